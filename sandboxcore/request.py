"""One command's bytes: argv, environment, streams and files, as C wants them (``csrc/plan.h``)."""

import errno
import functools
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from sandboxcore import _native
from sandboxcore.errors import ExecError, SpecError
from sandboxcore.plan import PATH, Plan, RLimit
from sandboxcore.spec import Limits, check_env

PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL

StrOrBytes = str | bytes
Program = str | bytes | os.PathLike[str]
File = int | IO[Any] | None
FileContent = StrOrBytes | tuple[StrOrBytes, int]

HOLD = ("HOLD",)  # enum sbx_group_use: of what init keeps open
PATH_MAX = 4096
ARG_MAX = 128 * 1024  # MAX_ARG_STRLEN of execve(2): the longest single argument

# For the fault walk: the number of the call in the child that fails, and its errno. Only a helper
# built with SBX_FAULT looks at it.
FAULT = (0, 0)


_NULL, _PASSED, _STDOUT = (_native.constant(f"STDIO_{name}") for name in ("NULL", "PASSED", "STDOUT"))


def make_streams(
    plan: Plan,
    input: StrOrBytes | None,
    files: tuple[File, File, File],
    encoding: str | None,
    *,
    owner: tuple[int, int] | None = None,
    limits: Limits | None = None,
) -> tuple[_native.Streams, tuple[int, int, int]]:
    """Which pipes there are, and the request's word for each of stdin, stdout and stderr."""
    stdin, stdout, stderr = files
    limit, owner = (limits or plan.spec.limits).output, owner or plan.owner
    if input is None and stdin is None and stdout == PIPE and stderr == PIPE:
        return _captured(limit, owner), (_NULL, _PASSED, _PASSED)
    if input is not None and stdin is not None:
        raise ValueError("stdin and input arguments may not both be used.")
    source = -1
    if stdin == PIPE:
        raise ValueError("stdin=PIPE has nobody to write to it; use input=")
    if stdin is not None and stdin != DEVNULL:
        source = _open_descriptor(stdin)
    capture, relay, words = _outputs(stdout, stderr)
    data = input.encode(encoding or "utf-8") if isinstance(input, str) else input
    streams = _native.Streams(
        input=data,
        stdin=source,
        capture=capture,
        relay=relay,
        limit=limit if isinstance(limit, int) else None,
        owner=owner,
    )
    return streams, (_PASSED if source >= 0 or input is not None else _NULL, *words)


@functools.lru_cache
def _captured(limit: int | str | None, owner: tuple[int, int] | None) -> _native.Streams:
    """What most commands ask for: no input, everything captured."""
    return _native.Streams(limit=limit if isinstance(limit, int) else None, owner=owner)


def _outputs(
    stdout: File, stderr: File
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, int]]:
    """What to capture, what to relay, and the request's words for stdout and stderr."""
    capture, relay, words = [], [], []
    for number, target in ((1, stdout), (2, stderr)):
        if target == STDOUT:
            if number == 1:
                raise ValueError("STDOUT can only be used for stderr")
            words.append(_STDOUT)
            continue
        words.append(_NULL if target == DEVNULL else _PASSED)
        if target == PIPE:
            capture.append(number)
        elif target != DEVNULL:
            relay.append((number, _open_descriptor(number if target is None else target)))
    return tuple(capture), tuple(relay), (words[0], words[1])


def _open_descriptor(file: int | IO[Any]) -> int:
    """A descriptor that is open now: the number of a closed one would soon be one of our own."""
    number = file if isinstance(file, int) else file.fileno()
    os.fstat(number)
    return number


@dataclass(slots=True, kw_only=True)  # not frozen: that costs microseconds per command
class Extras:
    """What only a living sandbox's commands have. ``flags`` are names of ``enum sbx_request_flags``."""

    flags: tuple[str, ...] = ()
    ids: tuple[int, int] | None = None
    rlimits: tuple[RLimit, ...] = ()
    timeout: float | None = None
    size: tuple[int, int] | None = None  # of its terminal: rows, columns
    executable: Program | None = None
    umask: int | None = None
    limits: Limits | None = None  # what rlimits was made from


PLAIN = Extras()


_HEADER = _native.Header("struct sbx_request")
_FIXED = {
    "magic": _native.constant("REQUEST_MAGIC"),
    "layout": _native.constant("LAYOUT"),
}
_VARYING, _VARYING_AT = _HEADER.part("size", "paths1")
_FILE = struct.Struct("=4I")  # struct sbx_file
_RLIMIT = struct.Struct("=2I2Q")  # struct sbx_rlimit


