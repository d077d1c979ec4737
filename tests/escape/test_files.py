"""Attacks on files of the host: by path, by link, by descriptor, by privilege."""

import os
import secrets
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    AT_FDCWD,
    BUFFER,
    Hostile,
    Outcome,
    allowing,
    as_nobody,
    call,
    calls,
    conversation,
    open_for,
    pack,
    pointer,
    read,
    result,
)
from support import can_grant

import sandboxcore
from sandboxcore import SandboxSpec, SetupError

pytestmark = pytest.mark.escape

AT_EMPTY_PATH, AT_SYMLINK_FOLLOW = 0x1000, 0x400
RENAME_EXCHANGE = 2


@pytest.fixture
def secret(open_dir: Path) -> Path:
    """A file of the host that every user may read and write, and no sandbox is granted."""
    path = open_dir / "secret"
    path.write_text("the secret")
    path.chmod(0o666)
    return path


@pytest.fixture
def granted(tmp_path: Path) -> Path:
    """A directory of the host that sandboxes are granted, next to the open one with the secret."""
    folder = tmp_path / "granted"
    folder.mkdir()
    return folder


# --- by path ------------------------------------------------------------------------------------


def test_host_files(hostile: Hostile, secret: Path) -> None:
    for attack in (read(secret), open_for(secret, os.O_WRONLY)):
        assert hostile.outside(attack).verdict == "ok"
        assert hostile.inside(attack).verdict == "ENOENT"


@pytest.mark.parametrize(
    "name", "/home /root /run /sys /boot /opt /srv /mnt /media /var/lib /var/log /var/run".split()
)
def test_host_directories(hostile: Hostile, name: str) -> None:
    attack = open_for(name, os.O_PATH)
    if os.path.exists(name):
        assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "ENOENT"


@pytest.mark.parametrize("name", ["shadow", "machine-id", "ssh", "sudoers", "fstab", "environment"])
def test_host_configuration(hostile: Hostile, name: str) -> None:
    assert hostile.inside(open_for(f"/etc/{name}", os.O_PATH)).verdict == "ENOENT"
    assert hostile.inside(read("/etc/passwd")).data.startswith(b"root:x:0:")
    assert hostile.inside(read("/etc/passwd")).data.count(b"\n") == 3


def test_the_root_has_nothing_else(hostile: Hostile) -> None:
    seen = set(sandboxcore.run(["ls", "-A", "/"], spec=hostile.spec, text=True).stdout.split())
    ours = {"dev", "etc", "hostile", "proc", "tmp", "var", "workspace"}
    programs = {"usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"}
    assert ours <= seen <= ours | programs
    assert not set(os.listdir("/")) <= seen, "the same look outside sees more"


@pytest.mark.parametrize("landlock", [True, False])
def test_read_only_grants(hostile: Hostile, secret: Path, landlock: bool) -> None:
    """The mount says no, with and without Landlock, although the file's own mode says yes."""
    folder = secret.parent
    grant = {"ro": [folder], "landlock": landlock}
    for attack in (
        open_for(secret, os.O_WRONLY),
        open_for(folder / "new", os.O_WRONLY | os.O_CREAT),
        calls(call("mkdirat", AT_FDCWD, str(folder / "folder"), 0o700)),
        calls(call("utimensat", AT_FDCWD, str(secret), 0, 0)),
        calls(call("unlinkat", AT_FDCWD, str(secret), 0)),
    ):
        assert hostile.inside(attack, **grant).verdict == "EROFS"
        assert hostile.outside(attack).verdict == "ok"


