"""pyverbs for this Python, with the rdma-core that it belongs to.

PyPI has pyverbs as source only, and what its own build makes works with no libibverbs but that of exactly its version,
which it leaves out. So the rdma-core inside the source is built here, to be used in place.
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final

from lamina_jax.testing.rdma.image import WORK, made_once
from lamina_jax.testing.rdma.packages import PYVERBS_PACKAGES, locked, require_packages, run_tool

_PYVERBS: Final = "pyverbs==59.0"
# mlx5dv_flow.pyx of this version is no Cython 3.2.
_CYTHON: Final = "cython>=3.0.12,<3.2"
_WANTED: Final = re.compile(r"python/pyverbs/[a-z_]+\.cpython.*\.so|lib/lib(?!ib|rdmacm|rspreload)[\w-]+\.so[\d.]*")
"""Of the targets: the modules, which bring the libraries along, and the drivers of all devices."""
_PATH_FILE: Final = "lamina_jax_pyverbs.pth"


def build_pyverbs(work: Path = WORK) -> Path:
    """Builds pyverbs unless that was done. Returns the folder from which it is imported.

    Raises:
        SetupError: Something is missing, or the build failed; the message says what.
    """
    require_packages(PYVERBS_PACKAGES)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = work / f"pyverbs-{python}"
    inputs = {"pyverbs": _PYVERBS, "cython": _CYTHON, "targets": _WANTED.pattern, "python": sys.version}
    with locked(work), made_once(home, inputs) as missing:
        if missing:
            _build(home)
    return home / "site"


def install_pyverbs(site: Path) -> Path:
    """Makes `import pyverbs` find it in the running Python's environment. Returns the file that does this."""
    path_file = Path(sysconfig.get_path("purelib")) / _PATH_FILE
    path_file.write_text(f"{site}\n")
    return path_file


def _build(home: Path) -> None:
    tools, build = home / "tools", home / "build"
    run_tool([sys.executable, "-m", "venv", tools])
    pip = [tools / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # The build backend only has to say what the source is.
    run_tool([*pip, "install", _CYTHON, "scikit-build-core", "setuptools-scm", "cmake", "ninja"])
    download = ["download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", f"--dest={home}", _PYVERBS]
    environment = {**os.environ, "PATH": f"{tools / 'bin'}:{os.environ.get('PATH', os.defpath)}"}
    run_tool([*pip, *download], env=environment)
    run_tool(["tar", "--extract", "--file", next(home.glob("pyverbs-*.tar.gz")), "--directory", home])
    source = next(home.glob("pyverbs-*/rdma-core"))
    run_tool(
        [
            *("cmake", "-S", source, "-B", build, "-G", "Ninja"),
            *("-DIN_PLACE=1", "-DNO_MAN_PAGES=1", "-DCMAKE_BUILD_TYPE=Release"),
            *(f"-DPYTHON_EXECUTABLE={tools / 'bin/python'}", f"-DCYTHON_EXECUTABLE={tools / 'bin/cython'}"),
        ],
        env=environment,
    )
    listed = run_tool(["ninja", "-C", build, "-t", "targets", "all"], env=environment).decode()
    targets = [line.partition(":")[0] for line in listed.splitlines()]
    run_tool(["ninja", "-C", build, *filter(_WANTED.fullmatch, targets)], env=environment)
    # A folder of its own: beside pyverbs the build has one that is called cython.
    (home / "site").mkdir()
    (home / "site/pyverbs").symlink_to(build / "python/pyverbs")
    shutil.rmtree(tools)
