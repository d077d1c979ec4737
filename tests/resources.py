"""What the tests of resources share: a payload that uses so much and no more, ways to run it, skips in the
host's own words, and what is left of control groups. Host programs import it: it loads no pytest, which takes
longer than everything else here."""

import functools
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import sandboxcore
from sandboxcore import PIPE, ExecResult, Limits, Sandbox, SandboxSpec, SandboxState, cgroup, groups
from sandboxcore.cgroup_files import groups_below, processes
from sandboxcore.command import Process

MiB = 1 << 20
IN_VM = "VMTEST" in os.environ  # a machine in software: twenty times slower
PATIENCE = 300 if IN_VM else 30  # seconds for whatever must happen
FOLDER = "/load"  # the payload's, inside
PAYLOAD = "SANDBOXCORE_TEST_PAYLOAD"  # the variable that says where it is outside
LIVING = ("exec", "popen", "detach")
WAYS = ("run", *LIVING)


# --- what the host has --------------------------------------------------------------------------------


def needs(*names: str) -> None:
    """Skip unless these are to be had here: controllers, "swap", "freezer". The reason is the layout's, with
    its remedy; for who was given no group by anybody, it is that only root need not be."""
    found = cgroup.layout()
    for name in names:
        if (name == "freezer" and found.freezer) or name in found.versions:
            continue
        excuse = "" if os.geteuid() == 0 or IN_VM else "only root can do this: "
        _skip(excuse + found.remedies[name])


def _skip(reason: str) -> NoReturn:
    import pytest

    pytest.skip(reason)


def version(controller: str) -> int:
    """1 or 2: who has the controller."""
    return cgroup.layout().versions[controller]


# --- the payload --------------------------------------------------------------------------------------


@functools.cache
def program() -> Path:
    """The payload, compiled once, also for the host programs of tests; where everybody may run it."""
    if known := os.environ.get(PAYLOAD):
        return Path(known)
    if not shutil.which("gcc"):
        _skip("no gcc on PATH")
    folder = tempfile.TemporaryDirectory(prefix="workload-", ignore_cleanup_errors=True)
    _folders.append(folder)
    Path(folder.name).chmod(0o755)
    target = Path(folder.name) / "workload"
    command = ["gcc", "-std=gnu17", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", target]
    subprocess.run([*command, Path(__file__).with_name("workload.c")], check=True, timeout=PATIENCE)
    os.environ[PAYLOAD] = str(target)
    return target


_folders: list["tempfile.TemporaryDirectory[str]"] = []  # removed with the interpreter


def load(*steps: str | int) -> list[str]:
    """A command line for the steps of workload.c."""
    return [f"{FOLDER}/workload", *map(str, steps)]


def spec(*, rw: Any = (), accounting: bool = False, optional: Any = (), **limits: Any) -> SandboxSpec:
    """A spec with these limits, in which the payload is to be found."""
    ro = [(program().parent, FOLDER)]
    return SandboxSpec(ro=ro, rw=rw, limits=Limits(**limits), optional=optional, accounting=accounting)


@contextmanager
def box(**options: Any) -> Iterator[Sandbox]:
    """A living sandbox of such a spec."""
    with Sandbox.create(spec(**options)) as made:
        yield made


def within(sandbox: Sandbox, way: str, argv: list[str], **options: Any) -> ExecResult:
    """Run a command in a living sandbox in one of three ways, to its end."""
    options.setdefault("timeout", PATIENCE)
    if way == "exec":
        return sandbox.exec(argv, **options)
    if way == "popen":
        with sandbox.popen(argv, **options) as process:
            process.communicate(timeout=PATIENCE)
            assert process.result is not None
            return process.result
    with sandbox.detach(argv, **options) as command:
        return command.wait(PATIENCE)


def perform(way: str, argv: list[str], described: SandboxSpec, **options: Any) -> ExecResult:
    """Run a command in one of the ways, in a sandbox of its own."""
    if way == "run":
        options.setdefault("timeout", PATIENCE)
        return sandboxcore.run(argv, spec=described, **options)
    with Sandbox.create(described) as sandbox:
        return within(sandbox, way, argv, **options)


@contextmanager
def started(sandbox: Sandbox, *steps: str | int, count: int = 1, **options: Any) -> Iterator[Process]:
    """A command whose steps begin now; it has said ``count`` lines when this returns."""
    with sandbox.popen(load(*steps), stdin=PIPE, bufsize=0, **options) as process:
        for _ in range(count):
            assert process.stdout.readline() == b"ready\n"
        try:
            yield process
        finally:
            if sandbox.state is SandboxState.PAUSED:  # else the end would be waited for in vain
                sandbox.resume()
            process.kill()


def let_go(process: Process) -> ExecResult:
    """Have a command go on from its step ``go`` to its end."""
    process.stdin.write(b"g")
    process.wait(PATIENCE)
    assert process.result is not None
    return process.result


@contextmanager
def meanwhile(action: Callable[[], Any]) -> Iterator[list[Any]]:
    """Do something in a thread; its result, or what it raised, is in the list after the end."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield results
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def cpu(usage: Any) -> float:
    """CPU seconds, of a Usage or a GroupUsage."""
    return usage.cpu_user + usage.cpu_system


# --- groups, seen from outside ------------------------------------------------------------------------


def in_force(sandbox: Sandbox) -> dict[str, Any]:
    """The limits that the kernel has for a sandbox's commands together."""
    group = sandbox._link_now().group
    assert group is not None
    return groups.limits_of(group)


def groups_of(pid: int, name: str = "") -> list[Path]:
    """Directories of groups that a process has made, in all hierarchies; only those whose name begins so."""
    found = cgroup.layout()
    parents = {*found.v1.values(), *([] if found.v2 is None else [found.v2])}
    pattern = f"sandboxcore/host-{pid}-*" + (f"/{name}*" if name else "")
    return sorted(path for parent in parents for path in parent.glob(pattern))


def populated(group: Path) -> bool:
    """Whether a process is left in a group or below it. It may go while one looks."""
    return any(processes(path) for path in groups_below(group))


def groups_of_sandbox(sandbox: Sandbox) -> list[Path]:
    """The same for one sandbox of this process."""
    return groups_of(os.getpid(), f"{sandbox.id}.")
