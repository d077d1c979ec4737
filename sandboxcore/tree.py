"""What a sandbox's inside consists of: the nodes of its root and every mount, in order.

The host is looked at (which of its directories exist, who owns a source) and never changed, but for the state
directory, where the layers of images are unpacked.
"""

import fnmatch
import functools
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sandboxcore import _native
from sandboxcore.errors import SpecError
from sandboxcore.host import ID_RANGE, HostFeatures
from sandboxcore.spec import WORKSPACE, SandboxSpec, check_source
from sandboxcore.spec import Mount as SpecMount
from sandboxcore.volumes import Source, Volumes

RDONLY, NOSUID, NODEV, NOEXEC, IDMAP = 1, 2, 4, 8, 0x100000  # mount_setattr(2)

# The host's own directories below which programs, libraries and their data live.
ROOT_ENTRIES = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
ETC_BINDS = (
    "alternatives",
    "ssl/certs",
    "pki/tls/certs",
    "ca-certificates",
    "fonts",
    "terminfo",
    "java",
    "java-*",
)
ETC_COPIES = (
    *("ld.so.cache", "ld.so.conf", "ld.so.conf.d/*", "localtime", "mime.types", "services", "protocols"),
    *("os-release", "debian_version", "ssl/openssl.cnf", "inputrc", "nanorc"),
)  # fmt: skip

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEV_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
             "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}  # fmt: skip


MAX_IMAGE_LAYERS = 128  # overlayfs takes 500; an image has 127 at most by custom


@dataclass(slots=True)
class Node:
    """A directory, file or symbolic link of the root tmpfs."""

    kind: str
    path: str
    data: bytes = b""
    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Lower:
    """A directory of the host that is a layer of an overlay."""

    source: str
    id_maps: tuple[str, str] | None = None


@dataclass(slots=True)
class Mount:
    """One mount; ``origin`` tells which part of the spec asked for it."""

    kind: str
    target: str
    origin: str
    source: str = ""
    attrs: int = 0
    options: tuple[str, ...] = ()
    directory: bool = True
    mode: int = 0
    writable: bool = False
    id_maps: tuple[str, str] | None = None
    late: bool = False
    create: bool = False
    lowers: tuple[Lower, ...] = ()  # of an overlay, the topmost first
    name: str = ""  # of its source, for people
    bounded: bool = False  # its file system is as large as somebody has said

    def __str__(self) -> str:
        access = "rw" if self.writable else "ro"
        late = ", late" if self.late else ""
        layers = " over ".join(lower.source for lower in self.lowers)
        source = self.name or self.source or layers or self.kind.lower()
        return f"{source} on {self.target} ({access}, {self.origin}{late})"


def identity(path: str) -> tuple[int, ...]:
    """What tells a replaced file or directory from the one that was bound or copied. With a slash
    at its end, a directory's entries count as well."""
    try:
        st = os.stat(path)
    except OSError as error:
        return (error.errno or -1,)
    if stat.S_ISDIR(st.st_mode) and not path.endswith("/"):
        return (st.st_dev, st.st_ino, st.st_uid, st.st_gid)
    return _identity_of(st)


def _identity_of(st: os.stat_result) -> tuple[int, ...]:
    return (st.st_dev, st.st_ino, st.st_mtime_ns, st.st_size)


def owner_maps(owner: tuple[int, int], host: HostFeatures, ids: tuple[int, int]) -> tuple[str, str] | None:
    """Id maps by which the payload stands for the owner of a source; None where it is the caller."""
    if host.mode != "root":
        return None
    return f"{owner[0]} {host.id_base + ids[0]} 1", f"{owner[1]} {host.id_base + ids[1]} 1"


def granted(
    wanted: SpecMount, real: str, st: os.stat_result, maps: tuple[str, str] | None, origin: str
) -> Mount:
    """The bind of a source, which is ``real`` without symbolic links. ``origin``: who asked for it."""
    access, attrs = ("ro", RDONLY) if wanted.read_only else ("rw", 0)
    directory = stat.S_ISDIR(st.st_mode)
    mount = Mount(
        "BIND", wanted.target, f"{origin} {access}", real, NOSUID | NODEV | attrs, directory=directory
    )
    mount.writable = not wanted.read_only
    if mount.writable and maps is not None:
        mount.attrs |= IDMAP
        mount.id_maps = maps
    return mount


