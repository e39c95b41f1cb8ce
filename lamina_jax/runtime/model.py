"""A model as the runtime sees it: a pure function with weights, traced for the shapes of a step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lamina_jax import partition

ModelFunction = Callable[..., Sequence[jax.Array]]
"""``f(params, tokens [B, T], positions [B, T], logit_index [B]) -> (logits [B, vocab],)``, calling `attend`."""


class Model:
    """A model function with its weights, traced on demand for the shapes of a step."""

    def __init__(self, fn: ModelFunction, params: Any) -> None:
        self._fn = fn
        self.params: list[jax.Array] = jax.tree.leaves(params)
        self._tree = jax.tree.structure(params)
        self._traced = functools.cache(self._trace)
        self._weights: list[jax.Array] | None = None

    def traced(self, batch: int, tokens: int) -> partition.Traced:
        """The model on `batch` sequences of `tokens` new tokens each."""
        return self._traced(batch, tokens)

    def weights(self, traced: partition.Traced) -> list[jax.Array]:
        """The values of `Traced.weight_vars`. Computed once: they are the same for every shape."""
        if self._weights is None or len(self._weights) != len(traced.weight_vars):
            self._weights = traced.weights(self.params)
        return self._weights

    @functools.cached_property
    def sites(self) -> tuple[partition.AttendSite, ...]:
        """The attends, for a step of one token."""
        return partition.cut(self.traced(1, 1)).sites

    def _trace(self, batch: int, tokens: int) -> partition.Traced:
        params = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in self.params]
        return partition.trace(self._fn, jax.tree.unflatten(self._tree, params), *input_shapes(batch, tokens))


def input_shapes(batch: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
