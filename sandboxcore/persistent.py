"""Sandboxes that outlive the process which made them: :class:`PersistentSandbox`."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Self

from sandboxcore import cgroup, host
from sandboxcore.cgroup import GroupUsage
from sandboxcore.commit import finish_all
from sandboxcore.detached import DetachedCommand, Door
from sandboxcore.errors import InvalidTransition, SandboxError, SandboxNotFound, SetupError, SpecError
from sandboxcore.events import EventKind
from sandboxcore.files import FileServer
from sandboxcore.groups import remove_later
from sandboxcore.identity import boot_id, pid_of, start_ticks
from sandboxcore.journal import Journal
from sandboxcore.layers import Layers
from sandboxcore.layerstore import collecting
from sandboxcore.lifecycle import SandboxState, check_move, new_id
from sandboxcore.link import ANSWER_PATIENCE, Home, Link
from sandboxcore.persistent_files import PersistentFiles
from sandboxcore.plan import Plan, reopened_plan, updated_plan
from sandboxcore.request import Request
from sandboxcore.resources import LimitChange
from sandboxcore.saved import SnapshotStore
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import Mount, SandboxSpec, StrPath, check_name
from sandboxcore.statedir import StatePath, private_directory
from sandboxcore.store import CommandRecord, SandboxRecord, Store
from sandboxcore.volumes import Volumes

_TOUCH = 1.0  # seconds between two notes of activity


class PersistentSandbox(PersistentFiles):
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
        self._store = Store(state_dir)
        record = SandboxRecord(
            id=self.id, name=self.name, state=self._state.value, spec=self.spec.to_dict(), labels=self.labels,
            description=self.description, metadata=self.metadata, owner=self.owner,
            created_at=self.created_at, last_active_at=self.created_at,
        )  # fmt: skip
        home = self._store.home(self.id).path
        try:
            with self._store.locked(self.id):  # or gc() would take the directory for a stray
                try:
                    home.mkdir(mode=0o700)
                    self._store.add(record)
                except BaseException:
                    with contextlib.suppress(OSError):
                        home.rmdir()
                    raise
        except BaseException:
            self._store.close()
            raise
        self._record = record

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
            if (record.pid, record.ticks) != (self._record.pid, self._record.ticks):
                self._let_go()
            changed = record.spec != self._record.spec  # the cheaper question
            if changed and (spec := SandboxSpec.from_dict(record.spec)) != self.spec:  # by another handle
                self.spec, self._plan = spec, updated_plan(self._plan, spec)
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

    def _note_end(self, record: SandboxRecord, reason: str | None = "asked") -> None:
        """It was killed, or the machine was restarted: put that on record, unless somebody did meanwhile.
        Observers are told, unless there is more to come (None)."""
        now, was = time.time(), self._state
        self._store.end(record, now)
        _drop_group(self._store, self.id)
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
            self._may_start()
            self._started(self._begin(self._home()))

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
            check_move(self.name, self.state, SandboxState.STOPPED, "stop")
            self._link_now().end(wait=ANSWER_PATIENCE)
            self._let_go()
            self._note_end(self._record)

    def close(self) -> None:
        """Let go of the handle; the sandbox stays. Commands of this handle that are not detached end.
        Idempotent."""
        with self._lock:
            for process in list(self._running):
                process.close()
            self._let_go()
            self._store.close()

    def destroy(self) -> None:
        """End it for good and forget it, with the journals of its commands. Idempotent."""
        with self._lock:
            if self._state is not SandboxState.DESTROYED:
                with self._store.locked(self.id):
                    self._look()
                    if self._link is not None:
                        self._link.end(wait=ANSWER_PATIENCE)
                    self._let_go()
                    self._forget()
            self.close()

    def _forget(self) -> None:
        """It has ended; the caller holds its lock."""
        if self._observers:
            self._settle(lambda command_id: self.command(command_id).result)
        self._store.remove(self.id)
        was, self._state = self._state, SandboxState.DESTROYED
        self._note_end_of(was, "asked")

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._let_go()
            self._store.close()

    def _ready(self, wanted: str) -> Link:
        with self._lock:
            self._look()
            link = super()._ready(wanted)
            if self.last_active_at - self._record.last_active_at > _TOUCH:
                self._store.change(self.id, last_active_at=self.last_active_at)
            return link

    def usage(self) -> GroupUsage:
        self._look()
        return super().usage()

    def _update(self, changes: Mapping[str, Any]) -> dict[str, LimitChange]:
        with self._store.locked(self.id):
            self._look()
            return super()._update(changes)

    def _limits_now(self, spec: SandboxSpec, *, running: bool) -> None:
        self._store.change(self.id, spec=spec.to_dict())
        super()._limits_now(spec, running=running)

    def _bindable(self, source: StrPath, target: StrPath, *, read_only: bool) -> Mount:
        """Whoever finds it again would not know of it."""
        raise SpecError(f"sandbox {self.name}: it is persistent: what it is to see has to be in its spec")

    @classmethod
    def from_snapshot(cls, snapshot: Snapshot, *, spec: SandboxSpec | None = None, **about: Any) -> Self:
        """Start one that has the files of a snapshot; also after :meth:`stop` it begins with these. As
        :meth:`Sandbox.from_snapshot`."""
        return cls._from(snapshot, spec=snapshot.fitting(spec), **about)._started_or_gone()

    def _begun(self, snapshot: Snapshot) -> Self:
        return self.from_snapshot(snapshot, state_dir=self._store.path)

    # --- detached commands ----------------------------------------------------------------------

    def _new_command(
        self, request: Request, keep: int, *, pty: bool, wait: bool = True
    ) -> tuple[DetachedCommand, socket.socket]:
        home, command_id, now = self._store.home(self.id), new_id("cmd"), time.time()
        args = [os.fsdecode(arg) for arg in request.args]
        record = CommandRecord(id=command_id, sandbox=self.id, args=args, pty=pty, started_at=now)
        # Locked, because gc() removes what is on no record
        with contextlib.ExitStack() as undo, self._store.locked(self.id, wait=wait):
            if self._store.get(self.id) is None:
                raise SandboxNotFound(f"sandbox {self.name} is not on record any more")
            undo.callback(home.remove, command_id, f"{command_id}.journal")
            journal = Journal.create(home.path / f"{command_id}.journal", keep)
            undo.callback(journal.close)
            later = home.bind(command_id)
            undo.callback(later.close)
            self._store.add(record)
            undo.pop_all()
        return self._command(record, journal), later

    def _command(self, record: CommandRecord, journal: Journal) -> DetachedCommand:
        home, name = self._store.home(self.id), record.id
        command = DetachedCommand(
            name, record.args, self._plan, journal, Door(home, name),
            pty=record.pty, started_at=record.started_at,
        )  # fmt: skip
        command._watch = self._watch_of(name)
        return command

    def _forget_command(self, command: DetachedCommand) -> None:
        command._forget()
        self._store.remove_command(command.id)
        self._store.home(self.id).remove(command.id, f"{command.id}.journal")

    def commands(self) -> list[DetachedCommand]:
        """The detached commands, oldest first, ended ones too, whoever started them."""
        found = []
        for record in self._store.commands(self.id):
            path = self._store.home(self.id).path / f"{record.id}.journal"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found.append(self._command(record, Journal.open(path)))
        return found


def list_sandboxes(
    state_dir: StatePath = None, *, labels: Mapping[str, str] | None = None
) -> list[SandboxRecord]:
    """What is on record, oldest first, corrected by what is really there. ``labels``: only those with all of
    these."""
    with Store(state_dir) as store:
        return [record for record in _true_records(store, labels or {}) if record is not None]


def _true_records(store: Store, labels: Mapping[str, str]) -> Iterator[SandboxRecord | None]:
    """Each sandbox; None for what is not wanted, or was removed just now."""
    for record in store.all():
        true = _true_record(store, record)
        yield true if true is not None and labels.items() <= true.labels.items() else None


def _true_record(store: Store, record: SandboxRecord) -> SandboxRecord | None:
    if record.state in (SandboxState.RUNNING, SandboxState.PAUSED) and not _runs(store, record):
        store.end(record, time.time())
        _drop_group(store, record.id)
        return store.get(record.id)
    return record


def _drop_group(store: Store, sandbox_id: str) -> None:
    """Remove the control group of a sandbox that was found dead. Whoever works on it just now takes care of
    that, or has started it again: then it is another one."""
    with contextlib.suppress(BlockingIOError), store.locked(sandbox_id, wait=False):
        now, group = store.get(sandbox_id), store.home(sandbox_id).group
        if group is not None and now is not None and now.state == SandboxState.STOPPED:
            remove_later(group)


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """What :func:`gc` did: ids of sandboxes found dead; what no record knew: directories, and files in
    them as "sandbox/file", remains of volumes, and layers of images as "layers/name"; control groups in which
    nothing can run any more, as absolute paths; layers that no snapshot has, likewise; directories into which
    a commit was finished."""

    ended: tuple[str, ...]
    removed: tuple[str, ...]
    groups: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


def gc(
    state_dir: StatePath = None, *, dry_run: bool = False, unused_layers: float | None = None
) -> Collected:
    """Set the records right after crashes: sandboxes whose processes are gone are put down as stopped, and
    what no record knows is removed (what may still run there is ended first). What somebody works on
    just now is left alone.

    The control groups of such sandboxes go, and those of all processes on this host that are gone: also of
    those that had no state directory, or another one. With ``unused_layers``, so do the layers of images that
    nobody has used for so many seconds: see :func:`sandboxcore.images.collect`."""
    ended: list[str] = []
    removed: list[str] = []
    groups: list[str] = []
    with Store(state_dir) as store:
        for _ in _collect(store, ended, removed, groups, dry_run=dry_run, unused_layers=unused_layers):
            pass
    layers, commits = _collect_files(state_dir, dry_run=dry_run)
    return Collected(tuple(ended), tuple(removed), tuple(groups), layers, commits)


def _collect_files(state_dir: StatePath, *, dry_run: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What crashes have left of snapshots and commits."""
    path = private_directory(state_dir)
    layers = SnapshotStore(path).gc(dry_run=dry_run) if (path / "snapshots").is_dir() else ()
    return layers, () if dry_run else tuple(finish_all(path / "commits"))


