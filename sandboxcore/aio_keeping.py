"""What a manager for asyncio has: threads for what takes longer, its sandboxes, and what becomes of them."""

import asyncio
import contextlib
import weakref
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from sandboxcore import manager, persistent, sandbox
from sandboxcore.aio_loop import readable
from sandboxcore.aio_persistent import PersistentSandbox
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.errors import TooManySandboxes
from sandboxcore.events import Dispatcher
from sandboxcore.lifecycle import SandboxState
from sandboxcore.manager_stats import Health, ManagerStats
from sandboxcore.policy import Action, LifecyclePolicy
from sandboxcore.reconcile import Reconciled
from sandboxcore.records import SandboxRecord
from sandboxcore.resources import LimitChange
from sandboxcore.room import hear
from sandboxcore.spec import SandboxSpec

THREADS = 8  # at once; who comes later waits, and the loop goes on
SHORTEST, LONGEST = 0.001, 1.0  # seconds between two looks for room

Done = TypeVar("Done")


class Keeping:
    """The part of :class:`sandboxcore.aio.SandboxManager` that is not about sessions."""

    def __init__(self, own: manager.SandboxManager) -> None:
        self._own = own
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="sandboxcore-manager")
        self._handles: weakref.WeakValueDictionary[str, Sandbox] = weakref.WeakValueDictionary()
        self._turn = asyncio.Lock()  # of those who wait for room: who came first is first

    @property
    def events(self) -> Dispatcher:
        """Who hears what happens. A subscriber is called in whatever thread works."""
        return self._own.events

    # --- threads --------------------------------------------------------------------------------

    async def _do(self, action: Callable[..., Done], *args: Any, **options: Any) -> Done:
        """In a thread; to its end, also if this is cancelled meanwhile."""
        return await self._finished(self._threads.submit(action, *args, **options))

    async def _make(
        self, undo: Callable[[Done], object], action: Callable[..., Done], *args: Any, **options: Any
    ) -> Done:
        """In a thread; what it has made is undone if this is cancelled meanwhile."""
        work = self._threads.submit(action, *args, **options)
        try:
            return await asyncio.shield(asyncio.wrap_future(work))
        except asyncio.CancelledError:
            if not work.cancel():
                with contextlib.suppress(Exception, asyncio.CancelledError):
                    await self._finished(work)
                if work.exception() is None:
                    with contextlib.suppress(Exception, asyncio.CancelledError):
                        await self._finished(self._threads.submit(undo, work.result()))
            raise

    @staticmethod
    async def _finished(work: Future[Done]) -> Done:
        """Wait for it, however often cancelled; then say so."""
        cancelled: asyncio.CancelledError | None = None
        waited = asyncio.wrap_future(work)
        while not waited.done():
            try:
                await asyncio.wait([waited])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            waited.exception()  # nobody else will ask
            raise cancelled
        return waited.result()

    async def _when_there_is_room(
        self, attempt: Callable[[], Awaitable[Done]], wait: float | None, *, at_once: bool = False
    ) -> Done:
        """Try it, and again when a place may be free. No thread waits meanwhile. at_once: it may need none,
        so that those who wait for one do not come first; nor do they for whoever does not wait."""
        loop = asyncio.get_running_loop()
        deadline = None if wait is None else loop.time() + wait
        if at_once or not self._turn.locked() or (wait is not None and wait <= 0):
            try:
                return await attempt()
            except TooManySandboxes:
                if wait is not None and wait <= 0:
                    raise
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise TooManySandboxes(self._own._room.maximum or 0, str(self._own.state_dir)) from None
        try:
            return await self._in_turn(attempt, deadline)
        finally:
            self._turn.release()

    async def _in_turn(self, attempt: Callable[[], Awaitable[Done]], deadline: float | None) -> Done:
        loop, room, pause = asyncio.get_running_loop(), self._own._room, SHORTEST
        with room.news() as fd:
            while True:
                left = LONGEST if deadline is None else deadline - loop.time()
                if room.free() != 0 or left <= 0:
                    try:
                        return await attempt()
                    except TooManySandboxes:
                        if left <= 0:
                            raise
                try:
                    async with asyncio.timeout(min(left, pause)):
                        if fd < 0:
                            await asyncio.sleep(LONGEST)
                        await readable(fd, LONGEST)
                    hear(fd)
                    pause = SHORTEST
                except TimeoutError:
                    pause = min(2 * pause, LONGEST)

    # --- looking: statements of the database ------------------------------------------------------

    def get_sandbox(self, key: str) -> Sandbox | None:
        """:meth:`sandboxcore.SandboxManager.get_sandbox`."""
        own = self._own.get_sandbox(key)
        return None if own is None else self._handle(own)

    def find(self, key: str) -> Sandbox:
        """The same. Raises :class:`SandboxNotFound`."""
        return self._handle(self._own.find(key))

    def _handle(self, own: sandbox.Sandbox) -> Sandbox:
        found = self._handles.get(own.id)
        if found is None or found._own is not own:
            kind = PersistentSandbox if isinstance(own, persistent.PersistentSandbox) else Sandbox
            found = kind.__new__(kind)
            found._handle(own)
            self._handles[own.id] = found
        return found

    async def list_sandboxes(
        self, *, labels: Mapping[str, str] | None = None, state: str | None = None
    ) -> list[SandboxRecord]:
        """:meth:`sandboxcore.SandboxManager.list_sandboxes`."""
        return await self._do(self._own.list_sandboxes, labels=labels, state=state)

    async def create(
        self, spec: SandboxSpec | None = None, *, wait: float | None = 0.0, **about: Any
    ) -> Sandbox:
        """:meth:`sandboxcore.SandboxManager.create`."""

        def attempt() -> Awaitable[sandbox.Sandbox]:
            return self._make(lambda made: made.destroy(), self._own.create, spec, **about)

        return self._handle(await self._when_there_is_room(attempt, wait))

    # --- what becomes of them ---------------------------------------------------------------------

    async def destroy(self, key: str) -> None:
        """:meth:`sandboxcore.SandboxManager.destroy`."""
        await self._do(self._own.destroy, key)

    async def destroy_all(self, *, labels: Mapping[str, str] | None = None) -> tuple[Action, ...]:
        """:meth:`sandboxcore.SandboxManager.destroy_all`."""
        return await self._do(self._own.destroy_all, labels=labels)

    async def archive(self, key: str, why: str = "") -> None:
        """:meth:`sandboxcore.SandboxManager.archive`."""
        await self._do(self._own.archive, key, why)

    async def recover(self, key: str, *, start: bool = False, wait: float | None = 0.0) -> None:
        """:meth:`sandboxcore.SandboxManager.recover`."""

        def attempt() -> Awaitable[sandbox.Sandbox]:
            return self._do(self._own._run, key)

        await self._do(self._own.recover, key)
        if start:
            await self._when_there_is_room(attempt, wait)

    async def reconcile(self, *, dry_run: bool = False) -> Reconciled:
        """:meth:`sandboxcore.SandboxManager.reconcile`."""
        return await self._do(self._own.reconcile, dry_run=dry_run)

    async def gc(self) -> Reconciled:
        """The same as :meth:`reconcile`."""
        return await self.reconcile()

    async def cleanup_expired(self) -> int:
        """:meth:`sandboxcore.SandboxManager.cleanup_expired`."""
        return await self._do(self._own.cleanup_expired)

    def extend_ttl(self, key: str, seconds: float | None) -> float | None:
        """:meth:`sandboxcore.SandboxManager.extend_ttl`."""
        return self._own.extend_ttl(key, seconds)

    def expired(self) -> list[SandboxRecord]:
        """:meth:`sandboxcore.SandboxManager.expired`."""
        return self._own.expired()

    def set_policy(self, key: str, policy: LifecyclePolicy) -> None:
        """:meth:`sandboxcore.SandboxManager.set_policy`."""
        self._own.set_policy(key, policy)

    async def update(self, key: str, **fields: Any) -> Mapping[str, LimitChange]:
        """:meth:`sandboxcore.SandboxManager.update`."""
        return await self._do(self._own.update, key, **fields)

    def describe(self, key: str, **about: Any) -> SandboxRecord:
        """:meth:`sandboxcore.SandboxManager.describe`."""
        return self._own.describe(key, **about)

    def touch(self, key: str) -> None:
        """:meth:`sandboxcore.SandboxManager.touch`."""
        self._own.touch(key)

    async def stats(self) -> ManagerStats:
        """:meth:`sandboxcore.SandboxManager.stats`."""
        return await self._do(self._own.stats)

    async def prometheus(self) -> str:
        """:meth:`sandboxcore.SandboxManager.prometheus`."""
        return await self._do(self._own.prometheus)

    async def health(self) -> Health:
        """:meth:`sandboxcore.SandboxManager.health`."""
        return await self._do(self._own.health)

    def damaged(self) -> list[str]:
        """:meth:`sandboxcore.SandboxManager.damaged`."""
        return self._own.damaged()

    def get_record(self, key: str) -> SandboxRecord | None:
        """:meth:`sandboxcore.SandboxManager.get_record`."""
        return self._own.get_record(key)

    def exists(self, key: str) -> bool:
        """:meth:`sandboxcore.SandboxManager.exists`."""
        return self._own.exists(key)

    def get_state(self, key: str) -> SandboxState | None:
        """:meth:`sandboxcore.SandboxManager.get_state`."""
        found = self.get_sandbox(key)
        state = None if found is None else found.state
        return None if state is SandboxState.DESTROYED else state

    def set_default_sandbox(self, key: str | None) -> None:
        """:meth:`sandboxcore.SandboxManager.set_default_sandbox`."""
        self._own.set_default_sandbox(key)

    def get_default_sandbox(self) -> str | None:
        """:meth:`sandboxcore.SandboxManager.get_default_sandbox`."""
        return self._own.get_default_sandbox()
