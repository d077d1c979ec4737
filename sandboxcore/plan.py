"""Compiles a spec into a plan: the bytes that C executes (``csrc/plan.h``).

All policy about a sandbox is decided here and in :mod:`sandboxcore.tree`. Beside the bytes a plan has a
description for people and the names behind every index that an error may mention.
"""

import hashlib
import os
import resource
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandboxcore import _native, cgroup
from sandboxcore.cgroup_values import LIMITS
from sandboxcore.errors import SetupError, SpecError, UnsupportedHost
from sandboxcore.host import ID_RANGE, HostFeatures
from sandboxcore.seccomp import compile_filter, hosts_launcher, resolve, without_set_id
from sandboxcore.spec import MAX_LAYERS, Limits, SandboxSpec
from sandboxcore.statedir import StatePath
from sandboxcore.tree import Mount, Node, Tree, below, identity
from sandboxcore.volumes import Source, Volumes

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# clone(2)
NAMESPACES = {"mnt": 0x20000, "cgroup": 0x2000000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000,
              "pid": 0x20000000, "net": 0x40000000}  # fmt: skip

# What proc tells everybody about the host, its other tenants or the kernel's addresses. A name with a
# slash is a directory.
PROC_MASKS = (
    *("kallsyms", "keys", "key-users", "interrupts", "softirqs", "schedstat", "iomem", "ioports"),
    *("modules", "config.gz", "cmdline", "locks", "diskstats", "partitions", "mtrr"),
    *("acpi/", "asound/", "driver/", "pressure/", "scsi/"),
)  # fmt: skip
PROC_READONLY = ("sys",)
# What only its owner, the real root, can open: to be covered where the payload's id is root's outside.
PROC_MASKS_ROOT = (
    *("kcore", "kmsg", "timer_list", "slabinfo", "vmallocinfo", "pagetypeinfo", "latency_stats"),
    *("sched_debug", "kpagecount", "kpageflags", "kpagecgroup", "sysrq-trigger"),
)  # fmt: skip
PROC_READONLY_ROOT = ("irq", "bus", "fs")

# landlock(7): which rights an ABI knows, and what each kind of place grants.
LL_READ = 0b1101  # execute, read_file, read_dir
LL_WRITE_FILE, LL_MAKE_DEVICES, LL_REFER, LL_TRUNCATE, LL_IOCTL = (
    1 << 1,
    1 << 6 | 1 << 11,
    1 << 13,
    1 << 14,
    1 << 15,
)
LL_SCOPES = 0b11  # abstract unix sockets, signals: ABI 6
LL_NEWEST = 6  # the newest ABI whose rights are used here

_RLIMIT_NICE, _RLIMIT_RTPRIO = 13, 14  # the resource module does not name them

# For the fault walk: the number of the template builder's call that fails, in a helper built for it.
FAULT = 0

# What a single command can have tighter than its sandbox.
COMMAND_LIMITS = ("cpu_time", "wall_time", "pids", "open_files", "file_size", "output")


RLimit = tuple[str, int, int, int]  # name, RLIMIT_*, soft, hard


