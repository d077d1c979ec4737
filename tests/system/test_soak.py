"""Thousands of runs leave every count where it was."""

import threading

import pytest
from support import leaves_nothing, spawner_pids

import sandboxcore
from sandboxcore import Cause, ProgramNotFound, SandboxSpec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def settle() -> None:
    """Fill whatever is filled on first use: spawner, pool of namespaces, caches."""
    for _ in range(20):
        assert sandboxcore.run(["true"]).ok


def test_sequential_runs_leave_nothing() -> None:
    settle()
    pids = spawner_pids()
    with leaves_nothing():
        for _ in range(2000):
            assert sandboxcore.run(["true"]).returncode == 0
    assert spawner_pids() == pids


def test_parallel_runs_leave_nothing() -> None:
    settle()
    failures: list[object] = []

    def work(number: int) -> None:
        for index in range(500):
            text = f"{number}.{index}"
            done = sandboxcore.run(["echo", text], text=True, timeout=60)
            if done.stdout != text + "\n":
                failures.append(done)

    with leaves_nothing():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(250)
        assert not any(thread.is_alive() for thread in threads)
    assert failures == []


def test_runs_that_end_badly_leave_nothing() -> None:
    """Timeouts, crashes, missing programs, orphans, specs that come and go."""
    settle()
    with leaves_nothing():
        for number in range(100):
            assert sandboxcore.run(["sleep", "30"], timeout=0.001 * (number % 5)).cause is Cause.TIMEOUT
            assert sandboxcore.run(["sh", "-c", "kill -9 $$"]).returncode == -9
            assert sandboxcore.run(["sh", "-c", "sleep 60 & sleep 60 & exit 2"]).returncode == 2
            with pytest.raises(ProgramNotFound):
                sandboxcore.run(["no-such-program"], files={"x": b"y" * 50_000})
            spec = SandboxSpec(hostname=f"h{number % 3}", network=("none", "private")[number % 2])
            assert sandboxcore.run(["true"], spec=spec, record=number % 2 == 0).ok
        for number in range(3):  # the templates of these specs stay; make room for the ones from before
            sandboxcore.run(["true"], spec=SandboxSpec(hostname=f"h{number}"))
