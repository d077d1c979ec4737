"""Sessions over sandboxes: who gets which, for how long it is theirs, and what is left."""

import errno
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from managed import heard, is_gone, manager, nothing_left, runs, second, session_in, state
from support import spawner_pids, wait_until

from sandboxcore import (
    Event,
    InvalidTransition,
    LifecyclePolicy,
    PersistentSandbox,
    Sandbox,
    SandboxBusy,
    SandboxError,
    SandboxGone,
    SandboxManager,
    SandboxNotFound,
    SandboxSession,
    SandboxState,
    SelectionOptions,
    SessionNotFound,
    SessionState,
    SetupError,
    SpecError,
    TooManySandboxes,
    acquiring,
)
from sandboxcore import SandboxSpec as Spec
from sandboxcore.events import tracing
from sandboxcore.records import SessionRecord

__all__ = ["heard", "manager", "nothing_left", "second", "state"]  # fixtures


# --- acquire and release ------------------------------------------------------------------------------


def test_acquire_gives_a_session_of_a_sandbox_that_runs(manager: SandboxManager) -> None:
    began = time.time()
    session = manager.acquire(client_id="me", metadata={"n": [1]}, labels={"team": "a"})
    assert session.id.startswith("sess-")
    assert session.sandbox_id.startswith("sbx-")
    assert (session.client_id, session.state) == ("me", SessionState.ACTIVE)
    assert (session.metadata, session.labels) == ({"n": [1]}, {"team": "a"})
    assert began <= session.created_at <= session.last_active_at <= time.time()
    assert session.sandbox is session.sandbox
    assert session.sandbox.owner == "me"
    assert runs(session)
    assert session.to_dict()["sandbox"] == session.sandbox_id


def test_release_destroys_what_acquire_made(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="me")
    sandbox = session.sandbox
    session.release()
    assert session.state is SessionState.TERMINATED
    assert sandbox.state is SandboxState.DESTROYED
    assert is_gone(manager, sandbox.id)
    assert session.record.ended_why == "released"
    session.release()
    with pytest.raises(SandboxNotFound):
        _ = session.sandbox


def test_release_with_keep_alive_keeps_it_for_this_client_alone(manager: SandboxManager) -> None:
    mine = manager.acquire(client_id="me")
    mine.sandbox.files.write("/tmp/mine", b"x")
    manager.release(mine, keep_alive=True)
    assert mine.state is SessionState.DETACHED
    other = manager.acquire(client_id="you")
    nobody = manager.acquire()
    assert mine.sandbox_id not in (other.sandbox_id, nobody.sandbox_id)
    again = manager.acquire(client_id="me")
    assert (again, again.sandbox_id) == (mine, mine.sandbox_id)
    assert again.sandbox.files.read("/tmp/mine") == b"x"
    assert manager.acquire(client_id="me").sandbox_id != mine.sandbox_id


@pytest.mark.parametrize("how", ["attach", "owner"])
def test_what_somebody_else_has_used_is_not_taken_by_itself(manager: SandboxManager, how: str) -> None:
    """Also not when he has left it long ago; who wants it says so."""
    mine = manager.acquire(client_id="me")
    mine.detach()
    if how == "attach":
        manager.attach(mine.sandbox_id, "you").session.terminate()
    else:
        manager.describe(mine.sandbox_id, owner="you")
    assert manager.acquire(client_id="me").sandbox_id != mine.sandbox_id
    assert manager.attach(mine.sandbox_id, "me").session == mine


def test_a_session_of_nobody_is_not_continued_by_somebody_else_without_a_name(
    manager: SandboxManager,
) -> None:
    first = manager.acquire()
    first.detach()
    assert manager.attach(first.sandbox_id).session != first
    assert manager.acquire().sandbox_id != first.sandbox_id
    assert first.state is SessionState.DETACHED


def test_what_was_left_is_not_taken_where_another_spec_is_wanted(manager: SandboxManager) -> None:
    mine = manager.acquire(Spec(env={"A": "1"}), client_id="me")
    mine.detach()
    assert manager.acquire(Spec(env={"A": "2"}), client_id="me").sandbox_id != mine.sandbox_id
    fresh = manager.acquire(Spec(env={"A": "1"}), SelectionOptions(require_fresh=True), "me")
    assert fresh.sandbox_id != mine.sandbox_id
    assert manager.acquire(Spec(env={"A": "1"}), client_id="me") == mine


def test_leaving_the_block_releases(manager: SandboxManager) -> None:
    with manager.acquire() as session:
        key = session.sandbox_id
    assert is_gone(manager, key)
    with manager.acquire() as session:
        session.terminate()


