"""What `--check` of the launch scripts looks at before anything starts."""

import contextlib
import dataclasses
import errno
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

from lamina_jax.runtime.cluster import Cluster, split_address
from lamina_jax.runtime.cluster_key import load_key_file
from lamina_jax.runtime.control_tcp import BUSY, ControlLink, peer_info
from lamina_jax.runtime.errors import WorkerError
from lamina_jax.runtime.memory import available_memory
from lamina_jax.runtime.messages import FromClusterWorker, FromModelWorker
from lamina_jax.transport import verbs
from lamina_jax.transport.rdma_devices import RdmaPort, choose_verbs_port

_REACH_TIMEOUT_S: Final = 3.0
# Rings of a small model; those of a large one take hundreds of MiB, see docs/deploy.md.
_LEAST_LOCKED: Final = 64 << 20
_LEAST_SHM: Final = 64 << 20
_LEAST_MEMORY: Final = 1 << 30
_LARGEST_MTU: Final = 4096
_CAP_IPC_LOCK: Final = 14
_PACKAGES: Final = ("lamina_jax", "jax", "jaxlib", "pyzmq", "pyverbs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at and what was found."""

    name: str
    result: Literal["ok", "note", "FAILED"]
    """"note" is something to know that does not keep the worker from running."""
    detail: str
    """What was found, and for a failure what to do."""


def table(checks: Sequence[Check]) -> str:
    """Checks as lines of aligned columns, with a heading."""
    rows = [("check", "result", "detail"), *((check.name, check.result, check.detail) for check in checks)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {result:{widths[1]}}  {detail}" for name, result, detail in rows)


def attention_worker_checks(cluster: Cluster, index: int) -> list[Check]:
    """What an attention worker needs to run on this host."""
    address = cluster.attention_workers[index]
    return _worker_checks(cluster, address, [cluster.model_worker])


def model_worker_checks(cluster: Cluster) -> list[Check]:
    """What the model worker needs to run on this host, and which attention workers it reaches by now."""
    own = _worker_checks(cluster, cluster.model_worker, cluster.attention_workers)
    addresses = cluster.attention_workers

    def reach(index: int) -> Check:
        name = f"attention worker {index}"
        return check_reachable(cluster, name, addresses[index], FromClusterWorker, required=False)

    # At once: each that is not up yet is waited for.
    with ThreadPoolExecutor(len(addresses)) as pool:
        return [*own, *pool.map(reach, range(len(addresses)))]


def engine_checks(cluster: Cluster) -> list[Check]:
    """What the engine needs: the key, and the model worker."""
    reached = check_reachable(cluster, "model worker", cluster.model_worker, FromModelWorker, required=True)
    return [check_key(cluster), reached, check_versions()]


def check_key(cluster: Cluster) -> Check:
    """Whether the cluster key can be read, by this user alone."""
    name = "key file"
    if cluster.key_file is None:
        return Check(name=name, result="ok", detail="none needed: every address is loopback")
    try:
        load_key_file(cluster.key_file)
    except (OSError, ValueError) as error:
        return Check(name=name, result="FAILED", detail=str(error))
    mode = stat.S_IMODE(os.stat(cluster.key_file).st_mode)
    return Check(name=name, result="ok", detail=f"{cluster.key_file}, mode {mode:04o}")


def check_own_address(address: str) -> Check:
    """Whether a worker of this host can listen on a control address: it is this host's, and the port is free."""
    name = "own address"
    host, port = split_address(address)
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        reason = {
            errno.EADDRINUSE: f"port {port} is in use; see `ss -ltnp` for by whom",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this host; see `ip addr`",
        }.get(error.errno or 0, str(error))
        return Check(name=name, result="FAILED", detail=f"{address}: {reason}")
    return Check(name=name, result="ok", detail=f"{address} is this host's, and the port is free")


def check_reachable(cluster: Cluster, worker: str, address: str, incoming: Any, *, required: bool) -> Check:
    """Whether a worker is up, has the same cluster key and versions, and would take a session.

    Args:
        worker: its name.
        incoming: the type of its messages.
        required: whether it has to be up by now; otherwise it may still come.
    """
    failed = "FAILED" if required else "note"
    try:
        key = None if cluster.key_file is None else load_key_file(cluster.key_file)
        link = ControlLink(address, key, incoming, worker, peer_info())
    except (OSError, ValueError) as error:
        return Check(name=worker, result=failed, detail=f"{address} not tried: {error}")
    try:
        peer = link.open(_REACH_TIMEOUT_S, on_waiting=lambda what: None)
    except WorkerError as error:
        if f"refused: {BUSY}" in str(error):
            # It compares keys and versions first, and an engine would wait.
            return Check(name=worker, result="note", detail=f"{error} It is up, with this key and these versions.")
        later = " Is it up, and does its firewall let this port pass?" if required else " It may still come."
        return Check(name=worker, result=failed, detail=f"{error}{later}")
    finally:
        link.close("it was only a check")
    return Check(name=worker, result="ok", detail=f"{address} is served by {peer}")


def check_rdma(transport: str) -> list[Check]:
    """Whether channels to other hosts can be RDMA: the device, its packets, and the memory it may register.

    Args:
        transport: that of the cluster. Only "verbs" needs RDMA; with "auto" channels are tcp where there is none.
    """
    name = "RDMA device"
    if (problem := verbs.rdma_problem()) is not None:
        if transport == "verbs":
            return [Check(name=name, result="FAILED", detail=problem)]
        return [Check(name=name, result="note", detail=f"tcp will be used, as {problem}")]
    port = choose_verbs_port(verbs.rdma_device())
    return [
        Check(
            name=name, result="ok", detail=f"{port.nic}, port {port.port} is active, its GID has index {port.gid_index}"
        ),
        check_mtu(_active_mtu(port)),
        check_memory_lock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], privileged=_may_lock_memory()),
    ]


