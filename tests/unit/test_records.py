"""Damaged records are left out, told of and kept; databases of earlier versions are brought up to date."""

import contextlib
import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import pytest
from support import host_environment

from sandboxcore import SandboxError, SpecError
from sandboxcore.ledger import Ledger
from sandboxcore.lifecycle import new_id
from sandboxcore.records import (
    CHANGES,
    SCHEMA,
    CommandRecord,
    SandboxRecord,
    SessionRecord,
    plain_metadata,
    row_of,
)
from sandboxcore.recovery import gc
from sandboxcore.store import DATABASE, Store

CLEAN = {"sandboxes": "id = 'sbx-1'", "commands": "id = 'cmd-1'", "sessions": "id = 'sess-1'"}


def sandbox(number: int, **more: object) -> SandboxRecord:
    values = {"id": f"sbx-{number}", "name": f"box{number}", "state": "stopped", "spec": {}}
    return SandboxRecord(**{**values, "created_at": float(number), **more})  # type: ignore[arg-type]


def session(number: int, **more: object) -> SessionRecord:
    values = {"id": f"sess-{number}", "sandbox": f"sbx-{number}", "client": "me", "state": "active"}
    times = {"created_at": float(number), "last_active_at": float(number)}
    return SessionRecord(**{**values, **times, **more})  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path):
    with Ledger(tmp_path / "state") as made:
        for number in (1, 2):
            with made.locked(f"sbx-{number}"):
                made.home(f"sbx-{number}").path.mkdir()
                made.add(sandbox(number))
            made.add(CommandRecord(id=f"cmd-{number}", sandbox="sbx-1", args=[], pty=False, started_at=0.0))
            made.add(session(number))
        yield made


def run(path: Path, statement: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path / DATABASE)) as db, db:
        return db.execute(statement).fetchall()


# --- damaged rows -----------------------------------------------------------------------------------

DAMAGE = [
    *(("sandboxes", name, text) for name in ("spec", "labels", "metadata", "policy", "omitted")
      for text in ("{", "", "nonsense", "3", "null", '"x"')),
    ("sandboxes", "spec", "[]"), ("sandboxes", "omitted", "{}"),
    ("sandboxes", "state", "flying"), ("sandboxes", "state", "destroyed"), ("sandboxes", "state", ""),
    ("sandboxes", "host", "nobody"), ("sandboxes", "host", "1 2"), ("sandboxes", "host", "-1 2 boot"),
    ("sandboxes", "policy", '{"auto_stop": "soon"}'), ("sandboxes", "labels", '{"a": [}'),
    ("commands", "args", "{}"), ("commands", "args", "[1, 2"),
    ("sessions", "timeouts", "[]"), ("sessions", "metadata", ""), ("sessions", "labels", "true"),
    ("sessions", "state", "asleep"), ("sessions", "timeouts", '{"idle": []}'),
    ("sandboxes", "labels", '{"a": 1}'), ("sandboxes", "omitted", "[1]"), ("commands", "args", "[null]"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "column", "text"), DAMAGE)
def test_damage(ledger: Ledger, table: str, column: str, text: str) -> None:
    run(ledger.path, f"UPDATE {table} SET {column} = '{text}' WHERE {CLEAN[table]}")
    before = run(ledger.path, f"SELECT * FROM {table} ORDER BY id")
    prefix = {"sandboxes": "sbx", "commands": "cmd", "sessions": "sess"}[table]
    (damage,) = ledger.damaged()
    assert (damage.table, damage.id) == (table, f"{prefix}-1")
    assert damage.problem
    good = {"sandboxes": ["sbx-2"], "commands": ["cmd-2"], "sessions": ["sess-2"]}
    every = {name: [identifier.replace("2", "1"), identifier] for name, (identifier,) in good.items()}
    assert [one.id for one in ledger.all()] == {**every, table: good[table]}["sandboxes"]
    assert [one.id for one in ledger.commands("sbx-1")] == {**every, table: good[table]}["commands"]
    assert [one.id for one in ledger.sessions()] == {**every, table: good[table]}["sessions"]
    if table == "sandboxes":
        for key in ("sbx-1", "box1"):
            with pytest.raises(SandboxError, match="damaged record: sandboxes sbx-1"):
                ledger.find(key)
    if table == "sessions":
        with pytest.raises(SandboxError, match="damaged record: sessions sess-1"):
            ledger.session("sess-1")
    assert ledger.strays() == []
    collected = gc(ledger.path)
    assert (collected.ended, collected.removed) == ((), ())
    assert ledger.home("sbx-1").path.is_dir()
    assert run(ledger.path, f"SELECT * FROM {table} ORDER BY id") == before


