"""Traces: complete, ordered, bounded, and what a viewer expects."""

import itertools
import json
import multiprocessing
import pathlib
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lamina_jax.runtime import timeline
from lamina_jax.runtime.timeline import share_of_time, spans_of
from lamina_jax.transport import Channel, ShmChannel, Tag, attach, make_stamp, recv, send
from lamina_jax.transport.recorder import EVENT_DTYPE, Recording, drain_recording, start_recording

LAYERS = 3
VALUE = jax.ShapeDtypeStruct((4,), jnp.float32)
NEXT_LAYER = np.array([0, 1, 0], np.int32)


@pytest.fixture(autouse=True)
def recording_ends():
    yield
    timeline.discard()


def model_side(down: Channel, up: Channel) -> None:
    """What the model worker sends and receives in one step."""

    def layer(_, stamp):
        stamp = send([down], stamp, [jnp.zeros(4)], tag=Tag.Q)
        stamp = send([down], stamp, [jnp.zeros(4)], tag=Tag.KV)
        _, stamp = recv([up], stamp, [VALUE], tag=Tag.ATTENDED)
        return stamp + NEXT_LAYER

    jax.jit(lambda stamp: jax.lax.fori_loop(0, LAYERS, layer, stamp))(make_stamp(0)).block_until_ready()


def attention_side(down: Channel, up: Channel) -> None:
    def layer(_, stamp):
        _, stamp = recv([down], stamp, [VALUE], tag=Tag.Q)
        _, stamp = recv([down], stamp, [VALUE], tag=Tag.KV)
        return send([up], stamp, [jnp.zeros(4)], tag=Tag.ATTENDED) + NEXT_LAYER

    jax.jit(lambda stamp: jax.lax.fori_loop(0, LAYERS, layer, stamp))(make_stamp(0)).block_until_ready()


