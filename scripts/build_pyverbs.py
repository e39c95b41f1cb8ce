"""Builds pyverbs, the Python side of RDMA verbs, for this Python, and makes `import pyverbs` find it there.

python scripts/build_pyverbs.py

It lies in .rdma/ of the checkout, with the rdma-core that it belongs to, and is built once: a minute or two, with a C
compiler and the packages libibverbs-dev, libnl-3-dev, libnl-route-3-dev and pkg-config, which root has installed here.
"""

import sys
from pathlib import Path

from absl import app, flags

from lamina_jax.testing.rdma.image import WORK
from lamina_jax.testing.rdma.packages import SetupError
from lamina_jax.testing.rdma.pyverbs import build_pyverbs, install_pyverbs

_WORK_DIR = flags.DEFINE_string("work_dir", str(WORK), "Where to build it.")


def main(_argv: list[str]) -> None:
    try:
        site = build_pyverbs(Path(_WORK_DIR.value).resolve())
    except SetupError as error:
        sys.exit(f"build_pyverbs: {error}")
    print(f"{site} is on the path of {sys.executable} by {install_pyverbs(site)}")


if __name__ == "__main__":
    app.run(main)
