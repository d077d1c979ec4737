"""The records of persistent sandboxes: one database and one directory each."""

import contextlib
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from support import host_environment, host_program

from sandboxcore import SandboxError, SandboxNotFound, SpecError
from sandboxcore.records import SCHEMA, CommandRecord, SandboxRecord
from sandboxcore.statedir import default_state_dir
from sandboxcore.store import DATABASE, Store


def record(number: int = 1, **more: object) -> SandboxRecord:
    values = {
        "id": f"sbx-{number:032x}",
        "name": f"box{number}",
        "state": "created",
        "spec": {"network": "none"},
    }
    return SandboxRecord(**{**values, "created_at": float(number), **more})  # type: ignore[arg-type]


def kept(store: Store, entry: SandboxRecord) -> SandboxRecord:
    """Add a record as a sandbox does: with its directory."""
    with store.locked(entry.id):
        store.home(entry.id).path.mkdir()
        store.add(entry)
    return entry


@pytest.fixture
def store(tmp_path: Path):
    with Store(tmp_path / "state") as made:
        yield made


def test_a_record_comes_back_whole(store: Store) -> None:
    entry = kept(
        store,
        record(labels={"ü": "x'\"; DROP TABLE sandboxes"}, metadata={"deep": [1, {"a": None}]}, owner="me",
               description="\n\t", omitted=["landlock"], started_at=1.5, stopped_at=2.5, last_active_at=3.25,
               pid=2**22, ticks=2**40, boot="b"),
    )  # fmt: skip
    assert store.get(entry.id) == store.get(entry.name) == store.find("box1") == entry
    assert store.all() == [entry]
    store.change(entry.id, state="running", labels={"a": "b"}, owner=None)
    changed = store.find(entry.id)
    assert (changed.state, changed.labels, changed.owner, changed.pid) == ("running", {"a": "b"}, None, 2**22)


def test_unknown(store: Store) -> None:
    assert store.get("nobody") is None
    with pytest.raises(SandboxNotFound, match="nobody"):
        store.find("nobody")
    with pytest.raises(SandboxNotFound):
        store.add(CommandRecord(id="cmd-1", sandbox="sbx-none", args=["true"], pty=False, started_at=0.0))


def test_a_name_is_taken_once(store: Store) -> None:
    first, second = kept(store, record(1)), record(2, name="box1")
    with pytest.raises(SpecError, match="'box1' is the name of another sandbox"):
        store.add(second)
    assert store.all() == [first]


def test_an_id_outranks_a_name(store: Store) -> None:
    """Somebody may call a sandbox by the id of another."""
    first = kept(store, record(1))
    second = kept(store, record(0, name=first.id))
    assert store.find(first.id) == first
    assert store.find(second.id) == second


def test_commands_go_with_their_sandbox(store: Store) -> None:
    entry, other = kept(store, record(1)), kept(store, record(2))
    made = [
        CommandRecord(
            id=f"cmd-{n}", sandbox=entry.id, args=["a\n", "ü", ""], pty=bool(n % 2), started_at=float(n)
        )
        for n in range(3)
    ]
    for command in reversed(made):
        store.add(command)
    assert store.commands(entry.id) == made
    assert store.commands(other.id) == []
    store.remove_command("cmd-1")
    assert [command.id for command in store.commands(entry.id)] == ["cmd-0", "cmd-2"]
    with store.locked(entry.id):
        store.remove(entry.id)
    assert store.commands(entry.id) == []
    assert not store.home(entry.id).path.exists()


def test_end_touches_only_what_was_seen(store: Store) -> None:
    """Somebody may have started it again since."""
    seen = kept(store, record(state="running", pid=7, ticks=8))
    store.change(seen.id, pid=9)
    store.end(seen, 5.0)
    assert store.find(seen.id).state == "running"
    store.end(store.find(seen.id), 5.0)
    ended = store.find(seen.id)
    assert (ended.state, ended.stopped_at, ended.pid, ended.ticks) == ("stopped", 5.0, 0, 0)
    store.end(ended, 6.0)
    assert store.find(seen.id).stopped_at == 5.0


