"""What is to survive a crash at any moment: made whole beside its place, and then put there at once."""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".new-"  # what such a name begins with is nobody's, unless its maker still holds it


def sync_directory(path: Path) -> None:
    """The names in a directory are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def temporary(directory: Path) -> Iterator[tuple[io.BufferedRandom, Path]]:
    """A new file in a directory, and its path, from which the block may rename or link it. Only for this
    user; gone afterwards, if it is still there."""
    fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=directory)
    path = Path(name)
    try:
        with open(fd, "w+b") as file:
            yield file, path
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, data: bytes, *, replace: bool = True) -> None:
    """A file with this content, or nothing. Raises OSError; FileExistsError with ``replace=False``."""
    with temporary(path.parent) as (file, name):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if replace:
            os.rename(name, path)
        else:
            os.link(name, path)
    sync_directory(path.parent)
