"""The two sides of a ping-pong, and of a stream of messages one way, as jitted programs."""

import jax
import jax.numpy as jnp

from lamina_jax.transport import Channel, Tag, make_stamp, recv, send


def spec(num_bytes: int) -> jax.ShapeDtypeStruct:
    """The tensor of a message of so many bytes, a multiple of 2."""
    return jax.ShapeDtypeStruct((num_bytes // 2,), jnp.float16)


def message(num_bytes: int) -> jax.Array:
    """What `make_ping` and `make_fill` are given: float16[num_bytes / 2]."""
    return jnp.ones(spec(num_bytes).shape, spec(num_bytes).dtype)


def make_ping(tx: Channel, rx: Channel, rounds: int):
    """A compiled loop of `rounds` round trips. float16[n] -> float16[n]"""

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


def make_fill(tx: Channel, count: int):
    """A compiled loop that sends a message `count` times. float16[n] -> stamp"""
    return jax.jit(
        lambda x: jax.lax.fori_loop(0, count, lambda _, stamp: send([tx], stamp, [x], tag=Tag.Q), make_stamp(0))
    )


def make_drain(rx: Channel, num_bytes: int, count: int):
    """A compiled loop that receives `count` messages. -> (float16[n], stamp), the last of them"""

    def body(_, carry):
        (x,), stamp = recv([rx], carry[1], [spec(num_bytes)], tag=Tag.Q)
        return x, stamp

    return jax.jit(lambda: jax.lax.fori_loop(0, count, body, (message(num_bytes), make_stamp(0))))
