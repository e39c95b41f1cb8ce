"""Which NIC, port and GID RDMA connections use, from what Linux says under /sys."""

import dataclasses
import errno
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

_SYS = Path("/sys")
_ACTIVE = "4: ACTIVE"  # enum ibv_port_state
_DRIVER = "mlx5_core"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RdmaPort:
    """A port of a NIC that carries traffic, and the address in its table of GIDs that connections start from."""

    nic: str
    port: int
    gid_index: int
    loopback: bool = False
    """Whether the address reaches this host only."""


def choose_port(gpu_bus_id: str, *, nic: str | None = None, sys: Path = _SYS) -> RdmaPort:
    """The active port of the mlx5 NIC that shares most of the way over PCIe with a GPU; the first by name of several.

    On Ethernet the GID is the first of RoCE v2 with an IPv4 address, or else the first of RoCE v2; on InfiniBand it is
    the port's own, number 0.

    Args:
        gpu_bus_id: where the GPU is on the PCI bus, e.g. "0000:1a:00.0".
        nic: the only NIC to consider, e.g. "mlx5_0"; None considers all.
        sys: the file system that says all this.

    Raises:
        OSError: there is no such port; the message says what was found.
    """
    nics = sorted(path for path in (sys / "class/infiniband").glob("*") if nic in (None, path.name))
    gpu = (sys / "bus/pci/devices" / gpu_bus_id.lower()).resolve()
    found = []
    for path in nics:
        # The device of a NIC of another make, or of none (Soft-RoCE), has no such driver.
        if (path / "device/driver").resolve().name == _DRIVER:
            shared = len(Path(os.path.commonpath([gpu, (path / "device").resolve()])).parts)
            found += [(-shared, port) for port in _usable_ports(path)]
    if not found:
        wanted = "an mlx5 NIC" if nic is None else f"{nic} to be an mlx5 NIC"
        names = ", ".join(path.name for path in nics) or "none"
        raise OSError(
            errno.ENODEV,
            f"gda channels need {wanted} with an active port that has an address; RDMA devices: {names}. See "
            "`ibv_devinfo` and `show_gids`",
        )
    return min(found, key=lambda each: (each[0], each[1].nic, each[1].port))[1]


def choose_verbs_port(nic: str | None = None, *, sys: Path = _SYS) -> RdmaPort:
    """The first active port, by name, of any RDMA device; one whose only address is the loopback's comes last.

    Args:
        nic: the only device to consider, e.g. "mlx5_0"; None considers all.
        sys: the file system that says all this.

    Raises:
        OSError: there is no such port; the message says what was found.
    """
    devices = sorted((sys / "class/infiniband").glob("*"))
    ports = [port for path in devices if nic in (None, path.name) for port in _usable_ports(path)]
    if not ports:
        wanted = "an RDMA device" if nic is None else f"the RDMA device {nic}"
        names = ", ".join(path.name for path in devices) or "none"
        raise OSError(
            errno.ENODEV,
            f"verbs channels need {wanted} with an active port that has an address; RDMA devices: {names}. See "
            "`ibv_devinfo` and `rdma link`",
        )
    return min(ports, key=lambda port: (port.loopback, port.nic, port.port))


def _usable_ports(nic: Path) -> Iterator[RdmaPort]:
    for port in sorted(nic.glob("ports/*"), key=lambda path: int(path.name)):
        if _read(port / "state") != _ACTIVE:
            continue
        number = int(port.name)
        if _read(port / "link_layer") == "InfiniBand":
            yield RdmaPort(nic=nic.name, port=number, gid_index=0)
        elif (found := _roce_gid(port)) is not None:
            yield RdmaPort(nic=nic.name, port=number, gid_index=found[0], loopback=_is_loopback(found[1]))


def _is_loopback(gid: ipaddress.IPv6Address) -> bool:
    return (gid.ipv4_mapped or gid).is_loopback


def _roce_gid(port: Path) -> tuple[int, ipaddress.IPv6Address] | None:
    """The number of the GID that RoCE v2 routes, and the GID; None if the port has no address."""
    usable: dict[int, ipaddress.IPv6Address] = {}
    for entry in port.glob("gids/*"):
        if _read(port / "gid_attrs/types" / entry.name) == "RoCE v2" and (text := _read(entry)):
            usable[int(entry.name)] = ipaddress.IPv6Address(text)
    with_address = [(index, gid) for index, gid in usable.items() if int(gid) != 0]
    return min(with_address, key=lambda found: (found[1].ipv4_mapped is None, found[0]), default=None)


def _read(path: Path) -> str:
    """A line of /sys; empty if there is none. Entries of the table of GIDs that are not in use cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
