"""The states of a sandbox: every pair of them, and identifiers."""

import itertools
import pickle
import time

import pytest

from sandboxcore import InvalidTransition, SandboxState
from sandboxcore.lifecycle import can_move, check_move, create_timings, new_id

LEGAL = {
    ("created", "running"),
    ("created", "destroyed"),
    ("running", "paused"),
    ("running", "stopped"),
    ("running", "destroyed"),
    ("paused", "running"),
    ("paused", "stopped"),
    ("paused", "destroyed"),
    ("stopped", "running"),
    ("stopped", "destroyed"),
    ("stopped", "archived"),
    ("created", "archived"),
    ("archived", "stopped"),
    ("archived", "destroyed"),
}


def test_there_are_six_states() -> None:
    states = ["created", "running", "paused", "stopped", "archived", "destroyed"]
    assert [state.value for state in SandboxState] == states
    assert SandboxState("paused") is SandboxState.PAUSED
    assert SandboxState.PAUSED == "paused"
    assert f"{SandboxState.PAUSED}" == "paused"


@pytest.mark.parametrize(("before", "after"), list(itertools.product(SandboxState, repeat=2)))
def test_every_pair(before: SandboxState, after: SandboxState) -> None:
    assert can_move(before, after) is ((before.value, after.value) in LEGAL)
    if can_move(before, after):
        check_move("box", before, after, "go on")
        return
    with pytest.raises(InvalidTransition) as caught:
        check_move("box", before, after, "go on")
    error = caught.value
    assert (error.name, error.state, error.wanted) == ("box", before.value, "go on")
    assert str(error) == f"box: cannot go on while {before.value}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_nothing_leads_back() -> None:
    """Destroyed is for good, and nothing becomes new again."""
    assert not any(can_move(SandboxState.DESTROYED, state) for state in SandboxState)
    assert not any(can_move(state, SandboxState.CREATED) for state in SandboxState)
    assert not any(can_move(state, state) for state in SandboxState)


def test_identifiers() -> None:
    first = new_id("sbx")
    time.sleep(0.002)  # they sort by milliseconds
    second = new_id("sbx")
    assert first < second
    assert first.startswith("sbx-")
    assert len(first) == len("sbx-") + 32
    assert int(first.removeprefix("sbx-"), 16)
    assert len({new_id("cmd") for _ in range(1000)}) == 1000


def test_a_start_by_phase() -> None:
    timings = create_timings(10**9, [2 * 10**9, 2 * 10**9, 3 * 10**9, 5 * 10**9], 6 * 10**9)
    assert timings == {"plan": 1.0, "group": 0.0, "spawn": 1.0, "setup": 2.0, "total": 5.0}
    assert create_timings(0, (), 10**9) == {"total": 1.0}
    with pytest.raises(TypeError):
        timings["plan"] = 2.0  # type: ignore[index]
