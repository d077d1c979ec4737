"""Living sandboxes: their states, and commands in them by exec() and popen()."""

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    IS_ROOT,
    PYTHON,
    can_grant,
    descendants,
    gone,
    host_process,
    host_program,
    leaves_nothing,
    open_fds,
    wait_until,
)

import sandboxcore
from sandboxcore import (
    DEVNULL,
    PIPE,
    STDOUT,
    Cause,
    Exit,
    InvalidTransition,
    Limits,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    Sandbox,
    SandboxGone,
    SandboxSpec,
    SandboxState,
    SetupError,
    SpecError,
    Stderr,
    Stdout,
    UnsupportedHost,
)
from sandboxcore.seccomp import PROFILES

CAT = ["cat"]
SLEEP = ["sleep", "600"]


def python(code: str, *args: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", code, *args]


@pytest.fixture(scope="module")
def shared() -> Iterator[Sandbox]:
    """One sandbox for the tests that leave it as it was."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def rootless() -> bool:
    return sandboxcore.host.features().mode == "rootless"


# --- states -------------------------------------------------------------------------------------------


def test_created_and_started_apart() -> None:
    sandbox = Sandbox(name="mine", labels={"a": "b"}, metadata={"n": 1}, owner="me", description="d")
    assert sandbox.state is SandboxState.CREATED
    assert (sandbox.name, sandbox.labels, sandbox.metadata) == ("mine", {"a": "b"}, {"n": 1})
    assert (sandbox.owner, sandbox.description, sandbox.pid) == ("me", "d", 0)
    assert sandbox.started_at is None
    sandbox.start()
    assert sandbox.state is SandboxState.RUNNING
    assert sandbox.started_at is not None
    assert sandbox.created_at <= sandbox.started_at <= time.time()
    pid = sandbox.pid
    assert not gone(pid)
    sandbox.close()
    assert sandbox.state is SandboxState.DESTROYED
    assert sandbox.stopped_at is not None
    wait_until(lambda: gone(pid), "the end of init")


def test_spec_errors_come_before_anything_starts() -> None:
    with pytest.raises(SpecError):
        Sandbox(SandboxSpec(ro=["/nowhere/at/all"]))


def test_close_is_idempotent_and_legal_from_every_state() -> None:
    for prepare in ("", "start", "start suspend", "start stop", "start suspend stop", "close"):
        sandbox = Sandbox()
        for step in prepare.split():
            getattr(sandbox, step)()
        sandbox.close()
        sandbox.close()
        assert sandbox.state is SandboxState.DESTROYED


OPERATIONS = {
    "start": lambda sandbox: sandbox.start(),
    "suspend": lambda sandbox: sandbox.suspend(),
    "resume": lambda sandbox: sandbox.resume(),
    "stop": lambda sandbox: sandbox.stop(),
    "exec": lambda sandbox: sandbox.exec(["true"]),
    "popen": lambda sandbox: sandbox.popen(["true"]).close(),
    "signal": lambda sandbox: sandbox.signal(signal.SIGTERM),
    "capabilities": lambda sandbox: sandbox.capabilities,
}
LEGAL = {
    "created": {"start"},
    "running": {"suspend", "stop", "exec", "popen", "signal", "capabilities"},
    "paused": {"resume", "stop"},
    "stopped": {"start"},
    "destroyed": set(),
}
WAYS = {
    "created": "",
    "running": "start",
    "paused": "start suspend",
    "stopped": "start stop",
    "destroyed": "start close",
}


@pytest.mark.parametrize("state", LEGAL)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_in_every_state(state: str, operation: str) -> None:
    sandbox = Sandbox()
    try:
        for step in WAYS[state].split():
            getattr(sandbox, step)()
        assert sandbox.state == state
        if operation in LEGAL[state]:
            OPERATIONS[operation](sandbox)
        else:
            with pytest.raises(InvalidTransition) as caught:
                OPERATIONS[operation](sandbox)
            assert caught.value.state == state
            assert sandbox.state == state, "a refusal changes nothing"
    finally:
        sandbox.close()


def test_a_stopped_one_starts_again_and_is_empty() -> None:
    with Sandbox() as sandbox:
        assert sandbox.exec(["sh", "-c", "echo old > /workspace/a; echo old > /tmp/b"]).ok
        first = sandbox.pid
        sandbox.stop()
        assert gone(first)
        assert sandbox.stopped_at is not None
        sandbox.start()
        assert sandbox.stopped_at is None
        assert sandbox.exec(["ls", "/workspace", "/tmp"]).stdout == b"/tmp:\n\n/workspace:\n"


def test_with_statement_closes_after_an_exception() -> None:
    with contextlib.suppress(KeyError), Sandbox() as sandbox:
        process = sandbox.popen(SLEEP)
        raise KeyError
    assert sandbox.state is SandboxState.DESTROYED
    assert process.wait(5) == -9
    process.close()


def test_with_statement_takes_a_started_one() -> None:
    with Sandbox.create() as sandbox:
        assert sandbox.exec(["true"]).ok


def test_close_waits_for_commands() -> None:
    sandbox = Sandbox.create()
    with sandbox.popen(SLEEP) as process:
        pid = process.pid
        sandbox.close()
        assert gone(pid)
        assert process.wait(5) == -9
        assert process.result is not None
        assert process.result.cause is Cause.KILLED


@pytest.mark.parametrize("how", ["close", "stop", "kill"])
def test_its_end_while_exec_runs_in_another_thread(how: str) -> None:
    sandbox = Sandbox.create()
    results: list[object] = []

    def work() -> None:
        try:
            results.append(sandbox.exec(SLEEP))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: len(descendants(sandbox.pid)) > 1, "the command")
    if how == "kill":
        os.kill(sandbox.pid, signal.SIGKILL)
    else:
        getattr(sandbox, how)()
    thread.join(10)
    (result,) = results
    assert isinstance(result, sandboxcore.ExecResult)
    assert (result.returncode, result.cause) == (-9, Cause.KILLED)
    wait_until(lambda: sandbox.state == ("destroyed" if how == "close" else "stopped"), "the state")
    sandbox.close()


@pytest.mark.parametrize("round", range(5))
def test_exec_while_it_closes(round: int) -> None:
    """Whatever the moment: a result, or an exception of ours; and never another sandbox's command."""
    sandbox, bystander = Sandbox.create(), Sandbox.create()
    bystander.exec(["sh", "-c", "echo bystander > /tmp/name"])
    allowed = (SandboxGone, InvalidTransition)
    outcomes: list[object] = []

    def work() -> None:
        with contextlib.suppress(InvalidTransition, SandboxGone):
            while True:
                try:
                    outcomes.append(sandbox.exec(["cat", "/tmp/name"]))
                except Exception as error:
                    outcomes.append(error)
                    raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(outcomes) > 10 * round, "some commands")
    sandbox.close()
    fresh = [Sandbox.create() for _ in range(3)]  # they get the descriptors' numbers
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for outcome in outcomes:
        if isinstance(outcome, sandboxcore.ExecResult):
            assert outcome.stdout == b""
            assert outcome.cause in (Cause.EXITED, Cause.KILLED)
        else:
            assert isinstance(outcome, allowed), outcome
    assert all(other.exec(["true"]).ok for other in (bystander, *fresh))
    for other in (bystander, *fresh):
        other.close()


