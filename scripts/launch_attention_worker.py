"""Runs an attention worker of a cluster.

    python scripts/launch_attention_worker.py --cluster=FILE --index=0 [flags]

It holds the KV cache of its share of the KV heads and computes attention, for one session of the model worker after
another. Workers and engine may be started in any order. SIGTERM ends it when what is under way is done, with status 0.
It says on stderr what it waits for.
"""

import _flags
import _launch
from absl import flags

FLAGS = flags.FLAGS
flags.DEFINE_integer("index", None, "Which attention worker of the cluster this is, from 0 (required).", lower_bound=0)
_launch.define_flags()


def main() -> None:
    cluster = _flags.read_cluster()
    _check_index(len(cluster.attention_workers))
    _launch.choose_device()
    if FLAGS.check:
        from lamina_jax.runtime.checks import attention_worker_checks

        _flags.report(attention_worker_checks(cluster, FLAGS.index))
    from lamina_jax.runtime.attention_worker import serve_cluster
    from lamina_jax.runtime.messages import ToClusterWorker

    name = f"attention worker {FLAGS.index}"
    listener, _, _ = _launch.listen(cluster, cluster.attention_workers[FLAGS.index], ToClusterWorker, name)
    serve_cluster(listener, name=name)
    _launch.say_end(name, listener)


def _check_index(count: int) -> None:
    if FLAGS.index is None:
        raise _flags.UserError("--index is required; see --help")
    if FLAGS.index >= count:
        raise _flags.UserError(f"--index is {FLAGS.index}, and {FLAGS.cluster} has {count} attention workers, from 0")


if __name__ == "__main__":
    _flags.run(main)
