"""What a KV cache may hold instead of the model's own numbers: one byte each, with a scale for every vector.

Every key and every value of a token and KV head has a scale of its own: the largest of its numbers over the largest
that the dtype has. That takes no calibration and clips nothing, and a token with large numbers does not make others
coarse, as one scale for a whole tensor would. It costs 4 bytes per vector (3 % at head_dim 128). A scale is a common
factor of its vector, so attention needs no dequantized vector: with stored ``k``, ``v`` and scales ``s``, ``r``

    score_j = s_j * (q . k_j),    output = sum_j (p_j * r_j) v_j

Both dtypes are subsets of bfloat16 and float16, so that converting them is exact.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Shaped

AUTO = "auto"
STORED: dict[str, str | None] = {AUTO: None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "int8": "int8"}
"""By the name that a user gives (vLLM's) the dtype that the cache holds; None is the model's."""
SCALE_DTYPE = jnp.float32
_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
"""Of int8, -128 is not used: scales are symmetric."""
_SMALLEST = float(np.finfo(np.float32).tiny) * 1024
"""A vector whose numbers are all below is stored as zeros: its scale, or what is divided by it, might be a subnormal
number, which devices flush to zero."""


def check_kv_cache_dtype(name: str) -> None:
    """Raises ValueError with the names there are unless `name` is one of STORED."""
    if name not in STORED:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(STORED)}, got {name!r}.")


def stored_dtype(kv_cache_dtype: str, dtype: DTypeLike) -> np.dtype:
    """What the cache of a model of `dtype` holds. Raises ValueError if there is no such `kv_cache_dtype`."""
    check_kv_cache_dtype(kv_cache_dtype)
    return jnp.dtype(STORED[kv_cache_dtype] or dtype)


def is_quantized(stored: DTypeLike) -> bool:
    """Whether numbers of this dtype have scales in a cache."""
    return jnp.dtype(stored).name in _LARGEST


def scale_bytes(stored: DTypeLike) -> int:
    """Bytes that a cached key or value has besides its numbers."""
    return jnp.dtype(SCALE_DTYPE).itemsize if is_quantized(stored) else 0


def quantize(
    x: Float[Array, "*vectors head_dim"], stored: DTypeLike
) -> tuple[Shaped[Array, "*vectors head_dim"], Float[Array, "*vectors"]]:
    """`x` as numbers of the dtype `stored` times scales (float32), rounded to nearest.

    The error is at most half a scale for int8; for fp8 it is 1/16 of the number, or 1/1024 of a scale near zero. A
    vector with a nan or an infinity has a scale that is not finite, so that it shows.
    """
    largest = _LARGEST[jnp.dtype(stored).name]
    x = x.astype(SCALE_DTYPE)
    amplitude = jnp.abs(x).max(axis=-1)
    scale = jnp.where(amplitude < _SMALLEST, jnp.ones_like(amplitude), amplitude / largest)
    # Dividing by a rounded quotient may end a bit above the largest number, and what is beyond e4m3fn's is nan.
    numbers = jnp.clip(x / scale[..., None], -largest, largest)
    if jnp.issubdtype(stored, jnp.integer):
        numbers = jnp.round(numbers)
    return numbers.astype(stored), scale
