"""Decoding on a GPU alone, and with attention on the CPUs of its host, while batch and context grow.

    python benchmarks/gpu_decode.py [--models=llama3_2_1b,llama3_8b] [--cases=1x1024,64x8192] [--json=FILE]

Weights are random numbers made on the GPU, and the cache is full from the start, since speed depends on neither.
Cases grow until the GPU alone is out of memory, which is a row too. A case of the split model is skipped if the host
has no memory for its cache, and every case that would end after its model's share of `--seconds`, going by the one
before.

* tokens/s: steps as `LLM` runs them, the host one step behind.
* ms/step: steps dispatched at once, so that the device never waits for the host; "host ms" is what planning and
  dispatching one costs the host, and where that is less, the host is not in the way. "launches" counts the sends and
  recvs of a step that the host launched: none if CUDA graphs did all.

`--tiny` runs all of it on a CPU with a tiny model, to show that the program works.
"""

import dataclasses
import gc
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

_MODELS = flags.DEFINE_list("models", ["llama3_2_1b", "llama3_8b"], "Files of configs/models/, without .json.")
_CASES = flags.DEFINE_list(
    "cases",
    ["1x1024", "16x1024", "64x2048", "64x8192", "128x8192", "256x8192", "512x8192"],
    "Sequences x tokens of each, growing.",
)
_ENGINES = flags.DEFINE_list("engines", ["alone", "n1", "n2"], "Of alone; n1 and n2: split with so many batches.")
_SECONDS = flags.DEFINE_float("seconds", 300.0, "For everything.", lower_bound=10.0)
_CASE_SECONDS = flags.DEFINE_float("case_seconds", 3.0, "Aim of the timed steps of a case.", lower_bound=0.01)
_PAGE = flags.DEFINE_integer("page_size", 16, "Tokens in a page.", lower_bound=1)
_TINY = flags.DEFINE_bool("tiny", False, "A tiny model on the CPU.")
_JSON = flags.DEFINE_string("json", None, "Write the figures here, after every row.")

