"""A session as its client holds it: :class:`SandboxSession`."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.records import SessionRecord
from sandboxcore.sandbox import Sandbox
from sandboxcore.session import SessionState, SessionTimeouts, deadline


class Sessions(Protocol):
    """What a session needs of its manager."""

    def session_record(self, session_id: str) -> SessionRecord: ...
    def find(self, key: str) -> Sandbox: ...
    def touch_session(self, session: "SandboxSession | str") -> None: ...
    def release(self, session: "SandboxSession | str", *, keep_alive: bool = False) -> None: ...
    def detach(self, session: "SandboxSession | str") -> None: ...
    def suspend(self, session: "SandboxSession | str") -> None: ...
    def resume(self, session: "SandboxSession | str") -> "SandboxSession": ...
    def terminate(self, session: "SandboxSession | str") -> None: ...


class SandboxSession:
    """One client's use of one sandbox. Leaving a ``with`` block releases it.

    id: ``sess-...``, later ones sort behind. sandbox_id, client_id, created_at (seconds since the epoch),
    timeouts, metadata, labels, trace_id: as they were given. went_on: whether it was there before this object
    was got: one that the client had left.
    """

    def __init__(self, manager: Sessions, record: SessionRecord, *, went_on: bool = False) -> None:
        self._manager, self._first = manager, record
        self.id, self.sandbox_id, self.client_id = record.id, record.sandbox, record.client
        self.created_at, self.trace_id = record.created_at, record.trace_id
        self.timeouts = SessionTimeouts.from_dict(record.timeouts)
        self.metadata, self.labels = dict(record.metadata), dict(record.labels)
        self.went_on = went_on

    @property
    def record(self) -> SessionRecord:
        """What is on record now, whichever process changed it. Raises :class:`SessionNotFound` a day after it
        has ended."""
        return self._manager.session_record(self.id)

    @property
    def state(self) -> SessionState:
        """A :class:`SessionState`, as it is now."""
        return SessionState(self.record.state)

    @property
    def last_active_at(self) -> float:
        """When something happened in it last, in seconds since the epoch."""
        return self.record.last_active_at

    @property
    def expires_at(self) -> float | None:
        """When it will have been without activity for too long, in its present state; None: never."""
        return deadline(self.record)

    @property
    def sandbox(self) -> Sandbox:
        """Its sandbox, the same object each time; do not close it. Raises :class:`SandboxNotFound`."""
        return self._manager.find(self.sandbox_id)

    def touch(self) -> None:
        """It is in use: its time without activity begins anew."""
        self._manager.touch_session(self)

    def detach(self) -> None:
        """:meth:`SandboxManager.detach`."""
        self._manager.detach(self)

    def suspend(self) -> None:
        """:meth:`SandboxManager.suspend`."""
        self._manager.suspend(self)

    def resume(self) -> None:
        """:meth:`SandboxManager.resume`."""
        self._manager.resume(self)

    def release(self, *, keep_alive: bool = False) -> None:
        """:meth:`SandboxManager.release`."""
        self._manager.release(self, keep_alive=keep_alive)

    def terminate(self) -> None:
        """:meth:`SandboxManager.terminate`."""
        self._manager.terminate(self)

    def to_dict(self) -> dict[str, Any]:
        """What is on record now, fit for JSON."""
        record = self.record
        return {name: getattr(record, name) for name in record.__slots__}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state is not SessionState.TERMINATED:
            self.release()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SandboxSession) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<SandboxSession {self.id} of {self.client_id or 'nobody'} in {self.sandbox_id}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachResult:
    """What :meth:`SandboxManager.attach` gives: the session, whether its sandbox was made for it, and what is
    applied to that, read back from the kernel."""

    session: SandboxSession
    newly_created: bool
    capabilities: SandboxCapabilities
