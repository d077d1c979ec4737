"""File operations of a living sandbox, without the waiting.

Each operation is a generator. It yields an :class:`Ask`, which somebody puts to the sandbox's file server,
and gets back a descriptor or -1, or the OSError; it yields None where a long copy may pause. So the blocking
and the asyncio interface share everything but how they wait.
"""

import contextlib
import errno as E
import os
import stat
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal, TypeVar

from sandboxcore import _native
from sandboxcore.events import EventKind
from sandboxcore.host import ID_RANGE, HostFeatures
from sandboxcore.observers import Observed, Operated, noted
from sandboxcore.spec import SandboxSpec

Path = str | os.PathLike[str]
Data = bytes | bytearray | memoryview | str | IO[Any]
FileType = Literal["file", "directory", "symlink", "fifo", "socket", "char", "block"]

CHUNK = 1 << 20
READ_MAX = 1 << 30  # what is read into memory at once without being asked for by size
PATH_MAX = 4096
NOBODY = 65534  # what an id that is not mapped looks like inside

_TYPES: dict[int, FileType] = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
}


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What is known about a file. ``name`` is relative to what was listed; ``mode`` are the permission bits;
    ``uid`` and ``gid`` as inside; ``mtime`` in seconds since the epoch; ``target`` of a symbolic link."""

    path: str
    name: str
    type: FileType
    size: int
    mode: int
    uid: int
    gid: int
    mtime: float
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to the file server: an operation of ``enum sbx_file_ops`` and what it is about. Paths begin
    at the directory ``at`` if there is one. ``about`` names the file in errors."""

    op: str
    path: str
    second: str | None = None
    flags: int = 0
    mode: int = 0
    at: int = -1
    about: str = ""

    @property
    def idempotent(self) -> bool:
        """Whether asking again changes nothing."""
        return self.op == "OPEN" and not self.flags & (os.O_CREAT | os.O_TRUNC)

    def paths(self) -> bytes:
        """The paths as they travel. Raises OSError for one that is too long, ValueError for a NUL in one."""
        names = [os.fsencode(name) for name in (self.path, self.second) if name is not None]
        if any(b"\0" in name for name in names):
            raise ValueError("embedded null byte")
        if any(len(name) >= PATH_MAX for name in names):
            raise self.failure(E.ENAMETOOLONG)
        return b"".join(name + b"\0" for name in names)

    def send(self, socket: int) -> None:
        """Put it to the server. Raises OSError."""
        _native.send_file_op(socket, self.op, self.paths(), flags=self.flags, mode=self.mode, at=self.at)

    def answer(self, record: _native.Record) -> int:
        """The descriptor, or -1, that a record brings. Raises the OSError that it tells of."""
        if record.error is None and record.kind == "DONE" and (record.fd >= 0) == (self.op == "OPEN"):
            return record.fd
        if record.fd >= 0:
            os.close(record.fd)
        raise self.failure(record.error.errno if record.error else E.EPROTO)

    def failure(self, number: int) -> OSError:
        """The exception for an errno."""
        name = self.about or self.path
        if self.op == "RENAME":
            return OSError(number, os.strerror(number), name, None, self.second)
        return OSError(number, os.strerror(number), self.second if self.op == "SYMLINK" else name)


T = TypeVar("T")
Steps = Generator[Ask | None, int, T]


def type_of(st: os.stat_result) -> FileType:
    """The kind of file in a word."""
    return _TYPES.get(stat.S_IFMT(st.st_mode), "file")


def check_mode(mode: int) -> int:
    """The mode, if it has permission bits only. Set-id bits do not enter a sandbox."""
    if not 0 <= mode <= 0o1777:
        raise ValueError(f"mode {mode:#o} is not of permission bits")
    return mode


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of the body that name no file are about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            error.filename = path
        raise


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """The descriptor, closed afterwards."""
    try:
        yield fd
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> int:
    """Write all of it."""
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += os.write(fd, view[done : done + CHUNK])
    return done


