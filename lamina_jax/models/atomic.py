"""Directories that appear whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `path`, and puts it in its place when the block ends without an error.

    Args:
        path: what is to be made; its parents are made too.
        overwrite: replace a directory that is there already.

    Raises:
        FileExistsError: `path` is a file, or a directory that is not empty and may not be replaced.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        raise FileExistsError(f"{path}: expected nothing or an empty directory; choose another place or remove it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
