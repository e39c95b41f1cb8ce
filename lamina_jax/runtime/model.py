"""A model as the runtime sees it: a pure function with weights, traced for the shapes of a step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamina_jax import partition
from lamina_jax.runtime.gpu_options import exact_products
from lamina_jax.runtime.kept import KeptPrograms

ModelFunction = Callable[..., Sequence[jax.Array]]
"""``f(params, tokens [B, T], positions [B, T], logit_index [B]) -> (logits [B, vocab],)``, calling `attend`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """How a model is divided among the devices of a mesh, each of which runs the model's function on its part of the
    weights and communicates with the others over the mesh's one axis."""

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]
    """How each leaf of the weights lies along the axis."""

    @property
    def axis(self) -> str:
        """The mesh's axis."""
        (name,) = self.mesh.axis_names
        return name


class Model:
    """A model function with its weights, traced on demand for the shapes of a step.

    Of a divided model the function, what is traced and its shapes are those of one device; the weights are whole
    arrays which lie on the mesh.
    """

    def __init__(self, fn: ModelFunction, params: Any, *, division: Division | None = None) -> None:
        """Raises ValueError if a leaf of `params` has no spec in `division`."""
        self._fn = fn
        self.params: list[jax.Array] = jax.tree.leaves(params)
        self.division = division
        self.kept = KeptPrograms()
        """What the last executor has compiled of it."""
        self._tree = jax.tree.structure(params)
        self._traced = functools.cache(self._trace)
        self._weights: list[jax.Array] | None = None
        if division is not None and len(division.specs) != len(self.params):
            raise ValueError(f"expected a spec for each of {len(self.params)} parameters, got {len(division.specs)}.")

    @property
    def device(self) -> Any:
        """The `jax.Device` that has the weights, or one of those that share them; JAX's default for weights that are
        only shapes, to compile for, or in host memory."""
        sharding = getattr(self.params[0], "sharding", None)
        return next(iter(sharding.device_set)) if sharding is not None else jax.devices()[0]

    @property
    def num_devices(self) -> int:
        """Devices that share the model."""
        return self.division.mesh.size if self.division else 1

    def traced(self, batch: int, tokens: int) -> partition.Traced:
        """The model on `batch` sequences of `tokens` new tokens each."""
        return self._traced(batch, tokens)

    def weights(self, traced: partition.Traced) -> list[jax.Array]:
        """The values of `Traced.weight_vars`. Computed once: they are the same for every shape."""
        if self._weights is None or len(self._weights) != len(traced.weight_vars):
            self._weights = traced.weights(self.params)
        return self._weights

    def weight_specs(self, traced: partition.Traced) -> list[PartitionSpec]:
        """How each of the `weights` lies along the axis of the division.

        Raises:
            ValueError: weights are cut out of others, as those of layers in a scan are, which a division cannot be
                read from.
        """
        assert self.division is not None
        if traced.prepare:
            raise ValueError("A model whose layers' weights are stacked cannot be divided; give each layer its own.")
        specs = list(self.division.specs)
        # Behind the parameters come constants, which are whole on every device.
        return specs + [PartitionSpec()] * (len(traced.weight_vars) - len(specs))

    @functools.cached_property
    def sites(self) -> tuple[partition.AttendSite, ...]:
        """The attends, for a step of one token."""
        return partition.cut(self.traced(1, 1)).sites

    def _trace(self, batch: int, tokens: int) -> partition.Traced:
        shapes = [jax.ShapeDtypeStruct(self._local_shape(i), p.dtype) for i, p in enumerate(self.params)]
        axes = [(self.division.axis, self.num_devices)] if self.division else []
        with exact_products(self.device.platform, self.params[0].dtype):
            return partition.trace(
                self._fn, jax.tree.unflatten(self._tree, shapes), *input_shapes(batch, tokens), axes=axes
            )

    def _local_shape(self, leaf: int) -> tuple[int, ...]:
        shape = self.params[leaf].shape
        if self.division is None:
            return shape
        return NamedSharding(self.division.mesh, self.division.specs[leaf]).shard_shape(shape)


def input_shapes(batch: int, tokens: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the model function's tokens, positions and logit_index, all int32."""
    return (
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
