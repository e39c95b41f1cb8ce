"""Batch files: one request a line in, one result a line out, in the same order.

A line holds a JSON object of one of two shapes.

Simple: `{"prompt": "text"}` or `{"prompt_token_ids": [1, 2]}`, with an optional `custom_id` and any field of
`SamplingParams`. Its result is `{"custom_id", "prompt", "outputs": [{"text", "token_ids", "finish_reason"}],
"error"}`, where custom_id and the prompt appear as far as they were given.

OpenAI: `{"custom_id", "method": "POST", "url": "/v1/completions", "body": {"prompt", "max_tokens", ...}}`, the
prompt being text or a list of token ids. Its result is `{"id", "custom_id", "response", "error"}`, the response's
body being a completion object.

In both, null stands for a field that is not given, and fields that are not given take the caller's defaults. Fields
that would change the result but are not supported make the row an error; those that cannot (`user`, `stream: false`
and the like) are accepted. `model` is not checked: rows written for a server's model name run as they are.

A row that cannot be used gets a result too, with `error` set to `{"code", "message", "line"}`.
"""

import codecs
import dataclasses
import io
import json
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from .outputs import CompletionOutput, RequestOutput
from .sampling_params import SamplingParams, ValidationError

_COMPLETIONS_URL = "/v1/completions"
_SAMPLING_FIELDS = frozenset(field.name for field in dataclasses.fields(SamplingParams))
_IGNORED_FIELDS = frozenset({"model", "user", "metadata"})
# Fields of other engines that we lack, each with the value that asks for nothing.
_NEUTRAL_VALUES: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "logit_bias": {},
    "min_tokens": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "spaces_between_special_tokens": True,
    "stream": False,
    "suffix": "",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A row to be run.

    Attributes:
        line_number: its line in the file, counted from 1.
        prompt: text, or `{"prompt_token_ids": [...]}`: what `LLM.generate` takes.
        params: the row's sampling parameters.
        custom_id: the caller's name for it, if any.
        model: the row's own model field, which the result repeats.
        openai: whether the row, and so its result, has OpenAI's shape.
    """

    line_number: int
    prompt: str | dict[str, list[int]]
    params: SamplingParams
    custom_id: str | None = None
    model: str | None = None
    openai: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchError:
    """A row that cannot be run, and why. Attributes as those of `BatchRequest`."""

    line_number: int
    message: str
    prompt: str | dict[str, list[int]] | None = None
    custom_id: str | None = None
    openai: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSummary:
    """What became of a batch file: rows that got a completion and rows that failed, tokens, and seconds it took."""

    succeeded: int
    failed: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float


@runtime_checkable
class BatchEngine(Protocol):
    """The part of `LLM` that a batch file needs."""

    def validate(self, prompt: Any, params: SamplingParams) -> None: ...

    def stream(
        self, requests: Iterable[tuple[Any, SamplingParams]], *, use_tqdm: bool = False
    ) -> Iterator[tuple[int, RequestOutput]]: ...


def run_batch(
    llm: BatchEngine,
    lines: Iterable[bytes],
    output_file: io.BufferedIOBase,
    *,
    defaults: SamplingParams,
    model: str,
    use_tqdm: bool = False,
) -> BatchSummary:
    """Runs the rows of a batch file and writes their results, in order and as they come.

    Rows are read when the engine has room for them; results are held back only while an earlier row still runs. A
    row that cannot be run becomes an error row.

    Args:
        llm: the engine.
        lines: of the batch file, e.g. the file itself opened in binary.
        output_file: opened for writing in binary.
        defaults: sampling parameters where a row gives none.
        model: named in OpenAI results whose row named none.
        use_tqdm: show progress on stderr.

    Raises:
        OSError: a file cannot be read or written.
    """
    start = time.monotonic()
    writer = OrderedWriter(output_file)
    failed = succeeded = prompt_tokens = generated_tokens = 0
    running: dict[int, tuple[int, BatchRequest]] = {}

    def requests() -> Iterator[tuple[Any, SamplingParams]]:
        nonlocal failed
        accepted = 0
        for index, row in enumerate(read_rows(lines, defaults)):
            problem = _problem(llm, row)
            if problem is not None:
                failed += 1
                writer.write(index, problem)
            elif isinstance(row, BatchRequest):
                running[accepted] = (index, row)
                accepted += 1
                yield row.prompt, row.params

    for number, output in llm.stream(requests(), use_tqdm=use_tqdm):
        index, row = running.pop(number)
        writer.write(index, result_row(row, output, model))
        succeeded += 1
        prompt_tokens += len(output.prompt_token_ids)
        generated_tokens += _generated_tokens(output)
    return BatchSummary(
        succeeded=succeeded,
        failed=failed,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        seconds=time.monotonic() - start,
    )


def read_rows(lines: Iterable[bytes], defaults: SamplingParams) -> Iterator[BatchRequest | BatchError]:
    """Parses the lines of a batch file as they are asked for, e.g. of a file opened in binary; skips blank ones."""
    for line_number, line in enumerate(lines, start=1):
        if line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield parse_row(line, line_number, defaults)


def parse_row(line: bytes, line_number: int, defaults: SamplingParams) -> BatchRequest | BatchError:
    """Parses one line. Whatever is wrong with it comes back as a `BatchError`, never as an exception.

    Args:
        line: the line's bytes, UTF-8; its end may be there or not.
        line_number: counted from 1, for messages.
        defaults: values of the sampling parameters that the row does not give.
    """
    try:
        row = _load_object(line)
    except _RowError as error:
        return BatchError(line_number=line_number, message=str(error))
    openai = "body" in row or "url" in row
    custom_id = row.get("custom_id")
    prompt = None
    try:
        if custom_id is not None and not isinstance(custom_id, str):
            custom_id = None
            raise _RowError("custom_id must be a string.")
        fields = _openai_body(row) if openai else {k: v for k, v in row.items() if k != "custom_id"}
        fields = {name: value for name, value in fields.items() if value is not None}
        prompt = _take_prompt(fields)
        model = fields.get("model")
        return BatchRequest(
            line_number=line_number,
            prompt=prompt,
            params=_sampling_params(fields, defaults),
            custom_id=custom_id,
            model=model if isinstance(model, str) else None,
            openai=openai,
        )
    except (_RowError, ValidationError) as error:
        return BatchError(
            line_number=line_number, message=str(error), prompt=prompt, custom_id=custom_id, openai=openai
        )


def result_row(request: BatchRequest, output: RequestOutput, model: str) -> dict[str, Any]:
    """The result line of a finished request; `model` is named in OpenAI results whose row named none."""
    if request.openai:
        return _openai_result(request, output, model)
    return {
        **_identity(request),
        "outputs": [
            {"text": c.text, "token_ids": list(c.token_ids), "finish_reason": c.finish_reason} for c in output.outputs
        ],
        "error": None,
    }


def error_row(row: BatchRequest | BatchError, message: str | None = None) -> dict[str, Any]:
    """The result line of a row that failed; `message` is needed, and used, only for a `BatchRequest`."""
    if isinstance(row, BatchError):
        message = row.message
    error = {"code": "invalid_request", "message": message, "line": row.line_number}
    if row.openai:
        return {"id": _new_id("batch_req"), "custom_id": row.custom_id, "response": None, "error": error}
    return {**_identity(row), "outputs": [], "error": error}


class OrderedWriter:
    """Writes result lines in the order of their indices, each as soon as those before it are written.

    Holds only the results that came early, and flushes every line, so that a file cut short by a crash holds whole
    results.

    Args:
        file: opened for writing in binary.
    """

    def __init__(self, file: io.BufferedIOBase):
        self._file = file
        self._next = 0
        self._early: dict[int, bytes] = {}

    def write(self, index: int, row: dict[str, Any]) -> None:
        """Takes in the result with an index; every index from 0 on must be given once.

        Raises:
            ValueError: there was a result with this index.
            OSError: the file cannot be written.
        """
        if index < self._next or index in self._early:
            raise ValueError(f"Result {index} was written before.")
        # An unpaired surrogate is not UTF-8; written as its escape it is JSON, and reads back as it was.
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        self._early[index] = line
        while self._next in self._early:
            self._file.write(self._early.pop(self._next))
            self._file.flush()
            self._next += 1


def _problem(llm: BatchEngine, row: BatchRequest | BatchError) -> dict[str, Any] | None:
    """The result line of a row that cannot be run; None if it can."""
    if isinstance(row, BatchError):
        return error_row(row)
    try:
        llm.validate(row.prompt, row.params)
    except ValueError as error:
        return error_row(row, str(error))
    return None


class _RowError(ValueError):
    """What is wrong with a row, in words for whoever wrote it."""


def _load_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _RowError(f"The line is not UTF-8: {error.reason} at byte {error.start}.") from None
    except RecursionError:
        raise _RowError("The line is nested too deeply.") from None
    except ValueError as error:  # JSONDecodeError, and integers of too many digits
        raise _RowError(f"The line is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise _RowError(f"The line must hold a JSON object, got {type(row).__name__}.")
    return row


def _openai_body(row: dict[str, Any]) -> dict[str, Any]:
    url, method, body = row.get("url"), row.get("method", "POST"), row.get("body")
    if url == "/v1/chat/completions":
        raise _RowError(f"url {url} is not supported yet: use {_COMPLETIONS_URL} with the prompt's text.")
    if url != _COMPLETIONS_URL:
        raise _RowError(f"url must be {_COMPLETIONS_URL!r}, got {url!r}.")
    if method != "POST":
        raise _RowError(f"method must be 'POST', got {method!r}.")
    if not isinstance(body, dict):
        raise _RowError("body must be an object.")
    body = dict(body)
    if isinstance(body.get("prompt"), list):
        if "prompt_token_ids" in body:
            raise _RowError("prompt and prompt_token_ids cannot both be given.")
        body["prompt_token_ids"] = body.pop("prompt")
    return body


def _take_prompt(fields: dict[str, Any]) -> str | dict[str, list[int]]:
    text, token_ids = fields.pop("prompt", None), fields.pop("prompt_token_ids", None)
    if (text is None) == (token_ids is None):
        raise _RowError(
            f"Either prompt or prompt_token_ids must be given, got {'neither' if text is None else 'both'}."
        )
    if token_ids is None:
        if not isinstance(text, str):
            raise _RowError(f"prompt must be a string, got {type(text).__name__}.")
        return text
    if not isinstance(token_ids, list) or not token_ids or not all(type(t) is int for t in token_ids):
        raise _RowError(
            "The prompt's token ids must be a list of integers, not empty; several prompts need several rows."
        )
    return {"prompt_token_ids": token_ids}


def _sampling_params(fields: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = {}
    for name, value in fields.items():
        if name in _SAMPLING_FIELDS:
            given[name] = value
        elif name in _NEUTRAL_VALUES:
            if value != _NEUTRAL_VALUES[name]:
                raise _RowError(f"{name} is not supported, got {value!r}.")
        elif name not in _IGNORED_FIELDS:
            raise _RowError(
                f"Field {name!r} is not supported. Those of sampling are {', '.join(sorted(_SAMPLING_FIELDS))}."
            )
    return dataclasses.replace(defaults, **given)


def _identity(row: BatchRequest | BatchError) -> dict[str, Any]:
    identity: dict[str, Any] = {} if row.custom_id is None else {"custom_id": row.custom_id}
    if isinstance(row.prompt, dict):
        identity.update(row.prompt)
    elif row.prompt is not None:
        identity["prompt"] = row.prompt
    return identity


def _openai_result(request: BatchRequest, output: RequestOutput, model: str) -> dict[str, Any]:
    generated = _generated_tokens(output)
    body = {
        "id": f"cmpl-{output.request_id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": request.model or model,
        "choices": [_openai_choice(c) for c in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": generated,
            "total_tokens": len(output.prompt_token_ids) + generated,
        },
    }
    return {
        "id": _new_id("batch_req"),
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": output.request_id, "body": body},
        "error": None,
    }


def _generated_tokens(output: RequestOutput) -> int:
    return sum(len(c.token_ids) for c in output.outputs)


def _openai_choice(completion: CompletionOutput) -> dict[str, Any]:
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": None,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
