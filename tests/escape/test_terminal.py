"""Attacks on the caller's terminal and on what its output is written to."""

import fcntl
import os
import pty
import subprocess
import sys
import tty
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    AT_FDCWD,
    BUFFER,
    MARKER,
    Hostile,
    allowing,
    call,
    calls,
    marking,
    open_for,
    pack,
    result,
)
from support import host_environment

import sandboxcore

pytestmark = pytest.mark.escape

TIOCSCTTY, TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD = 0x540E, 0x5412, 0x541C, 0x541D, 0x5423
TCGETS, TCSETS, FIONREAD, TIOCGPTN, TIOCSPTLCK = 0x5401, 0x5402, 0x541B, 0x80045430, 0x40045431

# A program in the foreground of a terminal, whose three streams are that terminal. It runs an attack
# with those, and then looks how much somebody has typed meanwhile.
LAUNCHER = """
import array, fcntl, json, os, subprocess, sys, termios
from pathlib import Path
import sandboxcore
from escape.hostile import Hostile, allowing, as_nobody

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
hostile, place, report = Hostile(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
attack, passed = sys.argv[4].split("\\x1f"), [9]
os.dup2(0, 9)
if place == "outside":
    done = hostile.run_outside(attack, stdin=0, stdout=None, pass_fds=passed)
else:
    options = {"seccomp": allowing("ioctl")} if place == "unfiltered" else {}
    done = hostile.run_inside(
        attack, stdin=0, stdout=None, stderr=None, pass_fds=passed, timeout=10, **options
    )
typed = array.array("i", [0])
fcntl.ioctl(0, termios.FIONREAD, typed)
flags = [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK for fd in (0, 1, 2)]
os.write(report, json.dumps([typed[0], any(flags)]).encode())
"""


def on_a_terminal(hostile: Hostile, attack: list[str], place: str) -> tuple[list[str], int, bool]:
    """The answers, how many bytes were typed into the terminal, and whether it is non-blocking."""
    import json

    terminal, end = pty.openpty()
    report, for_report = os.pipe()
    try:
        tty.setraw(end)
        args = [hostile.program, place, str(for_report), "\x1f".join(attack)]
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *args],
            stdin=end, stdout=end, stderr=end, pass_fds=[for_report],
            start_new_session=True, env=host_environment(),
        )  # fmt: skip
        os.close(for_report)
        with open(report, "rb", closefd=False) as file:
            told = file.read()
        process.wait(30)
        os.set_blocking(terminal, False)
        output = os.read(terminal, 65536).decode()
        assert told, output
        typed, nonblocking = json.loads(told)
        return [line.split()[0] for line in output.partition("\0")[0].splitlines()], typed, nonblocking
    finally:
        for fd in (terminal, end, report):
            os.close(fd)


def tiocsti_works() -> bool:
    path = Path("/proc/sys/dev/tty/legacy_tiocsti")
    return os.geteuid() == 0 or not path.exists() or path.read_text().strip() == "1"


@pytest.mark.parametrize("high", [0, 1 << 32, 1 << 63])
def test_typing_into_the_terminal(hostile: Hostile, high: int) -> None:
    """CVE-2017-5226, and CVE-2019-10063 with the bits that the kernel does not look at."""
    attack = calls(call("ioctl", 0, high | TIOCSTI, "x"), call("ioctl", 9, high | TIOCSTI, "x"))
    answers, typed, _ = on_a_terminal(hostile, attack, "outside")
    if tiocsti_works():
        assert (answers, typed) == (["ok", "ok"], 2)
    else:
        assert answers == ["EIO", "EIO"]
    assert on_a_terminal(hostile, attack, "inside")[:2] == (["EPERM", "EPERM"], 0)
    # without the filter: stdin is a pipe, and a terminal is not controlled by a stranger's session
    answers, typed, _ = on_a_terminal(hostile, attack, "unfiltered")
    assert answers[0] == "ENOTTY"
    assert answers[1] in ("EPERM", "EIO")
    assert typed == 0


def test_controlling_terminal(hostile: Hostile) -> None:
    attack = calls(
        call("openat", AT_FDCWD, "/dev/tty", os.O_RDWR),
        call("ioctl", 0, TCGETS, BUFFER),
        call("ioctl", 1, TCGETS, BUFFER),
        call("ioctl", 2, TCGETS, BUFFER),
    )
    assert on_a_terminal(hostile, attack, "outside")[0] == ["ok"] * 4
    for place in ("inside", "unfiltered"):
        assert on_a_terminal(hostile, attack, place)[0] == ["ENXIO", *["ENOTTY"] * 3]
    take = calls(call("ioctl", 9, TIOCSCTTY, 0), call("ioctl", 9, TIOCSCTTY, 1))
    for place in ("inside", "unfiltered"):
        assert on_a_terminal(hostile, take, place)[0] == ["EPERM", "EPERM"]


