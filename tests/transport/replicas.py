"""Run by test_replicas.py, in a process of its own: channels between the CPU devices of one process."""

import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.transport import Channel, ShmChannel, Tag, attach, make_stamp, recv, send

SIZE = 512
PROGRAMS = 5
LAYERS = 4
VALUE = jax.ShapeDtypeStruct((4,), jnp.float32)


def connect() -> tuple[Channel, Channel]:
    """Both ends of a channel, writer first."""
    writer = ShmChannel.create(role="writer", peer="the other replica", messages=[], slot_bytes=4096, timeout_s=20)
    return writer, attach(writer.address, role="reader", peer="the other replica", timeout_s=20)


def work(stamp: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A matmul that depends on the stamp, and a stamp that depends on it: the next wait sits where the matmul ended."""
    x = x @ x + stamp[1].astype(jnp.float32)
    return stamp + jnp.asarray([0, 1, 0], jnp.int32) + (x[0, 0] * 0).astype(jnp.int32), x


def ping_pong() -> None:
    """Two devices pass a value to and fro, in several programs each."""
    first, second = jax.devices()
    (there, arrived), (back, returned) = connect(), connect()

    def leads(stamp, x):
        def layer(stamp, x):
            stamp = send([there], stamp, [x], tag=Tag.CONTEXT)
            (x,), stamp = recv([returned], stamp, [VALUE], tag=Tag.CONTEXT)
            return stamp + jnp.asarray([0, 1, 0], jnp.int32), x

        return jax.lax.fori_loop(0, LAYERS, lambda _, carry: layer(*carry), (stamp, x))

    def follows(stamp, scale):
        def layer(_, stamp):
            (x,), stamp = recv([arrived], stamp, [VALUE], tag=Tag.CONTEXT)
            stamp = send([back], stamp, [x + scale], tag=Tag.CONTEXT)
            return stamp + jnp.asarray([0, 1, 0], jnp.int32)

        return jax.lax.fori_loop(0, LAYERS, layer, stamp)

    put = lambda value, device: jax.device_put(np.asarray(value), device)  # noqa: E731
    one, two = put(make_stamp(0), first), put(make_stamp(0), second)
    x, scale = put(np.zeros(4, np.float32), first), put(np.float32(1), second)
    lead, follow = (jax.jit(f).lower(*a).compile() for f, a in ((leads, (one, x)), (follows, (two, scale))))

    def run_follower(stamp):
        for _ in range(PROGRAMS):
            stamp = follow(stamp, scale)
        return stamp

    # A thread for each device: XLA runs a program of fewer than 1000 flops in the thread that dispatches it.
    with ThreadPoolExecutor(1) as thread:
        followed = thread.submit(run_follower, two)
        for _ in range(PROGRAMS):
            one, x = lead(one, x)
        two = followed.result()
    np.testing.assert_array_equal(x, np.full(4, PROGRAMS * LAYERS, np.float32))
    assert two.tolist() == [0, PROGRAMS * LAYERS, 0]
    assert x.devices() == {first}


def all_but_one_blocked() -> None:
    """Every device but the last waits inside XLA; the matmul for which they wait must still find threads."""
    *waiting, last = jax.devices()
    channels = [connect() for _ in waiting]

    def wait(reader, stamp, x):
        def body(carry, _):
            stamp, x = work(*carry)
            _, stamp = recv([reader], stamp, [VALUE], tag=Tag.CONTEXT)
            return (stamp, x), None

        return jax.lax.scan(body, (stamp, x), None, length=LAYERS)[0]

    def compute(stamp, x):
        def body(carry, _):
            stamp, x = work(*carry)
            for writer, _ in channels:
                stamp = send([writer], stamp, [x[0, :4]], tag=Tag.CONTEXT)
            return (stamp, x), None

        return jax.lax.scan(body, (stamp, x), None, length=LAYERS)[0]

    programs = [lambda *a, reader=reader: wait(reader, *a) for _, reader in channels]
    arguments = [jax.device_put((np.asarray(make_stamp(0)), np.eye(SIZE, dtype=np.float32)), d) for d in jax.devices()]
    compiled = [jax.jit(f).lower(*a).compile() for f, a in zip([*programs, compute], arguments, strict=True)]
    results = [program(*a) for program, a in zip(compiled, arguments, strict=True)]
    assert {stamp.devices().pop() for stamp, _ in results} == {*waiting, last}
    for stamp, _ in results:
        assert stamp.tolist() == [0, LAYERS, 0]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
    {"ping_pong": ping_pong, "all_but_one_blocked": all_but_one_blocked}[sys.argv[1]]()
