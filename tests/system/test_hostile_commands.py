"""Commands of a living sandbox that do not want to end: whoever waits for them is free in time, nothing of
them is left, and the sandbox takes the next one.

Each is tried twice: with a time limit of its own, and killed by its handle. What is left is looked for from
outside, by a mark on the command line, and from inside, by what /proc lists.
"""

import os
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import PYTHON, descendants, gone, marked, wait_until

import sandboxcore
from sandboxcore import Cause, Limits, Process, Sandbox, SandboxSpec

pytestmark = pytest.mark.once

TIMEOUT = 1.0
GRACE = 1.0  # how much later than its time-out a command may be over

PRELUDE = """
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def say_ready():
    try:
        os.write(2, b"ready\\n")
    except OSError:
        pass
"""

# What runs until it is killed. Each says "ready" on stderr when it has done its worst.
ENDLESS = {
    "floods stdout and stderr": """
        say_ready()
        if os.fork():
            while True:
                os.write(1, b"x" * 65536)
        while True:
            os.write(2, b"y" * 65536)
    """,
    "closes its descriptors and sleeps": """
        say_ready()
        os.closerange(0, 1024)
        time.sleep(600)
    """,
    "daemonises twice and holds the pipes": """
        def daemonise():
            if os.fork():
                time.sleep(600)
            os.setsid()
            if os.fork():
                time.sleep(600)
        daemonise()
        daemonise()
        say_ready()
        time.sleep(600)
    """,
    "ignores every signal that it can": """
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        say_ready()
        while True:
            time.sleep(600)
    """,
    "stops itself": """
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        os.waitpid(child, os.WUNTRACED)
        say_ready()
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)
    """,
    "stops everything": """
        say_ready()
        if os.fork() == 0:
            while True:
                os.kill(-1, signal.SIGSTOP)
        time.sleep(600)
    """,
    "zombies": """
        for _ in range(50):
            if os.fork() == 0:
                os._exit(0)
        say_ready()
        time.sleep(600)
    """,
    "a parent in vfork": """
        # which sleeps in the kernel until its child execs or ends
        import subprocess
        say_ready()
        subprocess.Popen([sys.executable, "-c", "0"], preexec_fn=lambda: time.sleep(600), close_fds=False)
        time.sleep(600)
    """,
    "has the launcher trace it": """
        say_ready()
        libc.ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
    """,
    "traces its own child": """
        child = os.fork()
        if child == 0:
            libc.ptrace(0, 0, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        os.waitpid(child, os.WUNTRACED)
        say_ready()
        time.sleep(600)
    """,
    "a thread calls exec": """
        def become():
            again = "import time; time.sleep(600)"
            os.execv(sys.executable, [sys.executable, "-c", again, sys.argv[1]])
        for _ in range(4):
            threading.Thread(target=time.sleep, args=(600,)).start()
        say_ready()
        threading.Thread(target=become).start()
        time.sleep(600)
    """,
    "the first thread has ended": """
        if os.fork() == 0:
            os.setsid()
            threading.Thread(target=time.sleep, args=(600,)).start()
            say_ready()
            libc.syscall(EXIT, 0)  # of this thread: the process looks like a zombie
        time.sleep(600)
    """,
    "a fork bomb": """
        say_ready()
        while True:
            try:
                os.fork()
            except OSError:
                time.sleep(0.01)
    """,
    "a long chain of sessions": """
        for _ in range(80):
            try:
                if os.fork():
                    time.sleep(600)
                os.setsid()
            except OSError:
                break
        say_ready()
        time.sleep(600)
    """,
    "comets": """
        say_ready()
        for _ in range(2):
            if os.fork() == 0:
                while True:
                    try:
                        if os.fork():
                            os._exit(0)
                        os.setsid()
                    except OSError:
                        pass
        time.sleep(600)
    """,
}  # fmt: skip
WITHOUT_MERCY = {"comets", "stops everything"}  # here the sandbox may be taken down

SPEC = SandboxSpec(limits=Limits(pids=200))


def program(code: str, mark: str) -> list[str]:
    exit_number = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    code = PRELUDE + f"EXIT = {exit_number}\n" + textwrap.dedent(code)
    return [PYTHON, "-I", "-S", "-c", code, mark]


@pytest.fixture
def mark() -> str:
    return f"mark-{uuid.uuid4().hex}"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SPEC) as sandbox:
        yield sandbox


def alive(mark: str) -> list[int]:
    return [pid for pid in marked(mark) if not gone(pid)]


