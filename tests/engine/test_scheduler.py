"""The scheduler alone: who runs, on which pages, and that nothing is lost or shared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.scheduler import Scheduler, SchedulerLimits, SequenceState, bucket_size

GREEDY = SamplingParams(temperature=0.0)


def limits(**changes) -> SchedulerLimits:
    sizes = {"max_num_seqs": 4, "max_prefill_tokens": 32, "page_size": 4, "num_pages": 64}
    sizes |= {"num_batches": 1, "min_batch_seqs": 1}
    return SchedulerLimits.of(**sizes | changes)


def sequence(prompt: int, new: int) -> SequenceState:
    return SequenceState(
        prompt_token_ids=list(range(1, prompt + 1)), params=GREEDY, seed=0, index=0, max_new_tokens=new
    )


def run_to_end(scheduler: Scheduler, *, late: int = 0, ends_early: dict[SequenceState, int] | None = None):
    """Plans steps until none is left, finishing sequences `late` rounds after their last token; yields the steps.

    `ends_early` gives the number of tokens after which a sequence turns out to have ended.
    """
    ends: dict[SequenceState, int] = ends_early or {}
    got: dict[SequenceState, int] = {}
    under_way = []
    while True:
        steps = scheduler.plan()
        if not steps and not under_way:
            assert scheduler.is_idle
            return
        if steps:
            assert len({step.plan.bucket for step in steps}) == 1
            assert len({step.plan.batch for step in steps}) == len(steps)
            under_way.append(steps)
            yield from steps
        if not steps or len(under_way) > late:
            for _, s in [emit for step in under_way.pop(0) for emit in step.emits]:
                got[s] = got.get(s, 0) + 1
                if got[s] == (min(ends[s], s.max_new_tokens) if s in ends else s.max_new_tokens):
                    scheduler.finish(s)


@pytest.mark.parametrize(("size", "least", "expected"), [(1, 1, 1), (2, 1, 2), (3, 1, 4), (5, 16, 16), (64, 1, 64)])
def test_bucket_size(size, least, expected):
    assert bucket_size(size, least) == expected


def test_prefill_then_decode():
    scheduler = Scheduler(limits())
    s = sequence(prompt=5, new=3)
    scheduler.add(s)
    first, *rest = run_to_end(scheduler)
    assert first.plan.tokens is not None
    np.testing.assert_array_equal(first.plan.tokens[0, :5], [1, 2, 3, 4, 5])
    assert first.plan.num_new.tolist() == [5]
    assert [step.plan.context_lens[0] for step in rest] == [5, 6]
    assert [step.plan.num_new.tolist() for step in rest] == [[1, 0], [1, 0]]
    assert all(step.plan.tokens is None for step in rest)


def test_long_prompt_goes_in_pieces_and_only_the_last_emits():
    scheduler = Scheduler(limits())
    scheduler.add(sequence(prompt=70, new=1))
    steps = list(run_to_end(scheduler))
    assert [step.plan.num_new.tolist() for step in steps] == [[32], [32], [6]]
    assert [step.plan.context_lens.tolist() for step in steps] == [[0], [32], [64]]
    assert [len(step.emits) for step in steps] == [0, 0, 1]


def test_sequences_wait_for_slots():
    scheduler = Scheduler(limits(max_num_seqs=2))
    for _ in range(5):
        scheduler.add(sequence(prompt=3, new=4))
    assert max(sum(step.plan.num_new > 0) for step in run_to_end(scheduler)) == 2


def test_sequences_wait_for_pages():
    scheduler = Scheduler(limits(num_pages=3))
    for _ in range(3):
        scheduler.add(sequence(prompt=5, new=4))  # 8 cached tokens, 2 pages
    assert max(sum(step.plan.num_new > 0) for step in run_to_end(scheduler)) == 1


def test_sequence_that_can_never_fit_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"13 tokens of KV cache, 4 pages of 4 tokens, but there are 3 pages"):
        Scheduler(limits(num_pages=3)).add(sequence(prompt=10, new=4))


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [1]), (8, [8]), (15, [15]), (16, [8, 8]), (21, [11, 10]), (24, [8, 8, 8]), (40, [14, 13, 13])],
)
def test_batches_are_even_once_they_are_worth_it(count, sizes):
    many = {"max_num_seqs": 64, "max_prefill_tokens": 1024, "num_pages": 256}
    scheduler = Scheduler(limits(**many, num_batches=3, min_batch_seqs=8))
    for _ in range(count):
        scheduler.add(sequence(prompt=3, new=4))
    steps = scheduler.plan()
    assert [int((step.plan.num_new > 0).sum()) for step in steps] == sizes
    assert [step.plan.batch for step in steps] == list(range(len(sizes)))


def test_a_latecomer_does_not_open_a_batch_of_one():
    scheduler = Scheduler(
        limits(max_num_seqs=64, max_prefill_tokens=1024, num_pages=256, num_batches=2, min_batch_seqs=8)
    )
    for _ in range(15):
        scheduler.add(sequence(prompt=3, new=20))
    scheduler.plan()
    scheduler.add(sequence(prompt=3, new=20))
    (step,) = scheduler.plan()
    assert step.plan.batch == 0
    for _ in range(8):
        scheduler.add(sequence(prompt=3, new=20))
    assert [step.plan.batch for step in scheduler.plan()] == [1]


def test_finished_while_waiting():
    scheduler = Scheduler(limits(max_num_seqs=1))
    first, second = sequence(3, 2), sequence(3, 2)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.plan()
    scheduler.finish(second)
    scheduler.finish(first)
    assert scheduler.is_idle


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    max_num_seqs=st.integers(1, 5),
    page_size=st.integers(1, 8),
    late=st.integers(0, 3),
    num_batches=st.integers(1, 3),
    min_batch_seqs=st.integers(1, 3),
)
@settings(max_examples=80, deadline=None)
def test_every_token_is_computed_once_on_pages_of_its_own(
    lengths, max_num_seqs, page_size, late, num_batches, min_batch_seqs
):
    """Plays the steps on a model of the cache: what each sequence attends to must be its own tokens, in order."""
    pages = {"page_size": page_size, "num_pages": -(-70 // page_size) + 4}
    batches = {"num_batches": num_batches, "min_batch_seqs": min_batch_seqs}
    scheduler = Scheduler(limits(max_num_seqs=max_num_seqs, **batches, **pages))
    sequences = [sequence(prompt, new) for prompt, new, _ in lengths]
    ends_early = {s: end for s, (_, _, end) in zip(sequences, lengths, strict=True)}
    for s in sequences:
        scheduler.add(s)
    cache: dict[tuple[int, int], tuple[int, int]] = {}
    owner: dict[int, SequenceState] = {}
    emitted: dict[SequenceState, int] = {}
    for step in run_to_end(scheduler, late=late, ends_early=ends_early):
        plan = step.plan
        assert plan.bucket.batch * plan.bucket.tokens <= max(32, bucket_size(max_num_seqs))
        for row, slot in enumerate(plan.slots):
            if plan.num_new[row] == 0:
                continue
            place = lambda t, row=row, plan=plan: (int(plan.block_tables[row, t // page_size]), t % page_size)  # noqa: E731
            context, new = int(plan.context_lens[row]), int(plan.num_new[row])
            if context == 0:
                owner[int(slot)] = next(s for s in sequences if s.slot == slot and s.num_computed == new)
            name = id(owner[int(slot)])
            assert [cache.get(place(t)) for t in range(context)] == [(name, t) for t in range(context)]
            cache.update({place(t): (name, t) for t in range(context, context + new)})
        for _, s in step.emits:
            emitted[s] = emitted.get(s, 0) + 1
    for s in sequences:
        assert s.max_new_tokens >= emitted[s] >= min(ends_early[s], s.max_new_tokens)
