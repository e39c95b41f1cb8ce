"""How the next token of a request is chosen, and when the request ends."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

GREEDY_BELOW = 1e-5
MAX_TEMPERATURE = 2.0
MAX_N = 1024


class ValidationError(ValueError):
    """A sampling parameter that cannot be used.

    Attributes:
        parameter: name of the parameter at fault.
        value: the value it was given.
    """

    def __init__(self, message: str, parameter: str | None = None, value: Any = None):
        super().__init__(message)
        self.parameter = parameter
        self.value = value


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, with vLLM's names and defaults.

    Attributes:
        n: completions per prompt, from 1 to 1024.
        temperature: in [0, 2]; below 1e-5 the most probable token is taken (`greedy`).
        top_p: in (0, 1]; keep the most probable tokens that together reach this probability. 1 keeps all.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        min_p: in [0, 1]; drop tokens less probable than min_p times the most probable one. 0 drops none.
        seed: a signed 64-bit integer that fixes the random choices of this request, or None: the engine picks one.
        stop: string or strings that end the text; stored as a tuple. None is taken for no strings.
        stop_token_ids: token ids that end the text, besides the model's own end-of-text ids; stored as a tuple.
        ignore_eos: go on after the model's end-of-text ids.
        max_tokens: most tokens to generate, at least 1; None is as many as the model's length allows.
        include_stop_str_in_output: leave the stop string at the end of the text rather than cut it off.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        ValidationError: a value of the wrong type or outside its range, or n > 1 with greedy sampling.
    """

    # The runtime type checker of the tests would otherwise refuse wrong types before `__post_init__` can, with an
    # error that no user ever sees, and numpy integers too.
    __no_type_check__ = True

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self):
        self._normalise()
        self._check_ranges()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken; top_p, top_k, min_p and seed then change nothing."""
        return self.temperature < GREEDY_BELOW

    def _normalise(self) -> None:
        for name in ("n", "top_k"):
            self._set(name, _as_int(name, getattr(self, name)))
        for name in ("seed", "max_tokens"):
            if getattr(self, name) is not None:
                self._set(name, _as_int(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p"):
            self._set(name, _as_float(name, getattr(self, name)))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            self._set(name, _as_bool(name, getattr(self, name)))
        self._set("stop", _as_strings("stop", self.stop))
        self._set("stop_token_ids", _as_token_ids("stop_token_ids", self.stop_token_ids))

    def _check_ranges(self) -> None:
        self._require(self.n >= 1, "n", "must be at least 1")
        self._require(self.n <= MAX_N, "n", f"must be at most {MAX_N}")
        self._require(0.0 <= self.temperature <= MAX_TEMPERATURE, "temperature", "must be in [0, 2]")
        self._require(0.0 < self.top_p <= 1.0, "top_p", "must be in (0, 1]")
        self._require(self.top_k >= -1, "top_k", "must be 0 or -1 (off), or at least 1")
        self._require(0.0 <= self.min_p <= 1.0, "min_p", "must be in [0, 1]")
        self._require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "must fit in a signed 64-bit integer")
        self._require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "must be at least 1")
        self._require("" not in self.stop, "stop", "must not contain an empty string")
        self._require(all(t >= 0 for t in self.stop_token_ids), "stop_token_ids", "must not contain negative ids")
        self._require(not self.greedy or self.n == 1, "n", "must be 1 when using greedy sampling")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise _invalid(name, rule, getattr(self, name))


def _invalid(name: str, rule: str, value: Any) -> ValidationError:
    return ValidationError(f"{name} {rule}, got {value!r}.", parameter=name, value=value)


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise _invalid(name, "must be an integer", value)
    return int(value)


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise _invalid(name, "must be a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _invalid(name, "must be a finite number", value)
    return number


def _as_bool(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _invalid(name, "must be True or False", value)
    return bool(value)


def _as_strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    strings = tuple(value) if isinstance(value, Iterable) else None
    if strings is None or not all(isinstance(s, str) for s in strings):
        raise _invalid(name, "must be a string or a sequence of strings", value)
    return strings


def _as_token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise _invalid(name, "must be a sequence of token ids", value)
    return tuple(_as_int(name, token_id) for token_id in value)
