"""Commands in a living sandbox by popen()."""

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from living import CAT, SLEEP, python, sandbox, shared
from support import gone, wait_until

from sandboxcore import DEVNULL, PIPE, Cause, Exit, Sandbox, Stderr, Stdout

pytestmark = pytest.mark.once

__all__ = ["sandbox", "shared"]  # fixtures


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
