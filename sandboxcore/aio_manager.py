"""Many clients, many sandboxes, for asyncio: :class:`SandboxManager`.

Threads of its own do what takes longer than a statement of the database, so nothing blocks the loop.
Sandboxes are :class:`sandboxcore.aio.Sandbox` and :class:`sandboxcore.aio.PersistentSandbox`, whose commands
wait by the loop.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from sandboxcore import managed_session, manager, sandbox
from sandboxcore.aio_keeping import Keeping
from sandboxcore.aio_run import run
from sandboxcore.aio_session import AttachResult, SandboxSession
from sandboxcore.events import Event
from sandboxcore.policy import LifecyclePolicy
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.pools import as_spec
from sandboxcore.request import Program
from sandboxcore.result import ExecResult
from sandboxcore.selection import SelectionOptions
from sandboxcore.session import SessionState, SessionTimeouts
from sandboxcore.spec import SandboxSpec
from sandboxcore.statedir import StatePath, close_lock

AnySession = SandboxSession | str


class SandboxManager(Keeping):
    """:class:`sandboxcore.SandboxManager` for asyncio, with the same parameters, sessions and errors.

    Who is cancelled leaves nothing: what :meth:`acquire`, :meth:`attach`, :meth:`create` and :meth:`fork`
    were making is released or destroyed. What ends something ends it also if its caller is cancelled.
    ``on_event`` is called in whatever thread works. The pools of ``warm`` are begun by a thread: what that
    raises, entering an ``async with`` block does.
    """

    def __init__(
        self,
        state_dir: StatePath = None,
        *,
        max_sandboxes: int | None = 100,
        timeouts: SessionTimeouts | None = None,
        policy: LifecyclePolicy | None = None,
        pool: PoolConfig | None = None,
        warm: Iterable[SandboxSpec | str] = (),
        sweep_interval: float | None = manager.SWEEP,
        on_event: Iterable[Callable[[Event], object]] = (),
    ) -> None:
        specs = [as_spec(one) for one in warm]
        own = manager.SandboxManager(
            state_dir,
            max_sandboxes=max_sandboxes,
            timeouts=timeouts,
            policy=policy,
            pool=pool,
            sweep_interval=sweep_interval,
            on_event=on_event,
        )
        super().__init__(own)
        self._filled = self._threads.submit(own._fill, specs)
        self._closing: Future[None] | None = None

    # --- sessions -------------------------------------------------------------------------------

    def _session(self, own: managed_session.SandboxSession) -> SandboxSession:
        return SandboxSession(self, own)

    async def acquire(
        self,
        spec: SandboxSpec | None = None,
        options: SelectionOptions | None = None,
        client_id: str = "",
        *,
        wait: float | None = 0.0,
        **about: Any,
    ) -> SandboxSession:
        """:meth:`sandboxcore.SandboxManager.acquire`."""

        def attempt() -> Awaitable[managed_session.SandboxSession]:
            return self._make(self._own._undo, self._own.acquire, spec, options, client_id, **about)

        kept = client_id and self._own.list_sessions(SessionState.DETACHED, client_id)
        preferred = options is not None and options.preferred_id is not None
        at_once = bool(kept) or preferred
        return self._session(await self._when_there_is_room(attempt, wait, at_once=at_once))

    async def attach(
        self, sandbox_id: str, client_id: str = "", *, wait: float | None = 0.0, **about: Any
    ) -> AttachResult:
        """:meth:`sandboxcore.SandboxManager.attach`."""

        def undo(made: managed_session.AttachResult) -> None:
            self._own._undo(made.session)

        def attempt() -> Awaitable[managed_session.AttachResult]:
            return self._make(undo, self._own.attach, sandbox_id, client_id, **about)

        made = await self._when_there_is_room(attempt, wait, at_once=self.exists(sandbox_id))
        return AttachResult(
            session=self._session(made.session),
            newly_created=made.newly_created,
            capabilities=made.capabilities,
        )

    async def detach(self, session: AnySession) -> None:
        """:meth:`sandboxcore.SandboxManager.detach`."""
        await self._do(self._own.detach, _id(session))

    async def suspend(self, session: AnySession) -> None:
        """:meth:`sandboxcore.SandboxManager.suspend`."""
        await self._do(self._own.suspend, _id(session))

    async def resume(self, session: AnySession, *, wait: float | None = 0.0) -> SandboxSession:
        """:meth:`sandboxcore.SandboxManager.resume`."""

        def attempt() -> Awaitable[managed_session.SandboxSession]:
            return self._do(self._own.resume, _id(session))

        return self._session(await self._when_there_is_room(attempt, wait))

    async def release(self, session: AnySession, *, keep_alive: bool = False) -> None:
        """:meth:`sandboxcore.SandboxManager.release`."""
        await self._do(self._own.release, _id(session), keep_alive=keep_alive)

    async def terminate(self, session: AnySession) -> None:
        """:meth:`sandboxcore.SandboxManager.terminate`."""
        await self._do(self._own.terminate, _id(session))

    async def fork(
        self, session: AnySession, n: int = 1, *, client_id: str | None = None
    ) -> list[SandboxSession]:
        """:meth:`sandboxcore.SandboxManager.fork`."""

        def undo(made: list[managed_session.SandboxSession]) -> None:
            for one in made:
                one.terminate()

        made = await self._make(undo, self._own.fork, _id(session), n, client_id=client_id)
        return [self._session(one) for one in made]

    # --- looking: statements of the database ------------------------------------------------------

    def list_sessions(
        self,
        state: str | None = None,
        client_id: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[SandboxSession]:
        """:meth:`sandboxcore.SandboxManager.list_sessions`."""
        return [self._session(own) for own in self._own.list_sessions(state, client_id, labels)]

    def get_session(self, session_id: str) -> SandboxSession | None:
        """:meth:`sandboxcore.SandboxManager.get_session`."""
        return self._maybe(self._own.get_session(session_id))

    def get_session_by_sandbox(self, key: str) -> SandboxSession | None:
        """:meth:`sandboxcore.SandboxManager.get_session_by_sandbox`."""
        return self._maybe(self._own.get_session_by_sandbox(key))

    def get_session_by_client(self, client_id: str) -> SandboxSession | None:
        """:meth:`sandboxcore.SandboxManager.get_session_by_client`."""
        return self._maybe(self._own.get_session_by_client(client_id))

    def _maybe(self, own: managed_session.SandboxSession | None) -> SandboxSession | None:
        return None if own is None else self._session(own)

    # --- without a session ------------------------------------------------------------------------

    async def run_ephemeral(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | None = None,
        wait: float | None = 0.0,
        **options: Any,
    ) -> ExecResult:
        """:meth:`sandboxcore.SandboxManager.run_ephemeral`."""

        def take() -> Awaitable[int]:
            return self._make(_give_back, self._own._when_there_is_room, self._own._room.take, 0.0)

        with self._own._telling(argv) as told:
            place = await self._when_there_is_room(take, wait)
            try:
                told.append(await run(argv, spec=spec, **options))
            finally:
                _give_back(place)
        return told[0]

    async def run_pooled(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | None = None,
        wait: float | None = 0.0,
        client: str | None = None,
        **options: Any,
    ) -> ExecResult:
        """:meth:`sandboxcore.SandboxManager.run_pooled`."""
        pools = self._own.pools

        def claim() -> Awaitable[sandbox.Sandbox]:
            return self._make(pools.release, pools.claim, spec, client=client)

        with self._own._telling(argv) as told:
            own = await self._when_there_is_room(claim, wait)
            try:
                told.append(await self._handle(own).exec(argv, **options))
            finally:
                self._handles.pop(own.id, None)
                await self._do(pools.release, own)
        return told[0]

    async def close(self) -> None:
        """:meth:`sandboxcore.SandboxManager.close`; it is closed also if this is cancelled."""
        if self._closing is None:
            self._closing = self._threads.submit(self._own.close)
        try:
            await self._finished(self._closing)
        finally:
            self._threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        try:
            await self._finished(self._filled)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _give_back(place: int) -> None:
    if place >= 0:
        close_lock(place)


def _id(session: AnySession) -> str:
    return session if isinstance(session, str) else session.id
