"""Control groups: what limits need of the host, and the tree of groups that sandboxes live in.

::

    <parent>/                     cgroup_layout.py finds it, one per hierarchy
        sandboxcore.host/         the parent's own processes, where it was a delegated group (v2)
        sandboxcore/              the host-wide limits
            host-<pid>-<start>-<ns>-<n>/   Base: one helper process and its sandboxes; mode 0700
                spawner/              the helper itself (v2)
                <name>/               Group: one sandbox or one run
                    init/  cmd-N/     made by Group.prepare() and by the sandbox's init
"""

import contextlib
import errno as E
import functools
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sandboxcore import cgroup_v2
from sandboxcore.cgroup_files import (
    groups_below,
    naming,
    processes,
    read,
    remove_tree,
    wait_event,
    write,
)
from sandboxcore.cgroup_group import Directories, Group, GroupUsage, v1
from sandboxcore.cgroup_layout import HOST_LEAF, SHARED, TRIAL, V1_NAMES, Layout, forget, layout
from sandboxcore.cgroup_scope import enter_scope
from sandboxcore.cgroup_values import CONTROLLERS, LIMITS, check_cpus, values_of
from sandboxcore.errors import SetupError, SpecError, UnsupportedHost
from sandboxcore.identity import pid_namespace, start_ticks
from sandboxcore.spec import Limits

__all__ = [
    "LIMITS",
    "Base",
    "Directories",
    "Group",
    "GroupUsage",
    "Layout",
    "collect",
    "host_limits",
    "layout",
    "needed",
    "require",
]

T = TypeVar("T")

SPAWNER_LEAF = "spawner"
STAYS = ".stays"  # ends the name of the group of a sandbox that outlives its maker

_HOST = re.compile(r"host-([0-9]+)-([0-9]+)-([0-9]+)-[0-9]+")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_ROUNDS = 100  # of what others may undo meanwhile
_ENDING = 1.0  # seconds for a sandbox to see that its host process is gone, and to end
_numbers = itertools.count()


# --- what limits need -------------------------------------------------------------------------------


def needed(limits: Limits) -> dict[str, str]:
    """The limits that are set and need a group, and the controller of each. ``pids`` does without one."""
    return {
        name: controller
        for name, controller in LIMITS.items()
        if name != "pids" and getattr(limits, name) is not None
    }


