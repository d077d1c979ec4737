"""Every state of a session and of a sandbox, with everything that a manager can do to it."""

from collections.abc import Callable
from typing import Any

import pytest
from managed import heard, in_state, is_gone, kinds, manager, nothing_left, runs, session_in, state

from sandboxcore import (
    Event,
    InvalidTransition,
    LifecyclePolicy,
    SandboxManager,
    SandboxNotFound,
    SandboxSession,
    SandboxState,
    SelectionOptions,
    SessionState,
)

pytestmark = pytest.mark.once

__all__ = ["heard", "manager", "nothing_left", "state"]  # fixtures

REFUSED = "refused"
ACTIVE, DETACHED, SUSPENDED, TERMINATED = "active", "detached", "suspended", "terminated"

SESSION_OPERATIONS: dict[str, Callable[[SandboxManager, SandboxSession], Any]] = {
    "detach": lambda manager, session: manager.detach(session),
    "suspend": lambda manager, session: manager.suspend(session.id),
    "resume": lambda manager, session: manager.resume(session),
    "release": lambda manager, session: manager.release(session),
    "keep": lambda manager, session: manager.release(session.id, keep_alive=True),
    "terminate": lambda manager, session: manager.terminate(session),
    "touch": lambda manager, session: manager.touch_session(session),
    "attach": lambda manager, session: manager.attach(session.sandbox_id, session.client_id),
}

# What a session is afterwards; refused: the error names the state, and nothing has changed.
SESSIONS = {
    ACTIVE: {"detach": DETACHED, "suspend": SUSPENDED, "resume": REFUSED, "release": TERMINATED,
             "keep": DETACHED, "terminate": TERMINATED, "touch": ACTIVE, "attach": ACTIVE},
    DETACHED: {"detach": REFUSED, "suspend": SUSPENDED, "resume": ACTIVE, "release": TERMINATED,
               "keep": REFUSED, "terminate": TERMINATED, "touch": DETACHED, "attach": ACTIVE},
    SUSPENDED: {"detach": REFUSED, "suspend": REFUSED, "resume": ACTIVE, "release": TERMINATED,
                "keep": REFUSED, "terminate": TERMINATED, "touch": SUSPENDED, "attach": REFUSED},
    TERMINATED: {"detach": REFUSED, "suspend": REFUSED, "resume": REFUSED, "release": TERMINATED,
                 "keep": REFUSED, "terminate": TERMINATED, "touch": REFUSED},
}  # fmt: skip
EVENTS = {"detach": "detached", "suspend": "suspended", "resume": "resumed", "release": "released",
          "keep": "detached", "terminate": "terminated", "attach": "attached"}  # fmt: skip
RUNS = {ACTIVE: SandboxState.RUNNING, DETACHED: SandboxState.RUNNING, SUSPENDED: SandboxState.PAUSED}


@pytest.mark.parametrize(
    ("before", "operation", "after"),
    [(before, *pair) for before, some in SESSIONS.items() for pair in some.items()],
)
def test_every_state_of_a_session_with_every_operation(
    manager: SandboxManager, heard: list[Event], before: str, operation: str, after: str
) -> None:
    session = session_in(manager, before)
    heard.clear()
    if after == REFUSED:
        with pytest.raises(InvalidTransition) as info:
            SESSION_OPERATIONS[operation](manager, session)
        assert info.value.state in (before, SandboxState.PAUSED)
        assert session.state == before
        assert kinds(heard, "session") == []
    else:
        SESSION_OPERATIONS[operation](manager, session)
        assert session.state == after
        told = [] if before == TERMINATED or operation == "touch" else [f"session.{EVENTS[operation]}"]
        assert kinds(heard, "session") == told
        for event in heard:
            assert event.sandbox == session.sandbox_id
            if event.kind.startswith("session") and operation != "attach":
                assert (event.session, event.client) == (session.id, "me")
    now = before if after == REFUSED else after
    if now == TERMINATED:
        assert is_gone(manager, session.sandbox_id)
    else:
        assert session.sandbox.state is RUNS[now]


