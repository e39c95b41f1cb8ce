"""A small model that calls `attend`, and slices run one by one with plain attention between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lamina_jax.attention.attend import attend, causal_attention
from lamina_jax.partition import Ports, cut, trace

HIDDEN, HEADS, DIM = 16, 2, 8


def weights(num_layers, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.2, jnp.float32)  # noqa: E731
    return [{name: draw(HIDDEN, HIDDEN) for name in "qkvo"} for _ in range(num_layers)]


def layer(w, x):
    q, k, v = ((x @ w[name]).reshape(*x.shape[:2], HEADS, DIM) for name in "qkv")
    return x + jax.nn.silu(attend(q, k, v, scale=0.3).reshape(x.shape) @ w["o"])


def model(params, x):
    for w in params:
        x = layer(w, x)
    return (x,)


def run_slices(parts, leaves, inputs):
    """Runs the slices one by one with plain causal attention between them, and notes the order of events."""
    values, sent, events = dict(enumerate(inputs)), [], []

    def recv():
        events.append("recv")
        site = parts.sites[events.count("recv") - 1]
        return causal_attention(*[sent.pop(0) for _ in range(3)], **dataclasses.asdict(site.params))

    def send_q(q):
        events.append("q")
        sent.append(q)

    def send_kv(k, v):
        events.append("kv")
        sent.extend((k, v))

    for step in parts.slices:
        program = parts.programs[step.program]
        reads = [values[i] for i in step.reads]
        writes = program.run([leaves[i] for i in step.weights], reads, Ports(recv, send_q, send_kv))
        values.update(zip(step.writes, writes, strict=True))
        for i in step.drops:
            del values[i]
    return [values[i] for i in parts.outputs], values, events


def check(fn, params, *inputs):
    """Cuts `fn`, runs the slices, and compares with `fn` itself. Returns the partition."""
    traced = trace(fn, params, *inputs)
    parts = cut(traced)
    leaves = traced.weights(jax.tree.leaves(params))
    outputs, left, events = run_slices(parts, leaves, jax.tree.leaves(inputs))
    for got, expected in zip(outputs, fn(params, *inputs), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert set(left) == set(parts.outputs)
    assert events == ["q", "kv", "recv"] * len(parts.sites)
    return parts