def test_the_landlock_wall_alone(hostile: Hostile, secret: Path) -> None:
    """A descriptor of the host's own, writable mount: only Landlock knows that it was not granted."""
    with open(secret, "rb") as file:
        fd = file.fileno()
        attack = open_for(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert hostile.outside(attack, pass_fds=[fd]).verdict == "ok"
        assert hostile.inside(attack, pass_fds=[fd]).verdict == "EACCES"
        assert hostile.inside(attack, pass_fds=[fd], landlock=False).verdict == "ok"


def test_host_programs_are_read_only(hostile: Hostile) -> None:
    attack = calls(call("mkdirat", AT_FDCWD, "/usr/hostile", 0o700))
    for user in ("1000", "0"):
        assert hostile.inside(attack, user=user).verdict == "EROFS"
    attack = open_for("/etc/passwd", os.O_WRONLY)
    assert hostile.inside(attack, user="0").verdict in ("EROFS", "EACCES")


@pytest.mark.parametrize("shared", ["/tmp", "/var/tmp", "/dev/shm"])
def test_shared_temporary_directories(hostile: Hostile, shared: str) -> None:
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        os.chmod(folder, 0o777)
        Path(folder, "file").write_text("of the host")
        look = read(f"{folder}/file")
        assert hostile.outside(look).data == b"of the host"
        assert hostile.inside(look).verdict == "ENOENT"

        name = f"{shared}/{secrets.token_hex(8)}"
        leave = open_for(name, os.O_CREAT | os.O_EXCL)
        assert hostile.inside(leave).verdict == "ok"
        assert not os.path.exists(name)
        assert hostile.inside(leave).verdict == "ok", "a second sandbox sees nothing of the first"
        assert hostile.outside(leave).verdict == "ok"
        os.unlink(name)


# --- by link and by .. --------------------------------------------------------------------------

UP = "../" * 20


@pytest.mark.parametrize(
    "target",
    ["{secret}", "../open/secret", UP + "{secret}", "/proc/self/root{secret}",
     "/proc/1/root{secret}", "/proc/self/cwd/../open/secret", "/dev/fd/0/" + UP + "{secret}"],
)  # fmt: skip
def test_links_planted_in_a_grant(hostile: Hostile, secret: Path, granted: Path, target: str) -> None:
    (granted / "link").symlink_to(target.format(secret=secret))
    attack = calls(
        call("chdir", str(granted)),
        call("openat", AT_FDCWD, "link", os.O_RDONLY),
        call("read", result(1), BUFFER, 100),
    )
    if "/1/" not in target and "/0/" not in target:
        assert hostile.outside(attack).data == b"the secret"
    for grant in ({"rw": [granted]}, {"ro": [granted]}):
        done = hostile.inside(attack, **grant)
        assert done.verdict in ("ENOENT", "EACCES", "ENOTDIR")
        assert done.data == b""


def test_links_planted_for_injected_files(hostile: Hostile, secret: Path, granted: Path) -> None:
    """files= writes through no link, however it got there."""
    (granted / "file").symlink_to(secret)
    (granted / "folder").symlink_to(secret.parent)
    spec = SandboxSpec(rw=(granted,), mounts=hostile.spec.mounts)
    for name in (granted / "file", granted / "folder" / "secret"):
        with pytest.raises(SetupError) as caught:
            sandboxcore.run(["true"], spec=spec, files={str(name): "overwritten"})
        assert (caught.value.stage, caught.value.errno) == ("file", 40)  # ELOOP
    assert secret.read_text() == "the secret"
    (granted / "file").write_text("this is how it would have gone")
    assert secret.read_text() == "this is how it would have gone"


@pytest.mark.parametrize("where", ["/proc/self/root", "/proc/self/fd/0", "/proc/1/root", "/dev/fd/3"])
def test_working_directory_behind_a_magic_link(where: str) -> None:
    """CVE-2024-21626: a descriptor of the host as the working directory."""
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], cwd=where)
    assert caught.value.stage == "cwd"
    assert os.strerror(caught.value.errno) in (os.strerror(40), os.strerror(13), os.strerror(2))


def test_working_directory_behind_a_planted_link(secret: Path, granted: Path) -> None:
    (granted / "out").symlink_to(secret.parent)
    (granted / "root").symlink_to("/")
    spec = SandboxSpec(rw=(granted,))
    with pytest.raises(SetupError, match="cwd"):
        sandboxcore.run(["true"], spec=spec, cwd=granted / "out")
    inside = sandboxcore.run(["ls"], spec=spec, cwd=granted / "root", text=True).stdout.split()
    assert "workspace" in inside, "an absolute link means the sandbox's own root"
    assert "workspace" not in os.listdir(granted / "root")


