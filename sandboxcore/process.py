"""Running one command in a fresh sandbox: :func:`run` and what it returns."""

import enum
import itertools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from sandboxcore import _native, host, spawner
from sandboxcore.capabilities import SandboxCapabilities, parse_applied
from sandboxcore.errors import (
    CommandFailed,
    ExecError,
    ProgramNotExecutable,
    ProgramNotFound,
    SandboxError,
    SandboxTimeout,
    SetupError,
    SpecError,
    UnsupportedHost,
)
from sandboxcore.plan import PATH, Plan, compile_plan
from sandboxcore.spec import SandboxSpec, check_env

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL

StrOrBytes = str | bytes
Program = str | bytes | os.PathLike[str]
File = int | IO[Any] | None
FileContent = StrOrBytes | tuple[StrOrBytes, int]

_PATH_MAX = 4096
_ARG_MAX = 128 * 1024  # MAX_ARG_STRLEN of execve(2): the longest single argument


class Cause(enum.StrEnum):
    """Why a command ended, from kernel evidence."""

    EXITED = "exited"  # by itself, with any status
    SIGNALED = "signaled"  # by a signal of its own making
    TIMEOUT = "timeout"  # the wall clock; the whole tree was killed
    CPU_TIME = "cpu_time"  # RLIMIT_CPU
    OOM = "oom"  # its cgroup ran out of memory
    PIDS = "pids"  # its cgroup ran out of processes
    SECCOMP = "seccomp"  # SIGSYS: a system call that the filter answers with death
    OUTPUT = "output"  # more output than allowed
    DISK = "disk"  # RLIMIT_FSIZE: SIGXFSZ
    KILLED = "killed"  # the sandbox was killed from outside
    SETUP = "setup"  # never ran


@dataclass(frozen=True, slots=True)
class Usage:
    """What everything in the sandbox used together: CPU seconds, the largest process's peak in bytes,
    major page faults, block input and output in 512-byte units (getrusage(2), RUSAGE_CHILDREN)."""

    cpu_user: float
    cpu_system: float
    max_rss: int
    major_faults: int
    blocks_in: int
    blocks_out: int


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command did. Nothing of it is left when this exists.

    args: the command line as given.
    returncode: exit status, or -N when signal N ended it (also -9 after a timeout).
    stdout, stderr: bytes, or text with ``text=True``; None when not captured.
    duration: seconds from exec to exit.
    cause: a :class:`Cause`.
    truncated: whether captured output exceeded ``limits.output``; then each stream has the first and
        the last half of the limit, and ``stdout_total`` and ``stderr_total`` count what was written.
    timings: seconds of each phase: queue, clone, setup, drop, run, collect.
    capabilities: with ``record=True``, what was applied, read back from the kernel.
    """

    args: tuple[Program, ...]
    returncode: int
    stdout: Any
    stderr: Any
    duration: float
    cause: Cause
    stdout_total: int
    stderr_total: int
    truncated: bool
    usage: Usage
    timings: Mapping[str, float] = field(repr=False)
    capabilities: SandboxCapabilities | None = field(repr=False, default=None)

    @property
    def exit_code(self) -> int:
        """The same as ``returncode``."""
        return self.returncode

    @property
    def signal(self) -> signal.Signals | int | None:
        """The signal that ended it, if one did."""
        if self.returncode >= 0:
            return None
        try:
            return signal.Signals(-self.returncode)
        except ValueError:  # a real-time signal has no name
            return -self.returncode

    @property
    def timed_out(self) -> bool:
        """Whether the wall clock ended it."""
        return self.cause is Cause.TIMEOUT

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.returncode == 0

    def check_returncode(self) -> None:
        """Raise :class:`SandboxTimeout` or :class:`CommandFailed` unless it exited with 0."""
        if self.timed_out:
            raise SandboxTimeout(self)
        if not self.ok:
            raise CommandFailed(self)


_DEFAULT_SPEC = SandboxSpec()


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
    input: fed to stdin, then end-of-file. Text is encoded.
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
    streams, stdio = _streams(plan, input, stdin, stdout, stderr)
    request = _Request(plan, argv, cwd=cwd, env=env, files=files, pass_fds=pass_fds, stdio=stdio, record=record)
    limits = plan.spec.limits
    deadlines = [seconds for seconds in (timeout, limits.wall_time) if seconds is not None]
    done = _execute(plan, request, streams, max(0.0, min(deadlines)) if deadlines else None)
    result = _result(plan, request.args, streams, done, _Decoder(text, encoding, errors))
    if check:
        result.check_returncode()
    return result


# --- the request ------------------------------------------------------------------------------------


def _streams(
    plan: Plan, input: StrOrBytes | None, stdin: File, stdout: File, stderr: File
) -> tuple[_native.Streams, tuple[int, int, int]]:
    """Which pipes there are, and the request's word for each of the three."""
    null, passed, merged = (_native.constant(f"STDIO_{name}") for name in ("NULL", "PASSED", "STDOUT"))
    if input is not None and stdin is not None:
        raise ValueError("stdin and input arguments may not both be used.")
    source = -1
    if stdin == PIPE:
        raise ValueError("stdin=PIPE has nobody to write to it; use input=")
    if stdin is not None and stdin != DEVNULL:
        source = stdin if isinstance(stdin, int) else stdin.fileno()
    capture, relay, stdio = [], [], [passed if source >= 0 or input is not None else null]
    for number, target in ((1, stdout), (2, stderr)):
        if target == STDOUT:
            if number == 1:
                raise ValueError("STDOUT can only be used for stderr")
            stdio.append(merged)
            continue
        stdio.append(null if target == DEVNULL else passed)
        if target == PIPE:
            capture.append(number)
        elif target != DEVNULL:
            relay.append((number, _descriptor(number, target)))
    data = input.encode() if isinstance(input, str) else input
    limit = plan.spec.limits.output
    streams = _native.Streams(
        input=data,
        stdin=source,
        capture=tuple(capture),
        relay=tuple(relay),
        limit=limit if isinstance(limit, int) else None,
    )
    return streams, (stdio[0], stdio[1], stdio[2])


