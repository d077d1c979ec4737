"""sandboxcore.aio: whoever is cancelled, at whatever moment, leaves nothing."""

import asyncio
import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from aiolife import MIB, mark, python, spawner_runs, with_sandbox
from loops import cancelled_after, condition, play
from support import leaves_nothing, marked, open_fds, parents, wait_until

import sandboxcore
import sandboxcore.files
import sandboxcore.persistent
from sandboxcore import Cause, SandboxState, aio

pytestmark = pytest.mark.once

__all__ = ["spawner_runs"]  # fixtures


def test_cancelled_create_leaves_nothing() -> None:
    async def create() -> None:
        sandbox = await aio.Sandbox.create()
        await asyncio.sleep(300)
        await sandbox.close()

    async def main() -> None:
        for turns in range(25):
            assert await cancelled_after(turns, create())
            gc.collect()

    sandboxcore.run(["true"])
    with leaves_nothing():
        play(main())


def test_cancelled_run_leaves_nothing() -> None:
    async def main() -> None:
        for turns in range(25):
            assert await cancelled_after(turns, aio.run(["sh", "-c", "sleep 300; :", name]))
            assert marked(name) == set()

    name = mark()
    sandboxcore.run(["true"])
    with leaves_nothing():
        play(main())


def test_cancelled_exec_leaves_nothing() -> None:
    """The command is gone when the cancellation arrives, and its sandbox goes on."""
    name = mark()

    async def action(sandbox: aio.Sandbox) -> None:
        assert (await sandbox.exec(["true"])).ok
        init = sandbox.pid
        fds = len(open_fds())
        for turns in range(25):
            command = ["sh", "-c", "(setsid sleep 300 &) ; sleep 300; :", name]
            assert await cancelled_after(turns, sandbox.exec(command, input=bytes(MIB)))
            assert marked(name) == set()
            assert len(os.listdir("/proc/self/fd")) == fds
        listing = await sandbox.exec(["sh", "-c", "ls -d /proc/[0-9]* | wc -l"], text=True)
        assert int(listing.stdout) < 12
        assert sandbox.pid == init

    with leaves_nothing():
        with_sandbox(action)


def test_cancelled_popen_leaves_nothing() -> None:
    name = mark()

    async def popen(sandbox: aio.Sandbox, **options: Any) -> None:
        async with await sandbox.popen(["sh", "-c", "sleep 300; :", name], **options):
            await asyncio.sleep(300)

    async def action(sandbox: aio.Sandbox) -> None:
        assert (await sandbox.exec(["true"])).ok
        fds = len(open_fds())
        for turns in range(25):
            for options in ({"stdin": aio.PIPE}, {"pty": True}):
                assert await cancelled_after(turns, popen(sandbox, **options))
                await condition(lambda: not marked(name), "the end of the command")
                await condition(lambda: len(os.listdir("/proc/self/fd")) == fds, "the end of the pipes")

    with leaves_nothing():
        with_sandbox(action)


def test_cancelled_more_than_once() -> None:
    """The second cancellation comes while the first is being served."""

    async def action(sandbox: aio.Sandbox) -> None:
        name = mark()
        for pause in (0, 0, 0.0005, 0.001):
            task = asyncio.create_task(sandbox.exec(["sh", "-c", "sleep 300; :", name]))
            await condition(lambda: marked(name), "the command")
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(pause)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert marked(name) == set()

    with leaves_nothing():
        with_sandbox(action)


def test_a_command_that_ignores_everything_is_gone_in_time() -> None:
    code = """
        import os, signal, sys, time
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(300)
    """

    async def action(sandbox: aio.Sandbox) -> None:
        for execute in (sandbox.exec, aio.run):
            name = mark()
            began = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await execute(python(code, name))
            assert marked(name) == set()
            assert time.monotonic() - began < 1.5

    with leaves_nothing():
        with_sandbox(action)


