"""sandboxcore.aio: detached commands."""

import asyncio
import gc
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiostay import (
    PATIENCE,
    SLEEP,
    TURNS,
    Action,
    collect,
    in_log,
    living,
    mark,
    open_fds,
    sh,
    spawner_runs,
    state,
    ticking,
)
from loops import cancelled_after, condition, play
from support import leaves_nothing, marked

from sandboxcore import (
    PIPE,
    Cause,
    InvalidTransition,
    ProgramNotFound,
    SandboxGone,
    SandboxNotFound,
    SpecError,
    aio,
    aio_detached,
)
from sandboxcore.command import Exit, Stderr, Stdout
from sandboxcore.persistent import PersistentSandbox

pytestmark = pytest.mark.once

__all__ = ["living", "spawner_runs", "state"]  # fixtures


def test_how_it_ends(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(sh('echo out; echo error >&2; exit "$1"', "3"))
        result = await command.wait(PATIENCE)
        assert (result.returncode, result.cause) == (3, Cause.EXITED)
        assert (command.returncode, command.status, command.written) == (3, "failed", (4, 6))
        assert command.result == result
        assert command.logs("stderr").data == b"error\n"
        assert (await (await sandbox.detach(["true"])).wait()).ok
        late = await sandbox.detach(SLEEP, timeout=0.2)
        assert (await late.wait(PATIENCE)).cause is Cause.TIMEOUT
        command = await sandbox.detach(SLEEP)
        with pytest.raises(subprocess.TimeoutExpired):
            await command.wait(0.05)
        assert (command.status, command.returncode) == ("running", None)
        assert command.pid_inside > 1
        command.terminate()
        assert (await command.wait(PATIENCE)).returncode == -signal.SIGTERM
        command = await sandbox.detach(sh("sleep 300; :"))
        command.kill()
        assert (await command.wait(PATIENCE)).cause is Cause.KILLED
        command.send_signal(signal.SIGTERM)  # nothing is there to get it
        with pytest.raises(ValueError, match="scope"):
            command.send_signal(signal.SIGTERM, "all")  # type: ignore[arg-type]

    living(action)


def test_list_and_find(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        assert sandbox.commands() == []
        assert sandbox.environment["PATH"]
        first = await sandbox.detach(["true"])
        await first.wait(PATIENCE)
        async with await sandbox.detach(SLEEP) as second:
            assert [command.id for command in sandbox.commands()] == [first.id, second.id]
        with pytest.raises(ValueError, match="closed"):
            second.logs()
        found = sandbox.command(second.id)
        assert (found.args, found.status, found.pty) == (("sleep", "300"), "running", False)
        again = found.again()
        found.close()
        assert again.status == "running"
        with pytest.raises(SandboxNotFound):
            sandbox.command("cmd-nobody")
        with pytest.raises(InvalidTransition):
            sandbox.forget(second.id)
        sandbox.forget(first.id)
        assert [command.id for command in sandbox.commands()] == [second.id]

    living(action)


def test_a_failing_start_leaves_nothing(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        fds = open_fds()
        with pytest.raises(ProgramNotFound) as caught:
            await sandbox.detach(["/no/such/program"])
        assert (caught.value.stage, caught.value.errno) == ("exec", 2)
        with pytest.raises(SpecError, match="keep"):
            await sandbox.detach(["true"], keep=1)
        with pytest.raises(ValueError, match="DEVNULL or PIPE"):
            await sandbox.detach(["true"], stdin=0)
        assert sandbox.commands() == []
        await condition(lambda: open_fds() <= fds, "the end of descriptors")
        await sandbox.suspend()
        with pytest.raises(InvalidTransition):
            await sandbox.detach(["true"])
        await sandbox.resume()

    living(action)


def test_follow(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        script = "for i in 1 2 3 4 5; do echo out$i; echo err$i >&2; sleep 0.02; done; exit 4"
        command = await sandbox.detach(sh(script))
        streams = {Stdout: b"", Stderr: b""}
        async for event in command.follow():
            if isinstance(event, Exit):
                assert event.result.returncode == 4
                break
            assert event.offset == len(streams[type(event)])
            streams[type(event)] += event.data
        assert streams[Stdout] == b"".join(b"out%d\n" % n for n in range(1, 6))
        assert streams[Stderr] == b"".join(b"err%d\n" % n for n in range(1, 6))
        rest = [event async for event in command.follow(stdout=20, stderr=None)]
        assert rest[0] == Stdout(b"out5\n", 20)
        assert [type(event) for event in rest] == [Stdout, Exit]

    living(action)


def test_many_followers_more_than_a_launcher_tells(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(["cat"], stdin=PIPE)
        handles = [sandbox.command(command.id) for _ in range(25)]

        async def read(handle: aio.DetachedCommand) -> bytes:
            return b"".join([event.data async for event in handle.follow() if isinstance(event, Stdout)])

        readers = [asyncio.create_task(read(handle)) for handle in handles]
        waiters = [asyncio.create_task(handle.wait(PATIENCE)) for handle in handles]
        async with await command.input(last=True) as stdin:
            for number in range(20):
                stdin.write(b"%d\n" % number)
                await stdin.drain()
                await asyncio.sleep(0.005)
        expected = b"".join(b"%d\n" % number for number in range(20))
        assert set(await asyncio.gather(*readers)) == {expected}
        assert all(result.ok for result in await asyncio.gather(*waiters))

    living(action)


def test_who_leaves_leaves_nothing(living: Callable[[Action], None]) -> None:
    """A wait that is cancelled, an iteration that is left: the command runs on."""

    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(sh("while echo x; do sleep 0.01; done"))
        fds = open_fds()

        async def follow() -> None:
            async for _ in command.follow():
                pass

        for turns in range(TURNS):
            assert await cancelled_after(turns, command.wait())
            assert await cancelled_after(turns, follow())
            assert open_fds() == fds
        async for _ in command.follow():
            break
        gc.collect()
        await condition(lambda: open_fds() == fds, "the end of the iteration")
        assert command.status == "running"

    living(action)


def test_a_flood_leaves_the_loop_to_others(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(["yes"])
        seen: list[int] = []

        async def read() -> None:
            async for event in command.follow():
                assert isinstance(event, Stdout)
                seen.append(len(event.data))

        async with ticking(1):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(read(), 0.5)
        assert sum(seen) > 65536

    living(action)


def test_input(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(["cat"], stdin=PIPE)
        async with await command.input() as first, await command.input() as second:
            first.write(b"one\n")
            await first.drain()
            await in_log(command, b"one\n")
            second.write(b"two\n")
        await in_log(command, b"two\n")
        assert command.status == "running"  # closing is no end-of-file
        async with await command.input(last=True) as stdin:
            stdin.write(b"three\n")
            with pytest.raises(ValueError, match="any more"):
                await command.input()
            with pytest.raises(ValueError, match="no terminal"):
                stdin.resize(10, 10)
        assert (await command.wait(PATIENCE)).ok
        assert command.logs().data == b"one\ntwo\nthree\n"
        with pytest.raises(SandboxGone):
            await command.input()
        command = await sandbox.detach(SLEEP)
        with pytest.raises(ValueError, match="neither"):
            await command.input()

    living(action)


def test_input_that_nobody_reads(living: Callable[[Action], None]) -> None:
    """What waits is the task, not the loop; and it can be cancelled."""

    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(SLEEP, stdin=PIPE)
        fds = open_fds()

        async def write(*, drain: bool) -> None:
            async with asyncio.timeout(0.3), await command.input() as stdin:
                stdin.write(bytes(1 << 20))
                if drain:
                    await stdin.drain()

        async with ticking(1):
            for drain in (True, False):
                with pytest.raises(TimeoutError):
                    await write(drain=drain)
        await condition(lambda: open_fds() == fds, "the end of the pipes")
        command.kill()
        await command.wait(PATIENCE)

    living(action)


def test_writers_of_both_kinds_lose_nothing(state: Path) -> None:
    """They share the pipe's description: neither may make it wait, or not wait, for the other."""

    async def main() -> None:
        async with await aio.PersistentSandbox.create(name="box", state_dir=state) as sandbox:
            command = await sandbox.detach(["cat"], stdin=PIPE, keep="4M")

            def write_sync() -> None:
                with PersistentSandbox.connect("box", state_dir=state) as other:
                    with other.command(command.id) as handle, handle.input() as stdin:
                        for number in range(300):
                            stdin.write(b"s %6d " % number + bytes(4000) + b"\n")

            async def write() -> None:
                async with await command.input() as stdin:
                    for number in range(300):
                        stdin.write(b"a %6d " % number + bytes(4000) + b"\n")
                        await stdin.drain()

            thread = threading.Thread(target=write_sync)
            thread.start()
            await write()
            await condition(lambda: not thread.is_alive(), "the end of the thread", PATIENCE)
            async with await command.input(last=True):
                pass
            assert (await command.wait(PATIENCE)).ok
            assert command.written[0] == 600 * 4010
            lines = command.logs(size=4 << 20).data.splitlines()
            for who in (b"s", b"a"):
                got = [line.split()[1] for line in lines if line.startswith(who)]
                assert got == [b"%d" % number for number in range(300)]
            await sandbox.destroy()

    play(main())


def test_a_terminal(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(["/bin/sh"], pty=(30, 90), env={"PS1": "$ ", "PATH": "/usr/bin:/bin"})
        async with await command.input() as terminal:
            terminal.write(b"stty size; tty\n")
            assert b"30 90\r\n" in await in_log(command, b"/dev/pts/")
            terminal.resize(41, 142)
            terminal.write(b"stty size; echo er''ror >&2\n")
            assert b"41 142\r\n" in await in_log(command, b"error\r\n")
        assert (command.pty, command.status) == (True, "running")
        async with await command.input() as terminal:
            terminal.write(b"exit 7\n")
        assert (await command.wait(PATIENCE)).returncode == 7

    living(action)


def test_a_paused_sandbox_answers_in_time(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(["cat"], stdin=PIPE)
        await sandbox.suspend()

        def insist() -> None:
            for _ in range(5000):
                command.send_signal(signal.SIGCONT)

        async with ticking(2):
            with pytest.raises(TimeoutError, match="paused"):
                insist()
            assert command.status == "running"
            with pytest.raises(subprocess.TimeoutExpired):
                await command.wait(0.1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await command.input()
        await sandbox.resume()
        command.kill()
        assert (await command.wait(PATIENCE)).cause is Cause.KILLED

    living(action)


def test_the_sandbox_ends_first(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        command = await sandbox.detach(sh("echo here; sleep 300"))
        await in_log(command, b"here")
        waiting = asyncio.create_task(command.wait(PATIENCE))
        events = asyncio.create_task(collect(command))
        await asyncio.sleep(0.01)
        await sandbox.stop()
        assert (await waiting).cause is Cause.KILLED
        assert [type(event) for event in await events] == [Stdout, Exit]
        assert sandbox.command(command.id).logs().data == b"here\n"

    living(action)


def test_close_waits_for_it() -> None:
    async def main() -> None:
        name = mark()
        sandbox = await aio.Sandbox.create()
        await sandbox.detach(sh("sleep 300; :", name))
        assert marked(name)
        await sandbox.close()
        assert not marked(name)

    with leaves_nothing():
        play(main())


def test_cancelled_detach_leaves_nothing(living: Callable[[Action], None]) -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        name = mark()
        assert (await sandbox.exec(["true"])).ok
        fds = open_fds()

        async def detach(**options: Any) -> None:
            await sandbox.detach(sh("(setsid sleep 300 &) ; sleep 300; :", name), **options)
            started.append(True)

        for turns in range(TURNS):
            for options in ({"stdin": PIPE}, {"pty": True}):
                started: list[bool] = []
                cancelled = await cancelled_after(turns, detach(**options))
                if started:  # the cancellation came behind its end
                    assert not cancelled
                    (command,) = sandbox.commands()
                    command.kill()
                    await command.wait(PATIENCE)
                    sandbox.forget(command.id)
                    del command
                assert marked(name) == set(), turns
                assert sandbox.commands() == []
                assert open_fds() == fds
        assert (await sandbox.exec(["true"])).ok

    living(action)


def test_cancelled_detach_at_its_very_start(
    living: Callable[[Action], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher has said that it runs, and nobody has heard it yet: it is killed nonetheless."""
    name = mark()

    async def action(sandbox: aio.Sandbox) -> None:
        original = aio_detached.Life

        class Deaf(original):  # type: ignore[misc, valid-type]
            def _hear(self) -> None:
                if marked(name):
                    self.loop.call_soon(task.cancel)

        monkeypatch.setattr(aio_detached, "Life", Deaf)
        for _ in range(5):
            task = asyncio.create_task(sandbox.detach(sh("sleep 300; :", name)))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (marked(name), sandbox.commands()) == (set(), [])
        monkeypatch.undo()

    living(action)


def test_cancelled_before_a_launcher_took_it(living: Callable[[Action], None]) -> None:
    """Stopped from outside: nobody serves the request. It must not be served later, either."""
    name = mark()

    async def action(sandbox: aio.Sandbox) -> None:
        sandbox._own._link_now().tell_init(signal.SIGSTOP)
        task = asyncio.create_task(sandbox.detach(sh("sleep 300; :", name)))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 5
        sandbox._own._link_now().tell_init(signal.SIGCONT)
        assert (await sandbox.exec(["true"])).ok
        assert (marked(name), sandbox.commands()) == (set(), [])

    living(action)
