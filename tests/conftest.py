"""Settings of every test: JAX refuses silent promotion, keeps what it compiled, and nothing may be left behind."""

import contextlib
import os
import shutil
import tempfile
import time

import jax
import jaxtyping
import psutil
import pytest
from hypothesis import HealthCheck, settings
from jax.extend import source_info_util

_SHM_LIMIT_S = 10.0
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_CACHE_FROM_S = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"

# Tests of GPU code need "cuda", or "cuda,cpu"; everything else runs on the CPU wherever it is.
PLATFORM = os.environ.get("LAMINA_TEST_PLATFORM", "cpu")
jax.config.update("jax_platforms", PLATFORM)
# For runs with several replicas of the model.
jax.config.update("jax_num_cpu_devices", 3)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

# The type checker wraps every function; JAX should look through it when it names source lines.
source_info_util.register_exclusion(os.path.dirname(jaxtyping.__file__))


def pytest_configure(config: pytest.Config) -> None:
    """One cache of compiled programs for all processes of this run: most start the same few models."""
    if PLATFORM == "cpu" and _CACHE not in os.environ:
        folder = tempfile.mkdtemp(prefix="lamina-tests-jax-cache-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        os.environ |= {_CACHE: folder, _CACHE_FROM_S: "0.05"}
    jax.config.update("jax_compilation_cache_dir", os.environ.get(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ.get(_CACHE_FROM_S, "1")))


def _workers() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie has ended, too
            if "lamina_jax.runtime.attention_worker" in child.cmdline():
                found.add(child.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """No test leaves a worker process or a file in /dev/shm."""
    workers, files = _workers(), set(os.listdir("/dev/shm"))
    yield
    assert _workers() <= workers, "attention workers still run"
    left = set(os.listdir("/dev/shm")) - files
    # A test beside this one has files, too, but only until both ends of a channel hold them.
    deadline = time.monotonic() + _SHM_LIMIT_S
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= set(os.listdir("/dev/shm"))
    assert not left
