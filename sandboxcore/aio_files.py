"""The files of a living sandbox for asyncio: :class:`sandboxcore.files.Files`, whose waiting is awaited."""

import asyncio
import errno as E
from collections.abc import Callable, Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, overload

from sandboxcore import _native
from sandboxcore.aio_loop import LOCK_PATIENCE, has_ended, patiently, readable, writable
from sandboxcore.errors import SandboxGone
from sandboxcore.fileops import Ask, Data, FileInfo, Operations, Path, Steps
from sandboxcore.files import REPLY_PATIENCE, FileServer, ServerLost
from sandboxcore.filetree import Manner, TreeOperations
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import ANSWER_PATIENCE, Link

if TYPE_CHECKING:
    from sandboxcore.sandbox import Sandbox

T = TypeVar("T")
Listing = list[FileInfo]  # inside the class `list` is a method


async def looking(sandbox: "Sandbox", look: Callable[[], T]) -> T:
    """What needs a sandbox's lock for an instant. A thread of a manager may have it for as long as a fork or
    an archive takes, which is waited for without blocking. Raises TimeoutError."""

    def lock() -> None:
        if not sandbox._lock.acquire(blocking=False):
            raise BlockingIOError

    text = f"sandbox {sandbox.name}: somebody else has been changing it for {LOCK_PATIENCE} s"
    await patiently(lock, LOCK_PATIENCE, text)
    try:
        return look()
    finally:
        sandbox._lock.release()


