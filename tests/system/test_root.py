"""The root file system: what is there, that it works, and that nothing else is there."""

import os
from pathlib import Path

import pytest
from support import IS_ROOT, Spec, ask_python, run_python, shell, snapshot

import sandboxcore
from sandboxcore.tree import ROOT_ENTRIES

LIST = "print(json.dumps({path: sorted(os.listdir(path)) for path in sys.argv[1:]}))"


def listing(*paths: str, **fields) -> dict[str, list[str]]:
    return ask_python(LIST, *paths, spec=Spec(**fields))


# --- the default root -------------------------------------------------------------------------------


def test_top_level() -> None:
    programs = {name for name in ROOT_ENTRIES if os.path.lexists(f"/{name}")}
    found = listing("/", "/var", "/var/tmp", "/tmp", "/workspace", "/dev/shm")
    assert set(found["/"]) == programs | {"dev", "etc", "proc", "tmp", "var", "workspace"}
    assert found["/var"] == ["tmp"]
    assert found["/var/tmp"] == found["/tmp"] == found["/workspace"] == found["/dev/shm"] == []


def test_programs_are_linked_as_on_the_host() -> None:
    inside = ask_python(
        "print(json.dumps({n: os.readlink('/' + n) for n in os.listdir('/') if os.path.islink('/' + n)}))"
    )
    outside = {name: os.readlink(f"/{name}") for name in ROOT_ENTRIES if os.path.islink(f"/{name}")}
    assert inside == outside


def test_etc_is_minimal() -> None:
    """Nothing that says who uses this host or how it is set up."""
    found = set(listing("/etc")["/etc"])
    assert {"passwd", "group", "hosts", "hostname", "nsswitch.conf"} <= found
    secret = "shadow gshadow sudoers ssh cron.d fstab machine-id subuid environment resolv.conf mtab"
    assert not found & set(secret.split())
    users = ask_python("print(json.dumps([line.split(':')[0] for line in open('/etc/passwd')]))")
    assert users == ["root", "sandbox", "nobody"]


def test_every_part_of_the_root_is_read_only() -> None:
    code = """
        found = {}
        for path in sys.argv[1:]:
            try:
                open(path + '/new', 'w').close()
                found[path] = 0
            except OSError as error:
                found[path] = error.errno
        print(json.dumps(found))
    """
    for user in (None, 0):
        closed = ["/", "/usr", "/usr/bin", "/etc", "/dev", "/var", "/proc"]
        answers = ask_python(code, *closed, spec=Spec(user=user))
        assert set(answers.values()) <= {13, 30, 2}, answers  # EACCES, EROFS; proc says ENOENT
        assert 0 not in answers.values()


def test_private_directories_are_writable_and_fresh() -> None:
    places = ("/tmp", "/var/tmp", "/workspace", "/dev/shm")
    code = """
        for path in sys.argv[1:]:
            open(path + '/x', 'x').close()
        print(json.dumps([oct(os.stat(path).st_mode) for path in sys.argv[1:]]))
    """
    for _ in range(2):
        assert ask_python(code, *places) == ["0o41777", "0o41777", "0o40755", "0o41777"]


def test_home_is_the_working_directory() -> None:
    done = shell("pwd; echo $HOME; cd ~ && pwd; stat -c %u .", spec=Spec())
    assert done.stdout == b"/workspace\n/workspace\n/workspace\n1000\n"


def test_workdir_elsewhere() -> None:
    assert shell("pwd; echo $HOME", spec=Spec(workdir="/tmp")).stdout == b"/tmp\n/tmp\n"


def test_environment_is_clean() -> None:
    os.environ["SECRET_OF_THE_HOST"] = "x"
    try:
        inside = ask_python("print(json.dumps(dict(os.environ)))", spec=Spec(env={"MINE": "1"}))
    finally:
        del os.environ["SECRET_OF_THE_HOST"]
    inside.pop("LC_CTYPE", None)  # Python's own doing
    assert set(inside) == {"PATH", "HOME", "USER", "LOGNAME", "LANG", "MINE"}


# --- devices ----------------------------------------------------------------------------------------


def test_dev_has_these_and_no_others() -> None:
    expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert listing("/dev")["/dev"] == expected.split()


def test_devices_work() -> None:
    code = """
        import errno
        answers = [len(open('/dev/urandom', 'rb').read(8)), len(open('/dev/random', 'rb').read(8))]
        answers += [list(open('/dev/zero', 'rb').read(2)), len(open('/dev/null', 'rb').read())]
        for path, data in (('/dev/null', b'x'), ('/dev/full', b'x'), ('/dev/tty', b'x')):
            try:
                fd = os.open(path, os.O_RDWR)
                answers.append(os.write(fd, data))
            except OSError as error:
                answers.append(errno.errorcode[error.errno])
        print(json.dumps(answers))
    """
    assert ask_python(code) == [8, 8, [0, 0], 0, 1, "ENOSPC", "ENXIO"]


