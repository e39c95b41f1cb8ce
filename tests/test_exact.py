"""Generated tokens and logits, through every process and channel, against transformers (tests/goldens)."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTHS = (1, 2, 16, 17, 45, 129, 300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
BFLOAT16_TOLERANCE = 0.3
"""Largest difference of a bf16 logit from the float32 one. Measured: 0.24; the logits' standard deviation is 2."""


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes the directory of a tiny model by its name."""

    @functools.cache
    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        write_tiny_checkpoint(directory, name)
        return directory

    return make


def prompts(name: str) -> list[dict]:
    return [{"prompt_token_ids": golden(name)[f"prompt_{n}"].tolist()} for n in PROMPT_LENGTHS]


def expected_tokens(name: str) -> list[tuple[int, ...]]:
    return [tuple(golden(name)[f"tokens_{n}"].tolist()) for n in PROMPT_LENGTHS]


def tokens_of(outputs) -> list[tuple[int, ...]]:
    return [tuple(o.outputs[0].token_ids) for o in outputs]


class RecordedLogits:
    """Notes the logits of every step that an LLM runs, with the rows that counted."""

    def __init__(self, llm: LLM):
        self.steps: list[tuple[np.ndarray, jax.Array]] = []
        assert isinstance(llm._worker, ModelWorker)
        worker = llm._worker
        run = worker.run_with_logits

        def recorded(plans):
            results = run(plans)
            self.steps += [(plan.emits, logits) for plan, (_, logits) in zip(plans, results, strict=True)]
            return results

        worker.run_with_logits = recorded

    def rows(self) -> np.ndarray:
        """Logits [steps, vocab] of a single request."""
        return np.concatenate([np.asarray(logits)[emits] for emits, logits in self.steps])


# The architectures differ in the model's slices and in the attention of a worker, not in how work is divided.
COUNTS = {name: (0, 2) for name in ("mistral", "qwen2", "qwen3", "gemma2")}
WORKERS = [
    (name, n)
    for name, config in TINY_CONFIGS.items()
    for n in COUNTS.get(name, (0, 1, 2, 3))
    if n <= config.num_kv_heads
]


@pytest.mark.parametrize(("name", "num_attention_workers"), WORKERS)
def test_greedy_tokens_equal_transformers(checkpoint, name, num_attention_workers):
    with LLM(checkpoint(name), num_attention_workers=num_attention_workers) as llm:
        batch = llm.generate(prompts(name), GREEDY, use_tqdm=False)
        assert tokens_of(batch) == expected_tokens(name)
        assert all(o.outputs[0].finish_reason == "length" for o in batch)
        for prompt, n in zip(prompts(name), PROMPT_LENGTHS, strict=True):
            recorded = RecordedLogits(llm)
            (alone,) = llm.generate(prompt, GREEDY, use_tqdm=False)
            assert tokens_of([alone]) == [tuple(golden(name)[f"tokens_{n}"].tolist())]
            logits = recorded.rows()
            np.testing.assert_allclose(logits[0], golden(name)[f"first_logits_{n}"], atol=1e-4, rtol=0)
            np.testing.assert_allclose(logits[63], golden(name)[f"last_logits_{n}"], atol=1e-4, rtol=0)


def test_four_workers_equal_transformers(checkpoint):
    with LLM(checkpoint("mha"), num_attention_workers=4) as llm:
        assert tokens_of(llm.generate(prompts("mha"), GREEDY, use_tqdm=False)) == expected_tokens("mha")


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_bfloat16_logits_are_near_float32(checkpoint, name):
    workers = min(2, TINY_CONFIGS[name].num_kv_heads)
    with LLM(checkpoint(name), num_attention_workers=workers, dtype="bfloat16") as llm:
        for prompt, n in zip(prompts(name), PROMPT_LENGTHS, strict=True):
            recorded = RecordedLogits(llm)
            llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
            logits = recorded.rows()
            assert logits.dtype == jnp.float32
            np.testing.assert_allclose(logits[0], golden(name)[f"first_logits_{n}"], atol=BFLOAT16_TOLERANCE, rtol=0)


def test_prompts_in_pieces_and_small_pages_change_nothing(checkpoint):
    with LLM(checkpoint("gqa"), num_attention_workers=2, max_prefill_tokens=64, page_size=5) as llm:
        assert tokens_of(llm.generate(prompts("gqa"), GREEDY, use_tqdm=False)) == expected_tokens("gqa")


def test_more_requests_than_slots_or_pages(checkpoint):
    """Requests wait for slots and pages, and get the same tokens as alone."""
    # 23 pages of 16 tokens: the longest request needs all of them.
    page_bytes = TINY_CONFIGS["gqa"].kv_bytes_per_token(4) * 16
    options: dict[str, Any] = {"num_attention_workers": 1, "max_num_seqs": 3, "kv_cache_bytes": 23 * page_bytes}
    with LLM(checkpoint("gqa"), **options) as llm:
        outputs = llm.generate(prompts("gqa") * 2, GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == expected_tokens("gqa") * 2
