"""A request under way: its completions, and when each of them ends."""

import dataclasses
import time
from collections.abc import Sequence

from lamina_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from lamina_jax.engine.sampling_params import SamplingParams
from lamina_jax.engine.scheduler import SequenceState
from lamina_jax.engine.tokenizer import Detokenizer, Tokenizer


class Request:
    """Collects the tokens of a prompt's n completions and finds their ends."""

    def __init__(
        self,
        *,
        index: int,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Args:
        index: the caller's number for the request.
        seed: fixes the random choices, together with a completion's index.
        max_new_tokens: most tokens of each completion.
        eos_token_ids: tokens that end a completion with no stop_reason.
        tokenizer: None leaves all text empty.
        """
        self.index = index
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._eos_token_ids = eos_token_ids
        self._arrival = time.monotonic()
        self._first_token: float | None = None
        self._finished: float | None = None
        self._completions = {
            SequenceState(
                prompt_token_ids=prompt_token_ids, params=params, seed=seed, index=i, max_new_tokens=max_new_tokens
            ): _Completion(i, _detokenizer(params, tokenizer))
            for i in range(params.n)
        }

    @property
    def sequences(self) -> list[SequenceState]:
        """One per completion, for the scheduler."""
        return list(self._completions)

    @property
    def finished(self) -> bool:
        """Whether all completions have ended."""
        return all(c.finish_reason is not None for c in self._completions.values())

    def add_token(self, sequence: SequenceState, token_id: int, now: float) -> bool:
        """Adds a sampled token, seen at `now` (`time.monotonic`), to a completion; returns whether that ends it."""
        if self._first_token is None:
            self._first_token = now
        completion = self._completions[sequence]
        completion.token_ids.append(token_id)
        ended = self._end_of(completion, token_id, sequence.max_new_tokens)
        if ended:
            completion.finish(*ended)
        if self.finished:
            self._finished = now
        return ended is not None

    def output(self) -> RequestOutput:
        """The request as it stands."""
        completions = [c.output() for c in self._completions.values()]
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=completions,
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=self._arrival,
                first_token_time=self._first_token,
                finished_time=self._finished,
                num_prompt_tokens=len(self._prompt_token_ids),
                num_generated_tokens=sum(len(c.token_ids) for c in completions),
            ),
        )

    def _end_of(
        self, completion: "_Completion", token_id: int, max_new_tokens: int
    ) -> tuple[str, str | int | None] | None:
        """finish_reason and stop_reason if the token just added ends the completion."""
        if token_id in self._eos_token_ids:
            return "stop", None
        if token_id in self._params.stop_token_ids:
            return "stop", token_id
        stop = completion.detokenizer.feed(token_id) if completion.detokenizer else None
        if stop is not None:
            return "stop", stop
        if len(completion.token_ids) >= max_new_tokens:
            return "length", None
        return None


@dataclasses.dataclass
class _Completion:
    index: int
    detokenizer: Detokenizer | None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finish(self, finish_reason: str, stop_reason: str | int | None) -> None:
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        if self.detokenizer is not None:
            # Bytes held back for a character that never came may complete a stop string.
            stop = self.detokenizer.finish()
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text if self.detokenizer else "",
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _detokenizer(params: SamplingParams, tokenizer: Tokenizer | None) -> Detokenizer | None:
    if tokenizer is None:
        return None
    return Detokenizer(
        tokenizer,
        stop=tuple(params.stop),
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
    )
