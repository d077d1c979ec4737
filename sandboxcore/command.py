"""A command that runs in a living sandbox: :class:`Process`, for those who know :class:`subprocess.Popen`."""

import codecs
import contextlib
import errno
import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
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
        # All are looked at before a pipe of ours can take the number of one that is closed.
        stdin, stdout, stderr = (_target(number, file) for number, file in enumerate(files))
        if stderr == stdout >= 0:
            stderr = STDOUT  # through one pipe, or the order of what is written would be lost
        words = []
        try:
            for number, target in enumerate((stdin, stdout, stderr)):
                words.append(_native.constant(f"STDIO_{self._add(number, target, owner)}"))
        except BaseException:
            self.close()
            raise
        self.stdio = (words[0], words[1], words[2])

    def _add(self, number: int, target: int, owner: tuple[int, int] | None) -> str:
        if target == STDOUT:
            return "STDOUT"
        if target == DEVNULL:
            return "NULL"
        if target == PIPE:
            read, write = os.pipe2(os.O_CLOEXEC)
            self._made += [read, write]
            self.ours[number], theirs = (write, read) if number == 0 else (read, write)
            if owner:
                os.fchown(read, *owner)  # so that /dev/stdout can be opened again inside
            self.theirs.append(theirs)
            return "PASSED"
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


def _target(number: int, file: File) -> int:
    """PIPE, STDOUT, DEVNULL, or the open descriptor that a stream is to be copied from or to."""
    if isinstance(file, int) and file in (PIPE, STDOUT, DEVNULL):
        if file == STDOUT and number != 2:
            raise ValueError("STDOUT can only be used for stderr")
        return file
    target = number if file is None else file if isinstance(file, int) else file.fileno()
    try:
        os.fstat(target)
    except OSError:
        if file is None:  # closed here, so there
            return DEVNULL
        raise
    return target


def check_buffering(bufsize: int, *, text: bool, encoding: str | None, errors: str | None) -> int:
    """The size of a binary pipe's buffer. Raises here, before anything is started, what open() would."""
    if not isinstance(bufsize, int):
        raise TypeError("bufsize must be an integer")
    codecs.lookup(encoding or "utf-8")
    codecs.lookup_error(errors or "strict")
    if bufsize == 1 and not (text or encoding or errors):
        import warnings

        message = "line buffering (buffering=1) isn't supported in binary mode"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return -1
    return bufsize


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
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return 0  # nobody has it open any more
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

    def end_of_file(self, *, after: bytes = b"\n") -> bytes:
        """What to write for the reader to see end-of-file: Ctrl-D, and twice where a line has begun."""
        import termios

        key: bytes = termios.tcgetattr(self.fileno())[6][termios.VEOF]
        return key if not after or after.endswith(b"\n") else key + key

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
        bounds, decode = self.request.limits, Decoder(False, None, None)
        result = make_result(self.plan, self.request.args, streams, done, decode, limits=bounds)
        self.result = result
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
            _close_quietly(self.stdin)
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


def poll_once(wanted: Mapping[int, int], seconds: float | None) -> dict[int, int]:
    """Which of the descriptors are ready for what: poll(2). Blocks ``seconds``, None: until one is."""
    poller = select.poll()
    for fd, events in wanted.items():
        poller.register(fd, events)
    return dict(poller.poll(None if seconds is None else max(0.0, seconds * 1000)))


