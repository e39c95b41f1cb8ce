"""What --check looks at, on hosts where it is right and where it is not."""

import resource
import shutil
import socket

import pytest

from lamina_jax.runtime import checks
from lamina_jax.runtime.cluster import Cluster
from lamina_jax.runtime.cluster_key import make_key_file

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
        ("none", f"there is no {tmp_path}/none: copy that of another host, or make one"),
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


@pytest.mark.parametrize("required", [True, False])
def test_reaching_a_worker(required):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        there = checks.check_reachable("model worker", address, required=required)
    assert (there.name, there.result, there.detail) == ("model worker", "ok", f"{address} answers")
    gone = checks.check_reachable("model worker", address, required=required)
    assert gone.result == ("FAILED" if required else "note")
    assert gone.detail.startswith(f"{address}: nothing listens there yet")
    assert ("start that worker" in gone.detail) == required


def test_a_host_that_does_not_answer(monkeypatch):
    def drop(address, timeout):
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", drop)
    check = checks.check_reachable("attention worker 0", "tcp://192.0.2.1:7101", required=True)
    assert check.result == "FAILED"
    assert "tcp://192.0.2.1:7101: no answer within 3 s; is the host up, and its firewall open" in check.detail


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