def _descriptor(number: int, target: File) -> int:
    if target is None:
        return number
    return target if isinstance(target, int) else target.fileno()


class _Request:
    """One command's bytes, and the names that an error may need."""

    def __init__(
        self,
        plan: Plan,
        argv: Sequence[Program],
        *,
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str] | None,
        files: Mapping[str, FileContent] | None,
        pass_fds: Sequence[int],
        stdio: tuple[int, int, int],
        record: bool,
    ) -> None:
        if isinstance(argv, str | bytes) or not argv:
            raise SpecError(f"argv: {argv!r} is not a non-empty sequence of arguments")
        self.args = tuple(argv)
        self.cwd = plan.spec.workdir if cwd is None else os.path.join(plan.spec.workdir, os.fspath(cwd))
        self.files = [_file(self.cwd, path, content) for path, content in (files or {}).items()]
        self.pass_fds = sorted(set(pass_fds))
        if len(self.pass_fds) > _native.MAX_PASS or (self.pass_fds and self.pass_fds[0] < 3):
            raise SpecError(f"pass_fds: at most {_native.MAX_PASS} descriptors, each above 2")
        items = plan.env_items
        if env is not None:
            check_env(env, "env")
            items = tuple(os.fsencode(f"{key}={value}") for key, value in env.items())
        path = (plan.env if env is None else env).get("PATH", PATH)
        self.data = self._encode(plan, items, path, stdio, record=record)

    def _encode(
        self, plan: Plan, env: tuple[bytes, ...], path: str, stdio: tuple[int, int, int], *, record: bool
    ) -> bytes:
        arena = _native.Arena(
            "struct sbx_request",
            {"files": ("struct sbx_file", len(self.files)), "pass": ("int32_t", len(self.pass_fds))},
        )
        head = arena.head
        args = [os.fsencode(arg) for arg in self.args]
        if any(b"\0" in arg for arg in args):
            raise ValueError("embedded null byte")  # as subprocess says it
        if too_long := next((arg for arg in (*args, *env) if len(arg) >= _ARG_MAX), None):
            raise ProgramNotExecutable("exec", 7, subject=f"an argument of {len(too_long)} bytes")
        arena.strings("argv", args)
        arena.strings("env", env)
        arena.strings("paths", _candidates(args[0], path))
        head.plan, head.cwd, head.umask = plan.id, arena.data(os.fsencode(self.cwd)), 0o022
        head.flags = _native.constant("REQUEST_RECORD") if record else 0
        head.stdio = stdio
        head.fault_at = int(os.environ.get("SANDBOXCORE_FAULT", "0"))
        head.fault_errno = int(os.environ.get("SANDBOXCORE_FAULT_ERRNO", "117"))
        for index, (name, data, mode) in enumerate(self.files):
            file = arena.record("files", index)
            file.path, file.mode = arena.data(os.fsencode(name)), mode
            file.data, file.size = arena.data(data), len(data)
        for index, number in enumerate(self.pass_fds):
            arena.record("pass", index)[0] = number
        return arena.finish(_native.constant("REQUEST_MAGIC"))

    def subject(self, failure: _native.NativeFailure) -> str:
        """What an error of this request is about."""
        if failure.stage == "exec":
            return os.fsdecode(self.args[0])
        if failure.stage == "cwd":
            return self.cwd
        if failure.stage == "file" and failure.index < len(self.files):
            return self.files[failure.index][0]
        return ""


