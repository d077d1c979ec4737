"""The description of a sandbox: frozen, validated when made, pure data.

Nothing here looks at the host. A wrong value raises :class:`SpecError` naming the field; whether the
host can do what is asked is decided later, in :mod:`sandboxcore.plan`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

from sandboxcore.errors import SpecError
from sandboxcore.seccomp import SeccompPolicy, resolve

StrPath = str | os.PathLike[str]
Binding = str | os.PathLike[str] | tuple[StrPath, StrPath]
VolumeBinding = str | tuple[str, StrPath] | tuple[str, StrPath, Literal["ro", "rw"]]
Network = Literal["none", "private", "host"]

WORKSPACE = "/workspace"
DEFAULT_ID = 1000
ID_RANGE = 65536
MAX_VOLUMES = 16  # of one sandbox: a descriptor each
MAX_LAYERS = 40  # whose names fit into one option of fsconfig(2)

PROFILES: Mapping[str, Mapping[str, Any]] = {
    "minimal": {"seccomp": "minimal", "proc": "pid"},
    "standard": {"seccomp": "standard", "proc": "full"},
    "full": {"seccomp": "full", "proc": "full"},
}

_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "network": ("none", "private", "host"),
    "proc": ("full", "pid"),
    "live_binds": ("ro", "rw", None),
}

# Made by us in every sandbox: nothing may be mounted over them or below them.
RESERVED = ("/proc", "/dev", "/sys")

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
MAX_SIZE = 2**63 - 1  # loff_t


def parse_size(value: int | str, name: str) -> int:
    """Bytes from ``512``, ``"512M"``, ``"1.5G"`` (binary units). ``name`` is for the error."""
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is not None:
        unit, fraction = _UNITS[match[3].upper()], match[2] or "0"
        value = int(match[1]) * unit + int(fraction) * unit // 10 ** len(fraction)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
        raise SpecError(f"{name}: {value!r} is not a size such as 1048576 or '512M'")
    return value


def path_text(path: object, name: str) -> str:
    """A path as text, without a NUL. ``name`` is for the error."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise SpecError(f"{name}: {path!r} is not a path")
    return text


def clean_path(path: StrPath, name: str) -> str:
    """An absolute path without ``.``, ``..`` or double slashes. ``name`` is for the error."""
    text = path_text(path, name)
    if not text.startswith("/"):
        raise SpecError(f"{name}: {text!r} is not an absolute path")
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise SpecError(f"{name}: {text!r} has a '..'")
    clean = "/" + "/".join(parts)
    if len(os.fsencode(clean)) > 4000 or any(len(os.fsencode(part)) > 255 for part in parts):
        raise SpecError(f"{name}: path is too long")
    return clean


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """One mount. ``kind="bind"`` shows ``source`` of the host at ``target``; ``kind="overlay"`` shows it
    copy-on-write: what is written stays in the sandbox and ends with it; ``kind="tmpfs"`` is a private,
    writable file system in memory; ``kind="volume"`` is the volume ``source`` (:class:`Volumes`), which is
    there already.

    An overlay is writable for the payload as ``source`` is for its owner. What its other files have in them
    can be read as far as everybody may, and not be changed or removed (EOVERFLOW, EPERM).

    Parameters
    ----------
    target: absolute path inside; missing directories are made where that does not touch the host.
    source: path on the host, of a directory for an overlay; symbolic links in it are followed once, now. The
        name of a volume. Not for a tmpfs.
    read_only: bind and volume only; default True.
    size, inodes, mode: tmpfs only: bytes (default: the sandbox's ``limits.disk``), number of files,
        permissions of its root (default 0o755, owned by the payload).
    """

    kind: Literal["bind", "overlay", "tmpfs", "volume"]
    target: str
    source: str | None = None
    read_only: bool = True
    size: int | str | None = None
    inodes: int | None = None
    mode: int = 0o755

    def __post_init__(self) -> None:
        """Validate and normalise."""
        put = object.__setattr__
        put(self, "target", clean_path(self.target, "mounts.target"))
        if self.target == "/" or any(_below(self.target, path) for path in RESERVED):
            raise SpecError(f"mounts: target {self.target!r} is reserved")
        if self.kind in ("bind", "overlay"):
            if self.source is None:
                raise SpecError(f"mounts: {self.kind} at {self.target!r} has no source")
            source = clean_path(os.path.abspath(os.path.expanduser(self.source)), "mounts.source")
            check_source(source, source)
            put(self, "source", source)
        elif self.kind == "volume":
            if self.source is None:
                raise SpecError(f"mounts: volume at {self.target!r} has no name")
            check_name(self.source, "volumes")
        elif self.kind != "tmpfs":
            raise SpecError(f"mounts: unknown kind {self.kind!r}")
        elif self.source is not None:
            raise SpecError(f"mounts: tmpfs at {self.target!r} has a source")
        if self.size is not None:
            put(self, "size", parse_size(self.size, "mounts.size"))
        if not isinstance(self.mode, int) or not 0 <= self.mode <= 0o7777:
            raise SpecError(f"mounts: mode {self.mode!r} is not a file mode")
        if self.inodes is not None and not (isinstance(self.inodes, int) and 0 < self.inodes < 2**62):
            raise SpecError(f"mounts: inodes {self.inodes!r} is not a positive number")


