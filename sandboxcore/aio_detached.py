"""Detached commands for asyncio: :class:`sandboxcore.detached.DetachedCommand`, whose waiting is awaited."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from sandboxcore import detached
from sandboxcore.aio_exec import HARD
from sandboxcore.aio_life import Input, Life
from sandboxcore.aio_loop import Flag, patiently, readable
from sandboxcore.command import Ending, Event, Exit, Scope, Stderr, Stdout
from sandboxcore.detached import DEFAULT_KEEP, Status, Stream
from sandboxcore.errors import SandboxGone
from sandboxcore.journal import Log
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE
from sandboxcore.result import ExecResult

PIECE = 65536
BACKOFF = 0.05  # seconds until the next look where nobody tells of news
BRIEF = 0.1  # seconds that a full queue may block the loop; its launcher empties it at once, unless paused


async def await_start(command: detached.DetachedCommand, ending: Ending) -> None:
    """Wait until the program runs. Raises what kept it from that; then, and when cancelled, it is gone, or
    will be as soon as its launcher has a look."""
    life = Life(ending)
    try:
        if not await life.news.until(lambda: ending.started or life.over(), START_PATIENCE):
            raise TimeoutError(f"{command.args[0]!r} did not start within {START_PATIENCE} s")
        if life.failure is not None:
            raise life.failure
    except GeneratorExit:
        raise
    except BaseException:
        life.close()  # before it was announced this is its end
        with contextlib.suppress(SandboxGone, TimeoutError):
            command._signal(signal.SIGKILL, "tree", 0)
        await _end(command)
        raise
    finally:
        life.close()


async def _end(command: detached.DetachedCommand) -> None:
    """Wait until it is gone, and whoever might still start it; although cancelled, but not for ever."""
    loop, over, news = asyncio.get_running_loop(), Flag(), command._subscribe()

    def hear() -> None:
        if not news.recv(1):
            loop.remove_reader(news.fileno())
            over.set()

    with news:
        loop.add_reader(news.fileno(), hear)
        try:
            await over.insist(over.is_set, HARD)
        finally:
            loop.remove_reader(news.fileno())


class Subscription:
    """What a launcher tells of a command."""

    def __init__(self, command: detached.DetachedCommand) -> None:
        self._command = command
        self._sock = command._subscribe()

    async def wait(self, seconds: float | None = None) -> None:
        """Wait until there may be something new, or until the launcher is gone."""
        try:
            await readable(self._sock.fileno(), seconds)
        except TimeoutError:
            return
        if not self._sock.recv(1):
            # It has ended; or it has as many followers as it takes, or its sandbox is paused.
            await asyncio.sleep(BACKOFF if seconds is None else max(0.0, min(seconds, BACKOFF)))
            self._sock.close()
            self._sock = self._command._subscribe()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def __del__(self) -> None:  # of an iteration that was left, with its loop closed before it could be told
        if hasattr(self, "_sock"):
            self._sock.close()


class Borrowed(asyncio.StreamWriter):
    """A command's stdin or terminal: write, ``await drain()``, close; or leave it by ``async with``.

    Up to 4096 bytes that are drained before the next are written arrive in one piece, whoever else writes.
    """

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size. Raises ValueError where it is none."""
        import termios

        file = self.get_extra_info("pipe")
        if not file.isatty():
            raise ValueError("the command has no terminal")
        termios.tcsetwinsize(file.fileno(), (rows, columns))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Have what was written arrive; after an exception, or when cancelled here, drop it."""
        try:
            if kind is None:
                self.close()
                await self.wait_closed()
        finally:
            if self.transport.get_write_buffer_size():  # else it is closed, or about to be
                self.transport.abort()
            self.close()


class DetachedCommand:
    """:class:`sandboxcore.detached.DetachedCommand` for asyncio, with the same parameters, results and
    errors. Made by :meth:`Sandbox.detach`, found again by :meth:`Sandbox.command`.

    What waits is a coroutine; all the rest, which looks at a file or sends a datagram, is not.
    """

    def __init__(self, own: detached.DetachedCommand) -> None:
        self._own = own
        self.id, self.args, self.pty, self.started_at = own.id, own.args, own.pty, own.started_at

    def again(self) -> "DetachedCommand":
        """Another handle of it, to be closed on its own."""
        return DetachedCommand(self._own.again())

    # --- how it is ------------------------------------------------------------------------------

    @property
    def result(self) -> ExecResult | None:
        """None while it runs, then an :class:`ExecResult` without output. Cause ``killed`` where its sandbox
        or its launcher was killed, ``setup`` where it never started."""
        return self._own.result

    @property
    def returncode(self) -> int | None:
        """None while it runs, then its exit status, or -N when signal N ended it."""
        return self._own.returncode

    @property
    def status(self) -> Status:
        """running; completed: it exited with 0; failed: it ended in any other way."""
        return self._own.status

    @property
    def pid_inside(self) -> int:
        """Its number inside the sandbox."""
        return self._own.pid_inside

    # --- waiting, signals -----------------------------------------------------------------------

    async def wait(self, timeout: float | None = None) -> ExecResult:
        """Wait for its end. Raises :class:`subprocess.TimeoutExpired`; it runs on, as when cancelled."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        with Subscription(self._own) as news:
            while (result := self.result) is None:
                left = None if deadline is None else deadline - loop.time()
                if left is not None and left <= 0:
                    raise subprocess.TimeoutExpired([os.fsdecode(arg) for arg in self.args], timeout or 0.0)
                await news.wait(left)
        return result

    def send_signal(self, number: int, scope: Scope = "process") -> None:
        """Send a signal to its process, its process group, or everything below it ("tree"). Does nothing
        once it has ended. Raises TimeoutError if its sandbox is paused and takes no more."""
        self._own._signal(number, scope, BRIEF)

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
        return self._own.written

    def logs(self, stream: Stream = "stdout", *, since: int = 0, size: int = DEFAULT_KEEP) -> Log:
        """What is kept of a stream from offset ``since`` on, at most ``size`` bytes, without waiting.

        Go on with ``since=log.end``. With a terminal everything is stdout.
        """
        return self._own.logs(stream, since=since, size=size)

    async def follow(self, *, stdout: int | None = 0, stderr: int | None = 0) -> AsyncIterator[Event]:
        """Pieces of output from these offsets on as they come (None: not this stream), then the end.

        A reader slower than the command misses what is not kept any more; offsets tell.
        """
        at = {number: start for number, start in enumerate((stdout, stderr)) if start is not None}
        with Subscription(self._own) as news:
            while True:
                result, found = self.result, False
                for number, since in list(at.items()):
                    log = self._own._journal.read(number, since, PIECE)
                    if log.data:
                        found, at[number] = True, log.end
                        yield (Stderr if number else Stdout)(log.data, log.offset)
                if found:
                    await asyncio.sleep(0)  # whoever writes without end must not have the loop for himself
                elif result is not None:
                    yield Exit(result)
                    return
                else:
                    await news.wait()

    async def input(self, *, last: bool = False) -> Borrowed:
        """Borrow its stdin, started with ``stdin=PIPE``, to write to; or its terminal.

        Closing it is no end-of-file for the command, because its launcher still holds the pipe; after
        ``last=True`` it does not. Raises :class:`SandboxGone` once it has ended, ValueError where it has
        neither, or not any more, TimeoutError while its sandbox is paused.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                await self._send(theirs, last=last)
            try:
                await readable(ours.fileno(), ANSWER_PATIENCE)
            except TimeoutError:
                raise TimeoutError(f"command {self.id}: its launcher does not answer") from None
            fd = self._own._lent(ours)
        return await _writer(fd)

    async def _send(self, theirs: socket.socket, *, last: bool) -> None:
        def once() -> None:
            try:
                self._own._send("INPUT", [theirs.fileno()], flags=int(last), patience=0)
            except TimeoutError as error:
                raise BlockingIOError(str(error)) from None

        await patiently(once, ANSWER_PATIENCE, f"command {self.id}: its sandbox is paused and takes no more")

    # --- letting go -----------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the handle; the command runs on. Idempotent."""
        self._own.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DetachedCommand {self.id} {list(self.args)!r}>"


async def _writer(fd: int) -> Borrowed:
    loop = asyncio.get_running_loop()
    nobody = asyncio.StreamReader(loop=loop)
    file = open(fd, "wb", 0)  # noqa: SIM115 - the transport's, from here on
    try:
        transport, protocol = await loop.connect_write_pipe(lambda: Input(nobody, loop=loop), file)
    except BaseException:
        file.close()
        raise
    transport.set_write_buffer_limits(0)  # drained means: in the pipe
    return Borrowed(transport, protocol, None, loop)
