"""sandbox.files: the files of a living sandbox, from outside."""

import errno
import io
import os
import signal
import socket
import stat
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from support import PYTHON, Spec, gone, host_program, leaves_nothing, open_fds, wait_until

import sandboxcore
from sandboxcore import FileInfo, InvalidTransition, Sandbox, SandboxGone, _native
from sandboxcore.fileops import READ_MAX, Operations
from sandboxcore.host import HostFeatures
from sandboxcore.seccomp import PROFILES, hosts_launcher

DEEP = """
import os
os.mkdir("deep")
os.chdir("deep")
for _ in range(5000):
    os.mkdir("d")
    os.chdir("d")
open("file", "w").close()
"""


@pytest.fixture
def sb() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def inside(sb: Sandbox, script: str) -> str:
    done = sb.shell(script, text=True, timeout=60)
    assert done.returncode == 0, done
    return str(done.stdout)


def python(sb: Sandbox, code: str) -> str:
    done = sb.exec([PYTHON, "-I", "-S", "-c", code], text=True, timeout=60)
    assert done.returncode == 0, done
    return str(done.stdout)


def tree_of(sb: Sandbox, path: str) -> dict[str, str]:
    return {info.name: info.type for info in sb.files.list(path, depth=None)}


# --- contents ---------------------------------------------------------------------------------------


def test_write_and_read(sb: Sandbox) -> None:
    assert sb.files.write("hello", b"hello\n") == 6
    assert inside(sb, "cat hello; stat -c '%a %u %g' hello") == "hello\n644 1000 1000\n"
    assert sb.files.read("hello") == sb.files.read("/workspace/hello") == b"hello\n"
    assert sb.files.read(Path("hello"), text=True) == "hello\n"
    assert sb.files.read("hello", offset=1, size=3) == b"ell"
    assert sb.files.read("hello", offset=100) == sb.files.read("hello", size=0) == b""
    sb.files.write("latin", "\xe4\r\n".encode("latin-1"))
    assert sb.files.read("latin", text=True, encoding="latin-1") == "\xe4\r\n"
    assert sb.files.read("/etc/passwd").startswith(b"root:")


def test_write_takes_what_there_is(sb: Sandbox) -> None:
    for number, data in enumerate(
        ("text \N{SNOWMAN}", bytearray(b"ab"), memoryview(b"cd"), io.BytesIO(b"ef"))
    ):
        sb.files.write(f"f{number}", data)
    assert sb.files.write("f4", io.StringIO("gh")) == 2
    assert inside(sb, "cat f?") == "text \N{SNOWMAN}abcdefgh"


def test_write_makes_directories_or_not(sb: Sandbox) -> None:
    sb.files.write("a/b/c", "deep")
    assert inside(sb, "cat a/b/c; stat -c %a a a/b") == "deep755\n755\n"
    with pytest.raises(FileNotFoundError) as caught:
        sb.files.write("x/y", "", parents=False)
    assert caught.value.filename == "/workspace/x/y"
    with pytest.raises(NotADirectoryError):
        sb.files.write("a/b/c/d", "")


def test_write_modes_and_flags(sb: Sandbox) -> None:
    sb.files.write("f", "one", mode=0o750)
    sb.files.write("f", "two", append=True)
    assert inside(sb, "cat f; stat -c %a f") == "onetwo750\n"
    sb.files.write("f", "3")
    assert inside(sb, "cat f; stat -c %a f") == "3750\n", "an existing file keeps its mode"
    sb.files.write("f", "", mode=0o600)
    assert inside(sb, "cat f; stat -c %a f") == "600\n"
    with pytest.raises(FileExistsError):
        sb.files.write("f", "", exclusive=True)
    for mode in (0o4755, 0o2755, -1, 0o10000):
        with pytest.raises(ValueError, match="permission bits"):
            sb.files.write("f", "", mode=mode)


def test_write_many(sb: Sandbox) -> None:
    sb.files.write_many({"run.sh": ("#!/bin/sh\necho ran\n", 0o755), "a/data": b"\0\1", "text": "t"})
    assert inside(sb, "./run.sh; od -An -tx1 a/data; cat text") == "ran\n 00 01\nt"


