"""What is on record, as plain data: sandboxes, their detached commands, sessions; and their tables."""

import dataclasses
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxcore.errors import SpecError

SCHEMA = 2

# What brings a database from one version to the next; each statement once, all of a version or none. The
# first version took labels that are no text: these become text, or nobody could read the record, nor destroy
# the sandbox.
CHANGES: Mapping[int, str] = {
    1: """
CREATE TABLE sandboxes (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, state TEXT NOT NULL, spec TEXT NOT NULL,
    labels TEXT NOT NULL, description TEXT NOT NULL, metadata TEXT NOT NULL, owner TEXT,
    created_at REAL NOT NULL, started_at REAL, stopped_at REAL, last_active_at REAL NOT NULL,
    pid INTEGER NOT NULL, ticks INTEGER NOT NULL, boot TEXT NOT NULL, omitted TEXT NOT NULL
) STRICT;
CREATE TABLE commands (
    id TEXT PRIMARY KEY, sandbox TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    args TEXT NOT NULL, pty INTEGER NOT NULL, started_at REAL NOT NULL
) STRICT;
""",
    2: """
ALTER TABLE sandboxes ADD COLUMN expires_at REAL;
ALTER TABLE sandboxes ADD COLUMN policy TEXT NOT NULL DEFAULT '{}';
ALTER TABLE sandboxes ADD COLUMN archived_at REAL;
ALTER TABLE sandboxes ADD COLUMN archived_why TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN template TEXT;
ALTER TABLE sandboxes ADD COLUMN template_help TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN host TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN doomed TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN lasting INTEGER NOT NULL DEFAULT 1;
ALTER TABLE sandboxes ADD COLUMN shared INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN next_spec TEXT NOT NULL DEFAULT '{}';
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, sandbox TEXT NOT NULL, client TEXT NOT NULL, state TEXT NOT NULL,
    created_at REAL NOT NULL, last_active_at REAL NOT NULL, timeouts TEXT NOT NULL,
    metadata TEXT NOT NULL, labels TEXT NOT NULL, trace_id TEXT, ended_at REAL, ended_why TEXT NOT NULL
) STRICT;
CREATE INDEX sessions_of_client ON sessions (client, state);
CREATE INDEX sessions_of_sandbox ON sessions (sandbox, state);
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
UPDATE sandboxes SET labels = (
    SELECT json_group_object(key, CASE WHEN type IN ('true', 'false', 'null') THEN type
                                       ELSE value || '' END) FROM json_each(labels)
) WHERE CASE WHEN json_valid(labels) THEN json_type(labels) = 'object' AND EXISTS
    (SELECT 1 FROM json_each(labels) WHERE type != 'text') END;
""",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxRecord:
    """One sandbox. ``pid``, ``ticks`` and ``boot`` together name its init, whatever became of the number
    since.

    expires_at: seconds since the epoch from which on it is destroyed; None: never. policy: see
    :class:`LifecyclePolicy`. archived_at, archived_why: since when and why it is archived. template,
    template_help: what it was made from, and what that says of itself. host: "" for one that outlives
    every process; else the process with which it ends, as "PID TICKS BOOT". doomed: why it is about to be
    destroyed; "" if it is not. lasting: whether it stays when its last session has ended. shared: whether
    another client than its owner had a session of it. spec: how it runs,
    or where it does not, how it ran last or will run next; next_spec: how it will start the next time, where
    that was changed while it ran, else empty.
    """

    id: str
    name: str
    state: str
    spec: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    description: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    owner: str | None = None
    created_at: float = 0.0
    started_at: float | None = None
    stopped_at: float | None = None
    last_active_at: float = 0.0
    pid: int = 0
    ticks: int = 0
    boot: str = ""
    omitted: list[str] = field(default_factory=list)
    expires_at: float | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    archived_at: float | None = None
    archived_why: str = ""
    template: str | None = None
    template_help: str = ""
    host: str = ""
    doomed: str = ""
    lasting: bool = True
    shared: bool = False
    next_spec: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRecord:
    """One detached command of a persistent sandbox. How it ended is in its journal."""

    id: str
    sandbox: str
    args: list[str]
    pty: bool
    started_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """One client's use of one sandbox. Times are seconds since the epoch; ``ended_why`` is "" until then."""

    id: str
    sandbox: str
    client: str
    state: str
    created_at: float
    last_active_at: float
    timeouts: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    trace_id: str | None = None
    ended_at: float | None = None
    ended_why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A row that cannot be read. It is left as it is, and left out of every list."""

    table: str
    id: str
    problem: str


Record = SandboxRecord | CommandRecord | SessionRecord
TABLES: Mapping[type[Record], str] = {
    SandboxRecord: "sandboxes",
    CommandRecord: "commands",
    SessionRecord: "sessions",
}
STATES: Mapping[str, tuple[str, ...]] = {
    "sandboxes": ("created", "running", "paused", "stopped", "archived"),
    "sessions": ("active", "detached", "suspended", "terminated"),
}
_KINDS: Mapping[str, type] = {
    **dict.fromkeys(("spec", "next_spec", "labels", "metadata", "policy", "timeouts"), dict),
    **dict.fromkeys(("omitted", "args"), list),
}


_ITEMS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("labels", "omitted", "args"), (str,)),
    **dict.fromkeys(("policy", "timeouts"), (int, float, type(None))),
}
_PROCESS = re.compile(r"[0-9]+ [0-9]+ [^ ].*")  # identity.this_process()


class Damaged(ValueError):
    """A row that cannot be read; ``damage`` says why."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(f"{damage.table} {damage.id}: {damage.problem}")
        self.damage = damage


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy, as it is read back. Raises :class:`SpecError` for what is not JSON data."""
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"metadata: is not JSON data: {error}") from None
    if wrong := [key for key in _keys(metadata) if not isinstance(key, str)]:
        raise SpecError(f"metadata: is not JSON data: the key {wrong[0]!r} is no text")
    return dict(json.loads(text))


def _keys(value: Any) -> Iterator[Any]:
    """Those of all mappings in it."""
    if isinstance(value, Mapping):
        yield from value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _keys(item)


def columns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as the database has them."""
    return {name: json.dumps(value) if name in _KINDS else value for name, value in values.items()}


def row_of(record: Record) -> dict[str, Any]:
    """A record as the database has it."""
    return columns({item.name: getattr(record, item.name) for item in dataclasses.fields(record)})


def _values(row: sqlite3.Row, table: str) -> dict[str, Any]:
    values = dict(row)
    try:
        for name in values.keys() & _KINDS.keys():
            values[name] = json.loads(values[name])
            if not isinstance(values[name], _KINDS[name]):
                raise ValueError(f"{name} is no {_KINDS[name].__name__}")
            items = values[name].values() if _KINDS[name] is dict else values[name]
            if name in _ITEMS and not all(type(item) in _ITEMS[name] for item in items):
                raise ValueError(f"{name}: {values[name]!r}")
        if table in STATES and values["state"] not in STATES[table]:
            raise ValueError(f"state {values['state']!r}")
        if values.get("host") and not _PROCESS.fullmatch(values["host"]):
            raise ValueError(f"host {values['host']!r}")
    except ValueError as error:
        raise Damaged(Damage(table=table, id=str(row["id"]), problem=str(error))) from None
    return values


def sandbox_of(row: sqlite3.Row) -> SandboxRecord:
    """Raises :class:`Damaged`."""
    values = _values(row, "sandboxes")
    marks = {name: bool(values[name]) for name in ("lasting", "shared")}
    return SandboxRecord(**{**values, **marks})


def command_of(row: sqlite3.Row) -> CommandRecord:
    """Raises :class:`Damaged`."""
    values = _values(row, "commands")
    return CommandRecord(**{**values, "pty": bool(values["pty"])})


def session_of(row: sqlite3.Row) -> SessionRecord:
    """Raises :class:`Damaged`."""
    return SessionRecord(**_values(row, "sessions"))