_NONE = Limits()


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay that is written to: its number in the plan, where it is, and what lies below it: directories
    of the host, the topmost first, and below these, for the root, nodes. ``covers``: where something else is
    mounted on it. ``inode``: st_dev and st_ino of the topmost directory."""

    index: int
    target: str
    sources: tuple[str, ...]
    nodes: tuple[Node, ...]
    covers: tuple[str, ...]
    inode: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled spec. ``data`` is what C executes; the rest is for people and for freshness."""

    id: int
    data: bytes
    spec: SandboxSpec
    host: HostFeatures
    env: Mapping[str, str]
    env_items: tuple[bytes, ...]
    rlimits: tuple[RLimit, ...]
    names: Mapping[str, tuple[str, ...]]
    omitted: tuple[str, ...]
    lines: tuple[str, ...]
    watched: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    controllers: tuple[str, ...] = ()  # of control groups; none: it needs no group
    group_limits: Limits = _NONE  # what is written there
    overlays: tuple[Overlay, ...] = ()  # that are written to
    held: tuple[object, ...] = field(default=(), repr=False, compare=False)  # layers, unpacked for it
    mounted: tuple[tuple[str, bool], ...] = ()  # targets, and whether what is there is private and writable
    volumes: tuple[Source, ...] = field(repr=False, default=())
    restated: bool = False  # the template knows other rlimits: a request brings them
    id_maps: tuple[str, str] = ("", "")  # uid_map and gid_map
    ids: tuple[int, int] = field(init=False)  # uid and gid of the payload, as seen inside
    owner: tuple[int, int] | None = field(init=False)  # the same outside, unless it is the caller

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", self.spec.ids())
        object.__setattr__(self, "owner", self.outside(self.ids))

    @property
    def host_network(self) -> bool:
        """Whether the sandbox stays in the host's network namespace."""
        return self.spec.network == "host"

    @property
    def live_binds(self) -> str | None:
        """Which binds may come while it runs: ``"ro"``, also ``"rw"``, or None."""
        return self.spec.live_binds or ("ro" if self.overlays else None)

    def outside(self, ids: tuple[int, int]) -> tuple[int, int] | None:
        """A payload's ids outside, where they are not the caller's own."""
        if self.host.mode != "root":
            return None
        return self.host.id_base + ids[0], self.host.id_base + ids[1]

    @property
    def uids(self) -> range:
        """The ids outside that a payload of any user inside may have."""
        if self.host.mode == "root":
            return range(self.host.id_base, self.host.id_base + ID_RANGE)
        return range(self.host.uid, self.host.uid + 1)

    def is_fresh(self) -> bool:
        """Whether everything the template binds or copies is still the same file."""
        return all(identity(path) == known for path, known in self.watched)

    def subject(self, stage: str, index: int) -> str:
        """The name behind an error's index, or an empty string."""
        names = self.names.get("mount" if stage == "source" else stage, ())
        return names[index] if 0 <= index < len(names) else ""


def compile_plan(spec: SandboxSpec, host: HostFeatures, state_dir: StatePath = None) -> Plan:
    """The plan of a spec on this host, cached until something it is made from changes. ``state_dir``: where
    its volumes are.

    Raises :class:`SpecError` for a source that does not exist and :class:`UnsupportedHost` for what the
    host cannot do.
    """
    volumes = Volumes(state_dir)
    key = (spec.fingerprint, host, volumes.path if spec.uses_volumes() else None)
    plan = _cache.get(key)
    if plan is None or not plan.is_fresh():
        try:
            plan = _Compiler(spec, host, volumes).compile()
        except OSError as error:  # of this process: too many open files, for instance
            raise SetupError("host", error.errno or 0, subject=str(error.filename or "")) from error
        if len(_cache) >= 256:
            _cache.pop(next(iter(_cache)))
        _cache[key] = plan
    return plan


def reopened_plan(spec: SandboxSpec, host: HostFeatures, omitted: tuple[str, ...]) -> Plan:
    """What is needed of the plan of a sandbox that stands already: its commands' side of it, no template."""
    env = _environment(spec)
    controllers, _ = _controllers(spec.replace(optional=(*spec.optional, *LIMITS, "accounting")))
    return Plan(
        id=0,
        data=b"",
        spec=spec,
        host=host,
        env=env,
        env_items=_environment_items(env),
        rlimits=tuple(_resource_limits(spec.limits, host, spec.ids()[0], "pids" in controllers)),
        names={},
        omitted=omitted,
        lines=(),
        watched=(),
        controllers=controllers,
        group_limits=_group_limits(spec.limits, omitted),
        restated=True,
    )


