"""Checkpoints in Orbax's format, which restores each device's part of a parameter straight to that device."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lamina_jax.models.atomic import new_directory
from lamina_jax.models.base import DecoderModel, ParameterPath
from lamina_jax.models.checkpoint import ORBAX_FOLDER, Placement, sharding_of
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.fields import CheckpointError

# It reports every phase of every save and restore.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname or record.levelno > logging.INFO)


def save_orbax(
    directory: str | Path, config: ModelConfig, model: DecoderModel, *, files: Iterable[str | Path] = ()
) -> None:
    """Writes a directory that `load_model` reads: config.json, a folder of parameters, and copies of `files`.

    The directory appears when it is complete. config.json names the model's dtype, whatever `config` says.

    Raises:
        FileExistsError: `directory` is a file, or a directory that is not empty.
    """
    arrays = {_name(path): parameter[...] for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    dtype = next(iter(arrays.values())).dtype.name
    with new_directory(directory) as temporary:
        for file in files:
            shutil.copy(file, temporary)
        text = json.dumps(dataclasses.replace(config, dtype=dtype).to_hf_dict(), indent=2)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary.absolute() / ORBAX_FOLDER, args=ocp.args.PyTreeSave(arrays))


def restore(folder: Path, abstract: Any, placement: Placement | None) -> Any:
    """The state of the model that `abstract` is the shape of, from a folder that `save_orbax` wrote.

    Raises:
        CheckpointError: the folder is damaged, or what it holds has other names or shapes.
    """
    parameters = dict(nnx.to_flat_state(abstract))
    with _checkpointer() as checkpointer:
        _check(folder, checkpointer, {_name(path): p.shape for path, p in parameters.items()})
        restore_args = {_name(path): _restore_args(path, p, placement) for path, p in parameters.items()}
        item = {_name(path): jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in parameters.items()}
        try:
            arrays = checkpointer.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
            )
        except Exception as error:
            raise _damaged(folder, error) from error
    return nnx.from_flat_state([(path, p.replace(jnp.asarray(arrays[_name(path)]))) for path, p in parameters.items()])


def _check(folder: Path, checkpointer: ocp.Checkpointer, expected: dict[str, tuple[int, ...]]) -> None:
    try:
        metadata = checkpointer.metadata(folder.absolute()).item_metadata
    except Exception as error:
        raise _damaged(folder, error) from error
    if metadata is None:
        raise _damaged(folder, "it lists no parameters")
    shapes = {name: tuple(leaf.shape) for name, leaf in metadata.tree.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f"{folder}: parameter '{name}': expected shape {expected.get(name)}, as config.json says, got "
                f"{shapes.get(name)}. Convert the checkpoint again."
            )


def _restore_args(path: ParameterPath, parameter: Any, placement: Placement | None) -> ocp.RestoreArgs:
    sharding = sharding_of(placement, path, parameter.shape)
    if sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=parameter.dtype)
    return ocp.ArrayRestoreArgs(sharding=sharding, dtype=parameter.dtype)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


# Orbax and TensorStore raise errors of many kinds; all of them mean this.
def _damaged(folder: Path, error: Exception | str) -> CheckpointError:
    return CheckpointError(f"{folder}: cannot be restored: {error}. Convert the checkpoint again.")


def _name(path: ParameterPath) -> str:
    return ".".join(map(str, path))
