"""Decoding unsplit, split, and split with batches staggered: tokens per second, time per token, and who waits.

    python benchmarks/pipeline.py [--batch=8,64] [--context=256,4096] [--cores=shared,own] [--json=FILE]

All engines live at the same time in one process (with their workers beside it) on the same cores and take turns, so
that noise of the machine falls on all of them. They run planned steps as `LLM` does, one step ahead of the host, but
start with the cache full: a prompt of 4096 tokens for each of 64 sequences would take longer than everything else, and
speed does not depend on what weights and cache hold. Waiting is measured in a run of its own, by the timeline.

With `--cores=shared` every worker may use every core, and what one leaves idle another takes. With `--cores=own` the
model worker and the attention worker have a core each and nothing to share, as devices of different kinds have; the
unsplit model keeps both.
"""

import contextlib
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path

from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from decoder import Decoder, Kind

from lamina_jax.models import ModelConfig, load_model
from lamina_jax.runtime import timeline
from lamina_jax.runtime.model import Model
from lamina_jax.runtime.model_worker import model_function
from lamina_jax.testing import write_tiny_checkpoint

_BATCH = flags.DEFINE_list("batch", ["8", "64"], "Sequences decoded together.")
_CONTEXT = flags.DEFINE_list("context", ["256", "1024"], "Tokens of each sequence.")
_TOKENS = flags.DEFINE_integer("tokens", 16, "Decode steps timed in a repeat.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times that every engine takes its turn.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden_size", 512, "Of the model; it has hidden_size // 64 heads.")
_LAYERS = flags.DEFINE_integer("num_layers", 8, "Of the model.")
_CORES = flags.DEFINE_multi_enum("cores", ["shared", "own"], ["shared", "own"], "Which cores the workers may use.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the cache.")
_TRACE_DIR = flags.DEFINE_string("trace_dir", None, "Keep the timelines there, to look at or to draw.")
_JSON = flags.DEFINE_string("json", None, "Write the figures here as well.")

KINDS = (
    Kind("unsplit"),
    Kind("split, n = 1, no overlap", 1, False),
    Kind("split, n = 1", 1),
    Kind("split, n = 2, no overlap", 2, False),
    Kind("split, n = 2", 2),
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows = []
    model = tiny_model()
    _print_header()
    for cores, batch, context in itertools.product(_CORES.value, map(int, _BATCH.value), map(int, _CONTEXT.value)):
        rows += _measure(model, batch, context, cores)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


def tiny_model() -> Model:
    """A model of the size that the flags say, with random weights."""
    heads = _HIDDEN.value // 64
    config = ModelConfig.from_hf_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 8192,
            "hidden_size": _HIDDEN.value,
            "intermediate_size": 3 * _HIDDEN.value,
            "num_hidden_layers": _LAYERS.value,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "max_position_embeddings": 8192,
        }
    )
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_checkpoint(Path(directory), config, dtype=_DTYPE.value)
        return Model(*model_function(load_model(Path(directory))[1]))


def _measure(model: Model, batch: int, context: int, cores: str) -> list[dict]:
    seconds: dict[str, list[float]] = {kind.name: [] for kind in KINDS}
    num_steps = (2 + _REPEATS.value) * _TOKENS.value
    with contextlib.ExitStack() as stack:
        decoders = {}
        for kind in KINDS:
            decoders[kind.name] = Decoder(model, kind, batch=batch, context=context, num_steps=num_steps)
            stack.callback(decoders[kind.name].close)
        for decoder in decoders.values():
            decoder.run(_TOKENS.value)  # compiles
        for _ in range(_REPEATS.value):
            for name, decoder in decoders.items():
                with decoder.on_cores(cores):
                    seconds[name].append(decoder.run(_TOKENS.value))
    base = statistics.median(seconds["unsplit"])
    rows = []
    for kind in KINDS:
        waits = _waits(model, kind, batch=batch, context=context, cores=cores) if kind.num_batches else {}
        row = _row(kind.name, batch, context, seconds[kind.name], base)
        rows.append({"cores": cores} | row | {"waits": waits})
        _print(rows[-1])
    return rows


def _waits(model: Model, kind: Kind, *, batch: int, context: int, cores: str) -> dict[str, float]:
    """By worker, the share of its time in steps that it waits for messages."""
    with tempfile.TemporaryDirectory() as directory:
        if _TRACE_DIR.value:
            place = f"{kind.name.replace(', ', '-').replace(' ', '')}-{batch}x{context}-{cores}"
            directory = str(Path(_TRACE_DIR.value, place))
        timeline.start(directory)
        decoder = Decoder(model, kind, batch=batch, context=context, num_steps=2 * _TOKENS.value, trace_dir=directory)
        decoder.run(_TOKENS.value)
        with decoder.on_cores(cores):
            seconds = decoder.run(_TOKENS.value)
        decoder.close()
        spans = timeline.read_spans(timeline.finish(directory))
    last = max(s.end_ns for each in spans.values() for s in each)
    window = (last - round(seconds * 1e9), last)
    return {worker: timeline.share_of_time(each, window).wait for worker, each in spans.items()}


def _row(name: str, batch: int, context: int, times: list[float], base: float) -> dict:
    median = statistics.median(times)
    return {
        "engine": name,
        "batch": batch,
        "context": context,
        "tokens_per_s": batch * _TOKENS.value / median,
        "ms_per_token": 1e3 * median / _TOKENS.value,
        "spread": (max(times) - min(times)) / median,
        "of_unsplit": base / median,
    }


def _print_header() -> None:
    titles = (
        "cores",
        "engine",
        "batch",
        "context",
        "tok/s",
        "ms/token",
        "spread",
        "of unsplit",
        "waits: model, attention",
    )
    print("{:6} {:26} {:>5} {:>7} {:>9} {:>9} {:>7} {:>10}  {}".format(*titles))


def _print(row: dict) -> None:
    waits = ", ".join(f"{share:.0%}" for share in row["waits"].values())
    line = (
        "{cores:6} {engine:26} {batch:5} {context:7} {tokens_per_s:9.1f} {ms_per_token:9.2f} {spread:7.0%} "
        "{of_unsplit:9.2f}x  "
    )
    print(line.format(**row) + waits, flush=True)


if __name__ == "__main__":
    app.run(main)
