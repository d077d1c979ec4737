"""A command that runs in a living sandbox, for those who know :class:`asyncio.subprocess.Process`."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import termios
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import IO, Self

from sandboxcore.aio_exec import HARD
from sandboxcore.aio_life import TIOCGPTPEER, Input, Life, Output
from sandboxcore.aio_loop import News
from sandboxcore.command import Ending, Event, Exit, Scope, Stderr, Stdout
from sandboxcore.link import START_PATIENCE
from sandboxcore.pipes import CHUNK, Pipes
from sandboxcore.result import ExecResult


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
        transport, output = await loop.connect_read_pipe(lambda: Output(reader, self._life, file), file)
        self._transports.append(transport)
        self._life.outputs.append(output)
        if self._life.over():
            output.finish()
        return reader

    async def _writer(self, file: IO[bytes]) -> asyncio.StreamWriter:
        loop = self._life.loop
        nobody = asyncio.StreamReader(loop=loop)
        transport, protocol = await loop.connect_write_pipe(lambda: Input(nobody, loop=loop), file)
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
