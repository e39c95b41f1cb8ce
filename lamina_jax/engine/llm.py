"""`LLM`: prompts in, text out."""

import contextlib
import dataclasses
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from lamina_jax.engine.backend import Backend, ClusterBackend, LocalBackend
from lamina_jax.engine.config import CacheSize, EngineConfig, size_cache
from lamina_jax.engine.interrupts import keeps_ctrl_c
from lamina_jax.engine.outputs import RequestOutput
from lamina_jax.engine.progress import Progress
from lamina_jax.engine.request import Request
from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.scheduler import PlannedStep, Scheduler, SchedulerLimits
from lamina_jax.engine.tokenizer import Tokenizer
from lamina_jax.models import GenerationDefaults, ModelConfig, load_generation_config
from lamina_jax.models.parallel import local_config
from lamina_jax.runtime import timeline
from lamina_jax.runtime.cluster import Cluster, load_cluster
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.messages import ExecutorSettings
from lamina_jax.runtime.model_worker import StepRunner
from lamina_jax.runtime.plan import StepPlan
from lamina_jax.runtime.slices import split_heads

Prompt = str | Mapping[str, Any]
"""Text, or ``{"prompt": text}``, or ``{"prompt_token_ids": [...]}``."""

# Steps that are under way while the host looks at an older one: the device never waits for the host.
_STEPS_AHEAD = 1
# Settings of the processes that an LLM starts.
_NOT_IN_CLUSTERS = ("num_attention_workers", "transport", "attention_memory_fraction", "trace_dir")
# How long after Ctrl-C the steps under way may still take before the workers are given up.
_INTERRUPTED_S = 2.0