def copy_data(source: int, target: int, size: int) -> Steps[None]:
    """Copy ``size`` bytes, or what there is of them, to a new file: holes stay holes, so a small file that
    says it is huge does not fill the other side."""
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
            stop = min(os.lseek(source, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == E.ENXIO:  # nothing but a hole from here
                break
            if error.errno != E.EINVAL:
                raise
            start, stop = at, size
        at = start
        while at < stop:
            data = os.pread(source, min(CHUNK, stop - at), at)
            if not data:
                break
            os.lseek(target, at, os.SEEK_SET)
            at += write_all(target, data)
            yield None
        if at < stop:
            break  # it became shorter meanwhile
    os.ftruncate(target, min(size, os.fstat(source).st_size))


class Operations(Operated):
    """The operations on one sandbox's files; see :class:`sandboxcore.files.Files` for what each does."""

    def __init__(self, spec: SandboxSpec, host: HostFeatures, observed: Observed | None = None) -> None:
        self.workdir, self.observed = spec.workdir, observed
        self._host = host
        self._ids = spec.ids()

    # --- names and ids --------------------------------------------------------------------------

    def resolve(self, path: Path) -> str:
        """The absolute path inside. ".." stays: what it means depends on links, and the kernel knows."""
        text = os.fsdecode(path)
        if not text:
            raise FileNotFoundError(E.ENOENT, os.strerror(E.ENOENT), text)
        parts = os.path.join(self.workdir, text).split("/")
        return "/" + "/".join(part for part in parts if part not in ("", "."))

    def info(self, path: str, name: str, st: os.stat_result, target: str | None = None) -> FileInfo:
        """Make a FileInfo."""
        return FileInfo(
            path,
            name,
            type_of(st),
            st.st_size,
            stat.S_IMODE(st.st_mode),
            self._inside(st.st_uid, self._host.uid, self._ids[0], self._host.subuid),
            self._inside(st.st_gid, self._host.gid, self._ids[1], self._host.subgid),
            st.st_mtime,
            target,
        )

    def _inside(self, outer: int, caller: int, own: int, spare: tuple[int, int] | None) -> int:
        """An id of the host as the sandbox's id map has it: see plan.py."""
        if self._host.mode == "root":
            number = outer - self._host.id_base
            return number if 0 <= number < ID_RANGE else NOBODY
        if outer == caller:
            return own
        if self._host.mode == "subuid" and spare and 0 <= outer - spare[0] < spare[1]:
            number = outer - spare[0]
            return number if number < own else number + 1
        return NOBODY

    # --- opening --------------------------------------------------------------------------------

    def acquire(
        self, path: str, flags: int, mode: int = 0, *, at: int = -1, about: str = "", any_type: bool = False
    ) -> Steps[int]:
        """A descriptor of a regular file, with O_DIRECTORY of a directory; ``any_type``: of what is there."""
        ask = Ask("OPEN", path, flags=flags, mode=mode, at=at, about=about)
        fd = yield ask
        if any_type or flags & (os.O_DIRECTORY | os.O_PATH):  # the kernel has looked
            return fd
        kind = type_of(os.fstat(fd))
        if kind == "file":
            return fd
        os.close(fd)
        if kind == "directory":
            raise ask.failure(E.EISDIR)
        raise OSError(E.EINVAL, f"Not a regular file but a {kind}", about or path)

    def create(self, path: str, flags: int, mode: int, parents: bool) -> Steps[int]:
        """The same for writing, with the directories on the way if they are missing."""
        try:
            return (yield from self.acquire(path, flags, mode))
        except FileNotFoundError:
            if not parents:
                raise
        yield from self.make_parents(path)
        return (yield from self.acquire(path, flags, mode))

    def make_parents(self, path: str, at: int = -1) -> Steps[None]:
        """Make the directories above a path, where missing."""
        above = os.path.dirname(path)
        if above.strip("/"):
            with contextlib.suppress(FileExistsError):
                yield Ask("MKDIR", above, flags=_native.constant("FILE_PARENTS"), mode=0o755, at=at)

    @noted(EventKind.FILE_OPENED, "path", "mode")
    def open(
        self,
        path: Path,
        mode: str,
        *,
        buffering: int,
        encoding: str | None,
        errors: str | None,
        newline: str | None,
        permissions: int,
    ) -> Steps[IO[Any]]:
        """A Python file."""
        flags, name = _open_flags(mode), self.resolve(path)
        fd = yield from self.acquire(name, flags, check_mode(permissions) if flags & os.O_CREAT else 0)
        taken = False

        def opener(_name: str, _flags: int) -> int:
            nonlocal taken
            taken = True
            return fd

        try:
            return open(name, mode, buffering, encoding, errors, newline, opener=opener)
        finally:
            if not taken:
                os.close(fd)

    # --- contents -------------------------------------------------------------------------------

    @noted(EventKind.FILE_READ, "path")
    def read(self, path: Path, offset: int, size: int | None) -> Steps[bytes]:
        """The bytes of a file."""
        if offset < 0 or (size is not None and size < 0):
            raise ValueError("offset and size must not be negative")
        name = self.resolve(path)
        fd = yield from self.acquire(name, os.O_RDONLY)
        limit = READ_MAX + 1 if size is None else size
        data = bytearray()
        with closing(fd), naming(name):
            if size is None and os.fstat(fd).st_size - offset > READ_MAX:
                raise _too_large(name)
            while len(data) < limit:
                piece = os.pread(fd, min(CHUNK, limit - len(data)), offset + len(data))
                if not piece:
                    break
                data += piece
                yield None
        if size is None and len(data) > READ_MAX:
            raise _too_large(name)
        return bytes(data)

    @noted(EventKind.FILE_WRITTEN, "path")
    def write(
        self,
        path: Path,
        data: Data,
        mode: int | None,
        *,
        append: bool = False,
        parents: bool = True,
        exclusive: bool = False,
    ) -> Steps[int]:
        """Write a file; returns the number of bytes."""
        name = self.resolve(path)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
        bits = 0o644 if mode is None else check_mode(mode) & 0o777
        fd = yield from self.create(name, flags | (os.O_EXCL if exclusive else 0), bits, parents)
        written = 0
        with closing(fd):
            if mode is not None:
                yield Ask("CHMOD", "", mode=mode, at=fd, about=name)
            for piece in _pieces(data):
                with naming(name):
                    written += write_all(fd, piece)
                yield None
        return written

    def write_many(self, files: Mapping[str, Data | tuple[Data, int]]) -> Steps[None]:
        """Write several files."""
        for path, content in files.items():
            data, mode = content if isinstance(content, tuple) else (content, None)
            yield from self.write(path, data, mode)

    # --- looking --------------------------------------------------------------------------------

    def stat(self, path: Path, follow: bool) -> Steps[FileInfo]:
        """What a file is."""
        name = self.resolve(path)
        fd = yield from self.acquire(name, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        with closing(fd), naming(name):
            st = os.fstat(fd)
            return self.info(name, os.path.basename(name) or "/", st, _target("", fd, st))

    def exists(self, path: Path, follow: bool) -> Steps[bool]:
        """Whether there is one."""
        try:
            yield from self.stat(path, follow)
        except OSError as error:
            if error.errno in (E.ENOENT, E.ENOTDIR, E.ELOOP, E.ENAMETOOLONG):
                return False
            raise
        return True

    def listing(self, path: Path, depth: int | None) -> Steps[list[FileInfo]]:
        """What is in a directory."""
        if depth is not None and depth < 1:
            raise ValueError("depth must be at least 1")
        top, found = self.resolve(path), []
        base = yield from self.acquire(top, os.O_RDONLY | os.O_DIRECTORY)
        with closing(base):
            for info in (yield from self.walk(base, top, depth)):
                found.append(info)
        return sorted(found, key=lambda info: os.fsencode(info.name).split(b"/"))

    def walk(self, base: int, top: str, depth: int | None) -> Steps[list[FileInfo]]:
        """Everything below the directory ``base``, parents first. What vanishes meanwhile is left out."""
        found: list[FileInfo] = []
        waiting = [""]
        while waiting:
            here = waiting.pop()
            level = here.count("/") + 1 if here else 0
            entries = yield from self.entries(base, here, top)
            found += entries
            if depth is None or level + 1 < depth:
                waiting += [info.name for info in entries if info.type == "directory"]
        return found

    def entries(self, base: int, here: str, top: str) -> Steps[list[FileInfo]]:
        """What is in the directory ``here`` below ``base``; nothing if that is none any more."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        about = os.path.join(top, here)
        try:
            fd = yield from self.acquire(here or ".", flags, at=base, about=about)
        except OSError as error:
            if here and error.errno in (E.ENOENT, E.ENOTDIR, E.ELOOP):
                return []
            raise
        found = []
        with closing(fd), naming(about):
            for name in sorted(os.listdir(fd)):
                with contextlib.suppress(FileNotFoundError):
                    st = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    target = _target(name, fd, st)
                    relative = os.path.join(here, name)
                    found.append(self.info(os.path.join(top, relative), relative, st, target))
        return found

    # --- changing -------------------------------------------------------------------------------

    @noted(EventKind.FILE_MADE, "path")
    def mkdir(self, path: Path, mode: int, parents: bool, exist_ok: bool) -> Steps[None]:
        """Make a directory."""
        yield from self.folder(path, mode, parents, exist_ok)

    def folder(self, path: Path, mode: int, parents: bool, exist_ok: bool) -> Steps[None]:
        """The same as a part of another operation."""
        name = self.resolve(path)
        flags = _native.constant("FILE_PARENTS") if parents else 0
        try:
            yield Ask("MKDIR", name, flags=flags, mode=check_mode(mode))
        except OSError as error:
            if error.errno not in (E.EEXIST, E.EBUSY) or not exist_ok:
                raise
            if (yield from self.stat(name, True)).type != "directory":
                raise

    @noted(EventKind.FILE_REMOVED, "path")
    def remove(self, path: Path, recursive: bool, missing_ok: bool) -> Steps[None]:
        """Remove a file, a link, an empty directory, or a tree."""
        name = self.resolve(path)
        try:
            if recursive:
                yield Ask("REMOVE_TREE", name)
                return
            try:
                yield Ask("UNLINK", name)
            except IsADirectoryError:
                yield Ask("RMDIR", name)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @noted(EventKind.FILE_RENAMED, "path", "to")
    def rename(self, old: Path, new: Path) -> Steps[None]:
        """Rename, as rename(2)."""
        yield Ask("RENAME", self.resolve(old), self.resolve(new))

    @noted(EventKind.FILE_LINKED, "target", "path")
    def symlink(self, target: Path, path: Path) -> Steps[None]:
        """Make a symbolic link."""
        yield Ask("SYMLINK", os.fsdecode(target), self.resolve(path))

    @noted(EventKind.FILE_CHANGED, "path", "mode")
    def chmod(self, path: Path, mode: int) -> Steps[None]:
        """Change the permission bits."""
        yield Ask("CHMOD", self.resolve(path), mode=check_mode(mode))


def _open_flags(mode: str) -> int:
    """The flags of open(2) behind a mode of :func:`open`."""
    letters = set(mode)
    kinds = letters & set("rwax")
    if len(letters) != len(mode) or letters - set("rwaxbt+") or len(kinds) != 1 or {"b", "t"} <= letters:
        raise ValueError(f"invalid mode: {mode!r}")
    how = {"r": 0, "w": os.O_CREAT | os.O_TRUNC, "a": os.O_CREAT | os.O_APPEND, "x": os.O_CREAT | os.O_EXCL}
    kind = kinds.pop()
    access = os.O_RDWR if "+" in letters else os.O_RDONLY if kind == "r" else os.O_WRONLY
    return access | how[kind]


def _pieces(data: Data) -> Iterator[bytes | bytearray | memoryview]:
    if isinstance(data, str):
        yield data.encode()
    elif isinstance(data, bytes | bytearray | memoryview):
        yield data
    else:
        read: Callable[[int], Any] = data.read
        while piece := read(CHUNK):
            yield piece.encode() if isinstance(piece, str) else piece


def _target(name: str, fd: int, st: os.stat_result) -> str | None:
    """Where a symbolic link leads; an empty text for one of proc that the host cannot read."""
    if not stat.S_ISLNK(st.st_mode):
        return None
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError:
        return ""


def _too_large(name: str) -> OSError:
    return OSError(E.EFBIG, f"More than {READ_MAX} bytes; use size=, open() or copy_out()", name)