def check_mtu(active: int) -> Check:
    """Whether RDMA's packets are as large as they get, in bytes."""
    if active >= _LARGEST_MTU:
        return Check(name="MTU", result="ok", detail=f"{active} bytes a packet; should be as large on every host")
    return Check(
        name="MTU",
        result="note",
        detail=f"{active} bytes a packet; {_LARGEST_MTU} need an MTU of {_LARGEST_MTU + 104} or more of an Ethernet "
        "device (`ip link set DEVICE mtu 4200`) and its switches, as on every host",
    )


def check_memory_lock(limit: int, *, privileged: bool) -> Check:
    """Whether channels can register their memory with an RDMA device.

    Args:
        limit: RLIMIT_MEMLOCK, in bytes.
        privileged: whether this process has CAP_IPC_LOCK, to which the limit does not apply.
    """
    name = "memory lock limit"
    if privileged or limit == resource.RLIM_INFINITY:
        return Check(name=name, result="ok", detail="unlimited" + (" (CAP_IPC_LOCK)" if privileged else ""))
    if limit >= _LEAST_LOCKED:
        return Check(name=name, result="ok", detail=f"{_mib(limit)}; docs/deploy.md says how much a model needs")
    return Check(
        name=name,
        result="FAILED",
        detail=f"{_mib(limit)}, and channels register {_mib(_LEAST_LOCKED)} or more: `ulimit -l unlimited`, memlock in "
        "/etc/security/limits.conf, or LimitMEMLOCK of a systemd unit",
    )


def check_shared_memory(path: str = "/dev/shm") -> Check:
    """Whether there is room for channels between the workers of this host."""
    free = shutil.disk_usage(path).free
    if free >= _LEAST_SHM:
        return Check(name="shared memory", result="ok", detail=f"{_mib(free)} free in {path}")
    return Check(
        name="shared memory",
        result="FAILED",
        detail=f"{_mib(free)} free in {path}, and channels take at least {_mib(_LEAST_SHM)}: `mount -o remount,size=1G "
        f"{path}`, or --shm-size of a container",
    )


def check_memory(available: int) -> Check:
    """What memory there is for weights or KV cache, in bytes."""
    if available >= _LEAST_MEMORY:
        return Check(name="free memory", result="ok", detail=_mib(available))
    return Check(name="free memory", result="note", detail=f"{_mib(available)}, which is enough for a tiny model only")


def check_versions() -> Check:
    """The versions that every host should have alike."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    versions = ", ".join(f"{package} {version}" for package, version in found.items())
    return Check(name="versions", result="ok", detail=f"Python {platform.python_version()}, {versions}")


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f} MiB"


def _worker_checks(cluster: Cluster, address: str, others: Sequence[str]) -> list[Check]:
    """Args:
    others: addresses of the workers that channels lead to.
    """
    own_host = split_address(address)[0]
    near = [split_address(other)[0] == own_host for other in others]
    checks = [check_key(cluster), check_own_address(address)]
    if cluster.transport == "verbs" or (cluster.transport == "auto" and not all(near)):
        checks += check_rdma(cluster.transport)
    if cluster.transport in ("auto", "shm") and any(near):
        checks.append(check_shared_memory())
    return [*checks, check_memory(available_memory()), check_versions()]


def _active_mtu(port: RdmaPort) -> int:
    """Bytes of RDMA's packets on a port, which follow from the MTU of the network device and do not exceed 4096."""
    device = importlib.import_module("pyverbs.device")
    return 128 << device.Context(name=port.nic).query_port(port.port).active_mtu


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _may_lock_memory() -> bool:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
