"""Overlays: what is written stays inside and ends with the sandbox; layers of a root file system."""

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import IS_ROOT, Spec, ask_python, host_environment, leaves_nothing, run_python, shell, snapshot

import sandboxcore
from sandboxcore import Limits, Mount, Sandbox, SetupError, SpecError, UnsupportedHost, host

pytestmark = pytest.mark.usefixtures("overlays")

OWNER = (12345, 12346) if IS_ROOT else (os.getuid(), os.getgid())


def give(tree: Path) -> None:
    """Make everything in it somebody's who is neither root nor, as root, this user."""
    for path in (tree, *tree.rglob("*")):
        os.chown(path, *OWNER, follow_symlinks=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory of the host with one of everything, of an ordinary user."""
    path = tmp_path / "source"
    (path / "dir/sub").mkdir(parents=True)
    (path / "file").write_text("content\n")
    (path / "dir/deep").write_text("deep\n")
    (path / "dir/sub/deeper").write_text("deeper\n")
    (path / "link").symlink_to("file")
    os.link(path / "file", path / "hard")
    os.mkfifo(path / "fifo")
    (path / "private").write_text("private\n")
    (path / "private").chmod(0o600)
    path.chmod(0o750)
    give(path)
    return path


@contextmanager
def unharmed(*trees: Path) -> Iterator[None]:
    before = [snapshot(tree) for tree in trees]
    yield
    assert [snapshot(tree) for tree in trees] == before


# --- a directory of the host ------------------------------------------------------------------------

CHANGES = {
    "append": ("echo more >> file; cat file", "content\nmore\n"),
    "truncate": (": > file; stat -c %s file", "0\n"),
    "remove": ("rm file link hard fifo; ls", "dir\nprivate\n"),
    "remove a tree": ("rm -r dir; ls -d dir 2>&1 | wc -l; mkdir dir; ls -A dir | wc -l", "1\n0\n"),
    "rename": ("mv file other; cat other; ls file 2>&1 | wc -l", "content\n1\n"),
    "rename a directory": ("mv dir moved; cat moved/sub/deeper; ls dir 2>&1 | wc -l", "deeper\n1\n"),
    "replace by another kind": (
        "rm -r dir; echo x > dir; rm file; mkdir file; cat dir; ls -d file",
        "x\nfile\n",
    ),
    "mode": ("chmod 4711 file; stat -c %a file", "4711\n"),
    "times": ("touch -d @5 file; stat -c %Y file", "5\n"),
    "link": ("ln private p; echo y >> p; cat private", "private\ny\n"),
    "of its own": ("mkdir -p a/b; echo z > a/b/c; cat a/b/c; rm -r a; ls -d a 2>&1 | wc -l", "z\n1\n"),
    "the root": ("chmod 700 .; touch -d @7 .; stat -c '%a %Y' .", "700 7\n"),
    "through a link": ("echo w > link; cat file", "w\n"),
}


@pytest.mark.parametrize("script", CHANGES)
@pytest.mark.parametrize("user", [None, 0, "7:8"])
def test_what_is_written_stays_inside(source: Path, script: str, user: int | str | None) -> None:
    spec = Spec(overlay=[(source, "/data")], workdir="/data", user=user)
    with unharmed(source):
        done = shell(CHANGES[script][0], spec=spec)
        assert (done.stdout.decode(), done.stderr) == (CHANGES[script][1], b"")
        again = shell("cat file; ls", spec=spec)
        assert again.stdout == b"content\ndir\nfifo\nfile\nhard\nlink\nprivate\n"


@pytest.mark.parametrize("user", [None, 0, "7:8"])
def test_the_payload_stands_for_the_owner(source: Path, user: int | str | None) -> None:
    """Mode 0750 and 0600 are no obstacle, and what it makes is its own."""
    done = shell(
        "cat private; touch new; stat -c %u:%g . private new dir/sub",
        spec=Spec(overlay=[(source, "/data")], workdir="/data", user=user),
    )
    inside = {None: "1000:1000", 0: "0:0", "7:8": "7:8"}[user]
    assert (done.stdout.decode(), done.stderr) == ("private\n" + f"{inside}\n" * 4, b"")


@pytest.mark.needs_root
@pytest.mark.parametrize("user", [None, 0])
def test_files_of_others_are_no_more_open_than_outside(source: Path, user: int | None) -> None:
    (source / "others").write_text("public\n")
    (source / "secret").write_text("secret\n")
    os.chown(source / "others", 0, 0)
    os.chown(source / "secret", 0, 0)
    (source / "secret").chmod(0o600)
    code = """
    found = []
    for path in ("others", "secret"):
        for flags in (os.O_RDONLY, os.O_RDWR):
            try:
                found.append(os.read(os.open(path, flags), 99).decode())
            except OSError as error:
                found.append(error.errno)
        try:
            os.unlink(path)
        except OSError as error:
            found.append(error.errno)
    print(json.dumps(found))
    """
    with unharmed(source):
        found = ask_python(code, spec=Spec(overlay=[(source, "/data")], workdir="/data", user=user))
    assert found[0] == "public\n"
    assert found[1] in (errno.EOVERFLOW, errno.EACCES, errno.EPERM)
    assert found[3:5] == [errno.EACCES] * 2
    assert {found[2], found[5]} <= {errno.EOVERFLOW, errno.EPERM}


def test_shared_mappings_and_descriptors(source: Path) -> None:
    code = """
    import mmap
    reader = os.open("file", os.O_RDONLY)
    writer = os.open("file", os.O_RDWR)
    with mmap.mmap(writer, 0) as shared:
        shared[:4] = b"CONT"
        shared.flush()
    again = os.open(f"/proc/self/fd/{reader}", os.O_RDWR)
    os.pwrite(again, b"!", 7)
    os.ftruncate(writer, 8)
    print(json.dumps([os.pread(writer, 99, 0).decode(), open("file").read()]))
    """
    with unharmed(source):
        found = ask_python(code, spec=Spec(overlay=[(source, "/data")], workdir="/data"))
    assert found == ["CONTent!"] * 2


def test_several_and_nested(source: Path, tmp_path: Path) -> None:
    """In any order; a file below an overlay's mount points, a bind, a tmpfs."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "o").write_text("other\n")
    give(other)
    mounts = [
        Mount(kind="bind", source=str(other), target="/a/dir/ro"),
        Mount(kind="overlay", source=str(source), target="/a"),
        Mount(kind="overlay", source=str(other), target="/a/dir/sub"),
        Mount(kind="tmpfs", target="/a/dir/sub/t"),
        Mount(kind="overlay", source=str(other), target="/workspace/deep/there"),
    ]
    script = """
    cat /a/dir/sub/o /a/dir/ro/o /workspace/deep/there/o
    echo 1 > /a/1; echo 2 > /a/dir/sub/2; echo 3 > /a/dir/sub/t/3; echo 4 > /workspace/deep/there/4
    cat /a/1 /a/dir/sub/2 /a/dir/sub/t/3 /workspace/deep/there/4; ls /a/dir; ls /a/dir/sub
    echo x > /a/dir/ro/x
    """
    with unharmed(source, other):
        for order in (mounts, mounts[::-1]):
            done = shell(script, spec=Spec(mounts=order))
            assert done.stdout == b"other\n" * 3 + b"1\n2\n3\n4\ndeep\nro\nsub\n2\no\nt\n"
            assert done.stderr.count(b"Read-only file system") == 1


def test_deny_below_an_overlay(source: Path) -> None:
    spec = Spec(
        overlay=[(source, "/data")], deny=["/data/dir", "/data/private", "/data/none"], workdir="/data"
    )
    done = shell("ls dir; cat private; echo x > private; rm private; rm -r dir; touch none; ls", spec=spec)
    assert done.stdout == b"dir\nfifo\nfile\nhard\nlink\nnone\nprivate\n"
    with pytest.raises(SpecError, match="symbolic link"):
        shell("true", spec=spec.replace(deny=["/data/link"]))


def test_flags(source: Path) -> None:
    found = sandboxcore.run(["true"], spec=Spec(overlay=[(source, "/data")]), record=True).capabilities
    assert found is not None
    (mount,) = (mount for mount in found.mounts if mount.target == "/data")
    assert mount.fstype == "overlay"
    assert {"rw", "nosuid", "nodev"} <= set(mount.options)


def test_what_is_written_counts_against_the_limits(source: Path) -> None:
    """Bytes and files, with what is copied up, of all overlays and private directories together."""
    (source / "large").write_bytes(bytes(3 << 20))
    give(source)
    code = """
    def attempt(action):
        try:
            action()
        except OSError as error:
            return error.errno
    def fill(path):
        with open(path, "wb", buffering=0) as file:
            for _ in range(64):
                file.write(bytes(65536))
    def many():
        for n in range(500):
            os.mkdir(f"/tmp/{n}" if n % 2 else f"d{n}")
    found = [attempt(lambda: open("large", "r+b")), attempt(lambda: fill("new"))]
    os.unlink("new")
    print(json.dumps([*found, attempt(lambda: fill("/tmp/new")), attempt(many)]))
    """
    spec = Spec(overlay=[(source, "/data")], workdir="/data", limits=Limits(disk="2M", inodes=300))
    with unharmed(source):
        assert ask_python(code, spec=spec) == [errno.ENOSPC] * 4


def test_a_living_sandbox_keeps_it(source: Path) -> None:
    with unharmed(source), Sandbox(Spec(overlay=[(source, "/data")], workdir="/data")) as sandbox:
        assert sandbox.shell("echo one > new; rm file").ok
        assert sandbox.files.read("/data/new") == b"one\n"
        sandbox.files.write("/data/dir/deep", b"from outside")
        assert sandbox.shell("cat new dir/deep; ls file").stdout == b"one\nfrom outside"
        sandbox.stop()
        sandbox.start()
        assert sandbox.shell("ls new; cat file").stdout == b"content\n"


def test_sandboxes_see_nothing_of_each_other(source: Path) -> None:
    failures: list[object] = []

    def work(n: int) -> None:
        for _ in range(5):
            done = shell(
                f"echo {n} > mine; ls; cat mine", spec=Spec(overlay=[(source, "/data")], workdir="/data")
            )
            if done.stdout != f"dir\nfifo\nfile\nhard\nlink\nmine\nprivate\n{n}\n".encode():
                failures.append(done)

    with unharmed(source), leaves_nothing():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_a_source_that_is_replaced(source: Path) -> None:
    """The next sandbox sees the new one."""
    spec = Spec(overlay=[(source, "/data")])
    assert shell("cat /data/file", spec=spec).stdout == b"content\n"
    source.rename(source.with_name("old"))
    source.mkdir()
    (source / "file").write_text("another\n")
    give(source)
    assert shell("cat /data/file", spec=spec).stdout == b"another\n"


def test_a_change_outside_is_seen_by_the_next(source: Path) -> None:
    spec = Spec(overlay=[(source, "/data")])
    assert shell("cat /data/file", spec=spec).stdout == b"content\n"
    (source / "file").write_text("changed\n")
    assert shell("cat /data/file", spec=spec).stdout == b"changed\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlay": [("/etc/passwd", "/x")]}, "no directory"),
        ({"overlay": [("/no/such", "/x")]}, "No such file"),
        ({"rootfs": ["/no/such"]}, "not a directory"),
        ({"rootfs": "/", "writable": True}, "no image"),
    ],
)
def test_wrong_sources(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        shell("true", spec=Spec(**options))  # type: ignore[arg-type]


def test_no_place_to_mount_it(source: Path) -> None:
    with pytest.raises(SetupError) as caught:
        shell("true", spec=Spec(overlay=[(source, "/usr/no/such")]))
    assert (caught.value.stage, caught.value.errno) == ("mount", errno.ENOENT)
    assert "spec overlay" in str(caught.value)


def test_an_old_kernel(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    old = replace(host.features(), tmpfs_xattr=False)
    monkeypatch.setattr(host, "features", lambda: old)
    for spec in (Spec(overlay=[(source, "/data")]), Spec(writable=True)):
        with pytest.raises(UnsupportedHost, match=r"Linux 6\.6"):
            shell("true", spec=spec)
    assert shell("true", spec=Spec(rootfs=[source], ro=["/usr", "/bin", "/lib", "/lib64"])).ok


# --- a writable root --------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["none", "host"])
@pytest.mark.parametrize("user", [None, 0])
def test_a_writable_root(network: str, user: int | None) -> None:
    spec = Spec(writable=True, network=network, user=user)  # type: ignore[arg-type]
    script = """
    mkdir -p /srv/a && echo 1 > /srv/a/f && cat /srv/a/f
    echo more >> /etc/passwd && tail -1 /etc/passwd
    mv /etc/hosts /etc/moved && ls /etc/hosts 2>&1 | wc -l
    rm /bin && mkdir /bin && echo 2 > /bin/x && cat /bin/x
    touch here /var/tmp/there /tmp/tmp /dev/shm/shm && ls
    stat -c %u:%g / /etc /workspace /srv
    """
    done = shell("cd /workspace;" + script, spec=spec)
    own = b"0:0\n" if user == 0 else b"1000:1000\n"
    assert done.stdout == b"1\nmore\n1\n2\nhere\n" + own * 4
    assert done.stderr == b""
    assert shell("ls /srv /workspace; tail -1 /etc/passwd", spec=spec).stdout.count(b"more") == 0


def test_what_stays_read_only() -> None:
    done = shell(
        "for path in /usr/x /dev/x /proc/x /etc/ssl/certs/x; do touch $path; done", spec=Spec(writable=True)
    )
    assert done.stderr.count(b"Read-only file system") + done.stderr.count(b"No such file") == 4


def test_mounts_on_a_writable_root(source: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    give(shared)
    (tmp_path / "text").write_text("text\n")
    spec = Spec(
        writable=True,
        ro=[(source / "dir", "/opt/ro"), (tmp_path / "text", "/opt/text")],
        rw=[(shared, "/srv/rw")],
        overlay=[(source, "/workspace")],
        tmpfs=["/t:1M"],
        deny=["/etc/passwd", "/etc/ssl", "/opt/ro/sub"],
    )
    script = """
    cat /opt/ro/deep /opt/text /workspace/file; ls -A /etc/ssl; ls -A /opt/ro/sub
    echo x > /srv/rw/x; echo y > /workspace/y; echo z > /t/z; echo q > /opt/q
    cat /etc/passwd; echo x > /etc/passwd; echo x > /opt/ro/deep; echo x > /opt/text; rmdir /opt/ro
    ls /opt
    """
    with unharmed(source):
        done = shell(script, spec=spec)
    assert done.stdout == b"deep\ntext\ncontent\nq\nro\ntext\n", done
    assert (shared / "x").read_text() == "x\n"
    assert (shared / "x").stat().st_uid == OWNER[0]
    assert done.stderr.count(b"Permission denied") + done.stderr.count(b"Read-only file system") == 6
    assert b"busy" in done.stderr


def test_a_writable_root_is_no_weaker() -> None:
    code = """
    def attempt(action):
        try:
            action()
            return 0
        except OSError as error:
            return error.errno
    found = {
        "device": attempt(lambda: os.mknod("/null", 0o020666, os.makedev(1, 3))),
        "whiteout": attempt(lambda: os.mknod("/etc/hosts", 0o020000, 0)),
        "chroot": attempt(lambda: os.chroot("/etc")),
        "trusted": attempt(lambda: os.setxattr("/etc", "trusted.overlay.opaque", b"y")),
        "void": sorted(set(os.listdir("/proc")) & {"nodes", "scratch", "proc", "dir", "0.0"}),
        "below": [line.split()[4] for line in open("/proc/self/mountinfo") if " / / " in line],
    }
    print(json.dumps(found))
    """
    found = ask_python(code, spec=Spec(writable=True))
    assert all(
        found[name] in (errno.EPERM, errno.EACCES, errno.EEXIST)
        for name in ("device", "whiteout", "chroot", "trusted")
    )
    assert found["void"] == []
    assert found["below"] == ["/"]


def test_a_living_sandbox_with_a_writable_root() -> None:
    with leaves_nothing(), Sandbox(Spec(writable=True)) as sandbox:
        assert sandbox.shell("mkdir /srv; echo 1 > /srv/a; echo 2 > b").ok
        assert sandbox.files.read("/srv/a") == b"1\n"
        assert sandbox.files.read("/workspace/b") == b"2\n"
        assert sandbox.exec(["cat", "/srv/a", "b"]).stdout == b"1\n2\n"
        assert sandbox.capabilities.no_new_privs


# --- layers -----------------------------------------------------------------------------------------


@pytest.fixture
def layers(tmp_path: Path, toolbox: str) -> list[Path]:
    """Three layers, the lowest first, with the tools of :func:`support.compile_static` in the first."""
    low, middle, top = (tmp_path / name for name in ("low", "middle", "top"))
    for layer in (low, middle, top):
        (layer / "etc").mkdir(parents=True)
    (low / "bin").mkdir()
    (low / "bin/toolbox").write_bytes(Path(toolbox).read_bytes())
    (low / "bin/toolbox").chmod(0o755)
    for name, text in {"a": "low a", "b": "low b", "gone": "low", "dir/x": "low x"}.items():
        (low / "etc" / name).parent.mkdir(exist_ok=True)
        (low / "etc" / name).write_text(text + "\n")
    (middle / "etc/b").write_text("middle b\n")
    (middle / "etc/c").write_text("middle c\n")
    os.mknod(middle / "etc/gone", stat.S_IFCHR, 0)
    (top / "etc/c").write_text("top c\n")
    (top / "etc/dir").mkdir()
    (top / "etc/dir/y").write_text("top y\n")
    os.setxattr(top / "etc/dir", "user.overlay.opaque", b"y")
    return [low, middle, top]


def toolbox_run(
    *argv: str, spec: sandboxcore.SandboxSpec, input: bytes | None = None
) -> sandboxcore.ExecResult:
    return sandboxcore.run(["/bin/toolbox", *argv], spec=spec, input=input, timeout=60)


@pytest.mark.parametrize("writable", [False, True])
def test_layers(layers: list[Path], *, writable: bool) -> None:
    """The later hides the earlier; whiteouts and opaque directories count; so does the order."""
    spec = Spec(rootfs=[str(layer) for layer in layers], writable=writable)
    with unharmed(*layers):
        for path, text in {"a": b"low a\n", "b": b"middle b\n", "c": b"top c\n", "dir/y": b"top y\n"}.items():
            assert toolbox_run("cat", f"/etc/{path}", spec=spec).stdout == text
        assert toolbox_run("ls", "/etc/dir", spec=spec).stdout == b"y\n"
        assert b"gone" not in toolbox_run("ls", "/etc", spec=spec).stdout
        swapped = spec.replace(rootfs=[str(layers[1]), str(layers[0])])
        assert toolbox_run("cat", "/etc/b", spec=swapped).stdout == b"low b\n"
        assert toolbox_run("cat", "/etc/gone", spec=swapped).stdout == b"low\n"


def test_one_layer_is_a_root_too(layers: list[Path]) -> None:
    for rootfs in (str(layers[0]), [str(layers[0])]):
        assert toolbox_run("cat", "/etc/a", spec=Spec(rootfs=rootfs)).stdout == b"low a\n"


def test_writing_to_layers(layers: list[Path]) -> None:
    for writable in (False, True):
        spec = Spec(rootfs=[str(layer) for layer in layers], writable=writable, user=0)
        with unharmed(*layers):
            done = toolbox_run("write", "/etc/a", spec=spec, input=b"text")
        assert (done.ok, b"Read-only" in done.stderr) == (writable, not writable), done


def test_owners_in_layers(layers: list[Path]) -> None:
    """As in an image: as root those of the files, for a user all are the one id there is."""
    if IS_ROOT:
        os.chown(layers[0] / "etc/a", 7, 8)
    spec = Spec(
        rootfs=[str(layers[0])], ro=["/usr", *(f"/{n}" for n in ("lib", "lib64") if os.path.exists(f"/{n}"))]
    )
    done = sandboxcore.run(["/usr/bin/stat", "-c", "%u:%g", "/etc/a", "/etc/b"], spec=spec, timeout=60)
    mode = host.features().mode
    expected = {
        "root": "7:8\n0:0\n",
        "rootless": "1000:1000\n1000:1000\n",
        "subuid": "1000:1000\n1000:1000\n",
    }
    assert done.stdout.decode() == expected[mode], done


def test_deny_in_layers(layers: list[Path]) -> None:
    for writable in (False, True):
        spec = Spec(rootfs=[str(layer) for layer in layers], writable=writable, deny=["/etc/a", "/etc/none"])
        assert toolbox_run("cat", "/etc/a", spec=spec).stdout == b""
        assert toolbox_run("cat", "/etc/b", spec=spec).stdout == b"middle b\n"


def test_the_standard_directories_on_layers(layers: list[Path]) -> None:
    """/proc, /dev, /tmp and /workspace are there, whatever the layers have in their place."""
    (layers[0] / "dev").mkdir()
    (layers[0] / "dev/fake").write_text("x")
    (layers[1] / "tmp").symlink_to("/etc")
    spec = Spec(rootfs=[str(layer) for layer in layers], ro=["/usr"])
    for writable in (False, True):
        done = toolbox_run("ls", "/", spec=spec.replace(writable=writable))
        assert sorted(done.stdout.split()) == b"bin dev etc proc tmp usr workspace".split(), done
        assert toolbox_run("ls", "/tmp", spec=spec).stdout == b""
        assert toolbox_run("write", "/tmp/x", spec=spec, input=b"y").ok
        assert toolbox_run("cat", "/dev/null", spec=spec).ok


def test_the_cli(source: Path, layers: list[Path]) -> None:
    def cli(*argv: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "sandboxcore", "explain", *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=host_environment(), timeout=60)
        return done.returncode, done.stdout

    code, text = cli("--overlay", f"{source}:/data", "--writable")
    assert code == 0
    assert f"mount: {source} on /data (rw, spec overlay)" in text
    assert "overlay on / (rw, root)" in text
    code, text = cli("--rootfs", str(layers[0]), "--rootfs", str(layers[1]))
    assert f"mount: {layers[1]} over {layers[0]} on / (ro, root)" in text
    code, text = cli("--rootfs", str(layers[0]))
    assert "overlay" not in text


def test_python_with_a_writable_root_and_an_overlay(source: Path) -> None:
    """A program that uses the file system in earnest."""
    code = """
    import shutil, sqlite3, tempfile, zipfile
    db = sqlite3.connect("/srv.db")
    db.execute("pragma journal_mode=wal")
    db.execute("create table t (x)")
    db.executemany("insert into t values (?)", [(n,) for n in range(1000)])
    db.commit()
    shutil.copytree("/data", "/copy", symlinks=True, ignore=shutil.ignore_patterns("fifo"))
    shutil.make_archive("/data/all", "zip", "/copy")
    os.replace("/data/all.zip", "/data/dir/all.zip")
    with tempfile.NamedTemporaryFile(dir="/data") as file:
        file.write(b"x")
    names = sorted(zipfile.ZipFile("/data/dir/all.zip").namelist())
    print(json.dumps([db.execute("select sum(x) from t").fetchone()[0], names, os.listdir("/data/dir/sub")]))
    """
    with unharmed(source):
        found = ask_python(code, spec=Spec(writable=True, overlay=[(source, "/data")]))
    assert found[0] == 499500
    assert "dir/sub/deeper" in found[1]
    assert found[2] == ["deeper"]


def test_python_runs(source: Path) -> None:
    assert run_python("print(1)", spec=Spec(writable=True, profile="minimal")).stdout == b"1\n"