def completed_plan(plan: Plan, state_dir: StatePath) -> Plan:
    """The same, also with what its template would be, by what the host is now. Raises what
    :func:`compile_plan` does."""
    whole = compile_plan(plan.spec, plan.host, state_dir)
    return replace(
        plan, id=whole.id, data=whole.data, names=whole.names, overlays=whole.overlays, id_maps=whole.id_maps
    )


def updated_plan(plan: Plan, spec: SandboxSpec) -> Plan:
    """The commands' side of the plan of a sandbox whose limits have changed while it runs."""
    rlimits = _resource_limits(spec.limits, plan.host, plan.ids[0], "pids" in plan.controllers)
    limits = _group_limits(spec.limits, plan.omitted)
    return replace(plan, spec=spec, rlimits=tuple(rlimits), group_limits=limits, restated=True)


def restated_plan(plan: Plan, spec: SandboxSpec) -> Plan:
    """The same where the environment of commands has changed, too."""
    env = _environment(spec)
    return replace(updated_plan(plan, spec), env=env, env_items=_environment_items(env))


def rebound_plan(plan: Plan, env: Mapping[str, str]) -> Plan:
    """The commands' side of the plan of a running sandbox whose commands get these variables, too."""
    spec = plan.spec.replace(env={**plan.spec.env, **env})
    merged = _environment(spec)
    return replace(plan, spec=spec, env=merged, env_items=_environment_items(merged))


_cache: dict[tuple[str, HostFeatures, Path | None], Plan] = {}