def test_a_launcher_that_is_killed() -> None:
    """What it left is gone, too, when the end is told; the sandbox goes on."""
    name = mark()

    async def action(sandbox: aio.Sandbox) -> None:
        assert (await sandbox.exec(["true"])).ok
        task = asyncio.create_task(sandbox.exec(["sh", "-c", "(setsid sleep 300 &) ; sleep 300; :", name]))
        found, parent_of = await condition(lambda: marked(name), "the command"), parents()
        (launcher,) = {parent_of[pid] for pid in found if pid in parent_of} - found
        os.kill(launcher, signal.SIGKILL)
        result = await task
        assert result.cause is Cause.KILLED
        await condition(lambda: not marked(name), "the end of what it left", 0.5)
        assert (await sandbox.exec(["true"])).ok

    with leaves_nothing():
        with_sandbox(action)


def test_cancelled_while_it_waits_for_a_launcher_that_is_stopped() -> None:
    """A launcher that does not answer takes its sandbox with it, but not where we have stopped it."""

    async def main() -> None:
        async with aio.Sandbox() as sandbox:
            name = mark()
            task = asyncio.create_task(sandbox.exec(["sh", "-c", "sleep 300; :", name]))
            await condition(lambda: marked(name), "the command")
            await sandbox.suspend()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sandbox.state is SandboxState.PAUSED
            await sandbox.resume()
            await condition(lambda: not marked(name), "the end of the command")
            assert (await sandbox.exec(["true"])).ok

    with leaves_nothing():
        play(main())


def test_cancelled_before_a_launcher_took_it() -> None:
    """It never runs, and its sandbox goes on."""

    async def action(sandbox: aio.Sandbox) -> None:
        assert (await sandbox.exec(["true"])).ok
        init = sandbox.pid
        os.kill(init, signal.SIGSTOP)
        launchers = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        for launcher in launchers:
            os.kill(int(launcher), signal.SIGSTOP)
        for command in (sandbox.exec, sandbox.popen):
            task = asyncio.create_task(command(["touch", "/tmp/it-ran"]))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.monotonic() - began < 3
        for pid in (*launchers, init):
            os.kill(int(pid), signal.SIGCONT)
        assert (await sandbox.shell("ls /tmp")).stdout == b""
        assert sandbox.pid == init

    with leaves_nothing():
        with_sandbox(action)


def test_timeout_of_one_whose_sandbox_is_stopped_by_somebody_else() -> None:
    async def main() -> None:
        async with aio.Sandbox() as sandbox:
            name = mark()
            task = asyncio.create_task(sandbox.exec(["sh", "-c", "sleep 300; :", name], timeout=1))
            payload = (await condition(lambda: marked(name), "the command")).pop()
            launcher = int(Path(f"/proc/{payload}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(sandbox.pid, signal.SIGSTOP)  # else it would let the launcher go on
            os.kill(launcher, signal.SIGSTOP)
            began = time.monotonic()
            done = await task
            assert done.timed_out
            assert time.monotonic() - began < 2.5
            assert marked(name) == set()
            await condition(lambda: sandbox.state is SandboxState.STOPPED, "its end")

    with leaves_nothing():
        play(main())


def test_the_end_of_the_loop_is_the_end_of_everything() -> None:
    """Tasks that are left are cancelled by asyncio.run()."""
    name = mark()
    kept: list[asyncio.Task[Any]] = []

    async def main() -> None:
        sandbox = await aio.Sandbox.create()
        kept.append(asyncio.create_task(sandbox.exec(["sh", "-c", "sleep 300; :", name])))
        kept.append(asyncio.create_task(aio.run(["sh", "-c", "sleep 300; :", name])))
        await condition(lambda: len(marked(name)) >= 2, "both commands")

    with leaves_nothing():
        asyncio.run(main())
        assert all(task.cancelled() for task in kept)
        kept.clear()
        gc.collect()
        wait_until(lambda: not marked(name), "their end")