def _candidates(program: bytes, path: str) -> list[bytes]:
    """Where execvp(3) would look, in order."""
    if b"/" in program or not program:
        return [program]
    return [os.path.join(os.fsencode(directory or "."), program) for directory in path.split(":")]


def _file(cwd: str, path: str, content: FileContent) -> tuple[str, bytes, int]:
    data, mode = content if isinstance(content, tuple) else (content, 0o644)
    name = os.path.normpath(os.path.join(cwd, path))
    if "\0" in name or path.endswith("/") or ".." in path.split("/") or len(os.fsencode(name)) >= _PATH_MAX:
        raise SpecError(f"files: {path!r} is not a usable file name")
    if not 0 <= mode <= 0o777:
        raise SpecError(f"files: {path!r}: mode {mode!r} is not a file mode")
    return name, data.encode() if isinstance(data, str) else data, mode


# --- execution and errors ----------------------------------------------------------------------------


def _execute(plan: Plan, request: _Request, streams: _native.Streams, timeout: float | None) -> _native.NativeResult:
    """Run it; a spawner that has died or has forgotten the plan is helped once, before anything ran."""
    for attempt in (1, 2, 3):
        try:
            connection = spawner.get_spawner(plan)
        except _native.NativeFailure as failure:
            raise _render(plan, request, failure) from None
        try:
            connection.teach(plan)
            return _native.run(connection.fd, request.data, streams, timeout, request.pass_fds)
        except _native.NativeFailure as failure:
            if failure.stage == "plan" and failure.errno == 116 and attempt < 3:  # ESTALE: evicted
                connection.known.discard(plan.id)
            elif failure.stage == "spawner" and failure.index in (11, 14) and attempt < 3:  # not even sent
                spawner.drop_spawner(connection)
            else:
                if failure.stage == "spawner":
                    spawner.drop_spawner(connection)
                raise _render(plan, request, failure) from None
    raise AssertionError("unreachable")


