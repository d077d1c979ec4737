"""What a pool has ready, and who has what it has handed out: the half of its core that never waits."""

import contextlib
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from sandboxcore import host
from sandboxcore.errors import SandboxGone, SandboxNotFound
from sandboxcore.events import LOGGER
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import ANSWER_PATIENCE
from sandboxcore.observers import Observer
from sandboxcore.plan import compile_plan
from sandboxcore.pool_binding import Identity
from sandboxcore.pool_policy import Demand, PoolConfig, PoolStats, percentiles
from sandboxcore.pool_reset import View
from sandboxcore.pool_total import Leaving, Total, end_of
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import SandboxSpec

SAMPLES = 1000  # starts that are remembered


class Room(Protocol):
    """Who says whether there may be one more sandbox."""

    def take(self) -> int:
        """A descriptor that stands for one. Raises :class:`TooManySandboxes`."""


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
    """Of a sandbox that was handed out: for whom, and what it looked like before."""

    client: str | None = None
    view: View | None = None


@dataclass(slots=True)
class Tally:
    """The numbers of one pool, to be added up."""

    count: Counter[str]
    reasons: Counter[str]
    starts: list[float]
    refills: list[float]


def added_up(tallies: Iterable[Tally]) -> PoolStats:
    """The statistics of some pools together."""
    count, reasons = Counter[str](), Counter[str]()
    starts: list[float] = []
    refills: list[float] = []
    for tally in tallies:
        count.update(tally.count)
        reasons.update(tally.reasons)
        starts += tally.starts
        refills += tally.refills
    return PoolStats(
        misses_by_reason=dict(reasons),
        refill_seconds=sum(refills) / len(refills) if refills else None,
        creation=percentiles(starts),
        **count,
    )


def end_and_wait(sandbox: Sandbox) -> None:
    """Destroy it, and wait until nothing of it is left. Raises TimeoutError."""
    with sandbox._lock:
        if sandbox._state is not SandboxState.DESTROYED:
            sandbox._end(SandboxState.DESTROYED, wait=ANSWER_PATIENCE)