def test_terminals_of_ones_own() -> None:
    code = """
        import pty, tty
        master, slave = os.openpty()
        tty.setraw(slave)
        os.write(slave, b'to the master')
        answer = [os.ttyname(slave), os.read(master, 100).decode(), os.isatty(slave)]
        child, fd = pty.fork()
        if child == 0:
            os.execvp('tty', ['tty'])
        text = b''
        try:
            while piece := os.read(fd, 100):
                text += piece
        except OSError:
            pass
        os.waitpid(child, 0)
        print(json.dumps([*answer, text.decode().strip()]))
    """
    assert ask_python(code) == ["/dev/pts/0", "to the master", True, "/dev/pts/1"]


def test_shared_memory_and_semaphores() -> None:
    code = """
        import multiprocessing as mp
        from multiprocessing.shared_memory import SharedMemory
        def work(name, lock):
            with lock:
                block = SharedMemory(name)
                block.buf[0] = 42
                block.close()
        context = mp.get_context('fork')
        block = SharedMemory(create=True, size=1 << 20)
        child = context.Process(target=work, args=(block.name, context.Lock()))
        child.start(); child.join()
        print(json.dumps([child.exitcode, block.buf[0]]))
        block.close(); block.unlink()
    """
    assert ask_python(code) == [0, 42]


# --- proc -------------------------------------------------------------------------------------------


def test_proc_is_of_the_own_pid_namespace() -> None:
    code = "print(json.dumps([sorted(int(n) for n in os.listdir('/proc') if n.isdecimal()), os.getpid()]))"
    assert ask_python(code) == [[1, 2], 2]


def test_proc_masks() -> None:
    """What tells about the host's kernel or its other tenants is empty or refused."""
    code = """
        found = {}
        for name in sys.argv[1:]:
            path = '/proc/' + name
            try:
                found[name] = len(os.listdir(path)) if os.path.isdir(path) else len(open(path, 'rb').read(1))
            except OSError:
                found[name] = 0
        print(json.dumps(found))
    """
    names = "kallsyms kcore keys key-users timer_list interrupts sched_debug modules kmsg config.gz cmdline"
    for user in (None, 0):
        found = ask_python(code, *names.split(), "acpi", "scsi", "driver", "pressure", spec=Spec(user=user))
        assert {name: size for name, size in found.items() if size} == {}


@pytest.mark.parametrize("user", [None, 0])
def test_proc_is_read_only_where_it_is_global(user: int | None) -> None:
    code = """
        found = {}
        for path, data in {'/proc/sys/kernel/hostname': 'x', '/proc/sys/vm/drop_caches': '0',
                           '/proc/sysrq-trigger': 'h', '/proc/sys/kernel/core_pattern': '|/x',
                           '/proc/sys/user/max_user_namespaces': '9'}.items():
            try:
                with open(path, 'w') as f:
                    f.write(data)
                found[path] = 'written'
            except OSError as error:
                pass
        print(json.dumps(found))
    """
    assert ask_python(code, spec=Spec(user=user)) == {}


def test_init_cannot_be_looked_into() -> None:
    code = """
        found = {}
        for name in ('environ', 'mem', 'maps', 'exe', 'cwd', 'root', 'fd'):
            path = '/proc/1/' + name
            try:
                found[name] = repr(os.readlink(path) if name in ('exe', 'cwd', 'root') else
                                   os.listdir(path) if name == 'fd' else open(path, 'rb').read(64))
            except OSError:
                pass
        print(json.dumps(found))
    """
    for user in (None, 0):
        assert ask_python(code, spec=Spec(user=user)) == {}


def test_proc_pid() -> None:
    found = listing("/proc", proc="pid")["/proc"]
    assert set(found) == {"1", "2", "self", "thread-self"} or set(found) == {"2", "self", "thread-self"}
    assert listing("/proc", profile="minimal")["/proc"] == found


# --- a given root -----------------------------------------------------------------------------------


@pytest.fixture
def rootfs(tmp_path: Path, toolbox: str) -> Path:
    root = tmp_path / "rootfs"
    for name in ("bin", "etc", "data/deep", "proc", "dev", "tmp", "sys", "workspace"):
        (root / name).mkdir(parents=True)
    (root / "bin/tool").write_bytes(Path(toolbox).read_bytes())
    (root / "bin/tool").chmod(0o755)
    (root / "bin/link").symlink_to("/bin/tool")
    (root / "etc/passwd").write_text("of the rootfs\n")
    (root / "workspace/hidden").write_text("x")
    (root / "data/deep/file").write_text("content\n")
    (root / "file").write_text("top\n")
    return root


def tool(root: Path, *args: str, **fields) -> sandboxcore.ExecResult:
    spec = Spec(rootfs=str(root), env={"PATH": "/bin"}, **fields)
    return sandboxcore.run(["tool", *args], spec=spec, text=True, timeout=20)


