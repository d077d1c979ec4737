"""Nothing is left: no control group after an end, whoever ended it, and however."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from resources import (
    PATIENCE,
    MiB,
    box,
    groups_of,
    groups_of_sandbox,
    load,
    needs,
    populated,
    spec,
    started,
    within,
)
from support import gone, host_environment, host_process, host_program, kill_spawners, wait_until

import sandboxcore
from sandboxcore import ProgramNotFound, Sandbox, SandboxError, SandboxSpec, aio
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import gc

pytestmark = pytest.mark.cgroup


def no_groups(find: Callable[[], list[Path]]) -> None:
    """They go at once, or with the last of their processes."""
    wait_until(lambda: not find(), f"the end of {find()}", PATIENCE)


def run_groups() -> set[str]:
    """Names of the groups that are there for runs."""
    return {path.name for path in groups_of(os.getpid(), "run-")}


def test_after_close_and_stop() -> None:
    needs("memory")
    with box(memory="64M") as sandbox:
        sandbox.exec(["true"])
        assert groups_of_sandbox(sandbox) != []
        sandbox.stop()
        no_groups(lambda: groups_of_sandbox(sandbox))
        sandbox.start()
        assert groups_of_sandbox(sandbox) != []
    no_groups(lambda: groups_of_sandbox(sandbox))


def test_after_close_with_commands_that_run() -> None:
    needs("memory", "pids")
    with box(memory="256M", pids=50) as sandbox, started(sandbox, "say", "ready", "bomb", "hold"):
        sandbox.detach(load("fork", 3, "hold"))
        sandbox.close()
        no_groups(lambda: groups_of_sandbox(sandbox))


def test_after_an_init_that_was_killed() -> None:
    needs("memory")
    with box(memory="64M") as sandbox, started(sandbox, "say", "ready", "hold"):
        os.kill(sandbox.pid, signal.SIGKILL)
        wait_until(lambda: gone(sandbox.pid), "the end of init", PATIENCE)
        sandbox.close()
        no_groups(lambda: groups_of_sandbox(sandbox))


@pytest.mark.parametrize("action", ["destroy", "archive", "start"])
@pytest.mark.parametrize("on_loop", [False, True])
def test_found_dead_by_who_works_on_it(tmp_path: Path, action: str, on_loop: bool) -> None:
    """Nobody has looked since it was killed: the first to do so has its lock already."""
    needs("memory")
    described, state = spec(memory="64M"), tmp_path / "state"
    with PersistentSandbox.create(described, name="box", state_dir=state) as sandbox:
        (before,) = {path.name for path in groups_of_sandbox(sandbox)}
        os.kill(sandbox.pid, signal.SIGKILL)
        wait_until(lambda: not sandbox._link.alive(), "the end of init", PATIENCE)
        if on_loop:
            asyncio.run(asyncio.wait_for(act(state, action), PATIENCE))
        else:
            getattr(sandbox, action)()
        wait_until(
            lambda: before not in {path.name for path in groups_of_sandbox(sandbox)}, "its end", PATIENCE
        )
        assert action == "start" or groups_of_sandbox(sandbox) == []
        sandbox.destroy()


async def act(state: Path, action: str) -> None:
    async with await aio.PersistentSandbox.connect("box", state_dir=state) as sandbox:
        await getattr(sandbox, action)()


def test_after_a_start_that_failed() -> None:
    """Of a sandbox that has too little memory for its init, and of a command that there is not."""
    needs("memory")
    before = set(groups_of(os.getpid(), "sbx-"))
    sandbox = Sandbox(SandboxSpec(limits=sandboxcore.Limits(memory=4096)))
    with pytest.raises(SandboxError):
        sandbox.start()
    no_groups(lambda: groups_of_sandbox(sandbox))
    runs = run_groups()
    for _ in range(20):
        with pytest.raises(ProgramNotFound):
            sandboxcore.run(["/no/such/program"], spec=spec(memory="44M"))
    wait_until(lambda: len(run_groups() - runs) <= 3, "groups for runs, but not many", PATIENCE)
    assert set(groups_of(os.getpid(), "sbx-")) <= before


@pytest.mark.slow
def test_runs_share_a_few_groups() -> None:
    needs("memory")
    described, runs = spec(memory="46M"), run_groups()
    for _ in range(12):
        assert sandboxcore.run(load("alloc", MiB), spec=described, timeout=PATIENCE).ok
    wait_until(lambda: len(run_groups() - runs) <= 3, "groups for runs, but not many", PATIENCE)


def test_after_the_end_of_a_spawner() -> None:
    """Its sandboxes end with it; the next is of another."""
    needs("memory")
    with box(memory="64M") as sandbox:
        kill_spawners()
        with box(memory="64M") as next_one:
            assert within(next_one, "exec", load("alloc", MiB)).ok
    no_groups(lambda: groups_of_sandbox(sandbox) + groups_of_sandbox(next_one))


LIVE = """
    import sys, time
    from resources import load, spec
    from sandboxcore import Sandbox, run
    box = Sandbox.create(spec(memory="64M"))
    run(["true"], spec=spec(memory="64M"))
    box.detach(load("fork", 3, "hold"))
    print("ready", flush=True)
    {rest}
