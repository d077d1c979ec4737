"""Commands that run on their own: how they end, what is kept of their output, who may write to them."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    IS_ROOT,
    PROJECT,
    PYTHON,
    descendants,
    gone,
    host_environment,
    leaves_nothing,
    marked,
    parents,
    wait_until,
)

from sandboxcore import (
    PIPE,
    Cause,
    InvalidTransition,
    Limits,
    ProgramNotFound,
    Sandbox,
    SandboxError,
    SandboxGone,
    SandboxNotFound,
    SetupError,
    SpecError,
    UnsupportedHost,
)
from sandboxcore.command import Exit, Stderr, Stdout
from sandboxcore.detached import DetachedCommand
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.pipes import Terminal

PATIENCE = 30
SLEEP = ["sleep", "300"]


@pytest.fixture(params=["private", "persistent"])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox of either kind: detached commands are the same in both."""
    if request.param == "private":
        with Sandbox.create() as sandbox:
            yield sandbox
        return
    sandbox = PersistentSandbox.create(state_dir=tmp_path / "state")
    try:
        yield sandbox
    finally:
        sandbox.destroy()


@pytest.fixture
def private() -> Iterator[Sandbox]:
    with Sandbox.create() as sandbox:
        yield sandbox


def python(code: str, *args: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", textwrap.dedent(code), *args]


def sh(script: str, *args: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *args]


def in_log(command: DetachedCommand, text: bytes, stream: Any = "stdout") -> bytes:
    """Wait until a stream has this; returns all of it that is kept."""
    wait_until(lambda: text in command.logs(stream).data, f"{text!r} in {stream}", PATIENCE)
    return command.logs(stream).data


# --- a stream whose every byte is known -------------------------------------------------------------

LINE = 16
WRITER = f"""
    import sys
    total, piece = int(sys.argv[1]), int(sys.argv[2])
    at = 0
    while at < total:
        first, last = at // {LINE}, (at + piece) // {LINE} + 1
        text = b"".join(b"%0{LINE - 1}d\\n" % n for n in range(first, last))
        size = min(piece, total - at)
        sys.stdout.buffer.write(text[at % {LINE}:at % {LINE} + size])
        sys.stdout.buffer.flush()
        at += size
"""


def expected(offset: int, size: int) -> bytes:
    """What WRITER writes there."""
    first, last = offset // LINE, (offset + size) // LINE + 1
    text = b"".join(b"%0*d\n" % (LINE - 1, n) for n in range(first, last))
    return text[offset % LINE : offset % LINE + size]


# --- how it ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_exit_status(box: Sandbox, code: int) -> None:
    command = box.detach(sh('exit "$1"', str(code)))
    result = command.wait(PATIENCE)
    assert (result.returncode, result.signal, result.cause) == (code, None, Cause.EXITED)
    assert (command.returncode, command.status) == (code, "failed" if code else "completed")
    assert command.pid_inside > 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1])
def test_ended_by_a_signal_of_its_own(box: Sandbox, number: signal.Signals) -> None:
    command = box.detach(sh('kill -"$1" $$', str(int(number))))
    result = command.wait(PATIENCE)
    assert (result.returncode, result.signal) == (-number, number)
    assert (result.cause, command.status) == (Cause.SIGNALED, "failed")


def test_ended_by_us(box: Sandbox) -> None:
    polite, killed = box.detach(SLEEP), box.detach(SLEEP)
    assert (polite.status, polite.returncode, polite.result) == ("running", None, None)
    polite.terminate()
    killed.kill()
    assert (polite.wait(PATIENCE).signal, polite.wait(0).cause) == (signal.SIGTERM, Cause.SIGNALED)
    assert (killed.wait(PATIENCE).signal, killed.wait(0).cause) == (signal.SIGKILL, Cause.KILLED)
    polite.kill()  # an ended one does not mind
    assert polite.returncode == -signal.SIGTERM


