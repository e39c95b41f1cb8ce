"""Channels between hosts over RDMA: each end's NIC writes to the other's memory, no kernel and no Python in between.

pyverbs (`make rdma`, or the extra `lamina_jax[rdma]`) and libibverbs set connections up; the custom calls then post and
poll themselves (`custom_calls/verbs_channel.h`). Any RDMA device with reliable connections will do, Soft-RoCE too.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Final, Literal

import msgspec

from lamina_jax import _custom_calls
from lamina_jax.transport.base import (
    Channel,
    ChannelAddress,
    MessageSpec,
    Role,
    require_kind,
    require_wait,
    slot_room,
)
from lamina_jax.transport.cpu_calls import TARGETS
from lamina_jax.transport.rc_queue_pair import LOCAL_WRITE, REMOTE_WRITE, CompletionQueue, QpAddress, RcQueuePair
from lamina_jax.transport.rdma_devices import RdmaPort, choose_verbs_port

KIND: Final = "verbs"

# Those that nobody closes are closed when the process exits: pyverbs cannot any more once modules are torn down.
_ends: "weakref.WeakSet[_End]" = weakref.WeakSet()

# 4.096 us * 2^15 = 134 ms, times 1 + 6: a dead peer is an error about a second after something is sent to it.
_RETRY_TIMEOUT: Final = 15
_MAX_INLINE: Final = 256
# More than a round trip with some work at the other end; to be woken by the NIC costs tens of microseconds.
_SPIN_US: Final = 1000.0
# Beside messages: words that say that the peer has stopped or sleeps, or ask whether it is there. Half of these
# receives may be used up before they are given back (`kReceiveBatch` in verbs_channel.cc).
_SPARE_REQUESTS: Final = 16


class _Location(msgspec.Struct, frozen=True, kw_only=True):
    """What `ChannelAddress.location` holds, as JSON: the way to one end."""

    host: str
    pid: int
    device: str
    queue_pair: QpAddress
    region: int
    rkey: int


@dataclasses.dataclass(frozen=True)
class _Device:
    """An open device; lives as long as the process, as channels come and go."""

    port: RdmaPort
    context: Any
    pd: Any

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"{self.port.nic} on {socket.gethostname()}"


class VerbsChannel(Channel):
    """A ring in the memory of two processes, each of which writes to the other's over a connection of its own.

    Both ends have to know each other's queue pair and memory, so the creator connects to the other's `answer`.

    An end learns that its peer is gone from its NIC, about a second after it next sends, and a waiting end sends every
    quarter of a second: then it fails, naming device and cause. A message counts as sent when the NIC has it all: the
    last ones of a process that is killed while they are on their way may be lost, which the reader is told.
    """

    needs_answer = True

    def __init__(
        self, end: "_End", address: ChannelAddress, *, role: Role, peer: str, device: int | None, attached: bool
    ):
        super().__init__(
            role=role,
            peer=peer,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            device=device,
            attached=attached,
        )
        self._end = end
        self._address = address

    @classmethod
    def create(
        cls,
        *,
        role: Role,
        peer: str,
        messages: Sequence[MessageSpec],
        num_slots: int = 8,
        slot_bytes: int | None = None,
        timeout_s: float = 60.0,
        spin_us: float = _SPIN_US,
        device: int | None = None,
        nic: str | None = None,
    ) -> "VerbsChannel":
        """Makes the ring and one end of the connection; see `Channel.create`.

        Args:
            role: The end to take.
            peer: What errors call the other end.
            messages: Every message that will travel.
            num_slots: Messages in flight before a send waits.
            slot_bytes: Bytes of tensors per slot, below 2 GB; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.
            spin_us: Microseconds that a wait polls before it sleeps; 20 at most after a wait that lasted longer.
            device: `jax.Device.local_hardware_id` of the one CPU device whose programs use this end; None for any.
            nic: The RDMA device to use, e.g. "mlx5_0"; None takes the environment variable LAMINA_RDMA_DEVICE's, or the
                first with an active port and an address.

        Raises:
            OSError: pyverbs, libibverbs or an RDMA device is missing, or refuses, e.g. to register so much memory.
            ValueError: A message does not fit, or an argument is out of range.
        """
        require_wait(timeout_s, spin_us)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        end = _End.make(
            role=role,
            peer=peer,
            num_slots=num_slots,
            slot_bytes=room,
            timeout_s=timeout_s,
            spin_us=spin_us,
            device=device,
            nic=nic,
        )
        address = ChannelAddress(
            kind=KIND, location=end.location, num_slots=num_slots, slot_bytes=room, creator_role=role
        )
        return cls(end, address, role=role, peer=peer, device=device, attached=False)

    @classmethod
    def attach(
        cls,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        timeout_s: float = 60.0,
        spin_us: float = _SPIN_US,
        nic: str | None = None,
    ) -> "VerbsChannel":
        """Takes the free end; see `create` and `Channel.attach`."""
        require_kind(address, KIND)
        require_wait(timeout_s, spin_us)
        there = _parsed(address, peer)
        if role == address.creator_role:
            raise ValueError(
                f"the {role} of the ring at {there.device} on {there.host} is already taken: expected no {role}, got "
                f"process {there.pid}"
            )
        end = _End.make(
            role=role,
            peer=peer,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            timeout_s=timeout_s,
            spin_us=spin_us,
            device=None,
            nic=nic,
        )
        try:
            end.connect(there, peer)
        except BaseException:
            end.close()
            raise
        return cls(end, address, role=role, peer=peer, device=None, attached=True)

    @property
    def address(self) -> ChannelAddress:
        return self._address

    @property
    def answer(self) -> ChannelAddress | None:
        if self._address.creator_role == self.role:
            return None
        return msgspec.structs.replace(self._address, location=self._end.location)

    def _connect(self, answer: ChannelAddress) -> None:
        self._end.connect(_parsed(answer, self.peer), self.peer)

    @property
    def id(self) -> int:
        return self._end.handle.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return TARGETS

    @property
    def peer_pid(self) -> int | None:
        return self._end.handle.peer_pid or None

    @property
    def closed(self) -> bool:
        return self._end.handle.closed

    @property
    def failure(self) -> str | None:
        return self._end.handle.failure

    def abort(self) -> None:
        self._end.handle.abort()

    def close(self) -> None:
        self._end.close()


class _End:
    """What one end has of its NIC: registered memory, a completion queue and a queue pair."""

    def __init__(self, device: _Device, handle: Any, cq: CompletionQueue, memory_region: Any, qp: RcQueuePair):
        self._device = device
        self.handle = handle
        self._cq = cq
        self._memory_region = memory_region
        self._qp = qp
        self._closing = threading.Lock()
        self._closed = False
        self._location = _Location(
            host=socket.gethostname(),
            pid=os.getpid(),
            device=device.port.nic,
            queue_pair=qp.address,
            region=handle.region,
            rkey=memory_region.rkey,
        )
        _ends.add(self)

    @classmethod
    def make(cls, *, role: Role, num_slots: int, slot_bytes: int, nic: str | None, device: int | None, **options: Any):
        """Takes memory and a queue pair that is ready to receive. Raises OSError."""
        if slot_bytes >= 1 << 31:
            raise ValueError(f"slot_bytes must be below 2 GB, got {slot_bytes}")
        opened = _open(nic or os.environ.get("LAMINA_RDMA_DEVICE"))
        send_depth, recv_depth = 2 * num_slots + _SPARE_REQUESTS, num_slots + _SPARE_REQUESTS
        with _refusals(opened.name, options["peer"]), contextlib.ExitStack() as undo:
            handle = _calls().create(
                writer=role == "writer",
                num_slots=num_slots,
                slot_bytes=slot_bytes,
                device=_custom_calls.ANY_DEVICE if device is None else device,
                **options,
            )
            undo.callback(handle.close)
            cq = CompletionQueue(opened.pd, send_depth + recv_depth, wakes=True)
            undo.callback(cq.close)
            with _memory_advice(handle.region_bytes):
                access = LOCAL_WRITE | REMOTE_WRITE
                region = _pyverbs("mr").MR(opened.pd, handle.region_bytes, access, address=handle.region)
            undo.callback(region.close)
            qp = RcQueuePair(
                opened.context,
                opened.pd,
                cq.pointer,
                port=opened.port.port,
                gid_index=opened.port.gid_index,
                send_depth=send_depth,
                recv_depth=recv_depth,
                max_inline=_MAX_INLINE,
            )
            undo.callback(qp.close)
            qp.initialize()
            handle.open(
                qp=qp.pointer,
                cq=cq.pointer,
                lkey=region.lkey,
                max_inline=qp.max_inline,
                send_depth=send_depth,
                recv_depth=recv_depth,
                where=opened.name,
                state_file=f"/sys/class/infiniband/{opened.port.nic}/ports/{opened.port.port}/state",
            )
            end = cls(opened, handle, cq, region, qp)
            undo.pop_all()
        return end

    @property
    def location(self) -> str:
        return msgspec.json.encode(self._location).decode()

    def connect(self, there: _Location, peer: str) -> None:
        with _refusals(self._device.name, peer):
            self._qp.connect(there.queue_pair, timeout=_RETRY_TIMEOUT)
        host = "" if there.host == self._location.host else there.host
        self.handle.connect(region=there.region, rkey=there.rkey, pid=there.pid, host=host)

    def __del__(self) -> None:
        # Nobody else knows its queues. What was never made completely was undone by `make`.
        if hasattr(self, "_location"):
            self.close()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self.handle.close()
            self._qp.close()
            self._memory_region.close()
            self._cq.close()


@atexit.register
def _close_all() -> None:
    for end in list(_ends):
        end.close()


def rdma_problem(nic: str | None = None) -> str | None:
    """Why this process could not use verbs channels, or None if it could.

    Args:
        nic: as of `VerbsChannel.create`.
    """
    try:
        _open(nic or os.environ.get("LAMINA_RDMA_DEVICE"))
        _calls()
    except OSError as error:
        return error.strerror or str(error)
    return None


def rdma_device(nic: str | None = None) -> str:
    """What the device that verbs channels use is called, e.g. "rxe0". Raises OSError if there is none."""
    return _open(nic or os.environ.get("LAMINA_RDMA_DEVICE")).port.nic


@functools.cache
def _open(nic: str | None) -> _Device:
    port = choose_verbs_port(nic)
    with _refusals(port.nic):
        context = _pyverbs("device").Context(name=port.nic)
        return _Device(port, context, _pyverbs("pd").PD(context))


def _calls() -> Any:
    if not hasattr(_custom_calls, "VerbsHandle"):
        raise OSError(
            errno.ENOSYS,
            "verbs channels need the custom calls of RDMA, which this installation lacks as it was built without "
            "infiniband/verbs.h: install libibverbs-dev (Debian) or rdma-core-devel and install lamina_jax again",
        )
    return _custom_calls.VerbsHandle  # pyright: ignore[reportAttributeAccessIssue]


def _pyverbs(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"pyverbs.{name}")
    except ImportError as error:
        raise OSError(
            errno.ENOSYS,
            f"verbs channels need pyverbs, which cannot be imported ({error}): run `make rdma`, or install "
            "lamina_jax[rdma] beside an rdma-core of the same version; see docs/deploy.md",
        ) from error


def _parsed(address: ChannelAddress, peer: str) -> _Location:
    try:
        return msgspec.json.decode(address.location, type=_Location)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"expected how to reach {peer}'s end of a verbs channel, got {address.location!r}: {error}"
        ) from None


@contextlib.contextmanager
def _refusals(device: str, peer: str | None = None) -> Iterator[None]:
    """What rdma-core refuses is an OSError that names the device, and the peer of a channel."""
    where = device if peer is None else f"{device}, channel to {peer}"
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{where}: {error.strerror or error}") from error
    except Exception as error:
        # pyverbs' exceptions share no base with Python's own, and it may not be there to name them.
        if not type(error).__module__.startswith("pyverbs"):
            raise
        raise OSError(getattr(error, "error_code", errno.EIO), f"{where}: {error}") from error


@contextlib.contextmanager
def _memory_advice(num_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OSError(
            getattr(error, "error_code", errno.ENOMEM),
            f"the NIC cannot register {num_bytes} bytes of memory: {error}. If `ulimit -l` is less, raise it (memlock "
            "in /etc/security/limits.conf, LimitMEMLOCK= of systemd)",
        ) from error
