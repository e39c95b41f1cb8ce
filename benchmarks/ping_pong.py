"""The two sides of a ping-pong as jitted programs."""

import jax
import jax.numpy as jnp

from lamina_jax.transport import Channel, Tag, make_stamp, recv, send


def spec(num_bytes: int) -> jax.ShapeDtypeStruct:
    """The tensor of a message of so many bytes, a multiple of 4."""
    return jax.ShapeDtypeStruct((num_bytes // 4,), jnp.float32)


def make_ping(tx: Channel, rx: Channel, rounds: int):
    """A compiled loop of `rounds` round trips. float32[n] -> float32[n]"""

    def body(_, carry):
        stamp, x = carry
        stamp = send([tx], stamp, [x], tag=Tag.Q)
        (x,), stamp = recv([rx], stamp, [jax.ShapeDtypeStruct(x.shape, x.dtype)], tag=Tag.ATTENDED)
        return stamp, x

    return jax.jit(lambda x: jax.lax.fori_loop(0, rounds, body, (make_stamp(0), x))[1], donate_argnums=0)


def make_pong(rx: Channel, tx: Channel, num_bytes: int, rounds: int):
    """A compiled loop that echoes `rounds` messages."""

    def body(_, stamp):
        (x,), stamp = recv([rx], stamp, [spec(num_bytes)], tag=Tag.Q)
        return send([tx], stamp, [x], tag=Tag.ATTENDED)

    return jax.jit(lambda: jax.lax.fori_loop(0, rounds, body, make_stamp(0)))
