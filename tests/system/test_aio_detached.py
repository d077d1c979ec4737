"""Detached commands and persistent sandboxes on an event loop: the same, without blocking it, and nothing
left behind by whoever is cancelled."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import textwrap
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import cancelled_after, condition, play
from support import PYTHON, gone, host_process, host_program, leaves_nothing, marked, wait_until

import sandboxcore
from sandboxcore import (
    PIPE,
    Cause,
    InvalidTransition,
    ProgramNotFound,
    SandboxGone,
    SandboxNotFound,
    SandboxState,
    SetupError,
    SpecError,
    aio,
    aio_detached,
    aio_persistent,
    aio_sandbox,
)
from sandboxcore.aio_loop import tell_init
from sandboxcore.command import Exit, Stderr, Stdout
from sandboxcore.persistent import PersistentSandbox, list_sandboxes
from sandboxcore.store import Store

PATIENCE = 30
SLEEP = ["sleep", "300"]
TURNS = 25
Action = Callable[[aio.Sandbox], Awaitable[None]]


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory, empty again at the end."""
    yield tmp_path / "state"
    for record in list_sandboxes(tmp_path / "state"):
        with contextlib.suppress(SandboxNotFound):
            PersistentSandbox.connect(record.id, state_dir=tmp_path / "state").destroy()


@pytest.fixture(params=["private", "persistent"])
def living(request: pytest.FixtureRequest, state: Path) -> Callable[[Action], None]:
    """Plays with a running sandbox of either kind, after which nothing is left."""

    def run(action: Action) -> None:
        async def main() -> None:
            if request.param == "private":
                sandbox: aio.Sandbox = await aio.Sandbox.create()
            else:
                sandbox = await aio.PersistentSandbox.create(name="box", state_dir=state)
            try:
                await action(sandbox)
            finally:
                await sandbox.destroy()

        with leaves_nothing():
            play(main())
            gc.collect()
        if request.param == "persistent":
            assert entries(state) == []

    return run


def entries(state: Path) -> list[str]:
    """What there is of sandboxes on disk."""
    return sorted(os.listdir(state / "sandboxes"))


def sh(script: str, *args: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *args]


def mark() -> str:
    return f"aio-{os.getpid()}-{time.monotonic_ns()}"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def in_log(command: aio.DetachedCommand, text: bytes) -> bytes:
    await condition(lambda: text in command.logs().data, f"{text!r} in stdout", PATIENCE)
    return command.logs().data


@contextlib.asynccontextmanager
async def ticking(longest: float) -> Any:
    """The loop is never held for longer than so many seconds."""
    gaps = [0.0]

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
    assert max(gaps) < longest


# --- detached commands ------------------------------------------------------------------------------


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


async def collect(command: aio.DetachedCommand) -> list[Any]:
    return [event async for event in command.follow()]


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


# --- persistent sandboxes ---------------------------------------------------------------------------


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

        async def fail(*_: Any) -> None:
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


# --- cancellation -----------------------------------------------------------------------------------


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

        async def born(*_: Any) -> None:
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