def test_open(sb: Sandbox) -> None:
    with sb.files.open("log", "w", encoding="utf-8", permissions=0o600) as file:
        file.write("first\n")
        assert file.name == "/workspace/log"
    with sb.files.open("log", "ab") as file:
        file.write(b"second\n")
    with sb.files.open("log", "r+") as file:
        assert file.readlines() == ["first\n", "second\n"]
        file.seek(0)
        file.write("FIRST")
    with sb.files.open("log") as file:
        assert isinstance(file, io.BufferedReader)
        assert file.read() == b"FIRST\nsecond\n"
        assert not os.get_inheritable(file.fileno())
    assert inside(sb, "stat -c %a log") == "600\n"
    with pytest.raises(FileExistsError):
        sb.files.open("log", "x")
    with sb.files.open("log", "wb"):
        pass
    assert sb.files.stat("log").size == 0


@pytest.mark.parametrize("mode", ["", "rw", "z", "rbt", "b", "rr", "r++"])
def test_open_refuses_odd_modes(sb: Sandbox, mode: str) -> None:
    with pytest.raises(ValueError):
        sb.files.open("/etc/passwd", mode)


def test_a_file_that_cannot_be_made_is_closed(sb: Sandbox) -> None:
    sb.files.exists("f")
    before = open_fds()
    with pytest.raises(LookupError):
        sb.files.open("/etc/passwd", "r", encoding="no such encoding")
    with pytest.raises(ValueError, match="binary"):
        sb.files.open("/etc/passwd", "rb", encoding="utf-8")
    assert os.listdir("/proc/self/fd") == before


def test_an_open_file_outlives_the_sandbox() -> None:
    with Sandbox() as sb:
        sb.files.write("f", "kept")
        file = sb.files.open("f")
    with file:
        assert file.read() == b"kept"


def test_without_size_at_most_so_much(sb: Sandbox) -> None:
    """A file that is all hole costs its maker nothing."""
    inside(sb, "truncate -s 1T bomb")
    with pytest.raises(OSError, match="use size=") as caught:
        sb.files.read("bomb")
    assert caught.value.errno == errno.EFBIG
    assert sb.files.stat("bomb").size == 1 << 40
    assert sb.files.read("bomb", offset=(1 << 40) - 2) == b"\0\0"
    assert READ_MAX == 1 << 30


# --- looking ----------------------------------------------------------------------------------------


def test_list(sb: Sandbox) -> None:
    inside(sb, "mkdir -p d/e; echo 1 >d/e/f; echo 22 >d/g; ln -s /etc d/link; mkfifo d/fifo; touch top")
    python(sb, "import socket; socket.socket(socket.AF_UNIX).bind('d/sock')")
    found = {info.name: info for info in sb.files.list("d")}
    assert {name: info.type for name, info in found.items()} == {
        "e": "directory", "g": "file", "link": "symlink", "fifo": "fifo", "sock": "socket",
    }  # fmt: skip
    assert found["link"].target == "/etc"
    assert found["g"] == sb.files.stat("d/g")
    assert (found["g"].path, found["g"].size, found["g"].uid) == ("/workspace/d/g", 3, 1000)
    assert [info.name for info in sb.files.list()] == ["d", "top"]
    deep = [info.name for info in sb.files.list(depth=3)]
    assert deep == ["d", "d/e", "d/e/f", "d/fifo", "d/g", "d/link", "d/sock", "top"]
    assert [info.name for info in sb.files.list(depth=2)] == [name for name in deep if name != "d/e/f"]
    assert {info.type for info in sb.files.list("/dev")} >= {"char", "symlink", "directory"}
    with pytest.raises(NotADirectoryError):
        sb.files.list("top")
    with pytest.raises(ValueError):
        sb.files.list(depth=0)


def test_stat_and_exists(sb: Sandbox) -> None:
    inside(
        sb,
        "echo abc >f; chmod 640 f; touch -d @12345.5 f; ln -s f link; ln -s gone dangling; ln -s loop loop",
    )
    info = sb.files.stat("f")
    assert info == FileInfo("/workspace/f", "f", "file", 4, 0o640, 1000, 1000, 12345.5)
    assert sb.files.stat("link").type == "file"
    assert sb.files.stat("link", follow=False).target == "f"
    assert sb.files.stat("/").name == "/"
    assert sb.files.stat("/dev/null").type == "char"
    assert (sb.files.stat("/usr").uid, sb.files.stat("/usr/bin").gid) == (65534, 65534)
    assert all(map(sb.files.exists, ("f", "link", ".", "/dev/null")))
    assert not any(map(sb.files.exists, ("gone", "dangling", "f/x", "loop", "x" * 300)))
    assert sb.files.exists("dangling", follow=False)
    with pytest.raises(OSError) as caught:
        sb.files.stat("loop")
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, "/workspace/loop")


