"""sandboxcore.aio: persistent sandboxes, and their lock."""

import asyncio
import contextlib
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiostay import PATIENCE, SLEEP, entries, living, mark, open_fds, sh, spawner_runs, state, ticking
from loops import condition, play
from support import gone, host_process, host_program, leaves_nothing, marked

import sandboxcore
from sandboxcore import (
    PIPE,
    InvalidTransition,
    SandboxGone,
    SandboxNotFound,
    SandboxState,
    SetupError,
    SpecError,
    aio,
    aio_persistent,
    aio_sandbox,
)
from sandboxcore.aio_loop import tell_init
from sandboxcore.persistent import PersistentSandbox

pytestmark = pytest.mark.once

__all__ = ["living", "spawner_runs", "state"]  # fixtures


# --- persistent sandboxes ---------------------------------------------------------------------------


def test_back_after_its_files_were_used(state: Path) -> None:
    """The loop's own file server is none of the commands that must not run."""

    async def main() -> None:
        spec = sandboxcore.SandboxSpec(writable=True)
        async with await aio.PersistentSandbox.create(spec, state_dir=state) as box:
            await box.files.write("/file", b"1")
            snapshot = await box.snapshot()
            await box.files.write("/file", b"2")
            await box.restore(snapshot)
            assert await box.files.read("/file") == b"1"
            await box.files.write("/file", b"3")
            await box.discard()
            assert await box.files.read("/file") == b"1"
            await box.destroy()

    play(main())


def test_made_here_used_there(state: Path) -> None:
    async def main() -> None:
        spec = sandboxcore.SandboxSpec(env={"COLOUR": "blue"}, labels={"a": "1"})
        about: dict[str, Any] = {
            "labels": {"b": "2"},
            "description": "d",
            "metadata": {"k": [1]},
            "owner": "me",
        }
        async with await aio.PersistentSandbox.create(spec, name="box", state_dir=state, **about) as box:
            assert (await box.shell("echo $COLOUR > /workspace/file", check=True)).ok
            assert await box.files.read("/workspace/file") == b"blue\n"
            async with await box.popen(["cat"], stdin=PIPE) as process:
                assert await process.communicate(b"through") == (b"through", b"")
            command = await box.detach(sh("read line; echo $line; exit 3"), stdin=PIPE)
            assert (await box.capabilities()).no_new_privs
            assert box.record.pid == box.pid
        with PersistentSandbox.connect("box", state_dir=state) as there:
            assert (there.labels, there.metadata) == ({"a": "1", "b": "2"}, {"k": [1]})
            assert there.exec(["cat", "/workspace/file"]).stdout == b"blue\n"
            assert there.files.read("/workspace/file") == b"blue\n"
            with there.command(command.id) as handle, handle.input() as stdin:
                stdin.write(b"hello\n")
                assert handle.wait(PATIENCE).returncode == 3
        back = await aio.PersistentSandbox.connect(box.id, state_dir=state)
        assert (back.name, back.description, back.owner, back.id) == ("box", "d", "me", box.id)
        found = back.command(command.id)
        assert (found.logs().data, found.returncode) == (b"hello\n", 3)
        assert await back.files.read("/workspace/file") == b"blue\n"
        await back.destroy()
        await back.destroy()
        assert (back.state, entries(state)) == (SandboxState.DESTROYED, [])
        with pytest.raises(SandboxNotFound):
            await aio.PersistentSandbox.connect("box", state_dir=state)

    with leaves_nothing():
        play(main())
        gc.collect()


