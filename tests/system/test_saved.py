"""Snapshots as files: exported, loaded, kept under names; whole or not there."""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crashes import killed_at
from support import Spec, host_program, kill_spawners, leaves_nothing
from trees import filled, make_source, manifest, ok, same

from sandboxcore import (
    ArchiveError,
    Sandbox,
    SandboxError,
    Snapshot,
    SnapshotNotFound,
    SnapshotStore,
    SpecError,
)

pytestmark = pytest.mark.usefixtures("overlays")

CHANGE = """
cd /data; rm -r d c; mkdir c; touch c/new; chmod 4711 h; rm g; mkdir g; mv a moved; echo x > /tmp/not
ln -s moved/x 'ö'; ln h hard; printf '\\377' > "$(printf 'b\\377d')"
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture(params=["root", "overlay", "both"])
def spec(request: pytest.FixtureRequest, source: Path) -> Any:
    """With /data to write to."""
    writable = request.param != "overlay"
    overlays = [] if request.param == "root" else [(source, "/data")]
    return Spec(writable=writable, overlay=overlays, tmpfs=["/data/t:1M"])


def test_there_and_back(spec: Any, tmp_path: Path) -> None:
    """Everything that can be said of the files is the same, of one layer or of several."""
    with Sandbox(spec) as sandbox:
        filled(sandbox)
        if spec.overlay:
            sandbox.snapshot()
            ok(sandbox, CHANGE)
        snapshot, then = sandbox.snapshot("one"), manifest(sandbox)
    snapshot.export(tmp_path / "one.tar")
    with leaves_nothing():
        loaded = Snapshot.load(tmp_path / "one.tar", spec, name="again")
        with Sandbox.from_snapshot(loaded) as child:
            assert same(manifest(child), then)
            ok(child, "rm -rf /data/many")
            child.restore(snapshot)
            assert same(manifest(child), then)
            child.restore(loaded)
            assert same(manifest(child), then)
        assert [change.path for change in loaded.diff() if change.type == "dir"] == [
            change.path for change in snapshot.diff() if change.type == "dir"
        ]
        loaded.close()
    again = io.BytesIO()  # of two layers, in another order
    with Sandbox.from_snapshot(snapshot) as child:
        child.snapshot().export(again)
    again.seek(0)
    with tarfile.open(fileobj=again) as tar, tarfile.open(tmp_path / "one.tar") as first:
        assert sorted(tar.getnames()) == sorted(first.getnames())


def test_tar_can_read_it(source: Path, tmp_path: Path) -> None:
    spec = Spec(overlay=[(source, "/data")])
    with Sandbox(spec) as sandbox:
        filled(sandbox)
        sandbox.snapshot().export(tmp_path / "x.tar")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["tar", "-x", "--no-same-owner", "--xattrs", "-f", tmp_path / "x.tar", "-C", tmp_path / "out"],
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    data = tmp_path / "out/files/data"
    assert (data / "a/b/two").read_text() == "two\n"
    assert (data / "sparse").stat().st_size == 16 << 20
    assert (data / "sparse").stat().st_blocks == 0
    assert (data / "a/one").samefile(data / "a/hard")
    about = json.loads((tmp_path / "out/manifest.json").read_text())
    assert len(about["sha256"]["files/data/a/b/two"]) == 64


def test_of_another_kind(spec: Any, source: Path, tmp_path: Path) -> None:
    with Sandbox(spec) as sandbox:
        sandbox.snapshot().export(tmp_path / "x.tar")
    with pytest.raises(ArchiveError, match="other overlays"):
        Snapshot.load(tmp_path / "x.tar", Spec(overlay=[(source, "/elsewhere")]))
    with pytest.raises(SpecError, match="nothing to write to"):
        Snapshot.load(tmp_path / "x.tar", Spec())
    with pytest.raises(FileNotFoundError):
        Snapshot.load(tmp_path / "none", spec)
    with pytest.raises(ArchiveError, match=r"not an archive|does not end"):
        Snapshot.load(io.BytesIO(b"x" * 5000), spec)


# --- under names ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "state")


def test_another_process_finds_it(spec: Any, store: SnapshotStore, tmp_path: Path) -> None:
    with Sandbox(spec) as sandbox:
        filled(sandbox)
        first = store.save(sandbox.snapshot("first"), description="of a test", labels={"a": "b"})
        ok(sandbox, "rm -r /data/a")
        second = store.save(sandbox.snapshot(), "second")
        then = manifest(sandbox)
    assert second.layers[1:] == first.layers, "what is there is not written again"
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}
from trees import manifest
from sandboxcore import Sandbox, SnapshotStore
snapshot = SnapshotStore({str(tmp_path / "state")!r}).load("second")
with Sandbox.from_snapshot(snapshot) as sandbox:
    sys.stdout.buffer.write(manifest(sandbox))
"""
    done = host_program(program, timeout=60)
    assert not done.stderr
    assert same(done.stdout.encode(), then)
    assert [one.name for one in store.list()] == ["first", "second"]
    assert [one.name for one in store.list(labels={"a": "b"})] == ["first"]
    assert store.describe("first") == first
    assert (first.description, first.sandbox) == ("of a test", sandbox.id)


