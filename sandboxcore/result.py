"""What a command did: :class:`ExecResult`, and how it is made from what C reports."""

import enum
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandboxcore import _native, audit
from sandboxcore.capabilities import SandboxCapabilities, parse_applied
from sandboxcore.errors import CommandFailed, SandboxTimeout
from sandboxcore.plan import Plan
from sandboxcore.spec import Limits

StrOrBytes = str | bytes
Program = str | bytes | os.PathLike[str]


class Cause(enum.StrEnum):
    """Why a command ended, from kernel evidence."""

    EXITED = "exited"  # by itself, with any status
    SIGNALED = "signaled"  # by a signal of its own making
    TIMEOUT = "timeout"  # the wall clock; the whole tree was killed
    CPU_TIME = "cpu_time"  # limits.cpu_time, of all its processes; or of one: RLIMIT_CPU
    OOM = "oom"  # its cgroup ran out of memory, and a process of it was killed; then all of it
    PIDS = "pids"  # its cgroup ran out of processes
    SECCOMP = "seccomp"  # SIGSYS: a system call that the filter answers with death
    OUTPUT = "output"  # more output than allowed
    DISK = "disk"  # it failed, and what it may write to was full; or a file too large: RLIMIT_FSIZE, SIGXFSZ
    KILLED = "killed"  # by somebody outside, or with its sandbox
    SETUP = "setup"  # never ran


@dataclass(slots=True)  # not frozen, as ExecResult: that costs microseconds per command
class Usage:
    """What a command and everything below it used.

    cpu_user, cpu_system: seconds. max_rss: the largest process's peak, bytes. major_faults, blocks_in,
    blocks_out: page faults, and block input and output in 512-byte units (getrusage(2), RUSAGE_CHILDREN).

    The others are counted by the command's own control group, where it has one; else they are None:
    memory_peak (bytes, of all processes together, with page cache and tmpfs), pids_peak (processes at once),
    pids_refused (forks), oom_kills (processes), io_read and io_written (bytes, on disks).
    """

    cpu_user: float
    cpu_system: float
    max_rss: int
    major_faults: int
    blocks_in: int
    blocks_out: int
    memory_peak: int | None = None
    pids_peak: int | None = None
    pids_refused: int | None = None
    oom_kills: int | None = None
    io_read: int | None = None
    io_written: int | None = None


@dataclass(slots=True)
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
    detail: where a limit ended it, which one, and the numbers; for ``seccomp``, the system call where the
        kernel's log may be read (as root).

    Cause ``disk`` is told from the end: the command failed, and just then no byte or no inode was left in
    what is bounded by ``limits.disk`` and ``limits.inodes``, or in a tmpfs with a size; or less than a large
    write takes at once (2 MiB, or an eighth of it) in a volume with a quota. One that removes what it wrote
    before it fails, or asked for more at once than there was, has cause ``exited``; of several commands each
    that fails meanwhile has cause ``disk``.
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
    detail: str = ""

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


class Decoder:
    def __init__(self, text: bool, encoding: str | None, errors: str | None) -> None:
        self.wanted = text or encoding is not None or errors is not None
        self.encoding, self.errors = encoding or "utf-8", errors

    def __call__(self, data: bytes, *, cut: bool) -> StrOrBytes:
        text = data.decode(self.encoding, self.errors or ("replace" if cut else "strict"))
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _cause(limits: Limits, done: _native.NativeResult) -> Cause:
    """From what the kernel has counted or we have done, never from a status alone."""
    counts = done.counts or {}
    ended = os.WTERMSIG(done.status) if os.WIFSIGNALED(done.status) else 0
    killed = ended == signal.SIGKILL
    by_clock = limits.cpu_time is not None and (killed or ended == signal.SIGXCPU)
    # Or it sent that to itself. RLIMIT_CPU goes by clock ticks: on a busy machine it is early by far.
    enough = by_clock and sum(_cpu(done)) >= (limits.cpu_time or 0) * 0.5e6
    causes = {  # the first that holds
        Cause.TIMEOUT: done.timed_out,
        Cause.OUTPUT: done.flooded,
        Cause.OOM: done.out_of_memory or counts.get("oom_kills"),  # of whichever of its processes
        Cause.CPU_TIME: done.out_of_time,
        Cause.KILLED: done.lost or (killed and done.killed),
        Cause.PIDS: counts.get("pids_refused"),
        Cause.SECCOMP: ended == signal.SIGSYS,
        Cause.DISK: (done.room and not enough) or (ended == signal.SIGXFSZ and limits.file_size is not None),
        Cause.EXITED: not ended,
    }
    last = Cause.CPU_TIME if enough else Cause.SIGNALED
    return next((cause for cause, holds in causes.items() if holds), last)


