"""The state directory: where it is, and that it is its owner's alone."""

import contextlib
import errno as E
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from sandboxcore.errors import SandboxError

StatePath = str | os.PathLike[str] | None


def default_state_dir() -> Path:
    """``$SANDBOXCORE_STATE_DIR``; else ``sandboxcore`` in ``$XDG_STATE_HOME``, default ``~/.local/state``."""
    if own := os.environ.get("SANDBOXCORE_STATE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sandboxcore"


def state_path(state_dir: StatePath) -> Path:
    """The directory that is meant, as an absolute path. It need not exist."""
    return Path(os.path.abspath(state_dir if state_dir is not None else default_state_dir()))


def make_private(path: Path) -> None:
    """Make the state directory if need be. Raises :class:`SandboxError` for one that others may change, and
    OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid != os.geteuid():
        raise SandboxError(f"{path}: belongs to uid {about.st_uid}; use another state directory")
    if about.st_mode & 0o022:  # not made private: it might be /tmp
        raise SandboxError(f"{path}: others may write to it; use another state directory")


def private_directory(state_dir: StatePath) -> Path:
    """The state directory, made if need be. Raises :class:`SandboxError`."""
    path = state_path(state_dir)
    try:
        make_private(path)
    except OSError as error:
        raise SandboxError(f"{path}: {error}") from error
    return path


_fds: set[int] = set()  # of locks that this process holds


def open_lock(path: Path, flags: int = 0) -> int:
    """A lock file, open for flock(2); a forked child lets go of it. Close it with :func:`close_lock`."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    _fds.add(fd)
    return fd


def close_lock(fd: int) -> None:
    """Let go of a lock, unless somebody else was given the descriptor, too."""
    _fds.discard(fd)
    os.close(fd)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock file, which is made if need be and stays. Released by the kernel when the holder dies."""
    fd = open_lock(path, os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        close_lock(fd)


def same_file(fd: int, path: Path) -> bool:
    """Whether what is open there still has that name."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError as error:
        if error.errno == E.ENOENT:
            return False
        raise


def _after_fork_in_child() -> None:
    for fd in _fds:  # the lock would last as long as the child
        os.close(fd)
    _fds.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
