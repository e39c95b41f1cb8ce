"""What the runtime does for a GPU, as far as a CPU can show it; tests/gpu shows the rest."""

import os
import re

import jax
import jax.numpy as jnp
import pytest

from lamina_jax import LLM, SamplingParams, WorkerError
from lamina_jax.attention.params import AttendParams
from lamina_jax.engine.config import EngineConfig
from lamina_jax.runtime import executor, gpu_options
from lamina_jax.runtime.assembly import claim_gpus
from lamina_jax.runtime.attention_worker import AttentionWorker
from lamina_jax.runtime.kept import KeptPrograms
from lamina_jax.runtime.messages import AttentionWorkerConfig
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.testing import write_tiny_checkpoint
from lamina_jax.transport import Channel, ChannelError, ShmChannel, attach, cuda, first_failure

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7]}
WORDS = "recv of 'attended' (step 3, layer 1, batch 0) from attention worker 0 (pid 1) failed: no message came in 60 s"


@pytest.fixture
def checkpoint(tmp_path):
    write_tiny_checkpoint(tmp_path, "gqa")
    return tmp_path


def fail_silently(channel: Channel, monkeypatch) -> None:
    """As a kernel does: the program ends like any other, and the channel has failed."""
    monkeypatch.setattr(channel, "error", lambda: ChannelError(WORDS, peer=channel.peer))


@pytest.mark.parametrize("end", ["_up", "_down"])
def test_tokens_of_a_step_whose_channel_failed_are_not_used(checkpoint, monkeypatch, end):
    with LLM(checkpoint, num_attention_workers=2, num_batches=2) as llm:
        outputs = llm.stream((PROMPT, PARAMS) for _ in range(1000))
        index, _ = next(outputs)
        assert isinstance(llm._worker, ModelWorker)
        fail_silently(getattr(llm._worker.executor, end)[1][1], monkeypatch)
        with pytest.raises(WorkerError, match=re.escape(WORDS)):
            for index, _ in outputs:  # noqa: B007
                pass
        # Only those that had come before.
        assert index < 64
        with pytest.raises(RuntimeError, match="cannot be used any more"):
            llm.generate(PROMPT, PARAMS, use_tqdm=False)


def test_attention_worker_looks_at_its_channels_when_a_step_has_run(monkeypatch):
    config = AttentionWorkerConfig(
        name="attention worker 0",
        layers=(AttendParams(scale=1.0),),
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        dtype="float32",
        page_size=4,
        num_pages=2,
        max_step_tokens=16,
        kernel="xla",
    )
    ends = [ShmChannel.create(role=role, peer="peer", messages=[]) for role in ("writer", "reader")]
    inbox = attach(ends[0].address, role="reader", peer="model worker")
    outbox = attach(ends[1].address, role="writer", peer="model worker")
    with ends[0], ends[1], inbox, outbox:
        worker = AttentionWorker(config, [inbox], [outbox], KeptPrograms())
        worker._in_flight.append(jnp.zeros(3).block_until_ready())
        worker.reap()
        assert not worker._in_flight
        fail_silently(outbox, monkeypatch)
        worker.reap()  # nothing has run
        worker._in_flight.append(jnp.zeros(3).block_until_ready())
        with pytest.raises(ChannelError, match=re.escape(WORDS)):
            worker.reap()


def test_first_failure_is_of_the_first_channel_that_failed(monkeypatch):
    ends = [ShmChannel.create(role="writer", peer=f"peer {i}", messages=[]) for i in range(3)]
    assert first_failure(ends) is None
    for end in ends[1:]:
        fail_silently(end, monkeypatch)
    failure = first_failure(ends)
    assert failure is not None
    assert failure.peer == "peer 1"
    for end in ends:
        end.close()


def test_whole_model_is_compiled_with_the_options_of_its_device(checkpoint, monkeypatch):
    asked = []

    def options(platform: str) -> dict:
        asked.append(platform)
        return {"xla_not_an_option": 1}

    monkeypatch.setattr(executor, "compiler_options", options)
    with LLM(checkpoint, num_attention_workers=0) as llm, pytest.raises(Exception, match="xla_not_an_option"):
        llm.generate(PROMPT, PARAMS, use_tqdm=False)
    assert set(asked) == {"cpu"}


@pytest.mark.parametrize(
    ("platform", "dtype", "precision"),
    [("gpu", "float32", jax.lax.Precision.HIGHEST), ("gpu", "bfloat16", None), ("cpu", "float32", None)],
)
def test_float32_is_multiplied_as_float32(platform, dtype, precision):
    x = jnp.zeros((4, 4), dtype)
    with gpu_options.exact_products(platform, dtype):
        (dot,) = jax.make_jaxpr(lambda x: x @ x)(x).eqns
    assert dot.params["precision"] == (precision and (precision, precision))


@pytest.mark.parametrize(
    ("settings", "num_gpus", "fraction"),
    [
        ({}, 1, "0.900"),
        ({"num_attention_workers": 0}, 1, "0.900"),
        ({"attention_platform": "cuda"}, 1, "0.450"),
        ({"attention_platform": "cuda", "num_attention_workers": 2}, 1, "0.300"),
        ({"attention_platform": "cuda"}, 2, "0.900"),
        ({"model_memory_fraction": 0.2}, 1, "0.200"),
    ],
)
def test_what_the_model_takes_of_its_gpu(monkeypatch, settings, num_gpus, fraction):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    monkeypatch.setattr(cuda, "cuda_device_count", lambda: num_gpus)
    placement = EngineConfig(model_platform="cuda", **settings).placement
    assert claim_gpus(placement, num_local_workers=placement.num_attention_workers) == num_gpus
    assert os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION") == fraction
