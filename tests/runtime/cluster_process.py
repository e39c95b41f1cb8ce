"""A process of a cluster on loopback: an engine, the model worker, or an attention worker.

python cluster_process.py model ADDRESS
python cluster_process.py N ADDRESS
python cluster_process.py engine MODEL_ADDRESS MODEL_DIRECTORY ATTENTION_ADDRESS...

KILL=COUNT:MILLISECONDS:SIGNAL in the environment has it send itself the signal so long after its control messages, sent
and received, have come to that count.
"""

import os
import signal
import threading
from typing import Any

import jax
from absl import app, logging

from lamina_jax import LLM, SamplingParams, WorkerError
from lamina_jax.runtime.attention_worker import serve_cluster
from lamina_jax.runtime.cluster import Cluster
from lamina_jax.runtime.control_tcp import ControlLink, ControlListener, Session, peer_info
from lamina_jax.runtime.messages import ToClusterWorker, ToModelWorker
from lamina_jax.runtime.model_server import serve_model

PROMPTS = [{"prompt_token_ids": [5 + i, 6, 7]} for i in range(4)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SETTINGS: dict[str, Any] = {"max_num_seqs": 4, "num_batches": 1, "max_model_len": 64}
_ATTEMPTS = 5


def tokens(llm: LLM) -> list[list[int]]:
    """What the model says, token by token."""
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def generate(model_worker: str, directory: str, attention_workers: list[str]) -> None:
    """Generates, again after each failure."""
    cluster = Cluster(model_worker=model_worker, attention_workers=tuple(attention_workers))
    llm = None
    for _ in range(_ATTEMPTS):
        try:
            llm = llm or LLM(directory, cluster=cluster, **SETTINGS)
            print(f"tokens {tokens(llm)}", flush=True)
            return llm.close()
        except WorkerError as error:
            print(f"failed: {error}", flush=True)
    return None


def _signal_at(count: int, milliseconds: float, number: int) -> None:
    left = [count]

    def note() -> None:
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(milliseconds / 1000, lambda: os.kill(os.getpid(), number)).start()

    def noted(method, counts):
        def wrapped(*args, **kwargs):
            result = method(*args, **kwargs)
            if counts(result):
                note()
            return result

        return wrapped

    for kind in (Session, ControlLink):
        kind.send = noted(kind.send, lambda _: True)
        kind.receive = noted(kind.receive, lambda message: message is not None)


def main(argv: list[str]) -> None:
    _, role, address, *rest = argv
    logging.set_verbosity(logging.INFO)
    jax.config.update("jax_platforms", "cpu")
    if "KILL" in os.environ:
        count, milliseconds, name = os.environ["KILL"].split(":")
        _signal_at(int(count), float(milliseconds), signal.Signals[name])
    if role == "engine":
        directory, *attention_workers = rest
        generate(address, directory, attention_workers)
    elif role == "model":
        info = peer_info()
        serve_model(ControlListener(address, None, ToModelWorker, "model worker", info), None, info)
    else:
        name = f"attention worker {role}"
        serve_cluster(ControlListener(address, None, ToClusterWorker, name, peer_info()), name=name)


if __name__ == "__main__":
    app.run(main)
