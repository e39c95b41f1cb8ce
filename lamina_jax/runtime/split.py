"""The model cut at its attends: slices run here, attention in workers, channels join them."""

import collections
import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from lamina_jax import partition
from lamina_jax.runtime.attention_step import answers, message_list, requests
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.executor import CacheConfig, Executor
from lamina_jax.runtime.gpu_options import compiler_options
from lamina_jax.runtime.messages import AttentionWorkerConfig, Bucket, Configure, RunStep
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.pool import AttentionWorkers
from lamina_jax.runtime.schedule import Turn, turns
from lamina_jax.runtime.slices import Heads, SlicePlan, SlicePorts, plan_slice, split_heads
from lamina_jax.runtime.stamps import first_stamp
from lamina_jax.transport import (
    Channel,
    ChannelAddress,
    ChannelError,
    MessageSpec,
    Tag,
    attach,
    channel_class,
    first_failure,
)

# A NIC takes a second or so to find out that its peer does not answer.
_TELLS_S: Final = 3.0
_POLL_S: Final = 0.02


class _SlicedModel:
    """The slices of one (batch, tokens) shape, compiled for every replica."""

    def __init__(
        self,
        parts: partition.Partition,
        compile_slice: Callable[[int, int, SlicePlan], jax.stages.Compiled],
        weights: Sequence[Sequence[jax.Array]],
    ) -> None:
        """Args:
        compile_slice: compiles for a replica the plan of a slice.
        weights: for each replica the values of `Traced.weight_vars`.
        """
        self.num_slices = len(parts.slices)
        self._parts = parts
        self._moves = len(weights) > 1
        plans = [plan_slice(parts, k, moves=self._moves) for k in range(self.num_slices)]
        first = {plan: k for k, plan in reversed(list(enumerate(plans)))}
        compiled = [
            {plan: compile_slice(replica, k, plan) for plan, k in first.items()} for replica in range(len(weights))
        ]
        self._programs = [[own[plan] for plan in plans] for own in compiled]
        self._weights = [[tuple(own[i] for i in s.weights) for s in parts.slices] for own in weights]

    def dispatch(self, turn: Turn, values: dict[int, Any], stamp: jax.Array | np.ndarray) -> jax.Array:
        """Dispatches a slice of a batch; returns its stamp. `values` are those of the batch that the host has: it adds
        and takes away."""
        this = self._parts.slices[turn.slice]
        given = tuple(values[i] for i in (range(self._parts.num_inputs) if self._moves else this.reads))
        weights = self._weights[turn.replica][turn.slice]
        writes, stamp_out = self._programs[turn.replica][turn.slice](weights, given, stamp)
        values.update(zip(this.writes, writes, strict=False))
        if not self._moves:
            for i in this.drops:
                del values[i]
        return stamp_out

    def outputs(self, values: dict[int, Any]) -> list[jax.Array]:
        """The model's outputs, after the last slice."""
        return [values[i] for i in self._parts.outputs]


