"""A command that runs in a living sandbox: :class:`Process`, for those who know :class:`subprocess.Popen`."""

import contextlib
import io
import os
import select
import selectors
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
from sandboxcore.link import pid_of
from sandboxcore.plan import Plan
from sandboxcore.process import render
from sandboxcore.request import DEVNULL, PIPE, STDOUT, File, Request, StrOrBytes
from sandboxcore.result import Decoder, ExecResult, make_result

Scope = Literal["process", "group", "tree"]
CHUNK = 65536


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


class Pipes:
    """The streams of a command that is about to start: our ends, theirs, and the request's words for them."""

    def __init__(self, files: tuple[File, File, File], owner: tuple[int, int] | None) -> None:
        self.ours: list[int | None] = [None, None, None]
        self.theirs: list[int] = []  # in the order in which the request takes them
        self.stdio: tuple[int, int, int]
        self._made: list[int] = []
        words = []
        try:
            for number, file in enumerate(files):
                words.append(_native.constant(f"STDIO_{self._add(number, file, owner)}"))
        except BaseException:
            self.close()
            raise
        self.stdio = (words[0], words[1], words[2])

    def _add(self, number: int, file: File, owner: tuple[int, int] | None) -> str:
        if file == STDOUT:
            if number != 2:
                raise ValueError("STDOUT can only be used for stderr")
            return "STDOUT"
        if file == DEVNULL:
            return "NULL"
        if file == PIPE:
            read, write = os.pipe2(os.O_CLOEXEC)
            self._made += [read, write]
            self.ours[number], theirs = (write, read) if number == 0 else (read, write)
            if owner:
                os.fchown(read, *owner)  # so that /dev/stdout can be opened again inside
            self.theirs.append(theirs)
            return "PASSED"
        target = number if file is None else file if isinstance(file, int) else file.fileno()
        try:
            os.fstat(target)
        except OSError:
            if file is None:  # closed here, so there
                return "NULL"
            raise
        self.theirs.append(target)
        return "RELAY"

    def sent(self) -> None:
        """The other side has its ends now: close our copies of them."""
        ours = {fd for fd in self.ours if fd is not None}
        for fd in self._made:
            if fd not in ours:
                os.close(fd)
        self._made.clear()

    def close(self) -> None:
        """Close everything that was made here."""
        for fd in self._made or [fd for fd in self.ours if fd is not None]:
            os.close(fd)
        self._made.clear()
        self.ours = [None, None, None]


class Terminal(io.RawIOBase):
    """Our side of a command's terminal: raw bytes, both ways. End-of-file when the command has left it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor of the terminal's master side."""
        if self._fd < 0:
            raise ValueError("I/O operation on closed file")
        return self._fd

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        try:
            data = os.read(self.fileno(), len(buffer))
        except BlockingIOError:
            return None
        except OSError:  # EIO: nobody has it open any more
            return 0
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int | None:
        try:
            return os.write(self.fileno(), data)
        except BlockingIOError:
            return None

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size; its foreground job gets SIGWINCH."""
        import termios

        termios.tcsetwinsize(self.fileno(), (rows, columns))

    def close(self) -> None:
        """Hang up: the session gets SIGHUP."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        super().close()


