"""Volumes: they outlive sandboxes, are shared or exclusive, held as long as a sandbox is, and have a size."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import (
    IS_ROOT,
    Spec,
    host_environment,
    host_process,
    host_program,
    leaves_nothing,
    shell,
    wait_until,
)

import sandboxcore
from sandboxcore import (
    Cause,
    PersistentSandbox,
    Sandbox,
    SandboxBusy,
    SpecError,
    UnsupportedHost,
    VolumeNotFound,
    Volumes,
    aio,
)
from sandboxcore.spec import Mount

MiB = 1 << 20
SHARED, EXCLUSIVE = Spec(volumes=["shared:/data"]), Spec(volumes=["single:/data"])


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    """Those of a state directory of our own, with a shared and an exclusive one."""
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(tmp_path / "state"))
    found = Volumes()
    found.create("shared")
    found.create("single", exclusive=True)
    sandboxcore.run(["true"], spec=SHARED)  # refused here and now where it cannot be done
    return found


@pytest.fixture
def bounded(volumes: Volumes) -> Volumes:
    """Where the host can bound them, one more, of 16 MiB and 64 inodes."""
    try:
        volumes.create("bounded", quota="16M", inodes=64)
    except UnsupportedHost as error:
        pytest.skip(str(error))
    return volumes


def users(volumes: Volumes, name: str) -> int:
    return len(volumes.describe(name).users)


# --- what they are for ------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, 0, "77:88"] if IS_ROOT else [None])
def test_what_is_written_stays_and_is_the_owners(volumes: Volumes, user: int | str | None) -> None:
    script = "umask 077; mkdir /data/dir; echo one > /data/dir/file; stat -c %u:%g /data/dir/file /data"
    inside = shell(script, spec=SHARED.replace(user=user)).stdout.decode().split()
    expected = "1000:1000" if user is None else "0:0" if user == 0 else user
    assert inside == [expected, expected]
    file = volumes.get("shared").path / "data/dir/file"
    assert (file.read_text(), file.stat().st_uid, file.stat().st_gid) == ("one\n", os.geteuid(), os.getegid())
    for access in ("rw", "ro"):  # as whoever, for it is the volume's and not a user's
        done = shell("cat /data/dir/file", spec=Spec(volumes=[("shared", "/data", access)]))
        assert done.stdout == b"one\n", done
    assert shell("cat /data/dir/file; rm -r /data/dir", spec=SHARED).stdout == b"one\n"


def test_several_sandboxes_share_one(volumes: Volumes) -> None:
    reader = Spec(mounts=[Mount(kind="volume", source="shared", target="/workspace/in")])
    with Sandbox(SHARED) as first, Sandbox(reader) as second:
        assert first.shell("echo from first > /data/file").ok
        assert second.shell("cat in/file; echo no > in/file").stdout == b"from first\n"
        assert b"Read-only" in second.shell("echo no > in/file").stderr
        assert sorted(volumes.describe("shared").users) == sorted([first.id, second.id])
        assert first.shell("grep /data /proc/mounts").stdout.split()[3].split(b",")[:3] == [
            *(b"rw", b"nosuid", b"nodev"),
        ]
        first.stop()
        first.start()
        assert first.shell("cat /data/file").stdout == b"from first\n"
    assert volumes.describe("shared").users == ()


def test_one_volume_in_two_places(volumes: Volumes) -> None:
    spec = Spec(volumes=["shared:/a", "shared:/b:ro", "single:/workspace/c"])
    assert shell("echo x > /a/file; cat /b/file; echo > /b/file || echo y > c/z", spec=spec).stdout == b"x\n"
    assert (volumes.get("single").path / "data/z").read_text() == "y\n"


def test_asyncio_and_the_state_directory_of_a_persistent_sandbox(volumes: Volumes, tmp_path: Path) -> None:
    async def awaited() -> tuple[bytes, int, int]:
        done = await aio.run(["sh", "-c", "echo x | tee /data/file"], spec=SHARED)
        async with aio.Sandbox(EXCLUSIVE) as sandbox:
            with pytest.raises(SandboxBusy, match="single.*exclusive.*in use by sbx-"):
                await aio.run(["true"], spec=EXCLUSIVE)
            during = users(volumes, "single")
            await sandbox.exec(["true"], check=True)
        return done.stdout, during, users(volumes, "single")

    assert asyncio.run(awaited()) == (b"x\n", 1, 0)
    elsewhere = Volumes(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="volume create shared"):
        PersistentSandbox(SHARED, state_dir=tmp_path / "elsewhere")
    elsewhere.create("shared")
    with PersistentSandbox.create(SHARED, state_dir=tmp_path / "elsewhere") as made:
        assert made.shell("echo other > /data/file").ok
        assert (users(volumes, "shared"), users(elsewhere, "shared")) == (0, 1)
        made.destroy()
    assert (elsewhere.get("shared").path / "data/file").read_text() == "other\n"


# --- in use -----------------------------------------------------------------------------------------


def test_exclusive_means_one_sandbox_at_a_time(volumes: Volumes) -> None:
    for _ in range(3):  # free as soon as the one before is closed
        with Sandbox(EXCLUSIVE) as sandbox:
            for attempt in (lambda: sandboxcore.run(["true"], spec=EXCLUSIVE), Sandbox(EXCLUSIVE).start):
                with pytest.raises(SandboxBusy, match=f"exclusive, and in use by {sandbox.id}"):
                    attempt()
            sandbox.stop()
            assert sandboxcore.run(["true"], spec=EXCLUSIVE).ok
            sandbox.start()
            assert sandbox.exec(["touch", "/data/file"]).ok
        assert sandboxcore.run(["ls", "/data"], spec=EXCLUSIVE).stdout == b"file\n"


def test_a_use_may_end_while_it_is_looked_at(volumes: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends removes the mark of it, which somebody else has just listed."""
    name = "single"
    mark, real, ended = volumes.get(name).path / "uses/run-1.0", os.open, []

    def late(path: Any, *args: Any, **options: Any) -> int:
        if path == mark:
            mark.unlink()
            ended.append(path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", late)
    for look in (lambda: volumes.describe(name), lambda: sandboxcore.run(["true"], spec=EXCLUSIVE)):
        mark.write_text("")
        look()
    assert ended == [mark, mark]


def test_a_race_for_an_exclusive_one_has_one_winner(volumes: Volumes) -> None:
    barrier = threading.Barrier(6)

    def attempt(_: int) -> Sandbox | None:
        sandbox = Sandbox(EXCLUSIVE)
        barrier.wait(60)
        try:
            sandbox.start()
        except SandboxBusy:
            return None
        return sandbox

    with ThreadPoolExecutor(6) as pool:
        winners = [sandbox for sandbox in pool.map(attempt, range(6)) if sandbox]
    assert len(winners) == 1
    winners[0].close()


def test_a_use_ends_with_its_sandbox_however_that_ends(volumes: Volumes) -> None:
    sandbox = Sandbox.create(EXCLUSIVE)
    os.kill(sandbox.pid, signal.SIGKILL)
    wait_until(lambda: users(volumes, "single") == 0, "the lock of a killed init")
    sandbox.close()
    code = """
        import sys
        from sandboxcore import *
        spec = SandboxSpec(volumes=["single:/data"])
        if sys.argv[1] == "run":
            print("ready", flush=True)
            run(["sh", "-c", "touch /data/there; sleep 60"], spec=spec)
        sandbox = Sandbox.create(spec)
        sandbox.popen(["sleep", "60"])
        print("ready", flush=True)
        sys.stdin.read()
    """
    for how in ("run", "stay"):
        with host_process(code, how) as process:
            assert process.stdout.readline() == "ready\n"
            wait_until(lambda: users(volumes, "single") == 1, "it to start")
            with pytest.raises(SandboxBusy):
                sandboxcore.run(["true"], spec=EXCLUSIVE)
            process.kill()
            process.wait(60)
        wait_until(lambda: users(volumes, "single") == 0, "the lock of a killed host process")
        assert sandboxcore.run(["true"], spec=EXCLUSIVE).ok


def test_a_persistent_sandbox_has_it_without_its_maker(volumes: Volumes) -> None:
    code = """
        from sandboxcore import *
        print(PersistentSandbox.create(SandboxSpec(volumes=["single:/data"]), name="one").id)
    """
    made = host_program(code)
    assert made.returncode == 0, made
    assert volumes.describe("single").users == (made.stdout.strip(),)
    with pytest.raises(SandboxBusy, match="in use by sbx-.*; end them first"):
        volumes.delete("single")
    with PersistentSandbox.connect("one") as sandbox:
        assert sandbox.shell("echo kept > /data/file").ok
        sandbox.stop()
        assert users(volumes, "single") == 0
        sandbox.start()
        assert sandbox.shell("cat /data/file").stdout == b"kept\n"
        sandbox.destroy()
    volumes.delete("single")
    assert [volume.name for volume in volumes.list()] == ["shared"]


def test_a_fork_of_the_caller_has_no_part_in_it(volumes: Volumes) -> None:
    """Nor has what another thread happens to start."""
    read, write = os.pipe()
    sandbox = Sandbox.create(EXCLUSIVE)
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    sandbox.close()
    try:
        assert sandboxcore.run(["true"], spec=EXCLUSIVE).ok
    finally:
        os.close(write)
        os.waitpid(child, 0)
        os.close(read)


def test_nothing_is_left_behind(volumes: Volumes) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    with leaves_nothing():
        sandboxcore.run(["true"], spec=SHARED)
        with Sandbox(EXCLUSIVE), pytest.raises(SandboxBusy):
            sandboxcore.run(["true"], spec=EXCLUSIVE)
        with pytest.raises(SandboxBusy), Sandbox(EXCLUSIVE):
            Sandbox.create(EXCLUSIVE.replace(volumes=["shared:/a", "single:/b"]))
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert volumes.gc() == ()
    assert all(not os.listdir(volume.path / "uses") for volume in volumes.list())


# --- the registry -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item",
    ["v", "v:", ":/d", "v:d", "v:/d:rx", "v:/d:ro:", "v:/proc/x", "v:/", "../v:/d", "a/b:/d", "/v:/d",
     ".v:/d", "v:/a/../b", "v" * 65 + ":/d", "v\0:/d", ("v",), ("v", "/d", "rx"), ("v", "/d", "ro", "rw"), 7,
     ("", "/d"), (None, "/d")],
)  # fmt: skip
def test_bad_ones_in_a_spec(item: Any) -> None:
    with pytest.raises(SpecError):
        Spec(volumes=[item])


