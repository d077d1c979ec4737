"""Unpacked layers of root file systems, each once: ``layers/sha256-HEX`` in the state directory.

The name says what was unpacked, so a layer never changes, and everybody of this user shares it. It comes into
being by a rename of what is complete and on disk; a crash leaves no more than a ``tmp-...``, which
:func:`collect` removes. A layer's directory has ``tree``, the layer, and ``manifest.json``, what is known of
it.

Whoever uses a layer holds a shared lock on its directory. What outlives its maker, a persistent sandbox, has
it mounted, as ``/proc/PID/mountinfo`` tells.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sandboxcore import _native
from sandboxcore.errors import SandboxError
from sandboxcore.statedir import default_state_dir, make_private
from sandboxcore.unpack import Bounds, Contents

VERSION = 1
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
DIFF_ID = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"sha256-[0-9a-f]{64}(\.own)?")

StatePath = str | os.PathLike[str] | None


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Layer:
    """One unpacked layer, which stays as long as this object.

    diff_id: the digest of its archive, uncompressed.
    path: of the directory to mount.
    opaque: it hides everything below.
    entries, bytes: how many files and directories it has; how much was in the archive.
    skipped: what of the archive was left out and why, at most a hundred; skips: how many it was.
    """

    diff_id: str
    path: str
    opaque: bool
    entries: int
    bytes: int
    skips: int
    skipped: tuple[str, ...]
    _fd: int = field(repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self._fd)


_held: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()


def _real(state_dir: StatePath) -> Path:
    """Without links: a mount's source has none."""
    return Path(os.path.realpath(state_dir if state_dir is not None else default_state_dir()))


class LayerStore:
    """The layers of one state directory. ``owners``: with the owners of their files, which only root can give
    them; others have layers of their own, in which everything is the caller's.

    Raises :class:`SandboxError` where the directory cannot be used."""

    def __init__(self, state_dir: StatePath = None, *, owners: bool) -> None:
        state = _real(state_dir)
        self.path, self.owners, self._suffix = state / "layers", owners, "" if owners else ".own"
        try:
            for directory in (state, self.path, self.path / "archives"):
                make_private(directory)
            self.path.chmod(0o700)  # files in it may belong to any user of this host
        except OSError as error:
            raise SandboxError(f"{self.path}: {error.strerror}") from error

    def get(self, diff_id: str) -> Layer | None:
        """A layer that is there already."""
        name = diff_id.replace(":", "-") + self._suffix
        place = self.path / name
        held = _held.get(str(place))
        if held is not None and _is(held._fd, place):
            os.utime(held._fd)
            return held
        try:
            fd = os.open(place, DIRECTORY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            about = _manifest(fd) if _is(fd, place) else None  # it may have been removed while we waited
            if about is None or f"sha256:{name[7:71]}" != diff_id:
                os.close(fd)
                return None
            os.utime(fd)  # when it was last used
        except BaseException:
            os.close(fd)
            raise
        layer = Layer(
            diff_id,
            str(place / "tree"),
            about.opaque,
            about.entries,
            about.bytes,
            about.skips,
            tuple(about.skipped),
            fd,
        )
        _held[str(place)] = layer
        return layer

    def obtain(self, key: str, find: Callable[[], Layer | None], fill: Callable[[int], Contents]) -> Layer:
        """What ``find`` finds, or else what ``fill`` makes in an empty directory, given as a descriptor: only
        one of those who ask with the same ``key`` does. What ``fill`` raises comes through, and nothing is
        left."""
        try:
            if (layer := find()) is not None:
                return layer
            few = hashlib.sha256(key.encode()).hexdigest()[0]
            with self._locked(f"lock-{few}"):
                return find() or self._make(fill)  # somebody else may have been faster
        except OSError as error:
            raise SandboxError(f"{self.path}: {error.strerror or error}") from error

    def _make(self, fill: Callable[[int], Contents]) -> Layer:
        with self._temporary() as (place, fd):
            os.mkdir("tree", 0o755, dir_fd=fd)
            tree = os.open("tree", DIRECTORY, dir_fd=fd)
            try:
                contents = fill(tree)
                _native.syncfs(tree)
            finally:
                os.close(tree)
            about = json.dumps({"version": VERSION, **dataclasses.asdict(contents)})
            _write(fd, "manifest.json", about.encode())
            # Another archive may have become the same layer.
            with self._locked("lock-new"):
                if (layer := self.get(contents.diff_id)) is None:
                    self._publish(place, contents.diff_id.replace(":", "-") + self._suffix)
                    fcntl.flock(fd, fcntl.LOCK_UN)  # or we would wait for ourselves
                    layer = self.get(contents.diff_id)
        if layer is None:
            raise SandboxError(f"{self.path}: a layer was removed as soon as it was there; try again")
        return layer

    def _publish(self, place: str, name: str) -> None:
        if (self.path / name).exists():  # without a manifest: somebody else's hand
            _remove(self.path, name)
        os.rename(place, self.path / name)
        _sync(self.path)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[str, int]]:
        """A new directory and its descriptor, locked, so that nobody takes it for a crash's. What it is
        called at the end may be gone."""
        while True:
            place = tempfile.mkdtemp(prefix="tmp-", dir=self.path)
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(place, DIRECTORY)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if _is(fd, place):
                    break
                os.close(fd)
        try:
            yield place, fd
        finally:
            if _is(fd, place):
                _remove(self.path, os.path.basename(place))
            fcntl.flock(fd, fcntl.LOCK_UN)  # or it lasts as long as a fork that has the descriptor, too
            os.close(fd)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        fd = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def room(self, bounds: Bounds) -> Bounds:
        """The bounds, or what is free on this file system if that is less."""
        about = os.statvfs(self.path)
        entries = min(bounds.entries, about.f_favail) if about.f_files else bounds.entries
        return Bounds(min(bounds.bytes, about.f_bavail * about.f_frsize), entries)

    # --- archives ---------------------------------------------------------------------------------

    def known(self, about: os.stat_result) -> Layer | None:
        """The layer of an archive that was seen before and has not changed since."""
        try:
            diff_id = os.readlink(self.path / "archives" / _identity(about))
        except OSError:
            return None
        return self.get(diff_id) if DIFF_ID.fullmatch(diff_id) else None

    def remember(self, about: os.stat_result, diff_id: str, since: float) -> None:
        """What an archive was, looked at ``since`` then (time.time). Not of one that had changed just before:
        its next change may have had the same time stamp, which on some file systems is of whole seconds."""
        tick = 0.1 if about.st_ctime_ns % 10**9 else 2.0
        if about.st_ctime < since - tick:
            with contextlib.suppress(FileExistsError):
                os.symlink(diff_id, self.path / "archives" / _identity(about))


