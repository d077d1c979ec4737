"""What happens to sandboxes, sessions, commands and files, as data: :class:`Event`; and who wants to know:
:class:`Dispatcher`."""

import contextlib
import contextvars
import enum
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from sandboxcore.errors import SpecError
from sandboxcore.lifecycle import new_id

VERSION = 1  # of the form of Event.to_dict
MAX_NAME = 512  # characters of an id
MAX_DEPTH = 16  # of what is in `data`

LOGGER = logging.getLogger("sandboxcore")


class EventKind(enum.StrEnum):
    """What an event is about, and what happened."""

    SANDBOX_CREATED = "sandbox.created"
    SANDBOX_STARTED = "sandbox.started"
    SANDBOX_STOPPED = "sandbox.stopped"
    SANDBOX_SUSPENDED = "sandbox.suspended"
    SANDBOX_RESUMED = "sandbox.resumed"
    SANDBOX_DESTROYED = "sandbox.destroyed"
    SANDBOX_ARCHIVED = "sandbox.archived"
    SANDBOX_RECOVERED = "sandbox.recovered"
    SANDBOX_UPDATED = "sandbox.updated"  # its limits, labels, policy
    SANDBOX_EXPIRED = "sandbox.expired"
    SANDBOX_SNAPSHOT = "sandbox.snapshot"
    SANDBOX_RESTORED = "sandbox.restored"
    SANDBOX_DISCARDED = "sandbox.discarded"  # what was written since the last snapshot
    SANDBOX_FORKED = "sandbox.forked"
    SANDBOX_COMMITTED = "sandbox.committed"  # what was written, to the host
    SANDBOX_BOUND = "sandbox.bound"
    SANDBOX_UNBOUND = "sandbox.unbound"

    SESSION_ACQUIRED = "session.acquired"
    SESSION_ATTACHED = "session.attached"
    SESSION_DETACHED = "session.detached"
    SESSION_SUSPENDED = "session.suspended"
    SESSION_RESUMED = "session.resumed"
    SESSION_TERMINATED = "session.terminated"
    SESSION_RELEASED = "session.released"
    SESSION_TIMED_OUT = "session.timed_out"

    COMMAND_STARTED = "command.started"
    COMMAND_ENDED = "command.ended"

    FILE_READ = "file.read"
    FILE_WRITTEN = "file.written"
    FILE_OPENED = "file.opened"
    FILE_REMOVED = "file.removed"
    FILE_RENAMED = "file.renamed"
    FILE_LINKED = "file.linked"  # a symbolic link was made
    FILE_CHANGED = "file.changed"  # its permission bits
    FILE_MADE = "file.made"  # a directory
    FILE_COPIED_IN = "file.copied_in"
    FILE_COPIED_OUT = "file.copied_out"

    POOL_CLAIMED = "pool.claimed"
    POOL_MISSED = "pool.missed"
    POOL_REFILLED = "pool.refilled"
    POOL_RESET = "pool.reset"
    POOL_DISCARDED = "pool.discarded"

    POLICY_STOP = "policy.stop"
    POLICY_ARCHIVE = "policy.archive"
    POLICY_DELETE = "policy.delete"

    RECORD_CORRUPT = "record.corrupt"  # a row of the state directory
    LOG_TORN = "log.torn"  # a line of an event log that a crash left unfinished


_KINDS = frozenset(EventKind)
_ID = re.compile(r"evt-[0-9a-f]{32}")
_NAMES = ("sandbox", "session", "client", "trace_id")
_FIELDS = frozenset(("version", "kind", "at", "id", *_NAMES, "data"))
_trace: contextvars.ContextVar[str | None] = contextvars.ContextVar("sandboxcore_trace", default=None)


@contextlib.contextmanager
def tracing(trace_id: str) -> Iterator[None]:
    """Whatever this thread or task does within has this trace id, in events of every sandbox. So do tasks
    that are started within. Nested, the inner one counts. Raises :class:`SpecError` for an empty one."""
    token = _trace.set(_name("trace_id", trace_id))
    try:
        yield
    finally:
        _trace.reset(token)


