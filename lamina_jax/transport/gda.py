"""Channels between GPUs of different hosts: GPU-initiated RDMA over mlx5 NICs, no CPU in between.

**Never run on hardware**: `docs/gpu.md` says what of it was tested against what. Importing this module registers the
custom calls of `platform="CUDA"`. That needs no GPU and no NIC, so programs can be compiled ahead of time.
"""

import contextlib
import errno
import importlib
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Literal

import jax
import msgspec

from lamina_jax.transport import cuda  # registers the fence of CUDA programs
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
from lamina_jax.transport.gda_link import GdaEnd, Link, RegionAddress
from lamina_jax.transport.rc_queue_pair import QpAddress
from lamina_jax.transport.rdma_devices import choose_port

KIND = "gda"
SEND, RECV = "lamina_gda_send", "lamina_gda_recv"


def _load_calls() -> ModuleType | None:
    """The compiled part, registered with XLA; None where it was not built."""
    try:
        calls = importlib.import_module("lamina_jax._gda_calls")
    except ModuleNotFoundError:
        return None
    jax.ffi.register_ffi_target(SEND, calls.send_handler(), platform="CUDA")
    jax.ffi.register_ffi_target(RECV, calls.recv_handler(), platform="CUDA")
    for tag in Tag:
        calls.name_tag(int(tag), tag.label)
    return calls


_calls = _load_calls()


class _Location(msgspec.Struct, frozen=True, kw_only=True):
    """What `ChannelAddress.location` holds, as JSON: the way to one end."""

    link: QpAddress
    region: RegionAddress


class GdaChannel(Channel):
    """A ring in the memory of two GPUs that their NICs write to, over a connection of its own.

    Both ends have to know each other's queue pair and memory, so the creator connects to the other's `answer`.

    As with every channel of a GPU, failures of a program are known after it has run (`failure`). That the peer is dead
    is known from the NIC, whose WRITEs nobody acknowledges any more: operations that wait, to receive or for room, post
    one every 250 ms to find out, so they end within two seconds. An end that nobody uses notices nothing.
    """

    needs_answer = True

    def __init__(
        self, link: Link, end: GdaEnd, address: ChannelAddress, *, role: Role, peer: str, device: int, attached: bool
    ):
        super().__init__(
            role=role,
            peer=peer,
            num_slots=address.num_slots,
            slot_bytes=address.slot_bytes,
            device=device,
            attached=attached,
        )
        self._link = link
        self._end = end
        self._address = address
        self._closing = threading.Lock()
        self._closed = False

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
        nic: str | None = None,
    ) -> "GdaChannel":
        """Makes the ring and one end of the connection; see `Channel.create`.

        Args:
            role: The end to take.
            peer: What errors call the other end.
            messages: Every message that will travel.
            num_slots: Messages in flight before a send waits.
            slot_bytes: Bytes of tensors per slot, below 2 GB; None takes the largest of `messages`.
            timeout_s: Seconds that one send or recv waits at most.
            device: CUDA's number of the GPU whose programs will operate this end.
            nic: The NIC to use, e.g. "mlx5_0"; None takes the one nearest to the GPU.

        Raises:
            OSError: GPU, NIC, pyverbs or the build with CUDA is missing, or one of them refuses.
            ValueError: A message does not fit, or an argument is out of range.
        """
        require_wait(timeout_s)
        room = slot_room(messages, num_slots=num_slots, slot_bytes=slot_bytes)
        with _opened(device, nic, role=role, peer=peer, num_slots=num_slots, slot_bytes=room, timeout_s=timeout_s) as (
            link,
            end,
        ):
            address = ChannelAddress(
                kind=KIND, location=_located(link, end), num_slots=num_slots, slot_bytes=room, creator_role=role
            )
        return cls(link, end, address, role=role, peer=peer, device=device, attached=False)

    @classmethod
    def attach(
        cls,
        address: ChannelAddress,
        *,
        role: Role,
        peer: str,
        timeout_s: float = 60.0,
        device: int = 0,
        nic: str | None = None,
    ) -> "GdaChannel":
        """Takes the free end, for the GPU `device`; see `create` and `Channel.attach`."""
        require_kind(address, KIND)
        require_wait(timeout_s)
        there = _parsed(address, peer)
        sizes = {"num_slots": address.num_slots, "slot_bytes": address.slot_bytes}
        with _opened(device, nic, role=role, peer=peer, timeout_s=timeout_s, **sizes) as (link, end):
            link.connect(there.link)
            end.connect(there.region)
        return cls(link, end, address, role=role, peer=peer, device=device, attached=True)

    @property
    def address(self) -> ChannelAddress:
        return self._address

    @property
    def answer(self) -> ChannelAddress | None:
        if self._address.creator_role == self.role:
            return None
        return msgspec.structs.replace(self._address, location=_located(self._link, self._end))

    def _connect(self, answer: ChannelAddress) -> None:
        there = _parsed(answer, self.peer)
        with _refusals():
            self._link.connect(there.link)
            self._end.connect(there.region)

    @property
    def id(self) -> int:
        return self._end.id

    @property
    def targets(self) -> dict[Literal["send", "recv"], str]:
        return {"send": SEND, "recv": RECV}

    @property
    def peer_pid(self) -> None:
        return None

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def failure(self) -> str | None:
        return self._end.failure

    def abort(self) -> None:
        self._end.abort()

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._end.close()
            self._link.close()


@contextlib.contextmanager
def _opened(
    device: int,
    nic: str | None,
    *,
    role: Role,
    peer: str,
    num_slots: int,
    slot_bytes: int,
    timeout_s: float,
) -> Iterator[tuple[Link, GdaEnd]]:
    """A connection and the end on it, which are closed again if what is done with them fails."""
    with _refusals(), contextlib.ExitStack() as undo:
        port = choose_port(_bus_id(device), nic=nic)
        link = Link(device=port.nic, gpu=device, port=port.port, gid_index=port.gid_index)
        undo.callback(link.close)
        end = GdaEnd(link, role=role, peer=peer, num_slots=num_slots, slot_bytes=slot_bytes, timeout_s=timeout_s)
        undo.callback(end.close)
        yield link, end
        undo.pop_all()


def _bus_id(device: int) -> str:
    if _calls is None:
        raise OSError(
            errno.ENODEV,
            "gda needs the custom calls of CUDA, which this installation lacks as it was built without nvcc: install "
            "again where nvcc is on the PATH",
        )
    return _calls.pci_bus_id(device)


def _located(link: Link, end: GdaEnd) -> str:
    return msgspec.json.encode(_Location(link=link.address, region=end.address)).decode()


def _parsed(address: ChannelAddress, peer: str) -> _Location:
    try:
        return msgspec.json.decode(address.location, type=_Location)
    except msgspec.DecodeError as error:
        raise ValueError(
            f"expected how to reach {peer}'s end of a gda channel, got {address.location!r}: {error}"
        ) from None


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What is missing, and what CUDA or rdma-core refuses, is an OSError, as with every other kind of channel."""
    try:
        with cuda.cuda_errors():
            yield
    except ImportError as error:
        raise OSError(errno.ENODEV, str(error)) from error
    except Exception as error:
        # pyverbs may not be there to name its exceptions, which share no base with Python's own.
        if not type(error).__module__.startswith("pyverbs"):
            raise
        raise OSError(getattr(error, "error_code", errno.EIO), f"gda: {error}") from error
