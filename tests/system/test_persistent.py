"""Sandboxes on record: found from other processes, alive after their maker, told truly after every death."""

import contextlib
import dataclasses
import gc as garbage
import json
import os
import signal
import stat
import subprocess
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiostay import state
from support import (
    PYTHON,
    gone,
    host_process,
    host_program,
    kill_spawners,
    leaves_nothing,
    marked,
    open_fds,
    wait_until,
)

from sandboxcore import (
    PIPE,
    InvalidTransition,
    Sandbox,
    SandboxError,
    SandboxGone,
    SandboxNotFound,
    SandboxState,
    SetupError,
    SpecError,
)
from sandboxcore.identity import boot_id, start_ticks
from sandboxcore.link import Home, Link
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import gc, list_sandboxes
from sandboxcore.store import Store

PATIENCE = 30
__all__ = ["state"]  # a fixture


@pytest.fixture
def box(state: Path) -> Iterator[PersistentSandbox]:
    sandbox = PersistentSandbox.create(name="box", state_dir=state)
    yield sandbox
    sandbox.destroy()


def client(code: str, *args: Any) -> Any:
    """Run a program in another process; returns what it prints as JSON."""
    prelude = """
        import json, os, signal, sys
        import sandboxcore
        from sandboxcore.persistent import PersistentSandbox
        from sandboxcore.recovery import gc, list_sandboxes
        from sandboxcore.store import Store
    """
    done = host_program(textwrap.dedent(prelude) + textwrap.dedent(code), *map(str, args))
    assert (done.returncode, done.stderr) == (0, ""), done
    return json.loads(done.stdout or "null")


def connect(key: str, state: Path) -> PersistentSandbox:
    return PersistentSandbox.connect(key, state_dir=state)


def entries(state: Path) -> list[str]:
    """What there is of sandboxes on disk."""
    return sorted(os.listdir(state / "sandboxes"))


# --- from other processes ---------------------------------------------------------------------------


def test_made_there_used_here(state: Path) -> None:
    made = client(
        """
        spec = sandboxcore.SandboxSpec(env={"COLOUR": "blue"}, labels={"a": "1"})
        with PersistentSandbox.create(spec, name="box", state_dir=sys.argv[1], description="d",
                                      metadata={"k": [1]}, owner="me", labels={"b": "2"}) as box:
            box.exec(["sh", "-c", "echo hello > /workspace/file"], check=True)
            print(json.dumps([box.id, box.pid]))
        """,
        state,
    )  # fmt: skip
    with connect("box", state) as box:
        assert [box.id, box.pid] == made
        assert (box.name, box.description, box.metadata, box.owner) == ("box", "d", {"k": [1]}, "me")
        assert box.labels == {"a": "1", "b": "2"}
        assert box.state is SandboxState.RUNNING
        assert box.exec(["sh", "-c", "cat /workspace/file; echo $COLOUR"]).stdout == b"hello\nblue\n"
        with box.popen(["cat"], stdin=PIPE) as process:
            assert process.communicate(b"through", timeout=PATIENCE)[0] == b"through"
        command = box.detach(["sh", "-c", "read line; echo $line; exit 3"], stdin=PIPE)
    there = client(
        """
        box = PersistentSandbox.connect(sys.argv[2], state_dir=sys.argv[1])
        command = box.command(sys.argv[3])
        status = command.status
        with command.input() as stdin:
            stdin.write(b"from there\\n")
        result = command.wait(30)
        print(json.dumps([status, result.returncode, command.logs().data.decode(), list(command.args)]))
        """,
        state, made[0], command.id,
    )  # fmt: skip
    assert there == ["running", 3, "from there\n", ["sh", "-c", "read line; echo $line; exit 3"]]
    assert command.returncode == 3


def test_unknown(state: Path) -> None:
    with pytest.raises(SandboxNotFound, match="nobody"):
        connect("nobody", state)
    assert list_sandboxes(state) == []


