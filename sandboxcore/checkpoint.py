"""Checkpoints of processes by CRIU, where the host has it: :func:`checkpoint` writes a running command of a
living sandbox to a directory, :func:`restore` lets it go on in another sandbox of the same spec. For root.

What CRIU does not bring back would be isolation lost. So there must be nothing of it (Landlock, control
groups), or it is inherited from what restores (no_new_privs, an empty session keyring), and what /proc tells
of every thread is compared with what it was, before the first of them runs on.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sandboxcore import criu, host
from sandboxcore.command import Process
from sandboxcore.criu import FEATURE, check
from sandboxcore.errors import CheckpointError, InvalidTransition, SandboxGone, SpecError, UnsupportedHost
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import SandboxSpec, StrPath

__all__ = ["CheckpointError", "Restored", "check", "checkpoint", "restore"]

PATIENCE = 300  # seconds for CRIU to write or read everything
_ABOUT = "sandboxcore.json"
_KEPT = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
         "Seccomp_filters")  # fmt: skip
# Not that of time: CRIU makes one, in which the monotonic clock goes on from where it was.
_SPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
# CRIU is executed inside, by root: from here on it is the host's own and nobody else's.
_HOSTS_OWN = ("/usr/", "/etc/", "/bin/", "/sbin/", "/lib/", "/lib32/", "/lib64/", "/libx32/", "/proc/",
              "/dev/", "/run/")  # fmt: skip


def checkpoint(sandbox: Sandbox, process: Process, path: StrPath, *, leave_running: bool = False) -> None:
    """Write a command, and everything below it, to the new directory ``path``; then it is killed.

    It has no terminal and is not user 0. The spec has ``landlock=False``, no limits that need a control
    group, no rootfs, overlay, volume or live binds: :class:`SpecError`. The files of the sandbox are no part
    of it. The sandbox is suspended meanwhile.

    leave_running: it is not killed, but goes on.

    Raises
    ------
    UnsupportedHost: CRIU, or what it needs, is missing. InvalidTransition: sandbox or command do not run.
    CheckpointError: CRIU cannot write this command; it runs on, and there is no ``path``. FileExistsError:
    there is one.
    """
    check()
    program = _require(sandbox)
    if process not in sandbox._running:
        raise ValueError("process: it is no command of this sandbox")
    if process.poll() is not None:
        raise InvalidTransition(sandbox.name, "ended", "checkpoint a command")
    if int(criu.status(process.pid)["Uid"].split()[0]) == host.features().id_base:
        raise SpecError("a checkpoint cannot be with user 0, who could kill the parent of what is restored")
    where = Path(path)
    where.mkdir(mode=0o700)
    try:
        with _still(sandbox):
            _dump(sandbox, process, program, where)
            if not leave_running:
                criu.signal_tree(process.pid, signal.SIGKILL)
    except BaseException:
        shutil.rmtree(where, ignore_errors=True)
        raise
    if not leave_running:
        process.wait()


@contextlib.contextmanager
def _still(sandbox: Sandbox) -> Iterator[None]:
    """Nothing of the payload runs while CRIU does, inside, with more power than it, and in its ``/tmp``."""
    sandbox.suspend()
    try:
        deadline = time.monotonic() + PATIENCE
        while moving := [pid for pid in criu.tree(sandbox.pid)[1:] if not criu.stands_still(pid)]:
            if time.monotonic() > deadline:
                raise CheckpointError(f"process {moving[0]} cannot be stopped")
            time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(SandboxGone):
            sandbox.resume()


def _dump(sandbox: Sandbox, process: Process, program: str, where: Path) -> None:
    options = [program, "dump", f"--tree={process.pid_inside}", "--leave-stopped"]
    done = criu.begin(sandbox.pid, where, options)
    try:
        code = done.wait(PATIENCE)
    except BaseException:
        criu.signal_tree(done.pid, signal.SIGKILL)
        done.wait()
        raise
    if code != 0:
        raise criu.failed(where, "dump")
    about = _About(
        spec=sandbox.spec.fingerprint,
        pid=process.pid_inside,
        argv=[os.fsdecode(item) for item in process.args],
        pipes=_pipes(process.pid),
        facts=_facts(process.pid, sandbox.pid),
    )
    criu.of_itself(where)
    criu.give(where, os.geteuid())
    (where / _ABOUT).write_text(json.dumps(vars(about), indent=1))


def restore(sandbox: Sandbox, path: StrPath) -> "Restored":
    """Let what :func:`checkpoint` wrote go on in a sandbox of the same spec, best in one that has run
    nothing, for every process gets the number it had, which has to be free.

    The sandbox is suspended meanwhile. Nobody but root may have access to ``path``, for CRIU trusts it.

    Raises
    ------
    UnsupportedHost, SpecError: as :func:`checkpoint`; or it is of another spec. CheckpointError: CRIU cannot
    restore it, or what it restored is not isolated as before. Then nothing of it is left.
    """
    check()
    program = _require(sandbox)
    where = Path(path)
    criu.require_private(where)
    about = _About(**json.loads((where / _ABOUT).read_text()))
    if about.spec != sandbox.spec.fingerprint:
        raise SpecError(f"{where}: it is of a sandbox of another spec")
    restored = Restored(sandbox, about)
    with _still(sandbox):
        try:
            with criu.lent(where, host.features().id_base):
                restored._start(program, where)
            if difference := _difference(about.facts, _facts(restored.pid, sandbox.pid)):
                raise CheckpointError(f"{where}: it is not isolated as before: {difference}")
        except BaseException:
            restored.close()  # before anything goes on
            raise
    return restored


@dataclass
class _About:
    """What CRIU's images do not say. facts: by number inside, of each process, what its isolation is."""

    spec: str
    pid: int
    argv: Sequence[str]
    pipes: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Restored:
    """A restored command. It ends with the sandbox, and with this handle; everything below it ends with it.

    args, stdin, stdout, stderr: as those of :class:`subprocess.Popen`, in bytes; a stream is None where it
        was no pipe.
    pid: its number outside, while it runs. pid_inside: inside, as before.
    """

    def __init__(self, sandbox: Sandbox, about: _About) -> None:
        self.args = tuple(about.argv)
        self.pid_inside = about.pid
        self.pid = 0
        self.returncode: int | None = None
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        self._init = sandbox.pid
        self._about = about
        self._life: int | None = None
        self._status: IO[bytes] | None = None
        self._ready = False
        self._parent: subprocess.Popen[bytes] | None = None

    def _start(self, program: str, where: Path) -> None:
        theirs: list[int] = []
        try:
            inherit = self._open_streams(theirs)
            life, self._life = os.pipe()
            ready, status = os.pipe()
            self._status = open(ready, "rb", 0)  # noqa: SIM115 - closed with the handle
            helper = os.open(host.HELPER, os.O_PATH | os.O_CLOEXEC)
            users = os.open(f"/proc/{self._init}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
            theirs += [life, status, helper, users]
            then = [f"/proc/self/fd/{helper}", "reap", *map(str, (self.pid_inside, status, life, users))]
            options = [program, "restore", "--leave-stopped", f"--join-ns=user:/proc/self/fd/{users},0,0"]
            options += [*inherit, "--exec-cmd", "--", *then]
            self._parent = criu.begin(self._init, where, options, theirs)
        finally:
            for fd in theirs:
                os.close(fd)
        if not self._readable(PATIENCE) or self._status.readline() != b"ready\n":
            raise criu.failed(where, "restore")
        self._ready = True
        found = [pid for pid in criu.tree(self._parent.pid)[2:] if criu.number_inside(pid) == self.pid_inside]
        if not found:
            raise CheckpointError(f"{where}: it ended at once")
        self.pid = found[0]

    def _open_streams(self, theirs: list[int]) -> list[str]:
        """Our ends of the pipes that were its streams."""
        options = []
        ends: dict[str, int] = {}
        for number, name in (("0", "stdin"), ("1", "stdout"), ("2", "stderr")):
            pipe = self._about.pipes.get(number)
            if pipe is None or pipe in ends:
                continue
            read, write = os.pipe()
            ours, ends[pipe] = (write, read) if number == "0" else (read, write)
            setattr(self, name, open(ours, "wb" if number == "0" else "rb"))  # noqa: SIM115
            theirs.append(ends[pipe])
            os.fchown(
                ends[pipe], *(host.features().id_base,) * 2
            )  # CRIU opens it again, as the sandbox's root
            options += ["--inherit-fd", f"fd[{ends[pipe]}]:{pipe}"]
        return options

    def _readable(self, seconds: float | None) -> bool:
        poller = select.poll()
        poller.register(self._status or -1, select.POLLIN)
        return bool(poller.poll(None if seconds is None else seconds * 1000))

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of it and everything below it; returns its return code, as that of Popen.

        Raises :class:`subprocess.TimeoutExpired` after ``timeout`` seconds; it runs on.
        """
        if self.returncode is None and self._status is not None and self._parent is not None:
            if not self._readable(timeout):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            # killed with the sandbox, its parent could not say so
            last = int(self._status.readline() or -1) if self._ready else -1
            self._parent.wait()
            self.returncode = -signal.SIGKILL if last < 0 else os.waitstatus_to_exitcode(last)
            self.pid = 0
        return -signal.SIGKILL if self.returncode is None else self.returncode

    def kill(self) -> None:
        """Kill it, and everything below it."""
        if self._life is not None:
            os.close(self._life)
            self._life = None
        if not self._ready and self._parent is not None:  # CRIU, and what it has made so far
            criu.signal_tree(self._parent.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it if it still runs, wait, and close its streams. Idempotent."""
        self.kill()
        self.wait()
        for stream in (self.stdin, self.stdout, self.stderr, self._status):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def __enter__(self) -> "Restored":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._life is not None:
            self.close()

    def __repr__(self) -> str:
        return f"<Restored: returncode: {self.returncode} args: {list(self.args)!r}>"


# --- what may be, and how ---------------------------------------------------------------------------


def _require(sandbox: Sandbox) -> str:
    """CRIU's path, the same inside. Raises UnsupportedHost, SpecError, SandboxGone."""
    if host.features().mode != "root":
        raise UnsupportedHost(FEATURE, "they need root, in the host's own user namespace")
    if reason := _unfit(sandbox.spec):
        raise SpecError(f"a checkpoint cannot be with {reason}")
    if sandbox._link_now().group is not None:
        raise SpecError("a checkpoint cannot be with limits that need a control group, or accounting")
    program = criu.find()
    if not program.startswith("/usr/"):
        raise UnsupportedHost(FEATURE, f"{program} is not below /usr, so no sandbox has it")
    return program


def _unfit(spec: SandboxSpec) -> str:
    """What CRIU cannot bring back, or what would let the payload change the CRIU that root executes."""
    landlock = spec.landlock and host.features().landlock_abi > 0
    wrong = {
        "Landlock, which CRIU does not know of; use landlock=False": landlock,
        "rootfs=, writable= or live_binds=": spec.rootfs is not None or spec.writable or spec.live_binds,
        "time_offsets=": spec.time_offsets,
        "proc='pid'": spec.proc != "full",
        "network='host'": spec.network == "host",
    }
    for mount in spec.all_mounts():
        if mount.kind not in ("bind", "tmpfs"):
            wrong[f"{mount.kind} {mount.target}"] = True
        if mount.target == "/" or f"{mount.target}/".startswith(_HOSTS_OWN):
            wrong[f"a mount on {mount.target}"] = True
    return next((reason for reason, holds in wrong.items() if holds), "")


# --- what it is, before and after -------------------------------------------------------------------


def _pipes(pid: int) -> dict[str, str]:
    """Which of its standard streams are pipes, and CRIU's names for them."""
    links = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    return {number: links[number] for number in "012" if links.get(number, "").startswith("pipe:")}


def _facts(pid: int, init: int) -> dict[str, Any]:
    """The isolation of a process and of everything below it, by number inside: what /proc tells of each
    thread, limits, descriptors and places, and which namespaces are those of the sandbox."""
    facts: dict[str, Any] = {}
    for member in criu.tree(pid):
        threads = [criu.status(member, int(task)) for task in os.listdir(f"/proc/{member}/task")]
        threads.sort(key=lambda thread: int(thread["NSpid"].split()[-1]))
        facts[str(criu.number_inside(member))] = {
            "threads": [{name: thread[name].split() for name in _KEPT} for thread in threads],
            "limits": Path(f"/proc/{member}/limits").read_text().splitlines(),
            "descriptors": {fd: _kind(member, f"fd/{fd}") for fd in sorted(os.listdir(f"/proc/{member}/fd"))},
            "places": [_kind(member, name) for name in ("root", "cwd", "exe")],
            "oom_score_adj": Path(f"/proc/{member}/oom_score_adj").read_text().strip(),
            "namespaces": [kind for kind in _SPACES if _space(member, kind) == _space(init, kind)],
        }
    return facts


def _kind(pid: int, name: str) -> str:
    """What a descriptor or a place is: a path, or a kind of thing that has none."""
    link = os.readlink(f"/proc/{pid}/{name}")
    return "deleted" if link.endswith(" (deleted)") else link.partition(":[")[0]


def _space(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def _difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Where the facts are not the same, for an error; empty if they are."""
    was, now = dict(_flat(before)), dict(_flat(after))
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            return f"process{name}: {now.get(name)}, not {was.get(name)}"
    return ""


def _flat(facts: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested facts, each with its whole name."""
    if isinstance(facts, Mapping):
        for key, value in facts.items():
            yield from _flat(value, f"{name} {key}")
    elif isinstance(facts, list) and facts:
        for number, value in enumerate(facts):
            yield from _flat(value, f"{name} {number}")
    else:
        yield name, facts