def test_owner_as_inside() -> None:
    with Sandbox(Spec(user="4321:8765")) as sb:
        sb.files.write("f", "")
        sb.files.mkdir("d")
        seen = inside(sb, "stat -c '%u %g' f d")
        assert seen == "4321 8765\n4321 8765\n"
        assert {(info.uid, info.gid) for info in sb.files.list()} == {(4321, 8765)}


def test_ids_of_every_kind_of_host() -> None:
    def ids(host: HostFeatures, *outer: int) -> list[int]:
        operations = Operations(Spec(user="1000"), host)
        return [operations._inside(number, host.uid, 1000, host.subuid) for number in outer]

    root = HostFeatures("root", 0, 0, 500000, 6)
    assert ids(root, 0, 499999, 500000, 501000, 565535, 565536) == [65534, 65534, 0, 1000, 65535, 65534]
    alone = HostFeatures("rootless", 77, 77, 0, 6)
    assert ids(alone, 77, 0, 1000) == [1000, 65534, 65534]
    spare = HostFeatures("subuid", 77, 77, 0, 6, (100000, 65535), (100000, 65535))
    assert ids(spare, 77, 100000, 100999, 101000, 165534, 165535, 0) == [
        1000, 0, 999, 1001, 65535, 65534, 65534,
    ]  # fmt: skip


# --- changing ---------------------------------------------------------------------------------------


def test_mkdir(sb: Sandbox) -> None:
    sb.files.mkdir("d", mode=0o1770)
    assert inside(sb, "stat -c '%a %u' d") == "1770 1000\n"
    with pytest.raises(FileExistsError):
        sb.files.mkdir("d")
    sb.files.mkdir("d", exist_ok=True)
    sb.files.mkdir("a/./b//c/", parents=True)
    sb.files.mkdir("a/b/c/../../x", parents=True)
    sb.files.mkdir("/", exist_ok=True)
    sb.files.mkdir("a/b", parents=True, exist_ok=True)
    assert set(tree_of(sb, "a")) == {"b", "b/c", "x"}
    with pytest.raises(FileNotFoundError):
        sb.files.mkdir("no/such")
    sb.files.write("file", "")
    with pytest.raises(FileExistsError):
        sb.files.mkdir("file", exist_ok=True)
    with pytest.raises(NotADirectoryError):
        sb.files.mkdir("file/x/y", parents=True)
    inside(sb, "ln -s a link")
    sb.files.mkdir("link/through/it", parents=True)
    assert sb.files.exists("a/through/it")


def test_remove(sb: Sandbox) -> None:
    inside(sb, "mkdir -p empty full/sub; touch f full/sub/f; ln -s full link; mkfifo fifo")
    for name in ("f", "empty", "link", "fifo"):
        sb.files.remove(name)
    assert set(tree_of(sb, ".")) == {"full", "full/sub", "full/sub/f"}
    with pytest.raises(OSError) as caught:
        sb.files.remove("full")
    assert caught.value.errno == errno.ENOTEMPTY
    sb.files.remove("full", recursive=True)
    with pytest.raises(FileNotFoundError):
        sb.files.remove("full", recursive=True)
    sb.files.remove("full", recursive=True, missing_ok=True)
    sb.files.remove("full", missing_ok=True)
    assert tree_of(sb, ".") == {}


def test_remove_refuses_what_is_no_entry(sb: Sandbox) -> None:
    sb.files.write("keep", "")
    sb.files.mkdir("d")
    for name in ("/", "d/..", "."):
        with pytest.raises(OSError) as caught:
            sb.files.remove(name, recursive=True)
        assert caught.value.errno in (errno.EBUSY, errno.EINVAL, errno.EACCES, errno.EROFS)
    with pytest.raises(FileNotFoundError):
        sb.files.remove("", recursive=True)
    assert sb.files.exists("keep")


def test_remove_tree_never_follows_links(sb: Sandbox) -> None:
    inside(sb, "mkdir keep tree; touch keep/f; ln -s ../keep tree/link; ln -s /workspace/keep tree/other")
    inside(sb, "ln -s keep top")
    sb.files.remove("tree", recursive=True)
    sb.files.remove("top", recursive=True)
    assert tree_of(sb, ".") == {"keep": "directory", "keep/f": "file"}


def test_remove_a_deep_tree(sb: Sandbox) -> None:
    python(sb, DEEP)
    sb.files.remove("deep", recursive=True)
    assert tree_of(sb, ".") == {}
    assert sb.files.list() == []