@pytest.mark.parametrize("name", ["", "a" * 65, ".hidden", "-dash", "a/b", "a b", "ä", "a\n", "..", "a\0"])
def test_wrong_names(state: Path, name: str) -> None:
    with pytest.raises(SpecError, match="name"):
        PersistentSandbox(name=name, state_dir=state)
    assert not state.exists()
    Store(state).close()


@pytest.mark.parametrize("name", ["a", "A" * 64, "_", "0", "a.b-c_d"])
def test_right_names(state: Path, name: str) -> None:
    assert PersistentSandbox(name=name, state_dir=state).name == name


def test_a_name_is_taken(box: PersistentSandbox, state: Path) -> None:

    def again() -> None:
        with pytest.raises(SpecError, match="'box' is the name of another"):
            PersistentSandbox.create(name="box", state_dir=state)

    again()  # SQLite keeps one descriptor for later: closing it would drop the locks of our other connection
    with leaves_nothing():
        again()
    assert entries(state) == [box.id, f"{box.id}.lock"]
    box.destroy()
    PersistentSandbox.create(name="box", state_dir=state).destroy()
    assert entries(state) == []


def test_eight_want_one_name(state: Path) -> None:
    """Exactly one wins, the others leave nothing."""
    code = """
        import sys
        import sandboxcore
        from sandboxcore.persistent import PersistentSandbox
        print("ready", flush=True)
        sys.stdin.readline()
        try:
            PersistentSandbox.create(name="box", state_dir=sys.argv[1])
            print("won")
        except sandboxcore.SpecError as error:
            print("lost" if "another" in str(error) else error)
    """
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(host_process(code, str(state))) for _ in range(8)]
        for one in clients:
            assert one.stdout.readline() == "ready\n"
        outputs = [one.communicate("\n", timeout=60) for one in clients]
    assert sorted(outputs) == [("lost\n", "")] * 7 + [("won\n", "")]
    (record,) = list_sandboxes(state)
    assert entries(state) == [record.id, f"{record.id}.lock"]
    assert connect("box", state).exec(["true"]).ok


def test_list_by_labels(state: Path) -> None:
    for number in range(3):
        about = {"all": "yes", "number": str(number)}
        PersistentSandbox(name=f"box{number}", labels=about, state_dir=state)
    assert [record.name for record in list_sandboxes(state)] == ["box0", "box1", "box2"]
    assert [r.name for r in list_sandboxes(state, labels={"number": "1", "all": "yes"})] == ["box1"]
    assert list_sandboxes(state, labels={"number": "1", "all": "no"}) == []


# --- states -----------------------------------------------------------------------------------------


def test_states_are_seen_everywhere(state: Path) -> None:
    box = PersistentSandbox(name="box", state_dir=state)
    look = "print(json.dumps(PersistentSandbox.connect('box', state_dir=sys.argv[1]).state))"
    assert client(look, state) == box.state == "created"
    box.start()
    assert client(look, state) == box.state == "running"
    first = box.pid
    client("PersistentSandbox.connect('box', state_dir=sys.argv[1]).suspend()", state)
    assert client(look, state) == box.state == "paused"
    with pytest.raises(InvalidTransition) as caught:
        box.exec(["true"])
    assert (caught.value.state, caught.value.wanted) == ("paused", "exec")
    with pytest.raises(InvalidTransition):
        box.start()
    client("PersistentSandbox.connect('box', state_dir=sys.argv[1]).resume()", state)
    assert box.exec(["true"], timeout=PATIENCE).ok
    client("PersistentSandbox.connect('box', state_dir=sys.argv[1]).stop()", state)
    assert client(look, state) == box.state == "stopped"
    assert gone(first)
    assert box.stopped_at is not None
    with pytest.raises(InvalidTransition):
        box.stop()
    client("PersistentSandbox.connect('box', state_dir=sys.argv[1]).start()", state)
    assert box.state is SandboxState.RUNNING
    assert box.pid not in (0, first)
    assert box.exec(["true"]).ok
    client("PersistentSandbox.connect('box', state_dir=sys.argv[1]).destroy()", state)
    assert box.state is SandboxState.DESTROYED
    for move in (box.start, box.stop, box.suspend, box.resume, lambda: box.exec(["true"])):
        with pytest.raises(InvalidTransition):
            move()
    box.destroy()
    assert entries(state) == []


