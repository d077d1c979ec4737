"""One control group of ours: a directory in each hierarchy in use, written and read as one thing."""

import contextlib
import errno as E
import os
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Self

from sandboxcore import cgroup_v2
from sandboxcore.cgroup_files import (
    events,
    groups_below,
    naming,
    processes,
    read,
    remove_tree,
    wait_event,
    write,
)
from sandboxcore.cgroup_layout import V1_NAMES, Layout
from sandboxcore.cgroup_values import LIMITS, check_cpus, checked, values_of
from sandboxcore.errors import SetupError, UnsupportedHost
from sandboxcore.spec import Limits

INIT_LEAF = "init"
LAUNCHER_LEAF = "cmd-"  # and a number: csrc/group.c

# Where a sandbox's init makes groups of its own, one per command, for what they use.
_SHARED_WITH_INIT = ("memory", "pids", "cpuacct", "blkio")


def v1() -> ModuleType:
    """The v1 interface, imported where it is used. :class:`UnsupportedHost` without cgroupspy."""
    try:
        from sandboxcore import cgroup_v1
    except ImportError as error:
        raise UnsupportedHost(f"cgroup v1 ({error})", "install cgroupspy: `pip install cgroupspy`") from None
    return cgroup_v1


def v1_names(layout: Layout, controllers: Collection[str]) -> list[str]:
    """The v1 hierarchies that a group with these controllers is in: cpuacct and the freezer come along."""
    names = [V1_NAMES[name] for name in controllers if layout.versions.get(name) == 1]
    if controllers and "cpuacct" in layout.v1:
        names.append("cpuacct")
    if layout.freezer == 1:
        names.append("freezer")
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUsage:
    """What a group and everything below it used. None is what the kernel does not have or was not asked for.

    Sizes are bytes: ``memory`` and ``swap`` now, ``memory_peak``, and what was read from and written to block
    devices. Times are seconds; ``cpu_throttled`` is time spent waiting for the next period of limits.cpus.
    ``oom_kills``: processes killed because memory was full (with a whole group, its first victim twice).
    ``pids_refused``: forks that failed by ``limits.pids`` (before Linux 6.11, and on v1, without those in
    groups that are gone). ``pressure``: percent of the last 10 s in which something waited for cpu, memory or
    io.
    """

    memory: int | None = None
    memory_peak: int | None = None
    swap: int | None = None
    cpu_user: float | None = None
    cpu_system: float | None = None
    cpu_throttled: float | None = None
    pids: int | None = None
    pids_peak: int | None = None
    io_read: int | None = None
    io_written: int | None = None
    oom_kills: int | None = None
    pids_refused: int | None = None
    pressure: Mapping[str, float] | None = None


