"""What a manager has: a state directory, the sandboxes in it, and who hears what becomes of them."""

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from sandboxcore.errors import InvalidTransition, SandboxError, SandboxNotFound, SpecError, TooManySandboxes
from sandboxcore.events import Dispatcher, Event, EventKind, current_trace
from sandboxcore.identity import this_process
from sandboxcore.ledger import Ledger
from sandboxcore.lifecycle import SandboxState
from sandboxcore.manager_metrics import Metrics
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.records import SandboxRecord, SessionRecord, plain_metadata
from sandboxcore.recovery import true_records
from sandboxcore.room import Room
from sandboxcore.sandbox import Sandbox
from sandboxcore.session import LIVE, begun
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import SandboxSpec
from sandboxcore.statedir import StatePath, close_lock
from sandboxcore.store import Store
from sandboxcore.template import Template

if TYPE_CHECKING:
    from sandboxcore.policy import LifecyclePolicy

DEFAULT_SANDBOX = "default_sandbox"  # of the settings
TOUCH = 1.0  # seconds between two notes of activity in one sandbox
PAUSE = 0.05  # seconds between two attempts where nothing tells of room
# To make room: others, and our own pools, may be faster than whoever it was made for.
TRIES, TRYING = 5, 5.0  # so often at most, and not again after so many seconds

Enrol = Callable[[SandboxRecord], SandboxRecord]


class Managed(PersistentSandbox):
    """A persistent sandbox of a manager, whose store it uses."""

    _ledger: Ledger

    def __init__(
        self, spec: SandboxSpec | None = None, *, ledger: Ledger, enrol: Enrol, room: Room, **about: Any
    ) -> None:
        self._ledger, self._enrol, self._room = ledger, enrol, room
        super().__init__(spec, state_dir=ledger.path, **about)

    def _opened(self, state_dir: StatePath) -> Store:
        return self._ledger

    def _closed(self) -> None:
        """It is the manager's, who uses it on."""

    def _enrolled(self, record: SandboxRecord) -> SandboxRecord:
        return self._enrol(record)

    @classmethod
    def of(cls, ledger: Ledger, record: SandboxRecord, room: Room) -> Self:
        """One that is on record."""
        self = cls._of(ledger, record)
        self._ledger, self._room = ledger, room
        return self

    def _begun(self, snapshot: Snapshot) -> Self:
        return self._child(snapshot, self._ledger.enrol)

    def _child(self, snapshot: Snapshot, enrol: Enrol) -> Self:
        parts: dict[str, Any] = {"ledger": self._ledger, "enrol": enrol, "room": self._room}
        return self._from(snapshot, spec=snapshot.fitting(None), **parts)._started_or_gone()

    def offspring(self, n: int, enrol: Enrol) -> list[Self]:
        """:meth:`fork`, with children that are put on record by ``enrol``."""
        return self._forked(n, lambda snapshot: self._child(snapshot, enrol))


