"""Attacks on processes: of the host, of another sandbox, and on the sandbox's own init."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    BUFFER,
    MARKER,
    PROGRAM,
    Hostile,
    allowing,
    call,
    calls,
    conversation,
    marking,
    nested,
    number,
    pack,
    pointer,
    result,
)
from support import gone, host_environment, marked

import sandboxcore

pytestmark = pytest.mark.escape

USERS = ["1000", "0"]  # the second has the id of init
Process = subprocess.Popen[bytes]


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [0, signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_signals_to_a_process_of_the_host(hostile: Hostile, bystander: Process, sig: int) -> None:
    attack = calls(call("kill", bystander.pid, sig))
    for user in USERS:
        assert hostile.inside(attack, user=user).verdict == "ESRCH"
    assert bystander.poll() is None
    assert hostile.outside(attack).verdict == "ok"


def test_signals_by_pidfd_and_to_threads(hostile: Hostile, bystander: Process) -> None:
    attacks = {
        "pidfd_open": [
            call("pidfd_open", bystander.pid, 0),
            call("pidfd_send_signal", result(0), 0, 0, 0),
        ],
        "tgkill": [call("tgkill", bystander.pid, bystander.pid, 0)],
        "tkill": [call("tkill", bystander.pid, 0)],
        "rt_sigqueueinfo": [call("rt_sigqueueinfo", bystander.pid, 10, pack("=iii116x", 10, 0, -1))],
        "process group": [call("kill", -os.getpgid(bystander.pid), 0)],
    }
    for name, attack in attacks.items():
        assert hostile.inside(calls(*attack)).verdict == "ESRCH", name
        if name != "rt_sigqueueinfo":
            assert hostile.outside(calls(*attack)).verdict == "ok", name
    assert bystander.poll() is None
    assert hostile.outside(calls(*attacks["rt_sigqueueinfo"])).verdict == "ok"
    assert bystander.wait(10) == -10


def test_killing_everything(hostile: Hostile, bystander: Process) -> None:
    """kill(-1) reaches everything that the sender may signal and see."""
    attack = "sleep 60 & sleeper=$!; kill -9 -1; wait $sleeper; echo $?"
    everything = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "sh", "-c", attack]
    outside = subprocess.run(everything, capture_output=True, timeout=30)
    assert outside.stdout == b"137\n", "in a pid namespace of its own it kills the rest of that"
    for user in USERS:
        done = hostile.run_inside(calls(call("kill", -1, signal.SIGKILL)), user=user)
        assert done.stdout in (b"ESRCH\n", b"ok 0\n")
        assert done.returncode == 0
    assert bystander.poll() is None


# The group consists of this program, a sleeper, and what it runs.
GROUP_LAUNCHER = """
import subprocess, sys
from pathlib import Path
from escape.hostile import Hostile, call, calls

hostile = Hostile(Path(sys.argv[1]))
sleeper = subprocess.Popen(["sleep", "60"])
try:
    done = getattr(hostile, sys.argv[2])(calls(call("kill", 0, 9)))
    print(done.answers, sleeper.poll())
finally:
    sleeper.kill()
    sleeper.wait()
