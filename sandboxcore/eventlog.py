"""Events in a file, a line of JSON each, that many processes write at once: :class:`EventLog`. With a key
the lines are chained: :func:`sandboxcore.eventchain.verify_log` finds what was changed."""

import contextlib
import errno as E
import fcntl
import hashlib
import hmac
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from sandboxcore.errors import SpecError
from sandboxcore.events import Event, EventKind

MIN_KEY = 16  # bytes
MAX_LINE = 16 << 20  # bytes; the kernel takes 2 MiB of arguments at most
PATIENCE = 5.0  # seconds for another writer to finish
_BLOCK = 1 << 16
START = bytes(32)  # what the first line follows
_HEX = re.compile(r"[0-9a-f]{64}")

_write = os.write  # tests replace it


class ChainLink(NamedTuple):
    """Where a chain has come to: the next line's number, and the last line's mac."""

    seq: int
    mac: bytes


class _At(NamedTuple):
    """The file as this process left it."""

    inode: tuple[int, int]
    size: int
    link: ChainLink


class EventLog:
    """A file of events. Subscribe its :meth:`append`, or call it. Any number of threads and processes may
    write the same file; each line is whole, and lines of one thread keep their order.

    A process that was killed while it wrote may leave part of a line. The next writer ends that line, says so
    in an event ``log.torn`` (bytes, sha256 of what was there), and goes on. If it is killed, too, before it
    has said so, the next one tells of all that is there since the last whole line.

    Parameters
    ----------
    path: made with mode 0600 where missing; its directory must exist. Never through a symbolic link.
    key: at least 16 bytes; then each line has ``seq``, ``prev`` and ``mac``, the HMAC-SHA256 over the mac of
        the line before and this line. All writers need the same one.
    max_bytes: a line that would make it longer begins a new file; the old one is renamed to ``PATH.00000001``
        and so on, which are never removed, or all but the last ``backups``. Default: it grows.
    fsync: have each line on the disk before :meth:`append` returns.

    Raises :class:`SpecError` where a key is missing or another one, OSError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        key: bytes | None = None,
        max_bytes: int | None = None,
        backups: int | None = None,
        fsync: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self._key = None if key is None else checked_key(key)
        if max_bytes is not None and max_bytes < 1:
            raise SpecError(f"event log: max_bytes: {max_bytes!r} is not positive")
        if backups is not None and backups < 0:
            raise SpecError(f"event log: backups: {backups!r} is negative")
        self._max, self._backups, self._fsync = max_bytes, backups, fsync
        self._lock = threading.RLock()
        self._busy = False
        self._pending: list[Event] = []
        self._fd, self._pid = -1, os.getpid()
        self._at: _At | None = None
        self._closed = False
        self._check()

    def append(self, event: Event) -> None:
        """Write one. Raises OSError, and TimeoutError where another writer does not finish within 5 s; then
        it is not in the log. SpecError for ``log.torn``, of which only the log itself knows."""
        if event.kind is EventKind.LOG_TORN:
            raise SpecError(f"event log: {event.kind.value} is not yours to write")
        if self._pid != os.getpid():  # forked: flock(2) would not tell us and our parent apart
            self._lock, self._busy, self._pending = threading.RLock(), False, []
            self._let_go()
        with self._lock:
            self._pending.append(event)
            if self._busy:  # a finaliser, while this very thread is at it
                return
            self._busy = True
            try:
                while self._pending:
                    self._put(self._pending.pop(0))
            finally:
                self._busy = False

    def close(self) -> None:
        """Let go of the file. Idempotent; nothing can be appended any more."""
        with self._lock:
            self._closed = True
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self._let_go()

    def __repr__(self) -> str:
        return f"<EventLog {str(self.path)!r}{'' if self._key is None else ' chained'}>"

    # --- the file -------------------------------------------------------------------------------

    def _let_go(self) -> None:
        fd, self._fd, self._at, self._pid = self._fd, -1, None, os.getpid()
        if fd >= 0:
            os.close(fd)

    def _check(self) -> None:
        """Whether what is there can be continued."""
        with self._locked() as fd:
            line = _last_line(fd)
        if line is None:
            return
        found = parsed(line)
        if self._key is None:
            if found is not None and "mac" in found:
                raise SpecError(f"{self.path}: is chained: key= is missing")
        elif found is None or "mac" not in found:
            raise SpecError(f"{self.path}: begun without a key")
        elif not is_authentic(self._key, found):
            raise SpecError(f"{self.path}: written with another key, or changed")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The file, while nobody else writes."""
        if self._closed:
            raise ValueError("the event log is closed")
        deadline = time.monotonic() + PATIENCE
        while True:
            if self._fd < 0:
                self._fd = _opened(self.path)
            fd = self._fd
            wait_for(fd, self.path, deadline)
            if is_there(fd, self.path):
                break
            self._let_go()  # renamed meanwhile
        try:
            yield fd
        finally:
            if self._fd == fd:
                fcntl.flock(fd, fcntl.LOCK_UN)

    def _put(self, event: Event) -> None:
        with self._locked() as fd:
            link = self._continued(fd)
            line, after = self._line(event, link)
            size = os.fstat(fd).st_size
            if self._max is not None and size and size + len(line) > self._max:
                self._rotate()
                self._let_go()
            else:
                self._append(fd, line, after)
                return
        with self._locked() as fd:  # the new one; another writer may have begun it
            line, after = self._line(event, self._continued(fd))
            self._append(fd, line, after)
            self._prune()  # only now: until there is a line, the chain goes on from the last full file

    def _line(self, event: Event, link: ChainLink) -> tuple[bytes, ChainLink]:
        data = event.to_dict()
        if self._key is not None:
            data |= {"seq": link.seq, "prev": link.mac.hex()}
            link = ChainLink(link.seq + 1, _mac(self._key, link.mac, data))
            data["mac"] = link.mac.hex()
        line = canonical(data) + b"\n"
        if len(line) > MAX_LINE:
            raise SpecError(f"event log: an event of more than {MAX_LINE} bytes")
        return line, link

    def _append(self, fd: int, line: bytes, after: ChainLink) -> None:
        size = os.fstat(fd).st_size
        try:
            left = memoryview(line)
            while left:
                left = left[_write(fd, left) :]
        except BaseException:
            self._at = None
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)  # a full disk: leave no half of it
            raise
        if self._fsync:
            os.fsync(fd)
            if not size:
                _sync_directory(self.path.parent)
        self._at = _At(_inode(fd), size + len(line), after)

    def _continued(self, fd: int) -> ChainLink:
        """What the next line follows. A torn last line is ended, and told of."""
        at, size = self._at, os.fstat(fd).st_size
        if at is not None and at.inode == _inode(fd) and at.size == size:
            return at.link
        rest = _tail(fd, size)
        if rest and parsed(rest) is not None:  # but for the newline it is whole
            self._append(fd, b"\n", ChainLink(0, START))
            self._at, rest, size = None, b"", size + 1
        link = ChainLink(0, START) if self._key is None else self._last(fd)
        if (start := _torn_from(fd, size)) < size:
            told = Event(kind=EventKind.LOG_TORN, data=_digest(fd, start, size if rest else size - 1))
            line, link = self._line(told, link)
            self._append(fd, (b"\n" if rest else b"") + line, link)
        return link

    def _last(self, fd: int) -> ChainLink:
        """From the last line that is one of a chain, here or in the files before."""
        for line in _backwards(fd):
            if (link := link_of(line)) is not None:
                return link
        for part in reversed(full_files(self.path)):
            with open(part, "rb") as file:
                for line in _backwards(file.fileno()):
                    if (link := link_of(line)) is not None:
                        return link
        return ChainLink(0, START)

    def _rotate(self) -> None:
        """Have a new file begun. We hold the lock of this one, so nobody else does."""
        parts = full_files(self.path)
        number = int(parts[-1].suffix[1:]) + 1 if parts else 1
        os.rename(self.path, f"{self.path}.{number:08d}")

    def _prune(self) -> None:
        """Remove full files, the oldest first. We hold the lock, so nobody reads them to go on with the
        chain."""
        if self._backups is not None:
            parts = full_files(self.path)
            for part in parts[: max(0, len(parts) - self._backups)]:
                part.unlink(missing_ok=True)


