"""Host directories and files that come to a running sandbox and go again: as if its spec had named them."""

import asyncio
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Spec, host_program, leaves_nothing, snapshot
from trees import small_source

from sandboxcore import (
    PIPE,
    STDOUT,
    InvalidTransition,
    Limits,
    Mount,
    PersistentSandbox,
    Process,
    Sandbox,
    SandboxBusy,
    SandboxError,
    SetupError,
    SpecError,
    aio,
    spawner,
)

PATIENCE = 30


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_source(tmp_path / "source")


@pytest.fixture(params=["plain", "overlay", "writable"])
def box(request: pytest.FixtureRequest, source: Path) -> Iterator[Sandbox]:
    """For read-only and writable binds; /data is private."""
    if request.param != "plain":
        request.getfixturevalue("overlays")
    specs = {
        "plain": Spec(live_binds="rw", tmpfs=["/data:1M"]),
        "overlay": Spec(live_binds="rw", overlay=[(source / "dir", "/data")]),
        "writable": Spec(live_binds="rw", writable=True),
    }
    with Sandbox(specs[request.param]) as sandbox:
        yield sandbox


@pytest.fixture
def plain() -> Iterator[Sandbox]:
    with Sandbox(Spec(live_binds="rw")) as sandbox:
        yield sandbox


def ok(sandbox: Sandbox, script: str) -> bytes:
    done = sandbox.shell(script, timeout=PATIENCE)
    assert done.ok, done
    return done.stdout


