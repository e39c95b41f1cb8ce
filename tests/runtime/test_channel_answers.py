"""Channels whose creator needs an answer: the exchange between engine and workers, and workers that get it wrong."""

import sys
from pathlib import Path

import answering
import pytest

from lamina_jax import LLM, SamplingParams, WorkerError
from lamina_jax.runtime import places
from lamina_jax.testing import write_tiny_checkpoint
from lamina_jax.transport import base

HERE = Path(__file__).parent
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gqa")
    write_tiny_checkpoint(directory, "gqa")
    return directory


@pytest.fixture
def workers_use(tmp_path, monkeypatch):
    """Offers the kind for CPUs; its argument names the class of answering.py in the workers."""
    monkeypatch.setitem(base._KINDS, answering.KIND, "answering:AnsweringChannel")
    monkeypatch.setitem(places._CHANNEL_KINDS, ("cpu", "cpu"), ("shm", answering.KIND))
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "transport"), prepend=":")

    def workers_use(name: str) -> None:
        python = tmp_path / "python"
        # In place of: python -m lamina_jax.runtime.attention_worker
        python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} {HERE / "answering_worker.py"} {name} "$@"\n')
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return workers_use


def test_generates_over_channels_that_need_answers(checkpoint, workers_use):
    with LLM(checkpoint, num_attention_workers=2) as llm:
        (expected,) = llm.generate(PROMPT, PARAMS, use_tqdm=False)
    workers_use("AnsweringChannel")
    with LLM(checkpoint, num_attention_workers=2, transport=answering.KIND) as llm:
        (got,) = llm.generate(PROMPT, PARAMS, use_tqdm=False)
    assert got.outputs[0].token_ids == expected.outputs[0].token_ids


CANNOT = "^cannot connect to the ends of channels that attention worker 0 has attached to: "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Silent", f"{CANNOT}expected attention worker 0 to answer .* of kind 'answering', got none"),
        ("OfAnotherKind", f"{CANNOT}attention worker 0 answered for another channel .* kind 'answering', got 'shm'"),
        ("Confused", f"{CANNOT}attention worker 0 answered 'nothing' to the challenge '.*'"),
        ("Done", "^attention worker 0 was given 4 channels to attach to and answered for 0"),
    ],
)
def test_worker_that_answers_wrongly_is_named(checkpoint, workers_use, name, message):
    workers_use(name)
    with pytest.raises(WorkerError, match=message):
        LLM(checkpoint, num_attention_workers=1, transport=answering.KIND)
