"""Cluster files: what they give, and what is said about those that cannot work."""

import pathlib
import re

import pytest

from lamina_jax.runtime.cluster import Cluster, is_loopback, load_cluster, split_address

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "clusters"
FILE = "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({fields!r})\n"
GOOD = {"model_worker": "tcp://127.0.0.1:7100", "attention_workers": ["tcp://127.0.0.1:7101"]}


def write(path, **fields):
    path.write_text(FILE.format(fields={**GOOD, **fields}))
    return path


def make(**fields):
    given = {**GOOD, **fields}
    return Cluster(**{**given, "attention_workers": tuple(given["attention_workers"])})


def test_examples_are_clusters():
    assert load_cluster(CONFIGS / "loopback.py") == Cluster(
        model_worker="tcp://127.0.0.1:7100",
        attention_workers=("tcp://127.0.0.1:7101", "tcp://127.0.0.1:7102"),
    )
    assert load_cluster(CONFIGS / "two_hosts.py") == Cluster(
        model_worker="tcp://10.99.0.1:7100",
        attention_workers=("tcp://10.99.0.2:7101", "tcp://10.99.0.2:7102"),
        key_file=str(pathlib.Path("~/.config/lamina_jax/cluster.key").expanduser()),
    )


@pytest.mark.parametrize(
    ("given", "expected"), [("a.key", "{folder}/a.key"), ("/etc/a.key", "/etc/a.key"), ("~/a.key", "{home}/a.key")]
)
def test_key_files_are_found_from_the_cluster_file(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/someone")
    cluster = load_cluster(write(tmp_path / "c.py", key_file=given))
    assert cluster.key_file == expected.format(folder=tmp_path, home="/home/someone")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_workers": []}, "attention_workers is empty; a cluster has at least one."),
        ({"model_worker": "10.0.0.1:7000"}, "model_worker: expected an address like tcp://10.0.0.1:7000, got '10.0.0."),
        ({"model_worker": "tcp://:7000"}, "model_worker: expected an address like"),
        ({"model_worker": "tcp://::1:7000"}, "model_worker: expected an address like"),
        ({"model_worker": "tcp://a:7000\n"}, "model_worker: expected an address like"),
        ({"attention_workers": ["tcp://127.0.0.1:0"]}, "attention_workers[0]: a port is from 1 to 65535, got 0"),
        ({"attention_workers": ["tcp://127.0.0.1:65536"]}, "attention_workers[0]: a port is from 1 to 65535"),
        ({"model_worker": "tcp://0.0.0.0:7000"}, "model_worker: the other hosts must be able to reach"),
        ({"model_worker": "tcp://*:7000"}, "model_worker: the other hosts must be able to reach"),
        (
            {"attention_workers": ["tcp://127.0.0.1:7101", "tcp://127.0.0.1:7100"]},
            "model_worker and attention_workers[1] have the same address tcp://127.0.0.1:7100",
        ),
        ({"transport": "rdma"}, "transport must be one of auto, shm, verbs, tcp, got 'rdma'."),
        (
            {"model_worker": "tcp://10.0.0.1:7000", "transport": "shm", "key_file": "k"},
            "transport 'shm' joins workers of one host, and they are on 10.0.0.1, 127.0.0.1",
        ),
        (
            {"attention_workers": ["tcp://10.0.0.1:7000"]},
            "key_file is missing: attention_workers[0] is tcp://10.0.0.1:7000, which is not loopback",
        ),
    ],
)
def test_a_cluster_that_cannot_work_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make(**fields)
    path = write(tmp_path / "c.py", **fields)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")):
        load_cluster(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "cannot be read: SyntaxError: '(' was never closed"),
        ("import nothing_of_that_name", "cannot be read: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("x = 1", "has no get_config(); see configs/clusters/ for examples"),
        ("def get_config(): return {}", "get_config() must return a ml_collections.ConfigDict, got dict"),
        ("def get_config(): raise KeyError('a')", "get_config() failed: KeyError: 'a'"),
        (
            FILE.format(fields={**GOOD, "atention": 1, "key": 2}),
            "unknown field atention, key; there are model_worker, attention_workers, transport, key_file.",
        ),
        (FILE.format(fields={"model_worker": "tcp://127.0.0.1:1"}), "attention_workers is missing."),
        (FILE.format(fields={**GOOD, "model_worker": 7000}), "model_worker must be a string, got 7000."),
        (FILE.format(fields={**GOOD, "transport": None}), "transport must be a string, got None."),
        (FILE.format(fields={**GOOD, "key_file": 1}), "key_file must be a path or None, got 1."),
        (
            FILE.format(fields={**GOOD, "attention_workers": "tcp://127.0.0.1:7101"}),
            "attention_workers must be a list of addresses, got 'tcp://127.0.0.1:7101'.",
        ),
    ],
)
def test_a_file_that_is_no_cluster_file_is_refused(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")):
        load_cluster(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no cluster file at {tmp_path}/none.py; see configs/clusters/"):
        load_cluster(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("address", "host", "port", "loopback"),
    [
        ("tcp://127.0.0.1:80", "127.0.0.1", 80, True),
        ("tcp://127.9.9.9:80", "127.9.9.9", 80, True),
        ("tcp://localhost:80", "localhost", 80, True),
        ("tcp://[::1]:80", "::1", 80, True),
        ("tcp://[fe80::1]:80", "fe80::1", 80, False),
        ("tcp://localhost.example.com:80", "localhost.example.com", 80, False),
        ("tcp://10.0.0.1:65535", "10.0.0.1", 65535, False),
    ],
)
def test_addresses(address, host, port, loopback):
    assert split_address(address) == (host, port)
    assert is_loopback(address) is loopback