def test_timeout(box: Sandbox) -> None:
    command = box.detach(sh("echo before; sleep 300"), timeout=0.3)
    result = command.wait(PATIENCE)
    assert (result.returncode, result.cause, result.timed_out) == (-signal.SIGKILL, Cause.TIMEOUT, True)
    assert 0.2 < result.duration < 10
    assert command.logs().data == b"before\n"


def test_wait_has_a_limit(box: Sandbox) -> None:
    command = box.detach(SLEEP)
    before = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(0.2)
    assert 0.2 <= time.monotonic() - before < 5
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(0)
    assert command.status == "running"


def test_totals_and_usage(box: Sandbox) -> None:
    result = box.detach(sh("printf 12345; printf 123 >&2")).wait(PATIENCE)
    assert (result.stdout_total, result.stderr_total) == (5, 3)
    assert result.stdout is None
    assert result.usage.max_rss > 100_000


def test_scopes(box: Sandbox) -> None:
    code = """
        import os, signal, sys, time
        def note(name):
            # no print(): the signal may come in the middle of one
            signal.signal(signal.SIGUSR1, lambda *_: (os.write(1, name.encode() + b"\\n"), os._exit(0)))
        if os.fork() == 0:
            note("same group"); print("ready", flush=True); time.sleep(300)
        if os.fork() == 0:
            os.setpgid(0, 0); note("other group"); print("ready", flush=True); time.sleep(300)
        note("itself")
        signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"itself\\n"))
        print("ready", flush=True)
        while True: time.sleep(300)
    """
    told: dict[Any, set[str]] = {
        "process": {"itself"},
        "group": {"itself", "same group"},
        "tree": {"itself", "same group", "other group"},
    }
    for scope, names in told.items():
        command = box.detach(python(code))
        wait_until(lambda c=command: c.logs().data.count(b"ready") == 3, "three processes", PATIENCE)
        command.send_signal(signal.SIGUSR1, scope)
        wanted = {"ready", *names}
        wait_until(lambda c=command, w=wanted: set(lines(c)) >= w, f"{names} told", PATIENCE)
        command.kill()
        command.wait(PATIENCE)
        assert set(lines(command)) == wanted


def lines(command: DetachedCommand) -> list[str]:
    return command.logs().data.decode().splitlines()


def test_wrong_signals(private: Sandbox) -> None:
    command = private.detach(SLEEP)
    with pytest.raises(ValueError, match="scope"):
        command.send_signal(signal.SIGTERM, "everything")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="65"):
        command.send_signal(65)
    assert command.status == "running"


def test_nothing_of_it_is_left(box: Sandbox) -> None:
    """A daemon that ignores everything ends with its command, and before that is reported."""
    mark = os.urandom(8).hex()
    code = """
        import os, signal, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                print("up", flush=True)
                time.sleep(300)
            os._exit(0)
        sys.stdin.read()
    """
    command = box.detach(python(code, mark), stdin=PIPE)
    in_log(command, b"up")
    assert len(marked(mark)) == 2
    command.input(last=True).close()
    assert command.wait(PATIENCE).returncode == 0
    assert marked(mark) == set()


# --- which there are --------------------------------------------------------------------------------


def test_list_and_find(box: Sandbox) -> None:
    made = [box.detach(sh(f"exit {number}")) for number in range(5)]
    for command in made:
        command.wait(PATIENCE)
    assert [command.id for command in box.commands()] == [command.id for command in made]
    assert [command.returncode for command in box.commands()] == list(range(5))
    found = box.command(made[3].id)
    assert (found.id, found.returncode, found.args, found.pty) == (made[3].id, 3, made[3].args, False)
    assert abs(found.started_at - time.time()) < 120
    with pytest.raises(SandboxNotFound, match="cmd-none"):
        box.command("cmd-none")


def test_a_forgotten_one_goes_on(box: Sandbox) -> None:
    with box.detach(sh("read line; echo got $line; exit 4"), stdin=PIPE) as command:
        name = command.id
    with pytest.raises(ValueError, match="closed"):
        command.logs()
    del command
    again = box.command(name)
    assert again.status == "running"
    with again.input() as stdin:
        stdin.write(b"it\n")
    assert again.wait(PATIENCE).returncode == 4
    assert again.logs().data == b"got it\n"


