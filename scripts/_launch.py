"""What the launch scripts share: their flags, and the control socket of the worker."""

import os
from typing import TYPE_CHECKING, Any

import _flags
from absl import flags, logging

from lamina_jax.runtime.cluster import Cluster

if TYPE_CHECKING:
    from lamina_jax.runtime.cluster_key import ClusterKey
    from lamina_jax.runtime.control_tcp import ControlListener, PeerInfo

# As in _flags.
flags.disclaim_key_flags()

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines what the launch scripts share."""
    _flags.define_cluster_flags("this worker")
    flags.DEFINE_enum("platform", "cpu", ["cpu", "cuda"], "Where this worker's programs run.")
    flags.DEFINE_string(
        "rdma_device", None, "RDMA device to use, one of `ibv_devices`; if not given, the first one that is usable."
    )
    # What a worker waits for is told as information.
    FLAGS.set_default("verbosity", logging.INFO)


def choose_device() -> None:
    """Makes --rdma_device the one that verbs channels use."""
    if FLAGS.rdma_device is not None:
        os.environ["LAMINA_RDMA_DEVICE"] = FLAGS.rdma_device


def listen(
    cluster: Cluster, address: str, incoming: Any, name: str
) -> tuple["ControlListener", "ClusterKey | None", "PeerInfo"]:
    """Opens a worker's control socket.

    Args:
        incoming: type of the messages that come.
        name: of this worker.

    Returns:
        The socket, the cluster key, and what this process tells others of itself.
    """
    from lamina_jax.runtime.cluster_key import load_key_file
    from lamina_jax.runtime.control_tcp import ControlListener, peer_info
    from lamina_jax.transport.verbs import rdma_device, rdma_problem

    with _flags.user_errors():
        key = None if cluster.key_file is None else load_key_file(cluster.key_file)
        problem = rdma_problem()
        info = peer_info(rdma=None if problem else rdma_device(), rdma_problem=problem or "")
        return ControlListener(address, key, incoming, name, info), key, info


def say_end(name: str, listener: "ControlListener") -> None:
    """Logs that a worker has ended, and what came to its control socket meanwhile."""
    logging.info("%s: ended; came to %s: %s", name, listener.address, listener.counters)
