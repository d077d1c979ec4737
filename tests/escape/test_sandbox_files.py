"""Attacks on whoever reads and writes a sandbox's files from outside: sandbox.files.

Each attack is also made on somebody who does the same by path in a granted directory, where it succeeds.
"""

import errno
import io
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import PYTHON, can_grant, wait_until

from sandboxcore import Sandbox, SandboxSpec

pytestmark = pytest.mark.escape

SWAP = """
import ctypes, sys
libc = ctypes.CDLL(None)
a, b = (name.encode() for name in sys.argv[1:])
print("ready", flush=True)
while libc.renameat2(-100, a, -100, b, 2) == 0:
    pass
sys.exit("renameat2")
"""
ROUNDS = 400


@pytest.fixture
def secret(open_dir: Path) -> Path:
    """A directory of the host with a file in it, which every user may read and write."""
    folder = open_dir / "secret"
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "file").write_text("the secret")
    (folder / "file").chmod(0o666)
    return folder


@pytest.fixture
def granted(tmp_path: Path) -> Path:
    folder = tmp_path / "granted"
    folder.mkdir()
    can_grant(folder)
    return folder


@pytest.fixture
def sb(granted: Path) -> Iterator[Sandbox]:
    with Sandbox(SandboxSpec(rw=[granted])) as sandbox:
        yield sandbox