class SplitExecutor(Executor):
    """The model's slices here, its attention in workers, channels between."""

    def __init__(
        self,
        model: Model,
        config: CacheConfig,
        pool: AttentionWorkers,
        *,
        num_batches: int,
        replicas: Sequence[Sharding],
        channel_kinds: Sequence[str],
        overlap: bool,
        max_step_tokens: int,
        timeout_s: float,
        trace_dir: str | None = None,
    ) -> None:
        """Args:
            num_batches: most batches in flight at a time.
            replicas: where each replica of the model lies, `schedule.num_replicas(num_batches)` of them: a device, or
                the mesh that the model is divided over.
            channel_kinds: for each attention worker one of `transport.channel_kinds()`.
            overlap: send q before k and v are computed, so that attention over the cache starts meanwhile.
            max_step_tokens: largest batch x tokens of any bucket; sizes the channels.
            timeout_s: longest wait for one message, in seconds.
            trace_dir: where the workers write their timelines when they end (`runtime.timeline`); None for none.

        Raises:
            ValueError: there are more workers than KV heads, or not as many for each device of the model.
            WorkerError: a worker did not start, or did not answer how to reach its ends of the channels.
        """
        self._model = model
        self._pool = pool
        self._num_batches = num_batches
        self._overlap = overlap
        self._trace_dir = trace_dir
        self._replicas = list(replicas)
        self._weights: list[list[jax.Array]] = []
        self._stamps = [jax.device_put(first_stamp(b), self._replicas[0]) for b in range(num_batches)]
        # Of slices on several replicas, whose stamps do not depend on one another.
        self._in_flight: collections.deque[Any] = collections.deque()
        self._closed = False
        self._num_steps = [0] * num_batches
        self._num_slices_done = 0
        self._prepared: set[tuple[Bucket, int]] = set()
        self._sliced: dict[tuple[int, int], _SlicedModel] = {}
        # The shares of one device's heads; every device has as many workers.
        self._shares = _shares(model, len(pool.names()))
        # By worker, then by batch: batches never wait for one another's messages. The first workers are those of the
        # first device.
        self._down: list[list[Channel]] = []
        self._up: list[list[Channel]] = []
        # By replica, then by batch: from a replica to the next one.
        self._context_out: list[list[Channel]] = []
        self._context_in: list[list[Channel]] = []
        names = pool.names()
        configs = [self._worker_config(config, i, max_step_tokens) for i in range(len(names))]
        try:
            for i, kind in enumerate(channel_kinds):
                self._open_channels(channel_class(kind), i, configs[i], timeout_s)
            if len(replicas) > 1:
                self._open_context_channels(max_step_tokens, timeout_s)
            replies = pool.configure([self._configuration(c, i) for i, c in enumerate(configs)])
            for i, name in enumerate(names):
                _connect([*self._down[i], *self._up[i]], replies[i], name)
        except BaseException:
            for channel in self._channels():
                channel.close()
            raise
        ends = tuple(channel.in_programs for channel in self._channels())
        setting = (tuple(replicas), tuple(self._shares), num_batches, overlap, ends)
        # By shape, replica and plan.
        self._compiled: dict[tuple[tuple[int, int], int, SlicePlan], jax.stages.Compiled] = model.kept.of(setting)

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        if (bucket, num_batches) in self._prepared:
            return
        self._pool.prepare(bucket, num_batches)
        shape = (bucket.batch, bucket.tokens)
        if shape not in self._sliced:
            self._sliced[shape] = self._slice(shape)
        self._pool.wait_done()
        self._prepared.add((bucket, num_batches))

    def _slice(self, shape: tuple[int, int]) -> _SlicedModel:
        traced = self._model.traced(*shape)
        parts = partition.cut(traced)
        specs = self._model.weight_specs(traced) if self._model.division else []

        def compile_slice(replica: int, k: int, plan: SlicePlan) -> jax.stages.Compiled:
            own = [specs[i] for i in parts.slices[k].weights] if specs else []
            key = (shape, replica, plan)
            if key not in self._compiled:
                self._compiled[key] = self._compile(shape, replica, parts.programs[plan.program], plan, own)
            return self._compiled[key]

        return _SlicedModel(parts, compile_slice, self._weights_of(traced))

    def forward(self, plans, tokens):
        # First the workers, then the slices: a slice may run, and wait for its answer, as it is dispatched.
        self._pool.run_step(_message(plans))
        bucket = plans[0].bucket
        sliced = self._sliced[bucket.batch, bucket.tokens]
        order = turns(
            sorted(plan.batch for plan in plans),
            sliced.num_slices,
            num_batches=self._num_batches,
            first_slice=self._num_slices_done,
        )
        index = {plan.batch: i for i, plan in enumerate(plans)}
        first = {turn.batch: self._replicas[turn.replica] for turn in order if turn.slice == 0}
        values = [dict(enumerate(self._inputs(p, t, first[p.batch]))) for p, t in zip(plans, tokens, strict=True)]
        for turn in order:
            if self._closed:
                raise RuntimeError("the executor was closed while it dispatched a step")
            i = index[turn.batch]
            if len(self._replicas) == 1:
                # As the slice before left it: nothing is copied to the device between slices.
                stamp = self._stamps[turn.batch]
            elif turn.slice == 0:
                # From the end of the batch's last step: this one must not overtake it on another replica.
                stamp = jax.device_put(self._stamps[turn.batch], self._replicas[turn.replica])
            else:
                # That of the messages it awaits, of the layer before. What else orders it is its context.
                stamp = np.array([self._num_steps[turn.batch], turn.slice - 1, turn.batch], np.int32)
            self._stamps[turn.batch] = stamp = sliced.dispatch(turn, values[i], stamp)
            if len(self._replicas) > 1:
                self._in_flight.append(stamp)
                while self._in_flight and self._in_flight[0].is_ready():
                    self._in_flight.popleft()
            if turn.slice == sliced.num_slices - 1:
                (logits,) = sliced.outputs(values[i])
                yield i, logits
        for plan in plans:
            self._num_steps[plan.batch] += 1
        self._num_slices_done += sliced.num_slices

    def _inputs(self, plan: StepPlan, tokens: jax.Array | np.ndarray, place: Sharding) -> Sequence[Any]:
        """The model's inputs, of which batches that move between replicas take the host's everywhere."""
        inputs = (plan.positions, plan.logit_index)
        if len(self._replicas) == 1:
            # Once, and not again with every slice that reads them.
            inputs = jax.device_put(inputs, place)
        return jax.device_put(tokens, place), *inputs

    def check(self) -> None:
        self._pool.check()
        if (failure := self._failure()) is not None:
            # Without the worker's own reason, which `explain` waits for.
            raise WorkerError(str(failure))

    def explain(self, error: Exception) -> Exception:
        failure = self._failure()
        # A worker's end is heard of before its channels tell, which know device and cause.
        deadline = time.monotonic() + _TELLS_S
        while failure is None and self._waits() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            failure = self._failure()
        return error if failure is None else self._pool.explain(failure)

    def _waits(self) -> bool:
        """Whether a slice is under way."""
        return not all(stamp.is_ready() for stamp in (*self._stamps, *self._in_flight))

    def _failure(self) -> ChannelError | None:
        return first_failure(self._channels())

    def close(self) -> None:
        self._closed = True
        for channel in self._channels():
            channel.abort()
        self._pool.close()
        try:
            # Slices still under way fail now; one that began later might meet another channel under the same number.
            for stamp in (*self._stamps, *self._in_flight):
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    stamp.block_until_ready()
        finally:
            for channel in self._channels():
                channel.close()

    def _channels(self) -> Iterator[Channel]:
        return itertools.chain(*self._up, *self._down, *self._context_out, *self._context_in)

    def _open_channels(self, kind: type[Channel], worker: int, config: AttentionWorkerConfig, timeout_s: float) -> None:
        options = {"peer": config.name, "timeout_s": timeout_s, "device": self._device_of(worker)}
        down, up = [], []
        self._down.append(down)
        self._up.append(up)
        for _ in range(self._num_batches):
            down.append(kind.create(role="writer", messages=requests(config), **options))
            up.append(kind.create(role="reader", messages=answers(config), **options))

    def _share_of(self, worker: int) -> Heads:
        """A worker's heads among those of its device."""
        return self._shares[worker % len(self._shares)]

    def _device_of(self, worker: int) -> int | None:
        """The device that a worker answers; None if replicas on several devices send to it in turn."""
        if len(self._replicas) > 1:
            return None
        (replica,) = self._replicas
        if self._model.division is None:
            (device,) = replica.device_set
        else:
            device = self._model.division.mesh.devices.flat[worker // len(self._shares)]
        return device.local_hardware_id

    def _ports(self, replica: int) -> SlicePorts:
        site, moves = self._model.sites[0], len(self._replicas) > 1
        return SlicePorts(
            shares=self._shares,
            down=self._of_all_devices(self._down),
            up=self._of_all_devices(self._up),
            head_dim=site.kv.shape[3],
            dtype=site.kv.dtype,
            overlap=self._overlap,
            context_in=self._context_in[replica] if moves else (),
            context_out=self._context_out[replica] if moves else (),
        )

    def _of_all_devices(self, ends: Sequence[Sequence[Channel]]) -> list[list[Channel]]:
        """By worker of a device the channels of all devices, each device's by batch: all run one program."""
        count = len(self._shares)
        return [list(itertools.chain(*ends[first::count])) for first in range(count)]

    def _worker_config(self, config: CacheConfig, worker: int, max_step_tokens: int) -> AttentionWorkerConfig:
        site, share = self._model.sites[0], self._share_of(worker)
        return AttentionWorkerConfig(
            name=self._pool.names()[worker],
            layers=tuple(s.params for s in self._model.sites),
            num_heads=share.num_q,
            num_kv_heads=share.num_kv,
            head_dim=site.kv.shape[3],
            dtype=str(site.kv.dtype),
            kv_cache_dtype=config.dtype,
            page_size=config.page_size,
            num_pages=config.num_pages,
            max_step_tokens=max_step_tokens,
            kernel=config.kernel,
            trace_dir=self._trace_dir,
        )

    def _configuration(self, config: AttentionWorkerConfig, worker: int) -> Configure:
        return Configure(
            config=config,
            messages=message_list(config),
            inboxes=tuple(c.address for c in self._down[worker]),
            outboxes=tuple(c.address for c in self._up[worker]),
        )

    def _open_context_channels(self, max_step_tokens: int, timeout_s: float) -> None:
        parts = partition.cut(self._model.traced(1, 1))
        # Every value that grows with the step is [batch, tokens, ..] or smaller: a step's is at most this much larger.
        sizes = [sum(_nbytes(parts.values[i]) for i in s.context) for s in parts.slices[:-1]]
        whole = jax.ShapeDtypeStruct((max(max(sizes), 1) * max_step_tokens // 4 + 64 * len(parts.values),), jnp.int32)
        count = len(self._replicas)
        shm = channel_class("shm")
        for r in range(count):
            messages = [MessageSpec(tag=Tag.CONTEXT, tensors=(whole,))]
            peer = f"model replica {(r + 1) % count}"
            ends = [
                shm.create(role="writer", peer=peer, messages=messages, timeout_s=timeout_s)
                for _ in range(self._num_batches)
            ]
            self._context_out.append(ends)
        for r in range(count):
            before = self._context_out[r - 1]
            peer = f"model replica {(r - 1) % count}"
            self._context_in.append([attach(c.address, role="reader", peer=peer, timeout_s=timeout_s) for c in before])

    def _weights_of(self, traced: partition.Traced) -> list[list[jax.Array]]:
        """For each replica the weights on its device."""
        if not self._weights:
            weights = self._model.weights(traced)
            self._weights = [self._placed(weights, traced, replica) for replica in self._replicas]
        return self._weights

    def _placed(self, weights: list[jax.Array], traced: partition.Traced, replica: Sharding) -> list[jax.Array]:
        division = self._model.division
        if division is None:
            return jax.device_put(weights, replica)
        return jax.device_put(weights, [NamedSharding(division.mesh, s) for s in self._model.weight_specs(traced)])

    def _compile(
        self,
        shape: tuple[int, int],
        replica: int,
        program: partition.SliceProgram,
        plan: SlicePlan,
        specs: Sequence[PartitionSpec],
    ) -> jax.stages.Compiled:
        """Args:
        specs: how each of the program's weights lies along the axis of the model's division; not read without one.
        """
        place, division = self._replicas[replica], self._model.division
        on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        run = self._ports(replica).function(program, plan, *shape)
        weights = [on_device(partition.shape_of(v)) for v in program.weights]
        if division is not None:
            whole = PartitionSpec()
            run = jax.shard_map(
                run,
                mesh=division.mesh,
                in_specs=(tuple(specs), whole, whole),
                out_specs=(whole, whole),
                check_vma=False,  # what is whole is so by the model's own sums over the axis
            )
            weights = [_whole(w, NamedSharding(division.mesh, spec)) for w, spec in zip(weights, specs, strict=True)]
        stamp = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=place)
        lowered = jax.jit(run).lower(tuple(weights), tuple(map(on_device, plan.given)), stamp)
        return lowered.compile(compiler_options=compiler_options(next(iter(place.device_set)).platform))


def _connect(channels: Sequence[Channel], answers: Sequence[ChannelAddress | None], worker: str) -> None:
    for channel, answer in zip(channels, answers, strict=True):
        try:
            channel.connect(answer)
        except (ValueError, OSError) as error:
            raise WorkerError(
                f"cannot connect to the ends of channels that {worker} has attached to: {error}"
            ) from error


def _shares(model: Model, num_workers: int) -> list[Heads]:
    if num_workers % model.num_devices:
        raise ValueError(
            f"expected as many attention workers for each of the {model.num_devices} devices that share the model, got "
            f"{num_workers} workers; make num_attention_workers a multiple of tensor_parallel_size."
        )
    site = model.sites[0]
    return split_heads(site.q.shape[2], site.kv.shape[2], num_workers // model.num_devices)


def _whole(local: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The array of which every device has a part of this shape."""
    divided = [axis is not None for axis in sharding.spec]
    shape = tuple(n * sharding.mesh.size if i < len(divided) and divided[i] else n for i, n in enumerate(local.shape))
    return jax.ShapeDtypeStruct(shape, local.dtype, sharding=sharding)


def _nbytes(value: jax.ShapeDtypeStruct) -> int:
    return math.prod(value.shape) * value.dtype.itemsize


def _message(plans: Sequence[StepPlan]) -> RunStep:
    return RunStep(
        bucket=plans[0].bucket,
        batches=tuple(p.batch for p in plans),
        context_lens=np.stack([p.context_lens for p in plans]).tobytes(),
        num_new=np.stack([p.num_new for p in plans]).tobytes(),
        block_tables=np.stack([p.block_tables for p in plans]).tobytes(),
    )
