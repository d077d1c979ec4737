"""Suspend and resume: everything stands still, the clocks too; and it can be ended all the same."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from resources import (
    IN_VM,
    LIVING,
    PATIENCE,
    MiB,
    box,
    cpu,
    groups_of_sandbox,
    load,
    meanwhile,
    needs,
    spec,
    started,
    within,
)
from support import gone, host_program, leaves_nothing, wait_until

from sandboxcore import Cause, InvalidTransition, Sandbox, SandboxState, cgroup
from sandboxcore.persistent import PersistentSandbox

pytestmark = pytest.mark.cgroup

STILL = 0.5  # seconds to look whether anything moves
KINDS = {"group": {"accounting": True}, "signal": {}}  # frozen by its group; stopped by SIGSTOP, without one
GIVEN_KINDS = [pytest.param(kind, marks=[pytest.mark.groupless] * (not KINDS[kind])) for kind in KINDS]
every_kind = pytest.mark.parametrize("kind", GIVEN_KINDS)


def kind_of(kind: str) -> dict[str, bool]:
    if kind == "group":
        needs("memory", "freezer")
    return KINDS[kind]


def ticks(pid: int) -> int:
    """CPU time of a process: proc(5), stat."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


def stands_still(*pids: int) -> bool:
    """Nothing of them runs, once the signal has reached them, where it is one that stops them."""
    for pid in pids:
        status = Path(f"/proc/{pid}/status")
        wait_until(
            lambda status=status: "State:\tR" not in status.read_text(), f"the stop of {pid}", PATIENCE
        )
    before = [ticks(pid) for pid in pids]
    time.sleep(STILL)
    return before == [ticks(pid) for pid in pids]


# --- under load ---------------------------------------------------------------------------------------


@every_kind
def test_no_cpu_while_suspended(kind: str) -> None:
    with box(**kind_of(kind)) as sandbox:
        with started(sandbox, "say", "ready", "spin") as one, started(sandbox, "say", "ready", "spin") as two:
            wait_until(lambda: ticks(one.pid) > 2 and ticks(two.pid) > 2, "two that spin", PATIENCE)
            for _ in range(3):
                sandbox.suspend()
                assert sandbox.state is SandboxState.PAUSED
                assert stands_still(one.pid, two.pid)
                sandbox.resume()
                before = ticks(one.pid)
                wait_until(lambda before=before: ticks(one.pid) > before, "its going on", PATIENCE)


@pytest.mark.slow
def test_under_a_storm_of_forks() -> None:
    """Also what is born in the very moment stands still, and all of it goes on."""
    needs("memory", "pids", "freezer")
    storm = ["sh", "-c", "echo ready; while :; do (: & :) & wait; done"]
    with box(memory="256M", pids=200) as sandbox, sandbox.popen(storm) as one, sandbox.popen(storm) as two:
        for process in (one, two):
            assert process.stdout.readline() == b"ready\n"
        try:
            for _ in range(5):
                sandbox.suspend()
                before = cpu(sandbox.usage())
                time.sleep(0.2)
                assert cpu(sandbox.usage()) == before
                sandbox.resume()
                wait_until(lambda before=before: cpu(sandbox.usage()) > before, "its going on", PATIENCE)
        finally:
            if sandbox.state is SandboxState.PAUSED:
                sandbox.resume()
            one.kill()
            two.kill()
        assert within(sandbox, "exec", ["true"]).ok


def test_suspending_again_and_again_while_commands_come_and_go() -> None:
    needs("memory", "freezer")
    with box(accounting=True) as sandbox:
        over, failures = threading.Event(), []

        def work() -> None:
            while not over.is_set():
                try:
                    done = sandbox.exec(load("burn", 1), timeout=PATIENCE)
                except InvalidTransition:  # it is suspended just now
                    continue
                if not done.ok:
                    failures.append(done)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                sandbox.suspend()
                sandbox.resume()
        finally:
            over.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert failures == []


@every_kind
def test_nothing_is_done_while_suspended(kind: str) -> None:
    with box(**kind_of(kind)) as sandbox:
        sandbox.suspend()
        for action in (sandbox.suspend, lambda: sandbox.exec(["true"]), lambda: sandbox.popen(["true"])):
            with pytest.raises(InvalidTransition, match="paused"):
                action()
        sandbox.resume()
        assert within(sandbox, "exec", ["true"]).ok


# --- the clocks ---------------------------------------------------------------------------------------


def outlast(sandbox: Sandbox, limit: float) -> None:
    """Suspend a sandbox for longer than a limit."""
    sandbox.suspend()
    time.sleep(limit + 0.2)
    sandbox.resume()


