"""Attacks on the set-up itself: links where mounts will go, names that change meanwhile."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    AT_FDCWD,
    PROGRAM,
    Hostile,
    call,
    calls,
    open_for,
    read,
    result,
)
from support import can_grant, host_environment, snapshot

import sandboxcore
from sandboxcore import SandboxError, SandboxSpec, SetupError

pytestmark = pytest.mark.escape

ELOOP = 40


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host over which no mount may land."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "canary").write_text("alive")
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory that several sandboxes may write to."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def mount_over(path: Path) -> list[str]:
    """What a runtime does that trusts names."""
    return call("mount", "none", str(path), "tmpfs", 0, 0)


# --- links at rest ------------------------------------------------------------------------------


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """An image with nothing in it but mount points."""
    folder = tmp_path / "rootfs"
    for name in ("proc", "dev/pts", "dev/shm", "etc", "tmp", "sys", "var/tmp", "workspace", "hostile", "run"):
        (folder / name).mkdir(parents=True)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return folder


@pytest.mark.parametrize("where", ["absolute", "relative", "root", "proc"])
@pytest.mark.parametrize("name", ["proc", "dev", "etc", "tmp", "sys", "var", "workspace", "hostile", "run"])
def test_image_with_a_link_at_a_mount_point(
    hostile: Hostile, rootfs: Path, victim: Path, name: str, where: str
) -> None:
    """CVE-2021-30465, CVE-2019-19921, CVE-2023-27561, CVE-2026-47766: each mount point in turn."""
    for path in sorted((rootfs / name).rglob("*"), reverse=True):
        path.rmdir()
    (rootfs / name).rmdir()
    target = {"absolute": str(victim), "relative": "../victim", "root": "/", "proc": "/proc/self/root"}
    (rootfs / name).symlink_to(target[where])
    if where in ("absolute", "relative"):
        attack = calls(mount_over(rootfs / name), *[open_for(victim / "canary", 0)[1:]])
        assert hostile.in_userns(attack).answers == ("ok", "ENOENT"), "by name, it lands on the victim"

    before = snapshot(rootfs), snapshot(victim)
    attack = calls(
        call("openat", AT_FDCWD, f"/{name}/canary", os.O_RDONLY),
        call("openat", AT_FDCWD, str(victim / "canary"), os.O_RDONLY),
        call("openat", AT_FDCWD, "/proc/self/status", os.O_RDONLY),
        call("openat", AT_FDCWD, "/dev/null", os.O_RDWR),
        call("openat", AT_FDCWD, "/tmp/file", os.O_CREAT | os.O_WRONLY, 0o600),
    )
    try:
        done = hostile.inside(attack, rootfs=str(rootfs))
    except SandboxError:  # our own mount point is a link: nothing was started
        assert name == "hostile"
    else:
        assert done.answers[0] in ("ENOENT", "EACCES")
        assert done.answers[1:] == ("ENOENT", "ok", "ok", "ok")
    assert (snapshot(rootfs), snapshot(victim)) == before


@pytest.mark.parametrize("kind", ["link", "file", "fifo", "directory"])
@pytest.mark.parametrize("name", ["dev/null", "dev/zero", "dev/tty", "dev/ptmx", "dev/console"])
def test_image_with_its_own_devices(
    hostile: Hostile, rootfs: Path, victim: Path, name: str, kind: str
) -> None:
    """CVE-2025-31133, CVE-2025-52565: nothing of an image's /dev is used as a source or a target."""
    path = rootfs / name
    if kind == "link":
        path.symlink_to(victim / "canary")
    elif kind == "file":
        path.write_text("not a device")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = snapshot(victim)
    attack = calls(
        call("openat", AT_FDCWD, "/dev/null", os.O_RDWR),
        call("write", result(0), "overwritten", 11),
        call("openat", AT_FDCWD, "/proc/kallsyms", os.O_RDONLY),
        call("read", result(2), "%", 100),
    )
    done = hostile.inside(attack, rootfs=str(rootfs))
    assert (done.verdict, done.values[1], done.data) == ("ok", 11, b"")
    stat = sandboxcore.run(
        [PROGRAM, *calls(call("openat", AT_FDCWD, "/dev/console", os.O_PATH))],
        spec=hostile.spec.replace(rootfs=str(rootfs)),
    )
    assert stat.stdout == b"ENOENT\n"
    assert snapshot(victim) == before