def test_one_that_cannot_start_leaves_nothing(manager: SandboxManager, tmp_path: Path) -> None:
    with pytest.raises((SetupError, SpecError)):
        manager.acquire(Spec(ro=[(str(tmp_path / "missing"), "/missing")]))
    assert manager.list_sandboxes() == []
    assert manager.list_sessions() == []


NO_TEXT: dict[str, Callable[[SandboxManager], object]] = {
    "create": lambda manager: manager.create(name="x", labels={"n": 1}),
    "handle": lambda manager: PersistentSandbox(name="x", labels={"n": 1}, state_dir=manager.state_dir),
    "required": lambda manager: manager.acquire(options=SelectionOptions(required_labels={"n": 1})),
    "acquire": lambda manager: manager.acquire(labels={"n": 1}),
    "attach": lambda manager: manager.attach("x", labels={"n": 1}, create_if_missing=True),
    "nothing said": lambda manager: manager.create(name="x", description=None),
    "bytes": lambda manager: manager.create(name="x", owner=b"me"),
    "client": lambda manager: manager.acquire(client_id="x" * 513),
    "metadata": lambda manager: manager.acquire(metadata={"a": object()}),
    "keys": lambda manager: manager.acquire(metadata={1: 2}),
    "of a sandbox": lambda manager: manager.create(metadata={"a": {2: 3}}),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("what", NO_TEXT)
def test_what_cannot_be_read_back_is_not_put_on_record(manager: SandboxManager, what: str) -> None:
    with pytest.raises(SpecError, match="client_id|description|labels|metadata|owner"):
        NO_TEXT[what](manager)
    assert (manager.list_sandboxes(), manager.list_sessions(), manager.damaged()) == ([], [], [])
    assert os.listdir(Path(manager.state_dir) / "sandboxes") == []


def test_the_longest_client(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="ü" * 512)
    session.detach()
    assert manager.acquire(client_id="ü" * 512) == session


@pytest.mark.parametrize("end", ["release", "terminate"])
def test_a_session_whose_row_is_damaged_ends(manager: SandboxManager, end: str) -> None:
    session = manager.acquire(client_id="me")
    manager._ledger._do("UPDATE sessions SET labels = '{'")
    with pytest.raises(SandboxError, match="damaged"):
        session.detach()
    getattr(session, end)()
    assert is_gone(manager, session.sandbox_id)
    with pytest.raises(SessionNotFound):
        manager.release("sess-none")


def test_creation_timeout(manager: SandboxManager) -> None:
    spawners = spawner_pids()  # one of each kind that some test has used
    assert spawners
    for spawner in spawners:
        os.kill(spawner, signal.SIGSTOP)
    try:
        with pytest.raises(SetupError) as info:
            manager.acquire(creation_timeout=0.05)
    finally:
        for spawner in spawners:
            os.kill(spawner, signal.SIGCONT)
    assert info.value.errno == errno.ETIME
    assert info.value.stage
    assert manager.list_sandboxes() == []
    assert manager.list_sessions() == []


# --- several sessions ---------------------------------------------------------------------------------


def test_several_sessions_of_one_client(manager: SandboxManager) -> None:
    found = [manager.acquire(client_id="me") for _ in range(3)]
    assert len({session.sandbox_id for session in found}) == 3
    assert manager.list_sessions(client_id="me") == found
    assert manager.get_session_by_client("me") == found[-1]
    found[-1].detach()
    assert manager.get_session_by_client("me") == found[-2]
    assert manager.get_session_by_client("you") is None
    assert [session.id for session in found] == sorted(session.id for session in found)


def test_a_sandbox_ends_with_its_last_session(manager: SandboxManager) -> None:
    first = manager.acquire(client_id="a")
    second = manager.attach(first.sandbox_id, "b").session
    third = manager.attach(first.sandbox_id, "a").session
    assert len({first, second, third}) == 3
    first.release()
    second.terminate()
    assert runs(third)
    third.detach()
    assert runs(third)
    third.terminate()
    assert is_gone(manager, first.sandbox_id)


def test_a_sandbox_that_create_made_stays_after_its_last_session(manager: SandboxManager) -> None:
    made = manager.create(name="dev")
    session = manager.attach("dev", "me").session
    session.release()
    assert made.state is SandboxState.RUNNING
    preferred = manager.acquire(options=SelectionOptions(preferred_id="dev"), client_id="me")
    preferred.terminate()
    assert made.exec(["true"]).ok


def test_nobody_suspends_what_another_uses(manager: SandboxManager) -> None:
    first = manager.acquire(client_id="a")
    second = manager.attach(first.sandbox_id, "b").session
    with pytest.raises(SandboxBusy):
        first.suspend()
    assert first.state is second.state is SessionState.ACTIVE
    second.detach()
    first.suspend()
    assert first.sandbox.state is SandboxState.PAUSED
    with pytest.raises(InvalidTransition):
        second.resume()
    assert second.state is SessionState.DETACHED
    second.suspend()
    first.resume()
    assert second.state is SessionState.SUSPENDED
    second.resume()
    assert runs(second)


def test_a_failed_suspend_changes_nothing(manager: SandboxManager) -> None:
    for was in ("active", "detached"):
        session = session_in(manager, was)
        session.sandbox.stop()
        with pytest.raises(InvalidTransition):
            session.suspend()
        assert session.state == was


def at(one: SandboxManager, monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], object]) -> None:
    """Have something happen right before a manager asks its ledger for this, the next time."""
    ask = getattr(one._ledger, name)

    def instead(*args: object, **options: object) -> object:
        monkeypatch.setattr(one._ledger, name, ask)
        act()
        return ask(*args, **options)

    monkeypatch.setattr(one._ledger, name, instead)


