"""Which workers there are, and where: what the launch scripts and the engine read from `configs/clusters/*.py`."""

import dataclasses
import ipaddress
import os
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ml_collections import ConfigDict

TRANSPORTS: Final = ("auto", "shm", "verbs", "tcp")
"""Kinds of channel between the workers of a cluster; "auto" takes the best one that both ends have."""

_ADDRESS: Final = re.compile(r"tcp://(?P<host>\[[^\[\]]+\]|[^\[\]:/]+):(?P<port>[0-9]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """The workers of a cluster. The same on every host.

    Raises:
        ValueError: a setting that is wrong; the message names it.
    """

    model_worker: str
    """Control address of the model worker, "tcp://HOST:PORT", where it listens and the others reach it."""
    attention_workers: tuple[str, ...]
    """Control address of each attention worker; the order is that of their numbers."""
    transport: str = "auto"
    """One of TRANSPORTS: the kind of the channels between the workers."""
    key_file: str | None = None
    """File of the cluster key (scripts/make_cluster_key.py), on each host; needed unless all addresses are loopback."""

    def __post_init__(self) -> None:
        if not self.attention_workers:
            raise ValueError("attention_workers is empty; a cluster has at least one.")
        for name, address in self._named_addresses():
            _check_address(name, address)
        self._check_distinct()
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {self.transport!r}.")
        hosts = sorted({split_address(address)[0] for _, address in self._named_addresses()})
        if self.transport == "shm" and len(hosts) > 1:
            raise ValueError(
                f"transport 'shm' joins workers of one host, and they are on {', '.join(hosts)}; use auto, verbs, tcp."
            )
        self._check_key()

    def _named_addresses(self) -> list[tuple[str, str]]:
        workers = [(f"attention_workers[{i}]", address) for i, address in enumerate(self.attention_workers)]
        return [("model_worker", self.model_worker), *workers]

    def _check_distinct(self) -> None:
        names: dict[tuple[str, int], str] = {}
        for name, address in self._named_addresses():
            if (other := names.setdefault(split_address(address), name)) != name:
                raise ValueError(f"{other} and {name} have the same address {address}; each needs a port of its own.")

    def _check_key(self) -> None:
        if self.key_file is not None:
            return
        for name, address in self._named_addresses():
            if not is_loopback(address):
                raise ValueError(
                    f"key_file is missing: {name} is {address}, which is not loopback, so the workers need a cluster "
                    "key; make one with scripts/make_cluster_key.py."
                )


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Reads a cluster file: Python with `get_config()`, which returns a ConfigDict with Cluster's fields.

    In `key_file` a leading ~ is the user's home; a relative path starts at the folder of the cluster file.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a cluster file, or not of a cluster that can work; the message names file and field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no cluster file at {path}; see configs/clusters/ for examples")
    try:
        fields = _checked_fields(_run(path))
        if fields.get("key_file") is not None:
            fields["key_file"] = str(path.parent.absolute() / Path(fields["key_file"]).expanduser())
        return Cluster(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 one without its brackets) and port of "tcp://HOST:PORT". Raises ValueError if it is not one."""
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"expected an address like tcp://10.0.0.1:7000, got {address!r}")
    return match["host"].strip("[]"), int(match["port"])


def is_loopback(address: str) -> bool:
    """Whether only processes of its own host can reach a control address."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(name: str, address: str) -> None:
    try:
        host, port = split_address(address)
    except ValueError as error:
        raise ValueError(f"{name}: {error}.") from error
    if not 1 <= port <= 65535:
        raise ValueError(f"{name}: a port is from 1 to 65535, got {port} in {address!r}.")
    if host in ("*", "0.0.0.0", "::"):
        raise ValueError(f"{name}: the other hosts must be able to reach {address!r}; give the host's own address.")


def _run(path: Path) -> Mapping[str, Any]:
    try:
        names = runpy.run_path(str(path))
    except Exception as error:
        raise ValueError(f"cannot be read: {type(error).__name__}: {error}") from error
    if "get_config" not in names:
        raise ValueError("has no get_config(); see configs/clusters/ for examples")
    try:
        config = names["get_config"]()
    except Exception as error:
        raise ValueError(f"get_config() failed: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"get_config() must return a ml_collections.ConfigDict, got {type(config).__name__}")
    return config.to_dict()


def _checked_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the types of Cluster's."""
    known = {field.name: field for field in dataclasses.fields(Cluster)}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"unknown field {', '.join(unknown)}; there are {', '.join(known)}.")
    for name, field in known.items():
        if name not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing.")
    fields = dict(given)
    workers = fields["attention_workers"]
    if not isinstance(workers, list | tuple) or not all(isinstance(address, str) for address in workers):
        raise ValueError(f"attention_workers must be a list of addresses, got {workers!r}.")
    fields["attention_workers"] = tuple(workers)
    for name in ("model_worker", "transport"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{name} must be a string, got {fields[name]!r}.")
    if not isinstance(fields.get("key_file"), str | None):
        raise ValueError(f"key_file must be a path or None, got {fields['key_file']!r}.")
    return fields