def below(path: str, parent: str) -> bool:
    return parent in ("/", path) or path.startswith(parent + "/")


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


def _is_image(rootfs: str) -> bool:
    """Whether it is an archive, an OCI image layout, or DIRECTORY:TAG of one."""
    if os.path.isdir(rootfs):
        return os.path.isfile(os.path.join(rootfs, "oci-layout"))
    return os.path.isfile(rootfs) or (":" in rootfs and not os.path.lexists(rootfs))


def _matching(pattern: str) -> list[str]:
    """The paths whose last part matches; unlike glob, no error but "no such directory" is an answer."""
    directory, name = os.path.split(pattern)
    try:
        return [
            os.path.join(directory, entry) for entry in sorted(fnmatch.filter(os.listdir(directory), name))
        ]
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []


class Tree:
    """Collects the nodes and mounts of one spec on one host. ``watched`` are the host paths whose
    replacement would make a template stale; ``held`` must stay as long as the plan. ``root`` is the overlay
    that is the root, if it is one: then it is the first mount."""

    def __init__(self, spec: SandboxSpec, host: HostFeatures, volumes: Volumes) -> None:
        """Everything in turn; parents come first in the result."""
        self.spec, self.host, self._volumes = spec, host, volumes
        self.sources: dict[str, Source] = {}  # of volumes, by name
        self.uid, self.gid = spec.ids()
        self.nodes: list[Node] = []
        self.mounts: list[Mount] = []
        self.watched: list[str] = []
        self._seen: dict[str, tuple[int, ...]] = {}
        self.held: tuple[object, ...] = ()
        self._layers: tuple[Lower, ...] = ()
        self.root = self._add_root()
        self._add_dev()
        self._add_private()
        self._add_user_mounts()
        self._order_mounts()
        self._add_denials()
        self.carried = self._carried()
        if self.root is not None:
            self.mounts.insert(0, self.root)

    def identities(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """What every watched path is right now, or was when it was read."""
        return tuple((path, self._seen.get(path) or identity(path)) for path in dict.fromkeys(self.watched))

    def _dir(self, path: str, mode: int = 0o755) -> None:
        known = next((node for node in self.nodes if node.path == path), None)
        if known is not None and known.kind != "DIR":
            raise SpecError(f"mounts: {path!r} is no directory in the sandbox's root")
        if known is None:
            parent = os.path.dirname(path)
            if parent != "/":
                self._dir(parent)
            self.nodes.append(Node("DIR", path, mode=mode))

    def _file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._dir(os.path.dirname(path))
        self.nodes.append(Node("FILE", path, data, mode))

    def _link(self, path: str, target: str) -> None:
        self.nodes.append(Node("SYMLINK", path, os.fsencode(target)))

    def _bind(self, source: str, target: str, origin: str, attrs: int, *, directory: bool) -> Mount:
        mount = Mount("BIND", target, origin, source, attrs, directory=directory)
        self.mounts.append(mount)
        return mount

    def _add_root(self) -> Mount | None:
        """Returns the overlay that is the root, if it is one."""
        for path in ("/proc", "/dev", "/tmp"):
            self._dir(path)
        rootfs = self.spec.rootfs
        if rootfs is None:
            self._add_host_programs()
            self._add_etc()
        elif isinstance(rootfs, str) and not self.spec.writable and not _is_image(rootfs):
            self._add_rootfs(rootfs)
        else:
            self._add_layers((rootfs,) if isinstance(rootfs, str) else rootfs)
        if not self.spec.writable and not self._layers:
            return None
        attrs = NOSUID | NODEV | (0 if self.spec.writable else RDONLY)
        root = Mount("OVERLAY", "/", "root", attrs=attrs, mode=0o755, writable=self.spec.writable)
        root.lowers = self._layers
        return root

    def _add_layers(self, roots: Sequence[str]) -> None:
        """Their files belong to whom they belong in an image, so as root the ids of this file system count
        from 0."""
        everybody = f"0 {self.host.id_base} {ID_RANGE}"
        maps = (everybody, everybody) if self.host.mode == "root" else None
        for rootfs in roots:
            if _is_image(rootfs):
                self._add_image(rootfs, maps)
                continue
            root = os.path.realpath(rootfs)
            if not os.path.isdir(root):
                raise SpecError(f"rootfs: {rootfs}: not a directory")
            if root == "/":
                raise SpecError("rootfs: '/' is no image: all of it would be the payload's; leave rootfs out")
            self.watched += [rootfs, root]
            self._layers = (Lower(root, maps), *self._layers)
        if len(self._layers) > MAX_IMAGE_LAYERS:
            raise SpecError(f"rootfs: {len(self._layers)} layers, but {MAX_IMAGE_LAYERS} are the most")

    def _add_image(self, rootfs: str, maps: tuple[str, str] | None) -> None:
        """An archive, or an image's layers, unpacked in the state directory."""
        from sandboxcore import images

        image = images.load(rootfs, owners=self.host.mode == "root")
        for path, about in image.sources.items():
            self.watched.append(path)
            self._seen[path] = _identity_of(about)
        for layer in image.layers:
            lower = Lower(layer.path, maps)
            # overlayfs takes a directory once; below itself it would make no difference.
            below_it = () if layer.opaque else (known for known in self._layers if known != lower)
            self._layers = (lower, *below_it)
            self.watched.append(layer.path)
        self.held += image.layers

    def _add_host_programs(self) -> None:
        for name, link in _host_root():
            if link:
                self._link(f"/{name}", link)
            else:
                self._bind(f"/{name}", f"/{name}", "default root", RDONLY | NOSUID | NODEV, directory=True)

    def _add_rootfs(self, rootfs: str) -> None:
        """Each top-level entry of the given root, so that nothing is ever made in it."""
        try:
            root = os.path.realpath(rootfs)
            entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        except OSError as error:
            raise SpecError(f"rootfs: {rootfs}: {error.strerror}") from error
        self.watched += [rootfs, root + "/"]
        own = {"proc", "dev", "sys", "tmp"}
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
            for path in _matching(f"/etc/{pattern}"):
                self._copy_etc(path[len("/etc/") :])
        for pattern in ETC_BINDS:
            for path in _matching(f"/etc/{pattern}"):
                if os.path.isdir(path):
                    real = os.path.realpath(path)
                    self._dir(os.path.dirname(path))
                    self._bind(real, path, "default root", RDONLY | NOSUID | NODEV | NOEXEC, directory=True)

    def _generated_etc(self) -> dict[str, str]:
        host = self.spec.hostname
        users = {0: "root", self.uid: "root" if self.uid == 0 else "sandbox", 65534: "nobody"}
        groups = {
            0: "root",
            self.gid: "root" if self.gid == 0 else "sandbox",
            5: "tty",
            65534: "nogroup",
        }
        return {
            "passwd": "".join(self._passwd_line(uid, name) for uid, name in sorted(users.items())),
            "group": "".join(f"{name}:x:{gid}:\n" for gid, name in sorted(groups.items())),
            "hosts": f"127.0.0.1 localhost {host}\n::1 localhost {host}\n",
            "hostname": f"{host}\n",
            "host.conf": "multi on\n",
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n",
        }

    def _passwd_line(self, uid: int, name: str) -> str:
        own = uid == self.uid
        home = self.spec.workdir if own else "/"
        return f"{name}:x:{uid}:{self.gid if own else uid}:{name}:{home}:/bin/sh\n"

    def _copy_etc(self, name: str) -> None:
        path = f"/etc/{name}"
        try:
            data = Path(path).read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
            return  # absent or not for this user: neither is needed to run a program
        if len(data) <= 4 << 20:
            self._file(path, data)
            self.watched.append(path)

    def _add_dev(self) -> None:
        for name in DEVICES:
            self._bind(
                f"/dev/{name}", f"/dev/{name}", "devices", RDONLY | NOSUID | NOEXEC, directory=False
            ).writable = True
        for name, target in DEV_LINKS.items():
            self._link(f"/dev/{name}", target)

    def _add_private(self) -> None:
        proc = ("subset", "pid", "hidepid", "invisible") if self.spec.proc == "pid" else ()
        self.mounts.append(Mount("PROC", "/proc", "proc", attrs=NOSUID | NODEV | NOEXEC, options=proc))
        gid = self.gid if self.host.mode == "rootless" else 5
        pts = ("ptmxmode", "0666", "mode", "0620", "gid", str(gid))
        self.mounts.append(Mount("DEVPTS", "/dev/pts", "pts", attrs=NOSUID | NOEXEC, options=pts))
        taken = {mount.target for mount in self.spec.all_mounts()}
        private = {"/dev/shm": 0o1777, "/tmp": 0o1777, "/var/tmp": 0o1777, WORKSPACE: 0o755}
        if self.spec.rootfs is not None:
            del private["/var/tmp"]
        for target, mode in private.items():
            if target in taken:
                continue
            if self.spec.writable and target in (WORKSPACE, "/var/tmp"):
                self._dir(target, mode)
            else:
                attrs = NOSUID | NODEV
                self.mounts.append(Mount("SCRATCH", target, "private", attrs=attrs, mode=mode, writable=True))

    def _add_user_mounts(self) -> None:
        for mount in self.spec.all_mounts():
            if mount.source is not None:
                add = self._add_volume if mount.kind == "volume" else self._add_user_source
                add(mount, mount.source)
                continue
            disk = mount.size if mount.size is not None else self.spec.limits.disk
            options = ["mode", f"{mount.mode:o}", "uid", str(self.uid), "gid", str(self.gid)]
            options += ["size", str(disk)] if disk is not None else []
            inodes = mount.inodes if mount.inodes is not None else self.spec.limits.inodes
            options += ["nr_inodes", str(inodes)] if inodes is not None else []
            self.mounts.append(
                Mount(
                    "TMPFS",
                    mount.target,
                    "spec tmpfs",
                    attrs=NOSUID | NODEV,
                    options=tuple(options),
                    writable=True,
                )
            )

    def _add_user_source(self, wanted: SpecMount, source: str) -> None:
        try:
            real = os.path.realpath(source)
            st = os.stat(real)
        except OSError as error:
            raise SpecError(f"mounts: source {source!r}: {error.strerror}") from error
        check_source(source, real)
        self.watched += [source, real]
        maps = owner_maps((st.st_uid, st.st_gid), self.host, (self.uid, self.gid))
        if wanted.kind == "overlay":
            if not stat.S_ISDIR(st.st_mode):
                raise SpecError(f"mounts: overlay of {source!r}, which is no directory")
            overlay = Mount("OVERLAY", wanted.target, "spec overlay", attrs=NOSUID | NODEV, writable=True)
            overlay.mode, overlay.lowers = stat.S_IMODE(st.st_mode) & 0o1777, (Lower(real, maps),)
            self.mounts.append(overlay)
            return
        self.mounts.append(granted(wanted, real, st, maps, "spec"))

    def _add_volume(self, wanted: SpecMount, name: str) -> None:
        """Id-mapped also where it is read-only: what one sandbox wrote another can read."""
        if name not in self.sources:
            self.sources[name] = self._volumes.source(name)
        source = self.sources[name]
        self.watched.append(os.fspath(source.volume.path / "volume.json"))
        if source.device is None:
            self.watched.append(source.path)
        attrs = NOSUID | NODEV | (RDONLY if wanted.read_only else 0)
        mount = self._bind(source.path, wanted.target, "spec volume", attrs, directory=True)
        mount.name, mount.writable = f"volume {name}", not wanted.read_only
        mount.bounded = source.volume.quota is not None
        mount.options = source.device.options if source.device else ()
        mount.id_maps = owner_maps(source.owner, self.host, (self.uid, self.gid))
        mount.attrs |= IDMAP if mount.id_maps else 0

    def _order_mounts(self) -> None:
        """Parents first; a bind below a per-sandbox mount is late; targets in our tmpfs may be made."""
        self.mounts.sort(key=lambda mount: mount.target.split("/"))
        for mount in self.mounts:
            parent = self._parent(mount.target)
            mount.late = (
                mount.kind == "BIND" and parent is not None and (parent.kind != "BIND" or parent.late)
            )
            mount.create = parent is None or parent.kind in ("SCRATCH", "TMPFS", "OVERLAY")
            if parent is None and (mount.kind != "BIND" or self.root is not None):
                if mount.directory:  # the root is read-only when these are made, or another one
                    self._dir(mount.target)
                elif all(node.path != mount.target for node in self.nodes):
                    self._file(mount.target, b"")
        late = [mount for mount in self.mounts if mount.late]
        if len(late) > _native.MAX_LATE:
            raise SpecError(f"mounts: more than {_native.MAX_LATE} lie below private directories")

    def _parent(self, target: str) -> Mount | None:
        above = [
            m for m in self.mounts if m.target != target and below(target, m.target) and m.kind != "MASK"
        ]
        return max(above, key=lambda mount: len(mount.target), default=None)

    def _add_denials(self) -> None:
        """A mask for each denied path that exists; what could appear later, or elsewhere, is refused."""
        masks = []
        for path in self.spec.deny:
            for node in self.nodes:
                if node.kind == "SYMLINK" and below(path, node.path):
                    raise SpecError(f"deny: {node.path!r} is a link to {os.fsdecode(node.data)!r}; deny that")
            above = [mount for mount in self.mounts if below(path, mount.target)]
            cover = max(above, key=lambda mount: len(mount.target), default=None)
            if cover is None:
                exists = any(below(node.path, path) for node in self.nodes) or self._in_layers(
                    path, self.root
                )
            elif cover.kind == "BIND":
                exists = self._deniable(path, cover)
            else:  # a private file system starts empty
                exists = cover.target == path or self._in_layers(path, cover)
            if exists:
                self._drop_below(path)
                late = self.spec.writable if cover is None else cover.late or cover.kind != "BIND"
                masks.append(Mount("MASK", path, "spec deny", late=late))
        self.mounts = sorted([*self.mounts, *masks], key=lambda m: (m.target.split("/"), m.kind == "MASK"))

    def _in_layers(self, path: str, overlay: Mount | None) -> bool:
        """Whether one of an overlay's layers has a denied path. What comes later is the payload's own."""
        if overlay is None:
            return False
        for lower in overlay.lowers:
            outside = lower.source + path[len(overlay.target.rstrip("/")) :]
            self.watched.append(outside)
            if os.path.realpath(outside) != outside:
                raise SpecError(f"deny: {path!r} goes through a symbolic link; deny what it points to")
            if os.path.lexists(outside):
                return True
        return False

    def _carried(self) -> tuple[str, ...]:
        """What lies on the template's own root, and has to come along to a writable one."""
        if self.root is None or not self.root.writable:
            return ()
        found = [m.target for m in self.mounts if m.kind in ("BIND", "MASK") and not m.late]
        tops = [path for path in found if not any(path != other and below(path, other) for other in found)]
        return ("/dev", *(path for path in tops if not below(path, "/dev")))

    def parent_overlay(self, mount: Mount) -> int:
        """1 + the index of the overlay that is written to and that a mount lies on directly; 0 where there is
        another mount between, or what the template has brought along."""
        over = self._parent(mount.target)
        if over is None or over.kind != "OVERLAY" or not over.writable:
            return 0
        if over is self.root and any(below(mount.target, path) for path in ("/proc", *self.carried)):
            return 0
        return 1 + self.mounts.index(over)

    def _drop_below(self, path: str) -> None:
        """Our own mounts below a denied path go; one that the spec names contradicts it."""
        inside = [mount for mount in self.mounts if mount.target != path and below(mount.target, path)]
        for mount in inside:
            if mount.origin.startswith("spec"):
                raise SpecError(f"deny: {path!r} hides {mount.target!r}, which the spec also mounts")
        self.mounts = [mount for mount in self.mounts if mount not in inside]

    def _deniable(self, path: str, cover: Mount) -> bool:
        """Whether a denied path exists below a bind, and can be masked without touching the host."""
        if cover.origin == "spec volume":
            raise SpecError(
                f"deny: {path!r} lies in {cover.name}, in which others may put anything; use ro, or none"
            )
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
