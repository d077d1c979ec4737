"""Sessions on record: each change is one that no other process can come between."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sandboxcore import InvalidTransition, SandboxBusy, SandboxError, SandboxNotFound
from sandboxcore.errors import SessionNotFound
from sandboxcore.identity import this_process
from sandboxcore.ledger import Ledger
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.session import LIVE, SessionState, can_move

PATIENCE = 60


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "state") as made:
        for number in (1, 2):
            made.add(sandbox(number))
        yield made


def sandbox(number: int, **more: object) -> SandboxRecord:
    values = {"id": f"sbx-{number}", "name": f"box{number}", "state": "running", "spec": {}, "lasting": False}
    return SandboxRecord(**{**values, "created_at": 1.0, "last_active_at": 2.0, **more})  # type: ignore[arg-type]


def opened(ledger: Ledger, number: int, box: int = 1, **more: object) -> SessionRecord:
    values = {"id": f"sess-{number}", "sandbox": f"sbx-{box}", "client": "me", "state": "active"}
    times = {"created_at": float(number), "last_active_at": float(number)}
    record = SessionRecord(**{**values, **times, **more})  # type: ignore[arg-type]
    ledger.open_session(record)
    return record


def states(ledger: Ledger) -> dict[str, str]:
    return {session.id: session.state for session in ledger.sessions()}


def at_once(*actions: Callable[[], object]) -> list[object]:
    """What they return, or raise, when each has a thread and they begin together."""
    barrier, results = threading.Barrier(len(actions)), [None] * len(actions)

    def run(number: int) -> None:
        barrier.wait(PATIENCE)
        try:
            results[number] = actions[number]()  # type: ignore[call-overload]
        except SandboxError as error:
            results[number] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results  # type: ignore[return-value]


# --- sessions ---------------------------------------------------------------------------------------


def test_a_session_comes_back_whole(ledger: Ledger) -> None:
    made = opened(ledger, 1, client="ü'; --", timeouts={"idle": 5, "detached": None}, metadata={"a": [None]},
                  labels={"k": "v"}, trace_id="t", ended_at=3.5, ended_why="so")  # fmt: skip
    assert ledger.session("sess-1") == made
    assert ledger.sessions() == [made]
    with pytest.raises(SessionNotFound, match="sess-none"):
        ledger.session("sess-none")


def test_of_a_sandbox_that_is_not_there(ledger: Ledger) -> None:
    with pytest.raises(SandboxNotFound, match="sbx-9 is not on record"):
        opened(ledger, 1, 9)
    assert ledger.doom(ledger.find("box1"), "its time is up")
    with pytest.raises(SandboxNotFound, match="about to be destroyed: its time is up"):
        opened(ledger, 1)
    assert ledger.sessions() == []


def test_which_ones(ledger: Ledger) -> None:
    opened(ledger, 1, labels={"a": "1", "b": "2"})
    opened(ledger, 2, client="you", state="detached", labels={"a": "1"})
    opened(ledger, 3, 2, state="suspended")
    opened(ledger, 4, 2, state="terminated")

    def ids(**which: object) -> list[int]:
        return [int(one.id.removeprefix("sess-")) for one in ledger.sessions(**which)]  # type: ignore[arg-type]

    assert ids() == [1, 2, 3, 4]
    assert ids(states=LIVE) == [1, 2, 3]
    assert ids(states=[SessionState.TERMINATED]) == [4]
    assert ids(client="you") == [2]
    assert ids(client="nobody") == []
    assert ids(sandbox="sbx-2") == [3, 4]
    assert ids(labels={"a": "1"}) == [1, 2]
    assert ids(labels={"a": "1", "b": "2"}, client="me", states=LIVE, sandbox="sbx-1") == [1]
    assert ledger.session_states() == {
        "sbx-1": {"sess-1": "active", "sess-2": "detached"}, "sbx-2": {"sess-3": "suspended"},
    }  # fmt: skip


@pytest.mark.parametrize("to", SessionState)
@pytest.mark.parametrize("state", SessionState)
def test_every_move(ledger: Ledger, state: SessionState, to: SessionState) -> None:
    made = opened(ledger, 1, state=state.value)
    if can_move(state, to):
        before = time.time()
        moved = ledger.move_session("sess-1", to, "move it")
        assert before <= moved.last_active_at <= time.time()
        assert moved == replace(made, state=to.value, last_active_at=moved.last_active_at)
        assert ledger.session("sess-1") == moved
    else:
        with pytest.raises(InvalidTransition, match=f"cannot move it while {state}"):
            ledger.move_session("sess-1", to, "move it")
        assert ledger.session("sess-1") == made
    with pytest.raises(SessionNotFound):
        ledger.move_session("sess-2", to, "move it")


def test_alone_or_not_at_all(ledger: Ledger) -> None:
    seen = opened(ledger, 1)
    opened(ledger, 2)
    with pytest.raises(SandboxBusy, match="sess-1: suspend: another one uses its sandbox"):
        ledger.move_session("sess-1", SessionState.SUSPENDED, "suspend", alone=True)
    assert ledger.session("sess-1") == seen
    ledger.move_session("sess-2", SessionState.DETACHED, "detach")
    ledger.move_session("sess-1", SessionState.SUSPENDED, "suspend", alone=True)
    ledger.put_back(seen)
    assert ledger.session("sess-1") == seen
    ledger.end_session("sess-1", "so")
    ledger.put_back(seen)  # it has gone on
    assert ledger.session("sess-1").state == "terminated"


@pytest.mark.parametrize("state", SessionState)
def test_only_a_detached_one_is_taken(ledger: Ledger, state: SessionState) -> None:
    opened(ledger, 1, state=state.value)
    taken = ledger.take_session("sess-1")
    assert (taken is not None) == (state == SessionState.DETACHED)
    assert states(ledger) == {"sess-1": "active" if taken else state.value}
    assert ledger.take_session("sess-none") is None


BECOMES_ACTIVE: dict[str, Callable[[Ledger], object]] = {
    "open": lambda ledger: opened(ledger, 2),
    "take": lambda ledger: ledger.take_session("sess-1"),
    "move": lambda ledger: ledger.move_session("sess-1", SessionState.ACTIVE, "resume"),
}


@pytest.mark.parametrize("way", BECOMES_ACTIVE)
def test_none_becomes_active_in_a_sandbox_that_is_no_use(ledger: Ledger, way: str) -> None:
    left = opened(ledger, 1, state="detached")
    for state in ("created", "paused", "stopped", "archived"):
        ledger.change("sbx-1", state=state)
        with pytest.raises(InvalidTransition, match=f"box1: cannot use it while {state}"):
            BECOMES_ACTIVE[way](ledger)
        assert ledger.sessions() == [left]
    ledger.change("sbx-1", state="running")
    assert ledger.doom(ledger.find("box1"), "its time is up")
    with pytest.raises(SandboxNotFound, match="about to be destroyed: its time is up"):
        BECOMES_ACTIVE[way](ledger)
    assert ledger.sessions() == [left]


@pytest.mark.parametrize("way", BECOMES_ACTIVE)
def test_what_is_on_record_does_not_say_whether_one_of_a_pool_runs(ledger: Ledger, way: str) -> None:
    opened(ledger, 1, state="detached")
    ledger.change("sbx-1", state="created", host=this_process())
    BECOMES_ACTIVE[way](ledger)
    assert "active" in states(ledger).values()


def test_one_of_eight_takes_it(ledger: Ledger) -> None:
    for number in range(20):
        opened(ledger, number, state="detached")
        with contextlib.ExitStack() as stack:
            others = [stack.enter_context(Ledger(ledger.path)) for _ in range(8)]
            name = f"sess-{number}"
            won = at_once(*(lambda own=own, name=name: own.take_session(name) for own in others))  # type: ignore[misc]
        assert sum(one is not None for one in won) == 1


def test_the_last_one_dooms_its_sandbox(ledger: Ledger) -> None:
    opened(ledger, 1)
    opened(ledger, 2, state="suspended")
    opened(ledger, 3, 2)
    assert ledger.end_session("sess-1", "first") == (True, False)
    assert ledger.end_session("sess-1", "again") == (False, False)
    assert ledger.find("box1").doomed == ""
    assert ledger.end_session("sess-2", "second") == (True, True)
    assert (ledger.find("box1").doomed, ledger.find("box2").doomed) == ("second", "")
    ended = ledger.session("sess-1")
    assert (ended.state, ended.ended_why) == ("terminated", "first")
    assert ended.ended_at is not None
    assert ledger.end_session("sess-none", "x") == (False, False)


def test_one_that_lasts_is_not_doomed(ledger: Ledger) -> None:
    ledger.add(sandbox(3, lasting=True))
    opened(ledger, 1, 3)
    assert ledger.end_session("sess-1", "so") == (True, False)
    assert ledger.find("box3").doomed == ""
    opened(ledger, 2, 3)


def test_the_last_one_and_a_new_one(ledger: Ledger) -> None:
    """Either the new one keeps the sandbox, or it does not come to be."""
    for number in range(30):
        box = 100 + number
        ledger.add(sandbox(box))
        opened(ledger, number, box)
        with Ledger(ledger.path) as other:
            (_, last), new = at_once(
                lambda n=number: ledger.end_session(f"sess-{n}", "so"),  # type: ignore[misc]
                lambda n=number, b=box, own=other: opened(own, 1000 + n, b),  # type: ignore[misc]
            )  # type: ignore[misc]
        assert last == isinstance(new, SandboxNotFound)
        assert bool(ledger.find(f"sbx-{box}").doomed) == last


def test_touched_in_between(ledger: Ledger) -> None:
    seen = opened(ledger, 1)
    ledger.touch_sessions("sbx-1", 50.0)
    assert ledger.end_session("sess-1", "timed out", unless_touched=seen.last_active_at) == (False, False)
    assert ledger.end_session("sess-1", "timed out", unless_touched=50.0) == (True, True)


def test_whom_activity_touches(ledger: Ledger) -> None:
    opened(ledger, 1)
    opened(ledger, 2, state="detached")
    opened(ledger, 3, state="suspended")
    opened(ledger, 4, 2)

    def times() -> list[float]:
        return [one.last_active_at for one in ledger.sessions()]

    ledger.touch_sessions("sbx-1", 100.0)
    assert times() == [100.0, 2.0, 3.0, 4.0]
    assert [one.last_active_at for one in ledger.all()] == [100.0, 2.0]
    ledger.touch_sessions("sbx-1", 50.0)  # it was active since
    assert times() == [100.0, 2.0, 3.0, 4.0]
    ledger.end_session("sess-1", "so")
    ledger.touch_sessions("sbx-1", 200.0)
    assert times() == [100.0, 200.0, 3.0, 4.0]
    ledger.end_session("sess-2", "so")
    ledger.touch_sessions("sbx-1", 300.0)
    assert times() == [100.0, 200.0, 3.0, 4.0]
    assert [one.last_active_at for one in ledger.all()] == [300.0, 2.0]


def test_they_end_with_their_sandbox(ledger: Ledger) -> None:
    opened(ledger, 1)
    opened(ledger, 2, state="terminated", ended_why="long ago")
    opened(ledger, 3, 2, state="suspended")
    ledger.doom(ledger.find("box2"), "expired")
    for number in (1, 2):
        with ledger.locked(f"sbx-{number}"):
            ledger.remove(f"sbx-{number}")
    assert [(one.state, one.ended_why) for one in ledger.sessions()] == [
        ("terminated", "its sandbox was destroyed"), ("terminated", "long ago"), ("terminated", "expired"),
    ]  # fmt: skip


def test_forgotten_when_they_are_old(ledger: Ledger) -> None:
    opened(ledger, 1, state="terminated", ended_at=10.0)
    opened(ledger, 2, state="terminated")
    opened(ledger, 3, state="terminated", ended_at=20.0)
    opened(ledger, 4)
    assert [one.id for one in ledger.ended_sessions(20.0)] == ["sess-1", "sess-2"]
    assert [ledger.forget_session(f"sess-{n}") for n in (1, 1, 4)] == [True, False, False]
    assert [*states(ledger)] == ["sess-2", "sess-3", "sess-4"]


# --- what is done only if nothing came between --------------------------------------------------------

BETWEEN = {
    "used": {"last_active_at": 3.0}, "stopped": {"state": "stopped"}, "more time": {"expires_at": 9e9},
    "another policy": {"policy": {"auto_stop": 5}}, "started again": {"started_at": 7.0},
    "another process": {"pid": 4}, "archived": {"archived_at": 4.0}, "doomed": {"doomed": "so"},
}  # fmt: skip


@pytest.mark.parametrize("what", BETWEEN)
def test_something_came_between(ledger: Ledger, what: str) -> None:
    seen = ledger.find("box1")
    ledger.change("sbx-1", **BETWEEN[what])
    now = ledger.find("box1")
    assert not ledger.doom(seen, "too late")
    assert not ledger.change_unused(seen, state="paused")
    assert ledger.find("box1") == now
    assert ledger.doom(seen, "its time is up", used=True) == (what != "more time")
    assert ledger.change_unused(ledger.find("box1"), state="paused")
    assert ledger.find("box1").state == "paused"


def test_more_time_from_many_at_once(ledger: Ledger) -> None:
    ledger.change("sbx-1", expires_at=9e9)
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(Ledger(ledger.path)) for _ in range(8)]
        given = at_once(*(lambda own=own: own.extend("sbx-1", 10) for own in others))  # type: ignore[misc]
    assert sorted(given) == [9e9 + 10 * number for number in range(1, 9)]  # type: ignore[type-var]
    assert ledger.find("box1").expires_at == 9e9 + 80


def test_more_time(ledger: Ledger) -> None:
    now = time.time()
    for expires in (None, 5.0):
        ledger.change("sbx-1", expires_at=expires)
        when = ledger.extend("sbx-1", 10)
        assert when is not None
        assert now + 10 <= when <= time.time() + 10
        assert ledger.find("box1").expires_at == when
    assert ledger.extend("sbx-1", None) is None
    assert ledger.find("box1").expires_at is None
    ledger.doom(ledger.find("box1"), "so")
    for key in ("sbx-1", "sbx-9"):
        with pytest.raises(SandboxNotFound):
            ledger.extend(key, 10)
    assert ledger.find("box1").expires_at is None


def test_a_session_came_between(ledger: Ledger) -> None:
    seen = ledger.find("box1")
    opened(ledger, 1)
    assert not ledger.doom(seen, "too late")
    assert not ledger.change_unused(seen, state="paused")
    ledger.move_session("sess-1", SessionState.DETACHED, "detach")
    assert ledger.change_unused(seen, description="x")
    assert ledger.doom(seen, "now")


def test_touched_while_it_runs(ledger: Ledger) -> None:
    assert ledger.touch("sbx-1", 5.0)
    ledger.change("sbx-1", state="paused")
    assert not ledger.touch("sbx-1", 6.0)
    assert ledger.find("box1").last_active_at == 5.0


def test_idle_makes_nothing(ledger: Ledger) -> None:
    assert ledger.idle("sbx-1")
    assert os.listdir(ledger.path / "sandboxes") == []
    with ledger.locked("sbx-1"):
        assert not ledger.idle("sbx-1")
    assert ledger.idle("sbx-1")
    with ledger.locked("sbx-1", wait=False):
        pass


# --- sandboxes of one process, settings -----------------------------------------------------------------


def test_of_one_process(ledger: Ledger) -> None:
    ledger.enrol(sandbox(3, host=this_process()))
    opened(ledger, 1, 3)
    assert ledger.find("box3").host == this_process()
    ledger.forget_private("sbx-3")
    assert ledger.get("sbx-3") is None
    assert states(ledger) == {"sess-1": "terminated"}
    assert os.listdir(ledger.path / "sandboxes") == []


def test_settings(ledger: Ledger) -> None:
    assert ledger.setting("default") is None
    for value in ("sbx-1", {"a": [1, None]}, 0, False, ""):
        ledger.set("default", value)
        with Ledger(ledger.path) as other:
            assert other.setting("default") == value
    ledger.set("default", None)
    ledger.set("default", None)
    assert ledger.setting("default") is None
    ledger._do("INSERT INTO settings VALUES ('broken', '{')")
    with pytest.raises(SandboxError, match="damaged setting 'broken'"):
        ledger.setting("broken")
