"""What a sandbox wrote above a directory of the host, put into that directory: all of it, or nothing.

What is new is made in a directory beside it all, ``.sandboxcore-commit-ID``. When that is complete, a list of
what is to be done is put there, and from then on the commit has happened: after a crash it is finished, by
whoever looks, for each step may be done twice. A note in the state directory says where to look.
"""

import contextlib
import errno as E
import fcntl
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sandboxcore import _native, durable
from sandboxcore.errors import CommitError
from sandboxcore.lifecycle import new_id
from sandboxcore.packing import Entry, Found, Item

STAGE, LIST = ".sandboxcore-commit-", "list"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KEPT_BITS = 0o1777  # what has set-id bits in a sandbox must not have them outside


class Change(NamedTuple):
    """A path in the directory, what it was and what it is to be."""

    path: bytes
    was: Found | None
    now: Found | None


class Place(NamedTuple):
    """The directory, and its st_dev and st_ino: its path may lead elsewhere now."""

    path: str
    inode: tuple[int, int]


def commit(
    place: Place, changes: list[Change], layers: Iterable[tuple[int, Iterator[Item]]], notes: Path
) -> None:
    """Do it. ``layers``: by their numbers, what is in them. ``notes``: the directory for notes. Raises
    CommitError; then nothing has happened, or :func:`finish_all` goes on."""
    identity = new_id("cmt")
    notes.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _said(place), _note(notes, identity, place), _opened_place(place) as top:
        name = STAGE + identity
        os.mkdir(name, 0o700, dir_fd=top)
        with _opened(name, top) as stage:
            try:
                _check(top, changes)
                staged = _Stage(stage, os.fstat(top)).fill(changes, layers)
                _write_list(stage, {"commit": identity, "steps": _steps(changes, staged)})
            except BaseException:
                _native.remove_tree(top, name)
                raise
            _finish(top, stage, identity)


def finish_all(notes: Path) -> list[str]:
    """Finish what was interrupted, or take back what had not begun; the directories. What goes on just now is
    left alone. Raises CommitError for the first that cannot be finished, after all others."""
    found, failed = [], []
    for path in sorted(notes.glob("cmt-*")) if notes.is_dir() else ():
        try:
            with contextlib.suppress(BlockingIOError, FileNotFoundError), _held(path) as place:
                with _said(place), _opened_place(place) as top:
                    _finish_left(top, path.name)
                path.unlink()
                found.append(place.path)
        except CommitError as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return found


# --- before: nothing has changed ----------------------------------------------------------------------


@contextlib.contextmanager
def _said(place: Place) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, CommitError):
            raise
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
        raise CommitError(error.errno, f"commit to {place.path}: {error.strerror}", name) from error


@contextlib.contextmanager
def _note(notes: Path, identity: str, place: Place) -> Iterator[None]:
    """A note that there is something to finish or to take back, as long as there is."""
    path = notes / identity
    with durable.NewFile(notes) as new:
        fcntl.flock(new.file, fcntl.LOCK_EX)
        new.file.write(json.dumps(place).encode())
        new.put(identity, replace=False)
        try:
            yield
        finally:
            if not os.path.lexists(os.path.join(place.path, STAGE + identity)):
                path.unlink()


@contextlib.contextmanager
def _held(note: Path) -> Iterator[Place]:
    """A note that is nobody else's. Raises BlockingIOError, FileNotFoundError."""
    with open(note, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.exists(note):
            raise FileNotFoundError
        path, (device, inode) = json.load(file)
        yield Place(path, (device, inode))


@contextlib.contextmanager
def _opened(path: str | bytes, at: int | None = None) -> Iterator[int]:
    fd = os.open(path, _FOLDER if at is not None else _FOLDER & ~os.O_NOFOLLOW, dir_fd=at)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_place(place: Place) -> Iterator[int]:
    """Whoever can write above it must not have us write somewhere else."""
    with _opened(place.path) as fd:
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) != place.inode:
            raise CommitError(E.ESTALE, "not the directory that the sandbox has", place.path)
        yield fd


