"""What CUDA channels promise where there is no GPU. What they do on one is in tests/gpu."""

import jax
import jax.numpy as jnp
import msgspec
import pytest

from lamina_jax.transport import ChannelAddress, Tag, attach, channel_class, cuda, fence, make_stamp, recv, send

needs_calls = pytest.mark.skipif(not cuda.cuda_calls_built(), reason="built without nvcc")
without_gpu = pytest.mark.skipif(cuda.cuda_device_count() > 0, reason="there is a GPU")
ADDRESS = ChannelAddress(kind="cuda_ipc", location="/proc/0/fd/3", num_slots=1, slot_bytes=64, creator_role="writer")


@without_gpu
@needs_calls
@pytest.mark.parametrize(("kind", "instead"), [("cuda_host", "'shm'"), ("cuda_ipc", "'shm', or 'cuda_host'")])
def test_no_gpu_says_what_to_use_instead(kind, instead):
    with pytest.raises(OSError, match=rf"{kind} needs a CUDA device; found none.*: use transport={instead}"):
        channel_class(kind).create(role="writer", peer="the peer", messages=[])


@without_gpu
@needs_calls
def test_no_gpu_to_attach_with():
    with pytest.raises(OSError, match="cuda_ipc needs a CUDA device; found none"):
        attach(ADDRESS, role="reader", peer="the peer")


@pytest.mark.parametrize("kind", ["cuda_host", "cuda_ipc"])
def test_built_without_cuda(kind, monkeypatch):
    monkeypatch.setattr(cuda, "_calls", None)
    assert not cuda.cuda_calls_built()
    assert cuda.cuda_device_count() == 0
    with pytest.raises(OSError, match=f"{kind} needs the custom calls of CUDA, .* where nvcc is on the PATH, or use"):
        channel_class(kind).create(role="writer", peer="the peer", messages=[])


def test_attach_to_another_kind():
    with pytest.raises(ValueError, match="expected an address of kind 'cuda_host', got 'cuda_ipc'"):
        cuda.CudaHostChannel.attach(ADDRESS, role="reader", peer="the peer")
    other = msgspec.structs.replace(ADDRESS, kind="cuda_host")
    with pytest.raises(ValueError, match="expected an address of kind 'cuda_ipc', got 'cuda_host'"):
        cuda.CudaIpcChannel.attach(other, role="reader", peer="the peer")


class _GpuEnd(cuda.CudaIpcChannel):
    """An end on a GPU that is not there: enough to lower a program."""

    def __init__(self, role):
        address = ChannelAddress(kind=self.kind, location="", num_slots=1, slot_bytes=4096, creator_role="writer")
        super().__init__(None, address, role=role, peer="the peer", device=0)

    @property
    def id(self):
        return 1 << 40

    @property
    def closed(self):
        return False


@needs_calls
def test_programs_lower_for_cuda_without_a_gpu():
    def program(stamp, x):
        stamp = send([_GpuEnd("writer")], stamp, [x], tag=Tag.Q)
        stamp, (x,) = fence(stamp, [x])
        (y,), stamp = recv([_GpuEnd("reader")], stamp, [jax.ShapeDtypeStruct((4,), jnp.float32)], tag=Tag.ATTENDED)
        return x + y, stamp

    lowered = jax.jit(program).trace(make_stamp(0), jnp.zeros(4)).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    for target in ("lamina_cuda_send", "lamina_fence", "lamina_cuda_recv"):
        assert text.count(f"@{target}(") == 1
