"""Snapshots as tar files: :meth:`Snapshot.export`, :meth:`Snapshot.load`.

``manifest.json`` is the last member; below ``files/`` lies what the layers have, together, with owners as
inside the sandbox, by its path there. The manifest has a hash of every file, and what tar has no word for:
paths that the layers remove, and directories that show nothing of what lies below.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from sandboxcore.errors import ArchiveError
from sandboxcore.packing import (
    ENTER,
    LEAVE,
    LINK,
    OPAQUE,
    OTHER,
    OVERLAYFS,
    Digest,
    Entry,
    Extent,
    Found,
    Item,
    Writer,
)
from sandboxcore.plan import Overlay

FORMAT, VERSION = "sandboxcore-snapshot", 1
MANIFEST, FILES = "manifest.json", "files"
BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 16
PAGE = 4096  # what a file of any size takes in memory
_XATTR = "SCHILY.xattr."
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


class IdMap:
    """Numbers of users or groups inside a sandbox, and outside: the text of uid_map(5)."""

    def __init__(self, text: str) -> None:
        numbers = [int(word) for word in text.split()]
        self._rows = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))

    def inside(self, number: int) -> int:
        """65534 for one that is nobody inside."""
        for first, outside, count in self._rows:
            if outside <= number < outside + count:
                return first + number - outside
        return 65534

    def outside(self, number: int) -> int:
        """Where there is one id only, that one. Raises ArchiveError for what the sandbox does not have."""
        if len(self._rows) == 1 and self._rows[0][2] == 1:
            return self._rows[0][1]
        for first, outside, count in self._rows:
            if first <= number < first + count:
                return outside + number - first
        raise ArchiveError(f"id {number}: the sandbox has no such")


# --- out ----------------------------------------------------------------------------------------------


class Names:
    """Where things are in an archive."""

    def __init__(self, overlays: Iterable[Overlay], ids: tuple[str, str]) -> None:
        """``ids``: the sandbox's uid_map and gid_map."""
        overlays = tuple(overlays)
        self.tops = {overlay.target: b"u%d" % overlay.index for overlay in overlays}
        self.uids, self.gids = map(IdMap, ids)
        self._targets = {top: target for target, top in self.tops.items()}

    def __call__(self, path: bytes) -> str | None:
        """The name of a path in a layer; None for what does not belong in an archive."""
        top, _, rest = path.partition(b"/")
        if top not in self._targets:
            return None
        inside = os.path.join(self._targets[top], os.fsdecode(rest)).rstrip("/")
        return None if rest and inside in self.tops else FILES + inside  # the other overlay has it


def export(
    tar: tarfile.TarFile,
    tree: Mapping[bytes, Found],
    layers: Iterable[tuple[int, Iterator[Item]]],
    names: Names,
) -> None:
    """``tree``: what the layers are together; ``layers``: their numbers, and their items with content.
    Sockets are left out."""
    known = {path: name for path in tree if (name := names(path)) is not None}
    hashes: dict[str, str] = {}
    for path, name in sorted(known.items()):
        if tree[path].entry.is_dir:
            tar.addfile(_info(name, tree[path].entry, names))
    first: dict[tuple[int, int], str] = {}
    for number, items in layers:
        for path, entry, content in items:
            here = tree.get(path)
            wanted = here is not None and here.layer == number and path in known
            if not wanted or entry.is_dir or entry.hides or stat.S_IFMT(entry.mode) not in _TYPES:
                continue
            info = _info(known[path], entry, names)
            if entry.number and (other := first.setdefault((number, entry.number), info.name)) != info.name:
                info.type, info.linkname, info.size = tarfile.LNKTYPE, other, 0
                tar.addfile(info)
            elif entry.is_file:
                hashes[info.name] = _add_file(tar, info, entry, content)
            else:
                tar.addfile(info)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "overlays": sorted(names.tops),
        "sha256": hashes,
        "removed": sorted(name for path, name in known.items() if tree[path].entry.hides),
        "opaque": sorted(name for path, name in known.items() if tree[path].entry.opaque),
    }
    data = json.dumps(manifest, indent=1).encode()
    info = tarfile.TarInfo(MANIFEST)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _info(name: str, entry: Entry, names: Names) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = _TYPES[stat.S_IFMT(entry.mode)]
    info.mode = stat.S_IMODE(entry.mode)
    info.uid, info.gid = names.uids.inside(entry.uid), names.gids.inside(entry.gid)
    info.size = entry.size
    info.linkname = os.fsdecode(entry.target)
    info.mtime = entry.mtime / 10**9
    info.pax_headers = {
        _XATTR + os.fsdecode(key): value.decode("utf-8", "surrogateescape")
        for key, value in entry.user_xattrs().items()
    }
    if entry.mtime % 10**9:
        info.pax_headers["mtime"] = f"{entry.mtime // 10**9}.{entry.mtime % 10**9:09}"
    return info


