"""Who fills a pool: the thread that starts, resets and ends sandboxes, :class:`Stock`."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import replace
from typing import Any

from sandboxcore.errors import InvalidTransition, TooManySandboxes
from sandboxcore.events import LOGGER
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import ANSWER_PATIENCE
from sandboxcore.pool_reset import look, prime, survivors
from sandboxcore.pool_shelf import Claim, Member, Shelf, end_and_wait
from sandboxcore.pool_total import LOOK
from sandboxcore.sandbox import Sandbox

TICK = 0.005  # seconds between two looks while there are claims, which would else have to wake the thread
HOT = 2.0  # seconds after a claim in which others are expected
QUIET = 0.003  # seconds after a claim in which nothing starts or ends, for whoever claimed wants the CPU
PATIENCE = 0.02  # seconds for which that may go on, claim after claim; the less the fewer are left
MANY = 16  # of those that were given back: then they end at once
AGAIN = (0.05, 5.0)  # seconds after a start that failed, twice as long each time


class Stock(Shelf):
    """A shelf, and the thread that keeps it filled.

    Everything that takes time (starting, resetting, destroying) is done by this one thread, one after the
    other, and by nobody else but for cold starts.
    """

    finished = True  # nobody fills it, and nothing is left
    _thread: threading.Thread | None = None
    _hasty = 0  # who waits for it to be full
    _failing = False  # the last start, which was no matter of room
    _wanting_since = _started_at = _failed_at = _pause = 0.0

    # --- opening and closing ----------------------------------------------------------------------

    def open(self) -> None:
        """Begin to have some ready. The spawner knows the plan: it is not to be born of a thread that may be
        of another priority. Idempotent; raises RuntimeError where there can be no more threads."""
        self.check()
        while True:
            with self._changed:
                if self.state == "closed":
                    raise InvalidTransition("pool", "closed", "start")
                if self.state == "open":
                    return
                last = self._thread
                if last is None or not last.is_alive():
                    self._begin()
                    return
            last.join()

    def _begin(self) -> None:
        """Have a thread. The caller has the lock."""
        # Daemonic, or the interpreter would wait for it before it calls what was registered with atexit.
        thread = threading.Thread(
            target=_keep, args=(weakref.ref(self), self._wake), name="sandboxcore-pool", daemon=True
        )
        before, self.state, self.finished = self.state, "open", False  # before the thread looks
        self._wake.clear()
        try:
            thread.start()
        except BaseException:
            self.state, self.finished = before, True
            raise
        self._thread = thread
        weakref.finalize(self, self._wake.set).atexit = False
        _open.add(self)
        self.total.join(self)

    def shut(self, state: str = "draining") -> None:
        """Have nothing ready any more: the thread ends everything, and itself. Without waiting. Idempotent;
        nothing in a process that was forked."""
        with contextlib.suppress(ConnectionError):
            self.check()
            with self._changed:
                self.state = "closed" if "closed" in (state, self.state) else state
                self._changed.notify_all()
            self._wake.set()
            if self._thread is None:
                self.finish()

    def await_end(self, timeout: float | None) -> None:
        """Wait until the thread has ended everything. Raises TimeoutError. In a process that was forked there
        is no thread, and the lock may be one's who is not there, either."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            thread = None if self.state == "open" else self._thread  # open: it has, and another one was begun
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                raise TimeoutError("the pool still starts or ends a sandbox")

    def finish(self) -> None:
        """End everything that nobody has."""
        with self._changed:
            members, self._members = self._members, deque()
            self._passing += len(members)
        for member in members:
            self._discard(member, "draining", wait=True)
        self.tidy_up()
        deadline = time.monotonic() + ANSWER_PATIENCE
        while self._leaving and time.monotonic() < deadline:
            self.passing()
            time.sleep(LOOK)

    def resize(self, min_warm: int | None, max_warm: int | None) -> None:
        """Other bounds. Raises SpecError."""
        self.check()
        with self._changed:
            old = self.config
            self.config = replace(
                old,
                min_warm=old.min_warm if min_warm is None else min_warm,
                max_warm=old.max_warm if max_warm is None else max_warm,
            )
            self._wake.set()

    def await_full(self, timeout: float | None, *, least: int | None = None) -> bool:
        """Wait until so many are ready, default what is wanted, without regard for anybody's quiet."""
        self.check()
        with self._changed:
            self.haste(1)
            try:
                self._changed.wait_for(lambda: self.state != "open" or self.is_full(least), timeout)
            finally:
                self.haste(-1)
            return self.is_full(least)

    def haste(self, number: int) -> None:
        """So many more wait for it to be full. The caller has the lock, or is alone."""
        self._hasty += number
        if number > 0:
            self._failed_at = 0.0
            self._wake.set()

    def is_full(self, least: int | None = None) -> bool:
        """Whether there are so many, default as many as are wanted."""
        return len(self._members) >= (self.target(time.monotonic()) if least is None else least)

    # --- the thread -----------------------------------------------------------------------------------

    def round(self) -> float | None:
        """Do what is due, one start at most. Returns in how many seconds to look again; None: when woken."""
        with self._changed:
            rest = self._rest(time.monotonic())
        if not rest:
            self.tidy_up()
        self._expire()
        with self._changed:
            now = time.monotonic()
            if self.state != "open" or (self._back and not rest):
                return 0
            wait = self._wait(now)
            if self._back:
                wait = rest if wait is None else min(wait, rest)
            if wait != 0:
                return self._park(now, wait)
        self._refill()
        return 0

    def _rest(self, now: float) -> float:
        """How long what was given back stays as it is, for its end takes processor time, too. The caller has
        the lock."""
        in_need = self.state != "open" or self._waiting or self._hasty
        if in_need or not 0 < len(self._back) < MANY:
            return 0.0
        return max(0.0, min(self._claimed_at + QUIET, self._back_since + PATIENCE) - now)

    def _wait(self, now: float) -> float | None:
        """How long until the next start; None: none is wanted. The caller has the lock."""
        if self.is_full():
            self._wanting_since = 0.0
            if not self._members:
                return None
            return max(0.001, self._members[0].since + self.config.warm_ttl - now)
        self._wanting_since = self._wanting_since or now
        waits = [0.0, self._failed_at + self._pause - now]
        if self.config.refill_rate is not None:
            waits.append(self._started_at + 1 / self.config.refill_rate - now)
        if self._members and not self._waiting and not self._hasty:
            patience = PATIENCE * len(self._members) / self.target(now)
            waits.append(min(self._claimed_at + QUIET, self._wanting_since + patience) - now)
        return max(waits)

    def _park(self, now: float, wait: float | None) -> float | None:
        """How long to sleep. While claims are to be expected none of them wakes the thread, which looks by
        itself: to wake one up costs more than the rest of a claim. The caller has the lock."""
        if now < self._claimed_at + HOT:
            return TICK if wait is None else min(wait, TICK)
        self._parked = True
        return wait

    def _refill(self) -> None:
        if not self.total.take():
            self._fail(None)
            return
        began = self._started_at = time.monotonic()
        sandbox = self.made(self.spec, {})
        with self._changed:
            self._passing += 1
        try:
            member = self._begun(sandbox)
        except Exception as error:  # whoever claims meets it, too, and is told
            self.total.give()
            self._fail(error)
            self.end(sandbox)
            return
        self._pause = self._wanting_since = 0.0
        self._failing = False
        seconds = time.monotonic() - began
        self.started(seconds, ahead=True)
        self._add(member, "pool.refilled", seconds=seconds)

    def _begun(self, sandbox: Sandbox) -> Member:
        sandbox.start()
        if not self.config.reset:
            prime(sandbox)
        return Member(sandbox, time.monotonic(), look(sandbox) if self.config.reset else None)

    def _add(self, member: Member, kind: str, **data: Any) -> None:
        """It was counted as passing, and is ready, if it is still wanted."""
        with self._changed:
            going_on = self.state == "open"
            wanted = going_on and len(self._members) < self.config.max_warm
            if wanted:
                self._members.append(member)
                self._passing -= 1
                self.total.move()
                self._changed.notify_all()
        if wanted:
            self.note(kind, member.sandbox, **data)
            self.on_change()
        else:
            self._discard(member, "surplus" if going_on else "draining", wait=True)

    def _fail(self, error: Exception | None) -> None:
        """Try again later, and later still if there is no other reason than that there are too many."""
        with self._changed:
            self._failed_at = time.monotonic()
            crowded = error is None or isinstance(error, TooManySandboxes)
            self._pause = min(AGAIN[1], max(AGAIN[0], 0.0 if crowded else 2 * self._pause))
            self._count["refill_failures"] += not crowded
            first, self._failing = not (crowded or self._failing), self._failing or not crowded
        if not crowded:  # the first of a row, or nobody would hear why the pool stays empty
            level = logging.WARNING if first else logging.DEBUG
            LOGGER.log(level, "pool: a sandbox could not be started ahead of time: %s", error)

    def yield_place(self) -> None:
        """Start none for a moment: somebody needs a place more."""
        self._fail(None)

    def _expire(self) -> None:
        """Let go of those that are too old, too many, or dead."""
        now, gone = time.monotonic(), []
        with self._changed:
            kept: deque[Member] = deque()
            surplus = len(self._members) - self.config.max_warm
            for number, member in enumerate(self._members):
                old = now >= member.since + self.config.warm_ttl
                reason = "surplus" if number < surplus else "expired" if old else ""
                reason = reason if member.alive() else "died"
                gone += [(member, reason)] if reason else []
                kept.extend([] if reason else [member])
            self._members = kept
            self._passing += len(gone)
            self._reap()
        for member, reason in gone:
            self._discard(member, reason)

    def tidy_up(self) -> None:
        """What was given back is reset, or ends; where there is no thread that looks for it, it is waited
        for."""
        while True:
            with self._changed:
                if not self._back:
                    return
                sandbox, claim = self._back.popleft()
                self._passing += 1
            try:
                if self.config.reset and self.state == "open":
                    self._renew(sandbox, claim)
            finally:
                self.end(sandbox, wait=self.state != "open")

    def _renew(self, used: Sandbox, claim: Claim) -> None:
        """Have another isolation take its place, and see that nothing of it is there."""
        if claim.view is None or len(self._members) >= self.config.max_warm or not self.total.take():
            return
        began, found = time.monotonic(), []
        fresh, member = self.made(self.spec, {}), None
        with self._changed:
            self._passing += 1
        try:
            member = self._begun(fresh)
            found = survivors(claim.view, member.view, there=used.state is SandboxState.RUNNING)
            end_and_wait(used)  # only now: the number of a namespace is given again when that is gone
        except TooManySandboxes:
            self.total.give()
            self.end(fresh)
            return
        except Exception as error:  # whatever it is, nobody gets it
            found.append(f"it could not be read back: {error}")
        if found or member is None:
            self.total.give()
            self.count(reset_failures=1)
            self.end(fresh)
            self.note("pool.discarded", used, reason="reset", survived=tuple(found))
            return
        self.count(resets=1, created=1)
        self._add(member, "pool.reset", seconds=time.monotonic() - began, used=used.id)


_open: "weakref.WeakSet[Stock]" = weakref.WeakSet()


def _keep(reference: "weakref.ref[Stock]", wake: threading.Event) -> None:
    """The thread of a stock, which ends with it."""
    while (stock := reference()) is not None:
        if stock.state != "open":
            stock.finish()
            stock.finished = True
            stock.on_change()
            return
        try:
            pause = stock.round()
        except Exception:
            LOGGER.exception("a pool's thread failed, and goes on")
            pause = AGAIN[1]
        del stock
        if pause != 0 and wake.wait(pause):
            wake.clear()


def _at_exit() -> None:
    for stock in list(_open):
        with contextlib.suppress(Exception):
            stock.shut("closed")
            stock.await_end(ANSWER_PATIENCE)


atexit.register(_at_exit)
