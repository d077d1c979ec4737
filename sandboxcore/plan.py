"""Compiles a spec into a plan: which nodes, mounts, limits, rules and filter, in which order.

All policy about a sandbox's inside lives here. The result is bytes for C (``csrc/plan.h``) and, for
people, a description and the names behind every index that an error may mention. Compiling reads the
host (which of its directories exist, who owns a source) but changes nothing.
"""

import functools
import glob
import hashlib
import os
import resource
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxcore import _native
from sandboxcore.errors import SpecError, UnsupportedHost
from sandboxcore.host import ID_RANGE, HostFeatures
from sandboxcore.seccomp import compile_filter
from sandboxcore.spec import WORKSPACE, Limits, SandboxSpec

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# clone(2) and mount_setattr(2)
NAMESPACES = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
              "pid": 0x20000000, "net": 0x40000000}  # fmt: skip
RDONLY, NOSUID, NODEV, NOEXEC, IDMAP = 1, 2, 4, 8, 0x100000

# Global files of proc that a payload could read about the host, its other tenants or the kernel's
# addresses. What is not world-readable needs no mask: no payload has a host id. A name with a slash
# is a directory.
PROC_MASKS = (
    *("kallsyms", "kcore", "keys", "key-users", "timer_list", "interrupts", "softirqs", "schedstat"),
    *("iomem", "ioports", "slabinfo", "vmallocinfo", "pagetypeinfo", "latency_stats", "sched_debug"),
    *("modules", "kmsg", "config.gz", "cmdline", "locks", "diskstats", "partitions", "mtrr"),
    *("acpi/", "asound/", "scsi/", "driver/", "pressure/"),
)  # fmt: skip
PROC_READONLY = ("sys", "irq", "bus", "fs", "sysrq-trigger")

