"""Reliable connections of RDMA: completion queues, and queue pairs, made and connected.

pyverbs opens devices and registers memory, but does not say where the queues it made lie, which whoever posts and polls
from C++ or from a GPU must know. So queues are made by libibverbs through ctypes. Structures: infiniband/verbs.h of
rdma-core.
"""

import contextlib
import ctypes
import errno
import ipaddress
import os
from typing import Any, Final

import msgspec

_ETHERNET: Final = 2  # IBV_LINK_LAYER_ETHERNET
_RC: Final = 2  # IBV_QPT_RC
_INIT, _RTR, _RTS = 1, 2, 3  # enum ibv_qp_state
_MASK_INIT: Final = 1 << 0 | 1 << 3 | 1 << 4 | 1 << 5  # STATE, ACCESS_FLAGS, PKEY_INDEX, PORT
_MASK_RTR: Final = 1 << 0 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 15 | 1 << 17 | 1 << 20
_MASK_RTS: Final = 1 << 0 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13 | 1 << 16
LOCAL_WRITE, REMOTE_WRITE = 1, 2  # enum ibv_access_flags; never RELAXED_ORDERING: rings rely on order

MAX_RETRIES: Final = 6
"""How often a NIC sends again what is not acknowledged, before that is an error. With 7, Soft-RoCE goes on for ever."""


class QpAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a peer finds a queue pair. Plain data, for a control connection."""

    qpn: int
    psn: int
    lid: int
    gid: bytes
    mtu: int
    """A number of enum ibv_mtu: 1 is 256 bytes, 5 is 4096."""


class _Cap(ctypes.Structure):  # struct ibv_qp_cap
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("max_send_wr", "max_recv_wr", "max_send_sge", "max_recv_sge", "max_inline_data")
    ]


class _QpInitAttr(ctypes.Structure):  # struct ibv_qp_init_attr
    _fields_ = [
        ("qp_context", ctypes.c_void_p),
        ("send_cq", ctypes.c_void_p),
        ("recv_cq", ctypes.c_void_p),
        ("srq", ctypes.c_void_p),
        ("cap", _Cap),
        ("qp_type", ctypes.c_int),
        ("sq_sig_all", ctypes.c_int),
    ]


class _GlobalRoute(ctypes.Structure):  # struct ibv_global_route
    _fields_ = [
        ("dgid", ctypes.c_uint64 * 2),
        ("flow_label", ctypes.c_uint32),
        *((name, ctypes.c_uint8) for name in ("sgid_index", "hop_limit", "traffic_class")),
    ]


class _AhAttr(ctypes.Structure):  # struct ibv_ah_attr
    _fields_ = [
        ("grh", _GlobalRoute),
        ("dlid", ctypes.c_uint16),
        *((name, ctypes.c_uint8) for name in ("sl", "src_path_bits", "static_rate", "is_global", "port_num")),
    ]


class _QpAttr(ctypes.Structure):  # struct ibv_qp_attr
    _fields_ = [
        *((name, ctypes.c_int) for name in ("qp_state", "cur_qp_state", "path_mtu", "path_mig_state")),
        *((name, ctypes.c_uint32) for name in ("qkey", "rq_psn", "sq_psn", "dest_qp_num", "qp_access_flags")),
        ("cap", _Cap),
        ("ah_attr", _AhAttr),
        ("alt_ah_attr", _AhAttr),
        ("pkey_index", ctypes.c_uint16),
        ("alt_pkey_index", ctypes.c_uint16),
        *(
            (name, ctypes.c_uint8)
            for name in (
                "en_sqd_async_notify",
                "sq_draining",
                "max_rd_atomic",
                "max_dest_rd_atomic",
                "min_rnr_timer",
                "port_num",
                "timeout",
                "retry_cnt",
                "rnr_retry",
                "alt_port_num",
                "alt_timeout",
            )
        ),
        ("rate_limit", ctypes.c_uint32),
    ]


class _QpHead(ctypes.Structure):  # the start of struct ibv_qp
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("context", "qp_context", "pd", "send_cq", "recv_cq", "srq")),
        ("handle", ctypes.c_uint32),
        ("qp_num", ctypes.c_uint32),
    ]


class CompletionQueue:
    """A completion queue.

    Args:
        pd: a pyverbs PD of the device.
        depth: completions that it holds.
        wakes: with a channel on which to sleep until something completes.

    Raises:
        OSError: the NIC refuses.
    """

    def __init__(self, pd: Any, depth: int, *, wakes: bool):
        verbs = verbs_library()
        # The first field of struct ibv_pd is the context.
        context = ctypes.c_void_p(ctypes.cast(pd.pd, ctypes.POINTER(ctypes.c_void_p))[0])
        with contextlib.ExitStack() as undo:
            channel = None
            if wakes:
                made = verbs.ibv_create_comp_channel(context)
                channel = ctypes.c_void_p(_made(made, "ibv_create_comp_channel"))
                undo.callback(verbs.ibv_destroy_comp_channel, channel)
            made = verbs.ibv_create_cq(context, depth, None, channel, 0)
            self.pointer = _made(made, f"ibv_create_cq of {depth} entries")
            """To the `ibv_cq`."""
            undo.callback(verbs.ibv_destroy_cq, ctypes.c_void_p(self.pointer))
            self._undo = undo.pop_all()

    def close(self) -> None:
        """Gives it up; the queue pairs that complete here must be closed."""
        self._undo.close()


class RcQueuePair:
    """A queue pair of a reliable connection to one peer.

    Args:
        context: the pyverbs Context of the device.
        pd: a pyverbs PD of it.
        cq: pointer to the `ibv_cq` of both directions.
        port, gid_index: the port, and the address in its table to connect from.
        send_depth, recv_depth: requests that are in flight at most.
        max_inline: bytes that a request carries itself, at least.

    Raises:
        OSError: the NIC refuses.
    """

    def __init__(
        self,
        context: Any,
        pd: Any,
        cq: int,
        *,
        port: int,
        gid_index: int,
        send_depth: int,
        recv_depth: int = 1,
        max_inline: int = 8,
    ):
        self._context, self._port, self._gid_index = context, port, gid_index
        self._psn = int.from_bytes(os.urandom(3), "little")
        self._verbs = verbs_library()
        attr = _QpInitAttr(send_cq=cq, recv_cq=cq, qp_type=_RC, sq_sig_all=0)
        attr.cap = _Cap(
            max_send_wr=send_depth,
            max_recv_wr=recv_depth,
            max_send_sge=1,
            max_recv_sge=1,
            max_inline_data=max_inline,
        )
        made = self._verbs.ibv_create_qp(ctypes.c_void_p(pd.pd), ctypes.byref(attr))
        self.pointer = _made(made, f"ibv_create_qp with {send_depth} send requests")
        """To the `ibv_qp`."""
        self.max_inline = int(attr.cap.max_inline_data)
        """Bytes that a request carries itself at most."""

    @property
    def number(self) -> int:
        """By which NICs know the queue pair."""
        return ctypes.cast(self.pointer, ctypes.POINTER(_QpHead)).contents.qp_num

    @property
    def address(self) -> QpAddress:
        """What the peer passes to `connect`. Raises OSError if the port has no address."""
        port = self._context.query_port(self._port)
        gid = ipaddress.IPv6Address(self._context.query_gid(self._port, self._gid_index).gid).packed
        if port.link_layer == _ETHERNET and not any(gid):
            raise OSError(
                errno.EADDRNOTAVAIL,
                f"GID index {self._gid_index} of port {self._port} has no address; see `show_gids`",
            )
        return QpAddress(qpn=self.number, psn=self._psn, lid=port.lid, gid=gid, mtu=int(port.active_mtu))

    def initialize(self) -> None:
        """Lets the queue pair take receives. Raises OSError."""
        attr = _QpAttr(qp_state=_INIT, port_num=self._port, qp_access_flags=LOCAL_WRITE | REMOTE_WRITE)
        self._modify(attr, _MASK_INIT, "INIT")

    def connect(self, peer: QpAddress, *, timeout: int) -> None:
        """Makes the connection of an initialized queue pair; the peer must do the same with this address.

        Args:
            peer: the other queue pair.
            timeout: the NIC sends again after 4.096 us * 2^timeout without an acknowledgement, MAX_RETRIES times.

        Raises:
            OSError: the NIC refuses.
        """
        own = self.address
        attr = _QpAttr(qp_state=_RTR, path_mtu=min(own.mtu, peer.mtu))
        attr.dest_qp_num, attr.rq_psn, attr.min_rnr_timer, attr.max_dest_rd_atomic = peer.qpn, peer.psn, 12, 1
        attr.ah_attr.dlid, attr.ah_attr.port_num, attr.ah_attr.is_global = peer.lid, self._port, int(any(peer.gid))
        attr.ah_attr.grh.sgid_index, attr.ah_attr.grh.hop_limit = self._gid_index, 64
        ctypes.memmove(ctypes.addressof(attr.ah_attr.grh), peer.gid, 16)
        self._modify(attr, _MASK_RTR, "RTR")
        attr.qp_state, attr.sq_psn, attr.timeout = _RTS, own.psn, timeout
        attr.retry_cnt, attr.rnr_retry, attr.max_rd_atomic = MAX_RETRIES, 7, 1
        self._modify(attr, _MASK_RTS, "RTS")

    def _modify(self, attr: _QpAttr, mask: int, state: str) -> None:
        error = self._verbs.ibv_modify_qp(ctypes.c_void_p(self.pointer), ctypes.byref(attr), mask)
        if error:
            raise OSError(error, f"the queue pair does not become {state}: {os.strerror(error)}")

    def close(self) -> None:
        """Ends the connection."""
        self._verbs.ibv_destroy_qp(ctypes.c_void_p(self.pointer))


def verbs_library() -> ctypes.CDLL:
    """libibverbs, the one that pyverbs has loaded if it has. Raises ImportError if there is none."""
    try:
        library = ctypes.CDLL("libibverbs.so.1", use_errno=True)
    except OSError as error:
        raise ImportError(f"RDMA needs rdma-core's libibverbs.so.1 (Debian: ibverbs-providers): {error}") from error
    for name in ("ibv_create_comp_channel", "ibv_create_cq", "ibv_create_qp"):
        getattr(library, name).restype = ctypes.c_void_p
    return library


def _made(pointer: int | None, what: str) -> int:
    if not pointer:
        error = ctypes.get_errno()
        raise OSError(error, f"{what} failed: {os.strerror(error)}")
    return pointer