LIMIT = 3.0 if IN_VM else 1.0  # seconds: more than a start takes


@pytest.mark.slow
@pytest.mark.parametrize(("given", "way"), [("wall_time", "exec"), *(("timeout", way) for way in LIVING)])
@every_kind
def test_the_clock_of_a_command_stops(kind: str, given: str, way: str) -> None:
    """It is killed when it has run for so long, however long it was suspended, and not before."""
    limits = {"wall_time": LIMIT} if given == "wall_time" else {}
    options = {"timeout": LIMIT} if given == "timeout" else {"timeout": None}
    with box(**kind_of(kind), **limits) as sandbox:
        began = time.monotonic()
        with meanwhile(lambda: within(sandbox, way, load("hold"), **options)) as ends:
            wait_until(lambda: _commands(sandbox), "a command", PATIENCE)
            outlast(sandbox, LIMIT)
            assert ends == []
        assert ends[0].cause is Cause.TIMEOUT, ends
        assert time.monotonic() - began >= LIMIT * 2 + 0.2


def _commands(sandbox: Sandbox) -> bool:
    """Whether a command runs: not only init, and launchers."""
    children = Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split()
    return any(Path(f"/proc/{pid}/task/{pid}/children").read_text() for pid in children)


@pytest.mark.slow
@every_kind
def test_a_command_that_ends_in_time_was_in_time(kind: str) -> None:
    with box(**kind_of(kind)) as sandbox:
        with started(sandbox, "say", "ready", "go", "exit", 4, timeout=LIMIT * 2) as process:
            outlast(sandbox, LIMIT * 2)
            process.stdin.write(b"g")
            assert process.wait(PATIENCE) == 4
            assert process.result is not None
            assert process.result.cause is Cause.EXITED


def test_cpu_time_while_suspended() -> None:
    """There is none to count, and the limit holds afterwards."""
    needs("memory", "cpu", "freezer")
    with box(accounting=True, cpu_time=1) as sandbox:
        with started(sandbox, "say", "ready", "go", "fork", 2, "spin") as process:
            process.stdin.write(b"g")
            outlast(sandbox, 1.5)
            process.wait(PATIENCE)
            assert process.result is not None
            assert process.result.cause is Cause.CPU_TIME
            assert cpu(process.result.usage) < 2


def test_duration_and_usage_after_a_pause() -> None:
    needs("memory", "cpu", "freezer")
    with box(accounting=True) as sandbox:
        with started(sandbox, "say", "ready", "go", "burn", 300) as process:
            outlast(sandbox, 0.5)
            process.stdin.write(b"g")
            process.wait(PATIENCE)
            assert process.result is not None
            assert process.result.ok
            assert 0.28 <= cpu(process.result.usage) <= 0.4


# --- ends ---------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("end", ["close", "stop"])
def test_the_end_of_a_suspended_sandbox(kind: str, end: str) -> None:
    options = kind_of(kind)
    with box(**options):  # what is made once
        pass
    with leaves_nothing(PATIENCE):
        with box(**options) as sandbox:
            with started(sandbox, "fork", 2, "say", "ready", "spin", count=2) as process:
                pid, init = process.pid, sandbox.pid
                sandbox.suspend()
                getattr(sandbox, end)()
                wait_until(lambda: gone(pid) and gone(init), "the end of all", PATIENCE)
                process.wait(PATIENCE)
                assert process.result is not None
                assert (process.returncode, process.result.cause) == (-signal.SIGKILL, Cause.KILLED)
            if kind == "group":
                wait_until(lambda: not groups_of_sandbox(sandbox), "the end of its groups", PATIENCE)
            if end == "stop":
                sandbox.start()
                assert within(sandbox, "exec", ["true"]).ok


@every_kind
def test_a_suspended_command_that_is_killed(kind: str) -> None:
    """At the latest when it goes on."""
    with box(**kind_of(kind)) as sandbox, started(sandbox, "say", "ready", "spin") as process:
        sandbox.suspend()
        process.kill()
        sandbox.resume()
        assert process.wait(PATIENCE) == -signal.SIGKILL


