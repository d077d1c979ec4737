"""How a manager is doing: :class:`ManagerStats`, :class:`Health`."""

import dataclasses
import functools
import time
from collections import Counter as Count
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxcore import host, process
from sandboxcore.errors import SandboxError
from sandboxcore.ledger import Ledger
from sandboxcore.manager_metrics import PHASES, Metrics
from sandboxcore.metrics import Counter, Gauge, prometheus
from sandboxcore.pool_policy import PoolStats
from sandboxcore.pools import SandboxPools
from sandboxcore.room import Room
from sandboxcore.selection import BACKEND


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerStats:
    """How many there are of what, over all processes that use the state directory; and, since this manager
    was made: ``created`` sandboxes, those of its pools included, ``commands`` that ended by their cause, what
    sweeps have ``timed_out``.

    sandboxes, sessions: how many, by state (sessions that have ended less than a day ago included).
    active_sandboxes: running and suspended ones. living, max_sandboxes: places that are taken, and how many
    there are, None: any number. pool: its stats, of this process, see :class:`PoolStats`; pool_size: warm
    ones. hit_rate: claims that found a warm one, of all, or None. creation: seconds of a start as its caller
    sees it, those of pools left out: count, sum, min, max, p50, p95, p99. phases: the same of each phase.
    damaged: records that cannot be read. timed_out: sessions and sandboxes ended by their timeouts, times to
    live and policies.
    """

    created: int
    sandboxes: Mapping[str, int]
    sessions: Mapping[str, int]
    active_sandboxes: int
    living: int
    max_sandboxes: int | None
    pool: PoolStats
    pool_size: int
    hit_rate: float | None
    creation: Mapping[str, float | None]
    phases: Mapping[str, Mapping[str, float | None]]
    commands: Mapping[str, int]
    timed_out: int
    damaged: int
    at: float = field(default_factory=time.time)

    @property
    def mean_creation(self) -> float | None:
        """Of ``creation``, in seconds; None where there was none."""
        count, total = self.creation["count"], self.creation["sum"]
        return total / count if count and total is not None else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = dataclasses.asdict(self)
        data["pool"]["hit_rate"] = self.pool.hit_rate
        return {**data, "mean_creation": self.mean_creation}


def gather(ledger: Ledger, room: Room, metrics: Metrics, pools: SandboxPools) -> ManagerStats:
    """How it is now."""
    sandboxes, sessions = ledger.counts("sandboxes"), ledger.counts("sessions")
    pool = pools.stats()
    return ManagerStats(
        created=int(metrics.created.value()) + pool.created,
        sandboxes=sandboxes,
        sessions=sessions,
        active_sandboxes=sandboxes.get("running", 0) + sandboxes.get("paused", 0),
        living=room.taken(),
        max_sandboxes=room.maximum,
        pool=pool,
        pool_size=pool.warm,
        hit_rate=pool.hit_rate,
        creation=metrics.creation.summary(),
        phases={phase: metrics.phases.summary(phase=phase) for phase in PHASES},
        commands=_by_label(metrics.commands),
        timed_out=sum(int(metrics.actions.value(action=kind)) for kind in ("terminate", "delete")),
        damaged=len(ledger.damaged()),
    )


def _by_label(counter: Counter) -> dict[str, int]:
    return dict(Count({key[0]: int(value) for _, key, value in counter.samples()}))


def exposition(stats: ManagerStats, metrics: Metrics) -> str:
    """All of it for Prometheus, in its text format 0.0.4."""
    gauge, counter = functools.partial(_filled, Gauge), functools.partial(_filled, Counter)
    pool = stats.pool
    maximum = float("inf") if stats.max_sandboxes is None else stats.max_sandboxes
    return prometheus(
        gauge("sandboxes", "Sandboxes on record, by state.", stats.sandboxes, "state"),
        gauge("sessions", "Sessions on record, by state.", stats.sessions, "state"),
        gauge("living", "Places of max_sandboxes that are taken.", stats.living),
        gauge("max_sandboxes", "How many sandboxes may live at once.", maximum),
        gauge("damaged_records", "Records that cannot be read.", stats.damaged),
        gauge("pool_warm", "Warm sandboxes of this process.", pool.warm),
        gauge("pool_target", "Warm sandboxes that are wanted.", pool.target),
        gauge("pool_claimed", "Claimed sandboxes of this process.", pool.claimed),
        counter("pool_hits_total", "Claims that got a warm sandbox.", pool.hits),
        counter("pool_misses_total", "Claims that did not, by reason.", pool.misses_by_reason, "reason"),
        counter("pool_created_total", "Sandboxes that pools have started.", pool.created),
        counter("pool_discarded_total", "Warm sandboxes that were of no use.", pool.discarded),
        counter("pool_expired_total", "Warm sandboxes that were too old.", pool.expired),
        counter("pool_resets_total", "Sandboxes that were reset.", pool.resets),
        counter("pool_reset_failures_total", "Resets that failed.", pool.reset_failures),
        counter("pool_refill_failures_total", "Starts ahead of time that failed.", pool.refill_failures),
        counter("created_total", metrics.created.help, stats.created),
        metrics.ended, metrics.actions, metrics.commands,
        metrics.durations, metrics.creation, metrics.phases,
    )  # fmt: skip


def _filled(
    kind: type[Gauge] | type[Counter],
    name: str,
    help_: str,
    value: float | Mapping[str, int],
    label: str | None = None,
) -> Gauge | Counter:
    """One with a value, or with one for each of a label's."""
    made = kind(f"sandboxcore_{name}", help_, (label,) if label else ())
    put = made.set if isinstance(made, Gauge) else made.inc
    if isinstance(value, Mapping):
        for key, number in value.items():
            put(number, **{str(label): key})
    else:
        put(value)
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """Whether a manager works.

    healthy: a sandbox runs a command, the state directory can be written, there is room. backend: its name;
    mode: "root" or "rootless". utilisation: of ``max_sandboxes``, 0 to 1, None without. warnings: what does
    not keep it from working, and what does. last_created: when this manager started a sandbox last that is
    none of its pools', in seconds since the epoch. seconds: what the trial took.
    """

    healthy: bool
    backend: str
    mode: str
    utilisation: float | None
    warnings: tuple[str, ...]
    last_created: float | None
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return dataclasses.asdict(self)


def examine(ledger: Ledger, room: Room, metrics: Metrics) -> Health:
    """Try it."""
    warnings, healthy, seconds = [], True, None
    try:
        began = time.monotonic()
        done = process.run(["/bin/true"], timeout=30)
        seconds = time.monotonic() - began
        if not done.ok:
            raise SandboxError(f"/bin/true ended by {done.cause.value} {done.returncode}")
    except (SandboxError, OSError) as error:
        healthy = False
        warnings.append(f"a sandbox: {error}")
    try:
        ledger.set("health", time.time())
        if damaged := ledger.damaged():
            warnings.append(f"{len(damaged)} damaged records in {ledger.path}")
    except SandboxError as error:
        healthy = False
        warnings.append(str(error))
    used = None if room.maximum is None else room.taken() / room.maximum
    if used is not None and used >= 1:
        healthy = False
        warnings.append(f"there are {room.taken()} sandboxes, of {room.maximum} that there may be")
    elif used is not None and used >= NEARLY:
        warnings.append(f"there is room for {room.free()} more sandboxes")
    return Health(
        healthy=healthy, backend=BACKEND, mode=host.features().mode, utilisation=used,
        warnings=tuple(warnings), last_created=metrics.last_created, seconds=seconds,
    )  # fmt: skip


NEARLY = 0.9  # of max_sandboxes: a warning
