"""What an attention kernel is: two partial attentions per layer, one of them over the paged cache."""

import abc

from jaxtyping import Array, Float, Int

from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.merge import Partial
from lamina_jax.attention.params import LayerParams


class AttentionKernel(abc.ABC):
    """Attention on one device for its share of the heads.

    Two calls instead of one, because q arrives first: the worker is over the cached pages while k and v are still
    being computed elsewhere. `lamina_jax.attention.merge` puts the two together. Scores and sums are float32.
    `params` are those of the layer, scalars.
    """

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
