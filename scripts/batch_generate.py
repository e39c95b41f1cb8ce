"""Completes the prompts of a batch file, one JSON object a line.

    python scripts/batch_generate.py --model=DIR --input_file=IN.jsonl --output_file=OUT.jsonl [flags]

A line is {"prompt": "..."} with any sampling parameters beside it (temperature, max_tokens, ...), or a row of
OpenAI's batch format for /v1/completions. Results are written in the order of the input, each as soon as those
before it are done. A row that cannot be used becomes an error row, and the others go on; the exit status is
0 then too. Sampling flags apply to rows that do not say; without a flag the model's generation_config.json does.
"""

import dataclasses
import os
import sys

import _flags
from absl import flags

FLAGS = flags.FLAGS
flags.DEFINE_string("input_file", None, "Batch file to read (required).")
flags.DEFINE_string("output_file", None, "File to write the results to (required).")
flags.DEFINE_bool("overwrite", False, "Replace an output file that exists.")
_flags.define_engine_flags()
_flags.define_sampling_flags()


def main() -> None:
    _flags.check_engine()
    _flags.require("model", "input_file", "output_file")
    _check_files()
    # Takes seconds, which a mistaken flag should not cost.
    from lamina_jax import LLM, SamplingParams
    from lamina_jax.engine.batch_file import run_batch

    with _flags.user_errors():
        SamplingParams(**_flags.sampling_options())
        llm = LLM(FLAGS.model, **_flags.engine_options())
    with llm:
        with _flags.user_errors():
            defaults = dataclasses.replace(llm.get_default_sampling_params(), **_flags.sampling_options())
            input_file = open(FLAGS.input_file, "rb")  # noqa: SIM115
            output_file = open(FLAGS.output_file, "wb" if FLAGS.overwrite else "xb")  # noqa: SIM115
        with input_file, output_file:
            summary = run_batch(llm, input_file, output_file, defaults=defaults, model=FLAGS.model, use_tqdm=True)
    seconds = max(summary.seconds, 1e-9)
    print(
        f"{summary.succeeded} rows succeeded, {summary.failed} failed, in {summary.seconds:.1f} s: "
        f"{summary.prompt_tokens} prompt tokens, {summary.generated_tokens} generated "
        f"({summary.generated_tokens / seconds:.1f} tok/s)",
        file=sys.stderr,
    )


def _check_files() -> None:
    """Finds what is wrong with the files before the model is loaded."""
    if not os.path.isfile(FLAGS.input_file):
        raise _flags.UserError(f"no input file at {FLAGS.input_file}")
    folder = os.path.dirname(os.path.abspath(FLAGS.output_file))
    if not os.path.isdir(folder):
        raise _flags.UserError(f"no directory {folder} to write the output file in")
    if os.path.exists(FLAGS.output_file):
        if not FLAGS.overwrite:
            raise _flags.UserError(f"{FLAGS.output_file} exists; give --overwrite to replace it")
        if os.path.samefile(FLAGS.input_file, FLAGS.output_file):
            raise _flags.UserError("the input file and the output file are the same")


if __name__ == "__main__":
    _flags.run(main)
