"""Commands that outlive whoever started them: :class:`DetachedCommand`, and the journals they write.

The launcher of a detached command keeps the last bytes of each stream in a ring in one file, the journal,
whose first page says how far the streams have come and how the command ended. Reading needs nobody's
help, and any number of processes can, now or later.
"""

import contextlib
import errno as E
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sandboxcore import _native
from sandboxcore.command import Event, Exit, Scope, Stderr, Stdout, Terminal
from sandboxcore.errors import SandboxGone
from sandboxcore.plan import Plan
from sandboxcore.request import Program
from sandboxcore.result import Decoder, ExecResult, make_result

Stream = Literal["stdout", "stderr"]
Status = Literal["running", "completed", "failed"]
DEFAULT_KEEP = 1 << 20


@dataclass(frozen=True, slots=True)
class Log:
    """A piece of a stream. ``offset`` is where it begins, in bytes since the command's start; more than was
    asked for if what lay before is not kept any more. ``end`` is where to go on."""

    data: bytes
    offset: int

    @property
    def end(self) -> int:
        """The offset behind the piece."""
        return self.offset + len(self.data)


class Journal:
    """The file in which a launcher keeps a detached command's output and its end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls, path: Path | None, keep: int) -> "Journal":
        """A new one, in memory where there is no path. ``keep``: bytes of each stream."""
        if path is None:
            fd = os.memfd_create("sandboxcore-journal")
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            head, size = _native.journal_head(keep)
            if path is not None:  # a full disk shall be known now
                with contextlib.suppress(OSError):
                    os.posix_fallocate(fd, 0, size)
                    size = 0
            if size:
                os.ftruncate(fd, size)
            os.pwrite(fd, head, 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """One that is there. Raises FileNotFoundError."""
        return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def head(self) -> _native.JournalHead:
        """The first page now."""
        size = _native.JOURNAL_SIZE
        data = os.pread(self.fd, size, 0)
        while (again := os.pread(self.fd, size, 0)) != data:  # it was being written
            data = again
        return _native.parse_journal(data)

    def read(self, stream: int, since: int, size: int) -> Log:
        """At most ``size`` bytes from offset ``since`` on, of what is kept."""
        while True:
            head = self.head()
            start = max(since, head.written[stream] - head.keep, 0)
            want = max(0, min(size, head.written[stream] - start))
            base, at = _native.JOURNAL_HEAD + stream * head.ring, start % head.ring
            data = os.pread(self.fd, min(want, head.ring - at), base + at)
            if len(data) < want:
                data += os.pread(self.fd, want - len(data), base)
            if start >= self.head().written[stream] - head.keep:  # else it was overwritten meanwhile
                return Log(data, start)

    def close(self) -> None:
        """Let go of the file. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DetachedCommand:
    """A command that runs on its own, with its output kept. Made by :meth:`Sandbox.detach`, found again by
    :meth:`Sandbox.command`, from any process if the sandbox is persistent.

    id: text. args: the command line. pty: whether it has a terminal. started_at: seconds since the epoch.
    """

    def __init__(
        self,
        command_id: str,
        args: Sequence[Program],
        plan: Plan,
        journal: Journal,
        connect: Callable[[], socket.socket],
        *,
        pty: bool,
        started_at: float,
    ) -> None:
        self.id, self.args, self.pty, self.started_at = command_id, tuple(args), pty, started_at
        self._plan, self._journal, self._connect = plan, journal, connect
        self._lost: ExecResult | None = None

    # --- how it is ------------------------------------------------------------------------------

    @property
    def result(self) -> ExecResult | None:
        """None while it runs, then an :class:`ExecResult` without output. Cause ``killed`` where its sandbox
        or its launcher was killed, ``setup`` where it never started."""
        head = self._journal.head()
        if head.state != "ENDED" and self._lost is None and not self._reachable():
            head = self._journal.head()  # it may have ended between the look and the question
            if head.state != "ENDED":
                now = time.monotonic_ns()
                self._lost = self._make(_native.lost_result(now, now), lost_setup=head.state == "NEW")
        if head.state == "ENDED":
            record = head.exit
            return self._make(
                _native.ended_result(record, record.native.clock[0], record.native.clock[4], b"")
            )
        return self._lost

    def _make(self, done: _native.NativeResult, *, lost_setup: bool = False) -> ExecResult:
        from dataclasses import replace

        from sandboxcore.result import Cause

        streams = _native.Streams(capture=())
        result = make_result(self._plan, self.args, streams, done, Decoder(False, None, None))
        totals = self._journal.head().written
        result = replace(result, stdout_total=totals[0], stderr_total=totals[1])
        return replace(result, cause=Cause.SETUP) if lost_setup else result

    @property
    def returncode(self) -> int | None:
        """None while it runs, then its exit status, or -N when signal N ended it."""
        result = self.result
        return None if result is None else result.returncode

    @property
    def status(self) -> Status:
        """running; completed: it exited with 0; failed: it ended in any other way."""
        code = self.returncode
        return "running" if code is None else "completed" if code == 0 else "failed"

    @property
    def pid_inside(self) -> int:
        """Its number inside the sandbox."""
        return self._journal.head().pid

    def _reachable(self) -> bool:
        try:
            self._send("SIGNAL", signal=0)
        except SandboxGone:
            return False
        except BlockingIOError:  # a full queue has somebody behind it
            pass
        return True

    def _send(self, kind: str, fds: Sequence[int] = (), *, flags: int = 0, signal: int = 0) -> None:
        """Raises SandboxGone where nobody listens any more."""
        try:
            with self._connect() as sock:
                _native.send(sock.fileno(), kind, fds=fds, flags=flags, signal=signal)
        except OSError as error:
            if error.errno in (E.ECONNREFUSED, E.ECONNRESET, E.EPIPE, E.ENOENT, E.ENOTCONN):
                raise SandboxGone(f"command {self.id}: it has ended") from None
            raise

    # --- waiting, signals -----------------------------------------------------------------------

    def wait(self, timeout: float | None = None) -> ExecResult:
        """Wait for its end. Raises :class:`subprocess.TimeoutExpired`; it runs on."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._news() as news:
            while (result := self.result) is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise subprocess.TimeoutExpired([os.fsdecode(a) for a in self.args], timeout or 0.0)
                news(left)
        return result

    @contextlib.contextmanager
    def _news(self) -> Iterator[Callable[[float | None], None]]:
        """A function that blocks until there is something new, or until the launcher is gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs, contextlib.suppress(SandboxGone):
                self._send("FOLLOW", [theirs.fileno()])

            def block(seconds: float | None) -> None:
                poller = select.poll()
                poller.register(ours, select.POLLIN)
                if poller.poll(None if seconds is None else max(0.0, seconds * 1000 + 1)):
                    ours.recv(1)

            yield block

    def send_signal(self, number: int, scope: Scope = "process") -> None:
        """Send a signal to its process, its process group, or everything below it ("tree"). Does nothing
        once it has ended."""
        flags = _native.constant(f"SCOPE_{scope.upper()}")
        with contextlib.suppress(SandboxGone):
            self._send("SIGNAL", flags=flags, signal=number)

    def terminate(self) -> None:
        """SIGTERM to its process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its process and everything below it."""
        self.send_signal(signal.SIGKILL, "tree")

    # --- output and input -----------------------------------------------------------------------

    def logs(self, stream: Stream = "stdout", *, since: int = 0, size: int = DEFAULT_KEEP) -> Log:
        """What is kept of a stream from offset ``since`` on, at most ``size`` bytes, without waiting.

        Go on with ``since=log.end``. With a terminal everything is stdout.
        """
        if stream not in ("stdout", "stderr"):
            raise ValueError(f"stream: {stream!r} is not stdout or stderr")
        if since < 0 or size < 0:
            raise ValueError("since and size are not negative")
        return self._journal.read(int(stream == "stderr"), since, size)

    def follow(self, *, stdout: int | None = 0, stderr: int | None = 0) -> Iterator[Event]:
        """Pieces of output from these offsets on as they come (None: not this stream), then the end.

        A reader slower than the command misses what is not kept any more; offsets tell.
        """
        at = {number: start for number, start in enumerate((stdout, stderr)) if start is not None}
        with self._news() as news:
            while True:
                result, found = self.result, False
                for number, since in list(at.items()):
                    log = self._journal.read(number, since, 65536)
                    if log.data:
                        found, at[number] = True, log.end
                        yield (Stderr if number else Stdout)(log.data, log.offset)
                if not found and result is not None:
                    yield Exit(result)
                    return
                if not found:
                    news(None)

    def input(self, *, last: bool = False) -> Any:
        """Borrow its stdin, started with ``stdin=PIPE``, as a binary file to write to; or its terminal.

        Closing the file is no end-of-file for the command, because its launcher still holds the pipe;
        after ``last=True`` it does not. Raises :class:`SandboxGone` once it has ended, ValueError where it
        has neither.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                self._send("INPUT", [theirs.fileno()], flags=int(last))
            poller = select.poll()
            poller.register(ours, select.POLLIN)
            poller.poll(5000)
            try:
                record = _native.receive(ours.fileno())
            except (BlockingIOError, ConnectionResetError):
                record = None
        if record is None:
            raise SandboxGone(f"command {self.id}: it has ended")
        if record.error:
            raise ValueError(f"command {self.id}: it was started with neither stdin=PIPE nor pty=")
        return Terminal(record.fd) if self.pty else open(record.fd, "wb", 0)

    def close(self) -> None:
        """Let go of the handle; the command runs on. Idempotent."""
        self._journal.close()

    def __enter__(self) -> "DetachedCommand":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_journal"):
            self._journal.close()

    def __repr__(self) -> str:
        return f"<DetachedCommand {self.id} {list(self.args)!r}>"
