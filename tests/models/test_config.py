"""ModelConfig: both shapes of config.json, what is refused, and the configs of known models."""

import dataclasses
import json
from pathlib import Path

import pytest

from lamina_jax.models import CheckpointError, ModelConfig, RopeScaling
from lamina_jax.models.checkpoint import num_parameters
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
        (
            {"architectures": ["MambaForCausalLM"]},
            r"'architectures'.*\(LlamaForCausalLM, .*\), got \['MambaForCausalLM'\]",
        ),
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


# As in the checkpoints that were published, which leave out some of what transformers has a default for.
MISTRAL = COMMON | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 3}
QWEN2 = MISTRAL | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 8}
QWEN3 = QWEN2 | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
GEMMA2 = MISTRAL | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (MISTRAL, (4096,) * 3),
        (MISTRAL | {"sliding_window": None}, ()),
        (QWEN2, ()),
        (QWEN2 | {"use_sliding_window": True}, ()),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, (None, 8, 8)),
        (QWEN2 | {"use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]}, (8, None, 8)),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, ()),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 2}, (None, None, 8)),
        (GEMMA2, (4096, None, 4096)),
        (GEMMA2 | {"sliding_window": 5, "layer_types": [FULL, FULL, SLIDING]}, (None, None, 5)),
    ],
)
def test_windows_of_every_architecture(raw, windows):
    assert ModelConfig.from_hf_dict(raw).windows == windows


@pytest.mark.parametrize(
    ("raw", "biases"),
    [(QWEN2, (True, False)), (QWEN3, (False, False)), (QWEN3 | {"attention_bias": True}, (True, True))],
)
def test_biases_of_attention(raw, biases):
    config = ModelConfig.from_hf_dict(raw)
    assert (config.qkv_bias, config.o_bias) == biases


def test_what_a_gemma2_config_leaves_out_is_what_transformers_takes_it_for():
    absent = {"head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_id"}
    config = ModelConfig.from_hf_dict({name: value for name, value in GEMMA2.items() if name not in absent})
    assert (config.head_dim, config.num_kv_heads, config.tie_word_embeddings, config.eos_token_ids) == (
        256,
        4,
        True,
        (1,),
    )
    assert (config.query_pre_attn_scalar, config.attention_soft_cap, config.logit_soft_cap) == (256, 50.0, 30.0)
    uncapped = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = ModelConfig.from_hf_dict(GEMMA2 | uncapped)
    assert (config.attention_soft_cap, config.logit_soft_cap) == (None, None)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (MISTRAL | {"hidden_act": "gelu"}, "'hidden_act': expected 'silu', got 'gelu'"),
        (MISTRAL | {"sliding_window": 0}, "'sliding_window': expected a positive integer, got 0"),
        (MISTRAL | {"layer_types": [FULL] * 3}, r"'layer_types': expected nothing, got \['full_attention'"),
        (QWEN2 | {"use_sliding_window": 1}, "'use_sliding_window': expected true or false, got 1"),
        (QWEN2 | {"layer_types": [SLIDING] * 3}, "'sliding_window': expected a positive integer, got nothing"),
        (QWEN2 | {"layer_types": [FULL] * 2}, "'layer_types': expected 3 times 'full_attention' or"),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 3}, "'layer_types': expected 3 times"),
        (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling.rope_type'.*got 'yarn'"),
        (QWEN3 | {"hidden_act": "relu"}, "'hidden_act': expected 'silu', got 'relu'"),
        (GEMMA2 | {"hidden_activation": "gelu"}, "'hidden_activation': expected 'gelu_pytorch_tanh', got 'gelu'"),
        (GEMMA2 | {"attn_logit_softcapping": 0}, "'attn_logit_softcapping': expected a positive number, got 0"),
        (GEMMA2 | {"query_pre_attn_scalar": None}, "'query_pre_attn_scalar': expected a positive integer, got nothing"),
        (GEMMA2 | {"use_bidirectional_attention": True}, "'use_bidirectional_attention': expected False, got True"),
    ],
)
def test_refused_fields_of_other_architectures_are_named(raw, message):
    with pytest.raises(CheckpointError, match=r"^some/config\.json: field " + message):
        ModelConfig.from_hf_dict(raw, source="some/config.json")


@pytest.mark.parametrize(("name", "windows"), [("mistral", (8, None)), ("gemma2", (8, 9, None, None))])
def test_windows_that_a_config_json_cannot_say_are_not_written(name, windows):
    with pytest.raises(ValueError, match="window"):
        dataclasses.replace(TINY_CONFIGS[name], windows=windows).to_hf_dict()


# The model cards of their makers and arXiv:2302.13971, table 2; bytes from the table of the paper, where they, in
# 16 bit, lie up to 2.6 % below the weights' (for LLaMA3-70B: 141.1 GB).
@pytest.mark.parametrize(
    ("name", "parameters", "paper_bytes"),
    [
        ("llama3_2_1b", 1.24e9, None),
        ("llama3_8b", 8.03e9, None),
        ("llama_33b", 32.5e9, 64.7e9),
        ("llama_65b", 65.3e9, 130.1e9),
        ("llama3_70b", 70.6e9, 137.5e9),
        ("mistral_7b", 7.24e9, None),
        ("qwen2_5_0_5b", 0.494e9, None),
        ("qwen3_0_6b", 0.596e9, None),
        ("gemma2_2b", 2.614e9, None),
    ],
)
def test_known_models_have_their_published_sizes(name, parameters, paper_bytes):
    config = ModelConfig.from_file(CONFIGS / f"{name}.json")
    count = num_parameters(config)
    assert count == pytest.approx(parameters, rel=0.005)
    if paper_bytes is not None:
        assert 2 * count == pytest.approx(paper_bytes, rel=0.03)


def test_kv_bytes_of_the_papers_models():
    expected = {"llama_33b": 1597440, "llama_65b": 2621440, "llama3_70b": 327680}
    actual = {name: ModelConfig.from_file(CONFIGS / f"{name}.json").kv_bytes_per_token(2) for name in expected}
    assert actual == expected
