"""What an attention kernel is: two partial attentions per layer, one of them over the paged cache."""

import abc
import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.merge import Partial
from lamina_jax.attention.params import LayerParams
from lamina_jax.attention.quantization import AUTO


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTarget:
    """Where a kernel is to run, and over what cache."""

    platform: str
    """As JAX names it for lowering: "cpu", "cuda", ..."""
    compute_capability: str | None = None
    """Of a CUDA device, such as "9.0"; None where it is not known."""
    dtype: str
    """Of queries, keys and values."""
    kv_cache_dtype: str = AUTO
    """How the cache holds them: a name in `quantization.STORED`."""
    head_dim: int
    page_size: int
    """Tokens in a page."""

    @classmethod
    def of_device(cls, device: Any, **cache: Any) -> "KernelTarget":
        """A `jax.Device`; `cache` are the other fields."""
        # JAX calls both kinds of GPU "gpu" where it lists devices; only CUDA's have a compute capability "x.y".
        capability = getattr(device, "compute_capability", None)
        if device.platform != "gpu":
            return cls(platform=device.platform, **cache)
        if capability is None or "gfx" in capability:
            return cls(platform="rocm", **cache)
        return cls(platform="cuda", compute_capability=capability, **cache)


class AttentionKernel(abc.ABC):
    """Attention on one device for its share of the heads.

    Two calls instead of one, because q arrives first: the worker is over the cached pages while k and v are still
    being computed elsewhere. `lamina_jax.attention.merge` puts the two together. Scores and sums are float32.
    `params` are those of the layer, scalars.
    """

    platforms: ClassVar[tuple[str, ...]]
    """JAX platforms (names for lowering) that the kernel runs on natively."""

    @classmethod
    def on(cls, device: Any) -> "AttentionKernel":
        """The kernel as it suits a `jax.Device`."""
        del device
        return cls()

    @classmethod
    def check(cls, target: KernelTarget) -> None:
        """Raises ValueError, with what to do, where the kernel does not run."""
        if target.platform not in cls.platforms:
            raise ValueError(
                f"{cls.__name__} runs on {', '.join(cls.platforms)}, but attention is to run on {target.platform}; use "
                "attention_kernel='auto'."
            )

    @abc.abstractmethod
    def attend_cached(
        self,
        q: Float[Array, "batch tokens num_heads head_dim"],
        cache: PagedCache,
        layer: Int[Array, ""],
        tables: StepTables,
        params: LayerParams,
    ) -> Partial:
        """Every new token over the `tables.context_lens` cached tokens of its sequence that are in its window.

        Column t of a sequence stands at position ``tables.context_lens + t``; none need be in its window.
        """

    @abc.abstractmethod
    def attend_new(
        self,
        q: Float[Array, "batch tokens num_heads head_dim"],
        k: Float[Array, "batch tokens num_kv_heads head_dim"],
        v: Float[Array, "batch tokens num_kv_heads head_dim"],
        params: LayerParams,
    ) -> Partial:
        """Every new token over the new tokens of its sequence up to itself (causal) that are in its window."""
