"""Warm sandboxes for asyncio: :class:`SandboxPool`, :class:`SandboxPools`.

The sandboxes are started by the thread of a :class:`~sandboxcore.pool_stock.Stock`, as in the other pool; the
loop only takes them.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from sandboxcore import sandbox
from sandboxcore.aio_loop import News, with_spawner
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.errors import InvalidTransition, SandboxError, TooManySandboxes
from sandboxcore.observers import Observer
from sandboxcore.pool_binding import NOTHING, Wanted, bind_at_once, makes_target, wanted
from sandboxcore.pool_policy import PoolConfig, PoolStats
from sandboxcore.pool_shelf import Member, Room, added_up
from sandboxcore.pool_stock import Stock
from sandboxcore.pool_total import Total
from sandboxcore.pools import Table, as_spec
from sandboxcore.request import Program
from sandboxcore.result import ExecResult
from sandboxcore.spawner import Spawner
from sandboxcore.spec import SandboxSpec


class SandboxPool:
    """:class:`sandboxcore.SandboxPool` for asyncio, with the same parameters. It belongs to the loop in which
    it is started; ``async with SandboxPool() as pool`` starts it."""

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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = News()

    @property
    def spec(self) -> SandboxSpec:
        """Of its sandboxes, with what ``config.binds`` has added."""
        return self._stock.spec

    @property
    def config(self) -> PoolConfig:
        """As it was given, or as :meth:`resize` has changed it."""
        return self._stock.config

    # --- life -----------------------------------------------------------------------------------------

    async def start(self) -> Self:
        """:meth:`sandboxcore.SandboxPool.start`."""
        if self._here().state == "open":
            return self
        await with_spawner(self._stock.plan, None, _nothing)
        await self._until_ended(None)
        self._stock.open()
        return self

    def _here(self) -> Stock:
        """The stock, if this is its loop. Raises RuntimeError, SandboxGone."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, news = loop, self._news
            self._stock.on_change = lambda: _tell(loop, news)
        if self._loop is not loop:
            raise RuntimeError("this pool belongs to another loop")
        self._stock.check()
        return self._stock

    async def wait_ready(self, timeout: float | None = None) -> bool:
        """:meth:`sandboxcore.SandboxPool.wait_ready`."""
        return await self._until_full(timeout, self.config.min_warm)

    async def replenish(self, timeout: float | None = None) -> bool:
        """:meth:`sandboxcore.SandboxPool.replenish`."""
        return await self._until_full(timeout, None)

    async def _until_full(self, timeout: float | None, least: int | None) -> bool:
        stock = self._here()
        stock.haste(1)
        try:
            await self._news.until(lambda: stock.state != "open" or stock.is_full(least), timeout)
        finally:
            stock.haste(-1)
        return stock.is_full(least)

    def resize(self, min_warm: int | None = None, max_warm: int | None = None) -> None:
        """:meth:`sandboxcore.SandboxPool.resize`."""
        self._stock.resize(min_warm, max_warm)

    async def drain(self, timeout: float | None = None) -> None:
        """:meth:`sandboxcore.SandboxPool.drain`. When cancelled, it goes on."""
        await self._end("draining", timeout)

    async def close(self) -> None:
        """:meth:`sandboxcore.SandboxPool.close`. When cancelled, it goes on."""
        await self._end("closed", None)

    async def _end(self, state: str, timeout: float | None) -> None:
        self._here().shut(state)
        await self._until_ended(timeout)

    async def _until_ended(self, timeout: float | None) -> None:
        stock = self._stock
        if not await self._news.until(lambda: stock.state == "open" or stock.finished, timeout):
            raise TimeoutError("the pool still starts or ends a sandbox")
        if stock.state != "open":
            stock.await_end(None)  # it has only to return

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- claims ---------------------------------------------------------------------------------------

    async def claim(
        self, *, client: str | None = None, timeout: float | None = None, **asked: Any
    ) -> Sandbox:
        """:meth:`sandboxcore.SandboxPool.claim`. Whoever is cancelled here leaves nothing."""
        stock = self._here()
        if stock.state == "closed":
            raise InvalidTransition("pool", "closed", "claim")
        what = wanted(spec=stock.given, **asked) if asked else NOTHING
        member, reason = None, what.not_late(stock.spec, stock.plan) or ""
        if not reason:
            member, reason = await self._taken(timeout)
        made = None
        if member is not None:
            made = await self._bound(member, what)
            if made is None:
                member, reason = None, "failed"
        if made is None:
            made = await self._cold(what)
        stock.handed(made._own, client, member, reason)
        return made

    async def _taken(self, patience: float | None) -> tuple[Member | None, str]:
        stock = self._stock
        deadline = time.monotonic() + (patience or 0)
        while True:
            member, reason = stock.take()
            left = deadline - time.monotonic()
            if reason != "empty" or left <= 0:
                return member, reason
            stock.hurry(1)
            try:
                await self._news.until(lambda: stock.state != "open" or stock.warm > 0, left)
            finally:
                stock.hurry(-1)

    async def _bound(self, member: Member, what: Wanted) -> Sandbox | None:
        """A handle of a member that is what was asked for; None where that failed, and it is no more."""
        own = member.sandbox
        try:
            if what is not NOTHING:
                bind_at_once(own, what)
            made = Sandbox.__new__(Sandbox)
            made._handle(own)
            if what is not NOTHING:
                await _bind_rest(made, what)
        except Exception:  # a sandbox of its own will have it, or say why not
            self._drop(own)
            return None
        except BaseException:
            self._drop(own)
            raise
        return made

    async def _cold(self, what: Wanted) -> Sandbox:
        """One that has everything from its start."""
        stock = self._stock
        while True:
            moves = stock.total.moves
            made = Sandbox(what.spec(stock.given), **what.identity())
            stock.placed(made._own)
            began = time.monotonic()
            try:
                await made.start()
                stock.started(time.monotonic() - began)
                if what.files:
                    await made.files.write_many(what.files)
            except TooManySandboxes:
                if not await asyncio.to_thread(stock.total.make_room, moves):
                    raise
                continue
            except BaseException:
                made._file_server.close()
                self._drop(made._own)
                raise
            return made

    async def release(self, sandbox: Sandbox) -> None:
        """:meth:`sandboxcore.SandboxPool.release`."""
        stock = self._here()
        kept = stock.give_back(sandbox._own)
        sandbox._file_server.close()
        if not kept:
            self._nobody_ends()

    def _drop(self, own: sandbox.Sandbox) -> None:
        self._stock.drop(own)
        self._nobody_ends()

    def _nobody_ends(self) -> None:
        """Where there is no thread any more, another one ends what was given back."""
        if self._stock.state != "open":
            asyncio.get_running_loop().run_in_executor(None, self._stock.tidy_up)

    async def run(
        self, argv: Sequence[Program], *, client: str | None = None, check: bool = False, **options: Any
    ) -> ExecResult:
        """:meth:`sandboxcore.SandboxPool.run`."""
        claimed = await self.claim(client=client)
        try:
            return await claimed.exec(argv, check=check, **options)
        finally:
            await self.release(claimed)

    def client(self, sandbox: Sandbox) -> str | None:
        """For whom it was claimed."""
        return self._stock.client_of(sandbox._own)

    @property
    def available(self) -> int:
        """How many are ready."""
        return self._stock.warm

    warm_count = available

    def stats(self) -> PoolStats:
        """What it has, and has done."""
        return added_up([self._stock.tally()])

    def __repr__(self) -> str:
        return f"<aio.SandboxPool {self._stock.state}: {self.available} ready>"


