"""The thread that does something again and again: it goes on after failures, and ends when it is to."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import host_program, wait_until

from sandboxcore import SpecError
from sandboxcore.reconcile import Sweeper

pytestmark = pytest.mark.once

PATIENCE = 30
NEVER = 3600.0  # seconds


@pytest.fixture
def sweep() -> Iterator[Callable[..., Sweeper]]:
    made: list[Sweeper] = []

    def make(action: Callable[[], Any], interval: float = NEVER) -> Sweeper:
        made.append(Sweeper(action, interval))
        return made[-1]

    yield make
    for sweeper in made:
        sweeper.close()
    wait_until(lambda: not threads(), "the end of the threads")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sandboxcore-sweeper"]


class Calls:
    """Counts calls, and how many there are at once."""

    def __init__(self) -> None:
        self.count = self.inside = self.most = 0
        self.go, self.lock = threading.Event(), threading.Lock()
        self.go.set()

    def __call__(self) -> None:
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        assert self.go.wait(PATIENCE)
        with self.lock:
            self.inside -= 1
            self.count += 1


def test_again_and_again(sweep: Any) -> None:
    calls, start = Calls(), time.monotonic()
    sweep(calls, 0.02)
    wait_until(lambda: calls.count >= 5, "five calls")
    assert time.monotonic() - start >= 5 * 0.02


def test_not_before_its_time(sweep: Any) -> None:
    calls = Calls()
    sweeper = sweep(calls)
    sweeper.nudge()
    wait_until(lambda: calls.count == 1, "the call")
    sweeper.close()
    assert calls.count == 1


def test_no_work_while_it_waits(sweep: Any) -> None:
    """It sleeps: no time of the processor, no waking up."""
    sweep(Calls())
    (thread,) = threads()

    def switches() -> int:
        with open(f"/proc/self/task/{thread.native_id}/status") as file:
            return sum(int(line.split()[1]) for line in file if "ctxt_switches" in line)

    wait_until(lambda: "\nState:\tS" in status(thread), "it to sleep")
    before = switches()
    time.sleep(0.5)
    assert switches() == before


def status(thread: threading.Thread) -> str:
    with open(f"/proc/self/task/{thread.native_id}/status") as file:
        return file.read()


def test_never_two_at_once(sweep: Any) -> None:
    """Nudged while it is at work: once more after that, however often."""
    calls = Calls()
    calls.go.clear()
    sweeper = sweep(calls)
    sweeper.nudge()
    wait_until(lambda: calls.inside == 1, "the first")
    for _ in range(10):
        sweeper.nudge()
    calls.go.set()
    wait_until(lambda: calls.count == 2, "the second")
    sweeper.close()
    assert (calls.count, calls.most) == (2, 1)


def test_it_goes_on_after_failures(sweep: Any, caplog: pytest.LogCaptureFixture) -> None:
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        if calls <= 3:
            raise RuntimeError(f"failure {calls}")

    with caplog.at_level(logging.ERROR, "sandboxcore"):
        sweeper = sweep(fail, 0.005)
        wait_until(lambda: calls >= 6, "it to go on")
    assert sweeper.failures == 3
    assert [f"failure {number}" in caplog.text for number in (1, 2, 3, 4)] == [True, True, True, False]


def test_closed_at_once(sweep: Any) -> None:
    sweeper = sweep(Calls())
    (thread,) = threads()
    start = time.monotonic()
    sweeper.close()
    assert time.monotonic() - start < 5
    assert not thread.is_alive()
    sweeper.close()
    sweeper.nudge()


def test_closing_waits_for_what_has_begun(sweep: Any) -> None:
    calls = Calls()
    calls.go.clear()
    sweeper = sweep(calls)
    sweeper.nudge()
    wait_until(lambda: calls.inside == 1, "it to begin")
    sweeper.close(wait=0.05)
    assert calls.inside == 1
    calls.go.set()
    wait_until(lambda: calls.count == 1 and not threads(), "its end")


def test_closed_by_what_it_calls(sweep: Any) -> None:
    """A manager that finds it is not needed any more, say."""
    done = []

    def act() -> None:
        sweeper.close()
        done.append(True)

    sweeper = sweep(act)
    sweeper.nudge()
    wait_until(lambda: not threads(), "its end")
    assert done == [True]


def test_closed_by_many(sweep: Any) -> None:
    sweeper = sweep(Calls(), 0.001)
    closing = [threading.Thread(target=sweeper.close) for _ in range(8)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(PATIENCE)
    assert not threads()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_not_in_a_forked_child(sweep: Any) -> None:
    """Where nothing may hang, either: the thread held its lock, perhaps."""
    calls = Calls()
    sweeper = sweep(calls, 0.0005)
    for _ in range(20):
        if (child := os.fork()) == 0:
            before = calls.count
            sweeper.nudge()
            sweeper.close()
            os._exit(calls.count - before + len(threads()))
        assert os.waitpid(child, 0)[1] == 0
    before = calls.count
    wait_until(lambda: calls.count > before, "the parent's to go on")


@pytest.mark.parametrize("interval", [0, -1, float("nan"), float("inf")])
def test_no_interval(interval: float) -> None:
    with pytest.raises(SpecError, match="not a positive number of seconds"):
        Sweeper(lambda: None, interval)


def test_nothing_is_left_at_the_end() -> None:
    """The interpreter ends at once, and nothing is called when its modules are gone."""
    code = """
        import atexit, threading, time
        def look():
            print([thread.name for thread in threading.enumerate()])
        atexit.register(look)
        from sandboxcore.reconcile import Sweeper
        def act():
            time.sleep(0.001)
        sweepers = [Sweeper(act, 0.001), Sweeper(act, 3600)]
        time.sleep(0.1)
    """
    start = time.monotonic()
    done = host_program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['MainThread']\n", "")
    assert time.monotonic() - start < 20
