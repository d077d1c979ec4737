"""What a sandbox wrote comes into the host's directory: all of it or nothing, and nothing else."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
from support import IS_ROOT, Spec
from trees import make_source, ok, shuffle

from sandboxcore import Sandbox, SpecError

pytestmark = pytest.mark.usefixtures("overlays")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def outside(top: Path) -> dict[str, Any]:
    """Everything that can be said of a tree of the host, by path."""
    found = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        about: list[Any] = [
            st.st_mode,
            st.st_nlink if not stat.S_ISDIR(st.st_mode) else 0,
            st.st_uid,
            st.st_gid,
        ]
        about += [os.readlink(path) if path.is_symlink() else os.listxattr(path)]
        about += [path.read_bytes(), st.st_mtime_ns] if stat.S_ISREG(st.st_mode) else []
        found[str(path.relative_to(top))] = about
    return found


LIST = r"""
cd /data
find . -mindepth 1 '(' -type d -printf '%P %y %#m\n' ')' -o -printf '%P %y %#m %s %T@ %l\n' | sort
"""


@pytest.mark.parametrize("seed", range(1, 8))
def test_random_changes(source: Path, state_dir: Path, seed: int) -> None:
    """Afterwards a new sandbox sees there what the old one saw."""
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        for step in range(seed):
            shuffle(sandbox, seed * 100 + step)
            if step % 2:
                sandbox.snapshot()
        then, before = ok(sandbox, LIST), outside(source)
        planned = sandbox.commit(dry_run=True, state_dir=state_dir)
        assert outside(source) == before
        assert sandbox.commit(state_dir=state_dir) == planned
        assert ok(sandbox, LIST) == then, "it goes on as before"
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        assert ok(sandbox, LIST) == then
    after = outside(source)
    assert {path for path in before.keys() | after if before.get(path) != after.get(path)} <= {
        change.path.removeprefix("/data/") for change in planned
    } | {path for change in planned for path in before if f"/data/{path}".startswith(change.path + "/")}
    if IS_ROOT:
        assert {(about[2], about[3]) for about in after.values()} == {(12345, 12345)}
    assert not list((state_dir / "commits").iterdir())


def test_chosen_paths(source: Path, state_dir: Path) -> None:
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(
            sandbox,
            "cd /data; mkdir -p new/deep; touch new/deep/one new/two; rm -r d; echo x > h; echo y > g",
        )
        changes = sandbox.commit(["/data/new/deep/", "/data/g"], state_dir=state_dir)
        said = [(change.path, change.kind) for change in changes]
        assert said == [
            ("/data/g", "changed"), ("/data/new", "added"), ("/data/new/deep", "added"),
            ("/data/new/deep/one", "added"),
        ]  # fmt: skip
        assert (source / "g").read_text() == "y\n"
        assert sorted(os.listdir(source / "new")) == ["deep"]
        assert (source / "h").read_text() == "host 4"
        assert (source / "d/e").is_dir()
        with pytest.raises(SpecError, match="/etc/hosts: in no overlay of a directory"):
            sandbox.commit(["/etc/hosts"], state_dir=state_dir)
    with Sandbox(Spec(writable=True)) as sandbox, pytest.raises(SpecError, match="export"):
        sandbox.commit()


def test_what_must_not_come_out(source: Path, state_dir: Path) -> None:
    """No set-id bits, no attributes of overlayfs, sockets, nor links that are followed."""
    victim = source.parent / "victim"
    victim.mkdir()
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        ok(
            sandbox,
            f"""cd /data; cp /bin/true s; chmod 6755 s; mkdir t; chmod 3777 t; rm -r a; mkdir a; touch a/x
            ln -s {victim} out; python3 -c 'import socket; socket.socket(1).bind("sock")'""",
        )
        sandbox.commit(state_dir=state_dir)
        assert stat.S_IMODE((source / "s").stat().st_mode) == 0o755
        assert stat.S_IMODE((source / "t").stat().st_mode) == 0o1777
        assert not (source / "sock").exists()
        assert all(not name.startswith("user.overlay") for p in source.rglob("*") if not p.is_symlink()
                   for name in os.listxattr(p))  # fmt: skip
        assert sorted(os.listdir(source / "a")) == ["x"]
        ok(sandbox, "cd /data; rm out; mkdir out; echo trap > out/file")
        sandbox.commit(["/data/out/file"], state_dir=state_dir)
    assert (source / "out/file").read_text() == "trap\n"
    assert not list(victim.iterdir())
