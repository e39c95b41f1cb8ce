"""ModelConfig: both shapes of config.json, what is refused, and the configs of known models."""

import json
from pathlib import Path

import jax
import pytest
from flax import nnx

from lamina_jax.models import CheckpointError, ModelConfig, RopeScaling
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.testing import TINY_CONFIGS

CONFIGS = Path(__file__).parents[2] / "configs" / "models"

# As transformers 4 and 5 write one and the same model.
COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 128256,
}
SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
VERSION4 = COMMON | {"rope_scaling": SCALING, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
VERSION5 = COMMON | {"rope_parameters": SCALING | {"rope_theta": 500000.0}, "dtype": "bfloat16"}

EXPECTED = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    tie_word_embeddings=True,
    dtype="bfloat16",
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)


@pytest.mark.parametrize("raw", [VERSION4, VERSION5], ids=["transformers4", "transformers5"])
def test_both_versions_of_transformers_are_read(raw):
    assert ModelConfig.from_hf_dict(raw) == EXPECTED


@pytest.mark.parametrize("config", [EXPECTED, *TINY_CONFIGS.values()])
def test_a_written_config_reads_back_as_itself(config):
    assert ModelConfig.from_hf_dict(json.loads(json.dumps(config.to_hf_dict()))) == config


def test_fields_of_old_configs_have_defaults():
    needed = "architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    raw = {name: COMMON[name] for name in [*needed.split(), "max_position_embeddings"]}
    config = ModelConfig.from_hf_dict(raw)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 64, 10000.0)
    assert (config.rope_scaling, config.tie_word_embeddings, config.dtype) == (None, False, "float32")
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_default_rope_is_no_scaling():
    raw = COMMON | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    assert ModelConfig.from_hf_dict(raw).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"'architectures'.*\(LlamaForCausalLM\), got \['MambaForCausalLM'\]"),
        ({"architectures": None}, "'architectures'.*got nothing"),
        ({"architectures": "LlamaForCausalLM"}, "'architectures'.*a list"),
        ({"architectures": [["LlamaForCausalLM"]]}, "'architectures'.*a list"),
        ({"vocab_size": None}, "'vocab_size': expected a positive integer, got nothing"),
        ({"hidden_size": "2048"}, "'hidden_size': expected a positive integer, got '2048'"),
        ({"num_hidden_layers": True}, "'num_hidden_layers': expected a positive integer, got True"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'.*got 0"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps': expected a number, got '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps': expected a positive number, got nan"),
        ({"num_key_value_heads": 5}, "'num_key_value_heads': expected a divisor of num_attention_heads=32, got 5"),
        ({"head_dim": 63}, "'head_dim': expected an even number"),
        ({"head_dim": None, "num_attention_heads": 24}, "'head_dim': expected to be given"),
        ({"attention_bias": 1}, "'attention_bias': expected true or false, got 1"),
        ({"torch_dtype": "int8"}, "'torch_dtype': expected one of float32, bfloat16, float16, got 'int8'"),
        ({"eos_token_id": [1, "2"]}, "'eos_token_id'"),
        ({"eos_token_id": -1}, "'eos_token_id'"),
        ({"hidden_act": "gelu"}, "'hidden_act': expected 'silu', got 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quantization_config'"),
        ({"rope_scaling": 8.0}, "'rope_scaling': expected an object, got 8.0"),
        ({"rope_scaling": SCALING | {"rope_type": "yarn"}}, "'rope_scaling.rope_type'.*'llama3', got 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling.rope_type'.*got 'linear'"),
        ({"rope_scaling": SCALING | {"factor": None}}, "'rope_scaling.factor'.*got nothing"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 1.0}}, "'rope_scaling.high_freq_factor'.*low_freq_factor=1.0"),
        ({"rope_parameters": SCALING | {"rope_theta": "big"}}, "'rope_parameters.rope_theta'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "'rope_parameters.partial_rotary_factor'"),
    ],
)
def test_refused_fields_are_named(change, message):
    with pytest.raises(CheckpointError, match=r"^some/config\.json: field " + message):
        ModelConfig.from_hf_dict(COMMON | change, source="some/config.json")


# Meta's model cards and arXiv:2302.13971, table 2; the three last from the table of the paper, where its bytes, in
# 16 bit, lie up to 2.6 % below the weights' (for LLaMA3-70B: 141.1 GB).
@pytest.mark.parametrize(
    ("name", "parameters", "paper_bytes"),
    [
        ("llama3_2_1b", 1.24e9, None),
        ("llama3_8b", 8.03e9, None),
        ("llama_33b", 32.5e9, 64.7e9),
        ("llama_65b", 65.3e9, 130.1e9),
        ("llama3_70b", 70.6e9, 137.5e9),
    ],
)
def test_known_models_have_their_published_sizes(name, parameters, paper_bytes):
    config = ModelConfig.from_file(CONFIGS / f"{name}.json")
    _, state = abstract_model(config, dtype="bfloat16")
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == config.num_parameters
    assert count == pytest.approx(parameters, rel=0.005)
    if paper_bytes is not None:
        assert 2 * count == pytest.approx(paper_bytes, rel=0.03)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_num_parameters_counts_every_kind_of_model(name):
    _, state = abstract_model(TINY_CONFIGS[name], dtype="float32")
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(state))) == TINY_CONFIGS[name].num_parameters


def test_kv_bytes_of_the_papers_models():
    expected = {"llama_33b": 1597440, "llama_65b": 2621440, "llama3_70b": 327680}
    actual = {name: ModelConfig.from_file(CONFIGS / f"{name}.json").kv_bytes_per_token(2) for name in expected}
    assert actual == expected
