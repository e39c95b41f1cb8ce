"""Checkpoints as models of the runtime, on the devices where they will run."""

from pathlib import Path

from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding

from lamina_jax.models import ModelConfig, load_model
from lamina_jax.models.base import ParameterPath
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.parallel import divided_over, local_config, partition_spec
from lamina_jax.runtime.model import Division, Model
from lamina_jax.runtime.model_worker import model_function


def load(directory: Path, *, dtype: str, place: Sharding) -> Model:
    """Loads a checkpoint for a device, or divided over a mesh of several.

    Args:
        directory, dtype: as for `load_model`.
        place: the device, or the mesh along whose one axis the model is divided.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ValueError: the model does not divide evenly.
    """
    mesh = place.mesh if isinstance(place, NamedSharding) else None
    if not isinstance(mesh, Mesh):
        return Model(*model_function(load_model(directory, dtype=dtype, placement=place)[1]))
    (axis,) = mesh.axis_names

    def placement(path: ParameterPath, shape: tuple[int, ...]) -> NamedSharding:
        del shape
        return NamedSharding(mesh, partition_spec(path, axis))

    # First, because no weight may be read of a model that does not divide.
    local = local_config(ModelConfig.from_file(directory / "config.json"), mesh.size)
    state = nnx.state(load_model(directory, dtype=dtype, placement=placement)[1])
    graph, _ = abstract_model(local, dtype=dtype if dtype != "auto" else local.dtype)

    def apply(params, tokens, positions, logit_index):
        with divided_over(axis):
            return (nnx.merge(graph, params)(tokens, positions, logit_index),)

    specs = tuple(partition_spec(path, axis) for path, _ in nnx.to_flat_state(state))
    return Model(apply, state, division=Division(mesh=mesh, specs=specs))
