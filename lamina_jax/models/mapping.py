"""Fields of config.json that several architectures share, but not all."""

from collections.abc import Callable
from typing import Any

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_attention_bias(fields: Fields) -> dict[str, Any]:
    """`attention_bias`, which is about all four projections; raises CheckpointError if it is no boolean."""
    bias = bool(fields.boolean("attention_bias"))
    return {"qkv_bias": bias, "o_bias": bias}


def read_windows(fields: Fields, is_sliding: Callable[[int], bool]) -> dict[str, Any]:
    """`sliding_window`, in those layers that `layer_types` names.

    Args:
        fields: the config.json.
        is_sliding: whether the layer of a number has the window, where there is no `layer_types`.

    Raises:
        CheckpointError: `layer_types` is not a list of known types, one per layer, or there is no `sliding_window`
            for a layer that needs it.
    """
    num_layers = fields.positive_int("num_hidden_layers")
    types = fields.raw.get("layer_types")
    if types is None:
        types = [_SLIDING if is_sliding(i) else _FULL for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or any(t not in (_FULL, _SLIDING) for t in types):
        raise fields.error("layer_types", f"{num_layers} times {_FULL!r} or {_SLIDING!r}", types)
    if _SLIDING not in types:
        return {"windows": ()}
    window = fields.positive_int("sliding_window")
    return {"windows": tuple(window if t == _SLIDING else None for t in types)}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_windows`. Raises ValueError where windows differ in length, which has no notation."""
    windows = config.windows or (None,) * config.num_layers
    lengths = {w for w in windows if w is not None}
    if len(lengths) > 1:
        raise ValueError(f"config.json holds one sliding_window; got windows of {sorted(lengths)} tokens.")
    return {
        "sliding_window": next(iter(lengths), None),
        "layer_types": [_FULL if w is None else _SLIDING for w in windows],
    }
