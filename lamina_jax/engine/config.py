"""What a user can set about an engine."""

import dataclasses

from jaxtyping import DTypeLike

from lamina_jax.attention.kernels import check_name
from lamina_jax.attention.quantization import check_kv_cache_dtype, scale_bytes, stored_dtype
from lamina_jax.models import ModelConfig
from lamina_jax.runtime.memory import CACHE_SHARE_OF_MEMORY, available_memory
from lamina_jax.runtime.messages import Placement
from lamina_jax.runtime.places import channel_kind, check_platforms


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an `LLM`, as given; None means that the engine works it out from the model and the machine.

    Raises:
        ValueError: a setting out of its range.
    """

    num_attention_workers: int = 1
    model_platform: str = "cpu"
    attention_platform: str = "cpu"
    transport: str = "auto"
    tensor_parallel_size: int = 1
    model_memory_fraction: float | None = None
    attention_memory_fraction: float | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    page_size: int = 16
    max_num_seqs: int = 64
    max_prefill_tokens: int = 512
    num_batches: int = 2
    min_batch_seqs: int | None = None
    overlap: bool = True
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    attention_kernel: str = "auto"
    timeout_s: float = 60.0
    start_timeout_s: float = 120.0
    seed: int = 0
    trace_dir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("num_attention_workers", 0),
            ("tensor_parallel_size", 1),
            ("max_model_len", 2),
            ("page_size", 1),
            ("max_num_seqs", 1),
            ("max_prefill_tokens", 1),
            ("num_batches", 1),
            ("min_batch_seqs", 1),
            ("kv_cache_bytes", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        for name in ("timeout_s", "start_timeout_s"):
            seconds = getattr(self, name)
            if not isinstance(seconds, int | float) or not seconds > 0:
                raise ValueError(f"{name} must be a positive number of seconds, got {seconds!r}.")
        for name in ("model_memory_fraction", "attention_memory_fraction"):
            fraction = getattr(self, name)
            if fraction is not None and not 0 < fraction <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {fraction!r}.")
        check_platforms(self.model_platform, self.attention_platform)
        channel_kind(self.model_platform, self.attention_platform, self.transport)
        self._check_division()
        check_name(self.attention_kernel)
        check_kv_cache_dtype(self.kv_cache_dtype)
        if self.trace_dir is not None and not self.num_attention_workers:
            raise ValueError("trace_dir records messages between workers, and num_attention_workers=0 has none.")
        if self.model_platform == "cuda" and self.num_batches > 2:
            raise ValueError(
                f"num_batches is {self.num_batches}, which takes {self.num_batches - 1} replicas of the model, and "
                "context does not travel between GPUs yet; use at most 2."
            )

    @property
    def placement(self) -> Placement:
        """Which devices the model takes."""
        return Placement(**{name: getattr(self, name) for name in Placement.__struct_fields__})

    def _check_division(self) -> None:
        if self.tensor_parallel_size == 1:
            return
        if self.num_attention_workers % self.tensor_parallel_size or not self.num_attention_workers:
            raise ValueError(
                f"num_attention_workers must be a multiple of tensor_parallel_size ({self.tensor_parallel_size}), as "
                f"each device of the model sends its own heads; got {self.num_attention_workers}."
            )
        if self.num_batches > 2:
            raise ValueError(
                f"num_batches is {self.num_batches}, which takes {self.num_batches - 1} replicas of the model; a model "
                "divided over devices has one: use num_batches=2, or tensor_parallel_size=1."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSize:
    """How long sequences can be, and how many pages there are for them."""

    max_model_len: int
    """Most tokens of a sequence, prompt and completion together."""
    num_pages: int


def size_cache(
    config: EngineConfig, model: ModelConfig, dtype: DTypeLike, *, device_bytes: int | None = None
) -> CacheSize:
    """Sizes the KV cache: room for `max_num_seqs` sequences of full length, or what the memory allows.

    Args:
        dtype: of the model's keys and values; `config.kv_cache_dtype` says how they are kept.
        device_bytes: what there is for the cache where it does not lie in the host's memory.

    Raises:
        ValueError: max_model_len is beyond what the model was made for, or one such sequence does not fit.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model's max_position_embeddings is "
            f"{model.max_position_embeddings}; give at most that."
        )
    memory = config.kv_cache_bytes or device_bytes or int(CACHE_SHARE_OF_MEMORY * available_memory())
    stored = stored_dtype(config.kv_cache_dtype, dtype)
    token_bytes = model.kv_bytes_per_token(stored.itemsize, scale_bytes=scale_bytes(stored))
    page_bytes = token_bytes * config.page_size
    affordable = memory // page_bytes
    wanted_len = config.max_model_len or model.max_position_embeddings
    per_sequence = -(-wanted_len // config.page_size)
    if affordable < (per_sequence if config.max_model_len is not None else 1):
        raise ValueError(
            f"A KV cache of {memory / 1e9:.3g} GB holds {affordable} pages, {affordable * config.page_size} tokens; "
            f"one sequence of {wanted_len} tokens needs {per_sequence * page_bytes / 1e9:.3g} GB. "
            "Lower max_model_len or raise kv_cache_bytes."
        )
    num_pages = min(affordable, per_sequence * config.max_num_seqs)
    return CacheSize(max_model_len=min(wanted_len, num_pages * config.page_size), num_pages=num_pages)
