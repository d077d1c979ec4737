"""A sandbox that stays: :class:`Sandbox`. Created once, then as many commands as one likes, each as cheap as
a fork and an exec."""

import contextlib
import errno as E
import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self

from sandboxcore import _native, host
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.command import Ending, Process
from sandboxcore.detached import DEFAULT_KEEP, DetachedCommand, PrivateDoor
from sandboxcore.errors import (
    InvalidTransition,
    SandboxError,
    SandboxNotFound,
    SandboxTimeout,
    SpecError,
)
from sandboxcore.events import EventKind
from sandboxcore.files import Files, FileServer
from sandboxcore.identity import pid_of
from sandboxcore.journal import Journal
from sandboxcore.layers import Layers
from sandboxcore.lifecycle import SandboxState, check_move, create_timings, new_id
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE, Birth, Home, Link
from sandboxcore.observers import Unwatched
from sandboxcore.plan import compile_plan
from sandboxcore.process import with_spawner
from sandboxcore.request import (
    DEVNULL,
    PIPE,
    File,
    FileContent,
    Program,
    Request,
    make_streams,
)
from sandboxcore.result import Decoder, make_result
from sandboxcore.room import Room
from sandboxcore.snapshots import Snapshot, Snapshots
from sandboxcore.spawner import Spawner
from sandboxcore.spec import Limits, SandboxSpec, check_labels, parse_size
from sandboxcore.statedir import StatePath