"""


def test_process_group(hostile: Hostile) -> None:
    """kill(0) goes by group, and a process group may reach across pid namespaces."""
    outcome = {}
    for place in ("outside", "in_userns", "inside"):
        outcome[place] = subprocess.run(
            [sys.executable, "-c", GROUP_LAUNCHER, hostile.program, place],
            capture_output=True, text=True, timeout=60, start_new_session=True, env=host_environment(),
        )  # fmt: skip
    assert outcome["outside"].returncode == -9
    assert outcome["in_userns"].returncode == -9, "its own pid namespace does not help"
    assert outcome["inside"].stdout == "('SIGKILL',) None\n"


def test_session_and_group_are_of_the_sandbox(hostile: Hostile) -> None:
    attack = calls(call("getsid", 0), call("getpgid", 0), call("getpid"))
    inside = hostile.inside(attack)
    assert inside.values == (2, 2, 2)
    assert hostile.outside(attack).values[0] == os.getsid(0)


@pytest.mark.parametrize("user", USERS)
def test_every_signal_to_init(hostile: Hostile, user: str) -> None:
    done = hostile.run_inside(["barrage", "1"], user=user)
    assert (done.returncode, done.cause) == (42, sandboxcore.Cause.EXITED)


# --- limits and priorities of others ------------------------------------------------------------

PRIO_PROCESS, PRIO_USER, RLIMIT_NOFILE, IOPRIO_WHO_USER = 0, 2, 7, 3


def test_limits_and_priorities_of_the_host(hostile: Hostile, bystander: Process) -> None:
    pid = bystander.pid
    attacks = {
        "setpriority": call("setpriority", PRIO_PROCESS, pid, 1),
        "sched_setaffinity": call("sched_setaffinity", pid, 8, pack("=Q", 1)),
        "sched_setscheduler": call("sched_setscheduler", pid, 0, pack("=i", 0)),
        "ioprio_set": call("ioprio_set", 1, pid, 3 << 13),
        "getpgid": call("getpgid", pid),
        "setpgid": call("setpgid", pid, 0),
    }
    for name, attack in attacks.items():
        for user in USERS:
            assert hostile.inside(calls(attack), user=user).verdict == "ESRCH", name
        if name != "setpgid":
            assert hostile.outside(calls(attack)).verdict == "ok", name
    limit = calls(call("prlimit64", pid, RLIMIT_NOFILE, 0, BUFFER))
    assert hostile.inside(limit).verdict == "EPERM"
    assert hostile.inside(limit, seccomp=allowing("prlimit64")).verdict == "ESRCH"
    assert hostile.outside(limit).verdict == "ok"


def test_priority_of_everything_of_a_user(hostile: Hostile, bystander: Process) -> None:
    """By user, not by number: ids are the same on both sides of a pid namespace."""
    before = os.getpriority(os.PRIO_PROCESS, bystander.pid)
    attack = calls(call("setpriority", PRIO_USER, 0, 7), call("ioprio_set", IOPRIO_WHO_USER, 0, 3 << 13))
    for user in USERS:  # init is among them, and more privileged
        assert set(hostile.inside(attack, user=user).answers) <= {"ok", "EPERM", "ESRCH"}
        assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == before
    # outside it would hit this very process, and nobody could take it back: the call for one only
    assert hostile.outside(calls(call("setpriority", PRIO_PROCESS, bystander.pid, 7))).verdict == "ok"
    assert os.getpriority(os.PRIO_PROCESS, bystander.pid) == 7


@pytest.mark.parametrize("user", USERS)
def test_limits_of_init(hostile: Hostile, user: str) -> None:
    attack = calls(call("prlimit64", 1, RLIMIT_NOFILE, pack("=2Q", 0, 0), 0))
    assert hostile.inside(attack, user=user).verdict == "EPERM"
    assert hostile.inside(attack, user=user, seccomp=marking("prlimit64")).verdict == MARKER
    own = calls(call("prlimit64", 0, RLIMIT_NOFILE, 0, BUFFER))
    assert hostile.inside(own, user=user).verdict == "ok"
    for attack in (
        calls(call("setpriority", PRIO_PROCESS, 1, 7)),
        calls(call("sched_setaffinity", 1, 8, pack("=Q", 1))),
        calls(call("sched_setscheduler", 1, 0, pack("=i", 0))),
        calls(call("ioprio_set", 1, 1, 3 << 13)),
    ):
        assert hostile.inside(attack, user=user).verdict == "EPERM"


# --- the memory and the descriptors of others ---------------------------------------------------

PTRACE_ATTACH, PTRACE_SEIZE, PTRACE_TRACEME = 16, 0x4206, 0


def intrusions(pid: int) -> dict[str, list[list[str]]]:
    local = nested(pointer(bytes(8)), struct.pack("=Q", 8))
    remote = pack("=2Q", 0, 8)
    return {
        "ptrace": [call("ptrace", PTRACE_ATTACH, pid, 0, 0)],
        "ptrace seize": [call("ptrace", PTRACE_SEIZE, pid, 0, 0)],
        "process_vm_readv": [call("process_vm_readv", pid, local, 1, remote, 1, 0)],
        "process_vm_writev": [call("process_vm_writev", pid, local, 1, remote, 1, 0)],
        "pidfd_getfd": [call("pidfd_open", pid, 0), call("pidfd_getfd", result(0), 1, 0)],
        "kcmp": [call("kcmp", pid, pid, 2, 0, 0)],
        "process_madvise": [
            call("pidfd_open", pid, 0),
            call("process_madvise", result(0), remote, 1, 21, 0),  # MADV_PAGEOUT
        ],
        "move_pages": [call("move_pages", pid, 0, 0, 0, 0, 0)],
    }


REACHED = ("ok", "EFAULT", "ENOMEM")  # there is nothing at address 0, but this was asked of the right process


@pytest.mark.parametrize("name", intrusions(0))
def test_intruding_into_init(hostile: Hostile, bystander: Process, name: str) -> None:
    """Init has the payload's user id, or an id that a payload can have; it is not dumpable."""
    known = name.split(maxsplit=1)[0]
    outside = hostile.outside(calls(*intrusions(bystander.pid)[name])).verdict
    if name != "process_madvise" or os.geteuid() == 0:  # which takes CAP_SYS_NICE for others
        assert outside in REACHED
    attack = calls(*intrusions(1)[name])
    closed = "ENOSYS" if name == "process_madvise" else "EPERM"
    for user in USERS:
        assert hostile.inside(attack, user=user).verdict == closed
        assert hostile.inside(attack, user=user, seccomp=marking(known)).verdict == MARKER
        behind = hostile.inside(attack, user=user, seccomp=allowing(known)).verdict
        assert behind in ("EPERM", "EACCES")