@contextmanager
def sleeper(sb: Sandbox) -> Iterator[int]:
    """A process of the sandbox, by its number inside."""
    with sb.popen(["/bin/sh", "-c", "echo $$; exec sleep 60"], text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


@contextmanager
def swapping(sb: Sandbox, one: Path, other: Path) -> Iterator[None]:
    """A payload exchanges two names as fast as it can."""
    with sb.popen([PYTHON, "-I", "-S", "-c", SWAP, str(one), str(other)], text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
        assert process.poll() is None, "it swapped to the end"
        process.kill()


@contextmanager
def may_fail(*numbers: int) -> Iterator[None]:
    """Where a race may end in an error, but only in one of these."""
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


RACED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EAGAIN, errno.EXDEV)


def until(action: Callable[[], object], wanted: object) -> bool:
    """Whether an action gives this within so many rounds; a failing one is tried again."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if action() == wanted:
                return True
        except OSError:
            continue
    return False


# --- links that lead out ------------------------------------------------------------------------


def test_reading_through_a_planted_link(sb: Sandbox, granted: Path, secret: Path) -> None:
    up = "../" * 30
    targets = [secret / "file", up + str(secret / "file")[1:], f"/proc/1/root{secret}/file"]
    for number, target in enumerate(targets):
        sb.exec(["ln", "-s", str(target), str(granted / f"link{number}")], check=True)
        with pytest.raises(OSError) as caught:
            sb.files.read(granted / f"link{number}")
        assert caught.value.errno in (errno.ENOENT, errno.ELOOP, errno.EACCES)
    for number in (0, 1):
        assert (granted / f"link{number}").read_text() == "the secret"
    sb.exec(["ln", "-s", str(secret), str(granted / "folder")], check=True)
    assert os.listdir(granted / "folder") == ["file"]
    for action in (
        lambda: sb.files.list(granted / "folder"),
        lambda: sb.files.copy_out(granted / "folder", granted.parent / "out"),
        lambda: sb.files.stat(granted / "folder/file"),
    ):
        with pytest.raises(FileNotFoundError):
            action()


def test_writing_through_a_planted_link(sb: Sandbox, granted: Path, secret: Path) -> None:
    """What the path of the host means inside is made there, where nobody of the host is."""
    sb.exec(["ln", "-s", str(secret), str(granted / "folder")], check=True)
    sb.exec(["ln", "-s", str(secret / "new"), str(granted / "new")], check=True)
    sb.files.write("tree/file", "copied")
    for name in ("folder", "new"):
        with pytest.raises(NotADirectoryError):
            sb.files.copy_out("tree", granted / name, overwrite=True)
    with pytest.raises(FileExistsError):
        sb.files.copy_out("tree/file", granted / "new")
    for action in (
        lambda: sb.files.write(granted / "folder/file", "changed"),
        lambda: sb.files.write(granted / "new", "made"),
        lambda: sb.files.mkdir(granted / "folder/d"),
        lambda: sb.files.remove(granted / "folder/file"),
        lambda: sb.files.remove(granted / "folder/", recursive=True),
        lambda: sb.files.chmod(granted / "folder/file", 0),
        lambda: sb.files.rename(granted / "folder/file", granted / "taken"),
        lambda: sb.files.copy_in("/etc/hostname", granted / "folder/file"),
    ):
        with may_fail(errno.ENOENT, errno.EROFS, errno.EACCES, errno.EEXIST):
            action()
    assert os.listdir(secret) == ["file"]
    assert (secret / "file").read_text() == "the secret"
    assert (secret / "file").stat().st_mode & 0o777 == 0o666
    os.symlink(secret, granted / "outside")
    (granted / "outside/file").write_text("by path")
    assert (secret / "file").read_text() == "by path"


def test_magic_links(sb: Sandbox) -> None:
    """Links that are not names but doors: a file of another process, its root, its descriptors."""
    with sleeper(sb) as pid:
        for name in ("exe", "root/etc/passwd", "cwd/x", "fd/0", "fd/1", "ns/mnt"):
            path = f"/proc/{pid}/{name}"
            assert sb.exec(["readlink", path.removesuffix("/etc/passwd").removesuffix("/x")]).stdout
            with pytest.raises(OSError) as caught:
                sb.files.read(path)
            assert caught.value.errno in (errno.ELOOP, errno.EACCES)
    for name in ("/dev/fd/0", "/dev/stdin", "/proc/self/exe", "/proc/self/fd/4"):
        with pytest.raises(OSError) as caught:
            sb.files.read(name)
        assert caught.value.errno in (errno.ELOOP, errno.EACCES, errno.ENOENT)


def test_switches_of_proc(sb: Sandbox) -> None:
    """A planted link makes a writer of results a writer of kernel settings."""
    with sleeper(sb) as pid:
        path = f"/proc/{pid}/oom_score_adj"
        sb.exec(["ln", "-s", path, "result"], check=True)
        assert sb.shell(f"echo 500 >result; cat {path}").stdout == b"500\n", "the payload itself may"
        for action in (
            lambda: sb.files.write("result", "1000"),
            lambda: sb.files.write("result", "1000", append=True),
            lambda: sb.files.open("result", "r+b"),
        ):
            with pytest.raises(PermissionError) as caught:
                action()
            assert caught.value.errno == errno.EPERM
        assert sb.files.read("result") == b"500\n"


# --- races --------------------------------------------------------------------------------------


def test_race_of_a_directory_with_a_link(sb: Sandbox, granted: Path, secret: Path) -> None:
    (granted / "folder").mkdir()
    (granted / "folder/file").write_text("harmless")
    (granted / "link").symlink_to(secret)
    path = granted / "folder/file"
    seen = set()
    with swapping(sb, granted / "folder", granted / "link"):
        assert until(path.read_text, "the secret"), "who goes by path gets the other file"
        for _ in range(ROUNDS):
            with may_fail(*RACED):
                seen.add(sb.files.read(path))
                sb.files.write(path, "harmless", parents=False)
                sb.files.chmod(path, 0o640)
                seen |= {info.name.encode() for info in sb.files.list(granted / "folder", depth=3)}
    assert seen <= {b"harmless", b"file", b""}
    assert (secret / "file").read_text() == "the secret"
    assert (secret / "file").stat().st_mode & 0o777 == 0o666


def test_race_of_a_removal(sb: Sandbox, granted: Path, secret: Path) -> None:
    """What is to be removed becomes a link when it has been looked at, and back."""
    (granted / "link").symlink_to(secret)
    (granted / "tree/folder/a/b").mkdir(parents=True)
    with swapping(sb, granted / "tree/folder", granted / "link"):
        for _ in range(ROUNDS):
            with may_fail(*RACED):
                sb.files.write(granted / "tree/folder/a/b/c", "", parents=False)
                sb.files.remove(granted / "tree/folder/a/b/c", recursive=True)
            with may_fail(*RACED):
                sb.files.remove(granted / "tree/folder/file", recursive=True)
            with may_fail(*RACED):
                sb.files.remove(granted / "tree/folder/a/b", recursive=True)
                sb.files.mkdir(granted / "tree/folder/a/b")
    sb.files.remove(granted / "tree", recursive=True)
    assert os.listdir(granted) == ["link"]
    assert (secret / "file").read_text() == "the secret"


def test_race_within_a_removal(sb: Sandbox, granted: Path) -> None:
    """Directories are moved out of a tree and back while it is removed: nothing beside it is touched."""
    (granted / "beside/keep").mkdir(parents=True)
    (granted / "beside/keep/file").write_text("kept")
    for _ in range(20):
        for number in range(30):
            (granted / f"tree/d/e/{number}/x/y").mkdir(parents=True, exist_ok=True)
        (granted / "beside/e").mkdir(exist_ok=True)
        swap = [PYTHON, "-I", "-S", "-c", SWAP, str(granted / "tree/d/e"), str(granted / "beside/e")]
        with sb.popen(swap, text=True) as process:  # until one of the names is gone
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            sb.files.remove(granted / "tree", recursive=True)
        assert (granted / "beside/keep/file").read_text() == "kept"
        assert not (granted / "tree").exists()


def test_race_of_a_copy(sb: Sandbox, granted: Path, secret: Path, tmp_path: Path) -> None:
    (granted / "tree/folder").mkdir(parents=True)
    (granted / "tree/folder/file").write_text("harmless")
    (granted / "link").symlink_to(secret)
    with swapping(sb, granted / "tree/folder", granted / "link"):
        read = (granted / "tree/folder/file").read_text
        assert until(read, "the secret"), "who copies by path gets the other file"
        for _ in range(ROUNDS // 4):
            out, archive = tmp_path / "out", b""
            with may_fail(*RACED):
                sb.files.copy_out(granted / "tree", out, symlinks=True, skip=True)
                archive = sb.files.tar(granted / "tree", skip=True)
            assert b"the secret" not in archive
            for path in out.rglob("*"):
                assert not path.is_symlink()
                assert path.is_dir() or path.read_bytes() == b"harmless"
            shutil.rmtree(out, ignore_errors=True)


def test_race_in_the_destination(sb: Sandbox, granted: Path, secret: Path) -> None:
    """A copy into a directory that the sandbox was granted: a name there becomes a link meanwhile."""
    sb.files.write("tree/folder/file", "from inside")
    (granted / "folder").mkdir()
    (granted / "link").symlink_to(secret)
    with swapping(sb, granted / "folder", granted / "link"):
        for _ in range(ROUNDS // 4):
            with may_fail(*RACED):
                sb.files.copy_out("tree", granted, overwrite=True)
    assert os.listdir(secret) == ["file"]
    assert (secret / "file").read_text() == "the secret"


# --- what is not a file -------------------------------------------------------------------------


def test_nothing_makes_the_reader_wait(sb: Sandbox, tmp_path: Path) -> None:
    """Fifos with nobody at the other end, devices without end, leases that are never given up."""
    hold = """
        import fcntl, os, signal, sys, time
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fd = os.open("leased", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        print("ready", flush=True)
        time.sleep(60)
    """.replace("\n        ", "\n")
    sb.shell("mkfifo fifo; ln -s /dev/zero zero; ln -s /dev/urandom random; ln -s /dev/ptmx ptmx", check=True)
    with sb.popen([PYTHON, "-I", "-S", "-c", hold], text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for name in ("fifo", "zero", "random", "ptmx", "leased", "/dev/tty"):
            for action in (
                lambda name=name: sb.files.read(name),
                lambda name=name: sb.files.write(name, "x"),
                lambda name=name: sb.files.copy_out(name, "/nowhere/at/all"),
                lambda name=name: sb.files.open(name, "r+b"),
            ):
                with pytest.raises(OSError) as caught:
                    action()
                assert caught.value.errno in (
                    errno.EINVAL,
                    errno.ENXIO,
                    errno.EAGAIN,
                    errno.EACCES,
                    errno.EROFS,
                )
        assert time.monotonic() - began < 5
        process.kill()
    with pytest.raises(OSError, match="fifo is not copied"):
        sb.files.copy_out(".", tmp_path / "out")
    with pytest.raises(OSError, match="fifo is not copied"):
        sb.files.tar(".")


def test_a_file_that_grows_for_ever(sb: Sandbox, tmp_path: Path) -> None:
    """Copied is what was there at the beginning."""
    with sb.popen(["/bin/sh", "-c", "while :; do echo more; done >>log"]) as process:
        wait_until(lambda: sb.files.exists("log") and sb.files.stat("log").size > 100000, "a long file")
        sb.files.copy_out("log", tmp_path / "log")
        archive = sb.files.tar("log")
        process.kill()
    assert (tmp_path / "log").stat().st_size <= sb.files.stat("log").size
    with tarfile.open(fileobj=io.BytesIO(archive)) as content:
        assert content.getnames() == ["log"]


def test_links_that_lead_out_of_a_copy(sb: Sandbox, tmp_path: Path, secret: Path) -> None:
    """A copy with such a link would lead the next one who goes by path."""
    escape = [str(secret), "../" * 30 + str(secret)[1:], "..", "a/../../x", "up/../..", "."]
    sb.shell(
        "mkdir -p tree/a/b; echo inside >tree/f; ln -s ../.. tree/a/b/up; ln -s ../f tree/a/fine", check=True
    )
    for number, target in enumerate(escape[:-1]):
        sb.files.symlink(target, f"tree/l{number}")
        with pytest.raises(OSError, match="leads out of the tree") as caught:
            sb.files.copy_out("tree", tmp_path / "refused", symlinks=True)
        assert caught.value.errno == errno.EINVAL
        shutil.rmtree(tmp_path / "refused")
        sb.files.remove(f"tree/l{number}")
    # each harmless by its text, but together "up/.." is above the tree
    sb.files.symlink("a/b/up/../file", "tree/together")
    sb.files.copy_out("tree", tmp_path / "out", symlinks=True, skip=True)
    assert not os.path.lexists(tmp_path / "out/together")
    assert (tmp_path / "out/a/fine").read_text() == "inside\n"
    for path in (tmp_path / "out").rglob("*"):
        assert path.resolve().is_relative_to(tmp_path / "out"), path


def test_no_set_id_bits_come_out(sb: Sandbox, tmp_path: Path) -> None:
    with Sandbox() as plain:
        plain.shell(
            "mkdir -p tree/d; cp /bin/true tree/true; chmod 6755 tree/true; chmod 3777 tree/d", check=True
        )
        assert plain.files.stat("tree/true").mode == 0o6755
        plain.files.copy_out("tree", tmp_path / "out")
        assert (tmp_path / "out/true").stat().st_mode & 0o7777 == 0o755
        assert (tmp_path / "out/d").stat().st_mode & 0o7777 == 0o777
        with tarfile.open(fileobj=io.BytesIO(plain.files.tar("tree"))) as archive:
            assert {member.mode & ~0o777 for member in archive} == {0}


def archive_of(*members: tuple[str, bytes, str]) -> bytes:
    """Name, type, link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind, link in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.mode = kind, link, 0o6777
            member.size = 6 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"hidden"))
    return stream.getvalue()


