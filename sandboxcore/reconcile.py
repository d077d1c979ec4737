"""What is due by time and by policy, and what crashes have left: :func:`reconcile`, :class:`Sweeper`."""

import atexit
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sandboxcore.errors import SandboxNotFound, SpecError
from sandboxcore.identity import lives, this_process
from sandboxcore.inhabitants import is_awaited
from sandboxcore.ledger import Ledger
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.policy import Action, due
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.recovery import Collected, gc, runs
from sandboxcore.session import LIVE, SessionState, SessionTimeouts, is_timed_out

KEEP_SESSIONS = 86400.0  # seconds for which one that was terminated can still be looked up

_log = logging.getLogger("sandboxcore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What :func:`reconcile` did, or with ``dry_run`` would have done, in its order; and what crashes had
    left."""

    dry_run: bool
    actions: tuple[Action, ...]
    collected: Collected

    def _done(self, kind: str) -> tuple[str, ...]:
        return tuple(action.id for action in self.actions if action.kind == kind and not action.error)

    @property
    def stopped(self) -> tuple[str, ...]:
        """Ids of sandboxes."""
        return self._done("stop")

    @property
    def archived(self) -> tuple[str, ...]:
        """Ids of sandboxes."""
        return self._done("archive")

    @property
    def deleted(self) -> tuple[str, ...]:
        """Ids of sandboxes."""
        return self._done("delete")

    @property
    def terminated(self) -> tuple[str, ...]:
        """Ids of sessions."""
        return self._done("terminate")

    @property
    def failed(self) -> tuple[Action, ...]:
        """What could not be done; each says why. Most of it is tried again the next time."""
        return tuple(action for action in self.actions if action.error)


def reconcile(
    ledger: Ledger,
    *,
    now: float | None = None,
    dry_run: bool = False,
    crashes: bool = True,
    busy: Callable[[str], bool] = lambda sandbox: False,
    written: Callable[[str], float] = lambda sandbox: 0.0,
    note: Callable[[Action], None] = lambda action: None,
) -> Reconciled:
    """Do what is due, each thing only if nothing has come between; what fails leaves the rest as it is.

    Sandboxes and sessions that ended with their process are forgotten; sessions without activity for too
    long are terminated, and sandboxes destroyed whose last one it was; sandboxes are stopped, archived and
    destroyed by their policy and their time to live; what crashes have left is cleared away. A command that
    somebody waits for is activity, and so is the output of a detached one. While a session is active, only
    the time to live ends its sandbox. Sandboxes of another process that lives are its own to destroy, and
    their sessions its own to terminate: it alone knows what runs there.

    now: seconds since the epoch. dry_run: nothing changes, and the actions are those that would be done.
    crashes: False leaves what they have left, which takes longest to look for, for another time.
    busy: whether this process runs something in a sandbox, which counts as activity. written: when a detached
    command of one of this process's own has written something last. note: called with each action that was
    done, or has failed.
    """
    now = time.time() if now is None else now
    one = _Pass(ledger, now, dry_run=dry_run, busy=busy, written=written, note=note)
    return one.run(crashes=crashes)


class _Pass:
    """One run. It goes by what it has read, and by what it would have changed; what it really changes, it
    changes only where that is still so."""

    def __init__(
        self,
        ledger: Ledger,
        now: float,
        *,
        dry_run: bool,
        busy: Callable[[str], bool],
        written: Callable[[str], float],
        note: Callable[[Action], None],
    ) -> None:
        self.ledger, self.now, self.dry_run = ledger, now, dry_run
        self.written, self.note, self.host = written, note, this_process()
        self.actions: list[Action] = []
        self.ended: list[str] = []
        self.old = ledger.ended_sessions(now - KEEP_SESSIONS)
        self.sessions = ledger.sessions(states=LIVE)
        self.states = ledger.session_states()  # also of damaged ones
        self.records = {record.id: record for record in ledger.all()}
        self.busy = {sandbox for sandbox in self.records if busy(sandbox)}

    def run(self, *, crashes: bool) -> Reconciled:
        for record in list(self.records.values()):
            self._attend(record)
        for record in list(self.records.values()):
            self._forget_with_host(record)
        for session in list(self.sessions):
            self._end_session(session)
        doomed = [record for record in self.records.values() if record.doomed and not record.host]
        for record in list(self.records.values()):
            if not record.doomed:
                self._by_policy(record)
        for record in doomed:
            self._destroy(record, record.doomed)
        collected = self._collected() if crashes else Collected((), ())
        self._forget_sessions()
        return Reconciled(dry_run=self.dry_run, actions=tuple(self.actions), collected=collected)

    def _act(self, action: Action, do: Callable[[], bool]) -> bool:
        """Whether it was done; an action that came too late is none."""
        if self.dry_run:
            self.actions.append(action)
            return True
        try:
            if not do():
                return False
        except SandboxNotFound:  # somebody else has destroyed it just now
            return False
        except Exception as error:
            self._cannot(action, error)
            return False
        self._noted(action)
        return True

    def _cannot(self, action: Action, error: Exception) -> None:
        action = replace(action, error=str(error) or repr(error))
        level = logging.INFO if isinstance(error, BlockingIOError) else logging.WARNING  # not just now
        _log.log(level, "%s %s: %s", action.kind, action.name or action.id, action.error)
        self._noted(action)

    def _noted(self, action: Action) -> None:
        self.actions.append(action)
        if not self.dry_run:
            try:
                self.note(action)
            except Exception:
                _log.exception("%s %s: told of it", action.kind, action.id)

    # --- what there is --------------------------------------------------------------------------

    def _attend(self, record: SandboxRecord) -> None:
        """Note what has happened in a sandbox since somebody looked, and whether it is still there."""
        if record.id not in self.busy and self._is_awaited(record):
            self.busy.add(record.id)
        when = self.now if record.id in self.busy else self._written(record)
        touched = self._touched(record.id, when)
        if touched or when > record.last_active_at:
            self.sessions = [touched.get(session.id, session) for session in self.sessions]
            record = replace(record, last_active_at=max(record.last_active_at, when))
            if not self.dry_run:
                self.ledger.touch_sessions(record.id, when)
        if record.state in ("running", "paused") and not record.host and not self._runs(record):
            self.ended.append(record.id)
            if not self.dry_run:
                self.ledger.end(record, self.now)
            record = replace(record, state="stopped", stopped_at=self.now, pid=0, ticks=0)
        self.records[record.id] = record

    def _is_awaited(self, record: SandboxRecord) -> bool:
        """Whether some process waits for a command in it; looked at where something might be due."""
        if record.state != "running" or not (self._is_due(record) and self._runs(record)):
            return False
        try:
            return is_awaited(self.ledger, record)
        except OSError:  # no free descriptor, say
            return True

    def _is_due(self, record: SandboxRecord) -> bool:
        try:
            return due(record, self.now) is not None or any(
                is_timed_out(session, self.now) for session in self._of(record.id)
            )
        except SpecError:
            return False

    def _runs(self, record: SandboxRecord) -> bool:
        try:
            return runs(self.ledger, record)
        except OSError:  # no free descriptor, say: not known to have ended
            return True

    def _written(self, record: SandboxRecord) -> float:
        """When a detached command has put something into its journal last; 0: none has."""
        last = self.written(record.id) if record.host else 0.0
        if record.host or record.state not in ("running", "paused"):
            return min(last, self.now)
        try:
            with os.scandir(self.ledger.home(record.id).path) as entries:
                for entry in entries:
                    if entry.name.endswith(".journal"):
                        last = max(last, entry.stat(follow_symlinks=False).st_mtime)
        except FileNotFoundError:  # it goes just now
            pass
        return min(last, self.now)

    def _touched(self, sandbox: str, when: float) -> dict[str, SessionRecord]:
        """What :meth:`Ledger.touch_sessions` changes."""
        for state in (SessionState.ACTIVE, SessionState.DETACHED):
            found = [one for one in self._of(sandbox) if one.state == state]
            if found:
                later = (one for one in found if one.last_active_at < when)
                return {one.id: replace(one, last_active_at=when) for one in later}
        return {}

    def _of(self, sandbox: str) -> Iterator[SessionRecord]:
        return (session for session in self.sessions if session.sandbox == sandbox)

    # --- sessions -------------------------------------------------------------------------------

    def _forget_with_host(self, record: SandboxRecord) -> None:
        if not record.host or lives(record.host):
            return
        reason = f"its process {record.host.split()[0]} has ended"

        def forget() -> bool:
            self.ledger.forget_private(record.id)
            return True

        if self._act(Action(kind="forget", id=record.id, name=record.name, reason=reason), forget):
            del self.records[record.id]
            self.sessions = [session for session in self.sessions if session.sandbox != record.id]

    def _end_session(self, session: SessionRecord) -> None:
        action = Action(kind="terminate", id=session.id, name=session.client, reason="timed out")
        record = self.records.get(session.sandbox)
        if record is not None and record.host not in ("", self.host):
            return
        try:
            if session.sandbox in self.busy or not is_timed_out(session, self.now):
                return
            most = SessionTimeouts.from_dict(session.timeouts).of(SessionState(session.state))
        except SpecError as error:
            self._cannot(action, error)
            return
        seconds = self.now - session.last_active_at
        why = f"timed out: {session.state} without activity for {seconds:.0f} s (timeout {most:g} s)"
        states = self.states.get(session.sandbox, {})  # read later than the session: it may have ended
        last = states.keys() == {session.id} and record is not None and not record.lasting

        def terminate() -> bool:
            nonlocal last
            done, last = self.ledger.end_session(session.id, why, unless_touched=session.last_active_at)
            return done

        if self._act(replace(action, reason=why), terminate):
            self.sessions.remove(session)
            states.pop(session.id, None)
            if last and record is not None and not record.host and not record.doomed:
                self._destroy(record, why)

    def _forget_sessions(self) -> None:
        reason = f"terminated more than {KEEP_SESSIONS / 3600:.0f} h ago"
        for session in self.old:
            action = Action(kind="forget", id=session.id, name=session.client, reason=reason)
            self._act(action, functools.partial(self.ledger.forget_session, session.id))

    # --- sandboxes ------------------------------------------------------------------------------

    def _by_policy(self, record: SandboxRecord) -> None:
        try:
            action = due(record, self.now)
        except SpecError as error:
            reason = "its policy cannot be read"
            self._cannot(Action(kind="stop", id=record.id, name=record.name, reason=reason), error)
            return
        expired = record.expires_at is not None and self.now >= record.expires_at
        used = record.id in self.busy or SessionState.ACTIVE in self.states.get(record.id, {}).values()
        if action is None or (used and not expired):
            return
        if action.kind == "delete":
            self._destroy(
                record, action.reason, lambda: self.ledger.doom(record, action.reason, used=expired)
            )
        else:
            self._act(action, lambda: self._put_by(record, action))

    def _put_by(self, record: SandboxRecord, action: Action) -> bool:
        if not self.ledger.idle(record.id):  # somebody works on it
            return False
        with self._connected(record) as sandbox:
            if action.kind == "stop":
                return sandbox._stop_unused(record)
            return sandbox._archive(action.reason, record)

    def _connected(self, record: SandboxRecord) -> contextlib.closing[PersistentSandbox]:
        """Not by its own ``with``, which starts one that does not run."""
        return contextlib.closing(PersistentSandbox.connect(record.id, state_dir=self.ledger.path))

    def _destroy(self, record: SandboxRecord, why: str, doom: Callable[[], bool] = lambda: True) -> None:
        """Whoever dies in between leaves it doomed, for the next one."""
        action = Action(kind="delete", id=record.id, name=record.name, reason=why)

        def destroy() -> bool:
            if not doom():
                return False
            if not self.ledger.idle(record.id):
                raise BlockingIOError("somebody works on it just now; the next time")
            with self._connected(record) as sandbox:
                return sandbox._destroy()

        if self._act(action, destroy):
            del self.records[record.id]

    # --- what crashes have left -----------------------------------------------------------------

    def _collected(self) -> Collected:
        try:
            found = gc(self.ledger.path, dry_run=self.dry_run)
        except Exception as error:
            reason = "what crashes have left"
            self._cannot(Action(kind="forget", id="", name=str(self.ledger.path), reason=reason), error)
            found = Collected((), ())
        gone = {action.id for action in self.actions if action.kind in ("delete", "forget")}
        ended = [*self.ended, *(one for one in found.ended if one not in gone and one not in self.ended)]
        removed = tuple(one for one in found.removed if one.partition("/")[0] not in gone)
        groups = tuple(one for one in found.groups if os.path.basename(one).partition(".")[0] not in gone)
        return replace(found, ended=tuple(ended), removed=removed, groups=groups)


class Sweeper:
    """Calls something again and again, in a thread of its own, until it is closed.

    action: what it raises is logged, and counted by ``failures``; it goes on. interval: seconds from the end
    of one call to the next. A forked child has none. When the interpreter ends, it is closed.
    """

    def __init__(self, action: Callable[[], Any], interval: float) -> None:
        if not 0 < interval < threading.TIMEOUT_MAX:
            raise SpecError(f"interval: {interval!r} is not a positive number of seconds")
        self._action, self.interval, self.failures = action, interval, 0
        self._renew()
        self._closed = self._wanted = False
        self._thread: threading.Thread | None = threading.Thread(
            target=self._go, name="sandboxcore-sweeper", daemon=True
        )
        _sweepers.add(self)
        self._thread.start()

    def _renew(self) -> None:
        self._changed = threading.Condition()

    def _go(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted, self.interval)
                if self._closed:
                    return
                self._wanted = False
            try:
                self._action()
            except Exception:
                self.failures += 1
                _log.exception("sweeper: %r", self._action)

    def nudge(self) -> None:
        """Have it done now; if it is being done just now, once more after that."""
        with self._changed:
            self._wanted = True
            self._changed.notify_all()

    def close(self, *, wait: float = 30.0) -> None:
        """No more calls. Waits for the end of one that has begun, at most so many seconds. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(wait)

    def _after_fork(self) -> None:
        self._renew()  # its lock may have been the thread's, which is not here
        self._closed, self._thread = True, None


_sweepers: weakref.WeakSet[Sweeper] = weakref.WeakSet()


def _close_all() -> None:
    for sweeper in list(_sweepers):
        sweeper.close()


def _after_fork_in_child() -> None:
    for sweeper in list(_sweepers):
        sweeper._after_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork_in_child)