def test_climbing_out_of_a_grant(hostile: Hostile, secret: Path, granted: Path) -> None:
    attack = calls(
        call("openat", AT_FDCWD, str(granted), os.O_RDONLY),
        call("openat", result(0), UP + str(secret), os.O_RDONLY),
        call("fchdir", result(0)),
        call("openat", AT_FDCWD, UP + str(secret), os.O_RDONLY),
    )
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack, rw=[granted]).answers == ("ok", "ENOENT", "ok", "ENOENT")


def test_a_passed_directory_leads_nowhere_else(hostile: Hostile, secret: Path, granted: Path) -> None:
    """The caller hands a directory over; what is above it, Landlock keeps."""
    granted.parent.chmod(0o755)
    fd = os.open(granted, os.O_RDONLY)
    try:
        attack = calls(call("openat", fd, "../open/secret", os.O_RDONLY))
        assert hostile.outside(attack, pass_fds=[fd]).verdict == "ok"
        assert hostile.inside(attack, pass_fds=[fd]).verdict == "EACCES"
        assert hostile.inside(attack, pass_fds=[fd], landlock=False).verdict == "ok"
    finally:
        os.close(fd)


def test_a_directory_moved_out_of_the_grant(secret: Path, granted: Path) -> None:
    """CVE-2015-2925: an accomplice moves the payload's working directory out of what is mounted."""
    can_grant(granted)
    script = "cd inner && echo ready && read go; cat ../secret"

    def attack(run: Any, **options: Any) -> bytes:
        (granted / "inner").mkdir()
        with conversation(run, ["sh", "-c", script], cwd=granted, **options) as talk:
            talk.await_ready()
            (granted / "inner").rename(secret.parent / "inner")
            talk.end()
            (secret.parent / "inner").rmdir()
            return bytes(talk.stdout.read())

    quiet = {"stderr": subprocess.DEVNULL, "timeout": 30}
    assert attack(subprocess.run, **quiet) == b"the secret"
    assert attack(sandboxcore.run, spec=SandboxSpec(rw=(granted,)), **quiet) == b""


def test_chroot_break(hostile: Hostile, secret: Path) -> None:
    """A second chroot, with a directory still open from before, is the way out of a first one."""
    jail = secret.parent / "jail"
    (jail / "second").mkdir(parents=True)
    attack = [
        call("openat", AT_FDCWD, ".", os.O_RDONLY),
        call("chroot", "second"),
        call("fchdir", "$2"),
        call("openat", AT_FDCWD, UP + str(secret), os.O_RDONLY),
    ]
    enter = [call("chroot", str(jail)), call("chdir", "/")]
    assert hostile.in_userns(calls(*enter, *attack)).verdict == "ok"
    assert hostile.inside(calls(*enter, *attack), rw=[jail]).verdict == "EPERM"
    policy = allowing("chroot")
    done = hostile.inside(calls(*enter, *attack), rw=[jail], seccomp=policy, user="0")
    assert done.verdict == "EPERM"


# --- by hard link, device, privilege ------------------------------------------------------------


def test_hard_links_to_host_files(hostile: Hostile, secret: Path, granted: Path) -> None:
    """A link would carry a file from where it may be read to where it may be written."""

    def link(source: Path | str, target: Path | str) -> list[str]:
        return calls(call("linkat", AT_FDCWD, str(source), AT_FDCWD, str(target), AT_SYMLINK_FOLLOW))

    assert hostile.outside(link(secret, granted / "outside")).verdict == "ok"
    grant: dict[str, Any] = {"ro": [secret.parent], "rw": [granted], "user": "0"}
    assert hostile.inside(link(secret, granted / "inside"), **grant).verdict == "EXDEV"
    assert hostile.inside(link("/usr/bin/env", "/workspace/env"), **grant).verdict == "EXDEV"
    by_descriptor = calls(
        call("openat", AT_FDCWD, str(secret), os.O_RDONLY),
        call(
            *("linkat", AT_FDCWD, "/proc/self/fd/3", AT_FDCWD, str(granted / "again")),
            AT_SYMLINK_FOLLOW,
        ),
    )
    assert hostile.inside(by_descriptor, **grant).answers == ("ok", "EXDEV")
    assert [path.name for path in granted.iterdir()] == ["outside"]


