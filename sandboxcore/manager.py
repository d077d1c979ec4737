"""Many clients, many sandboxes: :class:`SandboxManager`."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from sandboxcore import process
from sandboxcore.acquiring import Acquiring
from sandboxcore.directory import Managed
from sandboxcore.errors import SpecError
from sandboxcore.events import Event, EventKind
from sandboxcore.lifecycle import new_id
from sandboxcore.managed_session import SandboxSession
from sandboxcore.manager_stats import Health, ManagerStats, examine, exposition, gather
from sandboxcore.policy import LifecyclePolicy
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.request import Program
from sandboxcore.result import ExecResult
from sandboxcore.session import SessionTimeouts
from sandboxcore.spec import SandboxSpec
from sandboxcore.statedir import StatePath
from sandboxcore.tenancy import AnySession, id_of

SWEEP = 60.0  # seconds


class SandboxManager(Acquiring):
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
        from the beginning, as far as there is room; nobody waits for that. Raises what compiling a spec, or
        preparing its template, does.
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
        kinds: dict[str, tuple[object, type]] = {
            "timeouts": (timeouts, SessionTimeouts),
            "policy": (policy, LifecyclePolicy),
            "pool": (pool, PoolConfig),
        }
        for name, (given, kind) in kinds.items():
            if given is not None and not isinstance(given, kind):
                raise SpecError(f"{name}: {given!r} is no {kind.__name__}")
        super().__init__(
            state_dir,
            max_sandboxes=max_sandboxes,
            policy=policy,
            on_event=on_event,
            sweep_interval=sweep_interval,
            timeouts=timeouts,
            pool=pool,
        )
        try:
            self._fill(warm)
        except BaseException:
            self.close()
            raise

    def _fill(self, specs: Iterable[SandboxSpec | str]) -> None:
        """Have their pools begin. Without waiting: where there is no room it might be for ever."""
        for spec in specs:
            self.pools.pool(spec)

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
        record = self._ledger.session(id_of(session))
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