@contextlib.contextmanager
def _parent(top: int, path: bytes) -> Iterator[tuple[int, bytes]]:
    """The directory in which a path is, and its name there. No link is followed, and no way up."""
    *folders, name = path.split(b"/")
    if {b"", b".", b".."} & {*folders, name}:
        raise CommitError(E.EINVAL, "no path", os.fsdecode(path))
    fd = os.dup(top)
    try:
        for folder in folders:
            deeper = os.open(folder, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = deeper
        yield fd, name
    finally:
        os.close(fd)


def _check(top: int, changes: list[Change]) -> None:
    """Every directory that is not ours to make is there, and lets us write."""
    made = {c.path for c in changes if c.now is not None and c.now.entry.is_dir and _is_new(c)}
    gone = {c.path for c in changes if c.was is not None and c.was.entry.is_dir and _goes(c)}
    for path in sorted(({c.path.rpartition(b"/")[0] for c in changes} | gone) - made):
        with _parent(top, path + b"/x" if path else b"x") as (at, _):
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=at, effective_ids=True):
                raise CommitError(E.EACCES, "no directory to write to", os.fsdecode(path) or ".")


def _is_new(change: Change) -> bool:
    return change.was is None or _of_another_kind(change)


def _goes(change: Change) -> bool:
    return change.now is None or _of_another_kind(change)


class _Stage:
    """New files, by number, in a directory of their own."""

    def __init__(self, at: int, owner: os.stat_result) -> None:
        self._at, self._owner = at, owner
        self._next = 0
        self._first: dict[tuple[int, int], str] = {}  # of what has several names

    def fill(self, changes: list[Change], layers: Iterable[tuple[int, Iterator[Item]]]) -> dict[bytes, str]:
        """Make all that is to be; the names by paths."""
        wanted = {
            (change.now.layer, change.path): change.now.entry
            for change in changes
            if change.now is not None and not change.now.entry.is_dir
        }
        names: dict[bytes, str] = {}
        for number, items in layers:
            for path, _, content in items:
                if (entry := wanted.pop((number, path), None)) is not None:
                    names[path] = self._make(number, entry, content)
        if wanted:
            raise CommitError(E.ESTALE, "not in its layer", os.fsdecode(min(wanted)[1]))
        return names

    def _make(self, layer: int, entry: Entry, content: Iterator[Any]) -> str:
        self._next += 1
        name = str(self._next)
        if entry.number:
            first = self._first.setdefault((layer, entry.number), name)
            if first != name:
                os.link(first, name, src_dir_fd=self._at, dst_dir_fd=self._at, follow_symlinks=False)
                return name
        if entry.is_file:
            self._make_file(name, entry, content)
            return name
        if stat.S_ISLNK(entry.mode):
            os.symlink(entry.target, name, dir_fd=self._at)
        else:
            os.mkfifo(name, 0o600, dir_fd=self._at)
        os.chown(name, self._owner.st_uid, self._owner.st_gid, dir_fd=self._at, follow_symlinks=False)
        if not stat.S_ISLNK(entry.mode):
            os.chmod(name, entry.mode & _KEPT_BITS, dir_fd=self._at)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=self._at, follow_symlinks=False)
        return name

    def _make_file(self, name: str, entry: Entry, content: Iterator[Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=self._at), "wb", buffering=0) as file:
            for offset, data in content:
                os.pwrite(file.fileno(), data, offset)
            os.truncate(file.fileno(), entry.size)
            _set_status(file.fileno(), entry, self._owner)


def _set_status(fd: int, entry: Entry, owner: os.stat_result) -> None:
    """Owner, mode, attributes and times of what is open."""
    os.fchown(fd, owner.st_uid, owner.st_gid)
    os.fchmod(fd, entry.mode & _KEPT_BITS)
    for key, value in entry.user_xattrs().items():
        os.setxattr(fd, key, value)
    os.utime(fd, ns=(entry.mtime, entry.mtime))


# --- the list, which makes it happen ------------------------------------------------------------------


