"""Persistent sandboxes for asyncio: :class:`PersistentSandbox`, :func:`list_sandboxes`, :func:`gc`.

A statement of the database blocks, for it is short. Another process may hold a sandbox's lock for as long as
a start takes; that is waited for without blocking.
"""

import asyncio
import contextlib
import errno as E
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Self

from sandboxcore import persistent, recovery, sandbox
from sandboxcore.aio_loop import LOCK_PATIENCE, Flag, freeze, patiently
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.changes import FileChange
from sandboxcore.lifecycle import SandboxState, check_move
from sandboxcore.link import ANSWER_PATIENCE, Home
from sandboxcore.records import SandboxRecord
from sandboxcore.recovery import Collected
from sandboxcore.resources import LimitChange
from sandboxcore.saved import SnapshotStore
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import SandboxSpec
from sandboxcore.statedir import StatePath
from sandboxcore.store import Store


class PersistentSandbox(Sandbox):
    """:class:`sandboxcore.persistent.PersistentSandbox` for asyncio, with the same parameters and states.

    Leaving an ``async with`` block, and :meth:`close`, let go of the handle; :meth:`stop` and
    :meth:`destroy` end the sandbox.
    """

    _own: persistent.PersistentSandbox

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        *,
        name: str | None = None,
        state_dir: StatePath = None,
        **about: Any,
    ) -> None:
        self._handle(persistent.PersistentSandbox(spec, name=name, state_dir=state_dir, **about))

    @classmethod
    async def create(cls, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Make one and start it. One that cannot start, or is not to, leaves no record."""
        made = cls(spec, **about)
        try:
            await made.start()
        except BaseException as error:
            if not made._undone() and not isinstance(error, GeneratorExit):
                await made.destroy()
            raise
        return made

    def _undone(self) -> bool:
        """Forget it at once, unless somebody works on it just now."""
        own = self._own
        with contextlib.suppress(BlockingIOError), self._alone():
            own._look()
            if own._link is not None:
                own._link.end(wait=0)
            own._forget()
        if own._state is SandboxState.DESTROYED:
            own.close()
        return own._state is SandboxState.DESTROYED

    @classmethod
    async def connect(cls, key: str, *, state_dir: StatePath = None) -> Self:
        """The sandbox of a name or id. Raises :class:`SandboxNotFound`."""
        self = cls.__new__(cls)
        self._handle(persistent.PersistentSandbox.connect(key, state_dir=state_dir))
        return self

    # --- its files at earlier moments: reading and writing them is a thread's work ------------------

    @property
    def snapshots(self) -> SnapshotStore:
        """Where its snapshots are: those of all sandboxes in its state directory."""
        return self._own.snapshots

    async def snapshot(self, name: str | None = None, *, copy: bool | None = None) -> Snapshot:
        """:meth:`sandboxcore.PersistentSandbox.snapshot`; it is taken also if this is cancelled."""
        return await asyncio.to_thread(self._own.snapshot, name, copy=copy)

    async def restore(self, snapshot: Snapshot) -> None:
        """:meth:`sandboxcore.PersistentSandbox.restore`, likewise."""
        self._file_server.close(wait=ANSWER_PATIENCE)  # init would take it for a command
        await asyncio.to_thread(self._own.restore, snapshot)

    async def discard(self) -> None:
        """:meth:`sandboxcore.PersistentSandbox.discard`, likewise."""
        self._file_server.close(wait=ANSWER_PATIENCE)
        await asyncio.to_thread(self._own.discard)

    async def diff(self, since: Snapshot | None = None) -> list[FileChange]:
        """:meth:`sandboxcore.Sandbox.diff`."""
        return await asyncio.to_thread(self._own.diff, since)

    async def commit(
        self,
        paths: Iterable[str | os.PathLike[str]] | None = None,
        *,
        dry_run: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
    ) -> list[FileChange]:
        """:meth:`sandboxcore.Sandbox.commit`, likewise."""
        return await asyncio.to_thread(self._own.commit, paths, dry_run=dry_run, state_dir=state_dir)

    @classmethod
    async def from_snapshot(
        cls, snapshot: Snapshot, *, spec: SandboxSpec | None = None, **about: Any
    ) -> Self:
        """:meth:`sandboxcore.PersistentSandbox.from_snapshot`."""
        made = persistent.PersistentSandbox.from_snapshot
        self = cls.__new__(cls)
        self._handle(await asyncio.to_thread(made, snapshot, spec=spec, **about))
        return self

    async def fork(self, n: int = 1) -> list[Self]:
        """:meth:`sandboxcore.Sandbox.fork`."""
        children = []
        for own in await asyncio.to_thread(self._own.fork, n):
            children.append(type(self).__new__(type(self)))
            children[-1]._handle(own)
        return children

    @property
    def record(self) -> SandboxRecord:
        """What is on record now, as plain data."""
        return self._own.record

    # --- states ---------------------------------------------------------------------------------

    async def archive(self, why: str = "") -> None:
        """:meth:`sandboxcore.PersistentSandbox.archive`; it is archived also if this is cancelled."""
        async with self._moving:
            self._file_server.close()
            await asyncio.to_thread(self._own.archive, why)

    async def recover(self) -> None:
        """:meth:`sandboxcore.PersistentSandbox.recover`, likewise."""
        await asyncio.to_thread(self._own.recover)

    @contextlib.asynccontextmanager
    async def _changing(self) -> AsyncIterator[None]:
        def attempt() -> contextlib.ExitStack:
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._alone())
                return stack.pop_all()

        async with self._moving:
            with await patiently(attempt, LOCK_PATIENCE, self._held()):
                yield

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold its locks in the order of its own methods, which threads of a manager call, or both sides wait
        for each other. Other tasks of this thread have that of the process as well: they go by ``_moving``.
        Raises BlockingIOError if somebody else holds either."""
        own = self._own
        if not own._lock.acquire(blocking=False):
            raise BlockingIOError(E.EAGAIN, f"sandbox {own.name}: a thread works on it")
        try:
            with own._store.locked(own.id, wait=False):
                yield
        finally:
            own._lock.release()

    def _home(self) -> Home:
        return self._own._home()

    def _is_now(self, state: SandboxState) -> None:
        self._on_record(state)
        self._note_pause(state)

    def _on_record(self, state: SandboxState) -> None:
        self._own._store.change(self._own.id, state=state.value)
        self._own._look()

    async def suspend(self) -> None:
        """Stop every process in it, all at once, until :meth:`resume`: by the freezer of its control group,
        or SIGSTOP where it has none. No limit of time counts meanwhile."""
        own, stands = self._own, Flag()
        async with self._changing():
            check_move(own.name, self.state, SandboxState.PAUSED, "suspend")
            # On record first: a paused one that runs, because we die here, can be resumed; the reverse hangs.
            self._on_record(SandboxState.PAUSED)
            try:
                await self._through(lambda link: freeze(link, stands.set))
            finally:
                if not stands.is_set():
                    self._on_record(SandboxState.RUNNING)
                else:
                    self._note_pause(SandboxState.PAUSED)

    async def change_spec(self, **fields: Any) -> Mapping[str, LimitChange]:
        """:meth:`sandboxcore.PersistentSandbox.change_spec`, as :meth:`update`."""
        async with self._changing():
            return self._own._respecified(fields)

    def _updated(self, changes: Mapping[str, Any]) -> Mapping[str, LimitChange]:
        self._own._look()
        return sandbox.Sandbox._update(self._own, changes)  # its own would wait for the lock that we hold

    async def _end(self, state: SandboxState, *, wait: bool) -> None:
        """Kill it and wait until it is gone, although cancelled, but not for ever; and put that on record."""
        own, gone = self._own, Flag()
        loop, watch = asyncio.get_running_loop(), os.dup(own._link_now().pidfd)
        self._file_server.close()
        loop.add_reader(watch, gone.set)
        try:
            own._link_now().end(wait=0)
            await gone.insist(gone.is_set, ANSWER_PATIENCE)
        finally:
            loop.remove_reader(watch)
            os.close(watch)
            own._let_go()
            if gone.is_set():
                own._note_end(own._record, "asked" if state is SandboxState.STOPPED else None)
        if not gone.is_set():
            raise TimeoutError("a process in uninterruptible sleep cannot be killed yet")

    async def close(self) -> None:
        """Let go of the handle; the sandbox stays. Commands of this handle that are not detached end.
        Idempotent."""
        async with self._moving:
            self._close()

    def _close(self) -> None:
        for process in list(self._processes):
            process.close()
        self._file_server.close()
        self._own.close()

    async def destroy(self) -> None:
        """End it for good and forget it, with the journals of its commands. Idempotent.

        Whoever is cancelled while it ends has destroyed it; while somebody else works on it, not."""
        own = self._own
        if own._state is not SandboxState.DESTROYED:
            async with self._changing():
                own._look()
                try:
                    if own._link is not None:
                        await self._end(SandboxState.DESTROYED, wait=True)
                finally:
                    if own._state not in (SandboxState.RUNNING, SandboxState.PAUSED):
                        own._forget()
        self._close()


async def list_sandboxes(
    state_dir: StatePath = None, *, labels: Mapping[str, str] | None = None
) -> list[SandboxRecord]:
    """:func:`sandboxcore.recovery.list_sandboxes`."""
    found = []
    with Store(state_dir) as store:
        for record in recovery.true_records(store, labels or {}):
            if record is not None:
                found.append(record)
            await asyncio.sleep(0)
    return found


async def gc(
    state_dir: StatePath = None, *, dry_run: bool = False, unused_layers: float | None = None
) -> Collected:
    """:func:`sandboxcore.recovery.gc`."""
    ended: list[str] = []
    removed: list[str] = []
    groups: list[str] = []
    with Store(state_dir) as store:
        steps = recovery.collecting_records(
            store, ended, removed, groups, dry_run=dry_run, unused_layers=unused_layers
        )
        for _ in steps:
            await asyncio.sleep(0)
    layers, commits = await asyncio.to_thread(recovery.collect_files, state_dir, dry_run=dry_run)
    return Collected(tuple(ended), tuple(removed), tuple(groups), layers, commits)
