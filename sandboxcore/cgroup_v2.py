"""Limits and usage of a v2 group: Documentation/admin-guide/cgroup-v2.rst.

Values are those of :class:`sandboxcore.Limits`; None is no limit. Every function takes the group's directory.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sandboxcore.cgroup_files import (
    block_devices,
    groups_below,
    naming,
    number,
    pairs,
    read,
    write,
)
from sandboxcore.cgroup_values import cpu_quota

FILES: Mapping[str, str] = {
    "memory": "memory.max",
    "swap": "memory.swap.max",
    "cpus": "cpu.max",
    "cpu_weight": "cpu.weight",
    "io": "io.max",
    "pids": "pids.max",
    "cpuset": "cpuset.cpus",
}


def set_limit(group: Path, name: str, value: Any) -> None:
    """Write one limit. :class:`SetupError` names it, the file and the errno."""
    path = group / FILES[name]
    with naming(f"limits.{name} ({path})"):
        for line in _lines(name, value):
            write(path, line)


def _lines(name: str, value: Any) -> list[str]:
    if name == "cpus":
        return ["max 100000" if value is None else "{} {}".format(*cpu_quota(value))]
    if name == "io":
        limit = "max" if value is None else max(1, value)
        return [f"{device} rbps={limit} wbps={limit}" for device in block_devices()]
    if name == "cpu_weight":
        return ["100" if value is None else str(value)]
    if name == "cpuset":
        return ["\n" if value is None else value]
    return ["max" if value is None else str(value)]


def limits(group: Path, names: Collection[str]) -> dict[str, Any]:
    """What the kernel enforces in this group, for those names whose file there is."""
    found = {}
    for name in names:
        text = read(group / FILES[name])
        if text is not None:
            found[name] = _value(name, text.strip())
    return found


def _value(name: str, text: str) -> Any:
    if name == "cpus":
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    if name == "io":
        rates = [word.partition("=")[2] for word in text.split() if word.startswith(("rbps=", "wbps="))]
        return min((int(rate) for rate in rates if rate != "max"), default=None)
    if name == "cpuset":
        return text or None
    return None if text == "max" else int(text)


def usage(group: Path) -> dict[str, Any]:
    """Fields of :class:`sandboxcore.cgroup.GroupUsage`; what the kernel does not have is missing."""
    found: dict[str, Any] = {
        "memory": number(group / "memory.current"),
        "memory_peak": number(group / "memory.peak"),  # Linux 5.19
        "swap": number(group / "memory.swap.current"),
        "pids": number(group / "pids.current"),
        "pids_peak": number(group / "pids.peak"),  # Linux 6.1
        "oom_kills": pairs(read(group / "memory.events")).get("oom_kill"),
        "pids_refused": _pids_refused(group),
        "pressure": _pressure(group),
    }
    cpu = pairs(read(group / "cpu.stat"))
    for field, key in (
        ("cpu_user", "user_usec"),
        ("cpu_system", "system_usec"),
        ("cpu_throttled", "throttled_usec"),
    ):
        found[field] = cpu[key] / 1e6 if key in cpu else None
    io = read(group / "io.stat")
    for field, key in (("io_read", "rbytes="), ("io_written", "wbytes=")):
        words = [] if io is None else io.split()
        found[field] = (
            None if io is None else sum(int(word[len(key) :]) for word in words if word.startswith(key))
        )
    return {name: value for name, value in found.items() if value is not None}


def _pids_refused(group: Path) -> int | None:
    """Before Linux 6.11 a refused fork counts in the group of the process that forked, not in the one whose
    limit was hit; the kernels that count in the latter have pids.events.local."""
    if not (group / "pids.events").exists():
        return None
    groups = [group] if (group / "pids.events.local").exists() else groups_below(group)
    return sum(pairs(read(each / "pids.events")).get("max", 0) for each in groups)


def _pressure(group: Path) -> dict[str, float] | None:
    """avg10 of ``some``: the share of the last 10 seconds (in %) in which something waited."""
    found = {}
    for resource in ("cpu", "memory", "io"):
        for line in (read(group / f"{resource}.pressure") or "").splitlines():
            kind, average, *_ = line.split()
            if kind == "some":
                found[resource] = float(average.partition("=")[2])
    return found or None


def enable(group: Path, controllers: Collection[str]) -> None:
    """Offer controllers to the groups below: those of cgroup.subtree_control that are not there yet."""
    path = group / "cgroup.subtree_control"
    with naming(str(path)):
        missing = sorted(set(controllers) - set((read(path) or "").split()))
        if missing:
            write(path, " ".join(f"+{name}" for name in missing))


def swap_accounted(group: Path) -> bool:
    """Whether the kernel counts swap: seen in this group, or the first one below that has the controller;
    where none has it yet, a kernel with swap is taken to count it."""
    for each in (group, *(path for path in group.iterdir() if path.is_dir())):
        if (each / "memory.max").exists():
            return (each / "memory.swap.max").exists()
    return os.path.exists("/proc/swaps")
