"""The timeline of a run: what every worker did when, as a trace that https://ui.perfetto.dev opens.

`start` switches the recording of sends and receives on in a process, `write` writes down what it saw, and `merge` puts
the files of all workers into one `trace.json`. Each worker is a process of the trace and each of its batches a row.
What lies between two messages follows from which two they are: after a recv of attended and before a send of q, for
one, the model worker runs a slice.
"""

import dataclasses
import importlib.metadata
import itertools
import operator
import os
import pathlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np
from absl import logging

from lamina_jax.transport import Tag
from lamina_jax.transport.recorder import Recording, start_recording, stop_recording

MODEL_WORKER: Final = "model worker"
MERGED: Final = "trace.json"
CAPACITY: Final = 1 << 17
"""Events of one process: seven hundred steps of 32 layers with two attention workers, 7 MB. A worker must have written
its own before the engine runs out of patience with it."""

Kind = Literal["wait", "transfer", "compute", "between steps"]

_SHORTEST_WAIT_NS: Final = 1000  # what a call takes that does not wait

_Call = tuple[Literal["send", "recv"], Tag]
_CALLS: Final[dict[tuple[int, int], _Call]] = {}  # by is_recv and tag
for _tag in Tag:
    _CALLS[0, int(_tag)] = "send", _tag
    _CALLS[1, int(_tag)] = "recv", _tag