class Sandbox(Snapshots):
    """A sandbox that stays until it is closed, or until this process ends.

    ``with Sandbox() as sandbox`` starts it; :meth:`create` makes a started one; else :meth:`start` does.
    Any thread may use it, and many at once.

    Parameters
    ----------
    spec: how it is built; default :class:`SandboxSpec`.
    name, labels, description, metadata, owner: yours, for finding it again; the spec's labels are included.

    Raises
    ------
    SpecError, UnsupportedHost: here, before anything starts. SetupError: from ``start``.
    """

    _state_dir: StatePath = None  # where its volumes are
    start_timeout = START_PATIENCE  # seconds for it to start; then SetupError (ETIME)
    _room: Room | None = None  # where it takes a place while it lives; forks of it, too
    _began = 0  # its last start, ns
    _timings: Mapping[str, float] = MappingProxyType({})

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
        self.spec = spec or SandboxSpec()
        self.id = new_id("sbx")
        self.name = name or self.id
        self.labels = {**self.spec.labels, **check_labels(labels or {})}
        self.description = description
        self.metadata = dict(metadata or {})
        self.owner = owner
        self.created_at = time.time()
        self.started_at: float | None = None
        self.stopped_at: float | None = None
        self.last_active_at = self.created_at
        self._state = SandboxState.CREATED
        self._lock = threading.RLock()
        self._plan = compile_plan(self.spec, host.features(), self._state_dir)
        self._link: Link | None = None
        self._capabilities: SandboxCapabilities | None = None
        self._running: weakref.WeakSet[Process] = weakref.WeakSet()
        self._detached: dict[str, DetachedCommand] = {}
        self._file_server = FileServer()
        self._layers = Layers()
        self._binds = {}
        self._pid = os.getpid()

    @classmethod
    def create(cls, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Make one and start it."""
        sandbox = cls(spec, **about)
        sandbox.start()
        return sandbox

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, *, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Start one that has the files of a snapshot. What it writes is its own.

        spec: default that of the snapshot, with its environment and all; another one must have the same root
        and overlays, or :class:`SpecError`.
        """
        sandbox = cls._from(snapshot, spec=snapshot.fitting(spec), **about)
        sandbox.start()
        return sandbox

    @classmethod
    def _from(cls, snapshot: Snapshot, **about: Any) -> Self:
        """One that begins with a snapshot; not started."""
        sandbox = cls(**about)
        sandbox._layers = Layers(snapshot.layers)
        return sandbox

    def fork(self, n: int = 1) -> list[Self]:
        """Start ``n`` others that have the files of this one as they are now, and its spec; processes and
        what is in ``/tmp`` stay behind. All of them, or none. Raises what :meth:`snapshot` does."""
        return self._forked(n, self._begun)

    def _forked(self, n: int, begin: Callable[[Snapshot], Self]) -> list[Self]:
        children: list[Self] = []
        with self._moment() as snapshot:
            try:
                for _ in range(n):
                    children.append(begin(snapshot))
            except BaseException:
                for child in children:
                    child.destroy()
                raise
        self._note(EventKind.SANDBOX_FORKED, children=[child.id for child in children])
        return children

    def _begun(self, snapshot: Snapshot) -> Self:
        child = self._from(snapshot, spec=snapshot.fitting(None))
        child._room = self._room
        child.start()
        return child

    # --- states ---------------------------------------------------------------------------------

    @property
    def state(self) -> SandboxState:
        """A :class:`SandboxState`. One that was killed from outside is stopped."""
        with self._lock:
            if self._link is not None and not self._link.alive():
                self._end(SandboxState.STOPPED, reason="died")
            return self._state

    @property
    def pid(self) -> int:
        """The number of its init, as this process sees it; 0 when it does not run."""
        with self._lock:
            return 0 if self._link is None else pid_of(self._link.pidfd)

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds that its last start by this handle took, by phase: plan, group, spawn, setup, total; see
        :func:`sandboxcore.lifecycle.create_timings`. Empty if there was none."""
        return self._timings

    def start(self) -> None:
        """Start it, also again after :meth:`stop`; then everything private in it is new and empty."""
        with self._lock:
            self._may_start()
            self._started(self._begin(None))

    def _may_start(self) -> None:
        self._began = time.monotonic_ns()
        check_move(self.name, self.state, SandboxState.RUNNING, "start")
        if self._state is SandboxState.PAUSED:
            raise InvalidTransition(self.name, "paused", "start; resume it")
        self._plan = compile_plan(self.spec, host.features(), self._state_dir)

    def _started(self, link: Link) -> None:
        self._link = link
        self._state = SandboxState.RUNNING
        self.started_at = self.last_active_at = time.time()
        self.stopped_at = None
        self._note_start(link)

    def _note_start(self, link: Link) -> None:
        self._timings = create_timings(self._began, link.moments, time.monotonic_ns())
        if self._observers:
            self._note(EventKind.SANDBOX_STARTED, pid=pid_of(link.pidfd), timings=dict(self._timings))

    def _begin(self, home: Home | None) -> Link:
        def action(connection: Spawner) -> Link:
            try:
                return self._asked(connection, home).wait(self.start_timeout)
            except SandboxError:
                raise
            except OSError as error:
                code = error.errno or 0
                stage = "spawner" if code in (E.EPIPE, E.ECONNRESET) else "host"
                raise _native.NativeFailure.of(stage, 11, code) from error

        return with_spawner(self._plan, None, action)

    def _asked(self, connection: Spawner, home: Home | None) -> Birth:
        layers = self._layers.begin(connection)
        return Birth.send(self._plan, connection, self.id, home, layers=layers, room=self._room)

    def suspend(self) -> None:
        """Stop every process in it, all at once, until :meth:`resume`: by the freezer of its control group,
        or SIGSTOP where it has none. No limit of time counts meanwhile."""
        with self._lock:
            check_move(self.name, self.state, SandboxState.PAUSED, "suspend")
            self._through(Link.freeze)
            self._state = SandboxState.PAUSED
            self._note(EventKind.SANDBOX_SUSPENDED)

    def resume(self) -> None:
        """Let it go on after :meth:`suspend`."""
        with self._lock:
            if self.state is not SandboxState.PAUSED:
                raise InvalidTransition(self.name, self._state.value, "resume")
            self._through(Link.thaw)
            self._state = SandboxState.RUNNING
            self._note(EventKind.SANDBOX_RESUMED)

    def stop(self) -> None:
        """Kill everything in it, wait until it is gone. What is private in it is lost; it can start again."""
        with self._lock:
            check_move(self.name, self.state, SandboxState.STOPPED, "stop")
            self._end(SandboxState.STOPPED, wait=ANSWER_PATIENCE)

    def close(self) -> None:
        """End it for good. Waits for commands that run, at most 5 s, and for nothing if there are none.
        Idempotent."""
        with self._lock:
            if self._state is not SandboxState.DESTROYED:
                busy = any(process.returncode is None for process in list(self._running))
                busy = busy or any(command.returncode is None for command in self._detached.values())
                busy = busy or bool(self._plan.volumes)  # which somebody else may wait for
                self._end(SandboxState.DESTROYED, wait=ANSWER_PATIENCE if busy else 0)

    def destroy(self) -> None:
        """The same as :meth:`close`."""
        self.close()

    def _end(self, state: SandboxState, *, wait: float = 0, reason: str = "asked") -> None:
        self._file_server.close()
        self._layers.end()
        self._binds.clear()
        link, self._link = self._link, None
        was, self._state = self._state, state
        self.stopped_at = self.stopped_at or time.time()
        for command in list(self._detached.values()):  # not left to a collector, which takes the socket first
            command._door.close()
        if os.getpid() != self._pid:  # a forked child: the sandbox is its parent's
            if link is not None:
                link.close()
            return
        try:
            if link is not None:
                link.end(wait=wait)
        finally:
            self._note_end_of(was, reason)

    def _note_end_of(self, was: SandboxState, reason: str) -> None:
        """It has left a state for stopped or destroyed, and its detached commands have ended."""
        if not self._observers:
            return
        self._settle(lambda command_id: self.command(command_id).result)
        if self._state is not was:
            gone = self._state is SandboxState.DESTROYED
            kind = EventKind.SANDBOX_DESTROYED if gone else EventKind.SANDBOX_STOPPED
            self._note(kind, was=was.value, reason=reason)

    def __enter__(self) -> Self:
        if self.state is SandboxState.CREATED:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_link", None) is not None:
            with contextlib.suppress(Exception):
                self._end(SandboxState.DESTROYED, reason="forgotten")

    def __repr__(self) -> str:
        return f"<Sandbox {self.name} {self._state.value}>"

    @property
    def files(self) -> Files:
        """Its files: :class:`sandboxcore.files.Files`."""
        return Files(self, self._file_server)

    def detach(
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
        """Start a command that nobody needs to hold: it ends by itself, by its timeout, by :meth:`kill
        <DetachedCommand.kill>`, or with the sandbox.

        As for :meth:`popen`, and:

        stdin: DEVNULL (default), or PIPE: somebody may write to it by :meth:`DetachedCommand.input`.
        keep: the last so many bytes of stdout and of stderr are kept; default 1 MiB.
        """
        link = self._ready("detach")
        request, kept = self._kept(
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
        command, later = self._new_command(request, kept, pty=bool(pty))
        try:
            with self._watching(command):
                ending = self._released(link, request, command, later)
                ending.await_start(START_PATIENCE)
                ending.close()
        except BaseException:
            self._forget_command(command)
            raise
        return command

    def _kept(
        self,
        argv: Sequence[Program],
        *,
        stdin: File,
        pty: bool | tuple[int, int],
        keep: int | str,
        timeout: float | None,
        user: int | str | None,
        limits: Limits | None,
        **options: Any,
    ) -> tuple[Request, int]:
        """The request of :meth:`detach`, and how many bytes of each stream to keep."""
        flags, size = ["DETACHED"], (24, 80)
        if pty:
            flags, size = [*flags, "PTY"], pty if isinstance(pty, tuple) else size
        elif stdin == PIPE:
            flags.append("KEEP_STDIN")
        elif stdin not in (None, DEVNULL):
            raise ValueError("stdin is DEVNULL or PIPE: whoever holds another file may be gone first")
        kept = parse_size(keep, "keep")
        if not 4096 <= kept <= 1 << 30:
            raise SpecError(f"keep: {keep!r} is not between 4K and 1G")
        seconds = self._deadline(timeout, self._bounds(limits))
        extras = self._extras(user, limits, flags=tuple(flags), timeout=seconds, size=size)
        null, log = _native.constant("STDIO_NULL"), _native.constant("STDIO_LOG")
        request = Request(self._plan, argv, pass_fds=(), stdio=(null, log, log), extras=extras, **options)
        return request, kept

    def _released(
        self, link: Link, request: Request, command: DetachedCommand, later: socket.socket
    ) -> Ending:
        """A detached command that was asked for, until it has started."""
        with later:
            fds = [later.fileno(), command._journal.fd]
            return Ending(self._plan, request, self._submit(link, request, fds))

    def _new_command(
        self, request: Request, keep: int, *, pty: bool, wait: bool = True
    ) -> tuple[DetachedCommand, socket.socket]:
        """A command on record that is yet to start, and the socket by which its launcher will hear. Raises
        BlockingIOError with ``wait=False`` where it would have to wait for another process."""
        journal = Journal.create(None, keep)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        door, now = PrivateDoor(ours), time.time()
        command = DetachedCommand(
            new_id("cmd"), request.args, self._plan, journal, door, pty=pty, started_at=now
        )
        self._detached[command.id] = command.again()  # whoever has the other may close it
        return command, theirs

    def _watching(self, command: DetachedCommand) -> Unwatched:
        """A detached command that is about to start."""
        about = {"command": command.id, "detached": True, "pty": command.pty}
        command._watch = self._watched(command.args, _native.Streams(), **about)
        self._keep_watch(command.id, command._watch)
        if (ours := self._detached.get(command.id)) is not None:
            ours._watch = command._watch
        return command._watch

    def _forget_command(self, command: DetachedCommand) -> None:
        if (ours := self._detached.pop(command.id, None)) is not None:
            ours.close()
        command._forget()

    def forget(self, command_id: str) -> None:
        """Remove an ended detached command with its journal. Raises :class:`SandboxNotFound`, and
        :class:`InvalidTransition` while it runs."""
        command = self.command(command_id)
        if command.returncode is None:
            command.close()
            raise InvalidTransition(command_id, "running", "forget a command")
        self._forget_command(command)

    def commands(self) -> list[DetachedCommand]:
        """The detached commands, oldest first, ended ones too."""
        return [command.again() for command in list(self._detached.values())]

    def command(self, command_id: str) -> DetachedCommand:
        """A detached command by its id. Raises :class:`SandboxNotFound`."""
        for command in self.commands():
            if command.id == command_id:
                return command
        raise SandboxNotFound(f"no command {command_id!r} in sandbox {self.name}")

    def signal(self, number: int) -> None:
        """Send a signal to every process of every command. After SIGKILL it is empty, and still runs."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            raise ValueError("use suspend() and resume()")
        self._ready("signal")
        self._tell(number)

    @property
    def capabilities(self) -> SandboxCapabilities:
        """What was applied, read back from the kernel by a command that does everything but the exec."""
        if self._capabilities is None:
            self._capabilities = self._seen(*self._dry_run())
        return self._capabilities

    def _dry_run(self) -> tuple[Request, _native.Streams, _native.NativeResult]:
        link = self._ready("look")
        request, streams = self._looking()
        try:
            with link:
                done = _native.run(link.work.fileno(), request.data, streams, 10, (), sandbox=link.pidfd)
        except _native.NativeFailure as failure:
            raise self._rendered(request, failure, link) from None
        return request, streams, done

    def _looking(self) -> tuple[Request, _native.Streams]:
        extras = self._extras(None, None, flags=("DRY",))
        streams, stdio = make_streams(self._plan, None, (None, DEVNULL, DEVNULL), None)
        request = Request(
            self._plan,
            ["/"],
            cwd=None,
            env=None,
            files=None,
            pass_fds=(),
            stdio=stdio,
            record=True,
            extras=extras,
        )
        return request, streams

    def _seen(
        self, request: Request, streams: _native.Streams, done: _native.NativeResult
    ) -> SandboxCapabilities:
        done.group_limits = self._group_limits()
        result = make_result(self._plan, request.args, streams, done, Decoder(False, None, None))
        if result.capabilities is None:
            raise SandboxTimeout(result)
        return result.capabilities