def test_nonblocking_terminal(hostile: Hostile) -> None:
    """It would stay that way for the shell that comes after."""
    attack = calls(*(call("fcntl", fd, fcntl.F_SETFL, os.O_NONBLOCK | os.O_RDWR) for fd in (0, 1, 2)))
    assert on_a_terminal(hostile, attack, "outside")[2] is True
    assert on_a_terminal(hostile, attack, "inside") == (["ok", "ok", "ok"], 0, False)


@pytest.mark.parametrize("request_", [TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD])
@pytest.mark.parametrize("high", [0, 1 << 32])
def test_terminal_requests(hostile: Hostile, request_: int, high: int) -> None:
    """On a terminal of the sandbox's own even: the console and line disciplines are everybody's."""
    attack = calls(
        call("openat", AT_FDCWD, "/dev/ptmx", os.O_RDWR | os.O_NOCTTY),
        call("ioctl", result(0), TIOCSPTLCK, pack("=i", 0)),
        call("ioctl", result(0), high | request_, pack("=i", 0)),
    )
    assert hostile.inside(attack).answers == ("ok", "ok", "EPERM")
    marked = hostile.inside(attack, seccomp=marking("ioctl"))
    assert marked.answers == ("ok", MARKER, MARKER)
    if request_ in (TIOCSETD, TIOCLINUX):
        behind = hostile.inside(attack, seccomp=allowing("ioctl")).answers[2]
        assert behind == hostile.outside(attack).answers[2]
        assert behind in ("ok", "ENOTTY")


def test_terminals_of_the_host(hostile: Hostile) -> None:
    """/dev/pts is another instance, in which the numbers start again."""
    terminal, end = pty.openpty()
    name = os.ttyname(end)
    try:
        attack = open_for(name, os.O_RDWR | os.O_NOCTTY)
        assert hostile.outside(attack).verdict == "ok"
        assert hostile.inside(attack).verdict == "ENOENT"
        for other in ("/dev/console", "/dev/tty0", "/dev/tty1", "/dev/ttyS0", "/dev/vcs"):
            assert hostile.inside(open_for(other, os.O_RDWR)).verdict == "ENOENT"
    finally:
        os.close(terminal)
        os.close(end)


# --- files behind the streams -------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["truncate", "read", "seek"])
def test_reopening_the_output_file(hostile: Hostile, tmp_path: Path, attack: str) -> None:
    """Through /proc, a descriptor opened for appending can be had for reading and truncating."""
    path, theirs = tmp_path / "log", b"of somebody else\n"
    path.touch()
    path.chmod(0o666)
    reopen = "/proc/self/fd/1"
    steps = {
        "truncate": [
            call("openat", AT_FDCWD, reopen, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK),
            call("ftruncate", 1, 0),
        ],
        "read": [
            call("openat", AT_FDCWD, reopen, os.O_RDONLY | os.O_NONBLOCK),
            call("pread64", result(0), BUFFER, 100, 0),
        ],
        "seek": [call("lseek", 1, 0, os.SEEK_SET), call("write", 1, "mine", 4)],
    }[attack]

    def try_it(run: Any) -> bytes:
        path.write_bytes(theirs)
        with open(path, "rb+" if attack == "seek" else "ab") as file:
            file.seek(0, os.SEEK_END)
            run(calls(*steps), stdout=file)
        return path.read_bytes()

    inside = try_it(hostile.run_inside)
    assert inside.startswith(theirs)
    assert inside.count(theirs) == 1
    outside = try_it(hostile.run_outside)
    assert not outside.startswith(theirs) or outside.count(theirs) == 2


def test_reopening_the_input_file(hostile: Hostile, tmp_path: Path) -> None:
    path = tmp_path / "input"
    path.write_text("the input")
    path.chmod(0o666)
    attack = calls(
        call("openat", AT_FDCWD, "/proc/self/fd/0", os.O_WRONLY | os.O_NONBLOCK),
        call("pwrite64", result(0), "changed", 7, 0),
    )
    with open(path, "rb") as file:
        hostile.run_inside(attack, stdin=file)
        assert path.read_text() == "the input"
    with open(path, "rb") as file:
        hostile.run_outside(attack, stdin=file)
        assert path.read_text() == "changedut"


def test_flags_of_the_callers_descriptors(hostile: Hostile) -> None:
    attack = calls(call("fcntl", 1, fcntl.F_SETFL, os.O_NONBLOCK))
    reading, writing = os.pipe()
    try:
        assert hostile.run_inside(attack, stdout=writing).returncode == 0
        assert os.get_blocking(writing)
        hostile.run_outside(attack, stdout=writing)
        assert not os.get_blocking(writing)
    finally:
        os.close(reading)
        os.close(writing)


def test_streams_are_pipes_of_this_run(hostile: Hostile, tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        sandboxcore.run(
            ["sh", "-c", "for n in 0 1 2; do readlink /proc/$$/fd/$n; done"],
            input=b"x", stdout=out, stderr=err,
        )  # fmt: skip
    kinds = [line.partition(":")[0] for line in (tmp_path / "out").read_text().splitlines()]
    assert kinds == ["pipe", "pipe", "pipe"]
