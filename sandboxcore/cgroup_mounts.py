"""Which cgroup file systems are mounted, and which groups this process is in: proc(5), cgroups(7),
cgroup_namespaces(7). Pure parsing, but for one look at what a mount covers."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

LEGACY = frozenset(
    ("memory", "cpu", "cpuacct", "pids", "blkio", "cpuset", "freezer")
)  # v1 controllers of use


@dataclass(frozen=True, slots=True)
class Mount:
    """One cgroup mount. ``root`` is the group that its top shows, as seen from our cgroup namespace."""

    root: str
    point: Path
    device: int
    writable: bool
    unified: bool
    controllers: frozenset[str]

    def place(self, group: str) -> Path | None:
        """The directory of a group, if this mount shows it. Both sides may begin with ``/..``: outside of
        our namespace, where names are not known unless they are in both."""
        own, root = _parts(group), _parts(self.root)
        rest = own[len(root) :]
        if own[: len(root)] != root or ".." in rest:
            return None
        return self.point.joinpath(*rest)

    def visible(self) -> bool:
        """Whether nothing is mounted over it."""
        try:
            return self.point.stat().st_dev == self.device
        except OSError:
            return False


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def parse_mounts(mountinfo: str) -> list[Mount]:
    """The cgroup mounts of /proc/self/mountinfo (proc(5)), the last made first."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        if (words := after.split(" ")) and words[0] in ("cgroup", "cgroup2"):
            _, _, device, root, point, options, *_ = before.split(" ")
            settings = set(words[2].split(","))
            found.append(
                Mount(
                    root=_unescaped(root),
                    point=Path(_unescaped(point)),
                    device=os.makedev(*map(int, device.split(":"))),
                    writable="rw" in options.split(",") and "ro" not in settings,
                    unified=words[0] == "cgroup2",
                    controllers=frozenset(settings & LEGACY),
                )
            )
    return found[::-1]


def _unescaped(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)


def parse_own(text: str) -> dict[str, str]:
    """The groups of /proc/self/cgroup by v1 controller; the unified hierarchy's is that of ``""``."""
    found = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controllers:
            found.update(dict.fromkeys(controllers.split(","), path))
    return found
