"""The split run against the unsplit run: the same logits, bit for bit where the arithmetic is the same."""

import numpy as np
import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.runtime.slices import split_heads
from lamina_jax.testing import write_tiny_checkpoint

PROMPTS = [{"prompt_token_ids": list(range(1, n + 1))} for n in (1, 7, 40, 200)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


def logits_of_every_step(directory, **settings) -> list[np.ndarray]:
    steps = []
    with LLM(directory, **settings) as llm:
        assert isinstance(llm._worker, ModelWorker)
        run = llm._worker.run_with_logits

        def recorded(plans):
            results = run(plans)
            steps.extend((plan.emits, logits) for plan, (_, logits) in zip(plans, results, strict=True))
            return results

        llm._worker.run_with_logits = recorded
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        return [np.asarray(logits)[emits] for emits, logits in steps]


@pytest.mark.parametrize(
    "name", ["mha", "gqa", "mqa", "llama3_rope", "tied", "odd", "bias", "mistral", "qwen2", "qwen3", "gemma2"]
)
def test_split_equals_unsplit_bit_for_bit_in_float32(tmp_path, name):
    write_tiny_checkpoint(tmp_path, name)
    whole = logits_of_every_step(tmp_path, num_attention_workers=0)
    split = logits_of_every_step(tmp_path, num_attention_workers=1)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "kv_cache_dtype"), [("gqa", "int8"), ("gqa", "fp8"), ("gemma2", "int8")])
def test_split_equals_unsplit_bit_for_bit_over_a_quantized_cache(tmp_path, name, kv_cache_dtype):
    write_tiny_checkpoint(tmp_path, name)
    # The longest prompt goes in pieces, so that a prompt, too, reads what was quantized.
    options = {"kv_cache_dtype": kv_cache_dtype, "max_prefill_tokens": 64}
    whole = logits_of_every_step(tmp_path, num_attention_workers=0, **options)
    split = logits_of_every_step(tmp_path, num_attention_workers=1, **options)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_array_equal(a, b)


def first_logits(directory, **settings) -> np.ndarray:
    """Of the longest prompt."""
    with LLM(directory, num_attention_workers=0, **settings) as llm:
        assert isinstance(llm._worker, ModelWorker)
        run, seen = llm._worker.run_with_logits, []

        def recorded(plans):
            results = run(plans)
            seen.extend(np.asarray(logits)[plan.emits] for plan, (_, logits) in zip(plans, results, strict=True))
            return results

        llm._worker.run_with_logits = recorded
        llm.generate(PROMPTS[-1:], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
        (logits,) = np.concatenate(seen)
        return logits


@pytest.mark.parametrize(("kv_cache_dtype", "tolerance"), [("int8", 0.2)])
def test_logits_over_a_quantized_cache_are_near_those_over_the_models_own(tmp_path, kv_cache_dtype, tolerance):
    write_tiny_checkpoint(tmp_path, "gqa")
    exact = first_logits(tmp_path, max_prefill_tokens=64)
    quantized = first_logits(tmp_path, max_prefill_tokens=64, kv_cache_dtype=kv_cache_dtype)
    error = np.abs(quantized - exact).max()
    # Not zero: the cache was quantized, and read.
    assert 1e-4 < error < tolerance


@pytest.mark.parametrize("num_attention_workers", [2, 3])
def test_split_over_workers_equals_unsplit_within_1e_5(tmp_path, num_attention_workers):
    write_tiny_checkpoint(tmp_path, "gqa")
    whole = logits_of_every_step(tmp_path, num_attention_workers=0)
    split = logits_of_every_step(tmp_path, num_attention_workers=num_attention_workers)
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "num_workers", "counts"),
    [(8, 8, 1, [8]), (8, 8, 3, [2, 3, 3]), (6, 3, 2, [1, 2]), (32, 8, 8, [1] * 8), (4, 1, 1, [1])],
)
def test_heads_are_divided_evenly_and_completely(num_heads, num_kv_heads, num_workers, counts):
    shares = split_heads(num_heads, num_kv_heads, num_workers)
    assert sorted(s.kv.stop - s.kv.start for s in shares) == counts
    assert [h for s in shares for h in range(s.kv.start, s.kv.stop)] == list(range(num_kv_heads))
    assert [h for s in shares for h in range(s.q.start, s.q.stop)] == list(range(num_heads))
    for share in shares:
        assert {h // (num_heads // num_kv_heads) for h in range(share.q.start, share.q.stop)} == set(
            range(share.kv.start, share.kv.stop)
        )


def test_more_workers_than_kv_heads_names_both_numbers():
    with pytest.raises(ValueError, match=r"num_attention_workers is 3, but the model has only 2 KV heads"):
        split_heads(8, 2, 3)
