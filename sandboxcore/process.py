"""Running one command in a fresh sandbox: :func:`run`."""

import errno as E
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sandboxcore import _native, groups, host, spawner
from sandboxcore.census import place
from sandboxcore.errors import (
    CwdNotFound,
    CwdNotPermitted,
    CwdPathInvalid,
    ExecError,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    SandboxError,
    SetupError,
    UnsupportedHost,
)
from sandboxcore.plan import Plan, compile_plan
from sandboxcore.request import HOLD, PIPE, File, FileContent, Program, Request, StrOrBytes, make_streams
from sandboxcore.result import Decoder, ExecResult, make_result
from sandboxcore.spec import SandboxSpec
from sandboxcore.volumes import in_use

Done = TypeVar("Done")

_DEFAULT_SPEC = SandboxSpec()
ATTEMPTS = 8  # a template may be evicted between its making and its use, by 64 others


def run(
    argv: Sequence[Program],
    *,
    spec: SandboxSpec | None = None,
    input: StrOrBytes | None = None,
    stdin: File = None,
    stdout: File = PIPE,
    stderr: File = PIPE,
    timeout: float | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    text: bool = False,
    encoding: str | None = None,
    errors: str | None = None,
    check: bool = False,
    files: Mapping[str, FileContent] | None = None,
    pass_fds: Sequence[int] = (),
    record: bool = False,
) -> ExecResult:
    """Run a command in a fresh, fully isolated sandbox and wait until nothing of it is left.

    Where it overlaps with :func:`subprocess.run` it behaves like it, except that output is captured and
    stdin is the null device unless told otherwise, and that a timeout is a result, not an exception.

    Parameters
    ----------
    argv: program and arguments; a program without a slash is looked up in the sandbox's PATH.
    spec: how the sandbox is built; default :class:`SandboxSpec`.
    input: fed to stdin, then end-of-file. Text is encoded with ``encoding``.
    stdin: DEVNULL, or a descriptor or file to read from, through a pipe. Not together with ``input``.
    stdout, stderr: PIPE captures; DEVNULL; None passes through to this process's own; a descriptor or
        file is written to, through a pipe; ``stderr=STDOUT`` merges.
    timeout: seconds; then the whole tree is killed and the result has what it wrote so far.
    cwd: directory inside; default ``spec.workdir``. Links in it never lead out of the sandbox.
    env: the whole environment; default the spec's clean one.
    text, encoding, errors: decode output (UTF-8 unless told) with universal newlines. Output that was cut
        short is decoded with ``errors="replace"`` unless told otherwise.
    check: raise :class:`CommandFailed` or :class:`SandboxTimeout` unless it exits with 0.
    files: path to content, or to (content, mode); relative to ``cwd``. Written as the payload, mode 0o644.
    pass_fds: descriptors of this process that the command gets under the same numbers.
    record: read back what was applied into ``result.capabilities``.

    Raises
    ------
    SpecError, UnsupportedHost: before anything starts.
    SetupError: a step failed (:class:`ExecError` for the command itself); nothing is left behind.
    """
    plan = compile_plan(spec or _DEFAULT_SPEC, host.features())
    streams, stdio = make_streams(plan, input, (stdin, stdout, stderr), encoding)
    request = Request(
        plan, argv, cwd=cwd, env=env, files=files, pass_fds=pass_fds, stdio=stdio, record=record
    )
    limits = plan.spec.limits
    deadlines = [seconds for seconds in (timeout, limits.wall_time) if seconds is not None]
    done = _execute(plan, request, streams, max(0.0, min(deadlines)) if deadlines else None)
    result = make_result(plan, request.args, streams, done, Decoder(text, encoding, errors))
    if check:
        result.check_returncode()
    return result


# The spawner went away before init got its id maps; so the command has certainly not run.
_NEVER_RAN = {("spawner", 11), ("spawner", 13), ("spawner", 14), ("idmap", 1)}
# Or its maker of network namespaces did, which is asked before anything is cloned.
_NO_MAKER = {("netns", E.EPIPE), ("netns", E.ECONNRESET)}


def _execute(
    plan: Plan, request: Request, streams: _native.Streams, timeout: float | None
) -> _native.NativeResult:
    limits = plan.spec.limits
    flood = limits.output_action == "kill"

    def action(connection: spawner.Spawner) -> _native.NativeResult:
        if not plan.controllers:
            fds = [*request.pass_fds, *held]
            data = request.within(HOLD * len(held))
            return _native.run(connection.fd, data, streams, timeout, fds, kill_flood=flood)
        with groups.leased(plan, connection) as group:
            done = _native.run(
                connection.fd,
                request.within([*group.uses, *HOLD * len(held)]),
                streams,
                timeout,
                [*request.pass_fds, *group.fds, *held],
                watch=group.watch,
                kill_flood=flood,
            )
            return groups.counted(done, group)

    with place(), in_use(plan.volumes, f"run-{os.getpid()}", until_end=True) as held:
        return with_spawner(plan, request, action)


def with_spawner(plan: Plan, request: Request | None, action: Callable[[spawner.Spawner], Done]) -> Done:
    """Do something with a spawner that knows the plan. One that has died or has forgotten it is helped, as
    long as nothing ran; every other failure is rendered."""
    for attempt in range(ATTEMPTS):
        connection = reach_spawner(plan, request)
        try:
            connection.teach(plan)
            return action(connection)
        except _native.NativeFailure as failure:
            help_spawner(plan, request, connection, failure, last=attempt == ATTEMPTS - 1)
    raise AssertionError("unreachable")


