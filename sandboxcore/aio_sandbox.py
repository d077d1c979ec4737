"""A sandbox that stays, for asyncio: :class:`Sandbox`."""

import asyncio
import contextlib
import errno as E
import functools
import os
import signal
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Self

from sandboxcore import _native, sandbox
from sandboxcore.aio_detached import DetachedCommand, await_start
from sandboxcore.aio_exec import converse
from sandboxcore.aio_files import AsyncFileServer, Files, looking
from sandboxcore.aio_loop import (
    LOCK_PATIENCE,
    born,
    freeze,
    has_ended,
    patiently,
    readable,
    tell_init,
    thaw,
    writable,
)
from sandboxcore.aio_process import Process, start_process
from sandboxcore.binds import MissingTarget, Wait, refused_as_set_up
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.cgroup import GroupUsage
from sandboxcore.changes import FileChange
from sandboxcore.detached import DEFAULT_KEEP
from sandboxcore.errors import InvalidTransition, SandboxGone, SetupError
from sandboxcore.events import EventKind
from sandboxcore.layers import Copy, Layers
from sandboxcore.lifecycle import SandboxState, check_move
from sandboxcore.link import ANSWER_PATIENCE, Home, Link
from sandboxcore.observers import Observer
from sandboxcore.request import DEVNULL, PIPE, File, FileContent, Program, Request, StrOrBytes
from sandboxcore.resources import LimitChange
from sandboxcore.result import Decoder, ExecResult
from sandboxcore.snapshots import Snapshot
from sandboxcore.spawner import get_spawner
from sandboxcore.spec import Limits, Mount, SandboxSpec, StrPath


