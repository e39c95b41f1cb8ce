"""Runs the model worker of a cluster.

    python scripts/launch_model_worker.py --cluster=FILE [flags]

It loads the model that an engine asks for (generate.py --cluster=FILE) from the same path on its own host, and computes
everything but attention, for one engine after another. Workers and engine may be started in any order. SIGTERM ends
it when what is under way is done, with status 0. It says on stderr what it waits for.
"""

import _flags
import _launch

_launch.define_flags()


def main() -> None:
    cluster = _flags.read_cluster()
    _launch.choose_device()
    if _flags.FLAGS.check:
        from lamina_jax.runtime.checks import model_worker_checks

        _flags.report(model_worker_checks(cluster))
    from lamina_jax.runtime.messages import ToModelWorker
    from lamina_jax.runtime.model_server import serve_model

    listener, key, info = _launch.listen(cluster, cluster.model_worker, ToModelWorker, "model worker")
    serve_model(listener, key, info)
    _launch.say_end("model worker", listener)


if __name__ == "__main__":
    _flags.run(main)