def reach_spawner(plan: Plan, request: Request | None) -> spawner.Spawner:
    """The spawner for a plan, started if need be. Raises what :func:`render` makes of a failure."""
    try:
        return spawner.get_spawner(plan)
    except _native.NativeFailure as failure:
        raise render(plan, request, failure) from None


def help_spawner(
    plan: Plan,
    request: Request | None,
    connection: spawner.Spawner,
    failure: _native.NativeFailure,
    *,
    last: bool,
) -> None:
    """Make another attempt possible after a failure with which nothing ran; render every other one."""
    if not last and failure.stage == "plan" and failure.errno == E.ESTALE:
        connection.known.discard(plan.id)
        return
    again = (failure.stage, failure.index) in _NEVER_RAN or (failure.stage, failure.errno) in _NO_MAKER
    if failure.stage == "spawner" or again:
        spawner.drop_spawner(connection)
        groups.let_go(connection)
    if last or not again:
        raise render(plan, request, failure) from None


_OVERLAY = re.compile(r"\((ro|rw), (root|spec overlay)")
_HINTS = {
    ("cgroup", E.EBUSY): "somebody put a process or another controller into a group of ours",
    ("cgroup", E.ENOENT): "the group was removed, or lies outside of this process's cgroup namespace",
    ("cgroup", E.EAGAIN): "pids.max of a group above is reached",
    ("spawner", E.ENOENT): "the package's _spawner is missing: reinstall sandboxcore",
    ("spawner", E.EACCES): "the package's _spawner is not executable: reinstall sandboxcore",
    ("spawner", E.EPIPE): "the spawner was killed",
    ("template", E.EXDEV): "this process lives in a chroot; sandboxes need the mount namespace's own root",
    ("file", E.ENOSPC): "limits.disk or limits.inodes is too small for files=",
    ("file", E.EROFS): "that path is read-only inside; files= can only write where the payload can",
    ("session", E.EDQUOT): "too many keyrings for this user: raise sysctl kernel.keys.maxkeys",
    ("fork", E.EAGAIN): "limits.pids, or the user's own process limit, is reached",
    ("clone", E.EAGAIN): "the user's process limit is reached",
    ("init", E.ETIME): "a process in uninterruptible sleep cannot be killed yet",
    ("mount", E.ENOENT): "the mount point cannot be made in a directory of the host: create it",
    ("mount", E.ELOOP): "the mount point is, or lies behind, a symbolic link",
    ("source", E.ELOOP): "a part of the path became a symbolic link",
    ("source", E.EACCES): "not readable for this user",
    (
        "source",
        E.EINVAL,
    ): "another file system is mounted below it, which only root can leave out of an overlay",
    ("launcher", E.EAGAIN): "the sandbox takes no more commands: too many wait already, or it is stopped",
    ("pty", E.ENOSPC): "no more terminals in this sandbox",
    ("cred", E.EINVAL): "as an ordinary user without subordinate ids there is one identity: drop user=",
    ("node", E.ENOSPC): "the template's root is full: fewer or smaller files in /etc",
}
_HINTS_ANYWHERE = {
    E.EMFILE: "too many open files: close some, or raise RLIMIT_NOFILE",
    E.ENFILE: "the system's table of files is full: sysctl fs.file-max",
    E.ENOMEM: "out of memory",
}

# Where an errno means that the host does not grant something: what, and the key of its remedy.
_UNSUPPORTED = {
    ("clone", E.EPERM): ("user namespaces", "user"),
    ("clone", E.ENOSPC): ("one more namespace of each kind", "user"),
    ("netns", E.ENOSPC): ("one more network namespace", "net"),
    ("netns", E.EPERM): ("network namespaces", "net"),
    ("template", E.EPERM): ("mounts in a user namespace", "user"),
    ("loopback", E.EPERM): ("lo in a network namespace", "loopback"),
}

_KINDS: dict[tuple[str, int], type[SetupError]] = {
    ("cwd", E.ENOENT): CwdNotFound,
    ("cwd", E.ENOTDIR): CwdPathInvalid,
    ("cwd", E.EACCES): CwdNotPermitted,
    ("exec", E.ENOENT): ProgramNotFound,
    ("exec", E.ENOTDIR): ProgramPathInvalid,
    ("exec", E.EACCES): ProgramNotExecutable,
}


def render(plan: Plan, request: Request | None, failure: _native.NativeFailure) -> SandboxError:
    """The exception for a failure that C reports."""
    stage, code = failure.stage, failure.errno
    subject = (request and request.subject(failure)) or plan.subject(stage, failure.index)
    unsupported = _UNSUPPORTED.get((stage, code))
    if (stage, code) == ("mount", E.EPERM) and " on /proc " in subject:
        unsupported = ("a new /proc in a user namespace", "proc")
    mapped = re.search(r" rw\)|spec volume", subject) or (
        plan.host.mode == "root" and _OVERLAY.search(subject)
    )
    if (stage, code) == ("source", E.EINVAL) and mapped:
        unsupported = (f"an id-mapped mount of {subject}", "idmapped_mount")
    if stage == "mount" and code in (E.ENODEV, E.EPERM) and _OVERLAY.search(subject):
        unsupported = (f"overlayfs in a user namespace: {subject}", "overlay")
    if unsupported:
        return UnsupportedHost(unsupported[0], host.REMEDIES[unsupported[1]])
    kind = _KINDS.get((stage, code), ExecError if stage == "exec" else SetupError)
    hint = _HINTS.get((stage, code)) or _HINTS_ANYWHERE.get(code, "")
    return kind(stage, code, index=failure.index, subject=subject, hint=hint)
