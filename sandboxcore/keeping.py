"""What becomes of a manager's sandboxes in time: when they expire, are stopped, archived, destroyed; and what
crashes have left."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any

from sandboxcore.directory import Directory, Managed, check_ttl
from sandboxcore.errors import InvalidTransition, SandboxBusy, SandboxError, SandboxNotFound, SpecError
from sandboxcore.events import LOGGER, EventKind
from sandboxcore.lifecycle import SandboxState
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.policy import Action, LifecyclePolicy
from sandboxcore.reconcile import Reconciled, Sweeper, reconcile
from sandboxcore.records import Damage, SandboxRecord, SessionRecord
from sandboxcore.resources import LimitChange
from sandboxcore.sandbox import Sandbox
from sandboxcore.session import LIVE, SessionState
from sandboxcore.spec import check_labels

_POLICIES: Mapping[str, EventKind] = {
    "stop": EventKind.POLICY_STOP,
    "archive": EventKind.POLICY_ARCHIVE,
    "delete": EventKind.POLICY_DELETE,
}
_ENDS: Mapping[str, EventKind] = {
    "stop": EventKind.SANDBOX_STOPPED,
    "archive": EventKind.SANDBOX_ARCHIVED,
    "delete": EventKind.SANDBOX_DESTROYED,
    "forget": EventKind.SANDBOX_DESTROYED,
}


class Keeping(Directory):
    """The part of :class:`SandboxManager` that goes by the clock."""

    def __init__(self, *directory: Any, sweep_interval: float | None, **options: Any) -> None:
        if sweep_interval is not None and not (
            isinstance(sweep_interval, int | float) and 0 < sweep_interval < 1e9
        ):
            raise SpecError(f"sweep_interval: {sweep_interval!r} is not a positive number of seconds")
        super().__init__(*directory, **options)
        _keepings.add(self)
        self._sweeping = threading.Lock()
        self._swept_at, self._swept = 0.0, False  # when room was made last, and whether there was any to make
        self._told: set[Damage] = set()
        self._seen: dict[str, SandboxRecord] = {}
        self._used: list[SessionRecord] = []
        self._ended = ""  # the sandbox whose handle the sweep has find out that it is gone
        self._sweeper = None if sweep_interval is None else Sweeper(self.reconcile, sweep_interval)

    # --- times and policies -----------------------------------------------------------------------

    def extend_ttl(self, key: str, seconds: float | None) -> float | None:
        """Give a sandbox more time: ``seconds`` after it would expire, or from now on where it would not;
        None: it does not expire. Returns when it will, in seconds since the epoch, or None. Raises
        :class:`SandboxNotFound`, also for one that is about to be destroyed."""
        check_ttl(seconds)
        record = self._ledger.find(key)
        when = self._ledger.extend(record.id, seconds)
        self._emit(EventKind.SANDBOX_UPDATED, sandbox=record.id, changed=["expires_at"])
        return when

    def expired(self) -> list[SandboxRecord]:
        """Those whose time is over and that are still there."""
        now = time.time()
        return [one for one in self._ledger.all() if one.expires_at is not None and now >= one.expires_at]

    def set_policy(self, key: str, policy: LifecyclePolicy) -> None:
        """Replace a sandbox's policy."""
        self._change(self._ledger.find(key), policy=policy.to_dict())

    def describe(
        self,
        key: str,
        *,
        labels: Mapping[str, str] | None = None,
        description: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        owner: str | None = None,
    ) -> SandboxRecord:
        """Replace what is said about a sandbox: whatever is not None. Nothing needs a restart."""
        check_labels(labels or {})
        given: dict[str, Any] = {"description": description, "owner": owner}
        given |= {"labels": None if labels is None else dict(labels)}
        given |= {"metadata": None if metadata is None else dict(metadata)}
        record = self._ledger.find(key)
        changes = {name: value for name, value in given.items() if value is not None}
        if changes:
            self._change(record, **changes)
            if changes.get("owner", record.owner) != record.owner:  # the one before has used it
                self._ledger.change(record.id, shared=True)
            sandbox = self._private.get(record.id) or self._handles.get(record.id)
            for name, value in changes.items() if sandbox is not None else ():
                setattr(sandbox, name, value)
        return self._ledger.find(record.id)

    def update(self, key: str, **fields: Any) -> Mapping[str, LimitChange]:
        """Change what is stored of a sandbox: any field of its spec, as by
        :meth:`PersistentSandbox.change_spec`; its ``policy``; and ``labels``, ``description``, ``metadata``,
        ``owner``, as by :meth:`describe`. Says of each when it applies: ``"now"``, ``"next command"`` or
        ``"next start"``. Everything is checked before anything changes.

        Raises :class:`SpecError` for a field that there is not; for any but limits and what is said about it,
        of a sandbox of a pool: it never starts again.
        """
        record = self._ledger.find(key)
        now = {name: fields.pop(name) for name in (*_SAID, "policy") if name in fields}
        before = {name: getattr(record, name) for name in now}
        check_labels(now.get("labels", {}))
        policy = now.pop("policy", None)
        if policy is not None and not isinstance(policy, LifecyclePolicy):
            raise SpecError(f"policy: {policy!r} is not a LifecyclePolicy")
        changes: dict[str, LimitChange] = {}
        if fields:
            changes.update(self._respecified(record, fields))
        if now:
            self.describe(record.id, **now)
        if policy is not None:
            self.set_policy(record.id, policy)
            now["policy"] = policy.to_dict()
        return {**changes, **{name: LimitChange(before[name], now[name], "now") for name in now}}

    def _respecified(self, record: SandboxRecord, fields: dict[str, Any]) -> Mapping[str, LimitChange]:
        sandbox = self._handle(record)
        if isinstance(sandbox, PersistentSandbox):
            return sandbox.change_spec(**fields)
        if other := fields.keys() - {"limits"}:
            raise SpecError(f"{min(other)}: sandbox {sandbox.name} is of a pool: it never starts again")
        done = sandbox.update(**fields["limits"])
        return {f"limits.{name}": change for name, change in done.items()}

    def touch(self, key: str) -> None:
        """Somebody uses this sandbox: its sessions are active now, and no policy finds it idle."""
        self._ledger.touch_sessions(self._ledger.find(key).id, time.time())

    def _change(self, record: SandboxRecord, **changes: Any) -> None:
        self._ledger.change(record.id, **changes)
        self._emit(EventKind.SANDBOX_UPDATED, sandbox=record.id, changed=sorted(changes))

    # --- archive ----------------------------------------------------------------------------------

    def archive(self, key: str, why: str = "") -> None:
        """:meth:`PersistentSandbox.archive`. Raises InvalidTransition while a session of it is active, and
        :class:`SandboxBusy` where somebody else goes on using it."""
        sandbox = self._persistent(key)
        for _ in range(_LOOKS):
            seen = self._ledger.find(sandbox.id)
            if self._ledger.sessions(states=_ACTIVE, sandbox=sandbox.id):
                raise InvalidTransition(f"sandbox {sandbox.name}", "used by an active session", "archive it")
            if sandbox._archive(why, seen):
                return
        raise SandboxBusy(f"sandbox {sandbox.name}: archive: somebody uses it just now")

    def recover(self, key: str, *, start: bool = False, wait: float | None = 0.0) -> None:
        """:meth:`PersistentSandbox.recover`; with ``start``, it runs then. wait: for room, as for
        :meth:`create`. Where there is none it is recovered, and does not run."""
        sandbox = self._persistent(key)
        sandbox.recover()
        if start:
            self._run(sandbox.id, wait)

    def _run(self, key: str, wait: float | None = 0.0) -> Sandbox:
        sandbox = self.find(key)
        self._started(sandbox, wait)
        return sandbox

    def _persistent(self, key: str) -> Managed:
        sandbox = self.find(key)
        if not isinstance(sandbox, Managed):
            raise SandboxError(f"sandbox {sandbox.name}: it is of a pool, and ends with this process")
        return sandbox

    # --- the sweep --------------------------------------------------------------------------------

    def reconcile(self, *, dry_run: bool = False) -> Reconciled:
        """Do what is due: terminate sessions that were without activity for too long, and destroy sandboxes
        with their last session; destroy what has expired; stop, archive, destroy by policy; forget what ended
        with its process; set right what crashes have left (:func:`gc`). A background thread does it every
        ``sweep_interval`` seconds. What fails is in the result, and the rest is done all the same.

        dry_run: only say what would be done, and why.
        """
        with self._sweeping:
            done = self._pass(dry_run=dry_run)
            if not dry_run:
                self._tell_damage()
        return done

    def _make_room(self) -> bool:
        """End what is due, once for all who wait for it."""
        asked = time.monotonic()
        with self._sweeping:
            if self._swept_at < asked:
                self._swept_at = time.monotonic()
                done = self._pass(crashes=False)
                self._swept = any(action.kind in _FREES for action in done.actions)
            return self._swept

    def _pass(self, *, dry_run: bool = False, **options: Any) -> Reconciled:
        """One :func:`reconcile`; what it does is told, with what was known of it before."""
        self._seen = {} if dry_run else {record.id: record for record in self._ledger.all()}
        self._used = [] if dry_run else self._ledger.sessions(states=LIVE)
        if not dry_run:
            self._note_private()
        done = reconcile(
            self._ledger,
            dry_run=dry_run,
            busy=self._is_busy,
            written=self._written,
            note=self._acted,
            **options,
        )
        if not dry_run:
            self._drop_private()
            self._drop_handles()
        return done

    def _note_private(self) -> None:
        """Put down the states of those of this process alone: nobody else can tell."""
        for key, sandbox in list(self._private.items()):
            state = sandbox.state
            if state is SandboxState.DESTROYED:  # by whoever has it, who has not ended his session yet
                state = SandboxState.STOPPED
            with contextlib.suppress(SandboxError):  # its record is damaged
                record = self._ledger.get(key)
                if record is not None and record.state != state:
                    self._ledger.change(key, state=state.value, stopped_at=sandbox.stopped_at)

    def _written(self, key: str) -> float:
        """When a detached command of such a one has put something into its journal last; 0: none has."""
        sandbox, last = self._private.get(key), 0.0
        for command in [] if sandbox is None else list(sandbox._detached.values()):
            with contextlib.suppress(OSError):  # it is forgotten just now
                last = max(last, os.fstat(command._journal.fd).st_mtime)
        return last

    def _drop_handles(self) -> None:
        """Those of sandboxes that another process has destroyed. Each finds out by itself, and tells it."""
        there = {record.id for record in self._ledger.all()}
        with self._guard:
            missing = [handle for key, handle in self._handles.items() if key not in there]
        for handle in missing:
            with contextlib.suppress(SandboxError):  # its record is damaged: it is there
                if handle.state is SandboxState.DESTROYED:
                    self._forgotten(handle.id)

    def gc(self) -> Reconciled:
        """The same as :meth:`reconcile`."""
        return self.reconcile()

    def cleanup_expired(self) -> int:
        """:meth:`reconcile`; how many sessions and sandboxes it has ended."""
        done = self.reconcile()
        return sum(
            1 for action in done.actions if action.kind in ("terminate", "delete") and not action.error
        )

    def _tell_damage(self) -> None:
        """Of each damaged record once."""
        for damage in self._ledger.damaged():
            if damage not in self._told:
                self._told.add(damage)
                about = {"table": damage.table, "record": damage.id, "problem": damage.problem}
                self._emit(EventKind.RECORD_CORRUPT, None, **about)
                LOGGER.warning("damaged record: %s %s: %s", damage.table, damage.id, damage.problem)

    def _is_busy(self, key: str) -> bool:
        return self._busy.get(key, 0) > 0

    def _acted(self, action: Action) -> None:
        facts = {"name": action.name, "reason": action.reason}
        if action.error:
            facts["error"] = action.error
        if action.kind == "terminate":
            if not action.error:
                self._timed_out(action, facts)
        elif action.id.startswith("sbx-"):
            self._emit_action(action, facts)
        if not action.error:
            self.metrics.count_action(action.kind)

    def _timed_out(self, action: Action, facts: Mapping[str, Any]) -> None:
        session = next((one for one in self._used if one.id == action.id), None)
        if session is not None:
            self._used.remove(session)
            self._left(session)
        self._emit(EventKind.SESSION_TIMED_OUT, session, **facts)

    def _emit_action(self, action: Action, facts: Mapping[str, Any]) -> None:
        """What has become of a sandbox, and why."""
        record = self._seen.get(action.id)
        due = record is not None and record.expires_at is not None and time.time() >= record.expires_at
        why: EventKind | None = EventKind.SANDBOX_EXPIRED if due else _POLICIES.get(action.kind)
        if action.kind == "delete" and not due and "(auto_delete" not in action.reason:
            why = None
        if why is not None:
            self._emit(why, sandbox=action.id, **facts)
        if action.error:
            return
        gone = action.kind in ("delete", "forget")
        if gone:
            self._settle_handle(action.id)
        self._emit(_ENDS[action.kind], sandbox=action.id, **facts)
        if gone:
            self._emit_ends([one for one in self._used if one.sandbox == action.id], action.reason)
            self._forgotten(action.id)
        if action.kind == "delete":  # what is forgotten has ended with its process
            self.metrics.count_end("swept")

    def _settle_handle(self, key: str) -> None:
        """Have the handle of what the sweep has destroyed find that out: it tells how its commands ended."""
        with self._guard:
            handle = self._handles.get(key)
        if handle is not None:
            self._ended = key
            try:
                with contextlib.suppress(SandboxError):
                    handle.state  # noqa: B018
            finally:
                self._ended = ""

    def _heard(self, key: str, kind: str, data: Mapping[str, Any]) -> None:
        if kind != EventKind.SANDBOX_DESTROYED or key != self._ended:  # that the sweep tells, and why
            super()._heard(key, kind, data)

    def _drop_private(self) -> None:
        """Those of this process whose time is over, or whose last session somebody else has ended."""
        for key in list(self._private):
            record = self._ledger.get(key)
            if record is None or record.doomed:
                released = record is not None and record.doomed == "released"
                self._end_private(key, "released" if released else "swept")
            elif record.expires_at is not None and time.time() >= record.expires_at:
                users = self._ledger.sessions(states=LIVE, sandbox=key)
                self._emit(EventKind.SANDBOX_EXPIRED, sandbox=key, name=record.name)
                self._end_private(key, "expired")
                self._emit_ends(users, "its sandbox expired")

    def _left(self, session: SessionRecord) -> None:
        """A session is not active any more."""
        with self._guard:
            self._users.get(session.sandbox, {}).pop(session.id, None)

    def _end_private(self, key: str, why: str) -> None:
        """A sandbox of a pool is not wanted any more: "released" or not, for a reason that is counted."""
        raise NotImplementedError

    def destroy_all(self, *, labels: Mapping[str, str] | None = None) -> tuple[Action, ...]:
        """Destroy every sandbox of the state directory that this process can, or those with all of these
        labels; the others of other processes' pools are left alone. What was done; what failed says why."""
        done = []
        for record in self.list_sandboxes(labels=labels):
            if not self._is_ours(record):
                continue
            error = ""
            try:
                self._ledger.doom_anyhow(record.id, "destroy_all")
                self._destroy(record, "destroyed")
            except SandboxNotFound:
                continue
            except (SandboxError, OSError) as failure:
                error = str(failure)
            done.append(
                Action(kind="delete", id=record.id, name=record.name, reason="destroy_all", error=error)
            )
        return tuple(done)

    def close(self) -> None:
        """End the sweep, drain the pools, let go of every handle. Persistent sandboxes stay, their sessions,
        too; those of pools end. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.close()
        self._let_go()
        self._ledger.close()

    def _let_go(self) -> None:
        with self._guard:
            private, handles = list(self._private), list(self._handles.values())
            self._handles.clear()
        for key in private:
            with contextlib.suppress(SandboxError, OSError):
                self._end_private(key, "its manager was closed")
        for handle in handles:
            handle.close()


_keepings: weakref.WeakSet[Keeping] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    """What is of one process alone stays its parent's, with its record and sessions; and locks may have been
    those of threads that are not here."""
    for keeping in list(_keepings):
        keeping._guard, keeping._sweeping = threading.RLock(), threading.Lock()
        for known in (keeping._private, keeping._users, keeping._busy):
            known.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)

_ACTIVE = (SessionState.ACTIVE,)
_LOOKS = 10  # at a sandbox that is to be archived, each after somebody has used it
_FREES = ("terminate", "delete", "stop", "archive")
_SAID = ("labels", "description", "metadata", "owner")
