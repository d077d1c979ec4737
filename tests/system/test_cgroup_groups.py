"""Control groups for real: whatever hierarchies this host has, with processes in them.

Natively that may be v1 with a unified hierarchy beside it, or a delegated v2 group; `vmtest` has pure v2.
"""

import errno
import os
import re
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import gone, host_environment, host_process, host_program, open_fds, wait_until

from sandboxcore import SetupError, SpecError, UnsupportedHost, cgroup
from sandboxcore.cgroup_files import events, processes, remove_tree
from sandboxcore.cgroup_group import INIT_LEAF
from sandboxcore.spec import Limits

PATIENCE = 60  # seconds: a VM in software emulation is twenty times slower
NOBODY = 61234
EVERY = ("memory", "cpu", "pids", "io", "cpuset")

# A process that waits to be moved, then does what it is told.
CHILD = """
import os, sys
print("ready", flush=True)
sys.stdin.readline()
{code}
"""
SLEEP = "import time; time.sleep(600)"
SPIN = "\nwhile True: pass"


def had(*controllers: str) -> tuple[str, ...]:
    """These controllers; a skip with the layout's own words where one is not to be had."""
    found = cgroup.layout()
    for name in controllers:
        if name not in found.versions:
            pytest.skip(found.remedies[name])
    return controllers


def version(controller: str) -> int:
    return cgroup.layout().versions[controller]


@pytest.fixture
def base() -> Iterator[cgroup.Base]:
    """A base of our own, which leaves nothing behind."""
    found = cgroup.layout()
    if found.v2 is None and not found.v1:
        pytest.skip(found.remedies["memory"])
    made = cgroup.Base(found)
    yield made
    made.remove()
    left = [path for path in places(made) if path.exists()]
    assert left == []


def places(base: cgroup.Base) -> list[Path]:
    parents = {*base.layout.v1.values(), *([] if base.layout.v2 is None else [base.layout.v2])}
    return [parent / base.relative for parent in sorted(parents) if (parent / base.relative).exists()]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(base: cgroup.Base) -> Iterator[Start]:
    """Start a child in a group. All are gone, and so are their groups, before the base goes."""
    children: list[subprocess.Popen[str]] = []
    groups: list[cgroup.Group] = []

    def started(group: cgroup.Group, code: str, leaf: str = "") -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-I", "-S", "-c", CHILD.format(code=code)]
        child = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        children.append(child)
        groups.append(group)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        enter(group, child.pid, leaf)
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
        return child

    yield started
    for child in children:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate(timeout=PATIENCE)
    for group in groups:
        assert group.remove(PATIENCE), group


def enter(group: cgroup.Group, pid: int, leaf: str = "") -> None:
    """Move a process through the descriptors that C gets."""
    with group.directories(leaf) as opened:
        if opened.v2 is not None:
            fd = os.open("cgroup.procs", os.O_WRONLY, dir_fd=opened.v2)
            os.write(fd, str(pid).encode())
            os.close(fd)
        for fd in opened.procs.values():
            os.write(fd, str(pid).encode())