def test_devices_are_the_harmless_six(hostile: Hostile) -> None:
    listing = sandboxcore.run(["ls", "-A", "/dev"], text=True).stdout.split()
    links = {"fd", "stdin", "stdout", "stderr", "ptmx"}
    nodes = {"null", "zero", "full", "random", "urandom", "tty"}
    assert set(listing) == links | nodes | {"pts", "shm"}
    for name in ("mem", "kmsg", "fuse", "kvm", "net/tun", "vsock", "console", "loop-control"):
        assert hostile.inside(open_for(f"/dev/{name}", os.O_RDWR)).verdict == "ENOENT"


def test_device_nodes(hostile: Hostile, open_dir: Path) -> None:
    memory = os.makedev(1, 1)
    attack = calls(call("mknodat", AT_FDCWD, str(open_dir / "mem"), 0o20666, memory))
    inside = calls(call("mknodat", AT_FDCWD, "/tmp/mem", 0o20666, memory))
    if os.geteuid() == 0:
        assert hostile.outside(attack).verdict == "ok"
    for user in ("1000", "0"):
        assert hostile.inside(inside, user=user).verdict == "EACCES"  # Landlock
        assert hostile.inside(inside, user=user, landlock=False).verdict == "EPERM"  # no CAP_MKNOD
    fifo = calls(call("mknodat", AT_FDCWD, "/tmp/fifo", 0o10666, 0))
    assert hostile.inside(fifo).verdict == "ok"


def test_device_nodes_in_a_grant(hostile: Hostile) -> None:
    """A grant may hold devices; they are only names there."""
    attack = open_for("/workspace/zero", os.O_RDONLY)
    assert hostile.outside(open_for("/dev/zero", os.O_RDONLY)).verdict == "ok"
    assert hostile.inside(attack, ro=[("/dev/zero", "/workspace/zero")]).verdict == "EACCES"
    assert hostile.inside(open_for("/dev/zero", os.O_RDONLY)).verdict == "ok"


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom", "tty"])
def test_device_nodes_are_not_changed(hostile: Hostile, name: str) -> None:
    """The six nodes are the host's own: the data goes through, the inode stays as it is."""
    before = os.stat(f"/dev/{name}")
    for attack in (
        calls(call("utimensat", AT_FDCWD, f"/dev/{name}", 0, 0)),
        calls(call("fchmodat", AT_FDCWD, f"/dev/{name}", 0o600)),
        calls(call("fchownat", AT_FDCWD, f"/dev/{name}", 1000, 1000, 0)),
    ):
        for user in ("1000", "0"):
            assert hostile.inside(attack, user=user).verdict == "EROFS"
    after = os.stat(f"/dev/{name}")
    assert (before.st_mode, before.st_uid, before.st_mtime_ns) == (
        after.st_mode,
        after.st_uid,
        after.st_mtime_ns,
    )


def auxiliary_vector(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines() if line.startswith("AT_"))
    return {name: value.strip() for name, _, value in pairs}


@pytest.mark.needs_program("su")
def test_set_user_id_programs() -> None:
    """The loader shows its secrets only where the program gained nothing (AT_SECURE)."""
    program = shutil.which("su")
    assert program is not None
    assert os.stat(program).st_mode & 0o4000
    show = {"LD_SHOW_AUXV": "1", "PATH": "/usr/bin:/bin"}
    argv = [program, "--version"]
    outside = subprocess.run(argv, env=show, capture_output=True, text=True, **as_nobody())
    assert auxiliary_vector(outside.stdout) == {}, "outside it runs as root, and is secretive"
    for user in ("1000", "0"):
        inside = sandboxcore.run(argv, env=show, text=True, spec=SandboxSpec(user=user))
        assert auxiliary_vector(inside.stdout)["AT_SECURE"] == "0"
        assert auxiliary_vector(inside.stdout)["AT_EUID"] == user


