"""The fault walk through sandboxes with control groups: in init, in the first launcher, on the host's side.

As in test_fault_walk.py: a refusal that names the stage, with nothing left behind, or a sandbox that is no
weaker. Here that means: its processes are in its groups, and these have the limits that were asked for.
"""

import contextlib
import errno
import os
import random
import resource
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from support import wait_until
from system.test_fault_walk import (
    FINGERPRINT,
    NORMAL_ENDS,
    by_exec,
    drop_spawners,
    faulty,
    settled,
    walk_of_births,
)

import sandboxcore
from sandboxcore import Sandbox, SandboxSpec, SetupError, _native, cgroup, groups, request, spawner

__all__ = ["faulty"]  # a fixture

MEMORY, PIDS = 64 << 20, 64
SPEC = SandboxSpec(
    tmpfs=["/opt/scratch:1M"], limits=sandboxcore.Limits(cpu_time=100, memory=MEMORY, pids=PIDS)
)
# One that nothing has an answer to; and then, for each call as it comes, one that something may have.
LIKELY = [errno.ENOENT, errno.ENOSYS, errno.EINVAL, errno.EINTR, errno.EACCES, errno.ENOMEM]
CODES = [[errno.EUCLEAN], LIKELY]
if os.environ.get("SANDBOXCORE_ALL_FAULTS"):
    CODES = [[errno.EUCLEAN], *([code] for code in LIKELY)]
PATIENCE = 60

Failures = list[_native.NativeFailure]


@pytest.fixture(autouse=True)
def _limits_work() -> None:
    found = cgroup.layout()
    if "memory" not in found.versions:
        pytest.skip(found.remedies["memory"])


def base() -> cgroup.Base:
    """Of the spawner in use."""
    (connection,) = spawner._spawners.values()
    return groups.groups_of(connection).base


def left(kind: str) -> set[str]:
    """The groups of runs, or of sandboxes, that exist in any hierarchy."""
    found = base().layout
    parents = {*found.v1.values(), *([] if found.v2 is None else [found.v2])}
    return {path.name for parent in parents for path in (parent / base().relative).glob(f"{kind}-*")}


def kept() -> set[str]:
    """The groups of runs that are ready for the next one."""
    (connection,) = spawner._spawners.values()
    idle = groups.groups_of(connection)._idle
    return {Path(group.group.relative).name for ready in idle.values() for group in ready}


def descriptors() -> int:
    """How many there are, but for the groups that are ready: those have the only ones of groups."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    of_groups = [link for link in links if "/sandboxcore/host-" in link]
    words = {word for link in of_groups if base().relative in link for word in link.split("/")}
    assert {word for word in words if word.startswith("run-")} <= kept()
    return len([link for link in links if link not in of_groups and link != "anon_inode:[eventfd]"])


def in_force(limits: Mapping[str, Any], own: int = 0) -> bool:
    """Whether these are the limits that were asked for; ``own`` processes are the sandbox's."""
    return limits["memory"] == MEMORY and limits.get("pids") in (None, PIDS + own)


