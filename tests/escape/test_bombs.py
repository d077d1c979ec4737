"""Attacks by mass, and by not going away."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    PROGRAM,
    Hostile,
    call,
    calls,
    conversation,
)
from support import gone, host_environment, marked, wait_until

import sandboxcore
from sandboxcore import Cause, Limits, SandboxSpec

pytestmark = pytest.mark.escape


def count(done: Any) -> tuple[int, str]:
    """How many, and why no more."""
    number, why = done.stdout.split()
    return int(number), why.decode()


# --- mass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["1000", "0"])
def test_fork_bomb(hostile: Hostile, user: str) -> None:
    bomb = ["forkbomb", "100"]
    assert count(hostile.run_outside(bomb, start_new_session=True)) == (100, "ok")
    limits = Limits(pids=40)
    made, why = count(hostile.run_inside(bomb, limits=limits, user=user))
    assert why == "EAGAIN"
    assert 35 <= made < 40


def test_fork_bomb_hits_nobody_else(hostile: Hostile, marker: str) -> None:
    """Sandboxes of one user have the same id outside; the limit counts by sandbox all the same."""
    spec = hostile.spec.replace(limits=Limits(pids=40))
    crowd = [PROGRAM, "linger", "crowd", marker]
    with conversation(sandboxcore.run, crowd, spec=spec, timeout=20) as talk:
        talk.await_ready()
        assert len(marked(marker)) >= 40
        assert count(hostile.run_inside(["forkbomb", "30"], limits=spec.limits)) == (30, "ok")
        assert subprocess.run(["true"]).returncode == 0
        bury(marked(marker))


@pytest.mark.parametrize("folder", ["/tmp", "/workspace", "/dev/shm", "/var/tmp"])
def test_disk_bomb(hostile: Hostile, folder: str) -> None:
    limits = Limits(disk="8M")
    written, why = count(hostile.run_inside(["diskbomb", f"{folder}/file", str(64 << 20)], limits=limits))
    assert why == "ENOSPC"
    assert written <= 8 << 20
    assert count(hostile.run_inside(["diskbomb", f"{folder}/file", str(64 << 20)])) == (64 << 20, "ok")


def test_disk_bomb_in_many_places(hostile: Hostile) -> None:
    """One size holds for everything private together."""
    folders = "/tmp /workspace /dev/shm /var/tmp"
    script = f"for d in {folders}; do head -c 6M /dev/zero >$d/f; done; cat /*/f /*/*/f | wc -c"
    spec = SandboxSpec(limits=Limits(disk="8M"))
    assert int(sandboxcore.run(["sh", "-c", script], spec=spec).stdout) <= 8 << 20
    assert int(sandboxcore.run(["sh", "-c", script]).stdout) == 24 << 20


@pytest.mark.parametrize("folder", ["/tmp", "/workspace", "/dev/shm"])
def test_inode_bomb(hostile: Hostile, folder: str) -> None:
    limits = Limits(inodes=200)
    made, why = count(hostile.run_inside(["inodebomb", folder, "1000"], limits=limits))
    assert why == "ENOSPC"
    assert made <= 200
    assert count(hostile.run_inside(["inodebomb", folder, "1000"])) == (1000, "ok")


def test_file_size(hostile: Hostile, open_dir: Any) -> None:
    """In a grant, where no disk limit holds, at least no single file grows without end."""
    attack = ["diskbomb", str(open_dir / "file"), str(8 << 20)]
    done = hostile.run_inside(attack, rw=[open_dir], limits=Limits(file_size="1M"))
    assert (done.cause, done.returncode) == (Cause.DISK, -signal.SIGXFSZ)
    assert (open_dir / "file").stat().st_size == 1 << 20
    (open_dir / "file").unlink()
    assert count(hostile.run_outside(attack)) == (8 << 20, "ok")


def test_descriptor_bomb(hostile: Hostile) -> None:
    made, why = count(hostile.run_inside(["fdbomb", "1000"], limits=Limits(open_files=50)))
    assert (made, why) == (47, "EMFILE")
    assert count(hostile.run_inside(["fdbomb", "1000"])) == (1000, "ok")
    raised = calls(call("setrlimit", 7, "&" + (1000).to_bytes(8, "little").hex() * 2))
    assert hostile.inside(raised, limits=Limits(open_files=50)).verdict == "EPERM"


def test_output_flood(hostile: Hostile) -> None:
    """What is beyond the limit is counted and thrown away; the caller's memory stays as it is."""
    size, limit = 128 << 20, 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = hostile.run_inside(["flood", str(size)], limits=Limits(output=limit))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert (done.stdout_total, len(done.stdout), done.truncated) == (size, limit, True)
    assert grown < 16 << 20
    assert len(hostile.run_outside(["flood", str(size)]).stdout) == size


def test_output_flood_does_not_stop_the_clock(hostile: Hostile) -> None:
    began = time.monotonic()
    done = hostile.run_inside(["flood", str(1 << 50)], limits=Limits(output=4096), timeout=0.3)
    assert done.cause is Cause.TIMEOUT
    assert time.monotonic() - began < 5


def test_processor_bomb() -> None:
    spec = SandboxSpec(limits=Limits(cpu_time=1))
    done = sandboxcore.run(["sh", "-c", "while :; do :; done"], spec=spec, timeout=30)
    assert done.cause is Cause.CPU_TIME
    assert 0.5 < done.usage.cpu_user + done.usage.cpu_system < 3
    done = sandboxcore.run(["sh", "-c", "trap '' XCPU; while :; do :; done"], spec=spec, timeout=30)
    assert done.cause is Cause.CPU_TIME, "ignoring the first signal wins a second"


