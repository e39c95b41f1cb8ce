"""Loading a model from a directory: Hugging Face safetensors, or what `scripts/convert_checkpoint.py` made of them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open

from lamina_jax.models.base import DecoderModel, ParameterPath
from lamina_jax.models.config import DTYPES, ModelConfig
from lamina_jax.models.fields import CheckpointError, Fields, read_json_object
from lamina_jax.models.registry import model_class

Placement = Sharding | Callable[[ParameterPath, tuple[int, ...]], Sharding]
"""Where parameters go: one sharding for all, or a function of a parameter's path in the module and its shape."""

ORBAX_FOLDER = "orbax"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_STORED_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint recommends for generation; None where it says nothing."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor's place on disk."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load_model(
    directory: str | Path, *, dtype: str = "auto", placement: Placement | None = None
) -> tuple[ModelConfig, DecoderModel]:
    """Loads a checkpoint directory, one tensor at a time.

    Everything that can be checked without reading weights is checked before any is read. Host memory stays below
    1.3x the weights' size as loaded, given no single tensor is above a quarter of them.

    Args:
        directory: holds config.json and either model.safetensors, or model.safetensors.index.json with its shards,
            or the output of `scripts/convert_checkpoint.py`.
        dtype: 'float32', 'bfloat16' or 'float16', to which weights are cast, or 'auto' for the config's.
        placement: where parameters go; None leaves them in host memory (the CPU backend), uncommitted.

    Returns:
        The config and the model.

    Raises:
        CheckpointError: the directory, a file in it or a tensor in that is missing, damaged or not as the config
            says, or holds tensors that the model has no use for.
        ValueError: `dtype` is none of the above.
    """
    directory = _existing(directory)
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype: expected 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}.")
    config = ModelConfig.from_file(directory / "config.json")
    dtype = config.dtype if dtype == "auto" else dtype
    graphdef, abstract = abstract_model(config, dtype=dtype)
    if (directory / ORBAX_FOLDER).is_dir():
        # Imported late: Orbax takes seconds to import, and most loads do without it.
        from lamina_jax.models.orbax_store import restore

        state = restore(directory / ORBAX_FOLDER, abstract, placement)
    else:
        state = _load_safetensors(directory, config, abstract, placement)
    return config, nnx.merge(graphdef, state)


def load_generation_config(directory: str | Path) -> GenerationDefaults:
    """Reads generation_config.json; end-of-sequence ids come from config.json where it names none.

    Raises:
        CheckpointError: config.json is missing, or a field of either file has a wrong type or value.
    """
    directory = _existing(directory)
    config = ModelConfig.from_file(directory / "config.json")
    path = directory / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(eos_token_ids=config.eos_token_ids)
    fields = Fields(read_json_object(path), path)
    return GenerationDefaults(
        eos_token_ids=fields.token_ids("eos_token_id") or config.eos_token_ids,
        do_sample=fields.boolean("do_sample"),
        temperature=_in_range(fields, "temperature", 0.0, float("inf")),
        top_p=_in_range(fields, "top_p", 0.0, 1.0),
        top_k=fields.non_negative_int("top_k"),
    )


def abstract_model(config: ModelConfig, *, dtype: str) -> tuple[Any, Any]:
    """Graph definition and state of a model whose parameters are shapes and dtypes only."""
    model = model_class(config.architecture)
    return nnx.split(nnx.eval_shape(lambda: model(config, dtype=dtype, rngs=nnx.Rngs(0))))


