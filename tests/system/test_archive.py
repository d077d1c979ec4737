"""Archived: nothing of it runs, what was written to its overlays is on the disk, and it comes back."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiostay import state
from crashes import killed_at
from support import Spec, gone, host_program, wait_until

from sandboxcore import (
    InvalidTransition,
    Limits,
    Mount,
    SandboxBusy,
    SandboxError,
    SandboxState,
    SetupError,
    aio,
)
from sandboxcore.ledger import Ledger
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import gc, list_sandboxes
from sandboxcore.saved import SnapshotStore

pytestmark = pytest.mark.once

PATIENCE = 30
__all__ = ["state"]  # a fixture
needs_overlays = pytest.mark.usefixtures("overlays")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    (path / "below").write_text("below\n")
    return path


@pytest.fixture
def box(state: Path, overlays: None) -> Iterator[PersistentSandbox]:
    sandbox = PersistentSandbox.create(Spec(writable=True), name="box", state_dir=state)
    yield sandbox
    sandbox.destroy()


def sh(sandbox: Any, script: str) -> bytes:
    done = sandbox.shell(script, timeout=PATIENCE)
    assert done.ok, done
    return done.stdout


def in_state(state: Path, which: str, spec: Any) -> PersistentSandbox:
    """One with files in it, in that state."""
    if which == "created":
        return PersistentSandbox(spec, name="box", state_dir=state)
    sandbox = PersistentSandbox.create(spec, name="box", state_dir=state)
    sh(sandbox, "echo kept > /kept; echo lost > /tmp/lost; rm -f /etc/hosts")
    if which == "paused":
        sandbox.suspend()
    if which == "stopped":
        sandbox.stop()
    return sandbox


# --- what is kept -----------------------------------------------------------------------------------


@needs_overlays
@pytest.mark.parametrize("which", ["created", "running", "paused", "stopped"])
def test_from_every_state(state: Path, which: str) -> None:
    with in_state(state, which, Spec(writable=True)) as sandbox:
        init, before = sandbox.pid, time.time()
        sandbox.archive("not needed")
        assert sandbox.state is SandboxState.ARCHIVED
        assert sandbox.pid == 0
        assert not init or gone(init)
        record = sandbox.record
        assert (record.state, record.archived_why, record.pid) == ("archived", "not needed", 0)
        assert record.archived_at is not None
        assert before <= record.archived_at <= time.time()
        sandbox.recover()
        assert sandbox.state is SandboxState.STOPPED
        record = sandbox.record
        assert (record.archived_at, record.archived_why) == (None, "")
        sandbox.start()
        found = sh(sandbox, "cat /kept; ls /tmp; test -e /etc/hosts && echo hosts; true")
        kept = which in ("running", "paused")  # stopping loses everything
        assert found == (b"kept\n" if kept else b"hosts\n" if b"hosts" in found else b"")


def test_without_overlays(state: Path) -> None:
    with PersistentSandbox.create(name="box", state_dir=state) as sandbox:
        sh(sandbox, "echo x > /workspace/x")
        sandbox.archive()
        assert not (state / "snapshots").exists()
        sandbox.recover()
        sandbox.start()
        assert sh(sandbox, "ls /workspace") == b""


def test_only_what_is_an_overlay(state: Path, source: Path, overlays: None) -> None:
    spec = Spec(overlay=[(source, "/data")], mounts=[Mount(kind="tmpfs", target="/scratch")])
    with PersistentSandbox.create(spec, name="box", state_dir=state) as sandbox:
        sh(sandbox, "echo x > /data/x; rm /data/below; echo x > /scratch/x; echo x > /workspace/x")
        sandbox.archive()
        sandbox.recover()
        sandbox.start()
        assert sh(sandbox, "ls /data /scratch /workspace") == b"/data:\nx\n\n/scratch:\n\n/workspace:\n"
    assert (source / "below").exists()


def test_again_and_again(box: PersistentSandbox, state: Path) -> None:
    """Each time on top of the last one; and the layers do not pile up."""
    for number in range(12):
        sh(box, f"echo {number} > /{number}")
        box.archive()
        box.recover()
        box.start()
    assert sh(box, "cat /0 /5 /11") == b"0\n5\n11\n"
    assert len(box._layers_file()["base"]) <= box.DEEP + 1
    assert SnapshotStore(state).gc(dry_run=True) == ()
    box.destroy()
    gc(state)
    assert list((state / "snapshots" / "layers").iterdir()) == []


def test_stopped_after_it_was_recovered(box: PersistentSandbox) -> None:
    """It begins with what was kept, not with what was written since."""
    sh(box, "echo 1 > /one")
    box.archive()
    box.recover()
    box.start()
    sh(box, "echo 2 > /two")
    box.stop()
    box.start()
    assert sh(box, "ls /one; test ! -e /two") == b"/one\n"


def test_what_runs_writes_to_the_end(box: PersistentSandbox) -> None:
    """What a command has told of itself is kept, too: it ends before the last look at the files."""
    script = "i=0; while :; do i=$((i+1)); echo $i >> /n; echo $i; done"
    command = box.detach(["sh", "-c", script], keep="16M")
    wait_until(lambda: command.written[0] > 1000, "some output")
    box.archive()
    last = int(command.logs(size=1 << 24).data.split(b"\n")[-2])
    box.recover()
    box.start()
    assert int(sh(box, "tail -n 1 /n")) >= last


def test_a_suspended_one_is_archived_with_what_it_runs(box: PersistentSandbox) -> None:
    box.detach(["sh", "-c", "echo 1 > /one; sleep 300"])
    wait_until(lambda: box.files.exists("/one"), "its file")
    box.suspend()
    init = box.pid
    box.archive()
    assert gone(init)
    box.recover()
    box.start()
    assert sh(box, "cat /one") == b"1\n"


# --- what it is then --------------------------------------------------------------------------------


def test_nothing_else_can_be_done(box: PersistentSandbox, state: Path) -> None:
    box.archive()
    actions = {
        "start": box.start, "stop": box.stop, "suspend": box.suspend, "resume": box.resume,
        "archive": box.archive, "exec": lambda: box.exec(["true"]), "snapshot": box.snapshot,
        "detach": lambda: box.detach(["true"]), "signal": lambda: box.signal(signal.SIGTERM),
    }  # fmt: skip
    for name, action in actions.items():
        with pytest.raises(InvalidTransition, match=f"cannot {name} while archived"):
            action()
    assert [record.state for record in list_sandboxes(state)] == ["archived"]
    assert gc(state).ended == ()
    box.recover()
    with pytest.raises(InvalidTransition, match="cannot recover while stopped"):
        box.recover()
    box.start()
    with pytest.raises(InvalidTransition, match="cannot recover while running"):
        box.recover()
    assert sh(box, "echo fine") == b"fine\n"


def test_other_handles_and_processes_see_it(box: PersistentSandbox, state: Path) -> None:
    other = PersistentSandbox.connect("box", state_dir=state)
    sh(other, "echo 1 > /one")
    box.archive("from here")
    assert other.state is SandboxState.ARCHIVED
    with pytest.raises(InvalidTransition, match="archived"):
        other.exec(["true"])
    code = """
        import sys
        from sandboxcore.persistent import PersistentSandbox
        with PersistentSandbox.connect("box", state_dir=sys.argv[1]) as box:
            print(box.state.value, box.record.archived_why)
            box.recover()
            box.start()
            print(box.exec(["cat", "/one"]).stdout)
    """
    done = host_program(code, str(state))
    assert (done.stdout, done.stderr) == ("archived from here\nb'1\\n'\n", "")
    assert box.state is SandboxState.RUNNING
    assert sh(other, "cat /one") == b"1\n"
    other.close()


def test_destroyed_while_archived(box: PersistentSandbox, state: Path) -> None:
    box.archive()
    box.destroy()
    assert list_sandboxes(state) == []
    gc(state)
    assert list((state / "snapshots" / "layers").iterdir()) == []


# --- what cannot be done changes nothing --------------------------------------------------------------


def copy_fails(box: PersistentSandbox, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(type(box), "_copied", fail)


@pytest.mark.parametrize("before", ["running", "paused"])
def test_busy_leaves_it_as_it_was(
    box: PersistentSandbox, monkeypatch: pytest.MonkeyPatch, before: str, state: Path
) -> None:
    command = box.detach(["sh", "-c", "while :; do echo x; sleep 0.01; done"])
    if before == "paused":
        box.suspend()
    init = box.pid
    with monkeypatch.context() as patch:
        copy_fails(box, patch, SandboxBusy("another snapshot is taken"))
        with pytest.raises(SandboxBusy):
            box.archive()
    assert box.state == before == list_sandboxes(state)[0].state
    assert box.pid == init
    if before == "paused":
        written = command.written
        time.sleep(0.1)
        assert command.written == written
        box.resume()
    written = command.written
    wait_until(lambda: command.written != written, "it to go on")
    box.archive()


def test_no_room(state: Path, overlays: None) -> None:
    spec = Spec(writable=True, limits=Limits(disk="48M"))
    with PersistentSandbox.create(spec, name="box", state_dir=state) as box:
        sh(box, "head -c 40M /dev/zero > /big")
        with pytest.raises(SetupError) as caught:
            box.archive()
        assert caught.value.errno == 28
        assert box.state is SandboxState.RUNNING
        sh(box, "truncate -s 1M /big")
        box.archive()


def test_changed_below(state: Path, source: Path, overlays: None) -> None:
    """What its files lie on is another directory now: it is not known what they would mean."""
    with PersistentSandbox.create(Spec(overlay=[(source, "/data")]), name="box", state_dir=state) as box:
        data = box._layers_file()
        data["overlays"] = {"/data": [0, 1, 2]}
        box._layers_path().write_text(json.dumps(data))
        with pytest.raises(SandboxError, match="changed on the host"):
            box.archive()
        assert sh(box, "cat /data/below") == b"below\n"


def test_somebody_else_is_faster(box: PersistentSandbox, state: Path) -> None:
    """Two archive it at once: one has done it."""
    other, errors = PersistentSandbox.connect("box", state_dir=state), []

    def archive(own: PersistentSandbox) -> None:
        try:
            own.archive()
        except InvalidTransition as error:
            errors.append(error)

    threads = [threading.Thread(target=archive, args=(own,)) for own in (box, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(errors) == 1
    assert box.state is SandboxState.ARCHIVED
    other.close()


# --- only if nobody has used it -----------------------------------------------------------------------


def test_used_meanwhile(box: PersistentSandbox, state: Path) -> None:
    with Ledger(state) as ledger:
        ledger.change(box.id, last_active_at=5.0)
        seen = ledger.find("box")
        sh(box, "true")  # notes that
        assert ledger.find("box").last_active_at > 5.0
        assert not box._stop_unused(seen)
        assert not box._archive("unused", seen)
        assert box.state is SandboxState.RUNNING
        assert box._archive("unused", ledger.find("box"))
        seen = ledger.find("box")
        assert not box._stop_unused(seen)
        box.recover()
        assert box._archive("again", ledger.find("box"))
        assert ledger.find("box").archived_why == "again"


def test_who_comes_while_it_is_stopped(
    box: PersistentSandbox, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody starts anything in what is found unused: it is refused, not killed."""
    other, refused = PersistentSandbox.connect("box", state_dir=state), []
    stop = PersistentSandbox._stop

    def slowly(self: PersistentSandbox) -> None:
        with pytest.raises(InvalidTransition, match="while paused") as caught:
            other.exec(["true"])
        refused.append(caught.value)
        stop(self)

    monkeypatch.setattr(PersistentSandbox, "_stop", slowly)
    with Ledger(state) as ledger:
        ledger.change(box.id, last_active_at=5.0)
        assert box._stop_unused(ledger.find("box"))
    assert len(refused) == 1
    assert box.state is SandboxState.STOPPED
    other.close()