def test_a_failing_start_leaves_nothing(box: Sandbox, tmp_path: Path) -> None:
    box.exec(["true"])
    with leaves_nothing():
        for _ in range(5):
            with pytest.raises(ProgramNotFound):
                box.detach(["no-such-program"])
        with pytest.raises(SetupError) as caught:
            box.detach(["true"], cwd="/nowhere")
        assert caught.value.stage == "cwd"
        with pytest.raises(SpecError, match="keep"):
            box.detach(["true"], keep="1K")
        with pytest.raises(ValueError, match="stdin"):
            box.detach(["true"], stdin=0)
    assert box.commands() == []
    if isinstance(box, PersistentSandbox):
        assert sorted(os.listdir(box._store.home(box.id).path)) == ["keeper", "pause", "work"]
    assert box.exec(["true"]).ok


def test_limits_and_user(box: Sandbox) -> None:
    command = box.detach(sh("ulimit -n; id -u; pwd; echo $X"), limits=Limits(open_files=33), cwd="/tmp",
                         env={"X": "y", "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert command.wait(PATIENCE).ok, command.logs("stderr")
    assert lines(command) == ["33", "1000", "/tmp", "y"]
    killed = box.detach(sh("while :; do :; done"), limits=Limits(cpu_time=1)).wait(PATIENCE)
    assert killed.signal in (signal.SIGXCPU, signal.SIGKILL)
    if box._plan.host.mode == "rootless":
        with pytest.raises(UnsupportedHost):
            box.detach(["id"], user=1234)
        return
    command = box.detach(["id", "-u"], user=1234)
    assert command.wait(PATIENCE).ok
    assert command.logs().data == b"1234\n"


# --- what is kept of its output ---------------------------------------------------------------------


def test_logs_by_offset(box: Sandbox) -> None:
    command = box.detach(sh("printf 0123456789; printf abc >&2"))
    command.wait(PATIENCE)
    whole = command.logs()
    assert (whole.data, whole.offset, whole.end) == (b"0123456789", 0, 10)
    piece = command.logs(since=3, size=4)
    assert (piece.data, piece.offset, piece.end) == (b"3456", 3, 7)
    assert command.logs(since=piece.end).data == b"789"
    assert command.logs("stderr").data == b"abc"
    for nothing in (command.logs(size=0), command.logs(since=10), command.logs(since=1 << 70)):
        assert nothing.data == b""
    assert command.logs(since=1 << 70).offset == 1 << 70
    for wrong in ({"since": -1}, {"size": -1}):
        with pytest.raises(ValueError, match="negative"):
            command.logs(**wrong)
    with pytest.raises(ValueError, match="stream"):
        command.logs("stdin")  # type: ignore[arg-type]


def test_logs_survive_the_end_of_the_sandbox(box: Sandbox) -> None:
    command = box.detach(sh("echo kept; exit 9"))
    command.wait(PATIENCE)
    box.stop()
    assert (command.logs().data, command.returncode) == (b"kept\n", 9)
    assert box.command(command.id).returncode == 9


def test_the_ring_keeps_the_end(box: Sandbox) -> None:
    """10 MiB through 64 KiB: offsets go on, what is kept is right, what is lost is told."""
    total, keep = 10 << 20, 64 << 10
    command = box.detach(python(WRITER, str(total), "60000"), keep="64K")
    assert command.wait(60).stdout_total == total
    log = command.logs(size=total)
    assert (log.offset, log.end) == (total - keep, total)
    assert log.data == expected(log.offset, keep)
    for since in (0, total - keep - 1, total - keep, total - keep + 1, total - 7, total):
        for size in (0, 1, 5, 4096, keep):
            piece = command.logs(since=since, size=size)
            assert piece.offset == max(since, total - keep)
            assert piece.data == expected(piece.offset, min(size, total - piece.offset))


@pytest.mark.parametrize("piece", [1 << 20, 65536, 4097, 61])
def test_reading_while_it_is_written(private: Sandbox, piece: int) -> None:
    """Never a torn byte, for several readers at once, however often the ring goes round."""
    total = 24 << 20 if piece > 4096 else 2 << 20
    command = private.detach(python(WRITER, str(total), str(piece)), keep=4096 + 37)
    rounds: list[int] = []

    def look(size: int) -> None:
        handle, count, at = private.command(command.id), 0, 0
        while handle.status == "running" or at < total:
            log = handle.logs(since=at, size=size)
            assert log.offset >= at
            assert log.data == expected(log.offset, len(log.data))
            count, at = count + 1, log.end
        handle.close()
        rounds.append(count)

    run_all([lambda size=size: look(size) for size in (100, 4133, 1 << 20)])
    assert command.wait(PATIENCE).stdout_total == total
    assert len(rounds) == 3
    assert min(rounds) > 10


def run_all(actions: list[Any]) -> None:
    """Each in a thread of its own; the first failure is raised."""
    failures: list[BaseException] = []

    def attempt(action: Any) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


# --- following --------------------------------------------------------------------------------------

BOTH = """
    import sys
    for n in range(200):
        print("out", n, flush=True)
        print("err", n, file=sys.stderr, flush=True)
    sys.stdin.read()
    sys.exit(5)
"""


def test_follow_both(box: Sandbox) -> None:
    command = box.detach(python(BOTH), stdin=PIPE)
    got, offsets, end = {Stdout: b"", Stderr: b""}, {Stdout: 0, Stderr: 0}, None
    for event in command.follow():
        if isinstance(event, Exit):
            end = event.result
            continue
        assert event.offset == offsets[type(event)]
        got[type(event)] += event.data
        offsets[type(event)] += len(event.data)
        if got[Stdout].endswith(b"199\n") and got[Stderr].endswith(b"199\n"):
            command.input(last=True).close()
    assert end is not None
    assert end.returncode == 5
    assert got[Stdout].split(b"\n")[:2] == [b"out 0", b"out 1"]
    assert got[Stdout].count(b"\n") == got[Stderr].count(b"\n") == 200


def test_follow_one_and_from_an_offset(box: Sandbox) -> None:
    command = box.detach(sh("printf 12345; printf abcde >&2"))
    command.wait(PATIENCE)
    events = list(command.follow(stdout=None, stderr=2))
    assert [(type(e), getattr(e, "data", None), getattr(e, "offset", None)) for e in events] == [
        (Stderr, b"cde", 2),
        (Exit, None, None),
    ]
    assert [type(event) for event in command.follow(stdout=None, stderr=None)] == [Exit]
    assert [type(event) for event in command.follow(stdout=99, stderr=None)] == [Exit]


def test_a_slow_follower_misses_but_is_told(private: Sandbox) -> None:
    """The command does not wait for it; what comes is in order, and right."""
    total = 8 << 20
    command = private.detach(python(WRITER, str(total), "65536"), keep=8192)
    at, lost = 0, 0
    follower = command.follow(stderr=None)
    first = next(follower)
    assert isinstance(first, Stdout)
    assert first.offset >= 0
    assert first.data == expected(first.offset, len(first.data))
    command.wait(60)
    for event in follower:
        if isinstance(event, Stdout):
            assert event.offset >= at
            assert event.data == expected(event.offset, len(event.data))
            lost += event.offset - at
            at = event.offset + len(event.data)
    assert at == total
    assert lost > 0


def test_many_followers(box: Sandbox) -> None:
    """More than a launcher tells of news: all see everything, nobody waits in a busy loop."""
    command = box.detach(sh("echo first; read line; echo $line; exit 6"), stdin=PIPE)
    seen: list[bytes] = []
    busy: list[float] = []
    reading = threading.Semaphore(0)

    def follow() -> None:
        data, code = b"", None
        for event in box.command(command.id).follow():
            if isinstance(event, Exit):
                code = event.result.returncode
            else:
                data += event.data
                reading.release()
        assert code == 6
        seen.append(data)

    def finish() -> None:
        try:
            for _ in range(24):
                assert reading.acquire(timeout=PATIENCE)
            before = time.process_time()
            time.sleep(1)  # long enough for a busy loop to show
            busy.append(time.process_time() - before)
        finally:
            with command.input() as stdin:
                stdin.write(b"last\n")

    run_all([*[follow] * 24, finish])
    assert seen == [b"first\nlast\n"] * 24
    assert busy[0] < 0.6


def test_a_follower_that_leaves(box: Sandbox) -> None:
    command = box.detach(sh("read line; echo $line"), stdin=PIPE)
    for _ in range(40):  # more than there are places
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.001)
    with command.input() as stdin:
        stdin.write(b"x\n")
    assert command.wait(PATIENCE).ok


# --- writing to it ----------------------------------------------------------------------------------


def test_input(box: Sandbox) -> None:
    command = box.detach(["cat"], stdin=PIPE)
    with command.input() as first, command.input() as second:
        first.write(b"one\n")
        second.write(b"two\n")
    in_log(command, b"two\n")
    assert command.status == "running"  # closing is no end-of-file
    with box.command(command.id).input(last=True) as stdin:
        stdin.write(b"three\n")
        with pytest.raises(ValueError, match="any more"):
            command.input()
        assert command.status == "running"
    assert command.wait(PATIENCE).ok
    assert command.logs().data == b"one\ntwo\nthree\n"
    with pytest.raises(SandboxGone):
        command.input()


def test_no_input(box: Sandbox) -> None:
    command = box.detach(sh("cat; sleep 300"))
    with pytest.raises(ValueError, match="neither"):
        command.input()
    assert command.status == "running"


def test_several_writers_lose_nothing(private: Sandbox) -> None:
    command = private.detach(["cat"], stdin=PIPE, keep="4M")

    def write(who: int) -> None:
        with private.command(command.id).input() as stdin:
            for number in range(500):
                stdin.write(b"%d %d\n" % (who, number))

    run_all([lambda who=who: write(who) for who in range(4)])
    command.input(last=True).close()
    assert command.wait(PATIENCE).ok
    got = command.logs(size=4 << 20).data.splitlines()
    for who in range(4):
        mine = [line for line in got if line.startswith(b"%d " % who)]
        assert mine == [b"%d %d" % (who, number) for number in range(500)]


# --- terminals --------------------------------------------------------------------------------------


def test_terminal(box: Sandbox) -> None:
    command = box.detach(["/bin/sh"], pty=(30, 90), env={"PS1": "$ ", "PATH": "/usr/bin:/bin"})
    assert command.pty
    with command.input() as terminal:
        assert isinstance(terminal, Terminal)
        terminal.write(b"stty size; tty\n")
        assert b"30 90\r\n" in in_log(command, b"/dev/pts/")
        terminal.resize(41, 142)
        terminal.write(b"stty size; echo er''ror >&2\n")
        assert b"41 142\r\n" in in_log(command, b"error\r\n")  # everything is stdout
        terminal.write(b"sleep 300\n")
        in_log(command, b"sleep 300\r\n")
    assert command.status == "running"  # the launcher holds the terminal
    with box.command(command.id) as other, other.input() as terminal:
        replay = other.logs().data
        assert b"30 90" in replay
        assert b"41 142" in replay
        wait_until(lambda: interrupted(terminal, command), "the prompt after Ctrl-C", PATIENCE)
        terminal.write(b"exit 7\n")
        assert other.wait(PATIENCE).returncode == 7
    assert command.logs("stderr").data == b""
    data = b"".join(event.data for event in command.follow() if isinstance(event, Stdout))
    assert data == command.logs().data


def interrupted(terminal: Terminal, command: DetachedCommand) -> bool:
    terminal.write(b"\x03echo ba''ck\n")
    time.sleep(0.05)
    return b"back\r\n" in command.logs().data


# --- when something else ends -----------------------------------------------------------------------


def test_the_sandbox_ends_first(box: Sandbox) -> None:
    command = box.detach(SLEEP)
    ended = box.detach(sh("exit 3"))
    ended.wait(PATIENCE)
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(command.wait(PATIENCE)))
    thread.start()
    box.stop()
    thread.join(PATIENCE)
    for result in (waiting[0], command.wait(5)):
        assert (result.returncode, result.cause) == (-signal.SIGKILL, Cause.KILLED)
    assert (command.status, ended.returncode) == ("failed", 3)
    command.kill()
    with pytest.raises(SandboxGone):
        command.input()
    assert [type(event) for event in command.follow()] == [Exit]


