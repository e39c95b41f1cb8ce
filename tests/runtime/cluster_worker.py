"""A worker of a cluster on loopback, as the launch scripts start it: python cluster_worker.py model|N ADDRESS."""

import sys

import jax
from absl import app, logging

from lamina_jax.runtime.attention_worker import serve_cluster
from lamina_jax.runtime.control_tcp import ControlListener
from lamina_jax.runtime.control_wire import peer_info
from lamina_jax.runtime.messages import ToClusterWorker, ToModelWorker
from lamina_jax.runtime.model_server import serve_model


def main(argv: list[str]) -> None:
    _, role, address = argv
    logging.set_verbosity(logging.INFO)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 3)
    if role == "model":
        info = peer_info()
        serve_model(ControlListener(address, None, ToModelWorker, "model worker", info), None, info)
    else:
        name = f"attention worker {role}"
        serve_cluster(ControlListener(address, None, ToClusterWorker, name, peer_info()), name=name)


if __name__ == "__main__":
    app.run(main)