class Shelf:
    """Warm sandboxes of one spec, and who has which. Any thread may use it; it needs a :class:`Stock` to be
    filled."""

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
        self.on_change: Callable[[], object] = lambda: None  # one more, or none to come
        self._members: deque[Member] = deque()  # the oldest first
        self._out: weakref.WeakKeyDictionary[Sandbox, Claim] = weakref.WeakKeyDictionary()
        self._back: deque[tuple[Sandbox, Claim]] = deque()
        self._demand = Demand()
        self._count: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._starts: deque[float] = deque(maxlen=SAMPLES)
        self._refills: deque[float] = deque(maxlen=SAMPLES)
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._wake = threading.Event()
        self._parked = False
        self._waiting = 0  # who waits for a warm one
        self._claimed_at = -1e9
        self._back_since = 0.0
        self._passing = 0  # on no list, for they are being started, reset or ended
        self._leaving = Leaving()

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
                self.total.move(given=1)
            if member.alive():
                return member, ""
            self.count(discarded=1)
            self.drop(member.sandbox)
            self.note("pool.discarded", member.sandbox, reason="died")

    def _await_one(self, deadline: float) -> None:
        """The caller has the lock."""
        self.hurry(1)
        try:
            self._changed.wait_for(
                lambda: self._members or self.state != "open", max(0.0, deadline - time.monotonic())
            )
        finally:
            self.hurry(-1)

    def hurry(self, number: int) -> None:
        """So many more wait for a warm one. The caller has the lock, or is alone."""
        self._waiting += number
        if number > 0:
            self._wake.set()

    def handed(self, sandbox: Sandbox, client: str | None, member: Member | None, reason: str) -> None:
        """Somebody has got it: a member, or a cold one for a reason."""
        now = time.monotonic()
        claim = Claim(client, member.view if member else None)
        with self._changed:
            self._out[sandbox] = claim
            self._claimed_at = now
            self._demand.claimed(now, missed=reason == "empty", most=self.config.max_warm)
            if reason:
                self._reasons[reason] += 1
            self._count["misses" if reason else "hits"] += 1
            self._nudge()
        if self.on_event is not None:
            why = {"reason": reason} if reason else {}
            self.note("pool.missed" if reason else "pool.claimed", sandbox, client=client, **why)

    def give_back(self, sandbox: Sandbox) -> bool:
        """It is not used any more. False: nobody else will end it. Raises SandboxNotFound."""
        self.check()
        with self._changed:
            claim = self._out.pop(sandbox, None)
            if claim is None:
                raise SandboxNotFound(f"pool: sandbox {sandbox.name} is none that it has handed out")
            self._take_back(sandbox, claim)
            return self.state == "open"

    def drop(self, sandbox: Sandbox) -> None:
        """It is of no use, and will be destroyed."""
        with self._changed:
            self._take_back(sandbox, Claim())

    def _take_back(self, sandbox: Sandbox, claim: Claim) -> None:
        """The caller has the lock."""
        if not self._back:
            self._back_since = time.monotonic()
        self._back.append((sandbox, claim))
        self._nudge()

    def client_of(self, sandbox: Sandbox) -> str | None:
        """For whom it was claimed."""
        claim = self._out.get(sandbox)
        return None if claim is None else claim.client

    def _nudge(self) -> None:
        """Wake whoever fills it, if he sleeps for long. The caller has the lock."""
        if self._parked:
            self._parked = False
            self._wake.set()

    # --- starts ---------------------------------------------------------------------------------------

    def made(self, spec: SandboxSpec, identity: Identity) -> Sandbox:
        """One that does not run yet."""
        return self.placed(Sandbox(spec, **identity))

    def placed(self, sandbox: Sandbox) -> Sandbox:
        """The same with a place in the pool's room."""
        if self.room is not None:
            vars(sandbox)["_room"] = self.room
        return sandbox

    def started(self, seconds: float, *, ahead: bool = False) -> None:
        """A start took so long."""
        with self._changed:
            self._count["created"] += 1
            self._starts.append(seconds)
            if ahead:
                self._refills.append(seconds)

    # --- places for others ----------------------------------------------------------------------------

    @property
    def last_used(self) -> float:
        """When somebody has claimed one, by the monotonic clock."""
        return self._claimed_at

    def give_up(self, *, warm: bool) -> bool:
        """End one for somebody who needs its place: one that was given back, or one that is warm. False if
        there is none."""
        with self._changed:
            if not (self._members if warm else self._back):
                return False
            member = self._members.popleft() if warm else None
            sandbox = member.sandbox if member else self._back.popleft()[0]
            self._passing += 1
        if member is None:
            self.end(sandbox, wait=True)
        else:
            self._discard(member, "room", wait=True)
        return True

    def passing(self) -> bool:
        """Whether some are being started, reset or ended."""
        with self._changed:
            self._reap()
            return bool(self._passing or self._leaving)

    def _reap(self) -> None:
        """Look who has ended. The caller has the lock."""
        if self._leaving and self._leaving.gone():
            self.total.move()

    def end(self, sandbox: Sandbox, *, wait: bool = False) -> None:
        """Destroy one that was counted as passing, which it is no more then."""
        end = None if wait else end_of(sandbox)
        try:
            with contextlib.suppress(TimeoutError):
                (end_and_wait if wait else Sandbox.close)(sandbox)
        finally:
            with self._changed:
                if end is not None:
                    self._leaving.add(end)
            self._passed()

    def _passed(self) -> None:
        """One is not on its way any more."""
        with self._changed:
            self._passing -= 1
            self._reap()
            self.total.move()

    def _discard(self, member: Member, reason: str, *, wait: bool = False) -> None:
        """End a warm one that was counted as passing."""
        self.total.give()
        self.count(**{"expired" if reason == "expired" else "discarded": 1})
        self.end(member.sandbox, wait=wait)
        self.note("pool.discarded", member.sandbox, reason=reason)

    # --- what it says about itself --------------------------------------------------------------------

    def count(self, **numbers: int) -> None:
        """Add to what has happened."""
        with self._changed:
            self._count.update(numbers)

    def note(self, kind: str, sandbox: Sandbox, **data: Any) -> None:
        """Tell whoever observes. Without the lock."""
        if self.on_event is None:
            return
        try:
            self.on_event(kind, {"sandbox": sandbox.id, **data})
        except Exception:
            LOGGER.exception("an observer of a pool failed at %s", kind)

    @property
    def warm(self) -> int:
        """How many are ready."""
        return len(self._members)

    def target(self, now: float) -> int:
        """How many to have ready."""
        recent = self._refills[-1] if self._refills else 0.0
        return self._demand.target(now, self.config, recent)

    def tally(self) -> Tally:
        """The numbers as they are now."""
        self.check()
        with self._changed:
            out = sum(sandbox._state is not SandboxState.DESTROYED for sandbox in self._out)
            target = self.target(time.monotonic()) if self.state == "open" else 0
            now = {"warm": len(self._members), "target": target, "claimed": out}
            return Tally(
                Counter({**self._count, **now}),
                self._reasons.copy(),
                list(self._starts),
                list(self._refills),
            )
