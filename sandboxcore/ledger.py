"""The state directory with sessions: who uses which sandbox. Each method is one change, or one look, that no
other process can come between."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sandboxcore.errors import (
    InvalidTransition,
    SandboxBusy,
    SandboxError,
    SandboxNotFound,
    SessionNotFound,
)
from sandboxcore.records import Damaged, SandboxRecord, SessionRecord, session_of
from sandboxcore.session import LIVE, SessionState, check_move, sources
from sandboxcore.store import Store, insert, readable

_LIVE = ", ".join(f"'{state}'" for state in LIVE)


class Ledger(Store):
    """A :class:`Store` that knows sessions and settings, too."""

    # --- sessions -------------------------------------------------------------------------------

    def open_session(self, session: SessionRecord) -> None:
        """A new one. Raises :class:`SandboxNotFound` where its sandbox is gone, or about to be, and
        InvalidTransition where it does not run."""
        with self._change() as db:
            owner = _owner_of_usable(db, session.sandbox)
            insert(db, session)
            if session.client != (owner or ""):
                db.execute("UPDATE sandboxes SET shared = 1 WHERE id = ?", (session.sandbox,))

    def session(self, session_id: str) -> SessionRecord:
        """Raises :class:`SessionNotFound`, and :class:`SandboxError` for a record that cannot be read."""
        return self._read(self._row("*", session_id))

    def bare_session(self, session_id: str) -> SessionRecord:
        """The same without its timeouts, metadata and labels: also one in which these cannot be read."""
        names = "id, sandbox, client, state, created_at, last_active_at, trace_id, ended_at, ended_why"
        return SessionRecord(**dict(self._row(names, session_id)))

    def _row(self, names: str, session_id: str) -> sqlite3.Row:
        rows = self._do(f"SELECT {names} FROM sessions WHERE id = ?", (session_id,))
        if not rows:
            raise SessionNotFound(f"no session has the id {session_id!r} in {self.path}")
        return rows[0]

    def _read(self, row: sqlite3.Row) -> SessionRecord:
        try:
            return session_of(row)
        except Damaged as error:
            raise SandboxError(f"{self.path}: damaged record: {error}") from None

    def sessions(
        self,
        *,
        states: Sequence[SessionState] = (),
        client: str | None = None,
        sandbox: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[SessionRecord]:
        """Those that are all of this, oldest first; without ``states`` in any."""
        wheres, values = ["1"], []
        if states:
            wheres.append(f"state IN ({', '.join('?' * len(states))})")
            values += [str(state) for state in states]
        for name, value in (("client", client), ("sandbox", sandbox)):
            if value is not None:
                wheres.append(f"{name} = ?")
                values.append(value)
        rows = self._do(
            f"SELECT * FROM sessions WHERE {' AND '.join(wheres)} ORDER BY created_at, id", values
        )
        wanted = (labels or {}).items()
        return [session for session in readable(rows, session_of) if wanted <= session.labels.items()]

    def move_session(
        self, session_id: str, to: SessionState, wanted: str, *, alone: bool = False
    ) -> SessionRecord:
        """Bring one into another state, and touch it. ``alone``: only if no other session of its sandbox is
        active, or :class:`SandboxBusy`. Raises InvalidTransition, SessionNotFound; and for one that becomes
        active what :meth:`open_session` does."""
        with self._change() as db:
            row = self._row("*", session_id)
            check_move(session_id, SessionState(self._read(row).state), to, wanted)
            others = "SELECT 1 FROM sessions WHERE sandbox = ? AND state = 'active' AND id != ?"
            if alone and db.execute(others, (row["sandbox"], session_id)).fetchone():
                raise SandboxBusy(f"session {session_id}: {wanted}: another one uses its sandbox")
            if to is SessionState.ACTIVE:
                _owner_of_usable(db, row["sandbox"])
            update = "UPDATE sessions SET state = ?, last_active_at = ? WHERE id = ?"
            db.execute(update, (to.value, time.time(), session_id))
            return self._read(self._row("*", session_id))

    def put_back(self, seen: SessionRecord) -> None:
        """A session that was suspended just now is again as it was."""
        self._do(
            "UPDATE sessions SET state = ?, last_active_at = ? WHERE id = ? AND state = 'suspended'",
            (seen.state, seen.last_active_at, seen.id),
        )

    def take_session(self, session_id: str) -> SessionRecord | None:
        """Make a detached session active; None where somebody was faster. Raises what :meth:`open_session`
        does."""
        with self._change() as db:
            done = db.execute(
                "UPDATE sessions SET state = 'active', last_active_at = ?"
                " WHERE id = ? AND state = 'detached' RETURNING *",
                (time.time(), session_id),
            ).fetchall()
            if done:
                _owner_of_usable(db, done[0]["sandbox"])
            return self._read(done[0]) if done else None

    def end_session(
        self, session_id: str, why: str, *, unless_touched: float | None = None
    ) -> tuple[bool, bool]:
        """Terminate one, for good. Returns whether it was still going on, and whether it was the last one of
        its sandbox and that does not last without: it is doomed then, nobody gets a new one.
        ``unless_touched``: only if it was active last at this moment."""
        now = time.time()
        states = ", ".join(f"'{state}'" for state in sources(SessionState.TERMINATED))
        with self._change() as db:
            rows = db.execute(
                "UPDATE sessions SET state = 'terminated', ended_at = ?, ended_why = ?"
                f" WHERE id = ? AND state IN ({states})"
                " AND (? IS NULL OR last_active_at = ?) RETURNING sandbox",
                (now, why, session_id, unless_touched, unless_touched),
            ).fetchall()
            if not rows:
                return False, False
            last = db.execute(
                "UPDATE sandboxes SET doomed = ? WHERE id = ? AND NOT lasting AND NOT EXISTS"
                f" (SELECT 1 FROM sessions WHERE sandbox = ? AND state IN ({_LIVE})) RETURNING id",
                (why, rows[0]["sandbox"], rows[0]["sandbox"]),
            ).fetchall()
            return True, bool(last)

    def touch_sessions(self, sandbox: str, when: float) -> None:
        """Something has happened in a sandbox: its active sessions, or with none of them the detached ones,
        were active at that moment."""
        with self._change() as db:
            for state in ("active", "detached"):
                done = db.execute(
                    "UPDATE sessions SET last_active_at = max(last_active_at, ?)"
                    " WHERE sandbox = ? AND state = ? RETURNING id",
                    (when, sandbox, state),
                ).fetchall()
                if done:
                    break
            db.execute(
                "UPDATE sandboxes SET last_active_at = max(last_active_at, ?) WHERE id = ?", (when, sandbox)
            )

    def touch_session(self, session_id: str) -> None:
        """It is active at this moment. Raises :class:`InvalidTransition` where it has ended."""
        now = time.time()
        done = self._do(
            "UPDATE sessions SET last_active_at = ? WHERE id = ? AND state != 'terminated' RETURNING sandbox",
            (now, session_id),
        )
        if not done:
            raise InvalidTransition(f"session {session_id}", self.session(session_id).state, "touch")
        query = "UPDATE sandboxes SET last_active_at = max(last_active_at, ?) WHERE id = ?"
        self._do(query, (now, done[0]["sandbox"]))

    def session_states(self) -> dict[str, dict[str, str]]:
        """The states of all that go on, also of damaged ones, by their sandboxes and ids."""
        found: dict[str, dict[str, str]] = {}
        for row in self._do(f"SELECT id, sandbox, state FROM sessions WHERE state IN ({_LIVE})"):
            found.setdefault(row["sandbox"], {})[row["id"]] = row["state"]
        return found

    def ended_sessions(self, before: float) -> list[SessionRecord]:
        """Those that were terminated before this moment."""
        query = "SELECT * FROM sessions WHERE state = 'terminated' AND coalesce(ended_at, created_at) < ?"
        return list(readable(self._do(query + " ORDER BY created_at, id", (before,)), session_of))

    def forget_session(self, session_id: str) -> bool:
        """Forget one that was terminated; whether it was on record."""
        query = "DELETE FROM sessions WHERE id = ? AND state = 'terminated' RETURNING id"
        return bool(self._do(query, (session_id,)))

    # --- sandboxes ------------------------------------------------------------------------------

    def enrol(self, record: SandboxRecord, session: SessionRecord | None = None) -> SandboxRecord:
        """A new sandbox, and with it perhaps its first session. Raises :class:`NameTaken`."""
        self.add(record, *(() if session is None else (session,)))
        return record

    def doom(self, record: SandboxRecord, why: str, *, used: bool = False) -> bool:
        """Have nobody get a new session of a sandbox: it is about to be destroyed. False where it has changed
        since its record was read: somebody used it, started it, gave it more time; or has an active session,
        which with ``used`` does not matter."""
        if not used:
            return self.change_unused(record, doomed=why)
        query = "UPDATE sandboxes SET doomed = ? WHERE id = ? AND expires_at IS ? RETURNING id"
        return bool(self._do(query, (why, record.id, record.expires_at)))

    def doom_anyhow(self, sandbox: str, why: str) -> None:
        """The same, whatever has happened."""
        self._do("UPDATE sandboxes SET doomed = ? WHERE id = ?", (why, sandbox))

    def extend(self, sandbox: str, seconds: float | None) -> float | None:
        """Give it so many seconds more, from now on where its time is over or it has no end; None: it gets
        none. Returns when it expires. Raises :class:`SandboxNotFound` where it is gone, or about to be."""
        rows = self._do(
            "UPDATE sandboxes SET expires_at = max(coalesce(expires_at, 0), ?) + ?"
            " WHERE id = ? AND doomed = '' RETURNING expires_at",
            (time.time(), seconds, sandbox),
        )
        if not rows:
            raise SandboxNotFound(f"sandbox {sandbox} is about to be destroyed, or not on record any more")
        when: float | None = rows[0]["expires_at"]
        return when

    def forget_private(self, sandbox: str) -> None:
        """It has ended."""
        with self.locked(sandbox):
            self.remove(sandbox)

    def counts(self, table: str) -> dict[str, int]:
        """How many "sandboxes" or "sessions" are on record, by state."""
        rows = self._do(f"SELECT state, count(*) AS many FROM {table} GROUP BY state ORDER BY state")
        return {str(row["state"]): int(row["many"]) for row in rows}

    # --- settings -------------------------------------------------------------------------------

    def setting(self, key: str) -> Any:
        """What :meth:`set` put there, or None."""
        rows = self._do("SELECT value FROM settings WHERE key = ?", (key,))
        with contextlib.suppress(ValueError):
            return json.loads(rows[0]["value"]) if rows else None
        raise SandboxError(f"{self.path}: damaged setting {key!r}")

    def set(self, key: str, value: Any) -> None:
        """Remember a value; None forgets it."""
        if value is None:
            self._do("DELETE FROM settings WHERE key = ?", (key,))
        else:
            self._do("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))


def _owner_of_usable(db: sqlite3.Connection, sandbox: str) -> str | None:
    """The owner of a sandbox of which a session may become active. Raises :class:`SandboxNotFound` where it
    is gone, or about to be; InvalidTransition where it does not run. What is on record does not say so of
    one of a pool, which never starts again."""
    query = "SELECT name, state, doomed, owner, host FROM sandboxes WHERE id = ?"
    row = db.execute(query, (sandbox,)).fetchone()
    if row is None or row["doomed"]:
        why = f"about to be destroyed: {row['doomed']}" if row else "not on record any more"
        raise SandboxNotFound(f"sandbox {sandbox} is {why}")
    if row["state"] != "running" and not row["host"]:
        raise InvalidTransition(f"sandbox {row['name']}", row["state"], "use it")
    owner: str | None = row["owner"]
    return owner
