"""Sandbox.update(): on what runs already, on what comes next; all of it or nothing."""

import os
import time
from pathlib import Path

import pytest
from resources import (
    PATIENCE,
    MiB,
    box,
    cpu,
    in_force,
    let_go,
    load,
    meanwhile,
    needs,
    spec,
    started,
    version,
    within,
)
from support import host_program, wait_until

from sandboxcore import Cause, Sandbox, SetupError, SpecError, UnsupportedHost
from sandboxcore.persistent import PersistentSandbox

pytestmark = pytest.mark.cgroup


def test_a_memory_bomb_that_runs() -> None:
    needs("memory")
    with box(memory="512M") as sandbox:
        ours, theirs = os.pipe()
        bomb = load("alloc", 16 * MiB, "go", "alloc", 200 * MiB)
        with meanwhile(lambda: sandbox.exec(bomb, stdin=ours, timeout=PATIENCE)) as ends:
            wait_until(lambda: (sandbox.usage().memory or 0) > 15 * MiB, "the first of it", PATIENCE)
            change = sandbox.update(memory="64M")["memory"]
            assert (change.before, change.value, change.applies) == (512 * MiB, 64 * MiB, "now")
            os.write(theirs, b"g")
        os.close(ours)
        os.close(theirs)
        [done] = ends
        assert done.cause is Cause.OOM, done
        assert "limits.memory: 64 MiB, peak " in done.detail
        assert (done.usage.memory_peak or 0) <= 64 * MiB
        assert sandbox.update(memory="512M")["memory"].before == 64 * MiB
        assert within(sandbox, "exec", load("alloc", 200 * MiB)).ok


def test_below_what_is_in_use() -> None:
    """Version 2 kills, version 1 refuses and then nothing has changed."""
    needs("memory", "pids")
    with box(memory="512M", pids=50) as sandbox:
        with started(sandbox, "alloc", 100 * MiB, "say", "ready", "go") as bomb:
            if version("memory") == 2:
                sandbox.update(memory="32M")
                bomb.wait(PATIENCE)
                assert bomb.result is not None
                assert bomb.result.cause is Cause.OOM
                assert sandbox.spec.limits.memory == 32 * MiB
                return
            with pytest.raises(SetupError, match="limits.memory.*EBUSY.*cannot be reclaimed"):
                sandbox.update(pids=20, memory="32M")
            assert (in_force(sandbox)["memory"], sandbox.spec.limits.memory) == (512 * MiB, 512 * MiB)
            assert sandbox.spec.limits.pids == 50
            assert let_go(bomb).ok


def test_a_fork_bomb_that_runs() -> None:
    """A command that is under way, in whose launcher's group the limit is, too."""
    needs("memory", "pids")
    with (
        box(memory="256M", pids=200) as sandbox,
        started(sandbox, "say", "ready", "go", "bomb", "exit", 3) as bomb,
    ):
        assert sandbox.update(pids=20)["pids"].applies == "now"
        done = let_go(bomb)
        assert (done.cause, done.returncode, done.usage.pids_peak) == (Cause.PIDS, 3, 20), done
        assert done.detail.startswith("limits.pids: 20, ")
        sandbox.update(pids=40)
        more = within(sandbox, "exec", load("fork", 39, "exit", 0))
        assert (more.cause, more.returncode) == (Cause.EXITED, 0), more
        assert within(sandbox, "exec", load("bomb", "exit", 3)).cause is Cause.PIDS


@pytest.mark.slow
def test_cpus_of_a_command_that_spins() -> None:
    needs("cpu")

    def throttled() -> float:
        return sandbox.usage().cpu_throttled or 0.0

    def spent(seconds: float) -> float:
        began, before = time.monotonic(), cpu(sandbox.usage())
        time.sleep(seconds)
        return (cpu(sandbox.usage()) - before) / (time.monotonic() - began)

    with box(accounting=True, cpus=2) as sandbox, started(sandbox, "say", "ready", "spin"):
        assert throttled() == 0
        assert sandbox.update(cpus=0.2)["cpus"].value == pytest.approx(0.2)
        assert spent(1.5) < 0.3
        assert throttled() > 0
        assert sandbox.update(cpus=None)["cpus"].value is None
        before = throttled()
        assert spent(0.5) > 0.3
        assert throttled() - before < 0.2


