"""Mistral: LLaMA in which every token sees a window of the last tokens (arXiv:2310.06825)."""

from typing import Any, ClassVar

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields
from lamina_jax.models.llama import Llama
from lamina_jax.models.mapping import read_windows


class Mistral(Llama):
    """Mistral 7B and what is shaped like it; releases since v0.2 have `sliding_window` null, and no window."""

    CONFIG_DEFAULTS: ClassVar = {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2}

    @staticmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        fields.only("hidden_act", "silu")
        # Models with layers of several types are Ministral, by another name; transformers disregards the field.
        fields.only("layer_types")
        return read_windows(fields, lambda _: fields.raw.get("sliding_window") is not None)

    @staticmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        window = config.windows[0] if config.windows else None
        if set(config.windows) - {window}:
            raise ValueError(f"Every layer of Mistral has the same window; got {config.windows}.")
        return {"model_type": "mistral", "hidden_act": "silu", "sliding_window": window}
