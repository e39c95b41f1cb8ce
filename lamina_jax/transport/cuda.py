"""Channels of GPUs: to a CPU worker of the same host through pinned memory, and to another GPU of the host.

Importing this module registers the custom calls of `platform="CUDA"`. That needs no GPU, so programs can be compiled
ahead of time; making a GPU's end does.
"""

import contextlib
import errno
import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import ClassVar, Literal

import jax

from lamina_jax import _custom_calls
from lamina_jax.transport import cpu_calls
from lamina_jax.transport.base import (
    Channel,
    ChannelAddress,
    MessageSpec,
    Role,
    Tag,
    require_kind,
    require_wait,
    slot_room,
)
from lamina_jax.transport.ops import FENCE

SEND, RECV = "lamina_cuda_send", "lamina_cuda_recv"
"""The custom calls of every GPU's end."""


def _load_calls() -> ModuleType | None:
    """The compiled part, registered with XLA; None where it was not built."""
    try:
        calls = importlib.import_module("lamina_jax._cuda_calls")
    except ModuleNotFoundError:
        return None
    jax.ffi.register_ffi_target(SEND, calls.send_handler(), platform="CUDA")
    jax.ffi.register_ffi_target(RECV, calls.recv_handler(), platform="CUDA")
    jax.ffi.register_ffi_target(FENCE, calls.fence_handler(), platform="CUDA")
    for tag in Tag:
        calls.name_tag(int(tag), tag.label)
    return calls


_calls = _load_calls()


def cuda_calls_built() -> bool:
    """Whether this installation has the custom calls of CUDA; the build takes them along where it finds nvcc."""
    return _calls is not None


def cuda_device_count() -> int:
    """How many GPUs CUDA sees in this process; 0 also where the custom calls were not built."""
    return 0 if _calls is None else _calls.devices()[0]


def launch_count() -> int:
    """How many sends and recvs the host has launched, or captured, on GPUs. A graph's replays do not count."""
    return 0 if _calls is None else _calls.launch_count()


class _CudaChannel(Channel):
    """What the kinds share: an end that kernels of a GPU operate, or (cuda_host only) the CPU.

    What the CPU's custom calls raise when a program runs is known of a GPU's only after it has run: look at `failure`
    before you use results. From then on programs that are launched raise it, too.
    """

    kind: ClassVar[str]
    instead: ClassVar[str]
    """What to use where there is no GPU."""

    def __init__(self, handle, address: ChannelAddress, *, role: Role, peer: str, device: int | None):
        """Args:
        handle: a `_cuda_calls.DeviceHandle`, or for the CPU's end a `_custom_calls.ShmHandle`, which look alike.
        device: which GPU operates this end; None for the CPU.
        """
        super().__init__(
            role=role, peer=peer, num_slots=address.num_slots, slot_bytes=address.slot_bytes, device=device
        )
        self._handle = handle
        self._address = address

    @classmethod
    def _create_on_gpu(
        cls,
        device: int,
        *,
        role: Role,
        peer: str,
        messages: Sequence[MessageSpec],
        num_slots: int,
        slot_bytes: int | None,
        timeout_s: float,
    ):
        require_wait(timeout_s)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        calls = cls._require_device(device)
        with cuda_errors():
            handle = calls.DeviceHandle.create(
                kind=cls.kind,
                device=device,
                writer=role == "writer",
                peer=peer,
                num_slots=num_slots,
                slot_bytes=room,
                timeout_s=timeout_s,
            )
        return cls(handle, cls._address_of(handle, num_slots, room, role), role=role, peer=peer, device=device)

    @classmethod
    def _attach_on_gpu(cls, address: ChannelAddress, device: int, *, role: Role, peer: str, timeout_s: float):
        require_kind(address, cls.kind)
        require_wait(timeout_s)
        calls = cls._require_device(device)
        with cuda_errors():
            handle = calls.DeviceHandle.attach(
                kind=cls.kind,
                device=device,
                writer=role == "writer",
                peer=peer,
                path=address.location,
                num_slots=address.num_slots,
                slot_bytes=address.slot_bytes,
                timeout_s=timeout_s,
            )
        return cls(handle, address, role=role, peer=peer, device=device)

    @classmethod
    def _address_of(cls, handle, num_slots: int, slot_bytes: int, role: Role) -> ChannelAddress:
        return ChannelAddress(
            kind=cls.kind, location=handle.path, num_slots=num_slots, slot_bytes=slot_bytes, creator_role=role
        )

    @classmethod
    def _require_device(cls, device: int) -> ModuleType:
        if _calls is None:
            raise OSError(
                errno.ENODEV,
                f"{cls.kind} needs the custom calls of CUDA, which this installation lacks as it was built without "
                f"nvcc: install again where nvcc is on the PATH, or use {cls.instead}",
            )
        count, why_none = _calls.devices()
        if count == 0:
            why = f" ({why_none})" if why_none else ""
            raise OSError(errno.ENODEV, f"{cls.kind} needs a CUDA device; found none{why}: use {cls.instead}")
        if not 0 <= device < count:
            raise ValueError(f"expected device to be the number of a GPU, 0 to {count - 1}, got {device}")
        return _calls

    @property
    def address(self) -> ChannelAddress:
        return self._address

    @property
    def id(self) -> int:
        return self._handle.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        if self.device is None:
            return cpu_calls.TARGETS
        return {"send": SEND, "recv": RECV}

    @property
    def peer_pid(self) -> int | None:
        return self._handle.peer_pid or None

    @property
    def closed(self) -> bool:
        return self._handle.closed

    @property
    def failure(self) -> str | None:
        return self._handle.failure

    def abort(self) -> None:
        self._handle.abort()

    def close(self) -> None:
        self._handle.close()


