"""What a sandbox can be, and which moves between that are legal."""

import enum
import os
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

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


PHASES = ("plan", "group", "spawn", "setup")


def create_timings(began: int, moments: Sequence[int], ended: int) -> Mapping[str, float]:
    """Seconds that a start took, by phase, from moments in ns of CLOCK_MONOTONIC.

    plan: the spec compiled, the spawner reached, and started if there was none. group: a place among the
    host's sandboxes, the control group if it needs one, volumes. spawn: until its init exists. setup: until
    it is isolated and takes commands. total: all of it; of a persistent one with putting it on record.
    """
    marks = (began, *moments)
    found = {name: (marks[i + 1] - marks[i]) / 1e9 for i, name in enumerate(PHASES) if i + 1 < len(marks)}
    return MappingProxyType({**found, "total": (ended - began) / 1e9})


def new_id(prefix: str) -> str:
    """A new identifier, such as ``sbx-0192...``: 48 bits of milliseconds, so that they sort by time, and 80
    random ones (the layout of UUID version 7 without its fixed bits)."""
    return f"{prefix}-{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"
