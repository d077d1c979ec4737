"""What differs between two moments: every path, and no other."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from support import PYTHON, Spec
from trees import make_source, shuffle

from sandboxcore import Sandbox, SpecError

pytestmark = pytest.mark.usefixtures("overlays")

PATIENCE = 60
LOOK = """
import hashlib, json, os, stat, sys
found = {}
mounts = {line.split()[4] for line in open("/proc/self/mountinfo")}  # st_dev says nothing on an overlay
def look(path):
    for name in sorted(os.listdir(path)):
        full = os.path.join(path, name)
        if full in mounts:
            continue
        st = os.lstat(full)
        kind = stat.S_IFMT(st.st_mode)
        found[full] = [st.st_mode, st.st_uid, st.st_gid,
            hashlib.sha256(open(full, "rb").read()).hexdigest() if kind == stat.S_IFREG else "",
            st.st_size if kind == stat.S_IFREG else None,
            os.readlink(full) if kind == stat.S_IFLNK else ""]
        if kind == stat.S_IFDIR:
            look(full)
look("/data")
print(json.dumps(found))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "source")


@pytest.fixture(params=["root", "overlay", "layers"])
def spec(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Any:
    if request.param == "root":
        return Spec(writable=True, tmpfs=["/data/t:1M"])
    if request.param == "overlay":
        return Spec(overlay=[(source, "/data")])
    root = tmp_path / "rootfs"
    (root / "data/d").mkdir(parents=True)
    (root / "data/a").write_text("of the root file system")
    return Spec(writable=True, overlay=[(source, "/data")], tmpfs=["/data/c/t:1M"])


def look(sandbox: Sandbox) -> dict[str, Any]:
    done = sandbox.exec([PYTHON, "-I", "-S", "-c", LOOK], timeout=PATIENCE)
    assert done.ok, done.stderr
    return json.loads(done.stdout)


def expected(old: dict[str, Any], new: dict[str, Any]) -> tuple[set[str], set[str], set[str]]:
    """What must be said to be added, removed and changed."""
    added = new.keys() - old.keys()
    removed = old.keys() - new.keys()
    tops = {path for path in removed if os.path.dirname(path) in new or os.path.dirname(path) == "/data"}
    tops = {path for path in tops if _is_dir(new, os.path.dirname(path))}
    return added, tops, {path for path in old.keys() & new.keys() if old[path] != new[path]}


def _is_dir(tree: dict[str, Any], path: str) -> bool:
    return path == "/data" or tree[path][0] & 0o170000 == 0o040000


def said(changes: list[Any], kind: str) -> set[str]:
    return {change.path for change in changes if change.kind == kind and change.path.startswith("/data/")}


def check(changes: list[Any], old: dict[str, Any], new: dict[str, Any]) -> None:
    added, removed, changed = expected(old, new)
    assert said(changes, "added") == added
    assert said(changes, "removed") == removed
    assert said(changes, "changed") >= changed
    for change in changes:
        if change.kind == "changed" and change.path.startswith("/data/") and change.path not in changed:
            assert change.type == "file", "only of a file it is not asked what was written"
        if change.path in new:
            assert change.size == new[change.path][4], change
        if change.path in old:
            assert change.old_size == old[change.path][4], change


@pytest.mark.parametrize("seed", range(5))
def test_random_changes(spec: Any, seed: int) -> None:
    random.seed(seed)
    with Sandbox(spec) as sandbox:
        kept, trees = [], [look(sandbox)]
        for step in range(6):
            shuffle(sandbox, seed * 100 + step)
            kept.append(sandbox.snapshot(copy=random.choice([None, True])))
            trees.append(look(sandbox))
        for new in range(6):
            check(kept[new].diff(), trees[0], trees[new + 1])
            old = random.randrange(6)
            check(kept[new].diff(kept[old]), trees[old + 1], trees[new + 1])
        sandbox.restore(kept[2])
        shuffle(sandbox, seed)
        check(sandbox.diff(kept[5]), trees[6], look(sandbox))


def test_of_another_shape(source: Path) -> None:
    with Sandbox(Spec(writable=True)) as one, Sandbox(Spec(overlay=[(source, "/data")])) as other:
        kept = one.snapshot()
        with pytest.raises(SpecError, match="other overlays"):
            other.snapshot().diff(kept)