def test_hostile_archives(sb: Sandbox, granted: Path, secret: Path) -> None:
    for name, kind in (
        (str(secret / "new"), tarfile.REGTYPE),
        ("../climbed", tarfile.REGTYPE),
        ("a/../../climbed", tarfile.DIRTYPE),
        ("device", tarfile.CHRTYPE),
        ("fifo", tarfile.FIFOTYPE),
    ):
        archive = archive_of((name, kind, ""), ("good", tarfile.REGTYPE, ""))
        with pytest.raises(ValueError, match="skip=True leaves it out"):
            sb.files.untar(archive, granted / "in")
        sb.files.untar(archive, granted / "in", skip=True)
        assert os.listdir(granted / "in") == ["good"]
        assert (granted / "in/good").stat().st_mode & 0o7777 == 0o777
        sb.files.remove(granted / "in", recursive=True)
    link = ("link", tarfile.SYMTYPE, str(secret))
    through = [
        ("link/new", tarfile.REGTYPE, ""),
        ("link/d", tarfile.DIRTYPE, ""),
        ("link", tarfile.REGTYPE, ""),
    ]
    for member in through[:2]:
        with pytest.raises(OSError) as caught:
            sb.files.untar(archive_of(link, member), granted / "in")
        assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST)
    sb.files.untar(archive_of(link, through[2]), granted / "in")
    assert (granted / "in/link").read_bytes() == b"hidden"
    with pytest.raises(OSError) as caught:
        sb.files.untar(archive_of(link, ("twin", tarfile.LNKTYPE, "link/file")), granted / "in")
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    with pytest.raises(ValueError, match="hard link"):
        sb.files.untar(archive_of(("twin", tarfile.LNKTYPE, str(secret / "file"))), granted / "in")
    assert os.listdir(secret) == ["file"]
    assert (secret / "file").read_text() == "the secret"


