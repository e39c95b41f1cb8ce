"""Whether the host is in the path of a step: what a step costs it, and what goes on while it sleeps.

    python benchmarks/host.py [--sequences=16] [--tokens_each=256] [--pause_ms=50] [--steps_ahead=1,8]

Decodes as `LLM` does, split, with so many steps dispatched ahead of the one that the host waits for, and lets the host
sleep in the middle. Timestamps taken inside the custom calls say when each step ended. Steps that were dispatched when
the host fell asleep should take as long as all others.

XLA lets 32 programs be under way on a CPU device; a step has one for each slice, so that asking for more steps ahead
than that makes the dispatch wait instead.
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections import deque

import jax
from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pipeline
from decoder import Decoder, Kind, read

from lamina_jax.runtime import timeline

_BATCH = flags.DEFINE_integer("sequences", 16, "Sequences decoded together.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("tokens_each", 256, "Tokens of each sequence.", lower_bound=128)
_PAUSE_MS = flags.DEFINE_float("pause_ms", 50.0, "How long the host sleeps.", lower_bound=0)
_AHEAD = flags.DEFINE_list("steps_ahead", ["1", "8"], "Steps dispatched beyond the one that the host waits for.")
_STEPS = flags.DEFINE_integer("steps", 60, "Steps of a run; the host sleeps after half of them.", lower_bound=8)

_WARM_UP = 8


@dataclasses.dataclass(frozen=True)
class Run:
    """What the host saw. Times of the host are nanoseconds of CLOCK_MONOTONIC."""

    plan_s: list[float]
    """Seconds of planning, by step."""
    dispatch_s: list[float]
    """Seconds until the step was dispatched."""
    paused: tuple[int, int]
    in_flight: int
    """Steps dispatched and not known to be done when the host fell asleep."""


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    model = pipeline.tiny_model()
    titles = ("ahead", "in flight", "steps ended asleep", "ms each", "ms otherwise", "plan ms", "dispatch ms")
    print("{:>5} {:>9} {:>18} {:>8} {:>12} {:>8} {:>11}".format(*titles))
    for ahead in map(int, _AHEAD.value):
        run, ends = _measure(model, ahead)
        inside, outside = _intervals(ends, run.paused)
        each = f"{statistics.median(inside):8.2f}" if inside else f"{'-':>8}"
        print(
            f"{ahead:5} {run.in_flight:9} {len(inside):18} {each} {statistics.median(outside):12.2f} "
            f"{1e3 * statistics.median(run.plan_s):8.2f} {1e3 * statistics.median(run.dispatch_s):11.2f}",
            flush=True,
        )


def _measure(model, ahead: int) -> tuple[Run, list[int]]:
    """A run, and the time at which each of its steps got its last attention output."""
    kind = Kind("split, n = 1", 1)
    sizes = {"batch": _BATCH.value, "context": _CONTEXT.value, "num_steps": _WARM_UP + _STEPS.value}
    with tempfile.TemporaryDirectory() as directory:
        timeline.start(directory)
        decoder = Decoder(model, kind, **sizes, trace_dir=directory)
        try:
            decoder.run(_WARM_UP)
            start = time.monotonic_ns()
            run = _run(decoder, ahead)
        finally:
            decoder.close()
        spans = timeline.read_spans(timeline.finish(directory))[timeline.MODEL_WORKER]
    ends: dict[int, int] = {}
    for span in spans:
        if span.name == "recv attended" and span.end_ns > start:
            ends[span.step] = max(ends.get(span.step, 0), span.end_ns)
    return run, [ends[step] for step in sorted(ends)]


def _run(decoder: Decoder, ahead: int) -> Run:
    plan_s, dispatch_s = [], []
    in_flight: deque[list[jax.Array]] = deque()
    paused, waiting = (0, 0), 0
    for step in range(_STEPS.value):
        start = time.perf_counter()
        plans = decoder.plan()
        planned = time.perf_counter()
        in_flight.append(decoder.dispatch(plans))
        plan_s.append(planned - start)
        dispatch_s.append(time.perf_counter() - planned)
        if step == _STEPS.value // 2:
            waiting = sum(not all(map(_is_ready, tokens)) for tokens in in_flight)
            began = time.monotonic_ns()
            time.sleep(_PAUSE_MS.value / 1e3)
            paused = (began, time.monotonic_ns())
        if len(in_flight) > ahead:
            read(in_flight.popleft())
    while in_flight:
        read(in_flight.popleft())
    return Run(plan_s, dispatch_s, paused, waiting)


def _intervals(ends: list[int], paused: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps that ended in the pause, and of those that had no part in it."""
    inside, outside = [], []
    for before, end in itertools.pairwise(ends):
        if paused[0] <= end <= paused[1]:
            inside.append((end - before) / 1e6)
        elif end < paused[0] or before > paused[1]:
            outside.append((end - before) / 1e6)
    return inside, outside


def _is_ready(array: jax.Array) -> bool:
    return array.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    app.run(main)