def _add_file(tar: tarfile.TarFile, info: tarfile.TarInfo, entry: Entry, content: Iterator[Extent]) -> str:
    """A file as it is, or, with holes, in the form that GNU tar has for that (sparse format 1.0)."""
    with tempfile.TemporaryFile() as spool:
        extents, digest = _spooled(content, spool, entry.size)
        spool.seek(0)
        if sum(size for _, size in extents) == entry.size:
            tar.addfile(info, spool)
            return digest
        if not extents or sum(extents[-1]) != entry.size:
            extents.append((entry.size, 0))  # GNU tar goes by where the last one ends
        rows = [len(extents), *(number for extent in extents for number in extent)]
        text = b"".join(b"%d\n" % row for row in rows)
        text += bytes(-len(text) % BLOCK)
        info.pax_headers = {
            **info.pax_headers,
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": info.name,
            "GNU.sparse.realsize": str(entry.size),
        }
        info.size = len(text) + sum(size for _, size in extents)
        tar.addfile(info, _Chain(text, spool))
        return digest


class _Chain(io.RawIOBase):
    """Some bytes and then a file."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start, self._rest = io.BytesIO(start), rest

    def read(self, size: int = -1) -> bytes:
        return self._start.read(size) or self._rest.read(size)


def _spooled(content: Iterator[Extent], spool: BinaryIO, size: int) -> tuple[list[tuple[int, int]], str]:
    """Copies what there is; returns where it belongs, neighbours joined, and the hash with the holes."""
    digest, extents = Digest(), list[tuple[int, int]]()
    for extent in content:
        offset, data = extent
        if extents and sum(extents[-1]) == offset:
            extents[-1] = (extents[-1][0], extents[-1][1] + len(data))
        else:
            extents.append((offset, len(data)))
        digest.add(extent)
        spool.write(data)
    return extents, digest.hexdigest(size)


# --- in -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Place:
    """A name in a tree that is being put together: its entry, the member it comes from, what is in it."""

    entry: Entry | None = None
    member: tarfile.TarInfo | None = None
    inside: dict[bytes, "Place"] = field(default_factory=dict)


class Archive:
    """An exported archive that is about to be loaded: all of it has been looked at but for what is in files.
    Raises ArchiveError, OSError."""

    def __init__(self, file: BinaryIO, names: Names) -> None:
        self._file = file
        try:
            self._tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  # it closes nothing
            self._read(self._tar.getmembers(), names)
        except (tarfile.TarError, EOFError, UnicodeError, OverflowError) as error:
            raise ArchiveError(f"not an archive of a snapshot, or not all of it: {error}") from error

    def _read(self, members: list[tarfile.TarInfo], names: Names) -> None:
        manifest = _manifest(self._tar, members)
        if sorted(manifest["overlays"]) != sorted(names.tops):
            raise ArchiveError(f"of a sandbox with other overlays: {', '.join(manifest['overlays'])}")
        self._hashes: dict[str, str] = manifest["sha256"]
        self._names = names
        self._owner = names.uids.outside(0), names.gids.outside(0)
        self._root = Place(Entry(stat.S_IFDIR | 0o700, *self._owner))
        for top in names.tops.values():
            self._root.inside[top] = Place(Entry(stat.S_IFDIR | 0o755, *self._owner))
        placed: dict[str, Place] = {}
        for number, member in enumerate(members[:-1], 1):
            placed[member.name] = self._place(member, placed, number)
        for path in manifest["removed"]:
            place = self._find(path)
            if place.entry is not None:
                raise ArchiveError(f"{path}: removed, and there")
            place.entry = Entry(stat.S_IFCHR, *self._owner)
        for path in manifest["opaque"]:
            place = placed.get(path, Place())
            if place.entry is None or not place.entry.is_dir:
                raise ArchiveError(f"{path}: opaque, and no directory")
            place.entry = replace(place.entry, xattrs={**place.entry.xattrs, OPAQUE: b"y"})

    @property
    def room(self) -> int:
        """So many bytes of memory are enough for it."""
        files = (member.size for member in self._tar.getmembers() if not member.issparse())
        return sum(-(-size // PAGE) * PAGE for size in files) + self._file.seek(0, os.SEEK_END)

    def write(self, writer: Writer) -> None:
        """Put it to a writer, depth first; whichever name of a file comes first has the content. Raises
        ArchiveError, OSError."""
        todo: list[tuple[bytes, Place | None]] = [(b"", self._root)]
        written: set[int] = set()
        while todo:
            name, place = todo.pop()
            if place is None:
                writer.put(LEAVE)
                continue
            entry = place.entry
            if entry is None:
                raise ArchiveError(f"{os.fsdecode(name)!r}: a directory that is not in it")
            if entry.is_dir:
                writer.put(ENTER, name, entry)
                todo += [(b"", None), *sorted(place.inside.items(), reverse=True)]
                continue
            again = entry.number in written
            if entry.number:
                written.add(entry.number)
            writer.put(LINK if again else OTHER, name, entry)
            if place.member is not None and entry.is_file and not again:
                self._write_content(writer, place.member)

    def _write_content(self, writer: Writer, member: tarfile.TarInfo) -> None:
        """Zeroes become holes."""
        file, digest, at = self._tar.extractfile(member), hashlib.sha256(), 0
        assert file is not None
        with contextlib.closing(file):
            while data := file.read(CHUNK):
                digest.update(data)
                if data.count(0) != len(data):
                    writer.data(at, data)
                at += len(data)
        if self._hashes.get(member.name) != digest.hexdigest():
            raise ArchiveError(f"{member.name!r}: not what the manifest says")

    def _find(self, name: str) -> Place:
        """The place of a path; directories above it have to be there."""
        path = PurePosixPath(_checked(name).removeprefix(FILES) or "/")
        target = max((t for t in self._names.tops if path.is_relative_to(t)), key=len, default=None)
        if target is None:
            raise ArchiveError(f"{name!r}: in no overlay of the sandbox")
        place = self._root.inside[self._names.tops[target]]
        for part in path.relative_to(target).parts:
            if place.entry is None or not place.entry.is_dir:
                raise ArchiveError(f"{name!r}: what lies above it is no directory")
            place = place.inside.setdefault(os.fsencode(part), Place())
        return place

    def _place(self, member: tarfile.TarInfo, placed: Mapping[str, Place], number: int) -> Place:
        place = self._find(member.name)
        if place.entry is not None and not (place.entry.is_dir and member.isdir() and place.member is None):
            raise ArchiveError(f"{member.name!r}: twice")
        if member.islnk():
            original = placed.get(member.linkname)
            if original is None or original.entry is None or original.entry.is_dir:
                raise ArchiveError(f"{member.name!r}: a link to {member.linkname!r}, which is not there")
            if not original.entry.number:
                original.entry = replace(original.entry, number=number)
            place.entry, place.member = original.entry, original.member
            return place
        kind = tarfile.REGTYPE if member.isreg() else member.type
        if kind not in _TYPES.values():
            raise ArchiveError(f"{member.name!r}: a device, or what else may not be in a snapshot")
        mode = next(mode for mode, other in _TYPES.items() if other == kind)
        place.member = member
        place.entry = Entry(
            mode=mode | (member.mode & 0o7777),
            uid=self._names.uids.outside(member.uid),
            gid=self._names.gids.outside(member.gid),
            size=member.size if member.isreg() else 0,
            mtime=_nanoseconds(member),
            target=os.fsencode(member.linkname) if member.issym() else b"",
            xattrs=_xattrs(member),
        )
        if wrong := _wrong(os.fsencode(member.name), place.entry):
            raise ArchiveError(f"{member.name!r}: {wrong}")
        return place


def _manifest(tar: tarfile.TarFile, members: list[tarfile.TarInfo]) -> dict[str, Any]:
    if not members or members[-1].name != MANIFEST or not members[-1].isreg():
        raise ArchiveError(f"it does not end with {MANIFEST}: no snapshot, or not all of it")
    file = tar.extractfile(members[-1])
    assert file is not None
    try:
        manifest: dict[str, Any] = json.loads(file.read(1 << 30))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ArchiveError(
                f"format {manifest['format']} {manifest['version']}: only {FORMAT} {VERSION} is known"
            )
        texts = [text for key in ("overlays", "removed", "opaque") for text in [*manifest[key]]]
        texts += [text for item in manifest["sha256"].items() for text in item]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArchiveError):
            raise
        raise ArchiveError(f"{MANIFEST} is broken") from error
    return manifest


def _checked(name: str) -> str:
    """A path below files/, without ways up. Raises ArchiveError."""
    parts = name.split("/")
    if parts[0] != FILES or "" in parts or "." in parts or ".." in parts or "\0" in name:
        raise ArchiveError(f"{name!r}: no path in a snapshot")
    return name


def _nanoseconds(member: tarfile.TarInfo) -> int:
    whole, _, part = str(member.pax_headers.get("mtime", int(member.mtime))).partition(".")
    return int(whole) * 10**9 + int((part + "000000000")[:9])


def _wrong(name: bytes, entry: Entry) -> str:
    """What no file system takes, or no message of ours."""
    pairs = entry.xattrs.items()
    return next(
        (
            what
            for what, wrong in (
                ("a name of more than 255 bytes", len(name.rpartition(b"/")[2]) > 255),
                ("a link to more than 4095 bytes", len(entry.target) > 4095),
                ("no size", not 0 <= entry.size < 1 << 62),
                ("no time", not -(1 << 62) < entry.mtime < 1 << 62),
                ("large attributes", sum(len(key) + len(value) + 8 for key, value in pairs) > 1 << 16),
                ("the name of an attribute", any(len(key) > 255 or b"\0" in key for key, _ in pairs)),
            )
            if wrong
        ),
        "",
    )


def _xattrs(member: tarfile.TarInfo) -> dict[bytes, bytes]:
    """Only those of users, and not overlayfs's."""
    wanted = {
        os.fsencode(key.removeprefix(_XATTR)): value.encode("utf-8", "surrogateescape")
        for key, value in member.pax_headers.items()
        if key.startswith(_XATTR + "user.")
    }
    return {name: value for name, value in wanted.items() if not name.startswith(OVERLAYFS)}