def test_cpuset_of_a_command_that_runs() -> None:
    needs("cpuset")
    every = sorted(os.sched_getaffinity(0))
    if len(every) < 2:
        pytest.skip("this machine has one CPU only")
    with box(cpuset=str(every[0])) as sandbox, started(sandbox, "say", "ready", "hold") as process:
        host_pid = process.pid
        assert os.sched_getaffinity(host_pid) == {every[0]}
        assert sandbox.update(cpuset=str(every[1]))["cpuset"].applies == "now"
        assert os.sched_getaffinity(host_pid) == {every[1]}
        assert within(sandbox, "exec", ["sh", "-c", "exit $(nproc)"]).returncode == 1


def test_io_of_a_sandbox_that_runs(tmp_path: Path) -> None:
    needs("io")
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip(f"{tmp_path} is not on a disk")
    tmp_path.chmod(0o755)
    write = load("direct", "/disk/file", 8 * MiB)
    with box(io="1000G", rw=[(tmp_path, "/disk")]) as sandbox:
        assert within(sandbox, "exec", write).ok
        assert sandbox.update(io="4M")["io"].value == 4 * MiB
        slow = within(sandbox, "exec", write)
        assert slow.ok
        assert slow.duration >= 1.6


def test_cpu_weight_and_swap() -> None:
    needs("cpu", "memory", "swap")
    with box(memory="64M", cpu_weight=100) as sandbox:
        sandbox.update(cpu_weight=20, swap="16M")
        assert (in_force(sandbox)["cpu_weight"], in_force(sandbox)["swap"]) == (20, 16 * MiB)


def test_what_holds_for_the_next_command() -> None:
    """Limits of processes, and the clocks; this needs no group."""
    with Sandbox.create(spec()) as sandbox:
        with started(sandbox, "say", "ready", "go", "exit", 5) as running:
            changes = sandbox.update(wall_time=0.5, open_files=40, file_size="64K", output="1K", cpu_time=30)
            assert {change.applies for change in changes.values()} == {"next command"}
            assert changes["open_files"].before == 65536
            assert let_go(running).returncode == 5
        assert within(sandbox, "exec", load("hold")).cause is Cause.TIMEOUT
        sandbox.update(wall_time=None)
        assert within(sandbox, "exec", ["sh", "-c", "ulimit -n"]).stdout == b"40\n"
        assert within(sandbox, "exec", load("keep", "/tmp/file", MiB)).cause is Cause.DISK
        assert within(sandbox, "exec", ["head", "-c", "4096", "/dev/zero"]).truncated
        sandbox.update(file_size=None, output=None)
        assert within(sandbox, "exec", load("keep", "/tmp/file", MiB)).ok
        assert not within(sandbox, "exec", ["head", "-c", "4096", "/dev/zero"]).truncated


def test_cpu_time_of_the_next_command() -> None:
    needs("memory", "cpu")
    with box(accounting=True) as sandbox:
        assert sandbox.update(cpu_time=0.3)["cpu_time"].applies == "next command"
        done = within(sandbox, "exec", load("fork", 3, "spin"))
        assert done.cause is Cause.CPU_TIME, done
        assert done.detail.startswith("limits.cpu_time: 0.3 s, used 0.")


def test_all_or_nothing() -> None:
    needs("memory", "pids")
    with box(memory="256M", pids=50) as sandbox:
        before = in_force(sandbox)
        for wrong, error in (
            ({"pids": -1}, SpecError),
            ({"nothing": 1}, SpecError),
            ({"disk": "1G"}, SpecError),
            ({"cpuset": "0"}, UnsupportedHost),  # it was started without that controller
        ):
            with pytest.raises(error, match=f"limits.{next(iter(wrong))}"):
                sandbox.update(memory="128M", open_files=99, **wrong)
            assert in_force(sandbox) == before
            assert (sandbox.spec.limits.memory, sandbox.spec.limits.open_files) == (256 * MiB, 65536)


