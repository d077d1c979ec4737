"""How many sandboxes of this user there may be at once, over all processes.

A sandbox holds a place (:mod:`sandboxcore.places`) by its init: the kernel gives it back when that is gone,
however that happens.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sandboxcore.errors import SandboxError, SpecError, TooManySandboxes
from sandboxcore.places import Places, checked_maximum
from sandboxcore.statedir import close_lock

SETTING = "SANDBOXCORE_MAX_SANDBOXES"
FILE = "places"  # in the directory of this user

_maximum: int | None = None


def set_maximum(number: int | None) -> None:
    """For this process; None: what the environment says, or no limit."""
    global _maximum
    _maximum = None if number is None else checked_maximum(number)


def maximum() -> int | None:
    """How many there may be; None: any number."""
    if _maximum is not None:
        return _maximum
    text = os.environ.get(SETTING)
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SpecError(f"{SETTING}: {text!r} is not a positive whole number")
    return int(text)


def take_place() -> int:
    """A descriptor that stands for one sandbox, for :func:`sandboxcore.statedir.close_lock`, or -1 where
    there is no limit. Raises :class:`TooManySandboxes`."""
    number = maximum()
    if number is None:
        return -1
    fd = Places(_directory() / FILE).take(number)
    if fd < 0:
        raise TooManySandboxes(number)
    return fd


@contextlib.contextmanager
def place() -> Iterator[None]:
    """Count as one sandbox. Raises :class:`TooManySandboxes`."""
    fd = take_place()
    try:
        yield
    finally:
        if fd >= 0:
            close_lock(fd)


def _directory() -> Path:
    """Where the locks are: of this user alone, gone with the next boot."""
    base = os.environ.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else "")
    path = Path(base, "sandboxcore") if base else Path("/tmp", f"sandboxcore-{os.geteuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SandboxError(f"{path}: is not a directory of this user alone; {SETTING} needs one")
    return path