_HINTS = {
    ("host", 24): "too many open files: raise RLIMIT_NOFILE or close some",
    ("request", 24): "the spawner has too many open files: raise RLIMIT_NOFILE before the first run",
    ("spawner", 2): "the package's _spawner is missing: reinstall sandboxcore",
    ("spawner", 13): "the package's _spawner is not executable: reinstall sandboxcore",
    ("spawner", 32): "the spawner was killed",
    ("template", 18): "this process lives in a chroot; sandboxes need the mount namespace's own root",
    ("file", 28): "limits.disk or limits.inodes is too small for files=",
    ("file", 30): "that path is read-only inside; files= can only write where the payload can",
    ("session", 122): "too many keyrings for this user: raise sysctl kernel.keys.maxkeys",
    ("fork", 11): "limits.pids, or the user's own process limit, is reached",
    ("clone", 11): "the user's process limit is reached",
    ("init", 62): "a process in uninterruptible sleep cannot be killed yet",
    ("mount", 2): "the mount point does not exist and cannot be made in a directory of the host: create it",
    ("mount", 40): "the mount point is, or lies behind, a symbolic link",
    ("source", 40): "a part of the path became a symbolic link",
    ("source", 13): "not readable for this user",
    ("node", 28): "the template's root is full: fewer or smaller files in /etc",
}


def _render(plan: Plan, request: _Request, failure: _native.NativeFailure) -> SandboxError:
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


# --- the result --------------------------------------------------------------------------------------


class _Decoder:
    def __init__(self, text: bool, encoding: str | None, errors: str | None) -> None:
        self.wanted = text or encoding is not None or errors is not None
        self.encoding, self.errors = encoding or "utf-8", errors

    def __call__(self, data: bytes, *, cut: bool) -> StrOrBytes:
        if not self.wanted:
            return data
        text = data.decode(self.encoding, self.errors or ("replace" if cut else "strict"))
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


_NUMBERS = (_native.constant("CLOCK_RECEIVED"), _native.constant("CLOCK_STARTED"), _native.constant("CLOCK_FORK"),
            _native.constant("CLOCK_EXEC"), _native.constant("CLOCK_EXITED"))  # fmt: skip


def _cause(plan: Plan, done: _native.NativeResult) -> Cause:
    if done.timed_out:
        return Cause.TIMEOUT
    if done.lost:
        return Cause.KILLED
    if not os.WIFSIGNALED(done.status):
        return Cause.EXITED
    ended, cpu_limit = os.WTERMSIG(done.status), plan.spec.limits.cpu_time
    if ended == signal.SIGSYS:
        return Cause.SECCOMP
    if ended == signal.SIGXFSZ and plan.spec.limits.file_size is not None:
        return Cause.DISK
    if cpu_limit is not None and ended in (signal.SIGXCPU, signal.SIGKILL):
        used = (done.utime_us + done.stime_us) / 1e6
        if ended == signal.SIGXCPU or used >= cpu_limit:
            return Cause.CPU_TIME
    return Cause.SIGNALED


def _timings(done: _native.NativeResult) -> dict[str, float]:
    if done.lost:
        return {"total": (done.ended - done.began) / 1e9}
    received, started, fork, execed, exited = (done.clock[number] for number in _NUMBERS)
    marks = (done.began, received, started, fork, execed, exited, done.ended)
    names = ("queue", "clone", "setup", "drop", "run", "collect")
    spans = itertools.pairwise(marks)
    return {name: (after - before) / 1e9 for name, (before, after) in zip(names, spans, strict=True)}


def _result(
    plan: Plan, args: tuple[Program, ...], streams: _native.Streams, done: _native.NativeResult, decode: _Decoder
) -> ExecResult:
    cause = _cause(plan, done)
    cut = [streams.limit is not None and total > streams.limit for total in done.totals]
    output = [
        decode(done.output[i], cut=cut[i] or cause is Cause.TIMEOUT) if i + 1 in streams.capture else None
        for i in (0, 1)
    ]
    timings = _timings(done)
    return ExecResult(
        args=args,
        returncode=os.waitstatus_to_exitcode(done.status),
        stdout=output[0],
        stderr=output[1],
        duration=timings.get("run", (done.ended - done.began) / 1e9),
        cause=cause,
        stdout_total=done.totals[0],
        stderr_total=done.totals[1],
        truncated=any(cut[number - 1] for number in streams.capture),
        usage=Usage(
            done.utime_us / 1e6, done.stime_us / 1e6, done.maxrss_kib * 1024, done.majflt, done.inblock, done.oublock
        ),
        timings=timings,
        capabilities=parse_applied(done.applied, plan.omitted) if done.applied else None,
    )
