"""Attacks on the control groups of a sandbox: on their files, out of them, and on what they count.

The same attack is tried in a fresh sandbox and in a living one.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import select
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    AT_FDCWD,
    MARKER,
    PROGRAM,
    Hostile,
    Outcome,
    _outcome,
    allowing,
    call,
    calls,
    conversation,
    libc,
    marking,
    open_for,
    pointer,
    result,
)
from escape.test_processes import USERS
from support import IS_ROOT, PYTHON, gone, host_process, marked, wait_until

import sandboxcore
from sandboxcore import Cause, ExecResult, Limits, Sandbox, SandboxSpec, cgroup, groups

pytestmark = [pytest.mark.escape, pytest.mark.timeout(300)]

PATIENCE = 60  # seconds: a VM in software emulation is twenty times slower
SIZE = 24 << 20
LIMITS = Limits(memory=SIZE, pids=64)
CLONE_NEWCGROUP, AT_EMPTY_PATH = 0x2000000, 0x1000
MAGIC = (0x27E0EB, 0x63677270)  # statfs(2): of a group file system, version 1 and 2
SHORT_OF_MEMORY = (Cause.OOM, Cause.KILLED)  # the second: of a tiny process, the kernel may take init instead

Run = Callable[..., ExecResult]
Open = Callable[..., Run]


@pytest.fixture(autouse=True)
def _limits_work() -> None:
    """A skip in the layout's own words where there is no memory controller to be had."""
    found = cgroup.layout()
    if "memory" not in found.versions:
        pytest.skip(found.remedies["memory"])


@pytest.fixture(params=["fresh", "living"])
def grouped(request: pytest.FixtureRequest, hostile: Hostile) -> Iterator[Open]:
    """Makes something that runs commands in a sandbox with limits, or, with ``limits=None``, without."""
    with contextlib.ExitStack() as stack:

        def start(**fields: Any) -> Run:
            spec = hostile.spec.replace(**{"limits": LIMITS, **fields})
            if request.param == "fresh":
                return functools.partial(sandboxcore.run, spec=spec)
            return stack.enter_context(Sandbox(spec)).exec

        yield start


@pytest.fixture
def living(hostile: Hostile) -> Iterator[Callable[..., Sandbox]]:
    with contextlib.ExitStack() as stack:

        def start(**fields: Any) -> Sandbox:
            return stack.enter_context(Sandbox(hostile.spec.replace(**{"limits": LIMITS, **fields})))

        yield start


def inside(run: Run, attack: list[str], **options: Any) -> Outcome:
    done = run([PROGRAM, *attack], timeout=PATIENCE, **options)
    return _outcome(done.stdout, done.returncode)


def ask(run: Run, code: str, *args: str, **options: Any) -> Any:
    program = "import json, os, sys\n" + textwrap.dedent(code)
    done = run([PYTHON, "-I", "-S", "-c", program, *args], timeout=PATIENCE, **options)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def group_of(sandbox: Sandbox) -> cgroup.Group:
    link = sandbox._link
    assert link is not None
    assert link.group is not None
    return link.group


def groups_of(pid: int) -> list[str]:
    """Lines of /proc/PID/cgroup that lie below a base of ours, as the host sees them: cgroups(7)."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return [line for line in lines if "/sandboxcore/host-" in line]


def group_directory() -> Path:
    """A directory of a group file system on this host."""
    found = cgroup.layout()
    return found.v2 or found.v1["memory"]


# --- the files ----------------------------------------------------------------------------------

DESCRIPTORS = """
import ctypes
libc = ctypes.CDLL(None)
def kind(fd):
    room = (ctypes.c_long * 32)()  # struct statfs begins with f_type
    return room[0] if libc.fstatfs(fd, room) == 0 else None
