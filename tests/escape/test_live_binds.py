"""Attacks on binds that come to a running sandbox, and on init, which attaches them and takes them away."""

import errno
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from escape.hostile import AS_ROOT_INSIDE, AT_FDCWD, Hostile, allowing, call, calls, open_for, pack, result
from escape.test_living import inside, python
from support import IS_ROOT, snapshot
from trees import given_away

from sandboxcore import PIPE, Sandbox, SandboxBusy, SetupError

pytestmark = pytest.mark.escape

MS_REMOUNT, MS_BIND, MS_RDONLY, MNT_DETACH, UP = 32, 4096, 1, 2, "../" * 9
ROUNDS = 40
PATIENCE = 60  # seconds, where the link wins the race again and again


@pytest.fixture
def granted(tmp_path: Path) -> Path:
    """A directory of an ordinary user, open to everybody, with something beside it that nobody grants."""
    for path in (tmp_path, *list(tmp_path.parents)[:1]):
        path.chmod(0o755)
    folder = tmp_path / "granted"
    (folder / "dir").mkdir(parents=True)
    (folder / "file").write_text("granted")
    (tmp_path / "secret").write_text("the secret")
    given_away(folder)
    for item, mode in ((folder, 0o777), (folder / "dir", 0o777), (folder / "file", 0o666)):
        item.chmod(mode)
    (tmp_path / "secret").chmod(0o666)
    return folder


def living(hostile: Hostile, **fields: object) -> Sandbox:
    return Sandbox.create(hostile.spec.replace(live_binds="rw", **fields))


def targets(sandbox: Sandbox) -> set[str]:
    """Where something of the host's is mounted; not what was there from the start."""
    sandbox._capabilities = None
    return {mount.target for mount in sandbox.capabilities.mounts if "granted" in mount.target}


# --- where it is attached ---------------------------------------------------------------------------

SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
one, other = sys.argv[1].encode(), sys.argv[2].encode()
print("on", flush=True)
while True:
    libc.renameat2(-100, one, -100, other, 2)