@pytest.mark.parametrize("part", ["first", "middle", "last"])
@pytest.mark.parametrize("grant", ["tmpfs", "ro", "rw"])
def test_link_in_the_path_of_a_mount_point(
    tmp_path: Path, shared: Path, victim: Path, grant: str, part: str
) -> None:
    """The directory's other users plant a link where the next sandbox mounts something."""
    (victim / "b" / "c").mkdir(parents=True)
    (shared / "a" / "b" / "c").mkdir(parents=True)
    path = {"first": shared / "a", "middle": shared / "a" / "b", "last": shared / "a" / "b" / "c"}[part]
    path.rename(tmp_path / "away")
    path.symlink_to(victim)
    source = tmp_path / "source"
    source.mkdir()
    target = str(shared / "a" / "b" / "c")
    extra = {"tmpfs": [target], "ro": [(source, target)], "rw": [(source, target)]}[grant]
    both = {"rw": [shared, victim]}
    spec = SandboxSpec(**(both | {grant: [*both.get(grant, []), *extra]}))
    before = snapshot(victim)
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=spec)
    assert (caught.value.stage, caught.value.errno) == ("mount", ELOOP)
    assert snapshot(victim) == before


# --- names that change --------------------------------------------------------------------------


@contextmanager
def swapping(hostile: Hostile, one: Path, other: Path) -> Iterator[None]:
    """Exchange two names all the time, as an accomplice on the host or in another sandbox would."""
    command = [hostile.program, "swap", one, other]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield
            assert process.poll() is None
        finally:
            process.kill()


def test_race_for_a_mount_point(hostile: Hostile, shared: Path, victim: Path) -> None:
    """A directory and a link exchange their names while sandboxes start that mount there."""
    slot, link = shared / "slot", shared / "link"
    slot.mkdir()
    link.symlink_to(victim)
    with swapping(hostile, slot, link):
        naive = [mount_over(slot), open_for(victim / "canary", 0)[1:]]
        assert any(hostile.in_userns(calls(*naive * 20)).answers.count("ENOENT") for _ in range(20)), (
            "by name, one of 400 mounts lands on the victim"
        )

        landed, refused = 0, set()
        for attempt in range(300):
            # another host name is another template, so that each start mounts anew
            spec = SandboxSpec(rw=(shared, victim), tmpfs=(str(slot),), hostname=f"start{attempt}")
            try:
                done = sandboxcore.run(["cat", victim / "canary"], spec=spec, record=True, timeout=30)
            except SetupError as error:
                refused.add((error.stage, error.errno))
                continue
            assert done.stdout == b"alive"
            assert done.capabilities is not None
            at = {m.target for m in done.capabilities.mounts if str(shared.parent) in m.target}
            assert at - {str(slot), str(link)} == {str(shared), str(victim)}
            landed += 1
    assert landed, "the race was never won by the directory"
    assert refused == {("mount", ELOOP)}, "the race was won by the link, too, and only got it refused"
    assert sorted(os.listdir(shared)) == ["link", "slot"]
    assert os.listdir(victim) == ["canary"]


