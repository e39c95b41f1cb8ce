"""Batches in flight, overlap, replicas and workers change the time a token takes, and never the token."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from lamina_jax import LLM, SamplingParams
from lamina_jax.models import ModelConfig
from lamina_jax.runtime import split
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.runtime.schedule import turns
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

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
    outputs, in_flight = generate_split(checkpoint, PROMPTS, PARAMS, **options)
    assert in_flight == set(range(num_batches))
    assert outputs == expected


def generate_split(checkpoint, prompts, params, **options):
    """The outputs of each request, and the numbers of the batches that they ran in."""
    with LLM(checkpoint, min_batch_seqs=1, **options) as llm:
        in_flight = set()
        assert isinstance(llm._worker, ModelWorker)
        run = llm._worker.run_with_logits

        def recorded(plans):
            in_flight.update(plan.batch for plan in plans)
            return run(plans)

        llm._worker.run_with_logits = recorded
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [o.outputs for o in outputs], in_flight


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4])
def test_slices_are_dispatched_by_the_schedule(checkpoint, monkeypatch, num_batches):
    """Requests join and leave, so that batches sit steps out."""
    dispatched, scheduled = [], []

    def planned(batches, num_slices, **rest):
        order = turns(batches, num_slices, **rest)
        scheduled.extend(order)
        return order

    def dispatch(self, turn, values, stamp):
        device = next(iter(stamp.devices())) if isinstance(stamp, jax.Array) else None
        result = original(self, turn, values, stamp)
        (placed,) = result.devices()
        assert device in (None, placed)
        dispatched.append((turn, placed.id))
        return result

    original = split._SlicedModel.dispatch
    monkeypatch.setattr(split, "turns", planned)
    monkeypatch.setattr(split._SlicedModel, "dispatch", dispatch)
    generate_split(checkpoint, PROMPTS, PARAMS, num_batches=num_batches, num_attention_workers=1)
    assert [turn for turn, _ in dispatched] == scheduled
    replicas = max(1, num_batches - 1)
    slices = {b: [t for t in scheduled if t.batch == b] for b in range(num_batches)}
    assert all([t.slice for t in turns_of] == [k % 3 for k in range(len(turns_of))] for turns_of in slices.values())
    # Each replica is a device of its own, and a batch moves on to the next one with every slice.
    assert {(t.replica, device) for t, device in dispatched} == {(r, r) for r in range(replicas)}
    for turns_of in slices.values():
        within = [(b.replica - a.replica) % replicas for a, b in itertools.pairwise(turns_of) if b.slice]
        assert set(within) <= {1 % replicas}


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
# The LLaMAs take turns, each where it has KV heads enough.
LLAMAS = iter(("mqa", "odd", "tied", "llama3_rope", "bias"))
# Every number of batches with every number of workers, with and without overlap. The architectures go round and round
# meanwhile; there are five of them, so that each meets every one of the other values (the test below counts), which
# would take 120 runs to have in every combination.
SETTINGS = list(itertools.product((1, 2, 3), (True, False), (1, 2, 3, 4)))
CASES = list(zip(itertools.cycle(ARCHITECTURES), *zip(*SETTINGS, strict=True), strict=False))
MODELS = [next(LLAMAS) if architecture == "llama" else architecture for architecture, *_ in CASES]

# Enough for three batches; half of them are longer than the windows.
SHORT_PROMPTS = [{"prompt_token_ids": RNG.integers(1, 250, n).tolist()} for n in RNG.integers(1, 17, 18)]
SHORT_PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def four_headed(name: str) -> ModelConfig:
    """A config with KV heads for four workers and a window of 8 tokens for 24, but for the LLaMAs as they are."""
    config = TINY_CONFIGS[name]
    if config.architecture == "LlamaForCausalLM":
        return config
    windows = tuple(w and 8 for w in config.windows)
    return dataclasses.replace(config, num_heads=8, num_kv_heads=4, windows=windows)


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory):
    """By a model's name, its checkpoint and what it generates in one piece."""

    @functools.cache
    def run(name: str):
        directory = tmp_path_factory.mktemp(name)
        write_tiny_checkpoint(directory, four_headed(name))
        with LLM(directory, num_attention_workers=0) as llm:
            return directory, [o.outputs for o in llm.generate(SHORT_PROMPTS, SHORT_PARAMS, use_tqdm=False)]

    return run


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(range(4), 2)))
def test_the_cases_below_have_every_pair_of_values(first, second):
    values = [set(column) for column in zip(*CASES, strict=True)]
    assert list(map(len, values)) == [5, 3, 2, 4]
    pairs = {(case[first], case[second]) for case in CASES}
    assert pairs == set(itertools.product(values[first], values[second]))


@pytest.mark.parametrize(
    ("name", "num_batches", "overlap", "num_attention_workers"),
    [(name, *case[1:]) for name, case in zip(MODELS, CASES, strict=True)],
)
def test_tokens_of_every_architecture_are_those_of_the_unsplit_run(
    unsplit, name, num_batches, overlap, num_attention_workers
):
    directory, expected = unsplit(name)
    options = {"num_batches": num_batches, "overlap": overlap, "num_attention_workers": num_attention_workers}
    outputs, in_flight = generate_split(directory, SHORT_PROMPTS, SHORT_PARAMS, **options)
    assert in_flight == set(range(num_batches))
    assert outputs == expected