def test_rootfs_is_the_root(rootfs: Path) -> None:
    before = snapshot(rootfs)
    top = tool(rootfs, "ls", "/")
    assert set(top.stdout.split()) == {"bin", "data", "dev", "etc", "file", "proc", "tmp", "workspace"}
    assert tool(rootfs, "cat", "/data/deep/file").stdout == "content\n"
    assert tool(rootfs, "cat", "/etc/passwd").stdout == "of the rootfs\n"
    assert tool(rootfs, "cat", "/file").stdout == "top\n"
    assert tool(rootfs, "ls", "/workspace").stdout == ""
    assert tool(rootfs, "id").stdout == "1000:1000\n"
    assert "null" in tool(rootfs, "ls", "/dev").stdout
    assert "self" in tool(rootfs, "ls", "/proc").stdout
    linked = sandboxcore.run(["/bin/link", "pwd"], spec=Spec(rootfs=str(rootfs)), timeout=20)
    assert linked.stdout == b"/workspace\n"
    assert snapshot(rootfs) == before


@pytest.mark.parametrize("user", [None, 0])
def test_rootfs_is_read_only(rootfs: Path, user: int | None) -> None:
    for path in (rootfs, *rootfs.rglob("*")):
        if path.is_dir():
            path.chmod(0o777)
    before = snapshot(rootfs)
    for target in ("/new", "/data/new", "/data/deep/file", "/etc/new"):
        spec = Spec(rootfs=str(rootfs), user=user)
        done = sandboxcore.run(["/bin/tool", "write", target], spec=spec, input=b"x", timeout=20)
        assert done.returncode == 1, target
    done = sandboxcore.run(["/bin/tool", "write", "/tmp/x"], spec=spec, input=b"x", timeout=20)
    assert done.returncode == 0
    assert snapshot(rootfs) == before


@pytest.mark.parametrize("up", ["outside", "../../outside", "/"])
def test_links_in_a_hostile_rootfs_lead_nowhere(rootfs: Path, tmp_path: Path, up: str) -> None:
    """Where sandboxes mount, an image may have planted links to directories of the host."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o777)
    (outside / "secret").write_text("secret\n")
    target = str(outside) if up == "outside" else up
    for name in ("proc", "dev", "etc", "tmp", "sys", "workspace"):
        for path in sorted((rootfs / name).rglob("*"), reverse=True):
            path.unlink()
        (rootfs / name).rmdir()
        (rootfs / name).symlink_to(target)
    (rootfs / "evil").symlink_to(target)
    before = snapshot(tmp_path)
    spec = Spec(rootfs=str(rootfs), env={"PATH": "/bin"})
    done = sandboxcore.run(["tool", "ls", "/dev"], spec=spec, files={"/tmp/f": b"x"}, text=True, timeout=20)
    assert done.ok
    assert "null" in done.stdout.split()
    assert "self" in tool(rootfs, "ls", "/proc").stdout.split()
    assert tool(rootfs, "ls", "/tmp").stdout == ""
    for name in ("evil", "etc", "proc", "tmp"):
        assert "secret" not in tool(rootfs, "cat", f"/{name}/secret").stdout
    assert snapshot(tmp_path) == before


def test_rootfs_with_mounts_below_it(rootfs: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "f").write_text("mounted\n")
    before = snapshot(rootfs)
    assert tool(rootfs, "cat", "/data/deep/f", ro=[(source, "/data/deep")]).stdout == "mounted\n"
    assert tool(rootfs, "cat", "/brand/new/f", ro=[(source, "/brand/new")]).stdout == "mounted\n"
    with pytest.raises(sandboxcore.SetupError) as caught:  # nothing is made in the host's directory
        tool(rootfs, "cat", "/data/none/f", ro=[(source, "/data/none")])
    assert (caught.value.stage, caught.value.errno) == ("mount", 2)
    assert snapshot(rootfs) == before


def test_a_new_entry_in_rootfs_is_noticed(rootfs: Path) -> None:
    assert "later" not in tool(rootfs, "ls", "/").stdout
    (rootfs / "later").mkdir()
    assert "later" in tool(rootfs, "ls", "/").stdout


def test_missing_rootfs(tmp_path: Path) -> None:
    with pytest.raises(sandboxcore.SpecError, match="rootfs"):
        tool(tmp_path / "none", "id")


@pytest.mark.skipif(IS_ROOT, reason="root can read everything; see test_errors.py")
def test_unreadable_rootfs(rootfs: Path) -> None:
    rootfs.chmod(0)
    try:
        with pytest.raises(sandboxcore.SpecError, match=r"rootfs: .*Permission denied"):
            tool(rootfs, "id")
    finally:
        rootfs.chmod(0o755)


def test_only_default_standard_streams_are_open() -> None:
    done = run_python("import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))")
    assert done.stdout == b"[0, 1, 2, 3]\n"  # 3 is listdir's own