def _steps(changes: list[Change], staged: Mapping[bytes, str]) -> list[dict[str, Any]]:
    """What is to be done, in this order. Each may be done again."""
    changes = sorted(changes, key=lambda change: change.path)
    folders = [c for c in changes if c.now is not None and c.now.entry.is_dir]
    gone = [c for c in changes if c.was is not None and _goes(c)]
    steps: list[dict[str, Any]] = [
        {"do": "remove", "path": c.path, "name": f"gone-{n}"} for n, c in enumerate(gone)
    ]
    steps += [{"do": "mkdir", "path": c.path} for c in folders if _is_new(c)]
    steps += [{"do": "place", "path": path, "name": name} for path, name in sorted(staged.items())]
    steps += [
        {"do": "status", "path": c.path, "mode": c.now.entry.mode, "mtime": c.now.entry.mtime,
         "xattrs": {key.decode("latin1"): value.hex() for key, value in c.now.entry.user_xattrs().items()}}
        for c in reversed(folders) if c.now is not None
    ]  # fmt: skip
    return [{**step, "path": step["path"].decode("latin1")} for step in steps]


def _of_another_kind(change: Change) -> bool:
    """A directory cannot be renamed over."""
    return (
        change.was is not None
        and change.now is not None
        and change.was.entry.is_dir != change.now.entry.is_dir
    )


def _write_list(stage: int, what: dict[str, Any]) -> None:
    _native.syncfs(stage)
    fd = os.open(LIST + ".new", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=stage)
    with open(fd, "w", encoding="ascii") as file:
        json.dump(what, file)
        file.flush()
        os.fsync(fd)
    os.rename(LIST + ".new", LIST, src_dir_fd=stage, dst_dir_fd=stage)
    os.fsync(stage)


# --- after: it has happened, and may be finished by anybody -------------------------------------------


def _finish_left(top: int, identity: str) -> None:
    """The directory may be another user's, who can put something else in our name's place: it has to be one
    that only we can write to."""
    with contextlib.suppress(FileNotFoundError), _opened(STAGE + identity, top) as stage:
        st = os.fstat(stage)
        if st.st_uid != os.geteuid() or st.st_mode & 0o077:
            raise CommitError(E.EPERM, "not made by us", STAGE + identity)
        _finish(top, stage, identity)


def _finish(top: int, stage: int, identity: str) -> None:
    """Do what is on the list, if there is one; then remove it."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(LIST, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stage)
        with open(fd, encoding="ascii") as file:
            what = json.load(file)
        if what["commit"] != identity:
            raise CommitError(E.EPERM, "of another commit", STAGE + identity)
        for step in what["steps"]:
            _do(top, stage, step)
        _native.syncfs(top)
        os.unlink(LIST, dir_fd=stage)
    _native.remove_tree(top, STAGE + identity)


def _do(top: int, stage: int, step: Mapping[str, Any]) -> None:
    path = step["path"].encode("latin1")
    with _parent(top, path) as (at, name):
        match step["do"]:
            case "remove":
                if not _exists(step["name"], stage):  # done before; what is there now has come in its place
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(name, step["name"], src_dir_fd=at, dst_dir_fd=stage)
            case "mkdir":
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=at)
                owner = os.fstat(top)
                os.chown(name, owner.st_uid, owner.st_gid, dir_fd=at, follow_symlinks=False)
            case "place":
                with contextlib.suppress(FileNotFoundError):  # done before
                    os.rename(step["name"], name, src_dir_fd=stage, dst_dir_fd=at)
            case "status":
                with _opened(name, at) as fd:
                    _set_folder(fd, step)


def _exists(name: str, at: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        os.stat(name, dir_fd=at, follow_symlinks=False)
        return True
    return False


def _set_folder(fd: int, step: Mapping[str, Any]) -> None:
    xattrs = {key.encode("latin1"): bytes.fromhex(value) for key, value in step["xattrs"].items()}
    about = os.fstat(fd)
    _set_status(fd, Entry(step["mode"], 0, 0, mtime=step["mtime"], xattrs=xattrs), about)
    if about.st_mode & 0o6000:  # the host's own
        os.fchmod(fd, step["mode"] & _KEPT_BITS | about.st_mode & 0o6000)