# The host's own directories below which programs, libraries and their data live.
ROOT_ENTRIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC_BINDS = ("alternatives", "ssl/certs", "pki/tls/certs", "ca-certificates", "fonts", "terminfo", "java", "java-*")
ETC_COPIES = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d/*", "localtime", "mime.types", "services", "protocols"),
    *("os-release", "debian_version", "ssl/openssl.cnf", "inputrc", "nanorc"),
)  # fmt: skip

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEV_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
             "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}  # fmt: skip

# landlock(7): which rights an ABI knows, and what each kind of place grants.
LL_READ = 0b1101  # execute, read_file, read_dir
LL_WRITE_FILE, LL_MAKE_DEVICES, LL_REFER, LL_TRUNCATE, LL_IOCTL = 1 << 1, 1 << 6 | 1 << 11, 1 << 13, 1 << 14, 1 << 15
LL_SCOPES = 0b11  # abstract unix sockets, signals: ABI 6

CGROUP_LIMITS = ("memory", "swap", "cpus", "cpu_weight", "io")


@dataclass(slots=True)
class _Node:
    kind: str
    path: str
    data: bytes = b""
    mode: int = 0o755


@dataclass(slots=True)
class _Mount:
    kind: str
    target: str
    origin: str  # which part of the spec asked for it
    source: str = ""
    attrs: int = 0
    options: tuple[str, ...] = ()
    directory: bool = True
    mode: int = 0
    writable: bool = False
    id_maps: tuple[str, str] | None = None
    late: bool = False
    create: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled spec. ``data`` is what C executes; the rest is for people and for freshness."""

    id: int
    data: bytes
    spec: SandboxSpec
    host: HostFeatures
    env: Mapping[str, str]
    env_items: tuple[bytes, ...]
    names: Mapping[str, tuple[str, ...]]
    omitted: tuple[str, ...]
    lines: tuple[str, ...]
    watched: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)

    @property
    def host_network(self) -> bool:
        """Whether the sandbox stays in the host's network namespace."""
        return self.spec.network == "host"

    def is_fresh(self) -> bool:
        """Whether everything the template binds or copies is still the same file."""
        return all(_identity(path) == identity for path, identity in self.watched)

    def subject(self, stage: str, index: int) -> str:
        """The name behind an error's index, or an empty string."""
        names = self.names.get("mount" if stage == "source" else stage, ())
        return names[index] if 0 <= index < len(names) else ""


def compile_plan(spec: SandboxSpec, host: HostFeatures) -> Plan:
    """The plan of a spec on this host, cached until something it is made from changes.

    Raises :class:`SpecError` for a source that does not exist and :class:`UnsupportedHost` for what the
    host cannot do.
    """
    key = (spec.fingerprint, host)
    plan = _cache.get(key)
    if plan is None or not plan.is_fresh():
        plan = _Compiler(spec, host).compile()
        if len(_cache) >= 256:
            _cache.pop(next(iter(_cache)))
        _cache[key] = plan
    return plan


_cache: dict[tuple[str, HostFeatures], Plan] = {}


def _identity(path: str) -> tuple[int, ...]:
    """What tells a replaced file or directory from the one that was bound or copied."""
    try:
        st = os.stat(path)
    except OSError as error:
        return (error.errno or -1,)
    if stat.S_ISDIR(st.st_mode):
        return (st.st_dev, st.st_ino, st.st_uid, st.st_gid)
    return (st.st_dev, st.st_ino, st.st_mtime_ns, st.st_size)


def _below(path: str, parent: str) -> bool:
    return parent == "/" or path == parent or path.startswith(parent + "/")


@functools.cache
def _host_root() -> tuple[tuple[str, str], ...]:
    """The host's top-level program directories: name and link target (empty for a directory)."""
    found = []
    for name in ROOT_ENTRIES:
        path = f"/{name}"
        if os.path.islink(path):
            found.append((name, os.readlink(path)))
        elif os.path.isdir(path):
            found.append((name, ""))
    return tuple(found)


class _Compiler:
    """One compilation: collects nodes and mounts, then writes the arena."""

    def __init__(self, spec: SandboxSpec, host: HostFeatures) -> None:
        self.spec, self.host = spec, host
        self.uid, self.gid = spec.ids()
        self.nodes: list[_Node] = []
        self.mounts: list[_Mount] = []
        self.watched: list[str] = []
        self.omitted: list[str] = []

    def compile(self) -> Plan:
        """Every part in turn; the order of the calls is the order of the description."""
        self._check_cgroup_limits()
        self._add_root()
        self._add_dev()
        self._add_private()
        self._add_user_mounts()
        self._order_mounts()
        self._add_denials()
        rlimits = self._rlimits()
        handled, scoped, rules = self._landlock()
        return self._write(rlimits, handled, scoped, rules)

    # --- what is inside ---------------------------------------------------------------------------

    def _dir(self, path: str, mode: int = 0o755) -> None:
        known = next((node for node in self.nodes if node.path == path), None)
        if known is not None and known.kind != "DIR":
            raise SpecError(f"mounts: {path!r} is no directory in the sandbox's root")
        if known is None:
            parent = os.path.dirname(path)
            if parent != "/":
                self._dir(parent)
            self.nodes.append(_Node("DIR", path, mode=mode))

    def _file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._dir(os.path.dirname(path))
        self.nodes.append(_Node("FILE", path, data, mode))

    def _link(self, path: str, target: str) -> None:
        self.nodes.append(_Node("SYMLINK", path, os.fsencode(target)))

    def _bind(self, source: str, target: str, origin: str, attrs: int, *, directory: bool) -> _Mount:
        mount = _Mount("BIND", target, origin, source, attrs, directory=directory)
        self.mounts.append(mount)
        return mount

    def _add_root(self) -> None:
        for path in ("/proc", "/dev", "/etc", "/tmp"):
            self._dir(path)
        if self.spec.rootfs is None:
            self._add_host_programs()
            self._add_etc()
        else:
            self._add_rootfs(self.spec.rootfs)

    def _add_host_programs(self) -> None:
        for name, link in _host_root():
            if link:
                self._link(f"/{name}", link)
            else:
                self._bind(f"/{name}", f"/{name}", "default root", RDONLY | NOSUID | NODEV, directory=True)

    def _add_rootfs(self, rootfs: str) -> None:
        """Each top-level entry of the given root, so that nothing is ever made in it."""
        root = os.path.realpath(rootfs)
        try:
            entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        except OSError as error:
            raise SpecError(f"rootfs: {rootfs}: {error.strerror}") from error
        self.watched.append(root)
        own = {"proc", "dev", "sys", "tmp", *(node.path[1:] for node in self.nodes if node.path != "/etc")}
        self.nodes = [node for node in self.nodes if node.path != "/etc"]
        for entry in entries:
            path = f"/{entry.name}"
            if entry.name in own or path == WORKSPACE:
                continue
            if entry.is_symlink():
                self._link(path, os.readlink(entry.path))
            elif entry.is_dir() or entry.is_file():
                self._bind(entry.path, path, "rootfs", RDONLY | NOSUID | NODEV, directory=entry.is_dir())

    def _add_etc(self) -> None:
        for name, text in self._generated_etc().items():
            self._file(f"/etc/{name}", text.encode())
        if self.spec.network == "host":
            self._copy_etc("resolv.conf")
        for pattern in ETC_COPIES:
            for path in sorted(glob.glob(f"/etc/{pattern}")):
                self._copy_etc(path[len("/etc/") :])
        for pattern in ETC_BINDS:
            for path in sorted(glob.glob(f"/etc/{pattern}")):
                if os.path.isdir(path):
                    real = os.path.realpath(path)
                    self._dir(os.path.dirname(path))
                    self._bind(real, path, "default root", RDONLY | NOSUID | NODEV | NOEXEC, directory=True)

    def _generated_etc(self) -> dict[str, str]:
        home, host = self.spec.workdir, self.spec.hostname
        users = {0: "root", self.uid: "root" if self.uid == 0 else "sandbox", 65534: "nobody"}
        groups = {0: "root", self.gid: "root" if self.gid == 0 else "sandbox", 5: "tty", 65534: "nogroup"}
        homes = {self.uid: home}
        return {
            "passwd": "".join(
                f"{name}:x:{uid}:{self.gid if uid == self.uid else uid}:{name}:{homes.get(uid, '/')}:/bin/sh\n"
                for uid, name in sorted(users.items())
            ),
            "group": "".join(f"{name}:x:{gid}:\n" for gid, name in sorted(groups.items())),
            "hosts": f"127.0.0.1 localhost {host}\n::1 localhost {host}\n",
            "hostname": f"{host}\n",
            "host.conf": "multi on\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
        }

    def _copy_etc(self, name: str) -> None:
        path = f"/etc/{name}"
        try:
            data = Path(path).read_bytes()
        except OSError:  # absent or not for this user: neither is needed to run a program
            return
        if len(data) <= 4 << 20:
            self._file(path, data)
            self.watched.append(path)

    def _add_dev(self) -> None:
        for name in DEVICES:
            self._bind(f"/dev/{name}", f"/dev/{name}", "devices", NOSUID | NOEXEC, directory=False).writable = True
        for name, target in DEV_LINKS.items():
            self._link(f"/dev/{name}", target)

    def _add_private(self) -> None:
        proc = ("subset", "pid", "hidepid", "invisible") if self.spec.proc == "pid" else ()
        self.mounts.append(_Mount("PROC", "/proc", "proc", attrs=NOSUID | NODEV | NOEXEC, options=proc))
        gid = self.gid if self.host.mode == "rootless" else 5
        pts = ("ptmxmode", "0666", "mode", "0620", "gid", str(gid))
        self.mounts.append(_Mount("DEVPTS", "/dev/pts", "pts", attrs=NOSUID | NOEXEC, options=pts))
        taken = {mount.target for mount in self.spec.all_mounts()}
        private = {"/dev/shm": 0o1777, "/tmp": 0o1777, "/var/tmp": 0o1777, WORKSPACE: 0o755}
        if self.spec.rootfs is not None:
            del private["/var/tmp"]
        for target, mode in private.items():
            if target not in taken:
                attrs = NOSUID | NODEV
                self.mounts.append(_Mount("SCRATCH", target, "private", attrs=attrs, mode=mode, writable=True))

    def _add_user_mounts(self) -> None:
        for mount in self.spec.all_mounts():
            origin = f"spec {'rw' if not mount.read_only else 'ro'}" if mount.kind == "bind" else "spec tmpfs"
            if mount.kind == "bind" and mount.source is not None:
                self._add_user_bind(mount.source, mount.target, origin, read_only=mount.read_only)
                continue
            disk = mount.size if mount.size is not None else self.spec.limits.disk
            options = ["mode", f"{mount.mode:o}", "uid", str(self.uid), "gid", str(self.gid)]
            options += ["size", str(disk)] if disk is not None else []
            inodes = mount.inodes if mount.inodes is not None else self.spec.limits.inodes
            options += ["nr_inodes", str(inodes)] if inodes is not None else []
            self.mounts.append(
                _Mount("TMPFS", mount.target, origin, attrs=NOSUID | NODEV, options=tuple(options), writable=True)
            )

    def _add_user_bind(self, source: str, target: str, origin: str, *, read_only: bool) -> None:
        real = os.path.realpath(source)
        try:
            st = os.stat(real)
        except OSError as error:
            raise SpecError(f"mounts: source {source!r}: {error.strerror}") from error
        if _below(real, "/proc"):
            raise SpecError(f"mounts: source {source!r} is below /proc")
        attrs = NOSUID | NODEV | (RDONLY if read_only else 0)
        mount = self._bind(real, target, origin, attrs, directory=stat.S_ISDIR(st.st_mode))
        mount.writable = not read_only
        self.watched.append(real)
        if not read_only and self.host.mode == "root":
            mount.attrs |= IDMAP
            mount.id_maps = (
                f"{st.st_uid} {self.host.id_base + self.uid} 1",
                f"{st.st_gid} {self.host.id_base + self.gid} 1",
            )

    def _order_mounts(self) -> None:
        """Parents first; a bind below a per-sandbox mount is late; targets in our tmpfs may be made."""
        self.mounts.sort(key=lambda mount: mount.target.split("/"))
        for mount in self.mounts:
            parent = self._parent(mount.target)
            mount.late = mount.kind == "BIND" and parent is not None and (parent.kind != "BIND" or parent.late)
            mount.create = parent is None or parent.kind in ("SCRATCH", "TMPFS")
            if parent is None and mount.kind != "BIND":  # the root is read-only when these are made
                self._dir(mount.target)
        late = [mount for mount in self.mounts if mount.late]
        if len(late) > _native.MAX_LATE:
            raise SpecError(f"mounts: more than {_native.MAX_LATE} lie below private directories")

    def _parent(self, target: str) -> _Mount | None:
        above = [m for m in self.mounts if m.target != target and _below(target, m.target)]
        return max(above, key=lambda mount: len(mount.target), default=None)

    def _add_denials(self) -> None:
        """A mask for each denied path that exists; what could appear later, or elsewhere, is refused."""
        masks = []
        for path in self.spec.deny:
            for node in self.nodes:
                if node.kind == "SYMLINK" and _below(path, node.path):
                    raise SpecError(f"deny: {node.path!r} is a link to {os.fsdecode(node.data)!r}; deny that")
            above = [mount for mount in self.mounts if _below(path, mount.target)]
            cover = max(above, key=lambda mount: len(mount.target), default=None)
            if cover is None:
                exists = any(_below(node.path, path) for node in self.nodes)
            elif cover.kind == "BIND":
                exists = self._deniable(path, cover)
            else:
                exists = cover.target == path  # a private file system starts empty
            if exists:
                late = cover is not None and (cover.late or cover.kind != "BIND")
                masks.append(_Mount("MASK", path, "spec deny", late=late))
        self.mounts = sorted([*self.mounts, *masks], key=lambda m: (m.target.split("/"), m.kind == "MASK"))

    def _deniable(self, path: str, cover: _Mount) -> bool:
        """Whether a denied path exists below a bind, and can be masked without touching the host."""
        outside = cover.source + path[len(cover.target) :]
        self.watched.append(outside)
        if os.path.realpath(outside) != outside:
            raise SpecError(f"deny: {path!r} goes through a symbolic link; deny what it points to")
        if not os.path.exists(outside) and cover.writable:
            raise SpecError(
                f"deny: {path!r} does not exist below the writable {cover.target!r}, and a mask would have to"
                " create it on the host; create it or drop the entry"
            )
        return os.path.exists(outside)

    # --- limits and rules -------------------------------------------------------------------------

    def _check_cgroup_limits(self) -> None:
        for name in CGROUP_LIMITS:
            if getattr(self.spec.limits, name) is None:
                continue
            if name not in self.spec.optional:
                raise UnsupportedHost(
                    f"limits.{name}",
                    "this version applies no cgroup limits; drop it, or list it in optional= to run without",
                )
            self.omitted.append(f"limits.{name}")

    def _rlimits(self) -> list[tuple[str, int, int, int]]:
        limits = self.spec.limits
        default = Limits()
        wanted: dict[str, tuple[int, int | float | None, Any]] = {
            "pids": (resource.RLIMIT_NPROC, limits.pids, default.pids),
            "open_files": (resource.RLIMIT_NOFILE, limits.open_files, default.open_files),
            "file_size": (resource.RLIMIT_FSIZE, _whole(limits.file_size), None),
            "cpu_time": (resource.RLIMIT_CPU, limits.cpu_time, None),
        }
        chosen = [("core", resource.RLIMIT_CORE, 0, 0)]
        for name, (number, value, usual) in wanted.items():
            if value is None:
                continue
            soft = -(-value // 1)  # whole seconds, rounded up
            if name == "pids" and self.host.mode == "rootless":
                soft += 1  # init has the payload's id
            ceiling = resource.getrlimit(number)[1]
            if ceiling != resource.RLIM_INFINITY and soft > ceiling:
                if value != usual:
                    raise UnsupportedHost(f"limits.{name}={value}", f"the hard limit here is {ceiling}: raise it")
                soft = ceiling
            chosen.append((name, number, int(soft), int(soft) + (name == "cpu_time")))
        return chosen

    def _landlock(self) -> tuple[int, int, list[tuple[str, int]]]:
        abi = min(self.host.landlock_abi, 6)
        if not self.spec.landlock:
            return 0, 0, []
        if abi == 0:
            if self.spec.landlock == "required" and "landlock" not in self.spec.optional:
                raise UnsupportedHost("Landlock", "boot with lsm=landlock,... on Linux 5.13 or later")
            self.omitted.append("landlock")
            return 0, 0, []
        handled = (1 << (13 if abi == 1 else 14 if abi == 2 else 15 if abi < 5 else 16)) - 1
        anything = handled & ~LL_MAKE_DEVICES
        on_file = LL_READ & ~(1 << 3) | LL_WRITE_FILE | LL_TRUNCATE | LL_IOCTL
        in_place = handled & (LL_READ | LL_WRITE_FILE | LL_TRUNCATE | LL_IOCTL)
        rules = [("/", LL_READ), ("/dev", in_place), ("/proc", in_place)]
        rules += [
            (mount.target, anything if mount.directory else handled & on_file)
            for mount in self.mounts
            if mount.writable and mount.origin != "devices"
        ]
        return handled, LL_SCOPES if abi >= 6 else 0, rules

    # --- the arena --------------------------------------------------------------------------------

    def _id_maps(self) -> tuple[str, str, int]:
        """uid_map, gid_map, and the plan's flags that go with them."""
        if self.host.mode == "root":
            whole = f"0 {self.host.id_base} {ID_RANGE}"
            return whole, whole, _native.constant("PLAN_FRESH_PROC")
        if self.host.mode == "subuid":
            return _around(self.uid), _around(self.gid), 0
        flags = _native.constant("PLAN_DENY_SETGROUPS") | _native.constant("PLAN_NO_ROOT_ID")
        return f"{self.uid} 0 1", f"{self.gid} 0 1", flags

    def _namespaces(self) -> tuple[list[str], int]:
        names = [name for name in NAMESPACES if name != "net" or self.spec.network == "private"]
        flags = {
            "none": _native.constant("PLAN_POOLED_NET"),
            "private": _native.constant("PLAN_LOOPBACK"),
            "host": 0,
        }
        return names, flags[self.spec.network]

    def _write(
        self, rlimits: list[tuple[str, int, int, int]], handled: int, scoped: int, rules: list[tuple[str, int]]
    ) -> Plan:
        spec = self.spec
        program = compile_filter(spec.seccomp or "standard")
        arena = _native.Arena(
            "struct sbx_plan",
            {
                "nodes": ("struct sbx_node", len(self.nodes)),
                "mounts": ("struct sbx_mount", len(self.mounts)),
                "rlimits": ("struct sbx_rlimit", len(rlimits)),
                "rules": ("struct sbx_rule", len(rules)),
                "filter": ("uint64_t", len(program) // 8),
            },
        )
        head = arena.head
        uid_map, gid_map, map_flags = self._id_maps()
        names, net_flags = self._namespaces()
        head.flags = map_flags | net_flags
        head.namespaces = sum(NAMESPACES[name] for name in names)
        head.uid, head.gid = self.uid, self.gid
        head.uid_map, head.gid_map = arena.data(uid_map.encode()), arena.data(gid_map.encode())
        head.hostname = arena.data(spec.hostname.encode())
        if spec.time_offsets is not None:
            head.time_offsets = arena.data(_time_offsets(spec.time_offsets))
        head.root_options = arena.data(_options(("mode", "0755", "size", "64m")))
        head.scratch_options = arena.data(_options(self._scratch_options()))
        head.landlock_fs, head.landlock_scoped, head.landlock_abi = handled, scoped, min(self.host.landlock_abi, 6)
        head.fault_at = int(os.environ.get("SANDBOXCORE_FAULT_TEMPLATE", "0"))
        masks = PROC_MASKS if spec.proc == "full" else ()
        readonly = PROC_READONLY if spec.proc == "full" else ()
        arena.strings("masks", [name.encode() for name in masks])
        arena.strings("readonly", [name.encode() for name in readonly])
        self._write_nodes(arena)
        self._write_mounts(arena)
        for index, (_, number, soft, hard) in enumerate(rlimits):
            limit = arena.record("rlimits", index)
            limit.resource, limit.soft, limit.hard = number, soft, hard
        for index, (path, access) in enumerate(rules):
            rule = arena.record("rules", index)
            rule.path, rule.access = arena.data(os.fsencode(path)), access
        arena.raw("filter", program)
        data = arena.finish(_native.constant("PLAN_MAGIC"))
        _native.check_plan(data)
        env = self._environment()
        return Plan(
            id=int.from_bytes(hashlib.sha256(data + repr(self._identities()).encode()).digest()[:8], "little"),
            data=data,
            spec=spec,
            host=self.host,
            env=env,
            env_items=tuple(os.fsencode(f"{key}={value}") for key, value in env.items()),
            names=self._names(rlimits, rules, masks + readonly),
            omitted=tuple(self.omitted),
            lines=tuple(self._describe(names, uid_map, rlimits, handled, len(program) // 8)),
            watched=self._identities(),
        )

    def _identities(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((path, _identity(path)) for path in dict.fromkeys(self.watched))

    def _scratch_options(self) -> tuple[str, ...]:
        limits = self.spec.limits
        size = ("size", str(limits.disk)) if limits.disk is not None else ()
        return (*size, *(("nr_inodes", str(limits.inodes)) if limits.inodes is not None else ()))

    def _write_nodes(self, arena: _native.Arena) -> None:
        for index, item in enumerate(self.nodes):
            node = arena.record("nodes", index)
            node.kind = _native.constant(f"NODE_{item.kind}")
            node.path, node.mode = arena.data(os.fsencode(item.path)), item.mode
            node.data, node.size = arena.data(item.data), len(item.data)

    def _write_mounts(self, arena: _native.Arena) -> None:
        for index, item in enumerate(self.mounts):
            mount = arena.record("mounts", index)
            mount.kind = _native.constant(f"MOUNT_{item.kind}")
            mount.target, mount.attrs, mount.mode = arena.data(os.fsencode(item.target)), item.attrs, item.mode
            if item.source:
                mount.source = arena.data(os.fsencode(item.source))
            if item.options:
                mount.options = arena.data(_options(item.options))
            if item.id_maps:
                mount.uid_map, mount.gid_map = (arena.data(text.encode()) for text in item.id_maps)
            mount.flags = (
                (_native.constant("MOUNT_DIR") if item.directory else 0)
                | (_native.constant("MOUNT_CREATE") if item.create else 0)
                | (_native.constant("MOUNT_LATE") if item.late else 0)
            )

    def _environment(self) -> dict[str, str]:
        home = self.spec.workdir
        base = {"PATH": PATH, "HOME": home, "USER": "sandbox", "LOGNAME": "sandbox", "LANG": "C.UTF-8"}
        return base | dict(self.spec.env)

    def _names(
        self, rlimits: list[tuple[str, int, int, int]], rules: list[tuple[str, int]], proc: Iterable[str]
    ) -> dict[str, tuple[str, ...]]:
        return {
            "mount": (*(_mount_line(mount) for mount in self.mounts), "the scratch tmpfs"),
            "node": tuple(node.path for node in self.nodes),
            "rlimit": tuple(f"limits.{name}" for name, *_ in rlimits),
            "landlock": tuple(path for path, _ in rules),
            "proc": tuple(f"/proc/{name}" for name in proc),
            "hostname": (self.spec.hostname,),
        }

    def _describe(
        self, names: list[str], uid_map: str, rlimits: list[tuple[str, int, int, int]], handled: int, filter_len: int
    ) -> Iterable[str]:
        spec = self.spec
        network = {"none": "from the pool, lo up", "private": "own, lo up", "host": "the host's"}[spec.network]
        yield f"namespaces: {' '.join(sorted(names))}; network: {network}"
        yield f"ids: payload {self.uid}:{self.gid}; uid_map (inside outside count): {uid_map!r}; mode {self.host.mode}"
        yield from (f"mount: {_mount_line(mount)}" for mount in self.mounts)
        yield f"scratch: {' '.join(self._scratch_options()) or 'unlimited'} for all private directories"
        yield from (f"rlimit: {name} {soft}" for name, _, soft, _ in rlimits)
        yield f"landlock: ABI {min(self.host.landlock_abi, 6)}, rights {handled:#x}" if handled else "landlock: off"
        yield f"seccomp: {_policy_name(spec)}, {filter_len} instructions"
        yield "capabilities: none; no_new_privs; new session and keyring; no further namespaces"
        yield from (f"left out: {name}" for name in self.omitted)


def _policy_name(spec: SandboxSpec) -> str:
    return spec.seccomp if isinstance(spec.seccomp, str) else getattr(spec.seccomp, "name", "custom")


def _mount_line(mount: _Mount) -> str:
    access = "rw" if mount.writable else "ro"
    what = mount.source or mount.kind.lower()
    late = ", late" if mount.late else ""
    return f"{what} on {mount.target} ({access}, {mount.origin}{late})"


def _around(own: int) -> str:
    """An id map that puts the caller's own id (0 outside) at ``own`` and a range around it."""
    parts = [f"0 1 {own}"] if own else []
    parts += [f"{own} 0 1", f"{own + 1} {own + 1} {ID_RANGE - 1 - own}"]
    return "\n".join(parts)


def _options(pairs: Iterable[str]) -> bytes:
    return b"".join(item.encode() + b"\0" for item in pairs)


def _time_offsets(offsets: Mapping[str, float]) -> bytes:
    lines = []
    for clock, seconds in offsets.items():
        whole, fraction = divmod(seconds, 1)
        lines.append(f"{clock} {int(whole)} {int(fraction * 1e9)}\n")
    return "".join(lines).encode()


def _whole(value: int | str | None) -> int | None:
    return value if isinstance(value, int) else None