def test_close_while_it_runs(private: Sandbox) -> None:
    mark = os.urandom(8).hex()
    command = private.detach([*python("import time; time.sleep(300)"), mark])
    private.close()
    assert marked(mark) == set()
    assert (command.status, command.result and command.result.cause) == ("failed", Cause.KILLED)


def launcher_of(sandbox: Sandbox, mark: str) -> int:
    (pid,) = [p for p in marked(mark) if parents().get(parents()[p]) == sandbox.pid]
    return parents()[pid]


FAMILY = """
    import os, signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            print("up", flush=True)
        time.sleep(300)
    time.sleep(300)
"""


def test_the_launcher_is_killed_from_outside(box: Sandbox) -> None:
    mark, other = os.urandom(8).hex(), os.urandom(8).hex()
    command = box.detach(python(FAMILY, mark))
    bystander = box.detach(python(FAMILY, other))
    in_log(command, b"up")
    in_log(bystander, b"up")
    launcher = launcher_of(box, mark)
    assert len(marked(mark)) == 3
    os.kill(launcher, signal.SIGKILL)
    result = command.wait(PATIENCE)
    assert (result.returncode, result.cause, command.status) == (-9, Cause.KILLED, "failed")
    wait_until(lambda: not marked(mark), "nothing of the command left", PATIENCE)
    assert command.logs().data == b"up\n"
    assert (bystander.status, len(marked(other))) == ("running", 3)
    for _ in range(5):
        assert box.exec(["echo", "usable"], timeout=PATIENCE).stdout == b"usable\n"
    assert box.detach(sh("exit 8")).wait(PATIENCE).returncode == 8
    assert box.command(command.id).status == "failed"


