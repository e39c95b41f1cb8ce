"""What the engine and the attention workers say to each other on the control socket (msgspec over ZeroMQ).

Tensors of a step never travel here, only through channels; what does is sent ahead of the step that needs it.
"""

import msgspec

from lamina_jax.attention.params import AttendParams
from lamina_jax.attention.quantization import AUTO
from lamina_jax.transport import ChannelAddress


class AttentionWorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that an attention worker has to know about its share of the model."""

    name: str
    """As it appears in errors, e.g. 'attention worker 1'."""
    layers: tuple[AttendParams, ...]
    """The parameters of each layer's attention."""
    num_heads: int
    """Query heads of this worker."""
    num_kv_heads: int
    """KV heads of this worker."""
    head_dim: int
    dtype: str
    """Of q, k and v."""
    kv_cache_dtype: str = AUTO
    """How the cache holds k and v: a name in `lamina_jax.attention.quantization.STORED`."""
    page_size: int
    """Tokens in a page."""
    num_pages: int
    """Pages of the pool, the same number in each layer."""
    kernel: str
    """Name in `lamina_jax.attention.kernels.KERNELS`."""
    trace_dir: str | None = None
    """Where the worker writes its timeline when it ends; None records nothing."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled shape that a step is padded to."""

    batch: int
    """Sequences."""
    tokens: int
    """New tokens of each sequence; 1 in decoding."""
    max_pages: int
    """Width of the block tables."""


class Hello(msgspec.Struct, tag=True):
    """Worker: I am up."""

    worker: int
    device_bytes: int | None = None
    """Memory that the worker may take on its device, where that is a GPU."""


class Configure(msgspec.Struct, tag=True):
    """Engine: this is your share; attach to these channels."""

    config: AttentionWorkerConfig
    inboxes: tuple[ChannelAddress, ...]
    """The worker reads q, k and v of each batch here."""
    outboxes: tuple[ChannelAddress, ...]
    """The worker writes attention outputs of each batch here."""


class Prepare(msgspec.Struct, tag=True):
    """Engine: compile this bucket now for so many batches, so that no step has to wait for it."""

    bucket: Bucket
    num_batches: int
    """Batches that take their steps together."""


class RunStep(msgspec.Struct, tag=True):
    """Engine: run one step of some batches, layer by layer in turn. Arrays are int32 in native byte order."""

    bucket: Bucket
    batches: tuple[int, ...]
    """Numbers of the batches, below the number of channels."""
    context_lens: bytes
    """[len(batches), batch]"""
    num_new: bytes
    """[len(batches), batch]"""
    block_tables: bytes
    """[len(batches), batch, max_pages]"""


class Done(msgspec.Struct, tag=True):
    """Worker: what was asked (Configure, Prepare) is done."""

    answers: tuple[ChannelAddress | None, ...] = ()
    """To Configure: `Channel.answer` of the worker's end of every inbox, then of every outbox."""


class Failed(msgspec.Struct, tag=True):
    """Worker: I cannot go on, and end now."""

    message: str


class Shutdown(msgspec.Struct, tag=True):
    """Engine: end."""


ToWorker = Configure | Prepare | RunStep | Shutdown
FromWorker = Hello | Done | Failed