def nothing_is_left(sandbox: Sandbox, mark: str, *, may_be_gone: bool = False) -> None:
    """Outside nothing has the mark; inside there is nobody but init, launchers and the one who looks."""
    if may_be_gone:  # a launcher that was killed reports nothing: init ends what it left, at once, but later
        wait_until(lambda: not alive(mark), "the end of what a killed launcher left", 0.5)
    assert alive(mark) == []
    if may_be_gone and sandbox.state == "stopped":
        sandbox.start()
    below = descendants(sandbox.pid)  # not all of them have a command line
    strangers = below - set(launchers(sandbox))
    assert {pid for pid in strangers if not gone(pid)} == set()
    names = sandbox.exec(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"], text=True, timeout=30)
    assert names.ok, names
    assert mark not in names.stdout
    assert sandbox.exec(["echo", "still here"], timeout=30).stdout == b"still here\n"


def timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.parametrize("name", ENDLESS)
def test_its_time_limit_ends_it(sandbox: Sandbox, mark: str, name: str) -> None:
    results = []

    def action() -> None:
        results.append(sandbox.exec(program(ENDLESS[name], mark), timeout=TIMEOUT))

    took = timed(action)
    assert took < TIMEOUT + GRACE
    (done,) = results
    # where it can stop its launcher, init puts an end to that before the time is up
    causes = (Cause.TIMEOUT, Cause.KILLED) if name == "stops everything" else (Cause.TIMEOUT,)
    assert done.returncode == -9
    assert done.cause in causes, done
    assert b"ready" in done.stderr, done
    nothing_is_left(sandbox, mark, may_be_gone=name in WITHOUT_MERCY)


def await_ready(process: Process) -> None:
    assert process.stderr.read(6) == b"ready\n"


@pytest.mark.parametrize("name", ENDLESS)
def test_its_handle_kills_it(sandbox: Sandbox, mark: str, name: str) -> None:
    with sandbox.popen(program(ENDLESS[name], mark)) as process:
        await_ready(process)

        def action() -> None:
            process.kill()
            process.wait(GRACE)

        assert timed(action) < GRACE
        assert process.returncode == -9
        assert process.result is not None
        assert process.result.cause is Cause.KILLED
        nothing_is_left(sandbox, mark, may_be_gone=name in WITHOUT_MERCY)


@pytest.mark.parametrize("name", ENDLESS)
def test_the_launchers_clock_ends_it(sandbox: Sandbox, mark: str, name: str) -> None:
    """popen(timeout=) is kept by the launcher, whatever the caller does."""
    began = time.monotonic()
    with sandbox.popen(program(ENDLESS[name], mark), timeout=TIMEOUT) as process:
        process.wait(TIMEOUT + GRACE)
        assert time.monotonic() - began < TIMEOUT + GRACE
        assert process.returncode == -9
        assert process.result is not None
        assert process.result.cause in (Cause.TIMEOUT, Cause.KILLED)
        nothing_is_left(sandbox, mark, may_be_gone=name in WITHOUT_MERCY)


# What ends by itself, and leaves something behind that does not.
LEAVES = {
    "a grandchild that holds the pipes": """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                say_ready()
                time.sleep(600)
            os._exit(0)
        time.sleep(0.1)
    """,
    "a flood": """
        if os.fork() == 0:
            os.setsid()
            while True:
                os.write(1, b"x" * 65536)
        os.write(2, b"ready\\n")
    """,
    "a process without its first thread": """
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            def last():
                os.write(write, b".")
                time.sleep(600)
            threading.Thread(target=last).start()
            libc.syscall(EXIT, 0)
        os.read(read, 1)
        say_ready()
    """,
    "a stopped one": """
        child = os.fork()
        if child == 0:
            os.setsid()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        os.waitpid(child, os.WUNTRACED)
        say_ready()
    """,
    "many": """
        for _ in range(100):
            if os.fork() == 0:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
        say_ready()
    """,
    "a sibling, by CLONE_PARENT": """
        if libc.syscall(CLONE, 0x00008000 | 17, 0, 0, 0, 0) == 0:
            time.sleep(600)
        say_ready()
    """,
}


@pytest.mark.parametrize("name", LEAVES)
def test_what_it_leaves_behind_goes_with_it(sandbox: Sandbox, mark: str, name: str) -> None:
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    code = f"CLONE = {clone}\n" + textwrap.dedent(LEAVES[name]) + "\nos._exit(7)\n"
    results = []
    took = timed(lambda: results.append(sandbox.exec(program(code, mark), timeout=20)))
    (done,) = results
    assert (done.returncode, done.cause) == (7, Cause.EXITED), done
    assert b"ready" in done.stderr
    assert took < 5
    nothing_is_left(sandbox, mark)


@pytest.mark.parametrize("victim", ["everybody", "parent", "init"])
@pytest.mark.parametrize("sig", ["KILL", "STOP", "TERM", "HUP", "SEGV"])
def test_signals_to_launchers_and_init(sandbox: Sandbox, mark: str, victim: str, sig: str) -> None:
    """Where the payload has the launchers' id it can hit them: then the command ends with its launcher. The
    sandbox goes on."""
    target = {"everybody": "-1", "parent": "$PPID", "init": "1"}[victim]
    script = (
        f"kill -{sig} -- {target}; for i in 1 2 3 4 5 6 7 8 9; do kill -{sig} -- {target}; done; echo done"
    )
    before = sandbox.pid
    began = time.monotonic()
    done = sandbox.exec(["sh", "-c", script, mark], timeout=20)
    assert time.monotonic() - began < 5
    assert (done.returncode, done.cause) in [(0, Cause.EXITED), (-9, Cause.KILLED)], done
    nothing_is_left(sandbox, mark)
    assert sandbox.pid == before


def test_a_command_that_kills_the_others(sandbox: Sandbox, mark: str) -> None:
    """Commands of one sandbox are not protected from each other, but their callers are told the truth."""
    with sandbox.popen(["sleep", "600"]) as other:
        sandbox.exec(["sh", "-c", "kill -9 -1", mark], timeout=20)
        assert other.wait(10) == -9
        assert other.result is not None
        assert other.result.cause in (Cause.SIGNALED, Cause.KILLED)
    nothing_is_left(sandbox, mark)


def test_a_fork_bomb_is_bounded(sandbox: Sandbox, mark: str) -> None:
    with sandbox.popen(program(ENDLESS["a fork bomb"], mark)) as process:
        await_ready(process)
        wait_until(lambda: len(alive(mark)) > 150, "the bomb")
        assert len(alive(mark)) <= 200
        process.kill()
        process.wait(10)
    nothing_is_left(sandbox, mark)


def test_closing_the_sandbox_ends_everything(mark: str) -> None:
    sandbox = Sandbox.create(SPEC)
    processes = [
        sandbox.popen(program(ENDLESS[name], mark), stdout=sandboxcore.DEVNULL)
        for name in ("stops itself", "daemonises twice and holds the pipes", "comets")
    ]
    for process in processes:
        await_ready(process)
    assert timed(sandbox.close) < 5
    wait_until(lambda: not alive(mark), "the end of them all", 5)
    for process in processes:
        assert process.wait(5) == -9
        process.close()


GIB = 1 << 30
FLOOD = f"import os; [os.write(1, b'x' * 65536) for _ in range({GIB} // 65536)]"


def high_water(pid: int | str) -> int:
    """Of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def launchers(sandbox: Sandbox) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{sandbox.pid}/task/{sandbox.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_gibibyte_through_events(sandbox: Sandbox) -> None:
    before = high_water("self")
    total = 0
    with sandbox.popen([PYTHON, "-I", "-S", "-c", FLOOD]) as process:
        for event in process:
            if isinstance(event, sandboxcore.Stdout):
                assert event.offset == total
                total += len(event.data)
        assert process.returncode == 0
    assert total == GIB
    assert high_water("self") - before < 32 << 20
    assert max(map(high_water, launchers(sandbox))) < 16 << 20


@pytest.mark.slow
def test_a_gibibyte_through_a_relay(sandbox: Sandbox) -> None:
    """The launcher copies it to a pipe of ours."""
    before = high_water("self")
    read, write = os.pipe()
    total = 0
    with sandbox.popen([PYTHON, "-I", "-S", "-c", FLOOD], stdout=write) as process:
        os.close(write)
        with open(read, "rb", buffering=0) as source:
            while data := source.read(65536):
                total += len(data)
        assert process.wait(10) == 0
    assert total == GIB
    assert high_water("self") - before < 32 << 20
    assert max(map(high_water, launchers(sandbox))) < 16 << 20


@pytest.mark.slow
def test_a_gibibyte_into_a_file(sandbox: Sandbox) -> None:
    """exec() copies here; what is captured is bounded by limits.output."""
    before = high_water("self")
    with open("/dev/null", "wb") as null:
        done = sandbox.exec([PYTHON, "-I", "-S", "-c", FLOOD], stdout=null, timeout=100)
    assert (done.returncode, done.stdout_total) == (0, GIB)
    done = sandbox.exec([PYTHON, "-I", "-S", "-c", FLOOD], limits=Limits(output=1 << 20), timeout=100)
    assert (done.returncode, done.stdout_total, len(done.stdout)) == (0, GIB, 1 << 20)
    assert done.truncated
    assert high_water("self") - before < 32 << 20