def test_the_payload_kills_launchers(box: Sandbox) -> None:
    """Where there is one id only it can. It ends by that, and hurts nobody else."""
    command = box.detach(sh("kill -9 $PPID; sleep 300"), timeout=1)
    result = command.wait(PATIENCE)
    rootless = box._plan.host.mode == "rootless"
    assert result.cause is (Cause.KILLED if rootless else Cause.TIMEOUT)
    assert box.exec(["true"], timeout=PATIENCE).ok
    wait_until(lambda: not sleepers(box), "nothing of the command left", PATIENCE)


def test_the_payload_kills_everything_it_may(box: Sandbox) -> None:
    """Its own id is everybody's where there is one id only: other commands of the sandbox end, too, and are
    told of; the sandbox stays."""
    other = box.detach(SLEEP)
    box.detach(sh("kill -9 -1; sleep 300"), timeout=1).wait(PATIENCE)
    assert other.wait(PATIENCE).cause in (Cause.KILLED, Cause.SIGNALED)
    # An idle launcher that was killed, too, and has not had the time to die, takes a request along.
    wait_until(lambda: box.exec(["true"], timeout=PATIENCE).ok, "a launcher that was not killed", PATIENCE)
    wait_until(lambda: not sleepers(box), "nothing of the commands left", PATIENCE)