def _collect(
    store: Store,
    ended: list[str],
    removed: list[str],
    groups: list[str] | None = None,
    *,
    dry_run: bool,
    unused_layers: float | None = None,
) -> Iterator[None]:
    """A step for each sandbox or layer; no lock is held between them."""
    found = [] if groups is None else groups
    for record in store.all():
        if record.state in (SandboxState.RUNNING, SandboxState.PAUSED) and not _runs(store, record):
            ended.append(record.id)
            if not dry_run:
                store.end(record, time.time())
        with contextlib.suppress(BlockingIOError), store.locked(record.id, wait=False):
            removed += _clear(store, record.id, dry_run=dry_run)
            if (now := store.get(record.id)) is not None and not _may_run(store, now):
                found += _clear_group(store.home(record.id), dry_run=dry_run)
        yield
    for stray in store.strays():
        with contextlib.suppress(BlockingIOError), store.locked(stray, wait=False):
            if store.get(stray) is None and store.home(stray).path.is_dir():
                removed.append(stray)
                if not dry_run:
                    store.home(stray).end()
                    found += _clear_group(store.home(stray), dry_run=False)
                    store.remove(stray)
        yield
    found += cgroup.collect(dry_run=dry_run)
    for layer in collecting(store.path, unused_for=unused_layers, dry_run=dry_run):
        removed.append(f"layers/{layer}")
        yield
    removed += [f"volumes/{name}" for name in Volumes(store.path).gc(dry_run=dry_run)]


