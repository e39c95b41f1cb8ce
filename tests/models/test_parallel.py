"""Models divided among devices compute what whole ones do, and no parameter is forgotten."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.parallel import divided_over, local_config, partition_spec
from lamina_jax.models.registry import model_class
from lamina_jax.testing import TINY_CONFIGS

AXIS = "model"
DEVICES = {
    "mha": 2,
    "gqa": 3,
    "llama3_rope": 2,
    "bias": 3,
    "mistral": 3,
    "qwen2": 3,
    "qwen3": 3,
    "gemma2": 3,
    "tied": 3,
}
"""Numbers of devices that divide the heads of each model."""


def model_of(name: str):
    config = dataclasses.replace(TINY_CONFIGS[name], vocab_size=264)
    return config, model_class(config.architecture)(config, dtype=config.dtype, rngs=nnx.Rngs(3))


@pytest.mark.parametrize("name", DEVICES)
def test_divided_models_give_the_logits_of_whole_ones(name):
    count = DEVICES[name]
    config, model = model_of(name)
    rng = np.random.default_rng(0)
    # Whatever starts at one or zero should count, biases and norms above all.
    state = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(0, 0.1, p.shape), p.dtype), nnx.state(model))
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 7)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7))
    index = jnp.array([6, 3], jnp.int32)
    nnx.update(model, state)
    whole = model(tokens, positions, index)

    local, _ = abstract_model(local_config(config, count), dtype=config.dtype)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    specs = jax.tree.unflatten(jax.tree.structure(state), [partition_spec(path, AXIS) for path in paths])

    def run(part):
        with divided_over(AXIS):
            return nnx.merge(local, part)(tokens, positions, index)

    mesh = Mesh(np.array(jax.devices()[:count]), (AXIS,))
    divided = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)
    np.testing.assert_allclose(jax.jit(divided)(state), whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", DEVICES)
def test_parts_have_the_shapes_of_the_local_model(name):
    """So that every parameter that a local model has smaller is divided, and along the right axis."""
    config = dataclasses.replace(TINY_CONFIGS[name], vocab_size=264)
    count = DEVICES[name]
    _, whole = abstract_model(config, dtype=config.dtype)
    _, local = abstract_model(local_config(config, count), dtype=config.dtype)
    expected = {path: p.shape for path, p in nnx.to_flat_state(local)}
    for path, p in nnx.to_flat_state(whole):
        spec = partition_spec(path, AXIS)
        divided = [size // count if i < len(spec) and spec[i] else size for i, size in enumerate(p.shape)]
        assert tuple(divided) == expected[path], path


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match="2 model devices to divide num_kv_heads=3"):
        local_config(dataclasses.replace(TINY_CONFIGS["gqa"], vocab_size=260), 2)