def member(pid: int, group: cgroup.Group) -> bool:
    """Whether a process is in every hierarchy of a group; one that has ended meanwhile is nowhere else."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text.count(f"/{group.relative}") == len(group.places())


# --- fresh sandboxes ----------------------------------------------------------------------------


SEEN = 4 << 20  # bytes that its group must have counted: BULKY takes four times that
BULKY = FINGERPRINT + "dd if=/dev/zero of=/dev/null bs=16M count=1 2>/dev/null\n"


def attempt() -> sandboxcore.ExecResult:
    return sandboxcore.run(["/bin/sh", "-c", BULKY], spec=SPEC, files={"injected": "data"}, timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_every_call_of_a_run_in_a_group(
    faulty: Failures, monkeypatch: pytest.MonkeyPatch, codes: list[int]
) -> None:
    clean = attempt()
    assert clean.ok, clean
    before = descriptors() + 1, *settled()[1:]  # the socket of a spawner that is not collected yet
    stages, survived = [], 0
    for number in range(1, 2000):
        monkeypatch.setattr(request, "FAULT", (number, code := random.choice(codes)))
        faulty.clear()
        try:
            done = attempt()
        except NORMAL_ENDS:
            stages.append(faulty[0].stage)
            survived = 0
        else:
            assert done.stdout == clean.stdout, f"call {number} failed with {code} and weakened the sandbox"
            assert (done.usage.memory_peak or 0) > SEEN, f"call {number}: it was not in its group"
            survived += 1
        if survived == 30:
            break
    monkeypatch.setattr(request, "FAULT", (0, 0))
    assert attempt().stdout == clean.stdout
    wait_until(lambda: left("run") == kept(), "the end of every group but the next runs'", PATIENCE)
    (connection,) = spawner._spawners.values()
    for ready in groups.groups_of(connection)._idle.values():
        assert all(in_force(group.group.limits(), own=1) for group in ready)
    settled()
    after = descriptors(), *settled()[1:]
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    assert len(stages) > 100
    if codes == [errno.EUCLEAN]:
        assert "cgroup" in stages
        assert stages.index("cgroup") < stages.index("session"), "before anything of the payload"


# --- living sandboxes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_every_call_of_a_living_sandbox_in_a_group(
    faulty: Failures, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codes: list[int]
) -> None:
    def stands(living: Sandbox) -> None:
        link = living._link
        assert link is not None
        assert link.group is not None
        assert in_force(groups.limits_of(link.group))
        assert member(living.pid, link.group)

    def ran(done: sandboxcore.ExecResult) -> None:
        assert (done.usage.memory_peak or 0) > 100_000, done.usage

    with Sandbox(SPEC) as living:
        by_exec(living, tmp_path)
    before = settled()
    stages = walk_of_births(faulty, monkeypatch, tmp_path, codes, spec=SPEC, stands=stands, ran=ran)
    wait_until(lambda: not left("sbx"), "the end of every sandbox's group", PATIENCE)
    after = settled()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    if codes == [errno.EUCLEAN]:
        assert "cgroup" in stages


# --- the host's side ----------------------------------------------------------------------------


def by_run() -> None:
    assert sandboxcore.run(["true"], spec=SPEC, timeout=PATIENCE).ok


def by_start() -> None:
    with Sandbox(SPEC) as living:
        assert living.exec(["true"], timeout=PATIENCE).ok


STARTS = {"run": by_run, "start": by_start}
Start = Callable[[], None]


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> Start:
    """Both kinds, with a spawner of its own that has no group ready."""
    drop_spawners()
    chosen: Start = STARTS[request.param]
    return chosen


def everywhere() -> list[Path]:
    """The directories of the base."""
    found = base().layout
    parents = {*found.v1.values(), *([] if found.v2 is None else [found.v2])}
    return [parent / base().relative for parent in parents if (parent / base().relative).exists()]


def forget_ready() -> None:
    """The next run has to make its group."""
    (connection,) = spawner._spawners.values()
    found = groups.groups_of(connection)
    found.retire()
    found._retired = False


def nothing_new() -> None:
    wait_until(lambda: left("run") == kept(), "the end of groups of runs", PATIENCE)
    wait_until(lambda: not left("sbx"), "the end of groups of sandboxes", PATIENCE)


def failure(start: Start) -> OSError | None:
    """Which a SetupError is, too."""
    try:
        start()
    except OSError as error:
        return error
    return None


class Failing:
    """A function of os whose N-th call about groups fails, in this thread: another one tidies up."""

    def __init__(self, name: str, number: int) -> None:
        self.real, self.left = getattr(os, name), number
        self.all = name == "write"

    def __call__(self, *args: Any, **options: Any) -> Any:
        ours = threading.current_thread() is threading.main_thread()
        if ours and (self.all or "cgroup" in str(args[0]) or "dir_fd" in options):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(args[0]))
        return self.real(*args, **options)


@pytest.mark.parametrize("what", ["mkdir", "open", "write"])
def test_a_group_that_cannot_be_made(start: Start, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Every call of this process on files of groups fails once, one after the other."""
    failed = 0
    for number in range(1, 200):
        start()
        forget_ready()
        failing = Failing(what, number)
        with monkeypatch.context() as patch:
            patch.setattr(os, what, failing)
            error = failure(start)
        if error is not None:
            assert isinstance(error, SetupError), (number, error)
            assert (error.stage, error.errno) == ("cgroup", errno.EROFS), (number, error)
            failed += 1
        nothing_new()
        if failing.left > 0:
            break
    assert failed or what == "write", "version 1 is written to by cgroupspy, in its own way"
    start()
    nothing_new()


def test_a_base_that_was_removed(start: Start) -> None:
    """By whoever tidies up too eagerly: then there is another one."""
    start()
    forget_ready()
    nothing_new()
    base().remove()
    if everywhere():
        pytest.skip("the spawner is in it, so nobody can remove it")
    start()
    assert everywhere()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_base_that_is_read_only(start: Start) -> None:
    start()
    forget_ready()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in everywhere()}
    try:
        for path in modes:
            path.chmod(0o500)
        with pytest.raises(SetupError) as caught:
            start()
        assert (caught.value.stage, caught.value.errno) == ("cgroup", errno.EACCES)
        assert "mkdir" in str(caught.value)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    nothing_new()
    start()


def test_no_descriptor_is_left(start: Start) -> None:
    """RLIMIT_NOFILE, with more and more free descriptors until there are enough."""
    start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before, stages = descriptors(), set()
    for free in range(100):
        forget_ready()
        held = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(2))
            for fd in held[:free]:
                os.close(fd)
            error = failure(start)
        finally:
            for fd in held[free:]:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if error is None:
            break
        assert error.errno == errno.EMFILE, error
        stages.add(getattr(error, "stage", ""))
    assert "cgroup" in stages, stages
    nothing_new()
    assert descriptors() <= before + 1