def test_good_ones_in_a_spec(tmp_path: Path) -> None:
    spec = Spec(volumes=["v:/d", "w:/e:ro", ("x", Path("/f")), ("y", "/g:ro", "rw")])
    assert [(m.source, m.target, m.read_only) for m in spec.all_mounts()] == [
        *(("v", "/d", False), ("w", "/e", True), ("x", "/f", False), ("y", "/g:ro", False)),
    ]
    assert Spec.from_dict(json.loads(json.dumps(spec.to_dict()))).all_mounts() == spec.all_mounts()
    (tmp_path / "spec.toml").write_text('volumes = ["v:/d", ["w", "/e", "ro"]]')
    assert len(Spec.from_toml(tmp_path / "spec.toml").all_mounts()) == 2
    assert Spec(volumes=[f"v{n}:/{n}" for n in range(16)])
    for wrong in (["v:/d", "w:/d"], [f"v{n}:/{n}" for n in range(17)]):
        with pytest.raises(SpecError):
            Spec(volumes=wrong)


@pytest.mark.parametrize("access", ["rw", "ro"])
def test_nothing_in_one_is_denied(volumes: Volumes, access: Any) -> None:
    """Others may put it there later, or move it: a mask would promise too much."""
    (volumes.get("shared").path / "data/secret").touch()
    for path in ("/data/secret", "/data"):
        with pytest.raises(SpecError, match="deny: .* volume shared"):
            sandboxcore.run(["true"], spec=Spec(volumes=[("shared", "/data", access)], deny=[path]))