@pytest.mark.parametrize("grant", ["ro", "rw", "rootfs"])
def test_source_changes_after_it_was_looked_at(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, victim: Path, grant: str
) -> None:
    """Between Python's look at a source and C's use of it, a part of the path becomes a link."""
    folder = tmp_path / "folder"
    (folder / "usr").mkdir(parents=True)
    (victim / "usr").mkdir()
    from sandboxcore import process

    compile_plan = process.compile_plan

    def compile_and_swap(*args: Any) -> Any:
        plan = compile_plan(*args)
        folder.rename(tmp_path / "away")
        folder.symlink_to(victim)
        return plan

    monkeypatch.setattr(process, "compile_plan", compile_and_swap)
    spec = SandboxSpec(**{grant: str(folder) if grant == "rootfs" else [f"{folder}/usr:/opt"]})
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=spec)
    assert (caught.value.stage, caught.value.errno) == ("source", ELOOP)


@pytest.mark.parametrize("becomes", ["file", "directory", "fifo", "gone"])
def test_source_becomes_something_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, becomes: str) -> None:
    """A file where a directory was granted, or the other way round, is not what was granted."""
    source = tmp_path / "source"
    if becomes == "directory":
        source.write_text("")
    else:
        source.mkdir()
    from sandboxcore import process

    compile_plan = process.compile_plan

    def compile_and_swap(*args: Any) -> Any:
        plan = compile_plan(*args)
        source.rename(tmp_path / "away")
        {
            "file": source.touch,
            "directory": source.mkdir,
            "fifo": lambda: os.mkfifo(source),
            "gone": lambda: None,
        }[becomes]()
        return plan

    monkeypatch.setattr(process, "compile_plan", compile_and_swap)
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=SandboxSpec(ro=((source, "/opt"),)))
    assert caught.value.stage == "source"


def test_race_for_a_source(hostile: Hostile, tmp_path: Path, victim: Path) -> None:
    """Whichever of the two it gets, it gets that one whole; and a link is never a way past the look."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "canary").write_text("harmless")
    other.symlink_to(victim)
    seen: set[bytes] = set()
    with swapping(hostile, one, other):
        for attempt in range(150):
            spec = SandboxSpec(ro=((one, "/opt"),), hostname=f"start{attempt}")
            try:
                done = sandboxcore.run(
                    ["sh", "-c", "cat /opt/canary; grep -c ' /opt ' /proc/self/mountinfo"],
                    spec=spec,
                    timeout=30,
                )
            except SandboxError:  # an OSError of another kind would be an accident
                continue
            seen.add(done.stdout)
    assert seen <= {b"harmless1\n", b"alive1\n"}
    assert seen


# --- masks --------------------------------------------------------------------------------------


def test_denied_paths_stay_denied(hostile: Hostile, shared: Path) -> None:
    """Not by another name of the directory above, nor by moving, linking or removing the mask."""
    secret = shared / "above" / "secret"
    secret.parent.mkdir()
    secret.write_text("the secret")
    moved = shared / "moved"
    attempts = {
        "read": [call("openat", AT_FDCWD, str(secret), os.O_RDONLY)],
        "through proc": [call("openat", AT_FDCWD, f"/proc/self/root{secret}", os.O_RDONLY)],
        "move": [call("renameat", AT_FDCWD, str(secret), AT_FDCWD, str(moved))],
        "exchange": [
            call("openat", AT_FDCWD, str(moved), os.O_CREAT | os.O_WRONLY, 0o600),
            call("renameat2", AT_FDCWD, str(secret), AT_FDCWD, str(moved), 2),
        ],
        "remove": [call("unlinkat", AT_FDCWD, str(secret), 0)],
        "link": [call("linkat", AT_FDCWD, str(secret), AT_FDCWD, str(moved), 0)],
        "move what is above": [
            call("renameat", AT_FDCWD, str(secret.parent), AT_FDCWD, str(moved)),
            call("openat", AT_FDCWD, str(moved / "secret"), os.O_RDONLY),
        ],
    }
    expected = {"move": "EBUSY", "exchange": "EBUSY", "remove": "EBUSY", "link": "EXDEV"}
    for name, attack in attempts.items():
        denied = {"rw": [shared], "deny": [str(secret)]}
        assert hostile.inside(calls(*attack), **denied).verdict == expected.get(name, "EACCES"), name
        if moved.is_dir():
            moved.rename(secret.parent)
        moved.unlink(missing_ok=True)
        assert secret.read_text() == "the secret"
        if name not in ("remove", "move", "exchange"):
            done = hostile.inside(calls(*attack), rw=[shared])
            assert done.verdict == "ok", f"without the mask, {name} works"
        if moved.is_dir():
            moved.rename(secret.parent)
        moved.unlink(missing_ok=True)


def test_mounts_below_a_read_only_grant(hostile: Hostile) -> None:
    """A grant takes along what is mounted below it; read-only holds for all of that."""
    with open(f"/dev/shm/hostile-{os.getpid()}", "w") as file:
        os.fchmod(file.fileno(), 0o666)
        try:
            attack = open_for(file.name, os.O_WRONLY)
            assert hostile.outside(attack).verdict == "ok"
            inside = open_for(file.name.replace("/dev", "/mnt/dev"), os.O_WRONLY)
            grant = {"ro": [("/dev", "/mnt/dev")]}
            assert hostile.inside(inside, **grant).verdict == "EROFS"
            terminal = open_for("/mnt/dev/pts/ptmx", os.O_RDWR)
            assert hostile.inside(terminal, **grant).verdict in ("EACCES", "ENOENT")
        finally:
            os.unlink(file.name)


# --- what the host sees -------------------------------------------------------------------------

UNSHARED = """
import json, subprocess, sys
from pathlib import Path
import sandboxcore
from escape.hostile import conversation

