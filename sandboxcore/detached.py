"""Commands that outlive whoever started them: :class:`DetachedCommand`, from start to end.

The launcher of a detached command keeps the last bytes of its output, and how it ended, in a journal.
"""

import contextlib
import errno as E
import io
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from sandboxcore import _native
from sandboxcore.command import Event, Exit, Scope, Stderr, Stdout
from sandboxcore.errors import SandboxGone, SpecError
from sandboxcore.journal import Journal, Log
from sandboxcore.link import ANSWER_PATIENCE, Home
from sandboxcore.observers import UNWATCHED, Unwatched
from sandboxcore.pipes import Terminal
from sandboxcore.plan import Plan
from sandboxcore.request import Program
from sandboxcore.result import Decoder, ExecResult, make_result

Stream = Literal["stdout", "stderr"]
Status = Literal["running", "completed", "failed"]
DEFAULT_KEEP = 1 << 20
DETACH_KEYS = b"\x10\x11"  # Ctrl-P Ctrl-Q


class Door:
    """The way to the launcher of a command: a name in the sandbox's directory."""

    def __init__(self, home: Home, name: str) -> None:
        self._home, self._name = home, name

    def open(self) -> socket.socket:
        """A socket that sends there. Raises OSError where nobody listens."""
        return self._home.connect(self._name)

    def alive(self) -> bool:
        """Whether somebody listens. Takes no place in the queue, which nobody empties while it is paused."""
        with self.open():
            return True

    def close(self) -> None:
        """Let go, for every handle of the command. Idempotent."""


class PrivateDoor(Door):
    """The same within the process that made the sandbox: one half of a pair."""

    def __init__(self, ours: socket.socket) -> None:
        self._sock = ours

    def open(self) -> socket.socket:
        try:
            return self._sock.dup()
        except OSError as error:
            if self._sock.fileno() >= 0:
                raise
            raise OSError(E.ENOTCONN, "its sandbox has ended") from error

    def alive(self) -> bool:
        with self.open() as sock:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # a full queue has somebody behind it
                _native.send(sock.fileno(), "SIGNAL")
        return True

    def close(self) -> None:
        self._sock.close()

    def __del__(self) -> None:
        self.close()