def _detail(cause: Cause, plan: Plan, limits: Limits, done: _native.NativeResult) -> str:
    """Which limit it was, and what was used of it."""
    if cause is Cause.SECCOMP:
        name = audit.forbidden_call(done.began, done.ended, plan.uids)
        return f"system call {name}" if name else "the system call's name is not in a log that we may read"
    counts = done.counts or {}
    used = sum(_cpu(done)) / 1e6
    texts = {
        Cause.OOM: f"limits.memory: {_size(limits.memory)}, peak {_size(counts.get('memory'))}",
        Cause.PIDS: f"limits.pids: {limits.pids}, {counts.get('pids_refused', 0)} forks refused",
        Cause.CPU_TIME: f"limits.cpu_time: {limits.cpu_time} s, used {used:.3f} s",
        Cause.OUTPUT: f"limits.output: {_size(limits.output)}, written {_size(max(done.totals))}",
        Cause.DISK: _room(plan, done.room) if done.room else f"limits.file_size: {_size(limits.file_size)}",
    }
    return texts.get(cause, "")


def _room(plan: Plan, room: _native.Room) -> str:
    """What was full, and how large it is."""
    if room.mount is None:
        name = "limits.disk" if room.what == "bytes" else "limits.inodes"
    else:
        name = f"{room.what} of {plan.subject('mount', room.mount) or 'a mount'}"
    used, size = (_size(n) if room.what == "bytes" else str(n) for n in (room.used, room.size))
    return f"{name}: {used} used of {size}"


def _size(value: int | str | None) -> str:
    """Bytes, for people."""
    if not isinstance(value, int):
        return "none" if value is None else value
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value} B"


def _cpu(done: _native.NativeResult) -> tuple[int, int]:
    """CPU time of user and system, us: the group's, for nobody gets that of children who were not waited for
    (wait(2)), and an init that was killed tells nothing."""
    counts = done.counts or {}
    return counts.get("cpu_user", done.usage[0]), counts.get("cpu_system", done.usage[1])


def _usage(done: _native.NativeResult) -> Usage:
    used, counts = done.usage, done.counts
    user, system = _cpu(done)
    usage = Usage(user / 1e6, system / 1e6, used[2] * 1024, used[3], used[4], used[5])
    if counts:
        usage.memory_peak, usage.oom_kills = counts.get("memory"), counts.get("oom_kills")
        usage.pids_peak, usage.pids_refused = counts.get("pids"), counts.get("pids_refused")
        usage.io_read, usage.io_written = counts.get("io_read"), counts.get("io_written")
    return usage


class Timings(Mapping[str, float]):
    """Seconds of each phase, from the moments between them; worked out when somebody looks."""

    __slots__ = ("_done",)

    def __init__(self, done: _native.NativeResult) -> None:
        self._done = done

    def _all(self) -> dict[str, float]:
        done = self._done
        clock = () if done.lost else done.clock  # in the order of enum sbx_clock
        marks = (done.began, *clock, done.ended)
        names = ("total",) if done.lost else _PHASES
        return {name: (marks[i + 1] - marks[i]) / 1e9 for i, name in enumerate(names)}

    def __getitem__(self, name: str) -> float:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return 1 if self._done.lost else len(_PHASES)

    def __repr__(self) -> str:
        return repr(self._all())


_EXITED = Cause.EXITED
_PHASES = ("queue", "clone", "setup", "drop", "run", "collect")


def make_result(
    plan: Plan,
    args: tuple[Program, ...],
    streams: _native.Streams,
    done: _native.NativeResult,
    decode: Decoder,
    *,
    limits: Limits | None = None,
) -> ExecResult:
    """``limits``: those of the command, where they are not the spec's."""
    status, totals = done.status, done.totals
    cause = _EXITED
    if status or done.lost:
        cause = _cause(plan.spec.limits if limits is None else limits, done)
    truncated = False
    output: list[StrOrBytes | None] = [None, None]
    for number in streams.capture:
        data = done.output[number - 1]
        cut = streams.limit is not None and totals[number - 1] > streams.limit
        truncated |= cut
        output[number - 1] = decode(data, cut=cut or done.timed_out) if decode.wanted else data
    clock = done.clock
    return ExecResult(
        args,
        os.waitstatus_to_exitcode(status),
        output[0],
        output[1],
        (done.ended - done.began if done.lost else clock[-1] - clock[-2]) / 1e9,
        cause,
        totals[0],
        totals[1],
        truncated,
        _usage(done),
        Timings(done),
        parse_applied(done.applied, plan.omitted, done.group_limits) if done.applied else None,
        "" if cause is _EXITED else _detail(cause, plan, limits or plan.spec.limits, done),
    )
