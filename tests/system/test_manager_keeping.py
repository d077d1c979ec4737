"""What becomes of sandboxes in time, of what is stored of them, and of records that are damaged."""

import contextlib
import os
import signal
import sqlite3
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from managed import heard, in_state, is_gone, kinds, manager, nothing_left, runs, second, session_in, state
from support import host_program, open_fds, wait_until

from sandboxcore import (
    PIPE,
    Event,
    InvalidTransition,
    LifecyclePolicy,
    SandboxManager,
    SandboxNotFound,
    SandboxSession,
    SandboxState,
    SelectionOptions,
    SessionTimeouts,
    SpecError,
    UnsupportedHost,
)
from sandboxcore import SandboxSpec as Spec
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.store import DATABASE

pytestmark = pytest.mark.once

__all__ = ["heard", "manager", "nothing_left", "second", "state"]  # fixtures

POOLED = SelectionOptions(use_pool=True)


def ago(manager: SandboxManager, seconds: float, key: str | None = None) -> None:
    """As if nothing had happened for so long: in a sandbox, or in any."""
    there = [record.id for record in manager.list_sandboxes() if key in (None, record.id)]
    for sandbox in there:
        record = manager.get_record(sandbox)
        assert record is not None
        changes: dict[str, Any] = {"last_active_at": record.last_active_at - seconds}
        changes |= {name: when - seconds for name in ("expires_at", "stopped_at", "archived_at", "created_at")
                    if (when := getattr(record, name)) is not None}  # fmt: skip
        manager._ledger.change(sandbox, **changes)
        update = "UPDATE sessions SET last_active_at = last_active_at - ? WHERE sandbox = ?"
        manager._ledger._do(update, (seconds, sandbox))
        manager._touched.pop(sandbox, None)


# --- sessions -----------------------------------------------------------------------------------------


def test_the_defaults_are_five_minutes_an_hour_and_a_day(manager: SandboxManager) -> None:
    assert manager.acquire().timeouts == SessionTimeouts(idle=300, detached=3600, suspended=86400)


@pytest.mark.parametrize(("before", "name"), [("active", "idle"), ("detached",) * 2, ("suspended",) * 2])
def test_a_session_without_activity_ends_with_its_sandbox(
    manager: SandboxManager, heard: list[Event], before: str, name: str
) -> None:
    session, other = session_in(manager, before), session_in(manager, before, "you")
    seconds = getattr(session.timeouts, name)
    ago(manager, seconds - 5)
    assert manager.reconcile().actions == ()
    assert session.expires_at == pytest.approx(time.time() + 5, abs=3)
    ago(manager, 6, session.sandbox_id)
    heard.clear()
    assert manager.reconcile(dry_run=True).terminated == (session.id,)
    assert session.state == before
    assert heard == []
    assert manager.cleanup_expired() == 2
    assert (session.state, other.state) == ("terminated", before)
    assert is_gone(manager, session.sandbox_id)
    assert f"{before} without activity" in session.record.ended_why
    told = [event for event in heard if event.kind == "session.timed_out"]
    assert [(event.session, event.client, event.sandbox) for event in told] == [
        (session.id, "me", session.sandbox_id)
    ]
    assert kinds(heard, "sandbox") == ["sandbox.destroyed"]
    assert manager.stats().timed_out == 2


def test_a_session_has_timeouts_of_its_own(manager: SandboxManager) -> None:
    session = manager.acquire(timeouts=SessionTimeouts(idle=10, detached=None))
    forever = manager.acquire(timeouts=SessionTimeouts(idle=None))
    ago(manager, 11)
    assert manager.reconcile().terminated == (session.id,)
    assert forever.expires_at is None
    assert runs(forever)


