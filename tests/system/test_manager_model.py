"""Random operations on a manager, against a model of what there must be, with SIGKILL in between and in the
middle. SANDBOXCORE_MODEL_EXAMPLES: how many such histories; default 6."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import managerclient
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import gone, host_environment, wait_until

from sandboxcore import SandboxManager

EXAMPLES = int(os.environ.get("SANDBOXCORE_MODEL_EXAMPLES") or 6)
CLIENTS = st.sampled_from(["ada", "bob", ""])
PICK = st.integers(min_value=0, max_value=1 << 16)
PATIENCE = 30  # seconds
MOST = 5  # sandboxes at once, for speed

MOVES = {
    "detach": {"active": "detached"},
    "suspend": {"active": "suspended", "detached": "suspended"},
    "resume": {"suspended": "active", "detached": "active"},
    "release": dict.fromkeys(("active", "detached", "suspended"), "terminated"),
    "terminate": dict.fromkeys(("active", "detached", "suspended"), "terminated"),
}


class Machine(RuleBasedStateMachine):
    """sessions: id -> [sandbox, client, state]; sandboxes: id -> [state, mark]: of what has not ended.
    clients: of each sandbox, all that ever used it."""

    nursery = ""  # where its processes come from

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[str, list[str]] = {}
        self.sandboxes: dict[str, list[Any]] = {}
        self.clients: dict[str, set[str]] = {}
        self.marks = 0
        self.directory = tempfile.mkdtemp(prefix="manager-model-")

    # --- the process that does it -----------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self.nursery)
            self.lines = connection.makefile("rw")
        self.say(os.path.join(self.directory, "state"))
        self.pid = int(self.lines.readline())

    def say(self, line: str) -> None:
        print(line, file=self.lines, flush=True)

    def ask(self, *command: Any) -> Any:
        """What it says; the name of the error where it refuses."""
        self.say(json.dumps(command))
        answer = json.loads(self.lines.readline())
        return answer["error"] if "error" in answer else answer["done"]

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):  # or it ends with an answer that nobody wanted
            self.lines.read()
        with contextlib.suppress(BrokenPipeError):
            self.lines.close()
        wait_until(lambda: gone(self.pid), "its end", PATIENCE)
        del self.pid

    def teardown(self) -> None:
        if hasattr(self, "pid"):
            self.kill()
            with SandboxManager(os.path.join(self.directory, "state"), sweep_interval=None) as manager:
                manager.reconcile()
                assert [action for action in manager.destroy_all() if action.error] == []
        shutil.rmtree(self.directory)

    # --- what must come of it ---------------------------------------------------------------------

    def users(self, sandbox: str, *states: str) -> list[str]:
        return [key for key, (box, _, state) in self.sessions.items() if box == sandbox and state in states]

    def moved(self, operation: str, key: str) -> str | None:
        """The model's next state of a session, after which the rest of the model is right, too; None: it is
        refused."""
        sandbox, _, state = self.sessions[key]
        box, after = self.sandboxes[sandbox], MOVES[operation].get(state)
        if operation == "suspend" and (
            set(self.users(sandbox, "active")) - {key} or box[0] not in ("running", "paused")
        ):
            return None
        if operation == "resume" and state == "detached" and box[0] == "paused":
            return None
        if after is None:
            return None
        if operation == "suspend":
            box[0] = "paused"
        elif operation == "resume":
            box[:] = ["running", "" if box[0] == "stopped" else box[1]]
        self.sessions[key][2] = after
        if after == "terminated":
            del self.sessions[key]
            if not self.users(sandbox, "active", "detached", "suspended"):
                del self.sandboxes[sandbox]
        return after

    def picked(self, things: dict[str, Any], pick: int) -> str:
        return list(things)[pick % len(things)]

    @precondition(lambda self: len(self.sandboxes) < MOST)
    @rule(client=CLIENTS)
    def acquire(self, client: str) -> None:
        wanted = [client, "detached"] if client else []
        left = [key for key, (_, *rest) in self.sessions.items() if rest == wanted]
        alone = [key for key in left if self.clients[self.sessions[key][0]] == {client}]
        mine = [key for key in alone if self.sandboxes[self.sessions[key][0]][0] == "running"]
        key, sandbox = self.ask("acquire", client)
        if mine:
            assert key in mine
            self.sessions[key][2] = "active"
        else:
            assert key not in self.sessions
            assert sandbox not in self.sandboxes
            self.sessions[key] = [sandbox, client, "active"]
            self.sandboxes[sandbox] = ["running", ""]
            self.clients[sandbox] = {client}

    @precondition(lambda self: self.sandboxes)
    @rule(client=CLIENTS, pick=PICK)
    def attach(self, client: str, pick: int) -> None:
        sandbox = self.picked(self.sandboxes, pick)
        mine = [key for key in self.users(sandbox, "detached") if client and self.sessions[key][1] == client]
        answer = self.ask("attach", sandbox, client)
        if self.sandboxes[sandbox][0] == "paused":
            assert answer == "InvalidTransition"
            return
        if self.sandboxes[sandbox][0] == "stopped":
            self.sandboxes[sandbox] = ["running", ""]
        assert answer[0] in mine if mine else answer[0] not in self.sessions
        self.sessions[answer[0]] = [sandbox, client, "active"]
        self.clients[sandbox].add(client)

    @precondition(lambda self: self.sessions)
    @rule(operation=st.sampled_from(sorted(MOVES)), pick=PICK)
    def move(self, operation: str, pick: int) -> None:
        key = self.picked(self.sessions, pick)
        answer, refused = self.ask(operation, key), self.moved(operation, key) is None
        assert answer in (("InvalidTransition", "SandboxBusy") if refused else (None,))

    @precondition(lambda self: self.sandboxes)
    @rule(pick=PICK)
    def stop(self, pick: int) -> None:
        sandbox = self.picked(self.sandboxes, pick)
        stopped = self.sandboxes[sandbox][0] == "stopped"
        assert self.ask("stop", sandbox) == ("InvalidTransition" if stopped else None)
        self.sandboxes[sandbox] = ["stopped", None]

    @precondition(lambda self: any(state == "running" for state, _ in self.sandboxes.values()))
    @rule(pick=PICK)
    def mark(self, pick: int) -> None:
        running = {key: box for key, box in self.sandboxes.items() if box[0] == "running"}
        sandbox, self.marks = self.picked(running, pick), self.marks + 1
        assert self.ask("mark", sandbox, str(self.marks)) is None
        self.sandboxes[sandbox][1] = str(self.marks)

    @rule()
    def reconcile(self) -> None:
        assert self.ask("reconcile") == []

    @rule()
    def killed_between(self) -> None:
        self.kill()
        self.begin()

    @precondition(lambda self: self.sessions)
    @rule(operation=st.sampled_from(sorted(MOVES)), pick=PICK, delay=st.integers(0, 12))
    def killed_while_it_moves(self, operation: str, pick: int, delay: int) -> None:
        """It has happened or not; what is known of it is one or the other, and it can be done again."""
        key = self.picked(self.sessions, pick)
        before, box = list(self.sessions[key]), list(self.sandboxes[self.sessions[key][0]])
        self.interrupted(delay, operation, key)
        after = self.moved(operation, key)
        session = self.ask("look")["sessions"].get(key, [*before[:2], "terminated"])
        assert session[:2] == before[:2]
        assert session[2] in (before[2], after or before[2])
        self.done_after_all(operation, key, session[2], after, box[0])

    def done_after_all(self, operation: str, key: str, now: str, after: str | None, box: str) -> None:
        """So that what comes next does not depend on when exactly it was killed."""
        if after is None:
            return
        if operation == "suspend" and now == "suspended" and box == "running":  # only on record, perhaps
            assert self.ask("resume", key) is None
            now = "active"
        if now != after:
            assert self.ask(operation, key) is None

    @precondition(lambda self: len(self.sandboxes) < MOST)
    @rule(delay=st.integers(0, 40))
    def killed_while_it_acquires(self, delay: int) -> None:
        """What it made, if it got that far, is the client's."""
        self.interrupted(delay, "acquire", "cat")
        found = self.ask("look")
        for key in found["sessions"].keys() - self.sessions.keys():
            sandbox, client, state = found["sessions"][key]
            assert (client, state) == ("cat", "active")
            assert sandbox not in self.sandboxes
            assert found["sandboxes"][sandbox][0] in ("created", "running", "stopped")
            assert self.ask("terminate", key) is None

    def interrupted(self, delay: int, *command: Any) -> None:
        self.say(json.dumps(command))
        time.sleep(delay / 1000)
        self.kill()
        self.begin()
        assert self.ask("reconcile") == []

    @invariant()
    def is_as_it_must_be(self) -> None:
        if not hasattr(self, "pid"):
            return
        found = self.ask("look")
        assert found["sessions"] == self.sessions
        assert found["damaged"] == []
        assert found["sandboxes"].keys() == self.sandboxes.keys()
        for key, (state, mark) in self.sandboxes.items():
            expected = [state, (mark or "") if state == "running" else None]
            assert found["sandboxes"][key] == expected


Machine.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=15, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), print_blob=True,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    Machine.nursery = str(tmp_path_factory.mktemp("nursery") / "socket")
    command = [sys.executable, managerclient.__file__, Machine.nursery]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=host_environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.timeout(60 + 20 * EXAMPLES)
class TestModel(Machine.TestCase):
    """The machine."""
