"""stdin, stdout and stderr of one command on an event loop: what ``csrc/stream.c`` is for blocking callers.

The command has pipes, whose other ends are here, and non-blocking. The caller's descriptors may be shared
with others: their flags are left alone, and each transfer is asked for without waiting where the kernel
can (RWF_NOWAIT: preadv2(2)).
"""

import array
import asyncio
import contextlib
import errno as E
import fcntl
import os
import select
import stat
import termios
from collections.abc import Callable

CHUNK = 65536


def _waiting(fd: int) -> int:
    """How many bytes are in a pipe: ioctl_pipe(2). Another command may have been given it (SCM_RIGHTS), and
    write for ever."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


class Store:
    """Captured bytes: everything up to ``limit``, beyond that the first and the last half of it."""

    def __init__(self, limit: int | None) -> None:
        self.total = 0
        self._limit = limit
        self._tail_size = 0 if limit is None else limit // 2
        self._head, self._tail = bytearray(), bytearray()

    @property
    def exceeded(self) -> bool:
        """Whether more came than is kept."""
        return self._limit is not None and self.total > self._limit

    def add(self, data: bytes) -> None:
        """Keep a piece, or what of it is to be kept."""
        self.total += len(data)
        if self._limit is None:
            self._head += data
            return
        room = self._limit - self._tail_size - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > self._tail_size:
            del self._tail[: len(self._tail) - self._tail_size]

    def value(self) -> bytes:
        """What is kept, in order."""
        return bytes(self._head + self._tail)


class Ready:
    """Calls back when a descriptor of somebody else can be read or written; a copy of it is ours."""

    def __init__(self, fd: int, *, write: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._write = write
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._soon: asyncio.Handle | None = None
        self.fd = os.dup(fd)

    def wait(self, callback: Callable[[], None]) -> None:
        """Call back, once or more often, until :meth:`forget`. What cannot be polled is always ready."""
        try:
            (self._loop.add_writer if self._write else self._loop.add_reader)(self.fd, callback)
        except PermissionError:
            self._soon = self._loop.call_soon(callback)

    def forget(self) -> None:
        """No more calls."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        else:
            (self._loop.remove_writer if self._write else self._loop.remove_reader)(self.fd)

    def close(self) -> None:
        self.forget()
        os.close(self.fd)

    def read(self) -> bytes:
        """One piece; nothing at the end. Raises BlockingIOError."""
        buffer = bytearray(CHUNK)
        try:
            return bytes(buffer[: os.preadv(self.fd, [buffer], -1, os.RWF_NOWAIT)])
        except OSError as error:
            if not self._may_block(error):
                raise
        return os.read(self.fd, CHUNK)

    def write(self, data: memoryview) -> int:
        """Write some, no more than a pipe that polls writable takes. Raises BlockingIOError."""
        piece = data[: CHUNK if self._regular else select.PIPE_BUF]
        try:
            return os.pwritev(self.fd, [piece], -1, os.RWF_NOWAIT)
        except OSError as error:
            if not self._may_block(error):
                raise
        return os.write(self.fd, piece)

    def _may_block(self, error: OSError) -> bool:
        """A regular file says EAGAIN when it is not cached, but never blocks for long."""
        return error.errno == E.EOPNOTSUPP or (error.errno == E.EAGAIN and self._regular)


class Captured:
    """A pipe whose content is kept. ``flooded`` is called when it becomes more than the limit."""

    def __init__(
        self, fd: int, limit: int | None, tell: Callable[[], None], flooded: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd, self._tell, self._flooded = fd, tell, flooded
        self.store = Store(limit)
        self.done = False
        self._loop.add_reader(fd, self._read)

    @property
    def total(self) -> int:
        """How many bytes came."""
        return self.store.total

    def _read(self) -> bool:
        """Take one piece; False when there is none."""
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self.close()
            return False
        before = self.store.exceeded
        self.store.add(data)
        if self.store.exceeded and not before:
            self._flooded()
        return True

    def finish(self) -> None:
        """The writers are gone, and the stream ends behind what is in the pipe now."""
        last = self.total + (0 if self.done else _waiting(self._fd))
        while self.total < last and self._read():
            pass
        self.close()

    def close(self) -> None:
        """Let go. Idempotent."""
        if not self.done:
            self.done = True
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._tell()


class Relayed:
    """A pipe whose content goes to a descriptor of the caller."""

    def __init__(self, fd: int, target: int, tell: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd, self._tell = fd, tell
        self.total = 0
        self.done = False
        self._piece = memoryview(b"")
        self._last: int | None = None
        self._target = Ready(target, write=True)
        self._loop.add_reader(fd, self._read)

    def _read(self) -> None:
        size = CHUNK if self._last is None else min(CHUNK, self._last - self.total)
        try:
            data = os.read(self._fd, size)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self.total += len(data)
        self._piece = memoryview(data)
        self._loop.remove_reader(self._fd)
        self._target.wait(self._flush)

    def _flush(self) -> None:
        size = 0
        try:
            size = self._target.write(self._piece)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:  # its reader is gone: as with any broken pipe, the payload gets SIGPIPE
            self.close()
            return
        self._piece = self._piece[size:]
        self._target.forget()
        if self._piece:
            self._target.wait(self._flush)
        elif self._last is not None:
            self._read()
        else:
            self._loop.add_reader(self._fd, self._read)

    def finish(self) -> None:
        """The writers are gone: pass on what is in the pipe now, then it is done."""
        if not self.done:
            self._last = self.total + _waiting(self._fd)
            if not self._piece:
                self._read()

    def close(self) -> None:
        """Let go. Idempotent."""
        if not self.done:
            self.done = True
            self._loop.remove_reader(self._fd)
            self._target.close()
            os.close(self._fd)
            self._tell()


class Fed:
    """A pipe that is fed with bytes, or from a descriptor of the caller."""

    def __init__(self, fd: int, data: bytes | None, source: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._piece = memoryview(b"" if data is None else data).cast("B")
        self._source: Ready | None = None
        self.done = False
        if data is None:
            self._source = Ready(source, write=False)
        self._next()

    def _next(self) -> None:
        """Wait for whatever can go on: the pipe, the source; or this was the end."""
        if self._piece:
            self._loop.add_writer(self._fd, self._write)
        elif self._source is None:
            self.close()
        else:
            # A pipe's end for writing is readable when nobody reads it any more: then take no more either
            self._loop.add_reader(self._fd, self.close)
            self._source.wait(self._read)

    def _write(self) -> None:
        try:
            self._piece = self._piece[os.write(self._fd, self._piece[: 16 * CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:  # a reader that is gone is the payload's choice, not an error
            self.close()
            return
        if not self._piece:
            self._loop.remove_writer(self._fd)
            self._next()

    def _read(self) -> None:
        assert self._source is not None
        self._loop.remove_reader(self._fd)
        self._source.forget()
        data: bytes | None = None
        with contextlib.suppress(BlockingIOError, InterruptedError):
            try:
                data = self._source.read()
            except BlockingIOError:
                raise
            except OSError:  # the source is broken: so it has ended
                data = b""
        if data == b"":
            self.close()
            return
        self._piece = memoryview(data or b"")
        self._next()

    def close(self) -> None:
        """Let go: end-of-file for the command. Idempotent."""
        if not self.done:
            self.done = True
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            if self._source is not None:
                self._source.close()
            os.close(self._fd)
