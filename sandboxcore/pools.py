"""Pools for every spec that somebody wants: :class:`SandboxPools`."""

import functools
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from sandboxcore.errors import InvalidTransition, SandboxGone, SandboxNotFound, SpecError
from sandboxcore.observers import Observer
from sandboxcore.pool import SandboxPool
from sandboxcore.pool_policy import PoolConfig, PoolStats
from sandboxcore.pool_shelf import SAMPLES, Room, Tally, added_up
from sandboxcore.pool_stock import Stock
from sandboxcore.pool_total import Total
from sandboxcore.request import Program
from sandboxcore.result import ExecResult
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import PROFILES, SandboxSpec


class Pooled(Protocol):
    """What both kinds of pool have."""

    _stock: Stock


PoolKind = TypeVar("PoolKind", bound=Pooled)
SandboxKind = TypeVar("SandboxKind")


def as_spec(profile: "SandboxSpec | str | None") -> SandboxSpec:
    """A spec, or that of a profile by its name. Raises SpecError."""
    return profile if isinstance(profile, SandboxSpec) else _profile(profile or "standard")


@functools.cache
def _profile(name: str) -> SandboxSpec:
    if name not in PROFILES:
        raise SpecError(f"pools: {name!r} is not one of {', '.join(PROFILES)}")
    return SandboxSpec(profile=name)


class Table(Generic[PoolKind, SandboxKind]):
    """The pools of a process by their specs, the least recently used first, and which sandbox is whose."""

    def __init__(
        self,
        make: Callable[..., PoolKind],
        config: PoolConfig | None,
        *,
        most: int,
        total: int | None,
        room: Room | None,
        on_event: Observer | None,
    ) -> None:
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise SpecError(f"pools.most: {most!r} is not a positive whole number")
        self.most, self.total = most, Total(total)
        self._make = functools.partial(make, config=config, room=room, on_event=on_event, total=self.total)
        self.pools: dict[str, PoolKind] = {}
        self.closed = False
        self._retired: list[PoolKind] = []  # that may not have ended yet
        self._ended: list[tuple[weakref.ref[PoolKind], Stock]] = []  # in which claims may be under way
        self._owners: weakref.WeakKeyDictionary[Any, PoolKind] = weakref.WeakKeyDictionary()
        self._past = Tally(Counter(), Counter(), [], [])  # of pools that are gone
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise SandboxGone in a process that was forked from its own, InvalidTransition when closed."""
        if os.getpid() != self._pid:
            raise SandboxGone("pools: they belong to the process that this one was forked from")
        if self.closed:
            raise InvalidTransition("pools", "closed", "use them")

    def get(self, spec: SandboxSpec) -> PoolKind:
        """The pool of a spec, made if need be; it counts as used now."""
        self.check()
        key = spec.fingerprint
        with self._lock:
            pool = self.pools.pop(key, None)
            if pool is not None and pool._stock.state != "closed":
                self.pools[key] = pool
                return pool
            if pool is not None:  # by whoever has got it from us
                self._retired.append(pool)
        pool = self._make(spec)  # without the lock: it looks at the host
        with self._lock:
            self.check()
            self.pools[key] = pool = self.pools.pop(key, pool)
            old = [self.pools.pop(next(iter(self.pools))) for _ in range(len(self.pools) - self.most)]
            if old:
                self._fold()
                self._retired += old
        for each in old:
            each._stock.shut("closed")  # without waiting; what it has handed out stays its own
        return pool

    def remember(self, sandbox: SandboxKind, pool: PoolKind) -> SandboxKind:
        """It was handed out by this pool."""
        with self._lock:
            self._owners[sandbox] = pool
        return sandbox

    def owner(self, sandbox: SandboxKind) -> PoolKind:
        """Whose it was; nobody's from here on. Raises SandboxNotFound."""
        with self._lock:
            pool = self._owners.pop(sandbox, None)
        if pool is None:
            raise SandboxNotFound("pools: the sandbox is none that they have handed out")
        return pool

    def shut(self) -> list[PoolKind]:
        """Have nothing ready any more, without waiting. Returns what has to be waited for."""
        if os.getpid() != self._pid:
            return []
        with self._lock:
            pools = list(self.pools.values())
            self._retired += pools
            self.pools.clear()
            ending = list(self._retired)
        for pool in pools:
            pool._stock.shut("closed")
        return ending

    def stats(self) -> PoolStats:
        """Of all pools together, those that are gone included."""
        with self._lock:
            self._fold()
            stocks = [pool._stock for pool in (*self.pools.values(), *self._retired)]
            stocks += [stock for _, stock in self._ended]
            return added_up([self._past, *(stock.tally() for stock in stocks)])

    def _fold(self) -> None:
        """Add up what pools have done that have nothing any more, and that nobody can use. The caller has the
        lock, and nothing is counted twice, or not at all, for whoever has it next."""
        self._ended += [(weakref.ref(pool), pool._stock) for pool in self._retired if pool._stock.finished]
        self._retired = [pool for pool in self._retired if not pool._stock.finished]
        ended, self._ended = self._ended, []
        for pool, stock in ended:
            tally = stock.tally()
            if pool() is None and not tally.count["claimed"]:
                self._past = _sum(self._past, tally)
            else:
                self._ended.append((pool, stock))

    def each(self) -> dict[str, PoolStats]:
        """Of each pool that there is, by the fingerprint of its spec."""
        return {key: added_up([pool._stock.tally()]) for key, pool in list(self.pools.items())}