def test_huge_arguments_and_odd_names(hostile: Hostile) -> None:
    """Bytes go through as they are; there is no shell, and what is too long is one clear error."""
    odd = [b"\xff\xfe", b"a\nb", b"$(id)", b"; id", b"--", b"-c", b"", b"'\"", b"\x1b]0;x\x07", b"%s%n"]
    done = sandboxcore.run(["printf", "%s\\n", *odd])
    assert done.stdout == b"\n".join([*odd, b""])
    with pytest.raises(sandboxcore.ExecError) as caught:
        sandboxcore.run(["true", "x" * (4 << 20)])
    assert caught.value.errno == 7  # E2BIG
    many = ["x" * 1000] * 1000
    assert sandboxcore.run(["sh", "-c", "echo $#", "sh", *many]).stdout == b"1000\n"
    assert sandboxcore.run(["true"], env={f"V{i}": "x" * 1000 for i in range(500)}).ok


# --- not going away -----------------------------------------------------------------------------


def bury(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # the first one may take the rest along
            os.kill(pid, signal.SIGKILL)


WAYS = ["plain", "deaf", "stopped", "orphan", "daemon", "vfork", "zombies", "breeding"]


@pytest.mark.parametrize("user", ["1000", "0"])
@pytest.mark.parametrize("how", WAYS)
def test_outliving_the_time_limit(hostile: Hostile, marker: str, how: str, user: str) -> None:
    """Ignoring signals, being stopped, in vfork, orphaned, in a session of its own, always new..."""
    began = time.monotonic()
    reading, writing = os.pipe()  # a stdin that does not end
    try:
        done = hostile.run_inside(["linger", how, marker], timeout=0.3, user=user, stdin=reading)
    finally:
        os.close(reading)
        os.close(writing)
    took = time.monotonic() - began
    assert done.stdout == b"ready\n", "it got as far as wanting to stay"
    if how in ("orphan", "breeding"):
        assert done.returncode in (7, 0)
        assert took < 3
    else:
        assert (done.cause, done.returncode) == (Cause.TIMEOUT, -9)
        assert 0.3 <= took < 3
    assert not marked(marker)


@pytest.mark.parametrize("how", ["deaf", "stopped", "orphan", "daemon"])
def test_outliving_a_careless_supervisor(hostile: Hostile, marker: str, how: str) -> None:
    """The same without a sandbox: a signal to the child is not enough, and neither is its end."""
    command = [hostile.program, "linger", how, marker]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.stdin.close()
        if how in ("orphan", "daemon"):
            process.wait(10)
        else:
            state = f"/proc/{process.pid}/stat"
            wait_until(lambda: how == "deaf" or b" T " in Path(state).read_bytes(), "its stop")
            process.terminate()
        left = {pid for pid in marked(marker) if not gone(pid)}
        assert left, "it is still there"
        bury(left)


@pytest.mark.parametrize("how", ["orphan", "daemon"])
def test_outliving_the_payload(hostile: Hostile, marker: str, how: str) -> None:
    """When the payload has ended, what it left behind ends too, although it holds stdout open."""
    began = time.monotonic()
    done = hostile.run_inside(["linger", how, marker], timeout=20, input=b"")
    assert done.cause is Cause.EXITED
    assert done.returncode == (7 if how == "orphan" else 0)
    assert time.monotonic() - began < 3
    assert not marked(marker)


def test_the_search_for_survivors_finds_them(hostile: Hostile, marker: str) -> None:
    with conversation(
        sandboxcore.run, [PROGRAM, "linger", "daemon", marker], spec=hostile.spec, timeout=20
    ) as talk:
        talk.await_ready()
        assert len(marked(marker)) >= 2
        talk.end()
        assert not marked(marker)


def test_stopping_everything_including_init(hostile: Hostile, marker: str) -> None:
    """SIGSTOP to all: init cannot be stopped from inside, and a stopped process can be killed."""
    script = f"sleep 60 & sleep 60 & echo ready; kill -STOP -1; kill -STOP 1; kill -STOP $$ # {marker}"
    began = time.monotonic()
    done = sandboxcore.run(["sh", "-c", script], timeout=0.3)
    assert (done.cause, done.stdout) == (Cause.TIMEOUT, b"ready\n")
    assert time.monotonic() - began < 3
    assert not marked(marker)


@pytest.mark.parametrize("who", ["thread", "process"])
def test_outliving_the_caller(hostile: Hostile, marker: str, who: str) -> None:
    """A thread that ends takes nothing along (a parent-death signal would go by thread); a process
    that is killed takes its sandboxes along."""
    if who == "thread":
        results: list[Any] = []

        def start() -> None:
            results.append(sandboxcore.run(["sh", "-c", "sleep 0.2; echo fine"], spec=hostile.spec))

        thread = threading.Thread(target=start)
        thread.start()
        thread.join(20)
        assert results[0].stdout == b"fine\n"
        return
    code = (
        "import sys, sandboxcore\n"
        "spec = sandboxcore.SandboxSpec(ro=[(sys.argv[1], '/hostile')])\n"
        "sandboxcore.run(['/hostile/hostile', 'linger', sys.argv[2], sys.argv[3]],"
        " spec=spec, stdin=0, stdout=1)\n"
    )
    for how in ("deaf", "daemon"):
        command = [sys.executable, "-c", code, hostile.program.parent, how, marker]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=host_environment()
        ) as launcher:
            assert launcher.stdout
            assert launcher.stdout.readline() == b"ready\n"
            assert len(marked(marker)) >= 2
            launcher.kill()
            launcher.wait(10)
            wait_until(lambda: not {pid for pid in marked(marker) if not gone(pid)}, "its sandbox's end")
