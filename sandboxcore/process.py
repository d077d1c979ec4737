"""Running one command in a fresh sandbox: :func:`run`."""

import os
from collections.abc import Mapping, Sequence

from sandboxcore import _native, host, spawner
from sandboxcore.errors import (
    ExecError,
    ProgramNotExecutable,
    ProgramNotFound,
    SandboxError,
    SetupError,
    UnsupportedHost,
)
from sandboxcore.plan import Plan, compile_plan
from sandboxcore.request import PIPE, File, FileContent, Program, Request, StrOrBytes, make_streams
from sandboxcore.result import Decoder, ExecResult, make_result
from sandboxcore.spec import SandboxSpec

_DEFAULT_SPEC = SandboxSpec()
_ATTEMPTS = 8  # a template may be evicted between its making and its use, by 64 others


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
    streams, stdio = make_streams(plan, input, stdin, stdout, stderr, encoding)
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


def _execute(
    plan: Plan, request: Request, streams: _native.Streams, timeout: float | None
) -> _native.NativeResult:
    """Run it; a spawner that has died or has forgotten the plan is helped once, before anything ran."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            connection = spawner.get_spawner(plan)
        except _native.NativeFailure as failure:
            raise _render(plan, request, failure) from None
        try:
            connection.teach(plan)
            return _native.run(connection.fd, request.data, streams, timeout, request.pass_fds)
        except _native.NativeFailure as failure:
            if failure.stage == "plan" and failure.errno == 116 and attempt < _ATTEMPTS:  # ESTALE: evicted
                connection.known.discard(plan.id)
            elif (
                failure.stage == "spawner" and failure.index in (11, 14) and attempt < _ATTEMPTS
            ):  # not even sent
                spawner.drop_spawner(connection)
            else:
                if failure.stage == "spawner":
                    spawner.drop_spawner(connection)
                raise _render(plan, request, failure) from None
    raise AssertionError("unreachable")


_HINTS = {
    ("host", 24): "too many open files: raise RLIMIT_NOFILE or close some",
    (
        "request",
        24,
    ): "the spawner has too many open files: raise RLIMIT_NOFILE before the first run",
    ("spawner", 2): "the package's _spawner is missing: reinstall sandboxcore",
    ("spawner", 13): "the package's _spawner is not executable: reinstall sandboxcore",
    ("spawner", 32): "the spawner was killed",
    (
        "template",
        18,
    ): "this process lives in a chroot; sandboxes need the mount namespace's own root",
    ("file", 28): "limits.disk or limits.inodes is too small for files=",
    ("file", 30): "that path is read-only inside; files= can only write where the payload can",
    ("session", 122): "too many keyrings for this user: raise sysctl kernel.keys.maxkeys",
    ("fork", 11): "limits.pids, or the user's own process limit, is reached",
    ("clone", 11): "the user's process limit is reached",
    ("init", 62): "a process in uninterruptible sleep cannot be killed yet",
    (
        "mount",
        2,
    ): "the mount point does not exist and cannot be made in a directory of the host: create it",
    ("mount", 40): "the mount point is, or lies behind, a symbolic link",
    ("source", 40): "a part of the path became a symbolic link",
    ("source", 13): "not readable for this user",
    ("node", 28): "the template's root is full: fewer or smaller files in /etc",
}


def _render(plan: Plan, request: Request, failure: _native.NativeFailure) -> SandboxError:
    """The exception for a failure that C reports."""
    stage, errno = failure.stage, failure.errno
    unsupported = {
        ("clone", 1): ("user namespaces", "user"),
        ("clone", 28): ("one more namespace of each kind", "user"),
        ("netns", 28): ("one more network namespace", "net"),
        ("netns", 1): ("network namespaces", "net"),
        ("template", 1): ("mounts in a user namespace", "user"),
        ("loopback", 1): ("lo in a network namespace", "loopback"),
    }.get((stage, errno))
    subject = request.subject(failure) or plan.subject(stage, failure.index)
    if stage == "mount" and errno == 1 and " on /proc " in subject:
        unsupported = ("a new /proc in a user namespace", "proc")
    if unsupported:
        return UnsupportedHost(unsupported[0], host.REMEDIES[unsupported[1]])
    if stage == "source" and errno == 22 and "spec rw" in subject:
        return UnsupportedHost(f"an id-mapped mount of {subject}", host.REMEDIES["idmapped_mount"])
    kind: type[SetupError] = SetupError
    if stage == "exec":
        kind = {2: ProgramNotFound, 20: ProgramNotFound, 13: ProgramNotExecutable}.get(errno, ExecError)
    return kind(stage, errno, index=failure.index, subject=subject, hint=_HINTS.get((stage, errno), ""))