def test_what_is_not_said_is_what_the_table_says(ledger: Ledger) -> None:
    """So rows of an earlier version are what new ones are."""
    table = run(ledger.path, "SELECT name, dflt_value FROM pragma_table_info('sandboxes')")
    plain = row_of(sandbox(1))
    for name, text in table:
        if text is not None:
            (said,) = run(ledger.path, f"SELECT {text}")[0]
            assert plain[str(name)] == said, name


def test_types_are_the_databases_own(ledger: Ledger) -> None:
    """STRICT: what is no number does not get into its column."""
    for column in ("created_at", "expires_at", "pid"):
        with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT"):
            run(ledger.path, f"UPDATE sandboxes SET {column} = 'soon'")


def test_a_uuid_finds_it(ledger: Ledger) -> None:
    own = sandbox(7, id=new_id("sbx"), name="seven")
    ledger.add(own)
    number = uuid.UUID(own.id.removeprefix("sbx-"))
    for key in (str(number), number.hex, str(number).upper(), f"{{{number}}}", number.urn):
        assert ledger.find(key) == own
    assert ledger.get(str(uuid.uuid4())) is None
    ledger.add(sandbox(8, name=str(number)))
    assert ledger.find(str(number)).id == "sbx-8"  # a name that somebody gave


WRONG = [{"a": object()}, {1: 2}, {"a": [{None: 1}]}, {"a": float("nan")}, {"a": b"x"}, {"a": {1, 2}}]


@pytest.mark.parametrize("metadata", WRONG, ids=repr)
def test_metadata_is_json_data(metadata: dict[Any, Any]) -> None:
    with pytest.raises(SpecError, match="metadata: is not JSON data"):
        plain_metadata(metadata)


def test_metadata_is_as_it_will_be_read(ledger: Ledger) -> None:
    plain = plain_metadata({"a": (1, None, {"b": True}), "ü": 2.5})
    assert plain == {"a": [1, None, {"b": True}], "ü": 2.5}
    ledger.add(session(3, sandbox="sbx-1", metadata=plain))
    assert ledger.session("sess-3").metadata == plain


# --- from one version to the next -------------------------------------------------------------------

BEFORE = [
    ("sbx-a", "a", "running", '{"network": "none"}', '{"k": "v"}', "d", '{"m": [1]}', "me", 1.0, 2.0, None,
     3.0, 4, 5, "boot 6", '["landlock"]'),
    ("sbx-b", "b", "stopped", "{}", "{}", "", "{}", None, 10.0, None, 12.0, 13.0, 0, 0, "", "[]"),
]  # fmt: skip


