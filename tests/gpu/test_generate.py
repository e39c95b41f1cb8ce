"""Text from a model whose slices, attention, or both are on a GPU: the tokens that transformers computed on a CPU.

Each run is a process of its own, so that it takes its GPU's memory anew, and a hang is only its own. Where model and
attention are both on a GPU and there is only one, two processes share it and take turns: tiny, and few tokens. Rows on
the CPU show, where there is no GPU, that the test itself works.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint
from lamina_jax.transport import cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LENGTHS = (1, 17, 45)
MAX_TOKENS = 32
SETTINGS = {
    "max_num_seqs": 4,
    "min_batch_seqs": 1,
    "max_model_len": 128,
    "max_prefill_tokens": 64,
    "timeout_s": 30.0,
}
GPU_MEMORY = {"model_memory_fraction": 0.1, "attention_memory_fraction": 0.1}
BFLOAT16_TOLERANCE = 0.3
"""Of a logit, as in tests/test_exact.py."""

needs_gpu = pytest.mark.skipif(cuda.cuda_device_count() == 0, reason="needs a GPU and a build with nvcc")


def generate(checkpoint: Path, prompts: list[list[int]], *, max_tokens: int = MAX_TOKENS, **settings) -> dict:
    """What generate_peer.py prints."""
    on_gpu = settings["model_platform"] == "cuda"
    order = {
        "checkpoint": str(checkpoint),
        "prompts": prompts,
        "max_tokens": max_tokens,
        "settings": SETTINGS | (GPU_MEMORY if on_gpu else {}) | settings,
    }
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"JAX_PLATFORMS": "cuda,cpu" if on_gpu else "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, str(HERE / "generate_peer.py"), json.dumps(order)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def settings(model: str, attention: str, workers: int, num_batches: int = 1) -> dict:
    return {
        "model_platform": model,
        "attention_platform": attention,
        "num_attention_workers": workers,
        "num_batches": num_batches,
    }


@pytest.fixture(scope="module")
def big_heads(tmp_path_factory) -> tuple[Path, list[list[int]], list[float]]:
    """A checkpoint with heads of 64, a prompt, and its logits in float32 on the CPU."""
    checkpoint = tmp_path_factory.mktemp("big-heads")
    write_tiny_checkpoint(checkpoint, dataclasses.replace(TINY_CONFIGS["gqa"], head_dim=64), seed=3)
    prompts = [np.random.default_rng(0).integers(0, 256, 45).tolist()]
    exact = generate(checkpoint, prompts, max_tokens=1, **settings("cpu", "cpu", 0), dtype="float32")
    return checkpoint, prompts, exact["first_logits"]


RUNS = {
    "split on the CPU": settings("cpu", "cpu", 1, 2),
    "whole on a GPU": settings("cuda", "cpu", 0),
    "GPU and CPU, n = 1": settings("cuda", "cpu", 1),
    "GPU and two CPU workers, n = 2": settings("cuda", "cpu", 2, 2),
    "two processes on a GPU, n = 1": settings("cuda", "cuda", 1),
    "two processes on a GPU, n = 2": settings("cuda", "cuda", 1, 2),
}


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=name, marks=needs_gpu if "GPU" in name else ()) for name, run in RUNS.items()]
)
def test_tokens_equal_transformers_in_float32(tmp_path, run):
    config = write_tiny_checkpoint(tmp_path, "gqa")
    with np.load(ROOT / "tests" / "goldens" / "gqa.npz") as golden:
        prompts = [golden[f"prompt_{n}"].tolist() for n in LENGTHS]
        expected = [golden[f"tokens_{n}"].tolist()[:MAX_TOKENS] for n in LENGTHS]
    got = generate(tmp_path, prompts, **run)
    assert got["tokens"] == expected
    assert got["again"] == expected
    if run["model_platform"] == "cuda" and run["num_attention_workers"]:
        # q and kv there, attention back. Without graphs the host launches every one; with them a few again, when XLA
        # finds buffers where it has not seen them before.
        per_step = 3 * config.num_layers * run["num_attention_workers"]
        messages = MAX_TOKENS * per_step * min(run["num_batches"], len(prompts))
        assert got["launches"] < messages / 2, f"{got['launches']} launches for {messages} messages: no graphs"


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(settings("cpu", "cpu", 1), id="CPU"),
        pytest.param(settings("cuda", "cpu", 0), id="whole on a GPU", marks=needs_gpu),
        pytest.param(settings("cuda", "cpu", 1), id="GPU and CPU", marks=needs_gpu),
    ],
)
def test_bfloat16_logits_are_near_float32(big_heads, run):
    """In pieces, so that the last one attends over cached pages; on a Hopper GPU with the kernel for it."""
    checkpoint, prompts, exact = big_heads
    pieces = {"max_prefill_tokens": 16, "dtype": "bfloat16"}
    got = generate(checkpoint, prompts, max_tokens=1, **run, **pieces)
    np.testing.assert_allclose(got["first_logits"], exact, atol=BFLOAT16_TOLERANCE, rtol=0)
    assert np.std(exact) > 3 * BFLOAT16_TOLERANCE
