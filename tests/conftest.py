"""Settings of every test: JAX refuses silent promotion, and nothing may be left behind."""

import os

import jax
import psutil
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves a worker process or a file in /dev/shm."""
    files = set(os.listdir("/dev/shm"))
    yield
    workers = [p.pid for p in psutil.Process().children(recursive=True) if "attention_worker" in " ".join(p.cmdline())]
    assert not workers, f"attention workers still run: {workers}"
    assert set(os.listdir("/dev/shm")) <= files
