"""Decoding unsplit, split, and split with batches staggered: tokens per second and time per token, side by side.

    python benchmarks/pipeline.py [--batch=8,64] [--context=256,1024] [--json=FILE]

All engines live at the same time in one process (with their workers beside it) on the same cores, and take turns, so
that noise of the machine falls on all of them. Decode time is that of a run with many tokens less that of a run with
one, both after a warm-up. Weights are random: speed does not depend on them.
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")

_BATCH = flags.DEFINE_list("batch", ["8", "32"], "Sequences decoded together.")
_CONTEXT = flags.DEFINE_list("context", ["256"], "Tokens of each prompt.")
_TOKENS = flags.DEFINE_integer("tokens", 16, "Decode steps timed in a repeat.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times that every engine takes its turn.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden_size", 512, "Of the model; it has hidden_size // 64 heads.")
_LAYERS = flags.DEFINE_integer("num_layers", 8, "Of the model.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the cache.")
_JSON = flags.DEFINE_string("json", None, "Write the figures here as well.")

ENGINES = {
    "unsplit": {"num_attention_workers": 0},
    "split, n = 1, no overlap": {"num_batches": 1, "overlap": False},
    "split, n = 1": {"num_batches": 1},
    "split, n = 2, no overlap": {"num_batches": 2, "overlap": False},
    "split, n = 2": {"num_batches": 2},
}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        _write_model(Path(directory))
        for batch in map(int, _BATCH.value):
            for context in map(int, _CONTEXT.value):
                rows += _measure(directory, batch, context)
    _print(rows)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(rows, indent=2) + "\n")


def _write_model(directory: Path) -> None:
    from lamina_jax.models import ModelConfig
    from lamina_jax.testing import write_tiny_checkpoint

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
    write_tiny_checkpoint(directory, config, dtype=_DTYPE.value)


def _measure(directory: str, batch: int, context: int) -> list[dict]:
    from lamina_jax import LLM, SamplingParams

    prompts = [
        {"prompt_token_ids": row} for row in np.random.default_rng(0).integers(0, 8192, (batch, context)).tolist()
    ]
    params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in (1, 1 + _TOKENS.value)]
    options = {"max_model_len": context + 64, "max_num_seqs": batch}
    seconds: dict[str, list[float]] = {name: [] for name in ENGINES}
    with contextlib.ExitStack() as stack:
        engines = {name: stack.enter_context(LLM(directory, **options, **kind)) for name, kind in ENGINES.items()}
        for repeat in range(1 + _REPEATS.value):
            for name, llm in engines.items():
                short, long = (_time(llm, prompts, p) for p in params)
                if repeat:  # the first is the warm-up, which compiles
                    seconds[name].append(long - short)
    base = statistics.median(seconds["unsplit"])
    return [_row(name, batch, context, times, base) for name, times in seconds.items()]


def _time(llm, prompts, params) -> float:
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


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


def _print(rows: list[dict]) -> None:
    print(f"{'engine':26} {'batch':>5} {'context':>7} {'tok/s':>9} {'ms/token':>9} {'spread':>7} {'of unsplit':>10}")
    for r in rows:
        print(
            f"{r['engine']:26} {r['batch']:5} {r['context']:7} {r['tokens_per_s']:9.1f} {r['ms_per_token']:9.2f} "
            f"{r['spread']:6.0%} {r['of_unsplit']:9.2f}x"
        )


if __name__ == "__main__":
    app.run(main)
