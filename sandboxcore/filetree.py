"""Whole trees into and out of a living sandbox: copies and archives, on top of :mod:`sandboxcore.fileops`.

On the sandbox's side a tree is walked from one descriptor, without links, so it may change meanwhile. On the
host's side each directory is reached step by step without following a link, because the destination may be
a directory that a sandbox was granted.
"""

import contextlib
import errno as E
import io
import os
import secrets
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from sandboxcore.events import EventKind
from sandboxcore.fileops import (
    CHUNK,
    READ_MAX,
    Ask,
    FileInfo,
    Operations,
    Path,
    Steps,
    closing,
    copy_data,
    naming,
    type_of,
    write_all,
)
from sandboxcore.observers import Operated, noted

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Manner:
    """How trees are copied: links as links, without what would be refused, in place of what exists."""

    symlinks: bool
    skip: bool
    overwrite: bool


def leads_out(folder: str, target: str) -> bool:
    """Whether a link in ``folder``, relative to the tree's top, may lead out of the tree.

    Only a target that first goes up and then down is judged by its text: a ".." behind a name means
    something else when that name is a link.
    """
    if not target or target.startswith("/"):
        return True
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    depth = folder.count("/") + 1 if folder else 0
    return ups > depth or ".." in parts[ups:]


def _refused(kind: str, path: str, why: str = "") -> OSError:
    return OSError(E.EINVAL, f"A {kind} is not copied{why}; skip=True leaves it out", path)


class HostTree:
    """A directory of the host in which a copy is made, or from which one is taken."""

    def __init__(self, path: str, *, follow: bool) -> None:
        self.path = path
        self._top = os.open(path, _DIRECTORY & ~os.O_NOFOLLOW if follow else _DIRECTORY)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._top)

    @contextlib.contextmanager
    def enter(self, relative: str) -> Iterator[int]:
        """A directory below it, reached without following a link."""
        fd = os.dup(self._top)
        try:
            with naming(os.path.join(self.path, relative)):
                for part in relative.split("/") if relative else ():
                    fd, above = os.open(part, _DIRECTORY, dir_fd=fd), fd
                    os.close(above)
            yield fd
        finally:
            os.close(fd)

    def mkdir(self, relative: str) -> None:
        """Make a directory, or find one."""
        with self.enter(os.path.dirname(relative)) as above:
            with contextlib.suppress(FileExistsError):
                os.mkdir(os.path.basename(relative), 0o700, dir_fd=above)
        with self.enter(relative):
            pass  # raises unless it is a directory

    def chmod(self, relative: str, mode: int) -> None:
        """Set the permission bits of a directory."""
        with self.enter(relative) as fd:
            os.fchmod(fd, mode & 0o777)

    def symlink(self, relative: str, target: str, overwrite: bool) -> None:
        """Make a link."""
        name = os.path.basename(relative)
        with self.enter(os.path.dirname(relative)) as above, naming(os.path.join(self.path, relative)):
            if not overwrite:
                os.symlink(target, name, dir_fd=above)
                return
            temporary = f".{name[:100]}.{secrets.token_hex(8)}"
            os.symlink(target, temporary, dir_fd=above)
            _move(above, temporary, name)


def _move(above: int, temporary: str, name: str) -> None:
    try:
        os.rename(temporary, name, src_dir_fd=above, dst_dir_fd=above)
    except BaseException:
        os.unlink(temporary, dir_fd=above)
        raise


def _file_out(source: int, above: int, name: str, overwrite: bool) -> Steps[None]:
    """Copy an open file to a new one in the directory ``above``; complete or not there."""
    st = os.fstat(source)
    made = f".sandboxcore-{secrets.token_hex(8)}" if overwrite else name
    target = os.open(made, _NEW, 0o600, dir_fd=above)
    try:
        with closing(target):
            yield from copy_data(source, target, st.st_size)
            os.fchmod(target, st.st_mode & 0o777)
    except BaseException:
        os.unlink(made, dir_fd=above)
        raise
    if overwrite:
        _move(above, made, name)