class Directory:
    """The part of :class:`SandboxManager` that knows sandboxes, whoever uses them."""

    def __init__(
        self,
        state_dir: StatePath,
        *,
        max_sandboxes: int | None,
        policy: "LifecyclePolicy | None",
        on_event: Iterable[Callable[[Event], object]],
    ) -> None:
        self._room = Room(state_dir, max_sandboxes)
        self._policy = policy
        self.events = Dispatcher()
        self.metrics = Metrics()
        for callback in on_event:
            self.events.subscribe(callback)
        self._ledger = Ledger(state_dir)  # last: from here on there is something to close
        self._guard = threading.RLock()
        self._handles: dict[str, Sandbox] = {}
        self._private: dict[str, Sandbox] = {}  # of this process alone, from its pools
        self._users: dict[str, dict[str, str]] = {}  # sandbox -> its sessions here -> their clients
        self._busy: Counter[str] = Counter()  # foreground commands
        self._touched: dict[str, float] = {}
        self._closed = False

    @property
    def state_dir(self) -> os.PathLike[str]:
        """Where everything is on record."""
        return self._ledger.path

    # --- who hears ------------------------------------------------------------------------------

    def _emit(self, kind: EventKind, session: SessionRecord | None = None, /, **about: Any) -> None:
        if session is not None:
            about = {
                "session": session.id,
                "client": session.client or None,
                "sandbox": session.sandbox,
            } | about
            about.setdefault("trace_id", current_trace() or session.trace_id)
        data = {name: about.pop(name) for name in list(about) if name not in _ABOUT}
        self.events.emit(kind, data=data, **about)

    def _watched(self, sandbox: Sandbox) -> Sandbox:
        """Hear of everything that this process does with it."""
        key = sandbox.id
        sandbox.observe(lambda kind, data: self._heard(key, kind, data))
        return sandbox

    def _heard(self, key: str, kind: str, data: Mapping[str, Any]) -> None:
        foreground = not data.get("detached")
        with self._guard:
            users = self._users.get(key, {})
            session, client = next(iter(users.items())) if len(users) == 1 else (None, None)
            if kind == EventKind.COMMAND_STARTED and foreground:
                self._busy[key] += 1
            if kind == EventKind.COMMAND_ENDED and foreground and key in self._busy:
                self._busy[key] -= 1
        if kind == EventKind.COMMAND_ENDED:
            self.metrics.count_command(data.get("cause"), data.get("duration"))
        if self.events.active:
            self.events.dispatch(Event.noted(kind, data, sandbox=key, session=session, client=client or None))
        if kind == EventKind.SANDBOX_DESTROYED:
            self._forgotten(key)
        else:
            self._note_activity(key)

    def _forgotten(self, key: str) -> None:
        """A sandbox is no more."""
        with self._guard:
            for known in (self._handles, self._users, self._touched, self._busy):
                known.pop(key, None)

    def _note_activity(self, key: str) -> None:
        now = time.time()
        if now - self._touched.get(key, 0.0) > TOUCH:
            self._touched[key] = now
            with contextlib.suppress(SandboxError):  # it is noted with the next command
                self._ledger.touch_sessions(key, now)

    # --- looking --------------------------------------------------------------------------------

    def list_sandboxes(
        self, *, labels: Mapping[str, str] | None = None, state: str | None = None
    ) -> list[SandboxRecord]:
        """What is on record, oldest first, corrected by what is really there: all, or those with all of these
        labels and in this :class:`SandboxState`. Damaged records: see :meth:`damaged`."""
        found = (record for record in true_records(self._ledger, labels or {}) if record is not None)
        return [record for record in found if state is None or record.state == state]

    def damaged(self) -> list[str]:
        """Records that cannot be read: each with its table, id, and what is wrong. They are left as they are,
        and left out everywhere else."""
        return [f"{damage.table} {damage.id}: {damage.problem}" for damage in self._ledger.damaged()]

    def get_record(self, key: str) -> SandboxRecord | None:
        """What is on record of a sandbox, by its id, name or UUID; None if there is none."""
        return self._ledger.get(key)

    def exists(self, key: str) -> bool:
        """Whether a sandbox of this id, name or UUID is on record."""
        return self._ledger.get(key) is not None

    def get_state(self, key: str) -> SandboxState | None:
        """The state of a sandbox as it is now; None if there is none."""
        sandbox = self.get_sandbox(key)
        return None if sandbox is None or sandbox.state is SandboxState.DESTROYED else sandbox.state

    def get_sandbox(self, key: str) -> Sandbox | None:
        """A sandbox by its id, name or UUID; None if there is none. The same object each time; do not close
        it. Raises :class:`SandboxError` for one that another process alone can use."""
        record = self._ledger.get(key)
        return None if record is None else self._handle(record)

    def find(self, key: str) -> Sandbox:
        """The same. Raises :class:`SandboxNotFound`."""
        return self._handle(self._ledger.find(key))

    def _handle(self, record: SandboxRecord) -> Sandbox:
        with self._guard:
            found = self._private.get(record.id) or self._handles.get(record.id)
            if found is None and record.host and record.doomed:
                raise SandboxNotFound(f"sandbox {record.name} is about to be destroyed: {record.doomed}")
            if found is None:
                found = self._watched(Managed.of(self._ledger, record, self._room))
                self._handles[record.id] = found
            return found

    def _is_ours(self, record: SandboxRecord) -> bool:
        """Whether this process can use it."""
        return not record.host or record.id in self._private

    def set_default_sandbox(self, key: str | None) -> None:
        """Which one is meant where none is named, for every process; None: none is. Raises
        SandboxNotFound."""
        self._ledger.set(DEFAULT_SANDBOX, None if key is None else self._ledger.find(key).id)

    def get_default_sandbox(self) -> str | None:
        """Its id, or None; one that was destroyed is forgotten."""
        key = self._ledger.setting(DEFAULT_SANDBOX)
        return key if isinstance(key, str) and self._ledger.get(key) is not None else None

    # --- making ---------------------------------------------------------------------------------

    def create(
        self,
        spec: SandboxSpec | None = None,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        description: str = "",
        metadata: Mapping[str, Any] | None = None,
        owner: str | None = None,
        ttl: float | None = None,
        policy: "LifecyclePolicy | None" = None,
        template: Template | Snapshot | None = None,
        template_help: str = "",
        start: bool = True,
        wait: float | None = 0.0,
        creation_timeout: float | None = None,
    ) -> Sandbox:
        """A new persistent sandbox without a session: it stays until it is destroyed, expires, or its policy
        says so.

        Parameters
        ----------
        spec: default that of the template, or :class:`SandboxSpec`.
        name, labels, description, metadata, owner: as for :class:`Sandbox`.
        ttl: seconds until it is destroyed; default: never.
        policy: default the manager's.
        template: a :class:`Template` or snapshot that it begins with; ``template_help`` goes on record, too.
        start: False: put it on record only.
        wait: seconds to wait for a place where there are ``max_sandboxes``; None: for ever.
        creation_timeout: seconds for it to start; default 30.

        Raises what :class:`PersistentSandbox` does, and :class:`TooManySandboxes`. Then there is no record.
        """
        about = {
            "name": name, "labels": labels, "description": description, "owner": owner,
            "metadata": plain_metadata(metadata or {}),
        }  # fmt: skip
        more = self._more(ttl, policy, template, template_help)
        return self._created(
            spec, about, more, session=None, template=template, start=start, wait=wait,
            patience=creation_timeout,
        )  # fmt: skip

    def _more(
        self,
        ttl: float | None,
        policy: "LifecyclePolicy | None",
        template: Template | Snapshot | None,
        help_: str = "",
    ) -> dict[str, Any]:
        """What goes on record besides; "ttl" begins then."""
        check_ttl(ttl)
        policy = policy or self._policy
        return {
            "ttl": ttl,
            "policy": {} if policy is None else policy.to_dict(),
            "template": None if template is None else template.name,
            "template_help": help_,
        }

    def _created(
        self,
        spec: SandboxSpec | None,
        about: Mapping[str, Any],
        more: Mapping[str, Any],
        *,
        session: SessionRecord | None,
        template: Template | Snapshot | None = None,
        start: bool = True,
        wait: float | None = 0.0,
        patience: float | None = None,
    ) -> Sandbox:
        deadline = None if wait is None else time.monotonic() + wait
        if start:  # look first: one that finds no place is made, put on record and removed in vain
            self._when_there_is_room(self._check_room, wait)

        def enrol(record: SandboxRecord) -> SandboxRecord:
            first = None if session is None else begun(session, record.id)
            rest = {name: value for name, value in more.items() if name != "ttl"}
            whole = replace(record, lasting=session is None, expires_at=expiry(more["ttl"]), **rest)
            return self._ledger.enrol(whole, first)

        parts: dict[str, Any] = {**about, "ledger": self._ledger, "enrol": enrol, "room": self._room}
        snapshot = template.snapshot() if isinstance(template, Template) else template
        if snapshot is None:
            made = Managed(spec, **parts)
        else:
            made = Managed._from(snapshot, spec=snapshot.fitting(spec), **parts)
        if patience is not None:
            made.start_timeout = patience
        try:
            self._watched(made)
            self._emit(EventKind.SANDBOX_CREATED, session, sandbox=made.id, name=made.name, owner=made.owner)
            if session is not None:
                with self._guard:
                    self._users.setdefault(made.id, {})[session.id] = session.client
            if start:
                self._started(made, None if deadline is None else deadline - time.monotonic())
        except BaseException:
            self._unmade(made, session)
            raise
        with self._guard:
            return self._handles.setdefault(made.id, made)

    def _unmade(self, made: Managed, session: SessionRecord | None) -> None:
        """It could not be made for this session. Who has attached to it meanwhile keeps it."""
        if session is None:
            made.destroy()
            return
        self._ledger.end_session(session.id, "its sandbox could not be made")
        now = self._ledger.get(made.id)
        if now is None or now.doomed:
            made.destroy()
            return
        with self._guard:
            self._users.get(made.id, {}).pop(session.id, None)
        made.close()

    def _started(self, sandbox: Sandbox, wait: float | None) -> None:
        """Start one as soon as there is room."""
        began = time.monotonic()
        try:
            self._when_there_is_room(sandbox.start, wait)
        except InvalidTransition:
            if (state := sandbox.state) is SandboxState.DESTROYED:  # while we waited
                raise SandboxNotFound(f"sandbox {sandbox.name} is not on record any more") from None
            if state is not SandboxState.RUNNING:  # else somebody was faster
                raise
            return
        self.metrics.count_creation(time.monotonic() - began, sandbox.timings)

    def _when_there_is_room(self, action: Callable[[], Any], wait: float | None) -> Any:
        deadline = None if wait is None else time.monotonic() + wait
        tries, enough = TRIES, 0.0
        while True:
            try:
                return action()
            except TooManySandboxes as error:
                enough = enough or time.monotonic() + TRYING
                if tries and time.monotonic() < enough and self._make_room():
                    tries -= 1
                    continue
                tries = 0
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise
                if error.state_dir is None:  # so many of this user: nothing tells when there is one less
                    time.sleep(PAUSE if left is None else min(left, PAUSE))
                elif not self._room.wait(left):
                    raise

    def _check_room(self) -> None:
        if self._room.free() == 0:
            raise TooManySandboxes(self._room.maximum or 0, str(self.state_dir))

    def _make_room(self) -> bool:
        """End what is due. Whether there was any."""
        return False

    @contextlib.contextmanager
    def _place(self, wait: float | None) -> Iterator[None]:
        """Count as a sandbox for a while."""
        fd = self._when_there_is_room(self._room.take, wait)
        try:
            yield
        finally:
            if fd >= 0:
                close_lock(fd)

    # --- ending ---------------------------------------------------------------------------------

    def destroy(self, key: str) -> None:
        """End a sandbox for good and forget it; its sessions end. Raises :class:`SandboxNotFound`."""
        self._destroy(self._ledger.find(key), "destroyed")

    def _destroy(self, record: SandboxRecord, why: str) -> None:
        """Whoever it belongs to. Idempotent."""
        if not self._is_ours(record):
            raise SandboxError(f"sandbox {record.name}: it is process {record.host.split()[0]}'s alone")
        users = self._ledger.sessions(states=LIVE, sandbox=record.id)
        with contextlib.suppress(SandboxNotFound):
            self._handle(record).destroy()
        with self._guard:
            private = self._private.pop(record.id, None)
        self._forgotten(record.id)
        if private is not None:
            self._ledger.forget_private(record.id)
        self._emit_ends(users, f"its sandbox was destroyed: {why}")
        self.metrics.count_end(why)

    def _emit_ends(self, users: Iterable[SessionRecord], reason: str) -> None:
        """These sessions have ended with their sandbox."""
        for session in users:
            self._emit(EventKind.SESSION_TERMINATED, session, reason=reason)

    def _host(self) -> str:
        """What names this process on record."""
        return this_process()


_ABOUT = ("sandbox", "session", "client", "trace_id")


def check_ttl(ttl: float | None) -> None:
    """Raise :class:`SpecError` for what is no time to live, in seconds."""
    if ttl is not None and not (isinstance(ttl, int | float) and 0 < ttl < 1e12):
        raise SpecError(f"ttl: {ttl!r} is not a positive number of seconds")


def expiry(ttl: float | None) -> float | None:
    """When one that is put on record now expires, in seconds since the epoch; None: never."""
    return None if ttl is None else time.time() + ttl