def test_sixteen_of_them_and_many_descriptors(volumes: Volumes) -> None:
    for n in range(16):
        volumes.create(f"v{n}")
    spec = Spec(volumes=[f"v{n}:/v/{n}" for n in range(16)])
    read, write = os.pipe()
    copies = [os.dup(read) for _ in range(60)]
    assert sandboxcore.run(["ls", "/v"], spec=spec, pass_fds=copies).stdout.split()[-1] == b"9"
    with Sandbox(spec) as sandbox:
        assert sandbox.exec(["touch", *(f"/v/{n}/x" for n in range(16))]).ok
    for fd in (read, write, *copies):
        os.close(fd)


def test_missing_ones_and_names(volumes: Volumes) -> None:
    with pytest.raises(SpecError, match="no volume 'none' .*make it: sandboxcore volume create none"):
        sandboxcore.run(["true"], spec=Spec(volumes=["none:/d"]))
    for action in (volumes.get, volumes.describe, volumes.delete):
        with pytest.raises(VolumeNotFound):
            action("none")
        for name in ("../shared", "a/b", "", ".", "..", ".lock", "a\nb"):
            with pytest.raises(SpecError, match="name"):
                action(name)
    with pytest.raises(SpecError, match="already"):
        volumes.create("shared")
    for wrong in (
        {"quota": "1023K"},
        {"quota": "x"},
        {"inodes": 5},
        {"labels": {"a": 1}},
        {"quota": "8M", "inodes": 0},
    ):
        with pytest.raises(SpecError):
            volumes.create("wrong", **wrong)
    assert [volume.name for volume in volumes.list()] == ["shared", "single"]