def test_what_is_private_is_new_after_a_stop(box: PersistentSandbox) -> None:
    box.exec(["touch", "/workspace/file"], check=True)
    box.stop()
    box.start()
    assert box.exec(["ls", "/workspace"]).stdout == b""


def test_suspended_means_all(box: PersistentSandbox) -> None:
    code = "import time\nwhile True: print('x', flush=True); time.sleep(0.01)"
    command = box.detach([PYTHON, "-I", "-S", "-c", code])
    wait_until(lambda: command.logs().data, "output", PATIENCE)
    box.suspend()
    end = wait_until(lambda: settled_end(command), "silence", PATIENCE)
    box.resume()
    wait_until(lambda: command.logs().end > end, "more output", PATIENCE)


def settled_end(command: Any) -> int | None:
    before = command.logs().end
    time.sleep(0.1)
    return before if command.logs().end == before else None


def test_letting_go_is_not_the_end(state: Path) -> None:
    with PersistentSandbox.create(name="box", state_dir=state) as box:
        pid = box.pid
    box.close()
    assert not gone(pid)
    with connect("box", state) as again:
        process = again.popen(["sleep", "300"])
        assert again.state is SandboxState.RUNNING
    assert process.wait(PATIENCE) == -9  # not detached: it was this handle's
    box.destroy()  # a handle that was let go can still be asked
    assert gone(pid)
    assert box.state is SandboxState.DESTROYED


def test_destroyed_while_another_handle_is_in_use(box: PersistentSandbox, state: Path) -> None:
    results: list[Any] = []

    def work() -> None:
        with connect("box", state) as other:
            while True:
                try:
                    results.append(other.exec(["sleep", "0.05"], timeout=PATIENCE).returncode)
                except (SandboxGone, InvalidTransition, SandboxNotFound) as error:
                    results.append(type(error))
                    return

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: len(results) > 2, "commands", PATIENCE)
    box.destroy()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert set(results[:-2]) == {0}
    assert isinstance(results[-1], type)
    assert entries(state) == []


def test_a_failing_create_leaves_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PersistentSandbox.create(state_dir=state).destroy()
    with leaves_nothing():
        monkeypatch.setattr("sandboxcore.request.FAULT", (1, 5))
        monkeypatch.setattr("sandboxcore.link.sandbox_request", lambda *_, **__: b"nonsense")
        with pytest.raises(SetupError) as caught:
            PersistentSandbox.create(name="box", state_dir=state)
        assert caught.value.stage == "request"
        monkeypatch.undo()
    assert entries(state) == []
    assert list_sandboxes(state) == []
    PersistentSandbox.create(name="box", state_dir=state)


def test_in_a_forked_child(box: PersistentSandbox) -> None:
    """The sandbox is anybody's; the child's handle finds its own way there."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = box.exec(["sh", "-c", "exit 42"], timeout=PATIENCE).returncode
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert box.exec(["true"]).ok


def test_activity_is_noted(box: PersistentSandbox, state: Path) -> None:
    with Store(state) as store:
        store.change(box.id, last_active_at=1.0)
        box.exec(["true"])
        assert time.time() - store.find(box.id).last_active_at < 60


# --- deaths -----------------------------------------------------------------------------------------


def test_the_maker_is_killed_at_the_end_of_create(state: Path) -> None:
    code = """
        import os, signal, sys
        from sandboxcore.persistent import PersistentSandbox
        box = PersistentSandbox.create(name="box", state_dir=sys.argv[1])
        box.detach(["sh", "-c", "sleep 0.5; exit 5"])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert host_program(code, str(state)).returncode == -9
    with connect("box", state) as box:
        assert box.state is SandboxState.RUNNING
        assert box.exec(["echo", "usable"], timeout=PATIENCE).stdout == b"usable\n"
        (command,) = box.commands()
        assert command.wait(PATIENCE).returncode == 5
    assert gc(state) == gc(state, dry_run=True)


