"""Limits and usage of v1 groups (Documentation/admin-guide/cgroup-v1/), through cgroupspy's controllers.

Imported only where a v1 controller is used. A group is a mapping from the v1 controller's name to the group's
directory there. cgroupspy is handed one directory at a time and never walks a tree; what it lacks (pids,
freezer) or misspells (a blank in blkio's file name) is declared here in its own terms.
"""

import errno as E
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgroupspy import controllers as spy
from cgroupspy.contenttypes import DeviceThrottle
from cgroupspy.interfaces import BaseFileInterface, DictFile, IntegerFile, TypedFile

from sandboxcore.cgroup_files import block_devices, groups_below, naming, pairs, read
from sandboxcore.cgroup_values import cpu_quota, format_cpus, parse_cpus

Group = Mapping[str, Path]

_UNLIMITED = 1 << 60  # the kernel says LONG_MAX rounded to pages; nobody has an exabyte


class MemoryController(spy.MemoryController):  # type: ignore[misc]  # cgroupspy ships no types
    """cgroupspy does not know the limit of what sockets hold (memory.rst, 2.7)."""

    kmem_tcp_limit_in_bytes = IntegerFile("memory.kmem.tcp.limit_in_bytes")


class PidsController(spy.Controller):  # type: ignore[misc]
    """pids.max is a number or "max", which no class of cgroupspy's reads."""

    max = BaseFileInterface("pids.max")
    current = IntegerFile("pids.current", readonly=True)
    events = DictFile("pids.events", readonly=True)


class FreezerController(spy.Controller):  # type: ignore[misc]
    """THAWED, FREEZING, FROZEN."""

    state = BaseFileInterface("freezer.state")


class BlkIOController(spy.BlkIOController):  # type: ignore[misc]
    """cgroupspy 0.2.3 has ``"blkio.throttle.write_bps_device "``, which is no file."""

    throttle_write_bps_device = TypedFile("blkio.throttle.write_bps_device", DeviceThrottle, many=True)


class CpuAcctController(spy.CpuAcctController):  # type: ignore[misc]
    """Nanoseconds, since Linux 4.10; cpuacct.stat has hundredths."""

    usage = IntegerFile("cpuacct.usage", readonly=True)
    usage_sys = IntegerFile("cpuacct.usage_sys", readonly=True)


_CLASSES = {
    "memory": MemoryController,
    "cpu": spy.CpuController,
    "cpuacct": CpuAcctController,
    "cpuset": spy.CpuSetController,
    "blkio": BlkIOController,
    "pids": PidsController,
    "freezer": FreezerController,
}


@dataclass(frozen=True, slots=True)
class _Node:
    """As much of cgroupspy's Node as a controller asks for."""

    full_path: bytes


def controller(name: str, directory: Path) -> Any:
    """cgroupspy's object for one group of one hierarchy."""
    return _CLASSES[name](_Node(os.fsencode(directory)))


def made(name: str, directory: Path) -> None:
    """What a new group needs before a process may enter it, or before it has its own groups. Idempotent."""
    with naming(f"{name} ({directory})"):
        own = controller(name, directory)
        if name == "cpuset":
            parent = controller(name, directory.parent)
            own.mems, own.cpus = own.mems or parent.mems, own.cpus or parent.cpus
        elif name == "memory" and not own.use_hierarchy:  # Linux 5.11 and later know no other way
            own.use_hierarchy = True


# --- limits -----------------------------------------------------------------------------------------


