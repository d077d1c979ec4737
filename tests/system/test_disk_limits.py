"""limits.disk and limits.inodes: they hold exactly, everywhere, and whoever runs into them is told so."""

import asyncio
import errno
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from support import PYTHON, Spec, ask_python, shell

import sandboxcore
from sandboxcore import Cause, Limits, Sandbox, aio
from sandboxcore.spec import Mount

MiB = 1 << 20
TIGHT = Limits(disk=MiB, inodes=60)
FILL = "cat /dev/zero > /tmp/full"
LITTER = "i=0; while [ $i -lt 100 ]; do : > /tmp/$i || exit 7; i=$((i+1)); done"

# Fill the directories in turn, by small pieces; print what went in, and what stopped it.
BYTES = """
    total, stopped, files = 0, set(), [open(f"{place}/file", "wb", buffering=0) for place in sys.argv[1:]]
    while len(stopped) < len(files):
        for file in files:
            try:
                total += file.write(bytes(12288))
            except OSError as error:
                stopped.add((file.name, error.errno))
    print(json.dumps([total, sorted({number for _, number in stopped})]))
"""
INODES = """
    free, made = [os.statvfs(place) for place in sys.argv[1:]], 0
    try:
        while True:
            open(f"{sys.argv[1 + made % (len(sys.argv) - 1)]}/{made}", "x").close()
            made += 1
    except OSError as error:
        print(json.dumps([made, error.errno, [(one.f_files, one.f_ffree) for one in free]]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(b"of the host")
    return tmp_path / "source"


PRIVATE = ("/tmp", "/workspace", "/dev/shm", "/var/tmp")


@pytest.mark.parametrize("places", [("/tmp",), ("/workspace",), PRIVATE])
def test_bytes_stop_exactly_where_they_should(places: tuple[str, ...]) -> None:
    assert ask_python(BYTES, *places, spec=Spec(limits=Limits(disk=2 * MiB))) == [2 * MiB, [errno.ENOSPC]]


@pytest.mark.parametrize("places", [("/tmp",), ("/workspace",), PRIVATE])
def test_inodes_stop_exactly_where_they_should(places: tuple[str, ...]) -> None:
    made, number, before = ask_python(INODES, *places, spec=Spec(limits=Limits(inodes=300)))
    assert before == [[300, made]] * len(places), "one budget: a place of its own would have another number"
    assert number == errno.ENOSPC
    assert made >= 290


@pytest.mark.usefixtures("overlays")
@pytest.mark.parametrize("writable", [False, True])
def test_overlays_share_the_budget(source: Path, writable: bool) -> None:
    """And the host has not a byte of it."""
    spec = Spec(overlay=[(source, "/data")], writable=writable, limits=Limits(disk=2 * MiB, inodes=300))
    places = ("/data", "/tmp", *(["/home"] if writable else []))
    make = "os.makedirs(sys.argv[-1], exist_ok=True)\n"
    assert ask_python(make + dedent(BYTES), *places, spec=spec) == [2 * MiB, [errno.ENOSPC]]
    made, number, before = ask_python(make + dedent(INODES), *places, spec=spec)
    assert number == errno.ENOSPC
    assert made <= before[0][1] <= 300
    assert made >= before[0][1] - 4  # marks of overlayfs on what is new are counted by bytes of such
    assert [(entry.name, entry.stat().st_size) for entry in source.iterdir()] == [("file", 11)]
    kinds = shell("stat -f -c %T /tmp /workspace /dev/shm", spec=spec).stdout.decode().split()
    assert set(kinds) <= {"tmpfs", "overlayfs"}, "in memory: no disk of the host can grow"


@pytest.mark.parametrize(
    ("script", "detail"),
    [(FILL, "limits.disk: 1 MiB used of 1 MiB"), (LITTER, "limits.inodes: 60 used of 60")],
)
def test_whoever_runs_into_a_limit_is_told(script: str, detail: str) -> None:
    spec = Spec(limits=TIGHT)
    argv = ["sh", "-c", script]
    done = shell(script, spec=spec)
    assert (done.cause, done.detail) == (Cause.DISK, detail), done
    with pytest.raises(sandboxcore.CommandFailed, match=f"disk: {detail}"):
        done.check_returncode()
    with Sandbox(spec) as sandbox:
        assert sandbox.exec(argv, timeout=60).cause is Cause.DISK
        sandbox.shell("rm -r /tmp/*", check=True)
        with sandbox.popen(argv) as process:
            process.wait(60)
            assert (process.result.cause, process.result.detail) == (Cause.DISK, detail)
        sandbox.shell("rm -r /tmp/*", check=True)
        found = sandbox.detach(argv, timeout=60).wait(60)
        assert (found.cause, found.detail) == (Cause.DISK, detail)

    async def awaited() -> Any:
        return await aio.run(argv, spec=spec, timeout=60)

    assert asyncio.run(awaited()).cause is Cause.DISK


def test_a_private_tmpfs_has_a_limit_of_its_own() -> None:
    spec = Spec(tmpfs=["/data:64K"], mounts=[Mount(kind="tmpfs", target="/few", inodes=5)])
    done = shell("cat /dev/zero > /data/file", spec=spec)
    assert (done.cause, done.detail) == (
        Cause.DISK,
        "bytes of tmpfs on /data (rw, spec tmpfs): 64 KiB used of 64 KiB",
    )
    done = shell("touch /few/1 /few/2 /few/3 /few/4 /few/5", spec=spec)
    assert (done.cause, done.detail) == (
        Cause.DISK,
        "inodes of tmpfs on /few (rw, spec tmpfs): 5 used of 5",
    )


def test_it_is_told_from_the_state_at_the_end() -> None:
    spec = Spec(limits=TIGHT)
    assert shell(f"{FILL}; rm /tmp/full; exit 3", spec=spec).cause is Cause.EXITED  # nothing is full any more
    assert shell(f"{FILL} 2>/dev/null; exit 0", spec=spec).cause is Cause.EXITED  # it has not failed
    too_much = f"{PYTHON} -c \"import os; os.posix_fallocate(os.open('/tmp/x', 65), 0, 1 << 21)\""
    assert shell(too_much, spec=spec).cause is Cause.EXITED  # the kernel gave all of it back
    done = shell(f"{FILL}; kill -SEGV $$", spec=spec)
    assert (done.cause, done.returncode) == (Cause.DISK, -11)


def test_what_the_kernel_has_said_itself_goes_first() -> None:
    spec = Spec(limits=Limits(disk=MiB, file_size=MiB // 2, cpu_time=1))
    assert shell(f"{FILL}; {FILL}2; {FILL}3; sleep 60", spec=spec, timeout=1).cause is Cause.TIMEOUT
    with Sandbox(Spec(limits=TIGHT)) as sandbox:
        with sandbox.popen(["sh", "-c", f"{FILL}; echo; sleep 60"], stdout=sandboxcore.PIPE) as process:
            assert process.stdout.read(1) == b"\n"
            process.kill()
            process.wait(60)
            assert process.result.cause is Cause.KILLED


def test_several_commands_at_once() -> None:
    """Whoever fails while it is full, did so for that as far as anybody can tell; who succeeds did not."""
    with Sandbox(Spec(limits=TIGHT)) as sandbox:
        waits = ["sh", "-c", "while [ ! -e /dev/shm/go ]; do sleep 0.01; done; exit $0"]
        first, second = sandbox.popen([*waits, "0"]), sandbox.popen([*waits, "5"])
        sandbox.shell(f": > /dev/shm/go.new; {FILL}; mv /dev/shm/go.new /dev/shm/go")
        for process in (first, second):
            process.wait(60)
        assert (first.result.cause, second.result.cause) == (Cause.EXITED, Cause.DISK)
        first.close()
        second.close()
        sandbox.shell("rm /tmp/full", check=True)
        assert sandbox.shell("exit 5").cause is Cause.EXITED


def test_a_persistent_sandbox_found_again_knows_it(tmp_path: Path) -> None:
    made = sandboxcore.PersistentSandbox.create(Spec(limits=TIGHT), state_dir=tmp_path / "state")
    try:
        with sandboxcore.PersistentSandbox.connect(made.id, state_dir=tmp_path / "state") as again:
            done = again.shell(FILL)
            assert (done.cause, done.detail) == (Cause.DISK, "limits.disk: 1 MiB used of 1 MiB")
    finally:
        made.destroy()
