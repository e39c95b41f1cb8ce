"""Converting and compiling a published model: what it carries, how many programs it takes, and how long."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from conversion import abstract

from lamina_jax.models import ModelConfig
from lamina_jax.partition import Partition, cut, trace
from lamina_jax.runtime.model import input_shapes
from lamina_jax.testing import TINY_CONFIGS

CONFIG_FILE = Path(__file__).parents[2] / "configs/models/llama3_70b.json"
LLAMA3_70B = ModelConfig.from_file(CONFIG_FILE)
LIMIT_S = 30.0
"""Of processor time, for 80 layers."""


@functools.cache
def partition_of(config: ModelConfig, dtype: str, batch: int, tokens: int) -> Partition:
    return cut(trace(*abstract(config, dtype), *input_shapes(batch, tokens)))


def test_a_70b_model_is_converted_in_seconds_and_its_layers_share_one_program():
    script = Path(__file__).with_name("conversion.py")
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, script, CONFIG_FILE, "8", "80"]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True, timeout=300)
    shallow, deep = json.loads(result.stdout)
    assert (shallow["slices"], deep["slices"]) == (9, 81)
    # The first slice, the last, and all between.
    assert shallow["programs"] == deep["programs"] == 3
    assert shallow["compiled"] == deep["compiled"] == 3
    assert deep["seconds"] < LIMIT_S


def test_programs_of_a_70b_model_are_of_one_size_at_every_depth():
    shallow = partition_of(dataclasses.replace(LLAMA3_70B, num_layers=8), "bfloat16", 8, 1)
    deep = partition_of(LLAMA3_70B, "bfloat16", 8, 1)

    def sizes(parts):
        return [
            [len(group) for group in (p.before_attended, p.before_q, p.before_kv, p.rest, p.weights)]
            for p in parts.programs
        ]

    assert sizes(deep) == sizes(shallow)
    assert [s.program for s in deep.slices] == [0, *[1] * 79, 2]


def assert_context_is_the_residual_stream(config: ModelConfig, dtype: str, batch: int, tokens: int) -> None:
    parts = partition_of(config, dtype, batch, tokens)
    stream = ((batch, tokens, config.hidden_size), jnp.dtype(dtype))
    num_bytes = batch * tokens * config.hidden_size * jnp.dtype(dtype).itemsize
    boundaries = parts.slices[:-1]
    assert [s.context_bytes for s in boundaries] == [num_bytes] * config.num_layers
    for s in boundaries:
        assert [(parts.values[i].shape, parts.values[i].dtype) for i in s.context] == [stream]


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (64, 1), (2, 128)])
def test_context_of_a_70b_model_is_its_residual_stream(batch, tokens):
    assert_context_is_the_residual_stream(dataclasses.replace(LLAMA3_70B, num_layers=8), "bfloat16", batch, tokens)


def test_context_of_all_80_layers_is_the_residual_stream():
    assert_context_is_the_residual_stream(LLAMA3_70B, "bfloat16", 8, 1)


@pytest.mark.parametrize("name", TINY_CONFIGS)
@pytest.mark.parametrize(("dtype", "batch", "tokens"), [("float32", 3, 1), ("bfloat16", 2, 5)])
def test_context_of_every_tiny_model_is_its_residual_stream(name, dtype, batch, tokens):
    assert_context_is_the_residual_stream(TINY_CONFIGS[name], dtype, batch, tokens)
