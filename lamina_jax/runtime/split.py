"""The model cut at its attends: slices run here, attention in workers, channels join them."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lamina_jax import partition
from lamina_jax.runtime.executor import CacheConfig, Executor
from lamina_jax.runtime.messages import AttentionWorkerConfig, Bucket, Configure, RunStep
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.pool import AttentionWorkerPool
from lamina_jax.runtime.schedule import Turn, turns
from lamina_jax.runtime.stamps import first_stamp, next_layer, next_step
from lamina_jax.transport import Channel, MessageSpec, Tag, attach, channel_class, fence, recv, send


@dataclasses.dataclass(frozen=True)
class _Heads:
    """One worker's contiguous share of the heads."""

    q: slice
    kv: slice


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A compiled slice but for the weights: slices with equal plans share it."""

    program: int
    """Index into `Partition.programs`."""
    given: tuple[jax.ShapeDtypeStruct, ...]
    """Values that the caller passes in."""
    received: tuple[jax.ShapeDtypeStruct, ...]
    """Values that the replica of the slice before sends; none where batches do not move."""
    reads: tuple[int, ...]
    """Where the program's reads are among the values given and received."""
    sent: tuple[int, ...]
    """Where the values for the next replica are among those and the program's writes."""
    returns: bool
    """Whether the writes go back to the caller."""


def _plan_slice(parts: partition.Partition, k: int, *, moves: bool) -> _Plan:
    this, last = parts.slices[k], k == len(parts.slices) - 1
    given = tuple(range(parts.num_inputs)) if moves else this.reads
    received = parts.slices[k - 1].context if moves and k else ()
    at_hand = (*given, *received)
    return _Plan(
        program=this.program,
        given=tuple(parts.values[i] for i in given),
        received=tuple(parts.values[i] for i in received),
        reads=tuple(at_hand.index(i) for i in this.reads),
        sent=tuple((*at_hand, *this.writes).index(i) for i in this.context) if moves and not last else (),
        returns=last or not moves,
    )


