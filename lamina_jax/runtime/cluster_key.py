"""The key that all processes of a cluster share: who has it may use the workers, nobody else may."""

import contextlib
import dataclasses
import os
import stat
import struct
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

DEFAULT_PATH: Final = Path("~/.config/lamina_jax/cluster.key")
"""Where scripts look for the key, and make it, if they are not told."""

_HEADER: Final = "lamina_jax cluster key 1"
_MAX_BYTES: Final = 4096


@dataclasses.dataclass(frozen=True)
class ClusterKey:
    """A CURVE key pair, z85. Servers have it as the server's key, clients as the server's and as their own."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)


def make_key_file(path: str | os.PathLike[str]) -> ClusterKey:
    """Makes a new key and the file that holds it, with mode 0600, and directories above it with mode 0700.

    Raises:
        FileExistsError: there is a file already; it is left as it is.
        OSError: the file cannot be written.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    public, secret = zmq.curve_keypair()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FileExistsError(
            f"{path} exists already. Remove it first if no worker or engine uses its key any more."
        ) from None
    try:
        with os.fdopen(descriptor, "w") as file:
            os.fchmod(descriptor, 0o600)
            file.write(f"{_HEADER}\n{secret.decode()}\n")
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return ClusterKey(public=public, secret=secret)


def load_key_file(path: str | os.PathLike[str]) -> ClusterKey:
    """Reads the file that `make_key_file` made, on this host or another.

    Raises:
        ValueError: it is not a regular file of this user that nobody else may read or write, or holds something else.
        OSError: it cannot be read.
    """
    path = Path(path).expanduser()
    # O_NONBLOCK: opening a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        _require_private(path, os.fstat(descriptor))
        content = file.read(_MAX_BYTES)
    lines = content.decode("ascii", errors="replace").split("\n")
    if len(lines) != 3 or lines[0] != _HEADER or lines[2] != "":
        raise ValueError(
            f"{path} is not a cluster key: expected a line {_HEADER!r} and a line with the key. "
            "scripts/make_cluster_key.py makes one."
        )
    return _key_of(path, lines[1])


def _require_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"the cluster key {path} must be a regular file")
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"the cluster key {path} belongs to user {status.st_uid}, and this process runs as user {os.geteuid()}; "
            f"make a copy of your own: install -m 600 {path} COPY"
        )
    if status.st_mode & 0o077:
        raise ValueError(
            f"the cluster key {path} has mode {stat.S_IMODE(status.st_mode):04o}, so others may use it; "
            f"run: chmod 600 {path}"
        )


def _key_of(path: Path, text: str) -> ClusterKey:
    secret = text.encode()
    try:
        if len(z85.decode(secret)) == 32:
            return ClusterKey(public=zmq.curve_public(secret), secret=secret)
    except (ValueError, KeyError, struct.error):  # what decode raises for a wrong length, character or number
        pass
    raise ValueError(f"the second line of the cluster key {path} is not a CURVE key: 40 characters of z85")
