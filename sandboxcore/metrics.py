"""Numbers about what happened: :class:`Counter`, :class:`Gauge`, :class:`Histogram`; as text for Prometheus:
:func:`prometheus`.

Any thread may use them, also a finaliser in the midst of another use.
"""

import bisect
import math
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sandboxcore.errors import SpecError

MAX_SERIES = 1000  # different label values of one metric; what comes then is counted together
OTHER = "(other)"

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

Key = tuple[str, ...]  # the values of the labels
Sample = tuple[str, Key, float]  # suffix of the name, values, number

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metric:
    """What every kind has. Raises :class:`SpecError` for a name that Prometheus would not take.

    name, help: for Prometheus. labels: their names; each use gives all of their values. Of at most 1000
    different ones; any further are counted together, with ``(other)`` for each.
    """

    kind: ClassVar[str]
    _reserved: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        if not _NAME.fullmatch(name):
            raise SpecError(f"metric: {name!r} is no name")
        for label in labels:
            if not _LABEL.fullmatch(label) or label in self._reserved:
                raise SpecError(f"metric {name}: {label!r} is no name of a label")
        if len(set(labels)) != len(labels):
            raise SpecError(f"metric {name}: labels: {list(labels)!r}: one of them twice")
        self.name, self.help, self.labels = name, help, tuple(labels)
        self._lock = threading.RLock()
        self._known: set[Key] = set()

    def _key(self, labels: Mapping[str, str]) -> Key:
        if labels.keys() != set(self.labels):
            raise SpecError(f"metric {self.name}: labels: {sorted(labels)} are not {sorted(self.labels)}")
        key = tuple(str(labels[name]) for name in self.labels)
        if key not in self._known:
            if len(self._known) >= MAX_SERIES:
                return (OTHER,) * len(self.labels)
            self._known.add(key)
        return key

    def samples(self) -> Iterator[Sample]:
        """What there is now, for :func:`prometheus`. An ``le`` is the last of the values."""
        raise NotImplementedError


