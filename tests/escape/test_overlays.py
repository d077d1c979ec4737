"""Attacks on what lies under an overlay, and on the places where overlays are made."""

import os
from pathlib import Path

import pytest
from escape.hostile import (
    AS_ROOT_INSIDE,
    AT_FDCWD,
    Hostile,
    allowing,
    call,
    calls,
    open_for,
    pack,
    pointer,
    read,
    result,
)
from support import IS_ROOT, snapshot

pytestmark = [pytest.mark.escape, pytest.mark.usefixtures("overlays")]

FS_IOC_SETFLAGS, FS_NODUMP = 0x40086602, 0x40
FS_IOC_FSSETXATTR = 0x401C5820
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    """A directory of the host, an ordinary user's, for everybody to write to."""
    path = tmp_path / "lower"
    path.mkdir()
    path.chmod(0o777)
    (path / "file").write_text("the content")
    (path / "file").chmod(0o666)
    if IS_ROOT:
        os.chown(path, 12345, 12345)
        os.chown(path / "file", 12345, 12345)
    return path


def opened(path: str, flags: int, *then: list[str]) -> list[str]:
    return calls(call("openat", AT_FDCWD, path, flags, 0o600), *then)


# By what a file can be changed; "$0" is its descriptor.
CHANGES = {
    "write": (os.O_WRONLY, call("pwrite64", result(0), "changed", 7, 0)),
    "truncate": (os.O_WRONLY, call("ftruncate", result(0), 1)),
    "fallocate": (os.O_WRONLY, call("fallocate", result(0), FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, 0, 4096)),
    "attribute of the file": (os.O_RDONLY, call("fsetxattr", result(0), "user.x", "y", 1, 0)),
    "mode": (os.O_RDONLY, call("fchmod", result(0), 0o600)),
    "times": (os.O_RDONLY, call("utimensat", result(0), 0, pack("4q", 1, 0, 1, 0), 0)),
    "flags": (os.O_RDONLY, call("ioctl", result(0), FS_IOC_SETFLAGS, pack("q", FS_NODUMP))),
    "project": (os.O_RDONLY, call("ioctl", result(0), FS_IOC_FSSETXATTR, pointer(bytes(28)))),
}


def state(path: Path) -> tuple[object, ...]:
    st = path.stat()
    return snapshot(path.parent), st.st_mtime_ns, st.st_nlink, sorted(os.listxattr(path))


@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
@pytest.mark.parametrize("change", CHANGES)
def test_changing_a_lower_file(hostile: Hostile, lower: Path, change: str, user: str | None) -> None:
    """Inside it works, on a copy."""
    flags, step = CHANGES[change]
    before = state(lower / "file")
    inside = hostile.inside(
        opened("/data/file", flags, step), overlay=[(lower, "/data")], user=user, landlock=False
    )
    assert state(lower / "file") == before
    if change not in ("flags", "project"):  # not every file system has them, or lets its owner
        assert inside.verdict == "ok"
        assert hostile.outside(opened(f"{lower}/file", flags, step)).verdict == "ok"
        assert state(lower / "file") != before


def test_a_second_name_for_a_lower_file(hostile: Hostile, lower: Path) -> None:
    """A hard link, then a write through it."""

    def attack(base: str) -> list[str]:
        return calls(
            call("linkat", AT_FDCWD, f"{base}/file", AT_FDCWD, f"{base}/link", 0),
            call("openat", AT_FDCWD, f"{base}/link", os.O_WRONLY),
            call("write", result(1), "x", 1),
        )

    before = snapshot(lower)
    assert hostile.inside(attack("/data"), overlay=[(lower, "/data")]).verdict == "ok"
    assert snapshot(lower) == before
    assert hostile.outside(attack(str(lower))).verdict == "ok"
    assert snapshot(lower) != before