class _Compiler:
    """One compilation: the tree, the limits and rules, then the arena."""

    def __init__(self, spec: SandboxSpec, host: HostFeatures, volumes: Volumes) -> None:
        self.spec, self.host, self.volumes = spec, host, volumes
        self.uid, self.gid = spec.ids()
        self.omitted: list[str] = []

    def compile(self) -> Plan:
        """Everything that can be refused is refused before the first byte is written."""
        self.controllers, missing = _controllers(self.spec)
        self.omitted += missing
        self.tree = Tree(self.spec, self.host, self.volumes)
        overlays = [mount for mount in self.tree.mounts if mount.kind == "OVERLAY" and mount.writable]
        if overlays and not self.host.tmpfs_xattr:
            raise UnsupportedHost(
                f"an overlay that is written to ({overlays[0].origin})",
                "Linux 6.6 or later with CONFIG_TMPFS_XATTR",
            )
        self.rlimits = _resource_limits(self.spec.limits, self.host, self.uid, "pids" in self.controllers)
        self.landlock_fs, self.landlock_scoped, self.rules = self._landlock()
        self.policy = resolve(self.spec.seccomp or "standard")
        written = ("spec rw", "spec volume")
        if self.spec.live_binds == "rw" or any(m.writable and m.origin in written for m in self.tree.mounts):
            self.policy = without_set_id(self.policy)
        self.filter = compile_filter(self.policy)
        return self._plan(self._write())

    def _landlock(self) -> tuple[int, int, list[tuple[str, int]]]:
        abi = min(self.host.landlock_abi, LL_NEWEST)
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
        # a rule is about a directory that is there; what comes later falls under those above it
        whole = anything if self.spec.writable or self.spec.live_binds == "rw" else LL_READ
        rules = [("/", whole), ("/dev", in_place), ("/proc", in_place)]
        rules += [
            (mount.target, anything if mount.directory else handled & on_file)
            for mount in self.tree.mounts
            if mount.writable and mount.origin not in ("devices", "root")
        ]
        return handled, LL_SCOPES if abi >= 6 else 0, rules

    def _id_maps(self) -> tuple[str, str, int]:
        """uid_map, gid_map, and the plan's flags that go with them."""
        if self.host.mode == "root":
            whole = f"0 {self.host.id_base} {ID_RANGE}"
            return whole, whole, _native.constant("PLAN_FRESH_PROC")
        if self.host.mode == "subuid":
            return _around(self.uid), _around(self.gid), 0
        flags = _native.constant("PLAN_DENY_SETGROUPS") | _native.constant("PLAN_NO_ROOT_ID")
        return f"{self.uid} 0 1", f"{self.gid} 0 1", flags

    def _overlays(self) -> Iterator[Overlay]:
        for index, mount in enumerate(self.tree.mounts):
            if mount.kind == "OVERLAY" and mount.writable:
                nodes = tuple(self.tree.nodes) if mount is self.tree.root else ()
                sources = tuple(lower.source for lower in mount.lowers)
                targets = {other.target for other in self.tree.mounts if other is not mount}
                covers = tuple(sorted(path for path in targets if below(path, mount.target)))
                st = os.stat(sources[0]) if sources else None
                inode = (0, 0) if st is None else (st.st_dev, st.st_ino)
                yield Overlay(index, mount.target, sources, nodes, covers, inode)

    def _namespaces(self) -> tuple[str, ...]:
        return tuple(name for name in NAMESPACES if name != "net" or self.spec.network == "private")

    def _proc_covers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names below /proc to hide, and to make read-only."""
        if self.spec.proc == "pid":
            return (), ()
        if self.host.mode != "root" and self.host.uid == 0:
            return PROC_MASKS + PROC_MASKS_ROOT, PROC_READONLY + PROC_READONLY_ROOT
        return PROC_MASKS, PROC_READONLY

    def _scratch_options(self) -> tuple[str, ...]:
        limits = self.spec.limits
        wanted = {"size": limits.disk, "nr_inodes": limits.inodes}
        return tuple(text for key, n in wanted.items() if n is not None for text in (key, str(n)))

    # --- the arena ----------------------------------------------------------------------------

    def _write(self) -> bytes:
        arena = _native.Arena(
            "struct sbx_plan",
            {
                "nodes": ("struct sbx_node", len(self.tree.nodes)),
                "mounts": ("struct sbx_mount", len(self.tree.mounts)),
                "lowers": ("struct sbx_lower", sum(len(mount.lowers) for mount in self.tree.mounts)),
                "rlimits": ("struct sbx_rlimit", len(self.rlimits)),
                "rules": ("struct sbx_rule", len(self.rules)),
                "filter": ("uint64_t", len(self.filter) // 8),
            },
        )
        self._write_head(arena)
        masks, readonly = self._proc_covers()
        arena.strings("masks", [name.encode() for name in masks])
        arena.strings("readonly", [name.encode() for name in readonly])
        arena.strings("carried", [os.fsencode(path) for path in self.tree.carried])
        self._write_nodes(arena)
        self._write_mounts(arena)
        for index, (_, number, soft, hard) in enumerate(self.rlimits):
            limit = arena.record("rlimits", index)
            limit.resource, limit.soft, limit.hard = number, soft, hard
        for index, (path, access) in enumerate(self.rules):
            rule = arena.record("rules", index)
            rule.path, rule.access = arena.data(os.fsencode(path)), access
        arena.raw("filter", self.filter)
        data = arena.finish(_native.constant("PLAN_MAGIC"))
        _native.check_plan(data)
        return data

    def _write_head(self, arena: _native.Arena) -> None:
        head, spec = arena.head, self.spec
        net = {"none": "PLAN_POOLED_NET", "private": "PLAN_LOOPBACK"}.get(spec.network)
        uid_map, gid_map, flags = self._id_maps()
        once = _native.constant("PLAN_FILTER_ONCE") if hosts_launcher(self.policy) else 0
        head.flags = flags | once | (_native.constant(net) if net else 0)
        if any(mount.kind == "OVERLAY" and mount.writable for mount in self.tree.mounts):
            head.flags |= _native.constant("PLAN_LAYERS")
        if spec.live_binds is not None:
            head.flags |= _native.constant("PLAN_BINDS")
        if self.tree.root is not None:
            head.flags |= _native.constant("PLAN_OVERLAY_ROOT")
            head.flags |= _native.constant("PLAN_WRITABLE_ROOT") if self.spec.writable else 0
        head.namespaces = sum(NAMESPACES[name] for name in self._namespaces())
        head.uid, head.gid = self.uid, self.gid
        head.uid_map, head.gid_map = arena.data(uid_map.encode()), arena.data(gid_map.encode())
        head.hostname = arena.data(spec.hostname.encode())
        if spec.time_offsets is not None:
            head.time_offsets = arena.data(_time_offsets(spec.time_offsets))
        root: tuple[str, ...] = ("mode", "0755", "size", "64m")
        if self.spec.writable and self.host.mode == "root":  # elsewhere the nodes are the payload's anyway
            head.node_uid, head.node_gid = self.host.id_base + self.uid, self.host.id_base + self.gid
            root = (*root, "uid", str(head.node_uid), "gid", str(head.node_gid))
        head.root_options = arena.data(_options(root))
        head.scratch_options = arena.data(_options(self._scratch_options()))
        head.landlock_fs, head.landlock_scoped = self.landlock_fs, self.landlock_scoped
        head.landlock_abi = min(self.host.landlock_abi, LL_NEWEST)
        head.fault_at = FAULT

    def _write_nodes(self, arena: _native.Arena) -> None:
        for index, item in enumerate(self.tree.nodes):
            node = arena.record("nodes", index)
            node.kind = _native.constant(f"NODE_{item.kind}")
            node.path, node.mode = arena.data(os.fsencode(item.path)), item.mode
            node.data, node.size = arena.data(item.data), len(item.data)

    def _write_mounts(self, arena: _native.Arena) -> None:
        lowers = 0
        for index, item in enumerate(self.tree.mounts):
            mount = arena.record("mounts", index)
            mount.lower, mount.lowers = lowers, len(item.lowers)
            for layer in item.lowers:
                lower = arena.record("lowers", lowers)
                lower.source = arena.data(os.fsencode(layer.source))
                if layer.id_maps:
                    lower.uid_map, lower.gid_map = (arena.data(text.encode()) for text in layer.id_maps)
                lowers += 1
            mount.kind = _native.constant(f"MOUNT_{item.kind}")
            mount.target = arena.data(os.fsencode(item.target))
            mount.attrs, mount.mode = item.attrs, item.mode
            if item.source:
                mount.source = arena.data(os.fsencode(item.source))
            mount.parent = self.tree.parent_overlay(item)
            options = item.options
            if item.kind == "OVERLAY" and not item.writable:
                options = _overlay_options(item, index)
            if options:
                mount.options = arena.data(_options(options))
            if item.id_maps:
                mount.uid_map, mount.gid_map = (arena.data(text.encode()) for text in item.id_maps)
            flags = {
                "DIR": item.directory,
                "CREATE": item.create,
                "LATE": item.late,
                "BOUNDED": item.bounded,
            }
            mount.flags = sum(_native.constant(f"MOUNT_{name}") for name, on in flags.items() if on)

    # --- for people ---------------------------------------------------------------------------

    def _plan(self, data: bytes) -> Plan:
        env = _environment(self.spec)
        watched = self.tree.identities()
        digest = hashlib.sha256(data + repr(watched).encode()).digest()
        return Plan(
            id=int.from_bytes(digest[:8], "little"),
            data=data,
            spec=self.spec,
            host=self.host,
            env=env,
            env_items=_environment_items(env),
            rlimits=tuple(self.rlimits),
            names=self._names(),
            omitted=tuple(self.omitted),
            lines=tuple(self._describe()),
            watched=watched,
            overlays=tuple(self._overlays()),
            id_maps=self._id_maps()[:2],
            held=self.tree.held,
            mounted=tuple((m.target, m.writable and m.kind != "BIND") for m in self.tree.mounts),
            controllers=self.controllers,
            group_limits=_group_limits(self.spec.limits, self.omitted),
            volumes=tuple(self.tree.sources.values()),
        )

    def _names(self) -> dict[str, tuple[str, ...]]:
        covers = self._proc_covers()
        return {
            "mount": (*(str(mount) for mount in self.tree.mounts), "the scratch tmpfs"),
            "node": tuple(node.path for node in self.tree.nodes),
            "rlimit": tuple(f"limits.{name}" for name, *_ in self.rlimits),
            "landlock": tuple(path for path, _ in self.rules),
            "proc": tuple(f"/proc/{name}" for names in covers for name in names),
            "hostname": (self.spec.hostname,),
        }

    def _describe(self) -> Iterable[str]:
        networks = {"none": "from the pool, lo up", "private": "own, lo up", "host": "the host's"}
        yield f"namespaces: {' '.join(self._namespaces())}; network: {networks[self.spec.network]}"
        yield f"ids: payload {self.uid}:{self.gid}; uid_map {self._id_maps()[0]!r}"
        yield from (f"mount: {mount}" for mount in self.tree.mounts)
        scratch = " ".join(self._scratch_options()) or "unlimited"
        yield f"scratch: {scratch}, all private directories together"
        yield from (f"rlimit: {name} {soft}" for name, _, soft, _ in self.rlimits)
        abi = min(self.host.landlock_abi, LL_NEWEST)
        rights = f"ABI {abi}, rights {self.landlock_fs:#x}" if self.landlock_fs else "off"
        yield f"landlock: {rights}"
        yield f"seccomp: {self.policy.name}, {len(self.filter) // 8} instructions"
        yield "capabilities: none; no_new_privs; new session and keyring; no further namespaces"
        if self.spec.live_binds:
            yield f"live binds: {self.spec.live_binds}; init keeps its capabilities, over its own namespaces"
        if self.controllers:
            yield f"control group: {' '.join(self.controllers)}"
        yield from (f"left out: {name}" for name in self.omitted)


def _controllers(spec: SandboxSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The controllers that a spec needs, and what of it is left out. Raises UnsupportedHost."""
    if not spec.accounting and not cgroup.needed(spec.limits):
        return (), ()
    controllers, missing = cgroup.require(spec.limits, spec.optional)
    if not spec.accounting:
        return controllers, tuple(f"limits.{name}" for name in missing)
    found = cgroup.layout()
    if "memory" not in found.versions:
        if "accounting" not in spec.optional:
            raise UnsupportedHost("accounting", found.remedies["memory"])
        missing = (*missing, "accounting")
    metered = {name for name in ("memory", "pids", "io") if name in found.versions}
    return tuple(sorted({*controllers, *metered})), tuple(
        name if name == "accounting" else f"limits.{name}" for name in missing
    )