def _identity(about: os.stat_result) -> str:
    """The inode's change time is nobody's to set."""
    seen = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _is(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether a path still leads to what a descriptor is of."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False


def _manifest(fd: int) -> Contents | None:
    """What is on record of a layer; None if it is none."""
    try:
        file = os.open("manifest.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        with open(file, "rb") as stream:
            data = json.loads(stream.read())
        os.stat("tree/.", dir_fd=fd)
        return Contents(**data) if data.pop("version") == VERSION else None
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(directory: int, name: str, data: bytes) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.fsync(directory)


def _sync(path: Path) -> None:
    fd = os.open(path, DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- removing ---------------------------------------------------------------------------------------


def collect(
    state_dir: StatePath = None, *, unused_for: float | None = None, dry_run: bool = False
) -> tuple[str, ...]:
    """Remove what crashes have left of layers and, with ``unused_for``, the layers that nobody has used for
    so many seconds; never one that a process of this host uses or has mounted. Returns their names.

    What is removed is unpacked again when it is needed."""
    return tuple(collecting(state_dir, unused_for=unused_for, dry_run=dry_run))


def collecting(
    state_dir: StatePath = None, *, unused_for: float | None = None, dry_run: bool = False
) -> Iterator[str]:
    """The same, one after the other."""
    state = _real(state_dir)
    layers = state / "layers"
    names = sorted(os.listdir(layers)) if layers.is_dir() else []
    mounted = _mounted(layers) if unused_for is not None and names else set()
    for name in names:
        left = name.startswith("tmp-")
        if not left and (unused_for is None or name in mounted or not _NAME.fullmatch(name)):
            continue
        if _take(layers, name, 0.0 if left or unused_for is None else unused_for, dry_run=dry_run):
            yield name
    if names and not dry_run:
        _forget_archives(layers)


def _mounted(layers: Path) -> set[str]:
    """The layers that are mounted somewhere, whoever has done it."""
    pattern = re.compile(_in_mountinfo(layers) + rb"/(sha256-[0-9a-f]{64}(?:\.own)?)/tree[ /]")
    found: set[str] = set()
    for path in glob.glob("/proc/[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):
            found |= {name.decode() for name in pattern.findall(Path(path).read_bytes())}
    return found


def _in_mountinfo(directory: Path) -> bytes:
    """How a directory begins, as source of a mount: device and path in the file system. Where that cannot be
    told, any will do."""
    fd = os.open(directory, DIRECTORY)
    try:
        real = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))
        number = re.search(rb"mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{fd}").read_bytes())
    finally:
        os.close(fd)
    path = re.sub(rb"[ \t\n\\]", lambda match: b"\\%03o" % match[0][0], real)
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        mount, _, device, root, point, *_ = line.split()
        if number is not None and mount == number[1] and path.startswith(point.rstrip(b"/") + b"/"):
            inside = root.rstrip(b"/") + path[len(point.rstrip(b"/")) :]
            return re.escape(b" %s %s" % (device, inside))
    return b""


def _take(layers: Path, name: str, unused_for: float, *, dry_run: bool) -> bool:
    """Remove one of them, if nobody has it."""
    try:
        fd = os.open(layers / name, DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.fstat(fd).st_mtime < unused_for or not _is(fd, layers / name):
            return False
        if not dry_run:
            if not name.startswith("tmp-"):  # from now on it is nobody's
                away = f"tmp-{secrets.token_hex(4)}-{name}"
                os.rename(layers / name, layers / away)
                name = away
            _remove(layers, name)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _forget_archives(layers: Path) -> None:
    """What is known of archives whose layer is gone."""
    for path in layers.glob("archives/*"):
        with contextlib.suppress(FileNotFoundError):  # somebody else does the same
            name = os.readlink(path).replace(":", "-")
            if not any((layers / f"{name}{suffix}").is_dir() for suffix in ("", ".own")):
                path.unlink()


def _remove(parent: int | Path, name: str) -> None:
    """Remove a directory with all in it, whatever modes an archive gave it; no link is followed. It is not
    deeper than unpacking makes them."""
    if isinstance(parent, Path):
        fd = os.open(parent, DIRECTORY)
        try:
            return _remove(fd, name)
        finally:
            os.close(fd)
    os.chmod(name, 0o700, dir_fd=parent)
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        for entry in os.scandir(fd):
            if entry.is_dir(follow_symlinks=False):
                _remove(fd, entry.name)
            else:
                os.unlink(entry.name, dir_fd=fd)
    finally:
        os.close(fd)
    return os.rmdir(name, dir_fd=parent)
