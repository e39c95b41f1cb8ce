"""The attention worker's step, as a function to compile."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lamina_jax.attention.cache import PagedCache, StepTables, append
from lamina_jax.attention.kernels import AttentionKernel
from lamina_jax.attention.merge import merge
from lamina_jax.attention.params import LayerParams
from lamina_jax.runtime.messages import AttentionWorkerConfig
from lamina_jax.runtime.stamps import next_layer, next_step
from lamina_jax.transport import Channel, MessageSpec, Tag, fence, recv, send


def requests(config: AttentionWorkerConfig) -> list[MessageSpec]:
    """The largest messages that a worker's inboxes get."""
    q, kv = _largest(config, config.num_heads), _largest(config, config.num_kv_heads)
    return [MessageSpec(tag=Tag.Q, tensors=(q,)), MessageSpec(tag=Tag.KV, tensors=(kv, kv))]


def answers(config: AttentionWorkerConfig) -> list[MessageSpec]:
    """The largest messages that its outboxes take."""
    return [MessageSpec(tag=Tag.ATTENDED, tensors=(_largest(config, config.num_heads),))]


def message_list(config: AttentionWorkerConfig) -> tuple[str, ...]:
    """What travels between model worker and attention worker, in words that the two can compare."""
    return tuple(
        f"{message.tag.label} " + " ".join(f"{t.dtype.name}{list(t.shape)}" for t in message.tensors)
        for message in (*requests(config), *answers(config))
    )


def _largest(config: AttentionWorkerConfig, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.max_step_tokens, heads, config.head_dim), config.dtype)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AttentionStep:
    """For each layer and batch: awaits q, attends over the cache, awaits k and v, appends them, sends the output."""

    config: AttentionWorkerConfig
    kernel: AttentionKernel
    inboxes: Sequence[Channel]
    """Reading ends of q, k and v, by batch."""
    outboxes: Sequence[Channel]
    """Writing ends of the output, by batch."""

    def run(self, cache: PagedCache, stamps, batches, tables: list[StepTables], *, tokens: int):
        """One step of some batches, layer by layer in turn.

        Args:
            cache: to be donated.
            stamps: int32 [all batches, 3], of the messages before this step.
            batches: int32 [batches], which of them take part.
            tables: of each that does.
            tokens: new tokens of each sequence.

        Returns:
            The cache and the stamps after the step.
        """
        params = LayerParams.stack(self.config.layers)
        layers = jnp.arange(len(self.config.layers), dtype=jnp.int32)

        def layer(carry, xs):
            cache, own = carry
            done = []
            for stamp, batch_tables in zip(own, tables, strict=True):
                if done:
                    # Batches take turns: no recv may hold a thread that an earlier batch needs, and no reading of
                    # pages keep an earlier batch's answer waiting.
                    leaves, tree = jax.tree.flatten((stamp, batch_tables))
                    stamp, batch_tables = jax.tree.unflatten(tree, fence(done[-1], leaves)[1])
                cache, stamp = self._layer(cache, stamp, *xs, tables=batch_tables, tokens=tokens)
                done.append(stamp)
            return (cache, done), None

        own = [next_step(stamps[batches[i]]) for i in range(len(tables))]
        (cache, own), _ = jax.lax.scan(layer, (cache, own), (layers, params))
        return cache, stamps.at[batches].set(jnp.stack(own))

    def _layer(self, cache: PagedCache, stamp, layer, params: LayerParams, *, tables: StepTables, tokens: int):
        config = self.config
        batch = tables.context_lens.shape[0]
        q_spec = jax.ShapeDtypeStruct((batch, tokens, config.num_heads, config.head_dim), config.dtype)
        kv_spec = jax.ShapeDtypeStruct((batch, tokens, config.num_kv_heads, config.head_dim), config.dtype)

        (q,), stamp = recv(self.inboxes, stamp, [q_spec], tag=Tag.Q)
        cached = self.kernel.attend_cached(q, cache, layer, tables, params)
        # k and v are taken when they are wanted, not waited for by a thread that attention could use.
        leaves, tree = jax.tree.flatten(cached)
        stamp, leaves = fence(stamp, leaves)
        cached = jax.tree.unflatten(tree, leaves)
        (k, v), stamp = recv(self.inboxes, stamp, [kv_spec, kv_spec], tag=Tag.KV)
        new = self.kernel.attend_new(q, k, v, params)
        # XLA writes the cache in place only if it knows that every read of this layer came first; without the
        # barrier it copies the whole cache, once per layer (measured: 595 ms a step instead of 17).
        cached, k, v = jax.lax.optimization_barrier((cached, k, v))
        cache = append(cache, layer, k, v, tables)
        stamp = send(self.outboxes, stamp, [merge(cached, new).output(config.dtype)], tag=Tag.ATTENDED)
        return cache, next_layer(stamp)