own = {fd: kind(int(fd)) for fd in os.listdir("/proc/self/fd")}
others = {}
for pid in filter(str.isdecimal, os.listdir("/proc")):
    for name in ("fd", "fdinfo", "cwd", "root", "map_files"):
        if int(pid) == os.getpid():
            continue
        try:
            os.listdir(f"/proc/{pid}/{name}")
            others[f"{pid} {name}"] = "ok"
        except OSError as error:
            others[f"{pid} {name}"] = error.strerror
    for fd in range(64):
        try:
            others[f"{pid} {fd}"] = kind(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            pass
print(json.dumps([own, others]))
"""


@pytest.mark.parametrize("user", USERS)
def test_no_descriptor_leads_to_a_group(grouped: Open, user: str) -> None:
    """Init and launchers hold some; a command gets none and cannot look at theirs."""
    run = grouped(user=user)
    for _ in range(2):
        own, others = ask(run, DESCRIPTORS)
        assert set(own.values()).isdisjoint(MAGIC)
        others = {name: answer for name, answer in others.items() if int(name.split()[0]) <= 3}
        assert "1 fd" in others
        mine = {name for name, answer in others.items() if name.startswith("1 ") and answer == "ok"}
        assert mine == set()
        assert set(others.values()).isdisjoint(MAGIC)
    directory = os.open(group_directory(), os.O_RDONLY | os.O_DIRECTORY)
    try:  # a control: what is passed on purpose is found
        own, _ = ask(run, DESCRIPTORS, pass_fds=[directory])
    finally:
        os.close(directory)
    assert not set(own.values()).isdisjoint(MAGIC)


@pytest.mark.skipif(not IS_ROOT, reason="only root can do this")
def test_the_search_for_descriptors_finds_them(living: Callable[..., Sandbox]) -> None:
    """Root of the host sees what the payload does not."""
    sandbox = living()
    sandbox.exec(["true"])
    links = [os.readlink(f"/proc/{sandbox.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{sandbox.pid}/fd")]
    assert any(str(group_of(sandbox).relative) in link for link in links)


MOUNTS = {
    "v2": [call("mount", "none", "/tmp", "cgroup2", 0, 0)],
    "v1": [call("mount", "none", "/tmp", "cgroup", 0, "memory")],
    "v1 by name": [call("mount", "none", "/tmp", "cgroup", 0, "none,name=systemd")],
    "fsopen v2": [call("fsopen", "cgroup2", 0), call("fsconfig", result(0), 6, 0, 0, 0)],
    "fsopen v1": [call("fsopen", "cgroup", 0), call("fsconfig", result(0), 6, 0, 0, 0)],
    "bind": [call("mount", "/sys/fs/cgroup", "/tmp", 0, 4096, 0)],
}


@pytest.mark.parametrize("name", MOUNTS)
def test_group_file_systems_cannot_be_mounted(hostile: Hostile, grouped: Open, name: str) -> None:
    attack = calls(*MOUNTS[name])
    if name == "v2":
        assert hostile.in_userns(attack).verdict == "ok"
    walls = [{}, {"user": "0"}, {"seccomp": allowing("mount", "fsopen", "fsconfig")}]
    for fields in walls:
        expected = ("EPERM", "ENOENT") if name == "bind" else ("EPERM",)
        assert inside(grouped(**fields), attack).verdict in expected
    run = grouped(seccomp=marking("mount", "fsopen"))
    assert inside(run, attack).answers[0] == MARKER


def handle_of(path: Path) -> bytes:
    """name_to_handle_at(2)"""
    room = ctypes.create_string_buffer((128).to_bytes(4, "little"), 136)
    where = ctypes.c_int()
    asked = libc().name_to_handle_at(AT_FDCWD, os.fsencode(path), room, ctypes.byref(where), 0)
    assert asked == 0, os.strerror(ctypes.get_errno())
    return room.raw


def test_groups_by_handle(hostile: Hostile, grouped: Open) -> None:
    """Even with a descriptor of that very file system."""
    handle = pointer(handle_of(group_directory()))
    directory = os.open(group_directory(), os.O_RDONLY | os.O_DIRECTORY)
    attack = calls(call("open_by_handle_at", directory, handle, os.O_RDONLY))
    try:
        if IS_ROOT:
            assert hostile.outside(attack, pass_fds=[directory]).verdict == "ok"
        for user in USERS:
            run = grouped(user=user)
            assert inside(run, attack, pass_fds=[directory]).verdict == "EPERM"
            run = grouped(user=user, seccomp=allowing("open_by_handle_at"))
            assert inside(run, attack, pass_fds=[directory]).verdict == "EPERM"
            for place in ("/", "/proc", "/dev", "/tmp"):
                steps = [call("openat", AT_FDCWD, place, os.O_RDONLY)]
                steps.append(call("open_by_handle_at", result(0), handle, os.O_RDONLY))
                assert inside(run, calls(*steps)).answers == ("ok", "EPERM")
        run = grouped(seccomp=marking("open_by_handle_at"))
        assert inside(run, attack, pass_fds=[directory]).verdict == MARKER
    finally:
        os.close(directory)


def test_group_namespaces(hostile: Hostile, grouped: Open) -> None:
    """Neither a new view of groups, nor the host's, though its descriptor were at hand."""
    view = os.open("/proc/self/ns/cgroup", os.O_RDONLY)
    new = calls(call("unshare", CLONE_NEWCGROUP))
    old = calls(call("setns", view, CLONE_NEWCGROUP))
    by_name = calls(
        call("openat", AT_FDCWD, "/proc/1/ns/cgroup", os.O_RDONLY),
        call("setns", result(0), CLONE_NEWCGROUP),
    )
    try:
        assert hostile.in_userns(new).verdict == "ok"
        if IS_ROOT:
            assert hostile.outside(old, pass_fds=[view]).verdict == "ok"
        for user in USERS:
            for fields in ({}, {"seccomp": allowing("unshare", "setns")}):
                run = grouped(user=user, **fields)
                assert inside(run, new).verdict == "EPERM"
                assert inside(run, old, pass_fds=[view]).verdict == "EPERM"
                assert inside(run, by_name).answers[0] in ("EACCES", "EPERM")
        run = grouped(seccomp=marking("unshare", "setns"))
        assert inside(run, new).verdict == MARKER
        assert inside(run, old, pass_fds=[view]).verdict == MARKER
    finally:
        os.close(view)


def test_names_of_groups(grouped: Open) -> None:
    """Where the host's groups are is not told: at most what the sandbox itself is called there."""
    look = """
    names = [f"/proc/{pid}/{name}" for pid in filter(str.isdecimal, os.listdir("/proc"))
             for name in ("cgroup", "cpuset", "mountinfo")]
    texts = {}
    for name in names:
        try:
            texts[name] = open(name).read()
        except OSError:
            pass
    print(json.dumps(texts))
    """
    texts = ask(grouped(), look)
    assert "/proc/1/cgroup" in texts
    for name, text in texts.items():
        assert "host-" not in text
        assert "sandboxcore/" not in text
        if name.endswith("mountinfo"):
            assert " - cgroup" not in text
            continue
        for line in text.splitlines():
            path = line.split(":", 2)[-1]
            if name.endswith("cpuset"):  # where it is not enabled, that of a group above, without its name
                path = re.sub(r"^(/\.\.)+$", "/", path)
            assert re.fullmatch(r"/(sbx-[^/]+|run-\d+)?(/?(init|cmd-\d+))?", path), (name, line)
    with conversation(grouped(), [PROGRAM, "hold", "groups"], timeout=PATIENCE) as talk:
        talk.await_ready()
        (holder,) = [pid for pid in marked("hold\0groups") if not gone(pid)]
        assert groups_of(holder), "a control: the host sees where it is"
        os.kill(holder, signal.SIGKILL)


# --- out of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("how", ["plain", "orphan", "daemon", "zombies"])
def test_staying_in_the_group(grouped: Open, marker: str, how: str, user: str) -> None:
    """Forked, orphaned, daemonised: read back from the host."""
    script = f'"$0" linger {how} {marker} <&3 & exec "$0" hold holder-{marker} >/dev/null'
    command = ["sh", "-c", f"exec 3<&0; {script}", PROGRAM]
    with conversation(grouped(user=user), command, timeout=PATIENCE) as talk:
        talk.await_ready()
        (holder,) = wait_until(lambda: marked(f"hold\0holder-{marker}"), "its first process", PATIENCE)
        expected = groups_of(holder)
        assert expected
        assert all(re.search(r"/(run-\d+|cmd-\d+|init)$", line) for line in expected)
        places = []
        for pid in wait_until(lambda: marked(f"linger\0{how}\0{marker}"), "the others", PATIENCE):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                places.append(groups_of(pid))
        os.kill(holder, signal.SIGKILL)
    assert expected in places
    for place in places:  # of one that has ended less is told
        assert set(place) <= set(expected)
    wait_until(lambda: not marked(marker), "the end of all of them", PATIENCE)


LEAVE = """
import os, sys
print("ready", flush=True)
sys.stdin.readline()
try:
    with open(sys.argv[1] + "/cgroup.procs", "w") as file:
        file.write("0")
except OSError as error:
    print(error.strerror, flush=True)
else:
    print("ok", flush=True)
sys.stdin.readline()
"""


def test_leaving_by_the_groups_own_files(grouped: Open) -> None:
    """Who can name another group can go there; inside, nothing has a name."""
    base = cgroup.Base(cgroup.layout())
    first, second = base.group("first", ("pids",)), base.group("second", ("pids",))
    here, there = first.places()[-1], second.places()[-1]
    try:
        with host_process(LEAVE, str(there)) as process:
            assert process.stdout
            assert process.stdin
            assert process.stdout.readline() == "ready\n"
            (here / "cgroup.procs").write_text(str(process.pid))
            assert any("/first" in line for line in groups_of(process.pid))
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "ok\n"
            assert any("/second" in line for line in groups_of(process.pid))
        for user in USERS:
            run = grouped(user=user, landlock=False)
            attack = open_for(there / "cgroup.procs", os.O_WRONLY)
            assert inside(run, attack).verdict == "ENOENT"
    finally:
        first.remove(PATIENCE)
        second.remove(PATIENCE)
        base.remove()


# --- what they count ----------------------------------------------------------------------------


def hogs(count: int, *more: str) -> list[str]:
    """So many processes, of which no two are half of the limit."""
    return [PROGRAM, "hogs", str(count), str(4 << 20), *more]


def test_many_small_processes(grouped: Open) -> None:
    run, free = grouped(), grouped(limits=Limits())
    assert run(hogs(3), timeout=PATIENCE).stdout == b"3 ok\n"
    done = run(hogs(12), timeout=PATIENCE)
    assert (done.cause, done.stdout) == (Cause.OOM, b""), done
    assert run(hogs(3), timeout=PATIENCE).stdout == b"3 ok\n"
    assert free(hogs(12), timeout=PATIENCE).stdout == b"12 ok\n"


def test_daemons_count(grouped: Open, marker: str) -> None:
    """The same by processes that have left their parent and their session."""
    each = f'setsid "$0" hogs 1 {4 << 20} stay {marker}'
    script = f'for i in $(seq 12); do {each} & done; exec "$0" hold {marker}'
    done = grouped()(["sh", "-c", script, PROGRAM], timeout=PATIENCE)
    assert done.cause is Cause.OOM, done
    wait_until(lambda: not marked(marker), "the end of all of them", PATIENCE)


KINDS = "anonymous tmp shm memfd sysv messages pipe unix tables".split()


def filled(output: bytes) -> int:
    """Bytes of the last piece that it could take."""
    return int(output.split()[-2]) if output else 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_memory_counts(grouped: Open, kind: str) -> None:
    """Whatever holds the memory, a process, a file, a pipe, the kernel, it is no more than the limit."""
    attack = [PROGRAM, "fill", kind, str(2 * SIZE)]
    assert filled(grouped(limits=Limits())(attack, timeout=PATIENCE).stdout) >= 2 * SIZE
    done = grouped()(attack, timeout=PATIENCE)
    assert done.cause in SHORT_OF_MEMORY, done
    assert SIZE // 2 < filled(done.stdout) < SIZE


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_memory_of_sockets_counts(hostile: Hostile, living: Callable[..., Sandbox], kind: str) -> None:
    """Version 1 counts it apart, and drops what is too much; of TCP only what is accepted (README.md)."""
    sandbox = living()
    group = group_of(sandbox)
    attack = [PROGRAM, "fill", kind, str(2 * SIZE)]
    assert filled(hostile.run_inside(attack[1:], timeout=PATIENCE).stdout) >= 2 * SIZE
    done = sandbox.exec(attack, timeout=PATIENCE)
    if cgroup.layout().versions["memory"] == 2:
        assert done.cause in SHORT_OF_MEMORY
        assert filled(done.stdout) < SIZE
    else:
        assert done.ok
        peak = int((group.v1["memory"] / "memory.kmem.tcp.max_usage_in_bytes").read_text())
        assert peak > 0
        assert kind == "tcp" or peak <= SIZE


def test_a_full_sandbox_hurts_nobody_else(hostile: Hostile, living: Callable[..., Sandbox]) -> None:
    """Another sandbox and a fresh one go on; so does another command, unless the kernel picks it: who
    shares a limit can be a victim, and is told so."""
    sandbox, other = living(), living()
    with (
        sandbox.popen(["cat"], stdin=sandboxcore.PIPE) as sibling,
        other.popen(["cat"], stdin=sandboxcore.PIPE) as stranger,
        conversation(hostile.run_inside, ["hold", "apart"], limits=LIMITS, timeout=PATIENCE) as fresh,
    ):
        fresh.await_ready()
        for _ in range(3):
            done = sandbox.exec(hogs(12), timeout=PATIENCE)
            assert done.cause is Cause.OOM, done
        (holder,) = [pid for pid in marked("hold\0apart") if not gone(pid)]
        os.kill(holder, signal.SIGKILL)
        for process in (sibling, stranger):
            with contextlib.suppress(BrokenPipeError):
                out, _ = process.communicate(b"alive", timeout=PATIENCE)
            assert process.result is not None
            if process is sibling and process.result.cause is Cause.OOM:
                assert process.result.usage.oom_kills, "by the kernel"
                continue
            assert (out, process.returncode) == (b"alive", 0)
    assert sandbox.exec(["true"], timeout=PATIENCE).ok


@pytest.mark.parametrize("user", USERS)
def test_choosing_the_victim(
    hostile: Hostile, grouped: Open, bystander: subprocess.Popen[bytes], user: str
) -> None:
    """Neither oneself less nor init and launchers more than they are."""
    more = calls(
        call("openat", AT_FDCWD, f"/proc/{bystander.pid}/oom_score_adj", os.O_WRONLY),
        call("write", result(0), "1000", 4),
    )
    assert hostile.outside(more).verdict == "ok"
    run = grouped(user=user)
    for pid, text, expected in (
        ("self", "-1", "EACCES"),
        ("1", "1000", "EACCES"),
        ("2", "1000", "EACCES"),  # the first launcher; in a fresh sandbox, the payload itself
        ("self", "1000", "ok"),
    ):
        attack = calls(
            call("openat", AT_FDCWD, f"/proc/{pid}/oom_score_adj", os.O_WRONLY),
            call("write", result(0), text, len(text)),
        )
        fresh = isinstance(run, functools.partial)
        if not (fresh and pid == "2"):
            answer = inside(run, attack).verdict
            assert answer == expected or (answer == "EPERM" and expected == "EACCES"), (pid, text)


def weak_user() -> str:
    """Whose processes may send signals to launchers: the id that these have."""
    return "1000" if sandboxcore.host.features().mode == "rootless" else "0"


@pytest.mark.parametrize("sig", ["STOP", "KILL"])
def test_losing_a_launcher_lifts_no_limit(living: Callable[..., Sandbox], marker: str, sig: str) -> None:
    sandbox = living(user=weak_user())
    group, init = group_of(sandbox), sandbox.pid
    limits = group.limits()
    assert groups.limits_of(group)["memory"] == SIZE
    script = f'kill -{sig} $PPID; exec "$0" hogs 12 {4 << 20} {marker}'
    with contextlib.suppress(sandboxcore.SandboxGone):
        done = sandbox.exec(["sh", "-c", script, PROGRAM], timeout=PATIENCE)
        assert done.cause in SHORT_OF_MEMORY
        assert b"ok" not in done.stdout
    wait_until(lambda: not marked(marker), "the end of all of them", PATIENCE)
    if sandbox.state == "running":
        assert sandbox.pid == init
        assert group.limits() == limits
        assert (group.usage().memory_peak or 0) <= limits["memory"]
        wait_until(lambda: sandbox.exec(["true"], timeout=PATIENCE).ok, "a launcher", PATIENCE)
        assert sandbox.exec(hogs(12), timeout=PATIENCE).cause is Cause.OOM


@pytest.mark.parametrize("user", USERS)
def test_more_processes_than_allowed(grouped: Open, user: str) -> None:
    """The group's wall alone: the limit of the id's processes is wider."""
    if cgroup.layout().versions.get("pids") is None:
        pytest.skip(cgroup.layout().remedies["pids"])
    run = grouped(user=user, limits=Limits(memory="256M", pids=64))
    for _ in range(2):
        done = run([PROGRAM, "forkbomb", "200"], timeout=PATIENCE)
        made, why = done.stdout.split()
        assert why == b"EAGAIN"
        assert 48 <= int(made) < 64
    free = grouped(user=user, limits=Limits(memory="256M"))
    assert free([PROGRAM, "forkbomb", "200"], timeout=PATIENCE).stdout == b"200 ok\n"


SPIN = "for i in 1 2 3 4; do setsid sh -c 'while :; do :; done' & done; exec sleep 2"


def test_more_processes_use_no_more_processor(grouped: Open) -> None:
    if cgroup.layout().versions.get("cpu") is None:
        pytest.skip(cgroup.layout().remedies["cpu"])

    def share(run: Run) -> float:
        done = run(["sh", "-c", SPIN], timeout=PATIENCE)
        return (done.usage.cpu_user + done.usage.cpu_system) / done.duration

    limits = Limits(memory="64M", pids=64, cpus=0.25)
    assert share(grouped(limits=limits)) < 0.35
    assert share(grouped(limits=Limits(memory="64M", pids=64))) > 0.5


WAKE = r"""
import os, signal
os.write(1, b"ready\n")
while True:
    for target in (-1, 0, os.getppid(), 1):
        try:
            os.kill(target, signal.SIGCONT)
        except OSError:
            pass
    os.write(1, b".")
"""


def arrives(pipe: Any, seconds: float) -> bool:
    return bool(select.select([pipe], [], [], seconds)[0])


@pytest.mark.parametrize("user", USERS)
def test_a_suspended_sandbox_cannot_wake_itself(hostile: Hostile, user: str) -> None:
    """Two commands that do nothing but try."""
    limits = LIMITS if IS_ROOT else Limits()
    with Sandbox(SandboxSpec(user=user, limits=limits)) as sandbox:
        command = [PYTHON, "-I", "-S", "-c", WAKE]
        with sandbox.popen(command) as one, sandbox.popen(command) as two:
            for process in (one, two):
                assert process.stdout.readline() == b"ready\n"
            sandbox.suspend()
            for process in (one, two):
                while arrives(process.stdout, 0):
                    os.read(process.stdout.fileno(), 1 << 20)
            before = group_of(sandbox).usage().cpu_user if IS_ROOT else None
            for process in (one, two):
                assert not arrives(process.stdout, 0.3), "it runs"
            if before is not None:
                assert group_of(sandbox).usage().cpu_user == before
            sandbox.resume()
            for process in (one, two):
                assert arrives(process.stdout, PATIENCE), "a control: thawed, it goes on"
                process.kill()
