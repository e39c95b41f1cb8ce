"""Set-up of GPU-initiated RDMA on mlx5: queue pairs, registered GPU memory, and the ends of channels on top.

**Never run on hardware.** What is below this file (`custom_calls/cuda/gda_*.h`: WQEs, doorbells, completions, rings) is
tested against a software NIC; this file, which asks a real one for its queues, has not met one.

Queue pairs are made as for every RDMA channel (`rc_queue_pair.py`), then `mlx5dv_init_obj` is asked where the send
queue, its doorbell record and its doorbell lie. Structures: infiniband/mlx5dv.h of rdma-core.

A `Link` is one reliable connection to one peer; any number of channels, both ways, share it:

    link = Link(device="mlx5_0", gpu=0)            # both sides
    link.connect(peer_link_address)                # what the peer's link.address said
    end = GdaEnd(link, role="writer", peer="attention worker 0", num_slots=8, slot_bytes=65536)
    end.connect(peer_region_address)               # what the peer's end.address said

The addresses travel over whatever control connection there is.
"""

import ctypes
import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import msgspec
from absl import logging

from lamina_jax.transport.base import Role
from lamina_jax.transport.rc_queue_pair import LOCAL_WRITE, REMOTE_WRITE, CompletionQueue, QpAddress, RcQueuePair

MAX_LOG_WQES = 15
"""WQE counters have 16 bits, and half of their range must be enough to tell what has completed."""

# A retry after 4.096 us * 2^13 = 34 ms, six times: a dead peer is an error after 0.25 s. A NIC may take four times as
# long, 1 s, which leaves room for a probe (kProbeNs) in the two seconds that a channel has.
_RETRY_TIMEOUT = 13
_OBJ_QP, _OBJ_CQ = 1, 2  # enum mlx5dv_obj_type


class RegionAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where a peer finds the memory of a `GdaEnd`, and what it holds. Plain data, for a control connection."""

    region: int
    rkey: int
    num_slots: int
    slot_bytes: int
    role: Role


class _Ring(ctypes.Structure):
    _fields_ = [("buf", ctypes.c_void_p), ("wqe_cnt", ctypes.c_uint32), ("stride", ctypes.c_uint32)]


class _DvQp(ctypes.Structure):  # struct mlx5dv_qp
    _fields_ = [
        ("dbrec", ctypes.c_void_p),
        ("sq", _Ring),
        ("rq", _Ring),
        ("bf_reg", ctypes.c_void_p),
        ("bf_size", ctypes.c_uint32),
        ("comp_mask", ctypes.c_uint64),
        ("uar_mmap_offset", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("tirn", "tisn", "rqn", "sqn")),
        ("tir_icm_addr", ctypes.c_uint64),
    ]


class _DvCq(ctypes.Structure):  # struct mlx5dv_cq
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("dbrec", ctypes.c_void_p),
        ("cqe_cnt", ctypes.c_uint32),
        ("cqe_size", ctypes.c_uint32),
        ("cq_uar", ctypes.c_void_p),
        ("cqn", ctypes.c_uint32),
        ("comp_mask", ctypes.c_uint64),
    ]


class _DvObj(ctypes.Structure):  # struct mlx5dv_obj: in and out pointers of qp, cq, srq, rwq, dm, ah, pd
    _fields_ = [("pointers", ctypes.c_void_p * 14)]


def _module(name: str, needed: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"gda channels need {needed}; {name} cannot be imported ({error})") from error


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name, use_errno=True)
    except OSError as error:
        raise ImportError(f"gda channels need rdma-core's {name} (Debian: ibverbs-providers): {error}") from error


@functools.cache
def _say_that_cpu_posts(gpu: int) -> None:
    """Once for each GPU of the process, however many connections it has."""
    logging.warning(
        "GPU %d cannot reach the doorbell of its NIC: a CPU thread posts its sends, so messages take longer. Setting "
        'NVreg_RegistryDwords="PeerMappingOverride=1;" of the NVIDIA driver usually helps.',
        gpu,
    )


def _calls() -> Any:
    return _module("lamina_jax._gda_calls", "lamina_jax built where nvcc is found")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _log2(value: int, name: str) -> int:
    _require(value > 0 and value & (value - 1) == 0, f"{name} must be a power of two, got {value}")
    return value.bit_length() - 1


class Link:
    """A reliable connection of one GPU to one peer, over one queue pair of one port of an mlx5 NIC.

    Raises:
        ImportError: pyverbs, rdma-core or the CUDA build of the custom calls is missing.
        ValueError: An argument is out of range.
        OSError: The NIC refuses.
    """

    def __init__(self, *, device: str, gpu: int, port: int = 1, gid_index: int = 3, num_wqes: int = 1024):
        _require(gpu >= 0, f"gpu must be CUDA's number of a GPU, got {gpu}")
        _require(port >= 1, f"port counts from 1, got {port}")
        _require(gid_index >= 0, f"gid_index must not be negative, got {gid_index}")
        log_wqes = _log2(num_wqes, "num_wqes")
        _require(4 <= log_wqes <= MAX_LOG_WQES, f"num_wqes must be 16 to {1 << MAX_LOG_WQES}, got {num_wqes}")
        self.gpu = gpu
        self._calls = _calls()
        with ExitStack() as undo:
            self._context = _module("pyverbs.device", "the package pyverbs").Context(name=device)
            undo.callback(self._context.close)
            self.pd = _module("pyverbs.pd", "the package pyverbs").PD(self._context)
            undo.callback(self.pd.close)
            self._mlx5 = _library("libmlx5.so.1")
            cq = CompletionQueue(self.pd, num_wqes, wakes=False)
            undo.callback(cq.close)
            # One segment of data, or 8 bytes inline, make a WQE of one 64-byte block.
            self._qp = RcQueuePair(
                self._context, self.pd, cq.pointer, port=port, gid_index=gid_index, send_depth=num_wqes, max_inline=8
            )
            undo.callback(self._qp.close)
            self.queue = self._describe_queue(cq.pointer)
            undo.callback(self.queue.close)
            self._undo = undo.pop_all()

    def _describe_queue(self, cq: int) -> Any:
        dv_qp, dv_cq, obj = _DvQp(), _DvCq(), _DvObj()
        obj.pointers[0], obj.pointers[1] = self._qp.pointer, ctypes.addressof(dv_qp)
        obj.pointers[2], obj.pointers[3] = cq, ctypes.addressof(dv_cq)
        error = self._mlx5.mlx5dv_init_obj(ctypes.byref(obj), ctypes.c_uint64(_OBJ_QP | _OBJ_CQ))
        if error:
            raise OSError(error, "mlx5dv_init_obj failed: is the device an mlx5 NIC?")
        _require(dv_cq.cqe_size == 64, f"expected completions of 64 bytes, got {dv_cq.cqe_size}; unset MLX5_CQE_SIZE")
        _require(dv_qp.sq.stride == 64, f"expected a send queue of 64-byte blocks, got {dv_qp.sq.stride}")
        queue = self._calls.GpuQueue.make(
            device=self.gpu,
            wqes=dv_qp.sq.buf,
            log_num_wqes=_log2(dv_qp.sq.wqe_cnt, "the number of WQEs of the driver"),
            record=dv_qp.dbrec,
            doorbell=dv_qp.bf_reg,
            cqes=dv_cq.buf,
            log_num_cqes=_log2(dv_cq.cqe_cnt, "the number of CQEs of the driver"),
            cq_record=dv_cq.dbrec,
            qpn=self._qp.number,
        )
        if queue.uses_proxy:
            _say_that_cpu_posts(self.gpu)
        return queue

    @property
    def address(self) -> QpAddress:
        """What the peer passes to `connect`. Raises OSError if the port has no address."""
        return self._qp.address

    def connect(self, peer: QpAddress) -> None:
        """Makes the connection; the peer must do the same with this link's address. Raises OSError."""
        self._qp.initialize()
        self._qp.connect(peer, timeout=_RETRY_TIMEOUT)

    def close(self) -> None:
        """Ends the connection. Close the ends on it first."""
        self._undo.close()


