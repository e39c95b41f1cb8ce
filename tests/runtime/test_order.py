"""The order of computation and messages in the compiled slices: by data dependence, which XLA cannot undo."""

import itertools
import re

import pytest

from lamina_jax import LLM
from lamina_jax.runtime.messages import Bucket
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

CONFIG = TINY_CONFIGS["gqa"]
BUCKET = Bucket(batch=8, tokens=1, max_pages=8)


class Hlo:
    """The entry computation of a compiled program: its instructions in schedule order, and what they read."""

    def __init__(self, text: str):
        entry = text[text.index("\nENTRY") :]
        lines = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", entry, re.MULTILINE)
        self.names = [name for name, _ in lines]
        self.text = dict(lines)
        self.reads = {name: set(re.findall(r"%([\w.-]+)", body)) & set(self.names) for name, body in lines}

    def find(self, pattern: str) -> list[str]:
        return [name for name in self.names if re.search(pattern, self.text[name])]

    def depends_on(self, name: str, other: str) -> bool:
        seen, stack = set(), [name]
        while stack:
            for read in self.reads[stack.pop()] - seen:
                seen.add(read)
                stack.append(read)
        return other in seen


def sends(hlo: Hlo) -> list[str]:
    return hlo.find('custom_call_target="lamina_shm_send"')


def recvs(hlo: Hlo) -> list[str]:
    return hlo.find('custom_call_target="lamina_shm_recv"')


@pytest.fixture(scope="module", params=[True, False], ids=["overlap", "no overlap"])
def programs(request, tmp_path_factory):
    """(overlap, first slice, middle slice, last slice), compiled for two workers."""
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    with LLM(directory, num_attention_workers=2, overlap=request.param) as llm:
        executor = llm._worker.executor
        executor.prepare(BUCKET, 1)
        sliced = executor._sliced[BUCKET.batch, BUCKET.tokens]  # pyright: ignore[reportAttributeAccessIssue]
        yield request.param, *(Hlo(sliced._programs[0][k].as_text()) for k in (0, 1, -1))


def projections(hlo: Hlo) -> list[str]:
    """The products that make k and v: nothing else in the model is as wide as the KV heads."""
    width = CONFIG.num_kv_heads * CONFIG.head_dim
    assert width not in (CONFIG.hidden_size, CONFIG.num_heads * CONFIG.head_dim, CONFIG.intermediate_size)
    found = hlo.find(rf"^f32\[(?:\d+,)*{width}\]\S* (?:fusion|dot|custom-call)\(.*dot_general")
    assert len(found) == 2
    return found


@pytest.mark.parametrize("which", [1, 2], ids=["first", "middle"])
def test_q_is_sent_before_k_and_v_are_computed(programs, which):
    overlap, hlo = programs[0], programs[which]
    q_sends = sends(hlo)[:2]
    for product in projections(hlo):
        for send in q_sends:
            assert hlo.depends_on(product, send) is overlap
            if overlap:
                assert hlo.names.index(send) < hlo.names.index(product)


@pytest.mark.parametrize("which", [1, 2], ids=["first", "middle"])
def test_sends_are_in_one_chain(programs, which):
    hlo = programs[which]
    chain = sends(hlo)
    assert len(chain) == 4
    assert all(hlo.depends_on(later, earlier) for earlier, later in itertools.pairwise(chain))


def test_answers_are_awaited_before_the_next_q_is_sent(programs):
    hlo = programs[2]
    assert len(recvs(hlo)) == 2
    assert all(hlo.depends_on(sends(hlo)[0], recv) for recv in recvs(hlo))


def test_what_can_run_before_the_answer_is_awaited_does(programs):
    """The rotary angles depend on positions alone."""
    hlo = programs[2]
    angles = hlo.find(r"(?:cosine|sine)|calls=%\S*(?:cosine|sine)")
    assert angles
    assert all(hlo.depends_on(recv, angle) for recv in recvs(hlo) for angle in angles)


def test_last_slice_sends_nothing(programs):
    assert sends(programs[3]) == []
    assert len(recvs(programs[3])) == 2
