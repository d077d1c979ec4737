"""What differs between the files of two moments, path by path: :meth:`Snapshot.diff`."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sandboxcore.packing import Entry, Found

Tree = Mapping[bytes, Found]


@dataclass(frozen=True, slots=True)
class FileChange:
    """One path that differs.

    path: inside the sandbox. kind: "added", "changed" or "removed"; of a directory that was removed there is
    one change, of one that was added one for everything in it. type: what it is, or was: "file", "dir",
    "link", "fifo", "socket"; old_type: what it was, or None. size, old_size: in bytes, of files; None where
    there is, or was, none.
    """

    path: str
    kind: Literal["added", "changed", "removed"]
    type: str
    old_type: str | None
    size: int | None
    old_size: int | None


class Base:
    """What lies below all layers of one overlay: directories of the host, the topmost first, and names that
    the sandbox's root has anyway."""

    def __init__(self, directories: Sequence[str], nodes: Mapping[bytes, Entry]) -> None:
        self._directories = [os.fsencode(path) for path in directories]
        self._nodes = nodes

    def stat(self, path: bytes) -> Entry | None:
        """What is there; None where nothing is. Raises OSError."""
        for directory in self._directories:
            entry = _host_entry(directory, path)
            if entry is not None:
                return None if entry.hides else entry
        return self._nodes.get(path)

    def digest(self, path: bytes) -> str | None:
        """Of what is in a file there; None where that cannot be read."""
        for directory in self._directories:
            if _host_entry(directory, path) is not None:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                with (
                    contextlib.suppress(OSError),
                    open(os.open(directory + b"/" + path, flags), "rb") as file,
                ):
                    return hashlib.file_digest(file, "sha256").hexdigest()
                return None
        return None

    def names(self, path: bytes) -> set[bytes]:
        """What a directory there contains. Raises OSError."""
        found: set[bytes] = set()
        for directory in reversed(self._directories):
            entry = _host_entry(directory, path)
            if entry is not None and not entry.is_dir:
                found = set()
            elif entry is not None:
                found |= set(os.listdir(os.path.join(directory, path)))
        found |= {name.rpartition(b"/")[2] for name in self._nodes if name.rpartition(b"/")[0] == path}
        return {name for name in found if self.stat(joined(path, name)) is not None}


def _host_entry(directory: bytes, path: bytes) -> Entry | None:
    """Not through any link. A whiteout, too, for what one of them hides."""
    parts = path.split(b"/")
    for end in range(1, len(parts)):
        above = _lstat(os.path.join(directory, *parts[:end]))
        if above is None:
            return None
        if not above.is_dir:
            return Entry(stat.S_IFCHR, 0, 0)
    return _lstat(os.path.join(directory, path))


def _lstat(path: bytes) -> Entry | None:
    try:
        st = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    target = os.readlink(path) if stat.S_ISLNK(st.st_mode) else b""
    size = st.st_size if stat.S_ISREG(st.st_mode) else 0
    return Entry(st.st_mode, st.st_uid, st.st_gid, size, st.st_mtime_ns, device=st.st_rdev, target=target)


def joined(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


class View:
    """The files of one overlay at one moment."""

    def __init__(self, tree: Tree, base: Base, covers: Iterable[bytes] = ()) -> None:
        """``tree``: what its layers are together, with paths in the overlay. ``covers``: paths there at which
        something else is mounted, so that they are not there."""
        self.tree, self._base, self._covers = tree, base, frozenset(covers)
        self._inside: dict[bytes, set[bytes]] = {}
        for path in tree:
            folder, _, name = path.rpartition(b"/")
            if name:
                self._inside.setdefault(folder, set()).add(name)

    def stat(self, path: bytes) -> Found | None:
        """What is there, and in which layer: 0 for none of them."""
        if path in self._covers:
            return None
        if (found := self.tree.get(path)) is not None:
            return None if found.entry.hides else found
        if self.cut_off(path.rpartition(b"/")[0]):
            return None
        entry = self._base.stat(path)
        return None if entry is None else Found(entry, 0)

    def cut_off(self, folder: bytes) -> bool:
        """Whether a directory shows nothing of what lies below all layers: it, or one above."""
        parts = folder.split(b"/") if folder else []
        for end in range(len(parts) + 1):
            above = self.tree.get(b"/".join(parts[:end]))
            if above is not None and (not above.entry.is_dir or above.entry.opaque):
                return True
        return False

    def names(self, folder: bytes) -> set[bytes]:
        """What a directory contains."""
        found = set(self._inside.get(folder, ()))
        if not self.cut_off(folder):
            found |= self._base.names(folder)
        return {name for name in found if self.stat(joined(folder, name)) is not None}


def compare(old: View, new: View) -> list[tuple[bytes, Found | None, Found | None]]:
    """Every path that differs, what it was and what it is; sorted. What is in a directory that was removed is
    left out. Two copies of a file are taken to differ: :func:`may_be_same`."""
    todo = {path for path in (*old.tree, *new.tree) if path}
    if old.cut_off(b"") != new.cut_off(b""):
        todo |= old.names(b"") | new.names(b"")
    done: set[bytes] = set()
    found = []
    while todo:
        path = todo.pop()
        done.add(path)
        was, now = old.stat(path), new.stat(path)
        if now is not None and now.entry.is_dir:
            todo |= {joined(path, name) for name in _to_look_at(old, new, path, was)} - done
        if _differs(was, now) and not (now is None and _gone_above(new, path)):
            found.append((path, was, now))
    return sorted(found, key=lambda one: one[0])


def may_be_same(was: Found | None, now: Found | None) -> bool:
    """Whether these are two copies of a file of which only the content can say whether they differ."""
    if was is None or now is None or was.layer == now.layer or not now.entry.is_file:
        return False
    return not _differs(was, now, copies=False)


def _to_look_at(old: View, new: View, path: bytes, was: Found | None) -> set[bytes]:
    """Names in a directory that may differ without being in any layer: one of them does not show what lies
    below."""
    if was is None or not was.entry.is_dir:
        return new.names(path)
    if old.cut_off(path) != new.cut_off(path):
        return old.names(path) | new.names(path)
    return set()


def _gone_above(view: View, path: bytes) -> bool:
    parent = path.rpartition(b"/")[0]
    above = view.stat(parent) if parent else None
    return bool(parent) and (above is None or not above.entry.is_dir)


def _differs(was: Found | None, now: Found | None, *, copies: bool = True) -> bool:
    """``copies``: whether two copies of a file do."""
    if was is None or now is None:
        return was is not now
    a, b = was.entry, now.entry
    if a.mode != b.mode or a.target != b.target:
        return True
    if a.is_file and ((a.size, a.mtime) != (b.size, b.mtime) or (copies and was.layer != now.layer)):
        return True
    # owners of what lies below are the host's, and nobody can change them there
    below = not was.layer or not now.layer
    return not below and (a.uid, a.gid, a.own_xattrs()) != (b.uid, b.gid, b.own_xattrs())


_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def _type(found: Found) -> str:
    return _TYPES.get(stat.S_IFMT(found.entry.mode), "device")


def described(target: str, path: bytes, was: Found | None, now: Found | None) -> FileChange:
    """As the caller sees it. ``target``: where the overlay is."""
    one = now or was
    assert one is not None
    return FileChange(
        path=os.path.join(target, os.fsdecode(path)),
        kind="added" if was is None else "removed" if now is None else "changed",
        type=_type(one),
        old_type=None if was is None else _type(was),
        size=now.entry.size if now is not None and now.entry.is_file else None,
        old_size=was.entry.size if was is not None and was.entry.is_file else None,
    )