def _may_run(store: Store, record: SandboxRecord) -> bool:
    return record.state in (SandboxState.RUNNING, SandboxState.PAUSED) and _runs(store, record)


def _clear_group(home: Home, *, dry_run: bool) -> list[str]:
    """Remove the control group of a sandbox that is gone. What is busy still stays for the next time."""
    group = home.group
    places = [str(place) for place in group.places() if place.is_dir()] if group else []
    if group is None or dry_run:
        return places
    with contextlib.suppress(SetupError):  # somebody else's
        group.remove()
    return [place for place in places if not os.path.exists(place)]


def _runs(store: Store, record: SandboxRecord) -> bool:
    try:
        link = Link.reopen(store.home(record.id), record.pid, record.ticks, record.boot)
    except SandboxError:  # of another pid namespace: not ours to say
        return True
    if link is not None:
        link.close()
    return link is not None


def _clear(store: Store, sandbox: str, *, dry_run: bool) -> list[str]:
    """Remove what a crash left of commands that were not on record yet."""
    home = store.home(sandbox)
    try:
        orphans = store.orphans(sandbox)
    except FileNotFoundError:  # destroyed meanwhile
        return []
    if not dry_run:
        home.remove(*orphans)
    return [f"{sandbox}/{name}" for name in orphans]
