"""The file of the cluster key: private when it is made, and refused when it is not."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from lamina_jax.runtime.cluster_key import ClusterKey, load_key_file, make_key_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_cluster_key.py"


def test_what_is_made_is_what_is_loaded(tmp_path):
    path = tmp_path / "deep" / "er" / "cluster.key"
    made = make_key_file(path)
    assert load_key_file(path) == made
    assert zmq.curve_public(made.secret) == made.public
    assert len(z85.decode(made.secret)) == 32
    assert make_key_file(tmp_path / "other.key") != made


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_only_its_user_may_use_the_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        make_key_file(tmp_path / "cluster.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cluster.key").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path):
    made = make_key_file(tmp_path / "cluster.key")
    (tmp_path / "link.key").symlink_to(tmp_path / "nothing")
    for name in ("cluster.key", "link.key"):
        with pytest.raises(FileExistsError, match=f"{name} exists already. Remove it"):
            make_key_file(tmp_path / name)
    assert load_key_file(tmp_path / "cluster.key") == made
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o660])
def test_a_file_that_others_may_use_is_refused(tmp_path, mode):
    path = tmp_path / "cluster.key"
    make_key_file(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match=f"mode {mode:04o}, so others may use it; run: chmod 600 {path}"):
        load_key_file(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path):
    path = tmp_path / "cluster.key"
    make_key_file(path)
    os.chown(path, 12345, -1)
    with pytest.raises(ValueError, match=r"belongs to user 12345, and this process runs as user 0.*install -m 600"):
        load_key_file(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ValueError, match="must be a regular file"):
        load_key_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        load_key_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_key_file(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "expected a line 'lamina_jax cluster key 1'"),
        (b"\xff" * 100, "expected a line"),
        (b"lamina_jax cluster key 2\n" + b"0" * 40 + b"\n", "expected a line"),
        (b"lamina_jax cluster key 1\n" + b"0" * 40, "expected a line"),
        (b"lamina_jax cluster key 1\n" + b"0" * 39 + b"\n", "is not a CURVE key: 40 characters of z85"),
        (b"lamina_jax cluster key 1\n" + b"~" * 40 + b"\n", "is not a CURVE key: 40"),
        (b"lamina_jax cluster key 1\n" + b"#" * 40 + b"\n", "is not a CURVE key: 40"),
        (b"lamina_jax cluster key 1\n" + b"\xff" * 40 + b"\n", "is not a CURVE key|expected"),
        (b"lamina_jax cluster key 1\n" + b"0" * 10**6, "expected a line"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path, content, problem):
    path = tmp_path / "cluster.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ValueError, match=problem) as caught:
        load_key_file(path)
    assert str(path) in str(caught.value)


def test_the_secret_is_not_printed():
    key = ClusterKey(*zmq.curve_keypair())
    assert key.secret.decode() not in repr(key)


def test_script(tmp_path):
    path = tmp_path / "cluster.key"
    command = [sys.executable, str(SCRIPT), f"--output={path}"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    secret = load_key_file(path).secret.decode()
    assert str(path) in made.stdout
    assert secret not in made.stdout + made.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 1
    assert again.stderr.strip().endswith(
        f"make_cluster_key: {path} exists already. Remove it first if no worker or engine uses its key any more."
    )
