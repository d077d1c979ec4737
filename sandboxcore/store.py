"""What persistent sandboxes are remembered by: one SQLite database and one directory each, below the state
directory.

Everybody who may write the directory is the same owner; several processes may use it at once. SQLite
(WAL) makes each change atomic; what takes longer than one change, such as starting a sandbox, holds the
sandbox's own file lock. A record is written before the thing it describes is let loose, so after a crash
there may be a record without a sandbox, which the next look corrects, but no sandbox without a record.
"""

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from sandboxcore.errors import SandboxError, SandboxNotFound, SpecError
from sandboxcore.link import Home
from sandboxcore.records import (
    CHANGES,
    SCHEMA,
    TABLES,
    CommandRecord,
    Damage,
    Damaged,
    Record,
    SandboxRecord,
    columns,
    command_of,
    row_of,
    sandbox_of,
    session_of,
)
from sandboxcore.statedir import close_lock, open_lock, private_directory, same_file

DATABASE = "state.db"
WATCHED = ("state", "last_active_at", "expires_at", "policy", "archived_at", "started_at", "pid", "doomed")
PATIENCE = 10.0  # seconds for other processes to finish a change of the database

Read = TypeVar("Read")


class NameTaken(SpecError):
    """The name of a new sandbox is that of another one."""


