"""What --check looks at, on hosts where it is right and where it is not."""

import contextlib
import os
import resource
import shutil
import socket
import sys
import types

import pytest

from lamina_jax.runtime import checks
from lamina_jax.runtime.cluster import Cluster
from lamina_jax.runtime.cluster_key import make_key_file
from lamina_jax.runtime.control_tcp import ControlLink, ControlListener, peer_info
from lamina_jax.runtime.messages import FromModelWorker, ToModelWorker
from lamina_jax.transport import verbs
from lamina_jax.transport.rdma_devices import RdmaPort

MIB = 1 << 20


def cluster_with(key_file):
    return Cluster(model_worker="tcp://10.0.0.1:1", attention_workers=("tcp://10.0.0.2:1",), key_file=str(key_file))


def test_a_key_that_is_private_is_fine(tmp_path):
    make_key_file(tmp_path / "key")
    check = checks.check_key(cluster_with(tmp_path / "key"))
    assert (check.result, check.detail) == ("ok", f"{tmp_path}/key, mode 0600")


def test_loopback_needs_no_key():
    cluster = Cluster(model_worker="tcp://127.0.0.1:1", attention_workers=("tcp://127.0.0.1:2",))
    check = checks.check_key(cluster)
    assert (check.result, check.detail) == ("ok", "none needed: every address is loopback")


def test_keys_that_cannot_be_used(tmp_path):
    make_key_file(tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "other").write_text("something else\n")
    (tmp_path / "other").chmod(0o600)
    for name, message in [
        ("none", f"there is no cluster key at {tmp_path}/none; copy that of another host, or make one"),
        (".", "must be a regular file"),
        ("open", f"run: chmod 600 {tmp_path}/open"),
        ("other", f"{tmp_path}/other is not a cluster key"),
    ]:
        check = checks.check_key(cluster_with(tmp_path / name))
        assert check.result == "FAILED"
        assert message in check.detail


