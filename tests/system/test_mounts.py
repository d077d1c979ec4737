"""Mounts: ro, rw, tmpfs, deny, in any order, and the host's directories unharmed."""

import errno
import itertools
import os
import socket
from pathlib import Path

import pytest
from support import IS_ROOT, Spec, ask_python, run_python, shell, snapshot

import sandboxcore
from sandboxcore import Mount, SetupError, SpecError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory with a file and a sub-directory, for every user to read."""
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    (path / "file").write_text("content\n")
    (path / "sub/deep").write_text("deep\n")
    return path


# --- ro ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, 0])
def test_ro_shows_and_refuses(source: Path, user: int | None) -> None:
    source.chmod(0o777)
    (source / "file").chmod(0o666)
    before = snapshot(source)
    done = shell(
        "cd /data; cat file; echo x > file; echo x > new; rm file; mkdir d; chmod 0 .",
        spec=Spec(ro=[(source, "/data")], user=user),
    )
    assert done.stdout == b"content\n"
    assert done.stderr.count(b"Read-only file system") == 5
    assert snapshot(source) == before


def test_short_forms(source: Path) -> None:
    for item, target in ((str(source), str(source)), (f"{source}:/d", "/d"), (source, str(source))):
        assert shell('cat "$1/file"', target, spec=Spec(ro=[item])).stdout == b"content\n"


def test_nothing_beside_the_mount_is_seen(source: Path) -> None:
    (source.parent / "sibling").mkdir()
    listed = ask_python(
        "print(json.dumps(os.listdir(sys.argv[1])))", str(source.parent), spec=Spec(ro=[source])
    )
    assert listed == ["source"]


# --- rw ---------------------------------------------------------------------------------------------


def owners(path: Path) -> set[tuple[int, int]]:
    return {(entry.lstat().st_uid, entry.lstat().st_gid) for entry in path.rglob("*")}


@pytest.mark.parametrize("user", [None, 0, "7:8"])
@pytest.mark.parametrize("owner", [12345, 0, 65534, 1 << 20])
def test_what_is_made_belongs_to_the_directorys_owner(
    tmp_path: Path, owner: int, user: int | str | None
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    if IS_ROOT:
        os.chown(shared, owner, owner + 1)
    expected = (shared.stat().st_uid, shared.stat().st_gid)
    script = "umask 077; cd /s && mkdir -p a/b && echo text > a/b/f && ln -s f a/b/l && stat -c %u:%g . a/b/f"
    done = shell(script, spec=Spec(rw=[(shared, "/s")], user=user))
    inside = {None: b"1000:1000", 0: b"0:0", "7:8": b"7:8"}[user]
    assert (done.stdout, done.stderr) == (inside + b"\n" + inside + b"\n", b"")
    assert owners(shared) == {expected}
    assert (shared / "a/b/f").read_text() == "text\n"
    assert (shared / "a/b/f").stat().st_mode & 0o777 == 0o600


def test_rw_changes_what_is_there(source: Path) -> None:
    done = shell("cd /s && echo more >> file && rm sub/deep && mv sub other", spec=Spec(rw=[(source, "/s")]))
    assert done.ok, done
    assert (source / "file").read_text() == "content\nmore\n"
    assert sorted(path.name for path in source.iterdir()) == ["file", "other"]


def test_rw_of_a_single_file(source: Path) -> None:
    done = shell("echo changed > /f", spec=Spec(rw=[(source / "file", "/f")]))
    assert done.ok, done
    assert (source / "file").read_text() == "changed\n"


def test_two_sandboxes_write_to_one_directory(source: Path) -> None:
    for number in range(3):
        assert shell('echo "$1" >> /s/log', str(number), spec=Spec(rw=[(source, "/s")])).ok
    assert (source / "log").read_text() == "0\n1\n2\n"


@pytest.mark.needs_root
def test_rw_grants_nothing_of_other_owners(source: Path) -> None:
    """Only the directory's owner is mapped: a file of somebody else's stays somebody else's."""
    os.chown(source, 12345, 12345)
    private = source / "private"
    private.write_text("secret\n")
    os.chown(private, 12346, 12346)
    private.chmod(0o600)
    done = shell("stat -c %u /s/private; cat /s/private", spec=Spec(rw=[(source, "/s")]))
    assert done.stdout == b"65534\n"
    assert b"Permission denied" in done.stderr