def test_whoever_comes_before_it_stands_still_keeps_it_running(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attached when the other session was suspended on record, but not the sandbox yet."""
    first, others = manager.acquire(client_id="a"), []
    move = manager._ledger.move_session

    def moved(*args: Any, **options: Any) -> SessionRecord:
        done = move(*args, **options)
        others.append(second.attach(first.sandbox_id, "b").session)
        return done

    monkeypatch.setattr(manager._ledger, "move_session", moved)
    with pytest.raises(SandboxBusy):
        first.suspend()
    assert [first.state, *(other.state for other in others)] == [SessionState.ACTIVE] * 2
    assert runs(first)
    assert runs(others[0])


COMES: dict[str, tuple[str, Callable[[SandboxManager, SandboxSession], object]]] = {
    "attach": ("open_session", lambda one, left: one.attach(left.sandbox_id, "c")),
    "go on": ("take_session", lambda one, left: one.attach(left.sandbox_id, "b")),
    "resume": ("move_session", lambda one, left: one.resume(left.id)),
}


@pytest.mark.parametrize("way", COMES)
@pytest.mark.parametrize("what", ["suspended", "stopped", "archived", "destroyed"])
def test_whoever_comes_too_late_is_not_in(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch, way: str, what: str
) -> None:
    """It ran when they looked."""
    first = manager.acquire(client_id="a")
    left = manager.attach(first.sandbox_id, "b").session
    left.detach()
    key, policy = first.sandbox_id, LifecyclePolicy(auto_stop=0.001)
    ends: dict[str, Callable[[], object]] = {
        "suspended": first.suspend,
        "stopped": lambda: (first.detach(), manager.set_policy(key, policy), manager.reconcile()),
        "archived": lambda: (first.detach(), manager.archive(key)),
        "destroyed": lambda: manager._ledger.doom_anyhow(key, "its time is up"),
    }
    name, come = COMES[way]
    at(second, monkeypatch, name, ends[what])
    with pytest.raises(SandboxNotFound if what == "destroyed" else InvalidTransition):
        come(second, left)
    assert left.state is SessionState.DETACHED
    assert manager.get_state(key) == {"suspended": "paused", "destroyed": "running"}.get(what, what)
    assert manager.list_sessions("active") == ([first] if what == "destroyed" else [])


def test_whoever_comes_before_it_is_put_away_keeps_it(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, came = manager.create().id, []
    at(manager, monkeypatch, "change_unused", lambda: came.append(second.attach(key, "b").session))
    with pytest.raises(InvalidTransition, match="used by an active session"):
        manager.archive(key)
    assert runs(came[0])
    came[0].detach()
    at(manager, monkeypatch, "change_unused", lambda: second.touch(key))
    manager.archive(key)  # somebody has only looked in
    assert manager.get_state(key) is SandboxState.ARCHIVED


# --- attach -------------------------------------------------------------------------------------------


def test_attach_by_name_id_and_uuid(manager: SandboxManager) -> None:
    made = manager.create(name="dev")
    for key in ("dev", made.id, str(uuid.UUID(made.id[4:]))):
        found = manager.attach(key, "me")
        assert not found.newly_created
        assert found.session.sandbox_id == made.id
        assert found.capabilities == made.capabilities
        assert manager.find(key) is manager.get_sandbox(key) is made
    with pytest.raises(SandboxNotFound):
        manager.attach("other")
    assert manager.get_sandbox("other") is None


def test_attach_makes_what_is_missing(manager: SandboxManager) -> None:
    spec = Spec(env={"A": "b"})
    found = manager.attach("dev", "me", create_if_missing=True, create_spec=spec)
    assert found.newly_created
    assert found.session.sandbox.name == "dev"
    assert found.session.sandbox.spec.env["A"] == "b"
    assert found.capabilities == found.session.sandbox.capabilities
    assert not manager.attach("dev", "you", create_if_missing=True, create_spec=spec).newly_created
    with pytest.raises(SpecError):
        manager.attach("no/name", create_if_missing=True)


def test_threads_that_make_the_same_one_get_the_same_one(
    manager: SandboxManager, second: SandboxManager
) -> None:
    found, errors = [], []

    def attach(one: SandboxManager, client: str) -> None:
        try:
            found.append(one.attach("dev", client, create_if_missing=True))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=attach, args=((manager, second)[n % 2], f"c{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sum(result.newly_created for result in found) == 1
    assert len({result.session.sandbox_id for result in found}) == 1
    assert len({result.session.id for result in found}) == 8


def test_attach_goes_on_with_what_this_client_left(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="me")
    session.detach()
    assert manager.attach(session.sandbox_id, "you").session != session
    assert manager.attach(session.sandbox_id, "me").session == session
    assert manager.attach(session.sandbox_id, "me").session != session


def test_attach_starts_what_has_ended(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="me")
    session.sandbox.stop()
    session.detach()
    found = manager.attach(session.sandbox_id, "me")
    assert runs(found.session)


def test_attach_that_cannot_say_what_holds_leaves_no_session(
    manager: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = manager.create(name="dev")
    left = manager.attach("dev", "me").session
    left.detach()

    def fail(self: object) -> None:
        raise SandboxGone("just now")

    monkeypatch.setattr(Sandbox, "capabilities", property(fail))
    for client in ("me", "you"):
        with pytest.raises(SandboxGone):
            manager.attach("dev", client)
    with pytest.raises(SandboxGone):
        manager.attach("other", create_if_missing=True)
    assert manager.list_sessions() == [left]
    assert left.state is SessionState.DETACHED
    assert [record.id for record in manager.list_sandboxes()] == [made.id]


@pytest.mark.parametrize("make", [False, True])
def test_attach_to_one_that_is_destroyed_when_it_is_to_start(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch, make: bool
) -> None:
    made = manager.create(name="dev")
    made.stop()
    at(second, monkeypatch, "locked", lambda: manager.destroy("dev"))
    if make:
        found = second.attach("dev", "me", create_if_missing=True)
        assert found.newly_created
        assert runs(found.session)
    else:
        with pytest.raises(SandboxNotFound):
            second.attach("dev", "me")
        assert second.list_sessions() == []


def test_what_attach_makes_is_destroyed_before_it_starts(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it makes another, with a session that has not ended."""
    start = second._started

    def started(*args: Any) -> None:
        monkeypatch.setattr(second, "_started", start)
        manager.destroy("dev")
        start(*args)

    monkeypatch.setattr(second, "_started", started)
    found = second.attach("dev", "me", create_if_missing=True)
    assert found.newly_created
    assert second.list_sessions() == [found.session]
    assert runs(found.session)


def test_attach_makes_one_when_the_one_before_is_gone(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was to destroy it has died, or is at it just now."""
    made = manager.create(name="dev")
    manager._ledger.doom_anyhow(made.id, "released")
    with pytest.raises(SandboxNotFound):
        second.attach("dev")
    found = second.attach("dev", create_if_missing=True)
    assert found.newly_created
    assert runs(found.session)

    key, looks = found.session.sandbox_id, threading.Event()
    manager._ledger.doom_anyhow(key, "released")
    sweep = second._make_room
    monkeypatch.setattr(second, "_make_room", lambda: (sweep(), looks.set()))
    with ThreadPoolExecutor(1) as pool:
        with manager._ledger.locked(key):
            later = pool.submit(second.attach, "dev", create_if_missing=True)
            assert looks.wait(30)
            assert manager.exists(key)
        assert later.result(30).session.sandbox_id != key

    key = later.result().session.sandbox_id
    manager._ledger.doom_anyhow(key, "released")
    monkeypatch.setattr(acquiring, "_GOING", 0.05)
    with manager._ledger.locked(key), pytest.raises(SandboxNotFound, match="about to be destroyed"):
        second.attach("dev", create_if_missing=True)


def test_one_that_cannot_be_started_by_its_spec_is_not_tried_for_ever(
    manager: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = manager.create(name="dev")
    made.stop()

    def fail() -> None:
        raise SpecError("a path is gone")

    monkeypatch.setattr(made, "start", fail)
    with pytest.raises(SpecError):
        manager.attach("dev", create_if_missing=True)


@pytest.mark.parametrize("attached", [False, True])
def test_one_that_could_not_be_made_is_kept_for_whoever_has_attached(
    manager: SandboxManager, second: SandboxManager, monkeypatch: pytest.MonkeyPatch, attached: bool
) -> None:
    others = []

    def start(sandbox: Sandbox, wait: float | None) -> None:
        if attached:
            others.append(second.attach("dev", "you").session)
        raise TooManySandboxes(1)

    monkeypatch.setattr(manager, "_started", start)
    with pytest.raises(TooManySandboxes):
        manager.acquire(client_id="me", name="dev")
    assert manager.list_sessions() == others
    assert [record.id for record in manager.list_sandboxes()] == [one.sandbox_id for one in others]
    for other in others:
        assert runs(other)
        other.release()
    assert manager.list_sandboxes() == []


def test_whose_trace_id_it_is(manager: SandboxManager, heard: list[Event]) -> None:
    """That of whoever does it; where there is none, that of the session."""

    def told(act: Callable[[], object], prefix: str = "session") -> list[str | None]:
        heard.clear()
        act()
        return [event.trace_id for event in heard if event.kind.startswith(prefix)]

    without = manager.acquire(client_id="me")
    with tracing("first"):
        session = manager.acquire(client_id="me")
        assert told(without.detach) == ["first"]
    assert told(session.detach) == ["first"]
    with tracing("second"):
        assert told(session.resume) == ["second"]
        assert set(told(session.release, "")) == {"second"}
    assert told(without.release) == [None]


# --- looking ------------------------------------------------------------------------------------------


def test_sessions_by_sandbox_state_and_labels(manager: SandboxManager) -> None:
    first = manager.acquire(client_id="a", labels={"x": "1", "y": "2"})
    later = manager.attach(first.sandbox_id, "b", labels={"x": "1"}).session
    assert manager.get_session_by_sandbox(first.sandbox_id) == later
    later.detach()
    assert manager.get_session_by_sandbox(first.sandbox_id) == first
    assert manager.list_sessions("detached") == [later]
    assert manager.list_sessions(labels={"x": "1"}) == [first, later]
    assert manager.list_sessions(labels={"x": "1", "y": "2"}) == [first]
    assert manager.list_sessions("terminated") == []
    with pytest.raises(ValueError):
        manager.list_sessions("no such state")
    assert manager.get_session(first.id) == first
    assert manager.get_session("sess-0") is None
    assert manager.get_session_by_sandbox("sbx-0") is None
    with pytest.raises(SessionNotFound):
        manager.detach("sess-0")
    first.terminate()
    later.terminate()
    assert manager.list_sessions("terminated") == [first, later]
    assert manager.get_session_by_sandbox(first.sandbox_id) is None


def test_the_default_sandbox(manager: SandboxManager, second: SandboxManager) -> None:
    assert manager.get_default_sandbox() is None
    made = manager.create(name="dev")
    manager.set_default_sandbox("dev")
    assert second.get_default_sandbox() == made.id
    with pytest.raises(SandboxNotFound):
        second.set_default_sandbox("other")
    second.set_default_sandbox(None)
    assert manager.get_default_sandbox() is None
    manager.set_default_sandbox(made.id)
    manager.destroy("dev")
    assert manager.get_default_sandbox() is None


def test_sandboxes_by_state_and_labels(manager: SandboxManager) -> None:
    first = manager.create(name="a", labels={"x": "1"}, description="mine", metadata={"k": [1]}, owner="me")
    second = manager.create(start=False)
    assert [record.id for record in manager.list_sandboxes()] == [first.id, second.id]
    assert [record.id for record in manager.list_sandboxes(labels={"x": "1"})] == [first.id]
    assert [record.id for record in manager.list_sandboxes(state="created")] == [second.id]
    record = manager.get_record("a")
    assert record is not None
    assert (record.description, record.metadata, record.owner) == ("mine", {"k": [1]}, "me")
    assert manager.exists("a")
    assert not manager.exists("b")
    assert manager.get_state("a") is SandboxState.RUNNING
    assert manager.get_state("b") is None
    with pytest.raises(SpecError):
        manager.create(name="a")


def test_list_sees_what_was_killed(manager: SandboxManager) -> None:
    made = manager.create()
    os.kill(made.pid, signal.SIGKILL)
    wait_until(lambda: manager.list_sandboxes(state="stopped"), "the end on record")
    assert manager.get_state(made.id) is SandboxState.STOPPED
