"""What engine, model worker and attention workers say to each other on control connections (msgspec over ZeroMQ).

Tensors of a step never travel here, only through channels; what does is sent ahead of the step that needs it.
"""

from typing import Annotated

import msgspec

from lamina_jax.attention.params import AttendParams
from lamina_jax.attention.quantization import AUTO
from lamina_jax.runtime.schedule import num_replicas
from lamina_jax.transport import ChannelAddress

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Index = Annotated[int, msgspec.Meta(ge=0)]


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
    max_step_tokens: int
    """Largest batch x tokens of a step."""
    kernel: str
    """Name in `lamina_jax.attention.kernels.KERNELS`."""
    trace_dir: str | None = None
    """Where the worker writes its timeline when it ends; None records nothing."""


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """A compiled shape that a step is padded to."""

    batch: _Count
    """Sequences."""
    tokens: _Count
    """New tokens of each sequence; 1 in decoding."""
    max_pages: _Count
    """Width of the block tables."""


class Hello(msgspec.Struct, tag=True):
    """Worker: I am up."""

    worker: int
    device_bytes: int | None = None
    """Memory that the worker may take on its device, where that is a GPU."""


class Configure(msgspec.Struct, tag=True):
    """Model worker: this is your share; attach to these channels."""

    config: AttentionWorkerConfig
    messages: tuple[str, ...]
    """What will travel, as the model worker understands it: `attention_step.message_list`."""
    inboxes: tuple[ChannelAddress, ...]
    """The worker reads q, k and v of each batch here."""
    outboxes: tuple[ChannelAddress, ...]
    """The worker writes attention outputs of each batch here."""


class Prepare(msgspec.Struct, tag=True):
    """Model worker: compile this bucket now for so many batches, so that no step has to wait for it."""

    bucket: Bucket
    num_batches: _Count
    """Batches that take their steps together."""


class RunStep(msgspec.Struct, tag=True):
    """Model worker: run one step of some batches, layer by layer in turn. Arrays are int32 in native byte order."""

    bucket: Bucket
    batches: Annotated[tuple[_Index, ...], msgspec.Meta(min_length=1)]
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
    """Model worker: end."""


ToWorker = Configure | Prepare | RunStep | Shutdown
FromWorker = Hello | Done | Failed


class Describe(msgspec.Struct, tag=True):
    """Model worker, to a worker of a cluster: what do you have?"""


class Available(msgspec.Struct, tag=True):
    """Attention worker: what I have, in answer to Describe."""

    platform: str
    """Where it runs, "cpu" or "cuda"."""
    cache_bytes: int
    """Memory that its KV cache may take."""


ToClusterWorker = Describe | Configure | Prepare | RunStep
FromClusterWorker = Available | Done


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What engine and model worker must agree on about a model; both read it from their own config.json."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    """Of the checkpoint."""


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Which devices a model takes; the fields are settings of `LLM`."""

    model_platform: str
    attention_platform: str
    num_attention_workers: int
    tensor_parallel_size: int
    num_batches: int
    model_memory_fraction: float | None

    @property
    def num_replicas(self) -> int:
        """Replicas of the model."""
        return num_replicas(self.num_batches) if self.num_attention_workers else 1

    @property
    def num_model_gpus(self) -> int:
        """GPUs that the model takes."""
        return 0 if self.model_platform == "cpu" else self.tensor_parallel_size * self.num_replicas


class LoadModel(msgspec.Struct, tag=True, kw_only=True):
    """Engine: read this model's weights, and open sessions with these attention workers."""

    directory: str
    """On the model worker's host."""
    facts: ModelFacts
    dtype: str
    placement: Placement
    attention_workers: tuple[str, ...]
    """Control addresses."""
    transport: str
    """Kind of the channels to them, or "auto"."""
    start_timeout_s: float
    """How long to wait for an attention worker that is not there yet."""


class Waiting(msgspec.Struct, tag=True):
    """Model worker: I am still waiting for this."""

    what: str


class Loaded(msgspec.Struct, tag=True, kw_only=True):
    """Model worker: the weights are there, and this is known now."""

    kv_dtype: str
    """Of the model's keys and values."""
    cache_bytes: int
    """What there is for the KV cache over all attention workers."""
    channels: tuple[str, ...]
    """For each attention worker which kind of channel leads there, and why."""


class ExecutorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How steps are run, once it is known how large the KV cache is; fields without a text are settings of `LLM`."""

    page_size: int
    num_pages: int
    """Pages of every worker's pool."""
    kv_cache_dtype: str
    attention_platform: str
    attention_kernel: str
    max_num_seqs: int
    max_step_tokens: int
    """Largest batch x tokens of a bucket."""
    num_batches: int
    overlap: bool
    timeout_s: float
    trace_dir: str | None


class MakeExecutor(msgspec.Struct, tag=True):
    """Engine: get ready to run steps."""

    settings: ExecutorSettings


class PlannedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A `plan.StepPlan`; arrays are in native byte order, with the shapes and dtypes given there."""

    bucket: Bucket
    batch: _Index
    tokens: bytes | None
    slots: bytes
    context_lens: bytes
    num_new: bytes
    block_tables: bytes
    emits: bytes
    sampling: dict[str, bytes]
    sampling_mode: str


class RunPlans(msgspec.Struct, tag=True):
    """Engine: run a step of several batches."""

    step: int
    """Its number, from 0; the answer has the same."""
    batches: Annotated[tuple[PlannedBatch, ...], msgspec.Meta(min_length=1)]


class Sampled(msgspec.Struct, tag=True):
    """Model worker: what a step has sampled."""

    step: int
    tokens: tuple[bytes, ...]
    """int32 [batch] of each batch."""


ToModelWorker = LoadModel | MakeExecutor | Prepare | RunPlans
FromModelWorker = Waiting | Loaded | Done | Sampled
