"""Where control groups may be made on this host. Read from /proc and the cgroup file systems.

Nothing is changed here, but for one trial directory below the real root of a hierarchy, whose own directory
does not show whether its groups can be frozen and killed. See cgroups(7) and cgroup_namespaces(7).
"""

import contextlib
import functools
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sandboxcore.cgroup_files import block_devices, read
from sandboxcore.cgroup_mounts import Mount, parse_mounts, parse_own
from sandboxcore.cgroup_v2 import swap_accounted
from sandboxcore.cgroup_values import CONTROLLERS

SUBSYSTEMS = Path("/proc/cgroups")
SETTING = "SANDBOXCORE_CGROUP"
SHARED = "sandboxcore"  # the host-wide parent of all our groups
TRIAL = "sandboxcore.trial-"  # and a pid: a group that shows what groups can do here
HOST_LEAF = "sandboxcore.host"  # where the processes of a delegated group go

V1_NAMES: Mapping[str, str] = {name: name for name in CONTROLLERS} | {"io": "blkio", "freezer": "freezer"}

_NONE_MOUNTED = "no cgroup file system is mounted: `mount -t cgroup2 none /sys/fs/cgroup`"
_READ_ONLY = (
    "{} is mounted read-only; in a container: run it with a private cgroup namespace and a writable mount"
    " (--cgroupns=private, and cgroup2 mounted rw)"
)
_DELEGATE = (
    "delegate one: `systemctl edit user@.service`, [Service] Delegate=cpu cpuset io memory pids, and log in"
    f" again; or run as root; or name a group of yours in {SETTING}"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where this process may make groups.

    ``v2`` is the parent on the unified hierarchy (without any controller on a hybrid host), ``v1`` the
    parents by v1 controller (blkio for io, cpuacct beside cpu). ``versions`` has 1 or 2 for each of memory,
    cpu, pids, io, cpuset and "swap" (accounting) that may be used; ``remedies`` says what to do about each of
    the others, and about freezer and kill. ``freezer``: version, or 0. ``kill``: cgroup.kill, Linux 5.14.
    ``scope``: systemd can be asked for a transient scope with v2 controllers.
    """

    v2: Path | None
    v1: Mapping[str, Path]
    versions: Mapping[str, int]
    remedies: Mapping[str, str]
    freezer: int
    kill: bool
    scope: bool = False


def layout() -> Layout:
    """What is to be had here and now; never raises.

    Cached per process, effective uid and $SANDBOXCORE_CGROUP.
    """
    return _layout(os.getpid(), os.geteuid(), os.environ.get(SETTING, ""))


def forget() -> None:
    """Look again next time: this process is in another group now."""
    _layout.cache_clear()


@functools.lru_cache(8)
def _layout(pid: int, euid: int, setting: str) -> Layout:
    try:
        mounts, own = _text("/proc/self/mountinfo"), _text("/proc/self/cgroup")
        return find(mounts, own, euid=euid, setting=setting)
    except (OSError, ValueError) as error:
        return _nothing(f"looking for control groups failed: {error}")


def _text(path: str) -> str:
    return os.fsdecode(Path(path).read_bytes())


def _nothing(remedy: str) -> Layout:
    every = (*CONTROLLERS, "swap", "freezer", "kill")
    return Layout(None, MappingProxyType({}), {}, dict.fromkeys(every, remedy), 0, False)


def find(mountinfo: str, own: str, *, euid: int, setting: str = "") -> Layout:
    """:func:`layout` for given texts of mountinfo and cgroup."""
    search = _Search(parse_mounts(mountinfo), parse_own(own), euid, setting)
    v2, why = search.unified()
    if setting and v2 is None:
        return _nothing(why)
    versions, remedies, v1 = {}, {}, {}
    given = _controllers(v2)
    for name in CONTROLLERS:
        directory, problem = search.legacy(V1_NAMES[name])
        if name in given:
            versions[name] = 2
        elif directory is not None:
            versions[name], v1[V1_NAMES[name]] = 1, directory
        else:
            remedies[name] = problem or search.missing(name, v2, why)
    if "io" in versions and not block_devices():
        del versions["io"]
        remedies["io"] = "there is no block device whose speed could be limited"
    if v1 and (accounting := search.legacy("cpuacct")[0]):
        v1["cpuacct"] = accounting
    _add_swap(versions, remedies, v2, v1)
    freezer, kill = _freezer(search, v2, v1, remedies, why)
    scope = v2 is None and search.scope_possible()
    return Layout(v2, MappingProxyType(v1), versions, remedies, freezer, kill, scope)


def _controllers(group: Path | None) -> set[str]:
    return set() if group is None else set((read(group / "cgroup.controllers") or "").split())


def _add_swap(
    versions: dict[str, int], remedies: dict[str, str], v2: Path | None, v1: Mapping[str, Path]
) -> None:
    version = versions.get("memory", 0)
    if (version == 2 and v2 is not None and swap_accounted(v2)) or (
        version == 1 and (v1["memory"] / "memory.memsw.limit_in_bytes").exists()
    ):
        versions["swap"] = version
    else:
        remedies["swap"] = remedies.get(
            "memory", "the kernel does not count swap: boot with swapaccount=1 (CONFIG_SWAP, CONFIG_MEMCG)"
        )


def _freezer(
    search: "_Search", v2: Path | None, v1: dict[str, Path], remedies: dict[str, str], why: str
) -> tuple[int, bool]:
    able = _abilities(v2) if v2 is not None else set()
    kill = "cgroup.kill" in able
    if not kill:
        remedies["kill"] = why or "cgroup.kill needs Linux 5.14"
    if "cgroup.freeze" in able:
        return 2, kill
    directory, problem = search.legacy("freezer")
    if directory is not None:
        v1["freezer"] = directory
        return 1, kill
    remedies["freezer"] = problem or why or "cgroup.freeze needs Linux 5.2"
    return 0, kill


def _abilities(parent: Path) -> set[str]:
    """The names of the files of a group below ``parent``. A root lacks them itself, any child has them."""
    for group in (parent, *(path for path in parent.iterdir() if path.is_dir())):
        with contextlib.suppress(OSError):  # gone meanwhile, or closed to us
            if "cgroup.events" in (names := set(os.listdir(group))):
                return names
    trial = parent / f"{TRIAL}{os.getpid()}-{threading.get_ident()}"
    trial.mkdir()
    try:
        return set(os.listdir(trial))
    finally:
        trial.rmdir()


@dataclass(frozen=True, slots=True)
class _Search:
    mounts: list[Mount]
    own: Mapping[str, str]
    euid: int
    setting: str

    # --- unified hierarchy

    def unified(self) -> tuple[Path | None, str]:
        """The parent there, or None and why."""
        mounts = [mount for mount in self.mounts if mount.unified and mount.visible()]
        if not mounts:
            return (
                (None, f"{SETTING}={self.setting}: no cgroup2 file system is mounted")
                if self.setting
                else (
                    None,
                    "no cgroup2 file system is mounted: `mount -t cgroup2 none /sys/fs/cgroup`",
                )
            )
        mount = next((mount for mount in mounts if mount.writable), mounts[0])
        if self.setting:
            return self._named(mount)
        if not mount.writable:
            return None, _READ_ONLY.format(mount.point)
        for group in self._upwards(mount):
            if self._delegated(group):
                return group, ""
        if self.euid == 0:
            return self._of_root(mount)
        return None, f"no v2 group is delegated to uid {self.euid}; {_DELEGATE}"

    def _named(self, mount: Mount) -> tuple[Path | None, str]:
        group = mount.point / self.setting  # an absolute setting replaces the mount's path
        problem = ""
        try:
            if group.resolve(strict=True).stat().st_dev != mount.device:
                problem = f"not below the cgroup2 file system at {mount.point}"
        except OSError as error:
            problem = f"{error.strerror}"
        problem = problem or _unusable(group)
        return (None, f"{SETTING}={self.setting}: {problem}") if problem else (group.resolve(), "")

    def _upwards(self, mount: Mount) -> Iterator[Path]:
        own = mount.place(self.own.get("", "/.."))
        if own is None:
            return
        if (
            HOST_LEAF in own.parts
        ):  # an earlier process of ours, or this one, was moved there from the group above
            own = Path(*own.parts[: own.parts.index(HOST_LEAF)])
        yield own
        for group in own.parents:
            if group != mount.point and mount.point not in group.parents:
                return
            yield group

    def _delegated(self, group: Path) -> bool:
        if not (group / "cgroup.type").exists() or _unusable(group):
            return False
        if self.euid != 0 and group.stat().st_uid == self.euid:
            return True
        return any(_xattr(group, f"{space}.delegate") == b"1" for space in ("user", "trusted"))

    def _of_root(self, mount: Mount) -> tuple[Path | None, str]:
        own = mount.place(self.own.get("", "/.."))
        real_root = not (mount.point / "cgroup.type").exists()
        if real_root and own is not None and not _controllers(mount.point):
            group = own  # hybrid: only to freeze and kill, and no process is in the way of that
        elif real_root or (mount.root == "/" and own is not None):
            group = mount.point
        else:
            return None, (
                f"this process's group is not below the cgroup namespace's root at {mount.point}; {_DELEGATE}"
            )
        problem = _unusable(group)
        return (None, f"{problem}; {_DELEGATE}") if problem else (group, "")

    # --- the others

    def legacy(self, name: str) -> tuple[Path | None, str]:
        """The parent of a v1 controller, or None and why; no reason when no v1 hierarchy has it."""
        mounts = [mount for mount in self.mounts if name in mount.controllers and mount.visible()]
        if not mounts:
            return None, ""
        mount = next((mount for mount in mounts if mount.writable), mounts[0])
        if not mount.writable:
            return None, _READ_ONLY.format(f"the v1 controller {name} at {mount.point}")
        group = mount.place(self.own.get(name, "/.."))
        if group is None:
            return None, f"this process's group of the v1 controller {name} is not below {mount.point}"
        if not _writable(group, "cgroup.procs"):
            return None, (
                f"the v1 controller {name}: {group} is not writable for uid {self.euid}; run as root, or boot"
                " with systemd.unified_cgroup_hierarchy=1 and have systemd delegate a v2 group"
            )
        if importlib.util.find_spec("cgroupspy") is None:
            return None, f"the v1 controller {name} needs cgroupspy: `pip install cgroupspy`"
        return group, ""

    def missing(self, name: str, v2: Path | None, why: str) -> str:
        """Why no hierarchy has a controller, and what to do."""
        if not self.mounts:
            return _NONE_MOUNTED
        kernel = (read(SUBSYSTEMS) or "").splitlines()[1:]
        listed = {line.split()[0]: line.split()[-1] for line in kernel}
        known = V1_NAMES[name]
        if any(name in _controllers(mount.point) for mount in self.mounts if mount.unified):
            problem = f"{v2} was not given it; {_DELEGATE}" if v2 is not None else why
        elif listed.get(known) == "0":
            problem = f"it is switched off; boot with cgroup_enable={known}"
        elif listed and known not in listed:
            problem = "this kernel is built without it"
        elif known in self.own:
            problem = (
                f"it is a v1 controller here, and mounted nowhere: mount -t cgroup -o {known} none DIRECTORY"
            )
        else:
            problem = why or f"no mounted hierarchy has it; {_DELEGATE}"
        return f"the {name} controller: {problem}"

    def scope_possible(self) -> bool:
        """Whether there is a systemd to ask, and controllers to be had from it."""
        unified = [mount.point for mount in self.mounts if mount.unified and mount.writable]
        if self.setting or not any(_controllers(point) for point in unified) or not shutil.which("busctl"):
            return False
        if self.euid == 0:
            return os.path.exists("/run/dbus/system_bus_socket")
        runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{self.euid}")
        return "DBUS_SESSION_BUS_ADDRESS" in os.environ or os.path.exists(f"{runtime}/bus")


def _writable(group: Path, *files: str) -> bool:
    return os.access(group, os.W_OK | os.X_OK, effective_ids=True) and all(
        os.access(group / file, os.W_OK, effective_ids=True) for file in files
    )


def _unusable(group: Path) -> str:
    if not (group / "cgroup.procs").exists():
        return f"{group} is no control group"
    if not _writable(group, "cgroup.procs", "cgroup.subtree_control"):
        return f"{group} is not writable for uid {os.geteuid()}"
    kind = (read(group / "cgroup.type") or "domain").strip()
    return "" if kind == "domain" else f"{group} is of type {kind!r}, and only a domain has all controllers"


def _xattr(group: Path, name: str) -> bytes | None:
    try:
        return os.getxattr(group, name)
    except OSError:
        return None
