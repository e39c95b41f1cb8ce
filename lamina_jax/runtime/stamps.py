"""The stamp: int32[3] = (step, layer, batch), threaded through every send and recv of a batch on a device.

It orders them (XLA keeps no other order between custom calls), it stands in every message header, it chooses the
channel, and it is what an error names. Each device counts for itself, from the first step on; the two ends of a channel
compare. A stamp is always computed from the one before: constants would cut the chain, and with it the order.
"""

import jax
import jax.numpy as jnp

from lamina_jax.transport import make_stamp


def first_stamp(batch: int | jax.Array = 0) -> jax.Array:
    """The stamp of a batch before any step."""
    return make_stamp(-1, 0, batch)


def next_step(stamp: jax.Array) -> jax.Array:
    """(step + 1, 0, batch)."""
    return jnp.stack([stamp[0] + 1, jnp.zeros((), jnp.int32), stamp[2]])


def next_layer(stamp: jax.Array) -> jax.Array:
    """(step, layer + 1, batch)."""
    return stamp + jnp.array([0, 1, 0], jnp.int32)
