"""Completes prompts with a model.

    python scripts/generate.py --model=DIR --prompt="The capital of France is" [--prompt=...] [flags]

Prints each prompt and its text. Sampling flags that are not given come from the model's generation_config.json,
or else are those of plain sampling: temperature 1, no filters, 16 tokens.
"""

import dataclasses

import _flags
from absl import flags

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("prompt", None, "Text to complete (required)")
_flags.define_engine_flags()
_flags.define_sampling_flags()


def main() -> None:
    _flags.check_engine()
    _flags.require("model", "prompt")
    # Takes seconds, which a mistaken flag should not cost.
    from lamina_jax import LLM, SamplingParams

    with _flags.user_errors():
        SamplingParams(**_flags.sampling_options())
        llm = LLM(FLAGS.model, **_flags.engine_options())
    with llm:
        with _flags.user_errors():
            params = dataclasses.replace(llm.get_default_sampling_params(), **_flags.sampling_options())
            for prompt in FLAGS.prompt:
                llm.validate(prompt, params)
        for output in llm.generate(FLAGS.prompt, params):
            print(f"Prompt: {output.prompt}\nText: {output.outputs[0].text}\n", flush=True)


if __name__ == "__main__":
    _flags.run(main)