def test_remove_a_wide_tree(sb: Sandbox) -> None:
    python(sb, "import os\nfor i in range(3000):\n os.makedirs(f'wide/{i}/x'); open(f'wide/{i}/f','w')")
    sb.files.remove("wide", recursive=True)
    assert tree_of(sb, ".") == {}


def test_remove_what_one_may_not(sb: Sandbox) -> None:
    inside(sb, "mkdir -p locked/in; touch locked/in/f; chmod 500 locked/in")
    with pytest.raises(PermissionError):
        sb.files.remove("locked", recursive=True)
    sb.files.chmod("locked/in", 0o700)
    sb.files.remove("locked", recursive=True)


def test_rename_and_symlink(sb: Sandbox) -> None:
    sb.files.write("a", "1")
    sb.files.write("b", "2")
    sb.files.rename("a", "b")
    assert sb.files.read("b") == b"1"
    assert not sb.files.exists("a")
    with pytest.raises(FileNotFoundError) as caught:
        sb.files.rename("a", "c")
    assert (caught.value.filename, caught.value.filename2) == ("/workspace/a", "/workspace/c")
    sb.files.symlink("b", "link")
    assert inside(sb, "readlink link; cat link") == "b\n1"
    with pytest.raises(FileExistsError) as caught:
        sb.files.symlink("x", "link")
    assert caught.value.filename == "/workspace/link"
    sb.files.rename("link", "moved")
    assert sb.files.stat("moved", follow=False).type == "symlink"


def test_chmod(sb: Sandbox) -> None:
    inside(sb, "touch f; ln -s f link; mkdir d")
    sb.files.chmod("f", 0)
    sb.files.chmod("d", 0o1711)
    assert inside(sb, "stat -c %a f d") == "0\n1711\n"
    with pytest.raises(PermissionError):
        sb.files.read("f")
    sb.files.chmod("link", 0o640)
    assert inside(sb, "stat -c %a f") == "640\n"
    with pytest.raises(OSError) as caught:
        sb.files.chmod("/etc/passwd", 0o600)
    assert caught.value.errno in (errno.EPERM, errno.EROFS)
    with pytest.raises(ValueError):
        sb.files.chmod("f", 0o4755)


# --- names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["new\nline", os.fsdecode(b"\xff\xfe\x80"), "x" * 255, "-rf", " ", "\N{SNOWMAN}", "a:b\\c"]
)
def test_odd_names(sb: Sandbox, tmp_path: Path, name: str) -> None:
    sb.files.write(f"d/{name}", name.encode(errors="surrogateescape"))
    assert [info.name for info in sb.files.list("d")] == [name]
    sb.files.copy_out("d", tmp_path / "out")
    assert os.listdir(tmp_path / "out") == [name]
    sb.files.copy_in(tmp_path / "out", "in")
    sb.files.untar(sb.files.tar("in"), "again")
    assert [info.name for info in sb.files.list("again")] == [name]
    assert sb.files.read(f"again/{name}") == name.encode(errors="surrogateescape")
    sb.files.remove(f"d/{name}")


def test_impossible_names(sb: Sandbox) -> None:
    for name in ("x" * 256, "x/" * 2500, "/" + "y" * 5000):
        with pytest.raises(OSError) as caught:
            sb.files.write(name, "")
        assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(ValueError, match="null byte"):
        sb.files.read("a\0b")
    with pytest.raises(FileNotFoundError):
        sb.files.read("")
    assert sb.files.list() == []


# --- kinds of errors --------------------------------------------------------------------------------


def test_errors_of_the_builtin_kinds(sb: Sandbox) -> None:
    inside(sb, "mkdir d; touch f; chmod 0 f; mkfifo fifo")
    python(sb, "import socket; socket.socket(socket.AF_UNIX).bind('sock')")
    sb.files.exists("f")
    before = open_fds()
    for error, number, action in (
        (FileNotFoundError, errno.ENOENT, lambda: sb.files.read("gone")),
        (IsADirectoryError, errno.EISDIR, lambda: sb.files.read("d")),
        (IsADirectoryError, errno.EISDIR, lambda: sb.files.write("d", "")),
        (PermissionError, errno.EACCES, lambda: sb.files.read("f")),
        (NotADirectoryError, errno.ENOTDIR, lambda: sb.files.read("f/x")),
        (OSError, errno.EROFS, lambda: sb.files.write("/usr/x", "")),
        (OSError, errno.EINVAL, lambda: sb.files.read("fifo")),
        (OSError, errno.ENXIO, lambda: sb.files.write("fifo", "")),
        (OSError, errno.ENXIO, lambda: sb.files.read("sock")),
        (OSError, errno.EINVAL, lambda: sb.files.read("/dev/zero")),
        (OSError, errno.EINVAL, lambda: sb.files.write("/dev/null", "x")),
        (PermissionError, errno.EACCES, lambda: sb.files.write("/proc/self/environ", "x")),
    ):
        with pytest.raises(error) as caught:
            action()
        assert caught.value.errno == number
        assert caught.value.filename.startswith("/")
    assert os.listdir("/proc/self/fd") == before