def test_commands_files_and_output_are_activity(manager: SandboxManager) -> None:
    session = manager.acquire()
    for use in (
        lambda: session.sandbox.exec(["true"]),
        lambda: session.sandbox.files.write("/tmp/x", b""),
        session.touch,
        lambda: manager.touch(session.sandbox_id),
    ):
        ago(manager, 299)
        before = session.last_active_at
        use()
        assert session.last_active_at > before + 290
    with session.sandbox.popen(["sleep", "60"]) as process:
        ago(manager, 301)
        assert manager.reconcile().terminated == ()
        process.kill()
    command = session.sandbox.detach(["sh", "-c", "while :; do echo x; sleep 0.01; done"])
    ago(manager, 301)
    written = command.logs().end
    wait_until(lambda: command.logs().end > written, "output")
    assert manager.reconcile().terminated == ()
    command.kill()


def test_the_sweep_goes_on_after_a_failure(state: Path) -> None:
    with SandboxManager(state, sweep_interval=0.02) as manager:
        failing = manager.create()
        fails = manager._ledger.session_states

        def fail() -> Any:
            manager._ledger.session_states = fails  # type: ignore[method-assign]
            raise OSError("once")

        manager._ledger.session_states = fail  # type: ignore[method-assign]
        wait_until(lambda: manager._sweeper is not None and manager._sweeper.failures, "a failure")
        manager.extend_ttl(failing.id, 0.01)
        wait_until(lambda: is_gone(manager, failing.id), "the sweep")


# --- time to live -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, POOLED], ids=["persistent", "pooled"])
def test_time_to_live(manager: SandboxManager, heard: list[Event], options: SelectionOptions | None) -> None:
    session = manager.acquire(client_id="me", ttl=50, options=options)
    key = session.sandbox_id
    record = manager.get_record(key)
    assert record is not None
    assert record.expires_at == pytest.approx(time.time() + 50, abs=5)
    assert manager.extend_ttl(key, 50) == pytest.approx(time.time() + 100, abs=5)
    ago(manager, 99 - 5)
    assert manager.expired() == []
    manager.reconcile()
    assert runs(session)
    ago(manager, 10)
    assert [record.id for record in manager.expired()] == [key]
    manager.gc()
    assert is_gone(manager, key)
    assert session.state == "terminated"
    assert {"sandbox.expired", "sandbox.destroyed", "session.terminated"} <= set(kinds(heard, "s"))
    (ended,) = [event for event in heard if event.kind == "session.terminated"]
    assert (ended.session, ended.client, ended.sandbox) == (session.id, "me", key)


def test_a_time_to_live_is_lifted(manager: SandboxManager) -> None:
    made = manager.create(ttl=10)
    assert manager.extend_ttl(made.id, None) is None
    ago(manager, 1000)
    assert manager.reconcile().deleted == ()
    for wrong in (0, -1, "x", float("nan")):
        with pytest.raises(SpecError):
            manager.extend_ttl(made.id, wrong)  # type: ignore[arg-type]
        with pytest.raises(SpecError):
            manager.create(ttl=wrong)  # type: ignore[arg-type]


# --- policies, archive --------------------------------------------------------------------------------


def test_a_policy_stops_archives_and_deletes(manager: SandboxManager, heard: list[Event]) -> None:
    policy = LifecyclePolicy(auto_stop=10, auto_archive=100, auto_delete=1000)
    made = manager.create(name="dev", policy=policy)
    used = manager.acquire(policy=policy, timeouts=SessionTimeouts(idle=None))
    steps = ((11, "stop", "stopped"), (90, "archive", "archived"), (1001, "delete", None))
    for seconds, kind, after in steps:
        ago(manager, seconds)
        heard.clear()
        would = manager.reconcile(dry_run=True)
        assert [(action.kind, action.id, action.name) for action in would.actions] == [(kind, made.id, "dev")]
        assert f"auto_{kind}" in would.actions[0].reason
        assert heard == []
        done = manager.reconcile()
        assert [action.kind for action in done.actions] == [kind]
        assert manager.get_state(made.id) == after
        names = {"stop": "stopped", "archive": "archived", "delete": "destroyed"}
        assert kinds(heard, "sandbox", "policy") == [f"policy.{kind}", f"sandbox.{names[kind]}"]
        assert {event.sandbox for event in heard} == {made.id}
    assert runs(used)


