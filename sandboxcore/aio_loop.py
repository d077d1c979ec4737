"""Waiting on an event loop, by its own callbacks: for descriptors, the spawner, a sandbox's birth."""

import asyncio
import contextlib
import errno as E
import os
import select
import weakref
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandboxcore import _native
from sandboxcore.errors import SandboxError
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE, Birth, Home, Link
from sandboxcore.plan import Plan
from sandboxcore.process import ATTEMPTS, help_spawner, reach_spawner
from sandboxcore.request import Request
from sandboxcore.spawner import Spawner

Done = TypeVar("Done")

TEACH_PATIENCE = 60.0  # seconds for a template: a source may be on a slow network file system
LOCK_PATIENCE = 120.0  # seconds for another process to start, stop or remove a persistent sandbox
LONGEST_PAUSE = 0.05  # seconds between two attempts at what nobody tells of


class News:
    """What callbacks change and coroutines wait for."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        """Have everyone who waits look again."""
        self._event.set()

    async def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait until a condition holds; False if it still does not after ``seconds``."""
        # Not asyncio.timeout(): before Python 3.11.3 it never expires in a task that is being cancelled
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            self.tell()

        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, expire)
        try:
            while not condition():
                if expired:
                    return False
                self._event.clear()
                await self._event.wait()
        finally:
            if timer is not None:
                timer.cancel()
        return True

    async def insist(self, condition: Callable[[], bool], seconds: float) -> bool:
        """The same though cancelled meanwhile; the cancellation is raised in the end."""
        loop = asyncio.get_running_loop()
        deadline, cancelled = loop.time() + seconds, None
        while True:
            try:
                held = await self.until(condition, deadline - loop.time())
                break
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return held


class Flag(News):
    """Something that has happened or not."""

    def __init__(self) -> None:
        super().__init__()
        self._is_set = False

    def set(self) -> None:
        """It has."""
        self._is_set = True
        self.tell()

    def is_set(self) -> bool:
        """Whether it has."""
        return self._is_set


async def readable(fd: int, seconds: float | None = None) -> None:
    """Wait for a descriptor that nobody else waits for. Raises TimeoutError."""
    loop, ready = asyncio.get_running_loop(), Flag()
    loop.add_reader(fd, ready.set)
    try:
        if not await ready.until(ready.is_set, seconds):
            raise TimeoutError
    finally:
        loop.remove_reader(fd)


async def patiently(action: Callable[[], Done], seconds: float, text: str) -> Done:
    """Try what raises BlockingIOError until it does not. Raises TimeoutError, with ``text``."""
    loop = asyncio.get_running_loop()
    deadline, pause = loop.time() + seconds, 0.001
    while True:
        with contextlib.suppress(BlockingIOError):
            return action()
        if loop.time() >= deadline:
            raise TimeoutError(text)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def writable(fd: int, seconds: float) -> None:
    """Wait until a blocking socket takes a message at once; many may wait. Raises TimeoutError."""
    if _takes(fd):
        return
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    copy = os.dup(fd)  # a loop has one callback for each descriptor; and this one stays
    try:
        while not _takes(copy):
            ready = Flag()
            loop.add_writer(copy, ready.set)
            if not await ready.until(ready.is_set, deadline - loop.time()):
                raise TimeoutError
            loop.remove_writer(copy)
    finally:
        loop.remove_writer(copy)
        os.close(copy)


def _takes(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    return bool(poller.poll(0))


async def tell_init(link: Link, number: int, done: Callable[[], None]) -> None:
    """:meth:`Link.tell_init`; what is ``done`` behind it is done although cancelled meanwhile."""
    loop, answered = asyncio.get_running_loop(), Flag()
    with link.ask_init(number) as answer:
        loop.add_reader(answer.fileno(), answered.set)
        try:
            await answered.insist(answered.is_set, ANSWER_PATIENCE)
        finally:
            loop.remove_reader(answer.fileno())
            if answered.is_set():
                link.hear_init(answer)
                done()
    if not answered.is_set():
        raise TimeoutError(f"init does not answer within {ANSWER_PATIENCE} s")


async def has_ended(link: Link) -> bool:
    """Whether init has. Its sockets are closed a moment before that shows."""
    try:
        with link:
            copy = os.dup(link.pidfd)
    except _native.NativeFailure:  # closed by somebody who ended it
        return True
    try:
        await readable(copy, 1)
        return True
    except TimeoutError:
        return False
    finally:
        os.close(copy)


# --- the spawner ------------------------------------------------------------------------------------

_teaching: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


async def _teach(connection: Spawner, plan: Plan) -> None:
    """:meth:`Spawner.teach`; who needs the same template waits for the one that asked first."""
    if plan.id in connection.known:
        return
    async with _teaching.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        if plan.id in connection.known:
            return
        await _spawner_takes(connection)
        with connection.ask(plan) as answer:
            try:
                await readable(answer.fileno(), TEACH_PATIENCE)
                record = _native.receive(answer.fileno())
            except TimeoutError:
                raise _native.NativeFailure.of("spawner", 11, E.ETIME) from None
            except OSError as error:
                raise _native.NativeFailure.of("spawner", 11, error.errno or E.EIO) from error
        if record is None:
            raise _native.NativeFailure.of("spawner", 11, E.EPIPE)
        if record.error:
            raise record.error
        connection.known.add(plan.id)


async def _spawner_takes(connection: Spawner) -> None:
    try:
        await writable(connection.fd, START_PATIENCE)
    except TimeoutError:
        raise _native.NativeFailure.of("spawner", 18, E.ETIME) from None


async def with_spawner(
    plan: Plan, request: Request | None, action: Callable[[Spawner], Awaitable[Done]]
) -> Done:
    """:func:`sandboxcore.process.with_spawner`. Starting a spawner blocks, as starting any program does;
    nothing after that."""
    for attempt in range(ATTEMPTS):
        connection = reach_spawner(plan, request)
        try:
            await _teach(connection, plan)
            await _spawner_takes(connection)
            return await action(connection)
        except _native.NativeFailure as failure:
            help_spawner(plan, request, connection, failure, last=attempt == ATTEMPTS - 1)
    raise AssertionError("unreachable")


def unsent(error: OSError) -> _native.NativeFailure:
    """What to make of a request that could not be sent to the spawner."""
    code = error.errno or 0
    return _native.NativeFailure.of("spawner" if code in (E.EPIPE, E.ECONNRESET) else "host", 11, code)


async def born(plan: Plan, name: str, home: Home | None = None) -> Link:
    """A sandbox that stands; with ``home``, a persistent one. Whoever is cancelled here leaves none."""

    async def action(connection: Spawner) -> Link:
        try:
            birth = Birth.send(plan, connection, name, home)
        except SandboxError:
            raise
        except OSError as error:
            raise unsent(error) from error
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_PATIENCE
        try:
            while True:
                await readable(birth.answer.fileno(), deadline - loop.time())
                with contextlib.suppress(BlockingIOError):
                    if link := birth.hear():
                        return link
        except TimeoutError:
            birth.abandon()
            raise _native.NativeFailure.of("init", 20, E.ETIME) from None
        except BaseException:
            birth.abandon()
            raise

    return await with_spawner(plan, None, action)