def check_source(source: str, real: str) -> None:
    """Refuse what would show the host's /proc, which a user's mask never covers whole."""
    if real == "/" or _below(real, "/proc"):
        raise SpecError(f"mounts: source {source!r} would show the host's /proc; name what is needed of it")


def _below(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent.rstrip("/") + "/")


def _bind(
    item: Binding, name: str, *, kind: Literal["bind", "overlay"] = "bind", read_only: bool = True
) -> Mount:
    if isinstance(item, tuple):
        if len(item) != 2:
            raise SpecError(f"{name}: {item!r} is not (source, target)")
        source, target = path_text(item[0], name), path_text(item[1], name)
    else:
        text = path_text(item, name)
        source, colon, target = text.rpartition(":") if isinstance(item, str) else ("", "", text)
        if not colon or not target.startswith("/"):
            source, target = text, os.path.abspath(os.path.expanduser(text))
    if not source:
        raise SpecError(f"{name}: {item!r} has no source")
    return Mount(kind=kind, source=source, target=target, read_only=read_only)


def _volume(item: VolumeBinding) -> Mount:
    parts: tuple[Any, ...] = tuple(item.split(":")) if isinstance(item, str) else item
    if (
        not isinstance(parts, tuple)
        or len(parts) not in (2, 3)
        or parts[2:] not in ((), ("ro",), ("rw",))
        or not parts[1]
    ):
        raise SpecError(f"volumes: {item!r} is not 'NAME:/PATH', 'NAME:/PATH:ro', nor a tuple of these")
    target = path_text(parts[1], "volumes")
    return Mount(kind="volume", source=parts[0], target=target, read_only=parts[2:] == ("ro",))


def _anchored(item: Binding, name: str) -> Binding:
    """The same with an absolute source: a spec means the same wherever and whenever it is used."""
    mount = _bind(item, name)
    given = path_text(item[0] if isinstance(item, tuple) else item, name)
    return item if given.startswith("/") else (mount.source or "", mount.target)


