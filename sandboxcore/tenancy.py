"""Who uses which sandbox, and what becomes of one that nobody has any more."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sandboxcore.errors import (
    InvalidTransition,
    SandboxBusy,
    SandboxNotFound,
    SessionNotFound,
    SpecError,
)
from sandboxcore.events import MAX_NAME, EventKind, current_trace
from sandboxcore.keeping import Keeping
from sandboxcore.lifecycle import SandboxState, new_id
from sandboxcore.managed_session import SandboxSession
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.pools import SandboxPools
from sandboxcore.records import SandboxRecord, SessionRecord, plain_metadata
from sandboxcore.sandbox import Sandbox
from sandboxcore.session import LIVE, SessionState, SessionTimeouts, check_move
from sandboxcore.spec import check_labels

AnySession = SandboxSession | str


class Tenancy(Keeping):
    """The part of :class:`SandboxManager` that knows sessions, once they are there."""

    def __init__(
        self, *directory: Any, timeouts: SessionTimeouts | None, pool: PoolConfig | None, **options: Any
    ) -> None:
        self._timeouts = timeouts or SessionTimeouts()
        super().__init__(*directory, **options)
        self.pools = SandboxPools(pool, room=self._room, on_event=self._pool_said)

    def _new_session(
        self,
        client_id: str,
        timeouts: SessionTimeouts | None,
        metadata: Mapping[str, Any] | None,
        labels: Mapping[str, str] | None,
        sandbox: str = "",
    ) -> SessionRecord:
        if not isinstance(client_id, str) or len(client_id) > MAX_NAME:  # else no event could name it
            raise SpecError(f"client_id: {client_id!r} is not a text of at most {MAX_NAME} characters")
        said, marks = plain_metadata(metadata or {}), check_labels(labels or {})
        now = time.time()
        return SessionRecord(
            id=new_id("sess"), sandbox=sandbox, client=client_id, state=SessionState.ACTIVE.value,
            created_at=now, last_active_at=now, timeouts=(timeouts or self._timeouts).to_dict(),
            metadata=said, labels=marks, trace_id=current_trace(),
        )  # fmt: skip

    def _held(
        self, session: SessionRecord, kind: EventKind, *, went_on: bool = False, **data: Any
    ) -> SandboxSession:
        """A session that is this process's now."""
        with self._guard:
            self._users.setdefault(session.sandbox, {})[session.id] = session.client
        self._emit(kind, session, **data)
        return SandboxSession(self, session, went_on=went_on)

    def _undo(self, session: SandboxSession) -> None:
        """Nobody got what :meth:`acquire` or :meth:`attach` gave just now: one that went on is left again,
        and a new one never was."""
        if session.went_on:
            self.detach(session)
        else:
            self.terminate(session)

    def _usable(self, record: SandboxRecord, wait: float | None) -> Sandbox:
        """It, and it runs: one that was created or stopped is started."""
        sandbox = self._handle(record)
        if sandbox.state in (SandboxState.CREATED, SandboxState.STOPPED):
            self._started(sandbox, wait)
        if sandbox.state is SandboxState.DESTROYED:
            raise SandboxNotFound(f"sandbox {record.name} is not on record any more")
        if sandbox.state is not SandboxState.RUNNING:
            remedy = {SandboxState.PAUSED: "; resume it", SandboxState.ARCHIVED: "; recover it"}
            raise InvalidTransition(
                f"sandbox {record.name}", sandbox.state.value, f"use it{remedy.get(sandbox.state, '')}"
            )
        return sandbox

    # --- from one state to another --------------------------------------------------------------

    def detach(self, session: AnySession) -> None:
        """Leave the sandbox running, for this client to come back to: :meth:`acquire`, :meth:`attach`,
        :meth:`resume`. Raises InvalidTransition unless the session is active."""
        moved = self._ledger.move_session(id_of(session), SessionState.DETACHED, "detach")
        self._left(moved)
        self._emit(EventKind.SESSION_DETACHED, moved)

    def suspend(self, session: AnySession) -> None:
        """Stop every process in its sandbox until :meth:`resume`. Raises :class:`SandboxBusy` while another
        session uses the sandbox, and InvalidTransition unless this one is active or detached."""
        record = self._ledger.session(id_of(session))
        check_move(record.id, SessionState(record.state), SessionState.SUSPENDED, "suspend")
        sandbox = self.find(record.sandbox)
        moved = self._ledger.move_session(record.id, SessionState.SUSPENDED, "suspend", alone=True)
        try:  # in this order: who dies between has a suspended session of a sandbox that runs
            if sandbox.state is not SandboxState.PAUSED:
                sandbox.suspend()
                self._nobody_came(record.sandbox, sandbox)
        except BaseException:
            self._ledger.put_back(record)
            raise
        self._left(moved)
        self._emit(EventKind.SESSION_SUSPENDED, moved)

    def _nobody_came(self, key: str, sandbox: Sandbox) -> None:
        """Raises :class:`SandboxBusy`, and lets it go on, where a session of it has become active before it
        stood still: from then on none does."""
        if self._ledger.sessions(states=(SessionState.ACTIVE,), sandbox=key):
            with contextlib.suppress(InvalidTransition):  # it goes on already, or has ended
                sandbox.resume()
            raise SandboxBusy(f"sandbox {sandbox.name}: suspend: another session uses it")

    def resume(self, session: AnySession, *, wait: float | None = 0.0) -> SandboxSession:
        """Go on with a suspended or a detached session: its sandbox runs, and it is active. Other suspended
        sessions of that sandbox stay suspended until they are resumed, too. wait: for room, where its sandbox
        has ended and is started again, as for :meth:`create`."""
        record = self._ledger.session(id_of(session))
        if record.state not in (SessionState.SUSPENDED, SessionState.DETACHED):
            raise InvalidTransition(f"session {record.id}", record.state, "resume")
        sandbox = self.find(record.sandbox)
        if sandbox.state is SandboxState.PAUSED and record.state == SessionState.SUSPENDED:
            try:
                sandbox.resume()
            except InvalidTransition as error:
                if error.state != SandboxState.RUNNING:  # else another session was resumed just now
                    raise
        self._usable(self._ledger.find(record.sandbox), wait)
        moved = self._ledger.move_session(record.id, SessionState.ACTIVE, "resume")
        return self._held(moved, EventKind.SESSION_RESUMED)

    def release(self, session: AnySession, *, keep_alive: bool = False) -> None:
        """The client has what it wanted. keep_alive: keep the sandbox for it, as :meth:`detach`. Else the
        session ends, and with the last one of it the sandbox: it is destroyed, or goes back to its pool.
        Idempotent once the session has ended, but for ``keep_alive``."""
        if keep_alive:
            self.detach(session)
        else:
            self._terminated(id_of(session), "released", EventKind.SESSION_RELEASED)

    def terminate(self, session: AnySession) -> None:
        """End a session, and with the last one of it its sandbox, which does not go back to its pool.
        Idempotent."""
        self._terminated(id_of(session), "terminated", EventKind.SESSION_TERMINATED)

    def _terminated(self, session_id: str, why: str, kind: EventKind) -> None:
        record = self._ledger.bare_session(session_id)
        ended, last = self._ledger.end_session(session_id, why)
        self._left(record)
        if ended:
            self._emit(kind, record)
        if last:
            self._gone(record.sandbox, why)

    # --- looking --------------------------------------------------------------------------------

    def session_record(self, session_id: str) -> SessionRecord:
        """What is on record of a session. Raises :class:`SessionNotFound`."""
        return self._ledger.session(session_id)

    def touch_session(self, session: AnySession) -> None:
        """A session is in use: its time without activity begins anew."""
        self._ledger.touch_session(id_of(session))

    def list_sessions(
        self,
        state: str | None = None,
        client_id: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> list[SandboxSession]:
        """Sessions, oldest first: of this :class:`SessionState`, or all that have not ended; of this client,
        with all of these labels."""
        states = LIVE if state is None else (SessionState(state),)
        found = self._ledger.sessions(states=states, client=client_id, labels=labels)
        return [SandboxSession(self, record) for record in found]

    def get_session(self, session_id: str) -> SandboxSession | None:
        """A session by its id, also one that has ended less than a day ago; None if there is none."""
        with contextlib.suppress(SessionNotFound):
            return SandboxSession(self, self._ledger.session(session_id))
        return None

    def get_session_by_sandbox(self, key: str) -> SandboxSession | None:
        """The latest session of a sandbox that has not ended; an active one before others."""
        record = self._ledger.get(key)
        return None if record is None else self._latest(sandbox=record.id)

    def get_session_by_client(self, client_id: str) -> SandboxSession | None:
        """The latest active session of a client."""
        return self._latest(states=(SessionState.ACTIVE,), client=client_id)

    def _latest(
        self,
        states: Sequence[SessionState] = LIVE,
        *,
        client: str | None = None,
        sandbox: str | None = None,
    ) -> SandboxSession | None:
        found = self._ledger.sessions(states=states, client=client, sandbox=sandbox)
        found.sort(key=lambda record: (record.state == SessionState.ACTIVE, record.created_at, record.id))
        return SandboxSession(self, found[-1]) if found else None

    # --- sandboxes that nobody has ---------------------------------------------------------------

    def _gone(self, key: str, why: str) -> None:
        """Nobody uses it any more."""
        record = self._ledger.get(key)
        if record is None:
            return
        if key in self._private:
            self._end_private(key, why)
        elif self._is_ours(record):
            self._destroy(record, why)

    def _end_private(self, key: str, why: str) -> None:
        with self._guard:
            sandbox = self._private.pop(key, None)
            for known in (self._users, self._touched, self._busy):
                known.pop(key, None)
        if sandbox is None:
            return
        try:
            if why == "released" and not self._closed:
                self.pools.release(sandbox)  # it ends in a while, and tells that then
            else:
                sandbox.destroy()
        finally:  # also of one that cannot be killed yet: nobody gets it again
            self.metrics.count_end(why)
            self._ledger.forget_private(key)

    def _make_room(self) -> bool:
        return super()._make_room() or self.pools.make_room()

    def _pool_said(self, kind: str, data: Mapping[str, Any]) -> None:
        rest = {name: value for name, value in data.items() if name != "sandbox"}
        self._emit(EventKind(kind), None, sandbox=data.get("sandbox"), **rest)

    def _let_go(self) -> None:
        super()._let_go()
        self.pools.close()


def id_of(session: AnySession) -> str:
    return session if isinstance(session, str) else session.id
