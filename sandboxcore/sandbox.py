"""A sandbox that stays: :class:`Sandbox`. Created once, then as many commands as one likes, each as cheap as
a fork and an exec."""

import contextlib
import errno as E
import os
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from sandboxcore import _native, host
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.command import Ending, Process
from sandboxcore.detached import DEFAULT_KEEP, DetachedCommand, PrivateDoor
from sandboxcore.errors import (
    InvalidTransition,
    ProgramNotFound,
    SandboxGone,
    SandboxNotFound,
    SandboxTimeout,
    SpecError,
    UnsupportedHost,
)
from sandboxcore.files import Files, FileServer
from sandboxcore.journal import Journal
from sandboxcore.lifecycle import SandboxState, check_move, new_id
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE, Birth, Home, Link, pid_of
from sandboxcore.pipes import Pipes, check_buffering
from sandboxcore.plan import command_limits, compile_plan, tightened
from sandboxcore.process import render, with_spawner
from sandboxcore.request import (
    DEVNULL,
    PIPE,
    Extras,
    File,
    FileContent,
    Program,
    Request,
    StrOrBytes,
    make_streams,
)
from sandboxcore.result import Decoder, ExecResult, make_result
from sandboxcore.spawner import Spawner
from sandboxcore.spec import Limits, SandboxSpec, parse_size, parse_user

SHELLS = ("/bin/bash", "/bin/sh")
USER_VARIABLES = ("TERM", "COLORTERM", "LANG")  # what a terminal is and speaks