def version_1(path: Path) -> Path:
    path.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(path / DATABASE, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(CHANGES[1])
        db.executemany(f"INSERT INTO sandboxes VALUES ({', '.join('?' * 16)})", BEFORE)
        db.execute("INSERT INTO commands VALUES ('cmd-a', 'sbx-a', '[\"true\"]', 1, 20.0)")
        db.execute("PRAGMA user_version = 1")
    (path / DATABASE).chmod(0o600)
    return path


def check_migrated(path: Path) -> None:
    with Ledger(path) as ledger:
        first, second = ledger.all()
        assert (first.id, first.name, first.state, first.spec) == (
            "sbx-a",
            "a",
            "running",
            {"network": "none"},
        )
        assert (first.labels, first.metadata, first.omitted) == ({"k": "v"}, {"m": [1]}, ["landlock"])
        assert (first.pid, first.ticks, first.boot, first.last_active_at) == (4, 5, "boot 6", 3.0)
        assert (second.owner, second.started_at, second.stopped_at) == (None, None, 12.0)
        for one in (first, second):
            assert (one.expires_at, one.policy, one.archived_at, one.host, one.doomed) == (
                None,
                {},
                None,
                "",
                "",
            )
        (command,) = ledger.commands("sbx-a")
        assert (command.args, command.pty, command.started_at) == (["true"], True, 20.0)
        assert (ledger.sessions(), ledger.setting("x"), ledger.damaged()) == ([], None, [])
    assert run(path, "PRAGMA user_version") == [(SCHEMA,)]
    assert run(path, "PRAGMA integrity_check") == [("ok",)]


def test_from_version_1(tmp_path: Path) -> None:
    path = version_1(tmp_path / "state")
    check_migrated(path)
    with Ledger(path) as ledger:  # and as one that was made so
        ledger.open_session(session(1, sandbox="sbx-a"))
        ledger.change("sbx-b", expires_at=5.0, policy={"auto_stop": 3})
        assert ledger.find("b").policy == {"auto_stop": 3}
    with Store(tmp_path / "new"):
        pass
    schema = "SELECT name FROM pragma_table_info('sandboxes') ORDER BY cid"
    assert run(path, schema) == run(tmp_path / "new", schema)


def test_what_was_there_before_sessions(tmp_path: Path) -> None:
    """It stays without any, and starts the next time as it is."""
    path = version_1(tmp_path / "state")
    check_migrated(path)
    with Ledger(path) as ledger:
        assert [(one.lasting, one.next_spec) for one in ledger.all()] == [(True, {})] * 2
        ledger.open_session(session(1, sandbox="sbx-a"))
        assert ledger.end_session("sess-1", "released") == (True, False)


def test_labels_that_the_first_version_took(tmp_path: Path) -> None:
    """They become text; what is no JSON stays as it is, and is left out."""
    path = version_1(tmp_path / "state")
    run(path, """UPDATE sandboxes SET labels = '{"k": "v", "n": 1, "t": true, "z": null, "l": [1.5]}'""")
    run(path, "UPDATE sandboxes SET labels = '{' WHERE id = 'sbx-b'")
    with Ledger(path) as ledger:
        assert ledger.find("a").labels == {"k": "v", "n": "1", "t": "true", "z": "null", "l": "[1.5]"}
        assert [damage.id for damage in ledger.damaged()] == ["sbx-b"]


def test_four_processes_migrate_at_once(tmp_path: Path) -> None:
    path = version_1(tmp_path / "state")
    code = """
        import sys
        from sandboxcore.store import Store
        print("ready", flush=True)
        sys.stdin.readline()
        with Store(sys.argv[1]) as store:
            print([record.id for record in store.all()])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    clients = [subprocess.Popen(command, text=True, env=host_environment(), **pipes) for _ in range(4)]  # type: ignore[call-overload]
    try:
        for client in clients:
            assert client.stdout.readline() == "ready\n"
        for client in clients:
            client.stdin.write("\n")
            client.stdin.flush()
        outputs = [client.communicate(timeout=60) for client in clients]
    finally:
        for client in clients:
            client.kill()
    assert outputs == [("['sbx-a', 'sbx-b']\n", "")] * 4
    check_migrated(path)


def killed_before(path: Path, count: int) -> bool:
    """Whether a fork of this process, which opens it, was killed before its so-many-th statement."""
    if (child := os.fork()) == 0:
        try:
            left, connect = count, sqlite3.connect

            class Connection(sqlite3.Connection):
                def execute(self, *args: object) -> sqlite3.Cursor:  # type: ignore[override]
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return super().execute(*args)  # type: ignore[arg-type]

            sqlite3.connect = lambda *args, **more: connect(*args, factory=Connection, **more)
            with Store(path):
                os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_killed_in_the_middle(tmp_path: Path) -> None:
    """Before any statement: it is of the first version or of the last one, whole."""
    seen, count = set(), 0
    while killed_before(path := version_1(tmp_path / str(count)), count):
        (version,) = run(path, "PRAGMA user_version")[0]
        columns = len(run(path, "SELECT name FROM pragma_table_info('sandboxes')"))
        tables = {name for (name,) in run(path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
        seen.add((version, columns, "sessions" in tables))
        check_migrated(path)
        count += 1
    assert seen == {(1, 16, False), (SCHEMA, len(dataclasses.fields(SandboxRecord)), True)}
    assert count > 15
