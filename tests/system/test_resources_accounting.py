"""What a command used is known to within 5 %, and is its own: not an earlier one's, not its neighbour's.

Where the kernel counts in batches the error is absolute: memory is charged to a group 64 pages at a time on
each CPU (memcontrol.c, MEMCG_CHARGE_BATCH), on top of the program's own pages.
"""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from resources import (
    IN_VM,
    PATIENCE,
    WAYS,
    MiB,
    box,
    cpu,
    load,
    needs,
    perform,
    spec,
    started,
    version,
    within,
)
from support import host_program, wait_until

import sandboxcore
from sandboxcore import ExecResult, Sandbox, SpecError

pytestmark = pytest.mark.cgroup
every_way = pytest.mark.parametrize("way", WAYS)

# CPU seconds that it costs to start processes and to wait for them. A machine in software cannot tell that
# from what it has had to wait for its own CPUs.
STARTS = 0.5 if IN_VM else 0.02
BATCH = MiB + 64 * 4096 * (os.cpu_count() or 1)  # what a small program seems to use, at most
PIDS_ANEW = "a peak of processes that was there before says nothing about this command: None"


@pytest.fixture
def disk(tmp_path: Path) -> tuple[Path, str]:
    """A directory on a real disk, and where a sandbox has it."""
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip(f"{tmp_path} is not on a disk")
    tmp_path.chmod(0o755)
    return tmp_path, "/disk"


def near(value: float | None, wanted: float, slack: float = 0) -> bool:
    """Within 5 %, or what the kernel's counting costs."""
    return value is not None and abs(value - wanted) <= max(wanted * 0.05, slack)


def spent(usage: Any, wanted: float) -> bool:
    """The CPU time that was to be burnt, and what it took besides."""
    return wanted * 0.95 <= cpu(usage) <= wanted * 1.05 + STARTS


# --- known workloads ----------------------------------------------------------------------------------


@every_way
def test_memory(way: str) -> None:
    needs("memory")
    done = perform(way, load("alloc", 50 * MiB), spec(accounting=True))
    assert near(done.usage.memory_peak, 50 * MiB), done


@every_way
def test_memory_of_several_processes_and_of_files(way: str) -> None:
    needs("memory")
    steps = ("keep", "/tmp/file", 20 * MiB, "fork", 3, "alloc", 10 * MiB, "burn", 20)
    done = perform(way, load(*steps), spec(memory="256M"))
    assert done.usage.memory_peak is not None
    assert 30 * MiB <= done.usage.memory_peak <= 50 * MiB + 4 * BATCH, done


@every_way
def test_cpu(way: str) -> None:
    needs("memory", "cpu")
    done = perform(way, load("fork", 2, "burn", 500), spec(accounting=True))
    assert done.ok, done
    assert spent(done.usage, 1.0), done


@every_way
def test_cpu_of_children_that_nobody_waited_for(way: str) -> None:
    """Their parent does not get it, wait(2); their group does."""
    needs("memory", "cpu")
    done = perform(way, load("forget", "fork", 2, "burn", 250), spec(accounting=True))
    assert done.ok, done
    assert spent(done.usage, 0.5), done


@every_way
def test_io(way: str, disk: tuple[Path, str]) -> None:
    needs("memory", "io")
    steps = ("direct", "/disk/file", 20 * MiB, "read", "/disk/file", "read", "/disk/file")
    done = perform(way, load(*steps), spec(accounting=True, rw=[disk]))
    assert done.ok, done
    assert near(done.usage.io_written, 20 * MiB), done
    assert near(done.usage.io_read, 40 * MiB), done


def test_io_through_the_page_cache(disk: tuple[Path, str]) -> None:
    """Only version 2 knows whose pages they are when they are written."""
    needs("memory", "io")
    if version("io") == 1:
        pytest.skip("version 1 does not count what goes through the page cache: use cgroup v2")
    done = perform("exec", load("write", "/disk/file", 20 * MiB), spec(accounting=True, rw=[disk]))
    assert near(done.usage.io_written, 20 * MiB), done


@every_way
def test_processes(way: str) -> None:
    needs("memory", "pids")
    done = perform(way, load("fork", 9, "burn", 20), spec(accounting=True))
    assert (done.usage.pids_peak, done.usage.pids_refused) == (10, 0), done


# --- each its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["run", "exec", "popen", "detach"])
def test_a_small_command_after_a_big_one(way: str, disk: tuple[Path, str]) -> None:
    needs("memory", "pids")
    described = spec(accounting=True, rw=[disk])
    big = ("direct", "/disk/file", 8 * MiB, "alloc", 20 * MiB, "fork", 10, "alloc", 2 * MiB, "burn", 60)

    def check(big: ExecResult, small: ExecResult) -> None:
        assert big.ok, big
        assert 20 * MiB <= (big.usage.memory_peak or 0) <= 50 * MiB, big
        assert small.ok, small
        usage = small.usage
        # Where the kernel cannot set a peak back, an old one is not known: it is never this command's.
        assert usage.memory_peak is None or usage.memory_peak <= BATCH, small
        assert usage.pids_peak in (1, None), PIDS_ANEW
        assert cpu(usage) < STARTS
        assert not usage.io_written
        assert (usage.oom_kills, usage.pids_refused) == (0, 0)

    if way == "run":
        for _ in range(2):
            check(*(sandboxcore.run(load(*steps), spec=described, timeout=PATIENCE) for steps in (big, ())))
        return
    with Sandbox.create(described) as sandbox:
        for _ in range(2):
            check(*(within(sandbox, way, load(*steps)) for steps in (big, ())))


