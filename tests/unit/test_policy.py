"""What is due to a sandbox at which moment: nothing but records and a clock."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxcore import SpecError
from sandboxcore.policy import Action, LifecyclePolicy, due
from sandboxcore.records import STATES, SandboxRecord

NAMES = ("auto_stop", "auto_archive", "auto_delete")
SECONDS = st.none() | st.integers(0, 100)


def record(state: str = "running", **more: object) -> SandboxRecord:
    values = {"id": "sbx-1", "name": "box", "spec": {}, "created_at": 1000.0, "last_active_at": 1000.0}
    if state == "archived":
        values["archived_at"] = 1000.0
    if state == "stopped":
        values["stopped_at"] = 1000.0
    return SandboxRecord(state=state, **{**values, **more})  # type: ignore[arg-type]


def kind(entry: SandboxRecord, now: float) -> str | None:
    action = due(entry, now)
    return None if action is None else action.kind


@pytest.mark.parametrize("state", STATES["sandboxes"])
@pytest.mark.parametrize("seconds", list(itertools.product((None, 10.0), repeat=3)), ids=str)
def test_every_state_with_every_policy(state: str, seconds: tuple[float | None, ...]) -> None:
    policy = LifecyclePolicy(**dict(zip(NAMES, seconds, strict=True)))
    entry = record(state, policy=policy.to_dict())
    stop, archive, delete = seconds
    if state == "archived":
        expected = "delete" if delete else None
    elif archive:
        expected = "archive"
    elif state in ("running", "paused"):
        expected = "stop" if stop else None
    else:
        expected = "delete" if delete else None
    assert kind(entry, 1010.0) == expected
    assert kind(entry, 1009.9) is None


def test_reasons() -> None:
    action = due(record(policy={"auto_stop": 60}), 1090.0)
    assert action == Action(kind="stop", id="sbx-1", name="box", reason="inactive for 90 s (auto_stop 60 s)")
    action = due(record("archived", policy={"auto_delete": 60.5}), 1090.0)
    assert action is not None
    assert action.reason == "archived for 90 s (auto_delete 60.5 s)"
    action = due(record("stopped", policy={"auto_delete": 1}), 1090.0)
    assert action is not None
    assert action.reason == "stopped for 90 s (auto_delete 1 s)"
    action = due(record(expires_at=1050.0), 1090.0)
    assert action is not None
    assert (action.kind, action.reason, action.error) == ("delete", "expired 40 s ago", "")


@pytest.mark.parametrize("state", STATES["sandboxes"])
def test_time_to_live_and_doom_come_first(state: str) -> None:
    every = dict.fromkeys(NAMES, 0.0)
    assert kind(record(state, policy=every, expires_at=1000.0), 1000.0) == "delete"
    doomed = due(record(state, policy=every, doomed="its last session has ended"), 0.0)
    assert doomed is not None
    assert (doomed.kind, doomed.reason) == ("delete", "its last session has ended")
    assert kind(record(state, expires_at=1000.1), 1000.0) is None


@pytest.mark.parametrize("state", STATES["sandboxes"])
def test_that_of_a_process_is_its_own(state: str) -> None:
    entry = record(state, host="1 2 b", policy=dict.fromkeys(NAMES, 0.0), expires_at=0.0, doomed="so")
    assert due(entry, 1e9) is None


@given(st.tuples(SECONDS, SECONDS, SECONDS), st.integers(0, 100), st.integers(0, 100), st.integers(0, 300))
def test_a_life(seconds: tuple[int | None, ...], created: int, active: int, now: int) -> None:
    """Whatever is due is done, until nothing is: no circle, and nothing before its time."""
    stop, archive, delete = seconds
    policy = LifecyclePolicy(auto_stop=stop, auto_archive=archive, auto_delete=delete)
    assert LifecyclePolicy.from_dict(policy.to_dict()) == policy
    entry = record(created_at=float(created), last_active_at=float(active), policy=policy.to_dict())
    idle, seen = now - max(created, active), []
    while (action := due(entry, float(now))) is not None:
        seen.append(action.kind)
        assert len(seen) <= 3
        assert idle >= {"stop": stop, "archive": archive, "delete": 0}[action.kind]
        if action.kind == "delete":
            assert delete == 0  # nothing has stood still for longer
            break
        changes = {"state": "stopped", "stopped_at": float(now)}
        if action.kind == "archive":
            changes = {"state": "archived", "archived_at": float(now)}
        entry = record(**{**_fields(entry), **changes})
    assert len(set(seen)) == len(seen)


def _fields(entry: SandboxRecord) -> dict[str, object]:
    return {name: getattr(entry, name) for name in ("created_at", "last_active_at", "policy", "stopped_at")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, True, "60", math.nan, math.inf, {}])
def test_no_policy(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"policy\.{name}: .* is not a number of seconds"):
        LifecyclePolicy.from_dict({name: value})


def test_an_unknown_policy() -> None:
    with pytest.raises(SpecError, match=r"policy\.auto_explode"):
        LifecyclePolicy.from_dict({"auto_explode": 3})