@pytest.mark.parametrize("name", intrusions(0))
def test_intruding_into_the_host(hostile: Hostile, bystander: Process, name: str) -> None:
    attack = calls(*intrusions(bystander.pid)[name])
    policy = allowing(name.split(maxsplit=1)[0], "pidfd_open")
    for user in USERS:
        assert hostile.inside(attack, user=user, seccomp=policy).verdict == "ESRCH"


# --- another sandbox ----------------------------------------------------------------------------


@pytest.mark.parametrize("user", USERS)
def test_two_sandboxes_do_not_see_each_other(hostile: Hostile, marker: str, user: str) -> None:
    """They have the same ids outside, so only their pid namespaces keep them apart."""
    spec = hostile.spec.replace(user=user, seccomp="full")
    hold = [PROGRAM, "linger", "plain", marker]
    with conversation(sandboxcore.run, hold, spec=spec, timeout=20) as talk:
        talk.await_ready()
        assert marked(marker), "the host sees it"
        look = "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; ls /tmp /workspace /dev/shm /dev/pts"
        other = sandboxcore.run(["sh", "-c", look], spec=spec, text=True)
        assert marker not in other.stdout
        assert "linger" not in other.stdout
        for pid in range(3, 30):
            assert hostile.inside(calls(call("kill", pid, 0)), user=user).verdict == "ESRCH"
        victims = [pid for pid in marked(marker) if not gone(pid)]
        everything = hostile.inside(calls(call("kill", -1, signal.SIGKILL)), user=user)
        assert everything.verdict in ("ok", "ESRCH")
        assert [pid for pid in victims if not gone(pid)] == victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)


