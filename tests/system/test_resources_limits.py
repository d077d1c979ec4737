"""Limits of control groups act: memory, swap, processes, CPU time, disks, CPUs."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from resources import (
    IN_VM,
    LIVING,
    PATIENCE,
    WAYS,
    MiB,
    box,
    cpu,
    groups_of,
    in_force,
    load,
    meanwhile,
    needs,
    perform,
    spec,
    started,
    version,
    within,
)
from support import marked, wait_until

import sandboxcore
from sandboxcore import Cause, Limits, Sandbox, SandboxSpec, UnsupportedHost
from sandboxcore.cgroup_files import read

pytestmark = pytest.mark.cgroup
every_living_way = pytest.mark.parametrize("way", LIVING)
every_way = pytest.mark.parametrize("way", WAYS)

FLOOD = str(200 * MiB)


@pytest.fixture
def mark(tmp_path: Path) -> str:
    """What the list of processes shows of a command of this test only."""
    return f"mark-{os.getpid()}-{tmp_path.name}-{time.monotonic_ns()}"


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, str]:
    """A directory on a real disk, and where a sandbox has it."""
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip(f"{tmp_path} is not on a disk")
    tmp_path.chmod(0o755)
    return tmp_path, "/disk"


# --- memory -------------------------------------------------------------------------------------------


@every_way
def test_a_memory_bomb(way: str, mark: str) -> None:
    """All of the command goes, not only whom the kernel chose, and the message has the numbers."""
    needs("memory")
    bomb = load("#", mark, "fork", 3, "alloc", 8 * MiB, "alloc", FLOOD)
    done = perform(way, bomb, spec(memory="64M"))
    assert (done.cause, done.returncode) == (Cause.OOM, -9), done
    assert "limits.memory: 64 MiB, peak " in done.detail
    assert done.usage.oom_kills is not None
    assert done.usage.memory_peak is not None
    assert 50 * MiB < done.usage.memory_peak <= 65 * MiB  # who is dying may have a little more
    assert marked(mark) == set()


@every_living_way
def test_the_sandbox_goes_on_after_a_memory_bomb(way: str) -> None:
    needs("memory")
    with box(memory="64M") as sandbox, started(sandbox, "say", "ready", "go") as other:
        for _ in range(2):
            assert within(sandbox, way, load("alloc", FLOOD)).cause is Cause.OOM
            good = within(sandbox, way, load("alloc", 16 * MiB))
            assert (good.cause, good.returncode, good.usage.oom_kills) == (Cause.EXITED, 0, 0), good
        assert other.poll() is None
        other.stdin.write(b"g")
        assert other.wait(PATIENCE) == 0


@every_living_way
def test_the_sandbox_goes_on_when_files_have_filled_its_memory(way: str) -> None:
    """What was killed for it frees nothing: then the next commands have what the sandbox has for itself."""
    needs("memory")
    with box(memory="48M", disk="256M") as sandbox:
        done = within(sandbox, way, ["dd", "if=/dev/zero", "of=/tmp/file", "bs=1M", "count=100"])
        assert (done.cause, done.returncode) == (Cause.OOM, -9), done
        assert done.usage.oom_kills, "its launcher has told"
        for _ in range(3):
            assert within(sandbox, way, load("exit", 0)).ok
        assert within(sandbox, way, ["rm", "/tmp/file"]).ok
        assert within(sandbox, way, load("alloc", 24 * MiB)).ok


@every_way
def test_what_fits_is_left_alone(way: str) -> None:
    needs("memory")
    done = perform(way, load("alloc", 48 * MiB), spec(memory="64M"))
    assert (done.cause, done.returncode, done.detail) == (Cause.EXITED, 0, "")


@every_way
def test_many_small_processes_exceed_memory_together(way: str, mark: str) -> None:
    needs("memory")
    done = perform(way, load("#", mark, "fork", 16, "alloc", 8 * MiB, "hold"), spec(memory="64M"))
    assert (done.cause, done.returncode) == (Cause.OOM, -9), done
    assert marked(mark) == set()


@pytest.mark.parametrize("way", ["run", "exec"])
def test_files_in_memory_count(way: str) -> None:
    needs("memory")
    done = perform(way, load("keep", "/tmp/file", FLOOD), spec(memory="64M"))
    assert (done.cause, done.returncode) == (Cause.OOM, -9), done


def test_swap_is_none_where_memory_is_limited() -> None:
    needs("memory", "swap")
    with box(memory="64M") as sandbox:
        assert in_force(sandbox)["swap"] == 0
    with box(memory="64M", swap="32M") as sandbox:
        assert in_force(sandbox)["swap"] == 32 * MiB


def test_swap() -> None:
    """As much as it may have; then it is out of memory, too."""
    needs("memory", "swap")
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("this machine has no swap: swapon(8)")
    with box(memory="32M", swap="64M") as sandbox:
        with started(sandbox, "alloc", 64 * MiB, "say", "ready", "hold"):
            assert (sandbox.usage().swap or 0) > 24 * MiB
        assert within(sandbox, "exec", load("alloc", FLOOD)).cause is Cause.OOM


# --- processes ----------------------------------------------------------------------------------------


@every_way
def test_a_fork_bomb(way: str, mark: str) -> None:
    needs("memory", "pids")
    done = perform(way, load("#", mark, "bomb", "exit", 7), spec(memory="256M", pids=50))
    assert (done.cause, done.returncode) == (Cause.PIDS, 7), done
    assert done.detail.startswith("limits.pids: 50, ")
    assert (done.usage.pids_refused or 0) >= 1
    assert marked(mark) == set()


@pytest.mark.parametrize("way", ["run", "exec"])
def test_the_host_stays_usable_under_a_fork_bomb(way: str, mark: str) -> None:
    needs("memory", "pids")
    described = spec(memory="256M", pids=60)
    with meanwhile(
        lambda: perform(way, load("#", mark, "bomb", "hold"), described, timeout=PATIENCE)
    ) as ends:
        wait_until(lambda: len(marked(mark)) >= 60 or ends, "a full sandbox", PATIENCE)
        assert len(marked(mark)) == 60
        assert subprocess.run(["true"], timeout=PATIENCE).returncode == 0
        assert sandboxcore.run(load("fork", 20, "exit", 0), spec=described, timeout=PATIENCE).ok
        for pid in marked(mark):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
    assert ends[0].returncode == -9


def test_as_many_processes_as_it_may_have() -> None:
    """One less does not count as a refusal, one more does; the sandbox's own are nobody's."""
    needs("memory", "pids")
    with box(memory="256M", pids=10) as sandbox:
        fits = sandbox.exec(load("fork", 9, "exit", 0))
        assert (fits.cause, fits.usage.pids_refused, fits.returncode) == (Cause.EXITED, 0, 0), fits
        assert sandbox.exec(load("fork", 10, "hold"), timeout=PATIENCE).cause is Cause.PIDS


# --- CPU ----------------------------------------------------------------------------------------------


def crowded() -> bool:
    """Whether more want to run than there are CPUs."""
    return os.getloadavg()[0] > (os.cpu_count() or 1)


def share(measure: Callable[[], tuple[float, float]], wanted: float) -> None:
    """That CPU time per time is what was granted. More is never right. Less may be others' doing: that counts
    only where it is so every time, and fewer want to run than there are CPUs."""
    measured = []
    for _ in range(4):
        used, seconds = measure()
        measured.append(used / seconds)
        assert measured[-1] < wanted * 1.1, measured
        if measured[-1] > wanted * 0.9:
            return
    assert crowded(), f"{measured}, and not {wanted}"


def test_half_a_cpu() -> None:
    needs("cpu")
    with box(cpus=0.5, accounting=True) as sandbox, started(sandbox, "say", "ready", "fork", 2, "spin"):

        def measure() -> tuple[float, float]:
            began, before = time.monotonic(), cpu(sandbox.usage())
            time.sleep(3)
            after, ended = cpu(sandbox.usage()), time.monotonic()
            return after - before, ended - began

        share(measure, 0.5)
        assert (sandbox.usage().cpu_throttled or 0) > 0 or crowded()


@pytest.mark.slow
def test_half_a_cpu_of_a_run() -> None:
    needs("cpu")

    def measure() -> tuple[float, float]:
        done = perform("run", load("fork", 2, "burn", 750), spec(cpus=0.5))
        assert done.ok
        return cpu(done.usage), done.duration

    share(measure, 0.5)


@every_way
def test_cpu_time_of_all_processes_together(way: str) -> None:
    """RLIMIT_CPU, which is each process's, would let these have four seconds."""
    needs("memory", "cpu")
    done = perform(way, load("fork", 4, "spin"), spec(cpu_time=1, accounting=True))
    assert (done.cause, done.returncode) == (Cause.CPU_TIME, -9), done
    assert 0.95 <= cpu(done.usage) < 2
    assert done.detail.startswith("limits.cpu_time: 1 s, used ")


