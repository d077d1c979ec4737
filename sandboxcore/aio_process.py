"""A command that runs in a living sandbox, for those who know :class:`asyncio.subprocess.Process`."""

import asyncio
import contextlib
import errno as E
import fcntl
import os
import signal
import socket
import sys
import termios
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import IO, Self

from sandboxcore.aio_exec import HARD
from sandboxcore.aio_loop import News
from sandboxcore.command import Ending, Event, Exit, Scope, Stderr, Stdout
from sandboxcore.link import START_PATIENCE
from sandboxcore.pipes import CHUNK, Pipes
from sandboxcore.result import ExecResult

TIOCGPTPEER = 0x5441  # ioctl_tty(2); not in termios


class Life:
    """A command's socket on the loop. It does not know its :class:`Process`, which may so be forgotten."""

    def __init__(self, ending: Ending) -> None:
        self.ending, self.news = ending, News()
        self.failure: Exception | None = None
        self.loop = asyncio.get_running_loop()
        self._fd = ending.sock.fileno()
        self.outputs: list[_Output] = []
        self.slave = -1  # of its terminal
        ending.sock.setblocking(False)
        self.loop.add_reader(self._fd, self._hear)

    def _hear(self) -> None:
        try:
            while not self.ending.hear():
                pass
            self._leave()
        except BlockingIOError:
            pass
        except Exception as error:  # what kept it from starting
            self.failure = error
            self._leave()
        self.news.tell()

    def _leave(self) -> None:
        if self._fd >= 0:
            self.loop.remove_reader(self._fd)
            self._fd = -1
            self.finish()

    def drop(self) -> None:
        """Let go without a loop."""
        slave, self.slave = self.slave, -1
        if slave >= 0:
            os.close(slave)
        self.ending.close()

    def finish(self) -> None:
        """Have the outputs end, because the command has."""
        slave, self.slave = self.slave, -1
        if slave >= 0:
            os.close(slave)
        for output in self.outputs:
            output.finish()

    def over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self._fd < 0

    async def end(self) -> None:
        """Kill it and wait until it is gone, but not for ever, and although cancelled."""
        if not self.over():
            with contextlib.suppress(OSError):
                self.ending.sock.shutdown(socket.SHUT_WR)
            try:
                await self.news.insist(self.over, HARD)
            finally:
                self.close()

    def close(self) -> None:
        """Let go, by which it is killed if it still runs. Idempotent."""
        self._leave()
        self.ending.close()
        self.news.tell()


class _Input(asyncio.StreamReaderProtocol):
    def connection_lost(self, exc: Exception | None) -> None:
        # EIO is how a terminal says that nobody has its other side open any more: end-of-file
        super().connection_lost(None if isinstance(exc, OSError) and exc.errno == E.EIO else exc)


