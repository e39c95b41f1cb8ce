"""`attend`: the one primitive through which a model reaches attention, and where it is cut.

A model knows nothing of caches, steps or workers; it calls `attend` once per layer. What that means is decided
by whoever runs the traced model:

* as it stands (eager, `jit`, `grad`) it is causal self-attention over the T tokens given: training, references;
* `lamina_jax.partition.unsplit` replaces it with attention over a KV cache in the same program;
* `lamina_jax.partition.cut` removes it and leaves two slices, joined by channels to attention workers.
"""

import dataclasses

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.interpreters import ad, mlir
from jaxtyping import Array, Float

from lamina_jax.attention.params import AttendParams

# Errors about an attend should name the line of the model that calls it.
source_info_util.register_exclusion(__file__)

attend_p = jex_core.Primitive("attend")


def attend(
    q: Float[Array, "batch tokens num_heads head_dim"],
    k: Float[Array, "batch tokens num_kv_heads head_dim"],
    v: Float[Array, "batch tokens num_kv_heads head_dim"],
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "batch tokens num_heads head_dim"]:
    """Attention of the new tokens of one step over everything their sequences hold so far, themselves included.

    Args:
        q: queries of the step's new tokens, positions already encoded. Query head h reads KV head
            ``h // (num_heads // num_kv_heads)``.
        k, v: keys and values of the same tokens.
        scale: factor on the scores, usually ``head_dim ** -0.5``.
        window: how many tokens a token sees, itself included (arXiv:2310.06825); None is all of them.
        soft_cap: the scaled scores become ``soft_cap * tanh(scores / soft_cap)`` before the mask (arXiv:2408.00118);
            None leaves them as they are.

    Returns:
        The attention output, in q's dtype.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or `window` or `soft_cap` is not positive.
    """
    _check(q, k, v)
    params = AttendParams(
        scale=float(scale),
        window=None if window is None else int(window),
        soft_cap=None if soft_cap is None else float(soft_cap),
    )
    return attend_p.bind(q, k, v, **dataclasses.asdict(params))


def causal_attention(q, k, v, *, scale: float, window: int | None = None, soft_cap: float | None = None):
    """Causal self-attention among the T tokens alone; scores and sums in float32. Arguments as in `attend`."""
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = jnp.arange(tokens)[:, None] - jnp.arange(tokens)[None, :]
    mask = (distance >= 0) & (distance < (tokens if window is None else window))
    weights = jax.nn.softmax(jnp.where(mask[None, None, None], scores, -jnp.inf), axis=-1)
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
def _abstract_eval(q, k, v, **params):
    del k, v, params
    return ShapedArray(q.shape, q.dtype)


def _jvp(primals, tangents, **params):
    tangents = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(lambda q, k, v: causal_attention(q, k, v, **params), primals, tangents)


attend_p.def_impl(jax.jit(causal_attention, static_argnames=("scale", "window", "soft_cap")))
ad.primitive_jvps[attend_p] = _jvp
mlir.register_lowering(attend_p, mlir.lower_fun(causal_attention, multiple_results=False))
