"""Draws traces of runs (`trace.json`) as a picture: a row for each batch of each worker, one run above the other.

python scripts/plot_timeline.py --trace=alone/trace.json --trace=overlapped/trace.json --title=alone --title=overlapped
"""

import dataclasses
import json
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from absl import app, flags
from matplotlib.axes import Axes
from matplotlib.patches import Patch

_TRACE = flags.DEFINE_multi_string("trace", None, "A trace.json; up to two.", required=True)
_TITLE = flags.DEFINE_multi_string("title", [], "A title for each trace.")
_OUTPUT = flags.DEFINE_string("output", "timeline.png", "The picture to write.")
_START_MS = flags.DEFINE_float("start_ms", None, "Where the picture starts; None for a few steps from the middle.")
_LENGTH_MS = flags.DEFINE_float(
    "length_ms", None, "What it covers, in milliseconds; None for three steps.", lower_bound=0
)

_STEPS = 3
_LABEL_AT = 0.035  # of the width: a shorter span has no room for its name
_COLORS = {"compute": "#4878a8", "transfer": "#d98c3f", "wait": "#dddddd", "between steps": "#a9bfd4"}
_LABEL_COLORS = {"compute": "white", "between steps": "black"}


@dataclasses.dataclass(frozen=True)
class Run:
    """A trace, as rows of spans. Times are milliseconds.

    Attributes:
        rows: By worker and batch, e.g. ("model worker", "batch 0"), the trace's "X" events.
    """

    rows: dict[tuple[str, str], list[dict]]

    @property
    def spans(self) -> list[dict]:
        return [span for row in self.rows.values() for span in row]


def read(path: str) -> Run:
    """Reads a trace.

    Raises:
        ValueError: It holds no spans.
    """
    events = json.loads(pathlib.Path(path).read_text())["traceEvents"]
    order = {e["pid"]: e["args"]["sort_index"] for e in events if e["name"] == "process_sort_index"}
    workers = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    batches = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    rows: dict[tuple[str, str], list[dict]] = {}
    for pid, tid in sorted(batches, key=lambda row: (order.get(row[0], 0), row[1])):
        spans = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (pid, tid)]
        rows.setdefault((workers[pid], batches[pid, tid]), []).extend(spans)
    if not any(rows.values()):
        raise ValueError(f"{path} holds no spans; was anything generated while it was traced?")
    return Run(rows)


def window(run: Run) -> tuple[float, float]:
    """Start and length of what to draw, in milliseconds: what the flags say, or a few steps from the middle."""
    begins: dict[int, float] = {}
    for span in run.spans:
        step, begin = span["args"]["step"], float(span["ts"])
        begins[step] = min(begins.get(step, begin), begin)
    steps = sorted(begins)
    middle = max(0, (len(steps) - _STEPS) // 2)
    start = begins[steps[middle]] / 1e3
    if middle + _STEPS < len(steps):
        end = begins[steps[middle + _STEPS]] / 1e3
    else:
        end = max(span["ts"] + span["dur"] for span in run.spans) / 1e3
    return _flag_or(_START_MS.value, start), _flag_or(_LENGTH_MS.value, end - start)


def _flag_or(flag: float | None, default: float) -> float:
    return default if flag is None else flag


def draw(axes: Axes, run: Run, start: float, length: float, title: str) -> None:
    """Draws the spans of a window, the first row on top. Times on the axis count from its start."""
    for y, spans in enumerate(run.rows.values()):
        for span in spans:
            _draw_span(axes, y, span, start, length)
    axes.set_yticks(range(len(run.rows)), [f"{worker}\n{batch}" for worker, batch in run.rows])
    axes.set_ylim(len(run.rows) - 0.5, -0.5)
    axes.set_xlim(0, length)
    axes.set_xlabel(f"ms, from {start:.2f} ms on")
    axes.set_title(title, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_span(axes: Axes, y: int, span: dict, start: float, length: float) -> None:
    left = max(0.0, span["ts"] / 1e3 - start)
    right = min(length, (span["ts"] + span["dur"]) / 1e3 - start)
    if right <= left:
        return
    height = 0.3 if span["cat"] == "wait" else 0.72
    axes.barh(y, right - left, left=left, height=height, color=_COLORS[span["cat"]], edgecolor="white", linewidth=0.3)
    if span["cat"] in _LABEL_COLORS and right - left > _LABEL_AT * length:
        style = {"ha": "center", "va": "center", "fontsize": 6, "color": _LABEL_COLORS[span["cat"]]}
        axes.text((left + right) / 2, y, _label(span), **style)


def _label(span: dict) -> str:
    name = span["name"] if span["cat"] == "compute" else span["cat"]
    return name.replace(": ", "\n").replace(" ", "\n", 1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if len(_TRACE.value) > 2:
        raise app.UsageError(f"expected one trace or two, got {len(_TRACE.value)}")
    runs = [read(path) for path in _TRACE.value]
    titles = [*_TITLE.value, *_TRACE.value[len(_TITLE.value) :]]
    heights = [1 + 0.6 * len(run.rows) for run in runs]
    size = (13, sum(heights) + 0.6)
    figure, grid = plt.subplots(len(runs), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    windows = [window(run) for run in runs]
    length = max(each for _, each in windows)  # the same scale, so that lengths compare
    for axes, run, (start, _), title in zip(grid[:, 0], runs, windows, titles, strict=False):
        draw(axes, run, start, length, title)
    legend = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(_OUTPUT.value, dpi=150)
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    app.run(main)