def attention_process(down, up, directory: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    start_recording(100)
    attention_side(attach(down, role="reader", peer="model worker"), attach(up, role="writer", peer="model worker"))
    timeline.write(directory, "attention worker 0")


@pytest.fixture
def traced(tmp_path) -> tuple[pathlib.Path, np.ndarray]:
    """The merged trace of one step of two processes, and the events of this one."""
    ends = {"peer": "attention worker 0", "messages": [], "slot_bytes": 64}
    timeline.start(tmp_path)
    with ShmChannel.create(role="writer", **ends) as down, ShmChannel.create(role="reader", **ends) as up:
        arguments = (down.address, up.address, str(tmp_path))
        process = multiprocessing.get_context("spawn").Process(target=attention_process, args=arguments)
        process.start()
        model_side(down, up)
        process.join(60)
        assert process.exitcode == 0
        events = drain_recording().events
    # What was drained is gone, so it is written here as `finish` does.
    trace = timeline.trace(timeline.MODEL_WORKER, Recording(events, 0))
    (tmp_path / "trace-model-worker.json").write_text(json.dumps(trace))
    return timeline.merge(tmp_path), events


def test_events_of_a_known_exchange_are_complete_and_ordered(traced):
    _, events = traced
    order = [(bool(e["is_recv"]), Tag(e["tag"]), int(e["step"]), int(e["layer"]), int(e["batch"])) for e in events]
    layer = [(False, Tag.Q), (False, Tag.KV), (True, Tag.ATTENDED)]
    assert order == [(*operation, 0, i, 0) for i in range(LAYERS) for operation in layer]
    assert len({int(e["channel"]) for e in events}) == 2
    times = [int(e[name]) for e in events for name in ("start_ns", "ready_ns", "end_ns")]
    assert times == sorted(times)


def test_times_of_two_processes_line_up(traced):
    """Nothing is received before it was sent."""
    path, _ = traced
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    by_name = {(event["name"], event["args"]["layer"]): event for event in spans}
    for layer, tag in itertools.product(range(LAYERS), ("q", "kv", "attended")):
        sent, received = by_name[f"send {tag}", layer], by_name[f"recv {tag}", layer]
        assert sent["pid"] != received["pid"]
        assert sent["ts"] <= received["ts"] + received["dur"]


def test_trace_is_what_viewers_expect(traced):
    path, _ = traced
    trace = json.loads(path.read_text())
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert set(trace["otherData"]["versions"]) == {"lamina_jax", "jax", "jaxlib", "python"}
    assert list(trace["otherData"]["workers"]) == ["model worker", "attention worker 0"]
    assert all(about["dropped_events"] == 0 for about in trace["otherData"]["workers"].values())
    rows: dict[tuple[int, int], float] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert {"name", "pid", "tid"} <= set(event)
        if event["ph"] == "X":
            row = event["pid"], event["tid"]
            assert event["ts"] >= rows.get(row, 0.0) - 1e-3, "spans of a row overlap"
            assert event["dur"] >= 0
            rows[row] = event["ts"] + event["dur"]
    assert len(rows) == 2


def call(is_recv: bool, tag: Tag, start: int, ready: int, end: int, *, layer=0, step=0, batch=0):
    return (start, ready, end, 1, tag, step, layer, batch, is_recv, 0)


# Two batches of a model worker; times in units of 10 us.
STEP = [
    call(False, Tag.Q, 0, 0, 1),
    call(False, Tag.KV, 3, 3, 4),
    call(False, Tag.Q, 4, 4, 5, batch=1),
    call(True, Tag.ATTENDED, 4, 9, 10),
    call(False, Tag.Q, 15, 15, 16, layer=1),
    call(True, Tag.ATTENDED, 16, 18, 19, layer=1),
    call(False, Tag.Q, 20, 20, 20, step=1),
]


def as_events(calls) -> np.ndarray:
    events = np.array(calls, EVENT_DTYPE)
    for name in ("start_ns", "ready_ns", "end_ns"):
        events[name] *= 10_000
    return events


def test_what_lies_between_messages_is_named():
    spans = [(s.batch, s.kind, s.name) for s in spans_of(as_events(STEP)) if s.kind != "transfer"]
    assert spans == [
        (0, "compute", "slice 0: k, v"),
        (0, "wait", "wait for attended"),
        (0, "compute", "slice 1"),
        (0, "wait", "wait for attended"),
        (0, "between steps", "last slice, sampling, slice 0"),
    ]


def test_shares_of_time_count_no_moment_twice():
    spans = list(spans_of(as_events(STEP)))
    share = share_of_time(spans)
    assert share.seconds == pytest.approx(20e-5)
    assert share.compute == pytest.approx((2 + 5) / 20)
    assert share.transfer == pytest.approx((1 + 1 + 1 + 1 + 1 + 1) / 20)
    assert share.wait == pytest.approx((4 + 2) / 20)
    assert share.between_steps == pytest.approx(1 / 20)
    assert share.other == pytest.approx(0)
    part = share_of_time(spans, (80_000, 130_000))
    assert (part.wait, part.transfer, part.compute) == pytest.approx((1 / 5, 1 / 5, 3 / 5))
    assert share_of_time([]).seconds == 0


def test_spans_survive_the_file(tmp_path):
    events = as_events(STEP)
    trace = timeline.trace("model worker", Recording(events, 0))
    (tmp_path / "trace-model-worker.json").write_text(json.dumps(trace))
    key = lambda span: (span.batch, span.start_ns, span.name)  # noqa: E731
    (worker, spans), *others = timeline.read_spans(timeline.merge(tmp_path)).items()
    assert (worker, others) == ("model worker", [])
    assert sorted(spans, key=key) == sorted(spans_of(events), key=key)


def test_overlapping_spans_get_rows_of_their_own():
    """A replica waits for the values of a batch while the other one computes them."""
    calls = [call(True, Tag.ATTENDED, 0, 5, 6), call(False, Tag.CONTEXT, 8, 8, 9), call(True, Tag.CONTEXT, 2, 9, 10)]
    trace = timeline.trace("model worker", Recording(as_events(calls), 0))
    assert len({event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}) == 2


def test_full_buffer_counts_what_it_drops():
    ends = {"peer": "this process", "messages": [], "slot_bytes": 64}
    with ShmChannel.create(role="writer", **ends) as writer:
        reader = attach(writer.address, role="reader", peer="this process")
        start_recording(4)
        for _ in range(3):
            jax.jit(lambda stamp: send([writer], stamp, [jnp.zeros(4)], tag=Tag.Q))(make_stamp(0)).block_until_ready()
            jax.block_until_ready(jax.jit(lambda stamp: recv([reader], stamp, [VALUE], tag=Tag.Q))(make_stamp(0)))
        recording = drain_recording()
        reader.close()
    assert (len(recording.events), recording.dropped) == (4, 2)
    assert (len(drain_recording().events), drain_recording().dropped) == (0, 0)
    trace = timeline.trace("model worker", recording)
    assert trace["otherData"]["workers"]["model worker"]["dropped_events"] == 2
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        start_recording(0)


def test_nothing_is_recorded_unasked():
    with ShmChannel.create(role="writer", peer="nobody", messages=[], slot_bytes=64) as writer:
        send([writer], make_stamp(0), [jnp.zeros(4)], tag=Tag.Q).block_until_ready()
    assert len(drain_recording().events) == 0


def test_a_new_run_starts_without_the_traces_of_the_last(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trace-\*.json in .*; was the run traced"):
        timeline.merge(tmp_path)
    (tmp_path / "trace-attention-worker-7.json").write_text("stale")
    timeline.start(tmp_path / "deep" / "er")
    with pytest.raises(ValueError, match=r"being recorded for .*deep/er already"):
        timeline.start(tmp_path)
    timeline.discard()
    timeline.start(tmp_path)
    path = timeline.finish(tmp_path)
    assert list(json.loads(path.read_text())["otherData"]["workers"]) == ["model worker"]


PLOT = pathlib.Path(__file__).parents[2] / "scripts" / "plot_timeline.py"


def plot(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PLOT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_plot_draws_one_trace_or_two(tmp_path):
    for run in ("alone", "together"):
        timeline.start(tmp_path / run)
        trace = timeline.trace("model worker", Recording(as_events(STEP), 0))
        (tmp_path / run / "trace-model-worker.json").write_text(json.dumps(trace))
        timeline.merge(tmp_path / run)
        timeline.discard()
    one, two = (f"--trace={tmp_path / run / 'trace.json'}" for run in ("alone", "together"))
    done = plot(one, f"--output={tmp_path / 'one.png'}", "--start_ms=0.05", "--length_ms=0.1")
    assert done.returncode == 0, done.stderr
    done = plot(one, two, "--title=alone", "--title=together", f"--output={tmp_path / 'two.png'}")
    assert done.returncode == 0, done.stderr
    sizes = []
    for name in ("one.png", "two.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(struct.unpack(">II", data[16:24]))
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


def test_plot_refuses_an_empty_trace(tmp_path):
    timeline.start(tmp_path)
    done = plot(f"--trace={timeline.finish(tmp_path)}", f"--output={tmp_path / 'none.png'}")
    assert done.returncode != 0
    assert "holds no spans" in done.stderr