def test_disk_limit(tmp_path: Path) -> None:
    with Sandbox(Spec(limits=sandboxcore.Limits(disk="2M", inodes=64))) as sb:
        with pytest.raises(OSError) as caught:
            sb.files.write("big", bytes(4 << 20))
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/workspace/big")
        (tmp_path / "big").write_bytes(bytes(4 << 20))
        with pytest.raises(OSError) as caught:
            sb.files.copy_in(tmp_path / "big", "copy")
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError) as caught:
            sb.files.write_many({f"f{number}": "" for number in range(100)})
        assert caught.value.errno == errno.ENOSPC
        for info in sb.files.list():
            sb.files.remove(info.name)
        sb.files.write("small", "fits")


def test_granted_and_denied(tmp_path: Path) -> None:
    for name in ("rw", "ro"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / name / "file").chmod(0o666)
        (tmp_path / name).chmod(0o777)
    tmp_path.chmod(0o755)
    spec = Spec(
        rw=[(tmp_path / "rw", "/rw")], ro=[(tmp_path / "ro", "/ro")], deny=["/etc/passwd", "/usr/share"]
    )
    with Sandbox(spec) as sb:
        sb.files.write("/rw/new", "from inside", mode=0o640)
        st = (tmp_path / "rw/new").stat()
        assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (os.geteuid(), os.getegid(), 0o640)
        assert sb.files.stat("/rw/new").uid == 1000
        assert sb.files.read("/ro/file") == b"ro"
        for action in (
            lambda: sb.files.write("/ro/file", ""),
            lambda: sb.files.mkdir("/ro/d"),
            lambda: sb.files.remove("/ro/file"),
        ):
            with pytest.raises(OSError) as caught:
                action()
            assert caught.value.errno == errno.EROFS
        with pytest.raises(PermissionError):
            sb.files.read("/etc/passwd")
        with pytest.raises(PermissionError):
            sb.files.list("/usr/share")


def test_what_is_mounted_is_not_part_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("stays")
    with Sandbox(Spec(rw=[(tmp_path, "/workspace/tree/granted")], user="0")) as sb:
        for path in ("tree/granted", "tree"):
            with pytest.raises(OSError) as caught:
                sb.files.remove(path, recursive=True)
            assert caught.value.errno == errno.EBUSY
        assert (tmp_path / "file").read_text() == "stays"
        sb.files.remove("tree/granted/file")
        assert os.listdir(tmp_path) == []


# --- trees ------------------------------------------------------------------------------------------


@pytest.fixture
def host_tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "sub/empty").mkdir(parents=True)
    (top / "sub/script").write_text("#!/bin/sh\necho from the script\n")
    (top / "sub/script").chmod(0o755)
    (top / "data").write_bytes(bytes(range(256)) * 1000)
    (top / "private").mkdir(mode=0o500)
    (top / "sub/link").symlink_to("../data")
    return top


def test_copy_in_and_out(sb: Sandbox, host_tree: Path, tmp_path: Path) -> None:
    sb.files.copy_in(host_tree, "a/copy", symlinks=True)
    assert inside(sb, "cd a/copy; sub/script; readlink sub/link; stat -c '%a %u' private data") == (
        "from the script\n../data\n500 1000\n644 1000\n"
    )
    out = tmp_path / "out"
    sb.files.copy_out("a/copy", out, symlinks=True)
    for path in (host_tree, *sorted(host_tree.rglob("*"))):
        copy = out / path.relative_to(host_tree)
        assert copy.lstat().st_mode == path.lstat().st_mode, copy
        if path.is_file():
            assert copy.read_bytes() == path.read_bytes()
    assert os.readlink(out / "sub/link") == "../data"
    assert out.stat().st_uid == os.geteuid()