def test_the_managers_policy_and_anothers(state: Path) -> None:
    with SandboxManager(state, policy=LifecyclePolicy(auto_stop=10), sweep_interval=None) as manager:
        first, other = manager.create(), manager.create(policy=LifecyclePolicy())
        ago(manager, 11)
        assert manager.reconcile().stopped == (first.id,)
        manager.set_policy(other.id, LifecyclePolicy(auto_stop=20))
        ago(manager, 11)
        assert manager.reconcile().stopped == (other.id,)


def test_archive_keeps_what_was_written_and_recover_brings_it_back(
    manager: SandboxManager, overlays: None
) -> None:
    session = manager.acquire(Spec(writable=True), client_id="me")
    session.sandbox.files.write("/workspace/kept", b"x")
    with pytest.raises(InvalidTransition):
        manager.archive(session.sandbox_id)
    session.detach()
    manager.archive(session.sandbox_id, "not needed now")
    record = manager.get_record(session.sandbox_id)
    assert record is not None
    assert (record.state, record.archived_why) == ("archived", "not needed now")
    with pytest.raises(InvalidTransition):
        session.resume()
    manager.recover(session.sandbox_id, start=True)
    session.resume()
    assert session.sandbox.files.read("/workspace/kept") == b"x"


# --- update -------------------------------------------------------------------------------------------


def test_what_is_said_about_it_changes_now(manager: SandboxManager, second: SandboxManager) -> None:
    made = manager.create()
    policy = LifecyclePolicy(auto_stop=5)
    done = manager.update(
        made.id, labels={"a": "b"}, description="d", metadata={"k": 1}, owner="me", policy=policy
    )
    assert {name: change.applies for name, change in done.items()} == dict.fromkeys(
        ("labels", "description", "metadata", "owner", "policy"), "now"
    )
    record = second.get_record(made.id)
    assert record is not None
    assert (record.labels, record.description, record.metadata, record.owner, record.policy) == (
        {"a": "b"}, "d", {"k": 1}, "me", {"auto_stop": 5},
    )  # fmt: skip
    assert made.labels == {"a": "b"}


