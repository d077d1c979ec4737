"""Facts about the machine that a latency depends on, and signs that something else used it."""

from __future__ import annotations

import gzip
import os
import platform
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

Facts = dict[str, str | int | dict[str, str]]

UNUSUAL_WAITING = 0.25
"""A block is noisy when tasks waited so much more of it than of the subject's median block."""


class Disturbance(NamedTuple):
    """What else went on during a block.

    stolen: the hypervisor gave the processors to others. loaded: more tasks than processors wanted
    to run, on average over a minute. waiting: the share of the time in which some runnable task
    waited for a processor; a subject whose own processes overlap has a share of its own, so only
    a comparison with its other blocks tells.
    """

    stolen: bool
    loaded: bool
    waiting: float


class NoiseGuard:
    """Watches the machine from its creation on."""

    def __init__(self) -> None:
        self._before = self._now()

    def disturbance(self, slept_s: float) -> Disturbance:
        """What went on, seen against the time since then less what the block slept in it."""
        time_ns, steal, waited_us = (
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )
        return Disturbance(
            stolen=steal > 0,
            loaded=os.getloadavg()[0] > (os.cpu_count() or 1),
            waiting=waited_us * 1000 / max(1, time_ns - slept_s * 1e9),
        )

    @staticmethod
    def _now() -> tuple[int, int, int]:
        fields = _read("/proc/stat").split("\n", 1)[0].split()
        steal = int(fields[8]) if len(fields) > 8 else 0
        waited = re.search(r"some .*total=(\d+)", _read("/proc/pressure/cpu"))
        return time.perf_counter_ns(), steal, int(waited[1]) if waited else 0


def noisy_blocks(blocks: Sequence[Disturbance]) -> int:
    """How many of one subject's blocks were disturbed."""
    usual = statistics.median(block.waiting for block in blocks) if blocks else 0
    return sum(block.stolen or block.loaded or block.waiting > usual + UNUSUAL_WAITING for block in blocks)


def facts() -> Facts:
    """Everything in the order in which the tables print it; "unknown" where the host is silent."""
    config = _kernel_config()
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "virtual": "yes" if " hypervisor" in _read("/proc/cpuinfo") else "no",
        "hz": config.get("CONFIG_HZ", "unknown"),
        "preemption": _preemption(config),
        "clocksource": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "cgroup": _cgroup_layout(),
        "lsm": _read("/sys/kernel/security/lsm") or "unknown",
        "mitigations": _mitigations(),
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "mounts": len(_read("/proc/self/mountinfo").splitlines()),
        "uid": os.geteuid(),
        "tmp": _filesystem_of_tmp(),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def _kernel_config() -> dict[str, str]:
    try:
        text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    except (OSError, EOFError):
        text = _read(f"/boot/config-{platform.release()}")
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.MULTILINE))


def _preemption(config: dict[str, str]) -> str:
    """The mode in force; with PREEMPT_DYNAMIC the boot option decides, then the configuration."""
    shown = re.search(r"\((\w+)\)", _read("/sys/kernel/debug/sched/preempt"))
    asked = re.search(r"\bpreempt=(\w+)", _read("/proc/cmdline"))
    for found in (shown, asked):
        if found:
            return found[1]
    for mode in ("NONE", "VOLUNTARY", "LAZY", "RT"):
        if config.get(f"CONFIG_PREEMPT_{mode}") == "y":
            return mode.lower()
    return "full" if config.get("CONFIG_PREEMPT") == "y" else "unknown"


def _cgroup_layout() -> str:
    types = re.findall(r" - (cgroup2?) \S+ (\S+)", _read("/proc/self/mountinfo"))
    v1 = sum(kind == "cgroup" for kind, _ in types)
    v2 = [options for kind, options in types if kind == "cgroup2"]
    favour = ", favordynmods" if any("favordynmods" in options for options in v2) else ""
    if v1 and v2:
        return f"hybrid, {v1} v1 hierarchies{favour}"
    return f"v2{favour}" if v2 else "v1" if v1 else "none"


def _mitigations() -> dict[str, str]:
    """What the kernel does against each processor bug that this machine has."""
    found = {}
    for path in sorted(Path("/sys/devices/system/cpu/vulnerabilities").glob("*")):
        text = _read(str(path))
        if text and not text.startswith("Not affected"):
            found[path.name] = text.split(";")[0].split(",")[0]
    return found


def _filesystem_of_tmp() -> str:
    lines = [line.split(" - ") for line in _read("/proc/self/mountinfo").splitlines()]
    by_target = {left.split()[4]: right.split()[0] for left, right in lines}
    return by_target.get("/tmp", by_target.get("/", "unknown"))
