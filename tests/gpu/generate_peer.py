"""Generates in a process of its own, which has a GPU or none: JSON in (argv), a line of JSON out, the last one."""

import json
import sys

import numpy as np

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.model_worker import ModelWorker
from lamina_jax.transport import cuda


def first_logits(llm: LLM, prompt: dict) -> list[float]:
    """The logits that a prompt's first token is sampled from."""
    assert isinstance(llm._worker, ModelWorker)
    worker = llm._worker
    run, steps = worker.run_with_logits, []

    def recorded(plans):
        results = run(plans)
        steps.extend((plan.emits, logits) for plan, (_, logits) in zip(plans, results, strict=True))
        return results

    worker.run_with_logits = recorded
    llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    worker.run_with_logits = run
    (row,) = np.concatenate([np.asarray(logits)[emits] for emits, logits in steps])
    return row.astype(float).tolist()


def main(order: dict) -> None:
    prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=order["max_tokens"], ignore_eos=True)
    with LLM(order["checkpoint"], **order["settings"]) as llm:

        def tokens() -> list[list[int]]:
            return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

        first, launched = tokens(), cuda.launch_count()
        # By now everything is compiled, and what XLA makes a CUDA graph is one.
        again, launches = tokens(), cuda.launch_count() - launched
        logits = first_logits(llm, prompts[-1])
    print(json.dumps({"tokens": first, "again": again, "launches": launches, "first_logits": logits}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