def set_limits(group: Group, values: Mapping[str, Any]) -> None:
    """Write limits. :class:`SetupError` names the one that failed, its directory and the errno."""
    for name, value in values.items():
        if name == "cpus":
            with naming(f"limits.cpus ({group['cpu']})", "v1 grants no more than the group above has"):
                _set_cpus(controller("cpu", group["cpu"]), value)
        elif name == "cpu_weight":
            with naming(f"limits.cpu_weight ({group['cpu']})"):
                shares = 1024 if value is None else max(2, value * 1024 // 100)
                controller("cpu", group["cpu"]).shares = shares
        elif name == "pids":
            with naming(f"limits.pids ({group['pids']})"):
                controller("pids", group["pids"]).max = "max" if value is None else value
        elif name == "cpuset":
            with naming(f"limits.cpuset ({group['cpuset']})"):
                parent = controller("cpuset", group["cpuset"].parent)
                controller("cpuset", group["cpuset"]).cpus = (
                    parent.cpus if value is None else set(parse_cpus(value))
                )
        elif name == "io":
            with naming(f"limits.io ({group['blkio']})"):
                _set_io(controller("blkio", group["blkio"]), value)
    if "memory" in values or "swap" in values:
        _set_memory(group["memory"], values)


def _set_cpus(cpu: Any, value: float | None) -> None:
    if value is None:
        cpu.cfs_quota_us = None
        return
    quota, period = cpu_quota(value)
    if cpu.cfs_period_us != period:  # a longer period under the old, small quota would be refused below 1 ms
        cpu.cfs_quota_us = None
        cpu.cfs_period_us = period
    cpu.cfs_quota_us = quota


def _set_io(blkio: Any, value: int | None) -> None:
    for device in block_devices():
        line = [f"{device} {value or 0}"]  # 0 lifts the limit
        blkio.throttle_read_bps_device = line
        blkio.throttle_write_bps_device = line


def _set_memory(directory: Path, values: Mapping[str, Any]) -> None:
    """v1 limits memory, and memory + swap; the second may never be the smaller, not even for a moment."""
    own = controller("memory", directory)
    with naming(f"limits.memory ({directory})", "EBUSY: more than that is in use and cannot be reclaimed"):
        now = _memory_limits(directory)
        size, swap = values.get("memory", now["memory"]), values.get("swap", now.get("swap"))
        if "memory" in values and (directory / "memory.kmem.tcp.limit_in_bytes").exists():
            own.kmem_tcp_limit_in_bytes = size  # what sockets hold is counted apart, and only if that is set
        if not (directory / "memory.memsw.limit_in_bytes").exists():
            own.limit_in_bytes = size
            return
        total = None if size is None or swap is None else size + swap
        lower_first = size is not None and size <= own.memsw_limit_in_bytes
        if not lower_first:
            own.memsw_limit_in_bytes = total
        own.limit_in_bytes = size
        if lower_first:
            own.memsw_limit_in_bytes = total


def limits(group: Group, names: Collection[str]) -> dict[str, Any]:
    """What the kernel enforces, for those names whose hierarchy this group is in."""
    found: dict[str, Any] = {}
    if "memory" in group:
        found.update(_memory_limits(group["memory"]))
    if "cpu" in group:
        cpu = controller("cpu", group["cpu"])
        quota = cpu.cfs_quota_us
        found["cpus"] = None if quota is None else quota / cpu.cfs_period_us
        found["cpu_weight"] = max(1, round(cpu.shares * 100 / 1024))
    if "pids" in group:
        text = controller("pids", group["pids"]).max
        found["pids"] = None if text == "max" else int(text)
    if "cpuset" in group:
        found["cpuset"] = format_cpus(controller("cpuset", group["cpuset"]).cpus) or None
    if "blkio" in group:
        blkio = controller("blkio", group["blkio"])
        rates = [*blkio.throttle_read_bps_device, *blkio.throttle_write_bps_device]
        found["io"] = min((rate.limit for rate in rates), default=None)
    return {name: value for name, value in found.items() if name in names}


def _memory_limits(directory: Path) -> dict[str, Any]:
    own = controller("memory", directory)
    size: int = own.limit_in_bytes
    found: dict[str, Any] = {"memory": None if size >= _UNLIMITED else size}
    if (directory / "memory.memsw.limit_in_bytes").exists():
        total: int = own.memsw_limit_in_bytes
        found["swap"] = None if total >= _UNLIMITED else total - size
    return found


def effective_cpus(directory: Path) -> str:
    """The CPUs that a group below this one may use."""
    return format_cpus(controller("cpuset", directory).cpus)


# --- usage ------------------------------------------------------------------------------------------


def usage(group: Group) -> dict[str, Any]:
    """Fields of :class:`sandboxcore.cgroup.GroupUsage`; what the kernel does not have is missing."""
    found: dict[str, Any] = {}
    if "memory" in group:
        found.update(_memory_usage(group["memory"]))
    if "cpuacct" in group:
        cpuacct = controller("cpuacct", group["cpuacct"])
        if (group["cpuacct"] / "cpuacct.usage_sys").exists():
            kernel = cpuacct.usage_sys  # seen at clock ticks; only the sum is exact
            spent = max(cpuacct.usage, kernel)
            found.update(cpu_user=(spent - kernel) / 1e9, cpu_system=kernel / 1e9)
        else:
            ticks = os.sysconf("SC_CLK_TCK")
            spent = cpuacct.acct_stat
            found.update(cpu_user=spent["user"] / ticks, cpu_system=spent["system"] / ticks)
    if "cpu" in group:
        found["cpu_throttled"] = controller("cpu", group["cpu"]).stat["throttled_time"] / 1e9
    if "pids" in group:
        pids = controller("pids", group["pids"])
        found["pids"] = pids.current
        peak = read(group["pids"] / "pids.peak")  # Linux 6.1
        if peak is not None:
            found["pids_peak"] = int(peak)
        # v1 counts where the fork happened, not where the limit is.
        found["pids_refused"] = _sum(group["pids"], "pids.events", "max")
    if "blkio" in group:
        found.update(_io_usage(group["blkio"]))
    return found


def _memory_usage(directory: Path) -> dict[str, Any]:
    own = controller("memory", directory)
    found: dict[str, Any] = {"memory": own.usage_in_bytes, "memory_peak": own.max_usage_in_bytes}
    if (directory / "memory.memsw.usage_in_bytes").exists():
        found["swap"] = max(0, own.memsw_usage_in_bytes - found["memory"])
    found["oom_kills"] = _sum(directory, "memory.oom_control", "oom_kill")  # Linux 4.13
    return found


def _sum(directory: Path, file: str, key: str) -> int:
    return sum(pairs(read(group / file)).get(key, 0) for group in groups_below(directory))


def _io_usage(directory: Path) -> dict[str, int]:
    text = read(directory / "blkio.throttle.io_service_bytes_recursive")
    if text is None:
        return {}
    found = {"io_read": 0, "io_written": 0}
    for words in (line.split() for line in text.splitlines()):
        field = {"Read": "io_read", "Write": "io_written"}.get(words[1]) if len(words) == 3 else None
        if field:
            found[field] += int(words[2])
    return found


# --- freezer ----------------------------------------------------------------------------------------


def frozen(directory: Path) -> bool:
    """Whether every process of the group is."""
    return bool(controller("freezer", directory).state == "FROZEN")


def freeze(directory: Path, deadline: float) -> bool:
    """Freeze; False if it is not complete at ``deadline``. While the state is FREEZING the kernel has met a
    task that it could not stop, and wants to be asked again (cgroup-v1/freezer-subsystem.rst)."""
    own = controller("freezer", directory)
    while True:
        with naming(f"freezer.state ({directory})"):
            try:
                own.state = "FROZEN"
            except OSError as error:
                if error.errno != E.EBUSY:
                    raise
            if own.state == "FROZEN":
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.001)  # v1 has no file to poll


def thaw(directory: Path) -> bool:
    """Let the group run; False if a group above it is frozen."""
    with naming(f"freezer.state ({directory})"):
        own = controller("freezer", directory)
        own.state = "THAWED"
        return bool(own.state == "THAWED")