class GdaEnd:
    """One end of a channel over a `Link`: a ring in GPU memory that the peer's NIC writes to.

    `id` is what programs name in the attribute `channels` of the custom calls lamina_gda_send and lamina_gda_recv.

    Args:
        link: The connection to the peer.
        role: The end to take.
        peer: What errors call the other end.
        num_slots: Messages in flight before a send waits; the same at both ends.
        slot_bytes: Bytes of tensors per slot, a multiple of 64 below 2 GB; the same at both ends.
        timeout_s: Seconds that one send or recv waits at most.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: The GPU has no memory left, or does not order what the NIC writes.
        OSError: The NIC cannot register GPU memory.
    """

    def __init__(
        self, link: Link, *, role: Role, peer: str, num_slots: int = 8, slot_bytes: int, timeout_s: float = 60.0
    ):
        _require(num_slots >= 1, f"num_slots must be at least 1, got {num_slots}")
        _require(
            slot_bytes > 0 and slot_bytes % 64 == 0 and slot_bytes < (1 << 31) - 64,
            f"slot_bytes must be a multiple of 64 below 2 GB, got {slot_bytes}",
        )
        _require(timeout_s > 0, f"timeout_s must be positive, got {timeout_s}")
        self.role: Role = role
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._link = link
        self._end = _calls().GpuEnd.make(
            device=link.gpu,
            writer=role == "writer",
            peer=peer,
            num_slots=num_slots,
            slot_bytes=slot_bytes,
            timeout_s=timeout_s,
        )
        with ExitStack() as undo:
            undo.callback(self._end.close)
            self._memory_region, self._nic_address = self._register()
            undo.pop_all()

    def _register(self) -> tuple[Any, int]:
        """The memory region, and the address by which the NIC knows its start.

        As a dmabuf where kernel and driver have it, else by address, which needs the kernel module nvidia-peermem.
        """
        mr = _module("pyverbs.mr", "the package pyverbs")
        access = LOCAL_WRITE | REMOTE_WRITE
        with _exported(self._end) as fd:
            if fd < 0:
                by_address = mr.MR(self._link.pd, self._end.region_bytes, access, address=self._end.region)
                return by_address, self._end.region
            # pyverbs gives a dmabuf's memory region the I/O address of its offset, which is 0.
            return mr.DmaBufMR(self._link.pd, self._end.region_bytes, access, dmabuf=fd), 0

    @property
    def address(self) -> RegionAddress:
        """What the peer passes to `connect`."""
        return RegionAddress(
            region=self._nic_address,
            rkey=self._memory_region.rkey,
            num_slots=self.num_slots,
            slot_bytes=self.slot_bytes,
            role=self.role,
        )

    def connect(self, peer: RegionAddress) -> None:
        """Names the memory of the other end. Raises ValueError if that is not the other end of such a ring."""
        own = self.address
        _require(peer.role != own.role, f"expected the other end of the channel, got another {peer.role}")
        for name in ("num_slots", "slot_bytes"):
            mine, theirs = getattr(own, name), getattr(peer, name)
            _require(mine == theirs, f"the ends differ in {name}: expected {mine}, got {theirs}")
        self._end.connect(
            queue=self._link.queue,
            nic_address=self._nic_address,
            lkey=self._memory_region.lkey,
            peer_region=peer.region,
            peer_rkey=peer.rkey,
        )

    @property
    def id(self) -> int:
        return self._end.id

    @property
    def failure(self) -> str | None:
        """The first failure of this end, in words, or None."""
        return self._end.failure or None

    def abort(self) -> None:
        """Makes every operation of both ends fail, those that wait now and all later ones."""
        self._end.abort()

    def close(self) -> None:
        """Gives the end up. The peer may still receive what was sent."""
        self._end.close()
        self._memory_region.close()


@contextmanager
def _exported(end: Any) -> Iterator[int]:
    fd = end.export_dmabuf()
    try:
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)