def sandbox_request(
    plan: Plan, *, persistent: bool, groups: Sequence[str] = (), layers: Sequence[int] = ()
) -> bytes:
    """The request for a sandbox that stays, without a command. ``groups``: what the last descriptors are,
    names of ``enum sbx_group_use``; ``layers``: what it begins with, the topmost first, by their numbers on
    the shelf."""
    names = ("SANDBOX", "PERSISTENT") if persistent else ("SANDBOX",)
    values = {
        **_FIXED,
        "size": _HEADER.size + 8 * len(layers) + 4 * len(groups),
        "flags": _flags(names),
        "plan": plan.id,
        "groups0": _HEADER.size + 8 * len(layers),
        "groups1": len(groups),
        "layers0": _HEADER.size,
        "layers1": len(layers),
        "fault_at": FAULT[0],
        "fault_errno": FAULT[1],
    }
    uses = [_native.constant(f"GROUP_{use}") for use in groups]
    return _HEADER.pack(values) + struct.pack(f"={len(layers)}Q{len(uses)}I", *layers, *uses)


@functools.lru_cache(64)
def _flags(names: tuple[str, ...]) -> int:
    return sum(_native.constant(f"REQUEST_{name}") for name in names)


@functools.lru_cache(64)
def _frame(
    plan_id: int, ids: tuple[int, int], fault: tuple[int, int], env: tuple[bytes, ...], cwd: str
) -> tuple[bytes, int]:
    """What many requests have in common: the header but for what varies, the environment, the directory; and
    the length of the longest variable."""
    out, values = bytearray(_HEADER.size), dict(_FIXED)
    values["plan"], (values["uid"], values["gid"]) = plan_id, ids
    values["fault_at"], values["fault_errno"] = fault
    values["env0"], values["env1"] = _append(out, env)
    values["cwd"], _ = _append(out, [os.fsencode(cwd)])
    out[: _HEADER.size] = _HEADER.pack(values)
    return bytes(out), max(map(len, env), default=0)


def _append(out: bytearray, strings: Sequence[bytes]) -> tuple[int, int]:
    """Strings one behind the other; returns their offset and number."""
    if not strings:
        return 0, 0
    offset = len(out)
    out += b"\0".join(strings) + b"\0"
    return offset, len(strings)


def _append_records(out: bytearray, name: str, records: Sequence[bytes]) -> None:
    """Records of one size, aligned, and their span in the header."""
    out += bytes(-len(out) % 8)
    offset = len(out)
    out += b"".join(records)
    _set(out, name, offset, len(records))


def _set(out: bytearray, name: str, *values: int) -> None:
    """Change fields of the header, from ``name`` (or a span of that name) on."""
    first = name if name in _HEADER.names else f"{name}0"
    packer, offset = _part(first, len(values))
    packer.pack_into(out, offset, *values)


@functools.cache
def _part(first: str, count: int) -> tuple[struct.Struct, int]:
    return _HEADER.part(first, _HEADER.names[_HEADER.names.index(first) + count - 1])


