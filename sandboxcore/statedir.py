"""Where things are kept that outlive a process: one private directory per user."""

import os
from pathlib import Path

from sandboxcore.errors import SandboxError


def default_state_dir() -> Path:
    """``$SANDBOXCORE_STATE_DIR``; else ``sandboxcore`` in ``$XDG_STATE_HOME``, default ``~/.local/state``."""
    if own := os.environ.get("SANDBOXCORE_STATE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sandboxcore"


def make_private(path: Path) -> None:
    """Make the directory if it is missing. Raises OSError where it cannot be made, and :class:`SandboxError`
    where others could change it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = path.stat()
    if about.st_uid != os.geteuid():
        raise SandboxError(f"{path}: belongs to uid {about.st_uid}; use another state directory")
    if about.st_mode & 0o022:  # not made private: it might be /tmp
        raise SandboxError(f"{path}: others may write to it; use another state directory")


def private_directory(state_dir: str | os.PathLike[str] | None) -> Path:
    """The state directory, made if need be. Raises :class:`SandboxError`."""
    path = Path(os.path.abspath(state_dir if state_dir is not None else default_state_dir()))
    try:
        make_private(path)
    except OSError as error:
        raise SandboxError(f"{path}: {error}") from error
    return path
