"""Commands in a living sandbox by exec()."""

import os
import time
from pathlib import Path

import pytest
from living import CAT, SLEEP, python, rootless, sandbox, shared
from support import PYTHON, host_program, open_fds

import sandboxcore
from sandboxcore import (
    DEVNULL,
    PIPE,
    STDOUT,
    Cause,
    Limits,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    Sandbox,
    SandboxSpec,
    SetupError,
    SpecError,
    UnsupportedHost,
)

pytestmark = pytest.mark.once

__all__ = ["sandbox", "shared"]  # fixtures


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
