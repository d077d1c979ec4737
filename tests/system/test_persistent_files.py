"""Snapshots of a sandbox that outlives everybody: on the disk, and good for whoever comes later."""

from pathlib import Path
from typing import Any

import pytest
from support import Spec, host_program, kill_spawners
from trees import filled, make_source, manifest, ok, same

from sandboxcore import (
    PersistentSandbox,
    Sandbox,
    SandboxBusy,
    SandboxError,
    SnapshotStore,
    SpecError,
    gc,
    list_sandboxes,
)
from sandboxcore.link import Home

pytestmark = pytest.mark.usefixtures("overlays")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture
def state_dir(tmp_path: Path) -> Any:
    path = tmp_path / "state"
    yield path
    for record in list_sandboxes(path):
        PersistentSandbox.connect(record.id, state_dir=path).destroy()


@pytest.fixture
def box(source: Path, state_dir: Path) -> PersistentSandbox:
    spec = Spec(writable=True, overlay=[(source, "/data")], tmpfs=["/data/t:1M"])
    return PersistentSandbox.create(spec, name="box", state_dir=state_dir)


def again(state_dir: Path, script: str) -> str:
    """By another process, which knows names only."""
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}
from trees import manifest, ok
from sandboxcore import PersistentSandbox, SnapshotStore
store = SnapshotStore({str(state_dir)!r})
box = PersistentSandbox.connect("box", state_dir={str(state_dir)!r})
{script}
"""
    done = host_program(program, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_life_in_several_processes(box: PersistentSandbox, state_dir: Path) -> None:
    filled(box)
    first = manifest(box)
    one = box.snapshot("one")
    assert one.copied
    again(state_dir, 'ok(box, "rm -r /data/many; echo 2 > /two"); box.snapshot("two")')
    second = manifest(box, "/data", "/two")
    again(state_dir, 'box.restore(store.load("one")); ok(box, "test ! -e /two")')
    assert manifest(box) == first
    ok(box, "echo 3 > /three")
    box.snapshot("three")
    box.restore(box.snapshots.load("two"))
    assert manifest(box, "/data", "/two") == second
    ok(box, "test ! -e /three")
    again(state_dir, 'ok(box, "echo 4 > /four"); box.discard()')
    assert manifest(box, "/data", "/two") == second
    changes = again(state_dir, 'print([c.path for c in box.diff(store.load("one")) if c.path != "/data"])')
    assert changes == "['/data/many', '/two']\n"
    assert [saved.name for saved in box.snapshots.list()] == ["one", "two", "three"]
    assert gc(state_dir).removed == ()
    assert box.snapshots.gc() == ()
    used = box.shell("df -k --output=used /tmp | tail -1").stdout
    for _ in range(3):
        box.fork()[0].destroy()
    assert int(box.shell("df -k --output=used /tmp | tail -1").stdout) <= int(used) + 64, "no copy stays"
    box.snapshots.gc()
    assert len(list((state_dir / "snapshots/layers").iterdir())) == 3


def test_others_begin_with_it(box: PersistentSandbox, state_dir: Path) -> None:
    filled(box)
    child = box.fork()[0]
    assert child.name != box.name
    ok(child, "echo child > /data/who; rm -r /data/many")
    ok(box, "echo parent > /data/who")
    script = f"""