class _Output(_Input):
    """An output. It ends with the command, also where another command of the sandbox, which was given the
    pipe or the terminal (SCM_RIGHTS), still has it open."""

    # A terminal's driver may have more than it tells of: it has this long to say itself that it is over
    REST = 0.2  # seconds
    ROOM = 65536  # bytes

    def __init__(self, reader: asyncio.StreamReader, life: Life, file: IO[bytes]) -> None:
        super().__init__(reader, loop=life.loop)
        self._loop_of_life, self._file = life.loop, file
        self._pipe: asyncio.ReadTransport | None = None
        self._left: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert isinstance(transport, asyncio.ReadTransport)
        self._pipe = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._pipe = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._left is not None:
            self._left -= len(data)
            self._stop()

    def finish(self) -> None:
        """Nobody of the command is left to write: end behind what is there now."""
        if self._pipe is not None and self._left is None and not self._pipe.is_closing():
            self._left = self._waiting()
            if os.isatty(self._file.fileno()):
                self._left = max(self._left, self.ROOM)
                self._loop_of_life.call_later(self.REST, self._hang_up)
            self._stop()

    def _waiting(self) -> int:
        return int.from_bytes(fcntl.ioctl(self._file.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)

    def _hang_up(self) -> None:
        if self._pipe is not None and not self._pipe.is_closing():
            self._left = min(self._left or 0, self._waiting())
            self._stop()

    def _stop(self) -> None:
        if self._pipe is not None and self._left is not None and self._left <= 0:
            self._pipe.close()


async def start_process(ending: Ending, pipes: Pipes, limit: int) -> "Process":
    """Wait until the program runs. Raises what kept it from that; then, and when cancelled, it is killed."""
    life = Life(ending)
    process: Process | None = None
    try:
        if not await life.news.until(lambda: ending.started or life.over(), START_PATIENCE):
            raise TimeoutError(f"{ending.request.args[0]!r} did not start within {START_PATIENCE} s")
        if life.failure is not None:
            raise life.failure
        process = Process(life)
        await process._connect(pipes, limit)
        return process
    except GeneratorExit:
        _discard(life, process, pipes)
        raise
    except BaseException:
        try:
            await life.end()
        finally:
            _discard(life, process, pipes)
        raise


def _discard(life: Life, process: "Process | None", pipes: Pipes) -> None:
    pipes.close()
    life.close()
    if process is not None:
        process.close()


class Process:
    """A running command. Made by :meth:`Sandbox.popen`; the interface is that of
    :class:`asyncio.subprocess.Process`.

    When the process ends, everything below it is killed, and then it is reported; a handle that is closed,
    or forgotten, kills it. It belongs to the event loop in which it was made.

    args: the command line as given.
    stdin: an :class:`asyncio.StreamWriter`, where PIPE was asked for, else None.
    stdout, stderr: :class:`asyncio.StreamReader`, where PIPE was asked for, else None. What nobody reads
        stays in the pipe, but for a few hundred KiB.
    With ``pty=``, stdin and stdout are the two directions of its terminal.
    """

    def __init__(self, life: Life) -> None:
        self._life = life
        self.args = life.ending.request.args
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._transports: list[asyncio.BaseTransport] = []
        self._terminal: IO[bytes] | None = None
        self._pending: deque[Event] = deque()
        self._offsets = {1: 0, 2: 0}
        self._input: memoryview | None = None
        self._parts = {1: bytearray(), 2: bytearray()}

    async def _connect(self, pipes: Pipes, limit: int) -> None:
        """Hand our ends of the pipes to the loop."""
        ending = self._life.ending
        pty = ending.master >= 0
        if pty:
            # The command may leave its terminal and open it again (/dev/tty): only its end is end-of-file
            with contextlib.suppress(OSError):
                if not self._life.over():
                    self._life.slave = fcntl.ioctl(
                        ending.master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
                    )
            pipes.ours[0] = os.dup(ending.master)
            pipes.ours[1], ending.master = ending.master, -1
        for number in range(3):
            fd, pipes.ours[number] = pipes.ours[number], None
            if fd is None:
                continue
            file = open(fd, "rb" if number else "wb", 0)  # noqa: SIM115 - the transport's, from here on
            try:
                stream = await (self._reader(file, limit) if number else self._writer(file))
            except BaseException:
                file.close()
                raise
            setattr(self, ("stdin", "stdout", "stderr")[number], stream)
            if number == 1 and pty:
                self._terminal = file

    async def _reader(self, file: IO[bytes], limit: int) -> asyncio.StreamReader:
        loop = self._life.loop
        reader = asyncio.StreamReader(limit, loop)
        transport, output = await loop.connect_read_pipe(lambda: _Output(reader, self._life, file), file)
        self._transports.append(transport)
        self._life.outputs.append(output)
        if self._life.over():
            output.finish()
        return reader

    async def _writer(self, file: IO[bytes]) -> asyncio.StreamWriter:
        loop = self._life.loop
        nobody = asyncio.StreamReader(loop=loop)
        transport, protocol = await loop.connect_write_pipe(lambda: _Input(nobody, loop=loop), file)
        self._transports.append(transport)
        return asyncio.StreamWriter(transport, protocol, None, loop)

    # --- the end --------------------------------------------------------------------------------

    @property
    def result(self) -> ExecResult | None:
        """What it did, once it has ended (without the streams, which you read); None while it runs."""
        return self._life.ending.result

    @property
    def returncode(self) -> int | None:
        """None while it runs, then its exit status, or -N when signal N ended it."""
        return None if self.result is None else self.result.returncode

    @property
    def pid(self) -> int:
        """Its number outside, as this process sees it; 0 when it has ended."""
        return 0 if self._life.ending.pidfd < 0 else self._life.ending.host_pid()

    @property
    def pid_inside(self) -> int:
        """Its number inside the sandbox."""
        return self._life.ending.pid_inside

    async def wait(self) -> int:
        """Wait for the end of the command and everything below it; returns its return code."""
        await self._life.news.until(self._life.over)
        if self._life.failure is not None:
            raise self._life.failure
        if self.result is None:
            raise ValueError("the handle was closed before the command ended")
        return self.result.returncode

    # --- signals --------------------------------------------------------------------------------

    def send_signal(self, number: int, scope: Scope = "process") -> None:
        """Send a signal to the process, to its process group, or to everything below it ("tree"). Does
        nothing once it has ended."""
        self._life.ending.signal(number, scope)

    def terminate(self) -> None:
        """SIGTERM to the process."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and everything below it."""
        self.send_signal(signal.SIGKILL, "tree")

    def resize(self, rows: int, columns: int) -> None:
        """Give its terminal another size. Raises ValueError without ``pty=``, or when that is closed."""
        if self._terminal is None:
            raise ValueError("the command has no terminal")
        termios.tcsetwinsize(self._terminal.fileno(), (rows, columns))

    # --- streams --------------------------------------------------------------------------------

    async def communicate(self, input: bytes | None = None) -> tuple[bytes | None, bytes | None]:
        """Feed stdin, read stdout and stderr to their ends, wait. Returns both, None for what is no pipe.

        A cancellation, such as by :func:`asyncio.timeout`, loses nothing: call it again to go on. How much
        is read is not bounded; :meth:`Sandbox.exec` bounds it. With ``pty=``, end-of-file is typed after the
        input (Ctrl-D), and everything is stdout.
        """
        if self._input is None:
            self._input = memoryview(self._with_end(input or b"")).cast("B")
        elif input is not None:
            raise ValueError("Cannot send input after starting communication")
        await asyncio.gather(self._feed(), self._collect(1, self.stdout), self._collect(2, self.stderr))
        await self.wait()
        return (
            None if self.stdout is None else bytes(self._parts[1]),
            None if self.stderr is None else bytes(self._parts[2]),
        )

    def _with_end(self, data: bytes) -> bytes:
        """On a terminal, end-of-file is a key: Ctrl-D, and twice where a line has begun."""
        if self._terminal is None or self._terminal.closed:
            return data
        key: bytes = termios.tcgetattr(self._terminal.fileno())[6][termios.VEOF]
        return data + (key if not data or data.endswith(b"\n") else key + key)

    async def _feed(self) -> None:
        if self.stdin is None:
            return
        left = self._input or memoryview(b"")
        with contextlib.suppress(OSError):  # a reader that is gone is the command's choice
            while left:
                self.stdin.write(left[:CHUNK])
                self._input = left = left[CHUNK:]
                await self.stdin.drain()
        if self._terminal is None:
            self.stdin.close()

    async def _collect(self, number: int, stream: asyncio.StreamReader | None) -> None:
        while stream is not None and (data := await stream.read(CHUNK)):
            self._parts[number] += data

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Pieces of output as they come, and the end. Little is read ahead: who reads slowly slows it."""
        streams = {number: s for number, s in ((1, self.stdout), (2, self.stderr)) if s is not None}
        while streams or self._pending:
            while self._pending:
                yield self._pending.popleft()
            for number in [number for number, stream in streams.items() if stream.at_eof()]:
                del streams[number]
            if streams:
                await self._read_some(streams)
        await self.wait()
        if self.result is not None:
            yield Exit(self.result)

    async def _read_some(self, streams: dict[int, asyncio.StreamReader]) -> None:
        """Read from whichever has something first. Nothing that was read is lost by a cancellation."""
        tasks = {n: asyncio.ensure_future(stream.read(CHUNK)) for n, stream in streams.items()}
        ready = News()
        for task in tasks.values():
            task.add_done_callback(lambda _: ready.tell())
        try:
            await ready.until(lambda: any(task.done() for task in tasks.values()))
        finally:
            for task in tasks.values():
                task.cancel()  # nobody may wait in a stream that its owner could read from next
            try:
                await ready.insist(lambda: all(task.done() for task in tasks.values()), HARD)
            finally:
                for number, task in tasks.items():
                    if task.done() and not task.cancelled() and (data := task.result()):
                        self._pending.append(self._event(number, data))

    def _event(self, number: int, data: bytes) -> Event:
        offset = self._offsets[number]
        self._offsets[number] += len(data)
        return Stdout(data, offset) if number == 1 else Stderr(data, offset)

    # --- letting go -----------------------------------------------------------------------------

    def close(self) -> None:
        """Kill it if it still runs, and close all pipes. Waits for nothing. Idempotent."""
        self._close_pipes()
        self._life.close()

    def _close_pipes(self) -> None:
        for transport in self._transports:
            transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipes and wait. After an exception, or when cancelled here, kill it first."""
        self._close_pipes()
        try:
            if kind is None:
                await self.wait()
        finally:
            try:
                await self._life.end()
            finally:
                self.close()

    def __del__(self) -> None:
        if hasattr(self, "_life"):
            with contextlib.suppress(OSError):
                self._life.ending.sock.shutdown(socket.SHUT_WR)  # kills, whatever thread this is
            try:
                self._life.loop.call_soon_threadsafe(_forget, self._life, self._transports)
            except RuntimeError:  # the loop is closed
                self._life.drop()

    def __repr__(self) -> str:
        return f"<Process: returncode: {self.returncode} args: {list(self.args)!r}>"


def _forget(life: Life, transports: list[asyncio.BaseTransport]) -> None:
    for transport in transports:
        transport.close()
    life.close()