class CudaHostChannel(_CudaChannel):
    """A ring in memory of the host, of which a GPU of this host operates one end or both, and a CPU the other.

    It is the ring of `ShmChannel`, mapped into the GPU. The CPU's end polls, as a GPU wakes nobody: flat out for
    `spin_us`, then with naps that grow from 5 to 200 us.
    """

    kind = "cuda_host"
    instead = "transport='shm'"

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
        device: int | None = 0,
        spin_us: float = cpu_calls.DEFAULT_SPIN_US,
    ) -> "CudaHostChannel":
        """Makes the ring and reserves its memory; see `Channel.create`.

        Args:
            role: The end to take.
            peer: What errors call the other end.
            messages: Every message that will travel.
            num_slots: Messages in flight before a send waits.
            slot_bytes: Bytes of tensors per slot; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.
            device: CUDA's number of the GPU whose programs will operate this end; None for the CPU's programs.
            spin_us: Microseconds that a wait of the CPU's end polls before it naps.

        Raises:
            OSError: There is no GPU, the installation has no CUDA, or memory is refused.
            ValueError: A message does not fit, or an argument is out of range.
        """
        if device is not None:
            return cls._create_on_gpu(
                device,
                role=role,
                peer=peer,
                messages=messages,
                num_slots=num_slots,
                slot_bytes=slot_bytes,
                timeout_s=timeout_s,
            )
        require_wait(timeout_s, spin_us)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        handle = _custom_calls.ShmHandle.create(
            writer=role == "writer",
            peer=peer,
            num_slots=num_slots,
            slot_bytes=room,
            timeout_s=timeout_s,
            spin_us=spin_us,
            polled=True,
        )
        return cls(handle, cls._address_of(handle, num_slots, room, role), role=role, peer=peer, device=None)

    @classmethod
    def attach(
        cls,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        timeout_s: float = 60.0,
        device: int | None = None,
        spin_us: float = cpu_calls.DEFAULT_SPIN_US,
    ) -> "CudaHostChannel":
        """Takes the free end, for the CPU unless `device` names a GPU; see `create` and `Channel.attach`."""
        if device is not None:
            return cls._attach_on_gpu(address, device, role=role, peer=peer, timeout_s=timeout_s)
        require_kind(address, cls.kind)
        require_wait(timeout_s, spin_us)
        handle = _custom_calls.ShmHandle.attach(
            writer=role == "writer",
            peer=peer,
            path=address.location,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            timeout_s=timeout_s,
            spin_us=spin_us,
        )
        return cls(handle, address, role=role, peer=peer, device=None)


class CudaIpcChannel(_CudaChannel):
    """A ring in the memory of the reader's GPU, which the writer's GPU reaches directly: on one host, with peer access.

    The two may be the same GPU. Two processes that share a GPU take turns on it, and a message waits for the reader's
    turn, unless CUDA's MPS lets both run at once.
    """

    kind = "cuda_ipc"
    instead = "transport='shm', or 'cuda_host' where one end has a GPU"

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
        device: int = 0,
    ) -> "CudaIpcChannel":
        """Makes the channel; see `Channel.create` and `CudaHostChannel.create`.

        A writer's first send waits on the host until the reader has attached, for `timeout_s` at most.
        """
        return cls._create_on_gpu(
            device,
            role=role,
            peer=peer,
            messages=messages,
            num_slots=num_slots,
            slot_bytes=slot_bytes,
            timeout_s=timeout_s,
        )

    @classmethod
    def attach(
        cls, address: ChannelAddress, *, role: Role, peer: str, timeout_s: float = 60.0, device: int = 0
    ) -> "CudaIpcChannel":
        """Takes the free end, for the GPU `device`; see `Channel.attach`."""
        return cls._attach_on_gpu(address, device, role=role, peer=peer, timeout_s=timeout_s)


@contextlib.contextmanager
def cuda_errors() -> Iterator[None]:
    """What CUDA refuses is an OSError, as with every other kind of channel."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.ENODEV, str(error)) from None
