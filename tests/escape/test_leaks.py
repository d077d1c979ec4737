"""What a careless launcher passes on: descriptors, environment, signals, groups, capabilities..."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from escape.hostile import PROGRAM, Hostile, conversation
from support import host_environment, marked

import sandboxcore
from sandboxcore import SandboxSpec

pytestmark = pytest.mark.escape

# A host program with everything that could be passed on, in a state worth noticing.
LAUNCHER = """
import ctypes, fcntl, json, os, resource, signal, socket, subprocess, sys, tempfile
from pathlib import Path
import sandboxcore
from escape.hostile import BUFFER, Hostile, call, calls

hostile, marker = Hostile(Path(sys.argv[1])), sys.argv[2]
folder = tempfile.mkdtemp()
secret = os.path.join(folder, marker)
Path(secret).write_text(marker)
deleted = os.open(os.path.join(folder, "deleted"), os.O_RDWR | os.O_CREAT)
os.write(deleted, marker.encode())
os.unlink(os.path.join(folder, "deleted"))
left, right = socket.socketpair()
opened = [
    os.open(secret, os.O_RDWR), os.open(folder, os.O_RDONLY), os.open("/", os.O_PATH), deleted,
    left.fileno(), socket.socket().fileno(), os.memfd_create(marker), *os.pipe(),
]
held = [os.dup2(fd, 40 + at) for at, fd in enumerate(opened)]  # dup2: inheritable
os.chdir(folder)
os.umask(0)
for sig in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGTERM, signal.SIGRTMIN + 3):
    signal.signal(sig, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGALRM])
libc = ctypes.CDLL(None)
libc.personality(0x0040000)  # ADDR_NO_RANDOMIZE
if os.geteuid() == 0:
    os.setgroups([0, 4, 27])
    data = (ctypes.c_uint32 * 6)(*[0xFFFFFFFF] * 6)
    status = dict(line.split(":\\t") for line in Path("/proc/self/status").read_text().splitlines())
    low = int(status["CapPrm"], 16) & 0xFFFFFFFF
    high = int(status["CapPrm"], 16) >> 32
    data = (ctypes.c_uint32 * 6)(low, low, low, high, high, high)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    assert libc.capset(header, data) == 0
    for capability in range(41):
        libc.prctl(47, 2, capability, 0, 0)  # PR_CAP_AMBIENT_RAISE
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)


def seen(run):
    descriptors = run(calls(*(call("fcntl", fd, fcntl.F_GETFD) for fd in range(100)))).answers
    status = run(["exec", "cat", "/proc/self/status"])
    return {
        "descriptors": [fd for fd, answer in enumerate(descriptors) if answer == "ok"],
        "status": dict(line.split(":\\t", 1) for line in status.stdout.decode().splitlines()),
        "environ": run(["exec", "cat", "/proc/self/environ"]).stdout.decode(),
        "cwd": run(["exec", "pwd"]).stdout.decode().strip(),
        "personality": run(calls(call("personality", 0xFFFFFFFF))).values[0],
        "limits": run(["exec", "cat", "/proc/self/limits"]).stdout.decode(),
    }


class Both:
    def __init__(self, run, outcome):
        self.run, self.outcome = run, outcome

    def __call__(self, args):
        return (self.outcome if args[0] == "call" else self.run)(args)


