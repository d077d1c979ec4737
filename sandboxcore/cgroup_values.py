"""Limits as control groups take them: names, checks and units. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sandboxcore.errors import SpecError, UnsupportedHost
from sandboxcore.spec import Limits

CONTROLLERS = ("memory", "cpu", "pids", "io", "cpuset")

# What each limit is the business of.
LIMITS: Mapping[str, str] = {
    "memory": "memory",
    "swap": "memory",
    "cpus": "cpu",
    "cpu_weight": "cpu",
    "io": "io",
    "cpuset": "cpuset",
    "pids": "pids",
}

_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Limits as the kernel takes them. :class:`SpecError` for what :class:`Limits` alone lets through."""
    unknown = sorted(set(values) - LIMITS.keys())
    if unknown:
        raise SpecError(f"limits.{unknown[0]}: not a limit of a control group ({', '.join(LIMITS)})")
    parsed = Limits(**{name: value for name, value in values.items() if name != "cpuset"})
    found = {name: value if name == "cpuset" else getattr(parsed, name) for name, value in values.items()}
    if (cpus := found.get("cpus")) is not None and cpus < 0.001:
        raise SpecError(f"limits.cpus: {cpus!r} is less than 0.001, the least that the kernel grants")
    if (weight := found.get("cpu_weight")) is not None and weight > 10000:
        raise SpecError(f"limits.cpu_weight: {weight!r} is not a number from 1 to 10000")
    if found.get("cpuset") is not None:
        found["cpuset"] = format_cpus(parse_cpus(found["cpuset"]))
    return found


def values_of(limits: Limits) -> dict[str, Any]:
    """The limits of control groups that are set, checked."""
    values = {name: getattr(limits, name) for name in LIMITS}
    return checked({name: value for name, value in values.items() if value is not None})


def parse_cpus(text: object) -> frozenset[int]:
    """CPU numbers of ``"0-3,8"``. :class:`SpecError` for anything else."""
    found: set[int] = set()
    for part in str(text).strip().split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise SpecError(f"limits.cpuset: {text!r} is not a list of CPUs such as '0-3,8'")
        found.update(range(first, last + 1))
    return frozenset(found)


def format_cpus(cpus: Iterable[int]) -> str:
    """The kernel's spelling of a set of CPUs: ``"0-3,8"``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def check_cpus(wanted: str, effective: str) -> None:
    """:class:`UnsupportedHost` unless every CPU of ``wanted`` is one of ``effective``."""
    missing = parse_cpus(wanted) - (parse_cpus(effective) if effective.strip() else frozenset())
    if missing:
        raise UnsupportedHost(
            f"limits.cpuset {wanted!r}: CPU {format_cpus(missing)}",
            f"choose from {effective.strip() or 'none'}, which is what this process's group may use",
        )


def cpu_quota(cpus: float) -> tuple[int, int]:
    """Quota and period in microseconds for so many CPUs. The kernel wants a quota of 1 ms at least and a
    period of 1 s at most; 100 ms is its own default period."""
    period = 100_000 if cpus >= 0.01 else 1_000_000
    return max(1000, round(cpus * period)), period
