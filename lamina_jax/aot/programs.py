"""The programs of a model worker, as shapes to compile: slices, tensor parallel over the devices of a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamina_jax import partition
from lamina_jax.aot.channel import AotChannel
from lamina_jax.aot.compiler import MODEL_AXIS, Compiled, compile_for_gpu, mesh
from lamina_jax.aot.hlo import Widths
from lamina_jax.aot.targets import Target
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.parallel import divided_over, local_config, partition_spec
from lamina_jax.runtime.model import input_shapes
from lamina_jax.runtime.model_worker import model_function
from lamina_jax.runtime.slices import SlicePorts, plan_slice, split_heads
from lamina_jax.transport import MessageSpec, Role, Tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is compiled: a model, and how it is divided.

    Attributes:
        model_devices, attention_workers: the paper's degree of parallelism (a, b).
        batch, tokens: the shape of a step.
    """

    config: ModelConfig
    model_devices: int
    attention_workers: int
    batch: int
    tokens: int = 1

    def __post_init__(self) -> None:
        if self.attention_workers % self.model_devices:
            raise ValueError(
                f"expected as many attention workers to every model device, got {self.attention_workers} workers for "
                f"{self.model_devices} devices; make the first a multiple of the second"
            )

    @functools.cached_property
    def local(self) -> ModelConfig:
        """The part of the model that one device has."""
        return local_config(self.config, self.model_devices)

    @property
    def widths(self) -> Widths:
        """Shapes of one device's projections."""
        local = self.local
        return Widths(
            q=(local.hidden_size, local.num_heads * local.head_dim),
            kv=(local.hidden_size, local.num_kv_heads * local.head_dim),
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SliceShapes:
    """One device's slices, and how their weights lie on the devices."""

    parts: partition.Partition
    specs: tuple[PartitionSpec, ...]
    """By the index of a weight, `Slice.weights`."""

    def distinct(self) -> dict[str, int]:
        """One slice for every program, by name."""
        last = len(self.parts.slices) - 1
        first_of: dict[int, int] = {}
        for k, s in enumerate(self.parts.slices):
            first_of.setdefault(s.program, k)
        names = {0: "first slice", last: "last slice"}
        return {names.get(k, f"slice {k}"): k for k in first_of.values()}


def slice_shapes(deployment: Deployment, *, num_layers: int | None = None) -> SliceShapes:
    """Cuts one device's part of the model. Layers are alike: fewer of them give the same programs, sooner."""
    config = deployment.local
    if num_layers is not None:
        config = dataclasses.replace(config, num_layers=num_layers, windows=config.windows[:num_layers])
    graph, state = abstract_model(config, dtype=config.dtype)
    function, _ = model_function(nnx.merge(graph, state))
    with divided_over(MODEL_AXIS):
        axes = [(MODEL_AXIS, deployment.model_devices)]
        inputs = input_shapes(deployment.batch, deployment.tokens)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state)
        traced = partition.trace(function, shapes, *inputs, axes=axes)
    paths = [path for path, _ in nnx.to_flat_state(state)]
    specs = [partition_spec(path, MODEL_AXIS) for path in paths]
    # Behind the parameters come constants, which are whole on every device.
    specs += [PartitionSpec()] * (len(traced.weight_vars) - len(specs))
    return SliceShapes(parts=partition.cut(traced), specs=tuple(specs))


def compile_slice(deployment: Deployment, shapes: SliceShapes, k: int, target: Target) -> Compiled:
    """Compiles slice `k` for the model's devices, each of which sends its own heads to its own attention workers."""
    parts = shapes.parts
    plan = plan_slice(parts, k, moves=False)
    program = parts.programs[plan.program]
    devices = mesh(target, deployment.model_devices)
    specs = tuple(shapes.specs[i] for i in parts.slices[k].weights)
    weights = tuple(_on(devices, partition.shape_of(v), spec) for v, spec in zip(program.weights, specs, strict=True))
    given = tuple(_on(devices, value, PartitionSpec()) for value in plan.given)
    stamp = _on(devices, jax.ShapeDtypeStruct((3,), jnp.int32), PartitionSpec())
    function = _ports(deployment).function(program, plan, deployment.batch, deployment.tokens)
    whole = PartitionSpec()
    run = jax.shard_map(
        function, mesh=devices, in_specs=(specs, whole, whole), out_specs=(whole, whole), check_vma=False
    )
    return compile_for_gpu(run, (weights, given, stamp))


def _on(devices: Mesh, local: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    """The whole array of which every device has a part of shape `local`."""
    shape = tuple(
        size * (devices.size if i < len(spec) and spec[i] is not None else 1) for i, size in enumerate(local.shape)
    )
    return jax.ShapeDtypeStruct(shape, local.dtype, sharding=NamedSharding(devices, spec))


def _ports(deployment: Deployment) -> SlicePorts:
    config = deployment.local
    workers = deployment.attention_workers // deployment.model_devices
    shares = split_heads(config.num_heads, config.num_kv_heads, workers)
    dtype = jnp.dtype(config.dtype)

    def channels(role: Role, *tags: Tag) -> list[list[AotChannel]]:
        heads = {Tag.Q: config.num_heads, Tag.KV: 2 * config.num_kv_heads, Tag.ATTENDED: config.num_heads}
        shape = lambda tag: (deployment.batch, deployment.tokens, heads[tag], config.head_dim)  # noqa: E731
        messages = [MessageSpec(tag=tag, tensors=(jax.ShapeDtypeStruct(shape(tag), dtype),)) for tag in tags]
        # The call takes the channel of the device that it runs on, so a list has one for each device.
        return [
            [AotChannel.create(role=role, peer=f"attention worker {w}", messages=messages)] * deployment.model_devices
            for w in range(workers)
        ]

    return SlicePorts(
        shares=shares,
        down=channels("writer", Tag.Q, Tag.KV),
        up=channels("reader", Tag.ATTENDED),
        head_dim=config.head_dim,
        dtype=dtype,
    )
