"""How many sandboxes to keep warm, and what a pool says about itself. Pure: whoever asks brings the time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sandboxcore.errors import SpecError

HALF_LIFE = 60.0  # seconds after which half of what misses have added is gone
WINDOW = 10.0  # seconds over which claims are averaged


def _check_number(name: str, value: object, *, least: float, whole: bool) -> None:
    kinds = int if whole else int | float
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < 2**31:
        what = "a whole number" if whole else "a number"
        raise SpecError(f"pool.{name}: {value!r} is not {what} of at least {least:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How a :class:`SandboxPool` behaves.

    Parameters
    ----------
    min_warm: so many are always ready; 0: none, until there is a demand.
    max_warm: never more than so many that nobody has claimed.
    warm_ttl: in seconds; one that nobody has claimed for so long is replaced, for another is younger.
    reset: what is given back is reset, verified, and handed out again; else it is destroyed.
    refill_rate: so many starts per second at most; None: as fast as it goes.
    adaptive: keep more than ``min_warm`` ready while there is a demand for it; see :class:`Demand`.
    binds: ``"ro"`` or ``"rw"``: what a claim may mount without a new sandbox, as ``live_binds`` of the spec;
        None: what that says. Each costs something at the start: ``"rw"`` lets Landlock allow writing
        everywhere.
    """

    min_warm: int = 2
    max_warm: int = 10
    warm_ttl: float = 600.0
    reset: bool = False
    refill_rate: float | None = None
    adaptive: bool = True
    binds: Literal["ro", "rw"] | None = None

    def __post_init__(self) -> None:
        """Validate. Raises :class:`SpecError`."""
        _check_number("min_warm", self.min_warm, least=0, whole=True)
        _check_number("max_warm", self.max_warm, least=1, whole=True)
        if self.max_warm < self.min_warm:
            raise SpecError(f"pool.max_warm: {self.max_warm} is less than min_warm, {self.min_warm}")
        _check_number("warm_ttl", self.warm_ttl, least=0.01, whole=False)
        if self.refill_rate is not None:
            _check_number("refill_rate", self.refill_rate, least=0.001, whole=False)
        for name in ("reset", "adaptive"):
            if not isinstance(getattr(self, name), bool):
                raise SpecError(f"pool.{name}: {getattr(self, name)!r} is not True or False")
        if self.binds not in ("ro", "rw", None):
            raise SpecError(f"pool.binds: {self.binds!r} is not ro, rw or None")


@dataclass(slots=True)
class Demand:
    """What is wanted of a pool lately, and how many to keep ready for it.

    Two things count: how many claims come while one sandbox is started, averaged over ``WINDOW``; and misses,
    each of which adds one for good but for that half of it is forgotten after ``HALF_LIFE``. So a steady
    stream is met by what it takes, and a burst of eight by eight, once it has been seen.
    """

    _rate: float = 0.0  # claims per second
    _extra: float = 0.0
    _rate_at: float = 0.0
    _extra_at: float = 0.0

    def claimed(self, now: float, *, missed: bool, most: int) -> None:
        """Somebody wanted one; ``missed``: there was none. ``most``: more than that is never kept."""
        self._rate = self.rate(now) + 1 / WINDOW
        self._rate_at = now
        if missed:
            self._extra = min(float(most), self.extra(now) + 1)
            self._extra_at = now

    def rate(self, now: float) -> float:
        """Claims per second."""
        return self._rate * math.exp(-max(0.0, now - self._rate_at) / WINDOW)

    def extra(self, now: float) -> float:
        """What misses have added."""
        return self._extra * math.exp2(-max(0.0, now - self._extra_at) / HALF_LIFE)

    def target(self, now: float, config: PoolConfig, start_seconds: float) -> int:
        """How many to keep ready. ``start_seconds``: what it takes to start one."""
        if not config.adaptive:
            return config.min_warm
        meanwhile = self.rate(now) * start_seconds
        return min(config.max_warm, config.min_warm + round(meanwhile + self.extra(now)))


def percentiles(samples: Sequence[float]) -> Mapping[str, float]:
    """p50, p95 and p99 of some numbers; of none, nothing."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {f"p{part}": ordered[round(last * part / 100)] for part in (50, 95, 99)} if ordered else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """What a pool has and has done.

    warm: ready now. target: how many it wants to have ready. claimed: handed out, neither given back nor
    ended. hits, misses: claims that got a warm one, and those that did not, by their reason
    (``misses_by_reason``: ``"empty"``, ``"draining"``, ``"network"``, ``"limits"``, ``"mounts"``,
    ``"failed"``: what was warm could not be made what was asked for). created: started, cold ones included.
    discarded: warm ones that had died, or were too many. expired: warm ones that were too old. resets,
    reset_failures: given back and ready again; and those that were destroyed, because something survived or
    could not be read back. refill_failures: starts ahead of time that failed. refill_seconds: the mean of
    what a start ahead of time took, creation: p50, p95 and p99 of all starts, in seconds, of the last
    thousand.
    """

    warm: int = 0
    target: int = 0
    claimed: int = 0
    hits: int = 0
    misses: int = 0
    misses_by_reason: Mapping[str, int] = field(default_factory=dict)
    created: int = 0
    discarded: int = 0
    expired: int = 0
    resets: int = 0
    reset_failures: int = 0
    refill_failures: int = 0
    refill_seconds: float | None = None
    creation: Mapping[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float | None:
        """Hits among all claims, 0 to 1; None before the first."""
        claims = self.hits + self.misses
        return self.hits / claims if claims else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {name: getattr(self, name) for name in self.__slots__}
        maps = {name: dict(data[name]) for name in ("misses_by_reason", "creation")}
        return {**data, **maps, "hit_rate": self.hit_rate}
