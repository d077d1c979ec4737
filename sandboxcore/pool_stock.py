"""What a pool has ready, and the thread that keeps it so: the core of both kinds of pool."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sandboxcore import host
from sandboxcore.errors import InvalidTransition, SandboxGone, SandboxNotFound, TooManySandboxes
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import ANSWER_PATIENCE
from sandboxcore.plan import compile_plan
from sandboxcore.pool_binding import Identity
from sandboxcore.pool_policy import Demand, PoolConfig, PoolStats, percentiles
from sandboxcore.pool_reset import View, look, survivors
from sandboxcore.process import with_spawner
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import SandboxSpec

Observer = Callable[[str, Mapping[str, Any]], None]

QUIET = 0.001  # seconds after a claim in which nothing is started, for whoever claimed wants the CPU
PATIENCE = 0.02  # seconds for which that may go on, claim after claim
AGAIN = (0.05, 5.0)  # seconds after a start that failed, twice as long each time
_SAMPLES = 1000  # starts that are remembered

_log = logging.getLogger("sandboxcore")


class Room(Protocol):
    """Who says whether there may be one more sandbox."""

    def take(self) -> int:
        """A descriptor that stands for one. Raises :class:`TooManySandboxes`."""


class Total:
    """How many sandboxes several pools may have ready together."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._taken = 0

    def take(self) -> bool:
        """Whether there may be one more; then it counts."""
        with self._lock:
            if self.most is not None and self._taken >= self.most:
                return False
            self._taken += 1
            return True

    def give(self) -> None:
        """One less."""
        with self._lock:
            self._taken -= 1


@dataclass(slots=True)
class Member:
    """A sandbox that nobody has claimed. ``since``: by the monotonic clock; ``view``: what it looked like
    then, where it is to be reset."""

    sandbox: Sandbox
    since: float
    view: View | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        link = self.sandbox._link
        return link is not None and link.alive()


@dataclass(slots=True)
class Claim:
    """A sandbox that was handed out: to whom, and what it looked like before."""

    client: str | None
    view: View | None


def end_and_wait(sandbox: Sandbox) -> None:
    """Destroy it, and wait until nothing of it is left. Raises TimeoutError."""
    with sandbox._lock:
        if sandbox._state is not SandboxState.DESTROYED:
            sandbox._end(SandboxState.DESTROYED, wait=ANSWER_PATIENCE)