@pytest.mark.parametrize("step", ["locked", "home", "record", "birth", "on record"])
def test_the_maker_is_killed_in_the_middle(state: Path, step: str) -> None:
    """Wherever it dies: no sandbox that nobody knows of, and after gc() no trace but the record."""
    code = """
        import os, pathlib, signal, sys
        from sandboxcore import persistent
        from sandboxcore.store import Store
        Box = persistent.PersistentSandbox

        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        step = sys.argv[2]
        if step == "locked":
            locked = Store.locked
            def then_die(*args):
                pathlib.Path.mkdir = die
                return locked(*args)
            Store.locked = then_die
        if step == "home":
            Store.add = die
        if step == "record":
            Box.start = die
        if step == "birth":
            Box._on_record = die
        if step == "on record":
            persistent.Link.stay = die
        Box.create(name="box", state_dir=sys.argv[1])
    """
    Sandbox.create().close()  # this process has its spawner
    with leaves_nothing():
        assert host_program(code, str(state), step).returncode == -9
        if step in ("locked", "home"):
            assert list_sandboxes(state) == []
            left = entries(state)
            assert len(left) == {"locked": 1, "home": 2}[step]
            stray = left[0].removesuffix(".lock")
            assert gc(state, dry_run=True).removed == gc(state).removed
            assert gc(state).removed == ()
            assert entries(state) == [], stray
            return
        wait_until(lambda: list_sandboxes(state)[0].state != "running", "the truth", PATIENCE)
        gc(state)
        (record,) = list_sandboxes(state)
        assert record.state == ("stopped" if step == "on record" else "created")
        box = connect("box", state)
        box.start()
        assert box.exec(["true"], timeout=PATIENCE).ok
        box.destroy()
        assert entries(state) == []


def test_a_stray_directory_is_reported_and_removed(box: PersistentSandbox, state: Path) -> None:
    """Also if something still runs there: the database was lost."""
    home = state / "sandboxes" / "sbx-stray"
    home.mkdir()
    (home / "cmd-1.journal").touch()
    assert gc(state, dry_run=True).removed == ("sbx-stray",)
    assert home.exists()
    with Store(state) as store, store.locked("sbx-stray"):
        assert gc(state).removed == ()  # somebody works on it
    home.mkdir(exist_ok=True)
    gc(state)
    assert not home.exists()
    pid = box.pid
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (state / name).unlink(missing_ok=True)
    assert gc(state).removed == (box.id,)
    wait_until(lambda: gone(pid), "the end of the sandbox nobody knows", PATIENCE)
    assert entries(state) == []


def test_orphans_of_a_killed_client_are_removed(box: PersistentSandbox, state: Path) -> None:
    code = """
        import os, signal, sys
        from sandboxcore.persistent import PersistentSandbox
        from sandboxcore.store import Store
        box = PersistentSandbox.connect("box", state_dir=sys.argv[1])
        Store.add = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        box.detach(["true"])
    """
    assert host_program(code, str(state)).returncode == -9
    kept = box.detach(["sleep", "300"])
    found = gc(state, dry_run=True).removed
    assert len(found) == 2
    assert all(name.startswith(f"{box.id}/cmd-") for name in found)
    assert gc(state).removed == found
    assert sorted(os.listdir(state / "sandboxes" / box.id)) == sorted(
        ["keeper", "pause", "work", kept.id, f"{kept.id}.journal"]
    )
    assert (kept.status, gc(state).removed) == ("running", ())


def test_killed_between_the_record_and_the_start_of_a_command(box: PersistentSandbox, state: Path) -> None:
    code = """
        import os, signal, sys
        from sandboxcore import _native
        from sandboxcore.persistent import PersistentSandbox
        box = PersistentSandbox.connect("box", state_dir=sys.argv[1])
        _native.send = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        box.detach(["true"])
    """
    assert host_program(code, str(state)).returncode == -9
    (command,) = box.commands()
    assert (command.status, command.wait(5).cause) == ("failed", "setup")
    assert command.logs().data == b""


