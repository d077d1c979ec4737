"""What observers of a living sandbox are told: everything that happens, once, and nothing secret."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from living import CAT, SLEEP
from support import wait_until

from sandboxcore import (
    PIPE,
    CommandFailed,
    Event,
    EventKind,
    EventLog,
    InvalidTransition,
    Limits,
    PersistentSandbox,
    ProgramNotFound,
    Sandbox,
    SandboxSpec,
    SpecError,
    read_log,
    verify_log,
)
from sandboxcore.observers import Watch
from sandboxcore.result import ExecResult

pytestmark = pytest.mark.once

SECRET = "s3cret"
WRITABLE = SandboxSpec(writable=True)


class Told:
    """What one observer was told."""

    def __init__(self, sandbox: Any) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []
        self.stop: Callable[[], None] = sandbox.observe(self)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        assert isinstance(kind, EventKind)
        Event.noted(kind, data)  # it makes an event
        assert SECRET not in repr(data)
        self.all.append((kind, dict(data)))

    def kinds(self, of: str = "") -> list[str]:
        return [kind for kind, _ in self.all if kind.startswith(of)]

    def last(self, kind: str) -> dict[str, Any]:
        return next(data for one, data in reversed(self.all) if one == kind)

    def ended(self) -> dict[str, Any]:
        """The end of the one command that there was."""
        starts = [data for kind, data in self.all if kind == "command.started"]
        ends = [data for kind, data in self.all if kind == "command.ended"]
        assert len(starts) == len(ends) == 1
        assert starts[0]["command"] == ends[0]["command"]
        return ends[0]


@pytest.fixture(params=["private", "persistent"])
def sandbox(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sandbox]:
    """One that is not started; for a test of snapshots, one that can have them."""
    spec = WRITABLE if "snapshots" in request.node.name else None
    made: Sandbox
    if request.param == "private":
        made = Sandbox(spec)
    else:
        made = PersistentSandbox(spec, state_dir=tmp_path / "state")
    try:
        yield made
    finally:
        made.destroy()


# --- states and timings -----------------------------------------------------------------------------


def test_states(sandbox: Sandbox) -> None:
    told = Told(sandbox)
    sandbox.start()
    sandbox.suspend()
    sandbox.resume()
    sandbox.stop()
    sandbox.start()
    sandbox.destroy()
    sandbox.destroy()
    assert told.kinds() == [
        f"sandbox.{kind}" for kind in ("started", "suspended", "resumed", "stopped", "started", "destroyed")
    ]
    assert told.last("sandbox.stopped") == {"was": "running", "reason": "asked"}
    assert told.last("sandbox.destroyed")["reason"] == "asked"
    assert told.last("sandbox.started")["pid"] > 0


def test_moves_that_are_refused_are_not_told(sandbox: Sandbox) -> None:
    told = Told(sandbox)
    for move in (sandbox.stop, sandbox.suspend, sandbox.resume, lambda: sandbox.exec(["true"])):
        with pytest.raises(InvalidTransition):
            move()
    assert told.all == []


def test_found_dead(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    sandbox.detach(SLEEP)
    os.kill(sandbox.pid, signal.SIGKILL)
    wait_until(lambda: sandbox.state == "stopped", "its end")
    assert sandbox.state == "stopped"
    assert told.kinds() == ["command.started", "command.ended", "sandbox.stopped"]
    assert told.last("sandbox.stopped")["reason"] == "died"
    assert told.ended()["cause"] == "killed"


def test_one_that_is_forgotten_says_so() -> None:
    kinds: list[str] = []
    sandbox = Sandbox.create()
    sandbox.observe(lambda kind, data: kinds.append(f"{kind} {data['reason']}"))
    del sandbox
    assert kinds == ["sandbox.destroyed forgotten"]


def test_destroyed_by_another_handle(tmp_path: Path) -> None:
    with PersistentSandbox.create(name="one", state_dir=tmp_path) as sandbox:
        told = Told(sandbox)
        other = PersistentSandbox.connect("one", state_dir=tmp_path)
        own = Told(other)
        other.destroy()
        assert sandbox.state == "destroyed"
        assert sandbox.state == "destroyed"
    assert (told.kinds(), own.kinds()) == (["sandbox.destroyed"], ["sandbox.destroyed"])
    assert told.last("sandbox.destroyed")["reason"] == "elsewhere"


def test_how_long_the_start_took(sandbox: Sandbox) -> None:
    assert dict(sandbox.timings) == {}
    sandbox.start()
    timings = dict(sandbox.timings)
    assert list(timings) == ["plan", "group", "spawn", "setup", "total"]
    total = timings.pop("total")
    assert all(seconds >= 0 for seconds in timings.values())
    assert sum(timings.values()) <= total < 60
    sandbox.stop()
    told = Told(sandbox)
    sandbox.start()
    assert told.last("sandbox.started")["timings"] == dict(sandbox.timings)
    assert dict(sandbox.timings) != {**timings, "total": total}


# --- commands ---------------------------------------------------------------------------------------


def test_exec(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    sandbox.shell("cat; printf 12 >&2; exit 3", input=SECRET, env={"A": SECRET, "PATH": "/usr/bin:/bin"})
    assert told.kinds() == ["command.started", "command.ended"]
    start = told.last("command.started")
    assert start["args"] == ["/bin/sh", "-c", "cat; printf 12 >&2; exit 3"]
    assert start["detached"] is False
    ended = told.ended()
    assert (ended["cause"], ended["returncode"], ended["signal"]) == ("exited", 3, None)
    assert (ended["stdout_total"], ended["stderr_total"], ended["truncated"]) == (len(SECRET), 2, False)
    assert 0 < ended["duration"] < 60


def test_exec_that_a_limit_ends(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    sandbox.exec(SLEEP, timeout=0.02)
    ended = told.ended()
    assert (ended["cause"], ended["returncode"], ended["signal"]) == ("timeout", -9, 9)
    sandbox.exec(["head", "-c", "99999", "/dev/zero"], limits=Limits(output="4K"))
    assert told.last("command.ended")["truncated"] is True


def test_exec_that_does_not_start(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(ProgramNotFound):
        sandbox.exec(["no-such-program"])
    ended = told.ended()
    assert (ended["cause"], ended["returncode"], ended["error"]) == ("setup", None, "ProgramNotFound")
    with pytest.raises(SpecError):
        sandbox.exec(["true"], user="nonsense:")
    assert len(told.all) == 2


def test_exec_whose_output_is_no_text(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(UnicodeDecodeError):
        sandbox.exec(["printf", "\\377"], text=True)
    assert (told.ended()["cause"], told.ended()["error"]) == (None, "UnicodeDecodeError")


def test_check_changes_nothing(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(CommandFailed):
        sandbox.exec(["false"], check=True)
    assert (told.ended()["cause"], told.ended()["returncode"]) == ("exited", 1)


def test_exec_while_the_sandbox_is_killed(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    thread = threading.Thread(target=lambda: contextlib.suppress(Exception).__enter__() or try_sleep(sandbox))
    thread.start()
    wait_until(lambda: told.kinds() == ["command.started"], "the start")
    os.kill(sandbox.pid, signal.SIGKILL)
    thread.join(60)
    assert told.ended()["cause"] == "killed"


def try_sleep(sandbox: Sandbox) -> None:
    with contextlib.suppress(Exception):
        sandbox.exec(SLEEP)


def test_popen(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    process = sandbox.popen(CAT, stdin=PIPE)
    assert told.kinds() == ["command.started"]
    process.communicate(SECRET.encode())
    process.wait()
    process.close()
    ended = told.ended()
    assert (ended["cause"], ended["returncode"]) == ("exited", 0)
    assert "stdout_total" not in ended


def test_popen_that_does_not_start(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(ProgramNotFound):
        sandbox.popen(["no-such-program"])
    assert (told.ended()["cause"], told.ended()["error"]) == ("setup", "ProgramNotFound")


@pytest.mark.parametrize("how", ["close", "forget", "kill"])
def test_popen_that_is_let_go(sandbox: Sandbox, how: str) -> None:
    sandbox.start()
    told = Told(sandbox)
    process = sandbox.popen(SLEEP)
    if how == "kill":
        process.kill()
        process.wait()
        assert told.ended()["signal"] == 9
        return
    if how == "close":
        process.close()
        process.close()
    del process
    assert (told.ended()["cause"], told.ended()["error"]) == ("killed", "closed")


def test_detach(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    command = sandbox.detach(["printf", "12345"])
    command.wait(60)
    started, ended = told.last("command.started"), told.ended()
    assert (started["detached"], started["command"]) == (True, command.id)
    assert (ended["cause"], ended["stdout_total"]) == ("exited", 5)
    assert sandbox.command(command.id).returncode == 0
    sandbox.forget(command.id)
    assert len(told.all) == 2


def test_detach_that_does_not_start(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(ProgramNotFound):
        sandbox.detach(["no-such-program"])
    assert told.ended()["cause"] == "setup"


@pytest.mark.parametrize("how", ["stop", "destroy"])
def test_detached_ones_end_with_the_sandbox(sandbox: Sandbox, how: str) -> None:
    sandbox.start()
    told = Told(sandbox)
    command = sandbox.detach(SLEEP)
    command.close()
    sandbox.stop() if how == "stop" else sandbox.destroy()
    assert told.ended()["cause"] == "killed"
    assert told.kinds()[-1] == {"stop": "sandbox.stopped", "destroy": "sandbox.destroyed"}[how]


def test_another_handle_learns_of_the_end(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    sandbox.detach(["true"]).close()
    with sandbox.commands()[0] as command:
        command.wait(60)
    assert told.ended()["returncode"] == 0


# --- files ------------------------------------------------------------------------------------------


def test_files(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.start()
    told, files = Told(sandbox), sandbox.files
    (tmp_path / "in").write_text(SECRET)
    files.write("a", SECRET)
    files.read("a")
    files.write_many({"b": SECRET, "/tmp/c": (b"1", 0o600)})
    files.rename("a", "d")
    files.chmod("d", 0o600)
    files.symlink("d", "e")
    files.mkdir("f/g", parents=True)
    files.copy_in(tmp_path / "in", "f/in")
    files.copy_out("f", tmp_path / "out")
    files.untar(files.tar("f"), "h")
    files.remove("f", recursive=True)
    with files.open("d") as file:
        file.read()
    files.list(), files.stat("d"), files.exists("d")
    size = len(SECRET)
    assert told.all[:-4] == [
        ("file.written", {"path": "/workspace/a", "bytes": size}),
        ("file.read", {"path": "/workspace/a", "bytes": size}),
        ("file.written", {"path": "/workspace/b", "bytes": size}),
        ("file.written", {"path": "/tmp/c", "bytes": 1}),
        ("file.renamed", {"path": "/workspace/a", "to": "/workspace/d"}),
        ("file.changed", {"path": "/workspace/d", "mode": 0o600}),
        ("file.linked", {"target": "d", "path": "/workspace/e"}),
        ("file.made", {"path": "/workspace/f/g"}),
        ("file.copied_in", {"host": str(tmp_path / "in"), "path": "/workspace/f/in"}),
        ("file.copied_out", {"path": "/workspace/f", "host": str(tmp_path / "out")}),
    ]
    assert told.kinds()[-4:] == ["file.copied_out", "file.copied_in", "file.removed", "file.opened"]
    assert told.all[-3][1] == {"path": "/workspace/h", "archive": True}


def test_file_operations_that_fail(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with pytest.raises(FileNotFoundError):
        sandbox.files.read("none")
    assert told.all == [("file.read", {"path": "/workspace/none", "error": "FileNotFoundError"})]


def test_files_that_somebody_kept(sandbox: Sandbox) -> None:
    sandbox.start()
    files = sandbox.files
    told = Told(sandbox)
    files.write("a", b"1")
    told.stop()
    files.write("b", b"1")
    assert told.kinds() == ["file.written"]


# --- limits, snapshots, binds -----------------------------------------------------------------------


def test_limits(sandbox: Sandbox) -> None:
    told = Told(sandbox)
    sandbox.update(open_files=100)
    sandbox.start()
    sandbox.update(wall_time=5)
    limits = [data["limits"] for kind, data in told.all if kind == "sandbox.updated"]
    assert limits[0]["open_files"]["applies"] == "next start"
    assert limits[1]["wall_time"] == {"before": None, "value": 5, "applies": "next command"}
    with pytest.raises(SpecError):
        sandbox.update(nonsense=1)
    assert len(told.kinds("sandbox.updated")) == 2


def test_snapshots(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    snapshot = sandbox.snapshot("one")
    sandbox.exec(["touch", "/new"])
    sandbox.diff()
    sandbox.restore(snapshot)
    sandbox.discard()
    children = sandbox.fork(2)
    try:
        assert told.kinds("sandbox.") == [
            f"sandbox.{kind}" for kind in ("snapshot", "restored", "discarded", "forked")
        ]
        assert told.last("sandbox.snapshot")["snapshot"] == snapshot.id
        assert told.last("sandbox.restored")["name"] == "one"
        assert told.last("sandbox.forked") == {"children": [child.id for child in children]}
    finally:
        for child in children:
            child.destroy()


def test_commit(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir(mode=0o755)
    with Sandbox(SandboxSpec(overlay=[(place, "/place")])) as sandbox:
        told = Told(sandbox)
        sandbox.files.write("/place/a", b"1")
        sandbox.commit(dry_run=True, state_dir=tmp_path / "state")
        sandbox.commit(state_dir=tmp_path / "state")
    assert told.kinds("sandbox.") == ["sandbox.committed", "sandbox.destroyed"]
    assert told.last("sandbox.committed") == {"changes": 1}


def test_binds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with Sandbox(SandboxSpec(live_binds="ro")) as sandbox:
        told = Told(sandbox)
        sandbox.bind(tmp_path, "/workspace/a")
        sandbox.unbind("/workspace/a")
        with pytest.raises(SpecError):
            sandbox.bind(tmp_path, "/workspace/a", read_only=False)
    about = {"source": str(tmp_path), "target": "/workspace/a", "read_only": True}
    assert told.last("sandbox.bound") == about
    assert told.last("sandbox.unbound") == {**about, "lazy": False}
    assert told.kinds("sandbox.") == ["sandbox.bound", "sandbox.unbound", "sandbox.destroyed"]


# --- observers --------------------------------------------------------------------------------------


def test_traces(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)
    with sandbox.trace("one"):
        sandbox.exec(["true"])
        process = sandbox.popen(CAT, stdin=PIPE)
        with sandbox.trace("two"):
            sandbox.files.write("a", b"1")
    process.communicate()
    sandbox.exec(["true"])
    traces = [data.get("trace_id") for _, data in told.all]
    assert traces == ["one", "one", "one", "two", "one", None, None]


def test_one_that_raises_disturbs_nothing(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(kind: str, data: Mapping[str, Any]) -> None:
        raise RuntimeError("oh")

    sandbox.observe(wrong)
    told = Told(sandbox)
    with caplog.at_level(logging.ERROR, "sandboxcore"):
        sandbox.start()
        assert sandbox.exec(["echo", "x"]).stdout == b"x\n"
        sandbox.files.write("a", b"1")
    assert len(told.all) == 4
    assert caplog.text.count("RuntimeError: oh") == 4


def test_whoever_stops_hears_no_more(sandbox: Sandbox) -> None:
    sandbox.start()
    told, other = Told(sandbox), Told(sandbox)
    process = sandbox.popen(SLEEP)
    told.stop()
    told.stop()
    process.close()
    assert told.kinds() == ["command.started"]
    assert other.kinds() == ["command.started", "command.ended"]


def test_an_observer_may_look_at_the_sandbox(sandbox: Sandbox) -> None:
    states: list[str] = []
    sandbox.observe(lambda kind, data: states.append(str(sandbox.state)))
    sandbox.start()
    sandbox.suspend()
    sandbox.resume()
    sandbox.stop()
    assert states == ["running", "paused", "running", "stopped"]


def test_threads_have_a_start_and_an_end_each(sandbox: Sandbox) -> None:
    sandbox.start()
    told = Told(sandbox)

    def work() -> None:
        for _ in range(5):
            sandbox.exec(["true"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for kind in ("command.started", "command.ended"):
        assert len({data["command"] for one, data in told.all if one == kind}) == 20
    assert len(told.all) == 40


class Held(Watch):
    """A watch of a command that has not ended; who asks for the first time waits until something was done."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self._meanwhile = [meanwhile]

    @property
    def over(self) -> bool:  # type: ignore[override]
        if self._meanwhile:
            self._meanwhile.pop()()
        return False

    def ended(self, result: ExecResult) -> None:
        """It has not been told of."""

    def let_go(self, why: str = "closed") -> None:
        """Nor of that."""