child = PersistentSandbox.connect({child.name!r}, state_dir=store.path.parent)
child.stop()
child.start()
print(ok(child, "ls /data/many | wc -l; ls /data/who 2>&1 | wc -l"))
box.snapshots.gc()
child.snapshot("of child")
""".replace('"of child"', '"child"')
    box.destroy()
    with pytest.raises(AssertionError, match="box"):
        again(state_dir, script)
    PersistentSandbox.create(child.spec, name="box", state_dir=state_dir)
    assert again(state_dir, script) == "b'200\\n1\\n'\n"
    with Sandbox.from_snapshot(SnapshotStore(state_dir).load("child")) as living:
        assert ok(living, "ls /data/many | wc -l") == b"200\n"
    with Sandbox(child.spec) as living:
        ok(living, "echo x > /data/memory")
        kept = living.snapshot()
    child.restore(kept)
    assert ok(child, "cat /data/memory") == b"x\n"
    made = PersistentSandbox.from_snapshot(kept, name="made", state_dir=state_dir)
    made.stop()
    kept.close()
    SnapshotStore(state_dir).gc()
    made.start()
    assert ok(made, "cat /data/memory") == b"x\n"


def test_what_is_refused(box: PersistentSandbox, state_dir: Path) -> None:
    kept = box.snapshot("one")
    with pytest.raises(SpecError, match="'one' is the name"):
        box.snapshot("one")
    with pytest.raises(SpecError, match="are copies"):
        box.snapshot(copy=False)
    with box.popen(["sleep", "100"]) as process:
        assert box.snapshot().copied
        with pytest.raises(SandboxBusy, match="a command runs"):
            box.restore(kept)
        process.kill()
    assert box.snapshot().copied, "that refusal has changed nothing"
    with PersistentSandbox.create(Spec(), name="plain", state_dir=state_dir) as plain:
        with pytest.raises(SpecError, match="writable=True"):
            plain.snapshot()
        with pytest.raises(SpecError, match="other overlays"):
            PersistentSandbox.from_snapshot(kept, spec=plain.spec, state_dir=state_dir)


def test_interrupted_restore(box: PersistentSandbox) -> None:
    """Whoever comes later does not believe what is not certain."""
    ok(box, "echo 1 > /data/one")
    kept = box.snapshot("one")
    before = box._layers_file()
    box._write_layers(before["base"], None)
    with pytest.raises(SandboxError, match="a restore was interrupted"):
        box.snapshot("two")
    box.restore(kept)
    assert ok(box, "cat /data/one") == b"1\n"
    box.snapshot("two")
    box._write_layers(before["base"], None)
    box.stop()
    box.start()
    assert ok(box, "ls /data/one 2>&1 | wc -l; ls /data").startswith(b"1\n")
    box.snapshot("three")


def test_any_number_of_moments(box: PersistentSandbox) -> None:
    """Layers upon layers become one."""
    for n in range(12):
        ok(box, f"cd /data; echo {n} > f{n}; rm -rf f{n - 3} d; mkdir -p d; echo {n} > d/{n}; rm -f c/z")
        box.restore(box.snapshot(f"s{n}"))
    then = manifest(box)
    depths = [len(saved.layers) for saved in box.snapshots.list()]
    assert depths == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4]
    box.restore(box.snapshots.load("s3"))
    assert ok(box, "ls /data/d /data/f1 /data/f3") == b"/data/f1\n/data/f3\n\n/data/d:\n3\n"
    box.restore(box.snapshots.load("s11"))
    assert manifest(box) == then


@pytest.mark.slow
@pytest.mark.parametrize("what", ["snapshot", "restore"])
def test_clients_killed_at_every_third_step(box: PersistentSandbox, state_dir: Path, what: str) -> None:
    """What was saved is whole, the sandbox goes on, and nothing is left that nobody has."""
    ok(box, "echo 1 > /data/one; head -c 1M /dev/urandom > /data/random")
    box.snapshot("first")
    ok(box, "echo 2 > /data/two")
    then, done = manifest(box), 0
    room = "df -k --output=used /tmp | tail -1"
    used = int(ok(box, room))
    for step in range(1, 600, 3):
        action = f"box.snapshot('s{step}')" if what == "snapshot" else "box.restore(store.load('first'))"
        program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}
from crashes import kill_me_at
from sandboxcore import PersistentSandbox, SnapshotStore
store = SnapshotStore({str(state_dir)!r})
box = PersistentSandbox.connect("box", state_dir={str(state_dir)!r})
kill_me_at({step})
{action}
"""
        ended = host_program(program, timeout=60)
        assert not ended.stderr
        gc(state_dir)
        saved = box.snapshots.list()
        known = {f"{digest}.tar" for one in saved for digest in one.layers}
        known |= {f"{digest}.tar" for digest in box._layers_file()["now"] or ()}
        assert {path.name for path in (state_dir / "snapshots/layers").iterdir()} == known
        if what == "snapshot":
            assert manifest(box) == then
            if any(one.name == f"s{step}" for one in saved):
                done += 1
                with Sandbox.from_snapshot(SnapshotStore(state_dir).load(f"s{step}")) as child:
                    assert same(manifest(child), then)
                box.snapshots.delete(f"s{step}")
        else:
            done += ok(box, "ls /data/two 2>&1 | wc -l; cat /data/one") == b"1\n1\n"
            box.restore(box.snapshots.load("first"))
            ok(box, "echo 2 > /data/two")
        if ended.returncode == 0:
            break
    assert ended.returncode == 0
    assert done
    box.snapshot("last")
    assert int(ok(box, room)) <= used + 64, "a copy that somebody left is gone"


def test_layers_that_are_the_same(source: Path, state_dir: Path) -> None:
    """A fork of a fork, and whatever begins where several have written the same, or nothing."""
    spec = Spec(overlay=[(source, "/data")])
    with PersistentSandbox.create(spec, name="box", state_dir=state_dir) as box:
        (child,) = box.fork()
        (grandchild,) = child.fork()
        ok(grandchild, "echo a >/data/same")
        (last,) = grandchild.fork()
        ok(last, "rm /data/same && echo a >/data/same")
        snapshot = last.snapshot("twice")
        box.restore(snapshot)
        (restored,) = box.fork()
        restored.stop()
        restored.start()
        for sandbox in (box, restored):
            ok(sandbox, "grep -qx a /data/same")
    with Sandbox(spec) as private:
        first = private.snapshot()
        (child,) = private.fork()
        with child, child.snapshot() as second:
            SnapshotStore(state_dir).save(second, "nothing")
            for begun in (
                PersistentSandbox.from_snapshot(second, state_dir=state_dir),
                Sandbox.from_snapshot(SnapshotStore(state_dir).load("nothing")),
            ):
                with begun:
                    ok(begun, "test ! -e /data/same")
        first.close()


def test_the_spawner_dies_in_the_midst_of_a_start(
    box: PersistentSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the sandbox begins with was read into that one's memory; it is on the disk, too."""
    before = filled(box)
    box.archive()
    box.recover()
    home = box._home

    def late() -> Home:
        kill_spawners()
        return home()

    monkeypatch.setattr(box, "_home", late)
    box.start()
    assert manifest(box) == before