def current_trace() -> str | None:
    """The trace id of this thread or task now."""
    return _trace.get()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened.

    kind: an :class:`EventKind`. at: seconds since the epoch. id: ``evt-...``; later ones sort behind, by
    milliseconds. sandbox, session, client, trace_id: whom it is about, None where that is nobody. data: what
    else there is to say; only what JSON has, text for paths, enums and bytes.

    Raises :class:`SpecError` for what cannot be.
    """

    kind: EventKind
    at: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: new_id("evt"))
    sandbox: str | None = None
    session: str | None = None
    client: str | None = None
    trace_id: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise SpecError(f"event: kind: {self.kind!r} is no EventKind")
        if isinstance(self.at, bool) or not isinstance(self.at, int | float):
            raise SpecError(f"event: at: {self.at!r} is no number")
        if not (math.isfinite(self.at) and self.at >= 0):
            raise SpecError(f"event: at: {self.at!r} is no time")
        if not isinstance(self.id, str) or not _ID.fullmatch(self.id):
            raise SpecError(f"event: id: {self.id!r} is not evt- and 32 hexadecimal digits")
        for name in _NAMES:
            if getattr(self, name) is not None:
                _name(name, getattr(self, name))
        if not isinstance(self.data, Mapping):
            raise SpecError("event: data: not a mapping")
        object.__setattr__(self, "kind", EventKind(self.kind))
        object.__setattr__(self, "at", float(self.at))
        object.__setattr__(self, "data", MappingProxyType(_plain(self.data, "data")))

    @classmethod
    def noted(cls, kind: str, data: Mapping[str, Any], **about: str | None) -> Self:
        """The event for what an observer of a sandbox was told; the trace id is taken out of the data."""
        rest = dict(data)
        trace = rest.pop("trace_id", None)
        return cls(kind=EventKind(kind), trace_id=trace, data=rest, **about)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON. Names that are None are left out."""
        names = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        found = {"version": VERSION, "kind": self.kind.value, "at": self.at, "id": self.id, **names}
        return {**found, "data": _plain(self.data, "data")}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made. Raises :class:`SpecError` for anything else."""
        if not isinstance(data, Mapping):
            raise SpecError("event: not a mapping")
        if data.get("version") != VERSION or isinstance(data["version"], bool):
            raise SpecError(f"event: version {data.get('version')!r} is not {VERSION}")
        if unknown := [key for key in data if key not in _FIELDS]:
            raise SpecError(f"event: {unknown[0]!r} is no field of an event")
        if missing := {"kind", "at", "id", "data"} - data.keys():
            raise SpecError(f"event: {min(missing)} is missing")
        if not isinstance(data["kind"], str):
            raise SpecError(f"event: kind: {data['kind']!r} is no EventKind")
        return cls(**{key: value for key, value in data.items() if key != "version"})


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value or len(value) > MAX_NAME:
        raise SpecError(f"event: {what}: {value!r} is not a text of 1 to {MAX_NAME} characters")
    return value


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """What JSON has, and only that: a copy. Raises SpecError."""
    if depth > MAX_DEPTH:
        raise SpecError(f"event: {where}: nested too deeply")
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if abs(value) >= 1 << 64:
            raise SpecError(f"event: {where}: a number that does not fit into 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise SpecError(f"event: {where}: {value!r} is not in JSON")
        return value
    if isinstance(value, bytes | os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise SpecError(f"event: {where}: key {wrong[0]!r} is no text")
        return {str(key): _plain(one, f"{where}.{key}", depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [_plain(one, where, depth + 1) for one in items]
    raise SpecError(f"event: {where}: {type(value).__name__} is not in JSON")


Callback = Callable[[Event], object]


class Dispatcher:
    """Takes events to whoever subscribed, one after the other, in the thread in which they happen.

    A subscriber sees the events of each thread in their order, and none twice. It must not wait for what the
    thread that it is called in does next. One that raises is logged to ``logging.getLogger("sandboxcore")``;
    the others get the event all the same. No lock is held meanwhile: a subscriber may subscribe, unsubscribe
    and dispatch. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscribers: tuple[tuple[Callback, frozenset[EventKind] | None], ...] = ()

    @property
    def active(self) -> bool:
        """Whether anybody listens: without, there is no need to make an event."""
        return bool(self._subscribers)

    def subscribe(self, callback: Callback, kinds: Iterable[str] | None = None) -> Callable[[], None]:
        """Have every event, or those of some kinds. Returns a function that ends that, idempotent; a call
        that is on its way in another thread still arrives. Raises :class:`SpecError` for an unknown kind, and
        for what cannot be called."""
        if not callable(callback):
            raise SpecError(f"subscribe: {callback!r} cannot be called")
        wanted = None
        if kinds is not None:
            given = [kinds] if isinstance(kinds, str) else list(kinds)
            if unknown := [kind for kind in given if kind not in _KINDS]:
                raise SpecError(f"subscribe: {unknown[0]!r} is no EventKind")
            wanted = frozenset(map(EventKind, given))
        entry = (callback, wanted)

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = tuple(one for one in self._subscribers if one is not entry)

        with self._lock:
            self._subscribers = (*self._subscribers, entry)
        return unsubscribe

    def emit(self, kind: EventKind, **about: Any) -> Event | None:
        """Make an event and dispatch it, with the trace id of now unless told; None if nobody listens."""
        if not self._subscribers:
            return None
        event = Event(kind=kind, **{"trace_id": _trace.get(), **about})
        self.dispatch(event)
        return event

    def dispatch(self, event: Event) -> None:
        """Take it to whoever wants it now."""
        for callback, kinds in self._subscribers:
            if kinds is None or event.kind in kinds:
                try:
                    callback(event)
                except Exception:
                    LOGGER.exception("a subscriber failed with event %s (%s)", event.id, event.kind.value)
