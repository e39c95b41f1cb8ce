"""A model divided over devices, each of which sends its own heads to its own attention workers."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import NamedSharding

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.runtime.split import SplitExecutor
from lamina_jax.testing import TINY_CONFIGS, write_tiny_checkpoint

RNG = np.random.default_rng(0)
PROMPTS = [{"prompt_token_ids": RNG.integers(1, 250, n).tolist()} for n in (1, 17, 40, 9, 3)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def divisible(name: str):
    """A tiny config with 4 KV heads, and windows where the architecture has some."""
    config = TINY_CONFIGS[name]
    return dataclasses.replace(config, num_heads=8, num_kv_heads=4)


@pytest.fixture
def generate(tmp_path):
    def run(name: str, **options):
        if not (tmp_path / "config.json").exists():
            write_tiny_checkpoint(tmp_path, divisible(name))
        with LLM(tmp_path, **options) as llm:
            return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]

    return run


@pytest.mark.parametrize(
    ("name", "workers", "options"),
    [
        ("mha", 2, {}),
        ("bias", 4, {"num_batches": 1}),
        ("tied", 2, {"overlap": False}),
        ("mistral", 2, {"num_batches": 1, "overlap": False}),
        ("qwen2", 4, {}),
        ("qwen3", 2, {}),
        ("gemma2", 4, {}),
    ],
)
def test_tokens_are_those_of_the_undivided_model(generate, name, workers, options):
    expected = generate(name, num_attention_workers=0)
    divided = {"num_attention_workers": workers, "tensor_parallel_size": 2, "min_batch_seqs": 1}
    assert generate(name, **divided, **options) == expected


def test_every_device_has_its_part_of_the_weights(tmp_path):
    write_tiny_checkpoint(tmp_path, divisible("mha"))
    with LLM(tmp_path, num_attention_workers=2, tensor_parallel_size=2) as llm:
        assert isinstance(llm._worker, ModelWorker)
        executor = llm._worker.executor
        assert isinstance(executor, SplitExecutor)
        model = executor._model
        kernels = [p for p in model.params if p.ndim == 2]
        assert len({device for p in kernels for device in p.sharding.device_set}) == 2
        parts = [p.addressable_shards[0].data.size * 2 for p in kernels]
        assert parts == [p.size for p in kernels]
        norms = [p for p in model.params if p.ndim == 1]
        assert norms
        assert all(p.is_fully_replicated for p in norms)
        assert all(isinstance(p.sharding, NamedSharding) for p in model.params)
        assert model.num_devices == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2, "num_attention_workers": 1}, "must be a multiple of tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "num_attention_workers": 0}, "must be a multiple of tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "num_attention_workers": 2, "num_batches": 3}, "one: use num_batches=2"),
        ({"tensor_parallel_size": 3, "num_attention_workers": 3}, "3 model devices to divide num_heads=8"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer of at least 1"),
        ({"model_platform": "tpu"}, "model_platform must be one of cpu, cuda, got 'tpu'"),
        ({"attention_platform": "cuda"}, "no channel from a model on cpu to attention on cuda"),
        ({"model_platform": "cuda"}, "JAX's default platform is 'cpu'.*JAX_PLATFORMS=cuda,cpu"),
        ({"model_platform": "cuda", "num_batches": 3}, "context does not travel between GPUs yet; use at most 2"),
        ({"model_memory_fraction": 1.5}, "model_memory_fraction must be above 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, options, message):
    write_tiny_checkpoint(tmp_path, divisible("mha"))
    with pytest.raises(ValueError, match=message):
        LLM(tmp_path, **options)
