"""Which sequences run in the next step, in which slots and on which pages.

A sequence is admitted when a slot is free and there are pages for as long as it may become; it then never has to
wait or be thrown out. Prompts come first, in pieces of at most `max_step_tokens`; otherwise every running sequence
gets one token. Steps are planned ahead of knowing what the one before sampled: a sequence that turns out to have
ended takes part in the steps that were already under way, and what they sample for it is dropped.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence

import numpy as np

from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.sampling_tensors import build_sampling_tensors, required_mode
from lamina_jax.runtime.messages import Bucket
from lamina_jax.runtime.plan import StepPlan

# A matrix times one row is no matrix product: in bf16 on the CPU it takes XLA 11 times as long as with 8 rows.
_MIN_BATCH = 2
_MIN_TOKENS = 16
_MIN_PAGES = 8


@dataclasses.dataclass(eq=False, kw_only=True)
class SequenceState:
    """One completion under way. `batch`, `slot` and `pages` are set by the scheduler while it runs."""

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    index: int
    """Which of its request's n completions this is."""
    max_new_tokens: int
    """Most tokens that it may generate."""
    batch: int = dataclasses.field(default=-1, init=False)
    """Which of the batches in flight it belongs to, while it runs."""
    slot: int = dataclasses.field(default=-1, init=False)
    pages: list[int] = dataclasses.field(default_factory=list, init=False)
    num_computed: int = dataclasses.field(default=0, init=False)
    """Tokens that are in the cache once all planned steps have run."""
    num_planned: int = dataclasses.field(default=0, init=False)
    """Tokens sampled for it once all planned steps have run."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def in_prefill(self) -> bool:
        return self.num_computed < self.num_prompt_tokens

    @property
    def max_cached(self) -> int:
        """Most tokens that it can have in the cache: the last token sampled never gets there."""
        return self.num_prompt_tokens + self.max_new_tokens - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """A step, and whose rows it has: ``(row, sequence)`` of those that get a token from it."""

    plan: StepPlan
    emits: tuple[tuple[int, SequenceState], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """Sizes that bound a step."""

    max_num_seqs: int
    """Sequences that run at a time."""
    max_step_tokens: int
    """Largest batch x tokens of a bucket."""
    page_size: int
    num_pages: int
    num_batches: int
    """Most batches in flight."""
    min_batch_seqs: int
    """Sequences that each batch must get before there is another one: every batch reads all weights."""

    @classmethod
    def of(
        cls,
        *,
        max_num_seqs: int,
        max_prefill_tokens: int,
        page_size: int,
        num_pages: int,
        num_batches: int,
        min_batch_seqs: int,
    ) -> "SchedulerLimits":
        largest_batch = bucket_size(max_num_seqs, _MIN_BATCH)
        return cls(
            max_num_seqs=max_num_seqs,
            max_step_tokens=max(largest_batch, bucket_size(max_prefill_tokens, _MIN_TOKENS)),
            page_size=page_size,
            num_pages=num_pages,
            num_batches=num_batches,
            min_batch_seqs=min_batch_seqs,
        )


class Scheduler:
    """Holds what waits and what runs, and plans steps."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting: deque[SequenceState] = deque()
        self._running: list[SequenceState] = []
        self._free_slots = list(range(limits.max_num_seqs))[::-1]
        self._free_pages = list(range(limits.num_pages))[::-1]

    @property
    def has_room(self) -> bool:
        """Whether a new sequence would not wait behind another one."""
        return len(self._waiting) < len(self._free_slots)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._waiting and not self._running

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence. Raises ValueError if it can never run, because the whole cache is too small for it."""
        needed = self._pages_needed(sequence)
        if needed > self._limits.num_pages:
            raise ValueError(
                f"The request may need {sequence.max_cached} tokens of KV cache, {needed} pages of "
                f"{self._limits.page_size} tokens, but there are {self._limits.num_pages} pages. Shorten the prompt, "
                "lower max_tokens, or give the cache more memory (kv_cache_bytes)."
            )
        self._waiting.append(sequence)

    def finish(self, sequence: SequenceState) -> None:
        """Ends a sequence, whether it waits or runs, and frees what it holds.

        Steps that are under way may still write to its pages; whoever gets them next writes after that.
        """
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._free_pages.extend(reversed(sequence.pages))

    def plan(self) -> list[PlannedStep]:
        """The next step of every batch that can go on, all of one bucket; none if nothing can before more is known of
        the steps under way."""
        self._admit()
        chosen = self._prefill() or [s for s in self._running if s.num_planned < s.max_new_tokens]
        batches = [[s for s in chosen if s.batch == b] for b in range(self._limits.num_batches)]
        groups = [group for group in batches if group]
        if not groups:
            return []
        bucket = self._bucket(groups)
        return [self._plan(group, bucket) for group in groups]

    def _admit(self) -> None:
        batches = self._batches_to_join()
        while self._waiting and self._free_slots:
            needed = self._pages_needed(self._waiting[0])
            if needed > len(self._free_pages):
                return
            sequence = self._waiting.popleft()
            sequence.batch = min(batches, key=lambda b: sum(s.batch == b for s in self._running))
            sequence.slot = self._free_slots.pop()
            sequence.pages = [self._free_pages.pop() for _ in range(needed)]
            self._running.append(sequence)

    def _batches_to_join(self) -> list[int]:
        """The batches that there are, and as many more as are worth it now. Sequences stay in the batch that they began
        in: one that is opened for a single latecomer would be a batch of one, as wide as the others."""
        joining = min(len(self._waiting), len(self._free_slots))
        least, most = self._limits.min_batch_seqs, self._limits.num_batches
        used = sorted({s.batch for s in self._running})
        worth = min((len(self._running) + joining) // least, len(used) + joining // least, most)
        others = [b for b in range(most) if b not in used]
        return used + others[: max(worth, 1) - len(used)] if worth > len(used) or not used else used

    def _prefill(self) -> list[SequenceState]:
        """As many sequences, in order, as have prompt left and whose batches fit one bucket."""
        chosen: list[SequenceState] = []
        sizes = [0] * self._limits.num_batches
        longest = 0
        for sequence in filter(lambda s: s.in_prefill, self._running):
            sizes[sequence.batch] += 1
            longest = max(longest, self._piece(sequence))
            if chosen and bucket_size(max(sizes)) * bucket_size(longest, _MIN_TOKENS) > self._limits.max_step_tokens:
                break
            chosen.append(sequence)
        return chosen

    def _piece(self, sequence: SequenceState) -> int:
        """Prompt tokens that the next step can take."""
        return min(sequence.num_prompt_tokens - sequence.num_computed, self._limits.max_step_tokens)

    def _num_new(self, sequence: SequenceState) -> int:
        return self._piece(sequence) if sequence.in_prefill else 1

    def _bucket(self, groups: list[list[SequenceState]]) -> Bucket:
        """The smallest bucket that fits each of the groups."""
        prefill = groups[0][0].in_prefill
        everyone = [s for group in groups for s in group]
        longest = max(s.num_computed + self._num_new(s) for s in everyone)
        return Bucket(
            batch=bucket_size(max(map(len, groups)), 1 if prefill else _MIN_BATCH),
            tokens=bucket_size(max(map(self._num_new, everyone)), _MIN_TOKENS) if prefill else 1,
            max_pages=bucket_size(-(-longest // self._limits.page_size), _MIN_PAGES),
        )

    def _plan(self, sequences: list[SequenceState], bucket: Bucket) -> PlannedStep:
        num_new = [self._num_new(s) for s in sequences]
        after = [s.num_computed + n for s, n in zip(sequences, num_new, strict=True)]
        emits = [n >= s.num_prompt_tokens for s, n in zip(sequences, after, strict=True)]
        plan = StepPlan(
            bucket=bucket,
            batch=sequences[0].batch,
            tokens=_prompt_pieces(sequences, num_new, bucket) if sequences[0].in_prefill else None,
            slots=_padded([s.slot for s in sequences], bucket.batch, fill=self._limits.max_num_seqs),
            context_lens=_padded([s.num_computed for s in sequences], bucket.batch),
            num_new=_padded(num_new, bucket.batch),
            block_tables=_block_tables(sequences, bucket),
            emits=_padded(emits, bucket.batch).astype(bool),
            sampling=build_sampling_tensors([(s.params, s.seed, s.index) for s in sequences], bucket.batch),
            sampling_mode=required_mode([s.params for s in sequences]),
        )
        for sequence, computed, emit in zip(sequences, after, emits, strict=True):
            sequence.num_computed = computed
            sequence.num_planned += emit
        return PlannedStep(plan=plan, emits=tuple((i, s) for i, s in enumerate(sequences) if emits[i]))

    def _pages_needed(self, sequence: SequenceState) -> int:
        return -(-sequence.max_cached // self._limits.page_size)


def bucket_size(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least `size` and `least`."""
    return 1 << (max(size, least) - 1).bit_length()


def _padded(values: Sequence[int], length: int, fill: int = 0) -> np.ndarray:
    return np.array([*values, *[fill] * (length - len(values))], np.int32)


def _prompt_pieces(sequences: Sequence[SequenceState], num_new: Sequence[int], bucket: Bucket) -> np.ndarray:
    tokens = np.zeros((bucket.batch, bucket.tokens), np.int32)
    for row, sequence, count in zip(tokens, sequences, num_new, strict=False):
        row[:count] = sequence.prompt_token_ids[sequence.num_computed : sequence.num_computed + count]
    return tokens


def _block_tables(sequences: Sequence[SequenceState], bucket: Bucket) -> np.ndarray:
    tables = np.zeros((bucket.batch, bucket.max_pages), np.int32)
    for row, sequence in zip(tables, sequences, strict=False):
        pages = sequence.pages[: bucket.max_pages]
        row[: len(pages)] = pages
    return tables
