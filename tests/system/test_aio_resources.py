"""Control groups on an event loop: the same limits, causes and numbers as without one, suspended time
that does not count; and no group is left by whoever is cancelled."""

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loops import cancelled_after, condition, play
from resources import IN_VM, PATIENCE, MiB, cpu, groups_of, load, needs, populated, spec
from support import gone, marked

import sandboxcore
from sandboxcore import (
    Cause,
    ExecResult,
    InvalidTransition,
    Limits,
    SandboxSpec,
    SandboxState,
    SetupError,
    SpecError,
    UnsupportedHost,
    aio,
    aio_loop,
    cgroup,
    groups,
)

pytestmark = pytest.mark.timeout(600)
in_vm_too = pytest.mark.cgroup  # not all of them, for there it takes twenty times as long

SLOW = 3 if IN_VM else 1  # for what must take a while to show anything


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No group of a sandbox, and of runs only those that wait for the next one, with nobody in them."""
    before = _left()
    yield
    gc.collect()
    deadline = time.monotonic() + PATIENCE
    while (left := _left() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == set()


def _left() -> set[Path]:
    idle = groups_of(os.getpid(), "run-")
    return {*groups_of(os.getpid(), "sbx-"), *filter(populated, idle)}


def group_of(sandbox: aio.Sandbox) -> cgroup.Group:
    group = sandbox._own._link_now().group
    assert group is not None
    return group


async def frozen_for(sandbox: aio.Sandbox, seconds: float) -> float:
    """Suspend it for a while; how long it was."""
    await sandbox.suspend()
    began = time.monotonic()
    await asyncio.sleep(seconds)
    lasted = time.monotonic() - began
    await sandbox.resume()
    return lasted


async def started(sandbox: aio.Sandbox, *steps: str | int) -> aio.Process:
    """A command of a sandbox that has said so."""
    process = await sandbox.popen(load("say", "ready", *steps), stdin=aio.PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


# --- the same as without asyncio ----------------------------------------------------------------------

CASES: dict[str, tuple[tuple[str | int, ...], dict[str, Any]]] = {
    "nothing": ((), {"memory": "64M"}),
    "memory": (("alloc", 200 * MiB), {"memory": "64M"}),
    "memory of a child": (("fork", 3, "alloc", 30 * MiB, "hold"), {"memory": "64M"}),
    "processes": (("bomb", "exit", 3), {"memory": "256M", "pids": 20}),
    "CPU time of two": (("fork", 2, "spin"), {"memory": "64M", "cpu_time": 0.4 * SLOW}),
    "its own end": (("raise", int(signal.SIGKILL)), {"memory": "64M", "pids": 30, "cpu_time": 60}),
    "a status": (("exit", 137), {"memory": "64M"}),
}


def told(done: ExecResult) -> tuple[Any, ...]:
    """What must not depend on who waits: numbers only as far as they are known."""
    numbers = ("oom_kills", "pids_refused", "io_read", "io_written")  # a peak may be an earlier command's
    known = [name for name in numbers if getattr(done.usage, name) is not None]
    return done.cause, done.returncode, done.detail.partition(",")[0], done.truncated, known


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("living", [False, True])
def test_the_same_cause(name: str, living: bool) -> None:
    steps, limits = CASES[name]
    needs("memory", "pids")
    described = spec(**limits)

    async def main() -> ExecResult:
        if not living:
            return await aio.run(load(*steps), spec=described, timeout=PATIENCE)
        async with aio.Sandbox(described) as sandbox:
            done = await sandbox.exec(load(*steps), timeout=PATIENCE)
            assert (await sandbox.exec(load())).ok  # and it goes on
            return done

    if living:
        with sandboxcore.Sandbox(described) as sandbox:
            expected = sandbox.exec(load(*steps), timeout=PATIENCE)
    else:
        expected = sandboxcore.run(load(*steps), spec=described, timeout=PATIENCE)
    assert told(play(main(), PATIENCE)) == told(expected)


@pytest.mark.parametrize("living", [False, True])
@pytest.mark.parametrize("stream", [1, 2])
def test_output_that_kills(living: bool, stream: int) -> None:
    """Needs no group; the sandbox goes on, and as much as allowed is no reason."""
    described = SandboxSpec(limits=Limits(output="64K", output_action="kill"))

    async def main() -> None:
        async with aio.Sandbox(described) as sandbox:
            execute = sandbox.exec if living else partial(aio.run, spec=described)
            done = await execute(["sh", "-c", f"yes >&{stream}; sleep 600"], timeout=PATIENCE)
            assert (done.cause, done.returncode, done.truncated) == (Cause.OUTPUT, -9, True), done
            assert done.detail.startswith("limits.output: 64 KiB, written ")
            assert (len(done.stdout), len(done.stderr)) == ((65536, 0) if stream == 1 else (0, 65536))
            done = await execute(["head", "-c", "65536", "/dev/zero"], timeout=PATIENCE)
            assert (done.cause, done.truncated) == (Cause.EXITED, False)

    play(main(), PATIENCE)


@in_vm_too
@pytest.mark.parametrize("way", ["run", "exec", "popen", "detach"])
def test_memory_is_counted_for_each_command(way: str) -> None:
    """Also for those that run at once, and for a small one behind a big one."""
    needs("memory")
    described = spec(memory="400M")

    async def peak(sandbox: aio.Sandbox, size: int) -> int:
        argv = load("alloc", size * MiB)
        if way == "run":
            done = await aio.run(argv, spec=described, timeout=PATIENCE)
        elif way == "exec":
            done = await sandbox.exec(argv, timeout=PATIENCE)
        elif way == "popen":
            async with await sandbox.popen(argv) as process:
                await process.communicate()
            assert process.result is not None
            done = process.result
        else:
            async with await sandbox.detach(argv) as command:
                done = await command.wait(PATIENCE)
        assert (done.cause, done.usage.oom_kills) == (Cause.EXITED, 0)
        assert done.usage.memory_peak is not None
        return done.usage.memory_peak

    async def main() -> None:
        async with aio.Sandbox(described) as sandbox:
            sizes = [100, 50, 10, 25]
            for size, seen in zip(
                sizes, await asyncio.gather(*(peak(sandbox, size) for size in sizes)), strict=True
            ):
                assert seen == pytest.approx(size * MiB, rel=0.05, abs=2 * MiB), size
            assert await peak(sandbox, 100) == pytest.approx(100 * MiB, rel=0.05)
            # Where a peak cannot be set back (before Linux 6.12), a used group says nothing of a small one
            done = await sandbox.exec(load("alloc", 5 * MiB))
            assert done.usage.memory_peak is None or done.usage.memory_peak < 10 * MiB

    play(main(), PATIENCE)


def test_runs_use_a_ready_group_and_no_thread_of_their_own() -> None:
    needs("memory")
    described = spec(memory="64M")

    def names() -> set[str]:
        return {path.name for path in groups_of(os.getpid(), "run-")}

    async def main() -> None:
        others = names()
        for _ in range(3):
            assert (await aio.run(load(), spec=described)).ok
        threads = threading.active_count()
        fds = len(os.listdir("/proc/self/fd"))
        calls = [aio.run(load("exit", n), spec=described, timeout=PATIENCE) for n in range(12)]
        assert [done.returncode for done in await asyncio.gather(*calls)] == list(range(12))
        assert threading.active_count() <= threads + 1  # who tidies up, for the whole process
        await condition(
            lambda: len(names() - others) <= groups.KEPT + groups.READY,
            "the end of superfluous groups",
            PATIENCE,
        )
        for _ in range(20):  # those that are kept have open files: so many, and no more
            assert (await aio.run(load(), spec=described)).ok
        assert len(os.listdir("/proc/self/fd")) <= fds + 16 * groups.KEPT

    play(main(), PATIENCE)


def test_a_clock_of_cpu_time_does_not_tick_for_one_that_sleeps() -> None:
    """Nearly all of it used, then asleep: looked at now and then, not all the time."""
    needs("memory")
    looks = 0
    look = sandboxcore._native.Watch.out_of_time

    def counted(watch: Any) -> bool:
        nonlocal looks
        looks += 1
        return look(watch)

    async def main() -> None:
        described = spec(memory="64M", cpu_time=0.5 * SLOW)
        argv = ["sh", "-c", f"/load/workload burn {490 * SLOW}; sleep 1"]
        done = await aio.run(argv, spec=described, timeout=PATIENCE)
        assert (done.cause, done.returncode) in ((Cause.EXITED, 0), (Cause.CPU_TIME, -9)), done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandboxcore._native.Watch, "out_of_time", counted)
        play(main(), PATIENCE)
    assert 1 < looks < 400 * SLOW


# --- cancellation -------------------------------------------------------------------------------------


@in_vm_too
def test_cancelled_run_leaves_no_group() -> None:
    needs("memory")
    described = spec(memory="64M", pids=50)

    async def main() -> None:
        assert (await aio.run(load(), spec=described)).ok
        for turns in range(20 if not IN_VM else 8):
            assert await cancelled_after(turns, aio.run(load("fork", 3, "hold"), spec=described))
        await condition(
            lambda: not any(map(populated, groups_of(os.getpid(), "run-"))),
            "the end of all",
            PATIENCE,
        )
        done = await aio.run(load("alloc", 20 * MiB), spec=described)
        assert done.usage.memory_peak == pytest.approx(20 * MiB, rel=0.1)

    play(main(), PATIENCE)


@in_vm_too
@pytest.mark.parametrize("persistent", [False, True])
def test_cancelled_create_leaves_no_group(persistent: bool, tmp_path: Path) -> None:
    needs("memory")
    described = spec(memory="64M")

    async def create() -> None:
        if persistent:
            sandbox: aio.Sandbox = await aio.PersistentSandbox.create(described, state_dir=tmp_path)
        else:
            sandbox = await aio.Sandbox.create(described)
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            await sandbox.destroy()

    async def main() -> None:
        for turns in range(15 if not IN_VM else 6):
            assert await cancelled_after(turns, create())
            gc.collect()
        await condition(lambda: not groups_of(os.getpid(), "sbx-"), "the end of their groups", PATIENCE)

    play(main(), PATIENCE)


def test_cancelled_exec_leaves_the_group_empty_for_the_next() -> None:
    needs("memory", "pids")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="128M", pids=30)) as sandbox:
            assert (await sandbox.exec(load())).ok
            for turns in range(12 if not IN_VM else 5):
                argv = load("alloc", 10 * MiB, "fork", 8, "hold")
                assert await cancelled_after(turns, sandbox.exec(argv))
            done = await sandbox.exec(load("alloc", 90 * MiB), timeout=PATIENCE)
            assert (done.cause, done.usage.pids_refused) == (Cause.EXITED, 0)

    play(main(), PATIENCE)


# --- suspended ------------------------------------------------------------------------------------------


@in_vm_too
def test_suspend_freezes() -> None:
    """Under load: no CPU time is used meanwhile; then it goes on."""
    needs("memory", "freezer")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="128M")) as sandbox:
            busy = [await started(sandbox, "fork", 2, "spin") for _ in range(3)]
            for _ in range(5):
                await sandbox.suspend()
                assert (sandbox.state, group_of(sandbox).frozen) == (SandboxState.PAUSED, True)
                before = sandbox.usage()
                await asyncio.sleep(0.2 * SLOW)
                assert cpu(sandbox.usage()) - cpu(before) < 0.02 * SLOW
                with pytest.raises(InvalidTransition):
                    await sandbox.suspend()
                with pytest.raises(InvalidTransition):
                    await sandbox.exec(load())
                await sandbox.resume()
                assert (sandbox.state, group_of(sandbox).frozen) == (SandboxState.RUNNING, False)
                with pytest.raises(InvalidTransition):
                    await sandbox.resume()
                usage = sandbox.usage
                await condition(lambda: cpu(usage()) > cpu(before) + 0.05, "CPU time", PATIENCE)  # noqa: B023
            for process in busy:
                process.kill()
                assert await process.wait() == -signal.SIGKILL
                process.close()

    play(main(), PATIENCE)


@pytest.mark.parametrize("memory", ["64M", None])
@pytest.mark.parametrize("way", ["exec", "popen", "detach", "wall_time"])
def test_suspended_time_does_not_count(way: str, memory: str | None) -> None:
    """Neither by the freezer, nor where there is no group and signals have to do."""
    if memory:
        needs("memory", "freezer")
    limit, pause = 0.4 * SLOW, 0.7 * SLOW

    async def main() -> None:
        async with aio.Sandbox(spec(memory=memory)) as sandbox:
            assert (await sandbox.exec(load())).ok
            began = time.monotonic()
            task = asyncio.create_task(ended(sandbox))
            await asyncio.sleep(0.1 * SLOW)
            paused = await frozen_for(sandbox, pause)
            assert not task.done()
            done = await task
            assert (done.cause, done.returncode) == (Cause.TIMEOUT, -signal.SIGKILL), done
            assert time.monotonic() - began >= limit + paused - 0.05
            # and where it needs less than that, it may
            task = asyncio.create_task(sandbox.exec(["sh", "-c", "sleep 0.1"], timeout=limit))
            await asyncio.sleep(0)
            await frozen_for(sandbox, pause)
            assert (await task).cause is Cause.EXITED

    async def ended(sandbox: aio.Sandbox) -> ExecResult:
        if way == "exec":
            return await sandbox.exec(load("hold"), timeout=limit)
        if way == "wall_time":
            return await sandbox.exec(load("hold"), limits=Limits(wall_time=limit))
        if way == "popen":
            async with await sandbox.popen(load("hold"), timeout=limit) as process:
                await process.wait()
            assert process.result is not None
            return process.result
        async with await sandbox.detach(load("hold"), timeout=limit) as command:
            return await command.wait(PATIENCE)

    play(main(), PATIENCE)


@in_vm_too
@pytest.mark.parametrize("end", ["close", "stop", "kill"])
def test_the_end_of_a_frozen_one(end: str) -> None:
    needs("memory", "freezer")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="64M")) as sandbox:
            task = asyncio.create_task(sandbox.exec(load("fork", 2, "spin"), timeout=PATIENCE))
            process = await started(sandbox, "spin")
            await sandbox.suspend()
            group = group_of(sandbox)
            if end == "kill":
                os.kill(sandbox.pid, signal.SIGKILL)
                if cgroup.layout().freezer == 1:  # a frozen process cannot even die
                    group.thaw(0)
            else:
                await getattr(sandbox, end)()
            done = await task
            assert (done.cause, done.returncode) == (Cause.KILLED, -signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
            process.close()
        await condition(lambda: not any(place.exists() for place in group.places()), "its end", PATIENCE)

    play(main(), PATIENCE)


def test_cancelled_while_it_is_frozen() -> None:
    """The command is killed when the sandbox goes on, which stays."""
    needs("memory", "freezer")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="64M")) as sandbox:
            assert (await sandbox.exec(load())).ok
            name = f"frozen-{os.getpid()}-{time.monotonic_ns()}"
            task = asyncio.create_task(sandbox.exec(load("#", name, "spin")))
            await condition(lambda: marked(name), "the command", PATIENCE)
            await sandbox.suspend()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert sandbox.state is SandboxState.PAUSED
            await sandbox.resume()
            await condition(lambda: not marked(name), "the end of the command", PATIENCE)
            assert (await sandbox.exec(load())).ok

    play(main(), PATIENCE)


class Reluctant:
    """A freezer that needs some attempts; how many it had."""

    def __init__(self, patch: pytest.MonkeyPatch, successes_after: float) -> None:
        self.attempts = 0
        real = aio_loop._stands_still

        def stands_still(group: cgroup.Group) -> bool:
            self.attempts += 1
            return self.attempts > successes_after and real(group)

        patch.setattr(aio_loop, "_stands_still", stands_still)


@contextlib.asynccontextmanager
async def a_sandbox(tmp_path: Path, *, persistent: bool) -> AsyncIterator[aio.Sandbox]:
    """One that is yet to start, and destroyed at the end."""
    described = spec(memory="64M")
    if persistent:
        sandbox: aio.Sandbox = aio.PersistentSandbox(described, name="box", state_dir=tmp_path)
    else:
        sandbox = aio.Sandbox(described)
    try:
        yield sandbox
    finally:
        await sandbox.destroy()


persistent_too = pytest.mark.parametrize("persistent", [False, True])


@persistent_too
def test_the_loop_goes_on_while_it_freezes(
    persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And who is cancelled then has suspended it: the state says so."""
    needs("memory", "freezer")

    async def main() -> None:
        async with a_sandbox(tmp_path, persistent=persistent) as sandbox:
            await sandbox.start()
            for cancel in (False, True):
                freezer = Reluctant(monkeypatch, 6)
                turns = 0
                task = asyncio.create_task(sandbox.suspend())
                while not task.done():
                    turns += 1
                    if cancel and turns == 4:
                        task.cancel()
                    await asyncio.sleep(0)
                assert turns > 10
                assert freezer.attempts >= 7
                assert task.cancelled() == cancel
                assert (sandbox.state, group_of(sandbox).frozen) == (SandboxState.PAUSED, True)
                await sandbox.resume()
                assert (sandbox.state, group_of(sandbox).frozen) == (SandboxState.RUNNING, False)
                monkeypatch.undo()
            assert (await sandbox.exec(load())).ok

    play(main(), PATIENCE)