_BACKOFF = 0.05  # seconds until the next look where nobody tells of news
_GONE = (E.ECONNREFUSED, E.ECONNRESET, E.EPIPE, E.ENOENT, E.ENOTCONN)
_SCOPES = ("process", "group", "tree")


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
        door: Door,
        *,
        pty: bool,
        started_at: float,
    ) -> None:
        self.id, self.args, self.pty, self.started_at = command_id, tuple(args), pty, started_at
        self._plan, self._journal, self._door = plan, journal, door
        self._lost: ExecResult | None = None
        self._watch: Unwatched = UNWATCHED

    def again(self) -> "DetachedCommand":
        """Another handle of it, to be closed on its own."""
        other = DetachedCommand(
            self.id, self.args, self._plan, self._journal.again(), self._door,
            pty=self.pty, started_at=self.started_at,
        )  # fmt: skip
        other._watch = self._watch
        return other

    # --- how it is ------------------------------------------------------------------------------

    @property
    def result(self) -> ExecResult | None:
        """None while it runs, then an :class:`ExecResult` without output. Cause ``killed`` where its sandbox
        or its launcher was killed, ``setup`` where it never started."""
        result = self._result()
        if result is not None:
            self._watch.ended(result)
        return result

    def _result(self) -> ExecResult | None:
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
            return self._door.alive()
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise

    def _send(
        self,
        kind: str,
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        signal: int = 0,
        patience: float = ANSWER_PATIENCE,
    ) -> None:
        """Raises SandboxGone where nobody listens any more, TimeoutError where nobody empties the queue."""
        deadline = time.monotonic() + patience
        try:
            with self._door.open() as sock:
                sock.setblocking(False)
                while True:
                    with contextlib.suppress(BlockingIOError):
                        _native.send(sock.fileno(), kind, fds=fds, flags=flags, signal=signal)
                        return
                    if time.monotonic() >= deadline:
                        raise TimeoutError(f"command {self.id}: its sandbox is paused and takes no more")
                    time.sleep(0.01)
        except OSError as error:
            if error.errno in _GONE:
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
        """A function that blocks until there may be something new, or until the launcher is gone."""
        ours = self._subscribe()

        def block(seconds: float | None) -> None:
            nonlocal ours
            if _poll(ours, seconds) and not ours.recv(1):
                # It has ended; or it has as many followers as it takes, or its sandbox is paused.
                time.sleep(_BACKOFF if seconds is None else max(0.0, min(seconds, _BACKOFF)))
                ours.close()
                ours = self._subscribe()

        try:
            yield block
        finally:
            ours.close()

    def _subscribe(self) -> socket.socket:
        """A socket that gets a byte for each news; end-of-file when there will be none."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, contextlib.suppress(SandboxGone, TimeoutError):
                self._send("FOLLOW", [theirs.fileno()], patience=0)
        except BaseException:
            ours.close()
            raise
        return ours

    def send_signal(self, number: int, scope: Scope = "process") -> None:
        """Send a signal to its process, its process group, or everything below it ("tree"). Does nothing
        once it has ended. Raises TimeoutError if its sandbox is paused and takes no more."""
        self._signal(number, scope, ANSWER_PATIENCE)

    def _signal(self, number: int, scope: Scope, patience: float) -> None:
        if scope not in _SCOPES:
            raise ValueError(f"scope: {scope!r} is none of {', '.join(_SCOPES)}")
        if not 0 <= number <= 64:
            raise ValueError(f"{number} is not the number of a signal")
        flags = _native.constant(f"SCOPE_{scope.upper()}")
        with contextlib.suppress(SandboxGone):
            self._send("SIGNAL", flags=flags, signal=number, patience=patience)

    def terminate(self) -> None:
        """SIGTERM to its process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to its process and everything below it."""
        self.send_signal(signal.SIGKILL, "tree")

    # --- output and input -----------------------------------------------------------------------

    @property
    def written(self) -> tuple[int, int]:
        """How many bytes of stdout and of stderr there were up to now."""
        return self._journal.head().written

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
        has neither, or not any more, TimeoutError while its sandbox is paused.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                self._send("INPUT", [theirs.fileno()], flags=int(last))
            if not _poll(ours, ANSWER_PATIENCE):
                raise TimeoutError(f"command {self.id}: its launcher does not answer")
            fd = self._lent(ours)
        return Terminal(fd) if self.pty else _Lent(fd, "wb")

    def _lent(self, answer: socket.socket) -> int:
        """What a launcher lends in answer to INPUT."""
        try:
            record = _native.receive(answer.fileno())
        except ConnectionResetError:
            record = None
        if record is None:
            raise SandboxGone(f"command {self.id}: it has ended")
        if record.error:
            raise ValueError(f"command {self.id}: it has neither a terminal nor, any more, stdin=PIPE")
        os.set_blocking(record.fd, False)  # for all borrowers at once: some of them have an event loop
        return record.fd

    def attach(
        self, *, stdin: int = 0, stdout: int = 1, detach_keys: bytes | None = DETACH_KEYS
    ) -> ExecResult | None:
        """Let the user at our terminal use the command's; what is kept of its output is shown first.

        :func:`sandboxcore.terminal.attach` says what happens to our terminal. Several may be attached at
        once; each sees everything.

        stdin, stdout: descriptors of our terminal.
        detach_keys: bytes that leave it running when they are typed; None for no such keys.

        Returns its result; None where it runs on, because the keys were typed or our terminal has gone.
        Raises :class:`SpecError` where ``stdin`` is no terminal or the command has none, :class:`SandboxGone`
        where it has ended before.
        """
        from sandboxcore.replay import Replay
        from sandboxcore.terminal import attach, current_size

        current_size(stdin)
        if not self.pty:
            raise SpecError(f"command {self.id} has no terminal; start it with pty=")
        with self.input() as terminal:
            parting = attach((terminal, Replay(self)), stdin=stdin, stdout=stdout, detach_keys=detach_keys)
        return self.result if parting == "ended" else None

    def _forget(self) -> None:
        """It never started, or must not have: let go of everything, whoever still holds this handle, such as
        a traceback."""
        with contextlib.suppress(SandboxGone, OSError):
            self._send("SIGNAL", flags=_native.constant("SCOPE_TREE"), signal=signal.SIGKILL, patience=0)
        self.close()
        self._door.close()

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


class _Lent(io.FileIO):
    """The pipe to a command's stdin, which does not block, for one who wants to."""

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        while left:
            done = super().write(left)
            if done is None:
                poller = select.poll()
                poller.register(self, select.POLLOUT)
                poller.poll()
            left = left[done or 0 :]
        return size


def _poll(sock: socket.socket, seconds: float | None) -> bool:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(None if seconds is None else max(0.0, seconds * 1000 + 1)))
