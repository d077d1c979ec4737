"""sandboxcore.aio.SandboxManager: nothing blocks the loop, and whoever is cancelled leaves nothing."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from loops import cancelled_after, condition, play
from managed import nothing_left, state

from sandboxcore import (
    InvalidTransition,
    LifecyclePolicy,
    RequiredCapabilities,
    SandboxBusy,
    SandboxNotFound,
    SandboxState,
    SelectionOptions,
    SelectionRefused,
    SessionState,
    SpecError,
    TooManySandboxes,
    aio,
    aio_sandbox,
    persistent,
)
from sandboxcore import SandboxSpec as Spec
from sandboxcore.pool import SandboxPool
from sandboxcore.pool_policy import PoolConfig

pytestmark = pytest.mark.once

__all__ = ["nothing_left", "state"]  # fixtures

POOLED = SelectionOptions(use_pool=True)
PATIENCE = 30


def with_manager(state: Path, action: Callable[[aio.SandboxManager], Awaitable[Any]], **options: Any) -> None:
    """Play with a manager, in which nothing is left then."""

    async def main() -> None:
        async with aio.SandboxManager(state, sweep_interval=None, **options) as manager:
            await action(manager)
            assert [action for action in await manager.destroy_all() if action.error] == []

    play(main(), 90)


def test_the_life_of_a_session(state: Path) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        session = await manager.acquire(client_id="me", labels={"a": "b"}, metadata={"n": 1})
        assert (session.state, session.client_id, session.labels) == (SessionState.ACTIVE, "me", {"a": "b"})
        assert session.sandbox is session.sandbox
        assert isinstance(session.sandbox, aio.PersistentSandbox)
        assert (await session.sandbox.exec(["echo", "x"])).stdout == b"x\n"
        await session.detach()
        assert await manager.acquire(client_id="you") != session
        assert await manager.acquire(client_id="me") == session
        await session.suspend()
        assert session.sandbox.state is SandboxState.PAUSED
        with pytest.raises(InvalidTransition):
            await session.suspend()
        await session.resume()
        other = (await manager.attach(session.sandbox_id, "you")).session
        with pytest.raises(SandboxBusy):
            await session.suspend()
        await session.release(keep_alive=True)
        assert manager.list_sessions("detached") == [session]
        await other.terminate()
        await session.terminate()
        assert manager.get_sandbox(session.sandbox_id) is None
        async with await manager.acquire(client_id="me") as again:
            assert manager.get_session_by_client("me") == manager.get_session(again.id) == again
            assert manager.get_session_by_sandbox(again.sandbox_id) == again
        assert not manager.exists(again.sandbox_id)

    with_manager(state, action)


def test_selection_pools_and_runs(state: Path) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        with pytest.raises(SelectionRefused):
            await manager.acquire(options=SelectionOptions(required=RequiredCapabilities(network=True)))
        pooled = await manager.acquire(options=POOLED, client_id="me")
        assert (await pooled.sandbox.shell("echo x")).stdout == b"x\n"
        await pooled.release()
        assert (await manager.run_pooled(["echo", "x"])).stdout == b"x\n"
        done = await manager.run_ephemeral(["cat", "/workspace/f"], files={"/workspace/f": b"y"})
        assert done.stdout == b"y"
        found = await manager.attach("dev", "me", create_if_missing=True)
        assert found.newly_created
        assert found.capabilities == (await manager.attach("dev", "you")).capabilities
        with pytest.raises(SandboxNotFound):
            await manager.attach("other")
        assert manager.list_sessions(client_id="you")[0].sandbox.name == "dev"

    with_manager(state, action)


def test_keeping(state: Path) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        made = await manager.create(name="dev", ttl=60, policy=LifecyclePolicy(auto_stop=60))
        assert manager.find("dev") is made
        assert [record.name for record in await manager.list_sandboxes()] == ["dev"]
        manager.set_default_sandbox("dev")
        assert manager.get_default_sandbox() == made.id
        changes = await manager.update("dev", hostname="other", description="d")
        assert {name: change.applies for name, change in changes.items()} == {
            "hostname": "next start",
            "description": "now",
        }
        await manager.archive("dev")
        assert manager.get_state("dev") is SandboxState.ARCHIVED
        await manager.recover("dev", start=True)
        assert (await made.exec(["uname", "-n"])).stdout == b"other\n"
        manager.touch("dev")
        assert manager.describe("dev", owner="me").owner == "me"
        manager.set_policy("dev", LifecyclePolicy())
        manager.extend_ttl("dev", None)
        assert manager.expired() == []
        assert (await manager.reconcile(dry_run=True)).actions == ()
        assert (await manager.gc()).actions == ()
        assert await manager.cleanup_expired() == 0
        assert (await manager.stats()).sandboxes == {"running": 1}
        assert (await manager.health()).healthy
        assert "sandboxcore_living 1" in await manager.prometheus()
        await manager.destroy("dev")
        assert manager.get_record("dev") is None
        assert manager.damaged() == []

    with_manager(state, action)


def test_fork(state: Path, overlays: None) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        session = await manager.acquire(Spec(writable=True), client_id="me")
        await session.sandbox.files.write("/workspace/x", b"1")
        for child in await manager.fork(session, 2):
            assert await child.sandbox.files.read("/workspace/x") == b"1"
            await child.release()
        for turns in (1, 3, 9, 27):
            await cancelled_after(turns, manager.fork(session, 2))
            for left in manager.list_sessions():  # those that were faster
                if left != session:
                    await left.release()
        assert len(await manager.list_sandboxes()) == 1

    with_manager(state, action)


# --- cancelled ----------------------------------------------------------------------------------------


def test_cancelled_while_it_gets_one(state: Path) -> None:
    """At every turn: no sandbox and no session is left, and what was there is as before."""

    async def action(manager: aio.SandboxManager) -> None:
        kept = await manager.acquire(client_id="kept")
        await kept.detach()
        left = await manager.create(name="left")
        makers: list[Callable[[], Any]] = [
            manager.acquire,
            lambda: manager.acquire(options=POOLED),
            lambda: manager.attach("new", create_if_missing=True),
            lambda: manager.acquire(client_id="kept"),
            lambda: manager.attach("left", "me"),
            manager.create,
            lambda: manager.run_ephemeral(["sleep", "300"]),
            lambda: manager.run_pooled(["sleep", "300"]),
        ]

        for turns in range(0, 24, 2):
            for number, make in enumerate(makers):
                task = asyncio.create_task(make())
                for turn in range(turns):
                    await asyncio.sleep(0 if turn % 2 else 0.0004)
                task.cancel()
                try:
                    made = await task
                except asyncio.CancelledError:
                    made = None
                if number == 3 and made is not None:
                    await made.detach()
                elif isinstance(made, aio.Sandbox):
                    await made.destroy()
                elif made is not None:
                    await (made.session if isinstance(made, aio.AttachResult) else made).release()
                assert manager.list_sessions() == [kept], (turns, number)
                assert kept.state is SessionState.DETACHED
                names = {record.id for record in await manager.list_sandboxes()}
                assert names == {kept.sandbox_id, left.id}, (turns, number)
        assert (await left.exec(["true"])).ok

    with_manager(state, action)


def test_cancelled_while_it_ends_one(state: Path) -> None:
    """It ends all the same."""

    async def action(manager: aio.SandboxManager) -> None:
        for turns in range(0, 12, 2):
            session = await manager.acquire()
            await cancelled_after(turns, session.release())
            if not turns:
                await session.release()
            assert session.state is SessionState.TERMINATED
            assert not manager.exists(session.sandbox_id)

    with_manager(state, action)


# --- room ---------------------------------------------------------------------------------------------


def test_who_waits_for_room_blocks_nobody(state: Path) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        held = await manager.acquire(client_id="held")
        threads = threading.active_count()
        waiting = [asyncio.create_task(manager.acquire(wait=60)) for _ in range(40)]
        waiting += [asyncio.create_task(manager.run_ephemeral(["true"], wait=60)) for _ in range(10)]
        await asyncio.sleep(0.3)
        slowest, began = 0.0, time.monotonic()
        while time.monotonic() - began < 0.3:
            before = time.monotonic()
            await asyncio.sleep(0)
            slowest = max(slowest, time.monotonic() - before)
        assert slowest < 0.25
        assert threading.active_count() <= threads + 8
        assert not any(task.done() for task in waiting)
        # neither those who need no room
        other = (await asyncio.wait_for(manager.attach(held.sandbox_id, "other"), 10)).session
        await asyncio.wait_for(other.release(), 10)
        with pytest.raises(TooManySandboxes):
            await asyncio.wait_for(manager.acquire(wait=0.05), 10)
        for task in waiting[1:]:
            task.cancel()
        await asyncio.gather(*waiting[1:], return_exceptions=True)
        await held.release()
        await (await waiting[0]).release()

    with_manager(state, action, max_sandboxes=1)


def test_many_tasks_take_turns(state: Path) -> None:
    async def action(manager: aio.SandboxManager) -> None:
        now = most = 0

        async def use(number: int) -> None:
            nonlocal now, most
            async with await manager.acquire(client_id=f"c{number}", wait=60) as session:
                now += 1
                most = max(most, now)
                assert (await session.sandbox.exec(["echo", str(number)])).stdout == b"%d\n" % number
                now -= 1

        await asyncio.gather(*(use(number) for number in range(30)))
        assert 1 <= most <= 3
        await condition(lambda: manager.list_sessions() == [], "the end of all")

    with_manager(state, action, max_sandboxes=3)


def held(lock: Any) -> bool:
    """Whether any thread has it; it may be this one."""

    def look() -> bool:
        if free := lock.acquire(blocking=False):
            lock.release()
        return not free

    with ThreadPoolExecutor(1) as other:
        return other.submit(look).result()


@pytest.mark.parametrize("move", ["start", "stop"])
def test_a_task_and_a_thread_change_the_same_sandbox(
    state: Path, move: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread comes while the task is at it: neither waits for what the other one has."""
    came, go = threading.Event(), threading.Event()

    def late(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            came.set()
            assert go.wait(PATIENCE)
            return real(*args)

        return wrapper

    async def action(manager: aio.SandboxManager) -> None:
        box = await manager.create(start=move == "stop")
        real_born, real_end = aio_sandbox.born, aio.PersistentSandbox._end

        async def the_thread_goes_on() -> None:
            go.set()
            await condition(lambda: held(box._own._lock), "one of them")

        async def born(*args: Any, **options: Any) -> Any:
            link = await real_born(*args, **options)
            await the_thread_goes_on()
            return link

        async def end(self: aio.PersistentSandbox, *args: Any, **options: Any) -> None:
            await the_thread_goes_on()
            assert self.state is SandboxState.RUNNING
            await real_end(self, *args, **options)

        monkeypatch.setattr(aio_sandbox, "born", born)
        monkeypatch.setattr(aio.PersistentSandbox, "_end", end)
        for name in ("start", "_destroy"):
            monkeypatch.setattr(
                persistent.PersistentSandbox, name, late(getattr(persistent.PersistentSandbox, name))
            )
        work: Awaitable[Any] = manager.attach(box.id) if move == "start" else manager.destroy(box.id)
        thread = asyncio.ensure_future(work)
        await condition(came.is_set, "the thread")
        await getattr(box, move)()
        await thread
        assert manager.get_state(box.id) == ("running" if move == "start" else None)

    with_manager(state, action)


def test_no_pool_is_filled_on_the_loop(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, real = threading.Event(), SandboxPool.start

    def start(self: SandboxPool) -> SandboxPool:
        assert go.wait(PATIENCE)
        return real(self)

    monkeypatch.setattr(SandboxPool, "start", start)

    async def main() -> None:
        asyncio.get_running_loop().call_soon(go.set)
        config = PoolConfig(min_warm=2, max_warm=2)
        async with aio.SandboxManager(
            state, max_sandboxes=1, warm=["minimal"], pool=config, sweep_interval=None
        ) as manager:
            await condition(lambda: manager._own.stats().pool_size == 1, "the one for which there is room")
            assert (await manager.run_pooled(["echo", "x"], spec=Spec(profile="minimal"))).stdout == b"x\n"
        for bad in ("no such profile", Spec(ro=["/no/such/thing"])):
            with pytest.raises(SpecError):
                async with aio.SandboxManager(state, warm=[bad], sweep_interval=None):
                    pass

    play(main())


def test_a_place_is_taken_by_a_thread(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = threading.Event(), threading.Event()
    tidied: list[int] = []

    async def action(manager: aio.SandboxManager) -> None:
        own = manager._own
        take, make_room = own._room.take, own._make_room

        def slowly() -> int:
            asked.set()
            assert go.wait(PATIENCE)
            return take()

        def told() -> bool:
            tidied.append(threading.get_ident())
            return make_room()

        monkeypatch.setattr(own._room, "take", slowly)
        monkeypatch.setattr(own, "_make_room", told)
        run = asyncio.create_task(manager.run_ephemeral(["true"]))
        await condition(asked.is_set, "the place is asked for")
        run.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert own._room.taken() == 0
        assert (await manager.run_ephemeral(["true"])).ok
        assert own._room.taken() == 0
        box = await manager.create()
        with pytest.raises(TooManySandboxes):
            await manager.run_ephemeral(["true"])
        assert tidied
        assert threading.get_ident() not in tidied
        await manager.destroy(box.id)

    with_manager(state, action, max_sandboxes=1)


def test_closed_twice_and_cancelled(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aio.SandboxManager(state, sweep_interval=None) as manager:
            assert (await manager.run_pooled(["echo", "x"], client="me")).stdout == b"x\n"
            await manager.close()
            await manager.close()
        began, go = threading.Event(), threading.Event()
        manager = aio.SandboxManager(state, sweep_interval=None)
        real = manager._own.close

        def slowly() -> None:
            began.set()
            assert go.wait(PATIENCE)
            real()

        monkeypatch.setattr(manager._own, "close", slowly)
        closing = asyncio.create_task(manager.close())
        await condition(began.is_set, "it closes")
        closing.cancel()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await condition(
            lambda: not any(thread.is_alive() for thread in manager._threads._threads),
            "the end of its threads",
        )

    play(main())


def test_the_loop_goes_on_while_a_thread_changes_a_sandbox(state: Path) -> None:
    """One of a manager that forks it, or archives it, has its lock all the while."""
    has, go = threading.Event(), threading.Event()

    async def action(manager: aio.SandboxManager) -> None:
        box = await manager.create()

        def change() -> None:
            with box._own._lock:
                has.set()
                assert go.wait(PATIENCE)

        thread = asyncio.create_task(asyncio.to_thread(change))
        await condition(has.is_set, "the thread")
        assert manager.get_state(box.id) is box.state is SandboxState.RUNNING
        tasks = [
            asyncio.ensure_future(work)
            for work in (
                box.exec(["true"]),
                box.popen(["true"]),
                box.detach(["true"]),
                box.signal(0),
                box.files.write("/tmp/x", b""),
            )
        ]
        await asyncio.sleep(0)  # each has begun
        assert not any(task.done() for task in tasks)
        go.set()
        _, process, *_ = await asyncio.gather(*tasks)
        assert await process.wait() == 0
        await thread

    with_manager(state, action)