class Shell:
    """One that runs all the time, so that what it sees and may do was decided before."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.process: Process[bytes] = sandbox.popen(["sh"], stdin=PIPE, stdout=PIPE, stderr=STDOUT)

    def __call__(self, script: str) -> bytes:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{script}\necho end\n".encode())
        self.process.stdin.flush()
        lines = []
        while (line := self.process.stdout.readline()) not in (b"end\n", b""):
            lines.append(line)
        return b"".join(lines)

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.close()


# --- what is seen -----------------------------------------------------------------------------------


def test_running_and_new_commands_see_it(box: Sandbox, source: Path) -> None:
    with Shell(box) as shell:
        box.bind(source, "/data/a/ro")
        box.bind(str(source), "/workspace/rw", read_only=False)
        box.bind(source / "file", "/tmp/new/file")
        for run in (shell, lambda script: box.shell(script, stderr=STDOUT).stdout):
            assert run("cat /data/a/ro/dir/deep /tmp/new/file /workspace/rw/file") == b"deep\nhost\nhost\n"
            for path in ("/data/a/ro/file", "/data/a/ro/new", "/tmp/new/file"):
                assert b"ead-only file system" in run(f"echo x >{path}")
            run("cd /workspace/rw && mkdir -p d && echo x >d/new && mv d/new . && rmdir d; cd /")
            assert (source / "new").read_text() == "x\n"
            assert (source / "new").stat().st_uid == source.stat().st_uid
            run("rm /workspace/rw/new")
        assert box.files.read("/data/a/ro/file") == b"host\n"
        for path in ("/data/a/ro", "/workspace/rw", "/tmp/new/file"):
            box.unbind(path)
        assert shell("ls -A /data/a/ro /workspace/rw; cat /tmp/new/file; echo own >/data/a/ro/x") == (
            b"/data/a/ro:\n\n/workspace/rw:\n"
        )
    assert not (source / "x").exists()


def test_binds_and_capabilities_tell(plain: Sandbox, source: Path) -> None:
    def mounts() -> dict[str, bool]:
        found = {mount.target: mount.read_only for mount in plain.capabilities.mounts}
        return {path: found[path] for path in ("/tmp/ro", "/tmp/rw") if path in found}

    assert (plain.binds, mounts()) == ((), {})
    plain.bind(source, "/tmp/ro")
    plain.bind(source, "/tmp//rw/", read_only=False)
    assert plain.binds == (
        Mount(kind="bind", source=str(source), target="/tmp/ro"),
        Mount(kind="bind", source=str(source), target="/tmp/rw", read_only=False),
    )
    assert mounts() == {"/tmp/ro": True, "/tmp/rw": False}
    plain.unbind("/tmp/ro/")
    assert [bind.target for bind in plain.binds] == ["/tmp/rw"]
    assert mounts() == {"/tmp/rw": False}


def test_the_same_as_in_the_spec(source: Path) -> None:
    """To the last option, whoever asks."""
    spec = Spec(live_binds="rw", ro=[(source, "/a/ro")], rw=[(source, "/a/rw")])
    with Sandbox(spec) as sandbox:
        sandbox.bind(source, "/tmp/ro")
        sandbox.bind(source, "/tmp/rw", read_only=False)
        seen = {mount.target: mount for mount in sandbox.capabilities.mounts}
        for kind in ("ro", "rw"):
            one, other = seen[f"/a/{kind}"], seen[f"/tmp/{kind}"]
            assert (one.options, one.source, one.fstype) == (other.options, other.source, other.fstype)
            assert {"nosuid", "nodev", kind} <= {*other.options}


def test_no_weaker_than_others(source: Path) -> None:
    script = """
    grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Seccomp_filters|Cap...|SigBlk|SigIgn):' /proc/self/status
    cat /proc/self/uid_map; umask; ls /proc/self/fd | wc -l; ls /proc | grep -E 'nodes|scratch'
    for path in /usr/x /dev/x /proc/x /proc/sys/kernel/x /etc/x /x; do : > $path; done 2>&1
    """
    with Sandbox(Spec(rw=[(source, "/opt")])) as usual:
        expected = usual.shell(script).stdout
    for kind in ("ro", "rw"):
        with Sandbox(Spec(rw=[(source, "/opt")], live_binds=kind)) as sandbox:
            sandbox.bind(source, "/tmp/x")
            seen = sandbox.shell(script).stdout
            # where Landlock is no wall, the mount is
            assert seen.replace(b"Read-only file system", b"Permission denied") == expected.replace(
                b"Read-only file system", b"Permission denied"
            )


def test_below_one_another(plain: Sandbox, source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o755)
    (tmp_path / "other/x").write_text("x\n")
    plain.bind(source, "/tmp/a")
    plain.bind(tmp_path / "other", "/tmp/a/dir")
    assert ok(plain, "cat /tmp/a/file /tmp/a/dir/x") == b"host\nx\n"
    with pytest.raises(SandboxBusy, match="below it"):
        plain.unbind("/tmp/a")
    plain.unbind("/tmp/a/dir")
    assert ok(plain, "cat /tmp/a/dir/deep") == b"deep\n"
    plain.bind(tmp_path / "other", "/tmp/a/dir")
    plain.unbind("/tmp/a", lazy=True)
    assert plain.binds == ()
    plain.bind(source, "/tmp/a")
    plain.unbind("/tmp/a")


@pytest.mark.needs_root
def test_file_systems_below_the_source(tmp_path: Path) -> None:
    """They come along, read-only; and nothing of them is in the way of lazy=True."""
    code = """
    import ctypes, os, subprocess, sys
    from sandboxcore import Sandbox, SandboxBusy, SandboxSpec
    top, libc = sys.argv[1], ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0
    assert libc.mount(None, b"/", None, 0x44000, None) == 0
    os.makedirs(f"{top}/a/b")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "none", f"{top}/a/b"], check=True)
    open(f"{top}/a/b/f", "w").write("below")
    os.chmod(top, 0o755)
    with Sandbox(SandboxSpec(live_binds="ro")) as sandbox:
        sandbox.bind(top, "/tmp/x")
        done = sandbox.shell("cat /tmp/x/a/b/f; echo > /tmp/x/a/b/f")
        print(done.stdout.decode(), b"ead-only" in done.stderr)
        try:
            sandbox.unbind("/tmp/x")
        except SandboxBusy:
            sandbox.unbind("/tmp/x", lazy=True)
            print(sandbox.shell("grep -c /tmp/x /proc/self/mountinfo").stdout.decode(), end="")
    """
    done = host_program(code, str(tmp_path))
    assert done.stdout == "below True\n0\n", done


# --- taking it away ---------------------------------------------------------------------------------


def test_in_use(box: Sandbox, source: Path) -> None:
    box.bind(source, "/data/x", read_only=False)
    with Shell(box) as shell:
        for use, end in (("cd /data/x/dir", "cd /"), ("exec 5</data/x/file", "exec 5<&-")):
            shell(use)
            with pytest.raises(SandboxBusy, match="lazy=True"):
                box.unbind("/data/x")
            assert shell("cat /data/x/file") == b"host\n"
            shell(end)
        with box.files.open("/data/x/file", "rb") as file:
            with pytest.raises(SandboxBusy):
                box.unbind("/data/x")
            assert file.read() == b"host\n"
        shell("exec 5>/data/x/open; cd /data/x")
        box.unbind("/data/x", lazy=True)
        assert box.binds == ()
        shell("echo still >&5")
        assert (source / "open").read_text() == "still\n", "what is open stays open"
        assert b"deep\n" not in shell("cat ../dir/deep; cat ../../dir/deep; ls ..")
        assert shell("ls -A /data/x") == b""
        if box.spec.landlock and not box._plan.omitted:
            assert b"Permission denied" in shell("cat file")
        box.bind(source, "/data/x")
        assert shell("cat /data/x/file") == b"host\n"


def test_renamed_meanwhile(box: Sandbox, source: Path) -> None:
    """Whoever renames what leads there keeps nothing."""
    box.bind(source, "/data/one/two/x")
    ok(box, "cd /data; mv one three; mkdir -p one/two/x; mv three/two .; cat two/x/file")
    if box._plan.overlays:
        box.snapshot()
        assert ok(box, "cat /data/two/x/file") == b"host\n"
    with Shell(box) as shell:
        shell("cd /data/two/x")
        with pytest.raises(SandboxBusy):
            box.unbind("/data/one/two/x")
    box.unbind("/data/one/two/x")
    assert ok(box, "ls -A /data/two/x") == b""


@pytest.mark.usefixtures("overlays")
def test_odd_names(source: Path) -> None:
    """mountinfo writes some of their characters otherwise."""
    odd = [
        "a b",
        "a\\040b",
        "tab\there",
        "line\nfeed",
        "#x",
        "ä€",
        "\udcff",
        "(deleted)",
        "x" * 255,
        "-",
        "\\",
    ]
    with Sandbox(Spec(live_binds="ro", writable=True)) as sandbox:
        for name in odd:
            sandbox.bind(source, f"/workspace/{name}/{name}")
        sandbox.snapshot()
        assert ok(sandbox, "cat /workspace/*/*/file | uniq -c").split() == [b"11", b"host"]
        for name in odd:
            sandbox.unbind(f"/workspace/{name}/{name}")
        assert sandbox.shell("cat /workspace/*/*/file").stdout == b""


def test_removed_from_outside(plain: Sandbox, source: Path) -> None:
    """The target lay in a host directory, and somebody there has removed it: the kernel has taken it away."""
    plain.bind(source, "/tmp/rw", read_only=False)
    (source / "place").mkdir()
    plain.bind(source / "dir", "/tmp/rw/place")
    assert ok(plain, "cat /tmp/rw/place/deep") == b"deep\n"
    (source / "place").rmdir()
    plain.unbind("/tmp/rw/place")
    plain.unbind("/tmp/rw")


def test_end_and_new_start(plain: Sandbox, source: Path) -> None:
    plain.bind(source, "/tmp/x")
    plain.suspend()
    for action in (lambda: plain.bind(source, "/tmp/y"), lambda: plain.unbind("/tmp/x")):
        with pytest.raises(InvalidTransition):
            action()
    plain.resume()
    plain.stop()
    assert plain.binds == ()
    with pytest.raises(InvalidTransition):
        plain.bind(source, "/tmp/x")
    plain.start()
    assert ok(plain, "ls -A /tmp") == b""
    plain.bind(source, "/tmp/x")


# --- other layers -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("overlays")
@pytest.mark.parametrize("writable", [True, False])
def test_through_snapshots(source: Path, tmp_path: Path, writable: bool) -> None:
    overlay = [] if writable else [(source / "dir", "/data")]
    spec = Spec(live_binds="rw", writable=writable, overlay=overlay, tmpfs=["/data/t:1M"])
    (tmp_path / "other").mkdir(mode=0o755)
    (tmp_path / "other/x").write_text("x\n")
    see = "cat /data/p/ro/file /data/rw/file /data/t/x/file /tmp/x/file /data/p/ro/dir/x /workspace/f"
    with Sandbox(spec) as sandbox:
        first = sandbox.snapshot()
        for target in ("/data/p/ro", "/data/t/x", "/tmp/x"):
            sandbox.bind(source, target)
        sandbox.bind(tmp_path / "other", "/data/p/ro/dir")
        sandbox.bind(source, "/data/rw", read_only=False)
        sandbox.bind(source / "file", "/workspace/f")
        mounts = "cut -d' ' -f4,5,6 /proc/self/mountinfo | sort"
        before = ok(sandbox, mounts)
        expected = ok(sandbox, see)
        assert expected == 4 * b"host\n" + b"x\nhost\n"
        second = sandbox.snapshot()
        for change in (sandbox.discard, sandbox.snapshot, lambda: sandbox.restore(first)):
            change()  # the first did not have the targets
            assert ok(sandbox, see) == expected
            assert ok(sandbox, mounts) == before
        ok(sandbox, "echo y >/data/rw/new; cd /data/p && ! touch ro/new")
        assert (source / "new").read_text() == "y\n"
        with sandbox.fork()[0] as child:
            assert child.binds == ()
            assert child.shell(see).stdout == b"", "they are no part of what it has written"
            child.bind(source, "/data/rw")
        sandbox.restore(second)
        with Shell(sandbox) as shell:
            shell("cd /data/t/x")
            with pytest.raises(SandboxBusy):
                sandbox.unbind("/data/t/x")
        assert sandbox.snapshot(copy=True).copied
        for bind in reversed(sandbox.binds):
            sandbox.unbind(bind.target)
        assert sandbox.shell(see).stdout == b""


@pytest.mark.usefixtures("overlays")
def test_a_snapshot_in_which_the_target_is_something_else(source: Path) -> None:
    with Sandbox(Spec(live_binds="ro", writable=True)) as sandbox:
        ok(sandbox, "echo file >/workspace/x; ln -s . /workspace/y")
        kept = sandbox.snapshot()
        ok(sandbox, "rm /workspace/?; mkdir /workspace/x; echo now >/workspace/now")
        for name, code in (("x", errno.ENOTDIR), ("y/z", errno.ELOOP)):
            sandbox.bind(source, f"/workspace/{name}")
            with pytest.raises(SetupError, match=f"on /workspace/{name}") as caught:
                sandbox.restore(kept)
            assert caught.value.errno == code
            assert ok(sandbox, f"cat /workspace/{name}/file /workspace/now") == b"host\nnow\n"
            sandbox.unbind(f"/workspace/{name}")
            ok(sandbox, "rm -r /workspace/?")
        sandbox.restore(kept)
        assert ok(sandbox, "cat /workspace/x") == b"file\n"


# --- what is refused --------------------------------------------------------------------------------


def test_only_where_it_is_allowed(source: Path, tmp_path: Path) -> None:
    with Sandbox() as sandbox, pytest.raises(SpecError, match='live_binds="ro"'):
        sandbox.bind(source, "/tmp/x")
    with Sandbox(Spec(live_binds="ro")) as sandbox:
        sandbox.bind(source, "/tmp/x")
        with pytest.raises(SpecError, match='live_binds="rw"'):
            sandbox.bind(source, "/tmp/y", read_only=False)
    for value in ("yes", True):
        with pytest.raises(SpecError, match="live_binds"):
            Spec(live_binds=value)
    spec = Spec(live_binds="ro")
    with PersistentSandbox(spec, name="x", state_dir=tmp_path / "state") as persistent:
        with pytest.raises(SpecError, match="persistent"):
            persistent.bind(source, "/tmp/x")
        with pytest.raises(SpecError):
            persistent.unbind("/tmp/x")
        assert persistent.binds == ()
        assert persistent.shell("echo fine").stdout == b"fine\n"
        persistent.destroy()


@pytest.mark.usefixtures("overlays")
def test_overlays_have_it_anyhow(source: Path) -> None:
    with Sandbox(Spec(overlay=[(source, "/data")])) as sandbox:
        sandbox.bind(source, "/data/dir")
        assert ok(sandbox, "cat /data/dir/file") == b"host\n"
        with pytest.raises(SpecError, match='live_binds="rw"'):
            sandbox.bind(source, "/tmp/y", read_only=False)


TARGETS = {
    "/": "reserved",
    "/proc": "reserved",
    "/proc/self": "reserved",
    "/dev/shm/x": "reserved",
    "/sys/x": "reserved",
    "relative": "absolute",
    "/tmp/../usr": r"'\.\.'",
    "/tmp/\0": "not a path",
    "/tmp": "would hide '/tmp'",
    "/usr": "would hide '/usr'",
    "/opt": "would hide '/opt/ro'",
    "/opt/ro": "would hide",
    "/tmp/a": "would hide '/tmp/a/b'",
    "/tmp/a/b": "would hide",
    "/srv/d/dir": "denies",
    "/srv/d/dir/deep/x": "denies",
    5: "not a path",
}
REFUSED = {
    "/mnt": errno.ENOENT,
    "/opt/ro/missing": errno.ENOENT,
    "/tmp/a/b/missing": errno.ENOENT,
    "/tmp/link": errno.ELOOP,
    "/tmp/link/x": errno.ELOOP,
    "/tmp/dangling": errno.ELOOP,
    "/tmp/plain": errno.ENOTDIR,
    "/tmp/plain/x": errno.ENOTDIR,
    "/tmp/closed/x": errno.EACCES,
    "/etc/passwd": errno.ENOTDIR,
}


def test_targets(source: Path) -> None:
    spec = Spec(
        live_binds="ro",
        ro=[(source, "/opt/ro"), (source, "/srv/d")],
        deny=["/srv/d/dir/deep"],
        tmpfs=["/data:1M"],
    )
    with Sandbox(spec) as sandbox:
        ok(sandbox, "cd /tmp; mkdir real; ln -s real link; ln -s nowhere dangling; echo >plain")
        ok(sandbox, "mkdir /tmp/closed; chmod 500 /tmp/closed")
        sandbox.bind(source, "/tmp/a/b")
        before, outside = ok(sandbox, "cat /proc/self/mountinfo"), snapshot(source)
        for target, text in TARGETS.items():
            with pytest.raises(SpecError, match=text):
                sandbox.bind(source, target)  # type: ignore[arg-type]
        for target, code in REFUSED.items():
            with pytest.raises(SetupError) as caught:
                sandbox.bind(source, target)
            assert (caught.value.stage, caught.value.errno) == ("mount", code), target
            assert f"on {target}" in str(caught.value)
            assert caught.value.hint
        with pytest.raises(SetupError) as caught:
            sandbox.bind(source / "file", "/tmp/real")
        assert caught.value.errno == errno.EISDIR
        with pytest.raises(SpecError, match="nothing was bound"):
            sandbox.unbind("/tmp/real")
        assert ok(sandbox, "cat /proc/self/mountinfo") == before
        assert snapshot(source) == outside
        sandbox.bind(source / "file", "/tmp/plain")
        sandbox.bind(source, "/data/x")
        sandbox.bind(source / "dir", "/opt/ro/dir")
        assert len(sandbox.binds) == 4
        assert ok(sandbox, "cat /opt/ro/dir/deep; grep -c /opt/ro/dir /proc/self/mountinfo") == b"deep\n1\n"
        sandbox.unbind("/opt/ro/dir")


def test_sources(plain: Sandbox, source: Path, tmp_path: Path) -> None:
    for wrong, text in (
        (tmp_path / "missing", "No such file"),
        ("/", "would show"),
        ("/proc/self", "would show"),
        (source / "file/x", "Not a directory"),
        ("\0", "not a path"),
    ):
        with pytest.raises(SpecError, match=text):
            plain.bind(wrong, "/tmp/x")
    (tmp_path / "link").symlink_to(source)
    plain.bind(tmp_path / "link", "/tmp/x")
    assert ok(plain, "cat /tmp/x/file; ls -A /tmp") == b"host\nx\n"
    os.mkfifo(tmp_path / "fifo")
    plain.bind(tmp_path / "fifo", "/tmp/fifo")
    assert ok(plain, "test -p /tmp/fifo") == b""


def test_a_source_that_is_replaced_meanwhile(plain: Sandbox, source: Path, tmp_path: Path) -> None:
    """What was looked at is what is bound, or nothing."""
    from sandboxcore import binds

    opened = binds._opened

    def replaced(*args: Any) -> Any:
        found = opened(*args)
        source.rename(tmp_path / "aside")
        source.mkdir()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binds, "_opened", replaced)
        with pytest.raises(SetupError) as caught:
            plain.bind(source, "/tmp/x")
    assert (caught.value.stage, caught.value.errno) == ("source", errno.ESTALE)
    assert plain.binds == ()


def test_as_many_as_may_be(plain: Sandbox, source: Path) -> None:
    ok(plain, "cd /tmp; for n in $(seq 65); do mkdir $n; done")
    for n in range(64):
        plain.bind(source, f"/tmp/{n + 1}")
    with pytest.raises(SandboxError, match="64"):
        plain.bind(source, "/tmp/65")
    assert ok(plain, "cat /tmp/*/file | sort | uniq -c").split() == [b"64", b"host"]
    plain.unbind("/tmp/7")
    plain.bind(source, "/tmp/65")
    plain.unbind("/tmp/65")
    for n in range(64):
        if n != 6:
            plain.unbind(f"/tmp/{n + 1}")


@pytest.mark.usefixtures("overlays")
def test_no_room_for_the_target(source: Path) -> None:
    with Sandbox(Spec(live_binds="ro", limits=Limits(inodes=50))) as sandbox:
        sandbox.shell("cd /tmp; i=0; while mkdir d$i; do i=$((i + 1)); done")
        with pytest.raises(SetupError) as caught:
            sandbox.bind(source, "/tmp/x/y")
        assert (caught.value.stage, caught.value.errno) == ("mount", errno.ENOSPC)
        sandbox.bind(source, "/tmp/d1")
        assert len(sandbox.binds) == 1


# --- what is left -----------------------------------------------------------------------------------


def test_nothing_is_left(source: Path) -> None:
    spec = Spec(live_binds="rw")

    def work() -> None:
        with Sandbox(spec) as sandbox:
            for _ in range(5):
                sandbox.bind(source, "/tmp/x/y")
                sandbox.bind(source, "/tmp/z", read_only=False)
                with pytest.raises(SetupError):
                    sandbox.bind(source, "/mnt/x")
                sandbox.unbind("/tmp/x/y")
                sandbox.unbind("/tmp/z", lazy=True)
            sandbox.bind(source, "/tmp/x/y")

    work()
    with leaves_nothing():
        work()


def test_another_spawner_does_as_well(plain: Sandbox, source: Path) -> None:
    """What lends the mount may have been killed."""
    connection = spawner.get_spawner(plain._plan)
    os.kill(connection.pid, signal.SIGKILL)
    plain.bind(source, "/tmp/x")
    assert ok(plain, "cat /tmp/x/file") == b"host\n"
    assert spawner.get_spawner(plain._plan) is not connection


# --- on an event loop -------------------------------------------------------------------------------


def test_on_an_event_loop(source: Path) -> None:
    async def main() -> None:
        async with aio.Sandbox(Spec(live_binds="rw")) as sandbox:
            await asyncio.gather(*(sandbox.bind(source, f"/tmp/{n}/x") for n in range(5)))
            await sandbox.bind(source / "file", "/workspace/f", read_only=False)
            assert [bind.target for bind in sandbox.binds][-1] == "/workspace/f"
            done = await sandbox.shell("cat /tmp/?/x/file; echo changed >/workspace/f; cd /tmp/1/x; echo >f")
            assert done.stdout == 5 * b"host\n"
            assert (source / "file").read_text() == "changed\n"
            process = await sandbox.popen(["sleep", "100"], cwd="/tmp/2/x")
            with pytest.raises(SandboxBusy):
                await sandbox.unbind("/tmp/2/x")
            await sandbox.unbind("/tmp/2/x", lazy=True)
            process.kill()
            await process.wait()
            await sandbox.unbind("/workspace/f")
            with pytest.raises(SetupError):
                await sandbox.bind(source, "/mnt/x")
            with pytest.raises(SpecError):
                await sandbox.bind(source, "/usr")
            task = asyncio.ensure_future(sandbox.bind(source, "/tmp/cancelled"))
            for _ in range(3):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for bind in sandbox.binds:
                await sandbox.unbind(bind.target)
            assert (
                "/tmp/" not in (await sandbox.shell("grep -o '/tmp/.*' /proc/self/mountinfo")).stdout.decode()
            )

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
    with leaves_nothing():
        (source / "file").write_text("host\n")
        asyncio.run(asyncio.wait_for(main(), PATIENCE))