class Counter(Metric):
    """How often something happened: it only grows."""

    kind = "counter"

    def __init__(self, name: str, help: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help, labels)
        self._values: defaultdict[Key, float] = defaultdict(float)
        if not labels:
            self._values[()] = 0.0

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Count. Raises :class:`SpecError` for less than 0, and for other labels than its own."""
        if not 0 <= amount < math.inf:
            raise SpecError(f"metric {self.name}: {amount!r} cannot be counted")
        key = self._key(labels)
        with self._lock:
            self._values[key] += amount

    def value(self, **labels: str) -> float:
        """How often up to now."""
        return self._values.get(self._key(labels), 0.0)

    def samples(self) -> Iterator[Sample]:
        with self._lock:
            found = sorted(self._values.items())
        for key, value in found:
            yield "", key, value


class Gauge(Metric):
    """How much there is of something now.

    read: a function that says so when somebody looks, instead of :meth:`set`: a number, or with labels a
    mapping from their values to numbers. What it raises comes out of :func:`prometheus`.
    """

    kind = "gauge"

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        read: Callable[[], float | Mapping[Key, float]] | None = None,
    ) -> None:
        super().__init__(name, help, labels)
        self._read = read
        self._values: defaultdict[Key, float] = defaultdict(float)

    def set(self, value: float, **labels: str) -> None:
        """It is this now."""
        key = self._key(labels)
        with self._lock:
            self._values[key] = float(value)

    def inc(self, amount: float = 1, **labels: str) -> None:
        """It is more by this."""
        key = self._key(labels)
        with self._lock:
            self._values[key] += amount

    def dec(self, amount: float = 1, **labels: str) -> None:
        """It is less by this."""
        self.inc(-amount, **labels)

    def value(self, **labels: str) -> float:
        """What it is; 0 if nobody has said."""
        return self._now().get(self._key(labels), 0.0)

    def _now(self) -> dict[Key, float]:
        if self._read is None:
            with self._lock:
                return dict(self._values)
        found = self._read()
        return dict(found) if isinstance(found, Mapping) else {(): float(found)}

    def samples(self) -> Iterator[Sample]:
        for key, value in sorted(self._now().items()):
            if len(key) != len(self.labels):
                raise SpecError(f"metric {self.name}: {key!r} are not values of {self.labels!r}")
            yield "", key, value


@dataclass(slots=True)
class _Series:
    """Of one set of label values."""

    bounds: list[int]
    steps: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf


class Histogram(Metric):
    """How something is distributed: seconds, by default. It has no more memory for more values.

    Percentiles come from steps that grow by 2^(1/16): each is within 2.2 % of the value that really has this
    rank, between ``lowest`` and ``highest``; what is beyond counts as these, but for the least and the
    greatest, which are exact.

    buckets: upper bounds for Prometheus; counted exactly. lowest, highest: of the percentiles' steps; default
    100 ns and 10^6 s.
    """

    kind = "histogram"
    _reserved = frozenset(("le",))
    STEPS = 16  # for each doubling
    ERROR = 2 ** (1 / (2 * STEPS)) - 1  # relative, of a percentile

    def __init__(
        self,
        name: str,
        help: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float] = SECONDS,
        lowest: float = 1e-7,
        highest: float = 1e6,
    ) -> None:
        super().__init__(name, help, labels)
        if sorted(set(buckets)) != list(buckets) or not all(map(math.isfinite, buckets)):
            raise SpecError(f"metric {name}: buckets: not finite and increasing")
        if not 0 < lowest < highest < math.inf:
            raise SpecError(f"metric {name}: lowest and highest: not in this order")
        self.buckets = tuple(float(bound) for bound in buckets)
        self._lowest, self._highest = lowest, highest
        self._series: dict[Key, _Series] = {}

    def observe(self, value: float, **labels: str) -> None:
        """Count a value. Raises :class:`SpecError` for one that is no finite number."""
        value = float(value)
        if not math.isfinite(value):
            raise SpecError(f"metric {self.name}: {value!r} cannot be counted")
        key, step, bound = self._key(labels), self._step(value), bisect.bisect_left(self.buckets, value)
        with self._lock:
            series = self._series.get(key) or self._series.setdefault(
                key, _Series([0] * (len(self.buckets) + 1))
            )
            series.bounds[bound] += 1
            series.steps[step] += 1
            series.count += 1
            series.total += value
            if value < series.least:  # noqa: PLR1730 - during a call a finaliser may count, too
                series.least = value
            if value > series.most:  # noqa: PLR1730
                series.most = value

    def _step(self, value: float) -> int:
        inside = min(max(value, self._lowest), self._highest)
        return math.floor(math.log2(inside / self._lowest) * self.STEPS)

    def count(self, **labels: str) -> int:
        """How many values up to now."""
        series = self._series.get(self._key(labels))
        return 0 if series is None else series.count

    def percentile(self, percent: float, **labels: str) -> float | None:
        """The value that so many percent are not above (nearest rank); None if there are none."""
        if not 0 <= percent <= 100:
            raise SpecError(f"metric {self.name}: {percent!r} is no percentage")
        with self._lock:
            series = self._series.get(self._key(labels))
            if series is None:
                return None
            steps, count, least, most = sorted(series.steps.items()), series.count, series.least, series.most
        rank = max(1, math.ceil(count * percent / 100))
        if rank in (1, count):
            return least if rank == 1 else most
        for step, here in steps:
            rank -= here
            if rank <= 0:
                return min(max(self._lowest * 2 ** ((step + 0.5) / self.STEPS), least), most)
        raise AssertionError("unreachable")

    def summary(self, **labels: str) -> dict[str, float | None]:
        """count, sum, min, max, p50, p95 and p99; None where there is nothing."""
        key = self._key(labels)
        with self._lock:
            series = self._series.get(key)
            found: dict[str, float | None] = {"count": 0, "sum": 0.0, "min": None, "max": None}
            if series is not None:
                found = {"count": series.count, "sum": series.total, "min": series.least, "max": series.most}
            return found | {f"p{rank}": self.percentile(rank, **labels) for rank in (50, 95, 99)}

    def samples(self) -> Iterator[Sample]:
        with self._lock:
            found = [
                (key, list(series.bounds), series.count, series.total)
                for key, series in sorted(self._series.items())
            ]
        for key, bounds, count, total in found:
            below = 0
            for bound, here in zip((*self.buckets, math.inf), bounds, strict=True):
                below += here
                yield "_bucket", (*key, _number(bound)), below
            yield "_sum", key, total
            yield "_count", key, count


def prometheus(*metrics: Metric) -> str:
    """Metrics as text, in Prometheus' exposition format 0.0.4 (``text/plain; version=0.0.4``).

    Raises :class:`SpecError` where two have the same name, or a histogram's series have that of another.
    """
    taken: dict[str, str] = {}
    lines = []
    for metric in metrics:
        suffixes = ("", "_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for name in (metric.name + suffix for suffix in suffixes):
            if name in taken:
                raise SpecError(f"metric {metric.name}: {name} is that of {taken[name]}, too")
            taken[name] = metric.name
        lines.append(f"# HELP {metric.name} {_escaped(metric.help)}")
        lines.append(f"# TYPE {metric.name} {metric.kind}")
        for suffix, values, number in metric.samples():
            names = (*metric.labels, "le") if suffix == "_bucket" else metric.labels
            pairs = ",".join(
                f'{name}="{_escaped(value, quote=True)}"' for name, value in zip(names, values, strict=True)
            )
            lines.append(f"{metric.name}{suffix}{'{' + pairs + '}' if pairs else ''} {_number(number)}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str, *, quote: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quote else text


def _number(value: float) -> str:
    """As Go reads it."""
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if math.isnan(value):
        return "NaN"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