@pytest.mark.parametrize(("host", "literal"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_own_address(host, literal):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        address = f"tcp://{literal}:{server.getsockname()[1]}"
        taken = checks.check_own_address(address)
        assert (taken.result, "in use" in taken.detail) == ("FAILED", True)
    free = checks.check_own_address(address)
    assert (free.result, free.detail) == ("ok", f"{address} is this host's, and the port is free")


def test_the_address_of_another_host():
    check = checks.check_own_address("tcp://192.0.2.1:7100")
    assert check.result == "FAILED"
    assert "192.0.2.1 is not an address of this host" in check.detail


@pytest.fixture
def listening():
    """A model worker's control socket without a key, and a cluster that has it."""
    listener = ControlListener("tcp://127.0.0.1:0", None, ToModelWorker, "model worker", peer_info())
    yield loopback(listener.address)
    listener.close()


def loopback(address, key_file=None):
    return Cluster(model_worker=address, attention_workers=("tcp://127.0.0.1:1",), key_file=key_file)


def reach(cluster, *, required):
    return checks.check_reachable(cluster, "model worker", cluster.model_worker, FromModelWorker, required=required)


@pytest.mark.parametrize("required", [True, False])
def test_a_worker_that_is_up(listening, required):
    check = reach(listening, required=required)
    host = f"{socket.gethostname()} (pid {os.getpid()})"
    assert (check.name, check.result) == ("model worker", "ok")
    assert check.detail == f"{listening.model_worker} is served by {host}"


def test_a_worker_that_serves_another_engine(listening, monkeypatch):
    monkeypatch.setattr(checks, "_REACH_TIMEOUT_S", 1.0)
    with contextlib.closing(
        ControlLink(listening.model_worker, None, FromModelWorker, "model worker", peer_info())
    ) as other:
        other.open(30.0, on_waiting=lambda what: None)
        check = reach(listening, required=True)
        assert check.result == "note"
        assert f"busy with the engine on {socket.gethostname()} (pid {os.getpid()})" in check.detail
        assert check.detail.endswith("It is up, with this key and these versions.")


@pytest.mark.parametrize(("required", "result"), [(True, "FAILED"), (False, "note")])
def test_a_worker_that_is_not_up(monkeypatch, required, result):
    monkeypatch.setattr(checks, "_REACH_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    check = reach(loopback(address), required=required)
    assert check.result == result
    assert check.detail.startswith(f"Waited 0 s for model worker at {address}: no answer yet.")
    assert ("firewall" in check.detail) == required


def test_a_worker_with_another_key(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "_REACH_TIMEOUT_S", 2.0)
    make_key_file(tmp_path / "key")
    other = make_key_file(tmp_path / "other")
    listener = ControlListener("tcp://127.0.0.1:0", other, ToModelWorker, "model worker", peer_info())
    try:
        check = reach(loopback(listener.address, str(tmp_path / "key")), required=True)
    finally:
        listener.close()
    assert check.result == "FAILED"
    assert "is it the same cluster key?" in check.detail


def test_a_worker_is_not_tried_without_the_key(tmp_path):
    check = reach(loopback("tcp://127.0.0.1:7100", str(tmp_path / "key")), required=True)
    assert check.result == "FAILED"
    assert check.detail.startswith("tcp://127.0.0.1:7100 not tried: ")


@pytest.mark.parametrize(
    ("limit", "privileged", "result", "detail"),
    [
        (resource.RLIM_INFINITY, False, "ok", "unlimited"),
        (8 * MIB, True, "ok", "unlimited (CAP_IPC_LOCK)"),
        (64 * MIB, False, "ok", "64 MiB; docs/deploy.md says how much a model needs"),
        (8 * MIB, False, "FAILED", "8 MiB, and channels register 64 MiB or more: `ulimit -l unlimited`"),
    ],
)
def test_memory_lock_limit(limit, privileged, result, detail):
    check = checks.check_memory_lock(limit, privileged=privileged)
    assert check.result == result
    assert check.detail.startswith(detail)


@pytest.mark.parametrize(("free", "result"), [(63 * MIB, "FAILED"), (64 * MIB, "ok")])
def test_shared_memory(monkeypatch, free, result):
    usage = type(shutil.disk_usage("/"))(total=1 << 40, used=0, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check = checks.check_shared_memory()
    assert check.result == result
    assert check.detail.startswith(f"{free // MIB} MiB free in /dev/shm")


@pytest.mark.parametrize(("active", "result"), [(2048, "note"), (4096, "ok")])
def test_mtu(active, result):
    check = checks.check_mtu(active)
    assert check.result == result
    assert check.detail.startswith(f"{active} bytes a packet")


@pytest.mark.parametrize(("available", "result"), [(1023 * MIB, "note"), (1024 * MIB, "ok")])
def test_free_memory(available, result):
    check = checks.check_memory(available)
    assert check.result == result
    assert check.detail.startswith(f"{available // MIB:,} MiB")


def test_versions_name_what_has_to_be_alike():
    detail = checks.check_versions().detail
    for package in ("Python 3.12.", "lamina_jax ", "jax ", "jaxlib ", "pyzmq "):
        assert package in detail


def test_tables_line_up():
    made = [
        checks.Check(name="key file", result="ok", detail="a"),
        checks.Check(name="port", result="FAILED", detail="b c"),
    ]
    assert checks.table(made) == (
        "check     result  detail\n"
        "key file  ok      a\n"
        "port      FAILED  b c"
    )  # fmt: skip


@pytest.fixture
def rxe(monkeypatch):
    """A host with an RDMA device that can be used."""
    monkeypatch.setattr(verbs, "rdma_problem", lambda: None)
    monkeypatch.setattr(verbs, "rdma_device", lambda: "rxe0")
    monkeypatch.setattr(checks, "choose_verbs_port", lambda nic: RdmaPort(nic=nic, port=1, gid_index=3))
    port = types.SimpleNamespace(active_mtu=5)
    context = types.SimpleNamespace(query_port=lambda number: port)
    module = types.SimpleNamespace(Context=lambda name: context)
    monkeypatch.setitem(sys.modules, "pyverbs", types.ModuleType("pyverbs"))
    monkeypatch.setitem(sys.modules, "pyverbs.device", module)


@pytest.mark.parametrize("transport", ["auto", "verbs"])
def test_a_host_with_rdma(rxe, transport):
    device, mtu, lock = checks.check_rdma(transport)
    assert (device.result, device.detail) == ("ok", "rxe0, port 1 is active, its GID has index 3")
    assert (mtu.name, mtu.result, mtu.detail.split()[0]) == ("MTU", "ok", "4096")
    assert lock.name == "memory lock limit"


def test_a_host_without_rdma_uses_tcp_unless_verbs_is_asked_for(monkeypatch):
    monkeypatch.setattr(verbs, "rdma_problem", lambda: "there is no device")
    (auto,) = checks.check_rdma("auto")
    assert (auto.result, auto.detail) == ("note", "tcp will be used, as there is no device")
    (asked,) = checks.check_rdma("verbs")
    assert (asked.result, asked.detail) == ("FAILED", "there is no device")


NEAR, FAR = "tcp://127.0.0.1:7101", "tcp://10.0.0.2:7101"
RDMA = ["RDMA device", "MTU", "memory lock limit"]


@pytest.mark.parametrize(
    ("transport", "attention_workers", "channels"),
    [
        ("auto", [NEAR], ["shared memory"]),
        ("auto", [FAR], RDMA),
        ("auto", [NEAR, FAR], [*RDMA, "shared memory"]),
        ("shm", [NEAR], ["shared memory"]),
        ("verbs", [NEAR], RDMA),
        ("tcp", [NEAR, FAR], []),
    ],
)
def test_only_what_the_channels_need_is_checked(rxe, monkeypatch, transport, attention_workers, channels):
    monkeypatch.setattr(checks, "_REACH_TIMEOUT_S", 0.01)
    cluster = Cluster(
        model_worker="tcp://127.0.0.1:7100",
        attention_workers=tuple(attention_workers),
        transport=transport,
        key_file="none",
    )
    always = ["key file", "own address"], ["free memory", "versions"]
    names = [check.name for check in checks.attention_worker_checks(cluster, 0)]
    if len(attention_workers) == 1:
        assert names == [*always[0], *channels, *always[1]]
    names = [check.name for check in checks.model_worker_checks(cluster)]
    others = [f"attention worker {i}" for i in range(len(attention_workers))]
    assert names == [*always[0], *channels, *always[1], *others]
    assert [check.name for check in checks.engine_checks(cluster)] == ["key file", "model worker", "versions"]
