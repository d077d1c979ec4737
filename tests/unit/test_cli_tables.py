"""What the verbs about sandboxes, sessions and events print, from records alone."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sandboxcore import cli
from sandboxcore.cli_common import complain, shown, span
from sandboxcore.cli_events import event_line, is_wanted
from sandboxcore.cli_keeping import _print_actions, _print_collected
from sandboxcore.cli_manager import _Appender, wanted_policy
from sandboxcore.cli_reading import long_rows, short_rows
from sandboxcore.cli_resources import _counts
from sandboxcore.cli_sessions import session_data, session_rows
from sandboxcore.events import Event, EventKind
from sandboxcore.policy import Action, LifecyclePolicy
from sandboxcore.records import SandboxRecord, SessionRecord
from sandboxcore.recovery import Collected
from sandboxcore.session import SessionTimeouts

NOW = 1_000_000.0
BOX = SandboxRecord(
    id="sbx-1", name="box", state="running", spec={}, labels={"b": "2", "a": "1"}, owner="me",
    created_at=NOW - 7300, last_active_at=NOW - 61, expires_at=NOW + 119.5, pid=7,
)  # fmt: skip


def test_what_was_done_is_told_without_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    bad, told = "\x1b[2J\udcff", "?[2J?"
    done = Action(kind="stop", id="sbx-1", name=bad, reason="old")
    _print_actions((done, replace(done, kind="delete", error=bad)))
    _print_collected(Collected(ended=(), removed=(bad,), commits=(bad,)))
    complain(f"{bad}: no\nhint")
    out, err = capsys.readouterr()
    assert out == f"stopped {told}: old\nremoved {told}\nfinished commit to {told}\n"
    assert err == f"sandboxcore: delete {told} (old): {told}\nsandboxcore: {told}: no\nhint\n"


@pytest.mark.parametrize("module", cli._MODULES)
def test_each_verb_is_where_it_is_looked_for(module: str) -> None:
    """A module adds its verbs, and no others; they are loaded for nothing else."""
    script = f"""
import sandboxcore.cli_common, sandboxcore.{module}
print(*sorted(sandboxcore.cli_common.living.commands))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == sorted(cli._MODULES[module])


def test_every_module_of_verbs_is_known() -> None:
    shared = {"cli_common", "cli_manager", "cli_filter", "cli_doctor"}
    found = {path.stem for path in Path(cli.__file__).parent.glob("cli_*.py")}
    assert found - shared == cli._MODULES.keys()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0.9, "0s"), (119.9, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (200000, "2d")],
)
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_shown_is_printable() -> None:
    assert shown("a\x1b[2J\nb\x9b\x7fé") == "a?[2J?b??é"


def test_the_list_of_sandboxes() -> None:
    head, row = short_rows([BOX])
    assert head == ("NAME", "ID", "STATE", "PID", "AGE", "LABELS")
    assert row[:4] + row[5:] == ("box", "sbx-1", "running", "7", "a=1,b=2")


def test_the_long_list_of_sandboxes() -> None:
    bare = SandboxRecord(id="sbx-2", name="x", state="created", spec={}, created_at=NOW - 5)
    late = SandboxRecord(id="sbx-3", name="y", state="stopped", spec={}, created_at=NOW, expires_at=NOW)
    sessions = {"sbx-1": {"sess-1": "active", "sess-2": "detached"}}
    head, *rows = long_rows([BOX, bare, late], sessions, NOW)
    assert head == ("NAME", "STATE", "SESSIONS", "OWNER", "AGE", "IDLE", "EXPIRES", "LABELS")
    assert rows[0] == ("box", "running", "2", "me", "2h", "61s", "119s", "a=1,b=2")
    assert rows[1] == ("x", "created", "-", "-", "5s", "5s", "-", "")
    assert rows[2][6] == "due"


def test_a_sandbox_of_a_pool_is_marked() -> None:
    pooled = SandboxRecord(id="sbx-1", name="warm", state="running", spec={}, host="12 34 boot")
    assert short_rows([pooled])[1][2] == long_rows([pooled], {}, NOW)[1][1] == "running/pool"


def session(**fields: object) -> SessionRecord:
    values = {
        "id": "sess-1", "sandbox": "sbx-1", "client": "me", "state": "active", "created_at": NOW - 90,
        "last_active_at": NOW - 30, "timeouts": SessionTimeouts(idle=60, detached=None).to_dict(),
    }  # fmt: skip
    return SessionRecord(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "shown_as"),
    [
        ({}, ("box", "me", "active", "90s", "30s", "30s")),
        ({"last_active_at": NOW - 60}, ("box", "me", "active", "90s", "60s", "due")),
        ({"state": "detached", "client": ""}, ("box", "-", "detached", "90s", "30s", "-")),
        ({"state": "terminated", "sandbox": "sbx-9"}, ("sbx-9", "me", "terminated", "90s", "30s", "-")),
    ],
)
def test_the_list_of_sessions(fields: dict[str, object], shown_as: tuple[str, ...]) -> None:
    assert session_rows([session(**fields)], {"sbx-1": "box"}, NOW)[1] == ("sess-1", *shown_as)


def test_a_session_as_data() -> None:
    assert session_data(session(), "box")["expires_at"] == NOW + 30
    assert session_data(session(state="terminated"), None)["expires_at"] is None


def test_events_are_one_line_each() -> None:
    data = {"args": ["a b", "\x1b]0;t\x07"], "path": "/x", "odd": 'a "b"', "empty": "", "n": 1.5, "no": None}
    line = event_line(Event(kind=EventKind.COMMAND_ENDED, sandbox="sbx-1", client="me", data=data))
    rest = line.split(maxsplit=2)[2]
    assert rest == (
        r'command.ended      sandbox=sbx-1 client=me args=["a b", "\u001b]0;t\u0007"] path=/x'
        r' odd="a \"b\"" empty="" n=1.5 no=null'
    )


def test_which_events_are_wanted() -> None:
    event = Event(kind=EventKind.SANDBOX_STARTED, sandbox="sbx-1", client="me")
    assert is_wanted(event, (), {})
    assert is_wanted(event, ("command", "sandbox"), {"client": "me"})
    assert is_wanted(event, ("sandbox.started",), {"sandbox": "sbx-1", "client": "me"})
    assert not is_wanted(event, ("sandbox.start",), {})
    assert not is_wanted(event, (), {"client": "you"})


def test_events_that_are_lost_are_counted() -> None:
    class Full:
        def append(self, event: Event) -> None:
            raise OSError(28, "No space left on device")

    appender = _Appender(Full())  # type: ignore[arg-type]
    for _ in range(2):
        appender(Event(kind=EventKind.SANDBOX_STARTED))
    assert (appender.lost, appender.error and appender.error.errno) == (2, 28)


def test_options_change_a_policy() -> None:
    def given(**values: object) -> dict[str, object]:
        return {"auto_stop": None, "auto_archive": None, "auto_delete": None, **values}

    assert wanted_policy(given()) is None
    assert wanted_policy(given(auto_stop=5.0)) == LifecyclePolicy(auto_stop=5)
    now = LifecyclePolicy(auto_stop=5, auto_delete=7)
    assert wanted_policy(given(auto_stop="none", auto_archive=6.0), now) == LifecyclePolicy(
        auto_archive=6, auto_delete=7
    )


def test_counts() -> None:
    assert _counts({}) == "0"
    assert _counts({"running": 2, "stopped": 1, "paused": 0}) == "3: 2 running, 1 stopped"