class Sandbox:
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
        self.labels = {**self.spec.labels, **(labels or {})}
        self.description = description
        self.metadata = dict(metadata or {})
        self.owner = owner
        self.created_at = time.time()
        self.started_at: float | None = None
        self.stopped_at: float | None = None
        self.last_active_at = self.created_at
        self._state = SandboxState.CREATED
        self._lock = threading.RLock()
        self._plan = compile_plan(self.spec, host.features())
        self._link: Link | None = None
        self._capabilities: SandboxCapabilities | None = None
        self._running: weakref.WeakSet[Process] = weakref.WeakSet()
        self._detached: dict[str, DetachedCommand] = {}
        self._file_server = FileServer()
        self._pid = os.getpid()

    @classmethod
    def create(cls, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Make one and start it."""
        sandbox = cls(spec, **about)
        sandbox.start()
        return sandbox

    # --- states ---------------------------------------------------------------------------------

    @property
    def state(self) -> SandboxState:
        """A :class:`SandboxState`. One that was killed from outside is stopped."""
        with self._lock:
            if self._link is not None and not self._link.alive():
                self._end(SandboxState.STOPPED)
            return self._state

    @property
    def pid(self) -> int:
        """The number of its init, as this process sees it; 0 when it does not run."""
        with self._lock:
            return 0 if self._link is None else pid_of(self._link.pidfd)

    def start(self) -> None:
        """Start it, also again after :meth:`stop`; then everything private in it is new and empty."""
        with self._lock:
            self._may_start()
            self._started(self._begin(None))

    def _may_start(self) -> None:
        check_move(self.name, self.state, SandboxState.RUNNING, "start")
        if self._state is SandboxState.PAUSED:
            raise InvalidTransition(self.name, "paused", "start; resume it")
        self._plan = compile_plan(self.spec, host.features())

    def _started(self, link: Link) -> None:
        self._link = link
        self._state = SandboxState.RUNNING
        self.started_at = self.last_active_at = time.time()
        self.stopped_at = None

    def _begin(self, home: Home | None) -> Link:
        def action(connection: Spawner) -> Link:
            try:
                return Birth.send(self._plan, connection, home).wait()
            except OSError as error:
                code = error.errno or 0
                stage = "spawner" if code in (E.EPIPE, E.ECONNRESET) else "host"
                raise _native.NativeFailure.of(stage, 11, code) from error

        return with_spawner(self._plan, None, action)

    def suspend(self) -> None:
        """Stop every process in it (SIGSTOP, all at once) until :meth:`resume`."""
        with self._lock:
            check_move(self.name, self.state, SandboxState.PAUSED, "suspend")
            self._link_now().tell_init(signal.SIGSTOP)
            self._state = SandboxState.PAUSED

    def resume(self) -> None:
        """Let it go on after :meth:`suspend`."""
        with self._lock:
            if self.state is not SandboxState.PAUSED:
                raise InvalidTransition(self.name, self._state.value, "resume")
            self._link_now().tell_init(signal.SIGCONT)
            self._state = SandboxState.RUNNING

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
                self._end(SandboxState.DESTROYED, wait=ANSWER_PATIENCE if busy else 0)

    def destroy(self) -> None:
        """The same as :meth:`close`."""
        self.close()

    def _end(self, state: SandboxState, *, wait: float = 0) -> None:
        self._file_server.close()
        link, self._link = self._link, None
        self._state = state
        self.stopped_at = self.stopped_at or time.time()
        if link is not None:
            if os.getpid() == self._pid:
                link.kill(wait=wait)
            else:  # a forked child: the sandbox is its parent's
                link.close()

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
                self._end(SandboxState.DESTROYED)

    def __repr__(self) -> str:
        return f"<Sandbox {self.name} {self._state.value}>"

    def _link_now(self) -> Link:
        if os.getpid() != self._pid:
            raise SandboxGone(f"sandbox {self.name}: it belongs to the process that this one was forked from")
        if self._link is None:
            raise SandboxGone(f"sandbox {self.name}: it is {self._state.value}")
        return self._link

    def _ready(self, wanted: str) -> Link:
        """The link, if it takes commands now."""
        with self._lock:
            if self._state is not SandboxState.RUNNING:
                raise InvalidTransition(self.name, self._state.value, wanted)
            self.last_active_at = time.time()
            return self._link_now()

    @property
    def files(self) -> Files:
        """Its files: :class:`sandboxcore.files.Files`."""
        return Files(self, self._file_server)

    # --- commands -------------------------------------------------------------------------------

    def exec(
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
        """Run a command in the sandbox and wait until nothing of it is left; the sandbox stays.

        The parameters are those of :func:`sandboxcore.run`, and:

        user: uid or "uid:gid" inside, default the spec's. As an ordinary user without subordinate ids there
            is only one.
        limits: tighter than the sandbox's, for this command: cpu_time, wall_time, pids, open_files,
            file_size, output.
        executable: the program, where it is not the first of ``argv``.
        umask: default 0o022.

        A command is its process and everything below it. When the process ends, the rest is killed, also
        what daemonised; what should stay belongs to :meth:`popen` or :meth:`detach`.
        """
        link = self._ready("exec")
        extras = self._extras(user, limits, executable=executable, umask=umask)
        request, streams = self._captured(
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
        seconds = self._deadline(timeout, self._bounds(limits))
        try:
            with link:
                done = _native.run(
                    link.work.fileno(), request.data, streams, seconds, request.pass_fds, sandbox=link.pidfd
                )
        except _native.NativeFailure as failure:
            raise self._rendered(request, failure, link) from None
        return self._concluded(request, streams, done, Decoder(text, encoding, errors), check=check)

    def _captured(
        self,
        argv: Sequence[Program],
        *,
        input: StrOrBytes | None,
        stdio: tuple[File, File, File],
        encoding: str | None,
        limits: Limits | None,
        extras: Extras,
        **options: Any,
    ) -> tuple[Request, _native.Streams]:
        """The request of :meth:`exec`, and what is to be done with its streams."""
        owner, bounds = self._owner(extras.ids), self._bounds(limits)
        streams, words = make_streams(self._plan, input, stdio, encoding, owner=owner, limits=bounds)
        return Request(self._plan, argv, stdio=words, extras=extras, **options), streams

    def _concluded(
        self,
        request: Request,
        streams: _native.Streams,
        done: _native.NativeResult,
        decode: Decoder,
        *,
        check: bool,
    ) -> ExecResult:
        result = make_result(self._plan, request.args, streams, done, decode, limits=request.limits)
        self.last_active_at = time.time()
        if check:
            result.check_returncode()
        return result

    def shell(self, script: str, **options: Any) -> ExecResult:
        """:meth:`exec` of ``/bin/sh -c script``."""
        return self.exec(["/bin/sh", "-c", script], **options)

    def popen(
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
        text: bool = False,
        encoding: str | None = None,
        errors: str | None = None,
        bufsize: int = -1,
        files: Mapping[str, FileContent] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> Process:
        """Start a command and return when it runs.

        As for :meth:`exec`; PIPE makes a pipe whose other end is an attribute of the :class:`Process`;
        another file or descriptor is copied to and from by the sandbox's launcher, so the command never
        holds it. stdin is the null device unless told otherwise.

        pty: True or (rows, columns): the command gets a terminal of its own, as its controlling one;
            :class:`Process` has the other side as stdin and stdout.
        timeout: seconds; then the command and everything below it is killed, with cause ``timeout``.
        """
        bufsize = check_buffering(bufsize, text=text, encoding=encoding, errors=errors)
        seconds = self._deadline(timeout, self._bounds(limits))
        ending, pipes = self._launched(
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
        process = Process(
            ending, pipes, text=text, encoding=encoding, errors=errors, bufsize=bufsize, timeout=timeout
        )
        with self._lock:
            self._running.add(process)
        process._await_start(START_PATIENCE)
        return process

    def interact(
        self,
        argv: Sequence[Program] | None = None,
        *,
        stdin: int = 0,
        stdout: int = 1,
        timeout: float | None = None,
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        user: int | str | None = None,
        limits: Limits | None = None,
        files: Mapping[str, FileContent] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> ExecResult:
        """Let the user at our terminal work with a command in a terminal of its own, until it ends.

        As for :meth:`popen`; :func:`sandboxcore.terminal.attach` says what happens to our terminal. When
        that hangs up, and on every exception, the command is killed.

        argv: default a shell, /bin/bash or else /bin/sh.
        stdin, stdout: descriptors of our terminal.
        env: the whole environment; default the spec's, with our TERM, COLORTERM and LANG unless the spec
            has its own.

        Raises :class:`SpecError` where ``stdin`` is not a terminal.
        """
        from sandboxcore.terminal import attach, current_size

        size = current_size(stdin)
        if env is None:
            ours = {name: os.environ[name] for name in USER_VARIABLES if name in os.environ}
            env = {**self._plan.env, **ours, **self.spec.env}
        options: dict[str, Any] = {"timeout": timeout, "cwd": cwd, "env": env, "user": user}
        options |= {"limits": limits, "files": files, "pass_fds": pass_fds, "pty": size}
        for command in [argv] if argv is not None else [[shell] for shell in SHELLS]:
            try:
                process = self.popen(command, **options)
                break
            except ProgramNotFound:
                if argv is not None or command[0] == SHELLS[-1]:
                    raise
        try:
            attach(process, stdin=stdin, stdout=stdout)
        finally:
            process.kill()  # does nothing if it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ANSWER_PATIENCE)
            process.close()
            self.last_active_at = time.time()
        if process.result is None:
            raise TimeoutError("a process in uninterruptible sleep cannot be killed yet")
        return process.result

    def _launched(
        self,
        argv: Sequence[Program],
        *,
        stdio: tuple[File, File, File],
        pty: bool | tuple[int, int],
        user: int | str | None,
        limits: Limits | None,
        about: dict[str, Any],
        **options: Any,
    ) -> tuple[Ending, Pipes]:
        """A command that was asked for, and our ends of its pipes."""
        link = self._ready("popen")
        flags: tuple[str, ...] = ("NOTIFY",)
        size: tuple[int, int] = (24, 80)
        if pty:
            flags, size = ("NOTIFY", "PTY"), pty if isinstance(pty, tuple) else size
            stdio = (DEVNULL, DEVNULL, DEVNULL)
        extras = self._extras(user, limits, flags=flags, size=size, **about)
        pipes = Pipes(stdio, self._owner(extras.ids))
        try:
            request = Request(self._plan, argv, stdio=pipes.stdio, extras=extras, **options)
            ending = Ending(self._plan, request, self._submit(link, request, pipes.theirs))
        except BaseException:
            pipes.close()
            raise
        pipes.sent()
        return ending, pipes

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
        request = Request(
            self._plan,
            argv,
            cwd=cwd,
            env=env,
            files=files,
            pass_fds=(),
            stdio=(null, log, log),
            extras=extras,
        )
        command, later = self._new_command(request, kept, pty=bool(pty))
        try:
            with later:
                fds = [later.fileno(), command._journal.fd]
                ending = Ending(self._plan, request, self._submit(link, request, fds))
            ending.await_start(START_PATIENCE)
            ending.close()
        except BaseException:
            self._forget_command(command)
            raise
        return command

    def _new_command(
        self, request: Request, keep: int, *, pty: bool
    ) -> tuple[DetachedCommand, socket.socket]:
        """A command on record that is yet to start, and the socket by which its launcher will hear."""
        journal = Journal.create(None, keep)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        door, now = PrivateDoor(ours), time.time()
        command = DetachedCommand(
            new_id("cmd"), request.args, self._plan, journal, door, pty=pty, started_at=now
        )
        self._detached[command.id] = command.again()  # whoever has the other may close it
        return command, theirs

    def _forget_command(self, command: DetachedCommand) -> None:
        if (ours := self._detached.pop(command.id, None)) is not None:
            ours.close()
        command._forget()

    def commands(self) -> list[DetachedCommand]:
        """The detached commands, oldest first, ended ones too."""
        return [command.again() for command in list(self._detached.values())]

    def command(self, command_id: str) -> DetachedCommand:
        """A detached command by its id. Raises :class:`SandboxNotFound`."""
        for command in self.commands():
            if command.id == command_id:
                return command
        raise SandboxNotFound(f"no command {command_id!r} in sandbox {self.name}")

    def _submit(self, link: Link, request: Request, fds: Sequence[int]) -> socket.socket:
        """Send a request to the launchers; returns the command's socket."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                with link:
                    everything = [theirs.fileno(), *fds, *request.pass_fds]
                    _native.send(link.work.fileno(), "EXEC", request.data, everything)
            except (OSError, _native.NativeFailure) as error:
                ours.close()
                failure = _native.NativeFailure.of("launcher", 11, error.errno or 0)
                raise self._rendered(request, failure, link) from None
        return ours

    def _rendered(
        self, request: Request | None, failure: _native.NativeFailure, link: Link | None = None
    ) -> Exception:
        """The exception for a failure, which may be that the sandbox is no more; ``link``: the one that was
        used, for somebody may have started it again meanwhile."""
        if failure.errno in (E.EPIPE, E.ECONNRESET, E.ECONNREFUSED, E.ETIME) and self._is_gone(link):
            return SandboxGone(f"sandbox {self.name}: its init has ended")
        return render(self._plan, request, failure)

    def _is_gone(self, link: Link | None) -> bool:
        """Whether init has ended. Its sockets are closed a moment before that shows."""
        if link is not None:
            try:
                with link:
                    return not link.alive(patience=1.0)
            except _native.NativeFailure:  # closed by somebody who ended it
                return True
        with self._lock:
            if self._link is not None:
                self._link.alive(patience=1.0)
            return self.state is not SandboxState.RUNNING

    def _extras(self, user: int | str | None, limits: Limits | None, **more: Any) -> Extras:
        ids = None
        if user is not None:
            ids = parse_user(user, "user")
            if ids != self.spec.ids() and self._plan.host.mode == "rootless":
                raise UnsupportedHost(
                    f"user={user!r}",
                    "subordinate ids for this user: newuidmap and /etc/subuid, or run as root",
                )
        rlimits = command_limits(self._plan, limits) if limits else ()
        return Extras(ids=ids, rlimits=rlimits, limits=self._bounds(limits), **more)

    def _bounds(self, limits: Limits | None) -> Limits:
        """The limits of a command: the sandbox's, some of them tighter. Raises SpecError."""
        return tightened(self.spec.limits, limits) if limits else self.spec.limits

    def _owner(self, ids: tuple[int, int] | None) -> tuple[int, int] | None:
        """The payload's ids outside, where they are not this process's own."""
        return self._plan.outside(ids or self.spec.ids())

    @staticmethod
    def _deadline(timeout: float | None, limits: Limits) -> float | None:
        every = [seconds for seconds in (timeout, limits.wall_time) if seconds is not None]
        return max(0.0, min(every)) if every else None

    def signal(self, number: int) -> None:
        """Send a signal to every process of every command. After SIGKILL it is empty, and still runs."""
        if number in (signal.SIGSTOP, signal.SIGCONT):
            raise ValueError("use suspend() and resume()")
        self._ready("signal").tell_init(number)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a command that is started without ``env=``."""
        return dict(self._plan.env)

    @property
    def capabilities(self) -> SandboxCapabilities:
        """What was applied, read back from the kernel by a command that does everything but the exec."""
        if self._capabilities is None:
            link = self._ready("look")
            request, streams = self._looking()
            try:
                with link:
                    done = _native.run(link.work.fileno(), request.data, streams, 10, (), sandbox=link.pidfd)
            except _native.NativeFailure as failure:
                raise self._rendered(request, failure, link) from None
            self._capabilities = self._seen(request, streams, done)
        return self._capabilities

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
        result = make_result(self._plan, request.args, streams, done, Decoder(False, None, None))
        if result.capabilities is None:
            raise SandboxTimeout(result)
        return result.capabilities
