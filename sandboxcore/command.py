"""A command that runs in a living sandbox: :class:`Process`, for those who know :class:`subprocess.Popen`."""

import contextlib
import errno
import io
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Literal, Self

from sandboxcore import _native
from sandboxcore.identity import pid_of
from sandboxcore.link import Link
from sandboxcore.observers import UNWATCHED, Unwatched
from sandboxcore.pipes import Exchange, Outputs, Pipes, Terminal, close_quietly, poll_once
from sandboxcore.plan import Plan
from sandboxcore.process import render
from sandboxcore.request import Request, StrOrBytes
from sandboxcore.result import Decoder, ExecResult, make_result

Scope = Literal["process", "group", "tree"]


@dataclass(frozen=True, slots=True)
class Stdout:
    """A piece of standard output. ``offset`` is where it begins in the stream, in bytes."""

    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Stderr:
    """A piece of standard error. ``offset`` is where it begins in the stream, in bytes."""

    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of the command and of everything below it."""

    result: ExecResult


Event = Stdout | Stderr | Exit


class Ending:
    """Listens on a command's socket and knows how it ended: what sync and async processes share.

    The socket is the command's life: closing it kills the command and everything below it.
    """

    def __init__(
        self,
        plan: Plan,
        request: Request,
        sock: socket.socket,
        link: Link | None = None,
        watch: Unwatched = UNWATCHED,
    ) -> None:
        self.plan, self.request, self.sock, self.link, self.watch = plan, request, sock, link, watch
        self.began = time.monotonic_ns()
        self.result: ExecResult | None = None
        self.started = False
        self.pidfd = -1
        self.pid_inside = 0
        self.master = -1
        self._applied = b""
        self._pid = os.getpid()

    def hear(self) -> bool:
        """Take one record. Returns whether the command has ended. Raises BlockingIOError, SetupError."""
        if self.result is not None:
            return True
        self._check_owner()
        try:  # closed by us: killed by that
            record = _native.receive(self.sock.fileno()) if self.sock.fileno() >= 0 else None
        except ConnectionResetError:  # it left without reading our last signal; what it said is there still
            record = self._last_words()
        if record is None:
            self._finish(None)
        elif record.error is not None:
            error = render(self.plan, self.request, record.error)
            self.watch.failed(error)
            self.close()
            raise error
        elif record.kind == "APPLIED":
            self._applied += record.text
        elif record.kind == "LENT":
            self.master = record.fd
        elif record.kind == "STARTED":
            self.started, self.pidfd, self.pid_inside = True, record.fd, record.pid
        elif record.kind == "EXIT":
            self._finish(record)
        return self.result is not None

    def _last_words(self) -> _native.Record | None:
        try:
            return _native.receive(self.sock.fileno())
        except (BlockingIOError, ConnectionResetError):
            return None

    @property
    def foreign(self) -> bool:
        """Whether this is the copy of a forked child."""
        return os.getpid() != self._pid

    def _check_owner(self) -> None:
        if self.foreign:
            raise ChildProcessError(
                errno.ECHILD, "the command belongs to the process that this one was forked from"
            )

    def await_start(self, patience: float) -> None:
        """Block until the program runs. Raises what kept it from that; then it is killed."""
        try:
            poller = select.poll()
            poller.register(self.sock, select.POLLIN)
            deadline = time.monotonic() + patience
            while not self.started and self.result is None:
                left = deadline - time.monotonic()
                if left <= 0 or not poller.poll(left * 1000):
                    raise TimeoutError(f"{self.request.args[0]!r} did not start within {patience} s")
                with contextlib.suppress(BlockingIOError):
                    self.hear()
        except BaseException as error:
            self.watch.failed(error)
            self.close()
            raise

    def _finish(self, record: _native.Record | None) -> None:
        """An end without a record: its launcher was killed, so it was, too."""
        now = time.monotonic_ns()
        if record is None:
            done = _native.lost_result(self.began, now)
        else:
            done = _native.ended_result(record, self.began, now, self._applied)
        bounds = self.request.limits
        if self.link is not None:
            self.link.explain(done)
            bounds = bounds or self.link.limits_now(self.plan.spec.limits, done)
        streams, decode = _native.Streams(capture=()), Decoder(False, None, None)
        result = make_result(self.plan, self.request.args, streams, done, decode, limits=bounds)
        self.result = result
        self.watch.ended(result)
        self.sock.close()  # as with Popen, nothing but pipes stays open behind the end
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def signal(self, number: int, scope: Scope) -> None:
        """Send a signal, unless it has ended."""
        self._check_owner()
        if self.result is None and self.sock.fileno() >= 0:
            scopes = {"process": "PROCESS", "group": "GROUP", "tree": "TREE"}
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                flags = _native.constant(f"SCOPE_{scopes[scope]}")
                _native.send(self.sock.fileno(), "SIGNAL", flags=flags, signal=number)

    def host_pid(self) -> int:
        """The number by which this process knows the command, or 0 when it is gone: proc(5), fdinfo."""
        return pid_of(self.pidfd)

    def close(self) -> None:
        """Let go. Kills the command if it still runs. Idempotent."""
        if not self.foreign:
            self.watch.let_go()
        if self.sock.fileno() >= 0 and not self.foreign:
            with contextlib.suppress(OSError):  # a thread that waits in poll(2) would keep it open: wake it
                self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        for fd in (self.pidfd, self.master):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.master = -1


class Process:
    """A running command. Made by :meth:`Sandbox.popen`; the interface is that of :class:`subprocess.Popen`.

    When the process ends, everything below it is killed, and then it is reported; a handle that is closed,
    or forgotten, kills it. :meth:`wait` blocks on the kernel, it does not poll.

    args: the command line as given.
    stdin, stdout, stderr: our ends of its pipes, where PIPE was asked for; with ``pty=``, stdin and stdout
        are the same :class:`Terminal`.
    returncode: None while it runs, then its exit status, or -N when signal N ended it.
    result: None while it runs, then an :class:`ExecResult` (without the streams, which you read).
    """

    def __init__(
        self,
        ending: Ending,
        pipes: Pipes,
        *,
        text: bool,
        encoding: str | None,
        errors: str | None,
        bufsize: int,
    ) -> None:
        self.args = ending.request.args
        self._ending = ending
        self._lock = threading.RLock()
        self._text = text or encoding is not None or errors is not None
        self._encoding, self._errors = encoding or "utf-8", errors or "strict"
        self._bufsize = bufsize
        self.stdin: Any = self._open(pipes.ours[0], "wb")
        self.stdout: Any = self._open(pipes.ours[1], "rb")
        self.stderr: Any = self._open(pipes.ours[2], "rb")
        self._offsets = {1: 0, 2: 0}

    def _open(self, fd: int | None, mode: str) -> IO[Any] | None:
        if fd is None:
            return None
        line = self._text and self._bufsize == 1
        raw = open(fd, mode, -1 if line else self._bufsize)  # noqa: SIM115 - closed with the process
        if not self._text:
            return raw
        return io.TextIOWrapper(raw, self._encoding, self._errors, write_through=True, line_buffering=line)

    def _await_start(self, patience: float) -> None:
        """Return when the program runs. Raises what kept it from that."""
        try:
            self._ending.await_start(patience)
        except BaseException:
            self.close()
            raise
        if self._ending.master >= 0:
            terminal = Terminal(self._ending.master)
            self._ending.master = -1
            self.stdin = self.stdout = terminal

    # --- the end --------------------------------------------------------------------------------

    @property
    def result(self) -> ExecResult | None:
        """What it did, once it has ended."""
        return self._ending.result

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return None if self.result is None else self.result.returncode

    @property
    def pid(self) -> int:
        """Its number outside, as this process sees it; 0 when it has ended."""
        return 0 if self._ending.pidfd < 0 else self._ending.host_pid()

    @property
    def pid_inside(self) -> int:
        """Its number inside the sandbox."""
        return self._ending.pid_inside

    def fileno(self) -> int:
        """A descriptor that is readable when it has ended, for selectors. Raises ValueError after that."""
        number = self._ending.sock.fileno()
        if number < 0:
            raise ValueError("the command has ended")
        return number

    def poll(self) -> int | None:
        """Its return code if it has ended, else None."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while not self._ending.hear():
                pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command and everything below it; returns its return code.

        Raises :class:`subprocess.TimeoutExpired` after ``timeout`` seconds; it runs on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not self._readable(left) and left is not None and time.monotonic() >= (deadline or 0):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return code

    def _readable(self, seconds: float | None) -> bool:
        with self._lock:  # a copy: another thread may hear the end, and the number be somebody else's then
            if self._ending.sock.fileno() < 0:
                return True
            number = os.dup(self._ending.sock.fileno())
        try:
            poller = select.poll()
            poller.register(number, select.POLLIN)
            return bool(poller.poll(None if seconds is None else seconds * 1000 + 1))
        finally:
            os.close(number)

    # --- signals --------------------------------------------------------------------------------

    def send_signal(self, number: int, scope: Scope = "process") -> None:
        """Send a signal to the process, to its process group, or to everything below it ("tree"). Does
        nothing once it has ended."""
        if self.poll() is None:
            self._ending.signal(number, scope)

    def terminate(self) -> None:
        """SIGTERM to the process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and everything below it."""
        self.send_signal(signal.SIGKILL, "tree")

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size. Raises ValueError without ``pty=``."""
        if not isinstance(self.stdout, Terminal):
            raise ValueError("the command has no terminal")
        self.stdout.resize(rows, columns)

    # --- streams --------------------------------------------------------------------------------

    def communicate(self, input: StrOrBytes | None = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Feed stdin, read stdout and stderr to their ends, wait. Returns both, None for what is no pipe.

        With ``pty=``, end-of-file is typed after the input (Ctrl-D), and everything is stdout.
        Raises :class:`subprocess.TimeoutExpired` after ``timeout`` seconds, with what was read so far; call
        it again to go on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if not hasattr(self, "_exchange"):
            data = input.encode(self._encoding) if isinstance(input, str) else input
            self._exchange = Exchange(self, data)
        elif input is not None:
            raise ValueError("Cannot send input after starting communication")
        if not self._exchange.run(deadline):
            outputs = self._exchange.outputs()
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0, outputs[0], outputs[1])
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        self.wait(left)
        return tuple(self._decoded(data) for data in self._exchange.outputs())  # type: ignore[return-value]

    def _decoded(self, data: bytes | None) -> StrOrBytes | None:
        if data is None or not self._text:
            return data
        return data.decode(self._encoding, self._errors).replace("\r\n", "\n").replace("\r", "\n")

    def __iter__(self) -> Iterator[Event]:
        """Pieces of output as they come, and the end. Nothing is read ahead: who reads slowly slows it."""
        with Outputs(self) as outputs:
            while not outputs.done:
                for number, data in outputs.take(poll_once(outputs.wanted(), outputs.patience)):
                    offset = self._offsets[number]
                    self._offsets[number] += len(data)
                    yield (Stderr if number == 2 else Stdout)(data, offset)
        self.wait()
        if self.result is not None:
            yield Exit(self.result)

    # --- letting go -----------------------------------------------------------------------------

    def close(self) -> None:
        """Kill it if it still runs, and close all pipes. What stdin still holds here is lost. Idempotent."""
        with self._lock:
            self._ending.close()
            if self.stdin is not None and not self.stdin.closed and not self._ending.foreign:
                os.set_blocking(self.stdin.fileno(), False)  # nobody may be there to read the rest
            self._close_streams()

    def _close_streams(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As with Popen: close the pipes and wait. After an exception, kill it first."""
        if self._ending.foreign:
            self.close()
            return
        if kind is not None:
            self.kill()
            close_quietly(self.stdin)
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        try:
            if self.stdin is not None:
                self.stdin.close()  # raises when what it buffered finds no reader
        finally:
            self.wait()
            self.close()

    def __del__(self) -> None:
        if hasattr(self, "stderr"):
            self.close()

    def __repr__(self) -> str:
        return f"<Process: returncode: {self.returncode} args: {list(self.args)!r}>"