def test_states(state: Path) -> None:
    async def main() -> None:
        box = aio.PersistentSandbox(name="box", state_dir=state)
        other = await aio.PersistentSandbox.connect("box", state_dir=state)
        assert (box.state, other.state) == ("created", "created")
        with pytest.raises(InvalidTransition):
            await box.stop()
        await box.start()
        assert (other.state, other.pid) == ("running", box.pid)
        with pytest.raises(InvalidTransition):
            await other.start()
        await other.suspend()
        assert (box.state, box.record.state) == ("paused", "paused")
        with pytest.raises(InvalidTransition):
            await box.exec(["true"])
        with pytest.raises(InvalidTransition):
            await box.start()
        await box.resume()
        assert other.state == "running"
        await box.signal(signal.SIGTERM)
        (await box.files.write("/workspace/x", "1"))
        process = await other.popen(SLEEP)
        pid = box.pid
        await box.stop()
        assert gone(pid)
        assert await process.wait() < 0
        assert (other.state, other.pid, box.record.pid) == ("stopped", 0, 0)
        assert (box.stopped_at or 0) >= (box.started_at or 0) > 0
        await other.start()
        assert not await box.files.exists("/workspace/x")
        os.kill(other.pid, signal.SIGKILL)
        await condition(lambda: box.state == "stopped", "the end is seen")
        await box.destroy()
        assert other.state == "destroyed"
        with pytest.raises(InvalidTransition):
            await other.start()
        await other.close()
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()


def test_letting_go_is_not_the_end(state: Path) -> None:
    name = mark()

    async def main() -> None:
        async with aio.PersistentSandbox(name="box", state_dir=state) as box:
            process = await box.popen(sh("sleep 300; :", name))
            command = await box.detach(SLEEP)
        await condition(lambda: not marked(name), "the end of the command that is not detached")
        with pytest.raises(ValueError, match="closed"):
            await process.wait()
        assert command.status == "running"

    play(main())
    with PersistentSandbox.connect("box", state_dir=state) as box:
        assert box.state == "running"
        assert [command.status for command in box.commands()] == ["running"]


def test_survives_its_maker(state: Path) -> None:
    code = """
        import asyncio, json, os, signal, sys
        from sandboxcore import aio
        async def main():
            box = await aio.PersistentSandbox.create(name="box", state_dir=sys.argv[1])
            command = await box.detach(["sleep", "300"])
            print(json.dumps([box.pid, command.id]), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    done = host_program(code, str(state))
    assert done.returncode == -9, done
    pid, command_id = json.loads(done.stdout)

    async def main() -> None:
        box = await aio.PersistentSandbox.connect("box", state_dir=state)
        assert (box.pid, box.command(command_id).status) == (pid, "running")
        await box.destroy()

    play(main())


def test_a_failing_create_leaves_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        with pytest.raises(SpecError, match="name"):
            await aio.PersistentSandbox.create(name="a b", state_dir=state)
        kept = aio.PersistentSandbox(name="box", state_dir=state)
        with pytest.raises(SpecError, match="another sandbox"):
            await aio.PersistentSandbox.create(name="box", state_dir=state)
        await kept.destroy()

        async def fail(*_: Any, **_more: Any) -> None:
            raise SetupError("host", 12)

        monkeypatch.setattr(aio_sandbox, "born", fail)
        with pytest.raises(SetupError):
            await aio.PersistentSandbox.create(name="box", state_dir=state)
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()


def test_list_and_gc(state: Path) -> None:
    async def main() -> None:
        first = await aio.PersistentSandbox.create(name="first", state_dir=state, labels={"a": "1"})
        second = aio.PersistentSandbox(name="second", state_dir=state)
        assert [record.name for record in await aio.list_sandboxes(state)] == ["first", "second"]
        assert [record.name for record in await aio.list_sandboxes(state, labels={"a": "1"})] == ["first"]
        (state / "sandboxes" / "sbx-stray").mkdir()
        pid = first.pid
        os.kill(pid, signal.SIGKILL)
        await condition(lambda: gone(pid), "its end")
        expected = (first.id,), ("sbx-stray",)
        for dry_run in (True, False):
            found = await aio.gc(state, dry_run=dry_run)
            assert (found.ended, found.removed) == expected
        found = await aio.gc(state)
        assert (found.ended, found.removed) == ((), ())
        assert [record.state for record in await aio.list_sandboxes(state)] == ["stopped", "created"]
        await first.destroy()
        await second.destroy()

    play(main())


def test_told_what_init_cannot_hear(state: Path) -> None:
    async def main() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        link = box._own._link_now()
        os.kill(box.pid, signal.SIGKILL)
        with pytest.raises(SandboxGone):
            await box._through(lambda link: tell_init(link, signal.SIGTERM, lambda: None))
        assert box._own._link is link  # nobody had looked
        assert box.state == "stopped"
        await box.destroy()

    with leaves_nothing():
        play(main())
        gc.collect()


# --- the lock ---------------------------------------------------------------------------------------

HOLDER = """
    import sys
    from sandboxcore.store import Store
    with Store(sys.argv[1]) as store, store.locked(sys.argv[2]):
        print("held", flush=True)
        sys.stdin.readline()
