"""Many clients, many sandboxes: :class:`SandboxManager`."""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from sandboxcore import process
from sandboxcore.capabilities import SandboxCapabilities
from sandboxcore.directory import Managed
from sandboxcore.errors import (
    InvalidTransition,
    SandboxError,
    SandboxNotFound,
    SelectionRefused,
    SessionNotFound,
    SpecError,
)
from sandboxcore.events import Event, EventKind, current_trace
from sandboxcore.keeping import Keeping
from sandboxcore.lifecycle import SandboxState, new_id
from sandboxcore.managed_session import SandboxSession
from sandboxcore.manager_stats import Health, ManagerStats, examine, exposition, gather
from sandboxcore.policy import LifecyclePolicy
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.pools import SandboxPools
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.request import Program
from sandboxcore.result import ExecResult
from sandboxcore.sandbox import Sandbox
from sandboxcore.selection import SelectionOptions, unmet, unmet_by, unmet_inside
from sandboxcore.session import LIVE, SessionState, SessionTimeouts, check_move
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import SandboxSpec, check_name
from sandboxcore.statedir import StatePath
from sandboxcore.template import Template

SWEEP = 60.0  # seconds
AnySession = SandboxSession | str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachResult:
    """What :meth:`SandboxManager.attach` gives: the session, whether its sandbox was made for it, and what is
    applied to that, read back from the kernel."""

    session: SandboxSession
    newly_created: bool
    capabilities: SandboxCapabilities