class Store:
    """The state directory. Any thread may use it, and a forked child. Raises :class:`SandboxError` where it
    cannot be used."""

    def __init__(self, state_dir: str | os.PathLike[str] | None = None) -> None:
        self.path = private_directory(state_dir)
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._held: set[tuple[str, int]] = set()  # sandboxes whose locks it holds, by threads
        _stores.add(self)
        with self._understood():
            self._prepare()
            self._connection()

    def _prepare(self) -> None:
        (self.path / "sandboxes").mkdir(mode=0o700, exist_ok=True)
        database = self.path / DATABASE
        if not database.exists():
            # Linked, not opened: closing a descriptor of the database would drop this process's locks on it.
            fd, empty = tempfile.mkstemp(prefix=".new-", dir=self.path)
            os.close(fd)
            with contextlib.suppress(FileExistsError):
                os.link(empty, database)
            os.unlink(empty)

    def _connection(self) -> sqlite3.Connection:
        """The database, open. A handle that was closed opens it again."""
        if self._db is None:
            self._db = self._open()
        return self._db

    def _open(self) -> sqlite3.Connection:
        database = self.path / DATABASE
        db = sqlite3.connect(database, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))
            db.execute("PRAGMA synchronous = NORMAL")  # whole after a power cut, and then nothing runs anyway
            db.execute("PRAGMA foreign_keys = ON")
            if _version(db) < SCHEMA:
                with immediate(db):
                    for number in range(_version(db) + 1, SCHEMA + 1):  # or somebody was faster
                        for statement in filter(str.strip, CHANGES[number].split(";")):
                            db.execute(statement)
                    db.execute(f"PRAGMA user_version = {max(_version(db), SCHEMA)}")
            if _version(db) != SCHEMA:
                raise SandboxError(f"{self.path}: schema {_version(db)}, but this version knows {SCHEMA}")
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """What the system or SQLite says is an error of the state directory."""
        try:
            yield
        except SandboxError:  # some are OSErrors, too
            raise
        except (OSError, sqlite3.Error) as error:
            raise SandboxError(f"{self.path}: {error}") from error

    def _do(self, statement: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock, self._understood():
            return self._connection().execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """Several statements, all or none, and nobody else's between them."""
        with self._lock, self._understood(), immediate(self._connection()) as db:
            yield db

    def close(self) -> None:
        """Let go of the database. Idempotent; whatever is asked next opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- records --------------------------------------------------------------------------------

    def add(self, *records: Record) -> None:
        """Remember something new: all of it, or nothing. Raises what :func:`insert` does."""
        with self._change() as db:
            for record in records:
                insert(db, record)

    def change(self, sandbox: str, **values: Any) -> None:
        """Change fields of a sandbox's record, all at once."""
        plain = columns(values)
        sets = ", ".join(f"{name} = ?" for name in plain)
        self._do(f"UPDATE sandboxes SET {sets} WHERE id = ?", [*plain.values(), sandbox])

    def change_unused(self, seen: SandboxRecord, **values: Any) -> bool:
        """The same, unless somebody has used it since its record was read, has started or stopped it, has
        given it more time, or has an active session. Whether it was done."""
        plain, now = columns(values), row_of(seen)
        sets = ", ".join(f"{name} = ?" for name in plain)
        same = " AND ".join(f"{name} IS ?" for name in WATCHED)
        rows = self._do(
            f"UPDATE sandboxes SET {sets} WHERE id = ? AND {same} AND NOT EXISTS"
            " (SELECT 1 FROM sessions WHERE sandbox = sandboxes.id AND state = 'active') RETURNING id",
            [*plain.values(), seen.id, *(now[name] for name in WATCHED)],
        )
        return bool(rows)

    def touch(self, sandbox: str, when: float) -> bool:
        """Put down that one is used; False where it does not run any more."""
        query = "UPDATE sandboxes SET last_active_at = ? WHERE id = ? AND state = 'running' RETURNING id"
        return bool(self._do(query, (when, sandbox)))

    def end(self, record: SandboxRecord, when: float) -> None:
        """Put a sandbox down as stopped, unless its record has changed since this one was read."""
        self._do(
            "UPDATE sandboxes SET state = 'stopped', stopped_at = ?, pid = 0, ticks = 0"
            " WHERE id = ? AND pid = ? AND ticks = ? AND state IN ('running', 'paused')",
            (when, record.id, record.pid, record.ticks),
        )

    def get(self, key: str) -> SandboxRecord | None:
        """The sandbox of an id or, if it is nobody's, of a name or a UUID. Raises :class:`SandboxError` for
        a record that cannot be read."""
        query = "SELECT * FROM sandboxes WHERE id = ? OR name = ? ORDER BY id = ? DESC"  # by two indexes
        rows = self._do(query, (key, key, key))
        if not rows and (other := _id_of(key)):
            rows = self._do("SELECT * FROM sandboxes WHERE id = ?", (other,))
        try:
            return sandbox_of(rows[0]) if rows else None
        except Damaged as error:
            raise SandboxError(f"{self.path}: damaged record: {error}") from None

    def find(self, key: str) -> SandboxRecord:
        """The same. Raises :class:`SandboxNotFound`."""
        record = self.get(key)
        if record is None:
            raise SandboxNotFound(f"no sandbox has the name or id {key!r} in {self.path}")
        return record

    def all(self) -> list[SandboxRecord]:
        """Every sandbox, oldest first, but for :meth:`damaged` records."""
        return list(readable(self._do("SELECT * FROM sandboxes ORDER BY created_at, id"), sandbox_of))

    def damaged(self) -> list[Damage]:
        """Rows that cannot be read: left out elsewhere, and left as they are."""
        found: list[Damage] = []
        for table, read in (("sandboxes", sandbox_of), ("commands", command_of), ("sessions", session_of)):
            for row in self._do(f"SELECT * FROM {table} ORDER BY id"):
                try:
                    read(row)
                except Damaged as error:
                    found.append(error.damage)
        return found

    def commands(self, sandbox: str) -> list[CommandRecord]:
        """A sandbox's detached commands, oldest first."""
        query = "SELECT * FROM commands WHERE sandbox = ? ORDER BY started_at, id"
        return list(readable(self._do(query, (sandbox,)), command_of))

    def remove(self, sandbox: str) -> None:
        """Forget a sandbox with its commands, then its directory; its sessions end. The caller holds its
        lock."""
        with self._change() as db:
            db.execute(
                "UPDATE sessions SET state = 'terminated', ended_at = ?, ended_why = coalesce("
                "(SELECT nullif(doomed, '') FROM sandboxes WHERE id = ?), 'its sandbox was destroyed')"
                " WHERE sandbox = ? AND state != 'terminated'",
                (time.time(), sandbox, sandbox),
            )
            db.execute("DELETE FROM sandboxes WHERE id = ?", (sandbox,))
        shutil.rmtree(self.home(sandbox).path, ignore_errors=True)

    def remove_command(self, command: str) -> None:
        """Forget a detached command."""
        self._do("DELETE FROM commands WHERE id = ?", (command,))

    # --- directories and locks ------------------------------------------------------------------

    def home(self, sandbox: str) -> Home:
        """A sandbox's directory, which need not exist."""
        return Home(self.path / "sandboxes" / sandbox)

    def strays(self) -> list[str]:
        """Ids of directories and locks without a record: left by a crash, or being made just now."""
        found = set(os.listdir(self.path / "sandboxes"))  # before the records: a later one is no stray
        known = {row["id"] for row in self._do("SELECT id FROM sandboxes")}
        return sorted({name.removesuffix(".lock") for name in found} - known)

    def orphans(self, sandbox: str) -> list[str]:
        """Files in a sandbox's directory that are nobody's. The caller holds its lock."""
        known = {"keeper", "work", "pause", "group", "layers"}
        for row in self._do("SELECT id FROM commands WHERE sandbox = ?", (sandbox,)):
            known |= {row["id"], f"{row['id']}.journal"}
        return sorted(set(os.listdir(self.home(sandbox).path)) - known)

    def holds(self, sandbox: str) -> bool:
        """Whether a sandbox's lock is held by this very store, for this thread."""
        return (sandbox, threading.get_ident()) in self._held

    def idle(self, sandbox: str) -> bool:
        """Whether nobody holds a sandbox's lock just now. Makes no file, and removes none."""
        try:
            fd = open_lock(self._lock_path(sandbox))
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            close_lock(fd)
        return True

    def _lock_path(self, sandbox: str) -> Path:
        return self.path / "sandboxes" / f"{sandbox}.lock"

    @contextlib.contextmanager
    def locked(self, sandbox: str, *, wait: bool = True) -> Iterator[None]:
        """Hold a sandbox's lock: whoever starts, stops or removes it does. Released by the kernel when the
        holder dies; its file goes with the record. Raises BlockingIOError with ``wait=False`` if somebody
        else holds it."""
        path = self._lock_path(sandbox)
        while True:
            with self._understood():
                fd = open_lock(path, os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if not same_file(fd, path):  # it was removed while we waited
                    continue
                held = (sandbox, threading.get_ident())
                self._held.add(held)
                try:
                    yield
                finally:
                    self._held.discard(held)
                    if not self._do("SELECT 1 FROM sandboxes WHERE id = ?", (sandbox,)):
                        path.unlink(missing_ok=True)
                return
            finally:
                close_lock(fd)


def _patiently(action: Callable[[], Any]) -> None:
    """A change of the journal's mode does not wait for others by itself."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            action()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _id_of(key: str) -> str | None:
    """The id that a UUID stands for: its digits."""
    try:
        return f"sbx-{uuid.UUID(key).hex}"
    except ValueError:
        return None


def insert(db: sqlite3.Connection, record: Record) -> None:
    """One more row. Raises :class:`NameTaken`; :class:`SandboxNotFound` where its sandbox is gone; SpecError
    where its table does not take it."""
    values = row_of(record)
    marks = ", ".join("?" * len(values))
    query = f"INSERT INTO {TABLES[type(record)]} ({', '.join(values)}) VALUES ({marks})"
    try:
        db.execute(query, list(values.values()))
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_UNIQUE and isinstance(record, SandboxRecord):
            raise NameTaken(f"name: {record.name!r} is the name of another sandbox") from None
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            raise SandboxNotFound(f"the sandbox of {record.id} is not on record any more") from None
        raise SpecError(f"cannot be put on record: {error}") from None


def readable(rows: Iterable[sqlite3.Row], read: Callable[[sqlite3.Row], Read]) -> Iterator[Read]:
    """Those that are not damaged."""
    for row in rows:
        with contextlib.suppress(Damaged):
            yield read(row)


@contextlib.contextmanager
def immediate(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A transaction that begins with the right to write."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise


_stores: weakref.WeakSet[Store] = weakref.WeakSet()
_inherited: list[sqlite3.Connection | None] = []


def _after_fork_in_child() -> None:
    """A connection must not cross a fork, nor be closed there: sqlite.org/howtocorrupt.html, 2.6."""
    for store in _stores:
        _inherited.append(store._db)
        store._lock, store._db, store._held = threading.RLock(), None, set()


os.register_at_fork(after_in_child=_after_fork_in_child)
