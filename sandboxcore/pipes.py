"""The streams of a running command from outside: pipes, a terminal, reading and feeding them at once."""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

from sandboxcore import _native
from sandboxcore.request import DEVNULL, PIPE, STDOUT, File

if TYPE_CHECKING:
    from sandboxcore.command import Process

CHUNK = 65536


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

    def __init__(self, process: "Process") -> None:
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

    def __init__(self, process: "Process", data: bytes | None) -> None:
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
            close_quietly(stream)
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
            close_quietly(self._process.stdin)

    def outputs(self) -> tuple[bytes | None, bytes | None]:
        """What was read so far of stdout and stderr."""
        first, second = (b"".join(self._parts[n]) if n in self._parts else None for n in (1, 2))
        return first, second


def close_quietly(stream: Any) -> None:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()
