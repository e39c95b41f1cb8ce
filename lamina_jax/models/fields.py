"""Checked access to the JSON files of a checkpoint directory."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint directory, or a file in it, cannot be used as it stands. The message says which and why."""


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Parses a file that holds one JSON object; raises CheckpointError if there is none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory needs it.") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}. Download or write the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value


class Fields:
    """Typed access to a parsed JSON object; null counts as absent, as it does in transformers."""

    def __init__(self, raw: Mapping[str, Any], source: str | Path, prefix: str = ""):
        self.raw = raw
        self.source = source
        self.prefix = prefix

    def error(self, name: str, expected: str, got: Any) -> CheckpointError:
        shown = "nothing" if got is None else repr(got)
        return CheckpointError(f"{self.source}: field '{self.prefix}{name}': expected {expected}, got {shown}.")

    def replaced(self, **values: Any) -> "Fields":
        """The same with these values in place of what the file says."""
        return Fields({**self.raw, **values}, self.source, self.prefix)

    def object(self, name: str) -> "Fields | None":
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, "an object", value)
        return Fields(value, self.source, f"{self.prefix}{name}.")

    def positive_int(self, name: str, *, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(name, "a positive integer", value)
        return value

    def non_negative_int(self, name: str) -> int | None:
        value = self.raw.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise self.error(name, "a non-negative integer", value)
        return value

    def positive_float(self, name: str, *, default: float | None = None) -> float:
        value = self.number(name)
        value = default if value is None else value
        if value is None or not 0 < value < math.inf:
            raise self.error(name, "a positive number", value)
        return value

    def positive_float_or_none(self, name: str) -> float | None:
        return None if self.raw.get(name) is None else self.positive_float(name)

    def number(self, name: str) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(name, "a number", value)
        return float(value)

    def boolean(self, name: str) -> bool | None:
        value = self.raw.get(name)
        if not isinstance(value, bool | None):
            raise self.error(name, "true or false", value)
        return value

    def only(self, name: str, *supported: Any) -> None:
        """Refuses any value of a field but these; absent is as good as they."""
        value = self.raw.get(name)
        if value is not None and value not in supported:
            raise self.error(name, " or ".join(map(repr, supported)) or "nothing", value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id, a list of them, or none at all."""
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise self.error(name, "a token id or a list of token ids", value)
        return tuple(ids)
