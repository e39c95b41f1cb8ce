"""An engine that generates the same again and again, whatever happens to its workers. Run by `cluster_checks.py`.

    python -m lamina_jax.testing.rdma.generate_forever CLUSTER MODEL

Writes a line for every call of `generate`: "call 3: tokens [[..], ..]", or "call 3: error: .." and what was said.
"""

import itertools
import sys
from pathlib import Path

import jax

from lamina_jax import LLM, SamplingParams
from lamina_jax.runtime.cluster import load_cluster
from lamina_jax.runtime.errors import WorkerError

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1], [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 11])
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
# Otherwise as in docs/deploy.md, whose programs are then compiled already.
SETTINGS = {"dtype": "float32", "timeout_s": 30.0}


def tokens_of(llm: LLM) -> list[list[int]]:
    """What the model says to PROMPTS."""
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(cluster: str, model: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    with LLM(Path(model), cluster=load_cluster(cluster), **SETTINGS) as llm:
        for call in itertools.count(1):
            try:
                print(f"call {call}: tokens {tokens_of(llm)}", flush=True)
            except WorkerError as error:
                print(f"call {call}: error: {error}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
