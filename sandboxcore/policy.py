"""When a sandbox that nobody uses is stopped, archived, destroyed. Pure: looks at records and a clock."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from sandboxcore.errors import SpecError
from sandboxcore.records import SandboxRecord

ActionKind = Literal["stop", "archive", "delete", "terminate", "forget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecyclePolicy:
    """What becomes of a sandbox by itself. Seconds; ``None``: never.

    auto_stop: without activity for so long, while it runs: it is stopped, and what is private in it is lost.
    auto_archive: without activity for so long, running or stopped: it is archived, see
        :meth:`SandboxManager.archive`.
    auto_delete: archived for so long: it is destroyed. One that was never archived: stopped for so long,
        where there is no ``auto_archive``.
    """

    auto_stop: float | None = None
    auto_archive: float | None = None
    auto_delete: float | None = None

    def __post_init__(self) -> None:
        """Validate."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            ok = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
            if not ok or (value is not None and not 0 <= value < 1e12):
                raise SpecError(f"policy.{item.name}: {value!r} is not a number of seconds")

    def replace(self, **changes: float | None) -> Self:
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, float]:
        """Plain data, fit for JSON: what is not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Raises :class:`SpecError`, also for keys that nobody knows."""
        if unknown := data.keys() - {item.name for item in dataclasses.fields(cls)}:
            raise SpecError(f"policy.{min(unknown)}: there is no such policy")
        return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something that is due, or was done: to what (an id and a name), and why. error: why it could not be
    done, "" if it was."""

    kind: ActionKind
    id: str
    name: str
    reason: str
    error: str = ""


def due(record: SandboxRecord, now: float) -> Action | None:
    """What is to be done to a sandbox now, by its time to live or its policy; one thing at most."""
    if record.host:  # its process looks after it
        return None
    if record.doomed:
        return _action("delete", record, record.doomed)
    if record.expires_at is not None and now >= record.expires_at:
        return _action("delete", record, f"expired {now - record.expires_at:.0f} s ago")
    return _by_policy(record, LifecyclePolicy.from_dict(record.policy), now)


def _by_policy(record: SandboxRecord, policy: LifecyclePolicy, now: float) -> Action | None:
    if record.archived_at is not None:
        return _after(record, "delete", "archived", now - record.archived_at, policy.auto_delete)
    idle = now - max(record.last_active_at, record.created_at)
    action = _after(record, "archive", "inactive", idle, policy.auto_archive)
    if action is None and record.state in ("running", "paused"):
        action = _after(record, "stop", "inactive", idle, policy.auto_stop)
    if action is None and record.state in ("created", "stopped") and policy.auto_archive is None:
        since = record.stopped_at if record.stopped_at is not None else record.created_at
        action = _after(record, "delete", record.state, now - since, policy.auto_delete)
    return action


def _after(
    record: SandboxRecord, kind: ActionKind, what: str, seconds: float, most: float | None
) -> Action | None:
    if most is None or seconds < most:
        return None
    return _action(kind, record, f"{what} for {seconds:.0f} s (auto_{kind} {most:g} s)")


def _action(kind: ActionKind, record: SandboxRecord, reason: str) -> Action:
    return Action(kind=kind, id=record.id, name=record.name, reason=reason)
