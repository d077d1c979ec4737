"""Random operations on a manager, against a model of what there must be, with SIGKILL in between and in the
middle. SANDBOXCORE_MODEL_EXAMPLES: how many such histories; default 6."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import managerclient
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import host_environment

from sandboxcore import SandboxManager

EXAMPLES = int(os.environ.get("SANDBOXCORE_MODEL_EXAMPLES") or 6)
CLIENTS = st.sampled_from(["ada", "bob", ""])
PICK = st.integers(min_value=0, max_value=1 << 16)
MOST = 5  # sandboxes at once, for speed

MOVES = {
    "detach": {"active": "detached"},
    "suspend": {"active": "suspended", "detached": "suspended"},
    "resume": {"suspended": "active", "detached": "active"},
    "release": dict.fromkeys(("active", "detached", "suspended"), "terminated"),
    "terminate": dict.fromkeys(("active", "detached", "suspended"), "terminated"),
}


class Machine(RuleBasedStateMachine):
    """sessions: id -> [sandbox, client, state]; sandboxes: id -> [state, mark]: of what has not ended."""

    def __init__(self) -> None:
        super().__init__()
        self.sessions: dict[str, list[str]] = {}
        self.sandboxes: dict[str, list[Any]] = {}
        self.marks = 0
        self.directory = tempfile.mkdtemp(prefix="manager-model-")

    # --- the process that does it -----------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        command = [sys.executable, managerclient.__file__, os.path.join(self.directory, "state")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=host_environment()
        )
        assert self.heard() == "ready"

    def heard(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, *command: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def ask(self, *command: Any) -> Any:
        """What it says; the name of the error where it refuses."""
        self.tell(*command)
        answer = json.loads(self.heard())
        return answer["error"] if "error" in answer else answer["done"]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

    def teardown(self) -> None:
        if hasattr(self, "process"):
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
        return sorted(things)[pick % len(things)]

    @precondition(lambda self: len(self.sandboxes) < MOST)
    @rule(client=CLIENTS)
    def acquire(self, client: str) -> None:
        mine = [key for key, (box, who, state) in self.sessions.items()
                if client and (who, state) == (client, "detached") and self.sandboxes[box][0] == "running"]  # fmt: skip
        key, sandbox = self.ask("acquire", client)
        if mine:
            assert key in mine
            self.sessions[key][2] = "active"
        else:
            assert key not in self.sessions
            assert sandbox not in self.sandboxes
            self.sessions[key] = [sandbox, client, "active"]
            self.sandboxes[sandbox] = ["running", ""]

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
        """It has happened or not; nothing in between is left after the next manager has looked."""
        key = self.picked(self.sessions, pick)
        sandbox = self.sessions[key][0]
        before, box = list(self.sessions[key]), list(self.sandboxes[sandbox])
        self.interrupted(delay, operation, key)
        after = self.moved(operation, key) or before[2]
        found = self.ask("look")
        if key not in found["sessions"]:
            assert after == "terminated"
            return
        state = found["sessions"][key][2]
        assert state in (before[2], after)
        self.sessions[key] = [*before[:2], state]
        now = found["sandboxes"][sandbox]
        assert now[0] in (box[0], *({"suspend": ["paused"], "resume": ["running"]}.get(operation, [])))
        self.sandboxes[sandbox] = [now[0], now[1] if box[0] == "stopped" else box[1]]

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
            assert found["sandboxes"][sandbox][0] in ("created", "running")
            assert self.ask("terminate", key) is None

    def interrupted(self, delay: int, *command: Any) -> None:
        self.tell(*command)
        time.sleep(delay / 1000)
        self.kill()
        self.begin()
        assert self.ask("reconcile") == []

    @invariant()
    def is_as_it_must_be(self) -> None:
        if not hasattr(self, "process"):
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


@pytest.mark.timeout(60 + 20 * EXAMPLES)
class TestModel(Machine.TestCase):
    """The machine."""