def _sum(first: Tally, second: Tally) -> Tally:
    """Both together, with as many samples as one pool has."""
    return Tally(
        first.count + second.count,
        first.reasons + second.reasons,
        [*first.starts, *second.starts][-SAMPLES:],
        [*first.refills, *second.refills][-SAMPLES:],
    )


class SandboxPools:
    """A :class:`SandboxPool` for each spec, by its full fingerprint: made with its first use, drained when it
    is the one that nobody has used for longest and there are too many.

    A context manager; any thread may use it.

    Parameters
    ----------
    config: of every pool.
    most: so many pools at most.
    total: so many sandboxes at most that nobody has claimed, over all pools; None: no bound but each pool's.
    room, on_event: as for :class:`SandboxPool`.
    """

    def __init__(
        self,
        config: PoolConfig | None = None,
        *,
        most: int = 16,
        total: int | None = None,
        room: Room | None = None,
        on_event: Observer | None = None,
    ) -> None:
        self._table: Table[SandboxPool, Sandbox] = Table(
            SandboxPool, config, most=most, total=total, room=room, on_event=on_event
        )

    def pool(self, spec: SandboxSpec | str | None = None) -> SandboxPool:
        """The pool of a spec, or of a profile by its name, started."""
        while True:
            try:
                return self._table.get(as_spec(spec)).start()
            except InvalidTransition:  # somebody else has drained it just now
                self._table.check()

    def claim(self, spec: SandboxSpec | str | None = None, **options: Any) -> Sandbox:
        """:meth:`SandboxPool.claim` of the spec's pool."""
        while True:
            pool = self.pool(spec)
            try:
                return self._table.remember(pool.claim(**options), pool)
            except InvalidTransition:  # somebody else has drained it just now
                self._table.check()

    def release(self, sandbox: Sandbox) -> None:
        """:meth:`SandboxPool.release`."""
        self._table.owner(sandbox).release(sandbox)

    def run(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | str | None = None,
        client: str | None = None,
        **options: Any,
    ) -> ExecResult:
        """:meth:`SandboxPool.run`."""
        sandbox = self.claim(spec, client=client)
        try:
            return sandbox.exec(argv, **options)
        finally:
            self.release(sandbox)

    def warm(self, *specs: SandboxSpec | str, timeout: float | None = None) -> bool:
        """Have sandboxes of these specs, or profiles by their names (``"minimal"``, ``"standard"``,
        ``"full"``), ready, ``min_warm`` of each; False if that takes longer than ``timeout`` seconds for one
        of them."""
        pools = [self.pool(spec) for spec in specs]
        return all(pool.wait_ready(timeout) for pool in pools)

    def stats(self) -> PoolStats:
        """Of all pools together, those that are gone included."""
        return self._table.stats()

    def each(self) -> Mapping[str, PoolStats]:
        """Of each pool that there is, by the fingerprint of its spec."""
        return self._table.each()

    def make_room(self) -> bool:
        """End a sandbox that nobody has claimed, for somebody who needs its place, and wait for that, at most
        5 s: one that was given back, or else a warm one, of the pool that nobody has used for longest. False
        if there is none."""
        return self._table.total.make_room()

    def drain(self, timeout: float | None = None) -> None:
        """:meth:`SandboxPool.drain` of all pools; the next claim makes others. Raises TimeoutError."""
        for pool in self._table.shut():
            pool._stock.await_end(timeout)

    def close(self) -> None:
        """:meth:`drain`, for good. Idempotent."""
        self._table.closed = True
        self.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