class LLM:
    """A model, ready to generate; owns its attention workers, so close it or use it in a `with` statement.

    With `cluster` it owns nothing but sessions with the workers of a cluster, which others start. When one of those
    fails, `generate` does; the next call opens new sessions, and waits for workers that are not back yet.

    Args:
        model: a Hugging Face model directory (config.json, safetensors, tokenizer.json), or one made by
            scripts/convert_checkpoint.py. In a cluster the model worker's host has it under the same path.
        cluster: the workers of a cluster, or the file that names them (configs/clusters/); None runs the model worker
            in this process.
        num_attention_workers: processes that hold the KV cache and compute attention, each for its share of the KV
            heads; 0 runs the model whole in this process.
        dtype: of weights and activations: "auto" (the checkpoint's), "float32", "bfloat16", "float16".
        max_model_len: most tokens of a sequence, prompt and completion together; by default the model's
            max_position_embeddings, or less if the KV cache cannot hold that.
        page_size: tokens in a page of KV cache.
        max_num_seqs: sequences that run at a time.
        max_prefill_tokens: most prompt tokens in a step of a batch, padding included and rounded up to a power of two
            (at least 16, and at least max_num_seqs); longer prompts go in pieces.
        model_platform, attention_platform: "cpu" or "cuda", where the model's slices run and where attention does. A
            model on "cuda" needs the environment variable JAX_PLATFORMS=cuda,cpu, or none.
        transport: kind of the channels to the attention workers, or "auto" for the one that the platforms suggest:
            "shm" between CPUs, for which there are also "verbs" (RDMA) and "tcp", "cuda_host" from a GPU to a CPU,
            "cuda_ipc" between GPUs of one host, for which there is also "gda", GPU-initiated RDMA.
        tensor_parallel_size: devices that share the model; each sends its own heads to its own attention workers, so
            num_attention_workers is a multiple of it.
        model_memory_fraction, attention_memory_fraction: of a GPU's memory, what the model and what each attention
            worker may take; None is 0.9 of it, divided by the workers that share the GPU.
        num_batches: most batches in flight at a time, so that one's slices run while another's attention does; 1 is
            off.
        min_batch_seqs: sequences that each batch must get before there is another one; None is 32 where all workers
            share a CPU, 8 where the model is on a GPU, and never so many that max_num_seqs are too few for num_batches.
        overlap: start attention over the cache while k and v are still being computed.
        kv_cache_bytes: memory for the KV cache over all workers; by default a quarter of what is free at most.
        kv_cache_dtype: of the KV cache: "auto" (as `dtype`), "fp8" (or "fp8_e4m3") or "int8", which take half of
            bfloat16's memory and traffic. Keys and values then have scales of their own, per token and KV head. On a
            GPU set page_size=32 or more along with it: the kernel "mosaic" needs that.
        attention_kernel: name in `lamina_jax.attention.kernels.KERNELS`, or "auto" for the fastest one that runs on
            the attention devices: "mosaic" on Hopper GPUs if the cache suits it, else "xla".
        timeout_s: longest that one device waits for one message of another, in seconds.
        start_timeout_s: longest wait for the workers of a cluster to be there, in seconds.
        seed: for requests whose SamplingParams name none.
        trace_dir: write a timeline of slices, messages and attention there on `close`, trace.json, for Perfetto or
            scripts/plot_timeline.py.

    Raises:
        ValueError: a setting that is wrong or does not fit the model.
        CheckpointError: the model cannot be read.
        WorkerError: a worker did not start.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, cluster: Cluster | str | os.PathLike[str] | None = None, **settings: Any
    ) -> None:
        if isinstance(cluster, str | os.PathLike):
            cluster = load_cluster(cluster)
        self._config = config = _engine_config(settings, cluster)
        directory = Path(model)
        self._model_config = ModelConfig.from_file(directory / "config.json")
        self._generation_defaults: GenerationDefaults = load_generation_config(directory)
        if config.num_attention_workers:
            local = local_config(self._model_config, config.tensor_parallel_size)
            workers = config.num_attention_workers // config.tensor_parallel_size
            split_heads(local.num_heads, local.num_kv_heads, workers)
        self._tokenizer = Tokenizer.from_directory(directory) if (directory / "tokenizer.json").exists() else None
        self._dispatcher = ThreadPoolExecutor(1, thread_name_prefix="lamina dispatcher")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lamina reader")
        self._requests = itertools.count()
        self._closed_because: str | None = None
        self._busy = False
        self._in_cluster = cluster is not None
        self._backend: Backend = (
            LocalBackend(directory, self._model_config, config)
            if cluster is None
            else ClusterBackend(cluster, directory, self._model_config, config)
        )
        self._size: CacheSize | None = None
        self._open()

    def _open(self) -> None:
        """Makes the model worker. The sizes stay those of the first one."""
        config = self._config
        with contextlib.ExitStack() as undo:
            if config.trace_dir is not None:
                timeline.start(Path(config.trace_dir))
                undo.callback(timeline.discard)
            loaded = self._backend.load()
            undo.callback(loaded.close)
            if self._size is None:
                self._size = size_cache(config, self._model_config, loaded.kv_dtype, device_bytes=loaded.cache_bytes)
                self._limits = _scheduler_limits(config, self._size)
            worker = loaded.make_worker(_executor_settings(config, self._limits))
            undo.pop_all()
        self._worker: StepRunner = worker
        # Ends the workers also when nobody calls close().
        self._close_worker = weakref.finalize(self, _close, worker, config.trace_dir, os.getpid())

    @property
    def max_model_len(self) -> int:
        """Most tokens of a sequence, prompt and completion together."""
        assert self._size is not None
        return self._size.max_model_len

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the attention workers. The LLM cannot be used afterwards; may be called twice."""
        self._closed_because = self._closed_because or "it was closed."
        self._close_worker()
        for threads in (self._dispatcher, self._reader):
            threads.shutdown(wait=False, cancel_futures=True)

    def get_default_sampling_params(self) -> SamplingParams:
        """What generation_config.json asks for; SamplingParams' own defaults where it says nothing."""
        defaults = self._generation_defaults
        given = {name: getattr(defaults, name) for name in ("temperature", "top_p", "top_k")}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def validate(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises ValueError, saying what is wrong, if the request could not be run."""
        self._checked(prompt, params)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; returns one output per prompt, in order.

        Args:
            prompts: one or more; see `Prompt`.
            sampling_params: for all prompts, or one for each; None for `get_default_sampling_params()`.
            use_tqdm: show progress on stderr.

        Raises:
            ValueError: a prompt or its parameters cannot be used; nothing was run.
            WorkerError: a worker failed; the LLM is closed, if it is not that of a cluster.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(sampling_params, len(prompts))
        # All are checked before any is run.
        requests = [self._request(i, prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
        outputs = dict(self._run(iter(requests), Progress(len(requests), use_tqdm=use_tqdm)))
        return [outputs[i] for i in range(len(requests))]

    def stream(
        self, requests: Iterable[tuple[Prompt, SamplingParams]], *, use_tqdm: bool = False
    ) -> Generator[tuple[int, RequestOutput]]:
        """Completes requests as they come: takes the next one when there is room for it, yields each when it ends.

        Args:
            requests: prompts with their parameters; may be endless.
            use_tqdm: show progress on stderr.

        Yields:
            The request's number, from 0 in the order taken, and its output; shorter ones overtake longer ones.

        Raises:
            ValueError: a request cannot be used; those that are running are given up. `validate` tells before.
            WorkerError: a worker failed; the LLM is closed, if it is not that of a cluster.
        """
        made = (self._request(i, prompt, params) for i, (prompt, params) in enumerate(requests))
        return self._run(made, Progress(use_tqdm=use_tqdm))

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValueError(f"Got {count} prompts but {len(given)} sampling_params; give one, or one for each.")
        return list(given)

    def _checked(self, prompt: Prompt, params: Any) -> tuple[str | None, list[int]]:
        """Text and tokens of a prompt. Raises ValueError if the request cannot be run."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"Expected SamplingParams for each prompt, got {params!r}.")
        text, token_ids = self._tokens_of(prompt)
        self._check_tokens(token_ids)
        if params.stop and self._tokenizer is None:
            raise ValueError("Stop strings need text, but the model has no tokenizer.json; use stop_token_ids.")
        return text, token_ids

    def _request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        text, token_ids = self._checked(prompt, params)
        serial = next(self._requests)
        eos = () if params.ignore_eos else self._eos_token_ids
        return Request(
            index=index,
            request_id=str(serial),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            seed=params.seed if params.seed is not None else _seed_for(self._config.seed, serial),
            max_new_tokens=min(params.max_tokens or self.max_model_len, self.max_model_len - len(token_ids)),
            eos_token_ids=frozenset(eos),
            tokenizer=self._tokenizer,
        )

    @property
    def _eos_token_ids(self) -> tuple[int, ...]:
        return (*self._generation_defaults.eos_token_ids, *self._model_config.eos_token_ids)

    def _tokens_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), _checked_ids(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt")  # pyright: ignore[reportAssignmentType]
        if not isinstance(prompt, str):
            raise ValueError(
                f'A prompt must be a string, {{"prompt": text}} or {{"prompt_token_ids": [...]}}, got {prompt!r}.'
            )
        if self._tokenizer is None:
            raise ValueError('The model has no tokenizer.json: give {"prompt_token_ids": [...]} instead of text.')
        if not prompt:
            # Before a tokenizer adds its begin-of-text token.
            raise ValueError("The prompt is empty: it must have at least one token.")
        return prompt, self._tokenizer.encode(prompt)

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise ValueError("The prompt is empty: it must have at least one token.")
        if len(token_ids) >= self.max_model_len:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens, but max_model_len is {self.max_model_len}, which must hold "
                "the prompt and at least one more."
            )
        vocab_size = self._model_config.vocab_size
        bad = next((t for t in token_ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise ValueError(f"Token id {bad} is out of range: the model's vocabulary has {vocab_size} tokens.")

    def _run(self, requests: Iterator[Request], progress: Progress) -> Generator[tuple[int, RequestOutput]]:
        if self._closed_because is not None:
            raise RuntimeError(f"This LLM cannot be used any more: {self._closed_because}")
        if self._busy:
            raise RuntimeError("Another generate or stream of this LLM is under way; finish or close that one first.")
        if self._in_cluster:
            self._reopen_if_lost()
        self._busy = True
        run = _Run(self._worker, self._limits, self._dispatcher, self._reader, progress)
        patience = 2 * self._config.timeout_s
        try:
            with progress:
                yield from run.outputs(requests)
        except KeyboardInterrupt:
            patience = _INTERRUPTED_S
            raise
        except Exception as error:
            shown = self._worker.explain(error)
            if isinstance(shown, WorkerError) or isinstance(error, jax.errors.JaxRuntimeError):
                self._give_up_worker(str(shown))
            if shown is error:
                raise
            raise shown from error
        finally:
            # After Ctrl-C, or when the caller wants no more outputs, steps may still be under way.
            self._drain(run, patience)

    def _drain(self, run: "_Run", patience: float) -> None:
        drained = False
        try:
            drained = run.drain(patience)
        finally:
            # Also when a second Ctrl-C cuts the wait short.
            self._busy = False
            if not drained:
                self._give_up_worker("a step did not end after it was interrupted.")

    def _give_up_worker(self, why: str) -> None:
        """After a failure. The workers of a cluster are asked again for the next run, others are gone."""
        if self._in_cluster:
            self._close_worker()
        else:
            self._closed_because = why
            self.close()

    def _reopen_if_lost(self) -> None:
        try:
            self._worker.check()
        except WorkerError as error:
            logging.warning("new sessions with the workers of the cluster, as the last ones are over: %s", error)
            self._close_worker()
            self._open()


@dataclasses.dataclass(frozen=True)
class _InFlight:
    steps: Sequence[PlannedStep]
    """One step of each batch."""
    tokens: Future[list[np.ndarray]]


class _Run:
    """One call of generate or stream: plans and dispatches steps, and reads what they sampled one step late."""

    def __init__(
        self,
        worker: StepRunner,
        limits: SchedulerLimits,
        dispatcher: ThreadPoolExecutor,
        reader: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self._worker = worker
        self._dispatcher = dispatcher
        self._reader = reader
        self._progress = progress
        self._scheduler = Scheduler(limits)
        self._in_flight: deque[_InFlight] = deque()
        self._owners: dict[Any, Request] = {}

    def outputs(self, requests: Iterator[Request]) -> Iterator[tuple[int, RequestOutput]]:
        done: list[tuple[int, RequestOutput]] | None = []
        while done is not None:
            # While the caller has the outputs, Ctrl-C is the caller's.
            with keeps_ctrl_c():
                done = self._advance(requests)
            yield from done or ()

    def _advance(self, requests: Iterator[Request]) -> list[tuple[int, RequestOutput]] | None:
        """Dispatches the next steps and reads older ones; returns what is complete now, None when nothing is left."""
        self._take(requests)
        steps = self._scheduler.plan()
        if steps:
            self._dispatch(steps)
        if not steps and not self._in_flight:
            return None
        if steps and len(self._in_flight) <= _STEPS_AHEAD:
            return []
        return list(self._collect())

    def drain(self, timeout_s: float) -> bool:
        """Waits until nothing is under way; False if that took too long. Errors are left to whoever asks next."""
        deadline = time.monotonic() + timeout_s
        while self._in_flight:
            try:
                self._in_flight.popleft().tokens.result(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return False
            except Exception:
                continue
        return True

    def _take(self, requests: Iterator[Request]) -> None:
        while self._scheduler.has_room and (request := next(requests, None)) is not None:
            for sequence in request.sequences:
                self._scheduler.add(sequence)
                self._owners[sequence] = request

    def _dispatch(self, steps: Sequence[PlannedStep]) -> None:
        plans = [step.plan for step in steps]
        # In threads, because Ctrl-C must work: it cannot interrupt a wait inside XLA, and must not come between what
        # the workers are told and what is dispatched here.
        dispatched = self._dispatcher.submit(self._run_step, plans)
        tokens = self._reader.submit(lambda: [np.asarray(x) for x in dispatched.result()])
        self._in_flight.append(_InFlight(steps, tokens))
        self._progress.add(prompt_tokens=sum(int(p.num_new.sum()) for p in plans if p.tokens is not None))

    def _run_step(self, plans: Sequence[StepPlan]) -> Sequence[Any]:
        self._worker.prepare(plans[0].bucket, len(plans))
        return self._worker.run(plans)

    def _collect(self) -> Iterator[tuple[int, RequestOutput]]:
        arrived = self._in_flight.popleft()
        tokens = arrived.tokens.result()
        self._worker.check()
        now = time.monotonic()
        emits = [(int(t[row]), s) for t, step in zip(tokens, arrived.steps, strict=True) for row, s in step.emits]
        for token, sequence in emits:
            request = self._owners.get(sequence)
            if request is None:
                continue
            self._progress.add(decode_tokens=1)
            if request.add_token(sequence, token, now):
                self._scheduler.finish(sequence)
                del self._owners[sequence]
                if request.finished:
                    self._progress.add(finished=1)
                    yield request.index, request.output()


def _engine_config(settings: Mapping[str, Any], cluster: Cluster | None) -> EngineConfig:
    known = {field.name: field for field in dataclasses.fields(EngineConfig)}
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"LLM has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    if cluster is None:
        return EngineConfig(**settings)
    for name in _NOT_IN_CLUSTERS:
        if settings.get(name, known[name].default) != known[name].default:
            raise ValueError(f"{name} is for workers that the LLM starts; those of a cluster have their own: omit it.")
    return EngineConfig(**{**settings, "num_attention_workers": len(cluster.attention_workers)})


def _close(worker: StepRunner, trace_dir: str | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child, which exits
    worker.close()
    if trace_dir is not None:
        timeline.finish(Path(trace_dir))


def _scheduler_limits(config: EngineConfig, size: CacheSize) -> SchedulerLimits:
    return SchedulerLimits.of(
        max_num_seqs=config.max_num_seqs,
        max_prefill_tokens=min(config.max_prefill_tokens, size.max_model_len),
        page_size=config.page_size,
        num_pages=size.num_pages,
        num_batches=config.num_batches,
        min_batch_seqs=_min_batch_seqs(config),
    )


def _executor_settings(config: EngineConfig, limits: SchedulerLimits) -> ExecutorSettings:
    return ExecutorSettings(
        page_size=limits.page_size,
        num_pages=limits.num_pages,
        kv_cache_dtype=config.kv_cache_dtype,
        attention_platform=config.attention_platform,
        attention_kernel=config.attention_kernel,
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=limits.max_step_tokens,
        num_batches=config.num_batches,
        overlap=config.overlap,
        timeout_s=config.timeout_s,
        trace_dir=config.trace_dir,
    )


def _min_batch_seqs(config: EngineConfig) -> int:
    if config.min_batch_seqs is not None:
        return config.min_batch_seqs
    # Measured on two cores that model and attention share: smaller batches cost more than overlapping them gains.
    worth = 32 if config.model_platform == "cpu" else 8
    return max(1, min(worth, config.max_num_seqs // config.num_batches))


def _checked_ids(token_ids: Any) -> list[int]:
    if isinstance(token_ids, str) or not isinstance(token_ids, Iterable):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {token_ids!r}.")
    ids = list(token_ids)
    wrong = next((t for t in ids if not isinstance(t, int | np.integer) or isinstance(t, bool)), None)
    if wrong is not None:
        raise ValueError(f"prompt_token_ids must be integers, got {wrong!r}.")
    return [int(t) for t in ids]


def _seed_for(engine_seed: int, serial: int) -> int:
    """A seed of its own for every request, the same in every run of the same program."""
    return int(np.random.SeedSequence([engine_seed, serial]).generate_state(1, np.uint64)[0] >> 1)