def test_killed_from_outside_it_is_stopped_and_can_start_again() -> None:
    with Sandbox() as sandbox:
        process = sandbox.popen(SLEEP)
        os.kill(sandbox.pid, signal.SIGKILL)
        assert process.wait(5) == -9
        assert process.result is not None
        assert process.result.cause is Cause.KILLED
        process.close()
        with contextlib.suppress(SandboxGone, InvalidTransition):
            # or its last launcher is about to die, with the request
            assert sandbox.exec(["true"]).cause is Cause.KILLED
        wait_until(lambda: sandbox.state is SandboxState.STOPPED, "the state")
        with pytest.raises(InvalidTransition):
            sandbox.exec(["true"])
        sandbox.start()
        assert sandbox.exec(["true"]).ok


def test_exec_of_one_killed_just_now() -> None:
    for _ in range(10):
        with Sandbox() as sandbox:
            os.kill(sandbox.pid, signal.SIGKILL)
            try:
                result = sandbox.exec(["true"])
            except (SandboxGone, InvalidTransition):
                continue
            assert result.cause in (Cause.KILLED, Cause.EXITED)


def test_it_ends_with_its_host_process() -> None:
    program = """
    import sys
    from sandboxcore import Sandbox
    sandbox = Sandbox.create()
    process = sandbox.popen(["sleep", "600"])
    print(sandbox.pid, process.pid, flush=True)
    sys.stdin.read()
    """
    with host_process(program) as host:
        assert host.stdout is not None
        pids = [int(text) for text in host.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        host.kill()
        host.wait(10)
        wait_until(lambda: all(map(gone, pids)), "the end of everything")


def test_interpreter_exit_without_close() -> None:
    done = host_program(
        """
        from sandboxcore import Sandbox
        sandbox = Sandbox.create()
        process = sandbox.popen(["sleep", "600"], stdin=-1)
        print(sandbox.pid, process.pid, flush=True)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(text) for text in done.stdout.split()]
    wait_until(lambda: all(map(gone, pids)), "the end of everything")


def test_a_forked_child_neither_uses_nor_ends_it() -> None:
    done = host_program(
        """
        import os, signal, sys
        from sandboxcore import Sandbox, SandboxGone
        sandbox = Sandbox.create()
        for leave in ("exit", "raise", "close", "forget"):
            with sandbox.popen(["cat"], stdin=-1) as process:
                child = os.fork()
                if child == 0:
                    for use in (lambda: sandbox.exec(["true"]), lambda: sandbox.popen(["true"]),
                                lambda: sandbox.signal(15), sandbox.suspend):
                        try:
                            use()
                        except SandboxGone:
                            continue
                        os._exit(1)
                    for use in (process.poll, process.wait, process.kill):
                        try:
                            use()
                        except ChildProcessError:
                            continue
                        os._exit(2)
                    if leave == "exit":
                        os._exit(0)
                    if leave == "raise":
                        sys.exit(0)
                    if leave == "close":
                        process.close()
                        sandbox.close()
                    if leave == "forget":
                        del process, sandbox
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, leave
                assert process.poll() is None, leave
                assert process.communicate(b"alive")[0] == b"alive", leave
                assert process.returncode == 0
            assert sandbox.exec(["true"]).ok
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_forgotten_sandboxes_end() -> None:
    with leaves_nothing():
        sandbox = Sandbox.create()
        pid = sandbox.pid
        del sandbox
        wait_until(lambda: gone(pid), "its end")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_suspend_really_stops(sandbox: Sandbox) -> None:
    with sandbox.popen(["sh", "-c", "while :; do echo x; done"]) as process:
        assert process.stdout.read(2) == b"x\n"
        pid = process.pid
        sandbox.suspend()
        assert sandbox.state is SandboxState.PAUSED
        everything = {pid, *descendants(sandbox.pid)}
        wait_until(lambda: {state(pid) for pid in everything} == {"T"}, "all of it to have stopped")
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read():
            pass  # what the pipe still held
        with pytest.raises(InvalidTransition):
            sandbox.exec(["true"])
        assert process.poll() is None
        assert not process.stdout.read()
        sandbox.resume()
        os.set_blocking(process.stdout.fileno(), True)
        assert process.stdout.read(2)
        assert sandbox.exec(["true"], timeout=20).ok
        process.kill()


def test_suspended_ones_can_end() -> None:
    for end in ("close", "stop"):
        sandbox = Sandbox.create()
        process = sandbox.popen(SLEEP)
        pid = process.pid
        sandbox.suspend()
        getattr(sandbox, end)()
        wait_until(lambda pid=pid: gone(pid), "the end")
        assert process.wait(5) == -9
        process.close()
        sandbox.close()


def test_clocks_run_on_while_suspended(sandbox: Sandbox) -> None:
    """A time limit is of the wall clock: it strikes as soon as the sandbox goes on."""
    with sandbox.popen(SLEEP, timeout=0.3) as process:
        sandbox.suspend()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.6)
        sandbox.resume()
        assert process.wait(2) == -9
        assert process.result is not None
        assert process.result.cause is Cause.TIMEOUT


def test_signal_reaches_every_command(sandbox: Sandbox) -> None:
    trap = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    processes = [sandbox.popen(["sh", "-c", trap]) for _ in range(3)]
    for process in processes:
        assert process.stdout.read(6) == b"ready\n"
    sandbox.signal(signal.SIGTERM)
    for process in processes:
        # (the sleep in it, too, has got the signal)
        assert process.stdout.read() in (b"term\n", b"Terminated\nterm\n")
        assert process.wait(5) == 3
        process.close()
    with sandbox.popen(SLEEP) as process:
        sandbox.signal(signal.SIGKILL)
        assert process.wait(5) == -9
    assert sandbox.exec(["true"]).ok
    for number in (signal.SIGSTOP, signal.SIGCONT):
        with pytest.raises(ValueError, match="suspend"):
            sandbox.signal(number)


def test_what_it_reports_of_itself(shared: Sandbox) -> None:
    applied = shared.capabilities
    assert applied.no_new_privs
    assert applied.seccomp_mode == 2
    assert not any(applied.capability_sets.values())
    recorded = shared.exec(["true"], record=True).capabilities
    assert recorded is not None
    assert recorded.seccomp_filters == applied.seccomp_filters
    assert recorded.mounts == applied.mounts


# --- exec: options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 2, 42, 100, 126, 127, 128, 129, 254, 255])
def test_exact_exit_codes(shared: Sandbox, code: int) -> None:
    done = shared.exec(["sh", "-c", f"exit {code}"])
    assert (done.returncode, done.cause) == (code, Cause.EXITED)
    with shared.popen(["sh", "-c", f"exit {code}"]) as process:
        assert process.wait(10) == code


@pytest.mark.parametrize("number", [1, 2, 3, 6, 9, 11, 13, 14, 15, 34, 64])
def test_exact_signals(shared: Sandbox, number: int) -> None:
    code = f"import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), {number})"
    done = shared.exec(python(code))
    assert (done.returncode, done.cause) == (-number, Cause.SIGNALED)


def test_options_of_exec(shared: Sandbox) -> None:
    assert shared.exec(CAT, input=b"abc").stdout == b"abc"
    assert shared.exec(CAT, input="äöü", text=True).stdout == "äöü"
    assert shared.exec(CAT).stdout == b""
    assert shared.exec(["pwd"], cwd="/tmp").stdout == b"/tmp\n"
    assert shared.exec(["pwd"]).stdout == b"/workspace\n"
    assert shared.exec(["env"], env={"A": "1"}).stdout == b"A=1\n"
    assert shared.exec(["sh", "-c", "echo o; echo e >&2"], stderr=STDOUT).stdout == b"o\ne\n"
    quiet = shared.exec(["sh", "-c", "echo o; echo e >&2"], stdout=DEVNULL, stderr=DEVNULL)
    assert (quiet.stdout, quiet.stderr) == (None, None)
    files = {"a": "text", "/tmp/b": (b"bytes", 0o755)}
    assert shared.exec(["sh", "-c", "cat a; stat -c %a a /tmp/b"], files=files).stdout == b"text644\n755\n"
    assert shared.shell("echo $((6 * 7))").stdout == b"42\n"
    with pytest.raises(ValueError, match="stdin and input"):
        shared.exec(CAT, input=b"", stdin=DEVNULL)
    with pytest.raises(sandboxcore.CommandFailed):
        shared.exec(["false"], check=True)
    with pytest.raises(sandboxcore.SandboxTimeout):
        shared.exec(SLEEP, timeout=0.05, check=True)


def test_timeout_is_a_result(shared: Sandbox) -> None:
    began = time.monotonic()
    done = shared.exec(["sh", "-c", "echo before; sleep 600"], timeout=0.2)
    assert (done.returncode, done.cause, done.stdout) == (-9, Cause.TIMEOUT, b"before\n")
    assert 0.2 <= time.monotonic() - began < 1.2
    assert shared.exec(SLEEP, timeout=0).timed_out


def test_files_as_streams(shared: Sandbox, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content = os.urandom(300_000)
    source.write_bytes(content)
    with source.open("rb") as stdin, target.open("wb") as stdout:
        assert shared.exec(CAT, stdin=stdin, stdout=stdout).returncode == 0
    assert target.read_bytes() == content
    with source.open("rb") as stdin, target.open("wb") as stdout:
        with shared.popen(CAT, stdin=stdin, stdout=stdout) as process:
            assert process.wait(20) == 0
    assert target.read_bytes() == content
    with target.open("ab") as both:
        with shared.popen(["sh", "-c", "echo o; echo e >&2"], stdout=both, stderr=STDOUT) as process:
            assert process.wait(20) == 0
    assert target.read_bytes() == content + b"o\ne\n"


def test_streams_of_the_host_process() -> None:
    done = host_program(
        """
        from sandboxcore import Sandbox
        with Sandbox() as sandbox:
            sandbox.exec(["echo", "one"], stdout=None)
            with sandbox.popen(["sh", "-c", "echo two; echo three >&2"], stdout=None, stderr=None) as process:
                process.wait()
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("one\ntwo\n", "three\n", 0)


def test_identity_of_a_command(shared: Sandbox) -> None:
    own = shared.spec.ids()
    assert shared.exec(["id", "-u"], user=own[0]).stdout == f"{own[0]}\n".encode()
    for user, expected in ((0, b"0:0\n"), ("1234:99", b"1234:99\n"), (65534, b"65534:65534\n")):
        if rootless():
            with pytest.raises(UnsupportedHost):
                shared.exec(["id"], user=user)
            with pytest.raises(UnsupportedHost):
                shared.popen(["id"], user=user)
            continue
        script = (
            'echo "$(id -u):$(id -g)"; grep -E "^(Cap|NoNew)" /proc/self/status >&2; echo again > /dev/stdout'
        )
        done = shared.exec(["sh", "-c", script], user=user)
        assert done.stdout == expected + b"again\n"
        assert {line.split()[1] for line in done.stderr.splitlines()} == {b"0000000000000000", b"1"}
        with shared.popen(["sh", "-c", "id -u; echo again > /dev/stdout"], user=user) as process:
            assert process.communicate()[0].endswith(b"again\n")
    for bad in (-1, 70000, "x", "1:"):
        with pytest.raises(SpecError):
            shared.exec(["id"], user=bad)


def test_limits_of_a_command() -> None:
    with Sandbox(SandboxSpec(limits=Limits(open_files=100, pids=50, file_size=1 << 20))) as sandbox:
        look = ["sh", "-c", "ulimit -n; ulimit -f"]
        assert sandbox.exec(look).stdout.split() == [b"100", b"2048"]
        tight = Limits(open_files=20, file_size=512)
        assert sandbox.exec(look, limits=tight).stdout.split() == [b"20", b"1"]
        assert sandbox.exec(look).stdout.split() == [b"100", b"2048"], "only for that command"
        for wide in (Limits(open_files=101), Limits(file_size=1 << 21), Limits(pids=51)):
            with pytest.raises(SpecError, match="more than the sandbox"):
                sandbox.exec(look, limits=wide)
        with pytest.raises(SpecError, match="belongs to the sandbox"):
            sandbox.exec(look, limits=Limits(disk=1 << 20))
        burn = python("while True: pass")
        done = sandbox.exec(burn, limits=Limits(cpu_time=1), timeout=20)
        assert done.returncode in (-9, -24)
        assert sandbox.exec(SLEEP, limits=Limits(wall_time=0.2)).timed_out
        flood = python("import os; os.write(1, b'x' * 60000)")
        cut = sandbox.exec(flood, limits=Limits(output=1000))
        assert (cut.truncated, len(cut.stdout), cut.stdout_total) == (True, 1000, 60000)


def test_limits_of_a_command_leave_the_others_as_they_are() -> None:
    with Sandbox(SandboxSpec(limits=Limits(wall_time=0.3, output=100, pids=50))) as sandbox:
        for limits in (None, Limits(open_files=64), Limits(wall_time=0.2, output=50)):
            assert sandbox.exec(SLEEP, limits=limits).timed_out
            with sandbox.popen(SLEEP, limits=limits) as process:
                assert process.wait(5) == -9
            assert len(sandbox.exec(["seq", "1000"], limits=limits).stdout) <= 100
        for wide in (Limits(wall_time=0.4), Limits(output=101)):
            with pytest.raises(SpecError, match="more than"):
                sandbox.exec(["true"], limits=wide)


def test_the_cause_names_the_limit_of_the_command() -> None:
    with Sandbox() as sandbox:
        burn = python("while True: pass")
        done = sandbox.exec(burn, limits=Limits(cpu_time=1), timeout=20)
        assert done.cause is Cause.CPU_TIME
        fill = python("open('/tmp/f', 'wb').write(b'x' * 100000)")
        done = sandbox.exec(fill, limits=Limits(file_size=1000), timeout=20)
        assert (done.returncode, done.cause) in [(-25, Cause.DISK), (1, Cause.EXITED)]
        raw = python(
            """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
file = os.open("/tmp/f", os.O_RDWR | os.O_CREAT)
os.write(file, b"x" * 1000)
os.write(file, b"y")
"""
        )
        done = sandbox.exec(raw, limits=Limits(file_size=1000), timeout=20)
        assert (done.returncode, done.cause) == (-25, Cause.DISK)


COUNT_PROCESSES = """
import os, time
count = 1
while True:
    try:
        pid = os.fork()
    except OSError:
        break
    if pid == 0:
        time.sleep(60)
    count += 1
print(count)
"""


@pytest.mark.parametrize("user", ["0", "1000"])
def test_no_more_processes_than_the_host_process_may_have(user: str) -> None:
    """Room for launchers is given on top where that may be."""
    code = """
        import resource, sys
        from sandboxcore import Sandbox, SandboxSpec
        resource.setrlimit(resource.RLIMIT_NPROC, (4096, 4096))
        with Sandbox(SandboxSpec(user=sys.argv[1])) as sandbox:
            print(sandbox.exec(["grep", "processes", "/proc/self/limits"], text=True).stdout)
    """
    done = host_program(code, user)
    assert done.stderr == ""
    assert 4096 <= int(done.stdout.split()[2]) < 4128  # "Max processes  SOFT  HARD  processes"


@pytest.mark.parametrize("user", ["0", "1000"])
def test_as_many_processes_as_allowed(user: str) -> None:
    """Init and launchers do not count, whoever they are."""
    with Sandbox(SandboxSpec(user=user, limits=Limits(pids=20))) as sandbox:
        for _ in range(2):
            count = int(sandbox.exec(python(COUNT_PROCESSES), timeout=20).stdout)
            assert 18 <= count <= 20
        assert int(sandbox.exec(python(COUNT_PROCESSES), limits=Limits(pids=10), timeout=20).stdout) <= 10


def test_passed_descriptors(shared: Sandbox) -> None:
    read, write = os.pipe()
    try:
        say = """
import os, sys
os.write(int(sys.argv[1]), b"through")
print(sorted(os.listdir("/proc/self/fd")))
"""
        done = shared.exec(python(say, str(write)), pass_fds=[write])
        assert os.read(read, 100) == b"through"
        names = sorted({"0", "1", "2", str(write), "3" if write != 3 else "4"})  # the last is the listing's
        assert done.stdout.decode().strip() == str(names)
        with shared.popen(python(say, str(write)), pass_fds=[write]) as process:
            assert process.wait(10) == 0
        assert os.read(read, 100) == b"through"
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["no-such-program"], ProgramNotFound),
        (["/no/such"], ProgramNotFound),
        (["/etc/passwd/x"], ProgramPathInvalid),
        (["/etc/passwd"], ProgramNotExecutable),
    ],
)
def test_programs_that_cannot_start(shared: Sandbox, argv: list[str], error: type[SetupError]) -> None:
    before = open_fds()
    for start in (shared.exec, shared.popen):
        with pytest.raises(error) as caught:
            start(argv, stdin=DEVNULL)
        assert caught.value.stage == "exec"
        del caught
    with pytest.raises(error):
        shared.popen(argv, stdin=PIPE)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_starts_that_fail_elsewhere(shared: Sandbox) -> None:
    before = open_fds()
    for options, stage in (({"cwd": "/nowhere"}, "cwd"), ({"files": {"/usr/x": "y"}}, "file")):
        for start in (shared.exec, shared.popen):
            with pytest.raises(SetupError) as caught:
                start(["true"], **options)
            assert caught.value.stage == stage
            del caught
    with pytest.raises(ValueError, match="null byte"):
        shared.popen(["a\0b"], stdin=PIPE)
    with pytest.raises(SpecError):
        shared.popen([], stdin=PIPE)
    with pytest.raises(OSError, match="[Bb]ad file descriptor"):
        shared.popen(["true"], stdin=PIPE, stdout=987)
    with pytest.raises(OSError, match="[Bb]ad file descriptor"):
        shared.popen(["true"], stdin=PIPE, pass_fds=[987])
    with pytest.raises(ValueError, match="stderr"):
        shared.popen(["true"], stdin=PIPE, stdout=STDOUT)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_large_arguments_and_environments(shared: Sandbox) -> None:
    """More than a datagram holds: they travel in a memfd."""
    args = ["x" * 1000 for _ in range(1000)]
    env = {f"V{number}": "y" * 1000 for number in range(200)}
    look = "import os, sys; print(len(sys.argv) - 1, sum(map(len, sys.argv[1:])), len(os.environ))"
    for _ in range(3):
        done = shared.exec(python(look, *args), env=env)
        assert done.stdout.split()[:2] == [b"1000", b"1000000"]
        assert int(done.stdout.split()[2]) >= 200
    with shared.popen(python(look, *args), env=env) as process:
        assert process.communicate()[0].split()[:2] == [b"1000", b"1000000"]


def test_usage_is_that_of_one_command(shared: Sandbox) -> None:
    big = python(
        """
import time
block, begin = bytearray(100 << 20), time.process_time()
while time.process_time() - begin < 0.3:
    pass
"""
    )
    done = shared.exec(big)
    assert 100 << 20 < done.usage.max_rss < 200 << 20
    assert 0.3 <= done.usage.cpu_user + done.usage.cpu_system < 2
    for _ in range(4):  # every launcher that there may be
        small = shared.exec(["true"])
        assert small.usage.max_rss < 20 << 20
        assert small.usage.cpu_user + small.usage.cpu_system < 0.2
        assert small.duration < 0.25
    children = shared.exec(["sh", "-c", f"{PYTHON} -I -S -c 'b = bytearray(50 << 20)'; true"])
    assert children.usage.max_rss > 50 << 20


# --- popen --------------------------------------------------------------------------------------------


def test_poll_and_wait(shared: Sandbox) -> None:
    with shared.popen(CAT, stdin=PIPE) as process:
        assert process.poll() is None
        assert process.returncode is None
        assert process.result is None
        began = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            process.wait(0.1)
        assert caught.value.timeout == 0.1
        assert 0.1 <= time.monotonic() - began < 1
        pid = process.pid
        assert not gone(pid)
        inside = shared.exec(["cat", f"/proc/{process.pid_inside}/comm"])
        assert inside.stdout == b"cat\n"
        process.stdin.close()
        assert process.wait(10) == 0
        assert process.wait() == process.poll() == process.returncode == 0
        assert process.result is not None
        assert process.result.cause is Cause.EXITED
        assert process.pid == 0
        assert gone(pid)
        process.send_signal(signal.SIGKILL)  # does nothing
        process.kill()
        assert process.returncode == 0


def test_waiting_needs_no_processor(shared: Sandbox) -> None:
    with shared.popen(["sleep", "0.5"]) as process:
        before = time.thread_time()
        assert process.wait() == 0
        assert time.thread_time() - before < 0.1


def test_wait_in_many_threads(shared: Sandbox) -> None:
    with shared.popen(CAT, stdin=PIPE) as process:
        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(process.wait())) for _ in range(8)]
        for thread in threads:
            thread.start()
        process.stdin.close()
        for thread in threads:
            thread.join(10)
        assert codes == [0] * 8


def test_communicate(shared: Sandbox) -> None:
    data = os.urandom(8 << 20)
    script = "cat | tee /dev/stderr"
    with shared.popen(["sh", "-c", script], stdin=PIPE) as process:
        out, err = process.communicate(data, timeout=60)
        assert out == err == data
    with shared.popen(["sh", "-c", "echo o; echo e >&2"], stderr=DEVNULL) as process:
        assert process.communicate() == (b"o\n", None)
    with shared.popen(CAT, stdin=PIPE, text=True) as process:
        assert process.communicate("grüße\r\n") == ("grüße\n", "")


def test_communicate_goes_on_after_a_timeout(shared: Sandbox) -> None:
    data = os.urandom(3 << 20)
    script = """
import sys, time
sys.stdout.buffer.write(sys.stdin.buffer.read(1 << 20))
sys.stdout.flush()
time.sleep(0.5)
sys.stdout.buffer.write(sys.stdin.buffer.read())
"""
    with shared.popen(python(script), stdin=PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            process.communicate(data, timeout=0.3)
        assert data.startswith(caught.value.output)
        with pytest.raises(ValueError, match="after starting"):
            process.communicate(b"more")
        assert process.communicate(timeout=30) == (data, b"")


def test_stdin_that_nobody_reads(shared: Sandbox) -> None:
    with shared.popen(["true"], stdin=PIPE) as process:
        assert process.communicate(b"x" * (1 << 20)) == (b"", b"")
        assert process.returncode == 0
    with shared.popen(["sh", "-c", "exec <&-; echo; sleep 600"], stdin=PIPE) as process:
        assert process.stdout.read(1)
        with pytest.raises(BrokenPipeError):
            process.stdin.write(b"x" * 100_000)
        process.kill()
        assert process.wait(5) == -9
    began = time.monotonic()
    process = shared.popen(SLEEP, stdin=PIPE, bufsize=1 << 20)
    process.stdin.write(b"x" * 500_000)
    process.close()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("scope", "hit"),
    [("process", {"main"}), ("group", {"main", "group"}), ("tree", {"main", "group", "session"})],
)
def test_scope_of_signals(shared: Sandbox, scope: Any, hit: set[str]) -> None:
    code = """
import os, signal, sys, time
def play(name):
    signal.signal(signal.SIGUSR1, lambda *_: os.write(1, name.encode() + b"\\n"))
    os.write(2, b"r")
    while True:
        time.sleep(60)
if os.fork() == 0:
    play("group")
if os.fork() == 0:
    os.setsid()
    play("session")
play("main")
"""
    with shared.popen(python(code)) as process:
        assert process.stderr.read(3) == b"rrr"
        process.send_signal(signal.SIGUSR1, scope)
        heard = {process.stdout.readline().decode().strip() for _ in hit}
        assert heard == hit
        process.terminate()
        assert process.wait(5) == -15
        assert process.stdout.read() == b""


def test_a_signal_that_comes_too_late_changes_nothing(shared: Sandbox) -> None:
    """The command ends while signals are on their way: what is reported is still how it ended."""
    for _ in range(100):
        with shared.popen(["sh", "-c", "exit 7"], stdout=DEVNULL, stderr=DEVNULL) as process:
            while process._ending.result is None:
                process._ending.signal(signal.SIGCONT, "process")
                with contextlib.suppress(BlockingIOError):
                    process._ending.hear()
            assert process.returncode == 7
            assert process.result is not None
            assert process.result.cause is Cause.EXITED


def test_end_for_selectors(shared: Sandbox) -> None:
    with shared.popen(["sleep", "0.1"]) as first, shared.popen(SLEEP) as second:
        with selectors.DefaultSelector() as selector:
            selector.register(first, selectors.EVENT_READ)
            selector.register(second, selectors.EVENT_READ)
            ready = selector.select(10)
            assert [key.fileobj for key, _ in ready] == [first]
            selector.unregister(second)
        assert first.poll() == 0
        with pytest.raises(ValueError, match="ended"):
            first.fileno()
        second.kill()


def test_events(shared: Sandbox) -> None:
    script = "printf ab; sleep 0.1; printf cd >&2; sleep 0.1; printf ef; exit 3"
    with shared.popen(["sh", "-c", script]) as process:
        events = list(process)
    assert events[:-1] == [Stdout(b"ab", 0), Stderr(b"cd", 0), Stdout(b"ef", 2)]
    last = events[-1]
    assert isinstance(last, Exit)
    assert last.result.returncode == 3
    assert last.result is process.result


def test_events_hold_the_writer_back(shared: Sandbox) -> None:
    """Nothing is read ahead."""
    code = "import os, sys\nfor n in range(1000):\n os.write(1, b'x' * 65536); os.write(2, b'.')"
    with shared.popen(python(code)) as process:
        event = next(iter(process))
        assert isinstance(event, Stdout | Stderr)
        time.sleep(0.2)  # as long as it likes: it must not get far
        os.set_blocking(process.stderr.fileno(), False)
        assert len(process.stderr.read(1000) or b"") < 10
        process.kill()


def test_text_mode(shared: Sandbox) -> None:
    with shared.popen(["sh", "-c", "read x; echo got $x; echo fin"], stdin=PIPE, text=True) as process:
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() == "got hello\n"
        assert process.stdout.read() == "fin\n"
    with shared.popen(["printf", "\\377"], encoding="latin-1") as process:
        assert process.stdout.read() == "ÿ"


def test_handles_let_go(sandbox: Sandbox) -> None:
    process = sandbox.popen(SLEEP, stdin=PIPE)
    pid = process.pid
    process.close()
    process.close()
    wait_until(lambda: gone(pid), "its end after close")
    assert process.poll() == -9
    assert process.wait() == -9
    process = sandbox.popen(SLEEP, stdin=PIPE)
    pid = process.pid
    del process
    wait_until(lambda: gone(pid), "its end when it is forgotten")
    with contextlib.suppress(KeyError), sandbox.popen(SLEEP) as process:
        pid = process.pid
        raise KeyError
    assert gone(pid)
    assert sandbox.exec(["true"]).ok


def test_popen_returns_when_the_program_runs(shared: Sandbox) -> None:
    for _ in range(20):
        with shared.popen(SLEEP) as process:
            assert Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n"
            process.kill()


# --- many at once -------------------------------------------------------------------------------------


def test_many_threads(sandbox: Sandbox) -> None:
    failures: list[object] = []

    def work(number: int) -> None:
        for turn in range(5):
            text = f"{number}.{turn}"
            try:
                done = sandbox.exec(["sh", "-c", f"echo {text}; exit {number}"], text=True, timeout=60)
            except Exception as error:
                failures.append(error)
                continue
            if (done.stdout, done.returncode) != (text + "\n", number):
                failures.append(done)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    # idle launchers go again
    wait_until(lambda: len(descendants(sandbox.pid)) <= 4, "the end of idle launchers")


@pytest.mark.slow
def test_more_commands_than_launchers() -> None:
    """They wait for their turn; who cannot wait is told so, and nothing else suffers."""
    with Sandbox() as sandbox:
        held = [sandbox.popen(CAT, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL) for _ in range(256)]
        assert len({process.pid for process in held}) == 256
        results: list[object] = []
        waiting = [
            threading.Thread(target=lambda: results.append(sandbox.exec(["echo", "late"], timeout=60)))
            for _ in range(10)
        ]
        for thread in waiting:
            thread.start()
        began = time.monotonic()
        impatient = sandbox.exec(["touch", "/tmp/ran"], timeout=0.5)
        assert impatient.timed_out
        assert time.monotonic() - began < 0.5 + 1
        assert all(process.poll() is None for process in held), "the others run on"
        assert results == []
        for process in held:
            process.stdin.close()
        for process in held:
            assert process.wait(30) == 0
            process.close()
        for thread in waiting:
            thread.join(60)
        assert [result.stdout for result in results] == [b"late\n"] * 10  # type: ignore[attr-defined]
        assert sandbox.exec(["ls", "/tmp"]).stdout == b"", "nobody waits for it: it never runs"


# --- every kind of sandbox ----------------------------------------------------------------------------

LEAN = PROFILES["standard"].extend(name="lean", deny=["pwritev2", "preadv2", "eventfd2", "symlinkat"])


@pytest.mark.parametrize(("policy", "filters"), [("minimal", 1), ("standard", 1), ("full", 1), (LEAN, 1)])
def test_policies(policy: Any, filters: int) -> None:
    with Sandbox(SandboxSpec(seccomp=policy)) as sandbox:
        look = ["sh", "-c", "grep Seccomp /proc/self/status"]
        for _ in range(2):
            assert sandbox.exec(look).stdout.split() == [
                b"Seccomp:",
                b"2",
                b"Seccomp_filters:",
                b"%d" % filters,
            ]
        with sandbox.popen(["sh", "-c", "cat; echo fin"], stdin=PIPE) as process:
            assert process.communicate(b"data ")[0] == b"data fin\n"
        with sandbox.popen(SLEEP) as process:
            process.kill()
            assert process.wait(5) == -9
        ring = (
            "import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall(425, 1, 0), ctypes.get_errno())"
        )
        assert sandbox.exec(python(ring)).stdout.split()[0] == b"-1"


def test_a_filter_that_launchers_cannot_live_behind_is_the_commands_own() -> None:
    with Sandbox(SandboxSpec(seccomp=LEAN)) as sandbox:
        assert not sandboxcore.seccomp.hosts_launcher(LEAN)
        call = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(290, 0, 0), ctypes.get_errno())
"""
        if os.uname().machine == "x86_64":
            assert sandbox.exec(python(call)).stdout in (b"-1 1\n", b"-1 38\n")
        init = Path(f"/proc/{sandbox.pid}/status").read_text()
        assert "Seccomp:\t0" in init
        assert "NoNewPrivs:\t1" in init


def test_granted_directories(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    can_grant(tmp_path)
    with Sandbox(SandboxSpec(rw=[(tmp_path, "/data")])) as sandbox:
        assert sandbox.exec(["sh", "-c", "echo from inside > /data/file"]).ok
        assert (tmp_path / "file").read_text() == "from inside\n"
        assert (tmp_path / "file").stat().st_uid == os.getuid()
        (tmp_path / "other").write_text("from outside")
        assert sandbox.exec(["cat", "/data/other"]).stdout == b"from outside"


def test_other_specs() -> None:
    with Sandbox(SandboxSpec(network="host")) as sandbox:
        inside = sandbox.exec(["readlink", "/proc/self/ns/net"], text=True).stdout.strip()
        assert inside == os.readlink("/proc/self/ns/net")
    with Sandbox(SandboxSpec(network="private")) as sandbox:
        serve = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(b"hello")
"""
        with sandbox.popen(python(serve)) as server:
            port = int(server.stdout.readline())
            connect = f"import socket; print(socket.create_connection(('127.0.0.1', {port})).recv(9))"
            assert sandbox.exec(python(connect)).stdout == b"b'hello'\n"
            assert server.wait(10) == 0
    with Sandbox(SandboxSpec(landlock=False)) as sandbox:
        assert sandbox.exec(["true"]).ok


def test_time_offsets() -> None:
    try:
        sandbox = Sandbox(SandboxSpec(time_offsets={"boottime": 1_000_000, "monotonic": 0}))
    except UnsupportedHost as error:
        pytest.skip(str(error))
    with sandbox:
        for _ in range(2):
            uptime = float(sandbox.exec(["cat", "/proc/uptime"]).stdout.split()[0])
            assert uptime > 1_000_000
        assert sandbox.exec(SLEEP, timeout=0.1).timed_out


def test_other_roots(toolbox: str) -> None:
    folder = Path(toolbox).parent
    with Sandbox(SandboxSpec(rootfs=folder, env={}, workdir="/")) as sandbox:
        assert sandbox.exec(["/toolbox", "pwd"]).stdout == b"/\n"
        with sandbox.popen(["/toolbox", "cat", "/toolbox"]) as process:
            assert process.communicate()[0] == Path(toolbox).read_bytes()


def test_two_sandboxes_at_once() -> None:
    with Sandbox() as one, Sandbox() as two:
        one.exec(["sh", "-c", "echo one > /tmp/name"])
        assert two.exec(["ls", "/tmp"]).stdout == b""
        with one.popen(SLEEP) as process:
            two.signal(signal.SIGKILL)
            two.close()
            assert process.poll() is None
            process.kill()


# --- nothing is left ----------------------------------------------------------------------------------


def use(sandbox: Sandbox) -> None:
    assert sandbox.exec(["echo", "x"]).ok
    with sandbox.popen(CAT, stdin=PIPE) as process:
        assert process.communicate(b"x")[0] == b"x"
    with pytest.raises(ProgramNotFound):
        sandbox.exec(["no-such-program"])
    sandbox.exec(SLEEP, timeout=0.01)


def test_a_sandbox_leaves_nothing() -> None:
    with Sandbox() as sandbox:
        use(sandbox)
    with leaves_nothing():
        for _ in range(5):
            with Sandbox() as sandbox:
                use(sandbox)


def test_commands_leave_nothing_in_launchers(sandbox: Sandbox) -> None:
    def count() -> int:
        total = 0
        for pid in (sandbox.pid, *descendants(sandbox.pid)):
            total += len(os.listdir(f"/proc/{pid}/fd"))
        return total

    if not IS_ROOT:
        pytest.skip("only root can do this: look into what is not dumpable")
    for _ in range(5):
        use(sandbox)
    wait_until(lambda: len(descendants(sandbox.pid)) <= 3, "idle launchers to go")
    before = count()
    for _ in range(20):
        use(sandbox)
    wait_until(lambda: count() <= before + 12, "no more descriptors than those of two more launchers")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_soak() -> None:
    def many(sandbox: Sandbox) -> None:
        for turn in range(63):
            assert sandbox.exec(["echo", str(turn)], timeout=60).stdout == f"{turn}\n".encode()

    with Sandbox() as sandbox:
        use(sandbox)
    with leaves_nothing():
        with Sandbox() as sandbox:
            threads = [threading.Thread(target=many, args=(sandbox,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(100)
                assert not thread.is_alive()
    with leaves_nothing():
        for _ in range(200):
            Sandbox.create().close()