def test_a_spec_changes_with_the_next_start(
    manager: SandboxManager, second: SandboxManager, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("x")
    tmp_path.chmod(0o755)
    made, theirs = manager.create(name="dev"), second.find("dev")
    done = manager.update(
        "dev", hostname="other", ro=[(str(tmp_path / "d"), "/data")], env={"A": "b"},
        limits={"open_files": 99, "disk": "8M"},
    )  # fmt: skip
    assert {name: change.applies for name, change in done.items()} == {
        "hostname": "next start", "ro": "next start", "env": "next command",
        "limits.open_files": "next command", "limits.disk": "next start",
    }  # fmt: skip
    look = ["sh", "-c", "uname -n; ulimit -n; echo $A; ls /data 2>/dev/null"]
    for sandbox in (made, theirs):
        assert sandbox.exec(look).stdout == b"sandbox\n99\nb\n"
        assert (sandbox.spec.hostname, sandbox.spec.env["A"]) == ("sandbox", "b")
    record = manager.get_record("dev")
    assert record is not None
    assert (record.spec["hostname"], record.next_spec["hostname"]) == ("sandbox", "other")
    made.update(open_files=98)
    theirs.stop()
    made.start()
    for sandbox in (made, theirs):
        assert sandbox.exec(look).stdout == b"other\n98\nb\nf\n"
        assert (sandbox.spec.hostname, sandbox.spec.limits.disk) == ("other", 8 << 20)
    record = manager.get_record("dev")
    assert record is not None
    assert (record.spec["hostname"], record.next_spec) == ("other", {})


@pytest.mark.parametrize("before", ["created", "stopped", "archived"])
def test_one_that_does_not_run_has_it_at_once_on_record(manager: SandboxManager, before: str) -> None:
    key = in_state(manager, before)
    assert manager.update(key, hostname="other")["hostname"].applies == "next start"
    record = manager.get_record(key)
    assert record is not None
    assert (record.spec["hostname"], record.next_spec) == ("other", {})
    if before == "archived":
        manager.recover(key)
    session = manager.attach(key).session
    assert session.sandbox.exec(["uname", "-n"]).stdout == b"other\n"


def test_what_cannot_be_changes_nothing(manager: SandboxManager, tmp_path: Path) -> None:
    made = manager.create(name="dev")
    before = manager.get_record("dev")
    for wrong in (
        {"no_such": 1}, {"hostname": "-"}, {"fingerprint": "x"}, {"limits": {"no_such": 1}},
        {"labels": {"a": 1}}, {"policy": "never"}, {"ro": [str(tmp_path / "missing")], "description": "d"},
        {"limits": {"open_files": 7, "pids": -1}}, {"id": "x"}, {"state": "stopped"},
    ):  # fmt: skip
        with pytest.raises((SpecError, OSError, UnsupportedHost)):
            manager.update("dev", **wrong)
        assert manager.get_record("dev") == before
    assert made.exec(["uname", "-n"]).stdout == b"sandbox\n"
    with pytest.raises(SandboxNotFound):
        manager.update("other", hostname="x")
    session = manager.acquire(options=POOLED)
    with pytest.raises(SpecError):
        manager.update(session.sandbox_id, hostname="x")
    assert manager.update(session.sandbox_id, limits={"open_files": 97})["limits.open_files"].value == 97


def test_a_start_that_fails_leaves_the_change_for_the_next(manager: SandboxManager, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    tmp_path.chmod(0o755)
    made = manager.create()
    manager.update(made.id, ro=[(str(tmp_path / "d"), "/data")])
    (tmp_path / "d").rmdir()
    made.stop()
    with pytest.raises((SpecError, OSError)):
        made.start()
    record = manager.get_record(made.id)
    assert record is not None
    assert (record.state, record.spec["ro"]) == ("stopped", [])
    assert record.next_spec["ro"]
    (tmp_path / "d").mkdir()
    made.start()
    assert made.exec(["ls", "/data"]).ok


# --- damage -------------------------------------------------------------------------------------------


def test_a_damaged_record_is_told_of_skipped_and_kept(
    manager: SandboxManager, heard: list[Event], state: Path
) -> None:
    whole, broken = manager.acquire(client_id="me"), manager.acquire(client_id="me")
    left = manager.acquire(client_id="me")
    left.detach()
    with contextlib.closing(sqlite3.connect(state / DATABASE)) as db, db:
        (spec,) = db.execute("SELECT spec FROM sandboxes WHERE id = ?", (left.sandbox_id,)).fetchone()
        db.execute("UPDATE sandboxes SET spec = 'broken' WHERE id = ?", (left.sandbox_id,))
        db.execute("UPDATE sessions SET timeouts = '[' WHERE id = ?", (broken.id,))
    manager.reconcile()
    manager.reconcile()
    told = [event for event in heard if event.kind == "record.corrupt"]
    assert {(event.data["table"], event.data["record"]) for event in told} == {
        ("sandboxes", left.sandbox_id),
        ("sessions", broken.id),
    }
    assert len(told) == 2
    assert len(manager.damaged()) == manager.stats().damaged == 2
    assert manager.list_sessions() == [whole, left]
    assert left.sandbox_id not in [record.id for record in manager.list_sandboxes()]
    fresh = manager.acquire(client_id="me")
    assert fresh.sandbox_id != left.sandbox_id
    assert runs(whole)
    with contextlib.closing(sqlite3.connect(state / DATABASE)) as db, db:
        db.execute("UPDATE sandboxes SET spec = ? WHERE id = ?", (spec, left.sandbox_id))
        db.execute("UPDATE sessions SET timeouts = '{}' WHERE id = ?", (broken.id,))
    assert runs(manager.attach(left.sandbox_id, "me").session)
    assert manager.get_state(broken.sandbox_id) is SandboxState.RUNNING


def test_what_another_process_has_destroyed_is_let_go(
    manager: SandboxManager, second: SandboxManager, heard: list[Event]
) -> None:
    kept, damaged, gone = (manager.create(name=name) for name in ("kept", "damaged", "gone"))
    before = open_fds()
    handle = weakref.ref(manager.create(name="unused"))
    second.destroy("unused")
    command = gone.detach(["sleep", "60"])
    spec = manager._ledger._do("SELECT spec FROM sandboxes WHERE id = ?", (damaged.id,))[0]["spec"]
    manager._ledger._do("UPDATE sandboxes SET spec = '{' WHERE id = ?", (damaged.id,))
    second.destroy(gone.id)
    heard.clear()
    manager.reconcile(dry_run=True)
    assert gone.id in manager._handles
    for _ in range(2):
        manager.reconcile()
    manager._ledger._do("UPDATE sandboxes SET spec = ? WHERE id = ?", (spec, damaged.id))
    assert manager._handles.keys() == {kept.id, damaged.id}
    assert sorted(kinds(heard, "sandbox.destroyed", "command.ended")) == [
        "command.ended", "sandbox.destroyed", "sandbox.destroyed",
    ]  # fmt: skip
    command.close()
    assert handle() is None
    assert len(open_fds()) < len(before)


# --- of a pool: what this process alone can tell --------------------------------------------------------


def test_output_of_a_pools_sandbox_is_activity(manager: SandboxManager) -> None:
    session, silent = (manager.acquire(options=POOLED) for _ in range(2))
    command = session.sandbox.detach(["sh", "-c", "read x; echo x; sleep 60"], stdin=PIPE)
    for sandbox in (session.sandbox, silent.sandbox):
        sandbox.detach(["sleep", "60"])
        for known in sandbox._detached.values():
            os.utime(known._journal.fd, times=(time.time() - 400,) * 2)
    ago(manager, 301)
    with command.input(last=True) as stdin:
        stdin.write(b"\n")
    wait_until(lambda: command.logs().end, "output")
    assert manager.reconcile(dry_run=True).terminated == (silent.id,)
    assert manager.reconcile().terminated == (silent.id,)
    assert runs(session)


def test_the_state_of_a_pools_sandbox_is_on_record(manager: SandboxManager, second: SandboxManager) -> None:
    def state(session: SandboxSession) -> str:
        manager.reconcile()
        record = second.get_record(session.sandbox_id)
        assert record is not None
        return record.state

    session = manager.acquire(options=POOLED)
    assert state(session) == "running"
    session.suspend()
    assert state(session) == "paused"
    session.resume()
    assert state(session) == "running"
    os.kill(session.sandbox.pid, signal.SIGKILL)
    wait_until(lambda: session.sandbox.state is SandboxState.STOPPED, "its end")
    assert state(session) == "stopped"


def test_another_process_times_out_no_session_of_a_pools_sandbox(
    manager: SandboxManager, state: Path
) -> None:
    """It cannot know that a client waits for a command there."""
    session = manager.acquire(options=POOLED)
    ago(manager, 301)
    sweep = f"""
        from sandboxcore import SandboxManager
        with SandboxManager({str(state)!r}, sweep_interval=None) as manager:
            print(len(manager.reconcile().actions))
    """
    assert host_program(sweep).stdout.split() == ["0"]
    assert session.state == "active"
    assert manager.reconcile().terminated == (session.id,)
    assert is_gone(manager, session.sandbox_id)


def test_a_pools_sandbox_that_cannot_be_ended_yet_is_forgotten(
    manager: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = manager.acquire(options=POOLED)
    sandbox = session.sandbox
    real = sandbox.destroy

    def fail() -> None:
        raise TimeoutError("not yet")

    monkeypatch.setattr(sandbox, "destroy", fail)
    with pytest.raises(TimeoutError):
        session.terminate()
    assert manager.get_record(session.sandbox_id) is None
    assert session.state == "terminated"
    real()


# --- what is told of an end -----------------------------------------------------------------------------


def ends(heard: list[Event], key: str) -> list[tuple[str, str | None]]:
    """What was told of the ends of a sandbox and its commands, and of which command."""
    found = (event for event in heard if event.sandbox == key)
    return [
        (event.kind.value, event.data.get("command"))
        for event in found
        if event.kind in ("command.ended", "sandbox.destroyed")
    ]


@pytest.mark.parametrize("reset", [False, True], ids=["ended", "reset"])
def test_the_end_of_what_was_released_is_told_once(state: Path, heard: list[Event], reset: bool) -> None:
    config = PoolConfig(min_warm=1, max_warm=1, reset=reset)
    with SandboxManager(state, pool=config, sweep_interval=None, on_event=[heard.append]) as manager:
        session = manager.acquire(options=POOLED)
        command = session.sandbox.detach(["sleep", "60"])
        session.release()
        wait_until(lambda: ("sandbox.destroyed", None) in ends(heard, session.sandbox_id), "its end")
        manager.reconcile()
    assert ends(heard, session.sandbox_id) == [("command.ended", command.id), ("sandbox.destroyed", None)]


def test_the_end_of_what_the_sweep_destroys_is_told_once(manager: SandboxManager, heard: list[Event]) -> None:
    session = manager.acquire()
    sandbox = session.sandbox
    command = sandbox.detach(["sleep", "60"])
    ago(manager, 301)
    os.utime(command._journal.fd, times=(time.time() - 400,) * 2)
    assert manager.reconcile().terminated == (session.id,)
    assert sandbox.state is SandboxState.DESTROYED
    manager.reconcile()
    assert ends(heard, sandbox.id) == [("command.ended", command.id), ("sandbox.destroyed", None)]


def test_what_failed_is_not_told_as_done(manager: SandboxManager, heard: list[Event]) -> None:
    session = manager.acquire(client_id="me")
    manager._ledger._do("UPDATE sessions SET timeouts = '{\"idle\": -5}' WHERE id = ?", (session.id,))
    heard.clear()
    for _ in range(2):
        assert [action.id for action in manager.reconcile().failed] == [session.id]
    assert kinds(heard, "session") == []
    assert manager._users[session.sandbox_id] == {session.id: "me"}


def test_every_destroyed_sandbox_is_counted(manager: SandboxManager) -> None:
    swept, expired, pooled, left = (
        manager.acquire(ttl=ttl, options=options)
        for ttl, options in ((None, None), (50, POOLED), (None, POOLED), (None, POOLED))
    )
    left.release()
    for session, seconds in ((swept, 301), (expired, 60), (pooled, 301)):
        ago(manager, seconds, session.sandbox_id)
    manager.reconcile()
    for session in (swept, expired, pooled):
        assert is_gone(manager, session.sandbox_id)
    text = manager.prometheus()
    for reason, number in (("swept", 2), ("expired", 1), ("released", 1)):
        assert f'sandboxcore_destroyed_total{{reason="{reason}"}} {number}\n' in text


# --- a fork ---------------------------------------------------------------------------------------------


def test_a_forked_child_ends_nothing_of_its_parents(state: Path) -> None:
    """It may leave the block, whatever a thread of its parent was at."""
    code = f"""
        import os, signal, threading
        from sandboxcore import SandboxError, SandboxManager, SelectionOptions
        held, go = threading.Event(), threading.Event()
        def hold(manager):
            with manager._guard, manager._sweeping:
                held.set()
                go.wait()
        with SandboxManager({str(state)!r}, sweep_interval=None) as manager:
            session = manager.acquire(client_id="me", options=SelectionOptions(use_pool=True))
            thread = threading.Thread(target=hold, args=[manager])
            thread.start()
            held.wait()
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    session.sandbox
                except SandboxError as error:
                    assert str(os.getppid()) in str(error), error
                    manager.reconcile()
                    manager.close()
                    os._exit(0)
                os._exit(1)
            print(os.waitpid(child, 0)[1])
            go.set()
            thread.join()
            print(session.state, manager.get_record(session.sandbox_id).state)
            print(session.sandbox.exec(["echo", "x"]).stdout.decode())
    """
    assert host_program(code).stdout.split() == ["0", "active", "running", "x"]