def test_two_sandboxes_share_no_ipc(hostile: Hostile) -> None:
    """Objects of System V and POSIX with a name that the other one knows."""
    IPC_CREAT, IPC_EXCL = 0o1000, 0o2000
    for name, args in {
        "shmget": [0x5EC2E7, 4096, IPC_CREAT | IPC_EXCL | 0o666],
        "semget": [0x5EC2E7, 1, IPC_CREAT | IPC_EXCL | 0o666],
        "msgget": [0x5EC2E7, IPC_CREAT | IPC_EXCL | 0o666],
    }.items():
        make = calls(call(name, *args))
        assert hostile.inside(make).verdict == "ok"
        assert hostile.inside(make).verdict == "ok", "the second one is the first to make it, too"
        made = hostile.outside(make)
        assert made.verdict == "ok", "and the host has none"
        assert hostile.outside(make).verdict == "EEXIST"
        remove = {"shmget": ["shmctl", 0], "semget": ["semctl", 0, 0], "msgget": ["msgctl", 0]}[name]
        control = [number(str(remove[0])), made.values[0], *remove[1:]]
        assert hostile.outside(calls(call(*control))).verdict == "ok"
    queue = calls(call("mq_open", "sandboxcore-test", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600, 0))
    # (Landlock lets nobody open a queue: mqueue files are below no path that could be granted)
    assert hostile.inside(queue, landlock=False).verdict == "ok"
    assert hostile.inside(queue, landlock=False).verdict == "ok"
    assert hostile.outside(queue).verdict == "ok"
    assert hostile.outside(queue).verdict == "EEXIST"
    assert hostile.outside(calls(call("mq_unlink", "sandboxcore-test"))).verdict == "ok"


# --- the processor ------------------------------------------------------------------------------


def test_more_than_a_fair_share_of_the_processor(hostile: Hostile) -> None:
    urgent = calls(
        call("sched_setscheduler", 0, 1, pack("=i", 1)),
        call("setpriority", PRIO_PROCESS, 0, -20),
    )
    for user in USERS:
        assert hostile.inside(urgent, user=user).answers == ("EPERM", "EACCES")


# A daemon that root has given a better place than others: to itself, and as a right to take one.
FAVOURITE = """
import json, os, resource, sys
from pathlib import Path
from escape.hostile import Hostile, as_nobody, call, calls, pack

hostile, careless = Hostile(Path(sys.argv[1])), as_nobody()
if sys.argv[2] == "rights":
    for limit, value in ((resource.RLIMIT_RTPRIO, 1), (resource.RLIMIT_NICE, 40)):
        try:
            resource.setrlimit(limit, (value, value))
        except ValueError:
            sys.exit("not allowed")
    attack = calls(
        call("sched_setscheduler", 0, 1, pack("=i", 1)),
        call("sched_setscheduler", 0, 0, pack("=i", 0)),
        call("setpriority", 0, 0, -20),
    )
elif sys.argv[2] == "realtime":
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    attack = calls(call("sched_getscheduler", 0))
elif sys.argv[2] == "nice":
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    attack = calls(call("getpriority", 0, 0))  # answers 20 - nice
else:
    try:
        Path("/proc/self/oom_score_adj").write_text("-900")
    except PermissionError:
        sys.exit("not allowed")
    attack = ["exec", "cat", "/proc/self/oom_score_adj"]
    seen = hostile.run_outside(attack, **careless).stdout, hostile.run_inside(attack).stdout
    json.dump([int(text) for text in seen], sys.stdout)
    sys.exit()
outside, inside = hostile.outside(attack, **careless), hostile.inside(attack)
json.dump([[*outside.answers, outside.values[-1]], [*inside.answers, inside.values[-1]]], sys.stdout)
"""


@pytest.mark.needs_root
@pytest.mark.parametrize(
    ("what", "passed_on", "fair"),
    [
        ("realtime", ["ok", 1], ["ok", 0]),
        ("nice", ["ok", 25], ["ok", 20]),
        ("oom", -900, 0),
        ("rights", ["ok", "ok", "ok", 0], ["EPERM", "ok", "EACCES", -1]),
    ],
)
def test_priority_of_the_launcher(
    hostile: Hostile, exec_dir: Path, what: str, passed_on: Any, fair: Any
) -> None:
    """What the system's administrator granted the launcher is not for strangers' code."""
    program = exec_dir / "hostile"
    shutil.copy(hostile.program, program)
    command = [sys.executable, "-c", FAVOURITE, program, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=host_environment())
    if "not allowed" in done.stderr:
        pytest.skip("only root can do this, and only with CAP_SYS_RESOURCE")
    assert done.returncode == 0, done.stderr
    outside, inside = json.loads(done.stdout)
    assert outside == passed_on
    assert inside == fair
