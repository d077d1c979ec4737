"""Layers as streams of entries (csrc/pack.c), and what they are on top of each other."""

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from sandboxcore import _native
from sandboxcore.spawner import Spawner

ENTER, LEAVE, OTHER, LINK, DATA = (
    _native.constant(f"ENTRY_{name}") for name in ("ENTER", "LEAVE", "OTHER", "LINK", "DATA")
)
OPAQUE = b"user.overlay.opaque"
OVERLAYFS = b"user.overlay."
PIPE_SIZE = 1 << 20

_ENTRY = _native.Header("struct sbx_entry")
_SIZE = struct.Struct("=I")


class BrokenStream(ValueError):
    """A stream of entries that is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a layer: what stat(2) says, with ids as outside; ``number`` of what has several names,
    else 0; ``mtime`` in nanoseconds since the epoch."""

    mode: int
    uid: int
    gid: int
    size: int = 0
    mtime: int = 0
    number: int = 0
    device: int = 0
    target: bytes = b""
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def hides(self) -> bool:
        """Whether it says that there is nothing: a whiteout."""
        return stat.S_ISCHR(self.mode) and self.device == 0

    @property
    def opaque(self) -> bool:
        """Whether it is a directory that shows nothing of what lies below."""
        return self.is_dir and self.xattrs.get(OPAQUE) == b"y"

    def own_xattrs(self) -> dict[bytes, bytes]:
        """Without overlayfs's."""
        return {name: value for name, value in self.xattrs.items() if not name.startswith(OVERLAYFS)}

    def user_xattrs(self) -> dict[bytes, bytes]:
        """What means the same elsewhere; an ACL has ids."""
        return {name: value for name, value in self.own_xattrs().items() if name.startswith(b"user.")}


class Extent(NamedTuple):
    """A part of a file's content; the rest is zeroes."""

    offset: int
    data: bytes


class Item(NamedTuple):
    """An entry, the path to it in its layer (``b"u0/dir/name"``), and what is in it, to be read before the
    next item."""

    path: bytes
    entry: Entry
    content: Iterator[Extent]


# --- from the spawner ---------------------------------------------------------------------------------


class _Reader:
    """Entries one by one, with the header of the next one."""

    CHUNK = 1 << 18

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.next()

    def exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise BrokenStream("it ends too early")
        return data

    def next(self) -> None:
        self.head = dict(zip(_ENTRY.names, _ENTRY.unpack(self.exactly(_ENTRY.size)), strict=True))

    def texts(self) -> tuple[bytes, Entry]:
        """The name and everything else of an entry."""
        head = self.head
        name, target = self.exactly(head["name"]), self.exactly(head["target"])
        entry = Entry(
            mode=head["mode"],
            uid=head["uid"],
            gid=head["gid"],
            size=head["size"],
            mtime=head["mtime"] * 10**9 + head["mtime_ns"],
            number=head["ino"],
            device=head["rdev"],
            target=target,
            xattrs=_parsed(self.exactly(head["xattrs"])),
        )
        return name, entry

    def content(self) -> Iterator[Extent]:
        while self.head["kind"] == DATA:
            offset, left = self.head["offset"], self.head["size"]
            while left:
                data = self.exactly(min(left, self.CHUNK))
                yield Extent(offset, data)
                offset, left = offset + len(data), left - len(data)
            self.next()


def _parsed(data: bytes) -> dict[bytes, bytes]:
    found, at = {}, 0
    while at < len(data):
        end = data.index(0, at)
        (size,) = _SIZE.unpack_from(data, end + 1)
        start = end + 1 + _SIZE.size
        found[data[at:end]] = data[start : start + size]
        at = start + size
    return found


def parse(file: BinaryIO) -> Iterator[Item]:
    """The items of one layer, but for its own directory and overlayfs's working directories. Raises
    BrokenStream."""
    reader = _Reader(file)
    path: list[bytes] = []
    depth = 0
    while True:
        if reader.head["kind"] == LEAVE:
            depth -= 1
            if depth == 0:
                return
            path.pop()
            reader.next()
            continue
        directory = reader.head["kind"] == ENTER
        name, entry = reader.texts()
        reader.next()
        content = reader.content()
        if depth:
            full = b"/".join((*path, name))
            if full.startswith(b"u"):
                yield Item(full, entry, content)
        for _ in content:  # what nobody wanted
            pass
        if directory:
            depth += 1
            if depth > 1:
                path.append(name)


