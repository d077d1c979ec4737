"""Control group files: what both versions of the interface share.

Nothing here knows a layout. Reading gives None for what the kernel does not have; writing names the limit
that failed.
"""

import contextlib
import errno as E
import os
import re
import select
import time
from collections.abc import Iterator
from pathlib import Path

from sandboxcore.errors import SetupError

BLOCK = Path("/sys/block")

# Devices in memory, or another face of a file: throttling them throttles nothing, or the same thing twice.
_NOT_REAL = re.compile(r"(loop|ram|zram)[0-9]+")
_ABSENT = (E.ENOENT, E.ENODEV, E.ENOTDIR, E.EOPNOTSUPP)  # of a group, of a file, of a switched-off feature
_BUSY = (E.EBUSY, E.ENOTEMPTY)
_SOON = 0.002  # seconds in which to look again at once: the kernel tells of a change at most every 10 ms


def read(path: Path) -> str | None:
    """The file's text; None when the kernel has no such file, or the group is gone."""
    try:
        return path.read_text()
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise


def write(path: Path, text: str) -> None:
    """One write(2), as these files want it."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def pairs(text: str | None) -> dict[str, int]:
    """Lines of ``key number``, such as memory.events, as a dictionary."""
    lines = (line.split() for line in (text or "").splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}


def number(path: Path) -> int | None:
    """The number in a file; None for "max" and for what is absent."""
    text = (read(path) or "").strip()
    return int(text) if text.isdecimal() else None


@contextlib.contextmanager
def naming(subject: str, hint: str = "") -> Iterator[None]:
    """An OSError inside becomes a :class:`SetupError` of stage ``cgroup`` that says what failed."""
    try:
        yield
    except SetupError:
        raise
    except OSError as error:
        raise SetupError("cgroup", error.errno or E.EIO, subject=subject, hint=hint) from error


# --- devices, processes, groups ---------------------------------------------------------------------


def block_devices() -> list[str]:
    """``"major:minor"`` of every real block device: not partitions, loop, ram, zram, empty or hidden ones."""
    found = []
    for device in sorted(os.listdir(BLOCK)) if BLOCK.is_dir() else []:
        size, hidden = read(BLOCK / device / "size"), read(BLOCK / device / "hidden")
        if _NOT_REAL.fullmatch(device) or (size or "0").strip() == "0" or (hidden or "0").strip() == "1":
            continue
        if number := read(BLOCK / device / "dev"):
            found.append(number.strip())
    return found


def processes(group: Path) -> list[int]:
    """The processes in this very group; 0 stands for each one outside our pid namespace."""
    return [int(pid) for pid in (read(group / "cgroup.procs") or "").split()]


def groups_below(group: Path) -> list[Path]:
    """The group and all below it, deepest first."""
    return [Path(path) for path, _, _ in os.walk(group, topdown=False)]


def events(group: Path) -> dict[str, int]:
    """cgroup.events of a v2 group: ``populated``, and ``frozen`` since Linux 5.2; empty when it is gone."""
    return pairs(read(group / "cgroup.events"))


def wait_event(group: Path, key: str, value: int, deadline: float) -> bool:
    """Wait until cgroup.events says so, or until ``deadline`` (of time.monotonic). A group that is gone
    is not populated."""
    try:
        fd = os.open(group / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return key == "populated" and value == 0
    poller = select.poll()
    poller.register(fd, select.POLLPRI | select.POLLERR)
    soon = time.monotonic() + _SOON
    try:
        while pairs(os.pread(fd, 4096, 0).decode()).get(key) != value:
            now = time.monotonic()
            if now >= deadline:
                return False
            if now < soon:
                os.sched_yield()
            else:
                poller.poll(min(deadline - now, 1) * 1000)
    except OSError as error:
        if error.errno != E.ENODEV:
            raise
        return key == "populated" and value == 0
    finally:
        os.close(fd)
    return True


def _every_name_below(group: Path) -> list[Path]:
    """:func:`groups_below`, and those that we may not look into: a command's group belongs to its init, which
    has another uid; but they are removed from groups that are ours."""
    found: dict[Path, None] = {}
    for path, names, _ in os.walk(group, topdown=False):
        found |= dict.fromkeys([*(Path(path, name) for name in names), Path(path)])
    return list(found)


def remove_tree(group: Path, deadline: float) -> bool:
    """Remove a group with all below it; False if it is still busy at ``deadline``."""
    while True:
        for directory in _every_name_below(group):
            try:
                directory.rmdir()
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in _BUSY:
                    raise SetupError("cgroup", error.errno or E.EIO, subject=f"rmdir {directory}") from error
        if not group.exists():
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        # v1 tells nobody when a group becomes empty, and v2 may say so a moment before rmdir agrees.
        if not (group / "cgroup.events").exists() or wait_event(group, "populated", 0, deadline):
            time.sleep(min(left, 0.002))