def _tmpfs(item: str) -> Mount:
    target, colon, size = item.partition(":")
    return Mount(kind="tmpfs", target=target, size=size if colon else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a sandbox may use. ``None`` means no limit.

    Sizes are bytes or text such as ``"512M"``; times are seconds.

    Parameters
    ----------
    pids: processes and threads alive at once (RLIMIT_NPROC of the sandbox's own user namespace).
    open_files: descriptors per process (RLIMIT_NOFILE).
    file_size: largest file (RLIMIT_FSIZE); a process that exceeds it gets SIGXFSZ.
    cpu_time: CPU seconds of a command's processes together where there is a control group with a meter, else
        per process (RLIMIT_CPU, which holds in any case).
    wall_time: seconds until the whole tree is killed; the smaller of this and ``timeout=`` holds.
    output: bytes kept of stdout and of stderr, each: the first and the last half of it.
    output_action: what happens beyond that: ``"truncate"`` or ``"kill"``, which ends the command with cause
        ``output``.
    disk, inodes: everything private and writable together (``/tmp``, ``/workspace``, ``/dev/shm``, what is
        written to overlays).
    memory: bytes in use at once, page cache and files in tmpfs included. When it runs out, the kernel kills a
        process and we the rest of the command, or the whole of a fresh sandbox.
    swap: bytes of swap on top of that; default none where memory is limited.
    cpus: CPU time per time, for instance 0.5 or 2.
    cpu_weight: share when others want the CPU, too: 1 to 10000, usual 100.
    io: bytes per second, for reading and for writing each, on every disk.
    cpuset: the CPUs it may use, as ``"0-3,8"``.

    The last six need control groups, cgroups(7): where the host does not grant the controller, asking for one
    raises :class:`UnsupportedHost`, unless the spec lists it in ``optional``.
    """

    memory: int | str | None = None
    swap: int | str | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpu_time: float | None = None
    wall_time: float | None = None
    pids: int | None = 4096
    open_files: int | None = 65536
    file_size: int | str | None = None
    output: int | str | None = 64 << 20
    disk: int | str | None = 1 << 30
    inodes: int | None = 1 << 20
    io: int | str | None = None
    cpuset: str | None = None
    output_action: Literal["truncate", "kill"] = "truncate"

    def __post_init__(self) -> None:
        """Validate and normalise."""
        for name in ("memory", "swap", "file_size", "output", "disk", "io"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_size(value, f"limits.{name}"))
        for name in ("cpus", "cpu_weight", "cpu_time", "wall_time", "pids", "open_files", "inodes"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < 2**62):
                raise SpecError(f"limits.{name}: {value!r} is not a positive number")
        for name in ("cpu_weight", "pids", "open_files", "inodes"):
            if isinstance(getattr(self, name), float):
                raise SpecError(f"limits.{name}: {getattr(self, name)!r} is not a whole number")
        if self.cpu_weight is not None and self.cpu_weight > 10000:
            raise SpecError(f"limits.cpu_weight: {self.cpu_weight!r} is not between 1 and 10000")
        if self.cpuset is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", str(self.cpuset)):
            raise SpecError(f"limits.cpuset: {self.cpuset!r} is not a list of CPUs such as '0-3,8'")
        if self.output_action not in ("truncate", "kill"):
            raise SpecError(f"limits.output_action: {self.output_action!r} is not 'truncate' or 'kill'")


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """How a sandbox is built. Immutable; :meth:`replace` makes variants.

    What is named here is required: what the host lacks raises :class:`UnsupportedHost` before
    anything starts, except for what ``optional`` lists. What only the defaults name (Landlock)
    applies where the host can, and the result's record says whether it did.

    Parameters
    ----------
    profile: ``"minimal"``, ``"standard"`` or ``"full"``: the defaults of ``seccomp`` and ``proc``.
    rootfs: directory that becomes the read-only root; default: the host's ``/usr`` and a minimal
        ``/etc``. Or a tar archive of one (plain, gzip, bzip2, xz, zstd), or an image: the directory of an OCI
        image layout, with ``:TAG`` where it has several. Archives and images are unpacked once, into the
        state directory: see :mod:`sandboxcore.images`. Or several of all these, layers of one file system,
        the lowest first, as overlayfs takes them: a file in a later one hides that of the same name in those
        before.
    writable: the whole root is copy-on-write, ``/workspace`` included: what is written stays in the sandbox
        and ends with it. What the host's directories bring is read-only still. Needs Linux 6.6.
    mounts: typed mounts; ``ro``, ``rw``, ``overlay`` and ``tmpfs`` are short forms.
    ro, rw: ``"SRC"``, ``"SRC:DST"`` or ``(src, dst)`` host paths. ``rw`` is really writable, and
        what the payload makes there belongs to the directory's owner.
    overlay: likewise, copy-on-write: see :class:`Mount`. Needs Linux 6.6.
    live_binds: ``"ro"`` or ``"rw"``: host paths may come and go while a living sandbox runs, read-only or
        also writable: :meth:`Sandbox.bind`. A sandbox with overlays, or ``writable``, has ``"ro"`` anyhow.
        ``"rw"`` lets Landlock allow writing everywhere: what is read-only is so by its mount alone.
    volumes: ``"NAME:/PATH"``, ``"NAME:/PATH:ro"`` or tuples of these parts: volumes that exist already, see
        :class:`Volumes`. Written to as ``rw``.
    deny: absolute paths inside that become empty and unreadable. Never creates anything.
    tmpfs: ``"DST"`` or ``"DST:SIZE"``.
    network: ``"none"`` a namespace with only loopback; ``"private"`` the same, owned by the sandbox's
        own user namespace; ``"host"`` no network isolation at all.
    hostname: of the uts namespace.
    env: variables on top of the clean default environment.
    workdir: working directory and HOME; ``/workspace`` is private and writable.
    user: uid or ``"uid:gid"`` inside, 0 to 65535; default 1000:1000.
    seccomp: profile name or :class:`SeccompPolicy`; default: the profile's.
    capabilities: must be empty: payloads run with five empty capability sets.
    landlock: False to leave it out, ``"required"`` to insist.
    limits: :class:`Limits`.
    labels: free text pairs for the caller.
    optional: names that may be missing: ``"landlock"``, ``"memory"``, ``"swap"``, ``"cpus"``,
        ``"cpu_weight"``, ``"io"``.
    time_offsets: own time namespace with these offsets in seconds for ``monotonic`` and ``boottime``.
    proc: ``"full"`` with masks, or ``"pid"``: processes only (proc's ``subset=pid``).
    accounting: measure memory, processes and io of every command in a control group of its own, also where no
        limit needs one; ``optional`` may list it.
    """

    profile: str = "standard"
    rootfs: str | Sequence[str] | None = None
    writable: bool = False
    mounts: Sequence[Mount] = ()
    ro: Sequence[Binding] = ()
    rw: Sequence[Binding] = ()
    overlay: Sequence[Binding] = ()
    volumes: Sequence[VolumeBinding] = ()
    deny: Sequence[str] = ()
    tmpfs: Sequence[str] = ()
    network: Network = "none"
    hostname: str = "sandbox"
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str = WORKSPACE
    user: int | str | None = None
    seccomp: str | SeccompPolicy | None = None
    capabilities: Sequence[str] = ()
    landlock: bool | Literal["required"] = True
    limits: Limits = field(default_factory=Limits)
    labels: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()
    time_offsets: Mapping[str, float] | None = None
    proc: Literal["full", "pid"] | None = None
    accounting: bool = False
    live_binds: Literal["ro", "rw"] | None = None
    fingerprint: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        """Validate and normalise; everything that can be said without a host is said here."""
        put = object.__setattr__
        if self.profile not in PROFILES:
            raise SpecError(f"profile: {self.profile!r} is not one of {', '.join(PROFILES)}")
        for name, default in PROFILES[self.profile].items():
            if getattr(self, name) is None:
                put(self, name, default)
        for name in (
            *("mounts", "ro", "rw", "overlay", "volumes", "deny", "tmpfs", "capabilities", "optional"),
        ):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise SpecError(f"{name}: {value!r} is not a sequence")
            put(self, name, tuple(value))
        put(self, "deny", tuple(clean_path(path, "deny") for path in self.deny))
        put(self, "workdir", clean_path(self.workdir, "workdir"))
        if self.rootfs is not None:
            put(self, "rootfs", _root_layers(self.rootfs))
        self._check_values()
        for name in ("env", "labels", "time_offsets"):
            if getattr(self, name) is not None:
                put(self, name, MappingProxyType(dict(getattr(self, name))))
        resolve(PROFILES[self.profile]["seccomp"] if self.seccomp is None else self.seccomp)
        for name in ("ro", "rw", "overlay"):
            put(self, name, tuple(_anchored(item, name) for item in getattr(self, name)))
        self.all_mounts()
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode())
        put(self, "fingerprint", digest.hexdigest())

    def _check_values(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                others = ", ".join(str(choice) for choice in known[:-1])
                raise SpecError(f"{name}: {getattr(self, name)!r} is not {others} or {known[-1]}")
        if not isinstance(self.writable, bool):
            raise SpecError(f"writable: {self.writable!r} is not True or False")
        if self.landlock not in (True, False, "required"):
            raise SpecError(f"landlock: {self.landlock!r} is not True, False or 'required'")
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", self.hostname):
            raise SpecError(f"hostname: {self.hostname!r} is not a host name")
        if self.capabilities:
            raise SpecError("capabilities: payloads run with empty capability sets; none can be kept")
        if any(path == "/" or _below(path, "/proc") for path in self.deny):
            raise SpecError("deny: '/' and '/proc' cannot be denied; proc='pid' hides most of /proc")
        if not isinstance(self.limits, Limits):
            raise SpecError(f"limits: {self.limits!r} is not a Limits")
        check_env(self.env, "env")
        check_labels(self.labels)
        for clock, seconds in (self.time_offsets or {}).items():
            if clock not in ("monotonic", "boottime"):
                raise SpecError(f"time_offsets: {clock!r} is not monotonic or boottime")
            if not isinstance(seconds, int | float) or not abs(seconds) < 2**31:
                raise SpecError(f"time_offsets: {clock}: {seconds!r} is not a number of seconds")
        self.ids()

    def ids(self) -> tuple[int, int]:
        """uid and gid of the payload, as seen inside."""
        return parse_user(DEFAULT_ID if self.user is None else self.user, "user")

    def all_mounts(self) -> tuple[Mount, ...]:
        """``mounts`` and their short forms in one form, parents first whatever their order."""
        every = [
            *self.mounts,
            *(_bind(item, "ro", read_only=True) for item in self.ro),
            *(_bind(item, "rw", read_only=False) for item in self.rw),
            *(_bind(item, "overlay", kind="overlay") for item in self.overlay),
            *(_volume(item) for item in self.volumes),
            *(_tmpfs(item) for item in self.tmpfs),
        ]
        by_target: dict[str, Mount] = {}
        for mount in every:
            if mount.target in by_target:
                raise SpecError(f"mounts: {mount.target!r} is a target twice")
            by_target[mount.target] = mount
        if len({mount.source for mount in every if mount.kind == "volume"}) > MAX_VOLUMES:
            raise SpecError(f"volumes: more than {MAX_VOLUMES}")
        return tuple(sorted(every, key=lambda mount: mount.target.split("/")))

    def uses_volumes(self) -> bool:
        """Whether it means different things with different state directories."""
        return bool(self.volumes) or any(mount.kind == "volume" for mount in self.mounts)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed. A changed ``profile`` brings its own defaults."""
        if "profile" in changes:
            for name, default in PROFILES[self.profile].items():
                if name not in changes and getattr(self, name) == default:
                    changes[name] = None
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON; :meth:`from_dict` reads it back."""
        data: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            if item.name != "fingerprint":
                data[item.name] = _plain(getattr(self, item.name))
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A spec from plain data. An unknown key is a :class:`SpecError`."""
        known = {item.name for item in dataclasses.fields(cls)} - {"fingerprint"}
        if unknown := sorted(set(data) - known):
            raise SpecError(f"spec: unknown field {unknown[0]!r}")
        fields = dict(data)
        try:
            if isinstance(fields.get("limits"), Mapping):
                fields["limits"] = Limits(**fields["limits"])
            if isinstance(fields.get("seccomp"), Mapping):
                fields["seccomp"] = resolve(fields["seccomp"])
            for name in ("ro", "rw", "overlay", "volumes"):
                if isinstance(fields.get(name), list):
                    fields[name] = [tuple(i) if isinstance(i, list) else i for i in fields[name]]
            if isinstance(fields.get("mounts"), list):
                fields["mounts"] = [Mount(**item) for item in fields["mounts"]]
            return cls(**fields)
        except TypeError as error:
            raise SpecError(f"spec: {error}") from None

    @classmethod
    def from_toml(cls, path: StrPath) -> Self:
        """A spec from a TOML file with the same field names (``[limits]`` and ``[env]`` are tables)."""
        try:
            data = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SpecError(f"{os.fspath(path)}: {error}") from None
        return cls.from_dict(data)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_dict, (self.to_dict(),)


def _root_layers(rootfs: object) -> str | tuple[str, ...]:
    """One directory, or layers from the lowest to the topmost, as absolute paths."""
    if isinstance(rootfs, str | os.PathLike):
        return os.path.abspath(os.path.expanduser(path_text(rootfs, "rootfs")))
    if not isinstance(rootfs, Sequence) or not 1 <= len(rootfs) <= MAX_LAYERS:
        raise SpecError(f"rootfs: {rootfs!r} is not a directory, nor 1 to {MAX_LAYERS} of them")
    return tuple(os.path.abspath(os.path.expanduser(path_text(path, "rootfs"))) for path in rootfs)


@functools.lru_cache(64, typed=True)
def parse_user(user: int | str, name: str) -> tuple[int, int]:
    """A uid or "uid:gid" as a pair. ``name`` is for the error."""
    uid, colon, gid = str(user).partition(":")
    if not uid.isdecimal() or (colon and not gid.isdecimal()):
        raise SpecError(f"{name}: {user!r} is not a uid or 'uid:gid'")
    pair = int(uid), int(gid) if colon else int(uid)
    if max(pair) >= ID_RANGE:
        raise SpecError(f"{name}: {user!r} is not below {ID_RANGE}")
    return pair


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy. Raises :class:`SpecError` unless all of it is text."""
    if not isinstance(labels, Mapping) or not all(
        isinstance(text, str) for pair in labels.items() for text in pair
    ):
        raise SpecError(f"labels: {labels!r} are not pairs of text")
    return dict(labels)


def check_name(name: object, what: str = "name") -> None:
    """Raise :class:`SpecError` unless it is 1 to 64 letters, digits, ``_``, ``.`` or ``-``, no dot or dash
    first. ``what`` is for the error."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,63}", name):
        raise SpecError(
            f"{what}: {name!r} is not 1 to 64 letters, digits, '_', '.' or '-' (these two not first)"
        )


def check_env(env: Mapping[str, str], name: str) -> None:
    """Raise :class:`SpecError` unless every pair fits an environment block."""
    if not isinstance(env, Mapping):
        raise SpecError(f"{name}: {env!r} is not a mapping")
    for key, value in env.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise SpecError(f"{name}: {key!r}: names and values are text")
        if not key or "=" in key or "\0" in key + value:
            raise SpecError(f"{name}: {key!r} cannot be an environment variable")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