# --- the directory ----------------------------------------------------------------------------------


def test_modes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Store(tmp_path / "a" / "state") as store:
            kept(store, record())
            found = {
                str(path.relative_to(store.path)): stat.S_IMODE(path.stat().st_mode)
                for path in (store.path, *store.path.rglob("*"))
            }
    finally:
        os.umask(before)
    expected = {".": 0o700, "sandboxes": 0o700, DATABASE: 0o600, f"{DATABASE}-wal": 0o600,
                f"{DATABASE}-shm": 0o600, f"sandboxes/{record().id}.lock": 0o600}  # fmt: skip
    assert {name: mode for name, mode in found.items() if name in expected} == expected
    assert set(found) == {*expected, f"sandboxes/{record().id}"}


def test_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SANDBOXCORE_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert default_state_dir() == tmp_path / "xdg" / "sandboxcore"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_state_dir() == tmp_path / ".local" / "state" / "sandboxcore"
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(tmp_path / "own"))
    with Store() as store:
        assert store.path == tmp_path / "own"


def test_a_relative_place_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store("state") as store:
        monkeypatch.chdir("/")
        kept(store, record())
        assert (tmp_path / "state" / "sandboxes" / record().id).is_dir()


def test_a_file_is_no_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SandboxError, match=str(place)):
            Store(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SandboxError, match="Permission denied"):
        Store(tmp_path / "state")
    tmp_path.chmod(0o700)


def test_somebody_elses(tmp_path: Path) -> None:
    place = Path("/usr")
    if os.geteuid() == 0:
        place = tmp_path / "foreign"
        place.mkdir(mode=0o700)
        os.chown(place, 12345, 12345)
    with pytest.raises(SandboxError, match="belongs to uid"):
        Store(place)
    assert not (place / "sandboxes").exists()