def outcome(child: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = child.communicate(timeout=PATIENCE)
    return child.returncode, out


def cpu_time(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[11]) + int(fields[12])


# --- limits -----------------------------------------------------------------------------------------


def test_memory_is_limited(base: cgroup.Base, start: Start) -> None:
    group = base.group("bomb", had("memory"))
    group.limit(Limits(memory="64M", swap=0 if "swap" in base.layout.versions else None), whole=False)
    bomb = start(group, "x = bytearray(256 << 20); print('survived')")
    assert outcome(bomb) == (-signal.SIGKILL, "")
    usage = group.usage()
    assert usage.oom_kills == 1
    if usage.memory_peak is not None:
        assert 32 << 20 < usage.memory_peak <= 64 << 20


def test_the_whole_group_dies_when_memory_is_full(base: cgroup.Base, start: Start) -> None:
    group = base.group("whole", had("memory"))
    if version("memory") == 1:
        assert not any((path / "memory.oom.group").exists() for path in group.places())
        group.remove()
        return  # v1 has no such thing, and does not claim it
    swap = 0 if "swap" in cgroup.layout().versions else None
    group.limit(Limits(memory="64M", swap=swap), whole=True)
    bystander = start(group, SLEEP)
    start(group, "x = bytearray(256 << 20)")
    assert outcome(bystander)[0] == -signal.SIGKILL
    wait_until(lambda: not group.populated, "the end of the group", PATIENCE)
    assert (group.usage().oom_kills or 0) >= 2  # the kernel counts the first victim again


FORKS = """
import time
alive = []
for _ in range(10):
    try:
        pid = os.fork()
    except BlockingIOError:
        break
    if pid == 0:
        time.sleep(600)
    alive.append(pid)
print(len(alive), flush=True)
for pid in alive:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""


def test_processes_are_limited(base: cgroup.Base, start: Start) -> None:
    group = base.group("forks", had("pids"))
    group.limit(Limits(pids=4), whole=False)
    assert group.limits() == {"pids": 4}
    child = start(group, FORKS)
    assert outcome(child) == (0, "3\n")
    usage = group.usage()
    assert usage.pids_refused == 1
    if usage.pids_peak is not None:
        assert usage.pids_peak == 4


def test_refused_forks_are_counted_in_leaves_too(base: cgroup.Base, start: Start) -> None:
    group = base.group("leaves", had("pids"))
    group.limit(Limits(pids=4), whole=False)
    group.prepare()
    leaf = group.leaf("cmd-1")
    for path in leaf.places():
        path.mkdir(exist_ok=True)
    child = start(group, FORKS, INIT_LEAF)
    assert outcome(child) == (0, "3\n")
    assert group.usage().pids_refused == 1


def test_cpu_time_is_limited(base: cgroup.Base, start: Start) -> None:
    group = base.group("cpu", had("cpu"))
    group.limit(Limits(cpus=0.5, cpu_weight=200), whole=False)
    assert group.limits() == {"cpus": 0.5, "cpu_weight": 200}
    start(group, SPIN)
    wait_until(lambda: (group.usage().cpu_throttled or 0) > 0, "throttling", PATIENCE)
    wait_until(lambda: (group.usage().cpu_user or 0) > 0, "used time", PATIENCE)


def test_cpus_are_chosen(base: cgroup.Base, start: Start) -> None:
    group = base.group("cpuset", had("cpuset"))
    mine = max(os.sched_getaffinity(0))
    group.limit(Limits(cpuset=str(mine)), whole=False)
    assert group.limits() == {"cpuset": str(mine)}
    child = start(group, "print(*os.sched_getaffinity(0))")
    assert outcome(child) == (0, f"{mine}\n")


def test_a_group_without_a_choice_of_cpus_has_all(base: cgroup.Base, start: Start) -> None:
    group = base.group("anywhere", had("cpuset"))
    child = start(group, "print(len(os.sched_getaffinity(0)))")
    assert outcome(child) == (0, f"{len(os.sched_getaffinity(0))}\n")


def test_cpus_that_the_host_lacks_are_refused(base: cgroup.Base) -> None:
    group = base.group("missing", had("cpuset"))
    with pytest.raises(UnsupportedHost, match="limits.cpuset '4000': CPU 4000: .*choose from [0-9]"):
        group.change({"cpuset": "4000"})
    assert group.remove()


def test_io_is_limited_on_every_disk(base: cgroup.Base) -> None:
    group = base.group("io", had("io"))
    group.limit(Limits(io="1M"), whole=False)
    assert group.limits() == {"io": 1 << 20}
    assert group.change({"io": None}) == {"io": None}
    usage = group.usage()
    assert (usage.io_read or 0, usage.io_written or 0) == (0, 0)
    assert group.remove()


def test_written_bytes_are_counted_and_slowed(base: cgroup.Base, start: Start, tmp_path: Path) -> None:
    group = base.group("writer", had("io"))
    group.limit(Limits(io="4M"), whole=False)
    code = (
        f"import mmap, time; path = {str(tmp_path / 'file')!r}\n"
        "fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)\n"
        "begin = time.monotonic()\n"
        "for _ in range(8): os.write(fd, mmap.mmap(-1, 1 << 20))\n"
        "print(time.monotonic() - begin)"
    )
    child = start(group, code)
    status, out = outcome(child)
    if status != 0:
        pytest.skip(f"{tmp_path} is on a file system without O_DIRECT: writes cannot be told to the group")
    if not group.usage().io_written:
        pytest.skip(f"{tmp_path} is not on a disk of this machine")
    assert group.usage().io_written == 8 << 20
    assert float(out) > 1  # 8 MiB at 4 MiB/s


def test_all_limits_at_once_and_back(base: cgroup.Base) -> None:
    wanted = {"memory": 64 << 20, "swap": 1 << 20, "cpus": 1.5, "cpu_weight": 300, "pids": 7}
    found = base.layout.versions
    used = {
        name: value
        for name, value in wanted.items()
        if cgroup.LIMITS[name] in found and (name != "swap" or "swap" in found)
    }
    if not used.keys() - {"pids"}:
        pytest.skip(base.layout.remedies["memory"])
    limits = Limits(**{"pids": None, **used})
    controllers, omitted = cgroup.require(limits, ())
    assert omitted == ()
    assert set(controllers) >= {cgroup.LIMITS[name] for name in used} - {"pids"}
    group = base.group("all", controllers)
    group.limit(limits, whole=True)
    assert {name: group.limits()[name] for name in used} == used
    lifted = {name: 100 if name == "cpu_weight" else None for name in used}
    assert group.change(dict.fromkeys(used)) == lifted
    small = {"cpus": 0.005} if "cpus" in used else {}
    assert group.change(small) == small
    assert group.remove()


def test_memory_and_swap_move_in_either_direction(base: cgroup.Base) -> None:
    group = base.group("swap", had("memory", "swap")[:1])
    for memory, swap in ((64, 0), (256, 64), (32, 512), (512, 0), (16, 16)):
        wanted = {"memory": memory << 20, "swap": swap << 20}
        assert group.change(wanted) == wanted
    assert group.change({"memory": 128 << 20}) == {"memory": 128 << 20}
    assert group.limits() == {"memory": 128 << 20, "swap": 16 << 20}
    assert group.remove()


def test_a_refused_change_changes_nothing(base: cgroup.Base) -> None:
    group = base.group("refused", had("memory", "pids"))
    group.limit(Limits(memory="64M", pids=7), whole=False)
    before = group.limits()
    with pytest.raises(SetupError, match=r"cgroup: limits\.pids \(.*\): Invalid argument") as caught:
        group.change({"memory": "32M", "pids": 1 << 40})  # beyond the kernel's PID_MAX_LIMIT
    assert caught.value.subject.startswith("limits.pids (/")
    assert group.limits() == before
    with pytest.raises(SpecError, match="limits.memory"):
        group.change({"pids": 5, "memory": "lots"})
    assert group.limits() == before
    with pytest.raises(
        UnsupportedHost, match="limits.cpus of a running sandbox: .*without the cpu controller"
    ):
        group.change({"pids": 5, "cpus": 1})
    assert group.limits() == before
    assert group.remove()


def test_a_limit_that_cannot_be_written_is_named(base: cgroup.Base) -> None:
    made = base.group("bare", had("memory"))
    assert made.remove()
    with pytest.raises(SetupError, match=r"limits\.memory .*No such file or directory"):
        made.limit(Limits(memory="1G"), whole=False)
    with pytest.raises(SetupError, match="limits of .*/bare: No such file or directory"):
        made.limits()
    with pytest.raises(SetupError, match="usage of .*/bare: No such file or directory"):
        made.usage()


# --- freezing and killing ---------------------------------------------------------------------------


def test_the_freezer_stops_and_starts(base: cgroup.Base, start: Start) -> None:
    if not base.layout.freezer:
        pytest.skip(base.layout.remedies["freezer"])
    group = base.group("frozen", ())
    child = start(group, SPIN)
    wait_until(lambda: cpu_time(child.pid), "a running child", PATIENCE)
    for _ in range(3):
        group.freeze(PATIENCE)
        assert group.frozen
        before = cpu_time(child.pid)
        select.select([], [], [], 0.1)  # time in which it would run
        assert cpu_time(child.pid) == before
        group.thaw(PATIENCE)
        assert not group.frozen
        wait_until(lambda before=before: cpu_time(child.pid) > before, "the child running on", PATIENCE)


def test_v1_freezes_where_v2_does_not(base: cgroup.Base, start: Start) -> None:
    directory = next((m.place("/") for m in _v1_mounts("freezer") if m.writable), None)
    if directory is None or not os.access(directory, os.W_OK):
        pytest.skip("no v1 freezer is writable here")
    from sandboxcore.cgroup_layout import Layout

    found = Layout(None, {"freezer": directory}, {}, {}, 1, False)
    other = cgroup.Base(found)
    group = other.group("frozen", ())
    assert (group.v2, list(group.v1)) == (None, ["freezer"])
    child = start(group, SPIN)
    wait_until(lambda: cpu_time(child.pid), "a running child", PATIENCE)
    group.freeze(PATIENCE)
    assert (group.frozen, group.populated) == (True, True)
    before = cpu_time(child.pid)
    select.select([], [], [], 0.1)
    assert cpu_time(child.pid) == before
    group.thaw(PATIENCE)
    assert not group.frozen
    wait_until(lambda: cpu_time(child.pid) > before, "the child running on", PATIENCE)
    group.freeze(PATIENCE)
    group.kill()  # process by process, without cgroup.kill, and thaws it
    assert child.wait(PATIENCE) == -signal.SIGKILL
    assert group.remove(PATIENCE)
    other.remove()
    assert not (directory / other.relative).exists()


def _v1_mounts(name: str) -> list[object]:
    from sandboxcore.cgroup_mounts import parse_mounts

    mounts = parse_mounts(Path("/proc/self/mountinfo").read_text())
    return [mount for mount in mounts if name in mount.controllers and mount.visible()]


def test_freezing_that_takes_too_long_is_undone(base: cgroup.Base, start: Start) -> None:
    if base.layout.freezer != 2:
        pytest.skip(base.layout.remedies.get("freezer", "v1 freezes or does not; nothing to wait for"))
    group = base.group("slow", ())
    child = start(group, SPIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sandboxcore.cgroup_group.wait_event", lambda *_: False)
        with pytest.raises(
            SetupError, match="cgroup: freeze .*slow: Connection timed out .a process does not"
        ):
            group.freeze(0)
    before = cpu_time(child.pid)
    wait_until(lambda: cpu_time(child.pid) > before, "the child running on", PATIENCE)


def test_kill_ends_everything_at_once(base: cgroup.Base, start: Start) -> None:
    if not base.layout.kill:
        pytest.skip(base.layout.remedies["kill"])
    group = base.group("killed", ())
    child = start(group, "os.fork(); os.fork(); import time; time.sleep(600)")
    wait_until(lambda: group.v2 is not None and len(processes(group.v2)) == 4, "four processes", PATIENCE)
    assert group.v2 is not None
    members = processes(group.v2)
    group.kill()
    assert child.wait(PATIENCE) == -signal.SIGKILL
    wait_until(lambda: all(map(gone, members)), "the end of all", PATIENCE)
    wait_until(lambda: not group.populated, "an empty group", PATIENCE)


# --- making and removing ----------------------------------------------------------------------------


def test_a_base_is_closed_to_others(base: cgroup.Base) -> None:
    base.enable([name for name in EVERY if name in base.layout.versions])
    assert places(base)
    for path in places(base):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_group_is_made_once(base: cgroup.Base) -> None:
    group = base.group("one", ())
    with pytest.raises(SetupError, match="mkdir .*/one: File exists") as caught:
        base.group("one", ())
    assert caught.value.stage == "cgroup"
    assert all(path.is_dir() for path in group.places())
    for name in ("", "..", "a/b", "spawner", ".x"):
        with pytest.raises(SpecError, match="not a name for a group"):
            base.group(name, ())
    assert group.remove()
    assert group.remove()


def test_a_group_is_opened_by_its_path(base: cgroup.Base) -> None:
    controllers = [name for name in EVERY if name in base.layout.versions]
    group = base.group("found", controllers)
    again = cgroup.Group.open(cgroup.layout(), group.relative, controllers)
    assert again == group
    assert again.remove()
    with pytest.raises(SetupError, match="found: No such file or directory"):
        cgroup.Group.open(cgroup.layout(), group.relative, controllers)


def test_a_busy_group_stays_until_it_is_empty(base: cgroup.Base, start: Start) -> None:
    group = base.group("busy", [name for name in EVERY if name in base.layout.versions])
    child = start(group, SLEEP)
    assert group.populated
    assert not group.remove()
    assert not group.remove(0.05)
    base.remove()
    assert all(path.is_dir() for path in group.places())
    child.kill()
    assert group.remove(PATIENCE)
    assert not group.populated
    assert [path for path in group.places() if path.exists()] == []
    child.wait(PATIENCE)


def test_a_group_goes_with_all_below_it(base: cgroup.Base) -> None:
    group = base.group("deep", [name for name in EVERY if name in base.layout.versions])
    for path in group.places():
        (path / "a/b").mkdir(parents=True)
        (path / "c").mkdir()
    assert group.remove()
    assert [path for path in group.places() if path.exists()] == []


def test_usage_of_an_empty_group(base: cgroup.Base) -> None:
    controllers = [name for name in EVERY if name in base.layout.versions]
    group = base.group("usage", controllers)
    usage = group.usage()
    if "memory" in controllers:
        assert usage.oom_kills == 0
        assert usage.memory is not None
    if "pids" in controllers:
        assert (usage.pids, usage.pids_refused) == (0, 0)
    if "cpu" in controllers:
        assert usage.cpu_throttled == 0
        assert (usage.cpu_user, usage.cpu_system) == (0, 0)
    if base.layout.v2 is not None and os.path.exists("/proc/pressure/cpu"):
        assert usage.pressure is not None
    assert group.remove()


def test_directories_are_closed(base: cgroup.Base) -> None:
    group = base.group("open", [name for name in EVERY if name in base.layout.versions])
    before = set(open_fds())
    opened = group.directories()
    assert (opened.v2 is None) == (group.v2 is None)
    assert set(opened.v1) == set(group.v1)
    every = [*([] if opened.v2 is None else [opened.v2]), *opened.v1.values(), *opened.procs.values()]
    assert all(not os.get_inheritable(fd) for fd in every)
    opened.close()
    opened.close()
    assert group.remove()
    with pytest.raises(SetupError, match="opening .*/open: No such file or directory"):
        group.directories()
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_process_is_adopted(base: cgroup.Base) -> None:
    controllers = [name for name in EVERY if base.layout.versions.get(name) == 2]
    base.enable(controllers)
    own = Path("/proc/self/cgroup").read_text()
    with host_process(SLEEP) as child:
        base.adopt(child.pid)
        if controllers:
            assert base.layout.v2 is not None
            assert processes(base.layout.v2 / base.relative / "spawner") == [child.pid]
        else:
            assert Path(f"/proc/{child.pid}/cgroup").read_text() == own
        child.kill()
        child.wait(PATIENCE)


# --- a sandbox's group ------------------------------------------------------------------------------

INIT = """
for fd in map(int, sys.argv[1:]):
    os.mkdir("cmd-1", dir_fd=fd)
    procs = os.open("cmd-1/cgroup.procs", os.O_WRONLY, dir_fd=fd)
    os.write(procs, b"0")
print(os.getuid(), open("/proc/self/cgroup").read())
"""


def test_a_sandbox_s_init_makes_groups_for_its_commands(base: cgroup.Base) -> None:
    controllers = [name for name in EVERY if name in base.layout.versions]
    group = base.group("sandbox", controllers)
    group.prepare()
    shared = group.leaf("cmd-1")
    for path in shared.places():
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o777
        assert stat.S_IMODE((path.parent / "cgroup.procs").stat().st_mode) == 0o666
    if group.v2 is not None:
        enabled = (group.v2 / "cgroup.subtree_control").read_text().split()
        assert set(enabled) == {name for name in controllers if version(name) == 2}
        assert (group.v2 / INIT_LEAF).is_dir()
    fds = [os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY) for path in shared.places()]
    command = [sys.executable, "-I", "-S", "-c", CHILD.format(code=INIT), *map(str, fds)]
    identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, pass_fds=fds, **identity, **pipes) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            enter(group, child.pid, INIT_LEAF)
            out, err = child.communicate("go\n", timeout=PATIENCE)
        finally:
            child.kill()
    for fd in fds:
        os.close(fd)
    assert child.returncode == 0, err
    assert out.startswith(str(NOBODY if os.geteuid() == 0 else os.geteuid()))
    paths = [text.partition(":")[2] for text in out.splitlines() if text.endswith("/cmd-1")]
    assert len(paths) == len(shared.places()), out
    if "pids" in controllers:
        assert shared.usage().pids == 0
    assert group.remove(PATIENCE)


# --- several processes ------------------------------------------------------------------------------

OWNER = """
import sys
from sandboxcore import cgroup
found = cgroup.layout()
base = cgroup.Base(found)
group = base.group("left", [name for name in ("memory", "pids") if name in found.versions])
print(base.relative, *group.places(), flush=True)
sys.stdin.readline()
"""


def test_what_dead_processes_left_is_collected(base: cgroup.Base, start: Start) -> None:
    with host_process(OWNER) as owner:
        assert owner.stdout is not None
        relative, *left = owner.stdout.readline().split()
        directories = [Path(path) for path in left]
        assert directories
        bases = {str(path.parent) for path in directories}
        assert bases.isdisjoint(cgroup.collect())  # it lives
        assert all(path.is_dir() for path in directories)
        owner.kill()
        owner.wait(PATIENCE)
    layout = cgroup.layout()
    controllers = [name for name in ("memory", "pids") if name in layout.versions]
    group = cgroup.Group.open(layout, f"{relative}/left", controllers)
    child = start(group, SLEEP)
    assert bases.isdisjoint(cgroup.collect())  # something lives there
    assert all(path.is_dir() for path in directories)
    child.kill()
    child.wait(PATIENCE)
    wait_until(lambda: not group.populated, "an empty group", PATIENCE)
    removed = set(cgroup.collect())
    assert removed >= bases or not any(map(os.path.exists, bases))  # or by somebody else's collect()
    assert not any(path.exists() for path in directories)
    assert all(path.is_dir() for path in places(base))


STARVED = """
import os, resource
from sandboxcore import cgroup
found = cgroup.layout()
base = cgroup.Base(found, ())
group = base.group("left", ())
others = [os.open("/dev/null", os.O_RDONLY)]
resource.setrlimit(resource.RLIMIT_NOFILE, (others[0] + 1, 100))
try:
    cgroup.collect()
except OSError as error:
    print(error.errno)
os.close(others[0])
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
print(all(path.is_dir() for path in group.places()))
group.remove()
for path in group.places():
    path.parent.rmdir()  # as if somebody took it for left behind
print(base.group("again", ()).remove())
base.remove()
"""


def test_who_cannot_look_collects_nothing(base: cgroup.Base) -> None:
    """Without a descriptor to read /proc by, every process looks gone, this one too; and what others remove
    is made again."""
    assert places(base)
    done = host_program(STARVED, timeout=PATIENCE)
    assert (done.stdout.split(), done.stderr) == ([str(errno.EMFILE), "True", "True"], ""), done


CROWD = """
import sys
from sandboxcore import cgroup
found = cgroup.layout()
controllers = [name for name in ("memory", "cpu", "pids", "cpuset") if name in found.versions]
for round in range(int(sys.argv[1])):
    base = cgroup.Base(found, controllers if round % 2 else ())
    assert base.group("x", controllers).remove()
    base.remove()
"""


@pytest.mark.timeout(300)
def test_many_processes_make_and_remove_at_once() -> None:
    found = cgroup.layout()
    if found.v2 is None and not found.v1:
        pytest.skip(found.remedies["memory"])
    command = [sys.executable, "-c", CROWD, "15"]
    crowd = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=host_environment()) for _ in range(4)
    ]
    try:
        ends = [(child.communicate(timeout=4 * PATIENCE)[1], child.returncode) for child in crowd]
    finally:
        for child in crowd:
            child.kill()
    assert ends == [("", 0)] * 4
    pids = {str(child.pid) for child in crowd}
    parents = {*found.v1.values(), *([] if found.v2 is None else [found.v2])}
    left = [path for parent in parents for path in parent.glob("sandboxcore/host-*")]
    assert [path for path in left if path.name.split("-")[1] in pids] == []


def test_a_trial_that_was_cut_short_is_collected(base: cgroup.Base) -> None:
    if base.layout.v2 is None:
        pytest.skip(base.layout.remedies["kill"])
    with host_process("") as ended:
        ended.wait(PATIENCE)
        trial = base.layout.v2 / f"sandboxcore.trial-{ended.pid}-1"
        trial.mkdir()
        cgroup.collect()
        assert not trial.exists()


NAMED = """
import os
from sandboxcore import cgroup
from sandboxcore.spec import Limits
found = cgroup.layout()
print(found.v2)
if found.versions.get("memory") == 2:
    controllers, _ = cgroup.require(Limits(memory="64M"), ())
    base = cgroup.Base(found, controllers)
    group = base.group("x", controllers)
    group.limit(Limits(memory="64M"), whole=True)
    assert group.limits()["memory"] == 64 << 20
    assert group.remove()
    base.remove()
    assert not os.path.exists(found.v2 / "sandboxcore"), os.listdir(found.v2)
"""


def test_a_named_group_gives_up_its_processes(base: cgroup.Base, start: Start) -> None:
    if base.layout.v2 is None:
        pytest.skip(base.layout.remedies["kill"])
    controllers = [name for name in ("memory", "pids") if base.layout.versions.get(name) == 2]
    group = base.group("named", controllers)
    assert group.v2 is not None
    child = start(group, SLEEP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOXCORE_CGROUP", str(group.v2))
        done = host_program(NAMED, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, f"{group.v2}\n"), done.stderr
    if "memory" in controllers:
        assert processes(group.v2) == []
        assert processes(group.v2 / "sandboxcore.host") == [child.pid]
    else:
        assert processes(group.v2) == [child.pid]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SANDBOXCORE_CGROUP", str(group.v2 / "missing"))
        refused = cgroup.layout()
        with pytest.raises(
            UnsupportedHost, match="limits.memory: .*SANDBOXCORE_CGROUP=.*missing: No such file"
        ):
            cgroup.require(Limits(memory=1), ())
    assert (refused.versions, refused.v2) == ({}, None)


REFUSED = """
from sandboxcore import UnsupportedHost, cgroup
from sandboxcore.spec import Limits
for limits in (Limits(memory=1), Limits(cpus=1), Limits(io=1), Limits(swap=1)):
    try:
        cgroup.require(limits, ())
    except UnsupportedHost as error:
        print(error)
print(cgroup.require(Limits(memory=1, cpus=1), ["memory", "cpus"]))
print(cgroup.collect(), cgroup.layout().freezer, cgroup.layout().kill)
"""


@pytest.mark.needs_root
def test_who_has_nothing_delegated_is_told_what_to_do() -> None:
    command = [sys.executable, "-c", REFUSED]
    environment = {**host_environment(), "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
    environment.pop("XDG_RUNTIME_DIR", None)
    done = subprocess.run(
        command,
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    if "ModuleNotFoundError" in done.stderr or "Permission denied" in done.stderr:
        pytest.skip("only root can do this: the checkout is closed to others")
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 6), done.stderr
    for text, limit, names in zip(
        lines, ("memory", "cpus", "io", "swap"), ("memory", "cpu", "(blk)?io", "memory"), strict=False
    ):
        assert text.startswith(f"limits.{limit}: not available on this host; the ")
        assert re.search(f"controller:? {names}|{names} controller", text), text
        assert f"uid {NOBODY}" in text
        assert "run as root" in text
    assert lines[4:] == ["((), ('memory', 'cpus'))", "[] 0 False"]


def test_limits_of_the_host_as_a_whole(base: cgroup.Base) -> None:
    had("memory", "pids")
    limits = Limits(memory=1 << 42, pids=1_000_000)  # harmless to whoever works beside us
    try:
        in_force = cgroup.host_limits(limits)
        assert {name: in_force[name] for name in ("memory", "pids")} == {"memory": 1 << 42, "pids": 1_000_000}
        assert in_force.get("cpus") is None
        group = base.group("below", ("memory",))
        assert group.remove()
        base.remove()  # the host-wide parent stays as long as it limits
        again = cgroup.host_limits(Limits(pids=999_999))
        assert (again["memory"], again["pids"]) == (None, 999_999)
    finally:
        cleared = cgroup.host_limits(Limits(pids=None))
    assert (cleared["memory"], cleared["pids"]) == (None, None)


def test_events_of_what_is_gone(base: cgroup.Base) -> None:
    group = base.group("gone", ())
    assert group.remove()
    assert (group.frozen, group.populated) == (False, False)
    group.kill()
    for act in (group.freeze, group.thaw):
        with pytest.raises(SetupError, match="freezer of .*/gone: No such file or directory"):
            act(0)
    assert all(events(path) == {} for path in group.places())
    assert all(remove_tree(path, 0) for path in group.places())