def mounts():
    return Path("/proc/self/mountinfo").read_text()

assert "shared:" in mounts()
before = mounts()
spec = sandboxcore.SandboxSpec(rw=[sys.argv[1]], tmpfs=["/opt"], ro=["/etc"])
with conversation(sandboxcore.run, ["sh", "-c", "echo ready; read go"], spec=spec) as talk:
    talk.await_ready()
    during = mounts()
    done = talk.end()
json.dump([done.returncode in (0, 1), during == before, mounts() == before], sys.stdout)
"""


def test_mount_propagation(shared: Path) -> None:
    """Where the host's mounts are shared, as systemd makes them, what a sandbox mounts must not
    come back; here in a mount namespace of its own, so that the test does no harm if it does."""
    can_grant(shared)
    user = [] if os.geteuid() == 0 else ["--map-current-user"]
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    share = ["unshare", "--mount", "--propagation", "shared"]
    script = (
        f"unshare --mount --propagation unchanged mount -t tmpfs none {shared};"
        f" grep -c ' {shared} ' /proc/self/mountinfo"
    )
    naive = subprocess.run([*share, *root, "sh", "-c", script], capture_output=True, text=True)
    assert naive.stdout == "1\n", naive.stderr

    command = [*share, *user, sys.executable, "-c", UNSHARED, shared]
    done = subprocess.run(command, capture_output=True, text=True, env=host_environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, True, True]


def test_host_paths_in_mountinfo(hostile: Hostile, tmp_path: Path) -> None:
    """The kernel tells where a bind comes from; by default these are places every system has."""
    told = read("/proc/self/mountinfo")
    names = [str(Path.home()), os.getcwd(), str(Path(sandboxcore.__file__).parent), "/root", "/home"]
    granted = hostile.inside(told).data.decode()
    assert str(hostile.program.parent) in granted, "a grant does tell; SECURITY.md says so"
    inside = sandboxcore.run(["cat", "/proc/self/mountinfo"], text=True).stdout
    for line in inside.splitlines():
        source, target = line.split()[3:5]
        assert not any(name in source for name in names if len(name) > 1)
        assert source.rpartition("/")[2] in (target.rpartition("/")[2], "", "empty", "dir") or (
            source[1:].isdecimal()
        ), line
