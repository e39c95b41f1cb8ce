"""The programs of both kinds of worker, as shapes to compile: the model's slices, tensor parallel over the devices of a
mesh, and the attention worker's step for its share of the heads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lamina_jax import partition
from lamina_jax.aot.channel import AotChannel
from lamina_jax.aot.compiler import MODEL_AXIS, Compiled, compile_for_gpu, mesh
from lamina_jax.aot.hlo import Widths
from lamina_jax.aot.targets import Target
from lamina_jax.attention.cache import PagedCache, StepTables
from lamina_jax.attention.kernels import get_kernel
from lamina_jax.attention.quantization import AUTO, scale_bytes, stored_dtype
from lamina_jax.models.checkpoint import abstract_model
from lamina_jax.models.config import ModelConfig
from lamina_jax.models.parallel import divided_over, local_config, partition_spec
from lamina_jax.runtime.attention_step import AttentionStep
from lamina_jax.runtime.messages import AttentionWorkerConfig
from lamina_jax.runtime.model import input_shapes
from lamina_jax.runtime.model_worker import model_function
from lamina_jax.runtime.slices import SlicePorts, plan_slice, split_heads
from lamina_jax.transport import MessageSpec, Role, Tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """What is compiled: a model, and how it is divided.

    Attributes:
        model_devices, attention_workers: the paper's degree of parallelism (a, b).
        batch, tokens: the shape of a step of one batch.
        num_batches: batches in flight.
        context: tokens that a sequence may have in the cache.
        page_size: tokens in a page of it.
        kv_cache_dtype: of the cache, a name in `lamina_jax.attention.quantization.STORED`.
    """

    config: ModelConfig
    model_devices: int
    attention_workers: int
    batch: int
    tokens: int = 1
    num_batches: int = 2
    context: int = 4096
    page_size: int = 16
    kv_cache_dtype: str = AUTO

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


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of all weights of a model, or of a device's part of one, in the config's dtype."""
    _, state = abstract_model(config, dtype=config.dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def slice_weight_bytes(shapes: SliceShapes, k: int) -> int:
    """Bytes of the weights that slice `k` takes on each device."""
    program = shapes.parts.programs[shapes.parts.slices[k].program]
    return sum(_nbytes(partition.shape_of(v)) for v in program.weights)


def in_flight_bytes(deployment: Deployment, shapes: SliceShapes) -> int:
    """Bytes that the batches keep on each device between slices: the step's inputs, and the largest context."""
    parts = shapes.parts
    inputs = sum(_nbytes(value) for value in parts.values[: parts.num_inputs])
    context = max(sum(_nbytes(parts.values[i]) for i in s.context) for s in parts.slices)
    return deployment.num_batches * (inputs + context)


def worker_config(deployment: Deployment, *, kernel: str, cache_bytes: int) -> AttentionWorkerConfig:
    """An attention worker of which the KV cache takes at most `cache_bytes`."""
    config = deployment.config
    share = split_heads(config.num_heads, config.num_kv_heads, deployment.attention_workers)[0]
    stored = stored_dtype(deployment.kv_cache_dtype, config.dtype)
    vector_bytes = config.head_dim * stored.itemsize + scale_bytes(stored)
    page_bytes = 2 * config.num_layers * share.num_kv * deployment.page_size * vector_bytes
    return AttentionWorkerConfig(
        name="attention worker",
        layers=tuple(config.attend_params(i) for i in range(config.num_layers)),
        num_heads=share.num_q,
        num_kv_heads=share.num_kv,
        head_dim=config.head_dim,
        dtype=config.dtype,
        kv_cache_dtype=deployment.kv_cache_dtype,
        page_size=deployment.page_size,
        num_pages=cache_bytes // page_bytes,
        max_step_tokens=deployment.batch * deployment.tokens,
        kernel=kernel,
    )


def cache_shapes(config: AttentionWorkerConfig) -> PagedCache:
    """The worker's KV cache."""
    make = functools.partial(
        PagedCache.zeros,
        num_layers=len(config.layers),
        num_pages=config.num_pages,
        num_kv_heads=config.num_kv_heads,
        page_size=config.page_size,
        head_dim=config.head_dim,
        dtype=config.dtype,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    return jax.eval_shape(make)


def compile_attention(deployment: Deployment, config: AttentionWorkerConfig, target: Target) -> Compiled:
    """Compiles the attention worker's step of all batches for one device."""
    devices = mesh(target, 1)
    share = jax.ShapeDtypeStruct(
        (deployment.batch, deployment.tokens, config.num_heads + 2 * config.num_kv_heads, config.head_dim), config.dtype
    )
    messages = [MessageSpec(tag=Tag.Q, tensors=(share,))]
    batches = range(deployment.num_batches)
    ends = lambda role: [AotChannel.create(role=role, peer="model worker", messages=messages) for _ in batches]  # noqa: E731
    kernel = get_kernel(config.kernel, devices.devices.flat[0])
    step = AttentionStep(config=config, kernel=kernel, inboxes=ends("reader"), outboxes=ends("writer"))
    max_pages = -(-deployment.context // deployment.page_size)
    tables = [StepTables.shapes(deployment.batch, max_pages)] * deployment.num_batches
    stamps = jax.ShapeDtypeStruct((deployment.num_batches, 3), jnp.int32)
    indices = jax.ShapeDtypeStruct((deployment.num_batches,), jnp.int32)
    place = functools.partial(_on, devices, spec=PartitionSpec())
    arguments = jax.tree.map(place, (cache_shapes(config), stamps, indices, tables))
    return compile_for_gpu(functools.partial(step.run, tokens=deployment.tokens), arguments, donate_argnums=0)


def _nbytes(value: jax.ShapeDtypeStruct) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


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
        # One program runs on every device, so its lists have the channels of all of them.
        return [
            [
                AotChannel.create(role=role, peer=f"attention worker {w}", messages=messages)
                for _ in range(deployment.model_devices * deployment.num_batches)
            ]
            for w in range(workers)
        ]

    return SlicePorts(
        shares=shares,
        down=channels("writer", Tag.Q, Tag.KV),
        up=channels("reader", Tag.ATTENDED),
        head_dim=config.head_dim,
        dtype=dtype,
    )
