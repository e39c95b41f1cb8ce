"""Converts and compiles models that are shapes only, and reports what that took; see test_conversion.py.

A program of its own, so that it is timed without the type checks of the tests.

    python conversion.py CONFIG_JSON NUM_LAYERS...
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx

from lamina_jax.models import ModelConfig
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.runtime.executor import CacheConfig
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.pool import AttentionWorkerPool
from lamina_jax.runtime.split import SplitExecutor

BATCH = 8


def abstract(config: ModelConfig, dtype: str):
    """A model as a function, and its weights as shapes."""
    graph, state = abstract_model(config, dtype=dtype)
    return lambda state, *inputs: (nnx.merge(graph, state)(*inputs),), state


class Weightless(SplitExecutor):
    """Compiles without having weights: a program needs to know their shapes only."""

    def _weights_of(self, traced):
        return [[jnp.zeros(())] * len(traced.weight_vars)]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Notes what XLA compiles meanwhile."""
    events: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def convert(config: ModelConfig) -> dict[str, float]:
    """Traces, cuts and compiles the model for a decode step, as a run with 8 attention workers does.

    Returns:
        The numbers of slices, of their programs and of compilations, and the seconds that all processors together
        spent: on an idle machine no less than the time by the clock, and what others run does not count.
    """
    pool = mock.create_autospec(AttentionWorkerPool, instance=True)
    pool.names.return_value = [f"attention worker {i}" for i in range(8)]
    pool.configure.return_value = [(None,) * 4] * 8  # inboxes and outboxes of two batches
    start = time.process_time()
    executor = Weightless(
        Model(*abstract(config, "bfloat16")),
        CacheConfig(page_size=16, num_pages=8, kernel="xla"),
        pool,
        num_batches=2,
        replicas=[jax.sharding.SingleDeviceSharding(jax.devices()[0])],
        channel_kinds=["shm"] * 8,
        overlap=True,
        max_step_tokens=BATCH,
        timeout_s=60.0,
    )
    with contextlib.closing(executor), compilations() as compiled:
        jnp.zeros(()).block_until_ready()  # which compiles, too, at first
        compiled.clear()
        executor.prepare(Bucket(batch=BATCH, tokens=1, max_pages=8), num_batches=2)
        sliced = executor._sliced[BATCH, 1]
        return {
            "slices": sliced.num_slices,
            "programs": len(set(map(id, sliced._programs[0]))),
            "compiled": len(compiled),
            "seconds": time.process_time() - start,
        }


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    config = ModelConfig.from_file(sys.argv[1])
    print(json.dumps([convert(dataclasses.replace(config, num_layers=int(n))) for n in sys.argv[2:]]))


if __name__ == "__main__":
    main()