class Request:
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
        record: bool = False,
        extras: Extras = PLAIN,
    ) -> None:
        if isinstance(argv, (str, bytes)) or not argv:
            raise SpecError(f"argv: {argv!r} is not a non-empty sequence of arguments")
        self.args = tuple(argv)
        self.limits = extras.limits
        self.program = self.args[0] if extras.executable is None else extras.executable
        self.umask = 0o022 if extras.umask is None else extras.umask
        if not 0 <= self.umask <= 0o777:
            raise SpecError(f"umask: {self.umask!r} is not between 0 and 0o777")
        workdir = plan.spec.workdir
        self.cwd = workdir if cwd is None else os.path.join(workdir, os.fsdecode(cwd))
        self.files = [_file(self.cwd, *item) for item in files.items()] if files else []
        self.pass_fds = _checked(pass_fds) if pass_fds else []
        items, path = plan.env_items, plan.env.get("PATH", PATH)
        if env is not None:
            if isinstance(env, Mapping):  # as with subprocess, names and values may be bytes
                env = {_text(key): _text(value) for key, value in env.items()}
            check_env(env, "env")
            items = tuple(os.fsencode(key) + b"=" + os.fsencode(value) for key, value in env.items())
            path = env.get("PATH", PATH)
        if record:
            extras = replace(extras, flags=("RECORD", *extras.flags))
        self.data = self._encode(plan, items, path, stdio, extras)

    def _encode(
        self,
        plan: Plan,
        env: tuple[bytes, ...],
        path: str,
        stdio: tuple[int, int, int],
        extras: Extras,
    ) -> bytes:
        args = [os.fsencode(arg) for arg in self.args]
        program = os.fsencode(self.program)
        frame, longest = _frame(plan.id, extras.ids or plan.ids, FAULT, env, self.cwd)
        joined = b"\0".join(args)
        if joined.count(0) >= len(args) or b"\0" in program or "\0" in self.cwd:
            raise ValueError("embedded null byte")  # as subprocess says it
        if longest >= ARG_MAX or (len(joined) >= ARG_MAX and max(map(len, args)) >= ARG_MAX):
            hint = f"one of the arguments or variables has {max(longest, *map(len, args))} bytes"
            raise ExecError("exec", errno.E2BIG, subject=os.fsdecode(program), hint=hint)
        out, start = bytearray(frame), len(frame)
        candidates = _candidates(program, path)
        out += joined + b"\0" + b"\0".join(candidates) + b"\0"
        paths = start + len(joined) + 1
        if self.files:
            _append_records(out, "files", [self._file(out, f) for f in self.files])
        if self.pass_fds:
            _append_records(out, "pass", [number.to_bytes(4, "little") for number in self.pass_fds])
        if rlimits := extras.rlimits or (plan.rlimits if plan.restated else ()):
            limits = [_RLIMIT.pack(number, 0, soft, hard) for _, number, soft, hard in rlimits]
            _append_records(out, "rlimits", limits)
        if plan.controllers and (seconds := (extras.limits or plan.spec.limits).cpu_time):
            _set(out, "cpu_us", max(1, int(seconds * 1e6)))
        if extras.timeout is not None:
            _set(out, "timeout_ns", max(1, int(extras.timeout * 1e9)))
        if extras.size is not None:
            _set(out, "rows", *extras.size)
        spans = (start, len(args), paths, len(candidates))
        flags = _flags(extras.flags)
        _VARYING.pack_into(out, _VARYING_AT, len(out), flags, *stdio, self.umask, *spans)
        return bytes(out)

    def within(self, groups: Sequence[str]) -> bytes:
        """:attr:`data` of a command whose sandbox is made in control groups: names of ``enum sbx_group_use``,
        one for each descriptor after those to pass."""
        if not groups:
            return self.data
        out = bytearray(self.data)
        _append_records(
            out, "groups", [_native.constant(f"GROUP_{use}").to_bytes(4, "little") for use in groups]
        )
        _set(out, "size", len(out))
        return bytes(out)

    @staticmethod
    def _file(out: bytearray, file: tuple[str, bytes, int]) -> bytes:
        """One file to write: its name and content go to the end of `out`, the record is returned."""
        name, data, mode = file
        path, _ = _append(out, [os.fsencode(name)])
        content, _ = _append(out, [data])
        return _FILE.pack(path, mode, content, len(data))

    def subject(self, failure: _native.NativeFailure) -> str:
        """What an error of this request is about."""
        if failure.stage == "exec":
            return os.fsdecode(self.program)
        if failure.stage == "cwd":
            return self.cwd
        if failure.stage == "file" and failure.index < len(self.files):
            return self.files[failure.index][0]
        return ""


def _checked(pass_fds: Sequence[int]) -> list[int]:
    """Descriptors to pass, in order: they are open now."""
    numbers = sorted(set(pass_fds))
    if len(numbers) > _native.MAX_PASS or numbers[0] < 3:
        raise SpecError(f"pass_fds: at most {_native.MAX_PASS} descriptors, each above 2")
    for number in numbers:
        os.fstat(number)
    return numbers


def _text(item: Any) -> Any:
    return os.fsdecode(item) if isinstance(item, bytes) else item


def _candidates(program: bytes, path: str) -> list[bytes]:
    """Where execvp(3) would look, in order."""
    if b"/" in program or not program:
        return [program]
    return [directory + program for directory in _directories(path)]


@functools.lru_cache(16)
def _directories(path: str) -> tuple[bytes, ...]:
    return tuple(os.path.join(os.fsencode(directory or "."), b"") for directory in path.split(":"))


def _file(cwd: str, path: str, content: FileContent) -> tuple[str, bytes, int]:
    data, mode = content if isinstance(content, tuple) else (content, 0o644)
    name = os.path.normpath(os.path.join(cwd, path))
    if (
        not path
        or "\0" in name
        or path.endswith("/")
        or ".." in path.split("/")
        or len(os.fsencode(name)) >= PATH_MAX
    ):
        raise SpecError(f"files: {path!r} is not a usable file name")
    if not 0 <= mode <= 0o777:
        raise SpecError(f"files: {path!r}: mode {mode!r} is not a file mode")
    return name, data.encode() if isinstance(data, str) else bytes(data), mode
