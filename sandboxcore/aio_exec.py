"""One command from request to result on an event loop: what ``csrc/run.c`` is for blocking callers.

Letting go of the command's socket kills the command; the pidfd is the second way, where nobody answers.
"""

import asyncio
import contextlib
import dataclasses
import errno as E
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

from sandboxcore import _native
from sandboxcore.aio_loop import News, unsent
from sandboxcore.aio_streams import Captured, Fed, Relayed
from sandboxcore.groups import RunGroup
from sandboxcore.link import Link
from sandboxcore.request import HOLD, Request

SOFT, HARD = 0.5, 2.0  # seconds: the chance of init or launcher to report; then the kernel's
LOST = 0.05  # seconds for init to kill what a dead launcher left
RELAY_PATIENCE = 0.2  # seconds at least for whoever reads what is relayed
LOOK = 0.005  # seconds at least between two looks at what is used up
PAUSE_LOOK = 0.02  # seconds between two looks whether a suspended sandbox goes on

Reason = Literal["timed_out", "out_of_memory", "out_of_time", "flooded"]  # flags of NativeResult


async def converse(
    kind: Literal["RUN", "EXEC"],
    address: int,
    request: Request,
    streams: _native.Streams,
    seconds: float | None,
    *,
    link: Link | None = None,
    group: RunGroup | None = None,
    held: Sequence[int] = (),
    kill_flood: bool = False,
    spare: Callable[[], bool] = lambda: False,
) -> _native.NativeResult:
    """Run a request to its end. Raises NativeFailure.

    ``address`` leads to the spawner (RUN), or to the launchers of the sandbox that ``link`` leads to (EXEC).
    ``group`` is the fresh sandbox's own (RUN), ``held`` what its init keeps open. With ``kill_flood`` more
    output than is kept ends it. No time counts while the sandbox is suspended.

    When cancelled, the command is gone before that is raised. A command that cannot be killed otherwise
    takes its sandbox with it; after a cancellation not if ``spare()``.
    """
    conversation = Conversation(kind, link, group, spare)
    try:
        conversation.send(address, request, streams, held, kill_flood=kill_flood)
        return await conversation.result(seconds)
    except GeneratorExit:  # there is no loop any more
        raise
    except BaseException:
        await conversation.abandon()
        raise
    finally:
        conversation.close()


def _nothing() -> None:
    pass