def in_between(act: Callable[[], object]) -> Callable[[], None]:
    """Another thread does it; perhaps it has to wait until we are out of this."""

    def do() -> None:
        thread = threading.Thread(target=act)
        thread.start()
        thread.join(0.2)

    return do


def test_commands_that_are_detached_at_the_same_time() -> None:
    sandbox = Sandbox()
    sandbox._keep_watch("one", Held(in_between(lambda: sandbox._keep_watch("two", Held(lambda: None)))))
    sandbox._keep_watch("three", Held(lambda: None))
    wait_until(lambda: set(sandbox._watches or ()) == {"one", "two", "three"}, "all of them")


def test_a_sandbox_that_ends_while_a_command_is_detached() -> None:
    sandbox, settled = Sandbox(), list[str]()
    sandbox._keep_watch("one", Held(in_between(lambda: sandbox._settle(settled.append))))
    sandbox._keep_watch("two", Held(lambda: None))
    wait_until(lambda: settled, "the end")
    sandbox._settle(settled.append)
    wait_until(lambda: settled == ["one", "two"], "both ends")


def test_everything_goes_to_a_log(sandbox: Sandbox, tmp_path: Path) -> None:
    key = os.urandom(32)
    with EventLog(tmp_path / "log", key=key) as log:
        sandbox.observe(lambda kind, data: log.append(Event.noted(kind, data, sandbox=sandbox.id)))
        sandbox.start()
        with sandbox.trace("mine"):
            sandbox.exec([b"echo", b"\xff"])
        sandbox.destroy()
    found = list(read_log(tmp_path / "log"))
    assert [event.kind for event in found] == [
        "sandbox.started", "command.started", "command.ended", "sandbox.destroyed"
    ]  # fmt: skip
    assert {event.sandbox for event in found} == {sandbox.id}
    assert [event.trace_id for event in found] == [None, "mine", "mine", None]
    assert found[1].data["args"] == ["echo", "\udcff"]
    assert verify_log(tmp_path / "log", key, expect_lines=4).ok