"""


@pytest.mark.slow
def test_after_a_host_process_that_ends() -> None:
    """Also when it closes nothing."""
    needs("memory")
    code = textwrap.dedent(LIVE).format(rest="import os; print(os.getpid())")
    done = host_program(code, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    no_groups(lambda: groups_of(int(done.stdout.split()[1])))


def orphaned_groups() -> int:
    """The pid of a host process that was killed; its groups are still there."""
    code = textwrap.dedent(LIVE).format(rest="time.sleep(600)")
    with host_process(code) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "ready\n"
        assert groups_of(host.pid, "sbx-") != []
        host.kill()
        host.wait(PATIENCE)
    assert groups_of(host.pid) != []
    return host.pid


def emptied(pid: int) -> bool:
    """Whether no process is left in what a process has made."""
    return not any(map(populated, groups_of(pid)))


def test_after_a_host_process_that_was_killed() -> None:
    """The next process of the same user tidies up when it needs groups itself."""
    needs("memory")
    pid = orphaned_groups()
    wait_until(lambda: emptied(pid), "the end of its sandbox", PATIENCE)
    code = """
        from resources import spec
        import sandboxcore
        print(sandboxcore.run(["true"], spec=spec(memory="64M")).returncode)
    """
    done = host_program(code, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, "0\n"), done
    no_groups(lambda: groups_of(pid))


@pytest.mark.slow
def test_gc_removes_groups(tmp_path: Path) -> None:
    needs("memory")
    pid = orphaned_groups()
    wait_until(lambda: emptied(pid), "the end of its sandbox", PATIENCE)
    would = gc(tmp_path / "state", dry_run=True).groups
    assert any(f"/host-{pid}-" in path for path in would)
    assert groups_of(pid) != []
    assert any(f"/host-{pid}-" in path for path in gc(tmp_path / "state").groups)
    assert groups_of(pid) == []


@pytest.mark.slow
def test_a_persistent_sandbox_keeps_its_group(tmp_path: Path) -> None:
    """As long as it lives, whatever becomes of its maker; its limits hold meanwhile."""
    needs("memory")
    state = tmp_path / "state"
    code = """
        import os, sys
        from resources import spec
        from sandboxcore import PersistentSandbox
        PersistentSandbox.create(spec(memory="64M"), name="kept", state_dir=sys.argv[1])
        print(os.getpid(), flush=True)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(state)]
    made = subprocess.run(command, capture_output=True, text=True, env=host_environment(), timeout=PATIENCE)
    assert made.returncode == -signal.SIGKILL, made.stderr
    pid = int(made.stdout)
    box = PersistentSandbox.connect("kept", state_dir=state)
    try:
        gc(state)
        assert groups_of(pid, f"{box.id}.") != []
        assert (box.usage().memory_peak or 0) > 0
        assert within(box, "exec", load("alloc", 100 * MiB)).cause == "oom"
    finally:
        box.destroy()
    no_groups(lambda: groups_of(pid))