class Span(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A stretch of time of one batch in one worker.

    Attributes:
        kind: "wait" for a message or for room; "transfer": copying; "compute"; "between steps": the last slice of a
            step, sampling and the first slice of the next, with whatever the host adds.
        name: What it is, e.g. "slice 3" or "wait for kv".
        start_ns: CLOCK_MONOTONIC.
        end_ns: CLOCK_MONOTONIC.
    """

    kind: Kind
    name: str
    step: int
    layer: int
    batch: int
    start_ns: int
    end_ns: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """How one worker spent a time, as fractions of it; no moment counts twice.

    Attributes:
        compute: At least one batch computed.
        transfer: None computed, and at least one was copied.
        wait: None of these, and at least one waited for a message or for room.
        between_steps: None of these, and at least one was between two steps.
        other: The rest: nothing was under way, e.g. between the programs of two slices.
        seconds: The time.
    """

    compute: float
    transfer: float
    wait: float
    between_steps: float
    other: float
    seconds: float


# What a batch does between two of its messages, from the end of one to the start of the next; nothing otherwise.
_BETWEEN: Final[dict[tuple[_Call, _Call], str]] = {
    (("recv", Tag.ATTENDED), ("send", Tag.Q)): "slice {layer}",
    (("recv", Tag.CONTEXT), ("send", Tag.Q)): "slice {layer}",
    (("recv", Tag.ATTENDED), ("send", Tag.CONTEXT)): "slice {layer}",
    (("send", Tag.Q), ("send", Tag.KV)): "slice {layer}: k, v",
    (("recv", Tag.Q), ("recv", Tag.KV)): "attend cached",
    (("recv", Tag.KV), ("send", Tag.ATTENDED)): "attend new",
}


_recording: pathlib.Path | None = None


def start(directory: str | os.PathLike[str], capacity: int = CAPACITY) -> None:
    """Starts recording in the engine's process; call it before the workers start.

    Makes the directory, and removes from it the traces of an earlier run.

    Raises:
        ValueError: a process has one recording, and another is under way.
        FileExistsError: the directory is a file.
    """
    global _recording
    folder = pathlib.Path(directory)
    if _recording is not None:
        raise ValueError(f"a timeline is being recorded for {_recording} already; close that LLM first.")
    folder.mkdir(parents=True, exist_ok=True)
    _recording = folder
    for old in [*_worker_files(folder), folder / MERGED]:
        old.unlink(missing_ok=True)
    start_recording(capacity)


def discard() -> None:
    """Ends a recording in the engine's process without writing it."""
    global _recording
    _recording = None
    stop_recording()


def finish(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the model worker's trace and merges those of all workers, which must have ended. Returns the file."""
    global _recording
    _recording = None
    write(directory, MODEL_WORKER)
    return merge(directory)


def write(directory: str | os.PathLike[str], worker: str) -> pathlib.Path:
    """Stops the recording and writes it, e.g. to `trace-attention-worker-0.json`. Returns the file."""
    path = pathlib.Path(directory) / f"trace-{worker.replace(' ', '-')}.json"
    recording = stop_recording()
    if recording.dropped:
        kept = len(recording.events)
        logging.warning("trace of %s: %d events fitted, the %d after them are lost", worker, kept, recording.dropped)
    _write(path, trace(worker, recording))
    return path


def merge(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `trace.json`, of all workers whose files are there, starting at 0. Returns the file.

    Raises:
        FileNotFoundError: There are no traces.
    """
    folder = pathlib.Path(directory)
    files = _worker_files(folder)
    if not files:
        raise FileNotFoundError(f"no trace-*.json in {folder}; was the run traced, and did its workers end?")
    traces = [msgspec.json.decode(file.read_bytes()) for file in files]
    events = [event for each in traces for event in each["traceEvents"]]
    first = min((event["ts"] for event in events if event["ph"] == "X"), default=0.0)
    for event in events:
        if event["ph"] == "X":
            event["ts"] = round(event["ts"] - first, 3)
    events += [_sort_index(each["traceEvents"][0]["pid"], i) for i, each in enumerate(traces)]
    workers = {name: about for each in traces for name, about in each["otherData"]["workers"].items()}
    _write(folder / MERGED, _trace_object(events, workers))
    return folder / MERGED


def trace(worker: str, recording: Recording) -> dict[str, Any]:
    """A worker's recording as a Chrome trace object. Times are microseconds of CLOCK_MONOTONIC."""
    pid = os.getpid()
    spans = sorted(spans_of(recording.events), key=lambda span: (span.batch, span.start_ns, -span.end_ns))
    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": worker}},
    ]
    row = 0
    for batch, group in itertools.groupby(spans, key=lambda span: span.batch):
        for lane in _lanes(group):
            events.append(_metadata(pid, row, f"batch {batch}"))
            events += [_event(span, pid, row) for span in lane]
            row += 1
    about = {
        "pid": pid,
        "dropped_events": recording.dropped,
        "share_of_time": dataclasses.asdict(share_of_time(spans)),
    }
    return _trace_object(events, {worker: about})


def spans_of(events: np.ndarray) -> Iterator[Span]:
    """What a worker did, from its events ([N] of EVENT_DTYPE, in order of their ends)."""
    for batch in np.unique(events["batch"]):
        before: dict[str, Any] | None = None
        for event in _rows(events[events["batch"] == batch]):
            if before is not None:
                yield from _between(before, event)
            yield from _call(event)
            before = event


def read_spans(path: str | os.PathLike[str]) -> dict[str, list[Span]]:
    """The spans of a trace file, by worker. Times count from the start of the trace."""
    events = msgspec.json.decode(pathlib.Path(path).read_bytes())["traceEvents"]
    workers = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    spans: dict[str, list[Span]] = {worker: [] for worker in workers.values()}
    for event in events:
        if event["ph"] == "X":
            start_ns, length_ns = (round(event[name] * 1e3) for name in ("ts", "dur"))
            times = {"start_ns": start_ns, "end_ns": start_ns + length_ns}
            spans[workers[event["pid"]]].append(Span(kind=event["cat"], name=event["name"], **event["args"], **times))
    return spans


def share_of_time(spans: Iterable[Span], window_ns: tuple[int, int] | None = None) -> Share:
    """How a worker spent its time, from its spans.

    Args:
        spans: All of one worker.
        window_ns: Start and end of the time to account for; None for all from the first span to the last.
    """
    spans = list(spans)
    if window_ns is None:
        window_ns = min((s.start_ns for s in spans), default=0), max((s.end_ns for s in spans), default=0)
    total = window_ns[1] - window_ns[0]
    if total <= 0:
        return Share(compute=0.0, transfer=0.0, wait=0.0, between_steps=0.0, other=0.0, seconds=0.0)
    kinds: tuple[Kind, ...] = ("compute", "transfer", "wait", "between steps")
    spans.sort(key=operator.attrgetter("start_ns"))
    # Each kind takes what those before it leave.
    covered = [_length([s for s in spans if s.kind in kinds[: i + 1]], *window_ns) for i in range(len(kinds))]
    compute, transfer, wait, between = np.diff([0, *covered]) / total
    return Share(
        compute=float(compute),
        transfer=float(transfer),
        wait=float(wait),
        between_steps=float(between),
        other=1 - covered[-1] / total,
        seconds=total / 1e9,
    )


def _rows(events: np.ndarray) -> Iterator[dict[str, Any]]:
    names = events.dtype.names or ()
    for values in events.tolist():
        yield dict(zip(names, values, strict=True))


def _operation(event: dict[str, Any]) -> _Call:
    return _CALLS[event["is_recv"], event["tag"]]


def _span(kind: Kind, name: str, event: dict[str, Any], start_ns: int, end_ns: int) -> Span:
    return Span(
        kind=kind,
        name=name,
        step=event["step"],
        layer=event["layer"],
        batch=event["batch"],
        start_ns=start_ns,
        end_ns=end_ns,
    )


def _call(event: dict[str, Any]) -> Iterator[Span]:
    operation, tag = _operation(event)
    start_ns, ready_ns, end_ns = event["start_ns"], event["ready_ns"], event["end_ns"]
    if ready_ns - start_ns < _SHORTEST_WAIT_NS:
        ready_ns = start_ns
    else:
        wait = f"wait for {tag.label}" if operation == "recv" else f"wait for room for {tag.label}"
        yield _span("wait", wait, event, start_ns, ready_ns)
    yield _span("transfer", f"{operation} {tag.label}", event, ready_ns, end_ns)


def _between(before: dict[str, Any], event: dict[str, Any]) -> Iterator[Span]:
    name = _BETWEEN.get((_operation(before), _operation(event)))
    start_ns, end_ns = before["end_ns"], event["start_ns"]
    if name is None or end_ns <= start_ns:
        return
    if before["step"] == event["step"]:
        yield _span("compute", name.format(layer=event["layer"]), event, start_ns, end_ns)
    else:
        yield _span("between steps", "last slice, sampling, slice 0", event, start_ns, end_ns)


def _length(spans: Iterable[Span], start_ns: int, end_ns: int) -> int:
    """Nanoseconds from start to end that lie in at least one of the spans, which are in order of their starts."""
    total, reached = 0, start_ns
    for span in spans:
        until = min(span.end_ns, end_ns)
        if until > reached:
            total += until - max(span.start_ns, reached)
            reached = until
    return total


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Rows without overlap, which viewers cannot draw: one of two replicas may wait while the other computes."""
    lanes: list[list[Span]] = []
    for span in spans:
        free = next((lane for lane in lanes if lane[-1].end_ns <= span.start_ns), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _event(span: Span, pid: int, row: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": pid,
        "tid": row,
        "ts": span.start_ns / 1e3,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "args": {"step": span.step, "layer": span.layer, "batch": span.batch},
    }


def _sort_index(pid: int, index: int) -> dict[str, Any]:
    return {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": index}}


def _metadata(pid: int, row: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": row, "args": {"name": name}}


def _trace_object(events: Sequence[dict[str, Any]], workers: dict[str, Any]) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("lamina_jax", "jax", "jaxlib")}
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"versions": versions | {"python": platform.python_version()}, "workers": workers},
    }


def _worker_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The model worker's first, then those of the attention workers by number, which is by length and then name."""
    return sorted(folder.glob("trace-*.json"), key=lambda path: (len(path.name), path.name))


def _write(path: pathlib.Path, trace: dict[str, Any]) -> None:
    # In one piece: a worker may be killed while it writes.
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(msgspec.json.encode(trace))
    unfinished.replace(path)