def test_no_set_user_id_comes_out_of_rw(tmp_path: Path) -> None:
    """A program that a payload leaves behind has no power that its owner's other programs lack."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shell("cp /usr/bin/id /s/id; chmod u+s,g+s /s/id", spec=Spec(rw=[(shared, "/s")]))
    left = (shared / "id").stat()
    assert (left.st_uid, left.st_gid) == (shared.stat().st_uid, shared.stat().st_gid)


# --- order ------------------------------------------------------------------------------------------

TREE = """
    found = {}
    for top in ('/m', '/tmp', '/workspace'):
        for where, _, files in os.walk(top):
            found[where] = [sorted(files), os.access(where, os.W_OK), os.stat(where).st_dev]
    devices = {}
    for where in sorted(found):
        found[where][2] = devices.setdefault(found[where][2], len(devices))
    print(json.dumps(found))
"""


def test_the_order_of_nested_mounts_does_not_matter(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "inner"
    (outer / "a/b/c").mkdir(parents=True)
    (outer / "a/file").touch()
    (inner / "d").mkdir(parents=True)
    (inner / "in").touch()
    mounts = [
        Mount(kind="bind", source=str(outer), target="/m", read_only=True),
        Mount(kind="bind", source=str(inner), target="/m/a", read_only=False),
        Mount(kind="tmpfs", target="/m/a/d"),
        Mount(kind="bind", source=str(inner), target="/m/a/d/e/f"),
        Mount(kind="bind", source=str(outer), target="/tmp/x/y"),
    ]
    before = snapshot(tmp_path)
    trees = [ask_python(TREE, spec=Spec(mounts=list(order))) for order in itertools.permutations(mounts)]
    assert all(tree == trees[0] for tree in trees)
    writable = {where for where, (_, access, _) in trees[0].items() if access}
    assert writable >= {"/m/a", "/m/a/d", "/tmp", "/workspace"}
    assert not writable & {"/m", "/m/a/d/e/f", "/m/a/d/e/f/d", "/tmp/x/y", "/tmp/x/y/a"}
    assert trees[0]["/m/a"][0] == trees[0]["/m/a/d/e/f"][0] == ["in"]
    assert snapshot(tmp_path) == before


def test_a_read_only_part_of_a_writable_directory(source: Path) -> None:
    for mounts in itertools.permutations(
        [
            Mount(kind="bind", source=str(source), target="/s", read_only=False),
            Mount(kind="bind", source=str(source / "sub"), target="/s/sub"),
        ]
    ):
        done = shell("echo 1 > /s/new; echo 2 > /s/sub/new", spec=Spec(mounts=mounts))
        assert done.stderr.count(b"Read-only") == 1
    assert sorted(path.name for path in source.iterdir()) == ["file", "new", "sub"]
    assert [path.name for path in (source / "sub").iterdir()] == ["deep"]


@pytest.mark.parametrize("target", ["/tmp/a/b", "/workspace/in", "/var/tmp/x", "/tmp/file", "/workspace"])
def test_binds_below_private_directories(source: Path, target: str) -> None:
    kind = source / "file" if target.endswith("file") else source
    path = target if kind.is_file() else f"{target}/file"
    for _ in range(2):
        done = shell('cat "$1"; echo x > "$1"', path, spec=Spec(ro=[(kind, target)]))
        assert done.stdout == b"content\n"
        assert b"Read-only" in done.stderr


def test_sources_of_many_kinds(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("file", "directory", "fifo", "socket", "link")}
    places["file"].write_text("x")
    places["directory"].mkdir()
    os.mkfifo(places["fifo"], 0o666)
    places["link"].symlink_to("file")
    with socket.socket(socket.AF_UNIX) as listener:
        old = os.getcwd()
        os.chdir(tmp_path)  # the path may be too long for an address
        try:
            listener.bind("socket")
        finally:
            os.chdir(old)
        kinds = ask_python(
            "import stat\n"
            "modes = [stat.filemode(os.lstat('/s/' + name).st_mode) for name in sys.argv[1:]]\n"
            "print(json.dumps([mode[0] for mode in modes]))",
            *places,
            spec=Spec(ro=[(path, f"/s/{name}") for name, path in places.items()]),
        )
    assert kinds == ["-", "d", "p", "s", "-"]


# --- tmpfs ------------------------------------------------------------------------------------------

FILL = """
    import errno
    size = made = 0
    try:
        with open(sys.argv[1] + '/big', 'wb', buffering=0) as file:
            while size < 64 << 20:
                size += file.write(bytes(65536))
    except OSError as error:
        size_error = error.errno
    os.unlink(sys.argv[1] + '/big')
    try:
        while made < 5000:
            open(f'{sys.argv[1]}/{made}', 'x').close()
            made += 1
    except OSError as error:
        made_error = error.errno
    print(json.dumps([size, size_error, made, made_error]))