def require(limits: Limits, optional: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The controllers that these limits use here, and the limits (as ``"memory"``) that are left out.

    :class:`UnsupportedHost` for a limit that is not to be had and not in ``optional``. When any group is in
    use, ``pids`` joins. Has systemd move this process into a scope of its own where that is the only way.
    """
    wanted = needed(limits)
    if not wanted:
        return (), ()
    values = values_of(limits)
    found, problem = _with_scope()
    used, omitted = set(), []
    for name, controller in wanted.items():
        try:
            _check(found, name, controller, values, problem)
            used.add(controller)
        except UnsupportedHost:
            if name not in optional:
                raise
            omitted.append(name)
    if used and "pids" in found.versions:
        used.add("pids")
    return tuple(name for name in CONTROLLERS if name in used), tuple(omitted)


def _with_scope() -> tuple[Layout, str]:
    """The layout, after asking systemd where that is the only way; and what became of that."""
    found = layout()
    if not found.scope:
        return found, ""
    problem = _ask_once(os.getpid())
    forget()
    return layout(), problem


@functools.lru_cache(1)
def _ask_once(pid: int) -> str:
    return enter_scope()


def _check(found: Layout, name: str, controller: str, values: Mapping[str, Any], problem: str) -> None:
    accounted = "swap" if name == "swap" else controller
    if accounted not in found.versions:
        remedy = found.remedies[accounted]
        raise UnsupportedHost(f"limits.{name}", f"{remedy} ({problem})" if problem else remedy)
    if name == "swap" and found.versions["swap"] == 1 and "memory" not in values:
        raise UnsupportedHost(
            "limits.swap without limits.memory",
            "cgroup v1 limits memory, and memory and swap together; set limits.memory as well",
        )
    if name == "cpuset":
        check_cpus(values["cpuset"], _effective_cpus(found))


def _effective_cpus(found: Layout) -> str:
    if found.versions["cpuset"] == 1:
        return str(v1().effective_cpus(found.v1["cpuset"]))
    return read((found.v2 or Path()) / "cpuset.cpus.effective") or ""


# --- the tree ---------------------------------------------------------------------------------------


class Base:
    """What one helper process of ours and all of its sandboxes live below.

    Made at once in every hierarchy in use, with mode 0700; ``controllers`` are enabled for its groups.
    :class:`SetupError` names what failed, and nothing is left then. Threads may share it.
    """

    def __init__(self, layout: Layout, controllers: Collection[str] = ()) -> None:
        self.layout = layout
        whose = f"{os.getpid()}-{start_ticks(os.getpid())}-{pid_namespace()}"
        self.relative = f"{SHARED}/host-{whose}-{next(_numbers)}"
        self.controllers: tuple[str, ...] = ()
        self._lock = threading.Lock()
        try:
            self.enable(controllers)
        except BaseException:
            self.remove()
            raise

    def enable(self, controllers: Collection[str]) -> None:
        """Have these controllers as well, from the parent down to here. The first one on v2 moves the
        parent's own processes into a leaf of it, unless the parent is the hierarchy's root."""
        with self._lock:
            every = tuple(sorted({*self.controllers, *controllers}))
            whole = Group.below(self.layout, self.relative, every)
            _again(lambda: _make_base(whole))
            v2 = [name for name in every if self.layout.versions.get(name) == 2]
            if v2 and self.layout.v2 is not None and whole.v2 is not None:
                _offer(self.layout.v2, v2)
                cgroup_v2.enable(whole.v2.parent, v2)
                cgroup_v2.enable(whole.v2, v2)
            self.controllers = every

    def adopt(self, pid: int) -> None:
        """Move a process into the leaf ``spawner``, so that it may fork into groups beside that. Only v2 with
        controllers wants this."""
        if self.layout.v2 is None or not any(
            self.layout.versions.get(name) == 2 for name in self.controllers
        ):
            return
        leaf = self.layout.v2 / self.relative / SPAWNER_LEAF
        with naming(f"process {pid} into {leaf}"):
            leaf.mkdir(exist_ok=True)
            write(leaf / "cgroup.procs", str(pid))

    def group(self, name: str, controllers: Collection[str]) -> Group:
        """Make a group in each hierarchy that its controllers, or freezing and killing, want. The controllers
        are enabled first if they are not."""
        if not _NAME.fullmatch(name) or name == SPAWNER_LEAF:
            raise SpecError(f"group: {name!r} is not a name for a group")
        if set(controllers) - set(self.controllers):
            self.enable(controllers)
        group = Group.below(self.layout, f"{self.relative}/{name}", controllers)
        try:
            group.make()
        except SetupError as error:
            if error.errno != E.ENOENT:
                raise
            self.enable(())  # somebody tidied up what looked empty
            group.make()
        return group

    def remove(self) -> None:
        """Remove what has no process in it. Idempotent."""
        whole = Group.below(self.layout, self.relative, tuple(self.layout.versions.keys() & set(CONTROLLERS)))
        for place in whole.places():
            left = _clear(place)
            if left == [place / SPAWNER_LEAF]:  # it goes after the last of its sandboxes
                wait_event(left[0], "populated", 0, time.monotonic() + _ENDING)
                _clear(place)
        _tidy(self.layout)


def _hierarchies(group: Group) -> list[tuple[Path, list[str]]]:
    """Each directory of a group, with its v1 controllers (none: v2)."""
    return [
        (place, [name for name, directory in group.v1.items() if directory == place])
        for place in group.places()
    ]


def _again(action: Callable[[], T]) -> T:
    """Do what needs the shared parent, which another process may remove as long as it is empty."""
    for _ in range(_ROUNDS):
        try:
            return action()
        except SetupError as error:
            if error.errno not in (E.ENOENT, E.ENODEV):
                raise
    return action()


def _make(directory: Path, v1_controllers: Collection[str], mode: int = 0o755) -> None:
    with naming(f"mkdir {directory}"), contextlib.suppress(FileExistsError):
        os.mkdir(directory, mode)
    for name in v1_controllers:
        v1().made(name, directory)


def _make_base(whole: Group) -> None:
    for directory, names in _hierarchies(whole):
        _make(directory.parent, names)
        _make(directory, names, 0o700)


def _offer(parent: Path, controllers: Collection[str]) -> None:
    """Enable controllers below a parent that is not ours alone. No group but the root may have processes and
    controllers for groups below (cgroups(7)): they move to a leaf. It was delegated: they are ours to move.
    """
    if set(controllers) <= set((read(parent / "cgroup.subtree_control") or "").split()):
        return
    is_root = not (parent / "cgroup.type").exists()
    for last in [False] * _ROUNDS + [True]:
        if not is_root:
            _vacate(parent)
        try:
            cgroup_v2.enable(parent, controllers)
        except SetupError as error:
            if last or is_root or error.errno != E.EBUSY:  # a process was born there since
                raise
        else:
            return


def _vacate(parent: Path) -> None:
    leaf = parent / HOST_LEAF
    for pid in processes(parent):
        if pid == 0:
            hint = (
                "a process of another pid namespace is in this group; name an empty one in SANDBOXCORE_CGROUP"
            )
            raise SetupError("cgroup", E.EBUSY, subject=str(parent), hint=hint)
        with naming(f"process {pid} from {parent} into {leaf}"):
            leaf.mkdir(exist_ok=True)
            try:
                write(leaf / "cgroup.procs", str(pid))
            except ProcessLookupError:
                continue


def _tidy(found: Layout) -> None:
    """The shared parent goes when it is empty and holds no host-wide limit."""
    every = Group.below(found, SHARED, tuple(found.versions.keys() & set(CONTROLLERS)))
    for directory, names in _hierarchies(every):
        with contextlib.suppress(OSError):  # another process has its base there, or has removed it
            if directory.is_dir() and not _limited(found, directory, names):
                directory.rmdir()


def _limited(found: Layout, directory: Path, names: Collection[str]) -> bool:
    controllers = [name for name in CONTROLLERS if V1_NAMES[name] in names]
    if not names:
        controllers = [name for name in CONTROLLERS if found.versions.get(name) == 2]
    one = Group(
        relative=SHARED,
        v2=None if names else directory,
        v1=dict.fromkeys(names, directory),
        controllers=tuple(controllers),
    )
    values = one.limits()
    if "cpuset" in names and values.get("cpuset") == v1().effective_cpus(directory.parent):
        del values["cpuset"]  # v1 always has one
    return any(value is not None and (name, value) != ("cpu_weight", 100) for name, value in values.items())


def collect(*, dry_run: bool = False) -> list[str]:
    """Remove the bases of processes that are gone, if nothing runs there. Returns their directories.

    What was suspended there, and does not stay, is let go: it ends by that. ``dry_run``: nothing is done.
    """
    found, removed = layout(), []
    parents = dict.fromkeys([*([] if found.v2 is None else [found.v2]), *found.v1.values()])
    for trial in found.v2.glob(f"{TRIAL}*") if found.v2 is not None and not dry_run else ():
        if not start_ticks(int(trial.name.removeprefix(TRIAL).partition("-")[0])):
            with contextlib.suppress(OSError):
                trial.rmdir()
    bases = [
        base for parent in parents for base in sorted((parent / SHARED).glob("host-*")) if _is_left(base)
    ]
    thawed = [] if dry_run else [base for base in bases if _thaw(base)]
    deadline = time.monotonic() + _ENDING
    while not all(map(_is_empty, thawed)) and time.monotonic() < deadline:
        time.sleep(0.01)  # version 1 tells nobody when a group becomes empty
    for base in bases:
        with contextlib.suppress(SetupError, PermissionError):  # somebody else's
            if _is_empty(base) if dry_run else not _clear(base):
                removed.append(str(base))
    if removed and not dry_run:
        _tidy(found)
    return removed


def _is_left(base: Path) -> bool:
    """Whether its process is gone. Of one in another pid namespace that cannot be told."""
    match = _HOST.fullmatch(base.name)
    if match is None or int(match[3]) != pid_namespace():
        return False
    return start_ticks(int(match[1])) != int(match[2])


def _is_empty(group: Path) -> bool:
    """Whether nothing runs there, or below."""
    return not any(processes(each) for each in groups_below(group))


def _clear(base: Path) -> list[Path]:
    """Remove a base and the groups in it, but for those in which something runs: their init makes groups
    there, and must find them. Returns what is left."""
    try:
        groups = [path for path in base.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    left = [group for group in groups if not (_is_empty(group) and remove_tree(group, 0))]
    return left if left else [] if remove_tree(base, 0) else [base]


def _thaw(base: Path) -> bool:
    """Let go what is frozen below a base and does not stay. Returns whether there was something."""
    any_frozen = False
    with contextlib.suppress(FileNotFoundError, PermissionError):
        for group in base.iterdir():
            for name, running in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
                if not group.name.endswith(STAYS) and (read(group / name) or running).strip() != running:
                    write(group / name, running)
                    any_frozen = True
    return any_frozen


def host_limits(limits: Limits) -> dict[str, Any]:
    """Limit all sandboxes of this host together; what is None is lifted. Returns what is in force.

    ``pids`` counts here, too: :class:`Limits` has a default for it. Another call replaces all of them.
    """
    found, problem = _with_scope()
    values = values_of(limits)
    for name in values:
        _check(found, name, LIMITS[name], values, problem)
    controllers = tuple(name for name in CONTROLLERS if name in found.versions)
    shared = Group.below(found, SHARED, controllers)
    v2 = [LIMITS[name] for name in values if found.versions[LIMITS[name]] == 2]

    def write_all() -> dict[str, Any]:
        for directory, names in _hierarchies(shared):
            _make(directory, names)
        if v2 and found.v2 is not None:
            _offer(found.v2, v2)
        return shared.change({name: values.get(name) for name in shared.limits()} | values)

    try:
        return _again(write_all)
    finally:
        _tidy(found)