# --- the server ---------------------------------------------------------------------------------


def test_the_server_is_out_of_reach(sb: Sandbox) -> None:
    """It has the payload's rights to files, but where there is more than one id, it is not the payload's."""
    sb.files.exists("/")
    attack = """
        import os, signal
        me, found = os.getpid(), []
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) in (1, me):
                continue
            for file in ("environ", "mem", "maps", "fd/4", "exe", "cwd"):
                try:
                    os.open(f"/proc/{name}/{file}", os.O_RDONLY)
                    found.append((name, file))
                except OSError:
                    pass
            try:
                os.kill(int(name), signal.SIGKILL)
                found.append((name, "kill"))
            except PermissionError:
                pass
        print(found)
    """.replace("\n        ", "\n")
    done = sb.exec([PYTHON, "-I", "-S", "-c", attack], text=True, timeout=60)
    if sb._plan.host.mode == "rootless":  # killed, at the worst; never read
        assert "'mem'" not in done.stdout
        assert "'fd/4'" not in done.stdout
    else:
        assert done.stdout == "[]\n"
    assert sb.files.exists("/workspace")


def test_a_server_that_is_stopped_or_killed(sb: Sandbox) -> None:
    """On a host with one id only the payload can do that: nobody waits for long, nothing is lost."""
    sb.files.write("f", "1")
    disturb = ["/bin/sh", "-c", "while :; do kill -STOP -1; kill -KILL -1; done 2>/dev/null"]
    stop = threading.Event()

    def disturber() -> None:
        while not stop.is_set():
            sb.exec(disturb, timeout=0.2)

    thread = threading.Thread(target=disturber)
    thread.start()
    try:
        for turn in range(40):
            with may_fail(errno.ECONNRESET):
                sb.files.write(f"f{turn}", str(turn))
                assert sb.files.read(f"f{turn}") == str(turn).encode()
    finally:
        stop.set()
        thread.join(timeout=30)
    assert not thread.is_alive()

    def kept() -> bool:
        with may_fail(errno.ECONNRESET):  # what outlived its killed launcher is still being killed by init
            return sb.files.read("f") == b"1"
        return False

    wait_until(kept, "the end of the disturbance")