def test_the_spawner_is_killed(box: PersistentSandbox) -> None:
    command = box.detach(["sleep", "300"])
    kill_spawners()
    assert box.state is SandboxState.RUNNING
    assert box.exec(["echo", "usable"], timeout=PATIENCE).stdout == b"usable\n"
    assert command.status == "running"
    box.stop()
    box.start()
    assert box.exec(["true"], timeout=PATIENCE).ok


def test_init_is_killed(box: PersistentSandbox, state: Path) -> None:
    command = box.detach(["sleep", "300"])
    os.kill(box.pid, signal.SIGKILL)
    wait_until(lambda: box.state is SandboxState.STOPPED, "the truth", PATIENCE)
    assert client("print(json.dumps(list_sandboxes(sys.argv[1])[0].state))", state) == "stopped"
    assert (command.status, box.pid, box.record.pid) == ("failed", 0, 0)
    with pytest.raises(InvalidTransition):
        box.exec(["true"])
    box.start()
    assert box.exec(["true"]).ok
    assert box.command(command.id).status == "failed"


def test_gc_reports_a_dead_one(box: PersistentSandbox, state: Path) -> None:
    pid = box.pid
    box.close()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid), "the end of init", PATIENCE)
    with Store(state) as store:
        assert gc(state, dry_run=True).ended == (box.id,)
        assert store.find(box.id).state == "running"
        assert gc(state).ended == (box.id,)
        assert store.find(box.id).state == "stopped"
    assert gc(state).ended == ()
    assert box.state is SandboxState.STOPPED


def test_exec_while_init_is_killed(box: PersistentSandbox) -> None:
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(box.exec(["sleep", "300"], timeout=PATIENCE).cause)
        except SandboxGone as error:
            results.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.1)
    os.kill(box.pid, signal.SIGKILL)
    thread.join(PATIENCE)
    assert results
    wait_until(lambda: box.state is SandboxState.STOPPED, "the truth", PATIENCE)


