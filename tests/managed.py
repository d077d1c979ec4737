"""What tests of managers share."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import leaves_nothing

import sandboxcore
from sandboxcore import Event, SandboxManager, SandboxNotFound, SandboxSession, SandboxSpec, SandboxState
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import list_sandboxes

NOBODY = "no-such-sandbox"


@pytest.fixture(autouse=True, scope="module")
def nothing_left() -> Iterator[None]:
    """After all tests of a file there is no more than before."""
    for network in ("none", "host"):  # each has a spawner
        sandboxcore.run(["true"], spec=SandboxSpec(network=network))
    with leaves_nothing():
        yield


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory, empty again at the end."""
    yield tmp_path / "state"
    for record in list_sandboxes(tmp_path / "state"):
        if not record.host:
            with contextlib.suppress(SandboxNotFound):
                PersistentSandbox.connect(record.id, state_dir=tmp_path / "state").destroy()


@pytest.fixture
def heard() -> list[Event]:
    """What the manager has told."""
    return []


@pytest.fixture
def manager(state: Path, heard: list[Event]) -> Iterator[SandboxManager]:
    """One without a sweep of its own, and nothing in it afterwards."""
    with SandboxManager(state, sweep_interval=None, on_event=[heard.append]) as made:
        yield made
        assert [action for action in made.destroy_all() if action.error] == []


@pytest.fixture
def second(state: Path, manager: SandboxManager) -> Iterator[SandboxManager]:
    """Another one over the same state directory, with its own connection and handles, as a process has."""
    with SandboxManager(state, sweep_interval=None) as made:
        yield made


def kinds(heard: list[Event], *prefixes: str) -> list[str]:
    """What was told of these, in its order."""
    return [event.kind.value for event in heard if event.kind.value.startswith(prefixes)]


def in_state(manager: SandboxManager, state: str) -> str:
    """A sandbox without sessions in a state: its id."""
    sandbox = manager.create(start=state != "created")
    assert isinstance(sandbox, PersistentSandbox)
    moves: dict[str, Callable[[], Any]] = {
        "paused": sandbox.suspend,
        "stopped": sandbox.stop,
        "archived": sandbox.archive,
        "destroyed": sandbox.destroy,
    }
    moves.get(state, lambda: None)()
    assert sandbox.state == state
    return sandbox.id


def session_in(manager: SandboxManager, state: str, client: str = "me") -> SandboxSession:
    """A session of a sandbox of its own, in a state."""
    session = manager.acquire(client_id=client)
    moves = {"detached": session.detach, "suspended": session.suspend, "terminated": session.terminate}
    moves.get(state, lambda: None)()
    assert session.state == state
    return session


def runs(session: SandboxSession) -> bool:
    """Whether its sandbox takes commands."""
    return session.sandbox.exec(["echo", "x"], timeout=20).stdout == b"x\n"


def is_gone(manager: SandboxManager, key: str) -> bool:
    """Whether nothing of a sandbox is on record, nor looked at as if it were."""
    found = manager.get_sandbox(key) is None and manager.get_state(key) in (None, SandboxState.DESTROYED)
    return found and key not in [record.id for record in manager.list_sandboxes()]