def test_what_limits_hit_is_not_the_next_ones() -> None:
    needs("memory", "pids")
    with box(memory="64M", pids=20) as sandbox:
        for _ in range(2):
            assert sandbox.exec(load("alloc", 100 * MiB), timeout=PATIENCE).cause == "oom"
            assert sandbox.exec(load("bomb", "exit", 1), timeout=PATIENCE).cause == "pids"
            for status in (0, 1):
                plain = sandbox.exec(load("exit", status), timeout=PATIENCE)
                assert (plain.cause, plain.returncode, plain.detail) == ("exited", status, ""), plain
                assert (plain.usage.oom_kills, plain.usage.pids_refused) == (0, 0), plain


def test_what_is_kept_in_files_is_of_the_command_that_wrote_it() -> None:
    needs("memory")
    with box(memory="256M") as sandbox:
        wrote = sandbox.exec(load("keep", "/tmp/file", 50 * MiB))
        assert near(wrote.usage.memory_peak, 50 * MiB), wrote
        after = sandbox.exec(load("alloc", 10 * MiB))
        assert after.usage.memory_peak is None or near(after.usage.memory_peak, 10 * MiB, BATCH), after
        assert near(sandbox.usage().memory, 50 * MiB, 4 * BATCH)


def test_commands_at_the_same_time_are_told_apart() -> None:
    needs("memory", "cpu", "pids")
    with box(accounting=True) as sandbox:
        sizes, results = (10, 20, 40), {}
        meet = threading.Barrier(len(sizes))

        def work(size: int) -> None:
            steps = ("alloc", size * MiB, "say", "ready", "go", "fork", size // 10, "burn", 300)
            with started(sandbox, *steps) as process:
                meet.wait(PATIENCE)
                process.stdin.write(b"g")
                process.wait(PATIENCE)
                results[size] = process.result

        threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(results) == list(sizes)
        for size, done in results.items():
            assert done is not None
            assert near(done.usage.memory_peak, size * MiB, BATCH), done
            assert cpu(done.usage) >= size // 10 * 0.3 * 0.95, done
            assert done.usage.pids_peak == size // 10 + 1, done
        # To each at least what it has burnt, and nothing to two: then none has what is another's.
        assert sum(cpu(done.usage) for done in results.values()) <= cpu(sandbox.usage()), results


# --- of a sandbox -------------------------------------------------------------------------------------


def test_a_sandbox_is_the_sum_of_its_commands(disk: tuple[Path, str]) -> None:
    needs("memory", "cpu", "pids")
    with box(accounting=True, rw=[disk]) as sandbox:
        steps = ("direct", "/disk/file", 4 * MiB, "alloc", 30 * MiB, "fork", 4, "burn", 100)
        done = [within(sandbox, way, load(*steps)).usage for way in ("exec", "popen", "detach")]
        whole = sandbox.usage()
        assert spent(whole, sum(map(cpu, done))), (whole, done)
        assert near(whole.memory_peak, 30 * MiB, 3 * BATCH), whole
        assert (whole.memory or 0) < 5 * MiB
        assert (whole.oom_kills, whole.pids_refused) == (0, 0)
        assert 5 < (whole.pids_peak or 0) < 15
        if "io" in sandboxcore.cgroup.layout().versions:
            assert near(whole.io_written, 12 * MiB), whole


def test_now_and_at_most() -> None:
    needs("memory", "pids")
    with box(accounting=True) as sandbox:
        idle = sandbox.usage()
        with started(sandbox, "fork", 3, "alloc", 10 * MiB, "say", "ready", "hold", count=3):
            busy = sandbox.usage()
            assert near(busy.memory, 30 * MiB + (idle.memory or 0), 3 * BATCH), busy
            assert (busy.pids or 0) >= (idle.pids or 0) + 4
        wait_until(lambda: (sandbox.usage().memory or 0) < 5 * MiB, "memory that is free again", PATIENCE)
        assert sandbox.usage().memory_peak >= (busy.memory or 0)


def test_pressure_where_the_kernel_has_it() -> None:
    needs("memory")
    with box(accounting=True) as sandbox:
        pressure = sandbox.usage().pressure
        group = sandbox._link_now().group
        assert group is not None
        if group.v2 is None or not (group.v2 / "memory.pressure").exists():
            assert pressure is None
        else:
            assert pressure is not None
            assert {"cpu", "memory", "io"} >= set(pressure)
            assert all(0 <= share <= 100 for share in pressure.values())


def test_without_a_group_there_is_no_usage() -> None:
    with Sandbox.create() as sandbox:
        with pytest.raises(SpecError, match="accounting: .*no control group.*accounting=True"):
            sandbox.usage()
        usage = sandbox.exec(["true"]).usage
        assert (usage.memory_peak, usage.pids_peak, usage.io_read, usage.oom_kills) == (None,) * 4


# --- what the caller was before -----------------------------------------------------------------------


@pytest.mark.slow
def test_the_callers_own_use_is_not_counted() -> None:
    """Neither its memory nor its CPU time: a sandbox is born in its own group."""
    needs("memory", "cpu")
    code = """
        import json, time
        from resources import load, spec
        import sandboxcore
        ballast = bytearray(40 << 20)
        end = time.process_time() + 1
        while time.process_time() < end:
            pass
        done = sandboxcore.run(load("alloc", 10 << 20), spec=spec(accounting=True), timeout=300)
        print(json.dumps([done.usage.memory_peak, done.usage.cpu_user + done.usage.cpu_system]))
    """
    done = host_program(code, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    peak, used = json.loads(done.stdout)
    assert near(peak, 10 * MiB, BATCH)
    assert used < 0.6