def test_cpu_time_counts_for_each_command_anew() -> None:
    needs("memory", "cpu")
    with box(cpu_time=1, accounting=True) as sandbox:
        for _ in range(3):
            assert within(sandbox, "exec", load("fork", 2, "burn", 250)).cause is Cause.EXITED
        assert within(sandbox, "exec", load("fork", 2, "burn", 1000)).cause is Cause.CPU_TIME


def test_cpu_weight() -> None:
    needs("cpu")
    with box(cpu_weight=50) as sandbox:
        assert in_force(sandbox)["cpu_weight"] == 50
        assert sandbox.exec(["true"]).ok
    assert sandboxcore.run(["true"], spec=spec(cpu_weight=30)).ok
    file, text = ("cpu.weight", "30\n") if version("cpu") == 2 else ("cpu.shares", f"{round(30 * 10.24)}\n")
    # Groups of other runs may be on their way out meanwhile.
    assert text in [read(group / file) for group in groups_of(os.getpid(), "run-")]


@pytest.mark.parametrize("way", WAYS)
def test_cpuset(way: str) -> None:
    needs("cpuset")
    only = str(max(os.sched_getaffinity(0)))
    done = perform(way, ["sh", "-c", "nproc >&2; grep Cpus_allowed_list /proc/self/status; exit $(nproc)"],
                   spec(cpuset=only))  # fmt: skip
    assert done.returncode == 1, done
    if done.stdout is not None:
        assert done.stdout.split() == [b"Cpus_allowed_list:", only.encode()]


def test_a_cpu_that_there_is_not() -> None:
    needs("cpuset")
    with pytest.raises(UnsupportedHost, match="limits.cpuset '4000': CPU 4000.*choose from"):
        Sandbox.create(SandboxSpec(limits=Limits(cpuset="4000")))


# --- disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "exec"])
def test_io(way: str, disk: tuple[Path, str]) -> None:
    """8 MiB at 4 MiB/s, each way; past the page cache, for version 1 sees nothing else."""
    needs("io")
    described = spec(io="4M", rw=[disk])
    written = perform(way, load("direct", "/disk/file", 8 * MiB), described)
    assert written.ok, written
    assert written.duration >= 1.6
    read = perform(way, load("read", "/disk/file"), described)
    assert read.ok, read
    assert read.duration >= 1.6
    free = perform(way, load("direct", "/disk/file", 8 * MiB), spec(rw=[disk]))
    assert free.ok
    if not IN_VM:  # a disk in software has a pace of its own
        assert free.duration < 1.6
