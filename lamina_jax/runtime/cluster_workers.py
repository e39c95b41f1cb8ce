"""The attention workers of a cluster as the model worker sees them: reached over control links, never started here."""

import collections
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from lamina_jax.runtime.cluster_key import ClusterKey
from lamina_jax.runtime.control_tcp import ControlLink, PeerInfo, same_host
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.messages import Available, Describe, Done, FromClusterWorker, Placement, ToWorker
from lamina_jax.runtime.places import cluster_channel_kind
from lamina_jax.runtime.pool import AttentionWorkers

_POLL_MS: Final = 50
_DESCRIBE_TIMEOUT_S: Final = 60.0


class ClusterWorkers(AttentionWorkers):
    """Sessions with the attention workers of a cluster; `close` ends them, and the workers wait for the next."""

    def __init__(
        self,
        addresses: Sequence[str],
        key: ClusterKey | None,
        info: PeerInfo,
        *,
        timeout_s: float,
        on_waiting: Callable[[str], None],
    ) -> None:
        """Opens a session with every worker, and asks what it has.

        Args:
            addresses: control addresses, in order of the workers' numbers.
            info: of this process.
            timeout_s: how long to wait for workers that are not there yet.
            on_waiting: called now and then with what is waited for; what it raises ends the wait.

        Raises:
            WorkerError: a worker does not come, or cannot be used.
        """
        super().__init__(len(addresses))
        self._info = info
        self._peers: list[PeerInfo] = []
        self._available: dict[int, Available] = {}
        # One thread dispatches steps and waits, others check.
        self._receiving = threading.Lock()
        self._links = [
            ControlLink(address, key, FromClusterWorker, f"attention worker {i}", info)
            for i, address in enumerate(addresses)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            for link in self._links:
                self._peers.append(link.open(max(1.0, deadline - time.monotonic()), on_waiting))
                link.send(Describe())
            self._wait(lambda: len(self._available) == len(addresses), _DESCRIBE_TIMEOUT_S, "say what it has")
        except BaseException:
            self.close()
            raise

    def names(self) -> list[str]:
        return [f"attention worker {i} on {peer.host}" for i, peer in enumerate(self._peers)]

    def cache_bytes(self) -> int:
        # Workers on the CPUs of one host share its memory; what one on a GPU may take is its own.
        hosts = collections.Counter(peer.boot_id for peer in self._peers)
        return min(
            self._available[i].cache_bytes // (hosts[peer.boot_id] if self._available[i].platform == "cpu" else 1)
            for i, peer in enumerate(self._peers)
        )

    def choose_channels(self, placement: Placement, transport: str) -> list[tuple[str, str]]:
        """For each worker the kind of channel that leads there, and why.

        Raises:
            WorkerError: there is none, or the worker is not on the platform that it should be on.
        """
        return [self._choose(i, placement, transport) for i in self._pending]

    def _choose(self, worker: int, placement: Placement, transport: str) -> tuple[str, str]:
        peer, platform = self._peers[worker], self._available[worker].platform
        if platform != placement.attention_platform:
            raise WorkerError(
                f"{self._described(worker)} runs on {platform}, expected attention_platform "
                f"{placement.attention_platform!r}."
            )
        try:
            return cluster_channel_kind(
                placement.model_platform,
                platform,
                transport,
                same_host=same_host(self._info, peer),
                rdma=(self._info.rdma, peer.rdma),
                rdma_problems=(self._info.rdma_problem, peer.rdma_problem),
            )
        except ValueError as error:
            raise WorkerError(f"cannot join the model worker and {self._described(worker)}: {error}.") from error

    def close(self) -> None:
        for link in self._links:
            link.close("the model worker has no more use for it")

    def _wait_until_up(self) -> None:
        pass  # since the sessions were opened

    def _send(self, worker: int, message: ToWorker) -> None:
        self._links[worker].send(message)

    def _receive(self, timeout_ms: int) -> tuple[int, Done] | None:
        with self._receiving:
            poller = select.poll()
            workers = {link.fileno(): i for i, link in enumerate(self._links)}
            for descriptor in workers:
                poller.register(descriptor, select.POLLIN)
            for descriptor, _ in poller.poll(timeout_ms):
                worker = workers[descriptor]
                message = self._links[worker].receive(timeout_ms=0)
                if isinstance(message, Available):
                    self._available[worker] = message
                elif message is not None:
                    return worker, message
        return None

    def _check_killed(self) -> None:
        pass  # a link knows no better reason than what a worker says before it ends

    def _check_alive(self) -> None:
        for link in self._links:
            link.check()

    def _is_late(self, worker: int) -> bool:
        return worker not in self._available or super()._is_late(worker)

    def _described(self, worker: int) -> str:
        return f"{self.names()[worker]} (pid {self._peers[worker].pid})"