DYING = """
    import os, sys
    from resources import load, spec
    from sandboxcore import Sandbox, spawner
    from sandboxcore.persistent import PersistentSandbox
    if sys.argv[1] == "stays":
        box = PersistentSandbox.create(spec(accounting=True), name="kept", state_dir=sys.argv[2])
    else:
        box = Sandbox.create(spec(accounting=True))
    detached = box.detach(load("hold"))
    command = box.popen(load("hold"))
    (helper,) = spawner._spawners.values()
    if sys.argv[1] == "replaced":  # the sandbox is below another spawner than the next one
        spawner.drop_spawner(helper)
        del helper
        other = Sandbox.create()
    elif sys.argv[1] == "both":
        os.kill(helper.pid, 9)
    box.suspend()
    print(box.pid, command.pid, box._link.group.relative, flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("who", ["host", "replaced", "both"])
def test_the_host_process_is_killed_while_its_sandbox_is_suspended(who: str) -> None:
    """Then, too, the sandbox ends: by its spawner; and where that is gone, by the next one to look."""
    needs("memory", "freezer")
    done = host_program(DYING, who, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done
    *words, relative = done.stdout.split()
    pids = [int(word) for word in words]
    try:
        if who == "both":
            assert not any(map(gone, pids))
            cgroup.collect()
        wait_until(lambda: all(map(gone, pids)), "the end of its sandbox", PATIENCE)
        base = Path(relative).parent

        def collected() -> bool:
            cgroup.collect()
            return not any((parent / base).exists() for parent in parents())

        wait_until(collected, "the end of its groups", PATIENCE)
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def parents() -> set[Path]:
    """Where groups are, in all hierarchies."""
    found = cgroup.layout()
    return {*found.v1.values(), *([] if found.v2 is None else [found.v2])}


def test_one_that_stays_is_still_suspended_after_the_end_of_its_maker(tmp_path: Path) -> None:
    needs("memory", "freezer")
    done = host_program(DYING, "stays", str(tmp_path), timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done
    pid, command = map(int, done.stdout.split()[:2])
    sandbox = PersistentSandbox.connect("kept", state_dir=tmp_path)
    try:
        cgroup.collect()
        assert sandbox.state is SandboxState.PAUSED
        assert not gone(pid)
        assert stands_still(command)
        sandbox.resume()
        wait_until(lambda: gone(command), "the end of a command that its maker held", PATIENCE)
        assert within(sandbox, "exec", load("exit", 0)).ok
        (detached,) = sandbox.commands()
        assert detached.status == "running"
        detached.close()
    finally:
        sandbox.destroy()


# --- others -------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_kind
def test_by_another_process(kind: str, tmp_path: Path) -> None:
    """A persistent sandbox: what one process suspends, another finds paused and resumes."""
    options = kind_of(kind)
    state = tmp_path / "state"
    sandbox = PersistentSandbox.create(spec(**options), name="kept", state_dir=state)
    try:
        command = sandbox.detach(load("spin"), timeout=PATIENCE)
        pid = wait_until(lambda: _only_command(sandbox), "the command", PATIENCE)
        code = """
            import sys
            from sandboxcore import PersistentSandbox
            box = PersistentSandbox.connect("kept", state_dir=sys.argv[1])
            print(box.state)
            getattr(box, sys.argv[2])()
            print(box.state)
        """
        done = host_program(code, str(state), "suspend", timeout=PATIENCE)
        assert (done.returncode, done.stdout.split()) == (0, ["running", "paused"]), done
        assert sandbox.state is SandboxState.PAUSED
        assert stands_still(pid)
        done = host_program(code, str(state), "resume", timeout=PATIENCE)
        assert (done.returncode, done.stdout.split()) == (0, ["paused", "running"]), done
        before = ticks(pid)
        wait_until(lambda: ticks(pid) > before, "its going on", PATIENCE)
        sandbox.suspend()
        command.close()
    finally:
        sandbox.destroy()
    wait_until(lambda: gone(pid), "the end of the command", PATIENCE)


def _only_command(sandbox: Sandbox) -> int:
    for launcher in Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split():
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            return int(pid)
    return 0


def test_update_while_suspended() -> None:
    """A bomb that stands still meets its new limit when it goes on."""
    needs("memory", "freezer")
    with box(memory="512M") as sandbox:
        with started(sandbox, "alloc", 16 * MiB, "say", "ready", "go", "alloc", 200 * MiB) as bomb:
            sandbox.suspend()
            assert sandbox.update(memory="64M")["memory"].applies == "now"
            assert sandbox.usage().memory is not None
            bomb.stdin.write(b"g")
            sandbox.resume()
            bomb.wait(PATIENCE)
            assert bomb.result is not None
            assert bomb.result.cause is Cause.OOM
        assert within(sandbox, "exec", load("alloc", 16 * MiB)).ok


def test_other_sandboxes_go_on() -> None:
    needs("memory", "freezer")
    with box(accounting=True) as still, box(accounting=True) as other:
        with started(still, "say", "ready", "spin") as one:
            still.suspend()
            assert within(other, "exec", load("burn", 50)).ok
            assert stands_still(one.pid)
            still.resume()