"""


def test_tmpfs_has_a_size_and_a_number_of_files() -> None:
    spec = Spec(mounts=[Mount(kind="tmpfs", target="/t", size="1M", inodes=100)])
    size, size_error, made, made_error = ask_python(FILL, "/t", spec=spec)
    assert (size, size_error, made_error) == (1 << 20, errno.ENOSPC, errno.ENOSPC)
    assert 95 <= made <= 100


def test_tmpfs_mode_owner_and_short_form() -> None:
    spec = Spec(tmpfs=["/a", "/b:2M"], mounts=[Mount(kind="tmpfs", target="/c", mode=0o700)])
    done = shell("stat -c '%a %u %g' /a /b /c; df -k --output=size /b | tail -1", spec=spec)
    assert done.stdout.split() == b"755 1000 1000 755 1000 1000 700 1000 1000 2048".split()


def test_tmpfs_instead_of_a_private_directory() -> None:
    done = shell("df -k --output=size /tmp | tail -1; echo x > /tmp/x", spec=Spec(tmpfs=["/tmp:4M"]))
    assert (done.stdout.strip(), done.stderr) == (b"4096", b"")


def test_tmpfs_over_a_host_directory(source: Path) -> None:
    before = snapshot(source)
    spec = Spec(rw=[(source, "/s")], tmpfs=["/s/sub"])
    assert shell("ls /s/sub; echo x > /s/sub/x; ls /s/sub", spec=spec).stdout == b"x\n"
    assert snapshot(source) == before


# --- deny -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, 0])
@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_denied_files_and_directories(source: Path, mode: str, user: int | None) -> None:
    before = snapshot(source)
    spec = Spec(**{mode: [(source, "/s")]}, deny=["/s/file", "/s/sub", "/usr/share"], user=user)
    code = """
        found = {}
        for path in ('/s/file', '/s/sub', '/s/sub/deep', '/usr/share', '/usr/share/x'):
            for what in ('open', 'listdir', 'write', 'chmod', 'unlink', 'rename'):
                try:
                    if what == 'open': open(path).read()
                    if what == 'listdir': os.listdir(path)
                    if what == 'write': open(path, 'a').write('x')
                    if what == 'chmod': os.chmod(path, 0o777)
                    if what == 'unlink': os.unlink(path)
                    if what == 'rename': os.rename(path, '/tmp/x')
                    found[f'{path} {what}'] = 0
                except OSError as error:
                    if what in ('open', 'listdir', 'chmod'):
                        found[f'{path} {what}'] = error.errno
        print(json.dumps(found))
    """
    found = ask_python(code, spec=spec)
    allowed = {errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.EPERM}
    assert {what: number for what, number in found.items() if number not in allowed} == {}
    assert found["/s/file open"] == found["/s/sub listdir"] == found["/s/sub/deep open"] == errno.EACCES
    assert snapshot(source) == before


def test_deny_of_what_does_not_exist_makes_nothing(source: Path) -> None:
    before = snapshot(source)
    spec = Spec(ro=[(source, "/s")], deny=["/s/none", "/nowhere/at/all", "/usr/none"])
    assert shell("ls -A /s; ls -d /nowhere", spec=spec).stdout == b"file\nsub\n"
    with pytest.raises(SpecError, match="does not exist below the writable"):
        sandboxcore.run(["true"], spec=Spec(rw=[(source, "/s")], deny=["/s/none"]))
    assert snapshot(source) == before


def test_deny_of_what_appears_between_two_runs(source: Path) -> None:
    spec = Spec(ro=[(source, "/s")], deny=["/s/later"])
    assert shell("cat /s/later", spec=spec).returncode == 1
    (source / "later").write_text("secret\n")
    assert b"Permission denied" in shell("cat /s/later", spec=spec).stderr


def test_deny_through_a_link_is_refused(source: Path) -> None:
    (source / "link").symlink_to("sub")
    for path in ("/s/link", "/s/link/deep"):
        with pytest.raises(SpecError, match="symbolic link"):
            sandboxcore.run(["true"], spec=Spec(ro=[(source, "/s")], deny=[path]))


@pytest.mark.parametrize("path", ["/etc", "/tmp", "/dev/shm", "/var", "/dev/pts", "/var/tmp"])
def test_deny_of_our_own_directories(path: str) -> None:
    """A directory with private ones below it takes them with it."""
    done = shell('ls "$1"', path, spec=Spec(deny=[path]))
    assert b"Permission denied" in done.stderr


def test_deny_wins_over_a_mount_below_it(source: Path) -> None:
    done = shell("cat /s/sub/m/file", spec=Spec(ro=[(source, "/s")], tmpfs=["/s/sub"], deny=["/s/sub"]))
    assert b"Permission denied" in done.stderr


# --- errors -----------------------------------------------------------------------------------------


def test_a_missing_mount_point_in_a_host_directory(source: Path) -> None:
    before = snapshot(source)
    for mode in ("ro", "rw"):
        with pytest.raises(SetupError) as caught:
            sandboxcore.run(["true"], spec=Spec(**{mode: [(source, "/s")]}, tmpfs=["/s/none"]))
        error = caught.value
        assert (error.stage, error.errno) == ("mount", errno.ENOENT)
        assert "/s/none" in error.subject
        assert error.hint
    assert snapshot(source) == before


def test_a_link_as_mount_point(source: Path, tmp_path: Path) -> None:
    """A payload that may write to a directory may plant links there for the next sandbox."""
    victim = tmp_path / "victim"
    victim.mkdir()
    before = snapshot(victim)
    for target in ("/etc", "../victim", str(victim), "/proc/self", "sub"):
        link = source / "link"
        link.symlink_to(target)
        for point in ("/s/link", "/s/link/x"):
            with pytest.raises(SetupError) as caught:
                sandboxcore.run(["true"], spec=Spec(rw=[(source, "/s")], tmpfs=[point]))
            assert (caught.value.stage, caught.value.errno) == ("mount", errno.ELOOP), (target, point)
        link.unlink()
    assert snapshot(victim) == before


def test_a_file_as_mount_point_of_a_directory(source: Path) -> None:
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=Spec(ro=[(source, "/s")], tmpfs=["/s/file"]))
    assert caught.value.stage == "mount"
    assert caught.value.errno in (errno.ENOTDIR, errno.EINVAL)  # move_mount(2) says EINVAL


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"mounts: source .*none.*No such file"):
        sandboxcore.run(["true"], spec=Spec(ro=[(tmp_path / "none", "/s")]))


@pytest.mark.parametrize("path", ["/proc", "/proc/self", "/proc/1"])
def test_proc_of_the_host_is_no_source(path: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    for source in (path, tmp_path / "link"):
        with pytest.raises(SpecError):
            sandboxcore.run(["true"], spec=Spec(ro=[(source, "/s")]))


def test_more_mounts_below_private_directories_than_there_is_room_for(source: Path) -> None:
    with pytest.raises(SpecError, match="more than"):
        sandboxcore.run(["true"], spec=Spec(ro=[(source, f"/tmp/{n}") for n in range(65)]))
    spec = Spec(ro=[(source, f"/tmp/{n:02}") for n in range(64)])
    assert shell("cat /tmp/63/file", spec=spec).stdout == b"content\n"


# --- freshness --------------------------------------------------------------------------------------


def test_a_replaced_source_is_noticed(source: Path) -> None:
    spec = Spec(ro=[(source, "/s"), (source / "file", "/f")])
    assert shell("cat /s/file /f", spec=spec).stdout == b"content\ncontent\n"
    source.rename(source.with_name("old"))
    source.mkdir()
    (source / "file").write_text("new\n")
    assert shell("cat /s/file /f", spec=spec).stdout == b"new\nnew\n"
    (source / "other").write_text("newer\n")
    (source / "other").rename(source / "file")
    assert shell("cat /s/file /f", spec=spec).stdout == b"newer\nnewer\n"


def test_a_moved_link_is_followed_anew(source: Path) -> None:
    other = source.with_name("other")
    other.mkdir()
    (other / "file").write_text("other\n")
    link = source.with_name("link")
    link.symlink_to(source)
    spec = Spec(ro=[(link, "/s")])
    assert shell("cat /s/file", spec=spec).stdout == b"content\n"
    link.unlink()
    link.symlink_to(other)
    assert shell("cat /s/file", spec=spec).stdout == b"other\n"


def test_a_source_can_be_removed_afterwards(source: Path) -> None:
    spec = Spec(ro=[(source, "/s")])
    assert shell("cat /s/file", spec=spec).ok
    for path in sorted(source.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    source.rmdir()
    with pytest.raises(SpecError, match="No such file"):
        shell("cat /s/file", spec=spec)


def test_more_specs_than_templates(source: Path) -> None:
    """The spawner keeps a few; the others are built again."""
    specs = [Spec(ro=[(source, f"/s{number}")]) for number in range(20)]
    for spec in specs + specs[::-1]:
        target = spec.all_mounts()[0].target
        assert shell('cat "$1/file"', target, spec=spec).stdout == b"content\n"


def test_more_specs_than_templates_at_once(source: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    specs = [Spec(ro=[(source, f"/s{number}")]) for number in range(24)]

    def use(number: int) -> bytes:
        return shell("cat /s*/file", spec=specs[number * 7 % len(specs)]).stdout

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(use, range(120))) == {b"content\n"}


def test_mounts_of_the_record(source: Path) -> None:
    done = run_python("pass", spec=Spec(ro=[(source, "/r")], rw=[(source, "/w")], tmpfs=["/t"]), record=True)
    assert done.capabilities is not None
    mounts = {mount.target: mount for mount in done.capabilities.mounts}
    assert {path: mounts[path].read_only for path in ("/", "/r", "/w", "/t", "/usr")} == {
        "/": True,
        "/r": True,
        "/w": False,
        "/t": False,
        "/usr": True,
    }
    # /proc/proc is the template's and out of reach: the sandbox's own proc covers it
    reachable = [mount for mount in done.capabilities.mounts if mount.target != "/proc/proc"]
    assert [mount.target for mount in reachable if "nosuid" not in mount.options] == []


@pytest.mark.parametrize("landlock", [True, False])
def test_what_covers_a_denied_path_is_no_place_to_leave_things(source: Path, *, landlock: bool) -> None:
    """All sandboxes of a spec share it, and rootless the payload has its owner's id."""
    spec = Spec(ro=[(source, "/s")], deny=["/s/file", "/s/sub"], landlock=landlock)
    script = (
        "chmod 777 /s/file /s/sub; echo planted > /s/file; echo planted > /s/sub/x; stat -c %a /s/file /s/sub"
    )
    first = shell(script, spec=spec)
    assert first.stdout == b"0\n0\n"
    second = shell("cat /s/file /s/sub/x; stat -c %a /s/file /s/sub", spec=spec)
    assert second.stdout == b"0\n0\n"