def num_parameters(config: ModelConfig) -> int:
    """Weights of a model; tied embeddings count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config, dtype="float32")[1]))


def sharding_of(placement: Placement | None, path: ParameterPath, shape: tuple[int, ...]) -> Sharding | None:
    """The sharding of one parameter; None is host memory."""
    return placement(path, shape) if callable(placement) else placement


def _load_safetensors(directory: Path, config: ModelConfig, abstract: Any, placement: Placement | None) -> Any:
    parameters = dict(nnx.to_flat_state(abstract))
    name_of = model_class(config.architecture).checkpoint_name
    stored = _stored_tensors(directory)
    sources = {path: _matching(stored, name_of(path), path, p.shape, directory) for path, p in parameters.items()}
    _refuse_leftovers(stored, {source.name for source in sources.values()}, config)
    # The largest come first: what is held twice while being converted is then held when little else is.
    for path in sorted(sources, key=lambda path: -parameters[path].size):
        parameters[path] = parameters[path].replace(_load(sources[path], path, parameters[path].dtype, placement))
    return nnx.from_flat_state(parameters)


def _load(source: _Stored, path: ParameterPath, dtype: Any, placement: Placement | None) -> jax.Array:
    """Reads one tensor. The file is opened anew each time, as pages once read stay resident while it is open."""
    try:
        with safe_open(source.file, framework="numpy") as file:
            raw = file.get_tensor(source.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source.file}: tensor '{source.name}' cannot be read: {error}.") from error
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        array = _convert(raw, path[-1] == "kernel", dtype)
    sharding = sharding_of(placement, path, array.shape)
    return jax.block_until_ready(array if sharding is None else jax.device_put(array, sharding))


def _convert(raw: np.ndarray, transpose: bool, dtype: Any) -> jax.Array:
    array = jnp.asarray(raw)
    return (array.T if transpose else array).astype(dtype)


def _existing(directory: str | Path) -> Path:
    directory = Path(directory)
    if not directory.is_dir():
        what = "a file" if directory.exists() else "nothing"
        raise CheckpointError(f"{directory}: expected a checkpoint directory, got {what}.")
    return directory


def _stored_tensors(directory: Path) -> dict[str, _Stored]:
    """Every tensor of the checkpoint by name, from the headers of its files."""
    single, index = directory / _SINGLE_FILE, directory / _INDEX_FILE
    if single.exists():
        return _header(single)
    if not index.exists():
        hint = " It holds PyTorch files: save them as safetensors." if any(directory.glob("*.bin")) else ""
        raise CheckpointError(f"{directory}: expected {_SINGLE_FILE} or {_INDEX_FILE}, got neither.{hint}")
    weight_map = _weight_map(index)
    headers = {file: _header(directory / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{directory / file}: expected tensor '{name}', as {_INDEX_FILE} says, got no such tensor. "
                "Download the shard and the index again."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    fields = Fields(read_json_object(index), index)
    weight_map = fields.raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fields.error("weight_map", "an object from tensor names to file names", weight_map)
    for name, file in weight_map.items():
        # A bare name: an index is no reason to read outside its directory.
        if not isinstance(file, str) or Path(file).name != file:
            raise fields.error(f"weight_map.{name}", "the name of a file beside the index", file)
    return weight_map


def _header(path: Path) -> dict[str, _Stored]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return {n: _Stored(path, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though {_INDEX_FILE} names it. Download the shard.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a whole safetensors file: {error}. Download it again.") from error


def _matching(
    stored: Mapping[str, _Stored], name: str, path: ParameterPath, shape: tuple[int, ...], directory: Path
) -> _Stored:
    """The stored tensor for one parameter, checked."""
    expected = shape[::-1] if path[-1] == "kernel" else shape
    source = stored.get(name)
    if source is None:
        raise CheckpointError(
            f"{directory}: expected tensor '{name}' {expected}, as config.json says, got no such tensor among "
            f"{len(stored)}. Check that config.json and the weights belong together."
        )
    if source.shape != expected:
        raise CheckpointError(
            f"{source.file}: tensor '{name}': expected shape {expected}, as config.json says, got {source.shape}."
        )
    if source.dtype not in _STORED_DTYPES:
        raise CheckpointError(
            f"{source.file}: tensor '{name}': expected dtype {', '.join(_STORED_DTYPES)}, got {source.dtype}. "
            "Quantized weights are not supported."
        )
    return source


def _refuse_leftovers(stored: Mapping[str, _Stored], used: set[str], config: ModelConfig) -> None:
    """A tensor without a use means that the model computes something else than what was trained."""
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = [n for n in stored if n not in used | ignored and not n.endswith("rotary_emb.inv_freq")]
    if left:
        raise CheckpointError(
            f"{stored[left[0]].file}: {len(left)} tensors have no place in {config.architecture} as config.json "
            f"describes it, such as '{left[0]}'. Check fields like attention_bias, mlp_bias and num_hidden_layers."
        )


def _in_range(fields: Fields, name: str, low: float, high: float) -> float | None:
    value = fields.number(name)
    if value is not None and not low <= value <= high:
        raise fields.error(name, f"a number between {low} and {high}", value)
    return value
