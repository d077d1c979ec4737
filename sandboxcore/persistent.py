"""Sandboxes that outlive the process which made them: :class:`PersistentSandbox`."""

import contextlib
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Mapping
from typing import Any, Self

from sandboxcore import host
from sandboxcore.cgroup import GroupUsage
from sandboxcore.errors import InvalidTransition, SandboxError, SandboxNotFound, SpecError
from sandboxcore.events import EventKind
from sandboxcore.files import FileServer
from sandboxcore.identity import boot_id, pid_of, start_ticks
from sandboxcore.layers import Layers
from sandboxcore.lifecycle import SandboxState, check_move
from sandboxcore.link import ANSWER_PATIENCE, Home, Link
from sandboxcore.persistent_commands import PersistentCommands
from sandboxcore.plan import Plan, compile_plan, reopened_plan, restated_plan
from sandboxcore.records import SandboxRecord
from sandboxcore.recovery import drop_group
from sandboxcore.resources import FIXED, LimitChange
from sandboxcore.snapshots import Snapshot, shape
from sandboxcore.spec import Limits, Mount, SandboxSpec, StrPath, check_name
from sandboxcore.statedir import StatePath
from sandboxcore.store import Store

_TOUCH = 1.0  # seconds between two notes of activity


class PersistentSandbox(PersistentCommands):
    """A sandbox with a name that stays until it is destroyed, whoever made it.

    Any process of the same user finds it again with :meth:`connect`. Leaving a ``with`` block, and
    :meth:`close`, let go of the handle; :meth:`stop` and :meth:`destroy` end the sandbox. It survives its
    maker, also a killed one, but not a reboot: then it is stopped.

    Parameters
    ----------
    state_dir: where it is on record; default ``$SANDBOXCORE_STATE_DIR``, else ``sandboxcore`` in
        ``$XDG_STATE_HOME`` or ``~/.local/state``.
    The others are those of :class:`Sandbox`. Raises :class:`SpecError` where the name is taken.
    """

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        *,
        name: str | None = None,
        state_dir: StatePath = None,
        **about: Any,
    ) -> None:
        if name is not None:
            check_name(name)
        self._state_dir = state_dir
        super().__init__(spec, name=name, **about)
        self._store = self._opened(state_dir)
        record = SandboxRecord(
            id=self.id, name=self.name, state=self._state.value, spec=self.spec.to_dict(), labels=self.labels,
            description=self.description, metadata=self.metadata, owner=self.owner,
            created_at=self.created_at, last_active_at=self.created_at, lasting=True,
        )  # fmt: skip
        home = self._store.home(self.id).path
        try:
            with self._store.locked(self.id):  # or gc() would take the directory for a stray
                try:
                    home.mkdir(mode=0o700)
                    self._record = self._enrolled(record)
                except BaseException:
                    with contextlib.suppress(OSError):
                        home.rmdir()
                    raise
        except BaseException:
            self._closed()
            raise

    def _opened(self, state_dir: StatePath) -> Store:
        return Store(state_dir)

    def _closed(self) -> None:
        self._store.close()

    def _enrolled(self, record: SandboxRecord) -> SandboxRecord:
        """Put on record."""
        self._store.add(record)
        return record

    @classmethod
    def create(cls, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Make one and start it. One that cannot start leaves no record."""
        return cls(spec, **about)._started_or_gone()

    def _started_or_gone(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.destroy()
            raise
        return self

    @classmethod
    def connect(cls, key: str, *, state_dir: StatePath = None) -> Self:
        """The sandbox of a name or id. Raises :class:`SandboxNotFound`."""
        store = Store(state_dir)
        try:
            return cls._of(store, store.find(key))
        except BaseException:
            store.close()
            raise

    @classmethod
    def _of(cls, store: Store, record: SandboxRecord) -> Self:
        if record.host:
            raise SandboxError(f"sandbox {record.name}: it is process {record.host.split()[0]}'s alone")
        self = cls.__new__(cls)
        self._store, self._record, self._state_dir = store, record, store.path
        self.spec = SandboxSpec.from_dict(record.spec)
        self.id, self.name, self.labels = record.id, record.name, dict(record.labels)
        self.description, self.metadata, self.owner = record.description, dict(record.metadata), record.owner
        self._lock = threading.RLock()
        self._plan = reopened_plan(self.spec, host.features(), tuple(record.omitted))
        self._link = None
        self._capabilities = None
        self._running = weakref.WeakSet()
        self._detached = {}
        self._file_server = FileServer()
        self._layers = Layers()
        self._binds = {}
        self._pid = os.getpid()
        self._adopt(record)
        self._look()
        return self

    def _adopt(self, record: SandboxRecord) -> None:
        self._record, self._state = record, SandboxState(record.state)
        self.created_at, self.started_at = record.created_at, record.started_at
        self.stopped_at, self.last_active_at = record.stopped_at, record.last_active_at

    # --- states ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Go by what is on record, which other processes change, and by what is really there."""
        with self._lock:
            if self._state is SandboxState.DESTROYED:
                return
            if self._pid != os.getpid():  # forked: the descriptors are the parent's, the sandbox is anybody's
                self._let_go()
                self._pid = os.getpid()
            record = self._store.get(self.id)
            if record is None:
                self._let_go()
                was, self._state = self._state, SandboxState.DESTROYED
                self._note_end_of(was, "elsewhere")
                return
            restarted = (record.pid, record.ticks) != (self._record.pid, self._record.ticks)
            if restarted:
                self._let_go()
            changed = record.spec != self._record.spec  # the cheaper question
            if changed and (spec := SandboxSpec.from_dict(record.spec)) != self.spec:  # by another handle
                again = reopened_plan(spec, host.features(), tuple(record.omitted))
                self.spec, self._plan = spec, again if restarted else restated_plan(self._plan, spec)
            self._adopt(record)
            if self._state not in (SandboxState.RUNNING, SandboxState.PAUSED):
                self._let_go()
                return
            if self._link is None:
                home = self._store.home(self.id)
                self._link = Link.reopen(home, record.pid, record.ticks, record.boot)
            if self._link is None or not self._link.alive():
                self._let_go()
                self._note_end(record, "died")
                drop_group(self._store, self.id)

    def _note_end(self, record: SandboxRecord, reason: str | None = "asked") -> None:
        """Put down that it runs no more, unless somebody did meanwhile, or has started it again. Observers
        are told, unless there is more to come (None)."""
        now, was = time.time(), self._state
        self._store.end(record, now)
        self._state, self.stopped_at = SandboxState.STOPPED, now
        if reason is not None:
            self._note_end_of(was, reason)

    def _let_go(self) -> None:
        self._file_server.close()
        if self._link is not None:
            self._link.close()
            self._link = None

    @property
    def state(self) -> SandboxState:
        """A :class:`SandboxState`, as it is now, whichever process changed it."""
        self._look()
        return self._state

    @property
    def record(self) -> SandboxRecord:
        """What is on record now, as plain data."""
        self._look()
        return dataclasses.replace(self._record, state=self._state.value, stopped_at=self.stopped_at)

    def start(self) -> None:
        """Start it, also again after :meth:`stop`; then everything private in it is new and empty."""
        with self._lock, self._store.locked(self.id):
            self._look()
            before, begun = self.spec, False
            if self._record.next_spec and self._state is SandboxState.STOPPED:
                self.spec = SandboxSpec.from_dict(self._record.next_spec)
            try:
                self._may_start()
                self._started(self._begin(self._home()))
                begun = True
            finally:
                if not begun and self._link is None:
                    self.spec = before

    def _home(self) -> Home:
        home = self._store.home(self.id)
        home.path.mkdir(mode=0o700, exist_ok=True)
        return home

    def _started(self, link: Link) -> None:
        try:
            self._on_record(link, self._plan)
            link.stay()
        except BaseException:
            link.end(wait=0)
            raise
        self._link = link
        self._look()
        self._note_start(link)

    def _on_record(self, link: Link, plan: Plan) -> None:
        pid, now = pid_of(link.pidfd), time.time()
        self._store.change(
            self.id, state=SandboxState.RUNNING.value, started_at=now, stopped_at=None, last_active_at=now,
            pid=pid, ticks=start_ticks(pid), boot=boot_id(), omitted=list(plan.omitted),
            spec=plan.spec.to_dict(), next_spec={},
        )  # fmt: skip
        record = self._store.get(self.id)
        if record is None:
            raise SandboxNotFound(f"sandbox {self.name} was removed while it started")
        self._adopt(record)

    def suspend(self) -> None:
        """Stop every process in it, all at once, until :meth:`resume`: by the freezer of its control group,
        or SIGSTOP where it has none. No limit of time counts meanwhile."""
        with self._lock, self._store.locked(self.id):
            check_move(self.name, self.state, SandboxState.PAUSED, "suspend")
            # On record first: a paused one that runs, because we die here, can be resumed; the reverse hangs.
            self._store.change(self.id, state=SandboxState.PAUSED.value)
            try:
                self._through(Link.freeze)
            except BaseException:
                self._store.change(self.id, state=SandboxState.RUNNING.value)
                raise
            self._look()
            self._note(EventKind.SANDBOX_SUSPENDED)

    def resume(self) -> None:
        """Let it go on after :meth:`suspend`."""
        with self._lock, self._store.locked(self.id):
            if self.state is not SandboxState.PAUSED:
                raise InvalidTransition(self.name, self._state.value, "resume")
            self._through(Link.thaw)
            self._store.change(self.id, state=SandboxState.RUNNING.value)
            self._look()
            self._note(EventKind.SANDBOX_RESUMED)

    def stop(self) -> None:
        """Kill everything in it, wait until it is gone. What is private in it is lost; it can start again."""
        with self._lock, self._store.locked(self.id):
            if self.state is SandboxState.ARCHIVED:
                raise InvalidTransition(self.name, self._state.value, "stop")
            check_move(self.name, self._state, SandboxState.STOPPED, "stop")
            self._stop()

    def _stop(self) -> None:
        self._link_now().end(wait=ANSWER_PATIENCE)
        self._let_go()
        self._note_end(self._record)

    def archive(self, why: str = "") -> None:
        """Stop it and put it away: nothing of it runs, and it cannot start before :meth:`recover`. What was
        written to its root or overlays (:attr:`SandboxSpec.writable`, ``overlay=``) is kept on the disk, and
        is there again when it starts; the rest is lost, as with :meth:`stop`.

        Raises what :meth:`snapshot` does where that cannot be kept: then it goes on as before.
        """
        self._archive(why, None)

    def _archive(self, why: str, seen: SandboxRecord | None) -> bool:
        """With ``seen``, only if nobody has used it since that was read; whether that was so."""
        archived = {"state": "archived", "archived_at": time.time(), "archived_why": why}
        with self._lock, self._store.locked(self.id):
            if (before := self.state) not in (SandboxState.RUNNING, SandboxState.PAUSED):
                check_move(self.name, before, SandboxState.ARCHIVED, "archive")
                if not self._claim(seen, archived):
                    return False
            else:
                if not self._claim(seen, {"state": SandboxState.PAUSED.value}):
                    return False
                self._put_away(before)
                self._store.change(self.id, **{**archived, "archived_at": time.time()})
            self._look()
            return True

    def _claim(self, seen: SandboxRecord | None, values: Mapping[str, Any]) -> bool:
        if seen is None:
            self._store.change(self.id, **values)
            return True
        return self._store.change_unused(seen, **values)

    def _put_away(self, before: SandboxState) -> None:
        """Keep its files, and end it. It is on record as paused: nobody begins anything in it meanwhile."""
        try:
            if self._whole_plan().overlays:
                self._keep_last(before)
        except BaseException:
            if before is SandboxState.RUNNING:
                self._store.change(self.id, state=before.value)
            elif self._link is not None and self._link.alive():
                self._link.freeze()
            self._look()
            raise
        self._stop()

    def _stop_unused(self, seen: SandboxRecord) -> bool:
        """:meth:`stop`, if nobody has used it since this was read; whether that was so. Who is about to,
        finds it paused."""
        with self._lock, self._store.locked(self.id):
            if self.state not in (SandboxState.RUNNING, SandboxState.PAUSED):
                return False
            if not self._store.change_unused(seen, state=SandboxState.PAUSED.value):
                return False
            self._stop()
            return True

    def recover(self) -> None:
        """Bring it back after :meth:`archive`: it is stopped, and can start."""
        with self._lock, self._store.locked(self.id):
            if self.state is not SandboxState.ARCHIVED:
                raise InvalidTransition(self.name, self._state.value, "recover")
            self._store.change(
                self.id, state=SandboxState.STOPPED.value, stopped_at=time.time(), last_active_at=time.time(),
                archived_at=None, archived_why="",
            )  # fmt: skip
            self._look()

    def close(self) -> None:
        """Let go of the handle; the sandbox stays. Commands of this handle that are not detached end.
        Idempotent."""
        with self._lock:
            for process in list(self._running):
                process.close()
            self._let_go()
            self._closed()

    def destroy(self) -> None:
        """End it for good and forget it, with the journals of its commands. Idempotent."""
        self._destroy()

    def _destroy(self) -> bool:
        """Whether it was still on record."""
        there = False
        with self._lock:
            if self._state is not SandboxState.DESTROYED:
                with self._store.locked(self.id):
                    there = self.state is not SandboxState.DESTROYED
                    if self._link is not None:
                        self._link.end(wait=ANSWER_PATIENCE)
                    self._forget()
            self.close()
        return there

    def _forget(self) -> None:
        """Nothing of it runs. The caller holds its lock."""
        self._let_go()
        if self._observers:
            self._settle(lambda command_id: self.command(command_id).result)
        drop_group(self._store, self.id)  # of one that was found dead
        self._store.remove(self.id)
        was, self._state = self._state, SandboxState.DESTROYED
        self._note_end_of(was, "asked")

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._let_go()
            self._closed()

    def _ready(self, wanted: str) -> Link:
        with self._lock:
            self._look()
            link = super()._ready(wanted)
            if self.last_active_at - self._record.last_active_at > _TOUCH:
                while not self._store.touch(self.id, self.last_active_at):  # it is being stopped just now
                    self._look()
                    link = super()._ready(wanted)
            return link

    def usage(self) -> GroupUsage:
        self._look()
        return super().usage()

    def _update(self, changes: Mapping[str, Any]) -> dict[str, LimitChange]:
        with self._store.locked(self.id):
            self._look()
            return super()._update(changes)

    def _limits_now(self, spec: SandboxSpec, *, running: bool) -> None:
        changes: dict[str, Any] = {"spec": spec.to_dict()}
        if self._record.next_spec:  # it has them the next time, too
            before, now = self._record.spec["limits"], changes["spec"]["limits"]
            other = {name: value for name, value in now.items() if value != before.get(name)}
            limits = {**self._record.next_spec["limits"], **other}
            changes["next_spec"] = {**self._record.next_spec, "limits": limits}
        self._store.change(self.id, **changes)
        self._adopt(dataclasses.replace(self._record, **changes))
        super()._limits_now(spec, running=running)

    def change_spec(self, **fields: Any) -> Mapping[str, LimitChange]:
        """Change its spec, by the names of :class:`SandboxSpec`; ``limits`` is a mapping of those to change.
        All of it changes, or nothing.

        What is given replaces what was there: ``env={...}`` all variables, ``ro=[...]`` all of these. Limits
        apply as by :meth:`update`, and those that are fixed while it runs with the next start; ``env`` with
        the next command; the rest with the next start. Until then :attr:`spec` is how it runs, and
        ``record.next_spec`` how it will. Says of each, limits as ``"limits.NAME"``, when it applies.

        Raises what :meth:`update` does, and what a sandbox of the new spec would on this host.
        """
        with self._lock, self._store.locked(self.id):
            return self._respecified(fields)

    def _respecified(self, given: Mapping[str, Any]) -> dict[str, LimitChange]:
        """The caller holds its lock."""
        self._look()
        if self._state is SandboxState.DESTROYED:
            raise SandboxNotFound(f"sandbox {self.name} is not on record any more")
        fields = dict(given)
        limits: Mapping[str, Any] = fields.pop("limits", None) or {}
        for kind, names, known in (("", fields, SandboxSpec), ("limits.", limits, Limits)):
            for name in names:
                if name not in known.__dataclass_fields__ or name == "fingerprint":
                    raise SpecError(f"{kind}{name}: there is no such field")
        before = SandboxSpec.from_dict(self._record.next_spec or self._record.spec)
        wanted = before.replace(**fields, limits=dataclasses.replace(before.limits, **limits))
        if not self._may_differ(before, wanted):
            raise SpecError(f"sandbox {self.name}: what it has written lies in its overlays: they stay")
        compile_plan(wanted, host.features(), self._store.path)  # what cannot be is said now
        now: dict[str, LimitChange] = {}
        if self._link is not None:
            now = self._partly_now(fields, {name: limits[name] for name in limits if name not in FIXED})
        self._remember(wanted)
        found = {name: (getattr(before, name), getattr(wanted, name)) for name in fields}
        for name in limits:
            found[f"limits.{name}"] = (getattr(before.limits, name), getattr(wanted.limits, name))
        later = {name: LimitChange(*pair, "next start") for name, pair in found.items()}
        changes = {**later, **now}
        if self._observers:
            said = {name: change.applies for name, change in changes.items()}
            self._note(EventKind.SANDBOX_UPDATED, spec=said)
        return changes

    def _may_differ(self, before: SandboxSpec, wanted: SandboxSpec) -> bool:
        if shape(before) == shape(wanted) or not shape(before).overlays:
            return True
        return self._link is None and not self._layers_file()["base"]

    def _partly_now(self, fields: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, LimitChange]:
        """What a sandbox that runs can have without another start."""
        done = super()._update(limits) if limits else {}
        found = {f"limits.{name}": change for name, change in done.items()}
        if "env" in fields:
            spec = self.spec.replace(env=fields["env"])
            found["env"] = LimitChange(dict(self.spec.env), dict(spec.env), "next command")
            self.spec, self._plan = spec, restated_plan(self._plan, spec)
        return found

    def _remember(self, wanted: SandboxSpec) -> None:
        if self._link is None:
            self.spec = wanted
        later = {} if wanted == self.spec else wanted.to_dict()
        changes: dict[str, Any] = {"spec": self.spec.to_dict(), "next_spec": later}
        self._store.change(self.id, **changes)
        self._adopt(dataclasses.replace(self._record, **changes))

    def _bindable(self, source: StrPath, target: StrPath, *, read_only: bool) -> Mount:
        """Whoever finds it again would not know of it."""
        raise SpecError(f"sandbox {self.name}: it is persistent: what it is to see has to be in its spec")

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, *, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Start one that has the files of a snapshot; also after :meth:`stop` it begins with these. As
        :meth:`Sandbox.from_snapshot`."""
        return cls._from(snapshot, spec=snapshot.fitting(spec), **about)._started_or_gone()

    def _begun(self, snapshot: Snapshot) -> Self:
        child = self._from(snapshot, spec=snapshot.fitting(None), state_dir=self._store.path)
        child._room = self._room
        return child._started_or_gone()