def test_records(volumes: Volumes) -> None:
    made = volumes.create("labelled", labels={"team": "a", "x": "y"})
    assert Volumes().get("labelled") == made
    assert volumes.list(labels={"team": "a"}) == [made]
    assert (made.quota, made.exclusive, made.to_dict()["path"]) == (None, False, str(made.path))
    (made.path / "volume.json").write_text("{")
    with pytest.raises(sandboxcore.SandboxError, match="volume.json"):
        volumes.get("labelled")


def test_one_with_an_old_name_is_another_one(volumes: Volumes) -> None:
    sandbox = Sandbox(SHARED)  # which has looked at it already
    assert shell("echo old > /data/file", spec=SHARED).ok
    volumes.delete("shared")
    with pytest.raises(SpecError, match="removed|no volume"):
        sandbox.start()
    volumes.create("shared")
    assert shell("ls /data", spec=SHARED).stdout == b""
    with sandbox:
        assert sandbox.shell("ls /data").stdout == b""


def test_a_race_for_a_name_has_one_winner(volumes: Volumes) -> None:
    def attempt(_: int) -> int:
        try:
            volumes.create("new")
        except SpecError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(24))) == 1


def test_gc_removes_what_a_crash_has_left(volumes: Volumes) -> None:
    for name in (".new-1", ".gone-2"):
        (volumes.path / name / "data/deep").mkdir(parents=True)
    mark = volumes.get("shared").path / "uses/sbx-1.1234"
    mark.touch()
    with Sandbox(SHARED) as sandbox:
        assert volumes.describe("shared").users == (sandbox.id,)
        assert volumes.gc(dry_run=True) == (".gone-2", ".new-1")
        assert sandboxcore.gc(volumes.path.parent).removed == ("volumes/.gone-2", "volumes/.new-1")
        assert volumes.gc() == ()
        assert users(volumes, "shared") == 1
    assert not mark.exists()
    assert sorted(os.listdir(volumes.path)) == [".lock", "shared", "single"]


def test_what_is_in_it_is_counted(volumes: Volumes) -> None:
    empty = volumes.describe("shared")
    script = "cd /data; head -c 1M /dev/zero > a; ln a b; ln -s /usr c; mkdir d; mkfifo d/e"
    assert shell(script, spec=SHARED).ok
    found = volumes.describe("shared")
    assert (empty.bytes, empty.inodes, found.inodes) == (0, 0, 4)
    assert MiB <= (found.bytes or 0) < MiB + 65536


# --- with a size ------------------------------------------------------------------------------------


@pytest.mark.skipif(IS_ROOT, reason="root can")
def test_a_size_is_for_root(volumes: Volumes) -> None:
    with pytest.raises(UnsupportedHost, match="only root.*SANDBOXCORE_STATE_DIR"):
        volumes.create("bounded", quota="16M")
    assert not (volumes.path / "bounded").exists()


def test_the_kernel_refuses_more(bounded: Volumes) -> None:
    """Everybody who shares it meets the same bound, and the cause says so."""
    image = bounded.get("bounded").path / "image"
    spec = Spec(volumes=["bounded:/data"])
    assert shell("ls -A /data", spec=spec).stdout == b""  # from here on this process holds the device
    with (
        leaves_nothing(),
        Sandbox(spec) as first,
        Sandbox(spec.replace(volumes=["bounded:/other"])) as second,
    ):
        filled = first.shell("cat /dev/zero > /data/file")
        assert (filled.cause, filled.stderr) == (Cause.DISK, b"cat: write error: No space left on device\n")
        assert filled.detail.startswith("bytes of volume bounded on /data (rw, spec volume): ")
        assert second.shell("cat /dev/zero > /other/more").cause is Cause.DISK
        usage = bounded.describe("bounded")
        assert 15.9 * MiB < (usage.bytes or 0) <= 16.5 * MiB
        assert (usage.inodes in (1, 2), len(usage.users)) == (True, 2)
        assert image.stat().st_blocks * 512 <= image.stat().st_size < 26 * MiB, "on the host's disk"
        assert second.shell("rm /other/*; sync -f /other").ok
        wait_until(lambda: image.stat().st_blocks * 512 < 8 * MiB, "what was removed to be given back")
        made = first.shell("i=0; while ( : > /data/$i ); do i=$((i+1)); done; ls /data | wc -l; exit 3")
        assert (made.cause, 64 <= int(made.stdout) < 64 + 64) == (Cause.DISK, True)
        assert made.detail.startswith("inodes of volume bounded")


