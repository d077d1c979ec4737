"""The command line over the manager: sessions, times and policies, the archive, room, events, health."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import host_environment

from sandboxcore.manager import SandboxManager
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.records import SandboxRecord
from sandboxcore.recovery import list_sandboxes
from sandboxcore.selection import SelectionOptions

pytestmark = pytest.mark.once  # who runs it makes no difference to what it says

CLI = [sys.executable, "-m", "sandboxcore"]


class Shell:
    """Somebody who types commands, with a state directory of their own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.env = {**host_environment(), "SANDBOXCORE_STATE_DIR": str(state)}

    def __call__(self, *args: str, status: int = 0, told: str | None = None, **env: str) -> str:
        """What a command prints; its exit status must be this one, and ``told`` be on stderr."""
        done = subprocess.run(
            [*CLI, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            env=self.env | env,
        )  # fmt: skip
        assert done.returncode == status, (args, done)
        assert (told or "") in done.stderr, (args, done)
        if status == 125:
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1, done.stderr
            return done.stderr
        assert bool(told) == bool(done.stderr), (args, done)
        return done.stdout

    def json(self, *args: str, **options: Any) -> Any:
        return json.loads(self(*args, "--json", **options))

    def records(self) -> list[SandboxRecord]:
        """What is on record now."""
        return list_sandboxes(self.state)

    def sql(self, statement: str, *values: Any) -> None:
        """Change the records behind everybody's back."""
        db = sqlite3.connect(self.state / "state.db", timeout=10)
        with db:
            db.execute(statement, values)
        db.close()


@pytest.fixture
def sh(tmp_path: Path) -> Iterator[Shell]:
    """An empty state directory; at the end its sandboxes are gone."""
    shell = Shell(tmp_path / "state")
    yield shell
    with SandboxManager(shell.state, sweep_interval=None) as manager:
        assert not [action for action in manager.destroy_all() if action.error]


# --- sessions -----------------------------------------------------------------------------------


def test_the_life_of_a_session(sh: Shell) -> None:
    made = sh.json(
        "create", "box", "--client", "me", "--label", "a=b", "--description", "words", "--auto-stop", "900"
    )
    session = made["session"]["id"]
    assert (made["name"], made["owner"], made["description"]) == ("box", "me", "words")
    assert (made["labels"], made["policy"]) == ({"a": "b"}, {"auto_stop": 900.0})
    (row,) = sh.json("ls")
    assert row == {key: value for key, value in made.items() if key != "session"} | {
        "sessions": {session: "active"}, "last_active_at": row["last_active_at"], "state": "running",
    }  # fmt: skip

    sh("session", "detach", session)
    assert "detached" in sh("session", "detach", session, status=125)
    assert sh("session", "attach", "box", "--client", "me") == f"{session}\n"  # the same goes on
    sh("session", "suspend", session)
    assert sh.json("ls", "--state", "paused")[0]["name"] == "box"
    assert sh.json("session", "ls", "--client", "me", "--state", "suspended")[0]["sandbox_name"] == "box"
    assert sh.json("session", "ls", "--client", "you") == []
    sh("session", "resume", session)
    assert sh("exec", "box", "--", "echo", "on") == "on\n"

    other = sh.json("session", "attach", "box", "--client", "you")
    assert (other["newly_created"], other["sandbox_name"]) == (False, "box")
    assert other["capabilities"]["no_new_privs"] is True
    sh("session", "end", session)
    assert sh.json("ls")[0]["sessions"] == {other["id"]: "active"}
    sh("session", "end", other["id"], other["id"])  # idempotent; with the last one goes the sandbox
    assert sh.records() == []
    assert [row["ended_why"] for row in sh.json("session", "ls", "--state", "terminated")] == [
        "terminated"
    ] * 2


def test_tables_of_sessions(sh: Shell) -> None:
    assert sh("session", "ls").split() == ["ID", "SANDBOX", "CLIENT", "STATE", "AGE", "IDLE", "LEFT"]
    first = sh("session", "attach", "box", "--client", "\x1b[2Jme", "--create").strip()
    assert re.fullmatch(r"sess-[0-9a-f]{32}", first)
    (line,) = sh("session", "ls", "box").splitlines()[1:]
    assert line.split()[:4] == [first, "box", "?[2Jme", "active"]
    assert max(map(len, sh("session", "ls").splitlines())) <= 100
    head, row = sh("ls", "--long").splitlines()
    assert head.split() == ["NAME", "STATE", "SESSIONS", "OWNER", "AGE", "IDLE", "EXPIRES", "LABELS"]
    assert row.split()[:4] == ["box", "running", "1", "?[2Jme"]
    assert "'nobody'" in sh("session", "ls", "nobody", status=125)


def test_refusals_of_one_do_not_keep_the_others(sh: Shell) -> None:
    sh("create", "box")
    session = sh("session", "attach", "box").strip()
    said = sh("session", "detach", "sess-none", session, status=125)
    assert "'sess-none'" in said
    assert sh.json("session", "ls")[0]["state"] == "detached"
    sh("session", "end", session)
    assert sh.records()[0].state == "running"  # it was there before


def test_sandboxes_of_a_pool_are_marked_and_left_alone(sh: Shell) -> None:
    with SandboxManager(sh.state, sweep_interval=None, pool=PoolConfig(min_warm=1, max_warm=1)) as manager:
        session = manager.acquire(None, SelectionOptions(use_pool=True), "me")
        (row,) = sh.json("ls")
        assert row["host"].split()[0] == str(os.getpid())
        assert sh("ls").splitlines()[1].split()[2] == "running/pool"
        assert sh.json("session", "ls")[0]["id"] == session.id
        assert f"process {os.getpid()}'s" in sh("rm", "-f", row["name"], status=125)
        assert f"process {os.getpid()}'s" in sh("exec", row["name"], "--", "true", status=125)
        assert sh.json("stats") == []
    assert sh.records() == []


# --- the default sandbox ------------------------------------------------------------------------


def test_the_default_sandbox(sh: Shell) -> None:
    sh("default", status=1)
    assert "no default" in sh("exec", "-", "--", "true", status=125)
    sh("create", "box", "--hostname", "inside")
    sh("default", "box")
    assert sh("default") == "box\n"
    assert sh("exec", "-", "--", "hostname") == "inside\n"
    assert "terminal" in sh("shell", status=125)
    assert "'nobody'" in sh("default", "nobody", status=125)
    sh("rm", "-f", "-")
    sh("default", status=1)
    assert "--unset" in sh("default", "--unset", "box", status=125)
    sh("default", "--unset")


# --- times, policies, the archive ---------------------------------------------------------------


def test_times(sh: Shell) -> None:
    sh("create", "box", "--no-start", "--ttl", "1000")
    first = sh.records()[0].expires_at
    assert first is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", sh("extend", "box", "500"))
    assert sh.records()[0].expires_at == pytest.approx(first + 500)
    assert sh("extend", "box", "none") == "none\n"
    assert sh.records()[0].expires_at is None
    assert "'soon'" in sh("extend", "box", "soon", status=125)
    assert "ttl" in sh("create", "other", "--ttl", "0", status=125)
    assert "--client" in sh("create", "other", "--client", "me", "--no-start", status=125)


def test_gc_does_what_is_due(sh: Shell) -> None:
    box = sh("create", "box", "--no-start", "--ttl", "1000").strip()
    kept = sh("create", "kept", "--auto-stop", "1000").strip()
    sh.sql("UPDATE sandboxes SET expires_at = 1 WHERE id = ?", box)
    sh.sql("UPDATE sandboxes SET created_at = 1, last_active_at = 1 WHERE id = ?", kept)

    dry = sh.json("gc", "--dry-run")
    due = {one["name"]: (one["kind"], one["reason"].split()[0], one["error"]) for one in dry["actions"]}
    assert due == {"box": ("delete", "expired", ""), "kept": ("stop", "inactive", "")}
    assert dry["dry_run"] is True
    assert {record.name: record.state for record in sh.records()} == {"box": "created", "kept": "running"}

    printed = sh("gc")
    assert re.search(r"^destroyed box: expired \d+ s ago$", printed, re.M)
    assert re.search(r"^stopped kept: inactive for \d+ s \(auto_stop 1000 s\)$", printed, re.M)
    assert [(record.name, record.state) for record in sh.records()] == [("kept", "stopped")]


def test_gc_tells_what_it_cannot_do(sh: Shell) -> None:
    box = sh("create", "box", "--no-start").strip()
    sh("create", "torn", "--no-start")
    sh.sql("UPDATE sandboxes SET policy = ? WHERE id = ?", json.dumps({"auto_\x1b": 1}), box)
    sh.sql("UPDATE sandboxes SET labels = 'no' WHERE name = 'torn'")
    told = sh("gc", status=1, told="sandboxcore: stop box (its policy cannot be read)")
    assert "\x1b" not in told
    done = sh.json("gc", status=1)
    assert [one["id"] for one in done["actions"] if one["error"]] == [box]
    assert len(done["damaged"]) == 1
    sh("ls", told="damaged record: sandboxes sbx-")
    sh.sql("UPDATE sandboxes SET labels = '{}' WHERE name = 'torn'")
    sh.sql("UPDATE sandboxes SET policy = '{}'")
    sh("gc")


def test_policies(sh: Shell) -> None:
    sh("create", "box", "--no-start", "--auto-stop", "60", "--auto-delete", "0")
    assert sh("policy", "box") == "auto_stop: 60\nauto_archive: none\nauto_delete: 0\n"
    done = sh.json("policy", "box", "--auto-stop", "none", "--auto-archive", "3600")
    assert done == sh.json("policy", "box") == {"auto_stop": None, "auto_archive": 3600, "auto_delete": 0}
    assert "policy.auto_stop" in sh("policy", "box", "--auto-stop=-1", status=125)
    assert "--auto-stop" in sh("policy", "box", "--auto-stop", "often", status=125)


def test_the_archive(sh: Shell) -> None:
    sh("create", "box")
    sh("archive", "box", "--why", "for later")
    (row,) = sh.json("ls", "--state", "archived")
    assert (row["archived_why"], row["pid"]) == ("for later", 0)
    assert "archived" in sh("start", "box", status=125)
    sh("recover", "box")
    assert "recover" in sh("recover", "box", status=125)
    sh("archive", "box")
    sh("recover", "box", "--start")
    assert sh("exec", "box", "--", "echo", "back") == "back\n"


@pytest.mark.usefixtures("overlays")
def test_the_archive_keeps_what_was_written(sh: Shell) -> None:
    sh("create", "box", "--writable")
    sh("exec", "box", "--", "sh", "-c", "mkdir /made; echo kept > /made/file")
    sh("archive", "box")
    sh("recover", "--start", "box")
    assert sh("exec", "box", "--", "cat", "/made/file") == "kept\n"
    assert sh("fork", "box", "two", "--max-sandboxes", "2") == "two\n"
    assert sh("exec", "two", "--", "cat", "/made/file") == "kept\n"
    assert "there are 2" in sh("fork", "box", "three", "--max-sandboxes", "2", status=125)


# --- room, stats, health ------------------------------------------------------------------------


def test_room(sh: Shell) -> None:
    one = {"SANDBOXCORE_STATE_MAX_SANDBOXES": "1"}
    sh("create", "one", **one)
    sh("create", "two", status=125, **one)
    sh("create", "two", "--max-sandboxes", "1", status=125)
    sh("session", "attach", "two", "--create", "--max-sandboxes", "1", status=125)
    sh("create", "two", "--no-start", **one)
    sh("start", "two", status=125, **one)
    assert [record.name for record in sh.records()] == ["one", "two"]  # nothing else is left behind
    sh("start", "two", "--max-sandboxes", "none")
    assert "--max-sandboxes" in sh("create", "three", "--max-sandboxes", "few", status=125)
    health = sh.json("health", status=1, **one)
    assert (health["healthy"], health["utilisation"]) == (False, 1.0)


def test_stats_and_health(sh: Shell) -> None:
    sh("session", "attach", "box", "--create", "--client", "me")
    sh("create", "other", "--no-start")
    data = sh.json("stats", "--summary")
    assert (data["sandboxes"], data["sessions"]) == ({"created": 1, "running": 1}, {"active": 1})
    assert (data["living"], data["max_sandboxes"], data["active_sandboxes"]) == (1, 100, 1)
    assert sh("stats", "--summary", "--max-sandboxes", "7").splitlines() == [
        "sandboxes  2: 1 created, 1 running",
        "sessions   1: 1 active",
        "room       1 places taken, of 7",
    ]
    text = sh("stats", "--prometheus")
    assert 'sandboxcore_sandboxes{state="running"} 1\n' in text
    assert "one of" in sh("stats", "--prometheus", "box", status=125)
    health = sh.json("health")
    assert (health["healthy"], health["warnings"]) == (True, [])
    assert re.fullmatch(r"healthy: \w+, \w+, a command in [\d.]+ ms\n", sh("health"))


# --- events -------------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with a key, its owner's alone."""
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("0123456789abcdef\n")
    return path


def test_events_are_chained_and_verified(sh: Shell, tmp_path: Path, key: Path) -> None:
    log = tmp_path / "events"
    env = {"SANDBOXCORE_EVENTS": str(log), "SANDBOXCORE_EVENT_KEY_FILE": str(key)}
    box = sh("create", "box", **env).strip()
    sh("exec", "box", "--", "sh", "-c", "exit 3", status=3, **env)
    sh("rm", "-f", "box", "--events", str(log), SANDBOXCORE_EVENT_KEY_FILE=str(key))

    found = [json.loads(line) for line in sh("events", "show", str(log), "--json").splitlines()]
    kinds = [event["kind"] for event in found]
    assert kinds[:2] == ["sandbox.created", "sandbox.started"]
    assert kinds[2:4] == ["command.started", "command.ended"]
    assert kinds[-1] == "sandbox.destroyed"
    assert {event["sandbox"] for event in found} == {box}
    (line,) = sh("events", "show", str(log), "--kind", "command.ended", "--sandbox", box).splitlines()
    assert "returncode=3" in line
    assert sh("events", "show", str(log), "--kind", "command", "--client", "nobody") == ""

    assert re.fullmatch(r"ok: \d+ lines, last [0-9a-f]{64}\n", sh("events", "verify", str(log), **env))
    last = sh.json("events", "verify", str(log), "--key-file", str(key))["last"]
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-1]))
    sh("events", "verify", str(log), **env)  # an end that is missing shows only to those who knew it
    sh("events", "verify", str(log), "--last", last, status=1, **env)
    log.write_bytes(b"".join(lines).replace(b'"returncode":3', b'"returncode":0'))
    assert "line 4: changed" in sh("events", "verify", str(log), status=1, **env)
    assert sh.json("events", "verify", str(log), status=1, **env)["at_line"] == 4


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("open", "others may use this key"),
        ("gone", "No such file"),
        ("short", "16 bytes"),
        ("log", "/no/such"),
    ],
)
def test_no_events_no_sandbox(sh: Shell, tmp_path: Path, key: Path, what: str, words: str) -> None:
    log = "/no/such/log" if what == "log" else str(tmp_path / "log")
    if what == "open":
        key.chmod(0o644)
    elif what == "gone":
        key.unlink()
    elif what == "short":
        key.write_text("short\n")
    said = sh("create", "box", "--events", log, status=125, SANDBOXCORE_EVENT_KEY_FILE=str(key))
    assert words in said
    assert sh.records() == []