def test_a_cpu_that_there_is_not_changes_nothing() -> None:
    needs("memory", "cpuset")
    first = str(min(os.sched_getaffinity(0)))
    with box(memory="256M", cpuset=first) as sandbox:
        with pytest.raises(UnsupportedHost, match="limits.cpuset '4000'"):
            sandbox.update(memory="128M", cpuset="4000")
        assert (in_force(sandbox)["memory"], in_force(sandbox)["cpuset"]) == (256 * MiB, first)


def test_io_that_nothing_would_meet() -> None:
    """Version 1 throttles each group by itself: those of commands, where no limit was asked for."""
    needs("memory", "io")
    with box(accounting=True) as sandbox:
        if version("io") == 2:
            assert sandbox.update(io="8M")["io"].applies == "now"
        else:
            with pytest.raises(UnsupportedHost, match="limits.io of a sandbox that was started without one"):
                sandbox.update(io="8M")
            assert sandbox.spec.limits.io is None


def test_without_a_group() -> None:
    with Sandbox.create(spec()) as sandbox:
        with pytest.raises(
            UnsupportedHost, match="limits.memory of a sandbox without a control group.*accounting"
        ):
            sandbox.update(memory="64M")
        assert sandbox.update(pids=5)["pids"].applies == "next command"
        assert within(sandbox, "exec", load("fork", 8, "hold")).returncode == 111


def test_before_the_start_and_after_a_stop() -> None:
    needs("memory")
    sandbox = Sandbox(spec(memory="256M"))
    try:
        assert sandbox.update(memory="128M")["memory"].applies == "next start"
        sandbox.start()
        assert in_force(sandbox)["memory"] == 128 * MiB
        sandbox.stop()
        assert sandbox.update(memory="64M", disk="32M")["disk"].applies == "next start"
        sandbox.start()
        assert in_force(sandbox)["memory"] == 64 * MiB
        assert within(sandbox, "exec", load("keep", "/tmp/file", 40 * MiB)).returncode == 111
    finally:
        sandbox.close()


@pytest.mark.slow
def test_of_a_persistent_sandbox_by_another_process(tmp_path: Path) -> None:
    needs("memory")
    state = tmp_path / "state"
    sandbox = PersistentSandbox.create(spec(memory="256M"), name="kept", state_dir=state)
    try:
        code = """
            import sys
            from sandboxcore import PersistentSandbox
            box = PersistentSandbox.connect("kept", state_dir=sys.argv[1])
            print(box.update(memory="64M", open_files=50)["memory"])
            print(box.usage().memory_peak > 0)
        """
        done = host_program(code, str(state), timeout=PATIENCE)
        assert (done.returncode, done.stdout.splitlines()[1:]) == (0, ["True"]), done
        assert f"before={256 * MiB}, value={64 * MiB}, applies='now'" in done.stdout
        again = PersistentSandbox.connect("kept", state_dir=state)
        assert again.spec.limits.memory == 64 * MiB
        assert in_force(again)["memory"] == 64 * MiB
        assert within(again, "exec", ["sh", "-c", "ulimit -n"]).stdout == b"50\n"
        assert within(sandbox, "exec", ["sh", "-c", "ulimit -n"]).stdout == b"50\n"  # the first handle knows
        assert sandbox.update(open_files=60)["open_files"].before == 50
        assert (again.update(pids=30)["pids"].value, sandbox.spec.limits.memory) == (30, 64 * MiB)
        assert (sandbox.state, sandbox.spec) == ("running", again.spec)
        assert within(again, "exec", load("alloc", 100 * MiB)).cause is Cause.OOM
    finally:
        sandbox.destroy()
