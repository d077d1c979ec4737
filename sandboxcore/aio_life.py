"""What asyncio's loop holds of a command: its socket, and the pipes to its streams."""

import asyncio
import contextlib
import errno as E
import fcntl
import os
import socket
import sys
import termios
from typing import IO

from sandboxcore.aio_exec import HARD
from sandboxcore.aio_loop import News
from sandboxcore.command import Ending

TIOCGPTPEER = 0x5441  # ioctl_tty(2); not in termios


class Life:
    """A command's socket on the loop. It does not know its :class:`Process`, which may so be forgotten."""

    def __init__(self, ending: Ending) -> None:
        self.ending, self.news = ending, News()
        self.failure: Exception | None = None
        self.loop = asyncio.get_running_loop()
        self._fd = ending.sock.fileno()
        self.outputs: list[Output] = []
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


class Input(asyncio.StreamReaderProtocol):
    """Whoever writes to the command."""

    def connection_lost(self, exc: Exception | None) -> None:
        # EIO is how a terminal says that nobody has its other side open any more: end-of-file
        super().connection_lost(None if isinstance(exc, OSError) and exc.errno == E.EIO else exc)


class Output(Input):
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