"""


@contextlib.contextmanager
def held(state: Path, sandbox: str) -> Iterator[Callable[[], None]]:
    """Another process has the lock, until it is told to let go."""
    with host_process(HOLDER, str(state), sandbox) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "held\n"
        stdin = process.stdin

        def release() -> None:
            stdin.write("\n")
            stdin.flush()

        yield release


def test_the_loop_goes_on_while_another_process_has_the_lock(state: Path) -> None:
    async def main() -> None:
        box = aio.PersistentSandbox(name="box", state_dir=state)
        async with ticking(1):
            for move in (
                box.start,
                box.suspend,
                box.resume,
                lambda: box.detach(SLEEP),
                box.stop,
                box.destroy,
            ):
                with held(state, box.id) as release:
                    before = box.state
                    task = asyncio.create_task(move())  # type: ignore[operator]
                    await asyncio.sleep(0.1)
                    assert (task.done(), box.state) == (False, before)
                    release()
                    await task
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()


def test_cancelled_while_another_process_has_the_lock(state: Path) -> None:
    async def main() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        fds, files = open_fds(), entries(state)
        with held(state, box.id) as release:
            for move in (box.suspend, lambda: box.detach(SLEEP), box.stop, box.destroy):
                task = asyncio.create_task(move())  # type: ignore[operator]
                await asyncio.sleep(0.02)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (box.state, box.commands(), entries(state)) == ("running", [], files)
            release()
        await condition(lambda: open_fds() == fds, "the end of the pipes to the other process")
        assert (await box.exec(["true"])).ok
        await box.destroy()

    with leaves_nothing():
        play(main())
        gc.collect()


def test_the_wait_for_the_lock_is_bounded(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (aio_sandbox, aio_persistent):
        monkeypatch.setattr(module, "LOCK_PATIENCE", 0.1)

    async def main() -> None:
        box = await aio.PersistentSandbox.create(name="box", state_dir=state)
        with held(state, box.id):
            for move in (box.suspend, lambda: box.detach(SLEEP), box.stop, box.destroy):
                with pytest.raises(TimeoutError, match="somebody else"):
                    await move()  # type: ignore[operator]
        assert box.state == "running"
        await box.destroy()

    play(main())


def test_handles_race_in_one_loop(state: Path) -> None:
    """They exclude each other by the file's lock, which one of them holds while the other has the loop."""

    async def main() -> None:
        boxes = [aio.PersistentSandbox(name="box", state_dir=state)]
        boxes += [await aio.PersistentSandbox.connect("box", state_dir=state) for _ in range(4)]
        for _ in range(3):
            outcomes = await asyncio.gather(*(box.start() for box in boxes), return_exceptions=True)
            assert sorted(map(str, map(type, outcomes))) == sorted(
                map(str, [type(None)] + 4 * [InvalidTransition])
            )
            assert len({box.pid for box in boxes if box.state == "running"}) == 1
            calls = [box.detach(["true"]) for box in boxes for _ in range(5)]
            commands = await asyncio.gather(*calls)
            assert all([(await command.wait(PATIENCE)).ok for command in commands])
            outcomes = await asyncio.gather(*(box.stop() for box in boxes), return_exceptions=True)
            assert sum(outcome is None for outcome in outcomes) == 1
        assert len(boxes[0].commands()) == 75
        await asyncio.gather(*(box.destroy() for box in boxes))
        assert entries(state) == []

    with leaves_nothing():
        play(main())
        gc.collect()
