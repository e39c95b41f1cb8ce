"""Qwen2 and Qwen2.5: LLaMA with biases on q, k and v alone (arXiv:2407.10671)."""

from typing import Any, ClassVar

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields
from lamina_jax.models.llama import Llama
from lamina_jax.models.mapping import read_windows, write_windows


class Qwen2(Llama):
    """A Qwen2 decoder. If `use_sliding_window` is true, layers from number `max_window_layers` on have a window."""

    CONFIG_DEFAULTS: ClassVar = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}

    @staticmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        fields.only("hidden_act", "silu")
        first = fields.non_negative_int("max_window_layers") or 0
        # As in transformers, there is no window without use_sliding_window, whatever its length and the layer types.
        if not fields.boolean("use_sliding_window"):
            fields = fields.replaced(sliding_window=None)
        return {
            "qkv_bias": True,
            **read_windows(fields, lambda i: fields.raw["sliding_window"] is not None and i >= first),
        }

    @staticmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        windows = write_windows(config)
        use = windows["sliding_window"] is not None
        return {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": use, **windows}