def test_who_has_looked_before(box: PersistentSandbox, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was found to run, and is stopped before its use is on record: that is seen."""
    with Ledger(state) as ledger:
        ledger.change(box.id, last_active_at=5.0)
        touch, other = Ledger.touch, PersistentSandbox.connect("box", state_dir=state)

        def late(self: Any, *args: Any) -> bool:
            monkeypatch.undo()
            assert box._stop_unused(ledger.find("box"))
            return touch(self, *args)

        monkeypatch.setattr("sandboxcore.store.Store.touch", late)
        with pytest.raises(InvalidTransition, match="cannot exec while stopped"):
            other.exec(["true"])
        assert ledger.find("box").last_active_at == 5.0
        other.close()


# --- on an event loop, and killed ---------------------------------------------------------------------


@needs_overlays
def test_on_an_event_loop(state: Path) -> None:
    async def main() -> None:
        async with await aio.PersistentSandbox.create(
            Spec(writable=True), name="box", state_dir=state
        ) as box:
            assert (await box.shell("echo 1 > /one; echo 2 > /tmp/two")).ok
            assert await box.files.read("/one") == b"1\n"
            await box.archive("so")
            assert (box.state, box.record.archived_why) == (SandboxState.ARCHIVED, "so")
            for action in (box.start, box.stop, box.suspend, box.archive, lambda: box.exec(["true"])):
                with pytest.raises(InvalidTransition, match="archived"):
                    await action()
            await box.recover()
            await box.start()
            assert (await box.shell("cat /one; ls /tmp")).stdout == b"1\n"
            await box.suspend()
            await box.archive()
            await box.destroy()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))


@needs_overlays
@pytest.mark.parametrize("before", ["running", "paused"])
def test_killed_at_any_moment(state: Path, before: str) -> None:
    """What is on record is true; the files are there, either still in it or kept; and it can be archived."""
    count, killed, ends = 0, True, set()
    with PersistentSandbox.create(Spec(writable=True), name="box", state_dir=state) as box:
        while killed:
            count += 1
            sh(box, f"echo {count} > /kept")
            if before == "paused":
                box.suspend()
            killed = killed_at(count, lambda: archive(state, "box"))
            ends.add(str(box.state))
            recovered(box)
            assert sh(box, "cat /kept") == f"{count}\n".encode()
        box.destroy()
    assert gc(state).removed == ()
    assert SnapshotStore(state).gc() == ()
    assert os.listdir(state / "sandboxes") == []
    assert {"paused", "archived"} <= ends <= {"running", "paused", "stopped", "archived"}


def archive(state: Path, name: str) -> None:
    PersistentSandbox.connect(name, state_dir=state).archive()


def recovered(box: PersistentSandbox) -> None:
    """Whatever it is, one gets it to run again with what it had."""
    if box.state is SandboxState.PAUSED:
        box.resume()
    if box.state is SandboxState.RUNNING:
        box.archive()
    if box.state is SandboxState.ARCHIVED:
        box.recover()
    box.start()