@pytest.mark.parametrize("kind", [Sandbox, PersistentSandbox])
def test_init_is_killed_just_then(kind: type[Sandbox], state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the message: what is told to nobody is SandboxGone."""
    tell = Link.tell_init

    def after_its_end(link: Link, number: int) -> None:
        signal.pidfd_send_signal(link.pidfd, signal.SIGKILL)
        wait_until(lambda: not link.alive(), "the end of init", PATIENCE)
        tell(link, number)

    about = {} if kind is Sandbox else {"state_dir": state}
    for wanted in (Sandbox.suspend, Sandbox.signal):
        box = kind.create(**about)
        with monkeypatch.context() as patch:
            patch.setattr(Link, "tell_init", after_its_end)
            with pytest.raises(SandboxGone):
                getattr(box, wanted.__name__)(*([15] if wanted is Sandbox.signal else []))
        assert box.state is SandboxState.STOPPED
        box.destroy()


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any of this."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


def test_after_a_reboot(state: Path, bystander: subprocess.Popen[bytes]) -> None:
    """The record's process number is somebody else's now, perhaps even started at the same tick."""
    box = PersistentSandbox(name="box", state_dir=state)
    pid = bystander.pid
    with Store(state) as store:
        store.change(box.id, state="running", pid=pid, ticks=start_ticks(pid), boot="another boot")
    assert gc(state).ended == (box.id,)
    box.destroy()
    assert bystander.poll() is None


def test_another_pid_namespace(state: Path) -> None:
    """Two containers with one state directory: the numbers of one mean nothing in the other."""
    box = PersistentSandbox.create(name="box", state_dir=state)
    boot = box.record.boot
    with Store(state) as store:
        store.change(box.id, boot=f"{boot.split()[0]} 1")
        with pytest.raises(SandboxError, match="another pid namespace"):
            connect("box", state)
        assert [record.state for record in list_sandboxes(state)] == ["running"]
        assert gc(state).ended == ()
        store.change(box.id, boot=boot)
    assert box.exec(["true"]).ok
    box.destroy()


@pytest.mark.parametrize("look", ["state", "list", "gc", "connect", "destroy", "stop"])
def test_a_reused_number(state: Path, bystander: subprocess.Popen[bytes], look: str) -> None:
    box = PersistentSandbox.create(name="box", state_dir=state)
    box.stop()
    pid = bystander.pid
    with Store(state) as store:
        store.change(box.id, state="running", pid=pid, ticks=start_ticks(pid) - 1, boot=boot_id())
    if look == "list":
        assert [record.state for record in list_sandboxes(state)] == ["stopped"]
    if look == "gc":
        assert gc(state).ended == (box.id,)
    if look == "connect":
        with connect("box", state) as other:
            assert other.state is SandboxState.STOPPED
    if look == "destroy":
        box.destroy()
        assert entries(state) == []
    if look == "stop":
        with pytest.raises(InvalidTransition):
            box.stop()
    if look != "destroy":
        assert box.state is SandboxState.STOPPED
        box.start()
        assert box.exec(["true"]).ok
    assert bystander.poll() is None


def test_a_number_that_a_thread_has(state: Path) -> None:
    """pidfd_open(2) takes processes only, and says EINVAL or ENOENT of others."""
    box = PersistentSandbox(name="box", state_dir=state)
    done = threading.Event()
    thread = threading.Thread(target=done.wait, args=(PATIENCE,))
    thread.start()
    try:
        assert thread.native_id
        with Store(state) as store:
            ticks = start_ticks(thread.native_id)
            store.change(box.id, state="running", pid=thread.native_id, ticks=ticks, boot=boot_id())
        assert [record.state for record in list_sandboxes(state)] == ["stopped"]
    finally:
        done.set()
        thread.join()


def test_a_number_that_nobody_has(state: Path) -> None:
    box = PersistentSandbox(name="box", state_dir=state)
    with Store(state) as store:
        store.change(box.id, state="paused", pid=2**22 - 1, ticks=1, boot=boot_id())
    assert box.state is SandboxState.STOPPED


def test_paused_on_record_only(box: PersistentSandbox, state: Path) -> None:
    """A client that was killed in the middle of suspend() or resume(): resume() helps."""
    with Store(state) as store:
        store.change(box.id, state="paused")
    assert box.state is SandboxState.PAUSED
    box.resume()
    assert box.exec(["true"], timeout=PATIENCE).ok


def test_killed_in_the_middle_of_suspend(box: PersistentSandbox, state: Path) -> None:
    code = """
        import os, signal, sys
        from sandboxcore.link import Home, Link
        from sandboxcore.persistent import PersistentSandbox
        tell = Link.tell_init
        def then_die(self, number):
            if sys.argv[2] == "after":
                tell(self, number)
            os.kill(os.getpid(), signal.SIGKILL)
        Link.tell_init = then_die
        PersistentSandbox.connect("box", state_dir=sys.argv[1]).suspend()
    """
    for moment in ("before", "after"):
        assert host_program(code, str(state), moment).returncode == -9
        assert box.state is SandboxState.PAUSED
        box.resume()
        assert box.exec(["true"], timeout=PATIENCE).ok


# --- those that are not on record -------------------------------------------------------------------

PLAIN = """
    import os, sys, time
    from sandboxcore import Sandbox
    from sandboxcore.persistent import PersistentSandbox
    boxes = [Sandbox.create(), Sandbox.create()]
    held = [box.popen(["sleep", "300", sys.argv[1]]) for box in boxes]
    held += [box.detach(["sleep", "300", sys.argv[1]]) for box in boxes]
    forked = os.fork() if sys.argv[2] == "fork" else 1
    if forked == 0:
        time.sleep(300)
    print(forked, *[box.pid for box in boxes], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["alone", "fork"])
def test_private_ones_end_with_the_host_process(way: str) -> None:
    """Under SIGKILL, also when a forked child still holds every descriptor."""
    mark = f"300.{int.from_bytes(os.urandom(5))}"
    with host_process(PLAIN.replace('"300", sys.argv[1]', "sys.argv[1]"), mark, way) as process:
        forked, *inits = map(int, process.stdout.readline().split())
        try:
            wait_until(lambda: len(marked(mark)) >= 5, "every command in sight", PATIENCE)
            process.kill()
            process.wait(PATIENCE)
            wait_until(lambda: all(gone(pid) for pid in inits), "the end of the sandboxes", 5)
            wait_until(lambda: marked(mark) <= {forked}, "the end of the commands", 5)
            if way == "fork":
                assert not gone(forked)
        finally:
            if way == "fork":
                os.kill(forked, signal.SIGKILL)


# --- the state directory ----------------------------------------------------------------------------


def test_a_long_state_dir(tmp_path: Path) -> None:
    """unix(7) has room for 107 bytes."""
    state = tmp_path.joinpath(*["directory" * 12] * 3)
    box = PersistentSandbox.create(name="box", state_dir=state)
    assert len(str(state)) > 320
    assert client(
        """
        box = PersistentSandbox.connect("box", state_dir=sys.argv[1])
        print(json.dumps([box.exec(["true"]).ok, box.detach(["sh", "-c", "exit 3"]).wait(30).returncode]))
        """,
        state,
    ) == [True, 3]
    box.destroy()
    assert entries(state) == []


def test_modes_of_everything(box: PersistentSandbox, state: Path) -> None:
    box.detach(["true"]).wait(PATIENCE)
    for path in (state, *state.rglob("*")):
        st = path.lstat()
        assert st.st_uid == os.geteuid()
        if stat.S_ISDIR(st.st_mode):
            assert stat.S_IMODE(st.st_mode) == 0o700, path
        elif stat.S_ISREG(st.st_mode):
            assert stat.S_IMODE(st.st_mode) == 0o600, path


@pytest.mark.needs_root
def test_somebody_elses_state_dir(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(SandboxError, match="belongs to uid 12345"):
        PersistentSandbox.create(state_dir=tmp_path)
    with pytest.raises(SandboxError, match="belongs to uid 12345"):
        list_sandboxes(tmp_path)
    with pytest.raises(SandboxError, match="belongs to uid 12345"):
        gc(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_state_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with leaves_nothing(), pytest.raises(SandboxError, match="file"):
        PersistentSandbox.create(state_dir=tmp_path / "file")


# --- many hands -------------------------------------------------------------------------------------

RACER = """
    import os, random, sys, time
    import sandboxcore as s
    from sandboxcore.persistent import PersistentSandbox
    from sandboxcore.recovery import gc, list_sandboxes
    state, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    fine = (s.InvalidTransition, s.SandboxNotFound, s.SandboxGone, s.SpecError)

    def create(): PersistentSandbox.create(name="box", state_dir=state).close()
    def with_box(action):
        def call():
            with PersistentSandbox.connect("box", state_dir=state) as box:
                action(box)
        return call
    def execute(box):
        done = box.exec(["echo", "x"], timeout=15)
        assert done.cause in ("exited", "killed") or box.state != "running", (done, box)
    def detach(box):
        command = box.detach(["true"])
        command.wait(20)
        command.close()
    actions = [create, create, *map(with_box, (
        PersistentSandbox.start, PersistentSandbox.stop, PersistentSandbox.destroy, PersistentSandbox.suspend,
        PersistentSandbox.resume, PersistentSandbox.resume, execute, detach)),
        lambda: gc(state), lambda: list_sandboxes(state)]
    while time.monotonic() < end:
        try:
            rng.choice(actions)()
            count += 1
        except fine:
            pass
        except s.SetupError as error:  # its sandbox was stopped or destroyed just then
            if error.stage not in ("launcher", "host", "init") : raise
    print(count, len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize("use", [Home.bind, Home.connect])
def test_a_directory_that_is_gone_leaves_no_socket(use: Callable[[Home, str], Any], tmp_path: Path) -> None:
    before = len(open_fds())
    with pytest.raises(FileNotFoundError) as caught:  # whose traceback keeps what its frames had
        use(Home(tmp_path / "gone"), "keeper")
    assert len(os.listdir("/proc/self/fd")) == before, caught.value


def test_one_that_has_half_ended_leaves_no_socket(box: PersistentSandbox, state: Path) -> None:
    """Its first socket answers, the second one is gone already."""
    record = box.record
    home = box._store.home(box.id)
    (home.path / "work").rename(home.path / "elsewhere")
    try:
        with leaves_nothing(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert Link.reopen(home, record.pid, record.ticks, record.boot) is None
            garbage.collect()
        assert [str(warning.message) for warning in seen] == []
    finally:
        (home.path / "elsewhere").rename(home.path / "work")


def test_one_that_is_just_removed(box: PersistentSandbox) -> None:
    """Its sockets answer still, but its directory is not whole any more."""
    record, home = box.record, box._store.home(box.id)
    (home.path / "pause").rename(home.path / "elsewhere")
    try:
        with leaves_nothing():
            assert Link.reopen(home, record.pid, record.ticks, record.boot) is None
    finally:
        (home.path / "elsewhere").rename(home.path / "pause")


@pytest.mark.slow
def test_processes_race(state: Path) -> None:
    """Start, stop, suspend, destroy, exec, gc on one name at once: no deadlock, no leak, the truth."""
    seed = int.from_bytes(os.urandom(3))
    print(f"seed {seed}")
    Sandbox.create().close()  # this process has its spawner
    with leaves_nothing(), contextlib.ExitStack() as stack:
        racers = [stack.enter_context(host_process(RACER, str(state), str(seed + n), "4")) for n in range(4)]
        deadline = time.monotonic() + 60
        while any(racer.poll() is None for racer in racers) and time.monotonic() < deadline:
            time.sleep(0.5)
            for record in list_sandboxes(
                state
            ):  # the last to suspend it may have gone, and nobody's time counts
                with contextlib.suppress(SandboxError), connect(record.id, state) as box:
                    box.resume()
        outputs = [racer.communicate(timeout=1) for racer in racers]
        print(outputs)
        assert [error for _, error in outputs] == [""] * 4
        for output, _ in outputs:
            count, fds = map(int, output.split())
            assert count > 5
            assert fds < 25
        gc(state)
        for record in list_sandboxes(state):
            with connect(record.id, state) as box:
                if box.state is SandboxState.PAUSED:
                    box.resume()
                if box.state is SandboxState.RUNNING:
                    assert box.exec(["true"], timeout=PATIENCE).ok
                else:
                    box.start()
                box.destroy()
        assert entries(state) == []


def test_threads_race_on_one_handle(box: PersistentSandbox) -> None:
    stop = time.monotonic() + 2
    failures: list[BaseException] = []

    def work(*moves: Any) -> None:
        while time.monotonic() < stop:
            for move in moves:
                try:
                    move()
                except (InvalidTransition, SandboxGone):
                    pass
                except BaseException as error:
                    failures.append(error)
                    return

    def execute() -> None:
        box.exec(["true"], timeout=PATIENCE)

    threads = [
        threading.Thread(target=work, args=moves)
        for moves in ((box.stop, box.start), (execute,), (execute,), (lambda: box.state,))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert failures == []
    if box.state is SandboxState.STOPPED:
        box.start()
    assert box.exec(["true"]).ok


def test_two_find_out_that_it_has_ended(box: PersistentSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both had looked before: the kernel has another error for each."""
    link = box._link_now()
    os.kill(box.pid, signal.SIGKILL)
    assert not link.alive(patience=PATIENCE)
    monkeypatch.setattr(box, "_ready", lambda wanted: link)
    for _ in range(2):
        with pytest.raises(SandboxGone):
            box.exec(["true"], timeout=PATIENCE)


def test_a_record_is_plain_data(box: PersistentSandbox) -> None:
    record = dataclasses.asdict(box.record)
    assert json.loads(json.dumps(record)) == record
    assert (record["state"], record["pid"], record["boot"]) == ("running", box.pid, boot_id())
    assert record["ticks"] == start_ticks(box.pid)
