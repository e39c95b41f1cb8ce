"""`attend`: the one primitive through which a model reaches attention, and where it is cut.

A model knows nothing of caches, steps or workers; it calls `attend` once per layer. What that means is decided
by whoever runs the traced model:

* as it stands (eager, `jit`, `grad`) it is causal self-attention over the T tokens given: training, references;
* `lamina_jax.partition.unsplit` replaces it with attention over a KV cache in the same program;
* `lamina_jax.partition.cut` removes it and leaves two slices, joined by channels to attention workers.
"""

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.interpreters import ad, mlir
from jaxtyping import Array, Float

# Errors about an attend should name the line of the model that calls it.
source_info_util.register_exclusion(__file__)

attend_p = jex_core.Primitive("attend")


def attend(
    q: Float[Array, "batch tokens num_heads head_dim"],
    k: Float[Array, "batch tokens num_kv_heads head_dim"],
    v: Float[Array, "batch tokens num_kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "batch tokens num_heads head_dim"]:
    """Attention of the new tokens of one step over everything their sequences hold so far, themselves included.

    Args:
        q: queries of the step's new tokens, positions already encoded. Query head h reads KV head
            ``h // (num_heads // num_kv_heads)``.
        k, v: keys and values of the same tokens.
        scale: factor on the logits, usually ``head_dim ** -0.5``.

    Returns:
        The attention output, in q's dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit together.
    """
    _check(q, k, v)
    return attend_p.bind(q, k, v, scale=float(scale))


def causal_attention(q, k, v, *, scale: float):
    """Causal self-attention among the T tokens alone; scores and sums in float32. Shapes as in `attend`."""
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    mask = jnp.tril(jnp.ones((1, 1, 1, tokens, tokens), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores * scale, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def _check(q, k, v) -> None:
    if k.shape != v.shape or q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attend expects q [batch, tokens, num_heads, head_dim] and k, v [batch, tokens, num_kv_heads, "
            f"head_dim]; got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads; got {q.shape[2]} and {k.shape[2]}.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attend expects q, k and v of one dtype; got {q.dtype}, {k.dtype}, {v.dtype}.")


@attend_p.def_abstract_eval
def _abstract_eval(q, k, v, *, scale):
    del k, v, scale
    return ShapedArray(q.shape, q.dtype)


def _jvp(primals, tangents, *, scale):
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(lambda q, k, v: causal_attention(q, k, v, scale=scale), primals, tangents)


attend_p.def_impl(jax.jit(causal_attention, static_argnames="scale"))
ad.primitive_jvps[attend_p] = _jvp
mlir.register_lowering(attend_p, mlir.lower_fun(causal_attention, multiple_results=False))
