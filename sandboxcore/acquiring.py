"""How a client comes to a sandbox: an old one of its own, a warm one, a new one, or one that it names."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sandboxcore.directory import expiry
from sandboxcore.errors import (
    InvalidTransition,
    SandboxError,
    SandboxNotFound,
    SelectionRefused,
    SpecError,
)
from sandboxcore.events import EventKind
from sandboxcore.lifecycle import SandboxState
from sandboxcore.managed_session import AttachResult, SandboxSession
from sandboxcore.policy import LifecyclePolicy
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.sandbox import Sandbox
from sandboxcore.selection import SelectionOptions, unmet, unmet_by, unmet_inside
from sandboxcore.session import SessionState, SessionTimeouts, begun
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import SandboxSpec, check_name
from sandboxcore.store import NameTaken
from sandboxcore.template import Template
from sandboxcore.tenancy import Tenancy

_GOING = 2.0  # seconds for a sandbox that is about to be destroyed to be gone
_SHORTEST, _LONGEST = 0.001, 0.1  # seconds between two looks at it


class Acquiring(Tenancy):
    """The part of :class:`SandboxManager` that finds a sandbox for a client."""

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
        client_id: yours, for whom it is: at most 512 characters.
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
        first = self._new_session(client_id, timeouts, metadata, labels)
        more = self._more(ttl, policy, template)
        found = self._preferred(options, first, wait)
        if found is None and not (options.require_fresh or name or template or binding):
            found = self._kept(spec, options, client_id)
        if found is not None:
            return self._held(found, EventKind.SESSION_ACQUIRED, went_on=found.id != first.id)
        limits = {"memory": spec.limits.memory}
        if failed := unmet(spec, options, {**spec.labels, **options.required_labels}, limits):
            raise SelectionRefused("a new sandbox of this spec", failed)
        if options.use_pool:
            return self._pooled(spec, options, first, wait, ttl, name=name, **binding)
        about = {"name": name, "labels": dict(options.required_labels), "owner": client_id or None}
        made = self._created(
            spec_or, about, more, session=first, template=template, wait=wait, patience=creation_timeout
        )
        self._look_inside(made, options)
        return self._held(self._ledger.session(first.id), EventKind.SESSION_ACQUIRED, new=True)

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

    def _joined(self, sandbox: str, first: SessionRecord) -> SessionRecord:
        """The client's detached session of this sandbox, which goes on, or a new one."""
        if not first.client:  # nobody has left it for whoever comes
            return self._opened(begun(first, sandbox))
        for session in self._ledger.sessions(
            states=(SessionState.DETACHED,), client=first.client, sandbox=sandbox
        ):
            if (taken := self._ledger.take_session(session.id)) is not None:
                return taken
        return self._opened(begun(first, sandbox))

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
        ttl: float | None,
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
            first = begun(first, sandbox.id)
            self._ledger.enrol(replace(self._private_record(sandbox), expires_at=expiry(ttl)), first)
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
            last_active_at=time.time(), pid=sandbox.pid, host=self._host(), lasting=False,
        )  # fmt: skip

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
        want that at once, one makes it; where one is about to be destroyed, as soon as it is gone, which is
        awaited for 2 s. wait: for room, where it is to be started, as for :meth:`create`.
        Raises :class:`SandboxNotFound`; :class:`InvalidTransition` for a suspended or archived one.
        """
        if create_if_missing and self._ledger.get(sandbox_id) is None:
            check_name(sandbox_id)
        deadline, pause = time.monotonic() + _GOING, _SHORTEST
        while True:
            first = self._new_session(client_id, timeouts, metadata, labels)  # the last one may have ended
            try:
                sandbox, session, new = self._attached(
                    sandbox_id, first, create_if_missing, create_spec, wait
                )
                break
            except NameTaken:  # somebody was faster: it is there now
                continue
            except SandboxNotFound:  # it was there a moment ago, or is about to go
                if not create_if_missing or time.monotonic() > deadline:
                    raise
            self._make_room()  # whoever was to destroy it may have died
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        held = self._held(session, EventKind.SESSION_ATTACHED, went_on=session.id != first.id, new=new)
        try:
            return AttachResult(session=held, newly_created=new, capabilities=sandbox.capabilities)
        except BaseException:
            with contextlib.suppress(InvalidTransition):  # it has ended with its sandbox
                self._undo(held)
            raise

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
        return sandbox, self._ledger.session(first.id), True


def _check_pooled(options: SelectionOptions, lasting: Mapping[str, Any], binding: Mapping[str, Any]) -> None:
    if binding and not options.use_pool:
        raise SpecError(f"{min(binding)}: is bound late only with options.use_pool; else it is the spec's")
    for name, value in lasting.items() if options.use_pool else ():
        if value is not None:
            raise SpecError(f"{name}: with options.use_pool there is none: it runs already, and ends with us")
