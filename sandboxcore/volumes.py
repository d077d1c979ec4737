"""Volumes: named directories that outlive sandboxes, below the state directory::

    STATE/volumes/.lock              held by whoever changes anything here, for a moment
    STATE/volumes/NAME/volume.json   what it is
    STATE/volumes/NAME/data/         what is in it; or, with a quota,
    STATE/volumes/NAME/image         a file system (volume_image.py)
    STATE/volumes/NAME/uses/         a locked file for each sandbox that has it

A use is a lock (flock(2)) that is held by the sandbox's init: the kernel gives it back, whatever ends the
sandbox. Payloads write in ``data`` or in the image only, so nothing else here is in question.
"""

import contextlib
import dataclasses
import errno as E
import fcntl
import json
import os
import secrets
import stat
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxcore import _native, volume_image
from sandboxcore.errors import SandboxBusy, SandboxError, SpecError, VolumeNotFound
from sandboxcore.spec import check_labels, check_name, parse_size
from sandboxcore.statedir import StatePath, close_lock, locked, make_private, open_lock, state_path
from sandboxcore.volume_image import LoopDevice

DEEPEST = 256  # directories in each other that are measured

_RECORD, _LOCK, _NEW, _GONE = "volume.json", ".lock", ".new-", ".gone-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """One volume. ``quota``: bytes, ``inodes``: files, or None for no bound of its own; ``created_at``:
    seconds since the epoch; ``path``: its place in the state directory; ``id`` tells it from others that
    had its name before."""

    name: str
    id: str
    path: Path
    quota: int | None = None
    inodes: int | None = None
    exclusive: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    created_at: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**data, "path": os.fspath(self.path), "labels": dict(self.labels)}


@dataclass(frozen=True, slots=True)
class VolumeUsage:
    """What a volume holds: ``bytes`` on disk and ``inodes``, None where that cannot be told (directories that
    are closed to us, or deeper than 256); ``users``: ids of the sandboxes that have it, ``run-PID`` for those
    of :func:`run`."""

    bytes: int | None
    inodes: int | None
    users: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What a sandbox's mount is made from: ``path`` of a directory, or of the device that is held by this.
    ``owner``: uid and gid whose files they are."""

    volume: Volume
    path: str
    owner: tuple[int, int]
    device: LoopDevice | None = None