careless = {"close_fds": False, "restore_signals": False}
json.dump(
    {
        "outside": seen(
            Both(lambda a: hostile.run_outside(a, **careless), lambda a: hostile.outside(a, **careless))
        ),
        "inside": seen(Both(hostile.run_inside, hostile.inside)),
        "held": held,
    },
    sys.stdout,
)
sys.stdout.flush()
os.unlink(secret)
os.chdir("/")
os.rmdir(folder)
"""


@pytest.fixture(scope="module")
def seen(hostile: Hostile) -> Any:
    """What a payload sees of its launcher, without a sandbox and in one."""
    env = host_environment() | {"SECRET": "in the environment", "LD_DEBUG_OUTPUT": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, hostile.program, "on the command line"],
        capture_output=True, text=True, timeout=60, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_descriptors(seen: Any) -> None:
    """Files, directories, deleted files, sockets, pipes, memfds; also those of the launcher itself."""
    assert set(seen["held"]) <= set(seen["outside"]["descriptors"])
    assert seen["inside"]["descriptors"] == [0, 1, 2]


def test_environment(seen: Any) -> None:
    def variables(place: str) -> set[str]:
        return {item.partition("=")[0] for item in seen[place]["environ"].split("\0") if item}

    assert "in the environment" in seen["outside"]["environ"]
    assert variables("inside") == {"PATH", "HOME", "USER", "LOGNAME", "LANG"}
    assert "in the environment" not in seen["inside"]["environ"]


def test_working_directory(seen: Any) -> None:
    assert seen["outside"]["cwd"] != "/workspace"
    assert seen["inside"]["cwd"] == "/workspace"


def test_umask(seen: Any) -> None:
    assert seen["outside"]["status"]["Umask"] == "0000"
    assert seen["inside"]["status"]["Umask"] == "0022"


@pytest.mark.parametrize("name", ["SigIgn", "SigBlk", "SigCgt", "SigPnd", "ShdPnd"])
def test_signals(seen: Any, name: str) -> None:
    if name in ("SigIgn", "SigBlk"):
        assert int(seen["outside"]["status"][name], 16) != 0
    assert int(seen["inside"]["status"][name], 16) == 0


def test_personality_of_the_launcher(seen: Any) -> None:
    """A launcher under a debugger has address randomisation off; its payloads need it."""
    assert seen["outside"]["personality"] == 0x0040000
    assert seen["inside"]["personality"] == 0


def test_groups(seen: Any) -> None:
    if os.geteuid() == 0:
        assert seen["outside"]["status"]["Groups"].split() == ["0", "4", "27"]
    assert seen["inside"]["status"]["Groups"].split() == []


@pytest.mark.parametrize("name", ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"])
def test_capabilities(seen: Any, name: str) -> None:
    """The launcher of root has them even inheritable and ambient (CVE-2022-24769 and its like)."""
    if os.geteuid() == 0 or name == "CapBnd":
        assert int(seen["outside"]["status"][name], 16) != 0
    assert int(seen["inside"]["status"][name], 16) == 0


def test_privileges(seen: Any) -> None:
    inside, outside = seen["inside"]["status"], seen["outside"]["status"]
    assert (outside["NoNewPrivs"], outside["Seccomp"]) == ("0", "0")
    assert (inside["NoNewPrivs"], inside["Seccomp"]) == ("1", "2")
    assert inside["Uid"].split() == ["1000"] * 4
    assert inside["Gid"].split() == ["1000"] * 4


def test_core_size(seen: Any) -> None:
    """The launcher asks for core dumps; a payload's would lie where the host's root puts them."""

    def core(place: str) -> list[str]:
        lines = seen[place]["limits"].splitlines()
        return next(line for line in lines if "core" in line).split()[4:6]

    assert "1" not in core("outside")
    assert core("inside") == ["1", "1"]


@pytest.mark.parametrize("user", ["1000", "0", "65535:77"])
def test_the_record_says_what_the_payload_sees(user: str) -> None:
    spec = SandboxSpec(user=user)
    done = sandboxcore.run(["cat", "/proc/self/status"], spec=spec, text=True, record=True)
    status = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    record = done.capabilities
    assert record is not None
    assert record.capability_sets == dict.fromkeys(record.capability_sets, 0)
    assert len(record.capability_sets) == 5
    for name, mask in record.capability_sets.items():
        assert int(status[name], 16) == mask
    assert record.no_new_privs == (status["NoNewPrivs"] == "1")
    assert record.seccomp_mode == int(status["Seccomp"]) == 2
    assert record.seccomp_filters == int(status["Seccomp_filters"]) >= 1
    assert record.groups == ()
    assert {record.uid} == {int(uid) for uid in status["Uid"].split()}
    assert {record.gid} == {int(gid) for gid in status["Gid"].split()}
    for kind, inode in record.namespaces.items():
        own = os.stat(f"/proc/self/ns/{kind}").st_ino
        assert (inode == own) == (kind == "time"), kind


@pytest.mark.parametrize("user", ["1000", "0"])
def test_ids_on_the_host(hostile: Hostile, marker: str, user: str) -> None:
    """Root's payloads are nobody that the host knows, whatever they are inside."""
    spec = hostile.spec.replace(user=user)
    hold = [PROGRAM, "linger", "plain", marker]
    with conversation(sandboxcore.run, hold, spec=spec, timeout=20) as talk:
        talk.await_ready()
        (pid,) = marked(marker)
        with open(f"/proc/{pid}/status") as file:
            status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
        if os.geteuid() == 0:
            assert {int(uid) for uid in status["Uid"].split()} == {0x70000000 + int(user)}
            assert {int(gid) for gid in status["Gid"].split()} == {0x70000000 + int(user)}
        else:
            assert {int(uid) for uid in status["Uid"].split()} == {os.geteuid()}
        os.kill(pid, 9)


def test_command_lines_of_other_runs(hostile: Hostile, marker: str) -> None:
    """What is on one run's command line and in its environment is in no later one's memory of init."""
    sandboxcore.run([PROGRAM, "fdbomb", "1"], spec=hostile.spec, env={"SECRET": marker})
    look = "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null"
    assert marker.encode() not in sandboxcore.run(["sh", "-c", look]).stdout
    visible = sandboxcore.run(["sh", "-c", look], env={"SECRET": marker, "PATH": "/bin"}).stdout
    assert marker.encode() in visible