@persistent_too
@pytest.mark.parametrize("cancel", [False, True])
def test_a_freezer_that_does_not_get_there(
    persistent: bool, cancel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sandbox runs on, and its clocks with it."""
    needs("memory", "freezer")

    def never(group: cgroup.Group, timeout: float) -> None:
        group.thaw(timeout)
        raise SetupError("cgroup", 110, subject=f"freeze {group.relative}")

    async def main() -> None:
        async with a_sandbox(tmp_path, persistent=persistent) as sandbox:
            await sandbox.start()
            with monkeypatch.context() as patch:
                Reluctant(patch, float("inf"))
                patch.setattr(aio_loop, "ANSWER_PATIENCE", 0.05)
                patch.setattr(cgroup.Group, "freeze", never)
                task = asyncio.create_task(sandbox.suspend())
                if cancel:
                    await asyncio.sleep(0.02)
                    task.cancel()
                with pytest.raises(asyncio.CancelledError if cancel else SetupError):
                    await task
            assert (sandbox.state, group_of(sandbox).frozen) == (SandboxState.RUNNING, False)
            assert not sandbox._own._link_now().pause.paused
            assert (await sandbox.exec(load("hold"), timeout=0.1)).cause is Cause.TIMEOUT

    play(main(), PATIENCE)


# --- usage and update -----------------------------------------------------------------------------------


def test_usage() -> None:
    needs("memory")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="200M")) as sandbox:
            process = await started(sandbox, "alloc", 50 * MiB, "say", "there", "hold")
            assert process.stdout is not None
            assert await process.stdout.readline() == b"there\n"
            usage = sandbox.usage()
            assert isinstance(usage, sandboxcore.GroupUsage)
            assert usage.memory == pytest.approx(50 * MiB, rel=0.1)
            assert usage.memory_peak >= 50 * MiB
            process.kill()
            await process.wait()
            process.close()
            await sandbox.stop()
            with pytest.raises(sandboxcore.SandboxGone):
                sandbox.usage()
        async with aio.Sandbox() as sandbox:
            with pytest.raises(SpecError, match="accounting"):
                sandbox.usage()

    play(main(), PATIENCE)


@in_vm_too
@persistent_too
def test_update(persistent: bool, tmp_path: Path) -> None:
    needs("memory", "pids")

    async def main() -> None:
        async with a_sandbox(tmp_path, persistent=persistent) as sandbox:
            changed = await sandbox.update(cpu_time=50)
            assert (changed["cpu_time"].value, changed["cpu_time"].applies) == (50, "next start")
            await sandbox.start()
            changed = await sandbox.update(memory="100M", pids=20, wall_time=0.5)
            assert {name: change.applies for name, change in changed.items()} == {
                "memory": "now",
                "pids": "now",
                "wall_time": "next command",
            }
            assert (changed["memory"].before, changed["memory"].value) == (64 * MiB, 100 * MiB)
            assert (sandbox.spec.limits.wall_time, sandbox.spec.limits.cpu_time) == (0.5, 50)
            assert groups.limits_of(group_of(sandbox))["memory"] == 100 * MiB
            assert (await sandbox.exec(load("hold"))).cause is Cause.TIMEOUT
            await sandbox.update(wall_time=None)
            done = await sandbox.exec(load("bomb", "exit", 3), timeout=PATIENCE)
            assert (done.cause, done.returncode) == (Cause.PIDS, 3)
            before = sandbox.spec
            for wrong, error in (
                ({"memory": "50M", "disk": "1M"}, SpecError),
                ({"memory": "50M", "nonsense": 1}, SpecError),
                ({"memory": "50M", "wall_time": -1}, SpecError),
            ):
                with pytest.raises(error):
                    await sandbox.update(**wrong)
                assert (sandbox.spec, groups.limits_of(group_of(sandbox))["memory"]) == (before, 100 * MiB)

    play(main(), PATIENCE)


@in_vm_too
def test_update_of_what_runs() -> None:
    """A bomb that was let grow is met by the limit that comes now."""
    needs("memory")

    async def main() -> None:
        async with aio.Sandbox(spec(memory="300M")) as sandbox:
            process = await started(sandbox, "alloc", 40 * MiB, "go", "alloc", 60 * MiB, "hold")
            await condition(lambda: (sandbox.usage().memory or 0) > 40 * MiB, "its memory", PATIENCE)
            await sandbox.update(memory="80M")
            assert process.stdin is not None
            process.stdin.write(b"g")
            assert await process.wait() == -signal.SIGKILL
            assert process.result is not None
            assert process.result.cause is Cause.OOM
            process.close()
            assert (await sandbox.exec(load("alloc", 60 * MiB), timeout=PATIENCE)).ok

    play(main(), PATIENCE)


def test_update_without_a_group() -> None:
    async def main() -> None:
        async with aio.Sandbox() as sandbox:
            with pytest.raises(UnsupportedHost, match=r"limits\.memory"):
                await sandbox.update(memory="50M")
            changed = await sandbox.update(open_files=50)
            assert changed["open_files"].applies == "next command"
            assert (await sandbox.shell("ulimit -n")).stdout == b"50\n"

    play(main(), PATIENCE)


def test_update_waits_for_its_turn_and_may_be_cancelled(tmp_path: Path) -> None:
    """Nothing has changed then, and nothing waits for ever."""
    needs("memory")

    async def main() -> None:
        box = await aio.PersistentSandbox.create(spec(memory="64M"), state_dir=tmp_path)
        async with box._changing():
            task = asyncio.create_task(box.update(memory="32M"))
            await asyncio.sleep(0.05)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert groups.limits_of(group_of(box))["memory"] == 64 * MiB
        assert (await box.update(memory="32M"))["memory"].value == 32 * MiB
        await box.destroy()

    play(main(), PATIENCE)


# --- persistent -----------------------------------------------------------------------------------------


@in_vm_too
def test_the_group_of_a_persistent_one_is_found_again(tmp_path: Path) -> None:
    needs("memory", "freezer")

    async def main() -> None:
        async with a_sandbox(tmp_path, persistent=True) as maker:
            await maker.start()
            await look(maker)

    async def look(maker: aio.Sandbox) -> None:
        box = await aio.PersistentSandbox.connect("box", state_dir=tmp_path)
        other = await aio.PersistentSandbox.connect("box", state_dir=tmp_path)
        assert group_of(box) == group_of(other)
        task = asyncio.create_task(box.exec(load("hold"), timeout=0.5 * SLOW))
        await asyncio.sleep(0.1)
        await other.suspend()
        assert (box.state, group_of(box).frozen) == (SandboxState.PAUSED, True)
        await asyncio.sleep(0.8 * SLOW)
        assert not task.done()
        await other.resume()
        assert (await task).cause is Cause.TIMEOUT
        assert other.usage().memory_peak
        assert (await other.update(memory="32M"))["memory"].applies == "now"
        assert (await box.exec(load("alloc", 50 * MiB), timeout=PATIENCE)).cause is Cause.OOM
        places = group_of(box).places()
        await box.stop()
        await condition(lambda: not any(place.exists() for place in places), "the end of its group", PATIENCE)
        await other.start()
        places = group_of(other).places()
        os.kill(other.pid, signal.SIGKILL)
        await condition(lambda: other.state is SandboxState.STOPPED, "its end", PATIENCE)
        await condition(lambda: not any(place.exists() for place in places), "the end of its group", PATIENCE)
        await maker.start()
        assert group_of(maker).places() != places
        await box.close()
        await other.close()

    play(main(), PATIENCE)


@in_vm_too
def test_a_frozen_persistent_one_is_destroyed(tmp_path: Path) -> None:
    needs("memory", "freezer")

    async def main() -> None:
        box = await aio.PersistentSandbox.create(spec(memory="64M"), state_dir=tmp_path)
        process = await started(box, "fork", 2, "spin")
        await box.suspend()
        pid = box.pid
        await box.destroy()
        assert gone(pid)
        with contextlib.suppress(ValueError):
            await process.wait()
        process.close()

    play(main(), PATIENCE)


@in_vm_too
@persistent_too
def test_suspend_and_resume_cancelled_at_every_turn(persistent: bool, tmp_path: Path) -> None:
    """Whatever has become of it, the state says it."""
    needs("memory", "freezer")

    async def main() -> None:
        async with a_sandbox(tmp_path, persistent=persistent) as sandbox:
            await sandbox.start()
            for turns in range(12 if not IN_VM else 5):
                for action in (sandbox.suspend, sandbox.resume):
                    if (sandbox.state is SandboxState.PAUSED) == (action == sandbox.resume):
                        await cancelled_after(turns, action())
                    paused = sandbox.state is SandboxState.PAUSED
                    assert group_of(sandbox).frozen == paused
                    assert sandbox._own._link_now().pause.paused == paused
            if sandbox.state is SandboxState.PAUSED:
                await sandbox.resume()
            assert (await sandbox.exec(load())).ok

    play(main(), PATIENCE)