class SandboxPools:
    """:class:`sandboxcore.SandboxPools` for asyncio, with the same parameters."""

    def __init__(
        self,
        config: PoolConfig | None = None,
        *,
        most: int = 16,
        total: int | None = None,
        room: Room | None = None,
        on_event: Observer | None = None,
    ) -> None:
        self._table: Table[SandboxPool, Sandbox] = Table(
            SandboxPool, config, most=most, total=total, room=room, on_event=on_event
        )

    async def pool(self, spec: SandboxSpec | str | None = None) -> SandboxPool:
        """The pool of a spec, or of a profile by its name, started."""
        while True:
            try:
                return await self._table.get(as_spec(spec)).start()
            except InvalidTransition:  # somebody else has drained it just now
                self._table.check()

    async def claim(self, spec: SandboxSpec | str | None = None, **options: Any) -> Sandbox:
        """:meth:`SandboxPool.claim` of the spec's pool."""
        while True:
            pool = await self.pool(spec)
            try:
                return self._table.remember(await pool.claim(**options), pool)
            except InvalidTransition:
                self._table.check()

    async def release(self, sandbox: Sandbox) -> None:
        """:meth:`SandboxPool.release`."""
        await self._table.owner(sandbox).release(sandbox)

    async def run(
        self,
        argv: Sequence[Program],
        *,
        spec: SandboxSpec | str | None = None,
        client: str | None = None,
        **options: Any,
    ) -> ExecResult:
        """:meth:`SandboxPool.run`."""
        sandbox = await self.claim(spec, client=client)
        try:
            return await sandbox.exec(argv, **options)
        finally:
            await self.release(sandbox)

    async def warm(self, *specs: SandboxSpec | str, timeout: float | None = None) -> bool:
        """:meth:`sandboxcore.SandboxPools.warm`."""
        pools = [await self.pool(spec) for spec in specs]
        ready = [await pool.wait_ready(timeout) for pool in pools]
        return all(ready)

    def stats(self) -> PoolStats:
        """:meth:`sandboxcore.SandboxPools.stats`."""
        return self._table.stats()

    def each(self) -> Mapping[str, PoolStats]:
        """:meth:`sandboxcore.SandboxPools.each`."""
        return self._table.each()

    async def make_room(self) -> bool:
        """:meth:`sandboxcore.SandboxPools.make_room`."""
        return await asyncio.to_thread(self._table.total.make_room)

    async def drain(self, timeout: float | None = None) -> None:
        """:meth:`sandboxcore.SandboxPools.drain`. When cancelled, it goes on."""
        for pool in self._table.shut():
            await pool._until_ended(timeout)  # in this loop or in another one: it ends by itself

    async def close(self) -> None:
        """:meth:`drain`, for good. Idempotent."""
        self._table.closed = True
        await self.drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _nothing(connection: Spawner) -> None:
    """What to do with a spawner that knows the plan."""


def _tell(loop: asyncio.AbstractEventLoop, news: News) -> None:
    """From another thread; a loop that is closed hears nothing."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(news.tell)


async def _bind_rest(made: Sandbox, what: Wanted) -> None:
    """The part of late binding for which somebody has to be waited for."""
    for mount in what.mounts if what.ro or what.rw else ():
        if mount.source is None:
            raise SandboxError("a bind without a source")
        if makes_target(made._own, mount):
            with contextlib.suppress(OSError):  # bind() says why
                await made.files.mkdir(mount.target, parents=True, exist_ok=True)
        await made.bind(mount.source, mount.target, read_only=mount.read_only)
    if what.files:
        await made.files.write_many(what.files)
