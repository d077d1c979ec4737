"""The files of a living sandbox: ``sandbox.files``.

The sandbox's file server (csrc/files.c) opens, makes and removes with the payload's rights, inside; what it
opens comes here as a descriptor, and data never passes through it.
"""

import contextlib
import errno as E
import os
import select
import socket
import threading
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, overload

from sandboxcore import _native
from sandboxcore.errors import SandboxGone
from sandboxcore.fileops import Ask, Data, FileInfo, Operations, Path, Steps
from sandboxcore.filetree import Manner, TreeOperations
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import Link

if TYPE_CHECKING:
    from sandboxcore.sandbox import Sandbox

REPLY_PATIENCE = 60.0  # seconds for one operation

T = TypeVar("T")
Listing = list[FileInfo]  # inside the class `list` is a method


class ServerLost(Exception):
    """The file server has ended; ``taken``: it may have begun with what it was asked."""

    def __init__(self, taken: bool) -> None:
        super().__init__(taken)
        self.taken = taken


class FileServer:
    """The connection to a sandbox's file server: made with the first request, shared by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._link: Link | None = None
        self._pid = 0
        self._unwanted = False

    def ask(self, link: Link, ask: Ask) -> int:
        """Put one request and wait for its answer. Raises OSError, TimeoutError, ServerLost."""
        ask.paths()  # what is wrong with them is found before anything is sent
        with self._lock:
            self._unwanted = False
            try:
                record = self._exchange(link, ask)
            except BaseException:  # the answer may still come: it must not be taken for the next one's
                self._drop()
                raise
        if self._unwanted:
            self.close()
        return ask.answer(record)

    def _exchange(self, link: Link, ask: Ask) -> _native.Record:
        try:
            connection = self._connect(link)
            ask.send(connection.fileno())
        except ConnectionError:
            raise ServerLost(taken=False) from None
        except BlockingIOError:  # its launchers take nothing: stopped from outside
            raise TimeoutError(E.ETIMEDOUT, "the sandbox takes no requests", ask.about or ask.path) from None
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        if not poller.poll(REPLY_PATIENCE * 1000):
            raise TimeoutError(E.ETIMEDOUT, f"no answer within {REPLY_PATIENCE:.0f} s", ask.about or ask.path)
        try:
            record = _native.receive(connection.fileno())
        except ConnectionError:
            record = None
        if record is None:
            raise ServerLost(taken=True)
        return record

    def _connect(self, link: Link) -> socket.socket:
        if self._socket is not None and (self._link is not link or self._pid != os.getpid()):
            self._drop()  # of the time before a restart, or the parent's
        if self._socket is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    _native.send(link.work.fileno(), "FILES", fds=[theirs.fileno()])
                except BaseException:
                    ours.close()
                    raise
            self._socket, self._link, self._pid = ours, link, os.getpid()
        return self._socket

    def _drop(self, wait: float = 0) -> None:
        if self._socket is None:
            return
        if wait and self._pid == os.getpid():
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            poller.poll(wait * 1000)
        self._socket.close()
        self._socket = self._link = None

    def close(self, *, wait: float = 0) -> None:
        """Let go of the server; wait so many seconds at most until it knows. But never for whoever is at it,
        who closes behind himself. Idempotent."""
        self._unwanted = True
        if self._lock.acquire(blocking=False):
            try:
                self._drop(wait)
            finally:
                self._lock.release()


class Files:
    """Files of a running sandbox, read and written from outside, with the rights of its payload.

    Paths are absolute or relative to ``spec.workdir``. They are resolved inside: links and ".." lead nowhere
    else, whatever the payload does to them meanwhile. Any thread may use it.

    Raises
    ------
    OSError of the built-in kinds (FileNotFoundError, IsADirectoryError, PermissionError, ...), with the path
        inside as its filename; EINVAL for what is neither a file nor a directory.
    InvalidTransition: the sandbox does not run. SandboxGone: it ended meanwhile.
    ConnectionError: the file server was killed during a change, which may have been made.
    TimeoutError: no answer within 60 s.
    """

    def __init__(self, sandbox: "Sandbox", server: FileServer) -> None:
        self._sandbox, self._server = sandbox, server
        self._operations = Operations(sandbox.spec, sandbox._plan.host, sandbox)
        self._trees = TreeOperations(self._operations)

    def _ask(self, ask: Ask) -> int:
        again = False
        while True:
            link = self._sandbox._ready("use its files")
            try:
                return self._server.ask(link, ask)
            except ServerLost as lost:
                if again or (lost.taken and not ask.idempotent):
                    raise self._lost(link, ask) from None
                if self._sandbox.state is not SandboxState.RUNNING:
                    raise SandboxGone(f"sandbox {self._sandbox.name}: its init has ended") from None
                again = True

    def _lost(self, link: Link, ask: Ask) -> ConnectionError:
        with contextlib.suppress(OSError, ValueError):  # its end may be on the way
            poller = select.poll()
            poller.register(link.pidfd, select.POLLIN)
            poller.poll(1000)
        if self._sandbox.state is not SandboxState.RUNNING:
            return SandboxGone(f"sandbox {self._sandbox.name}: its init has ended")
        what = "twice" if ask.idempotent else "during a change, which may have been made"
        return ConnectionError(
            E.ECONNRESET, f"sandbox {self._sandbox.name}: its file server was killed {what}"
        )

    def _run(self, steps: Steps[T]) -> T:
        try:
            ask = next(steps)
            while True:
                try:
                    answer = -1 if ask is None else self._ask(ask)
                except Exception as error:
                    ask = steps.throw(error)
                else:
                    ask = steps.send(answer)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        finally:
            steps.close()

    # --- contents -------------------------------------------------------------------------------

    @overload
    def read(
        self, path: Path, *, text: Literal[False] = False, offset: int = 0, size: int | None = None
    ) -> bytes: ...
    @overload
    def read(
        self,
        path: Path,
        *,
        text: Literal[True],
        encoding: str = "utf-8",
        offset: int = 0,
        size: int | None = None,
    ) -> str: ...
    def read(
        self,
        path: Path,
        *,
        text: bool = False,
        encoding: str = "utf-8",
        offset: int = 0,
        size: int | None = None,
    ) -> bytes | str:
        """The content of a file, or ``size`` bytes from ``offset``. Without ``size`` at most 1 GiB: EFBIG,
        because a payload can make a file of any length. Newlines stay as they are."""
        data = self._run(self._operations.read(path, offset, size))
        return data.decode(encoding) if text else data

    def write(
        self,
        path: Path,
        data: Data,
        *,
        mode: int | None = None,
        append: bool = False,
        parents: bool = True,
        exclusive: bool = False,
    ) -> int:
        """Write bytes, text (as UTF-8) or what a file object has; returns the number of bytes.

        mode: permission bits; default 0o644 for a new file, and those that it has for another.
        append: behind what is there. parents: make missing directories. exclusive: refuse an existing file.
        """
        return self._run(
            self._operations.write(path, data, mode, append=append, parents=parents, exclusive=exclusive)
        )

    def write_many(self, files: Mapping[str, Data | tuple[Data, int]]) -> None:
        """:meth:`write` of several: path to content, or to (content, mode). Ends with the first error."""
        self._run(self._operations.write_many(files))

    def open(
        self,
        path: Path,
        mode: str = "rb",
        *,
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        permissions: int = 0o644,
    ) -> IO[Any]:
        """A Python file, as from :func:`open`; ``permissions`` are a new one's. It stays usable when the
        sandbox is gone."""
        return self._run(
            self._operations.open(
                path,
                mode,
                buffering=buffering,
                encoding=encoding,
                errors=errors,
                newline=newline,
                permissions=permissions,
            )
        )

    # --- looking --------------------------------------------------------------------------------

    def list(self, path: Path = ".", *, depth: int | None = 1) -> Listing:
        """What is in a directory, sorted; with ``depth`` also below it, None: without end. Links are listed,
        never followed."""
        return self._run(self._operations.listing(path, depth))

    def stat(self, path: Path, follow: bool = True) -> FileInfo:
        """What a file is; without ``follow``, what a symbolic link itself is."""
        return self._run(self._operations.stat(path, follow))

    def exists(self, path: Path, follow: bool = True) -> bool:
        """Whether there is such a file, of any type."""
        return self._run(self._operations.exists(path, follow))

    # --- changing -------------------------------------------------------------------------------

    def mkdir(self, path: Path, *, mode: int = 0o755, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory; with ``parents`` also those above it."""
        self._run(self._operations.mkdir(path, mode, parents, exist_ok))

    def remove(self, path: Path, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, a link or an empty directory; with ``recursive`` a whole tree, which takes at most
        50 s and ends with EBUSY at something that is mounted there."""
        self._run(self._operations.remove(path, recursive, missing_ok))

    def rename(self, old: Path, new: Path) -> None:
        """Rename; what ``new`` was is replaced, as by rename(2)."""
        self._run(self._operations.rename(old, new))

    def symlink(self, target: Path, path: Path) -> None:
        """Make ``path`` a symbolic link to ``target``, which is any text."""
        self._run(self._operations.symlink(target, path))

    def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits. Set-id bits are refused: ValueError."""
        self._run(self._operations.chmod(path, mode))

    # --- trees ----------------------------------------------------------------------------------

    def copy_in(
        self,
        host_path: Path,
        path: Path,
        *,
        symlinks: bool = False,
        skip: bool = False,
        overwrite: bool = True,
    ) -> None:
        """Copy a file or a tree of the host to ``path``, which is the copy's own name. Where ``host_path`` is
        itself a link, it is followed: do not name what a sandbox can write to.

        symlinks: copy those in a tree as links; else they are refused, as devices, fifos and sockets are.
        skip: leave out what would be refused. overwrite: files that exist are written anew.
        Permission bits are kept, without set-id. Holes stay holes.
        """
        self._run(self._trees.copy_in(host_path, path, Manner(symlinks, skip, overwrite)))

    def copy_out(
        self,
        path: Path,
        host_path: Path,
        *,
        symlinks: bool = False,
        skip: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Copy a file or a tree to ``host_path``, which is the copy's own name; a tree may be copied into a
        directory that exists.

        Nothing is written through a link, and no link is made that leads out of the copy.
        symlinks: copy those in a tree as links; else, and where they lead out, they are refused, as devices,
            fifos and sockets are: OSError EINVAL.
        skip: leave out what would be refused. overwrite: replace files that exist; else FileExistsError.
        Permission bits are kept, without set-id; the owner is the caller. Holes stay holes.
        """
        self._run(self._trees.copy_out(path, host_path, Manner(symlinks, skip, overwrite)))

    @overload
    def tar(self, path: Path, fileobj: None = None, *, skip: bool = False) -> bytes: ...
    @overload
    def tar(self, path: Path, fileobj: IO[bytes], *, skip: bool = False) -> None: ...
    def tar(self, path: Path, fileobj: IO[bytes] | None = None, *, skip: bool = False) -> bytes | None:
        """A tar archive (pax) of a file or a tree, written to ``fileobj`` or returned, then of 1 GiB at most.

        Names are relative to the tree; symbolic links are in it as such; devices, fifos and sockets are
        refused, or with ``skip`` left out. A file that is hardly more than a hole of over 1 GiB is refused.
        """
        return self._run(self._trees.tar(path, fileobj, skip))

    def untar(self, archive: bytes | IO[bytes], path: Path = ".", *, skip: bool = False) -> None:
        """Extract a tar archive, compressed or not, below the directory ``path``, which is made if missing.

        A member with an absolute name or "..", a device or a fifo is refused: ValueError; with ``skip``, left
        out. Nothing is extracted through a link. What exists is replaced, but not a directory by a file.
        """
        self._run(self._trees.untar(archive, path, skip))