class _Plain(io.RawIOBase):
    """What tarfile reads a member from: exactly as long as the header says, whatever the payload does."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd, self._left, self._at = fd, size, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        want = self._left if size < 0 else min(size, self._left)
        data = os.pread(self._fd, want, self._at)
        data = data.ljust(want, b"\0")  # it became shorter: the header is written already
        self._left -= len(data)
        self._at += len(data)
        return data


class _Sink:
    """Where tarfile writes an archive to, with or without a limit."""

    def __init__(self, out: IO[bytes], bounded: bool) -> None:
        self._out, self._bounded, self._size = out, bounded, 0

    def tell(self) -> int:
        return self._size

    def write(self, data: bytes) -> int:
        self._size += len(data)
        if self._bounded and self._size > READ_MAX:
            raise OSError(E.EFBIG, f"The archive has more than {READ_MAX} bytes; use fileobj=")
        self._out.write(data)
        return len(data)


class TreeOperations(Operated):
    """Copies and archives; see :class:`sandboxcore.files.Files` for what each does."""

    def __init__(self, operations: Operations) -> None:
        self._files, self.observed = operations, operations.observed

    def resolve(self, path: Path) -> str:
        """The absolute path inside."""
        return self._files.resolve(path)

    # --- out ------------------------------------------------------------------------------------

    @noted(EventKind.FILE_COPIED_OUT, "path", "host")
    def copy_out(self, path: Path, host_path: Path, how: Manner) -> Steps[None]:
        """Copy to the host."""
        name, target = self._files.resolve(path), os.path.abspath(os.fsdecode(host_path))
        source = yield from self._files.acquire(name, os.O_RDONLY, any_type=True)
        with closing(source):
            st = os.fstat(source)
            if stat.S_ISDIR(st.st_mode):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(target, 0o700)
                tree = HostTree(target, follow=False)
                with contextlib.closing(tree):
                    yield from self._tree_out(source, name, tree, how)
                    tree.chmod("", st.st_mode)
                return
            if not stat.S_ISREG(st.st_mode):
                raise OSError(E.EINVAL, f"Not a regular file but a {type_of(st)}", name)
            with naming(target):
                above = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                with closing(above):
                    yield from _file_out(source, above, os.path.basename(target), how.overwrite)

    def _tree_out(self, base: int, top: str, tree: HostTree, how: Manner) -> Steps[None]:
        waiting, modes = [""], []
        while waiting:
            here = waiting.pop()
            for info in (yield from self._files.entries(base, here, top)):
                if info.type == "directory":
                    tree.mkdir(info.name)
                    modes.append((info.name, info.mode))
                    waiting.append(info.name)
                elif info.type == "file":
                    yield from self._entry_out(base, info, tree, how.overwrite)
                elif info.type == "symlink" and how.symlinks and not leads_out(here, info.target or ""):
                    tree.symlink(info.name, info.target or "", how.overwrite)
                elif not how.skip:
                    out = (
                        " because it leads out of the tree" if info.type == "symlink" and how.symlinks else ""
                    )
                    raise _refused(info.type, info.path, out)
        for name, mode in reversed(modes):
            tree.chmod(name, mode)

    def _entry_out(self, base: int, info: FileInfo, tree: HostTree, overwrite: bool) -> Steps[None]:
        flags = os.O_RDONLY | os.O_NOFOLLOW
        try:
            source = yield from self._files.acquire(info.name, flags, at=base, about=info.path)
        except FileNotFoundError:  # gone meanwhile
            return
        folder, name = os.path.split(info.name)
        with closing(source), tree.enter(folder) as above, naming(os.path.join(tree.path, info.name)):
            yield from _file_out(source, above, name, overwrite)

    # --- in -------------------------------------------------------------------------------------

    @noted(EventKind.FILE_COPIED_IN, "host", "path")
    def copy_in(self, host_path: Path, path: Path, how: Manner) -> Steps[None]:
        """Copy from the host."""
        name, origin = self._files.resolve(path), os.path.abspath(os.fsdecode(host_path))
        if os.path.isdir(origin):
            yield from self._files.folder(name, 0o755, True, True)
            base = yield from self._files.acquire(name, os.O_RDONLY | os.O_DIRECTORY)
            tree = HostTree(origin, follow=True)
            with closing(base), contextlib.closing(tree):
                yield from self._tree_in(tree, base, name, how)
                with tree.enter("") as fd:
                    mode = os.fstat(fd).st_mode & 0o777
                with contextlib.suppress(PermissionError):  # it may have been there, of another owner
                    yield Ask("CHMOD", "", mode=mode, at=base, about=name)
            return
        yield from self._files.make_parents(name)
        source = os.open(origin, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with closing(source):
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise OSError(E.EINVAL, "Not a regular file", origin)
            yield from self._file_in(source, name, -1, name, how.overwrite)

    def _tree_in(self, tree: HostTree, base: int, top: str, how: Manner) -> Steps[None]:
        waiting, modes = [""], []
        while waiting:
            here = waiting.pop()
            with tree.enter(here) as folder:
                for entry in sorted(os.listdir(folder)):
                    name = os.path.join(here, entry)
                    about = os.path.join(top, name)
                    st = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                    kind, mode = type_of(st), st.st_mode & 0o777
                    if kind == "directory":
                        yield from self._folder_in(name, base, about)
                        modes.append((name, mode))
                        waiting.append(name)
                    elif kind == "file":
                        source = os.open(
                            entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder
                        )
                        with closing(source):
                            yield from self._file_in(source, name, base, about, how.overwrite)
                    elif kind == "symlink" and how.symlinks:
                        yield from self._link_in(os.readlink(entry, dir_fd=folder), name, base, how.overwrite)
                    elif not how.skip:
                        raise _refused(kind, os.path.join(tree.path, name))
        for name, mode in reversed(modes):
            yield Ask("CHMOD", name, mode=mode, at=base, about=os.path.join(top, name))

    def _folder_in(self, name: str, base: int, about: str) -> Steps[None]:
        with contextlib.suppress(FileExistsError):
            yield Ask("MKDIR", name, mode=0o700, at=base, about=about)
        # raises unless it is a directory
        fd = yield from self._files.acquire(name, os.O_PATH | os.O_DIRECTORY, at=base, about=about)
        os.close(fd)

    def _file_in(self, source: int, name: str, base: int, about: str, overwrite: bool) -> Steps[None]:
        st = os.fstat(source)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL)
        target = yield from self._files.acquire(name, flags, st.st_mode & 0o777, at=base, about=about)
        with closing(target):
            with naming(about):
                yield from copy_data(source, target, st.st_size)
            yield Ask("CHMOD", "", mode=st.st_mode & 0o777, at=target, about=about)

    def _link_in(self, target: str, name: str, base: int, overwrite: bool) -> Steps[None]:
        try:
            yield Ask("SYMLINK", target, name, at=base)
        except FileExistsError:
            if not overwrite:
                raise
            yield Ask("UNLINK", name, at=base)
            yield Ask("SYMLINK", target, name, at=base)

    # --- archives -------------------------------------------------------------------------------

    @noted(EventKind.FILE_COPIED_OUT, "path", archive=True)
    def tar(self, path: Path, fileobj: IO[bytes] | None, skip: bool) -> Steps[bytes | None]:
        """Write an archive."""
        top = self._files.resolve(path)
        out = io.BytesIO() if fileobj is None else fileobj
        source = yield from self._files.acquire(top, os.O_RDONLY, any_type=True)
        # not a stream ("w|"), which would write once more when it is collected after an error
        sink: Any = _Sink(out, fileobj is None)
        archive: Any = tarfile.TarFile(fileobj=sink, mode="w", encoding="utf-8")
        with closing(source):
            st = os.fstat(source)
            if stat.S_ISREG(st.st_mode):
                name = os.path.basename(top)
                self._member(archive, self._files.info(top, name, st), source)
            elif stat.S_ISDIR(st.st_mode):
                yield from self._tree_to(archive, source, top, skip)
            else:
                raise OSError(E.EINVAL, f"Not a regular file but a {type_of(st)}", top)
        archive.close()
        return out.getvalue() if isinstance(out, io.BytesIO) and fileobj is None else None

    def _tree_to(self, archive: Any, base: int, top: str, skip: bool) -> Steps[None]:
        flags = os.O_RDONLY | os.O_NOFOLLOW
        waiting = [""]
        while waiting:
            for info in (yield from self._files.entries(base, waiting.pop(), top)):
                if info.type == "file":
                    with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                        fd = yield from self._files.acquire(info.name, flags, at=base, about=info.path)
                        with closing(fd):
                            now = self._files.info(info.path, info.name, os.fstat(fd))
                            self._member(archive, now, fd)
                elif info.type in ("directory", "symlink"):
                    self._member(archive, info, -1)
                elif not skip:
                    raise _refused(info.type, info.path)
                if info.type == "directory":
                    waiting.append(info.name)

    @staticmethod
    def _member(archive: Any, info: FileInfo, fd: int) -> None:
        if fd >= 0 and info.size > READ_MAX and os.fstat(fd).st_blocks * 1024 < info.size:
            raise OSError(E.EFBIG, "A file of holes does not fit into an archive", info.path)
        member = tarfile.TarInfo(info.name)
        member.mode, member.uid, member.gid, member.mtime = info.mode & 0o777, info.uid, info.gid, info.mtime
        member.type = {"directory": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE}.get(
            info.type, tarfile.REGTYPE
        )
        member.size = info.size if fd >= 0 else 0
        member.linkname = info.target or ""
        archive.addfile(member, _Plain(fd, info.size) if fd >= 0 else None)
        archive.members.clear()

    @noted(EventKind.FILE_COPIED_IN, "", "path", archive=True)
    def untar(self, data: bytes | IO[bytes], path: Path, skip: bool) -> Steps[None]:
        """Extract an archive."""
        top = self._files.resolve(path)
        yield from self._files.folder(top, 0o755, True, True)
        base = yield from self._files.acquire(top, os.O_RDONLY | os.O_DIRECTORY)
        stream = io.BytesIO(data) if isinstance(data, bytes | bytearray) else data
        modes = []
        with closing(base), tarfile.open(fileobj=stream, mode="r|*") as archive:
            members: list[Any] = vars(archive)["members"]
            while (member := archive.next()) is not None:
                members.clear()  # or they stay in memory, however many
                name = _clean(member.name)
                known = member.isdir() or member.isreg() or member.issym() or member.islnk()
                if name is None or not known:
                    if skip:
                        continue
                    why = "leads out of the archive" if name is None else "is a device or a fifo"
                    raise ValueError(f"{member.name!r} {why}; skip=True leaves it out")
                if name:
                    yield from self._extract(archive, member, name, base, os.path.join(top, name))
                if name and member.isdir():
                    modes.append((name, member.mode & 0o777))
            for name, mode in reversed(modes):
                yield Ask("CHMOD", name, mode=mode, at=base, about=os.path.join(top, name))

    def _extract(
        self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, base: int, about: str
    ) -> Steps[None]:
        yield from self._files.make_parents(name, base)
        if member.isdir():
            yield from self._folder_in(name, base, about)
        elif member.issym():
            yield from self._link_in(member.linkname, name, base, True)
        elif member.islnk():
            yield from self._second_name(member, name, base, about)
        else:
            target = yield from self._new_file(name, base, about)
            content = archive.extractfile(member)
            with closing(target):
                while content is not None and (piece := content.read(CHUNK)):
                    with naming(about):
                        write_all(target, piece)
                    yield None
                yield Ask("CHMOD", "", mode=member.mode & 0o777, at=target, about=about)

    def _new_file(self, name: str, base: int, about: str) -> Steps[int]:
        """A new file in place of whatever had the name: nothing is written through a link."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            return (yield from self._files.acquire(name, flags, 0o600, at=base, about=about))
        except FileExistsError:
            yield Ask("UNLINK", name, at=base, about=about)
        return (yield from self._files.acquire(name, flags, 0o600, at=base, about=about))

    def _second_name(self, member: tarfile.TarInfo, name: str, base: int, about: str) -> Steps[None]:
        """A hard link becomes a copy of the file that was extracted before."""
        first = _clean(member.linkname)
        if not first:
            raise ValueError(f"{member.name!r} is a hard link to {member.linkname!r}")
        if first == name:
            return
        flags = os.O_RDONLY | os.O_NOFOLLOW
        source = yield from self._files.acquire(first, flags, at=base, about=about)
        with closing(source):
            target = yield from self._new_file(name, base, about)
            with closing(target):
                st = os.fstat(source)
                with naming(about):
                    yield from copy_data(source, target, st.st_size)
                yield Ask("CHMOD", "", mode=st.st_mode & 0o777, at=target, about=about)


def _clean(name: str) -> str | None:
    """A member's name without "." and double slashes; None if it is absolute or climbs."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts else "/".join(parts)