def test_set_user_id_file_in_a_grant(hostile: Hostile, exec_dir: Path) -> None:
    program = exec_dir / "program"
    shutil.copy(hostile.program, program)
    program.chmod(0o6755)
    attack = calls(call("geteuid"), call("getegid"))
    outside = subprocess.run([program, *attack], capture_output=True, **as_nobody())
    assert outside.stdout == b"ok %d\nok %d\n" % (os.geteuid(), os.getegid())
    for grant in ({"ro": (exec_dir,)}, {"rw": (exec_dir,)}):
        inside = sandboxcore.run([program, *attack], spec=SandboxSpec(user="77", **grant))
        assert inside.stdout == b"ok 77\nok 77\n"


def test_file_capabilities(hostile: Hostile, exec_dir: Path) -> None:
    """A file with capabilities, permitted and inheritable ones, gives them to nobody inside."""
    program = exec_dir / "program"
    shutil.copy(hostile.program, program)
    granting = struct.pack("=5I", 0x02000001, *[0xFFFFFFFF] * 2, *[0x1FF] * 2)  # vfs_cap_data
    give = call("setxattr", str(program), "security.capability", pointer(granting), 20, 0)
    assert hostile.in_userns(calls(give)).verdict == "ok"
    attack = ["exec", str(program), *read("/proc/self/status")]

    def capabilities(done: Outcome) -> list[int]:
        lines = dict(line.split(b":\t") for line in done.data.splitlines())
        return [int(lines[name], 16) for name in (b"CapPrm", b"CapEff", b"CapInh", b"CapAmb")]

    gained = capabilities(hostile.in_userns(["nocaps", *attack]))
    assert gained[0], "the file brings back what was given up"
    for grant in ({"ro": [exec_dir]}, {"rw": [exec_dir]}):
        for user in ("1000", "0"):
            assert capabilities(hostile.inside(attack, user=user, **grant)) == [0, 0, 0, 0]


MODES = {"set-user-ID": 0o4755, "set-group-ID": 0o2755}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("how", ["fchmodat", "fchmod", "openat", "mknodat", "openat2", "files"])
def test_no_set_user_id_file_is_left_behind(hostile: Hostile, granted: Path, how: str, mode: int) -> None:
    """What the payload leaves in a grant belongs to the owner of the grant, perhaps to root. With
    a set-user-ID bit it would wait there for a local accomplice to run it as that owner."""
    path = str(granted / "trap")
    create = os.O_CREAT | os.O_WRONLY
    attack = calls(
        *{
            "fchmodat": [call("openat", AT_FDCWD, path, create, 0o755),
                         call("fchmodat", AT_FDCWD, path, mode)],
            "fchmod": [call("openat", AT_FDCWD, path, create, 0o755),
                       call("fchmod", result(0), mode)],
            "openat": [call("openat", AT_FDCWD, path, create, mode)],
            "mknodat": [call("mknodat", AT_FDCWD, path, 0o100000 | mode, 0)],
            "openat2": [call("openat2", AT_FDCWD, path, pack("=3Q", create, mode, 0), 24)],
            "files": [call("getpid")],
        }[how]
    )  # fmt: skip
    if how == "files":  # the caller may ask for what the payload may not
        with pytest.raises(sandboxcore.SpecError):
            hostile.inside(attack, rw=[granted], files={path: ("", mode)})
        return
    assert hostile.outside(attack).verdict == "ok"
    assert os.stat(path).st_mode & 0o7777 == mode
    os.unlink(path)
    hostile.inside(attack, rw=[granted])
    left = os.stat(path).st_mode & 0o7777 if os.path.exists(path) else 0
    assert not left & 0o6000
