"""max_sandboxes: over threads and processes, given back by the kernel."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import sandboxcore
from sandboxcore import PersistentSandbox, Sandbox, SpecError, TooManySandboxes, census, host_limits

PATIENCE = 20


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nobody else counts here."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv(census.SETTING, raising=False)
    yield tmp_path / "sandboxcore"
    host_limits(max_sandboxes=None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def there_is_room() -> bool:
    """Whether one more may live now: closing a sandbox does not wait for the end of its init."""
    try:
        Sandbox.create().close()
    except TooManySandboxes:
        return False
    return True


def test_one_too_many() -> None:
    host_limits(max_sandboxes=2)
    with Sandbox(), Sandbox() as second:
        for attempt in (Sandbox.create, lambda: sandboxcore.run(["true"])):
            with pytest.raises(TooManySandboxes, match="2 sandboxes") as caught:
                attempt()
            assert caught.value.maximum == 2
            assert caught.value.errno == errno.EAGAIN
        assert second.exec(["true"]).ok  # commands do not count
        second.close()
        until(there_is_room)


def test_a_run_counts_while_it_runs() -> None:
    host_limits(max_sandboxes=1)
    for _ in range(3):
        assert sandboxcore.run(["true"]).ok
    with Sandbox(), pytest.raises(TooManySandboxes):
        sandboxcore.run(["true"])


def test_no_place_is_lost_by_a_failure() -> None:
    host_limits(max_sandboxes=1)
    with pytest.raises(sandboxcore.SetupError):
        sandboxcore.run(["/nonexistent"])
    spec = sandboxcore.SandboxSpec(workdir="/nonexistent/workdir")
    with contextlib.suppress(sandboxcore.SandboxError):
        sandboxcore.run(["true"], spec=spec)
    assert sandboxcore.run(["true"]).ok


def test_threads_never_exceed_it() -> None:
    host_limits(max_sandboxes=3)
    lock, living, most, refused = threading.Lock(), 0, 0, 0

    def churn() -> None:
        nonlocal living, most, refused
        for _ in range(15):
            try:
                sandbox = Sandbox.create()
            except TooManySandboxes:
                with lock:
                    refused += 1
                continue
            with lock:
                living += 1
                most = max(most, living)
            sandbox.exec(["true"])
            with lock:
                living -= 1
            sandbox.close()

    threads = [threading.Thread(target=churn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 3)
    assert 1 <= most <= 3
    assert refused > 0
    until(there_is_room)


HOLDER = """
import sandboxcore, sys
box = sandboxcore.Sandbox.create()
print(box.pid, flush=True)
sys.stdin.read()
"""


def test_processes_share_it_and_a_killed_one_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(census.SETTING, "1")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        with pytest.raises(TooManySandboxes):
            sandboxcore.run(["true"])
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE)
    until(there_is_room)


def test_a_persistent_one_counts_without_its_maker(tmp_path: Path) -> None:
    host_limits(max_sandboxes=1)
    with PersistentSandbox.create(name="box", state_dir=tmp_path / "state"):
        pass
    assert not there_is_room()
    with PersistentSandbox.connect("box", state_dir=tmp_path / "state") as box:
        assert box.exec(["true"]).ok
        box.destroy()
    until(there_is_room)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_bad_numbers(value: object) -> None:
    with pytest.raises(SpecError, match="max_sandboxes"):
        host_limits(max_sandboxes=value)  # type: ignore[arg-type]
    assert census.maximum() is None


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5"])
def test_bad_settings(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(census.SETTING, text)
    with pytest.raises(SpecError, match=census.SETTING):
        sandboxcore.run(["true"])


def test_a_directory_that_others_may_write(places: Path) -> None:
    host_limits(max_sandboxes=1)
    places.mkdir()
    places.chmod(0o777)
    with pytest.raises(sandboxcore.SandboxError, match="this user alone"):
        sandboxcore.run(["true"])
    places.rmdir()
    elsewhere = places.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    os.symlink(elsewhere, places)
    with pytest.raises(sandboxcore.SandboxError, match="this user alone"):
        sandboxcore.run(["true"])
    assert not os.listdir(elsewhere)