class Stock:
    """Warm sandboxes of one spec, and who has which. Any thread may use it.

    Everything that takes time (starting, resetting, destroying) is done by one thread, one after the other,
    and by nobody else.
    """

    def __init__(
        self,
        spec: SandboxSpec | None,
        config: PoolConfig | None,
        *,
        room: Room | None = None,
        on_event: Observer | None = None,
        total: Total | None = None,
    ) -> None:
        self.config = config or PoolConfig()
        self.given = spec or SandboxSpec()
        binds = {self.given.live_binds, self.config.binds}
        self.spec = self.given.replace(live_binds="rw" if "rw" in binds else "ro" if "ro" in binds else None)
        self.plan = compile_plan(self.spec, host.features())
        self.room, self.on_event, self.total = room, on_event, total or Total(None)
        self.state = "new"  # open, draining, closed
        self._members: deque[Member] = deque()  # the oldest first
        self._out: weakref.WeakKeyDictionary[Sandbox, Claim] = weakref.WeakKeyDictionary()
        self._back: deque[tuple[Sandbox, Claim]] = deque()
        self._demand = Demand()
        self._count: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._starts: deque[float] = deque(maxlen=_SAMPLES)
        self._refills: deque[float] = deque(maxlen=_SAMPLES)
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._parked = False
        self._waiting = 0  # who waits for a warm one
        self._hasty = False  # somebody waits for the pool to be full
        self._claimed_at = self._wanting_since = self._started_at = 0.0
        self._failed_at, self._pause = 0.0, 0.0

    # --- opening and closing ----------------------------------------------------------------------

    def open(self) -> None:
        """Begin to have some ready. Idempotent."""
        self.check()
        with_spawner(self.plan, None, lambda connection: None)  # in the caller's thread and priority
        with self._changed:
            if self.state == "closed":
                raise InvalidTransition("pool", "closed", "start")
            if self.state == "open":
                return
            self.state = "open"
            self._wake.clear()
            # Daemonic, or the interpreter would wait for it before it calls what was registered with atexit.
            self._thread = threading.Thread(
                target=_keep, args=(weakref.ref(self), self._wake), name="sandboxcore-pool", daemon=True
            )
            weakref.finalize(self, self._wake.set).atexit = False
            self._thread.start()
            _open.add(self)

    def shut(self, timeout: float | None, state: str = "draining") -> None:
        """Have nothing ready any more, and nothing of it left. Raises TimeoutError."""
        if os.getpid() != self._pid:
            return
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self.state = state if self.state != "closed" else "closed"
            thread, self._thread = self._thread, None
            members, self._members = list(self._members), deque()
            self._changed.notify_all()
        self._wake.set()
        for member in members:
            self.total.give()
            end_and_wait(member.sandbox)
            self._note("pool.discarded", member.sandbox, reason="draining")
        if thread is not None and thread is not threading.current_thread():
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError("the pool's thread is still starting or ending a sandbox")
        self._tidy_up(wait=True)

    def check(self) -> None:
        """Raise SandboxGone in a process that was forked from the pool's."""
        if os.getpid() != self._pid:
            raise SandboxGone("pool: it belongs to the process that this one was forked from")

    # --- claims -------------------------------------------------------------------------------------

    def take(self, patience: float | None = None) -> tuple[Member | None, str]:
        """A warm one that runs, or None and the reason. ``patience``: wait so many seconds for one."""
        deadline = None if patience is None else time.monotonic() + patience
        while True:
            with self._changed:
                if self.state != "open":
                    return None, "draining"
                if not self._members and deadline is not None:
                    self._await_one(deadline)
                if not self._members:
                    return None, "empty"
                member = self._members.pop()  # the youngest: what it needs is still in the caches
            self.total.give()
            if member.alive():
                return member, ""
            self._discard(member, "died")

    def _await_one(self, deadline: float) -> None:
        """The caller has the lock."""
        self._waiting += 1
        self._nudge()
        self._changed.wait_for(
            lambda: self._members or self.state != "open", max(0.0, deadline - time.monotonic())
        )
        self._waiting -= 1

    def handed(self, sandbox: Sandbox, client: str | None, member: Member | None, reason: str) -> None:
        """Somebody has got it: a member, or a cold one for a reason."""
        now = time.monotonic()
        with self._changed:
            self._out[sandbox] = Claim(client, member.view if member else None)
            self._claimed_at = now
            missed = reason == "empty"
            self._demand.claimed(now, missed=missed, most=self.config.max_warm)
            self._count["misses" if reason else "hits"] += 1
            if reason:
                self._reasons[reason] += 1
            self._nudge()
        if self.on_event is not None:
            kind = "pool.missed" if reason else "pool.claimed"
            self._note(kind, sandbox, client=client, **({"reason": reason} if reason else {}))

    def give_back(self, sandbox: Sandbox) -> None:
        """It is not used any more: it is destroyed, or reset, later."""
        self.check()
        with self._changed:
            claim = self._out.pop(sandbox, None)
            if claim is None:
                raise SandboxNotFound(f"pool: sandbox {sandbox.name} is not one that it has handed out")
            self._back.append((sandbox, claim))
            self._nudge()
            alone = self.state != "open"
        if alone:
            self._tidy_up()

    def client_of(self, sandbox: Sandbox) -> str | None:
        """Who has claimed it."""
        claim = self._out.get(sandbox)
        return None if claim is None else claim.client

    def _nudge(self) -> None:
        """Wake the thread if it sleeps for long. The caller has the lock."""
        if self._parked:
            self._parked = False
            self._wake.set()

    # --- starts ---------------------------------------------------------------------------------------

    def made(self, spec: SandboxSpec, identity: Identity) -> Sandbox:
        """One that does not run yet."""
        sandbox = Sandbox(spec, **identity)
        if self.room is not None:
            sandbox._room = self.room  # type: ignore[attr-defined]
        return sandbox

    def started(self, seconds: float, *, ahead: bool = False) -> None:
        """A start took so long."""
        with self._changed:
            self._count["created"] += 1
            self._starts.append(seconds)
            if ahead:
                self._refills.append(seconds)

    def make_room(self) -> bool:
        """Give up a warm one for somebody who needs its place; False if there is none."""
        with self._changed:
            member = self._members.popleft() if self._members else None
        if member is None:
            return False
        self.total.give()
        self._discard(member, "room", wait=True)
        return True

    # --- the thread -----------------------------------------------------------------------------------

    def round(self) -> float | None:
        """Do what is due, one start at most. Returns in how many seconds to look again; None: when woken."""
        self._tidy_up()
        self._expire()
        with self._changed:
            now = time.monotonic()
            if self.state != "open":
                return None
            wait = self._wait(now)
            if wait != 0:
                self._parked = not self._back
                return wait if self._parked else 0
        self._refill()
        return 0

    def _wait(self, now: float) -> float | None:
        """How long until the next start; None: none is wanted. The caller has the lock."""
        if self.target(now) <= len(self._members):
            self._wanting_since = 0.0
            if not self._members:
                return None
            return max(0.001, self._members[0].since + self.config.warm_ttl - now)
        self._wanting_since = self._wanting_since or now
        waits = [self._failed_at + self._pause - now]
        if self.config.refill_rate is not None:
            waits.append(self._started_at + 1 / self.config.refill_rate - now)
        if self._members and not self._waiting and not self._hasty:
            waits.append(min(self._claimed_at + QUIET, self._wanting_since + PATIENCE) - now)
        return max(0.0, *waits)

    def target(self, now: float) -> int:
        """How many to have ready."""
        recent = self._refills[-1] if self._refills else 0.0
        return self._demand.target(now, self.config, recent)

    def _refill(self) -> None:
        if not self.total.take():
            self._fail()
            return
        began = self._started_at = time.monotonic()
        sandbox = None
        try:
            sandbox = self.made(self.spec, {})
            sandbox.start()
            view = look(sandbox) if self.config.reset else None
        except Exception as error:  # whoever claims meets it, too, and is told
            self.total.give()
            self._fail(error)
            if sandbox is not None:
                end_and_wait(sandbox)
            return
        self._pause = 0.0
        seconds = time.monotonic() - began
        self.started(seconds, ahead=True)
        self._add(Member(sandbox, time.monotonic(), view), "pool.refilled", seconds=seconds)

    def _add(self, member: Member, kind: str, **data: Any) -> None:
        with self._changed:
            wanted = self.state == "open" and len(self._members) < self.config.max_warm
            if wanted:
                self._members.append(member)
                self._changed.notify_all()
        if wanted:
            self._note(kind, member.sandbox, **data)
        else:
            self.total.give()
            self._discard(member, "surplus", wait=True)

    def _fail(self, error: Exception | None = None) -> None:
        """Try again later, and later still."""
        with self._changed:
            self._failed_at = time.monotonic()
            self._pause = min(AGAIN[1], max(AGAIN[0], 2 * self._pause))
            self._changed.notify_all()
            if error is not None and not isinstance(error, TooManySandboxes):
                self._count["refill_failures"] += 1
                _log.debug("pool: a sandbox could not be started ahead of time: %s", error)

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
        for member, reason in gone:
            self.total.give()
            self._discard(member, reason)

    def _discard(self, member: Member, reason: str, *, wait: bool = False) -> None:
        with self._changed:
            self._count["expired" if reason == "expired" else "discarded"] += 1
        (end_and_wait if wait else Sandbox.close)(member.sandbox)
        self._note("pool.discarded", member.sandbox, reason=reason)

    def _tidy_up(self, *, wait: bool = False) -> None:
        """What was given back is reset, or ends."""
        while True:
            with self._changed:
                if not self._back:
                    return
                sandbox, claim = self._back.popleft()
            if self.config.reset and self.state == "open" and claim.view is not None:
                self._renew(sandbox, claim.view)
            with contextlib.suppress(TimeoutError):
                (end_and_wait if wait else Sandbox.close)(sandbox)

    def _renew(self, used: Sandbox, before: View) -> None:
        """Have another isolation take its place, and see that nothing of it is there."""
        if len(self._members) >= self.config.max_warm or not self.total.take():
            return
        began, found, view, fresh = time.monotonic(), [], None, None
        try:
            fresh = self.made(self.spec, {})
            fresh.start()
            view = look(fresh)
            found = survivors(before, view)
            end_and_wait(used)  # only now: numbers of namespaces are given again
        except Exception as error:  # whatever it is, nobody gets it
            found.append(f"it could not be read back: {error}")
        with self._changed:
            self._count["reset_failures" if found else "resets"] += 1
            self._count["created"] += not found
        if found or fresh is None:
            self.total.give()
            if fresh is not None:
                fresh.close()
            self._note("pool.discarded", used, reason="reset", survived=tuple(found))
            return
        now = time.monotonic()
        self._add(Member(fresh, now, view), "pool.reset", seconds=now - began, used=used.id)

    # --- what it says about itself --------------------------------------------------------------------

    def _note(self, kind: str, sandbox: Sandbox, **data: Any) -> None:
        if self.on_event is None:
            return
        try:
            self.on_event(kind, {"sandbox": sandbox.id, **data})
        except Exception:
            _log.exception("an observer of a pool failed at %s", kind)

    @property
    def warm(self) -> int:
        """How many are ready."""
        return len(self._members)

    def ids(self) -> list[str]:
        """Those of what is ready."""
        with self._changed:
            return [member.sandbox.id for member in self._members]

    def stats(self) -> PoolStats:
        """How it is now."""
        with self._changed:
            count, reasons = dict(self._count), dict(self._reasons)
            starts, refills = list(self._starts), list(self._refills)
            out = [sandbox for sandbox in self._out if sandbox._state is not SandboxState.DESTROYED]
            warm, target = len(self._members), self.target(time.monotonic())
        return PoolStats(
            warm=warm,
            target=target if self.state == "open" else 0,
            claimed=len(out),
            misses_by_reason=reasons,
            refill_seconds=sum(refills) / len(refills) if refills else None,
            creation=percentiles(starts),
            **count,
        )

    def resize(self, min_warm: int | None, max_warm: int | None) -> None:
        """Other bounds. Raises SpecError."""
        self.check()
        changes = {"min_warm": min_warm, "max_warm": max_warm}
        changes = {name: value for name, value in changes.items() if value is not None}
        with self._changed:
            self.config = replace(self.config, **changes)
            self._nudge()

    def await_full(self, timeout: float | None, *, number: int | None = None) -> bool:
        """Wait until so many are ready, default what is wanted, without regard for anybody's quiet."""
        self.check()
        with self._changed:
            self._hasty = True
            self._nudge()
            try:
                return self._changed.wait_for(
                    lambda: self.state != "open" or len(self._members) >= self._enough(number), timeout
                )
            finally:
                self._hasty = False

    def _enough(self, number: int | None) -> int:
        return self.target(time.monotonic()) if number is None else min(number, self.config.max_warm)


_open: "weakref.WeakSet[Stock]" = weakref.WeakSet()


def _keep(reference: "weakref.ref[Stock]", wake: threading.Event) -> None:
    """The thread of a stock, which ends with it."""
    while (stock := reference()) is not None and stock.state == "open":
        try:
            pause = stock.round()
        except Exception:
            _log.exception("a pool's thread failed, and goes on")
            pause = AGAIN[1]
        del stock
        if pause != 0 and wake.wait(pause):
            wake.clear()


def _at_exit() -> None:
    for stock in list(_open):
        with contextlib.suppress(Exception):
            stock.shut(ANSWER_PATIENCE)


atexit.register(_at_exit)
