"""One client's use of a sandbox: its states, and how long it may stay in each."""

import dataclasses
import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from sandboxcore.errors import InvalidTransition, SpecError
from sandboxcore.records import SessionRecord


class SessionState(enum.StrEnum):
    """The states of a session."""

    ACTIVE = "active"  # somebody uses the sandbox
    DETACHED = "detached"  # nobody does; the sandbox runs on and is kept for the client
    SUSPENDED = "suspended"  # the sandbox stands still
    TERMINATED = "terminated"  # for good


_MOVES = {
    SessionState.ACTIVE: {SessionState.DETACHED, SessionState.SUSPENDED, SessionState.TERMINATED},
    SessionState.DETACHED: {SessionState.ACTIVE, SessionState.SUSPENDED, SessionState.TERMINATED},
    SessionState.SUSPENDED: {SessionState.ACTIVE, SessionState.TERMINATED},
    SessionState.TERMINATED: set(),
}
LIVE = (SessionState.ACTIVE, SessionState.DETACHED, SessionState.SUSPENDED)


def can_move(state: SessionState, to: SessionState) -> bool:
    """Whether ``to`` may follow ``state``."""
    return to in _MOVES[state]


def sources(to: SessionState) -> tuple[SessionState, ...]:
    """The states that ``to`` may follow."""
    return tuple(state for state, targets in _MOVES.items() if to in targets)


def check_move(session: str, state: SessionState, to: SessionState, wanted: str) -> None:
    """Raise :class:`InvalidTransition` unless ``to`` may follow ``state``."""
    if not can_move(state, to):
        raise InvalidTransition(f"session {session}", state.value, wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimeouts:
    """How long a session may be without activity, in seconds, before it is terminated. ``None``: for ever.

    idle: while active (default 5 minutes); detached: 1 hour; suspended: 24 hours.
    """

    idle: float | None = 300.0
    detached: float | None = 3600.0
    suspended: float | None = 86400.0

    def __post_init__(self) -> None:
        """Validate."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            ok = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not ok or (value is not None and not 0 < value < 1e12):
                raise SpecError(f"timeouts.{item.name}: {value!r} is not a positive number of seconds")

    def of(self, state: SessionState) -> float | None:
        """How long in this state."""
        return {
            SessionState.ACTIVE: self.idle,
            SessionState.DETACHED: self.detached,
            SessionState.SUSPENDED: self.suspended,
        }.get(state)

    def replace(self, **changes: float | None) -> Self:
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, float | None]:
        """Plain data, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises :class:`SpecError`, also for keys that nobody knows."""
        if unknown := data.keys() - {item.name for item in dataclasses.fields(cls)}:
            raise SpecError(f"timeouts.{min(unknown)}: there is no such timeout")
        return cls(**data)


def deadline(record: SessionRecord) -> float | None:
    """When it has been without activity for too long, in seconds since the epoch; None: never."""
    seconds = SessionTimeouts.from_dict(record.timeouts).of(SessionState(record.state))
    return None if seconds is None else record.last_active_at + seconds


def begun(record: SessionRecord, sandbox: str) -> SessionRecord:
    """The same, of this sandbox and from this moment on."""
    now = time.time()
    return dataclasses.replace(record, sandbox=sandbox, created_at=now, last_active_at=now)


def is_timed_out(record: SessionRecord, now: float) -> bool:
    """Whether it has ended, or would have if anybody had looked."""
    if record.state == SessionState.TERMINATED:
        return True
    when = deadline(record)
    return when is not None and now >= when
