"""Unpacks a tar archive that nobody vouches for into an empty directory, as a layer for overlayfs.

Every name is walked from the directory's descriptor, part by part, and no link is ever followed; every file
is made anew. So nothing in an archive can lead out of the directory, whatever it was made for.
"""

import errno as E
import itertools
import os
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from sandboxcore.errors import SandboxError, SpecError, UnsupportedHost
from sandboxcore.tarstream import FULL, TarStream

Parts = tuple[bytes, ...]
T = TypeVar("T")

MAX_BYTES, MAX_ENTRIES = 16 << 30, 1_000_000  # usual bounds
MAX_DEPTH = 256
MAX_PATH = 4095
MAX_ID = 65535  # as many as are mapped
NOBODY = 65534
MAX_SKIPPED = 100  # names kept of what was left out
WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
SUPPORTED = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, *tarfile.REGULAR_TYPES)
LEFT_OUT = {tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device", tarfile.FIFOTYPE: "fifo"}


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much an archive may become: bytes, of the archive unpacked and of its files with their holes;
    entries, with the directories that only a path mentions."""

    bytes: int = MAX_BYTES
    entries: int = MAX_ENTRIES


@dataclass(slots=True)
class Contents:
    """What was unpacked. ``opaque``: nothing of the layers below is to be seen. ``skipped``: what was left
    out, and why; the first hundred of ``skips``."""

    diff_id: str = ""
    entries: int = 0
    bytes: int = 0
    opaque: bool = False
    skips: int = 0
    skipped: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Attributes:
    mode: int = 0o755
    mtime: int | None = None
    owner: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def unpack(stream: TarStream, root: int, bounds: Bounds, *, owners: bool) -> Contents:
    """Unpack into the directory with descriptor ``root``; with ``owners``, what is in it belongs to whom the
    archive says, else to the caller.

    Raises :class:`SpecError` for what is wrong with the archive, :class:`UnsupportedHost` for what the file
    system cannot hold, :class:`SandboxError` where it fails. What is in the directory then is to be
    removed."""
    unpacker = _Unpacker(stream, root, bounds, owners=owners)
    try:
        for member, pieces in stream.members():
            unpacker.add(member, pieces)
        unpacker.finish()
    except OSError as error:
        raise SandboxError(f"{stream.what}: {unpacker.now}: {error.strerror}") from error
    finally:
        unpacker.close()
    unpacker.contents.diff_id = f"sha256:{stream.digest.hexdigest()}"
    return unpacker.contents


class _Unpacker:
    def __init__(self, stream: TarStream, root: int, bounds: Bounds, *, owners: bool) -> None:
        self.stream, self.bounds, self.owners = stream, bounds, owners
        self.contents = Contents()
        self.now = "unpacking"
        self._at: Parts = ()
        self._fds = [root]  # of the directories on the way to the one that is worked in
        self._directories: dict[Parts, _Attributes] = {(): _Attributes()}
        self._whiteouts: dict[Parts, None] = {}

    def close(self) -> None:
        """Let go of the directories last used."""
        self._leave(0)

    @property
    def _fd(self) -> int:
        return self._fds[-1]

    def add(self, member: tarfile.TarInfo, pieces: list[tuple[int, int]]) -> None:
        """One member. The later of two with one name replaces the other."""
        self.now = repr(member.name)
        path = self._path(member.name)
        if not member.isdir() or path in self._directories:  # a new one is counted where it is made
            self._count(member.size if member.isreg() else 0)
        if path and path[-1].startswith(WHITEOUT):
            self._mark(path)
        elif member.type in LEFT_OUT:
            # The sandbox has its own /dev, and two with one root could talk through a fifo.
            self._skip(f"{member.name}: {LEFT_OUT[member.type]}")
        elif member.type not in SUPPORTED:
            raise self._refuse(f"of a kind that is not known: {member.type!r}")
        elif member.isdir():
            self._enter(path)
            self._directories[path] = self._attributes(member)
        elif not path:
            raise self._refuse("the root is a directory")
        elif member.isreg():
            self._make_file(path, member, pieces)
        elif member.issym():
            self._make_link(path, member)
        else:
            self._link(path, self._path(member.linkname))

    def finish(self) -> None:
        """What can only be done when all is there: whiteouts, and the attributes of directories."""
        for path in self._whiteouts:
            self.now = repr(os.fsdecode(b"/".join(path)))
            self._white_out(path)
        del self._directories[()]  # the layers' root is under the sandbox's own
        self.now = "directories"
        # A mode may take the right to enter: the deepest first.
        for path in sorted(self._directories, key=len, reverse=True):
            self._enter(path)
            self._set(self._fd, self._directories[path], stat.S_ISVTX | 0o777)

    # --- names ------------------------------------------------------------------------------------

    def _refuse(self, why: str) -> SpecError:
        return self.stream.refuse(f"{self.now}: {why}")

    def _path(self, name: str) -> Parts:
        """Relative to the root, with a slash at the beginning or without."""
        raw = name.encode("utf-8", "surrogateescape")
        parts = tuple(part for part in raw.split(b"/") if part not in (b"", b"."))
        if b".." in parts:
            raise self._refuse(f"a path with '..': {name!r}")
        if b"\0" in raw or len(raw) > MAX_PATH or len(parts) > MAX_DEPTH or any(len(p) > 255 for p in parts):
            raise self._refuse("no path, or one that is too long or too deep")
        return parts

    def _enter(self, path: Parts, *, make: bool = True) -> None:
        """Make a directory the one that is worked in, with those above it."""
        if path == self._at:
            return
        pairs = zip(path, self._at, strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._leave(common)
        for depth in range(common, len(path)):
            self._fds.append(self._step(path[: depth + 1], make=make))
            self._at = path[: depth + 1]

    def _leave(self, depth: int) -> None:
        while len(self._at) > depth:
            self._at = self._at[:-1]
            os.close(self._fds.pop())

    def _step(self, path: Parts, *, make: bool) -> int:
        name = path[-1]
        if make and path not in self._directories:
            self._count(0)
            try:
                os.mkdir(name, 0o700, dir_fd=self._fd)
            except FileExistsError:
                raise self._refuse(f"{os.fsdecode(name)!r} is no directory") from None
            self._directories[path] = _Attributes()
        how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, how, dir_fd=self._fd)
        except OSError as error:
            if error.errno not in (E.ENOENT, E.ENOTDIR, E.ELOOP):
                raise
            raise self._refuse(f"{os.fsdecode(name)!r} is no directory") from None

    def _make(self, path: Parts, make: Callable[[bytes, int], T]) -> T:
        """Have something made, by name and the directory's descriptor, in place of what has the name."""
        if path in self._directories:
            raise self._refuse("a directory of that name came before")
        self._enter(path[:-1])
        try:
            return make(path[-1], self._fd)
        except FileExistsError:
            os.unlink(path[-1], dir_fd=self._fd)
            return make(path[-1], self._fd)

    # --- one of each kind -------------------------------------------------------------------------

    def _make_file(self, path: Parts, member: tarfile.TarInfo, pieces: list[tuple[int, int]]) -> None:
        attributes = self._attributes(member)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = self._make(path, lambda name, at: os.open(name, flags, 0o600, dir_fd=at))
        try:
            for offset, size in pieces:
                self._fill(fd, offset, size)
            if getattr(member, "sparse", None) is not None:
                os.ftruncate(fd, member.size)
            self._set(fd, attributes, 0o777)
        finally:
            os.close(fd)

    def _fill(self, fd: int, offset: int, size: int) -> None:
        end = offset + size
        while offset < end:
            data = self.stream.take(end - offset)
            if not data:
                raise self._refuse("cut off")
            while data:
                count = os.pwrite(fd, data, offset)
                data, offset = data[count:], offset + count

    def _make_link(self, path: Parts, member: tarfile.TarInfo) -> None:
        target = member.linkname.encode("utf-8", "surrogateescape")
        if not target or b"\0" in target or len(target) > MAX_PATH:
            raise self._refuse("a symbolic link to nothing, or to too long a path")
        attributes, name = self._attributes(member), path[-1]
        self._make(path, lambda name, at: os.symlink(target, name, dir_fd=at))
        if self.owners:
            os.chown(name, *attributes.owner, dir_fd=self._fd, follow_symlinks=False)
        if attributes.mtime is not None:
            times = (attributes.mtime, attributes.mtime)
            os.utime(name, ns=times, dir_fd=self._fd, follow_symlinks=False)

    def _link(self, path: Parts, target: Parts) -> None:
        """Another name of a file that came before."""
        if not target or target in self._directories or target == path:
            raise self._refuse("a hard link to itself or to a directory")
        self._enter(target[:-1], make=False)
        above = os.dup(self._fd)
        try:
            self._make(
                path,
                lambda name, at: os.link(
                    target[-1], name, src_dir_fd=above, dst_dir_fd=at, follow_symlinks=False
                ),
            )
        except FileNotFoundError:
            raise self._refuse("a hard link to what is not in the archive before it") from None
        finally:
            os.close(above)

    # --- whiteouts --------------------------------------------------------------------------------

    def _mark(self, path: Parts) -> None:
        """``.wh.NAME`` hides NAME of the layers below; opaque is a directory of which all is hidden."""
        name = path[-1].removeprefix(WHITEOUT)
        if path[-1] == OPAQUE:
            self._hide_below(path[:-1])
        elif name.startswith(WHITEOUT):
            self._skip(f"{os.fsdecode(b'/'.join(path))}: of another kind of layers")
        elif name in (b"", b".", b".."):
            raise self._refuse("a whiteout of nothing")
        else:
            self._enter(path[:-1])
            self._whiteouts[*path[:-1], name] = None

    def _hide_below(self, directory: Parts) -> None:
        self._enter(directory)
        if not directory:
            self.contents.opaque = True
        else:
            self._directories[directory].xattrs["user.overlay.opaque"] = b"y"

    def _white_out(self, path: Parts) -> None:
        """A device with the number 0 or, where the file system is an overlay and keeps those to itself, an
        empty file with a mark (Linux 6.7)."""
        if path in self._directories:  # there anew, but nothing of the old one
            self._hide_below(path)
            return
        self._enter(path[:-1])
        try:
            os.mknod(path[-1], stat.S_IFCHR, 0, dir_fd=self._fd)
        except FileExistsError:
            return
        except PermissionError:
            self._white_out_by_mark(path)

    def _white_out_by_mark(self, path: Parts) -> None:
        major, minor = os.uname().release.split(".")[:2]
        if (int(major), int("".join(filter(str.isdigit, minor)))) < (6, 7):
            remedy = "have the state directory on another file system than an overlay, or use Linux 6.7"
            raise UnsupportedHost(f"a whiteout in {self.stream.what}", remedy)
        fd = os.open(path[-1], os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        try:
            self._set_xattr(fd, "user.overlay.whiteout", b"")
        finally:
            os.close(fd)
        if len(path) == 1:
            self._set_xattr(self._fds[0], "user.overlay.opaque", b"x")
        else:
            self._directories[path[:-1]].xattrs.setdefault("user.overlay.opaque", b"x")

    # --- attributes -------------------------------------------------------------------------------

    def _attributes(self, member: tarfile.TarInfo) -> _Attributes:
        owner = tuple(one if 0 <= one <= MAX_ID else NOBODY for one in (member.uid, member.gid))
        found = _Attributes(member.mode, self._mtime(member), (owner[0], owner[1]))
        for key, value in member.pax_headers.items():
            kind, _, name = key.partition("SCHILY.xattr.")
            if kind or not name:
                continue
            if "\0" in name or name == "user." or len(name) > 255:
                raise self._refuse(f"no name of an extended attribute: {name[:300]!r}")
            if name.startswith("user.") and not name.startswith("user.overlay.") and not member.issym():
                found.xattrs[name] = value.encode("utf-8", "surrogateescape")
            else:  # what the kernel would act on is not an archive's to say
                self._skip(f"{member.name}: {name}")
        return found

    def _mtime(self, member: tarfile.TarInfo) -> int:
        """In nanoseconds. tarfile has only a float of it."""
        text = member.pax_headers.get("mtime")
        try:
            seconds, _, fraction = (text or str(int(member.mtime))).partition(".")
            when = int(seconds) * 10**9 + int(fraction[:9].ljust(9, "0"))
        except (ValueError, OverflowError):
            raise self._refuse("no time") from None
        return min(max(when, 0), 2**33 * 10**9)

    def _set(self, fd: int, attributes: _Attributes, mask: int) -> None:
        """Set-ID bits are never kept: nobody is to run such a file, wherever this directory may be seen."""
        for name, value in attributes.xattrs.items():
            self._set_xattr(fd, name, value)
        if self.owners:
            os.fchown(fd, *attributes.owner)
        os.fchmod(fd, attributes.mode & mask)
        if attributes.mtime is not None:
            os.utime(fd, ns=(attributes.mtime, attributes.mtime))

    def _set_xattr(self, fd: int, name: str, value: bytes) -> None:
        try:
            os.setxattr(fd, name.encode("utf-8", "surrogateescape"), value)
        except OSError as error:
            if error.errno in (E.EINVAL, E.ERANGE, E.E2BIG):
                raise self._refuse(f"extended attribute {name!r}: {error.strerror}") from None
            if error.errno != E.EOPNOTSUPP:
                raise
            remedy = "have the state directory (SANDBOXCORE_STATE_DIR) on a file system that has them"
            raise UnsupportedHost(f"extended attributes of users, for {self.stream.what}", remedy) from None

    # --- counting ---------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self.contents.entries += 1
        self.contents.bytes += size
        if self.contents.entries > self.bounds.entries:
            raise self._refuse(f"more than {self.bounds.entries} files and directories: {FULL}")
        if self.contents.bytes > self.bounds.bytes:
            raise self._refuse(f"more than {self.bounds.bytes} bytes unpacked: {FULL}")

    def _skip(self, what: str) -> None:
        self.contents.skips += 1
        if len(self.contents.skipped) < MAX_SKIPPED:
            self.contents.skipped.append(what)
