"""aio.SandboxPool and aio.SandboxPools: the same without ever stopping the loop, and safe to cancel."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from loops import cancelled_after, condition, play
from support import leaves_nothing

import sandboxcore
from sandboxcore import (
    InvalidTransition,
    PoolConfig,
    SandboxNotFound,
    SandboxSpec,
    SandboxState,
    SetupError,
    SpecError,
    TooManySandboxes,
    aio,
)

pytestmark = pytest.mark.once

T = TypeVar("T")
PATIENCE = 20


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


@asynccontextmanager
async def ready(spec: SandboxSpec | None = None, **config: Any):
    async with aio.SandboxPool(spec, PoolConfig(**{"min_warm": 1, "max_warm": 4} | config)) as pool:
        assert await pool.wait_ready(PATIENCE)
        yield pool


def with_pool(action: Callable[[aio.SandboxPool], Awaitable[T]], **config: Any) -> T:
    async def main() -> T:
        async with ready(**config) as pool:
            return await action(pool)

    return play(main())


def test_claim_release_run() -> None:
    async def action(pool: aio.SandboxPool) -> None:
        sandbox = await pool.claim(client="c")
        assert isinstance(sandbox, aio.Sandbox)
        assert (await sandbox.exec(["echo", "hi"])).stdout == b"hi\n"
        assert pool.client(sandbox) == "c"
        await sandbox.files.write("x", b"y")
        await pool.release(sandbox)
        await condition(lambda: sandbox.state is SandboxState.DESTROYED, "its end")
        with pytest.raises(SandboxNotFound):
            await pool.release(sandbox)
        assert await pool.replenish(PATIENCE)
        assert (await pool.run(["cat"], input=b"in", check=True)).stdout == b"in"
        with pytest.raises(sandboxcore.CommandFailed):
            await pool.run(["false"], check=True)
        stats = pool.stats()
        assert stats.hits + stats.misses == 3
        assert stats.hits >= 2

    with leaves_nothing():
        with_pool(action)


def test_late_binding(tmp_path: Path) -> None:
    async def action(pool: aio.SandboxPool) -> None:
        async with await pool.claim(
            env={"A": "b"},
            files={"f": "content"},
            ro=[(tmp_path, "/workspace/in")],
            limits={"open_files": 90},
            labels={"x": "y"},
            name="named",
        ) as sandbox:
            done = await sandbox.shell("echo $A; cat f; ulimit -n; test -d in && echo in")
            assert done.stdout == b"b\ncontent90\nin\n"
            assert (sandbox.name, sandbox.labels) == ("named", {"x": "y"})
            assert sandbox.binds[0].target == "/workspace/in"
        assert (pool.stats().hits, pool.stats().misses) == (1, 0)
        async with await pool.claim(network="private") as other:
            assert other.spec.network == "private"
        assert dict(pool.stats().misses_by_reason) == {"network": 1}

    with_pool(action, binds="ro")


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"ro": ["/no/such/directory:/workspace/x"]}, SpecError),
        ({"ro": ["/etc:/usr/not-there"]}, SetupError),
        ({"files": {"/usr/file": "x"}}, OSError),
        ({"env": {"A=": "x"}}, SpecError),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], kind: type[Exception]) -> None:
    async def action(pool: aio.SandboxPool) -> None:
        with pytest.raises(kind):
            await pool.claim(**asked)
        assert pool.stats().claimed == 0

    with leaves_nothing():
        with_pool(action, binds="ro")


def test_reset() -> None:
    async def action(pool: aio.SandboxPool) -> None:
        pool.resize(min_warm=0, max_warm=1)
        used = await pool.claim()
        await used.files.write("/tmp/secret", b"x")
        await pool.release(used)
        await condition(lambda: pool.stats().resets == 1, "the reset")
        async with await pool.claim() as fresh:
            assert await fresh.files.list("/tmp") == []
        with pytest.raises(sandboxcore.SandboxError):
            await used.exec(["true"])

    with_pool(action, reset=True)


def test_drain_and_start_again() -> None:
    async def main() -> None:
        before = set(threading.enumerate())
        pool = aio.SandboxPool(config=PoolConfig(min_warm=2, max_warm=2))
        async with pool:
            assert await pool.wait_ready(PATIENCE)
            own = [t for t in set(threading.enumerate()) - before if t.name == "sandboxcore-pool"]
            assert len(own) == 1
            kept = await pool.claim()
            await pool.drain(PATIENCE)
            assert pool.available == 0
            assert not own[0].is_alive()  # the loop's executor keeps its own
            assert (await kept.exec(["true"])).ok
            await pool.release(kept)
            await condition(lambda: kept.state is SandboxState.DESTROYED, "its end")
            cold = await pool.claim()
            await cold.close()
            assert dict(pool.stats().misses_by_reason) == {"draining": 1}
            await pool.start()
            assert await pool.wait_ready(PATIENCE)
        with pytest.raises(InvalidTransition):
            await pool.claim()

    with leaves_nothing():
        play(main())


def test_a_pool_belongs_to_its_loop() -> None:
    pool = aio.SandboxPool(config=PoolConfig(min_warm=1))

    async def begin() -> None:
        await pool.start()
        assert await pool.wait_ready(PATIENCE)

    async def use() -> None:
        for use in (pool.claim, pool.start, pool.wait_ready, pool.drain):
            with pytest.raises(RuntimeError, match="another loop"):
                await use()

    with leaves_nothing():
        play(begin())
        play(use())
        pool._stock.shut("closed")
        pool._stock.await_end(PATIENCE)


def test_waiting_for_a_warm_one() -> None:
    async def main() -> None:
        async with aio.SandboxPool(config=PoolConfig(min_warm=1, max_warm=1)) as pool:
            claims = [asyncio.create_task(pool.claim(timeout=PATIENCE)) for _ in range(3)]
            for sandbox in await asyncio.gather(*claims):
                await pool.release(sandbox)
            assert pool.stats().hits == 3

    play(main())


def test_many_tasks_never_get_the_same_one() -> None:
    async def action(pool: aio.SandboxPool) -> None:
        held: set[str] = set()
        seen: list[str] = []

        async def work() -> None:
            sandbox = await pool.claim()
            assert sandbox.id not in held
            held.add(sandbox.id)
            seen.append(sandbox.id)
            assert (await sandbox.exec(["true"])).ok
            held.discard(sandbox.id)
            await pool.release(sandbox)
            assert pool.available <= 4

        await asyncio.gather(*(work() for _ in range(40)))
        assert len(set(seen)) == 40
        assert pool.stats().hits + pool.stats().misses == 40

    with leaves_nothing():
        with_pool(action)


def test_nothing_stops_the_loop() -> None:
    """While everything goes on, a task that looks at the clock is never late for long."""

    async def action(pool: aio.SandboxPool) -> None:
        late: list[float] = []

        async def watch() -> None:
            while True:
                before = time.thread_time()
                await asyncio.sleep(0.001)
                late.append(time.thread_time() - before)

        watcher = asyncio.create_task(watch())
        for number in range(12):
            await pool.release(await pool.claim(labels={"n": str(number)}, env={"A": "b"}))
        await pool.drain(PATIENCE)
        watcher.cancel()
        assert late
        assert max(late) < 0.1, "processor time of the loop's own thread between two turns"

    with_pool(action, reset=True)


@pytest.mark.parametrize("asked", [{}, {"files": {"a": "b"}, "env": {"A": "b"}}, {"network": "private"}])
def test_whoever_is_cancelled_leaves_nothing(asked: dict[str, Any]) -> None:
    async def action(pool: aio.SandboxPool) -> None:
        async def claim() -> None:
            await pool.release(await pool.claim(**asked))

        async def run() -> None:
            await pool.run(["sleep", "0.001"])

        for turns in range(14):
            await cancelled_after(turns, claim())
            await cancelled_after(turns, run())
        await condition(lambda: pool.stats().claimed == 0, "nobody to have one")
        assert (await pool.run(["true"])).ok

    with leaves_nothing():
        with_pool(action)


def test_cancelling_starts_and_ends() -> None:
    async def main() -> None:
        for turns in range(8):
            pool = aio.SandboxPool(config=PoolConfig(min_warm=2, max_warm=2))

            async def use(pool: aio.SandboxPool = pool) -> None:
                async with pool:
                    await pool.wait_ready(PATIENCE)

            await cancelled_after(turns, use())
            await pool.close()

    with leaves_nothing():
        play(main())


def test_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aio.SandboxPool(config=PoolConfig(min_warm=3, max_warm=3)) as pool:
            await condition(lambda: pool.available == 2, "as many as there may be")
            async with await pool.claim(network="private"):
                async with await pool.claim():
                    with pytest.raises(TooManySandboxes):
                        await pool.claim()

    sandboxcore.host_limits(max_sandboxes=2)
    try:
        play(main())
    finally:
        sandboxcore.host_limits(max_sandboxes=None)


def test_who_needs_a_place_gets_that_of_another_pool() -> None:
    one, two = SandboxSpec(hostname="one"), SandboxSpec(hostname="two")

    async def main() -> None:
        async with aio.SandboxPools(PoolConfig(min_warm=2, max_warm=2, adaptive=False)) as pools:
            assert await pools.warm(one, timeout=PATIENCE)
            async with await pools.claim(two), await pools.claim(two) as last:
                assert (await last.exec(["true"])).ok
                assert not await pools.make_room()
                with pytest.raises(TooManySandboxes):
                    await pools.claim(one)

    sandboxcore.host_limits(max_sandboxes=2)
    try:
        play(main())
    finally:
        sandboxcore.host_limits(max_sandboxes=None)


def test_pools() -> None:
    one, two = SandboxSpec(hostname="one"), SandboxSpec(hostname="two")

    async def main() -> None:
        async with aio.SandboxPools(PoolConfig(min_warm=1, max_warm=1), most=2, total=2) as pools:
            assert await pools.warm(one, two, timeout=PATIENCE)
            for spec in (one, two):
                sandbox = await pools.claim(spec)
                assert (await sandbox.exec(["uname", "-n"])).stdout.decode().strip() == spec.hostname
                await pools.release(sandbox)
                with pytest.raises(SandboxNotFound):
                    await pools.release(sandbox)
            assert pools.stats().hits == 2
            assert (await pools.run(["true"], spec="minimal", check=True)).ok
            assert len(pools.each()) == 2
            await pools.drain(PATIENCE)
            assert pools.stats().warm == 0
            assert (await pools.run(["true"], spec=one)).ok
        with pytest.raises(InvalidTransition):
            await pools.claim()

    with leaves_nothing():
        play(main())
