"""A session as its client holds it, for asyncio: :class:`SandboxSession`."""

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from sandboxcore import managed_session
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.records import SessionRecord
from sandboxcore.session import SessionState


class Sessions(Protocol):
    """What a session needs of its manager."""

    def find(self, key: str) -> Sandbox: ...
    async def detach(self, session: "SandboxSession | str") -> None: ...
    async def suspend(self, session: "SandboxSession | str") -> None: ...
    async def resume(self, session: "SandboxSession | str") -> "SandboxSession": ...
    async def release(self, session: "SandboxSession | str", *, keep_alive: bool = False) -> None: ...
    async def terminate(self, session: "SandboxSession | str") -> None: ...


class SandboxSession:
    """:class:`sandboxcore.SandboxSession` for asyncio. Leaving an ``async with`` block releases it."""

    def __init__(self, owner: Sessions, own: managed_session.SandboxSession) -> None:
        self._manager, self._own = owner, own
        self.id, self.sandbox_id, self.client_id = own.id, own.sandbox_id, own.client_id
        self.created_at, self.trace_id, self.timeouts = own.created_at, own.trace_id, own.timeouts
        self.metadata, self.labels, self.went_on = own.metadata, own.labels, own.went_on

    @property
    def record(self) -> SessionRecord:
        """What is on record now."""
        return self._own.record

    @property
    def state(self) -> SessionState:
        """A :class:`SessionState`, as it is now."""
        return self._own.state

    @property
    def last_active_at(self) -> float:
        """When something happened in it last, in seconds since the epoch."""
        return self._own.last_active_at

    @property
    def expires_at(self) -> float | None:
        """When it will have been without activity for too long, in its present state; None: never."""
        return self._own.expires_at

    @property
    def sandbox(self) -> Sandbox:
        """Its sandbox, the same object each time; do not close it."""
        return self._manager.find(self.sandbox_id)

    def touch(self) -> None:
        """It is in use: its time without activity begins anew."""
        self._own.touch()

    async def detach(self) -> None:
        """:meth:`SandboxManager.detach`."""
        await self._manager.detach(self)

    async def suspend(self) -> None:
        """:meth:`SandboxManager.suspend`."""
        await self._manager.suspend(self)

    async def resume(self) -> None:
        """:meth:`SandboxManager.resume`."""
        await self._manager.resume(self)

    async def release(self, *, keep_alive: bool = False) -> None:
        """:meth:`SandboxManager.release`."""
        await self._manager.release(self, keep_alive=keep_alive)

    async def terminate(self) -> None:
        """:meth:`SandboxManager.terminate`."""
        await self._manager.terminate(self)

    def to_dict(self) -> dict[str, Any]:
        """What is on record now, fit for JSON."""
        return self._own.to_dict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.state is not SessionState.TERMINATED:
            await self.release()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SandboxSession) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<aio.SandboxSession {self.id} of {self.client_id or 'nobody'} in {self.sandbox_id}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachResult:
    """:class:`sandboxcore.AttachResult`, with a session for asyncio."""

    session: SandboxSession
    newly_created: bool
    capabilities: SandboxCapabilities
