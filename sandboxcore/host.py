"""What this host grants: decided once per process, cheap to ask.

:func:`features` looks only at what every plan needs and costs microseconds. :func:`probe` tries each
kernel primitive for real, in processes of their own, for ``sandboxcore doctor``.
"""

import functools
import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sandboxcore import _native

HELPER = Path(__file__).with_name("_spawner")

# Beyond the ranges that systemd, containers and /etc/subuid hand out, and below 2**31.
ROOT_ID_BASE = 0x70000000
ID_RANGE = 65536

_NEEDED_CAPS = {
    "CAP_SYS_ADMIN": 21,
    "CAP_SETUID": 7,
    "CAP_SETGID": 6,
    "CAP_SYS_CHROOT": 18,
    "CAP_NET_ADMIN": 12,
}


@dataclass(frozen=True, slots=True)
class HostFeatures:
    """How sandboxes get their identity here.

    mode: ``"root"`` maps ``ID_RANGE`` ids from ``id_base``; ``"subuid"`` maps the caller's own id and
    a subordinate range; ``"rootless"`` maps the caller's own id alone.
    tmpfs_xattr: files in memory can have extended attributes of users (Linux 6.6), which overlays need.
    """

    mode: Literal["root", "subuid", "rootless"]
    uid: int
    gid: int
    id_base: int
    landlock_abi: int
    subuid: tuple[int, int] | None = None
    subgid: tuple[int, int] | None = None
    tmpfs_xattr: bool = True


@functools.cache
def _features(uid: int, gid: int) -> HostFeatures:
    abi, xattr = _native.landlock_abi(), _tmpfs_xattr()
    base = _root_base() if uid == 0 and _has_capabilities() else None
    if base is not None:
        return HostFeatures("root", uid, gid, base, abi, tmpfs_xattr=xattr)
    ranges = _subordinate_ranges(uid)
    if ranges is not None:
        return HostFeatures("subuid", uid, gid, 0, abi, *ranges, tmpfs_xattr=xattr)
    return HostFeatures("rootless", uid, gid, 0, abi, tmpfs_xattr=xattr)


def features() -> HostFeatures:
    """The features for the process's current effective ids."""
    return _features(os.geteuid(), os.getegid())


def _tmpfs_xattr() -> bool:
    """memfd_create(2): its files are those of a tmpfs."""
    fd = os.memfd_create("sandboxcore-xattr", os.MFD_CLOEXEC)
    try:
        os.setxattr(fd, "user.sandboxcore", b"")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _has_capabilities() -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            effective = int(line.split()[1], 16)
            return all(effective >> bit & 1 for bit in _NEEDED_CAPS.values())
    return False


def _root_base() -> int | None:
    """A range of unprivileged ids that this user namespace maps; a small map (as of ``unshare -r`` or a
    rootless container) has none to spare, and then root is treated as any other user."""
    best = 0
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        inside, _, count = (int(part) for part in line.split())
        if inside <= ROOT_ID_BASE and inside + count >= ROOT_ID_BASE + ID_RANGE:
            return ROOT_ID_BASE
        if count >= 2 * ID_RANGE:
            best = max(best, inside + count - ID_RANGE)
    return best or None


def _subordinate_ranges(uid: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    if not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        return None
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    uids, gids = (_subordinate_range(Path(path), name, uid) for path in ("/etc/subuid", "/etc/subgid"))
    return (uids, gids) if uids and gids else None


def _subordinate_range(path: Path, name: str, uid: int) -> tuple[int, int] | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        owner, _, rest = line.partition(":")
        start, _, count = rest.partition(":")
        if owner in (name, str(uid)) and count.isdecimal() and int(count) >= ID_RANGE - 1:
            return int(start), ID_RANGE - 1
    return None


REMEDIES: Mapping[str, str] = {
    "user": "allow user namespaces: sysctl user.max_user_namespaces > 0, kernel.unprivileged_userns_clone=1,"
    " kernel.apparmor_restrict_unprivileged_userns=0; in a container, a seccomp profile that permits them",
    "mnt": "raise sysctl user.max_mnt_namespaces",
    "pid": "raise sysctl user.max_pid_namespaces",
    "net": "raise sysctl user.max_net_namespaces",
    "ipc": "raise sysctl user.max_ipc_namespaces",
    "uts": "raise sysctl user.max_uts_namespaces",
    "cgroup": "raise sysctl user.max_cgroup_namespaces",
    "time": "needs Linux 5.6 with CONFIG_TIME_NS; only time_offsets= uses it",
    "loopback": "the network namespace refuses to bring lo up; in a container, allow CAP_NET_ADMIN in user"
    " namespaces",
    "proc": "the host's /proc is masked, as in an unprivileged container; run it with"
    " --security-opt systempaths=unconfined or an unmasked procMount",
    "overlay": "overlay= and writable= need Linux 6.6 with CONFIG_OVERLAY_FS and CONFIG_TMPFS_XATTR",
    "idmapped_mount": "rw= as root needs Linux 5.12 and a file system with id-mapped mounts; rootless does"
    " without",
    "seccomp": "needs CONFIG_SECCOMP_FILTER; in a container, a profile that permits seccomp(2)",
    "landlock": "boot with lsm=landlock,... and CONFIG_SECURITY_LANDLOCK; sandboxes run without this second"
    " wall",
    "keyring": "in a container, allow keyctl(2), or raise sysctl kernel.keys.maxkeys",
    "close_range": "needs Linux 5.9",
    "openat2": "needs Linux 5.6; in a container, a seccomp profile that knows it",
}

# Without these no sandbox starts.
ESSENTIAL = (
    "user",
    "mnt",
    "pid",
    "net",
    "ipc",
    "uts",
    "cgroup",
    "loopback",
    "proc",
    "seccomp",
    "close_range",
    "openat2",
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One primitive: ``errno`` 0 if it worked just now, ``value`` where it has a number."""

    name: str
    errno: int
    value: int
    essential: bool

    @property
    def remedy(self) -> str:
        """What to do when it does not work."""
        return REMEDIES[self.name]


def probe() -> list[Probe]:
    """Try every primitive now. Takes some tens of milliseconds."""
    done = subprocess.run([HELPER, "probe"], capture_output=True, text=True, timeout=60, check=True)
    probes = []
    for line in done.stdout.splitlines():
        name, errno, value = line.split()
        probes.append(Probe(name, int(errno), int(value), name in ESSENTIAL))
    return probes
