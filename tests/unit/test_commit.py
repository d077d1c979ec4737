"""A commit that is killed at any moment has happened, or has not."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import killed_at

from sandboxcore import CommitError
from sandboxcore.commit import STAGE, Change, Place, commit, finish_all
from sandboxcore.packing import Entry, Extent, Found, Item

MTIME = 1_000_000_000_500_000_000


def file(data: bytes, number: int = 0) -> Entry:
    return Entry(stat.S_IFREG | 0o640, 0, 0, len(data), MTIME, number, xattrs={b"user.note": b"x"})


def folder() -> Entry:
    return Entry(stat.S_IFDIR | 0o750, 0, 0, mtime=MTIME)


def link(target: bytes) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, 0, 0, mtime=MTIME, target=target)


# Everything that may happen to a path: what is there, and what is to be.
WAS = {
    b"changed": b"old", b"gone": b"old", b"dir": None, b"dir/gone": b"old", b"deep": None,
    b"deep/down": b"old", b"to-dir": b"old", b"to-file": None, b"to-file/x": b"old", b"kept": b"old",
}  # fmt: skip
NOW = {
    b"changed": file(b"new"), b"new": file(b"new"), b"dir": folder(), b"dir/one": file(b"twice", 7),
    b"dir/two": file(b"twice", 7), b"dir/link": link(b"../new"), b"fresh": folder(), b"fresh/sub": folder(),
    b"fresh/sub/file": file(b""), b"to-dir": folder(), b"to-dir/file": file(b"in"),
    b"to-file": file(b"was dir"),
}  # fmt: skip
GONE = (b"gone", b"dir/gone", b"deep")


def place(top: Path) -> Place:
    st = top.stat()
    return Place(str(top), (st.st_dev, st.st_ino))


def make(top: Path) -> None:
    for name, data in WAS.items():
        path = top / os.fsdecode(name)
        path.mkdir() if data is None else path.write_bytes(data)


def changes() -> list[Change]:
    def was(path: bytes) -> Found | None:
        return (
            None if path not in WAS else Found(folder() if WAS[path] is None else file(WAS[path] or b""), 0)
        )

    found = [Change(path, was(path), Found(entry, 5)) for path, entry in NOW.items()]
    return found + [Change(path, was(path), None) for path in GONE]


def layers() -> Iterator[tuple[int, Iterator[Item]]]:
    data = {b"changed": b"new", b"new": b"new", b"dir/one": b"twice", b"dir/two": b"twice",
            b"to-dir/file": b"in", b"to-file": b"was dir"}  # fmt: skip
    items = (
        Item(path, entry, iter([Extent(0, data[path])] if path in data else []))
        for path, entry in NOW.items()
    )
    yield 5, items


def look(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        links = st.st_nlink if stat.S_ISREG(st.st_mode) else 0
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(top))] = (stat.filemode(st.st_mode), links, content)
    return found


def test_killed_at_every_step(tmp_path: Path) -> None:
    top, notes = tmp_path / "top", tmp_path / "notes"
    top.mkdir()
    make(top)
    before = look(top)
    commit(place(top), changes(), layers(), notes)
    after = look(top)
    assert after["dir/one"] == ("-rw-r-----", 2, b"twice")
    assert after["to-file"] == ("-rw-r-----", 1, b"was dir")
    assert "gone" not in after
    assert (top / "fresh").stat().st_mtime_ns == MTIME
    assert os.getxattr(top / "new", "user.note") == b"x"
    outcomes = []
    for step in range(1, 1000):
        shutil.rmtree(top)
        top.mkdir()
        make(top)
        killed = killed_at(step, lambda: commit(place(top), changes(), layers(), notes))
        while killed_at(step // 2 + 1, lambda: finish_all(notes)):  # and whoever finishes it, too
            step *= 2  # noqa: PLW2901
        finish_all(notes)
        assert not [path for path in notes.iterdir() if path.name.startswith("cmt-")]
        found = look(top)
        assert found in (before, after), step
        outcomes.append(found == after)
        if not killed:
            break
    assert outcomes == sorted(outcomes)
    assert 30 < outcomes.count(False) < len(outcomes) - 30


def test_links_on_the_host_are_not_followed(tmp_path: Path) -> None:
    """Though they came when the changes were known already."""
    top, victim = tmp_path / "top", tmp_path / "victim"
    top.mkdir()
    make(top)
    victim.mkdir()
    shutil.rmtree(top / "dir")
    (top / "dir").symlink_to(victim)
    some = [change for change in changes() if change.path.startswith(b"dir/")]
    before = look(top)
    with pytest.raises(CommitError, match="Not a directory"):
        commit(place(top), some, layers(), tmp_path / "notes")
    (top / "dir").unlink()
    with pytest.raises(CommitError, match="No such file"):
        commit(place(top), some, layers(), tmp_path / "notes")
    before.pop("dir")
    assert look(top) == before
    assert not list(victim.iterdir())
    assert not list((tmp_path / "notes").iterdir())


def test_another_directory_at_that_path(tmp_path: Path) -> None:
    """Whoever may write above it cannot have us write to what is not his."""
    top, victim = tmp_path / "top", tmp_path / "victim"
    top.mkdir()
    make(top)
    victim.mkdir()
    known = place(top)
    top.rename(tmp_path / "moved")
    top.symlink_to(victim)
    with pytest.raises(CommitError, match="not the directory"):
        commit(known, changes(), layers(), tmp_path / "notes")
    assert not list(victim.iterdir())


@pytest.mark.parametrize("way", ["list", "path", "other"])
def test_what_others_put_in_the_place_of_ours(tmp_path: Path, way: str) -> None:
    """A list of steps that somebody else has made, or of another commit, or with a way up."""
    top, notes = tmp_path / "top", tmp_path / "notes"
    top.mkdir()
    make(top)
    (tmp_path / "victim").write_text("kept")
    step = 1
    while killed_at(step, lambda: commit(place(top), changes(), layers(), notes)):
        stage = next(top.glob(STAGE + "*"), None)
        if stage is not None and (stage / "list").exists():
            break
        finish_all(notes)
        step += 1
    assert stage is not None
    what = json.loads((stage / "list").read_text())
    what["steps"] = [{"do": "remove", "path": "../victim", "name": "gone-0"}]
    if way == "other":
        what = {"commit": "cmt-other", "steps": []}
    (stage / "list").write_text(json.dumps(what))
    if way == "list":
        stage.chmod(0o755)
    with pytest.raises(CommitError, match={"list": "not made", "path": "no path", "other": "another"}[way]):
        finish_all(notes)
    assert (tmp_path / "victim").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", ["dir", "deep"])
def test_directories_that_cannot_be_written_to(tmp_path: Path, name: str) -> None:
    """Nothing has happened then."""
    top = tmp_path / "top"
    top.mkdir()
    make(top)
    (top / name).chmod(0o555)
    before = look(top)
    with pytest.raises(CommitError, match=f"no directory to write to: '{name}'"):
        commit(place(top), changes(), layers(), tmp_path / "notes")
    assert look(top) == before
    (top / name).chmod(0o755)


def test_what_goes_may_be_locked(tmp_path: Path) -> None:
    """Directories below it that nobody may enter, and more levels than a path can have."""
    top = tmp_path / "top"
    top.mkdir()
    make(top)
    (top / "deep/locked/in").mkdir(parents=True)
    (top / "deep/locked").chmod(0)
    commit(place(top), changes(), layers(), tmp_path / "notes")
    assert not (top / "deep").exists()
    assert not list(top.glob(STAGE + "*"))