def _opened(path: Path) -> int:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(path, flags, 0o600)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise SpecError(f"{path}: not a regular file")
        if about.st_uid != os.geteuid():
            raise SpecError(f"{path}: belongs to uid {about.st_uid}")
        if about.st_mode & 0o177:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def wait_for(fd: int, path: Path, deadline: float, how: int = fcntl.LOCK_EX) -> None:
    pause = 0.0002
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            raise TimeoutError(E.ETIMEDOUT, f"another writer holds it for {PATIENCE:.0f} s", str(path))
        time.sleep(pause)
        pause = min(pause * 2, 0.01)


def is_there(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _inode(fd: int) -> tuple[int, int]:
    about = os.fstat(fd)
    return about.st_dev, about.st_ino


def full_files(path: Path) -> list[Path]:
    """The files that were full, oldest first."""
    name = re.compile(re.escape(path.name) + r"\.\d{8}")
    return sorted(path.with_name(one) for one in os.listdir(path.parent) if name.fullmatch(one))


def _tail(fd: int, size: int) -> bytes:
    """What is behind the last newline."""
    found = b""
    while size > 0 and b"\n" not in found and len(found) <= MAX_LINE:
        start = max(0, size - _BLOCK)
        found = os.pread(fd, size - start, start) + found
        size = start
    return found.rpartition(b"\n")[2]


def _torn_from(fd: int, size: int) -> int:
    """Where the last line ends that is one: what is behind it was not finished, or not told of."""
    start = size - len(_tail(fd, size))
    for line in _backwards(fd):
        if parsed(line) is not None:
            break
        start -= len(line) + 1
    return start


def _digest(fd: int, start: int, end: int) -> dict[str, Any]:
    """What is told of a part of the file."""
    digest = hashlib.sha256()
    for at in range(start, end, _BLOCK):
        digest.update(os.pread(fd, min(_BLOCK, end - at), at))
    return {"bytes": end - start, "sha256": digest.hexdigest()}


def _backwards(fd: int) -> Iterator[bytes]:
    """Whole lines, the last one first."""
    end = os.fstat(fd).st_size
    end -= len(_tail(fd, end))
    while end > 0:
        line = _tail(fd, end - 1)
        yield line
        end -= len(line) + 1


def _last_line(fd: int) -> bytes | None:
    """The last line that is one."""
    for line in _backwards(fd):
        if parsed(line) is not None:
            return line
    return None


# --- lines ----------------------------------------------------------------------------------------------


def checked_key(key: bytes) -> bytes:
    if not isinstance(key, bytes | bytearray) or len(key) < MIN_KEY:
        raise SpecError(f"event log: key: not {MIN_KEY} bytes at least")
    return bytes(key)


def canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _mac(key: bytes, before: bytes, chained: dict[str, Any]) -> bytes:
    return hmac.digest(key, before + canonical(chained), "sha256")


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not in JSON")


def parsed(line: bytes) -> dict[str, Any] | None:
    """The mapping of a line, if it is one."""
    try:
        found = json.loads(line.decode("ascii"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def link_of(line: bytes) -> ChainLink | None:
    found = parsed(line) or {}
    mac, seq = found.get("mac"), found.get("seq")
    if not isinstance(mac, str) or not _HEX.fullmatch(mac) or type(seq) is not int or seq < 0:
        return None
    return ChainLink(seq + 1, bytes.fromhex(mac))


def is_authentic(key: bytes, found: dict[str, Any]) -> bool:
    """Whether whoever has the key wrote this line, wherever it stands."""
    mac, prev = found.get("mac"), found.get("prev")
    if not (isinstance(mac, str) and isinstance(prev, str) and _HEX.fullmatch(mac) and _HEX.fullmatch(prev)):
        return False
    chained = {name: value for name, value in found.items() if name != "mac"}
    try:
        ours = _mac(key, bytes.fromhex(prev), chained)
    except (ValueError, RecursionError):  # nothing that we would write
        return False
    return hmac.compare_digest(ours, bytes.fromhex(mac))