class Volumes:
    """The volumes of a state directory, default that of :class:`PersistentSandbox`. Any number of processes
    of its owner may use it at once."""

    def __init__(self, state_dir: StatePath = None) -> None:
        self.path = state_path(state_dir) / "volumes"

    def create(
        self,
        name: str,
        *,
        quota: int | str | None = None,
        inodes: int | None = None,
        exclusive: bool = False,
        labels: Mapping[str, str] | None = None,
    ) -> Volume:
        """Make an empty one.

        name: 1 to 64 letters, digits, ``_``, ``.`` or ``-``, no dot or dash first.
        quota: bytes (or ``"512M"``, at least 1M) that there is room for, at most one in 64 (or 256K) more.
            The kernel refuses what goes beyond (ENOSPC). On disk tables come on top: some 5 M and one byte in
            16, more with many inodes; what is not written takes no place. Only as root.
        inodes: files and directories in it; only with a quota. Rounded up to what a table has room for.
        exclusive: for one sandbox at a time; else any number share it.

        Raises :class:`SpecError`, also where the name is taken, and :class:`UnsupportedHost`.
        """
        check_name(name)
        size = None if quota is None else parse_size(quota, "quota")
        if size is not None and size < volume_image.MINIMUM:
            raise SpecError(f"quota: {quota!r} is less than {volume_image.MINIMUM >> 20}M")
        if inodes is not None and (size is None or not isinstance(inodes, int) or not 0 < inodes < 2**32):
            raise SpecError(f"inodes: {inodes!r} is not a positive number, or there is no quota")
        if size is not None:
            volume_image.require()
        volume = Volume(
            name=name, id=secrets.token_hex(8), path=self.path / name, quota=size, inodes=inodes,
            exclusive=bool(exclusive), labels=check_labels(labels or {}), created_at=time.time(),
        )  # fmt: skip
        with self._understood():
            make_private(self.path.parent)
            self.path.mkdir(mode=0o700, exist_ok=True)
            with locked(self.path / _LOCK):
                self._make(volume)
        return volume

    def _make(self, volume: Volume) -> None:
        """Whole, under another name first."""
        if os.path.lexists(volume.path):
            raise SpecError(f"name: there is a volume {volume.name!r} already")
        new = self.path / f"{_NEW}{volume.id}"
        try:
            new.mkdir(mode=0o700)
            (new / "uses").mkdir(mode=0o700)
            if volume.quota is None:
                (new / "data").mkdir()
                (new / "data").chmod(0o755)
            else:
                volume_image.make(new / "image", volume.quota, volume.inodes)
            data = volume.to_dict()
            del data["path"]
            (new / _RECORD).write_text(json.dumps(data))
            os.rename(new, volume.path)
        except BaseException:
            self._remove(new.name)
            raise

    def get(self, name: str) -> Volume:
        """One by its name. Raises :class:`VolumeNotFound`."""
        check_name(name)
        with self._understood():
            return self._read(self.path / name)

    def _read(self, path: Path) -> Volume:
        try:
            if self.path.exists():
                make_private(self.path.parent)
            if not stat.S_ISDIR(path.lstat().st_mode):
                raise SandboxError(f"{path}: is no directory of a volume")
            data = json.loads((path / _RECORD).read_text())
            return Volume(**{**data, "path": path})
        except (FileNotFoundError, NotADirectoryError):
            raise VolumeNotFound(f"no volume {path.name!r} in {self.path}") from None
        except (ValueError, TypeError) as error:
            raise SandboxError(f"{path / _RECORD}: {error}") from error

    def list(self, *, labels: Mapping[str, str] | None = None) -> list[Volume]:
        """All of them, oldest first. ``labels``: only those with all of these."""
        found = []
        with self._understood():
            names = os.listdir(self.path) if self.path.exists() else []
            for name in names:
                with contextlib.suppress(VolumeNotFound):  # removed meanwhile
                    if not name.startswith("."):
                        found.append(self._read(self.path / name))
        wanted = (labels or {}).items()
        every = [volume for volume in found if wanted <= dict(volume.labels).items()]
        return sorted(every, key=lambda volume: (volume.created_at, volume.name))

    def describe(self, name: str) -> VolumeUsage:
        """What it holds, and who has it. Without a quota everything in it is counted, which takes as long as
        there is much. Raises :class:`VolumeNotFound`."""
        with self._understood():
            with self._locked():
                volume = self.get(name)
                users = _users(volume.path)
                device = volume_image.attach(volume.path / "image") if volume.quota is not None else None
            if device is None:
                return VolumeUsage(*_measured(volume.path / "data"), users)
            with device, device.mounted() as root:
                fs = os.statvfs(root)
            blocks, files = fs.f_blocks - fs.f_bfree, fs.f_files - fs.f_ffree
            return VolumeUsage(blocks * fs.f_frsize, max(0, files - volume_image.OWN_INODES), users)

    def delete(self, name: str) -> None:
        """Remove it with everything in it. Raises :class:`SandboxBusy` while a sandbox has it, and
        :class:`VolumeNotFound`."""
        with self._understood():
            with self._locked():
                volume = self.get(name)
                if users := _users(volume.path):
                    raise SandboxBusy(f"volume {name}: in use by {', '.join(users)}; end them first")
                gone = f"{_GONE}{volume.id}"
                os.rename(volume.path, self.path / gone)
            self._remove(gone)

    def gc(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Remove what a crash has left: volumes that were half made or half removed, and marks of uses that
        are over. Returns the names of the former in the volumes' directory. :func:`sandboxcore.gc` does this,
        too."""
        if not self.path.exists():
            return ()
        with self._understood():
            with self._locked():  # who makes one holds it, too, so nobody is at work on what is found
                names = sorted(os.listdir(self.path))
                strays = [name for name in names if name.startswith((_NEW, _GONE))]
                if dry_run:
                    return tuple(strays)
                for name in names:
                    if name.startswith(_NEW):
                        os.rename(self.path / name, self.path / f"{_GONE}{name.removeprefix(_NEW)}")
                    elif not name.startswith(".") and (self.path / name / "uses").is_dir():
                        _users(self.path / name)
            for name in strays:
                self._remove(f"{_GONE}{name.rpartition('-')[2]}")
        return tuple(strays)

    def source(self, name: str) -> Source:
        """What a sandbox's mount of it is made from. Raises :class:`SpecError` where there is none."""
        try:
            with self._understood():
                volume = self.get(name)
                if volume.quota is None:
                    data = volume.path / "data"
                    about = data.lstat()
                    if not stat.S_ISDIR(about.st_mode):
                        raise SandboxError(f"{data}: is no directory")
                    return Source(volume, os.path.realpath(data), (about.st_uid, about.st_gid))
                with self._locked():
                    device = _devices.get(volume.id) or volume_image.attach(volume.path / "image")
                    _devices[volume.id] = device
                return Source(volume, device.path, (os.geteuid(), os.getegid()), device)
        except VolumeNotFound as error:
            raise SpecError(f"volumes: {error}; make it: sandboxcore volume create {name}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if not self.path.exists():
            raise VolumeNotFound(f"no volumes in {self.path}")
        with locked(self.path / _LOCK):
            yield

    def _remove(self, name: str) -> None:
        """Nobody uses it any more. Also after another process did the same."""
        with contextlib.suppress(FileNotFoundError):
            if (image := self.path / name / "image").exists():
                volume_image.empty(image)
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                _native.remove_tree(directory, name)
            finally:
                os.close(directory)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """What the system says is an error of the state directory."""
        try:
            yield
        except SandboxError:
            raise
        except OSError as error:
            raise SandboxError(f"{self.path}: {error}") from error


_devices: weakref.WeakValueDictionary[str, LoopDevice] = weakref.WeakValueDictionary()  # of this process


# --- uses -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_use(sources: Sequence[Source], user: str, *, until_end: bool = False) -> Iterator[list[int]]:
    """Take volumes for a sandbox: descriptors for its init to hold. They are closed at the end of the block;
    ``until_end``: then the sandbox has ended, and the uses with it.

    Raises :class:`SandboxBusy` for an exclusive one that somebody has, :class:`SpecError` for one that is
    gone.
    """
    taken: list[tuple[int, Path]] = []
    try:
        for source in sources:
            taken.append(_take(source.volume, user))
        yield [fd for fd, _ in taken]
        for fd, path in taken if until_end else ():
            path.unlink(missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for a child that a thread is just starting
    finally:
        for fd, _ in taken:
            close_lock(fd)


def _take(volume: Volume, user: str) -> tuple[int, Path]:
    try:
        with locked(volume.path.parent / _LOCK):
            if json.loads((volume.path / _RECORD).read_text())["id"] != volume.id:
                raise SandboxBusy(f"volume {volume.name}: was replaced just now; try again")
            if volume.exclusive and (users := _users(volume.path)):
                raise SandboxBusy(f"volume {volume.name}: is exclusive, and in use by {', '.join(users)}")
            path = volume.path / "uses" / f"{user}.{secrets.token_hex(4)}"
            fd = open_lock(path, os.O_CREAT | os.O_EXCL)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd, path
    except FileNotFoundError:
        raise SpecError(f"volumes: volume {volume.name!r} was removed just now") from None
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        raise SandboxError(f"volume {volume.name}: {error}") from error


def _users(volume: Path) -> tuple[str, ...]:
    """Who has a volume; marks of those who are gone are removed. The caller holds the lock."""
    found = []
    for path in sorted((volume / "uses").iterdir()):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:  # who ends removes his own, without the lock
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            found.append(path.name.rpartition(".")[0])
        finally:
            os.close(fd)
    return tuple(found)


# --- what is in it ----------------------------------------------------------------------------------


def _measured(top: Path) -> tuple[int | None, int | None]:
    """Bytes on disk and inodes of a directory in which anybody may move and replace things just now: from
    descriptor to descriptor, through no link."""
    size, seen, open_dirs = 0, set[tuple[int, int]](), list[tuple[int, list[str]]]()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(top, flags)
        open_dirs.append((fd, os.listdir(fd)))
        while open_dirs:
            directory, names = open_dirs[-1]
            if not names:
                os.close(open_dirs.pop()[0])
                continue
            name = names.pop()
            with contextlib.suppress(FileNotFoundError):
                about = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if (about.st_dev, about.st_ino) in seen:  # another name of it
                    continue
                seen.add((about.st_dev, about.st_ino))
                size += about.st_blocks * 512
                if stat.S_ISDIR(about.st_mode):
                    if len(open_dirs) == DEEPEST:
                        return None, None
                    fd = os.open(name, flags, dir_fd=directory)
                    open_dirs.append((fd, []))
                    open_dirs[-1][1].extend(os.listdir(fd))
    except OSError as error:
        if error.errno in (E.EACCES, E.ENOTDIR, E.ELOOP):  # closed to us, or just swapped
            return None, None
        raise
    finally:
        for fd, _ in open_dirs:
            os.close(fd)
    return size, len(seen)