def test_it_is_one_file_system_for_all_processes(bounded: Volumes) -> None:
    """Never on two loop devices; gone with the last that needs it; and what was written is there again."""
    code = """
        import sys
        from sandboxcore import *
        with Sandbox(SandboxSpec(volumes=["bounded:/data"])) as sandbox:
            sandbox.exec(["sh", "-c", "echo x >> /data/file; cat /data/file"], check=True)
            print("ready", flush=True)
            sys.stdin.readline()
            print(sandbox.exec(["cat", "/data/file"]).stdout.count(b"x"))
    """
    image = bounded.get("bounded").path / "image"

    def devices() -> int:
        known = os.stat(image)
        listing = subprocess.run(["losetup", "-nO", "BACK-INO", "-j", image], capture_output=True, check=True)
        return listing.stdout.split().count(str(known.st_ino).encode())

    mounts = Path("/proc/self/mountinfo").read_text()
    with host_process(code) as one, host_process(code) as two:
        assert (one.stdout.readline(), two.stdout.readline()) == ("ready\n", "ready\n")
        assert users(bounded, "bounded") == 2
        assert devices() == 1
        with pytest.raises(SandboxBusy):
            bounded.delete("bounded")
        for process in (one, two):
            assert process.communicate("\n", timeout=60)[0] == "2\n"
    wait_until(lambda: devices() == 0, "the loop device to be given back")
    assert Path("/proc/self/mountinfo").read_text() == mounts
    assert shell("cat /data/file", spec=Spec(volumes=["bounded:/data"])).stdout == b"x\nx\n"


def test_it_is_removed_although_a_template_has_it(bounded: Volumes) -> None:
    """This process keeps the mount ready for another sandbox: the file's space is given back all the same."""
    spec = Spec(volumes=["bounded:/data"])
    assert shell("head -c 8M /dev/zero > /data/file; mkdir -p /data/a/b/c", spec=spec).ok
    with open(bounded.get("bounded").path / "image", "rb") as image:
        bounded.delete("bounded")
        assert os.fstat(image.fileno()).st_nlink == 0
        assert os.fstat(image.fileno()).st_blocks * 512 < 6 * MiB
    bounded.create("bounded", quota="8M")
    assert shell("ls /data", spec=spec).stdout == b""
    bounded.delete("bounded")


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture
def cli(volumes: Volumes) -> Iterator[Any]:
    def call(*args: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "sandboxcore", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=host_environment(), timeout=60)
        assert done.returncode == status, done
        return done.stderr if status else done.stdout

    return call


def test_command_line(cli: Any) -> None:
    assert cli("volume", "create", "new", "--exclusive", "--label", "a=b") == ""
    script = "echo text > /d/file; cat /d/file"
    assert cli("run", "--volume", "new:/d", "--volume", "shared:/s:ro", "--", "sh", "-c", script) == "text\n"
    listed = json.loads(cli("volume", "ls", "--json", "--label", "a=b"))
    assert [(one["name"], one["exclusive"], one["files"], one["users"]) for one in listed] == [
        ("new", True, 1, [])
    ]
    assert cli("volume", "ls").splitlines()[0].split() == ["NAME", "USED", "QUOTA", "FILES", "KIND", "USERS"]
    assert "no volume 'none'" in cli("run", "--volume", "none:/d", "--", "true", status=125)
    cli("create", "--volume", "new:/d", "box")
    assert "in use by sbx-" in cli("volume", "rm", "new", "shared", status=125)
    cli("rm", "-f", "box")
    cli("volume", "rm", "new")
    assert [one["name"] for one in json.loads(cli("volume", "ls", "--json"))] == ["single"]