class Sandbox:
    """:class:`sandboxcore.Sandbox` for asyncio, with the same parameters and states.

    ``async with Sandbox() as sandbox`` starts it; ``await Sandbox.create()`` makes a started one; else
    :meth:`start` does. Many tasks may use it at once.
    """

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        description: str = "",
        metadata: Mapping[str, Any] | None = None,
        owner: str | None = None,
    ) -> None:
        about: dict[str, Any] = {
            "labels": labels,
            "description": description,
            "metadata": metadata,
            "owner": owner,
        }
        self._handle(sandbox.Sandbox(spec, name=name, **about))

    def _handle(self, own: sandbox.Sandbox) -> None:
        """Become a handle of it."""
        self._own = own
        self.id, self.name, self.labels = own.id, own.name, own.labels
        self.description, self.metadata, self.owner = own.description, own.metadata, own.owner
        self.created_at = own.created_at
        self._file_server = AsyncFileServer()
        self._moving = asyncio.Lock()
        self._processes: weakref.WeakSet[Process] = weakref.WeakSet()
        self._busy = 0  # commands that run, or start, without a Process yet

    @classmethod
    async def create(cls, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Make one and start it."""
        made = cls(spec, **about)
        await made.start()
        return made

    @property
    def spec(self) -> SandboxSpec:
        """How it is built, with the limits that :meth:`update` has set."""
        return self._own.spec

    # --- states ---------------------------------------------------------------------------------

    @property
    def state(self) -> SandboxState:
        """A :class:`SandboxState`. One that was killed from outside is stopped. While a thread of a manager
        changes it, that before the change."""
        own = self._own
        if not own._lock.acquire(blocking=False):
            return own._state
        try:
            return own.state
        finally:
            own._lock.release()

    @property
    def pid(self) -> int:
        """The number of its init, as this process sees it; 0 when it does not run."""
        return self._own.pid

    @property
    def started_at(self) -> float | None:
        """When it was started last, in seconds since the epoch."""
        return self._own.started_at

    @property
    def stopped_at(self) -> float | None:
        """When it ended, unless it runs."""
        return self._own.stopped_at

    @property
    def last_active_at(self) -> float:
        """When it took or finished its last command."""
        return self._own.last_active_at

    @property
    def timings(self) -> Mapping[str, float]:
        """:attr:`sandboxcore.Sandbox.timings`."""
        return self._own.timings

    def observe(self, callback: Observer) -> Callable[[], None]:
        """:meth:`sandboxcore.Sandbox.observe`. It is called by the loop's thread; for the snapshots and
        commits of a persistent one, by another."""
        return self._own.observe(callback)

    def trace(self, trace_id: str) -> AbstractContextManager[None]:
        """:meth:`sandboxcore.Sandbox.trace`: for the task that enters it, and those that it starts."""
        return self._own.trace(trace_id)

    async def start(self) -> None:
        """Start it, also again after :meth:`stop`; then everything private in it is new and empty."""
        async with self._changing():
            self._own._may_start()
            own = self._own
            own._started(
                await born(
                    own._plan,
                    self.id,
                    self._home(),
                    own._layers.begin,
                    room=own._room,
                    patience=own.start_timeout,
                )
            )

    def _changing(self) -> AbstractAsyncContextManager[Any]:
        """Whoever changes the state is alone."""
        return self._moving

    def _home(self) -> Home | None:
        """Where its sockets shall have names."""
        return None

    async def suspend(self) -> None:
        """Stop every process in it, all at once, until :meth:`resume`: by the freezer of its control group,
        or SIGSTOP where it has none. No limit of time counts meanwhile."""
        async with self._changing():
            check_move(self._own.name, self.state, SandboxState.PAUSED, "suspend")
            await self._through(lambda link: freeze(link, lambda: self._is_now(SandboxState.PAUSED)))

    async def resume(self) -> None:
        """Let it go on after :meth:`suspend`."""
        async with self._changing():
            if self.state is not SandboxState.PAUSED:
                raise InvalidTransition(self._own.name, self.state.value, "resume")
            await self._through(lambda link: thaw(link, lambda: self._is_now(SandboxState.RUNNING)))

    async def signal(self, number: int) -> None:
        """Send a signal to every process of every command. After SIGKILL it is empty, and still runs."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            raise ValueError("use suspend() and resume()")
        await looking(self._own, lambda: self._own._ready("signal"))
        await self._through(lambda link: tell_init(link, number, lambda: None))

    async def _through(self, action: Callable[[Link], Awaitable[None]]) -> None:
        """Do something with the link. Raises SandboxGone where init has ended."""
        link = self._own._link_now()
        try:
            await action(link)
        except (OSError, SetupError, _native.NativeFailure):
            if not await has_ended(link):
                raise
            raise SandboxGone(f"sandbox {self._own.name}: its init has ended") from None

    def _is_now(self, state: SandboxState) -> None:
        self._own._state = state
        self._note_pause(state)

    def _note_pause(self, state: SandboxState) -> None:
        paused = state is SandboxState.PAUSED
        self._own._note(EventKind.SANDBOX_SUSPENDED if paused else EventKind.SANDBOX_RESUMED)

    async def stop(self) -> None:
        """Kill everything in it, wait until it is gone. What is private in it is lost; it can start again."""
        async with self._changing():
            if self.state is SandboxState.ARCHIVED:
                raise InvalidTransition(self._own.name, self._own._state.value, "stop")
            check_move(self._own.name, self._own._state, SandboxState.STOPPED, "stop")
            await self._end(SandboxState.STOPPED, wait=True)

    async def close(self) -> None:
        """End it for good. Waits for commands that run, at most 5 s, and for nothing if there are none.
        Idempotent."""
        async with self._moving:
            if self.state is not SandboxState.DESTROYED:
                everything: list[Any] = [*self._processes, *self._own._detached.values()]
                busy = self._busy > 0 or any(command.returncode is None for command in everything)
                busy = busy or bool(self._own._plan.volumes)  # which somebody else may wait for
                await self._end(SandboxState.DESTROYED, wait=busy)

    async def destroy(self) -> None:
        """The same as :meth:`close`."""
        await self.close()

    async def _end(self, state: SandboxState, *, wait: bool) -> None:
        link = self._own._link
        watch = os.dup(link.pidfd) if link is not None and wait else -1
        try:
            self._file_server.close()
            self._own._end(state)
            if watch >= 0:
                await readable(watch, ANSWER_PATIENCE)
        except TimeoutError:
            raise TimeoutError("a process in uninterruptible sleep cannot be killed yet") from None
        finally:
            if watch >= 0:
                os.close(watch)

    async def __aenter__(self) -> Self:
        if self.state is SandboxState.CREATED:
            await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio.{type(self).__name__} {self._own.name} {self._own._state.value}>"

    @property
    def files(self) -> Files:
        """Its files: :class:`sandboxcore.files.Files`, with coroutines."""
        return Files(self._own, self._file_server)

    # --- its files at earlier moments -----------------------------------------------------------

    async def snapshot(self, name: str | None = None, *, copy: bool | None = None) -> Snapshot:
        """:meth:`sandboxcore.Sandbox.snapshot`. It takes init about a millisecond, during which the loop
        waits, so that nobody can be cancelled between; but for a copy."""
        taken = await self._taken(name, copy)
        self._own._note_snapshot(taken)
        return taken

    async def _taken(self, name: str | None = None, copy: bool | None = None) -> Snapshot:
        own = self._own
        async with self._still():
            with own._quiet("snapshot"):
                if own._sealed(copy):
                    return own._snapshot(name, None)
                with Copy(own._layers, own._link_now()) as made:
                    await readable(made.answer.fileno(), made.PATIENCE)
                    return own._snapshot(name, made.take(get_spawner(own._plan)))

    async def restore(self, snapshot: Snapshot) -> None:
        """:meth:`sandboxcore.Sandbox.restore`, likewise."""
        async with self._still():
            self._own.restore(snapshot)

    async def discard(self) -> None:
        """:meth:`sandboxcore.Sandbox.discard`, likewise."""
        async with self._still():
            self._own.discard()

    async def diff(self, since: Snapshot | None = None) -> list[FileChange]:
        """:meth:`sandboxcore.Sandbox.diff`; a thread of its own reads what is in the layers."""
        with await self._taken() as now:
            return await asyncio.to_thread(now.diff, since)

    async def commit(
        self,
        paths: Iterable[str | os.PathLike[str]] | None = None,
        *,
        dry_run: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
    ) -> list[FileChange]:
        """:meth:`sandboxcore.Sandbox.commit`; a thread of its own writes, also if this is cancelled."""
        with await self._taken() as now:
            changes = await asyncio.to_thread(now.commit, paths, dry_run=dry_run, state_dir=state_dir)
        self._own._note_commit(changes, dry_run=dry_run)
        return changes

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        async with self._changing():
            self._file_server.close(wait=ANSWER_PATIENCE)
            yield

    @classmethod
    async def from_snapshot(
        cls, snapshot: Snapshot, *, spec: SandboxSpec | None = None, **about: Any
    ) -> Self:
        """:meth:`sandboxcore.Sandbox.from_snapshot`."""
        made = cls._from(snapshot, snapshot.fitting(spec), **about)
        await made.start()
        return made

    @classmethod
    def _from(cls, snapshot: Snapshot, spec: SandboxSpec, **about: Any) -> Self:
        """One that begins with a snapshot; not started."""
        made = cls(spec, **about)
        made._own._layers = Layers(snapshot.layers)
        return made

    async def fork(self, n: int = 1) -> list[Self]:
        """:meth:`sandboxcore.Sandbox.fork`."""
        children: list[Self] = []
        with await self._taken() as snapshot:
            try:
                for _ in range(n):
                    children.append(self._from(snapshot, snapshot.fitting(None)))
                    children[-1]._own._room = self._own._room
                    await children[-1].start()
            except BaseException:
                for child in children:
                    await child.close()
                raise
        self._own._note(EventKind.SANDBOX_FORKED, children=[child.id for child in children])
        return children

    # --- what comes and goes while it runs --------------------------------------------------------

    @property
    def binds(self) -> tuple[Mount, ...]:
        """:attr:`sandboxcore.Sandbox.binds`."""
        return self._own.binds

    async def bind(self, source: StrPath, target: StrPath, *, read_only: bool = True) -> None:
        """:meth:`sandboxcore.Sandbox.bind`. When cancelled while init works, it is among :attr:`binds`."""
        async with self._changing():
            wanted = self._own._bindable(source, target, read_only=read_only)
            try:
                await self._waited(self._own._binding(wanted))
            except MissingTarget as missing:
                with refused_as_set_up(wanted):
                    if missing.directory:
                        await self.files.mkdir(wanted.target, parents=True, exist_ok=True)
                    else:
                        await self.files.write(wanted.target, b"", append=True)
                await self._waited(self._own._binding(wanted, made=True))

    async def unbind(self, target: StrPath, *, lazy: bool = False) -> None:
        """:meth:`sandboxcore.Sandbox.unbind`."""
        async with self._changing():
            await self._waited(self._own._unbinding(target, lazy=lazy))

    async def _waited(self, steps: Generator[Wait, None, None]) -> None:
        with contextlib.closing(steps):
            for answer, patience in steps:
                with contextlib.suppress(TimeoutError):  # the next step says of what
                    await readable(answer.fileno(), patience)

    # --- resources ------------------------------------------------------------------------------

    def usage(self) -> GroupUsage:
        """:meth:`sandboxcore.Sandbox.usage`. No coroutine: it reads small files, waits for nobody."""
        return self._own.usage()

    async def update(self, **changes: Any) -> Mapping[str, LimitChange]:
        """:meth:`sandboxcore.Sandbox.update`. Waits for whoever else changes the sandbox just now; once it is
        done nothing interrupts it."""
        async with self._changing():
            return self._updated(changes)

    def _updated(self, changes: Mapping[str, Any]) -> Mapping[str, LimitChange]:
        return self._own.update(**changes)

    # --- commands -------------------------------------------------------------------------------

    async def exec(
        self,
        argv: Sequence[Program],
        *,
        input: StrOrBytes | None = None,
        stdin: File = None,
        stdout: File = PIPE,
        stderr: File = PIPE,
        timeout: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | str | None = None,
        limits: Limits | None = None,
        executable: Program | None = None,
        umask: int | None = None,
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        check: bool = False,
        files: Mapping[str, FileContent] | None = None,
        pass_fds: Sequence[int] = (),
        record: bool = False,
    ) -> ExecResult:
        """:meth:`sandboxcore.Sandbox.exec`. When cancelled, the command is gone before that is raised."""
        own = self._own
        seconds = own._deadline(timeout, own._bounds(limits))
        link = await self._ready("exec", seconds)
        extras = own._extras(user, limits, flags=("NOTIFY",), executable=executable, umask=umask)
        request, streams = own._captured(
            argv,
            input=input,
            stdio=(stdin, stdout, stderr),
            encoding=encoding,
            limits=limits,
            extras=extras,
            cwd=cwd,
            env=env,
            files=files,
            pass_fds=pass_fds,
            record=record,
        )
        with own._watched(request.args, streams) as watch:
            done = await self._converse(link, request, streams, seconds)
            result = own._concluded(request, streams, done, Decoder(text, encoding, errors))
            watch.ended(result)
        if check:
            result.check_returncode()
        return result

    async def _ready(self, wanted: str, seconds: float | None) -> Link:
        """The link, when it takes a command at once."""
        link = await looking(self._own, lambda: self._own._ready(wanted))
        try:
            patience = ANSWER_PATIENCE if seconds is None else min(seconds, ANSWER_PATIENCE)
            await writable(link.work.fileno(), patience)
        except TimeoutError:
            failure = _native.NativeFailure.of("launcher", 11, E.EAGAIN)
            raise self._own._rendered(None, failure) from None
        return await looking(self._own, lambda: self._own._ready(wanted))

    async def _converse(
        self, link: Link, request: Request, streams: _native.Streams, seconds: float | None
    ) -> _native.NativeResult:
        def paused() -> bool:  # then its launcher kills the command when it goes on
            return self.state is SandboxState.PAUSED

        self._busy += 1
        try:
            return await converse(
                "EXEC",
                link.work.fileno(),
                request,
                streams,
                seconds,
                link=link,
                kill_flood=self.spec.limits.output_action == "kill",
                spare=paused,
            )
        except _native.NativeFailure as failure:
            raise self._own._rendered(request, failure) from None
        finally:
            self._busy -= 1

    async def shell(self, script: str, **options: Any) -> ExecResult:
        """:meth:`exec` of ``/bin/sh -c script``."""
        return await self.exec(["/bin/sh", "-c", script], **options)

    async def popen(
        self,
        argv: Sequence[Program],
        *,
        stdin: File = None,
        stdout: File = PIPE,
        stderr: File = PIPE,
        pty: bool | tuple[int, int] = False,
        timeout: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | str | None = None,
        limits: Limits | None = None,
        executable: Program | None = None,
        umask: int | None = None,
        files: Mapping[str, FileContent] | None = None,
        pass_fds: Sequence[int] = (),
        limit: int = 1 << 16,
    ) -> Process:
        """:meth:`sandboxcore.Sandbox.popen`, but that streams are bytes, as everywhere in asyncio.

        limit: of the :class:`asyncio.StreamReader`, in bytes; the longest line that it finds.
        """
        own = self._own
        seconds = own._deadline(timeout, own._bounds(limits))
        await self._ready("popen", seconds)
        launch = functools.partial(
            own._launched,
            argv,
            stdio=(DEVNULL if stdin is None else stdin, stdout, stderr),
            pty=pty,
            user=user,
            limits=limits,
            about={"timeout": seconds, "executable": executable, "umask": umask},
            cwd=cwd,
            env=env,
            files=files,
            pass_fds=pass_fds,
        )
        ending, pipes = await looking(own, launch)
        self._busy += 1
        try:
            process = await start_process(ending, pipes, limit)
        finally:
            self._busy -= 1
        self._processes.add(process)
        return process

    async def detach(
        self,
        argv: Sequence[Program],
        *,
        stdin: File = None,
        pty: bool | tuple[int, int] = False,
        keep: int | str = DEFAULT_KEEP,
        timeout: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | str | None = None,
        limits: Limits | None = None,
        files: Mapping[str, FileContent] | None = None,
    ) -> DetachedCommand:
        """:meth:`sandboxcore.Sandbox.detach`. When cancelled, the command is gone before that is raised."""
        own = self._own
        await looking(own, lambda: own._ready("detach"))
        request, kept = own._kept(
            argv,
            stdin=stdin,
            pty=pty,
            keep=keep,
            timeout=timeout,
            user=user,
            limits=limits,
            cwd=cwd,
            env=env,
            files=files,
        )
        command, later = await patiently(
            lambda: own._new_command(request, kept, pty=bool(pty), wait=False), LOCK_PATIENCE, self._held()
        )
        try:
            with own._watching(command):
                with later:  # also where nothing is sent
                    link = await self._ready("detach", own._deadline(timeout, own._bounds(limits)))
                    ending = own._released(link, request, command, later)
                await await_start(command, ending)
        except BaseException:
            own._forget_command(command)
            raise
        return DetachedCommand(command)

    def _held(self) -> str:
        return f"sandbox {self._own.name}: somebody else has been changing it for {LOCK_PATIENCE} s"

    def commands(self) -> list[DetachedCommand]:
        """The detached commands, oldest first, ended ones too."""
        return [DetachedCommand(command) for command in self._own.commands()]

    def command(self, command_id: str) -> DetachedCommand:
        """A detached command by its id. Raises :class:`SandboxNotFound`."""
        return DetachedCommand(self._own.command(command_id))

    def forget(self, command_id: str) -> None:
        """Remove an ended detached command with its journal. Raises :class:`SandboxNotFound`, and
        :class:`InvalidTransition` while it runs."""
        self._own.forget(command_id)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a command that is started without ``env=``."""
        return self._own.environment

    async def capabilities(self) -> SandboxCapabilities:
        """What was applied, read back from the kernel by a command that does everything but the exec."""
        if self._own._capabilities is None:
            link = await self._ready("look", None)
            request, streams = self._own._looking()
            done = await self._converse(link, request, streams, 10)
            self._own._capabilities = self._own._seen(request, streams, done)
        return self._own._capabilities
