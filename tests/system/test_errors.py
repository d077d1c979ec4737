"""Everything that can be wrong: the exact exception, what it says, and that nothing is left."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import (
    IS_ROOT,
    TESTS,
    Spec,
    host_environment,
    host_program,
    leaves_nothing,
    wait_until,
)

import sandboxcore
from sandboxcore import (
    CommandFailed,
    ExecError,
    Limits,
    Mount,
    ProgramNotExecutable,
    ProgramNotFound,
    SandboxError,
    SandboxTimeout,
    SetupError,
    SpecError,
)


@pytest.fixture(autouse=True)
def nothing_is_left():
    sandboxcore.run(["true"])
    with leaves_nothing():
        yield


# --- before anything starts -------------------------------------------------------------------------

BAD_SPECS = {
    "profile": {"profile": "none"},
    "network": {"network": "internet"},
    "proc": {"proc": "none"},
    "landlock": {"landlock": "maybe"},
    "hostname": {"hostname": "a b"},
    "user": {"user": "root"},
    "deny": {"deny": ["relative"]},
    "capabilities": {"capabilities": ["CAP_NET_RAW"]},
    "seccomp": {"seccomp": "no-such-profile"},
    "mounts": {"tmpfs": ["/a", "/a"]},
    "env": {"env": {"A=B": "x"}},
    "workdir": {"workdir": "relative"},
    "time_offsets": {"time_offsets": {"realtime": 1}},
}


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_spec(name: str) -> None:
    with pytest.raises(SpecError, match=name) as caught:
        Spec(**BAD_SPECS[name])
    assert isinstance(caught.value, ValueError | SandboxError)


def test_missing_mount_source(tmp_path: Path) -> None:
    for field in ("ro", "rw"):
        with pytest.raises(SpecError, match="none.*No such file"):
            sandboxcore.run(["true"], spec=Spec(**{field: [(tmp_path / "none", "/s")]}))


def test_missing_rootfs(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="rootfs.*No such file"):
        sandboxcore.run(["true"], spec=Spec(rootfs=tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="rootfs.*Not a directory"):
        sandboxcore.run(["true"], spec=Spec(rootfs=tmp_path / "file"))


@pytest.mark.skipif(IS_ROOT, reason="root may read everything")
def test_unreadable_source(tmp_path: Path) -> None:
    (tmp_path / "closed/inner").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(SpecError, match="Permission denied"):
            sandboxcore.run(["true"], spec=Spec(ro=[(tmp_path / "closed/inner", "/s")]))
        with pytest.raises(SpecError, match=r"rootfs.*Permission denied"):
            sandboxcore.run(["true"], spec=Spec(rootfs=tmp_path / "closed"))
    finally:
        (tmp_path / "closed").chmod(0o700)


# --- the command ------------------------------------------------------------------------------------


def test_missing_program() -> None:
    with pytest.raises(ProgramNotFound, match="no-such-program") as caught:
        sandboxcore.run(["no-such-program"])
    error = caught.value
    assert (error.stage, error.errno, error.subject) == ("exec", errno.ENOENT, "no-such-program")
    assert isinstance(error, ExecError | FileNotFoundError)


def test_program_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/garbage").write_bytes(b"\x7fELF garbage")
    (tmp_path / "d/garbage").chmod(0o755)
    (tmp_path / "d/text").write_text("x")
    with pytest.raises(ExecError) as caught:
        sandboxcore.run(["/d/garbage"], spec=Spec(ro=[(tmp_path / "d", "/d")]))
    assert (caught.value.stage, caught.value.errno) == ("exec", errno.ENOEXEC)
    with pytest.raises(ProgramNotExecutable) as refused:
        sandboxcore.run(["/d/text"], spec=Spec(ro=[(tmp_path / "d", "/d")]))
    assert refused.value.errno == errno.EACCES


def test_program_on_a_mount_without_execution() -> None:
    """/etc and its like are mounted without it; what the payload makes itself may be executed."""
    script = "cp /usr/bin/true /tmp/t && /tmp/t && echo ok"
    assert sandboxcore.run(["sh", "-c", script]).stdout == b"ok\n"


def test_working_directory() -> None:
    for cwd, number in (
        ("/none", errno.ENOENT),
        ("/etc/passwd", errno.ENOTDIR),
        ("x" * 300, errno.ENAMETOOLONG),
    ):
        with pytest.raises(SetupError) as caught:
            sandboxcore.run(["true"], cwd=cwd)
        assert (caught.value.stage, caught.value.errno) == ("cwd", number)
        assert caught.value.subject.endswith(cwd)


def test_check() -> None:
    with pytest.raises(CommandFailed) as failed:
        sandboxcore.run(["sh", "-c", "echo out; exit 3"], check=True)
    assert (failed.value.returncode, failed.value.stdout) == (3, b"out\n")
    assert isinstance(failed.value, subprocess.CalledProcessError)
    with pytest.raises(SandboxTimeout):
        sandboxcore.run(["sleep", "30"], check=True, timeout=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"pass_fds": [0]},
        {"pass_fds": [-1]},
        {"pass_fds": range(10, 100)},
        {"files": {"..": "x"}},
        {"env": {"": "x"}},
        {"cwd": "a\0b"},
    ],
    ids=str,
)
def test_invalid_option(options: dict) -> None:
    with pytest.raises(ValueError):
        sandboxcore.run(["true"], timeout=10, **options)


def test_unknown_option() -> None:
    with pytest.raises(TypeError):
        sandboxcore.run(["true"], shell=True)  # type: ignore[call-arg]


def test_passed_descriptor_that_is_not_open() -> None:
    source, sink = os.pipe()
    os.close(sink)
    os.close(source)
    with pytest.raises(OSError) as caught:
        sandboxcore.run(["true"], pass_fds=[sink], timeout=10)
    assert caught.value.errno == errno.EBADF


# --- the set-up -------------------------------------------------------------------------------------


def test_mount_point_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    spec = Spec(ro=[(tmp_path / "d", "/d")], mounts=[Mount(kind="tmpfs", target="/d/none")])
    with pytest.raises(SetupError, match="/d/none") as caught:
        sandboxcore.run(["true"], spec=spec)
    assert (caught.value.stage, caught.value.errno) == ("mount", errno.ENOENT)
    assert "create it" in caught.value.hint
    assert caught.value.hint in str(caught.value)
    assert os.listdir(tmp_path / "d") == []


def test_no_room_for_files() -> None:
    with pytest.raises(SetupError, match="big") as caught:
        sandboxcore.run(["true"], spec=Spec(limits=Limits(disk="64K")), files={"big": bytes(1 << 20)})
    assert (caught.value.stage, caught.value.errno, caught.value.index) == ("file", errno.ENOSPC, 0)
    assert caught.value.subject == "/workspace/big"
    assert "limits.disk" in caught.value.hint


def test_no_inodes_for_files() -> None:
    files = {f"{number}": "" for number in range(100)}
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=Spec(limits=Limits(inodes=20)), files=files)
    assert (caught.value.stage, caught.value.errno) == ("file", errno.ENOSPC)


def test_many_failures_leave_nothing() -> None:
    """The fixture counts."""
    for _ in range(50):
        with pytest.raises(ProgramNotFound):
            sandboxcore.run(["no-such-program"], input=b"x" * 100_000)
        with pytest.raises(SetupError):
            sandboxcore.run(["true"], cwd="/none")
        with pytest.raises(SetupError):
            sandboxcore.run(["true"], files={"/etc/x": ""})


# --- the host ---------------------------------------------------------------------------------------


def test_too_many_open_files() -> None:
    """With any number of free descriptors a run works or says EMFILE, and afterwards works again."""
    code = """
        import errno, os, resource, sandboxcore
        if WARM:
            sandboxcore.run(['true'])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        seen = set()
        sandboxcore.run  # loads all modules
        for free in range(24):
            count = len(os.listdir('/proc/self/fd')) - 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
            held = []
            while True:
                try:
                    held.append(os.open('/dev/null', os.O_RDONLY))
                except OSError:
                    break
            for fd in held[:free]:
                os.close(fd)
            before = len(held) - free
            try:
                ok = sandboxcore.run(['echo', 'x'], input=b'y').stdout == b'x\\n'
                seen.add('ok' if ok else 'bad')
            except OSError as error:  # before there is a plan, Python's own
                assert error.errno == errno.EMFILE, repr(error)
                assert not WARM or error.hint, repr(error)
                seen.add(getattr(error, 'stage', 'host'))
            for fd in held[free:]:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            if WARM:
                assert len(os.listdir('/proc/self/fd')) - 1 == count, (free, count)
        assert seen <= {'host', 'spawner', 'ok'} and 'ok' in seen, seen
        print(sandboxcore.run(['ls', '/etc'], text=True).stdout)
    """
    etc = sandboxcore.run(["ls", "/etc"], text=True).stdout
    for warm in (True, False):
        done = host_program(f"WARM = {warm}\n" + textwrap.dedent(code))
        assert done.stdout == f"{etc}\n", done.stderr


def test_a_spawner_with_few_descriptors() -> None:
    """It inherits the limit: more templates than fit are an error with a name, and others go on."""
    code = """
        import resource, sandboxcore
        resource.setrlimit(resource.RLIMIT_NOFILE, (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        sandboxcore.run(['true'])
        seen = set()
        for number in range(30):
            spec = sandboxcore.SandboxSpec(hostname=f'h{number}')
            try:
                assert sandboxcore.run(['hostname'], spec=spec, text=True).stdout == f'h{number}\\n'
            except sandboxcore.SetupError as error:
                assert error.errno == 24 and error.hint, repr(error)
        print(sandboxcore.run(['echo', 'fine'], text=True).stdout)
    """
    done = host_program(code)
    assert done.stdout == "fine\n\n", done.stderr


@pytest.mark.parametrize(("helper", "number"), [("/none", errno.ENOENT), ("/etc/passwd", errno.EACCES)])
def test_missing_helper(helper: str, number: int) -> None:
    code = """
        import sys, sandboxcore
        from sandboxcore import spawner
        spawner.HELPER = sys.argv[1]
        try:
            sandboxcore.run(['true'])
        except sandboxcore.SetupError as error:
            print(error.stage, error.errno, 'reinstall' in error.hint)
    """
    done = host_program(code, helper)
    assert done.stdout == f"spawner {number} True\n", done.stderr


def test_a_helper_that_is_something_else() -> None:
    code = """
        import sandboxcore
        from sandboxcore import spawner
        spawner.HELPER = '/bin/true'
        try:
            sandboxcore.run(['true'])
        except sandboxcore.SetupError as error:
            print(error.stage, error)
    """
    done = host_program(code, timeout=20)
    assert done.stdout.startswith("spawner "), done.stderr


REPORT = """
import sandboxcore
try:
    print(sandboxcore.run(['true']))
except sandboxcore.SandboxError as error:
    print(type(error).__name__, getattr(error, 'feature', ''), '|', getattr(error, 'remedy', ''))
"""


def report(*prefix: str, code: str = REPORT) -> tuple[str, str, str]:
    """Class, feature and remedy of what a host program meets that is started behind `prefix`."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=host_environment(),
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr
    name, _, rest = done.stdout.strip().partition(" ")
    feature, _, remedy = rest.partition(" | ")
    return name, feature, remedy


@pytest.mark.needs_program("unshare")
def test_user_namespaces_denied_by_sysctl() -> None:
    """An ordinary user below a limit of 0. As every limit of its kind it counts for what is nested."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    name, feature, remedy = report(
        *("unshare", "-U", "--map-user=1234", "--map-group=1234", "--keep-caps"), "sh", "-c", script, "sh"
    )
    assert (name, "user namespaces" in feature) == ("UnsupportedHost", True)
    assert "max_user_namespaces" in remedy


@pytest.mark.needs_root
@pytest.mark.needs_program("unshare")
def test_user_namespaces_denied_to_root_by_sysctl() -> None:
    """Root of a container with many ids."""
    script = 'read go; echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "-U", "-m", "--keep-caps", "sh", "-c", script, "sh", sys.executable, "-c", REPORT]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=host_environment(), cwd=TESTS, **pipes) as container:
        own, theirs = (Path(f"/proc/{pid}/ns/user") for pid in ("self", container.pid))
        wait_until(lambda: theirs.readlink() != own.readlink(), "the user namespace")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{container.pid}/{name}").write_text("0 0 4294967294\n")
        out, err = container.communicate("go\n", timeout=60)
    assert out.startswith("UnsupportedHost "), (out, err)
    assert "max_user_namespaces" in out


DENY = """
import os, pyseccomp
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
new_user = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, 0x10000000, 0x10000000)
filter.add_rule(pyseccomp.ERRNO(1), 'unshare', new_user)
filter.add_rule(pyseccomp.ERRNO(1), 'clone', new_user)
filter.add_rule(pyseccomp.ERRNO(38), 'clone3')
filter.load()
"""


DOCKERS = "chown dac_override fowner fsetid kill setgid setuid setpcap net_raw sys_chroot mknod setfcap"
DROP = (
    "setpriv",
    f"--bounding-set=-all,{','.join('+' + name for name in DOCKERS.split())}",
    "--inh-caps=-all",
)


@pytest.mark.needs_program("setpriv")
def test_user_namespaces_denied_by_a_seccomp_filter() -> None:
    """As in a container with Docker's default capabilities and profile."""
    name, feature, remedy = report(*DROP * IS_ROOT, code=DENY + REPORT)
    assert (name, "user namespaces" in feature) == ("UnsupportedHost", True)
    assert "seccomp" in remedy


@pytest.mark.needs_root
@pytest.mark.needs_program("setpriv")
def test_root_without_the_capabilities() -> None:
    """It is an ordinary user then, and its sandboxes work as such a user's."""
    code = "import sandboxcore; print(sandboxcore.run(['id', '-u'], text=True).stdout)"
    command = [*DROP, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=host_environment())
    assert done.stdout.strip() == "1000", done.stderr


@pytest.mark.needs_root
@pytest.mark.needs_program("unshare")
def test_in_a_chroot(tmp_path: Path) -> None:
    """Its paths mean something else in the mount namespace; better an error than the wrong files."""
    script = """
        new=$1; shift
        mount -t tmpfs none "$new" || exit 99
        for path in /*; do
            if [ -L "$path" ]; then cp -P "$path" "$new/"
            elif [ -d "$path" ]; then mkdir "$new$path" && mount --rbind "$path" "$new$path"
            fi
        done
        exec chroot "$new" "$@"
    """
    new = tmp_path / "new"
    new.mkdir()
    code = REPORT.replace("feature", "stage").replace("remedy", "hint")
    name, stage, hint = report("unshare", "-m", "sh", "-c", script, "sh", str(new), code=code)
    assert (name, stage) == ("SetupError", "template")
    assert "chroot" in hint


def test_process_limit_of_the_user() -> None:
    if IS_ROOT:
        pytest.skip("root is not bound by it")
    code = """
        import resource, sandboxcore
        sandboxcore.run(['true'])
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            print(sandboxcore.run(['true']).returncode)
        except sandboxcore.SandboxError as error:
            print(type(error).__name__, error)
    """
    done = host_program(code)
    assert done.returncode == 0, done.stderr