def read_layer(keeper: Spawner, number: int, *, content: bool) -> Iterator[Item]:
    """The items of a layer of the shelf. Raises NativeFailure, BrokenStream."""
    with ExitStack() as stack:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        file = stack.enter_context(open(ours, "rb", buffering=PIPE_SIZE))
        try:
            answer = stack.enter_context(keeper.stream("PACK", number, theirs, int(content)))
        finally:
            os.close(theirs)
        try:
            yield from parse(file)
        except BrokenStream:
            keeper.concluded(answer)  # raises what was wrong there
            raise
        keeper.concluded(answer)


class Digest:
    """The SHA-256 of what is in a file, with zeroes where nothing is."""

    def __init__(self) -> None:
        self._hash, self._at = hashlib.sha256(), 0

    def add(self, extent: Extent) -> None:
        """The next part."""
        self._skip_to(extent.offset)
        self._hash.update(extent.data)
        self._at += len(extent.data)

    def hexdigest(self, size: int) -> str:
        """Of a file of this size."""
        self._skip_to(size)
        return self._hash.hexdigest()

    def _skip_to(self, end: int) -> None:
        zeroes = bytes(min(end - self._at, PIPE_SIZE)) if end > self._at else b""
        while self._at < end:
            self._hash.update(zeroes[: end - self._at])
            self._at += min(len(zeroes), end - self._at)


# --- to the spawner -----------------------------------------------------------------------------------


class Writer:
    """Entries in the order of a tree, as the spawner wants them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def put(
        self, kind: int, name: bytes = b"", entry: Entry | None = None, *, size: int = 0, offset: int = 0
    ) -> None:
        """One entry."""
        values = {"kind": kind, "size": size, "offset": offset, "name": len(name)}
        tail = name
        if entry is not None:
            xattrs = b"".join(
                key + b"\0" + _SIZE.pack(len(value)) + value for key, value in entry.xattrs.items()
            )
            values |= {
                "mode": entry.mode,
                "uid": entry.uid,
                "gid": entry.gid,
                "ino": entry.number,
                "size": entry.size,
                "mtime": entry.mtime // 10**9,
                "mtime_ns": entry.mtime % 10**9,
                "rdev": entry.device,
                "target": len(entry.target),
                "xattrs": len(xattrs),
            }
            tail += entry.target + xattrs
        self._file.write(_ENTRY.pack(values) + tail)

    def data(self, offset: int, data: bytes) -> None:
        """A part of the file that was put last."""
        self.put(DATA, size=len(data), offset=offset)
        self._file.write(data)


# --- one on top of the other --------------------------------------------------------------------------


class Found(NamedTuple):
    """What a path is in some layers together, and the number of the one that has it."""

    entry: Entry
    layer: int


def merged(layers: Sequence[tuple[int, Iterable[tuple[bytes, Entry]]]]) -> dict[bytes, Found]:
    """What layers are together, numbers and paths with entries, the topmost first. Whiteouts stay, for
    something may lie below all of them. A directory is opaque where one of them says so."""
    tree: dict[bytes, Found] = {}
    for number, items in reversed(layers):
        for path, entry in items:
            below = tree.get(path)
            if below is not None and (not entry.is_dir or entry.opaque or not below.entry.is_dir):
                _cut(tree, path)
            hides = below is not None and (below.entry.hides or below.entry.opaque)
            tree[path] = Found(_made_opaque(entry) if hides and entry.is_dir else entry, number)
    return tree


def _made_opaque(entry: Entry) -> Entry:
    return Entry(
        mode=entry.mode, uid=entry.uid, gid=entry.gid, mtime=entry.mtime,
        xattrs={**entry.xattrs, OPAQUE: b"y"},
    )  # fmt: skip


def _cut(tree: dict[bytes, Found], path: bytes) -> None:
    prefix = path + b"/"
    for other in [key for key in tree if key == path or key.startswith(prefix)]:
        del tree[other]
