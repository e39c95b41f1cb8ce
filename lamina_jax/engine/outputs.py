"""What a user gets back for a request."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the request's n completions this is.
        text: the text generated so far.
        token_ids: the tokens generated so far, the one that ended the text included.
        finish_reason: "stop" (end of text, stop token or stop string), "length" (max_tokens or the model's length
            reached), or None while the completion is unfinished.
        stop_reason: the stop string or stop token id that ended the text; None for the model's own end of text.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic`, and how much of it there was.

    Attributes:
        arrival_time: the engine took the request in.
        first_token_time: the host saw the first generated token; None before that.
        finished_time: the host saw the request end; None before that.
        num_prompt_tokens: tokens of the prompt.
        num_generated_tokens: tokens generated, over all completions.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A request and its completions.

    Attributes:
        request_id: name of the request in the engine.
        prompt: the prompt's text; None if it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        outputs: the n completions, by index.
        finished: whether every completion has ended.
        metrics: times and counts, where the engine kept them.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: Sequence[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None