def _group_limits(limits: Limits, omitted: Collection[str]) -> Limits:
    """What of the limits a group has."""
    kept = {name: getattr(limits, name) for name in LIMITS if f"limits.{name}" not in omitted}
    if kept.get("memory") is not None and kept.get("swap") is None and "swap" in cgroup.layout().versions:
        kept["swap"] = 0  # or the limit would only be where swapping begins
    return Limits(**{"pids": None, **kept})


def _resource_limits(limits: Limits, host: HostFeatures, uid: int, grouped: bool) -> list[RLimit]:
    """``grouped``: processes are counted by a control group, which can tell; this is only the second wall."""
    default = Limits()
    wanted: dict[str, tuple[int, Any, Any]] = {
        "pids": (resource.RLIMIT_NPROC, limits.pids, default.pids),
        "open_files": (resource.RLIMIT_NOFILE, limits.open_files, default.open_files),
        "file_size": (resource.RLIMIT_FSIZE, limits.file_size, None),
        "cpu_time": (resource.RLIMIT_CPU, limits.cpu_time, None),
    }
    # 1, not 0: core(5) pipes to a host program whatever the limit is, except at this value
    chosen = [("core", resource.RLIMIT_CORE, 1, 1)]
    # what a privileged caller may have been granted is not for the payload
    chosen += [("rtprio", _RLIMIT_RTPRIO, 0, 0), ("nice", _RLIMIT_NICE, 0, 0)]
    for name, (number, value, usual) in wanted.items():
        if value is None:
            continue
        soft = -(-value // 1)  # whole seconds, rounded up
        if name == "pids" and (host.mode == "rootless" or uid == 0):
            soft += 1  # init has the payload's id
        if name == "pids" and grouped:
            soft += value + 64
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY and soft > ceiling:
            if value != usual:
                raise UnsupportedHost(f"limits.{name}={value}", f"the hard limit here is {ceiling}: raise it")
            soft = ceiling
        chosen.append((name, number, int(soft), int(soft) + (name == "cpu_time")))
    return chosen


def tightened(own: Limits, limits: Limits) -> Limits:
    """A sandbox's limits with what one command changes of them: a default says nothing.

    Raises :class:`SpecError` for a limit that is wider than the sandbox's or concerns the sandbox as a whole.
    """
    usual = Limits()
    changed: dict[str, Any] = {}
    for name in Limits.__dataclass_fields__:
        value, bound = getattr(limits, name), getattr(own, name)
        if value in (getattr(usual, name), bound):
            continue
        if name not in COMMAND_LIMITS:
            raise SpecError(f"limits.{name}: belongs to the sandbox, not to one command")
        if value is None or (bound is not None and value > bound):
            raise SpecError(f"limits.{name}: {value} is more than the sandbox's {bound}")
        changed[name] = value
    return replace(own, **changed) if changed else own


def command_limits(plan: Plan, limits: Limits) -> tuple[RLimit, ...]:
    """The resource limits of one command in a living sandbox, where they are not the plan's."""
    bounds = tightened(plan.spec.limits, limits)
    if bounds == plan.spec.limits:
        return ()
    return tuple(
        _resource_limits(bounds, plan.host, plan.ids[0], "pids" in plan.controllers and limits.pids is None)
    )


def _environment(spec: SandboxSpec) -> dict[str, str]:
    home = {"HOME": spec.workdir, "USER": "sandbox", "LOGNAME": "sandbox"}
    return {"PATH": PATH, "LANG": "C.UTF-8", **home, **spec.env}


def _environment_items(env: Mapping[str, str]) -> tuple[bytes, ...]:
    return tuple(os.fsencode(f"{key}={value}") for key, value in env.items())


def _around(own: int) -> str:
    """An id map that puts the caller's own id (0 outside) at ``own`` and a range around it."""
    parts = [f"0 1 {own}"] if own else []
    parts += [f"{own} 0 1", f"{own + 1} {own + 1} {ID_RANGE - 1 - own}"]
    return "\n".join(parts)


def _options(pairs: Iterable[str]) -> bytes:
    return b"".join(item.encode() + b"\0" for item in pairs)


def _overlay_options(mount: Mount, index: int) -> tuple[str, ...]:
    """Those of an overlay that nobody writes to, with the names that ``csrc/overlay.c`` gives."""
    root = ("nodes",) if mount.target == "/" else ()
    names = (*root, *(f"{index}.{k}" for k in range(len(mount.lowers))))
    if len(mount.lowers) <= MAX_LAYERS:
        return ("lowerdir", ":".join(names), "userxattr", "")
    return (*(text for name in names for text in ("lowerdir+", name)), "userxattr", "")  # Linux 6.5


def _time_offsets(offsets: Mapping[str, float]) -> bytes:
    lines = []
    for clock, seconds in offsets.items():
        whole, fraction = divmod(seconds, 1)
        lines.append(f"{clock} {int(whole)} {int(fraction * 1e9)}\n")
    return "".join(lines).encode()
