"""Waiting on an event loop, by its own callbacks: for descriptors, the spawner, a sandbox's birth."""

import asyncio
import contextlib
import errno as E
import os
import select
import signal
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sandboxcore import _native, cgroup
from sandboxcore.cgroup_group import v1
from sandboxcore.errors import SandboxError, SetupError
from sandboxcore.link import ANSWER_PATIENCE, START_PATIENCE, Birth, Home, Link
from sandboxcore.plan import Plan
from sandboxcore.process import ATTEMPTS, help_spawner, reach_spawner
from sandboxcore.request import Request
from sandboxcore.room import Room
from sandboxcore.spawner import Spawner

Done = TypeVar("Done")

TEACH_PATIENCE = 60.0  # seconds for a template: a source may be on a slow network file system
LOCK_PATIENCE = 120.0  # seconds for another process to start, stop or remove a persistent sandbox
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two attempts at what nobody tells of


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
        try:
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled  # whose traceback has this frame: no circle
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
    deadline, pause = loop.time() + seconds, SHORTEST_PAUSE
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
    silence = f"init does not answer within {ANSWER_PATIENCE} s"
    try:
        with link:
            await writable(link.keeper.fileno(), ANSWER_PATIENCE)
    except TimeoutError:
        raise TimeoutError(silence) from None
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
        raise TimeoutError(silence)


# --- the freezer --------------------------------------------------------------------------------------


async def freeze(link: Link, done: Callable[[], None]) -> None:
    """:meth:`Link.freeze`; what is ``done`` behind it is done although cancelled meanwhile."""
    group, pause, held = link.group, link.pause, False

    def stands() -> None:
        nonlocal held
        done()
        held = True

    if pause is not None:
        pause.begin()
    try:
        if group is None or not group.freezable:
            await tell_init(link, signal.SIGSTOP, stands)
        else:
            await _insist(lambda: _stands_still(group), lambda: group.freeze(0), stands)
    finally:
        if not held:
            if group is not None:
                with contextlib.suppress(SandboxError):  # it is gone
                    group.thaw(0)
            if pause is not None:
                pause.end()


async def thaw(link: Link, done: Callable[[], None]) -> None:
    """:meth:`Link.thaw`; what is ``done`` behind it is done although cancelled meanwhile."""
    group, pause, runs = link.group, link.pause, False

    def goes_on() -> None:
        nonlocal runs
        runs = True
        done()

    if pause is not None:  # before that: else whoever dies in between leaves it without limits of time
        pause.end()
    try:
        if group is None or not group.freezable:
            await tell_init(link, signal.SIGCONT, goes_on)
        else:
            await _insist(lambda: _is_thawed(group), lambda: group.thaw(0), goes_on)
    finally:
        if not runs and pause is not None:
            pause.begin()


def _stands_still(group: cgroup.Group) -> bool:
    """Ask the freezer; asking again does no harm, and is what version 1 wants (see cgroup_v1.freeze)."""
    if group._freezes_v2():
        return group._freeze_v2(1, 0)
    return bool(v1().freeze(group._freezer(), 0))


def _is_thawed(group: cgroup.Group) -> bool:
    try:
        group.thaw(0)
    except SetupError as error:
        if error.errno != E.ETIMEDOUT:
            raise
        return False
    return True


async def _insist(attempt: Callable[[], bool], last: Callable[[], None], done: Callable[[], None]) -> None:
    """Make attempts until one succeeds, although cancelled; what the ``last`` one raises is the answer.

    By short timers: cgroup.events cannot be waited for on a loop, because it always polls readable
    (POLLPRI tells of news), and version 1 has nothing to poll at all.
    """
    loop, cancelled = asyncio.get_running_loop(), None
    deadline, pause = loop.time() + ANSWER_PATIENCE, SHORTEST_PAUSE
    try:
        while not attempt():
            if loop.time() >= deadline:
                last()
                break
            try:
                await asyncio.sleep(pause)
            except asyncio.CancelledError as error:
                cancelled = error
            pause = min(2 * pause, LONGEST_PAUSE)
        done()
    finally:
        try:
            if cancelled is not None:
                raise cancelled
        finally:
            del cancelled  # whose traceback has this frame: no circle


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
    """:func:`sandboxcore.process.with_spawner`. Starting a spawner blocks, as starting any program does."""
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


async def born(
    plan: Plan,
    name: str,
    home: Home | None,
    layers: Callable[[Spawner], Sequence[int]],
    *,
    room: Room | None = None,
    patience: float = START_PATIENCE,
) -> Link:
    """A sandbox that stands; with ``home``, a persistent one; ``layers`` says with what it begins, ``room``
    where it takes a place; ``patience``: seconds. Whoever is cancelled here leaves none."""

    async def action(connection: Spawner) -> Link:
        try:
            birth = Birth.send(plan, connection, name, home, layers=layers(connection), room=room)
        except SandboxError:
            raise
        except OSError as error:
            raise unsent(error) from error
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
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