def test_open_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(SandboxError, match="others may write"):
        Store(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_schema_from_the_future(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        kept(store, record())
    db = sqlite3.connect(tmp_path / "state" / DATABASE)
    db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    with pytest.raises(SandboxError, match=f"schema {SCHEMA + 1}, but this version knows {SCHEMA}"):
        Store(tmp_path / "state")


def test_no_database(tmp_path: Path) -> None:
    with Store(tmp_path / "state"):
        pass
    (tmp_path / "state" / DATABASE).write_bytes(b"something else entirely" * 100)
    with pytest.raises(SandboxError, match="not a database"):
        Store(tmp_path / "state")


# --- several at once --------------------------------------------------------------------------------


def test_eight_processes_make_it_at_once(tmp_path: Path) -> None:
    """The first of all to use a directory, in the same instant: each finds one database."""
    code = """
        import os, sys
        from sandboxcore.records import SandboxRecord
        from sandboxcore.store import Store
        from sandboxcore import SpecError
        print("ready", flush=True)
        sys.stdin.readline()
        store, wins = Store(sys.argv[1]), 0
        for number in range(20):
            name = f"sbx-{os.getpid()}-{number}"
            own = SandboxRecord(id=name, name=f"name{number}", state="created", spec={})
            try:
                with store.locked(own.id):
                    store.add(own)
                wins += 1
            except SpecError:
                pass
        print(wins)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "state")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    clients = [subprocess.Popen(command, text=True, env=host_environment(), **pipes) for _ in range(8)]  # type: ignore[call-overload]
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
    assert [error for _, error in outputs] == [""] * 8
    assert sum(int(output) for output, _ in outputs) == 20
    with Store(tmp_path / "state") as store:
        assert len(store.all()) == 20
        assert store.strays() == []


def test_threads_share_a_store(store: Store) -> None:
    entry = kept(store, record())
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(50):
                store.change(entry.id, description=str(number))
                assert store.find("box1").description.isdecimal()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_the_lock(store: Store, tmp_path: Path) -> None:
    entry = kept(store, record())
    with store.locked(entry.id), Store(store.path) as other:
        with pytest.raises(BlockingIOError):
            with other.locked(entry.id, wait=False):
                pass
        with other.locked("sbx-other", wait=False):
            pass
    with store.locked(entry.id, wait=False):
        pass
    assert sorted(os.listdir(store.path / "sandboxes")) == [entry.id, f"{entry.id}.lock"]


def test_a_lock_goes_with_its_record(store: Store) -> None:
    """Also if it was waited for meanwhile: whoever gets it then, gets a new one."""
    entry = kept(store, record())
    got: list[bool] = []

    def wait() -> None:
        with Store(store.path) as other, other.locked(entry.id):
            got.append(other.get(entry.id) is None)

    with store.locked(entry.id):
        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        store.remove(entry.id)
    for thread in threads:
        thread.join(30)
    assert got == [True] * 4
    assert os.listdir(store.path / "sandboxes") == []


def test_the_lock_of_a_killed_process_is_free(store: Store) -> None:
    entry = kept(store, record())
    code = """
        import os, signal, sys
        from sandboxcore.store import Store
        with Store(sys.argv[1]).locked(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert host_program(code, str(store.path), entry.id).returncode == -9
    with store.locked(entry.id, wait=False):
        pass


def test_strays_and_orphans(store: Store) -> None:
    entry = kept(store, record())
    sandboxes = store.path / "sandboxes"
    (sandboxes / "sbx-lost").mkdir()
    (sandboxes / "sbx-locked.lock").touch()
    assert store.strays() == ["sbx-locked", "sbx-lost"]
    home = store.home(entry.id)
    store.add(CommandRecord(id="cmd-1", sandbox=entry.id, args=["true"], pty=False, started_at=0.0))
    for name in ("keeper", "work", "cmd-1", "cmd-1.journal", "cmd-2", "cmd-3.journal"):
        (home.path / name).touch()
    assert store.orphans(entry.id) == ["cmd-2", "cmd-3.journal"]


def test_closed_and_asked_again(store: Store) -> None:
    entry = kept(store, record())
    store.close()
    store.close()
    assert store.find(entry.id) == entry


def test_a_forked_child_has_its_own_connection(store: Store) -> None:
    entry = kept(store, record())
    child = os.fork()
    if child == 0:
        try:
            store.change(entry.id, description="by the child")
            store.close()
        finally:
            os._exit(store._db is not None)
    assert os.waitpid(child, 0)[1] == 0
    assert store.find(entry.id).description == "by the child"
    store.change(entry.id, description="by the parent")
    with contextlib.closing(sqlite3.connect(store.path / DATABASE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_keep_a_lock(store: Store) -> None:
    entry = kept(store, record())
    reading, writing = os.pipe()
    up, child_up = os.pipe()
    locked, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.locked(entry.id):
            locked.set()
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(30)
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(child_up, b"x")
        os.read(reading, 1)
        os._exit(0)
    assert os.read(up, 1) == b"x"
    release.set()
    thread.join(30)
    with store.locked(entry.id, wait=False):  # while the child lives
        pass
    for fd in (writing, reading, up, child_up):
        os.close(fd)
    assert os.waitpid(child, 0)[1] == 0


def test_a_name_longer_than_an_address(tmp_path: Path) -> None:
    """unix(7): 107 bytes."""
    with Store(tmp_path / ("d" * 120) / "state") as store:
        home = store.home(kept(store, record()).id)
        with home.bind("keeper") as server, home.connect("keeper") as client:
            client.send(b"x")
            assert server.recv(10) == b"x"
            assert server.type & socket.SOCK_DGRAM
        with pytest.raises(ConnectionRefusedError):
            home.connect("keeper")
        home.remove("keeper", "never-there")
        with pytest.raises(FileNotFoundError):
            home.connect("keeper")
