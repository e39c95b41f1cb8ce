"""What every model is to the rest of lamina_jax."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import Fields

ParameterPath = tuple[Any, ...]
"""Where a parameter is in its module: names of attributes and indices into lists."""


class DecoderModel(nnx.Module):
    """A decoder-only model: new tokens in, logits out, and `lamina_jax.attention.attend` once per layer between.

    It is a pure function of its parameters and arguments, so whoever runs it may trace it and replace `attend`.
    Without allocating weights: ``nnx.eval_shape(lambda: Model(config, dtype=dtype, rngs=nnx.Rngs(0)))``.

    Args:
        config: the model's shape.
        dtype: dtype of weights and activations. Norms, RoPE and logits are computed in float32 all the same.
        rngs: source of the initial weights.
    """

    config: ModelConfig

    CONFIG_DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """Fields of a config.json that transformers gives another value than absence where they are not written."""

    @abc.abstractmethod
    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs): ...

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens"],
        logit_index: Int[Array, " batch"],
    ) -> Float32[Array, "batch vocab"]:
        """Logits of what follows one token of each sequence.

        Args:
            tokens: the step's new tokens; those that only pad may be any in the vocabulary.
            positions: their places in their sequences, from 0.
            logit_index: which of a sequence's tokens to give logits for, as an index into the tokens axis.
        """
        x = self.hidden_states(tokens, positions)
        chosen = x[jnp.arange(x.shape[0]), logit_index]
        return self.logits(chosen[:, None])[:, 0]

    @abc.abstractmethod
    def hidden_states(
        self, tokens: Int[Array, "batch tokens"], positions: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens hidden"]:
        """What `logits` turns into logits, for every token; arguments as in `__call__`."""

    @abc.abstractmethod
    def logits(self, x: Float[Array, "batch tokens hidden"]) -> Float32[Array, "batch tokens vocab"]:
        """Logits of the tokens that follow, accumulated and returned in float32."""

    @staticmethod
    @abc.abstractmethod
    def checkpoint_name(path: ParameterPath) -> str:
        """The Hugging Face tensor that holds the parameter at `path` in the module.

        Parameters have the tensor's shape, but those called `kernel` are stored transposed, [out, in].
        """

    @staticmethod
    @abc.abstractmethod
    def read_config(fields: Fields) -> dict[str, Any]:
        """The arguments of ModelConfig that only some architectures have, from a config.json.

        Raises:
            CheckpointError: a field has a wrong type or value, or asks for something that is not supported.
        """

    @staticmethod
    @abc.abstractmethod
    def write_config(config: ModelConfig) -> dict[str, Any]:
        """The reverse of `read_config`, `model_type` included."""