class Conversation:
    """The socket of one command, and its streams."""

    def __init__(
        self,
        kind: Literal["RUN", "EXEC"],
        link: Link | None,
        group: RunGroup | None,
        spare: Callable[[], bool],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._fresh, self._kind, self._spare = kind == "RUN", kind, spare
        self._group, self._pause = group, None if link is None else link.pause
        self._began, self._since = time.monotonic_ns(), self._now()
        self._news = News()
        self._control: socket.socket | None = None
        self._feed: Fed | None = None
        self._outputs: dict[int, Captured | Relayed] = {}
        self._theirs: list[int] = []
        # init: of the run, or of the sandbox. A copy, which stays valid when the sandbox is closed meanwhile.
        self._pidfd = os.dup(link.pidfd) if link is not None and link.pidfd >= 0 else -1
        self._record: _native.Record | None = None
        self._failure: _native.NativeFailure | None = None
        self._applied = b""
        self._lost_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._sent = self._started = self._ended = self._lost = self._dead = False
        self._killed = self._given_up = False
        self._reason: Reason | None = None  # why we end it

    # --- start ------------------------------------------------------------------------------------

    def send(
        self,
        address: int,
        request: Request,
        streams: _native.Streams,
        held: Sequence[int],
        *,
        kill_flood: bool,
    ) -> None:
        """Make the channels and send the request. Raises NativeFailure."""
        group = self._group
        body = request.within([*(() if group is None else group.uses), *HOLD * len(held)])
        more = [*request.pass_fds, *(() if group is None else group.fds), *held]
        try:
            try:
                self._open(streams, self._flood if kill_flood else _nothing)
            except OSError as error:
                raise _native.NativeFailure.of("host", 10, error.errno or 0) from error
            try:
                _native.send(address, self._kind, body, [*self._theirs, *more])
            except OSError as error:
                raise unsent(error) from error
            self._sent = True
        finally:
            for fd in self._theirs:
                os.close(fd)
            self._theirs.clear()

    def _open(self, streams: _native.Streams, flooded: Callable[[], None]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.append(theirs.detach())
        self._loop.add_reader(self._control.fileno(), self._hear)
        if streams.input is not None or streams.stdin >= 0:
            self._feed = Fed(self._pipe(1, streams.owner), streams.input, streams.stdin)
        relays = dict(streams.relay)
        for number in (1, 2):
            if number in streams.capture:
                fd = self._pipe(0, streams.owner)
                self._outputs[number] = Captured(fd, streams.limit, self._news.tell, flooded)
            elif number in relays:
                fd = self._pipe(0, streams.owner)
                self._outputs[number] = Relayed(fd, relays[number], self._news.tell)

    def _pipe(self, our_end: int, owner: tuple[int, int] | None) -> int:
        ends = os.pipe2(os.O_CLOEXEC)
        self._theirs.append(ends[1 - our_end])
        ours = ends[our_end]
        try:
            if owner is not None:
                os.fchown(ours, *owner)  # so that /dev/stdout can be opened again inside
            os.set_blocking(ours, False)
        except OSError:
            os.close(ours)
            raise
        return ours

    # --- the control socket -------------------------------------------------------------------------

    def _hear(self) -> None:
        assert self._control is not None
        try:
            record = _native.receive(self._control.fileno())
        except BlockingIOError:
            return
        except ConnectionResetError:
            record = None
        except OSError as error:
            self._failure = _native.NativeFailure.of("spawner", 15, error.errno or 0)
            self._drop_control()
            self._news.tell()
            return
        if record is None:
            self._hung_up()
        else:
            self._take(record)
        self._news.tell()

    def _take(self, record: _native.Record) -> None:
        if record.kind == "PIDFD" and self._fresh and self._pidfd < 0:
            self._pidfd = record.fd
            if self._given_up:
                self._kill()
            return
        if record.fd >= 0:
            os.close(record.fd)
        if self._ended:
            return
        if record.error is not None:
            self._failure = record.error
        elif record.kind == "APPLIED":
            self._applied += record.text
        elif record.kind == "STARTED":
            self._started = True
        elif record.kind == "EXIT":
            if record.status != signal.SIGKILL:
                self._reason = None  # it ended just in time
            self._end(record)
        else:
            self._failure = _native.NativeFailure.of("spawner", 16, E.EPROTO)

    def _hung_up(self) -> None:
        """Nobody holds the other end: init or the launcher is gone, or never was."""
        self._drop_control()
        if self._fresh and self._pidfd < 0:
            self._failure = self._failure or _native.NativeFailure.of("spawner", 15, E.EPIPE)
            return
        self._lost = not self._ended
        if self._lost and not self._fresh and not self._killed:
            self._lost_timer = self._loop.call_later(LOST, self._launcher_died)
        elif self._fresh or not self._ended:
            self._loop.add_reader(self._pidfd, self._died)

    def _launcher_died(self) -> None:
        """It was killed, and so the command; init lives, and has killed what was left of it."""
        if not self._settled():
            self._end(None)
        self._news.tell()

    def _died(self) -> None:
        """Init has ended, and so everything has."""
        self._loop.remove_reader(self._pidfd)
        self._dead = True
        if not self._ended and self._failure is None:
            self._end(None)
        self._news.tell()

    def _end(self, record: _native.Record | None) -> None:
        self._ended, self._record = True, record
        for output in self._outputs.values():
            output.finish()

    def _drop_control(self) -> None:
        if self._control is not None:
            self._loop.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    # --- the end --------------------------------------------------------------------------------------

    async def result(self, seconds: float | None) -> _native.NativeResult:
        """Wait for the end, ``seconds`` after the beginning at the latest. Raises NativeFailure."""
        if self._group is not None:
            if self._group.watch.event >= 0:
                self._loop.add_reader(self._group.watch.event, self._look_at_group, True)
            self._look_at_group()
        if not await self._within(seconds, self._since, self._decided):
            self._condemn("timed_out")
        if not self._settled():
            self._shut_down()
            if not await self._within(SOFT, self._now(), self._settled):
                self._kill()
                if not await self._within(HARD, self._now(), self._settled):
                    raise _native.NativeFailure.of("init", 20, E.ETIME)
        if self._failure is not None:
            raise self._failure
        # Whoever reads what is relayed has that time, too
        left = None if seconds is None else seconds - (self._now() - self._since) / 1e9
        await self._news.until(self._drained, None if left is None else max(left, RELAY_PATIENCE))
        return self._made()

    def _now(self) -> int:
        """Nanoseconds of a clock that stands still while the sandbox is suspended."""
        now = time.monotonic_ns()
        return now if self._pause is None else now - self._pause.until(now)

    async def _within(self, seconds: float | None, since: int, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False if it still does not so many seconds after ``since``."""
        if seconds is None:
            return await self._news.until(condition)
        while (left := seconds - (self._now() - since) / 1e9) > 0:
            paused = self._pause is not None and self._pause.paused
            if await self._news.until(condition, max(left, PAUSE_LOOK) if paused else left):
                return True
        return condition()

    def _decided(self) -> bool:
        """Whether it has ended, or we are to end it."""
        return self._settled() or self._reason is not None

    def _condemn(self, reason: Reason) -> None:
        if not self._decided():
            self._reason = reason
            self._news.tell()

    def _flood(self) -> None:
        self._condemn("flooded")

    def _look_at_group(self, told: bool = False) -> None:
        """Now, and whenever it may have used up its memory or its CPU time next."""
        self._watch_no_more()
        if self._group is None:
            return
        watch = self._group.watch
        if watch.out_of_memory(told=told):
            self._condemn("out_of_memory")
        elif watch.out_of_time():
            self._condemn("out_of_time")
        if not self._decided() and (pause := watch.next) is not None:
            self._watch_timer = self._loop.call_later(max(pause, LOOK), self._look_at_group)

    def _watch_no_more(self) -> None:
        if self._watch_timer is not None:
            self._watch_timer.cancel()
            self._watch_timer = None

    def _settled(self) -> bool:
        return self._ended or self._failure is not None

    def _drained(self) -> bool:
        return all(output.done for output in self._outputs.values())

    def _made(self) -> _native.NativeResult:
        now = time.monotonic_ns()
        if self._record is None:
            done = _native.lost_result(self._began, now)
        else:
            done = _native.ended_result(self._record, self._began, now, self._applied)
        outputs = [self._outputs.get(number) for number in (1, 2)]
        kept = [output.store.value() if isinstance(output, Captured) else b"" for output in outputs]
        totals = [output.total if output else 0 for output in outputs]
        return dataclasses.replace(
            done,
            timed_out=self._reason == "timed_out",
            out_of_memory=done.out_of_memory or self._reason == "out_of_memory",
            out_of_time=done.out_of_time or self._reason == "out_of_time",
            flooded=self._reason == "flooded",
            lost=self._lost,
            applied=self._applied,
            output=(kept[0], kept[1]),
            totals=(totals[0], totals[1]),
        )

    def _shut_down(self) -> None:
        """Ask for its end: init or the launcher kills it, and says so."""
        if self._control is not None:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_WR)

    def _kill(self) -> None:
        self._killed = True
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def abandon(self) -> None:
        """After a failure or a cancellation: kill what may be left and wait for it, but not for ever."""
        if not self._sent or self._gone():
            return
        self._given_up = True
        self._shut_down()
        if self._fresh:
            self._kill()
        try:
            await self._news.insist(self._gone, HARD)
        finally:
            if not self._fresh and self._started and not self._gone() and not self._spare():
                self._kill()

    def _gone(self) -> bool:
        if self._fresh:
            return self._control is None and (self._pidfd < 0 or self._dead)
        return self._settled() or self._control is None

    def close(self) -> None:
        """Let go of everything."""
        self._drop_control()
        if self._lost_timer is not None:
            self._lost_timer.cancel()
        self._watch_no_more()
        if self._group is not None and self._group.watch.event >= 0:
            self._loop.remove_reader(self._group.watch.event)
        # A traceback may keep us: not what has a descriptor, and not in a circle
        self._failure = self._pause = self._group = None
        if self._feed is not None:
            self._feed.close()
        for output in self._outputs.values():
            output.close()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
