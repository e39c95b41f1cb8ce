"""The schedule as the paper draws it: no conflict, no bubble."""

import itertools
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina_jax.runtime.schedule import num_replicas, turns


@given(n=st.integers(2, 9), num_slices=st.integers(1, 40), first_slice=st.integers(0, 50))
def test_no_conflict_and_no_bubble(n, num_slices, first_slice):
    """With t_a = 1 and t_m = n - 1: a replica's turns and the pool's attentions touch but never overlap."""
    t_m = n - 1
    plan = turns(range(n), num_slices, num_batches=n, first_slice=first_slice)
    busy = defaultdict(list)
    for turn in plan:
        busy["replica", turn.replica].append((turn.start, turn.start + t_m))
        busy["pool"].append((turn.start + t_m, turn.start + t_m + 1))
    assert len(busy) == num_replicas(n) + 1
    for spans in busy.values():
        spans.sort()
        # Every end is the next start, but for the stagger at both ends of the step.
        assert all(a_end <= b_start for (_, a_end), (b_start, _) in itertools.pairwise(spans))
        assert all(a_end == b_start for (_, a_end), (b_start, _) in itertools.pairwise(spans))


@given(n=st.integers(1, 9), num_slices=st.integers(1, 40))
def test_a_slice_starts_when_its_attention_has_ended(n, num_slices):
    plan = turns(range(n), num_slices, num_batches=n)
    starts = {(t.batch, t.slice): t.start for t in plan}
    for (batch, k), start in starts.items():
        if k:
            # t_m + t_a = n units later than the slice before it.
            assert start == starts[batch, k - 1] + n


@given(n=st.integers(1, 9), num_slices=st.integers(1, 40), data=st.data())
def test_every_slice_of_every_batch_runs_once_and_in_order(n, num_slices, data):
    batches = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    plan = turns(batches, num_slices, num_batches=n)
    assert [t.start for t in plan] == sorted(t.start for t in plan)
    for batch in batches:
        assert [t.slice for t in plan if t.batch == batch] == list(range(num_slices))


@given(n=st.integers(3, 9), num_slices=st.integers(2, 20), first_slice=st.integers(0, 20))
def test_a_batch_moves_to_the_next_replica_with_every_slice_and_step(n, num_slices, first_slice):
    step = [t.replica for t in turns([1], num_slices, num_batches=n, first_slice=first_slice)]
    then = [t.replica for t in turns([1], num_slices, num_batches=n, first_slice=first_slice + num_slices)]
    assert all(b == (a + 1) % (n - 1) for a, b in zip(step + then, (step + then)[1:], strict=False))


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 1), (3, 2), (5, 4)])
def test_num_replicas(n, expected):
    assert num_replicas(n) == expected