class SandboxManager(Keeping):
    """Sandboxes of one state directory, and who uses them. Any thread may use it, and several processes at
    once.

    A **session** is one client's use of one sandbox: active, detached, suspended, or terminated. The rules:

    - A client may have several sessions, also of one sandbox, and a sandbox sessions of several clients, who
      :meth:`attach` to it or ask for it as the preferred one. Nobody gets otherwise what another has used.
    - A detached session is kept for its client: :meth:`acquire` of the same spec, and :meth:`attach`, go on
      with it, the oldest first. One without a client is nobody's: only :meth:`resume` goes on with it.
    - Suspended is the sandbox, for all: that is refused while another session of it is active, and while it
      stands still nobody attaches. The first :meth:`resume` lets it go on; other suspended sessions stay so
      until theirs.
    - A sandbox that :meth:`acquire`, :meth:`attach` or :meth:`fork` made is destroyed with its last session;
      one that :meth:`create` made stays. A sandbox that is destroyed, or expires, ends its sessions.
    - A session whose sandbox has stopped is still there: :meth:`attach` and :meth:`resume` start it again.

    Sandboxes and sessions outlive this process; those of a pool end with it.

    Parameters
    ----------
    state_dir: as for :class:`PersistentSandbox`.
    max_sandboxes: how many may live at once in this state directory, over all processes, warm ones of pools
        and :meth:`run_ephemeral` included; default 100, None: any number.
    timeouts: of sessions that say nothing else.
    policy: of sandboxes that say nothing else; default none.
    pool: how its pools behave: :class:`PoolConfig`. warm: specs, or names of profiles, whose pools are filled
        from the beginning.
    sweep_interval: seconds between two :meth:`reconcile` in the background; default 60, None: none.
    on_event: called with each :class:`Event`, as by ``manager.events.subscribe``.
    """

    def __init__(
        self,
        state_dir: StatePath = None,
        *,
        max_sandboxes: int | None = 100,
        timeouts: SessionTimeouts | None = None,
        policy: LifecyclePolicy | None = None,
        pool: PoolConfig | None = None,
        warm: Iterable[SandboxSpec | str] = (),
        sweep_interval: float | None = SWEEP,
        on_event: Iterable[Callable[[Event], object]] = (),
    ) -> None:
        self._timeouts = timeouts or SessionTimeouts()
        super().__init__(
            state_dir,
            max_sandboxes=max_sandboxes,
            policy=policy,
            on_event=on_event,
            sweep_interval=sweep_interval,
        )
        self.pools = SandboxPools(pool, room=self._room, on_event=self._pool_said)
        try:
            for spec in warm:
                self.pools.warm(spec)
        except BaseException:
            self.close()
            raise

    # --- sessions -------------------------------------------------------------------------------

    def acquire(
        self,
        spec: SandboxSpec | None = None,
        options: SelectionOptions | None = None,
        client_id: str = "",
        *,
        timeouts: SessionTimeouts | None = None,
        metadata: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        ttl: float | None = None,
        policy: LifecyclePolicy | None = None,
        template: Template | Snapshot | None = None,
        wait: float | None = 0.0,
        creation_timeout: float | None = None,
        **binding: Any,
    ) -> SandboxSession:
        """A session of a sandbox that is as wanted: ``options.preferred_id``, if there is one; else one that
        this client has left with ``release(keep_alive=True)`` or :meth:`detach`, of the same spec, whose
        session goes on; else a warm one, with ``options.use_pool``; else a new one. Never one that another
        client has used.

        Parameters
        ----------
        spec: default that of the template, or :class:`SandboxSpec`.
        client_id: yours, for whom it is.
        timeouts, metadata, labels: of the session; its timeouts default to the manager's.
        name, ttl, policy, template, wait, creation_timeout: of a new sandbox, as for :meth:`create`. One with
            a name or template is always new.
        binding: with ``options.use_pool``, what :meth:`SandboxPool.claim` binds late: env, files, ro, rw,
            limits.

        Raises :class:`SelectionRefused`, which names each requirement that failed; :class:`TooManySandboxes`;
        and what :meth:`create` does. Then there is no session.
        """
        options, spec_or = options or SelectionOptions(), spec
        spec = spec or (template.spec if template is not None else SandboxSpec())
        lasting = {"template": template, "policy": policy, "creation_timeout": creation_timeout}
        _check_pooled(options, lasting, binding)
        first, more = (
            self._new_session(client_id, timeouts, metadata, labels),
            self._more(ttl, policy, template),
        )
        found = self._preferred(options, first, wait)
        if found is None and not (options.require_fresh or name or template or binding):
            found = self._kept(spec, options, client_id)
        if found is not None:
            return self._held(found, EventKind.SESSION_ACQUIRED, went_on=found.id != first.id)
        limits = {"memory": spec.limits.memory}
        if failed := unmet(spec, options, {**spec.labels, **options.required_labels}, limits):
            raise SelectionRefused("a new sandbox of this spec", failed)
        if options.use_pool:
            return self._pooled(spec, options, first, wait, more["expires_at"], name=name, **binding)
        about = {"name": name, "labels": dict(options.required_labels), "owner": client_id or None}
        made = self._created(
            spec_or, about, more, session=first, template=template, wait=wait, patience=creation_timeout
        )
        self._look_inside(made, options)
        return self._held(replace(first, sandbox=made.id), EventKind.SESSION_ACQUIRED, new=True)

    def _new_session(
        self,
        client_id: str,
        timeouts: SessionTimeouts | None,
        metadata: Mapping[str, Any] | None,
        labels: Mapping[str, str] | None,
        sandbox: str = "",
    ) -> SessionRecord:
        if not isinstance(client_id, str):
            raise SpecError(f"client_id: {client_id!r} is not text")
        now = time.time()
        return SessionRecord(
            id=new_id("sess"), sandbox=sandbox, client=client_id, state=SessionState.ACTIVE.value,
            created_at=now, last_active_at=now, timeouts=(timeouts or self._timeouts).to_dict(),
            metadata=dict(metadata or {}), labels=dict(labels or {}), trace_id=current_trace(),
        )  # fmt: skip

    def _preferred(
        self, options: SelectionOptions, first: SessionRecord, wait: float | None
    ) -> SessionRecord | None:
        """A session of the sandbox that is preferred, if there is one."""
        record = None if options.preferred_id is None else self._ledger.get(options.preferred_id)
        if record is None:
            return None
        subject = f"sandbox {record.name}"
        if failed := unmet_by(record, SandboxSpec.from_dict(record.spec), options):
            raise SelectionRefused(subject, failed)
        sandbox = self._usable(record, wait)
        self._look_inside(sandbox, options, keep=True)
        return self._joined(sandbox.id, first)

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

    def _joined(self, sandbox: str, first: SessionRecord) -> SessionRecord:
        """The client's detached session of this sandbox, which goes on, or a new one."""
        if not first.client:  # nobody has left it for whoever comes
            return self._opened(replace(first, sandbox=sandbox))
        for session in self._ledger.sessions(
            states=(SessionState.DETACHED,), client=first.client, sandbox=sandbox
        ):
            if (taken := self._ledger.take_session(session.id)) is not None:
                return taken
        return self._opened(replace(first, sandbox=sandbox))

    def _opened(self, first: SessionRecord) -> SessionRecord:
        self._ledger.open_session(first)
        return first

    def _kept(self, spec: SandboxSpec, options: SelectionOptions, client: str) -> SessionRecord | None:
        """A detached session of this client whose sandbox will do. One without a client never is."""
        if not client:
            return None
        for session in self._ledger.sessions(states=(SessionState.DETACHED,), client=client):
            with contextlib.suppress(SandboxError):  # its record is damaged, or it goes just now
                if not self._will_do(session, spec, options):
                    continue
                if (taken := self._ledger.take_session(session.id)) is not None:
                    return taken
        return None

    def _will_do(self, session: SessionRecord, spec: SandboxSpec, options: SelectionOptions) -> bool:
        record = self._ledger.get(session.sandbox)
        if record is None or not self._is_ours(record) or bool(record.host) is not options.use_pool:
            return False
        if record.shared:  # another client was in it
            return False
        theirs = SandboxSpec.from_dict(record.spec)
        if theirs.fingerprint != spec.fingerprint or unmet_by(record, theirs, options):
            return False
        sandbox = self._handle(record)
        return sandbox.state is SandboxState.RUNNING and not unmet_inside(sandbox, options.required)

    def _look_inside(self, sandbox: Sandbox, options: SelectionOptions, *, keep: bool = False) -> None:
        """Raises SelectionRefused, and destroys what was made for it."""
        try:
            if failed := unmet_inside(sandbox, options.required):
                raise SelectionRefused(f"sandbox {sandbox.name}", failed)
        except BaseException:
            if not keep:
                self._gone(sandbox.id, "it was not as wanted")
            raise

    def _pooled(
        self,
        spec: SandboxSpec,
        options: SelectionOptions,
        first: SessionRecord,
        wait: float | None,
        expires_at: float | None,
        **binding: Any,
    ) -> SandboxSession:
        binding["labels"] = {**options.required_labels, **(binding.get("labels") or {})}
        binding["owner"] = first.client or None

        def claim() -> Sandbox:
            return self.pools.claim(spec, client=first.client or None, **binding)

        sandbox: Sandbox = self._when_there_is_room(claim, wait)
        try:
            if failed := unmet_inside(sandbox, options.required):
                raise SelectionRefused(f"sandbox {sandbox.name}", failed)
            first = replace(first, sandbox=sandbox.id)
            self._ledger.enrol(replace(self._private_record(sandbox), expires_at=expires_at), first)
        except BaseException:
            sandbox.destroy()
            raise
        with self._guard:
            self._private[sandbox.id] = self._watched(sandbox)
        return self._held(first, EventKind.SESSION_ACQUIRED, pooled=True)

    def _private_record(self, sandbox: Sandbox) -> SandboxRecord:
        return SandboxRecord(
            id=sandbox.id, name=sandbox.name, state=SandboxState.RUNNING.value, spec=sandbox.spec.to_dict(),
            labels=sandbox.labels, description=sandbox.description, metadata=sandbox.metadata,
            owner=sandbox.owner, created_at=sandbox.created_at, started_at=sandbox.started_at,
            last_active_at=time.time(), pid=sandbox.pid, host=self._host(),
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

    def attach(
        self,
        sandbox_id: str,
        client_id: str = "",
        *,
        create_if_missing: bool = False,
        create_spec: SandboxSpec | None = None,
        timeouts: SessionTimeouts | None = None,
        metadata: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
        wait: float | None = 0.0,
    ) -> AttachResult:
        """A session of a sandbox by its id, name or UUID, whoever made it: this client's detached one goes
        on, or there is a new one. A created or stopped sandbox is started.

        create_if_missing: make one of ``create_spec`` with this name where there is none: of several who
        want that at once, one makes it. wait: for room, where it is to be started, as for :meth:`create`.
        Raises :class:`SandboxNotFound`; :class:`InvalidTransition` for a suspended or archived one.
        """
        first = self._new_session(client_id, timeouts, metadata, labels)
        if create_if_missing and self._ledger.get(sandbox_id) is None:
            check_name(sandbox_id)
        while True:
            try:
                sandbox, session, new = self._attached(
                    sandbox_id, first, create_if_missing, create_spec, wait
                )
                break
            except (SandboxNotFound, SpecError) as error:  # somebody was faster: it is there now, or gone
                there = self._ledger.get(sandbox_id) is not None
                if not create_if_missing or there is isinstance(error, SandboxNotFound):
                    raise
        held = self._held(session, EventKind.SESSION_ATTACHED, went_on=session.id != first.id, new=new)
        return AttachResult(session=held, newly_created=new, capabilities=sandbox.capabilities)

    def _attached(
        self,
        key: str,
        first: SessionRecord,
        make: bool,
        spec: SandboxSpec | None,
        wait: float | None,
    ) -> tuple[Sandbox, SessionRecord, bool]:
        record = self._ledger.get(key)
        if record is not None:
            sandbox = self._usable(record, wait)
            return sandbox, self._joined(sandbox.id, first), False
        if not make:
            raise SandboxNotFound(f"no sandbox has the name or id {key!r} in {self.state_dir}")
        about = {"name": key, "owner": first.client or None}
        sandbox = self._created(spec, about, self._more(None, None, None), session=first, wait=wait)
        return sandbox, replace(first, sandbox=sandbox.id), True

    def detach(self, session: AnySession) -> None:
        """Leave the sandbox running, for this client to come back to: :meth:`acquire`, :meth:`attach`,
        :meth:`resume`. Raises InvalidTransition unless the session is active."""
        moved = self._ledger.move_session(_id(session), SessionState.DETACHED, "detach")
        self._left(moved)
        self._emit(EventKind.SESSION_DETACHED, moved)

    def suspend(self, session: AnySession) -> None:
        """Stop every process in its sandbox until :meth:`resume`. Raises :class:`SandboxBusy` while another
        session uses the sandbox, and InvalidTransition unless this one is active or detached."""
        record = self._ledger.session(_id(session))
        check_move(record.id, SessionState(record.state), SessionState.SUSPENDED, "suspend")
        sandbox = self.find(record.sandbox)
        moved = self._ledger.move_session(record.id, SessionState.SUSPENDED, "suspend", alone=True)
        try:  # in this order: who dies between has a suspended session of a sandbox that runs
            if sandbox.state is not SandboxState.PAUSED:
                sandbox.suspend()
        except BaseException:
            self._ledger.put_back(record)
            raise
        self._left(moved)
        self._emit(EventKind.SESSION_SUSPENDED, moved)

    def resume(self, session: AnySession, *, wait: float | None = 0.0) -> SandboxSession:
        """Go on with a suspended or a detached session: its sandbox runs, and it is active. Other suspended
        sessions of that sandbox stay suspended until they are resumed, too. wait: for room, where its sandbox
        has ended and is started again, as for :meth:`create`."""
        record = self._ledger.session(_id(session))
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
            self._terminated(_id(session), "released", EventKind.SESSION_RELEASED)

    def terminate(self, session: AnySession) -> None:
        """End a session, and with the last one of it its sandbox, which does not go back to its pool.
        Idempotent."""
        self._terminated(_id(session), "terminated", EventKind.SESSION_TERMINATED)

    def _terminated(self, session_id: str, why: str, kind: EventKind) -> None:
        record = self._ledger.session(session_id)
        ended, last = self._ledger.end_session(session_id, why)
        self._left(record)
        if ended:
            self._emit(kind, record)
        if last:
            self._gone(record.sandbox, why)

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
        if why == "released" and not self._closed:
            sandbox._observers = ()  # the pool says what becomes of it
            self.pools.release(sandbox)
        else:
            sandbox.destroy()
        self._ledger.forget_private(key)

    # --- looking --------------------------------------------------------------------------------

    def session_record(self, session_id: str) -> SessionRecord:
        """What is on record of a session. Raises :class:`SessionNotFound`."""
        return self._ledger.session(session_id)

    def touch_session(self, session: AnySession) -> None:
        """A session is in use: its time without activity begins anew."""
        self._ledger.touch_session(_id(session))

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

    # --- without a session ------------------------------------------------------------------------

    def run_ephemeral(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | None = None,
        wait: float | None = 0.0,
        **options: Any,
    ) -> ExecResult:
        """:func:`sandboxcore.run`: a command in a fresh sandbox that ends with it, which counts as one of
        ``max_sandboxes`` meanwhile. ``options``: files, input, timeout and all that run() takes."""
        with self._place(wait), self._telling(argv) as told:
            told.append(process.run(argv, spec=spec, **options))
        return told[0]

    def run_pooled(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | None = None,
        wait: float | None = 0.0,
        **options: Any,
    ) -> ExecResult:
        """The same in a warm sandbox: :meth:`SandboxPool.run`."""
        with self._telling(argv) as told:
            run = functools.partial(self.pools.run, argv, spec=spec, **options)
            told.append(self._when_there_is_room(run, wait))
        return told[0]

    @contextlib.contextmanager
    def _telling(self, argv: Sequence[Program]) -> Iterator[list[ExecResult]]:
        """Of a command that is no session's, and how it ended: what is put into the list."""
        about: dict[str, Any] = {"command": new_id("cmd"), "detached": False}
        args, done = [os.fsdecode(arg) for arg in argv], list[ExecResult]()
        self._emit(EventKind.COMMAND_STARTED, None, args=args, **about)
        ended: dict[str, Any] = {"cause": None, "returncode": None, "duration": None}
        try:
            yield done
            ended = {name: getattr(done[0], name) for name in ended}
            ended["cause"] = done[0].cause.value
        except BaseException as error:
            ended["error"] = type(error).__name__
            raise
        finally:
            self.metrics.count_command(ended["cause"], ended["duration"])
            self._emit(EventKind.COMMAND_ENDED, None, **about, **ended)

    def fork(self, session: AnySession, n: int = 1, *, client_id: str | None = None) -> list[SandboxSession]:
        """Sessions of ``n`` new sandboxes that have the files of this one's as they are now:
        :meth:`Sandbox.fork`. All of them, or none. client_id: default the same."""
        record = self._ledger.session(_id(session))
        timeouts = SessionTimeouts.from_dict(record.timeouts)
        client = record.client if client_id is None else client_id
        parent, firsts = self._persistent(record.sandbox), dict[str, SessionRecord]()
        more: dict[str, Any] = {
            "policy": self._ledger.find(parent.id).policy,
            "owner": client or None,
            "lasting": False,
        }

        def enrol(child: SandboxRecord) -> SandboxRecord:
            first = self._new_session(client, timeouts, record.metadata, record.labels, child.id)
            firsts[child.id] = first
            return self._ledger.enrol(replace(child, **more), first)

        assert isinstance(parent, Managed)
        for child in parent.offspring(n, enrol):
            child.owner = client or None
            with self._guard:
                self._handles[child.id] = self._watched(child)
            self.metrics.count_creation(child.timings["total"], child.timings)
            self._emit(EventKind.SANDBOX_CREATED, firsts[child.id], name=child.name, owner=child.owner)
        return [
            self._held(first, EventKind.SESSION_ACQUIRED, forked_from=parent.id) for first in firsts.values()
        ]

    # --- how it is ----------------------------------------------------------------------------------

    def stats(self) -> ManagerStats:
        """What there is now, over all processes, and what this manager has done."""
        return gather(self._ledger, self._room, self.metrics, self.pools)

    def prometheus(self) -> str:
        """The same, and more, as text for Prometheus (``text/plain; version=0.0.4``)."""
        return exposition(self.stats(), self.metrics)

    def health(self) -> Health:
        """Whether it works: each part is tried, and whether there is room."""
        return examine(self._ledger, self._room, self.metrics)

    def _pool_said(self, kind: str, data: Mapping[str, Any]) -> None:
        rest = {name: value for name, value in data.items() if name != "sandbox"}
        self._emit(EventKind(kind), None, sandbox=data.get("sandbox"), **rest)

    def _let_go(self) -> None:
        super()._let_go()
        self.pools.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_pooled(options: SelectionOptions, lasting: Mapping[str, Any], binding: Mapping[str, Any]) -> None:
    if binding and not options.use_pool:
        raise SpecError(f"{min(binding)}: is bound late only with options.use_pool; else it is the spec's")
    for name, value in lasting.items() if options.use_pool else ():
        if value is not None:
            raise SpecError(f"{name}: with options.use_pool there is none: it runs already, and ends with us")


def _id(session: AnySession) -> str:
    return session if isinstance(session, str) else session.id
