"""Sessions: which moves are legal, and when one has been without activity for too long."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxcore import InvalidTransition, SpecError
from sandboxcore.records import STATES, SessionRecord
from sandboxcore.session import (
    LIVE,
    SessionState,
    SessionTimeouts,
    can_move,
    check_move,
    deadline,
    is_timed_out,
    sources,
)

LEGAL = {
    ("active", "detached"), ("active", "suspended"), ("active", "terminated"),
    ("detached", "active"), ("detached", "suspended"), ("detached", "terminated"),
    ("suspended", "active"), ("suspended", "terminated"),
}  # fmt: skip
SECONDS = st.none() | st.floats(0.001, 1e9)


def record(state: str = "active", **more: object) -> SessionRecord:
    values = {"id": "sess-1", "sandbox": "sbx-1", "client": "me", "created_at": 0.0, "last_active_at": 1000.0}
    return SessionRecord(state=state, **{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", list(itertools.product(SessionState, repeat=2)), ids="-".join)
def test_every_pair(pair: tuple[SessionState, SessionState]) -> None:
    state, to = pair
    assert can_move(state, to) == (pair in LEGAL) == (state in sources(to))
    if pair in LEGAL:
        check_move("sess-1", state, to, "move")
    else:
        with pytest.raises(InvalidTransition, match=f"sess-1: cannot move while {state}"):
            check_move("sess-1", state, to, "move")


def test_the_states_on_record_are_these() -> None:
    assert STATES["sessions"] == tuple(SessionState)
    assert set(LIVE) == set(SessionState) - {SessionState.TERMINATED}
    assert not [to for to in SessionState if can_move(SessionState.TERMINATED, to)]


def test_the_defaults() -> None:
    times = SessionTimeouts()
    assert [times.of(state) for state in SessionState] == [300, 3600, 86400, None]
    assert times.replace(idle=None).of(SessionState.ACTIVE) is None
    assert SessionTimeouts.from_dict({}) == times


@pytest.mark.parametrize("name", ["idle", "detached", "suspended"])
@pytest.mark.parametrize("value", [0, -1, True, "60", math.nan, math.inf, [1]])
def test_no_timeout(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=rf"timeouts\.{name}: .* is not a positive number"):
        SessionTimeouts.from_dict({name: value})


def test_an_unknown_timeout() -> None:
    with pytest.raises(SpecError, match=r"timeouts\.idel: there is no such"):
        SessionTimeouts.from_dict({"idel": 3})


@given(SECONDS, SECONDS, SECONDS, st.sampled_from(SessionState), st.floats(0, 2e9))
def test_deadlines(
    idle: float | None, detached: float | None, suspended: float | None, state: SessionState, now: float
) -> None:
    times = SessionTimeouts(idle=idle, detached=detached, suspended=suspended)
    assert SessionTimeouts.from_dict(times.to_dict()) == times
    seconds = {"active": idle, "detached": detached, "suspended": suspended, "terminated": None}[state]
    session = record(state, timeouts=times.to_dict())
    assert deadline(session) == (None if seconds is None else 1000.0 + seconds)
    over = state == "terminated" or (seconds is not None and now >= 1000.0 + seconds)
    assert is_timed_out(session, now) == over