@dataclass(slots=True)
class Directories:
    """Open descriptors of a group, for C. A context manager; closing is idempotent.

    ``v2``: the directory, for CLONE_INTO_CGROUP and openat. ``procs``: cgroup.procs of each v1 hierarchy, for
    writing. ``v1``: the directories there.
    """

    v2: int | None = None
    procs: dict[str, int] = field(default_factory=dict)
    v1: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        """Close them all."""
        every = [*([] if self.v2 is None else [self.v2]), *self.procs.values(), *self.v1.values()]
        self.v2, self.procs, self.v1 = None, {}, {}
        for fd in every:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The group of one sandbox, or of one run.

    ``relative``: its path below the parents of a :class:`Layout`. ``v2``: its directory on the unified
    hierarchy, ``v1``: by v1 controller. ``controllers``: what it was made with.
    """

    relative: str
    v2: Path | None
    v1: Mapping[str, Path]
    controllers: tuple[str, ...]

    @classmethod
    def below(cls, layout: Layout, relative: str, controllers: Collection[str]) -> Self:
        """The group of this path, whether it exists or not."""
        names = v1_names(layout, controllers)
        return cls(
            relative=relative,
            v2=None if layout.v2 is None else layout.v2 / relative,
            v1=MappingProxyType({name: layout.v1[name] / relative for name in names}),
            controllers=tuple(controllers),
        )

    @classmethod
    def open(cls, layout: Layout, relative: str, controllers: Collection[str]) -> Self:
        """A group that exists, made by this or another process of the same user with the same layout.

        :class:`SetupError` (ENOENT) names the directory that is not there.
        """
        group = cls.below(layout, relative, controllers)
        for directory in group.places():
            if not directory.is_dir():
                raise SetupError("cgroup", E.ENOENT, subject=str(directory))
        return group

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON: for a process that finds other parents than this one, as of another
        session."""
        return {
            "relative": self.relative,
            "v2": None if self.v2 is None else str(self.v2),
            "v1": {name: str(path) for name, path in self.v1.items()},
            "controllers": list(self.controllers),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The reverse of :meth:`to_dict`; nothing is looked at."""
        return cls(
            relative=data["relative"],
            v2=None if data["v2"] is None else Path(data["v2"]),
            v1=MappingProxyType({name: Path(path) for name, path in data["v1"].items()}),
            controllers=tuple(data["controllers"]),
        )

    def leaf(self, name: str) -> "Group":
        """A group right below, such as that of one command."""
        return Group(
            relative=f"{self.relative}/{name}",
            v2=None if self.v2 is None else self.v2 / name,
            v1=MappingProxyType(
                {key: path / name for key, path in self.v1.items() if key in _SHARED_WITH_INIT}
            ),
            controllers=self.controllers,
        )

    def launchers(self) -> "list[Group]":
        """The groups that its init has made, with what is limited there."""
        names = {path.name for place in self.places() for path in place.glob(f"{LAUNCHER_LEAF}*")}
        controllers = tuple(name for name in ("memory", "pids") if name in self.controllers)
        v2 = self.v2 if any(self._version(name) == 2 for name in self.controllers) else None
        v1: Mapping[str, Path] = {name: path for name, path in self.v1.items() if name in controllers}
        whole = replace(self, v2=v2, v1=v1, controllers=controllers)
        return [whole.leaf(name) for name in sorted(names)]

    def places(self) -> list[Path]:
        """Its directories, each once (v1's cpu and cpuacct are often one hierarchy)."""
        return list(dict.fromkeys([*([] if self.v2 is None else [self.v2]), *self.v1.values()]))

    def make(self) -> None:
        """Make its directories. Nothing is left if one of them fails."""
        made: list[Path] = []
        try:
            for directory in self.places():
                with naming(f"mkdir {directory}"):
                    directory.mkdir()
                made.append(directory)
            for name, directory in self.v1.items():
                v1().made(name, directory)
        except BaseException:
            for directory in made:
                directory.rmdir()
            raise

    def prepare(self) -> None:
        """Make it ready for a sandbox: a leaf for its init, and leave for init to make leaves for commands.

        To be called while it is empty: nothing here then takes the kernel's lock of all forks. Init has
        another uid and is handed descriptors; all others stop at the base's 0700.
        """
        places = [self.v1[name] for name in _SHARED_WITH_INIT if name in self.v1]
        if self.v2 is not None:
            cgroup_v2.enable(self.v2, [name for name in self.controllers if self._version(name) == 2])
            with naming(f"mkdir {self.v2 / INIT_LEAF}"):
                (self.v2 / INIT_LEAF).mkdir()
            places.append(self.v2)
        for directory in dict.fromkeys(places):
            with naming(f"chmod {directory}"):
                directory.chmod(0o777)
                (directory / "cgroup.procs").chmod(0o666)

    # --- limits

    def limit(self, limits: Limits, *, whole: bool) -> None:
        """Write every limit that is set and whose controller the group has.

        ``whole``: when memory is full, all of the group is killed, not one process (memory.oom.group, v2
        only). :class:`SetupError` names the limit, the file and the errno, :class:`UnsupportedHost` a CPU
        that is not to be had.
        """
        values = values_of(limits)
        self._write({name: value for name, value in values.items() if LIMITS[name] in self.controllers})
        if whole and self.v2 is not None and "memory" in self.controllers and self._version("memory") == 2:
            path = self.v2 / "memory.oom.group"  # Linux 4.19
            with naming(str(path)):
                write(path, "1")

    def change(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change limits of a living group; None lifts one. Returns what the kernel says of these now.

        All are validated first. If one is refused the others are put back and :class:`SetupError` names it.
        When ``memory`` is set below what is in use and cannot be reclaimed, v2 kills processes; v1 refuses.
        """
        values = checked(changes)
        for name in values:
            if LIMITS[name] not in self.controllers:
                raise UnsupportedHost(
                    f"limits.{name} of a running sandbox",
                    f"it was started without the {LIMITS[name]} controller; give such a limit at the start",
                )
        before = self.limits()
        try:
            self._write(values)
        except (SetupError, UnsupportedHost):
            for name in values:
                with contextlib.suppress(SetupError, KeyError):
                    self._write({name: before[name]})
            raise
        after = self.limits()
        return {name: after.get(name) for name in values}

    def limits(self) -> dict[str, Any]:
        """What is in force, read back from the kernel: each limit whose controller the group has.

        :class:`SetupError` (ENOENT) when the group is gone.
        """
        with naming(f"limits of {self.relative}"):
            return self._limits()

    def _limits(self) -> dict[str, Any]:
        names = [name for name, controller in LIMITS.items() if controller in self.controllers]
        found = v1().limits(self.v1, names) if self.v1 else {}
        if self.v2 is not None:
            self.v2.stat()
            found.update(
                cgroup_v2.limits(self.v2, [name for name in names if self._version(LIMITS[name]) == 2])
            )
        return {name: found[name] for name in names if name in found}

    def _version(self, controller: str) -> int:
        return 1 if V1_NAMES[controller] in self.v1 else 2

    def _write(self, values: Mapping[str, Any]) -> None:
        if values.get("cpuset") is not None:
            check_cpus(values["cpuset"], self._effective_cpus())
        legacy = {name: value for name, value in values.items() if self._version(LIMITS[name]) == 1}
        if legacy:
            v1().set_limits(self.v1, legacy)
        for name, value in values.items():
            if name not in legacy:
                assert self.v2 is not None  # a controller that is not on v1
                cgroup_v2.set_limit(self.v2, name, value)

    def _effective_cpus(self) -> str:
        if self._version("cpuset") == 1:
            return str(v1().effective_cpus(self.v1["cpuset"].parent))
        assert self.v2 is not None
        return read(self.v2.parent / "cpuset.cpus.effective") or ""

    # --- life

    def usage(self) -> GroupUsage:
        """What the group used so far. :class:`SetupError` (ENOENT) when it is gone."""
        found: dict[str, Any] = {}
        with naming(f"usage of {self.relative}"):
            if self.v2 is not None:
                self.v2.stat()
                found.update(cgroup_v2.usage(self.v2))
            if self.v1:
                found.update(v1().usage(self.v1))
        return GroupUsage(**found)

    def freeze(self, timeout: float) -> None:
        """Stop every process of the group. :class:`SetupError` (ETIMEDOUT) if that takes more than
        ``timeout`` seconds: a process is deep in the kernel; the group runs on then."""
        deadline = time.monotonic() + timeout
        v2 = self._freezes_v2()
        done = self._freeze_v2(1, deadline) if v2 else v1().freeze(self._freezer(), deadline)
        if not done:
            with contextlib.suppress(SetupError):
                self.thaw(0)
            hint = "a process does not leave the kernel, such as one that waits for a dead network disk"
            raise SetupError("cgroup", E.ETIMEDOUT, subject=f"freeze {self.relative}", hint=hint)

    def thaw(self, timeout: float) -> None:
        """Let it run again. :class:`SetupError` (ETIMEDOUT) if it does not: a group above it is frozen."""
        if self._freezes_v2():
            done = self._freeze_v2(0, time.monotonic() + timeout)
        else:
            done = v1().thaw(self._freezer())
        if not done:
            hint = "a group above it is frozen"
            raise SetupError("cgroup", E.ETIMEDOUT, subject=f"thaw {self.relative}", hint=hint)

    def _freezes_v2(self) -> bool:
        return self.v2 is not None and (self.v2 / "cgroup.freeze").exists()

    def _freezer(self) -> Path:
        for directory in self.places():
            with naming(f"freezer of {self.relative}"):
                directory.stat()
        if "freezer" not in self.v1:
            raise UnsupportedHost("freezing a control group", "see layout().remedies['freezer']")
        return self.v1["freezer"]

    def _freeze_v2(self, value: int, deadline: float) -> bool:
        assert self.v2 is not None
        path = self.v2 / "cgroup.freeze"
        with naming(str(path)):
            write(path, str(value))
            return wait_event(self.v2, "frozen", value, deadline)

    @property
    def freezable(self) -> bool:
        """Whether there is a freezer for it."""
        return self._freezes_v2() or "freezer" in self.v1

    @property
    def frozen(self) -> bool:
        """Whether every process of the group is stopped by the freezer."""
        if self._freezes_v2() and self.v2 is not None:
            return events(self.v2).get("frozen") == 1
        return "freezer" in self.v1 and bool(v1().frozen(self.v1["freezer"]))

    @property
    def populated(self) -> bool:
        """Whether there is a living process in it, or below it."""
        if self.v2 is not None and events(self.v2).get("populated"):
            return True
        return any(processes(group) for path in self.v1.values() for group in groups_below(path))

    def kill(self) -> None:
        """SIGKILL to all of it at once, forks in flight included; without cgroup.kill (Linux 5.14), to the
        processes right in it: init is one of them, and with it everything ends."""
        if self.v2 is not None and (self.v2 / "cgroup.kill").exists():
            with naming(f"{self.v2}/cgroup.kill"):
                write(self.v2 / "cgroup.kill", "1")
        else:
            places = [*self.v1.values(), *([] if self.v2 is None else [self.v2, self.v2 / INIT_LEAF])]
            for pid in {pid for place in places for pid in processes(place)}:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        if "freezer" in self.v1:  # or the signal waits for ever: freezer-subsystem.rst
            v1().thaw(self.v1["freezer"])

    def remove(self, timeout: float = 0) -> bool:
        """Remove its directories and all below them. False if processes are in it for longer than ``timeout``
        seconds. Idempotent."""
        deadline = time.monotonic() + timeout
        left = [directory for directory in self.places() if not remove_tree(directory, deadline)]
        return not left

    def directories(self, leaf: str = "") -> Directories:
        """Its directories, open, for C; with ``leaf``, v2's is that leaf of it. The caller closes them."""
        opened = Directories()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        with _closing_on_error(opened), naming(f"opening {self.relative}"):
            if self.v2 is not None:
                opened.v2 = os.open(self.v2 / leaf, flags)
            seen = set()
            for name, directory in self.v1.items():
                opened.v1[name] = os.open(directory, flags)
                if directory not in seen:
                    seen.add(directory)
                    opened.procs[name] = os.open(directory / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        return opened


@contextlib.contextmanager
def _closing_on_error(opened: Directories) -> Iterator[None]:
    try:
        yield
    except BaseException:
        opened.close()
        raise