class Outputs:
    """The outputs of a process while they are read: never blocking, and not beyond the end of the command.

    Reading does not block, because the command could take back what poll(2) has seen: it may read its own
    pipe, and flush its terminal. End-of-file is not waited for, because another command of the sandbox could
    hold a pipe or the terminal open. A terminal that everybody has left may be opened again (/dev/tty) as
    long as the command runs: it is looked at now and then.
    """

    REST = 0.1  # seconds until the next look at an abandoned terminal
    TERMINAL_ROOM = 65536  # bytes, more than what a terminal holds

    def __init__(self, process: Process) -> None:
        self._process = process
        self._open: dict[int, int] = {}
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            if stream is not None and not stream.closed:
                self._open[stream.fileno()] = number
        terminal = isinstance(process.stdout, Terminal) and not process.stdout.closed
        self._terminal = process.stdout.fileno() if terminal else -1
        self._abandoned = False
        self._left: dict[int, int] | None = None  # after the end: bytes that can still be there
        self._alarm = -1 if process.poll() is not None else os.dup(process.fileno())  # not closed by others
        self._blocking = [fd for fd in self._open if os.get_blocking(fd)]
        for fd in self._blocking:
            os.set_blocking(fd, False)
        if self._alarm < 0:
            self._ended()

    @property
    def done(self) -> bool:
        """Whether everything has been read."""
        return not self._open

    @property
    def patience(self) -> float | None:
        """How long to wait for the next event, in seconds; None: for ever."""
        return 0.0 if self._left is not None else self.REST if self._abandoned else None

    def wanted(self, *, reading: bool = True) -> dict[int, int]:
        """What to poll for. ``reading=False``: only for the end of the command."""
        wanted = dict.fromkeys(self._open, select.POLLIN) if reading else {}
        if self._abandoned:
            wanted.pop(self._terminal, None)
        if self._alarm >= 0:
            wanted[self._alarm] = select.POLLIN
        return wanted

    def take(self, ready: Mapping[int, int], *, reading: bool = True) -> Iterator[tuple[int, bytes]]:
        """What has come of what was wanted: the stream's number, 1 or 2, and a piece of it."""
        again, self._abandoned = self._abandoned, False
        for fd, number in list(self._open.items()) if reading else ():
            data = self._read(fd) if fd in ready or (again and fd == self._terminal) else None
            if data:
                if self._left is not None:
                    self._left[fd] -= len(data)
                yield number, data
            if data == b"" and fd == self._terminal and self._left is None:
                self._abandoned = True
            elif data == b"" or (self._left is not None and (data is None or self._left[fd] <= 0)):
                del self._open[fd]
        if self._alarm in ready and self._process.poll() is not None:
            self._ended()

    def _read(self, fd: int) -> bytes | None:
        """None: nothing there now. Nothing in it: the end, also that of a terminal (EIO)."""
        try:
            return os.read(fd, CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EIO and fd == self._terminal:
                return b""
            raise

    def _ended(self) -> None:
        """Nobody of the command is left to write: what is there now is all."""
        import fcntl
        import termios

        self._left = {}
        for fd in self._open:
            size = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
            self._left[fd] = max(self.TERMINAL_ROOM, int.from_bytes(size, sys.byteorder))
        self._abandoned = False
        self._drop_alarm()

    def _drop_alarm(self) -> None:
        if self._alarm >= 0:
            os.close(self._alarm)
            self._alarm = -1

    def close(self) -> None:
        """Leave the descriptors as they were. Idempotent."""
        self._drop_alarm()
        blocking, self._blocking = self._blocking, []
        for fd in blocking:
            with contextlib.suppress(OSError):
                os.set_blocking(fd, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Exchange:
    """Feeding and draining pipes at once, in pieces: ``communicate()``, resumable after a time-out."""

    def __init__(self, process: Process, data: bytes | None) -> None:
        self._process = process
        self._parts: dict[int, list[bytes]] = {}
        for number, stream in ((1, process.stdout), (2, process.stderr)):
            if stream is not None and not stream.closed:
                self._parts[number] = []
        data = data or b""
        if isinstance(process.stdin, Terminal) and not process.stdin.closed:
            data += process.stdin.end_of_file(after=data)
        self._left = memoryview(data)

    def run(self, deadline: float | None) -> bool:
        """Go on until all is done (True) or the deadline has passed (False)."""
        self._begin()
        with Outputs(self._process) as outputs:
            while not outputs.done or self._feeding():
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                seconds = outputs.patience if left is None else min(left, outputs.patience or left)
                wanted = outputs.wanted()
                if stdin := self._feeding():
                    wanted[stdin] = wanted.get(stdin, 0) | select.POLLOUT
                ready = poll_once(wanted, 0 if outputs.patience == 0 else seconds)
                for number, data in outputs.take(ready):
                    self._parts[number].append(data)
                if stdin and ready.get(stdin, 0) & ~select.POLLIN:
                    self._feed(stdin)
                if self._left and self._process.returncode is not None:
                    self._stop_feeding()
        for stream in (self._process.stdout, self._process.stderr):
            _close_quietly(stream)
        return True

    def _begin(self) -> None:
        stdin = self._process.stdin
        if stdin is None:
            return
        with contextlib.suppress(BrokenPipeError, ValueError):  # nobody reads it; closed already
            stdin.flush()
        if not self._left:
            self._stop_feeding()
        elif not stdin.closed:
            os.set_blocking(stdin.fileno(), False)

    def _feeding(self) -> int:
        """The descriptor that wants more input, or 0."""
        stdin = self._process.stdin
        return stdin.fileno() if self._left and stdin is not None and not stdin.closed else 0

    def _feed(self, fd: int) -> None:
        try:
            self._left = self._left[os.write(fd, self._left[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self._left = self._left[:0]
        if not self._left:
            self._stop_feeding()

    def _stop_feeding(self) -> None:
        self._left = self._left[:0]
        if not isinstance(self._process.stdin, Terminal):
            _close_quietly(self._process.stdin)

    def outputs(self) -> tuple[bytes | None, bytes | None]:
        """What was read so far of stdout and stderr."""
        first, second = (b"".join(self._parts[n]) if n in self._parts else None for n in (1, 2))
        return first, second


def _close_quietly(stream: Any) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()
