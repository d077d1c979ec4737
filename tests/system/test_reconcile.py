"""What is due by time and by policy is done, once, and only if nothing came between; the rest goes on."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiostay import state
from crashes import killed_at
from support import host_process, wait_until

from sandboxcore import SandboxState
from sandboxcore.identity import this_process
from sandboxcore.ledger import Ledger
from sandboxcore.lifecycle import new_id
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.policy import Action
from sandboxcore.reconcile import KEEP_SESSIONS, Reconciled, reconcile
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.store import DATABASE

pytestmark = pytest.mark.once

PATIENCE = 30
LONG = 1e6  # seconds
__all__ = ["state"]  # a fixture


@pytest.fixture
def ledger(state: Path) -> Iterator[Ledger]:
    with Ledger(state) as made:
        yield made


@pytest.fixture
def make(ledger: Ledger) -> Callable[..., PersistentSandbox]:
    """A sandbox with these fields on record; it was used last a good while ago."""

    def made(name: str, *, run: bool = True, spec: Any = None, **fields: Any) -> PersistentSandbox:
        sandbox = PersistentSandbox(spec, name=name, state_dir=ledger.path)
        if run:
            sandbox.start()
        then = time.time() - 1000
        times = {"created_at": then - 1, "last_active_at": then}
        ledger.change(sandbox.id, **{**times, "lasting": False, **fields})
        return sandbox

    return made


def attend(
    ledger: Ledger, sandbox: Any, state: str = "active", *, ago: float = 0, **more: Any
) -> SessionRecord:
    then = time.time() - ago
    values = {"id": new_id("sess"), "sandbox": sandbox.id, "client": "me", "state": state}
    record = SessionRecord(**{**values, "created_at": then, "last_active_at": then, **more})
    ledger.add(record)  # whatever state its sandbox is in
    return record


def everything(path: Path) -> tuple[object, ...]:
    """All that is on record and on the disk."""
    with contextlib.closing(sqlite3.connect(path / DATABASE)) as db:
        rows = {
            table: db.execute(f"SELECT * FROM {table}").fetchall()
            for table in ("sandboxes", "commands", "sessions", "settings")
        }
    files = {
        (str(each.relative_to(path)), each.lstat().st_mtime_ns, each.lstat().st_ino)
        for each in path.rglob("*")
        if not each.name.startswith(DATABASE)
    }
    return rows, sorted(files)


def both(ledger: Ledger, **options: Any) -> Reconciled:
    """A dry run, which changes nothing, and then the real one, which does just what that has said."""
    options.setdefault("now", time.time())
    before, noted = everything(ledger.path), []
    dry = reconcile(ledger, dry_run=True, note=noted.append, **options)
    assert everything(ledger.path) == before
    assert noted == []
    real = reconcile(ledger, note=noted.append, **options)
    assert real.actions == dry.actions == tuple(noted)
    assert (dry.dry_run, real.dry_run) == (True, False)
    assert (real.collected.ended, real.collected.removed) == (dry.collected.ended, dry.collected.removed)
    return real


def kinds(done: Reconciled) -> list[tuple[str, str]]:
    return [(action.kind, action.name) for action in done.actions]


# --- by policy and time to live -----------------------------------------------------------------------


def test_nothing_is_due(ledger: Ledger, make: Any) -> None:
    make("bare")
    make(
        "patient",
        policy={"auto_stop": LONG, "auto_archive": LONG, "auto_delete": 0},
        expires_at=time.time() + LONG,
    )
    assert both(ledger).actions == ()


def test_each_policy(ledger: Ledger, make: Any) -> None:
    stopping = make("stopping", policy={"auto_stop": 900})
    away = make("away", policy={"auto_stop": 900, "auto_archive": 950})
    paused = make("paused", policy={"auto_stop": 900})
    paused.suspend()
    expired = make("expired", expires_at=time.time() - 5)
    old = make("old", run=False, policy={"auto_delete": 900})
    done = both(ledger)
    assert kinds(done) == [
        ("stop", "stopping"), ("archive", "away"), ("stop", "paused"),
        ("delete", "expired"), ("delete", "old"),
    ]  # fmt: skip
    assert done.stopped == (stopping.id, paused.id)
    assert done.archived == (away.id,)
    assert done.deleted == (expired.id, old.id)
    assert (done.terminated, done.failed) == ((), ())
    assert done.actions[0].reason == "inactive for 1000 s (auto_stop 900 s)"
    assert (stopping.state, away.state, paused.state) == ("stopped", "archived", "stopped")
    assert away.record.archived_why == "inactive for 1000 s (auto_archive 950 s)"
    assert (expired.state, old.state) == ("destroyed", "destroyed")
    assert both(ledger).actions == ()
    for one in (stopping, paused):
        one.start()
    away.recover()
    away.start()
    assert away.exec(["true"]).ok


def test_a_whole_life(ledger: Ledger, make: Any) -> None:
    box = make("box", policy={"auto_stop": 900, "auto_archive": 5000, "auto_delete": 19990})
    seen, now = [], time.time()
    for _ in range(40):
        done = both(ledger, now=now)
        seen += [(action.kind, round((now - time.time()) / 1000)) for action in done.actions]
        now += 1000
    assert seen == [("stop", 0), ("archive", 4), ("delete", 20)]
    assert box.state is SandboxState.DESTROYED


def test_an_active_session_keeps_it(ledger: Ledger, make: Any) -> None:
    """From what is due without activity; not from the end of its time."""
    every = {"auto_stop": 1, "auto_archive": 2, "auto_delete": 3}
    box, detached, doomed = (
        make("box", policy=every),
        make("other", policy=every),
        make("third", policy=every),
    )
    for one in (box, doomed):
        attend(ledger, one)
    attend(ledger, detached, "detached")
    ledger.change(doomed.id, expires_at=1.0)
    done = both(ledger)
    assert kinds(done) == [("archive", "other"), ("delete", "third")]
    assert box.state is SandboxState.RUNNING


# --- sessions -----------------------------------------------------------------------------------------


def test_sessions_time_out(ledger: Ledger, make: Any) -> None:
    box, other = make("box"), make("other")
    over = [
        attend(ledger, box, ago=301),
        attend(ledger, box, "detached", ago=3601),
        attend(ledger, box, "suspended", ago=86401),
        attend(ledger, box, ago=11, timeouts={"idle": 10}),
        attend(ledger, other, ago=301),
    ]
    live = [
        attend(ledger, box, ago=290),
        attend(ledger, box, "detached", ago=3590),
        attend(ledger, box, ago=3600, timeouts={"idle": None}),
    ]
    done = both(ledger)
    assert set(done.terminated) == {session.id for session in over}
    assert done.deleted == (other.id,)
    assert {session.id for session in ledger.sessions(states=["active", "detached"])} == {
        one.id for one in live
    }  # type: ignore[list-item]
    assert box.state is SandboxState.RUNNING
    assert other.state is SandboxState.DESTROYED
    why = "timed out: active without activity for 301 s (timeout 300 s)"
    assert ledger.session(over[0].id).ended_why == ledger.session(over[-1].id).ended_why == why
    assert Action(kind="delete", id=other.id, name="other", reason=why) in done.actions
    assert {action.name for action in done.actions if action.kind == "terminate"} == {"me"}


def test_the_last_two_at_once(ledger: Ledger, make: Any) -> None:
    box = make("box")
    for _ in range(2):
        attend(ledger, box, ago=400)
    assert [kind for kind, _ in kinds(both(ledger))] == ["terminate", "terminate", "delete"]


def test_one_that_lasts_stays_without_sessions(ledger: Ledger, make: Any) -> None:
    box = make("box", lasting=True)
    attend(ledger, box, ago=400)
    assert [kind for kind, _ in kinds(both(ledger))] == ["terminate"]
    assert box.state is SandboxState.RUNNING
    assert both(ledger).actions == ()


def test_one_that_never_had_a_session_stays(ledger: Ledger, make: Any) -> None:
    box = make("box")
    assert both(ledger).actions == ()
    assert box.state is SandboxState.RUNNING


def test_old_sessions_are_forgotten(ledger: Ledger, make: Any) -> None:
    box = make("box", run=False)
    old = attend(ledger, box, "terminated", ended_at=time.time() - KEEP_SESSIONS - 1)
    new = attend(ledger, box, "terminated", ended_at=time.time() - KEEP_SESSIONS + 100)
    done = both(ledger)
    assert [(action.kind, action.id) for action in done.actions] == [("forget", old.id)]
    assert [session.id for session in ledger.sessions()] == [new.id]


# --- activity -------------------------------------------------------------------------------------------


def test_output_of_a_detached_command(ledger: Ledger, make: Any) -> None:
    """Any process can tell when it was written: also one that did not start it."""
    box = make("box")
    session = attend(ledger, box, ago=400)
    command = box.detach(["sh", "-c", "read x; echo $x; read x"], stdin=-1)
    then = time.time() - 1000
    journal = ledger.home(box.id).path / f"{command.id}.journal"
    os.utime(journal, (then, then))
    ledger.change(box.id, last_active_at=then, policy={"auto_stop": 900})
    dry = reconcile(ledger, dry_run=True)
    assert [action.kind for action in dry.actions] == ["terminate", "delete"]
    before = time.time()
    with command.input() as stdin:
        stdin.write(b"hello\n")
    wait_until(lambda: command.logs().data == b"hello\n", "its output")
    assert both(ledger).actions == ()
    assert before - 0.1 <= ledger.find("box").last_active_at <= time.time()
    assert ledger.session(session.id).last_active_at == ledger.find("box").last_active_at
    assert kinds(both(ledger, now=time.time() + 500)) == [("terminate", "me"), ("delete", "box")]


def test_a_silent_command_is_no_activity(ledger: Ledger, make: Any) -> None:
    box = make("box", policy={"auto_stop": 900})
    box.detach(["sleep", "300"])
    assert both(ledger).actions == ()  # it has begun just now
    assert kinds(both(ledger, now=time.time() + 1000)) == [("stop", "box")]


def test_somebody_waits_for_a_command(ledger: Ledger, make: Any) -> None:
    """Whoever it is, and however long: seen in the kernel, not on record. Only the time to live counts."""
    box = make("box", policy={"auto_stop": 1})
    session = attend(ledger, box, ago=400)
    box.detach(["sh", "-c", "sleep 300 & exec sleep 300"])
    later = time.time() + 1000
    with box.popen(["sleep", "300"]) as process:
        assert both(ledger, now=later).actions == ()
        assert ledger.session(session.id).last_active_at == ledger.find("box").last_active_at == later
        process.kill()
        process.wait(10)
    assert kinds(both(ledger, now=later + 1000)) == [("terminate", "me"), ("delete", "box")]


def test_a_time_to_live_ends_what_is_waited_for(ledger: Ledger, make: Any) -> None:
    box = make("box", expires_at=time.time() + LONG)
    with box.popen(["sleep", "300"]) as process:
        assert both(ledger).actions == ()
        ledger.change(box.id, expires_at=5.0)
        assert kinds(both(ledger)) == [("delete", "box")]
        assert process.wait(10) == -9


def test_what_this_process_runs(ledger: Ledger, make: Any) -> None:
    """It is touched, and nothing of it is due."""
    every = {"auto_stop": 1, "auto_archive": 2, "auto_delete": 3}
    box, other = make("box", policy=every), make("other", policy=every)
    session = attend(ledger, box, ago=400)
    attend(ledger, box, "detached", ago=5000)
    now = time.time()
    done = both(ledger, now=now, busy=lambda sandbox: sandbox == box.id)
    assert kinds(done) == [("archive", "other")]
    assert ledger.find("box").last_active_at == ledger.session(session.id).last_active_at == now
    assert kinds(both(ledger, now=now)) == [("terminate", "me")]
    assert other.state is SandboxState.ARCHIVED


# --- what came between ----------------------------------------------------------------------------------


def between(monkeypatch: pytest.MonkeyPatch, kind: str, act: Callable[[], object]) -> None:
    """Something happens when an action was found due and is about to be done."""
    module = "sandboxcore.reconcile._Pass._act"
    from sandboxcore.reconcile import _Pass

    original = _Pass._act

    def late(self: Any, action: Action, do: Callable[[], bool]) -> bool:
        if action.kind == kind:
            act()
        return original(self, action, do)

    monkeypatch.setattr(module, late)


@pytest.mark.parametrize("policy", ["auto_stop", "auto_archive", "auto_delete", "expires_at"])
@pytest.mark.parametrize("event", ["used", "session", "more time", "busy", "gone"])
def test_not_due_any_more(
    ledger: Ledger, make: Any, monkeypatch: pytest.MonkeyPatch, policy: str, event: str
) -> None:
    run = policy != "auto_delete"
    fields = {"expires_at": 5.0} if policy == "expires_at" else {"policy": {policy: 1}}
    box = make("box", run=run, **fields)
    locks = contextlib.ExitStack()

    def use() -> None:
        if event == "used" and run:
            box.exec(["true"])
        elif event == "used":
            ledger.change(box.id, last_active_at=time.time())
        elif event == "session":
            attend(ledger, box)
        elif event == "more time":
            ledger.change(box.id, policy={}, expires_at=time.time() + LONG)
        elif event == "busy":
            locks.enter_context(ledger.locked(box.id))
        else:
            box.destroy()

    kind = {"expires_at": "delete"}.get(policy, policy.removeprefix("auto_"))
    between(monkeypatch, kind, use)
    with locks:
        done = reconcile(ledger)
    if event == "gone":
        assert done.actions == ()
    elif event == "busy" and kind == "delete":  # nobody gets it any more; the next one destroys it
        assert [action.error for action in done.actions] == ["somebody works on it just now; the next time"]
        monkeypatch.undo()
        assert kinds(both(ledger)) == [("delete", "box")]
    elif policy == "expires_at" and event in ("used", "session"):
        assert kinds(done) == [("delete", "box")]
    else:
        assert done.actions == ()
        assert box.state == ("running" if run else "created")
        assert ledger.find("box").doomed == ""


@pytest.mark.parametrize("event", ["touched", "attached", "ended"])
def test_a_session_that_is_used_after_all(
    ledger: Ledger, make: Any, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    box = make("box")
    session = attend(ledger, box, "detached", ago=4000)

    def use() -> None:
        if event == "touched":
            ledger.touch_sessions(box.id, time.time())
        elif event == "attached":
            assert ledger.take_session(session.id)
        else:
            ledger.end_session(session.id, "by its client")

    between(monkeypatch, "terminate", use)
    done = reconcile(ledger)
    if event == "ended":  # who ended it was to destroy it, and has not yet
        assert done.actions == ()
        monkeypatch.undo()
        assert kinds(both(ledger)) == [("delete", "box")]
    else:
        assert done.actions == ()
        assert box.state is SandboxState.RUNNING


def test_two_sweep_at_once(ledger: Ledger, make: Any) -> None:
    """Each thing is done once."""
    boxes = [make(f"box{number}", policy={"auto_stop": 1}) for number in range(4)]
    boxes += [make(f"old{number}", run=False, expires_at=1.0) for number in range(4)]
    sessions = [attend(ledger, box, ago=4000) for box in boxes[:2]]
    results: list[Reconciled] = []

    def sweep() -> None:
        with Ledger(ledger.path) as own:
            results.append(reconcile(own))

    threads = [threading.Thread(target=sweep) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    results.append(reconcile(ledger))
    done = [(action.kind, action.id) for one in results for action in one.actions if not action.error]
    expected = [
        *(("terminate", one.id) for one in sessions),
        *(("delete", one.id) for one in boxes[:2] + boxes[4:]),
    ]
    assert sorted(done) == sorted([*expected, *(("stop", one.id) for one in boxes[2:4])])


# --- what crashes have left -------------------------------------------------------------------------------


def test_killed_from_outside(ledger: Ledger, make: Any) -> None:
    """Found dead: on record as stopped, and that counts from now on."""
    box, due = make("box"), make("due", policy={"auto_stop": 1, "auto_archive": 5})
    for one in (box, due):
        os.kill(one.pid, signal.SIGKILL)
        wait_until(lambda one=one: not one._link.alive(), "its end")
    done = both(ledger)
    assert set(done.collected.ended) == {box.id, due.id}
    assert kinds(done) == [("archive", "due")]
    assert [record.state for record in ledger.all()] == ["stopped", "archived"]
    assert ledger.find("box").pid == 0


def test_what_no_record_knows(ledger: Ledger, make: Any) -> None:
    box = make("box")
    (ledger.path / "sandboxes" / "sbx-lost").mkdir()
    (ledger.path / "sandboxes" / "sbx-lost.lock").touch()
    (ledger.home(box.id).path / "cmd-lost").touch()
    done = both(ledger)
    assert set(done.collected.removed) == {"sbx-lost", f"{box.id}/cmd-lost"}
    assert sorted(os.listdir(ledger.path / "sandboxes")) == [box.id, f"{box.id}.lock"]


def test_doomed_and_never_destroyed(ledger: Ledger, make: Any) -> None:
    box = make("box", doomed="its last session has ended")
    (ledger.home(box.id).path / "cmd-lost").touch()
    done = both(ledger)
    assert kinds(done) == [("delete", "box")]
    assert done.actions[0].reason == "its last session has ended"
    assert done.collected.removed == ()
    assert box.state is SandboxState.DESTROYED


def private(ledger: Ledger, name: str, host: str, **more: Any) -> SandboxRecord:
    now = time.time()
    record = SandboxRecord(
        id=new_id("sbx"),
        name=name,
        state="running",
        spec={},
        created_at=now,
        last_active_at=now,
        host=host,
        lasting=False,
        **more,
    )
    ledger.enrol(record)
    return record


def test_of_a_process_that_has_ended(ledger: Ledger) -> None:
    code = """
        import sys
        from sandboxcore.identity import this_process
        print(this_process(), flush=True)
        sys.stdin.readline()
    """
    with host_process(code) as other:
        host = other.stdout.readline().strip()  # type: ignore[union-attr]
        theirs, ours = (
            private(ledger, "theirs", host),
            private(ledger, "ours", this_process(), expires_at=1.0),
        )
        sessions = [attend(ledger, one) for one in (theirs, ours)]
        sessions.append(attend(ledger, theirs, ago=400))  # theirs to say whether anything runs there
        late = attend(ledger, ours, ago=400)
        assert [(action.kind, action.id) for action in both(ledger).actions] == [("terminate", late.id)]
        other.kill()
        other.wait(PATIENCE)
    done = both(ledger)
    assert [(action.kind, action.id) for action in done.actions] == [("forget", theirs.id)]
    assert "has ended" in done.actions[0].reason
    assert [record.name for record in ledger.all()] == ["ours"]
    assert [ledger.session(one.id).state for one in sessions] == ["terminated", "active", "terminated"]
    assert done.collected.ended == ()
    ledger.forget_private(ours.id)


def test_the_owner_destroys_what_is_its_own(ledger: Ledger) -> None:
    """Its last session has ended: that is on record, for its process to see."""
    own = private(ledger, "own", this_process())
    attend(ledger, own, ago=400)
    assert [kind for kind, _ in kinds(both(ledger))] == ["terminate"]
    assert ledger.find("own").doomed.startswith("timed out")
    assert both(ledger).actions == ()
    ledger.forget_private(own.id)


# --- failures -----------------------------------------------------------------------------------------------


def test_one_failure_is_its_own(
    ledger: Ledger, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a", "b", "c"]
    boxes = [make(name, policy={"auto_stop": 1}) for name in names]
    stop = PersistentSandbox._stop_unused

    def fail(self: PersistentSandbox, seen: SandboxRecord) -> bool:
        if self.name == "b":
            raise OSError(5, "the disk")
        return stop(self, seen)

    monkeypatch.setattr(PersistentSandbox, "_stop_unused", fail)
    noted: list[Action] = []
    done = reconcile(ledger, note=noted.append)
    assert kinds(done) == [("stop", name) for name in names]
    assert done.failed == (replace(done.actions[1], error="[Errno 5] the disk"),)
    assert tuple(noted) == done.actions
    assert done.stopped == (boxes[0].id, boxes[2].id)
    assert "stop b: [Errno 5] the disk" in caplog.text
    monkeypatch.undo()
    assert kinds(both(ledger)) == [("stop", "b")]


def test_who_is_told_may_fail(ledger: Ledger, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    boxes = [make(name, policy={"auto_stop": 1}) for name in "ab"]

    def note(action: Action) -> None:
        raise RuntimeError("not listening")

    assert len(reconcile(ledger, note=note).stopped) == 2
    assert [box.state for box in boxes] == ["stopped", "stopped"]
    assert "not listening" in caplog.text


def test_damaged_records_do_not_stop_it(ledger: Ledger, make: Any) -> None:
    box, broken = make("box", policy={"auto_stop": 1}), make("broken", run=False)
    strange, odd = make("strange", policy={"auto_explode": 1}), make("odd", run=False)
    attend(ledger, broken, ago=1e5)
    unknown = attend(ledger, odd, timeouts={"idle": -5})
    ledger._do("UPDATE sandboxes SET spec = '{' WHERE id = ?", (broken.id,))
    done = both(ledger)
    assert ("stop", "box") in kinds(done)
    assert {action.id: action.error.partition(":")[0] for action in done.failed} == {
        strange.id: "policy.auto_explode", unknown.id: "timeouts.idle",
    }  # fmt: skip
    assert [damage.id for damage in ledger.damaged()] == [broken.id]
    assert ledger.home(broken.id).path.is_dir()
    assert box.state is SandboxState.STOPPED
    ledger._do("UPDATE sandboxes SET spec = '{}' WHERE id = ?", (broken.id,))


def test_killed_at_any_moment(ledger: Ledger, make: Any) -> None:
    """The next one finishes: nothing is done twice, and nothing is left."""
    count, killed = 0, True
    while killed:
        count += 3
        box, gone = make(f"box{count}", policy={"auto_archive": 1}), make(f"gone{count}", expires_at=1.0)
        late = make(f"late{count}", run=False)
        session = attend(ledger, late, ago=4000)
        killed = killed_at(count, lambda: sweep(ledger.path))
        reconcile(ledger)
        assert box.state is SandboxState.ARCHIVED
        for one in (gone, late):
            assert one.state is SandboxState.DESTROYED
        assert ledger.session(session.id).state == "terminated"
        box.destroy()
    assert reconcile(ledger).actions == ()
    assert os.listdir(ledger.path / "sandboxes") == []


def sweep(path: Path) -> None:
    with Ledger(path) as ledger:
        reconcile(ledger)
