"""Batches in flight, overlap, replicas and workers change the time a token takes, and never the token."""

import numpy as np
import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.testing import write_tiny_checkpoint

RNG = np.random.default_rng(0)
PROMPTS = [{"prompt_token_ids": RNG.integers(1, 250, n).tolist()} for n in RNG.integers(1, 90, 28)]
PARAMS = [SamplingParams(temperature=0.0, max_tokens=int(n), ignore_eos=True) for n in RNG.integers(5, 25, 28)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint):
    with LLM(checkpoint, num_attention_workers=0) as llm:
        return [o.outputs for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize(
    ("num_batches", "overlap", "num_attention_workers"),
    [(1, True, 1), (1, False, 2), (2, True, 3), (2, False, 1), (3, True, 2), (3, False, 1), (4, True, 1)],
)
def test_tokens_do_not_depend_on_batches_overlap_or_workers(
    checkpoint, expected, num_batches, overlap, num_attention_workers
):
    options = {"num_batches": num_batches, "overlap": overlap, "num_attention_workers": num_attention_workers}
    with LLM(checkpoint, min_batch_seqs=1, **options) as llm:
        in_flight = set()
        run = llm._worker.run_with_logits

        def recorded(plans):
            in_flight.update(plan.batch for plan in plans)
            return run(plans)

        llm._worker.run_with_logits = recorded
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert in_flight == set(range(num_batches))
    assert [o.outputs for o in outputs] == expected