class _SlicedModel:
    """The slices of one (batch, tokens) shape, compiled for every replica."""

    def __init__(
        self,
        parts: partition.Partition,
        compile_slice: Callable[[int, partition.SliceProgram, _Plan], jax.stages.Compiled],
        weights: Sequence[Sequence[jax.Array]],
    ) -> None:
        """Args:
        compile_slice: compiles a plan for a replica.
        weights: for each replica the values of `Traced.weight_vars`.
        """
        self.num_slices = len(parts.slices)
        self._parts = parts
        self._moves = len(weights) > 1
        plans = [_plan_slice(parts, k, moves=self._moves) for k in range(self.num_slices)]
        compiled = [
            {plan: compile_slice(replica, parts.programs[plan.program], plan) for plan in dict.fromkeys(plans)}
            for replica in range(len(weights))
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
    """The model's slices here, its attention in the workers of a pool, channels between."""

    def __init__(
        self,
        model: Model,
        config: CacheConfig,
        pool: AttentionWorkerPool,
        *,
        num_batches: int,
        replicas: Sequence[SingleDeviceSharding],
        overlap: bool,
        max_step_tokens: int,
        timeout_s: float,
        trace_dir: str | None = None,
    ) -> None:
        """Args:
            num_batches: most batches in flight at a time.
            replicas: devices for the model, `schedule.num_replicas(num_batches)` of them; each gets all weights.
            overlap: send q before k and v are computed, so that attention over the cache starts meanwhile.
            max_step_tokens: largest batch x tokens of any bucket; sizes the channels.
            timeout_s: longest wait for one message, in seconds.
            trace_dir: where the workers write their timelines when they end (`runtime.timeline`); None for none.

        Raises:
            ValueError: there are more workers than KV heads.
            WorkerError: a worker did not start.
        """
        self._model = model
        self._pool = pool
        self._num_batches = num_batches
        self._overlap = overlap
        self._trace_dir = trace_dir
        self._replicas = list(replicas)
        self._weights: list[list[jax.Array]] = []
        self._stamps = [first_stamp(b) for b in range(num_batches)]
        self._num_steps = [0] * num_batches
        self._num_slices_done = 0
        self._prepared: set[tuple[Bucket, int]] = set()
        self._sliced: dict[tuple[int, int], _SlicedModel] = {}
        site = model.sites[0]
        self._shares = split_heads(site.q.shape[2], site.kv.shape[2], len(pool.names()))
        # By worker, then by batch: batches never wait for one another's messages.
        self._down: list[list[Channel]] = []
        self._up: list[list[Channel]] = []
        for name, share in zip(pool.names(), self._shares, strict=True):
            self._open_channels(name, share, max_step_tokens, timeout_s)
        # By replica, then by batch: from a replica to the next one.
        self._context_out: list[list[Channel]] = []
        self._context_in: list[list[Channel]] = []
        if len(replicas) > 1:
            self._open_context_channels(max_step_tokens, timeout_s)
        pool.configure([self._configuration(config, i) for i in range(len(self._shares))])

    def prepare(self, bucket: Bucket, num_batches: int) -> None:
        if (bucket, num_batches) in self._prepared:
            return
        self._pool.prepare(bucket, num_batches)
        shape = (bucket.batch, bucket.tokens)
        if shape not in self._sliced:
            traced = self._model.traced(*shape)
            self._sliced[shape] = _SlicedModel(
                partition.cut(traced), functools.partial(self._compile, shape), self._weights_of(traced)
            )
        self._pool.wait_done()
        self._prepared.add((bucket, num_batches))

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
        values = [
            dict(enumerate((jax.device_put(t, first[p.batch]), p.positions, p.logit_index)))
            for p, t in zip(plans, tokens, strict=True)
        ]
        for turn in order:
            i = index[turn.batch]
            if turn.slice == 0:
                # From the end of the batch's last step: this one must not overtake it on another replica.
                stamp = jax.device_put(self._stamps[turn.batch], self._replicas[turn.replica])
            else:
                # That of the messages it awaits, of the layer before. What else orders it is its context.
                stamp = np.array([self._num_steps[turn.batch], turn.slice - 1, turn.batch], np.int32)
            self._stamps[turn.batch] = sliced.dispatch(turn, values[i], stamp)
            if turn.slice == sliced.num_slices - 1:
                (logits,) = sliced.outputs(values[i])
                yield i, logits
        for plan in plans:
            self._num_steps[plan.batch] += 1
        self._num_slices_done += sliced.num_slices

    def check(self) -> None:
        self._pool.check()

    def explain(self, error: Exception) -> Exception:
        failure = next((e for c in self._channels() if (e := c.error()) is not None), None)
        return error if failure is None else self._pool.explain(failure)

    def close(self) -> None:
        for channel in self._channels():
            channel.abort()
        self._pool.close()
        for channel in self._channels():
            channel.close()

    def _channels(self) -> Iterator[Channel]:
        return itertools.chain(*self._up, *self._down, *self._context_out, *self._context_in)

    def _open_channels(self, name: str, share: _Heads, max_step_tokens: int, timeout_s: float) -> None:
        q, kv = self._message_shapes(share, 1, max_step_tokens)
        options = {"peer": name, "timeout_s": timeout_s}
        requests = [MessageSpec(tag=Tag.Q, tensors=(q,)), MessageSpec(tag=Tag.KV, tensors=(kv, kv))]
        answers = [MessageSpec(tag=Tag.ATTENDED, tensors=(q,))]
        shm = channel_class("shm")
        batches = range(self._num_batches)
        self._down.append([shm.create(role="writer", messages=requests, **options) for _ in batches])
        self._up.append([shm.create(role="reader", messages=answers, **options) for _ in batches])

    def _message_shapes(self, share: _Heads, batch: int, tokens: int):
        site = self._model.sites[0]
        q = jax.ShapeDtypeStruct((batch, tokens, share.q.stop - share.q.start, site.q.shape[3]), site.q.dtype)
        kv = jax.ShapeDtypeStruct((batch, tokens, share.kv.stop - share.kv.start, site.kv.shape[3]), site.kv.dtype)
        return q, kv

    def _configuration(self, config: CacheConfig, worker: int) -> Configure:
        site, share = self._model.sites[0], self._shares[worker]
        return Configure(
            config=AttentionWorkerConfig(
                name=self._pool.names()[worker],
                layers=tuple(s.params for s in self._model.sites),
                num_heads=share.q.stop - share.q.start,
                num_kv_heads=share.kv.stop - share.kv.start,
                head_dim=site.kv.shape[3],
                dtype=str(site.kv.dtype),
                page_size=config.page_size,
                num_pages=config.num_pages,
                kernel=config.kernel,
                trace_dir=self._trace_dir,
            ),
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
            self._weights = [jax.device_put(weights, replica) for replica in self._replicas]
        return self._weights

    def _compile(
        self, shape: tuple[int, int], replica: int, program: partition.SliceProgram, plan: _Plan
    ) -> jax.stages.Compiled:
        place = self._replicas[replica]
        on_device = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
        weights = tuple(on_device(partition.shape_of(v)) for v in program.weights)
        stamp = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=place)
        run = jax.jit(functools.partial(self._run_slice, shape, replica, program, plan))
        return run.lower(weights, tuple(map(on_device, plan.given)), stamp).compile()

    def _run_slice(
        self,
        shape: tuple[int, int],
        replica: int,
        program: partition.SliceProgram,
        plan: _Plan,
        weights,
        given,
        stamp,
    ):
        at_hand = list(given)
        if program.attended is None:
            stamp = next_step(stamp)
        if plan.received:
            received, stamp = recv(self._context_in[replica], stamp, plan.received, tag=Tag.CONTEXT)
            at_hand += received

        def recv_attended() -> jax.Array:
            nonlocal stamp
            attended, stamp = self._recv_attended(shape, stamp)
            stamp = next_layer(stamp)
            return attended

        held: list[jax.Array] = []

        def send_q(q: jax.Array) -> None:
            nonlocal stamp
            if self._overlap:
                stamp = self._send_heads(stamp, [q], Tag.Q)
            else:
                held.append(q)

        def send_kv(k: jax.Array, v: jax.Array) -> None:
            nonlocal stamp
            if not self._overlap:
                stamp = self._send_heads(stamp, held, Tag.Q)
            stamp = self._send_heads(stamp, [k, v], Tag.KV)

        def keep_order(values: list[jax.Array]) -> list[jax.Array]:
            nonlocal stamp
            stamp, values = fence(stamp, values)
            return values

        ports = partition.Ports(recv=recv_attended, send_q=send_q, send_kv=send_kv, fence=keep_order)
        writes = program.run(weights, [at_hand[i] for i in plan.reads], ports)
        if plan.sent:
            at_hand += writes
            stamp = send(self._context_out[replica], stamp, [at_hand[i] for i in plan.sent], tag=Tag.CONTEXT)
        # The stamp goes out too, or XLA would drop the sends.
        return (writes if plan.returns else []), stamp

    def _send_heads(self, stamp: jax.Array, tensors: list[jax.Array], tag: Tag) -> jax.Array:
        for channels, share in zip(self._down, self._shares, strict=True):
            heads = share.q if tag is Tag.Q else share.kv
            stamp = send(channels, stamp, [x[:, :, heads] for x in tensors], tag=tag)
        return stamp

    def _recv_attended(self, shape: tuple[int, int], stamp: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = []
        for channels, share in zip(self._up, self._shares, strict=True):
            spec, _ = self._message_shapes(share, *shape)
            (part,), stamp = recv(channels, stamp, [spec], tag=Tag.ATTENDED)
            parts.append(part)
        return jnp.concatenate(parts, axis=2), stamp


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


def split_heads(num_heads: int, num_kv_heads: int, num_workers: int) -> list[_Heads]:
    """Contiguous shares of the KV heads, and the query heads that read them, as even as they go.

    Raises:
        ValueError: there are more workers than KV heads.
    """
    if num_workers > num_kv_heads:
        raise ValueError(
            f"num_attention_workers is {num_workers}, but the model has only {num_kv_heads} KV heads to divide; "
            f"use at most {num_kv_heads} attention workers."
        )
    group = num_heads // num_kv_heads
    bounds = [worker * num_kv_heads // num_workers for worker in range(num_workers + 1)]
    return [_Heads(slice(a * group, b * group), slice(a, b)) for a, b in itertools.pairwise(bounds)]
