"""What a sandbox can be, and which moves between that are legal."""

import enum
import os
import time

from sandboxcore.errors import InvalidTransition


class SandboxState(enum.StrEnum):
    """The states of a living sandbox."""

    CREATED = "created"  # described, nothing runs
    RUNNING = "running"  # takes commands
    PAUSED = "paused"  # its processes are stopped
    STOPPED = "stopped"  # its processes are gone; it can start again
    ARCHIVED = "archived"  # put away (a persistent one): it has to be recovered first
    DESTROYED = "destroyed"  # for good


_MOVES = {
    SandboxState.CREATED: {SandboxState.RUNNING, SandboxState.ARCHIVED, SandboxState.DESTROYED},
    SandboxState.RUNNING: {SandboxState.PAUSED, SandboxState.STOPPED, SandboxState.DESTROYED},
    SandboxState.PAUSED: {SandboxState.RUNNING, SandboxState.STOPPED, SandboxState.DESTROYED},
    SandboxState.STOPPED: {SandboxState.RUNNING, SandboxState.ARCHIVED, SandboxState.DESTROYED},
    SandboxState.ARCHIVED: {SandboxState.STOPPED, SandboxState.DESTROYED},
    SandboxState.DESTROYED: set(),
}


def can_move(state: SandboxState, to: SandboxState) -> bool:
    """Whether ``to`` may follow ``state``."""
    return to in _MOVES[state]


def check_move(name: str, state: SandboxState, to: SandboxState, wanted: str) -> None:
    """Raise :class:`InvalidTransition` unless ``to`` may follow ``state``."""
    if not can_move(state, to):
        raise InvalidTransition(name, state.value, wanted)


def new_id(prefix: str) -> str:
    """A new identifier, such as ``sbx-0192...``: 48 bits of milliseconds, so that they sort by time, and 80
    random ones (the layout of UUID version 7 without its fixed bits)."""
    return f"{prefix}-{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"
