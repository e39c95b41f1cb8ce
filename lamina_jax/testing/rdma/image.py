"""What a machine boots from: Debian's stock kernel, unpacked and not installed, and a first file system of its modules.

Everything lies in .rdma/ of the checkout and is made once; it is made anew when what it is made from changes here. A
newer kernel of Debian's is taken when .rdma/ is removed.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma.packages import MACHINE_PACKAGES, SetupError, locked, require_packages, run_tool

WORK: Final = Path(__file__).resolve().parents[3] / ".rdma"

_KERNEL: Final = "linux-image-amd64"
"""The generic flavour: that for clouds has neither rdma_rxe nor 9p."""
_UNPACKED: Final = (
    "kernel/arch/x86/crypto",
    "kernel/crypto",
    "kernel/drivers/char/virtio_console.ko",
    "kernel/drivers/infiniband/core",
    "kernel/drivers/infiniband/sw",
    "kernel/drivers/net/dummy.ko",
    "kernel/drivers/net/net_failover.ko",
    "kernel/drivers/net/virtio_net.ko",
    "kernel/drivers/virtio",
    "kernel/fs/9p",
    "kernel/fs/configfs",
    "kernel/fs/fscache",
    "kernel/fs/netfs",
    "kernel/fs/overlayfs",
    "kernel/lib",
    "kernel/net/9p",
    "kernel/net/core",
    "kernel/net/ipv4",
    "kernel/net/ipv6",
    "kernel/net/sched",
    "modules.builtin",
    "modules.builtin.modinfo",
    "modules.order",
)
"""28 of the package's 400 MB."""
_LOADED: Final = (
    "virtio_pci",
    "virtio_console",
    "virtio_net",
    "9p",
    "9pnet_virtio",
    "overlay",
    # What rxe computes checksums with; nothing loads it by itself here.
    "crc32_generic",
    "crc32c_generic",
    "rdma_rxe",
    "rdma_ucm",
    "dummy",
    "sch_netem",
)
_INIT: Final = Path(__file__).with_name("guest_init.sh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Image:
    """Paths of what a machine boots from.

    Attributes:
        kernel: The kernel.
        initramfs: The first file system.
        modules: The kernel's modules, /lib/modules/VERSION of the machine.
    """

    kernel: Path
    initramfs: Path
    modules: Path


def prepare_image(work: Path = WORK) -> Image:
    """Installs the packages that are missing, and makes the kernel and the initramfs unless they are there.

    Raises:
        SetupError: Something cannot be had; the message says what to do.
    """
    require_packages(MACHINE_PACKAGES)
    with locked(work):
        kernel = work / "kernel"
        inputs = {"package": _KERNEL, "unpacked": _UNPACKED}
        with made_once(kernel, inputs) as missing:
            if missing:
                _unpack_kernel(kernel)
        version = next((kernel / "lib/modules").iterdir()).name
        initramfs = work / "initramfs"
        inputs = {"kernel": version, "loaded": _LOADED, "init": _digest(_INIT), "busybox": _digest(_busybox())}
        with made_once(initramfs, inputs) as missing:
            if missing:
                (initramfs / "initramfs.gz").write_bytes(_initramfs(kernel, version))
    return Image(
        kernel=kernel / "boot" / f"vmlinuz-{version}",
        initramfs=initramfs / "initramfs.gz",
        modules=kernel / "lib/modules" / version,
    )


@contextlib.contextmanager
def made_once(folder: Path, inputs: Mapping[str, object]) -> Iterator[bool]:
    """Says whether the folder has to be filled, and if so empties it before and notes afterwards what it was made from.

    It does not if it was filled to the end, from the same inputs (anything that JSON can tell apart).
    """
    note, text = folder / "made-from.json", json.dumps(inputs, indent=1)
    if note.exists() and note.read_text() == text:
        yield False
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield True
    note.write_text(text)


def _unpack_kernel(folder: Path) -> None:
    """Downloads Debian's kernel package and unpacks the kernel and the modules that may be wanted."""
    package = _kernel_package()
    modules = f"./lib/modules/{package.removeprefix('linux-image-')}"
    with tempfile.TemporaryDirectory(dir=folder) as download:
        # As root, apt-get would rather download as a user of its own, who may not write here.
        run_tool(["apt-get", "--quiet", "-o", "APT::Sandbox::User=root", "download", package], cwd=Path(download))
        archive = next(Path(download).glob("*.deb"))
        wanted = ["./boot/vmlinuz-*", *(f"{modules}/{path}" for path in _UNPACKED)]
        tar = Path(download) / "data.tar"
        tar.write_bytes(run_tool(["dpkg-deb", "--fsys-tarfile", archive]))
        run_tool(["tar", "--extract", "--file", tar, "--directory", folder, "--wildcards", *wanted])
    run_tool([_system_tool("depmod"), "-b", folder, Path(modules).name])


def _kernel_package() -> str:
    """The package of the kernel that the generic one stands for, e.g. linux-image-6.1.0-56-amd64."""
    for attempt in range(2):
        depends = subprocess.run(["apt-cache", "depends", _KERNEL], capture_output=True, text=True)
        names = [line.split()[-1] for line in depends.stdout.splitlines() if "Depends: linux-image-" in line]
        if names:
            return names[0]
        if attempt == 0 and os.geteuid() == 0:
            run_tool(["apt-get", "--quiet", "update"])
    raise SetupError(f"apt knows no {_KERNEL}; run `apt-get update` as root, on a Debian whose kernel is 6.1")


def _initramfs(kernel: Path, version: str) -> bytes:
    """busybox, our init, and the modules with all that they need, in the order to load them."""
    modprobe = _system_tool("modprobe")
    paths: list[Path] = []
    for module in _LOADED:
        shown = run_tool([modprobe, "-d", kernel, "-S", version, "--show-depends", module]).decode()
        paths += [Path(line.split()[1]) for line in shown.splitlines() if line.startswith("insmod")]
    paths = list(dict.fromkeys(paths))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder in ("bin", "modules", "proc", "sys", "dev", "machine"):
            (root / folder).mkdir()
        shutil.copy(_busybox(), root / "bin/busybox")
        for path in paths:
            shutil.copy(path, root / "modules")
        (root / "modules/order").write_text("".join(f"{path.name}\n" for path in paths))
        shutil.copy(_INIT, root / "init")
        (root / "init").chmod(0o755)
        files = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        return gzip.compress(run_tool([_busybox(), "cpio", "-o", "-H", "newc"], cwd=root, stdin=files.encode()), 1)


def _busybox() -> Path:
    return Path(_system_tool("busybox"))


def _system_tool(name: str) -> str:
    """Where a program of the administrator's is, whose folder is not on everyone's PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    if (found := shutil.which(name, path=path)) is None:
        raise SetupError(f"{name} is needed, and is not on the PATH")
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
