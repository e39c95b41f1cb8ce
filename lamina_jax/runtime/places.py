"""Where the model lies, which channels lead from there to the attention workers, and what devices each process sees."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

PLATFORMS: Final = ("cpu", "cuda")
"""Where the model, or attention, can run."""

MODEL_AXIS: Final = "model"
"""The axis of a mesh of devices that share one model."""

AUTO_TRANSPORT: Final = "auto"

CACHE_SHARE_OF_GPU: Final = 0.85
"""Of the GPU memory that a worker may take, what its KV cache does; the rest is for the step."""

# From where the model runs to where attention does; "auto" is the first of each.
_CHANNEL_KINDS: Final[Mapping[tuple[str, str], Sequence[str]]] = {
    ("cpu", "cpu"): ("shm", "verbs", "tcp"),
    ("cuda", "cpu"): ("cuda_host",),
    ("cuda", "cuda"): ("cuda_ipc", "gda"),
}
# Of a GPU's memory, what its workers take together: the rest is the driver's, XLA's own and the loaded programs'.
_GPU_MEMORY_SHARE: Final = 0.9


def check_platforms(model_platform: str, attention_platform: str) -> None:
    """Raises ValueError if there is no such platform, or no channel from the one to the other."""
    for name, value in (("model_platform", model_platform), ("attention_platform", attention_platform)):
        if value not in PLATFORMS:
            raise ValueError(f"{name} must be one of {', '.join(PLATFORMS)}, got {value!r}.")
    if (model_platform, attention_platform) not in _CHANNEL_KINDS:
        known = "; ".join(f"{m} with attention on {a}" for m, a in _CHANNEL_KINDS)
        raise ValueError(
            f"there is no channel from a model on {model_platform} to attention on {attention_platform}; "
            f"there are: {known}."
        )


def channel_kind(model_platform: str, attention_platform: str, transport: str = AUTO_TRANSPORT) -> str:
    """The kind of channel that joins the two, for platforms that `check_platforms` lets pass.

    Args:
        transport: the kind asked for, or "auto".

    Raises:
        ValueError: that kind does not join these platforms.
    """
    suitable = _CHANNEL_KINDS[model_platform, attention_platform]
    if transport == AUTO_TRANSPORT:
        return suitable[0]
    if transport not in suitable:
        raise ValueError(
            f"transport {transport!r} does not lead from a model on {model_platform} to attention on "
            f"{attention_platform}; those that do: {', '.join((AUTO_TRANSPORT, *suitable))}."
        )
    return transport


def cluster_channel_kind(
    model_platform: str,
    attention_platform: str,
    transport: str,
    *,
    same_host: bool,
    rdma: tuple[str | None, str | None],
    rdma_problems: tuple[str, str] = ("", ""),
) -> tuple[str, str]:
    """The kind of channel between the model worker and an attention worker of a cluster, and why that one.

    Args:
        transport: the kind asked for, or "auto".
        same_host: whether the two can share memory.
        rdma: of the model worker and of the attention worker, what describes their RDMA device; None if there is none.
        rdma_problems: why there is none.

    Raises:
        ValueError: there is no such channel between them.
    """
    if (model_platform, attention_platform) != ("cpu", "cpu"):
        if not same_host:
            raise ValueError(
                f"a model on {model_platform} and attention on {attention_platform} must be on one host, as channels "
                "between hosts join CPUs so far"
            )
        kind = channel_kind(model_platform, attention_platform, transport)
        return kind, f"from {model_platform} to {attention_platform} of one host"
    sides = zip(("model worker", "attention worker"), rdma, rdma_problems, strict=True)
    lacking = " and ".join(f"the {side} has no RDMA device ({why})" for side, device, why in sides if device is None)
    if transport == "shm" and not same_host:
        raise ValueError("transport 'shm' joins workers that share memory, and these are on different hosts")
    if transport == "verbs" and lacking:
        raise ValueError(f"transport 'verbs' needs an RDMA device at both ends, but {lacking}")
    if transport != AUTO_TRANSPORT:
        return channel_kind(model_platform, attention_platform, transport), "as the cluster asks for"
    if same_host:
        return "shm", "as both are on one host"
    if lacking:
        return "tcp", f"as {lacking}"
    return "verbs", f"as both have an RDMA device ({' / '.join(map(str, rdma))})"


def model_places(platform: str, *, num_replicas: int, tensor_parallel_size: int) -> list[Sharding]:
    """Where each replica of the model lies: a device, or a mesh of `tensor_parallel_size` of them along MODEL_AXIS.

    Raises:
        ValueError: JAX was made for another platform, or has fewer devices and cannot be given more.
    """
    count = num_replicas * tensor_parallel_size
    if count > 1 and platform == "cpu":
        # Only heard before JAX has made its devices; the check below tells.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
    if jax.default_backend() != _backend(platform):
        raise ValueError(
            f"the model is to run on {platform}, but JAX's default platform is {jax.default_backend()!r}; set the "
            f"environment variable JAX_PLATFORMS={'cpu' if platform == 'cpu' else 'cuda,cpu'} before JAX starts."
        )
    devices = jax.devices()
    if len(devices) < count:
        advice = f"set the environment variable JAX_NUM_CPU_DEVICES={count}" if platform == "cpu" else "use fewer"
        raise ValueError(
            f"{num_replicas} replicas of the model over {tensor_parallel_size} devices each need {count} {platform} "
            f"devices, but JAX has {len(devices)}; {advice}."
        )
    if tensor_parallel_size == 1:
        return [SingleDeviceSharding(device) for device in devices[:num_replicas]]
    meshes = np.array(devices[:count]).reshape(num_replicas, tensor_parallel_size)
    return [NamedSharding(Mesh(each, (MODEL_AXIS,)), PartitionSpec()) for each in meshes]


def attention_environments(
    platform: str, *, num_workers: int, num_model_gpus: int, num_gpus: int, memory_fraction: float | None
) -> list[dict[str, str]]:
    """For each attention worker the environment variables that give it its devices: a GPU, and how much of its memory.

    Workers take the GPUs behind those of the model, in turn; where the model has them all, they share its GPUs.

    Args:
        num_gpus: how many this process sees.
        memory_fraction: of the GPU's memory; None shares out what the workers there take together.

    Raises:
        ValueError: there is no GPU.
    """
    if platform == "cpu":
        return [{"JAX_PLATFORMS": "cpu"}] * num_workers
    if num_gpus == 0:
        raise ValueError("attention is to run on cuda, but there is no GPU; use attention_platform='cpu'.")
    gpus = attention_gpus(num_workers, num_model_gpus=num_model_gpus, num_gpus=num_gpus)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(num_gpus)]
    return [
        {
            "JAX_PLATFORMS": "cuda,cpu",
            "CUDA_VISIBLE_DEVICES": names[gpu],
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{memory_fraction or _fair_share(gpu, gpus, num_model_gpus):.3f}",
        }
        for gpu in gpus
    ]


def model_memory_fraction(*, num_workers: int, num_model_gpus: int, num_gpus: int) -> float:
    """Of the memory of its GPUs, what the model may take where `num_workers` attention workers run on GPUs, too."""
    gpus = attention_gpus(num_workers, num_model_gpus=num_model_gpus, num_gpus=num_gpus) if num_gpus else []
    return min(_fair_share(gpu, gpus, num_model_gpus) for gpu in range(num_model_gpus))


def attention_gpus(num_workers: int, *, num_model_gpus: int, num_gpus: int) -> list[int]:
    """The GPU of each attention worker, counted among those that this process sees."""
    free = num_gpus - num_model_gpus
    return [num_model_gpus + i % free if free > 0 else i % num_gpus for i in range(num_workers)]


def device_bytes(device: Any) -> int | None:
    """Memory of a `jax.Device` that JAX may take in this process, where that is a GPU; None for a CPU."""
    return None if device.platform == "cpu" else (device.memory_stats() or {}).get("bytes_limit")


def _fair_share(gpu: int, attention: Sequence[int], num_model_gpus: int) -> float:
    return _GPU_MEMORY_SHARE / (attention.count(gpu) + (gpu < num_model_gpus))


def _backend(platform: str) -> str:
    return "gpu" if platform == "cuda" else platform