class Ending:
    """Listens on a command's socket and knows how it ended: what sync and async processes share.

    The socket is the command's life: closing it kills the command and everything below it.
    """

    def __init__(self, plan: Plan, request: Request, sock: socket.socket) -> None:
        self.plan, self.request, self.sock = plan, request, sock
        self.began = time.monotonic_ns()
        self.result: ExecResult | None = None
        self.started = False
        self.pidfd = -1
        self.pid_inside = 0
        self.master = -1
        self._applied = b""

    def hear(self) -> bool:
        """Take one record. Returns whether the command has ended. Raises BlockingIOError, SetupError."""
        if self.result is not None:
            return True
        try:
            record = _native.receive(self.sock.fileno())
        except ConnectionResetError:
            record = None
        if record is None:
            self._finish(None)
        elif record.error is not None:
            self.close()
            raise render(self.plan, self.request, record.error)
        elif record.kind == "APPLIED":
            self._applied += record.text
        elif record.kind == "LENT":
            self.master = record.fd
        elif record.kind == "STARTED":
            self.started, self.pidfd, self.pid_inside = True, record.fd, record.pid
        elif record.kind == "EXIT":
            self._finish(record)
        return self.result is not None

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
        except BaseException:
            self.close()
            raise

    def _finish(self, record: _native.Record | None) -> None:
        """An end without a record: its launcher was killed, so it was, too."""
        now = time.monotonic_ns()
        if record is None:
            done = _native.lost_result(self.began, now)
        else:
            done = _native.ended_result(record, self.began, now, self._applied)
        streams = _native.Streams(capture=())
        result = make_result(self.plan, self.request.args, streams, done, Decoder(False, None, None))
        self.result = result
        self.sock.close()

    def signal(self, number: int, scope: Scope) -> None:
        """Send a signal, unless it has ended."""
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
        timeout: float | None,
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
        raw = open(fd, mode, self._bufsize)  # noqa: SIM115 - closed with the process
        if not self._text:
            return raw
        line = self._bufsize == 1 and mode == "wb"
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
        number = self._ending.sock.fileno()
        if number < 0:
            return True
        poller = select.poll()
        poller.register(number, select.POLLIN)
        return bool(poller.poll(None if seconds is None else seconds * 1000 + 1))

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
        with selectors.DefaultSelector() as selector:
            for number, kind, stream in ((1, Stdout, self.stdout), (2, Stderr, self.stderr)):
                if stream is not None and not stream.closed:
                    selector.register(stream, selectors.EVENT_READ, (number, kind))
            while selector.get_map():
                for key, _ in selector.select():
                    number, kind = key.data
                    data = read_piece(key.fd)
                    if not data:
                        selector.unregister(key.fileobj)
                        continue
                    offset = self._offsets[number]
                    self._offsets[number] += len(data)
                    yield kind(data, offset)
        self.wait()
        if self.result is not None:
            yield Exit(self.result)

    # --- letting go -----------------------------------------------------------------------------

    def close(self) -> None:
        """Kill it if it still runs, and close all pipes. Idempotent."""
        with self._lock:
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
            self._ending.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """As with Popen: close the pipes and wait. After an exception, kill it first."""
        if kind is not None:
            self.kill()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.wait()
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_ending"):
            self._ending.close()

    def __repr__(self) -> str:
        return f"<Process: returncode: {self.returncode} args: {list(self.args)!r}>"


def read_piece(fd: int) -> bytes:
    """What is there to read now; nothing at the end, also that of a terminal."""
    try:
        return os.read(fd, CHUNK)
    except OSError as error:
        if isinstance(error, BlockingIOError | InterruptedError):
            return b""
        if error.errno == 5:  # EIO
            return b""
        raise


class Exchange:
    """Feeding and draining pipes at once, in pieces: ``communicate()``, resumable after a time-out."""

    def __init__(self, process: Process, data: bytes | None) -> None:
        self._process = process
        self._left = memoryview(data or b"")
        self._parts: dict[int, list[bytes]] = {}
        self._open = [s for s in (process.stdout, process.stderr) if s is not None and not s.closed]
        for stream in self._open:
            self._parts[stream.fileno()] = []
        self._order = [
            s.fileno() if s is not None and not s.closed else -1 for s in (process.stdout, process.stderr)
        ]

    def run(self, deadline: float | None) -> bool:
        """Go on until all is done (True) or the deadline has passed (False)."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                stdin.flush()
            if not self._left and not isinstance(stdin, Terminal):
                _close_quietly(stdin)
        with selectors.DefaultSelector() as selector:
            if stdin is not None and not stdin.closed and self._left:
                os.set_blocking(stdin.fileno(), False)
                selector.register(stdin, selectors.EVENT_WRITE)
            for stream in self._open:
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                for key, _ in selector.select(left):
                    self._move(key, selector)
        return True

    def _move(self, key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
        if key.events & selectors.EVENT_WRITE:
            try:
                self._left = self._left[os.write(key.fd, self._left[:CHUNK]) :]
            except BlockingIOError:
                return
            except OSError:
                self._left = self._left[:0]
            if not self._left:
                selector.unregister(key.fileobj)
                if not isinstance(key.fileobj, Terminal):
                    _close_quietly(key.fileobj)
            return
        data = read_piece(key.fd)
        if data:
            self._parts[key.fd].append(data)
            return
        selector.unregister(key.fileobj)
        self._open = [stream for stream in self._open if stream is not key.fileobj]
        key.fileobj.close()  # type: ignore[union-attr]

    def outputs(self) -> tuple[bytes | None, bytes | None]:
        """What was read so far of stdout and stderr."""
        first, second = (b"".join(self._parts[fd]) if fd in self._parts else None for fd in self._order)
        return first, second


def _close_quietly(stream: Any) -> None:
    with contextlib.suppress(OSError):
        stream.close()
