"""Small real checkpoints with seeded random weights, for tests of anything that loads or runs a model."""

import dataclasses
import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.config import ModelConfig, RopeScaling
from lamina_jax.models.registry import model_class

BOS, EOS = 256, 257
"""Token ids below 256 are bytes; then come these two, and the rest of the vocabulary has no text."""

_BASE = ModelConfig(
    vocab_size=260,
    hidden_size=48,
    intermediate_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    max_position_embeddings=512,
    bos_token_id=BOS,
    eos_token_ids=(EOS,),
)

TINY_CONFIGS: dict[str, ModelConfig] = {
    "mha": dataclasses.replace(_BASE, num_heads=4, num_kv_heads=4, head_dim=12),
    "gqa": dataclasses.replace(_BASE, num_heads=6, num_kv_heads=3),
    "mqa": dataclasses.replace(_BASE, num_heads=4, num_kv_heads=1, head_dim=16, hidden_size=64),
    # 300 positions are several times the original context, so that a model without the scaling is found out.
    "llama3_rope": dataclasses.replace(
        _BASE,
        vocab_size=320,
        hidden_size=64,
        num_heads=8,
        num_kv_heads=4,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
    ),
    "tied": dataclasses.replace(_BASE, num_layers=3, tie_word_embeddings=True),
    # No size is a round number, and num_heads * head_dim is not hidden_size. There is room for one special token.
    "odd": dataclasses.replace(
        _BASE,
        vocab_size=257,
        hidden_size=45,
        intermediate_size=77,
        num_heads=9,
        num_kv_heads=3,
        head_dim=12,
        bos_token_id=None,
        eos_token_ids=(256,),
    ),
    "bias": dataclasses.replace(_BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "mistral": dataclasses.replace(_BASE, architecture="MistralForCausalLM", windows=(24, 24)),
    "qwen2": dataclasses.replace(_BASE, architecture="Qwen2ForCausalLM", qkv_bias=True, windows=(None, 24)),
    "qwen3": dataclasses.replace(_BASE, architecture="Qwen3ForCausalLM", head_dim=12),
    # Caps are within the spread of what they bound, and the scores' factor is not that of the head_dim.
    "gemma2": dataclasses.replace(
        _BASE,
        architecture="Gemma2ForCausalLM",
        num_layers=4,
        tie_word_embeddings=True,
        windows=(24, None, 24, None),
        query_pre_attn_scalar=64,
        attention_soft_cap=4.0,
        logit_soft_cap=6.0,
    ),
}
"""One config for each thing in which LLaMA models differ, and one for each other architecture.

Every one has 256 byte tokens and 512 positions. Windows are shorter than most of the goldens' prompts.
"""

TINY_SEEDS: dict[str, int] = dict.fromkeys(TINY_CONFIGS, 0) | {
    "mha": 8,
    "mqa": 23,
    "gqa": 2,
    "llama3_rope": 7,
    "tied": 1,
    "odd": 9,
    "bias": 14,
    "mistral": 3,
    "qwen2": 1,
    "qwen3": 8,
    "gemma2": 7,
}
"""Seeds of the weights that `tests/goldens` was made with: those that no near-tie comes up with."""


def write_tiny_checkpoint(
    directory: str | Path,
    config: str | ModelConfig = "gqa",
    *,
    seed: int | None = None,
    num_shards: int = 1,
    dtype: str = "float32",
) -> ModelConfig:
    """Writes a Hugging Face directory: config, weights, generation config and a byte-level tokenizer.

    The same arguments give the same bytes on every machine.

    Args:
        directory: made if it does not exist; files in it are overwritten.
        config: a name from TINY_CONFIGS, or any other config with a vocabulary of at least 257.
        seed: of the weights; None is what the goldens of a named config were made with, else 0.
        num_shards: files that the weights are spread over; above 1 there is an index too.
        dtype: of the stored weights, which config.json then names.

    Returns:
        The config that was written.
    """
    if isinstance(config, str):
        seed = TINY_SEEDS[config] if seed is None else seed
        config = TINY_CONFIGS[config]
    config = dataclasses.replace(config, dtype=dtype)
    write_checkpoint(directory, config, tiny_weights(config, seed=seed or 0), byte_tokenizer(config), num_shards)
    return config


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    weights: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    num_shards: int = 1,
) -> None:
    """Writes a Hugging Face directory of these parts; `weights` by Hugging Face name, kernels as [out, in]."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    eos = list(config.eos_token_ids)
    _write_json(directory / "config.json", config.to_hf_dict())
    _write_json(directory / "generation_config.json", {"bos_token_id": config.bos_token_id, "eos_token_id": eos})
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_weights(directory, weights, num_shards)


def tiny_weights(config: ModelConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name and in the config's dtype, scaled so that logits spread by a few units.

    Each tensor is drawn from a seed of its own, so its values do not depend on which others there are.
    """
    name_of = model_class(config.architecture).checkpoint_name
    _, abstract = abstract_model(config, dtype=config.dtype)
    weights = {}
    for path, parameter in nnx.to_flat_state(abstract):
        shape = parameter.shape[::-1] if path[-1] == "kernel" else parameter.shape
        weights[name_of(path)] = _draw(name_of(path), shape, config, seed)
    return weights


def byte_tokenizer(config: ModelConfig) -> Tokenizer:
    """A tokenizer whose tokens 0 to 255 are single bytes (in GPT-2's printable form), with BOS and EOS if they fit.

    Tokens beyond decode to nothing.
    """
    # The byte-level alphabet: GPT-2 keeps printable bytes and moves the others up to 256 and above.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(moved)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {config.bos_token_id: "<|begin_of_text|>", **dict.fromkeys(config.eos_token_ids, "<|end_of_text|>")}
    tokenizer.add_special_tokens([special.get(i, f"<|reserved_{i}|>") for i in range(256, config.vocab_size)])
    return tokenizer


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> np.ndarray:
    normal = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).standard_normal(shape, np.float32)
    if "norm" in name:
        values = 1 + 0.1 * normal
    elif name.endswith("bias"):
        values = 0.2 * normal
    else:
        values = normal * np.float32(_gain(name, config) * shape[1] ** -0.5)
    return values.astype(np.float32).astype(_numpy_dtype(config.dtype))


def _gain(name: str, config: ModelConfig) -> float:
    if "embed_tokens" in name and config.architecture == "Gemma2ForCausalLM":
        # It is multiplied by a number anyway; more, and every token would be followed by itself.
        return 1.0
    if "lm_head" in name or ("embed_tokens" in name and config.tie_word_embeddings):
        return 2.0
    # Peaked enough attention for its mistakes to show; much more, and rounding errors grow from layer to layer.
    return 1.5 if "q_proj" in name or "k_proj" in name else 1.0


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _write_weights(directory: Path, weights: dict[str, np.ndarray], num_shards: int) -> None:
    if num_shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        shard = {name: weights[name] for name in names if weight_map[name] == file}
        save_file(shard, directory / file, metadata={"format": "pt"})
    total = sum(array.nbytes for array in weights.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