def sleepers(sandbox: Sandbox) -> list[int]:
    found = []
    for pid in descendants(sandbox.pid):
        with contextlib.suppress(OSError):
            if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes() and not gone(pid):
                found.append(pid)
    return found


def test_a_paused_sandbox_answers_in_time(box: Sandbox) -> None:
    """Nobody empties the command's queue: looking does not block, and what cannot be done is said."""
    command = box.detach(["cat"], stdin=PIPE)
    box.suspend()
    before = time.monotonic()
    for _ in range(50):
        assert command.status == "running"
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.01)
    assert time.monotonic() - before < 10

    def insist() -> None:
        for _ in range(5000):
            command.send_signal(signal.SIGCONT)

    with pytest.raises(TimeoutError, match="paused"):
        insist()
    box.resume()
    command.kill()
    assert command.wait(PATIENCE).cause is Cause.KILLED


# --- a full disk ------------------------------------------------------------------------------------


@pytest.mark.needs_root
@pytest.mark.needs_program("unshare")
def test_a_full_disk_is_told_before_the_start() -> None:
    code = """
        import os, subprocess, sys, errno, tempfile
        from sandboxcore import SetupError, SandboxError
        from sandboxcore.persistent import PersistentSandbox
        directory = tempfile.mkdtemp()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "none", directory], check=True)
        box = PersistentSandbox.create(state_dir=directory)
        try:
            box.detach(["true"], keep="64M")
        except SetupError as error:
            assert (error.stage, error.errno) == ("host", errno.ENOSPC), error
            assert "keep" in str(error)
        else:
            raise AssertionError("it started")
        assert box.commands() == []
        assert sorted(os.listdir(os.path.join(directory, "sandboxes", box.id))) == ["keeper", "pause", "work"]
        assert box.detach(["sh", "-c", "exit 3"], keep="64K").wait(30).returncode == 3
        try:
            with open(os.path.join(directory, "filler"), "wb", 0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError:
            pass
        try:
            box.detach(["true"], keep="64K")
        except SandboxError as error:
            assert "space" in str(error) or "full" in str(error), error
        else:
            raise AssertionError("it started")
        os.unlink(os.path.join(directory, "filler"))
        box.destroy()
        subprocess.run(["umount", "-l", directory], check=True)
        os.rmdir(directory)
    """
    command = ["unshare", "-m", sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, env=host_environment(), capture_output=True, text=True, timeout=60, cwd=PROJECT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert IS_ROOT


def test_many_at_once(box: Sandbox) -> None:
    commands = [box.detach(sh(f"echo {number}; exit {number}")) for number in range(40)]
    for number, command in enumerate(commands):
        assert command.wait(PATIENCE).returncode == number
        assert command.logs().data == b"%d\n" % number
    assert len(box.commands()) == 40


def test_forgotten_commands(box: Sandbox) -> None:
    ended, running = box.detach(["true"]), box.detach(SLEEP)
    assert ended.wait(PATIENCE).ok
    with pytest.raises(InvalidTransition, match="running"):
        box.forget(running.id)
    box.forget(ended.id)
    assert [command.id for command in box.commands()] == [running.id]
    with pytest.raises(SandboxNotFound):
        box.forget(ended.id)
    if isinstance(box, PersistentSandbox):
        home = box._store.home(box.id).path
        assert sorted(os.listdir(home)) == sorted(
            [running.id, f"{running.id}.journal", "keeper", "pause", "work"]
        )


def test_a_closed_sandbox_takes_none(box: Sandbox) -> None:
    box.destroy()
    with pytest.raises(SandboxError):
        box.detach(["true"])
    assert [c for c in box.commands() if c.status == "running"] == []


def test_nothing_is_left_to_the_collector() -> None:
    """Who has closed the sandbox has closed the way to its commands, also where a traceback keeps all."""

    def caught() -> None:
        with Sandbox() as sandbox:
            command = sandbox.detach(["sleep", "100"])
            try:
                raise ValueError
            except ValueError as error:
                kept = error  # which has this frame, which has it
        assert (command.returncode, kept.args) == (-9, ())

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        caught()
        gc.collect()
    assert [str(warning.message) for warning in seen] == []