@pytest.mark.parametrize(
    "name",
    ["user.overlay.redirect", "user.overlay.metacopy", "user.overlay.opaque", "trusted.overlay.redirect"],
)
def test_attributes_of_overlayfs(hostile: Hostile, lower: Path, name: str) -> None:
    """What overlayfs keeps in attributes is not the payload's to say: look for this directory over there."""
    (lower / "secret").mkdir()
    (lower / "secret/file").write_text("the secret")
    (lower / "secret").chmod(0o700)
    attack = calls(
        call("mkdirat", AT_FDCWD, "/data/new", 0o777),
        call("setxattr", "/data/new", name, "/secret", 7, 0),
        call("openat", AT_FDCWD, "/data/new/file", os.O_RDONLY),
    )
    seen = hostile.inside(attack, overlay=[(lower, "/data")], landlock=False)
    assert seen.answers[2] in ("ENOENT", "EPERM"), seen  # EPERM: nothing is looked up in what is wrong
    if name.startswith("user."):
        assert hostile.outside(calls(call("setxattr", str(lower), name, "/secret", 7, 0))).verdict == "ok"


@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
def test_whiteouts_of_ones_own(hostile: Hostile, lower: Path, user: str | None) -> None:
    """The device 0:0, which would be one in the upper directory, where a later overlay finds it."""
    attack = calls(call("mknodat", AT_FDCWD, "/data/w", 0o020000, 0))
    policy = allowing("mknodat")
    inside = hostile.inside(attack, overlay=[(lower, "/data")], landlock=False, seccomp=policy, user=user)
    assert inside.verdict == "EPERM"
    attack = calls(call("mknodat", AT_FDCWD, f"{lower}/w", 0o020000, 0))
    assert hostile.outside(attack).verdict == "ok"


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
def test_the_place_where_overlays_are_made(
    hostile: Hostile, lower: Path, user: str | None, *, writable: bool
) -> None:
    """Lower and upper directories lie below /proc, which nothing uncovers: by name, by going up, by taking it
    away, by a new view of it."""
    options = {"overlay": [(lower, "/data")], "writable": writable, "user": user, "landlock": False}
    for name in ("nodes", "scratch", "scratch/l0", "scratch/l0/u1", "0.0", "1.0", "dir"):
        for path in (
            f"/proc/{name}",
            f"/proc/1/cwd/{name}",
            f"/proc/self/../{name}",
            f"/proc/../proc/{name}",
        ):
            assert hostile.inside(open_for(path, os.O_PATH), **options).verdict in (
                "ENOENT",
                "EACCES",
                "ENOTDIR",
            )
    policy = allowing("umount2", "mount", "open_tree", "move_mount", "pivot_root", "fsopen")
    for attack in (
        calls(call("umount2", "/proc", 2)),
        calls(call("umount2", "/data", 2)),
        calls(call("open_tree", AT_FDCWD, "/proc", 1)),
        calls(call("mount", "/data", "/tmp", 0, 4096, 0)),
        calls(call("mount", "none", "/tmp", "overlay", 0, "lowerdir=/data:/tmp")),
    ):
        assert hostile.inside(attack, seccomp=policy, **options).verdict == "EPERM"


@pytest.mark.parametrize("name", ["file", "."])
def test_files_by_handle_below_an_overlay(hostile: Hostile, lower: Path, name: str) -> None:
    policy = allowing("open_by_handle_at")
    handle = pack("Ii8s", 8, 1, bytes(8))
    attack = calls(
        call("openat", AT_FDCWD, f"/data/{name}", os.O_RDONLY),
        call("open_by_handle_at", result(0), handle, 0),
    )
    inside = hostile.inside(attack, overlay=[(lower, "/data")], landlock=False, seccomp=policy)
    assert (inside.answers[0], inside.answers[1] == "ok") == ("ok", False)


@pytest.mark.needs_root
def test_reading_what_only_root_may(hostile: Hostile, lower: Path) -> None:
    """The payload stands for the owner of the directory, and for nobody else, whatever its id inside."""
    (lower / "secret").write_text("the secret")
    (lower / "secret").chmod(0o600)
    assert hostile.outside(read(lower / "secret")).data == b"the secret"
    for user in (None, AS_ROOT_INSIDE, "12345"):
        attack = read("/data/secret")
        assert (
            hostile.inside(attack, user=user, overlay=[(lower, "/data")], landlock=False).verdict == "EACCES"
        )
