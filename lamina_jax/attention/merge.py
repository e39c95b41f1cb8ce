"""Attention over disjoint sets of tokens, put together exactly.

Chen et al., arXiv 2405.01814v2, section 4.2: with output A(I) and softmax denominator S(I) over an index set I,
``A(I1 u I2) = (A(I1) S(I1) + A(I2) S(I2)) / (S(I1) + S(I2))``. The running maximum is carried along so that no
exponential overflows; ``weighted`` below is A(I) S(I), so that merging needs no division.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Partial:
    """Attention over some set of tokens, not yet divided by its softmax denominator. All float32."""

    weighted: Float[Array, "batch tokens num_heads head_dim"]
    """Sum of ``exp(score - maximum) * value``."""
    maximum: Float[Array, "batch tokens num_heads"]
    """Largest score; -inf over an empty set."""
    denominator: Float[Array, "batch tokens num_heads"]
    """Sum of ``exp(score - maximum)``; 0 over an empty set."""

    @classmethod
    def of_scores(
        cls,
        scores: Float[Array, "batch num_kv_heads group tokens keys"],
        v: Float[Array, "batch keys num_kv_heads head_dim"],
        v_scales: Float[Array, "batch num_kv_heads keys"] | None = None,
    ) -> "Partial":
        """From scaled float32 scores, -inf where masked. A row may be masked everywhere.

        `v_scales` are factors on the values, of a quantized cache."""
        batch, num_kv_heads, group, tokens, _ = scores.shape
        maximum = scores.max(axis=-1)
        # exp(-inf - -inf) would be nan; any finite number gives the zero that an empty set needs.
        weights = jnp.exp(scores - jnp.where(jnp.isneginf(maximum), 0.0, maximum)[..., None])
        factors = weights if v_scales is None else weights * v_scales[:, :, None, None]
        weighted = jnp.einsum("bkgts,bskd->btkgd", factors.astype(v.dtype), v, preferred_element_type=jnp.float32)
        rows = (batch, tokens, num_kv_heads * group)
        by_token = lambda x: jnp.moveaxis(x, 3, 1).reshape(rows)  # noqa: E731
        return cls(
            weighted=weighted.reshape(*rows, v.shape[-1]),
            maximum=by_token(maximum),
            denominator=by_token(weights.sum(axis=-1)),
        )

    def output(self, dtype: DTypeLike) -> Float[Array, "batch tokens num_heads head_dim"]:
        """The attention output in `dtype`; zero over an empty set."""
        safe = jnp.where(self.denominator == 0.0, 1.0, self.denominator)
        return (self.weighted / safe[..., None]).astype(dtype)


def merge(a: Partial, b: Partial) -> Partial:
    """The attention over the union of two disjoint sets of tokens; either may be empty."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    pivot = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    scale_a, scale_b = jnp.exp(a.maximum - pivot), jnp.exp(b.maximum - pivot)
    return Partial(
        weighted=a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None],
        maximum=maximum,
        denominator=a.denominator * scale_a + b.denominator * scale_b,
    )
