"""The file that keeps the output of a detached command, :class:`Journal`, and a piece of it, :class:`Log`.

Its first page says how far the streams have come and how the command ended; behind it are two rings,
``csrc/plan.h``. Reading needs nobody's help, and any number of processes can, while it is written.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sandboxcore import _native
from sandboxcore.errors import SetupError


@dataclass(frozen=True, slots=True)
class Log:
    """A piece of a stream. ``offset`` is where it begins, in bytes since the command's start; more than was
    asked for if what lay before is not kept any more. ``end`` is where to go on."""

    data: bytes
    offset: int

    @property
    def end(self) -> int:
        """The offset behind the piece."""
        return self.offset + len(self.data)


class Journal:
    """The file in which a launcher keeps a detached command's output and its end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, path: Path | None, keep: int) -> "Journal":
        """A new one, in memory where there is no path. ``keep``: bytes of each stream."""
        if path is None:
            fd = os.memfd_create("sandboxcore-journal")
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            head, size = _native.journal_head(keep)
            if path is None:
                os.ftruncate(fd, size)
            else:  # a full disk shall be known now
                os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, head, 0)
        except OSError as error:
            os.close(fd)
            hint = "no room for the journal: free some, or ask for less with keep="
            raise SetupError("host", error.errno or 0, subject=str(path or "memory"), hint=hint) from error
        return cls(fd)

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """One that is there. Raises FileNotFoundError."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def again(self) -> "Journal":
        """The same, to be closed on its own."""
        return Journal(os.dup(self._open()))

    def _open(self) -> int:
        if self.fd < 0:
            raise ValueError("this handle of the command is closed")
        return self.fd

    def head(self) -> _native.JournalHead:
        """The first page now."""
        fd, size = self._open(), _native.JOURNAL_SIZE
        data = os.pread(fd, size, 0)
        while (again := os.pread(fd, size, 0)) != data:  # it was being written
            data = again
        return _native.parse_journal(data)

    def read(self, stream: int, since: int, size: int) -> Log:
        """At most ``size`` bytes from offset ``since`` on, of what is kept."""
        while True:
            head = self.head()
            start = max(since, head.written[stream] - head.keep, 0)
            want = max(0, min(size, head.written[stream] - start))
            base, at = _native.JOURNAL_HEAD + stream * head.ring, start % head.ring
            data = os.pread(self.fd, min(want, head.ring - at), base + at)
            if len(data) < want:
                data += os.pread(self.fd, want - len(data), base)
            if start >= self.head().written[stream] - head.keep:  # else it was overwritten meanwhile
                return Log(data, start)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
