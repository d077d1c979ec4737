"""A bounded number of places, over all processes, that the kernel gives back.

Who has a place has a file open and a lock on one byte of it (F_OFD_SETLK, fcntl(2)). It is given back when
the last copy of that descriptor is closed, however that happens. The lock on one more byte is held, for an
instant, by whoever takes a place: else two could see each other and both go without, or both take the last.
"""

import contextlib
import errno as E
import fcntl
import os
import random
import struct
import time
from pathlib import Path

from sandboxcore.errors import SandboxError, SpecError
from sandboxcore.statedir import close_lock, open_lock

PATIENCE = 30.0  # seconds for others to take their places
_SHORTEST, _LONGEST = 0.0002, 0.01  # seconds between two attempts at that
_TURN = 1 << 61  # the byte of whose turn it is
_FLOCK = "hhqqi0q"  # struct flock


def checked_maximum(number: int) -> int:
    """How many there may be. Raises SpecError."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise SpecError(f"max_sandboxes: {number!r} is not a positive whole number")
    return number


class Places:
    """The places that a file stands for. It is made with the first of them, and stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, maximum: int) -> int:
        """A place: a descriptor, for :func:`sandboxcore.statedir.close_lock`; -1 if so many are taken
        already, whatever number those had in mind who took them. Raises SandboxError."""
        with contextlib.ExitStack() as undo:
            try:
                fd = open_lock(self.path, os.O_CREAT)
                undo.callback(close_lock, fd)
                self._await_turn(fd)
                try:
                    got = self._take(fd, maximum)
                finally:
                    _set(fd, fcntl.F_UNLCK, _TURN)
            except OSError as error:
                raise SandboxError(f"{self.path}: {error}") from error
            if got:
                undo.pop_all()
        return fd if got else -1

    def taken(self) -> int:
        """How many are taken now. Raises SandboxError."""
        try:
            # Not for writing: closing that is what whoever waits for a place looks out for
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise SandboxError(f"{self.path}: {error}") from error
        try:
            return _count(fd)
        finally:
            os.close(fd)

    def _await_turn(self, fd: int) -> None:
        """Not by F_OFD_SETLKW, which waits for ever for somebody who was stopped."""
        deadline, pause = time.monotonic() + PATIENCE, _SHORTEST
        while not _set(fd, fcntl.F_WRLCK, _TURN):
            if time.monotonic() > deadline:
                raise OSError(E.ETIMEDOUT, f"somebody has been taking a place for {PATIENCE:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    @staticmethod
    def _take(fd: int, maximum: int) -> bool:
        # Beyond it: somebody's who may have more of them. Then it does not say enough that one below is free.
        if _conflict(fd, maximum, _TURN) and _count(fd) >= maximum:
            return False
        first = random.randrange(maximum)
        return any(_set(fd, fcntl.F_WRLCK, (first + offset) % maximum) for offset in range(maximum))


def _set(fd: int, kind: int, byte: int) -> bool:
    """Lock a byte, or unlock it; False if somebody else has it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    except (BlockingIOError, PermissionError):  # as POSIX allows
        return False
    return True


def _conflict(fd: int, start: int, end: int) -> tuple[int, int] | None:
    """A part of a range that somebody else has locked, not always the first one."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    kind, _, found, size, _ = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
    return None if kind == fcntl.F_UNLCK else (max(start, found), min(end, found + size))


def _count(fd: int) -> int:
    """How many bytes are locked by others."""
    count, ranges = 0, [(0, _TURN)]
    while ranges:
        start, end = ranges.pop()
        if start < end and (found := _conflict(fd, start, end)):
            count += found[1] - found[0]
            ranges += [(start, found[0]), (found[1], end)]
    return count