class AsyncFileServer(FileServer):
    """The connection to a sandbox's file server, shared by all tasks."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = asyncio.Lock()

    async def put(self, link: Link, ask: Ask) -> int:
        """Put one request and wait for its answer. Raises OSError, TimeoutError, ServerLost."""
        ask.paths()  # what is wrong with them is found before anything is sent
        async with self._turn:
            self._unwanted = False
            try:
                record = await self._put(link, ask)
            except BaseException:  # the answer may still come: it must not be taken for the next one's
                self._drop()
                raise
            if self._unwanted:
                self._drop()
        return ask.answer(record)

    def close(self, *, wait: float = 0) -> None:
        """Let go of the server; wait so many seconds at most until it knows. But never for whoever is at it,
        who closes behind himself. Idempotent."""
        self._unwanted = True
        if not self._turn.locked():
            self._drop(wait)

    def __del__(self) -> None:
        self._drop()

    async def _put(self, link: Link, ask: Ask) -> _native.Record:
        about, text = ask.about or ask.path, "the sandbox takes no requests"
        try:
            with link:
                await writable(link.work.fileno(), ANSWER_PATIENCE)
                connection = self._connect(link)
            ask.send(connection.fileno())
            text = f"no answer within {REPLY_PATIENCE:.0f} s"
            await readable(connection.fileno(), REPLY_PATIENCE)
        except (ConnectionError, _native.NativeFailure):  # it is closed
            raise ServerLost(taken=False) from None
        except TimeoutError:
            raise TimeoutError(E.ETIMEDOUT, text, about) from None
        try:
            record = _native.receive(connection.fileno())
        except ConnectionError:
            record = None
        if record is None:
            raise ServerLost(taken=True)
        return record


class Files:
    """:class:`sandboxcore.files.Files` for asyncio, with the same parameters, results and errors.

    Regular files cannot be waited for: data is moved in pieces, between which other tasks have their turn.
    File objects that are given are read and written as they are, which may block.
    """

    def __init__(self, sandbox: "Sandbox", server: AsyncFileServer) -> None:
        self._sandbox, self._server = sandbox, server
        self._operations = Operations(sandbox.spec, sandbox._plan.host, sandbox)
        self._trees = TreeOperations(self._operations)

    async def _ask(self, ask: Ask) -> int:
        again = False
        while True:
            link = await looking(self._sandbox, lambda: self._sandbox._ready("use its files"))
            try:
                return await self._server.put(link, ask)
            except ServerLost as lost:
                final = again or (lost.taken and not ask.idempotent)
                if final:
                    await has_ended(link)
                if await looking(self._sandbox, lambda: self._sandbox.state) is not SandboxState.RUNNING:
                    raise SandboxGone(f"sandbox {self._sandbox.name}: its init has ended") from None
                if final:
                    text = "its file server was killed; the change may be made"
                    raise ConnectionError(E.ECONNRESET, f"sandbox {self._sandbox.name}: {text}") from None
                again = True

    async def _run(self, steps: Steps[T]) -> T:
        try:
            ask = next(steps)
            while True:
                try:
                    if ask is None:
                        await asyncio.sleep(0)
                    answer = -1 if ask is None else await self._ask(ask)
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
    async def read(
        self, path: Path, *, text: Literal[False] = False, offset: int = 0, size: int | None = None
    ) -> bytes: ...
    @overload
    async def read(
        self,
        path: Path,
        *,
        text: Literal[True],
        encoding: str = "utf-8",
        offset: int = 0,
        size: int | None = None,
    ) -> str: ...
    async def read(
        self,
        path: Path,
        *,
        text: bool = False,
        encoding: str = "utf-8",
        offset: int = 0,
        size: int | None = None,
    ) -> bytes | str:
        """The content of a file, or ``size`` bytes from ``offset``."""
        data = await self._run(self._operations.read(path, offset, size))
        return data.decode(encoding) if text else data

    async def write(
        self,
        path: Path,
        data: Data,
        *,
        mode: int | None = None,
        append: bool = False,
        parents: bool = True,
        exclusive: bool = False,
    ) -> int:
        """Write bytes, text (as UTF-8) or what a file object has; returns the number of bytes."""
        return await self._run(
            self._operations.write(path, data, mode, append=append, parents=parents, exclusive=exclusive)
        )

    async def write_many(self, files: Mapping[str, Data | tuple[Data, int]]) -> None:
        """:meth:`write` of several: path to content, or to (content, mode)."""
        await self._run(self._operations.write_many(files))

    async def open(
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
        """A Python file, as from :func:`open`: opening it is awaited, using it is not."""
        return await self._run(
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

    async def list(self, path: Path = ".", *, depth: int | None = 1) -> Listing:
        """What is in a directory, sorted; with ``depth`` also below it, None: without end."""
        return await self._run(self._operations.listing(path, depth))

    async def stat(self, path: Path, follow: bool = True) -> FileInfo:
        """What a file is; without ``follow``, what a symbolic link itself is."""
        return await self._run(self._operations.stat(path, follow))

    async def exists(self, path: Path, follow: bool = True) -> bool:
        """Whether there is such a file, of any type."""
        return await self._run(self._operations.exists(path, follow))

    # --- changing -------------------------------------------------------------------------------

    async def mkdir(
        self, path: Path, *, mode: int = 0o755, parents: bool = False, exist_ok: bool = False
    ) -> None:
        """Make a directory; with ``parents`` also those above it."""
        await self._run(self._operations.mkdir(path, mode, parents, exist_ok))

    async def remove(self, path: Path, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, a link or an empty directory; with ``recursive`` a whole tree."""
        await self._run(self._operations.remove(path, recursive, missing_ok))

    async def rename(self, old: Path, new: Path) -> None:
        """Rename; what ``new`` was is replaced, as by rename(2)."""
        await self._run(self._operations.rename(old, new))

    async def symlink(self, target: Path, path: Path) -> None:
        """Make ``path`` a symbolic link to ``target``, which is any text."""
        await self._run(self._operations.symlink(target, path))

    async def chmod(self, path: Path, mode: int) -> None:
        """Set the permission bits. Set-id bits are refused: ValueError."""
        await self._run(self._operations.chmod(path, mode))

    # --- trees ----------------------------------------------------------------------------------

    async def copy_in(
        self,
        host_path: Path,
        path: Path,
        *,
        symlinks: bool = False,
        skip: bool = False,
        overwrite: bool = True,
    ) -> None:
        """Copy a file or a tree of the host to ``path``, which is the copy's own name."""
        await self._run(self._trees.copy_in(host_path, path, Manner(symlinks, skip, overwrite)))

    async def copy_out(
        self,
        path: Path,
        host_path: Path,
        *,
        symlinks: bool = False,
        skip: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Copy a file or a tree to ``host_path``, which is the copy's own name."""
        await self._run(self._trees.copy_out(path, host_path, Manner(symlinks, skip, overwrite)))

    @overload
    async def tar(self, path: Path, fileobj: None = None, *, skip: bool = False) -> bytes: ...
    @overload
    async def tar(self, path: Path, fileobj: IO[bytes], *, skip: bool = False) -> None: ...
    async def tar(self, path: Path, fileobj: IO[bytes] | None = None, *, skip: bool = False) -> bytes | None:
        """A tar archive (pax) of a file or a tree, written to ``fileobj`` or returned."""
        return await self._run(self._trees.tar(path, fileobj, skip))

    async def untar(self, archive: bytes | IO[bytes], path: Path = ".", *, skip: bool = False) -> None:
        """Extract a tar archive, compressed or not, below the directory ``path``."""
        await self._run(self._trees.untar(archive, path, skip))