def test_copy_one_file(sb: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("content")
    sb.files.copy_in(tmp_path / "f", "new/name")
    sb.files.copy_out("new/name", tmp_path / "g")
    assert (tmp_path / "g").read_text() == "content"
    with pytest.raises(FileExistsError):
        sb.files.copy_out("new/name", tmp_path / "g")
    with pytest.raises(FileExistsError):
        sb.files.copy_in(tmp_path / "f", "new/name", overwrite=False)
    sb.files.write("new/name", "newer", mode=0o4755 & 0o755)
    sb.files.copy_out("new/name", tmp_path / "g", overwrite=True)
    assert (tmp_path / "g").read_text() == "newer"
    assert (tmp_path / "g").stat().st_mode & 0o7777 == 0o755
    with pytest.raises(IsADirectoryError):
        sb.files.copy_out("new/name", tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError):
        sb.files.copy_out("gone", tmp_path / "h")
    with pytest.raises(FileNotFoundError):
        sb.files.copy_out("new/name", tmp_path / "no/such/place")
    assert sorted(os.listdir(tmp_path)) == ["f", "g"], "no temporary file is left"


def test_links_are_copied_only_when_asked(sb: Sandbox, host_tree: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="symlink is not copied") as caught:
        sb.files.copy_in(host_tree, "copy")
    assert caught.value.errno == errno.EINVAL
    sb.files.copy_in(host_tree, "copy", skip=True)
    assert "sub/link" not in tree_of(sb, "copy")
    sb.files.symlink("data", "copy/link")
    with pytest.raises(OSError, match="symlink is not copied"):
        sb.files.copy_out("copy", tmp_path / "out")
    sb.files.copy_out("copy", tmp_path / "skipped", skip=True)
    assert not os.path.lexists(tmp_path / "skipped/link")


def test_a_hole_stays_a_hole(sb: Sandbox, tmp_path: Path) -> None:
    """Else a payload of few bytes fills the disk of whoever collects its files."""
    inside(sb, "truncate -s 100G bomb; printf x | dd of=bomb bs=1 seek=1000000 conv=notrunc status=none")
    sb.files.copy_out("bomb", tmp_path / "bomb")
    st = (tmp_path / "bomb").stat()
    assert st.st_size == 100 << 30
    assert st.st_blocks * 512 < 1 << 20
    with open(tmp_path / "bomb", "rb") as file:
        assert os.pread(file.fileno(), 3, 999999) == b"\0x\0"
    sb.files.copy_in(tmp_path / "bomb", "back")
    assert sb.files.read("back", offset=999999, size=3) == b"\0x\0"
    with pytest.raises(OSError, match="holes") as caught:
        sb.files.tar("bomb", io.BytesIO())
    assert caught.value.errno == errno.EFBIG


@pytest.mark.skipif("SBX_SANITIZE" in os.environ, reason="AddressSanitizer keeps what is freed")
def test_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    code = """
        import hashlib, os, re, sys
        from pathlib import Path
        from sandboxcore import Sandbox

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

        folder, size = Path(sys.argv[1]), 256 << 20
        block, digest = os.urandom(1 << 20), hashlib.blake2b()
        with open(folder / "big", "wb") as file:
            for _ in range(size >> 20):
                file.write(block)
                digest.update(block)

        def check(file):
            found = hashlib.file_digest(file, "blake2b")
            assert found.digest() == digest.digest()

        with Sandbox() as sb:
            sb.files.write("warm", "up")
            sb.files.copy_in(folder / "big", "probe")
            sb.files.remove("probe")
            before = peak()
            with open(folder / "big", "rb") as file:
                assert sb.files.write("big", file) == size
            with sb.files.open("big") as file:
                check(file)
            sb.files.copy_out("big", folder / "out")
            with open(folder / "out", "rb") as file:
                check(file)
            with open(os.devnull, "wb") as null:
                sb.files.tar("big", null)
            print(before, peak() - before)
    """
    done = host_program(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    before, more = map(int, done.stdout.split())
    assert before < 128
    assert more < 16


def test_tar(sb: Sandbox, host_tree: Path) -> None:
    sb.files.copy_in(host_tree, "tree", symlinks=True)
    with tarfile.open(fileobj=io.BytesIO(sb.files.tar("tree"))) as archive:
        members = {member.name: member for member in archive}
        assert set(members) == {"data", "private", "sub", "sub/empty", "sub/script", "sub/link"}
        assert (members["sub/script"].mode, members["data"].uid) == (0o755, 1000)
        assert members["sub/link"].linkname == "../data"
        content = archive.extractfile("data")
        assert content is not None
        assert content.read() == (host_tree / "data").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(sb.files.tar("tree/data"))) as archive:
        assert archive.getnames() == ["data"]
    inside(sb, "mkfifo tree/fifo")
    with pytest.raises(OSError, match="fifo"):
        sb.files.tar("tree")
    stream = io.BytesIO()
    sb.files.tar("tree", stream, skip=True)
    assert stream.getvalue()[-1024:] == bytes(1024)


@pytest.mark.parametrize("kind", ["w", "w:gz", "w:xz"])
def test_untar(sb: Sandbox, host_tree: Path, kind: str) -> None:
    stream = io.BytesIO()
    os.link(host_tree / "data", host_tree / "twin")
    with tarfile.open(fileobj=stream, mode=kind) as archive:  # type: ignore[call-overload]
        archive.add(host_tree, ".")
    sb.files.write("x/sub/script", "old")
    sb.files.symlink("/etc/passwd", "x/data")
    sb.files.untar(stream.getvalue(), "x")
    assert inside(sb, "cd x; sub/script; cmp data twin; stat -c '%a %F' data private; readlink sub/link") == (
        "from the script\n644 regular file\n500 directory\n../data\n"
    )
    stream.seek(0)
    sb.files.untar(stream)
    assert sb.files.stat("data").size == 256000


# --- life -------------------------------------------------------------------------------------------


def test_states() -> None:
    sb = Sandbox()
    with pytest.raises(InvalidTransition, match="while created"):
        sb.files.read("f")
    with sb:
        files = sb.files
        files.write("f", "")
        sb.suspend()
        with pytest.raises(InvalidTransition, match="while paused"):
            files.read("f")
        sb.resume()
        assert files.read("f") == b""
        sb.stop()
        with pytest.raises(InvalidTransition, match="while stopped"):
            files.read("f")
        sb.start()
        assert not files.exists("f")
    with pytest.raises(InvalidTransition, match="while destroyed"):
        files.read("f")


def kill_and_wait(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(gone(pid) for pid in pids), "their end")


def test_a_sandbox_killed_from_outside() -> None:
    with Sandbox() as sb:
        sb.files.write("f", "")
        kill_and_wait(sb.pid)
        with pytest.raises(SandboxGone):
            sb.files.read("f")
        with pytest.raises(InvalidTransition):
            sb.files.read("f")


def servers(sb: Sandbox) -> list[int]:
    """The processes that have the file server's socket: it is the only launcher with a borrowed identity,
    or where there is but one id, any of them."""
    children = Path(f"/proc/{sb.pid}/task/{sb.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def test_a_server_that_is_killed(sb: Sandbox) -> None:
    sb.files.write("f", "1")
    kill_and_wait(*servers(sb))
    assert sb.files.read("f") == b"1"
    kill_and_wait(*servers(sb))
    sb.files.write("f", "2")
    assert sb.files.read("f") == b"2"


def test_a_server_that_dies_during_a_change(sb: Sandbox) -> None:
    """Whether it was made is not known, so it is not made again."""
    python(sb, "import os\nfor i in range(20000):\n os.makedirs(f'wide/{i}')")
    sb.files.exists("wide")
    caught: list[BaseException] = []

    def remove() -> None:
        try:
            sb.files.remove("wide", recursive=True)
        except BaseException as error:
            caught.append(error)

    names = len(sb.files.list("wide"))
    thread = threading.Thread(target=remove)
    thread.start()
    wait_until(lambda: int(inside(sb, "ls wide | wc -l")) < names, "the removal's begin")
    kill_and_wait(*servers(sb))
    thread.join(timeout=30)
    assert not thread.is_alive()
    if caught:  # else it was faster
        assert isinstance(caught[0], ConnectionError)
        assert "file server was killed" in str(caught[0])
    sb.files.remove("wide", recursive=True, missing_ok=True)


def test_many_threads(sb: Sandbox) -> None:
    def work(number: int) -> None:
        for turn in range(20):
            name = f"t{number}/{turn}"
            sb.files.write(name, f"{number} {turn}")
            assert sb.files.read(name, text=True) == f"{number} {turn}"
            assert sb.files.stat(name).name == str(turn)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(sb.files.list(depth=2)) == 8 + 160


def test_nothing_is_left() -> None:
    with Sandbox() as sb:
        sb.files.write("warm", "up")
    with leaves_nothing():
        for _ in range(3):
            with Sandbox() as sb:
                sb.files.write("f", "x")
                sb.files.list()
                with pytest.raises(OSError):
                    sb.files.copy_out("/dev/null", "/nowhere/at/all")
            dropped = Sandbox.create()
            dropped.files.write("f", "x")
            del dropped


def test_a_policy_of_ones_own() -> None:
    """Where init and launchers cannot live behind the filter, the file server is without it."""
    minimal = PROFILES["minimal"]
    policy = replace(minimal, name="own", allow=minimal.allow - {"openat2", "fstatfs"})
    assert not hosts_launcher(policy)
    assert hosts_launcher(minimal)
    with Sandbox(Spec(seccomp=policy)) as sb:
        sb.files.write("a/b", "x")
        assert sb.files.read("a/b") == b"x"
    with Sandbox(Spec(seccomp="minimal")) as sb:
        sb.files.write("a/b", "x")
        sb.files.symlink("b", "a/link")
        sb.files.chmod("a/link", 0o600)
        sb.files.rename("a", "c")
        sb.files.remove("c", recursive=True)
        assert sb.files.list() == []


# --- the protocol -----------------------------------------------------------------------------------

HEAD = (0x52584253).to_bytes(4, "little")


def word(number: int) -> bytes:
    return number.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("datagram", "number"),
    [
        (b"x", errno.EPROTO),
        (HEAD, errno.EPROTO),
        (HEAD + word(1) + word(0) + word(0), errno.EPROTO),
        (word(7) + word(1) + word(0) + word(0) + b"/\0", errno.EPROTO),
        (HEAD + word(1) + word(0) + word(0) + b"/", errno.EPROTO),
        (HEAD + word(1) + word(0) + word(0) + b"/\0/\0", errno.EPROTO),
        (HEAD + word(6) + word(0) + word(0) + b"/a\0", errno.EPROTO),
        (HEAD + word(6) + word(0) + word(0) + b"/a\0/b\0/c\0", errno.EPROTO),
        (HEAD + word(0) + word(0) + word(0) + b"/\0", errno.EINVAL),
        (HEAD + word(99) + word(0) + word(0) + b"/\0", errno.EINVAL),
        (HEAD + word(1) + word(os.O_DIRECT) + word(0) + b"/\0", errno.EINVAL),
        (HEAD + word(1) + word(os.O_TMPFILE | os.O_RDWR) + word(0o600) + b"/tmp\0", errno.EINVAL),
        (HEAD + word(1) + word(os.O_CREAT | os.O_RDWR) + word(0o4755) + b"/tmp/x\0", errno.EINVAL),
        (HEAD + word(2) + word(8) + word(0) + b"/tmp/x\0", errno.EINVAL),
        (HEAD + word(3) + word(1) + word(0) + b"/tmp/x\0", errno.EINVAL),
        (HEAD + word(8) + word(0) + word(0o6755) + b"/tmp\0", errno.EINVAL),
        (HEAD + word(1) + word(0) + word(0) + b"x" * 4096 + b"\0", errno.ENAMETOOLONG),
        (HEAD + word(1) + word(0) + word(0) + b"x" * 20000 + b"\0", errno.EMSGSIZE),
    ],
)  # fmt: skip
def test_malformed_requests(sb: Sandbox, datagram: bytes, number: int) -> None:
    """Each is answered, and the next good one, too."""
    sb.files.exists("/")
    connection = sb._file_server._socket
    assert connection is not None

    connection.settimeout(10)
    socket.send_fds(connection, [datagram], [])
    connection.recv(1, socket.MSG_PEEK)
    record = _native.receive(connection.fileno())
    assert record is not None
    assert record.error is not None
    assert (record.kind, record.error.errno, record.fd) == ("DONE", number, -1)
    connection.settimeout(None)
    assert sb.files.exists("/workspace")


def test_too_many_descriptors(sb: Sandbox) -> None:
    sb.files.exists("/")
    connection = sb._file_server._socket
    assert connection is not None
    with open(os.devnull) as file:
        socket.send_fds(connection, [HEAD + word(1) + word(0) + word(0) + b"/\0"], [file.fileno()] * 3)
        connection.settimeout(10)
        connection.recv(1, socket.MSG_PEEK)
        record = _native.receive(connection.fileno())
        connection.settimeout(None)
    assert record is not None
    assert record.error is not None
    assert record.error.errno == errno.EMFILE
    assert sb.files.exists("/workspace")