def test_names(source: Path, store: SnapshotStore) -> None:
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        one, other = sandbox.snapshot(), sandbox.snapshot()
        store.save(one, "name")
        with pytest.raises(SpecError, match="'name' is the name of another"):
            store.save(other, "name")
        store.save(other, "name", replace=True)
        assert store.describe("name").id == other.id
        for name in ("../x", "", ".x", "a/b", "x" * 65):
            with pytest.raises(SpecError, match="name:"):
                store.save(one, name)
            with pytest.raises(SpecError, match="name:"):
                store.load(name)
        for action in (store.load, store.describe, store.delete):
            with pytest.raises(SnapshotNotFound, match="'none'"):
                action("none")


def test_layers_go_with_the_last_who_has_them(source: Path, store: SnapshotStore) -> None:
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(sandbox, "echo one > /data/one")
        store.save(sandbox.snapshot(), "first")
        ok(sandbox, "echo two > /data/two")
        store.save(sandbox.snapshot(), "second")
    store.delete("first")
    assert store.gc() == ()
    loaded = store.load("second")
    digests = {f"{digest}.tar" for digest in store.describe("second").layers}
    store.delete("second")
    found = store.gc(dry_run=True)
    assert {Path(path).name for path in found} == digests
    assert store.gc() == found
    assert store.gc() == ()
    with Sandbox.from_snapshot(loaded) as child:
        assert ok(child, "cat /data/one /data/two") == b"one\ntwo\n"
        store.save(loaded, "third")
    assert {f"{digest}.tar" for digest in store.describe("third").layers} == digests


def test_damage_is_seen(source: Path, store: SnapshotStore) -> None:
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(sandbox, "echo one > /data/one")
        saved = store.save(sandbox.snapshot(), "first")
    path = store.path / "layers" / f"{saved.layers[0]}.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"one\n", b"two\n"))
    again = SnapshotStore(store.path.parent)
    with pytest.raises(ArchiveError, match="not what was written"):
        again.load("first")
    path.unlink()
    with pytest.raises(SandboxError, match="No such file"):
        again.load("first")
    (store.path / "names/first.json").write_text("{")
    with pytest.raises(ArchiveError, match=r"first.json: broken"):
        again.list()
    with pytest.raises(ArchiveError, match=r"first.json: broken"):
        again.gc()


class Known:
    """A layer that a fork of this process can read, too."""

    def __init__(self, items: list[Any]) -> None:
        self._items, self.number, self.digest = items, 1, None

    def items(self, *, content: bool) -> Iterator[Any]:
        return (item._replace(content=iter(item.content)) for item in self._items)


def known(snapshot: Snapshot) -> Snapshot:
    """The same for forks."""
    snapshot._layers = tuple(
        Known([item._replace(content=list(item.content)) for item in layer.items(content=True)])
        for layer in snapshot.layers
    )
    return snapshot


def test_export_killed_at_every_step(source: Path, tmp_path: Path) -> None:
    """There is a whole file, or none."""
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(sandbox, "echo one > /data/one")
        kept = known(sandbox.snapshot())
    kept.export(tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "out").mkdir()
    exported, found = tmp_path / "out/exported.tar", []
    for step in range(1, 200):
        exported.write_bytes(b"before")
        killed = killed_at(step, lambda: kept.export(exported))
        found.append(exported.read_bytes())
        assert found[-1] in (b"before", whole)
        if not killed:
            break
    assert found.count(b"before") > 2
    assert found[-1] == whole
    assert len(list((tmp_path / "out").iterdir())) <= 2, "but for one name, killed between link and rename"


def test_killed_at_every_step(source: Path, store: SnapshotStore) -> None:
    """Of save, delete and gc: every snapshot that was there is there, and nothing else is, after gc()."""

    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        kept = []
        for n in range(2):
            ok(sandbox, f"echo {n} > /data/{n}; ln -s x /data/l{n}")
            kept.append(known(sandbox.snapshot(f"s{n}")))
    store.save(kept[0])
    before = {one.name: one.layers for one in store.list()}

    def check() -> dict[str, Any]:
        store.gc()
        now = {one.name: one.layers for one in store.list()}
        assert now["s0"] == before["s0"]
        layers = {path.stem for path in (store.path / "layers").iterdir()}
        assert layers == {digest for digests in now.values() for digest in digests}
        assert {path.stem for path in (store.path / "names").iterdir()} == set(now)
        return now

    steps = 0
    for action, there in ((lambda: store.save(kept[1]), True), (lambda: store.delete("s1"), False)):
        for step in range(1, 200):
            killed = killed_at(step, action)
            done = ("s1" in check()) is there
            steps += 1
            if not killed:
                assert done
                break
            if done:  # what comes after the moment it happened
                if there:
                    store.delete("s1")
                else:
                    store.save(kept[1])
            assert step < 190
    for step in range(1, 200):
        store.save(kept[1], replace=True)
        store.delete("s1")
        if not killed_at(step, store.gc):
            break
        assert set(check()) == {"s0"}
    assert steps > 10


def test_without_the_spawner(source: Path, tmp_path: Path) -> None:
    """What was in memory is gone with it, and everybody says so."""
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(sandbox, "echo one > /data/one")
        kept = sandbox.snapshot()
    kill_spawners()
    for action in (
        kept.diff,
        lambda: kept.commit(state_dir=tmp_path / "state"),
        lambda: kept.export(tmp_path / "x.tar"),
    ):
        with pytest.raises(SandboxError, match="spawner"):
            action()
    assert not (source / "one").exists()
    assert not (tmp_path / "x.tar").exists()
