"""Running commands in a sandbox that stays: what every kind of it has in common."""

import contextlib
import errno as E
import os
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sandboxcore import _native
from sandboxcore.command import Ending, Process
from sandboxcore.errors import (
    InvalidTransition,
    ProgramNotFound,
    SandboxGone,
    SetupError,
    UnsupportedHost,
)
from sandboxcore.groups import limits_of
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE, Link
from sandboxcore.observers import Observed
from sandboxcore.pipes import Pipes, check_buffering
from sandboxcore.plan import Plan, command_limits, tightened
from sandboxcore.process import render
from sandboxcore.request import (
    DEVNULL,
    PIPE,
    PLAIN,
    Extras,
    File,
    FileContent,
    Program,
    Request,
    StrOrBytes,
    make_streams,
)
from sandboxcore.result import Decoder, ExecResult, make_result
from sandboxcore.spec import Limits, SandboxSpec, parse_user

Done = TypeVar("Done")

SHELLS = ("/bin/bash", "/bin/sh")
_RUNNING = SandboxState.RUNNING
USER_VARIABLES = ("TERM", "COLORTERM", "LANG")  # what a terminal is and speaks


class Execution(Observed):
    """The part of :class:`Sandbox` that starts commands. Needs a link, a plan and a state."""

    name: str
    spec: SandboxSpec
    last_active_at: float
    _state: SandboxState
    _lock: threading.RLock
    _pid: int
    _plan: Plan
    _link: Link | None
    _running: weakref.WeakSet[Process]

    @property
    def state(self) -> SandboxState:
        """A :class:`SandboxState`."""
        return self._state

    def _link_now(self) -> Link:
        if os.getpid() != self._pid:
            raise SandboxGone(f"sandbox {self.name}: it belongs to the process that this one was forked from")
        if self._link is None:
            raise SandboxGone(f"sandbox {self.name}: it is {self._state.value}")
        return self._link

    def _tell(self, number: int) -> None:
        """Have init send a signal to every command."""
        self._through(lambda link: link.tell_init(number))

    def _through(self, action: Callable[[Link], Done]) -> Done:
        """Do something with the link. Raises SandboxGone where init has ended."""
        link = self._link_now()
        try:
            return action(link)
        except (OSError, SetupError, _native.NativeFailure):
            if not self._is_gone(link):
                raise
            raise SandboxGone(f"sandbox {self.name}: its init has ended") from None

    def _ready(self, wanted: str) -> Link:
        """The link, if it takes commands now. Without the lock: whoever closes it next finds us its users."""
        if self._state is not _RUNNING:
            raise InvalidTransition(self.name, self._state.value, wanted)
        self.last_active_at = time.time()
        return self._link_now()

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
        extras = PLAIN
        if user is not None or limits is not None or executable is not None or umask is not None:
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
        with self._watched(request.args, streams) as watch:
            try:
                with link:
                    done = _native.run(
                        link.work.fileno(),
                        request.data,
                        streams,
                        seconds,
                        request.pass_fds,
                        sandbox=link.pidfd,
                        pause=link.pause,
                        kill_flood=self.spec.limits.output_action == "kill",
                    )
            except _native.NativeFailure as failure:
                raise self._rendered(request, failure, link) from None
            result = self._concluded(request, streams, done, Decoder(text, encoding, errors))
            watch.ended(result)
        if check:
            result.check_returncode()
        return result

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
    ) -> ExecResult:
        if done.applied:
            done.group_limits = self._group_limits()
        if done.status and (link := self._link) is not None:
            link.explain(done)
        result = make_result(self._plan, request.args, streams, done, decode, limits=request.limits)
        self.last_active_at = time.time()
        return result

    def _group_limits(self) -> dict[str, Any] | None:
        link = self._link
        return limits_of(link.group) if link is not None and link.group is not None else None

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
        process = Process(ending, pipes, text=text, encoding=encoding, errors=errors, bufsize=bufsize)
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
            with self._watched(request.args, pty=bool(pty)) as watch:
                sock = self._submit(link, request, pipes.theirs)
                ending = Ending(self._plan, request, sock, link, watch)
        except BaseException:
            pipes.close()
            raise
        pipes.sent()
        return ending, pipes

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
        # A socket whose other end has gone says ECONNREFUSED to the first who sends, ENOTCONN to the next.
        ends = (E.EPIPE, E.ECONNRESET, E.ECONNREFUSED, E.ENOTCONN, E.ETIME)
        if failure.errno in ends and self._is_gone(link):
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
            if ids != self._plan.ids and self._plan.host.mode == "rootless":
                raise UnsupportedHost(
                    f"user={user!r}",
                    "subordinate ids for this user: newuidmap and /etc/subuid, or run as root",
                )
        rlimits = command_limits(self._plan, limits) if limits else ()
        bounds = self._bounds(limits) if limits else None
        return Extras(ids=ids, rlimits=rlimits, limits=bounds, **more)

    def _bounds(self, limits: Limits | None) -> Limits:
        """The limits of a command: the sandbox's, some of them tighter. Raises SpecError."""
        return tightened(self.spec.limits, limits) if limits else self.spec.limits

    def _owner(self, ids: tuple[int, int] | None) -> tuple[int, int] | None:
        """The payload's ids outside, where they are not this process's own."""
        return self._plan.outside(ids) if ids else self._plan.owner

    @staticmethod
    def _deadline(timeout: float | None, limits: Limits) -> float | None:
        every = [seconds for seconds in (timeout, limits.wall_time) if seconds is not None]
        return max(0.0, min(every)) if every else None

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a command that is started without ``env=``."""
        return dict(self._plan.env)
