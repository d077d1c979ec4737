"""Sandboxes that run before anybody wants them: :class:`SandboxPool`."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from sandboxcore.errors import InvalidTransition, TooManySandboxes
from sandboxcore.observers import Observer
from sandboxcore.pool_binding import NOTHING, Wanted, bind_late, wanted
from sandboxcore.pool_policy import PoolConfig, PoolStats
from sandboxcore.pool_shelf import Room, added_up, end_and_wait
from sandboxcore.pool_stock import Stock
from sandboxcore.pool_total import Total
from sandboxcore.process import with_spawner
from sandboxcore.request import FileContent, Program
from sandboxcore.result import ExecResult
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import Binding, Limits, Network, SandboxSpec


class SandboxPool:
    """Sandboxes of one spec that are started ahead of time, for whoever claims one.

    ``with SandboxPool(spec) as pool`` starts it; else :meth:`start` does. Any thread may use it, and many at
    once; a process that was forked from its own may not. A thread of its own starts, resets and destroys, one
    after the other, and not in the first moment after a claim.

    Parameters
    ----------
    spec: of its sandboxes; default :class:`SandboxSpec`.
    config: :class:`PoolConfig`.
    room: an object whose ``take()`` gives a descriptor for each sandbox that may be, or raises
        :class:`TooManySandboxes`; ahead of time that means: later.
    on_event: called with a kind (``pool.claimed``, ``missed``, ``refilled``, ``reset``, ``discarded``) and
        what it is about, sometimes in the pool's thread. What it raises is logged.

    Raises :class:`SpecError`, :class:`UnsupportedHost`.
    """

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        config: PoolConfig | None = None,
        *,
        room: Room | None = None,
        on_event: Observer | None = None,
        total: Total | None = None,
    ) -> None:
        self._stock = Stock(spec, config, room=room, on_event=on_event, total=total)

    @property
    def spec(self) -> SandboxSpec:
        """Of its sandboxes, with what ``config.binds`` has added."""
        return self._stock.spec

    @property
    def config(self) -> PoolConfig:
        """As it was given, or as :meth:`resize` has changed it."""
        return self._stock.config

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to have some ready, without waiting for them; also again after :meth:`drain`. Idempotent."""
        stock = self._stock
        stock.check()
        if stock.state == "open":
            return self
        with_spawner(stock.plan, None, lambda connection: None)  # in the caller's thread: its priority stays
        stock.open()
        return self

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until ``min_warm`` are ready; False if that takes longer than ``timeout`` seconds."""
        return self._stock.await_full(timeout, least=self.config.min_warm)

    def replenish(self, timeout: float | None = None) -> bool:
        """Wait until as many are ready as are wanted now; False if that takes longer than ``timeout``
        seconds."""
        return self._stock.await_full(timeout)

    def resize(self, min_warm: int | None = None, max_warm: int | None = None) -> None:
        """Other bounds from here on; what is too many ends. Raises :class:`SpecError`."""
        self._stock.resize(min_warm, max_warm)

    def drain(self, timeout: float | None = None) -> None:
        """End everything that nobody has claimed, and wait until nothing of it is left: no process, no
        thread, no descriptor. What was claimed stays, and claims go on, cold.

        Raises TimeoutError after so many seconds; a start that is on its way then still ends.
        """
        self._stock.shut()
        self._stock.await_end(timeout)

    def close(self) -> None:
        """:meth:`drain`, for good: claims raise :class:`InvalidTransition`. Idempotent."""
        self._stock.shut("closed")
        self._stock.await_end(None)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- claims ---------------------------------------------------------------------------------------

    def claim(
        self,
        *,
        client: str | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, FileContent] | None = None,
        ro: Sequence[Binding] = (),
        rw: Sequence[Binding] = (),
        limits: Limits | Mapping[str, Any] | None = None,
        network: Network | None = None,
        labels: Mapping[str, str] | None = None,
        name: str | None = None,
        owner: str | None = None,
        description: str = "",
        metadata: Mapping[str, Any] | None = None,
        timeout: float | None = None,
    ) -> Sandbox:
        """A running sandbox that nobody else has: a warm one at once, or else one that is started now. It is
        the caller's until :meth:`release`, or :meth:`Sandbox.close`.

        Parameters
        ----------
        client: for whom; remembered, and told to ``on_event``.
        env: variables of its commands, on top of the spec's.
        files: path to content, or to (content, mode); written as :meth:`Files.write_many` does.
        ro, rw: as for :class:`SandboxSpec`, mounted while it runs: needs ``config.binds``, or what the spec
            has of ``live_binds``.
        limits: these instead of the spec's; or a mapping with those that change.
        network: other than the spec's means: not a warm one.
        labels, owner, description, metadata: as for :class:`Sandbox`.
        name: 1 to 64 letters, digits, ``_``, ``.`` or ``-``, no dot or dash first; default its id.
        timeout: wait so many seconds for a warm one where there is none. Default: do not wait.

        What a warm one cannot become is started as a sandbox of its own, which takes as long as
        :meth:`Sandbox.start` and counts as a miss with its reason.

        Raises :class:`SpecError` for what cannot be, and whatever starting a sandbox raises. Then nothing is
        left of it.
        """
        plain = not (env or files or ro or rw or limits or network or labels or owner)
        if plain and name is None and not description and not metadata:
            return self._claimed(NOTHING, client, timeout)
        asked = wanted(
            spec=self._stock.given,
            env=env,
            files=files,
            ro=ro,
            rw=rw,
            limits=limits,
            network=network,
            labels=labels,
            name=name,
            owner=owner,
            description=description,
            metadata=metadata,
        )
        return self._claimed(asked, client, timeout)

    def _claimed(self, asked: Wanted, client: str | None, timeout: float | None) -> Sandbox:
        stock = self._stock
        stock.check()
        if stock.state == "closed":
            raise InvalidTransition("pool", "closed", "claim")
        member, reason = None, ""
        if asked is not NOTHING:
            reason = asked.not_late(stock.spec, stock.plan) or ""
        if not reason:
            member, reason = stock.take(timeout)
        sandbox = None
        if member is not None:
            sandbox = member.sandbox
            if asked is not NOTHING and not _bound(sandbox, asked):
                sandbox, member, reason = None, None, "failed"
        if sandbox is None:
            sandbox = self._cold(asked)
        stock.handed(sandbox, client, member, reason)
        return sandbox

    def _cold(self, asked: Wanted) -> Sandbox:
        """One that has everything from its start."""
        spec = asked.spec(self._stock.given)
        while True:
            moves = self._stock.total.moves
            sandbox = self._stock.made(spec, asked.identity())
            began = time.monotonic()
            try:
                sandbox.start()
            except TooManySandboxes:
                if not self._stock.total.make_room(moves):
                    raise
                continue
            self._stock.started(time.monotonic() - began)
            try:
                if asked.files:
                    sandbox.files.write_many(asked.files)
            except BaseException:
                sandbox.close()
                raise
            return sandbox

    def release(self, sandbox: Sandbox) -> None:
        """Give one back: it is destroyed, or with ``config.reset`` reset and kept for somebody else. Whoever
        still has it cannot use it any more. Without waiting, but for its end where the pool is drained.

        Raises :class:`SandboxNotFound` for one that was not claimed here, or is back already.
        """
        if not self._stock.give_back(sandbox):
            self._stock.tidy_up()

    def run(
        self, argv: Sequence[Program], *, client: str | None = None, check: bool = False, **options: Any
    ) -> ExecResult:
        """Run one command in a sandbox that nobody has used, and give that back. ``options``: as for
        :meth:`Sandbox.exec`."""
        sandbox = self._claimed(NOTHING, client, None)
        try:
            return sandbox.exec(argv, check=check, **options)
        finally:
            self.release(sandbox)

    def client(self, sandbox: Sandbox) -> str | None:
        """For whom it was claimed."""
        return self._stock.client_of(sandbox)

    # --- what it has ----------------------------------------------------------------------------------

    @property
    def available(self) -> int:
        """How many are ready."""
        return self._stock.warm

    warm_count = available

    def stats(self) -> PoolStats:
        """What it has, and has done."""
        return added_up([self._stock.tally()])

    def __repr__(self) -> str:
        return f"<SandboxPool {self._stock.state}: {self.available} ready>"


def _bound(sandbox: Sandbox, asked: Wanted) -> bool:
    """Make it what is asked for. False, and it is no more, where that failed."""
    try:
        bind_late(sandbox, asked)
    except Exception:  # a sandbox of its own will have it, or say why not; in the place of this one
        with contextlib.suppress(TimeoutError):
            end_and_wait(sandbox)
        return False
    except BaseException:
        sandbox.close()
        raise
    return True