def test_a_suspended_sandbox_stands_still_and_goes_on(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="me")
    counter = session.sandbox.detach(["sh", "-c", "while :; do echo x; sleep 0.01; done"])
    session.suspend()
    before = counter.logs()
    with pytest.raises(InvalidTransition):
        session.sandbox.exec(["true"])
    assert counter.logs() == before
    session.resume()
    assert runs(session)


# --- sandboxes ----------------------------------------------------------------------------------------

PREFERRED = "acquire"
SANDBOX_OPERATIONS: dict[str, Callable[[SandboxManager, str], Any]] = {
    "attach": lambda manager, key: manager.attach(key, "me"),
    PREFERRED: lambda manager, key: manager.acquire(options=SelectionOptions(preferred_id=key)),
    "archive": lambda manager, key: manager.archive(key, "done"),
    "recover": lambda manager, key: manager.recover(key),
    "recover and start": lambda manager, key: manager.recover(key, start=True),
    "destroy": lambda manager, key: manager.destroy(key),
    "extend_ttl": lambda manager, key: manager.extend_ttl(key, 60),
    "set_policy": lambda manager, key: manager.set_policy(key, LifecyclePolicy(auto_stop=60)),
    "describe": lambda manager, key: manager.describe(key, description="d", labels={"a": "b"}),
    "touch": lambda manager, key: manager.touch(key),
    "default": lambda manager, key: manager.set_default_sandbox(key),
    "update": lambda manager, key: manager.update(key, hostname="other"),
}
GONE = "gone"
SAME = dict.fromkeys(("extend_ttl", "set_policy", "describe", "touch", "default", "update"), "same")
USED = {"attach": "running", PREFERRED: "running", "destroy": GONE}
SANDBOXES = {
    "created": {**SAME, **USED, "archive": "archived", "recover": REFUSED, "recover and start": REFUSED},
    "running": {**SAME, **USED, "archive": "archived", "recover": REFUSED, "recover and start": REFUSED},
    "paused": {**SAME, "attach": REFUSED, PREFERRED: REFUSED, "archive": "archived", "recover": REFUSED,
               "recover and start": REFUSED, "destroy": GONE},
    "stopped": {**SAME, **USED, "archive": "archived", "recover": REFUSED, "recover and start": REFUSED},
    "archived": {**SAME, "attach": REFUSED, PREFERRED: REFUSED, "archive": REFUSED, "recover": "stopped",
                 "recover and start": "running", "destroy": GONE},
    "destroyed": {**dict.fromkeys(SANDBOX_OPERATIONS, GONE), PREFERRED: "another"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("before", "operation", "after"),
    [(before, *pair) for before, some in SANDBOXES.items() for pair in some.items()],
)
def test_every_state_of_a_sandbox_with_every_operation(
    manager: SandboxManager, before: str, operation: str, after: str
) -> None:
    key, act = in_state(manager, before), SANDBOX_OPERATIONS[operation]
    if after == REFUSED:
        with pytest.raises(InvalidTransition) as info:
            act(manager, key)
        assert info.value.state == before
        assert manager.get_state(key) == before
        assert manager.list_sessions() == []
    elif before == "destroyed" and after == GONE:
        with pytest.raises(SandboxNotFound):
            act(manager, key)
        assert manager.list_sessions() == []
    elif after == "another":
        assert act(manager, key).sandbox_id != key
    else:
        act(manager, key)
        if after == GONE:
            assert is_gone(manager, key)
        else:
            assert manager.get_state(key) == (before if after == "same" else after)


def test_all_pairs_are_in_the_tables() -> None:
    for name, some in SESSIONS.items():
        assert SESSION_OPERATIONS.keys() - some.keys() == ({"attach"} if name == TERMINATED else set())
    assert SESSIONS.keys() == {str(one) for one in SessionState}
    assert SANDBOXES.keys() == {str(one) for one in SandboxState}
    for some in SANDBOXES.values():
        assert some.keys() == SANDBOX_OPERATIONS.keys()
