"""sandboxcore.aio: whoever is cancelled about what outlives a loop."""

import asyncio
import gc
import logging
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from aiostay import PATIENCE, TURNS, collect, entries, living, mark, sh, spawner_runs, state
from loops import cancelled_after, condition, play
from support import PYTHON, gone, leaves_nothing, marked, wait_until

from sandboxcore import aio, aio_sandbox
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import list_sandboxes
from sandboxcore.store import Store

pytestmark = pytest.mark.once

__all__ = ["living", "spawner_runs", "state"]  # fixtures


def test_cancelled_create_leaves_nothing(state: Path) -> None:
    async def create() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        try:
            await asyncio.sleep(300)
        finally:
            box._undone()

    async def main() -> None:
        for turns in range(TURNS):
            assert await cancelled_after(turns, create())
            gc.collect()
            if (state / "sandboxes").exists():
                assert (entries(state), list_sandboxes(state)) == ([], [])

    with leaves_nothing():
        play(main())
        gc.collect()


def test_create_cancelled_while_somebody_has_found_it(state: Path) -> None:
    """Another process has its lock just then: that is waited for."""

    async def main() -> None:
        store = Store(state)
        original = aio_sandbox.born
        started = asyncio.Event()

        async def born(*_: Any, **__: Any) -> None:
            started.set()
            await asyncio.sleep(300)

        aio_sandbox.born = born  # type: ignore[assignment]
        try:
            task = asyncio.create_task(aio.PersistentSandbox.create(name="box", state_dir=state))
            await started.wait()
            record = store.find("box")
            thief: list[Any] = []

            def steal() -> None:  # in the moment between the end of the start and the clearing up
                with store.locked(record.id):
                    thief.append(True)
                    released.wait(PATIENCE)

            released = threading.Event()
            thread = threading.Thread(target=steal)
            thread.start()
            await asyncio.sleep(0.05)
            task.cancel()
            await asyncio.sleep(0.1)
            released.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            await condition(lambda: not thread.is_alive(), "the end of the thread")
            await condition(lambda: entries(state) == [], "nothing is left")
        finally:
            aio_sandbox.born = original
            store.close()
        assert list_sandboxes(state) == []

    play(main())


def test_cancelled_start_can_start_again(state: Path) -> None:
    async def main() -> None:
        box = aio.PersistentSandbox(name="box", state_dir=state)
        for turns in range(TURNS):
            done = not await cancelled_after(turns, box.start())
            assert box.state == ("running" if done else "created"), turns
            if done:
                break
            assert box.record.pid == 0
        else:
            await box.start()
        assert (await box.exec(["true"])).ok
        await box.destroy()
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()


def test_cancelled_moves_are_told_truly(state: Path) -> None:
    async def main() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        probe = await aio.PersistentSandbox.connect("box", state_dir=state)
        for turns in range(10):
            await cancelled_after(turns, box.suspend())
            assert box.state == probe.state
            assert box.state in ("running", "paused")
            if box.state == "paused":
                await cancelled_after(turns, probe.resume())
                if box.state == "paused":
                    await box.resume()
            assert (await probe.exec(["true"], timeout=PATIENCE)).ok  # it really runs
            pid = box.pid
            await cancelled_after(turns, probe.stop())
            assert (box.state == "stopped") == gone(pid)
            if box.state == "stopped":
                await box.start()
        await cancelled_after(2, box.destroy())
        if box.state != "destroyed":
            assert list_sandboxes(state) != []
            await box.destroy()
        await probe.close()
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()


def test_the_end_of_the_loop(state: Path) -> None:
    """asyncio.run() cancels what is left; what is on record stays, and nothing else."""
    name = mark()

    async def main() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        command = await box.detach(sh("sleep 300; :", name))
        left = [
            asyncio.create_task(command.wait()),
            asyncio.create_task(collect(command)),
            asyncio.create_task(aio.PersistentSandbox.create(name="late", state_dir=state)),
        ]
        await asyncio.sleep(0)
        assert not any(task.done() for task in left)

    with leaves_nothing():
        play(main())
        gc.collect()
        assert [record.name for record in list_sandboxes(state)] == ["box"]
        assert len(marked(name)) > 0
        PersistentSandbox.connect("box", state_dir=state).destroy()
        wait_until(lambda: not marked(name), "its end")


def test_no_callback_is_slow(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0.5
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        commands = await asyncio.gather(
            *(box.detach([PYTHON, "-I", "-S", "-c", textwrap.dedent(SPEAKER)]) for _ in range(10))
        )
        assert all([(await collect(command))[-1].result.ok for command in commands])
        await box.suspend()
        await box.resume()
        await aio.list_sandboxes(state)
        await aio.gc(state)
        await box.stop()
        await box.start()
        await box.destroy()

    with caplog.at_level(logging.WARNING, "asyncio"):
        asyncio.run(main(), debug=True)
    assert [record.getMessage() for record in caplog.records] == []


SPEAKER = """
    import os
    for number in range(50):
        os.write(1, b"x" * 10000)
"""
