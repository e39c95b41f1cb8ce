"""The stamp: int32[2] = (step, layer), threaded through every send and recv of a device.

It orders them (XLA keeps no other order between custom calls), it stands in every message header, and it is what an
error names. Each device counts for itself, from the first step on; the two ends of a channel compare.
"""

import jax
import jax.numpy as jnp


def first_stamp() -> jax.Array:
    """The stamp before any step."""
    return jnp.array([-1, 0], jnp.int32)


def next_step(stamp: jax.Array) -> jax.Array:
    """(step + 1, 0)."""
    return jnp.stack([stamp[0] + 1, jnp.zeros((), jnp.int32)])


def next_layer(stamp: jax.Array) -> jax.Array:
    """(step, layer + 1)."""
    return stamp + jnp.array([0, 1], jnp.int32)