_ROOT = Path(__file__).resolve().parent.parent
_WARM_UP = 4
"""Steps: one compiles, in the others XLA makes its graphs."""
_MOST_STEPS = 64
_BURST = 6
_STEPS = _WARM_UP + 2 + _MOST_STEPS + _BURST
"""Of a case at most; its sequences begin so many tokens short of their context."""
_HOST_MEMORY_SHARE = 0.8
_SPLIT = {"n1": 1, "n2": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A case of an engine. What was not measured is None, and `note` says why."""

    model: str
    engine: str
    batch: int
    context: int
    tokens_per_s: float | None = None
    step_ms: float | None = None
    host_plan_ms: float | None = None
    host_dispatch_ms: float | None = None
    launches_per_step: float | None = None
    note: str = ""


@dataclasses.dataclass
class Clock:
    """The time of one model, and how long its cases take. An engine's steps are taken to grow with batch x context."""

    deadline: float
    seconds_per_token: dict[str, float] = dataclasses.field(default_factory=dict)
    """By engine: of everything that the last case took, divided by batch x context."""

    def has_time(self, engine: str, batch: int, context: int) -> bool:
        """Whether a case should end in time."""
        wanted = self.seconds_per_token.get(engine, 0.0) * batch * context
        return time.monotonic() + wanted < self.deadline

    def took(self, engine: str, batch: int, context: int, seconds: float) -> None:
        """Notes how long a case took beyond its timed steps, which are bounded, and compiling, which does not grow."""
        self.seconds_per_token[engine] = seconds / (batch * context)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # Before JAX starts. Of the memory as much as LLM takes for a model that shares its GPU with nobody.
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if _TINY.value else "cuda,cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    import jax

    if not _TINY.value and not _has_gpu():
        raise SystemExit("gpu_decode: JAX finds no GPU; install jax[cuda13], or use --tiny.")
    device = jax.devices()[0].device_kind
    rows: list[Row] = []
    for row in _all_rows():
        rows.append(row)
        print(_line(row), flush=True)
        if _JSON.value:
            _write(Path(_JSON.value), device, rows)
    print(f"\n{device}, {'float32' if _TINY.value else 'bfloat16'}, pages of {_PAGE.value}")
    print("| model | engine | batch | context | tokens/s | ms/step | host ms/step | launches/step | |")
    print("|---|---|---|---|---|---|---|---|---|")
    print("\n".join(map(_line, rows)))
    if broken := [row for row in rows if row.note.startswith("failed")]:
        raise SystemExit(f"gpu_decode: {len(broken)} of {len(rows)} cases failed.")


def _has_gpu() -> bool:
    import jax

    try:
        return jax.default_backend() == "gpu"
    except RuntimeError:
        return False


def _all_rows() -> Iterator[Row]:
    import decoder

    end = time.monotonic() + _SECONDS.value
    configs = _configs()
    for i, (name, config) in enumerate(configs.items()):
        clock = Clock(time.monotonic() + (end - time.monotonic()) / (len(configs) - i))
        model = decoder.random_model(config, dtype="float32" if _TINY.value else "bfloat16")
        yield from _rows_of(name, config, model, clock)
        del model
        gc.collect()


def _configs() -> dict:
    from lamina_jax.models import ModelConfig
    from lamina_jax.testing import TINY_CONFIGS

    if _TINY.value:
        return {"tiny": dataclasses.replace(TINY_CONFIGS["gqa"], max_position_embeddings=8192)}
    return {name: ModelConfig.from_file(_ROOT / "configs" / "models" / f"{name}.json") for name in _MODELS.value}


def _rows_of(name: str, config, model, clock: Clock) -> Iterator[Row]:
    cases = ["2x128", "4x256"] if _TINY.value else _CASES.value
    full: set[str] = set()
    for batch, context in (map(int, case.split("x")) for case in cases):
        for engine in _ENGINES.value:
            if engine in full or context > config.max_position_embeddings or (engine == "n2" and batch < 2):
                continue
            case = {"model": name, "engine": engine, "batch": batch, "context": context}
            if missing := _missing_memory(config, engine, batch, context):
                full.add(engine)
                yield Row(**case, note=missing)
            elif not clock.has_time(engine, batch, context):
                full.add(engine)
                yield Row(**case, note="not run: no time left")
            else:
                row = _measured(model, case, clock)
                if row.note:
                    full.add(engine)
                yield row
        if "alone" in full:
            return


def _missing_memory(config, engine: str, batch: int, context: int) -> str:
    """Why the host cannot hold the cache of a split model, or nothing. What a GPU cannot hold it says itself."""
    import psutil

    if engine == "alone":
        return ""
    itemsize = 4 if _TINY.value else 2
    needed, free = config.kv_bytes_per_token(itemsize) * batch * context, psutil.virtual_memory().available
    if needed <= _HOST_MEMORY_SHARE * free:
        return ""
    return f"not run: a cache of {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB free in the host"


def _measured(model, case: dict, clock: Clock) -> Row:
    """One case; an error makes a row too, so that the others are measured."""
    try:
        return _measure(model, case, clock)
    except Exception as error:
        words = " ".join(str(error).split())
        note = "out of memory" if "RESOURCE_EXHAUSTED" in words else f"failed: {type(error).__name__}: {words[:200]}"
    # Here the error is gone, and with it the frames that hold a cache.
    gc.collect()
    return Row(**case, note=note)


def _measure(model, case: dict, clock: Clock) -> Row:
    import decoder

    from lamina_jax.transport import cuda

    engine, batch, context = case["engine"], case["batch"], case["context"]
    kind = decoder.Kind(engine, _SPLIT.get(engine), attention_kernel="auto", page_size=_PAGE.value)
    start = time.monotonic()
    steps = decoder.Decoder(model, kind, batch=batch, context=context, num_steps=_STEPS)
    try:
        began = time.monotonic()
        steps.run(1)
        compiled = time.monotonic()
        steps.run(_WARM_UP - 1)
        count = _steps_in(steps.run(2) / 2, clock)
        seconds = steps.run(count)
        launched = cuda.launch_count()
        burst = steps.burst(_BURST)
        launches = cuda.launch_count() - launched
    finally:
        steps.close()
    clock.took(engine, batch, context, time.monotonic() - start - (compiled - began))
    return Row(
        **case,
        tokens_per_s=batch * count / seconds,
        step_ms=1e3 * burst.step_s,
        host_plan_ms=1e3 * burst.plan_s,
        host_dispatch_ms=1e3 * burst.dispatch_s,
        launches_per_step=launches / _BURST if kind.num_batches and model.device.platform == "gpu" else None,
    )


def _steps_in(step_s: float, clock: Clock) -> int:
    """How many steps to time."""
    seconds = min(_CASE_SECONDS.value, max(clock.deadline - time.monotonic(), 0.0))
    return max(2, min(math.floor(seconds / step_s), _MOST_STEPS))


def _line(row: Row) -> str:
    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    host = None if row.host_plan_ms is None else row.host_plan_ms + (row.host_dispatch_ms or 0.0)
    engine = {"alone": "unsplit", "n1": "CPU attention, n = 1", "n2": "CPU attention, n = 2"}[row.engine]
    cells = [row.model, engine, row.batch, row.context, cell(row.tokens_per_s, ".1f"), cell(row.step_ms, ".2f")]
    cells += [cell(host, ".2f"), cell(row.launches_per_step, ".1f"), row.note]
    return f"| {' | '.join(map(str, cells))} |"


def _write(path: Path, device: str, rows: list[Row]) -> None:
    figures = {"device": device, "page_size": _PAGE.value, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
