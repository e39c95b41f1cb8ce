"""Plans as messages."""

import dataclasses

import msgspec
import numpy as np
import pytest

from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.scheduler import Scheduler, SchedulerLimits, SequenceState
from lamina_jax.runtime.messages import PlannedBatch
from lamina_jax.runtime.plan import StepPlan, decode_plan, encode_plan


def plans(params: SamplingParams) -> list[StepPlan]:
    """Of a step of prompts and one of decoding."""
    limits = SchedulerLimits.of(
        max_num_seqs=3, max_prefill_tokens=16, page_size=4, num_pages=32, num_batches=1, min_batch_seqs=1
    )
    scheduler = Scheduler(limits)
    for index in range(3):
        prompt = list(range(index + 2))
        scheduler.add(
            SequenceState(prompt_token_ids=prompt, params=params, seed=2**40 + index, index=index, max_new_tokens=4)
        )
    return [scheduler.plan()[0].plan for _ in range(2)]


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, top_k=4, top_p=0.5)]
)
def test_plan_survives_the_way(params):
    for plan in plans(params):
        message = msgspec.msgpack.decode(msgspec.msgpack.encode(encode_plan(plan)), type=PlannedBatch)
        assert same(plan, decode_plan(message))


@pytest.mark.parametrize(
    "change",
    [{"slots": b""}, {"tokens": b"abc"}, {"block_tables": b"1234"}, {"sampling": {}}, {"sampling_mode": "best"}],
)
def test_message_whose_parts_do_not_fit_is_refused(change):
    message = msgspec.structs.replace(encode_plan(plans(SamplingParams(temperature=0.0))[0]), **change)
    with pytest.raises(ValueError, match=r"sampling|reshape|buffer size|SamplingMode"):
        decode_plan(message)
