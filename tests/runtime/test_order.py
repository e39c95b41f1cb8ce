"""The order of computation and messages in the compiled slices: by data dependence, which XLA cannot undo."""

import itertools

import pytest

from lamina_jax import LLM
from lamina_jax.aot.hlo import FENCE, RECV, SEND, Hlo, Widths, early_violations, order_violations
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

EARLY = (r" (?:cosine|sine)\(",)
"""The rotary angles depend on positions alone."""
CONFIG = TINY_CONFIGS["gqa"]
BUCKET = Bucket(batch=8, tokens=1, max_pages=8)


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no overlap"])
def programs(request, tmp_path_factory):
    """(overlap, first slice, middle slice, last slice), compiled for two workers."""
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    with LLM(directory, num_attention_workers=2, overlap=request.param) as llm:
        assert isinstance(llm._worker, ModelWorker)
        executor = llm._worker.executor
        executor.prepare(BUCKET, 1)
        sliced = executor._sliced[BUCKET.batch, BUCKET.tokens]  # pyright: ignore[reportAttributeAccessIssue]
        yield request.param, *(Hlo.parse(sliced._programs[0][k].as_text()) for k in (0, 1, -1))


WIDTHS = Widths(
    q=(CONFIG.hidden_size, CONFIG.num_heads * CONFIG.head_dim),
    kv=(CONFIG.hidden_size, CONFIG.num_kv_heads * CONFIG.head_dim),
)


@pytest.mark.parametrize("which", [1, 2], ids=["first", "middle"])
def test_messages_and_products_are_in_order(programs, which):
    overlap, hlo = programs[0], programs[which]
    violations = order_violations(hlo, WIDTHS, receives=which == 2)
    if overlap:
        assert violations == []
    else:
        # Without overlap q waits for k and v, and that is all that is different.
        assert violations
        assert all(v.startswith("send of q and product of k, v: ") for v in violations)


@pytest.mark.parametrize("which", [1, 2], ids=["first", "middle"])
def test_sends_are_in_one_chain(programs, which):
    hlo = programs[which]
    chain = hlo.find(SEND)
    assert len(chain) == 4
    assert all(hlo.depends_on(later, earlier) for earlier, later in itertools.pairwise(chain))


def test_k_and_v_have_a_product_each(programs):
    assert len(programs[2].products(WIDTHS.kv)) == 2


def test_answers_are_awaited_before_the_next_q_is_sent(programs):
    hlo = programs[2]
    recvs = hlo.find(RECV)
    assert len(recvs) == 2
    assert all(hlo.depends_on(hlo.find(SEND)[0], recv) for recv in recvs)


def test_what_can_run_before_the_answer_is_awaited_does(programs):
    assert early_violations(programs[2], EARLY) == []


def test_last_slice_sends_nothing(programs):
    assert programs[3].find(SEND) == []
    assert len(programs[3].find(RECV)) == 2
    assert len(programs[3].find(FENCE)) <= 1