"""


@contextmanager
def swapping(sandbox: Sandbox, one: str, other: str) -> Iterator[None]:
    """Exchange two names all the time, whatever is mounted there."""
    with sandbox.popen(python(SWAP, one, other), stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        yield
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
@pytest.mark.parametrize("part", ["last", "middle"])
def test_race_of_the_target_with_a_link(hostile: Hostile, granted: Path, part: str, user: str | None) -> None:
    """It lands in the directory, under one of its two names, or nowhere; and always goes again."""
    end = "" if part == "last" else "/granted"
    with living(hostile, user=user) as sandbox:
        make = f"cd /workspace; mkdir -p granted{end} /tmp/victim{end}; ln -s /tmp/victim link"
        assert sandbox.shell(make).ok
        target, other = f"/workspace/granted{end}", f"/workspace/link{end}"
        with swapping(sandbox, "/workspace/granted", "/workspace/link"):
            seen = sandbox.shell(f"for i in $(seq 300); do readlink -f {target}; done").stdout.splitlines()
            assert b"/tmp/victim" + end.encode() in seen, "who goes by path gets there"
            landed, refused, patience = 0, set(), time.monotonic() + PATIENCE
            for attempt in itertools.count():
                if attempt >= ROUNDS and (landed or time.monotonic() > patience):
                    break
                try:
                    sandbox.bind(granted, target, read_only=attempt % 2 == 0)
                except SetupError as error:
                    refused.add(error.errno)
                    assert sandbox.binds == ()
                    continue
                landed += 1
                if attempt % 4 == 0:
                    assert targets(sandbox) <= {target, other}
                sandbox.unbind(target)
        assert landed
        assert refused <= {errno.ELOOP, errno.ESTALE, errno.ENOENT}
        assert targets(sandbox) == set()
        assert sandbox.shell("ls -A /tmp/victim /tmp/victim/*").stdout.count(b"file") == 0


def test_race_from_outside(hostile: Hostile, granted: Path) -> None:
    """The target lies in a directory of the host, and an accomplice there exchanges its names. He can move
    what is mounted, for it is his directory; it goes all the same."""
    if not IS_ROOT:
        os.chmod(granted, 0o755)
    (granted / "place").mkdir()
    (granted / "other").mkdir()
    with living(hostile) as sandbox:
        codes = set()
        sandbox.bind(granted, "/tmp/granted", read_only=False)
        command = [hostile.program, "swap", granted / "place", granted / "other"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            try:
                for _ in range(ROUNDS):
                    try:
                        sandbox.bind(granted / "dir", "/tmp/granted/place")
                    except SetupError as error:
                        codes.add(error.errno)
                        assert len(sandbox.binds) == 1
                    else:
                        sandbox.unbind("/tmp/granted/place", lazy=True)
                assert process.poll() is None
            finally:
                process.kill()
        assert codes <= {errno.ESTALE, errno.ENOENT}
        assert targets(sandbox) == {"/tmp/granted"}
        sandbox.bind(granted / "dir", "/tmp/granted/place")
        (granted / "place").rename(granted / "moved")
        assert targets(sandbox) == {"/tmp/granted", "/tmp/granted/moved"}
        sandbox.unbind("/tmp/granted/place")
        assert targets(sandbox) == {"/tmp/granted"}


def test_keeping_it_by_renaming(hostile: Hostile, granted: Path) -> None:
    """What the host takes away is gone, however often its path changes."""
    with living(hostile) as sandbox:
        assert sandbox.shell("mkdir -p /workspace/a /workspace/b").ok
        for lazy in (False, True) * 10:
            sandbox.bind(granted, "/workspace/a/granted")
            with swapping(sandbox, "/workspace/a", "/workspace/b"):
                sandbox.unbind("/workspace/a/granted", lazy=lazy)
                assert targets(sandbox) == set()
            sandbox.shell("cd /workspace; test -d a/granted || { mv a c; mv b a; mv c b; }")


# --- what may be done with it -----------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
@pytest.mark.parametrize("landlock", [True, False])
def test_changing_a_read_only_bind(hostile: Hostile, granted: Path, user: str | None, landlock: bool) -> None:
    """By no call on mounts, though the filter allows them; so it stays read-only, whatever Landlock says."""
    remount = call("mount", "none", "/tmp/granted", 0, MS_REMOUNT | MS_BIND, 0)
    bare = call("umount2", "/tmp/granted", MNT_DETACH)
    own = call("mount", str(granted), str(granted), 0, MS_BIND, 0)
    theirs = [
        call("mount", "none", str(granted), 0, MS_REMOUNT | MS_BIND | flag, 0) for flag in (MS_RDONLY, 0)
    ]
    detach = call("umount2", str(granted), MNT_DETACH)
    assert hostile.in_userns(calls(own, *theirs, detach)).verdict == "ok"
    attacks = [
        remount,
        bare,
        call("open_tree", AT_FDCWD, "/tmp/granted", 1),
        call("mount_setattr", AT_FDCWD, "/tmp/granted", 0, pack("4Q", 0, MS_RDONLY, 0, 0), 32),
        call("move_mount", AT_FDCWD, "/tmp/granted", AT_FDCWD, "/tmp", 0),
        call("mount", "/tmp/granted", "/tmp", 0, MS_BIND, 0),
    ]
    policy = allowing("mount", "umount2", "open_tree", "mount_setattr", "move_mount")
    before = snapshot(granted)
    with living(hostile, user=user, landlock=landlock, seccomp=policy) as sandbox:
        sandbox.bind(granted, "/tmp/granted")
        for attack in attacks:
            assert inside(sandbox, calls(attack)).verdict == "EPERM", attack
        for change in (
            open_for("/tmp/granted/file", os.O_WRONLY),
            open_for("/tmp/granted/new", os.O_WRONLY | os.O_CREAT),
            calls(call("fchmodat", AT_FDCWD, "/tmp/granted/file", 0o600)),
            calls(call("unlinkat", AT_FDCWD, "/tmp/granted/file", 0)),
        ):
            assert inside(sandbox, change).verdict == "EROFS", change
        assert snapshot(granted) == before
    assert hostile.outside(open_for(granted / "new", os.O_WRONLY | os.O_CREAT)).verdict == "ok"


@pytest.mark.parametrize("landlock", [True, False])
@pytest.mark.parametrize("when", ["bound", "taken away"])
def test_climbing_out(hostile: Hostile, granted: Path, when: str, landlock: bool) -> None:
    """From a directory of it: by "..", also after it was taken away below a command's feet."""
    attack = """
    import os, sys
    os.chdir(sys.argv[1])
    fd = os.open(".", os.O_RDONLY)
    print("on", flush=True)
    sys.stdin.readline()
    for at in (None, fd):
        for n in range(8):
            for name in ("secret", sys.argv[2].lstrip("/") + "/secret"):
                try:
                    print(open(os.open("../" * n + name, os.O_RDONLY, dir_fd=at)).read())
                except OSError:
                    pass
    """
    outside = subprocess.run(
        python(attack, str(granted / "dir"), str(granted.parent)),
        capture_output=True,
        text=True,
        input="\n",
        check=True,
    )
    assert "the secret" in outside.stdout
    with living(hostile, landlock=landlock) as sandbox:
        sandbox.bind(granted, "/tmp/granted", read_only=False)
        argv = python(attack, "/tmp/granted/dir", str(granted.parent))
        with sandbox.popen(argv, stdin=PIPE, stdout=PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            if when == "taken away":
                with pytest.raises(SandboxBusy):
                    sandbox.unbind("/tmp/granted")
                sandbox.unbind("/tmp/granted", lazy=True)
            out, _ = process.communicate(b"\n", timeout=30)
        assert (process.returncode, out) == (0, b"")


@pytest.mark.parametrize("landlock", [True, False])
def test_what_is_taken_away(hostile: Hostile, granted: Path, landlock: bool) -> None:
    """Who has a directory of it open finds no way on from there; without Landlock, what is below it stays."""
    script = "cd /tmp/granted; exec 3<dir; echo on; read go; cat file dir/../file 2>/dev/null | wc -c"
    with living(hostile, landlock=landlock) as sandbox:
        if sandbox._plan.omitted:
            pytest.skip("no Landlock here")
        sandbox.bind(granted, "/tmp/granted")
        with sandbox.popen(["sh", "-c", script], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"on\n"
            sandbox.unbind("/tmp/granted", lazy=True)
            out, _ = process.communicate(b"\n", timeout=30)
        assert out.strip() == (b"0" if landlock else b"14")
        assert sandbox.shell("cat /tmp/granted/file").returncode == 1


# --- what is left there -----------------------------------------------------------------------------

TRAPS: dict[str, Callable[[str], list[str]]] = {
    "set-user-ID": lambda path: calls(
        call("openat", AT_FDCWD, path, os.O_CREAT | os.O_WRONLY, 0o755), call("fchmod", result(0), 0o4755)
    ),
    "set-group-ID": lambda path: calls(call("openat", AT_FDCWD, path, os.O_CREAT | os.O_WRONLY, 0o2755)),
    "device": lambda path: calls(call("mknodat", AT_FDCWD, path, 0o20666, os.makedev(1, 1))),
}


@pytest.mark.parametrize("user", [None, AS_ROOT_INSIDE])
@pytest.mark.parametrize("trap", TRAPS)
def test_no_trap_is_left_behind(hostile: Hostile, granted: Path, trap: str, user: str | None) -> None:
    """Which would wait in the host's directory for an accomplice."""
    attack = TRAPS[trap]
    if IS_ROOT or trap != "device":
        assert hostile.outside(attack(str(granted / "trap"))).verdict == "ok"
        assert (granted / "trap").stat().st_mode & 0o6000 or trap == "device"
        (granted / "trap").unlink()
    with living(hostile, user=user) as sandbox:
        sandbox.bind(granted, "/tmp/granted", read_only=False)
        assert inside(sandbox, attack("/tmp/granted/trap")).verdict in ("EPERM", "EACCES")
    left = (granted / "trap").stat().st_mode if (granted / "trap").exists() else 0
    assert not left & 0o6000
    assert left == 0 or trap != "device"


def test_what_the_host_has_there_already(hostile: Hostile, exec_dir: Path) -> None:
    """Set-user-ID programs give nothing, devices are only names."""
    program = exec_dir / "granted"
    program.write_bytes(hostile.program.read_bytes())
    owner = 12345 if IS_ROOT else os.getuid()
    if IS_ROOT:
        os.chown(program, owner, owner)
    program.chmod(0o4755)
    ask = calls(call("geteuid"))
    as_other = {"user": 65534} if IS_ROOT else {}
    done = subprocess.run([program, *ask], capture_output=True, text=True, check=True, timeout=30, **as_other)
    assert done.stdout == f"ok {owner}\n"
    with living(hostile, user=AS_ROOT_INSIDE if not IS_ROOT else None) as sandbox:
        sandbox.bind(exec_dir, "/tmp/x", read_only=False)
        sandbox.bind("/dev/zero", "/tmp/zero")
        expected = sandbox.exec(["id", "-u"], text=True).stdout
        assert sandbox.exec(["/tmp/x/granted", *ask], text=True).stdout == f"ok {expected}"
        assert inside(sandbox, open_for("/tmp/zero", os.O_RDONLY)).verdict == "EACCES"
    assert hostile.outside(open_for("/dev/zero", os.O_RDONLY)).verdict == "ok"
