"""What is to survive a crash at any moment: made whole without a name, and then given one."""

import contextlib
import errno as E
import io
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

TEMPORARY = ".new-"  # what such a name begins with is nobody's


def sync_directory(path: Path) -> None:
    """The names in a directory are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class NewFile:
    """A file in a directory, without a name (O_TMPFILE of open(2)), where the file system can; gone with its
    maker unless it is :meth:`put`. Only for this user. Raises OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._name = directory, ""
        try:
            fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in (E.EOPNOTSUPP, E.EISDIR, E.EINVAL):
                raise
            fd, self._name = tempfile.mkstemp(prefix=TEMPORARY, dir=directory)
        self.file: io.BufferedRandom = open(fd, "w+b")  # noqa: SIM115  # closed at the end of the block

    def put(self, name: str, *, replace: bool = True) -> None:
        """Have it on the disk, then in the directory, at once. Raises FileExistsError unless ``replace``."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if replace:
            with self._named() as other:
                os.rename(self._directory / other, self._directory / name)
        else:
            self._link(name)
        sync_directory(self._directory)

    @contextlib.contextmanager
    def _named(self) -> Iterator[str]:
        name = self._name or TEMPORARY + secrets.token_hex(8)
        if not self._name:
            self._link(name)
        try:
            yield name
        except BaseException:
            os.unlink(self._directory / name)
            raise

    def _link(self, name: str) -> None:
        fd = os.open(self._directory, os.O_PATH | os.O_CLOEXEC)
        try:  # with a directory it is linkat(2), which follows the link in /proc
            here = (
                os.path.join(self._directory, self._name)
                if self._name
                else f"/proc/self/fd/{self.file.fileno()}"
            )
            os.link(here, name, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if self._name:
            (self._directory / self._name).unlink(missing_ok=True)


def write(path: Path, data: bytes, *, replace: bool = True) -> None:
    """A file with this content, or nothing. Raises OSError; FileExistsError with ``replace=False``."""
    with NewFile(path.parent) as new:
        new.file.write(data)
        new.put(path.name, replace=replace)
