"""What a checkpoint's `config.json` says, checked and in one shape whatever version of transformers wrote it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina_jax.attention.params import AttendParams
from lamina_jax.models.fields import Fields, read_json_object
from lamina_jax.models.registry import ARCHITECTURES, model_class

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """LLaMA-3's change of the rotary frequencies for contexts longer than the original ones.

    Attributes:
        factor: by how much the slow frequencies are divided.
        low_freq_factor, high_freq_factor: frequencies that turn fewer than ``low_freq_factor`` times in the
            original context are divided, those that turn more than ``high_freq_factor`` times are kept, and
            those between are interpolated.
        original_max_position_embeddings: tokens in the original context.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of a decoder-only model; hashable, so it can be a static argument.

    `dtype` is the dtype of the checkpoint, not necessarily that of a loaded model. What an architecture does not have
    is at its default: no biases, no windows, no caps.
    """

    architecture: str = "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    """Bias of the projection behind attention."""
    mlp_bias: bool = False
    windows: tuple[int | None, ...] = ()
    """How many tokens a token of each layer sees, itself included; None is all of them, () is None in every layer."""
    query_pre_attn_scalar: int | None = None
    """Scores are divided by its square root; None is head_dim."""
    attention_soft_cap: float | None = None
    """Bound of the scores, by tanh."""
    logit_soft_cap: float | None = None
    """Bound of the logits, by tanh."""
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def attend_params(self, layer: int) -> AttendParams:
        """The parameters of a layer's attention."""
        return AttendParams(
            scale=(self.query_pre_attn_scalar or self.head_dim) ** -0.5,
            window=self.windows[layer] if self.windows else None,
            soft_cap=self.attention_soft_cap,
        )

    def kv_bytes_per_token(self, itemsize: int, *, scale_bytes: int = 0) -> int:
        """Bytes of keys and values that one token leaves in the caches of all layers.

        Args:
            itemsize: of one number.
            scale_bytes: that each key and each value of a KV head takes besides its numbers.
        """
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * itemsize + scale_bytes)

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any], *, source: str | Path = "config.json") -> "ModelConfig":
        """Reads the contents of a `config.json` written by transformers 4 or 5.

        The two differ in where RoPE's constants lie (`rope_theta` and `rope_scaling`, or `rope_parameters`) and
        in the name of the dtype (`torch_dtype`, or `dtype`). Defaults are those of the architecture in transformers.
        Fields that only some architectures have are read by the model's class, `DecoderModel.read_config`.

        Args:
            raw: the parsed file.
            source: the file's path, for error messages.

        Raises:
            CheckpointError: a field is missing or has a wrong type or value, or the model is one that is not
                supported (architecture, activation, kind of RoPE, quantization).
        """
        architecture = _architecture(Fields(raw, source))
        model = model_class(architecture)
        fields = Fields({**model.CONFIG_DEFAULTS, **raw}, source)
        quantization = fields.raw.get("quantization_config")
        if quantization is not None:
            raise fields.error("quantization_config", "none: quantized weights are not supported", quantization)
        hidden_size = fields.positive_int("hidden_size")
        num_heads = fields.positive_int("num_attention_heads")
        num_kv_heads = fields.positive_int("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", num_kv_heads)
        if hidden_size % num_heads and fields.raw.get("head_dim") is None:
            raise fields.error("head_dim", "to be given, as num_attention_heads does not divide hidden_size", None)
        head_dim = fields.positive_int("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise fields.error("head_dim", "an even number, as RoPE turns pairs", head_dim)
        rope_theta, rope_scaling = _rope(fields)
        return cls(
            architecture=architecture,
            vocab_size=fields.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.positive_int("intermediate_size"),
            num_layers=fields.positive_int("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            rms_norm_eps=fields.positive_float("rms_norm_eps", default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=bool(fields.boolean("tie_word_embeddings")),
            dtype=_dtype(fields),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
            eos_token_ids=fields.token_ids("eos_token_id"),
            **model.read_config(fields),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Reads a file in the form of a `config.json`; raises CheckpointError, see `from_hf_dict`."""
        return cls.from_hf_dict(read_json_object(path), source=path)

    def to_hf_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that transformers 4 and 5 and `from_hf_dict` read."""
        scaling = (
            None if self.rope_scaling is None else {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        )
        return {
            "architectures": [self.architecture],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
            **model_class(self.architecture).write_config(self),
        }


def _architecture(fields: Fields) -> str:
    names = fields.raw.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        supported = ", ".join(ARCHITECTURES)
        raise fields.error("architectures", f"a list of one supported architecture ({supported})", names)
    return names[0]


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from transformers 5's `rope_parameters`, or transformers 4's `rope_theta`, `rope_scaling`."""
    version5 = fields.object("rope_parameters")
    scaling = version5 or fields.object("rope_scaling")
    theta_from = fields if version5 is None or version5.raw.get("rope_theta") is None else version5
    theta = theta_from.positive_float("rope_theta", default=10000.0)
    if scaling is None:
        return theta, None
    partial = scaling.raw.get("partial_rotary_factor")
    if partial not in (None, 1.0):
        raise scaling.error("partial_rotary_factor", "1.0", partial)
    kind = scaling.raw.get("rope_type", scaling.raw.get("type"))
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise scaling.error("rope_type", "'default' or 'llama3'", kind)
    rope_scaling = RopeScaling(
        factor=scaling.positive_float("factor"),
        low_freq_factor=scaling.positive_float("low_freq_factor"),
        high_freq_factor=scaling.positive_float("high_freq_factor"),
        original_max_position_embeddings=scaling.positive_int("original_max_position_embeddings"),
    )
    if rope_scaling.high_freq_factor <= rope_scaling.low_freq_factor:
        expected = f"more than low_freq_factor={rope_scaling.low_freq_factor}"
        raise scaling.error("high_freq_factor", expected, rope_scaling.high_freq_factor)
    return theta, rope_scaling


def _dtype(fields: Fields) -> str:
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(name)
    if value is None:
        return "float32"
    if value not in DTYPES:
        raise fields.error(name, f"one of {', '.join(DTYPES)}", value)
    return value
