"""The only importer of the compiled module: arenas, the spawner's socket, one call per run.

Failures leave here bare, as :class:`NativeFailure` (stage, index, errno); :mod:`sandboxcore.process`
renders them with what it knows about the plan.
"""

import errno
import functools
import mmap
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast

from sandboxcore._core import ffi, lib  # the compiled module has no types of its own

STAGES: tuple[str, ...] = tuple(
    cast(bytes, ffi.string(lib.sbx_stage_name(number))).decode() for number in range(lib.SBX_STAGE_COUNT)
)
MAX_PASS = cast(int, lib.SBX_MAX_PASS)
MAX_LATE = cast(int, lib.SBX_MAX_LATE)
IN_CLOSE_WRITE = 8  # linux/inotify.h


@functools.cache
def constant(name: str) -> int:
    """The value of an enumerator of ``plan.h``, without its ``SBX_`` prefix."""
    return cast(int, getattr(lib, f"SBX_{name}"))


class NativeFailure(Exception):
    """What C reports: a stage's name, the index within its list, the errno."""

    def __init__(self, error: Any) -> None:
        self.stage = STAGES[error.stage] if 0 <= error.stage < len(STAGES) else "unknown"
        self.index: int = error.index
        self.errno: int = error.err
        self.syscall: int = error.syscall
        super().__init__(self.stage, self.index, self.errno)

    @classmethod
    def of(cls, stage: str, index: int, errno: int) -> Self:
        """One that Python found."""
        error = ffi.new("struct sbx_error *")
        error.stage, error.index, error.err = STAGES.index(stage), index, errno
        return cls(error)


@functools.cache
def _type(name: str) -> tuple[int, int, Any]:
    """A C type's size, its alignment, and the type of a pointer to it."""
    return ffi.sizeof(name), ffi.alignof(name), ffi.typeof(f"{name} *")


class Header:
    """Packs a struct of ``plan.h`` in one call: its layout comes from cffi, its values by name."""

    def __init__(self, kind: str) -> None:
        self.names: list[str] = []
        formats = "="
        for name, field in ffi.typeof(kind).fields:
            flat, count = _flattened(field.type)
            if field.offset != struct.calcsize(formats):
                raise AssertionError(f"{kind}.{name}: padding before it")
            self.names += [name] if count == 1 else [f"{name}{number}" for number in range(count)]
            formats += flat
        self._struct = struct.Struct(formats)
        self.size = self._struct.size
        if self.size != ffi.sizeof(kind):
            raise AssertionError(f"{kind}: padding at its end")

    def pack(self, values: Mapping[str, int]) -> bytes:
        """The struct with the fields that are named; the others are 0."""
        return self._struct.pack(*[values.get(name, 0) for name in self.names])

    def part(self, first: str, last: str) -> tuple[struct.Struct, int]:
        """For a few fields that are neighbours: what packs them, and the offset of the first."""
        start, end = self.names.index(first), self.names.index(last) + 1
        formats = self._struct.format[1:]
        return struct.Struct("=" + formats[start:end]), struct.calcsize("=" + formats[:start])

    def unpack(self, data: Any) -> tuple[int, ...]:
        """All values, in the order of ``names``."""
        return self._struct.unpack(data)


def _flattened(kind: Any) -> tuple[str, int]:
    """A C type as format characters of :mod:`struct`, and how many values it has."""
    if kind.kind == "struct":
        parts = [_flattened(field.type) for _, field in kind.fields]
        return "".join(part for part, _ in parts), sum(count for _, count in parts)
    if kind.kind == "array":
        part, count = _flattened(kind.item)
        return part * kind.length, count * kind.length
    if kind.kind == "pointer":
        return "Q", 1
    return {"uint32_t": "I", "int32_t": "i", "uint64_t": "Q", "size_t": "Q", "int64_t": "q"}[kind.cname], 1


class Arena:
    """Writes one plan or request: a header, arrays of records, strings; linked by offsets."""

    def __init__(self, header: str, arrays: Mapping[str, tuple[str, int]]) -> None:
        """``arrays`` maps a span of the header to its record type and number of records."""
        size, _, pointer = _type(header)
        self._layout: dict[str, tuple[Any, int, int]] = {}
        for name, (kind, count) in arrays.items():
            if count:
                each, align, of_kind = _type(kind)
                size = (size + align - 1) // align * align
                self._layout[name] = (of_kind, size, each)
                size += each * count
        self._fixed = bytearray(size)
        self._strings = bytearray()
        self._known: dict[bytes, int] = {}
        # One buffer and plain pointers into it: views of views crash CPython's collector in a cycle
        self._base = ffi.from_buffer(self._fixed, require_writable=True)
        self.head = ffi.cast(pointer, self._base)
        for name, (_, offset, _each) in self._layout.items():
            span = getattr(self.head, name)
            span.off, span.count = offset, arrays[name][1]

    def record(self, name: str, index: int) -> Any:
        """The record ``index`` of the array ``name``, to be filled."""
        pointer, offset, each = self._layout[name]
        return ffi.cast(pointer, self._base + offset + each * index)

    def raw(self, name: str, data: bytes) -> None:
        """Fill the array ``name`` with bytes as they are."""
        if data:
            _, offset, _each = self._layout[name]
            self._fixed[offset : offset + len(data)] = data

    def data(self, data: bytes) -> int:
        """Store bytes with a NUL behind them; returns their offset. Equal ones are stored once."""
        known = self._known.get(data)
        if known is None:
            known = self._known[data] = len(self._fixed) + len(self._strings)
            self._strings += data + b"\0"
        return known

    def strings(self, name: str, items: Sequence[bytes]) -> None:
        """Point the header's span ``name`` at strings stored one behind the other."""
        span = getattr(self.head, name)
        if items:
            span.off = len(self._fixed) + len(self._strings)
            span.count = len(items)
            self._strings += b"\0".join(items) + b"\0"

    def finish(self, magic: int) -> bytes:
        """Set magic, layout and size; returns the whole arena."""
        self.head.magic = magic
        self.head.layout = lib.SBX_LAYOUT
        self.head.size = len(self._fixed) + len(self._strings)
        return bytes(self._fixed + self._strings)


def landlock_abi() -> int:
    """The kernel's Landlock ABI; 0 where there is none."""
    return cast(int, lib.sbx_landlock_abi())


def syncfs(fd: int) -> None:
    """Have a file system on disk, syncfs(2). Raises OSError."""
    if lib.syncfs(fd) < 0:
        raise OSError(ffi.errno, os.strerror(ffi.errno))


def watch_closes(path: str) -> int:
    """A descriptor, non-blocking, that is readable when a file was closed that was open for writing,
    inotify(7). Raises OSError."""
    fd = lib.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0 or lib.inotify_add_watch(fd, os.fsencode(path), IN_CLOSE_WRITE) < 0:
        code = ffi.errno
        if fd >= 0:
            os.close(fd)
        raise OSError(code, os.strerror(code), path)
    return cast(int, fd)


def check_plan(plan: bytes) -> None:
    """Raise :class:`NativeFailure` unless C would accept this plan."""
    error = ffi.new("struct sbx_error *")
    view = ffi.from_buffer(plan)
    if lib.sbx_plan_check(view, len(plan), error) < 0:
        raise NativeFailure(error)


def spawner_start(path: str, diagnostics: int) -> int:
    """Start the helper at ``path``; returns the connection's descriptor."""
    error = ffi.new("struct sbx_error *")
    fd = lib.sbx_spawner_start(os.fsencode(path), diagnostics, error)
    if fd < 0:
        raise NativeFailure(error)
    return cast(int, fd)


def spawner_hello(spawner: int, kind: str, flags: int) -> int:
    """Introduce ourselves (``kind`` HELLO, then maybe MAPPED); returns the spawner's pid."""
    error, record = ffi.new("struct sbx_error *"), ffi.new("struct sbx_record *")
    if lib.sbx_spawner_hello(spawner, constant(f"MESSAGE_{kind}"), flags, record, error) < 0:
        raise NativeFailure(error)
    return cast(int, record.pid)


def spawner_plan(spawner: int, plan_id: int, plan: bytes) -> None:
    """Have a template built from ``plan``."""
    error = ffi.new("struct sbx_error *")
    if lib.sbx_spawner_plan(spawner, plan_id, ffi.from_buffer(plan), len(plan), error) < 0:
        raise NativeFailure(error)


@dataclass(slots=True, kw_only=True)  # not frozen: that costs microseconds per command
class Streams:
    """Where stdin comes from and stdout and stderr go, in descriptors of this process.

    ``capture`` are the numbers (1, 2) to capture, ``relay`` maps 1 and 2 to a descriptor. ``owner`` gets
    the pipes, where that is somebody else.
    """

    input: bytes | None = None
    stdin: int = -1
    capture: tuple[int, ...] = (1, 2)
    relay: tuple[tuple[int, int], ...] = ()
    limit: int | None = None
    owner: tuple[int, int] | None = None

    @property
    def counted(self) -> tuple[int, ...]:
        """The streams whose bytes are counted."""
        return (*self.capture, *(number for number, _ in self.relay))


METERS = tuple(
    name.lower()
    for name in (
        "CPU_USER",
        "CPU_SYSTEM",
        "MEMORY",
        "OOM_KILLS",
        "PIDS",
        "PIDS_REFUSED",
        "IO_READ",
        "IO_WRITTEN",
    )
)


class Room(NamedTuple):
    """A file system without room: struct sbx_room. ``mount`` is its index, or None for the scratch."""

    what: str  # "bytes" or "inodes"
    mount: int | None
    size: int
    used: int


@dataclass(slots=True)
class NativeResult:
    """One finished run, in C's words: a wait status, bytes, nanoseconds and microseconds."""

    status: int
    timed_out: bool
    lost: bool
    output: tuple[bytes, bytes]
    totals: tuple[int, int]
    clock: tuple[int, ...]
    began: int
    ended: int
    usage: tuple[int, ...]  # CPU us of user and system, peak KiB, major faults, blocks in and out
    applied: bytes
    counts: Mapping[str, int] | None = None  # of its control group: METERS that are known
    out_of_memory: bool = False
    out_of_time: bool = False  # CPU time
    killed: bool = False  # by somebody's wish
    flooded: bool = False  # killed for its output
    group_limits: Mapping[str, Any] | None = None  # of its control group; where `applied` was asked for
    room: Room | None = None  # what was full when it had failed


_UNBOUNDED = 1 << 62


def run(
    socket: int,
    request: bytes,
    streams: Streams,
    timeout: float | None,
    fds: Sequence[int],
    *,
    sandbox: int = -1,
    pause: "Pause | None" = None,
    watch: "Watch | None" = None,
    kill_flood: bool = False,
) -> NativeResult:
    """Run one request to its end. Signal handlers of Python run meanwhile and may raise.

    ``socket`` leads to the spawner, for a fresh sandbox; or with ``sandbox``, the pidfd of its init, to the
    launchers of a living one. ``fds``: those to pass, then those of the request's groups. ``watch`` is of the
    fresh sandbox's own group, and has begun.
    """
    error, run = ffi.new("struct sbx_error *"), ffi.new("struct sbx_run *")
    keep: list[Any] = [ffi.from_buffer(request)]
    run.spawner, run.stdin_relay, run.sandbox = socket, streams.stdin, sandbox
    run.kind = lib.SBX_MESSAGE_RUN if sandbox < 0 else lib.SBX_MESSAGE_EXEC
    run.request, run.request_size = keep[0], len(request)
    if streams.input is not None:
        keep.append(ffi.from_buffer(streams.input))
        run.input, run.input_size = keep[1], len(streams.input)
    run.timeout_ns = -1 if timeout is None else min(int(timeout * 1e9), _UNBOUNDED)
    if streams.owner is not None:
        run.owned = 1
        run.owner_uid, run.owner_gid = streams.owner
    if fds:
        keep.append(ffi.new("int32_t[]", list(fds)))
        setattr(run, "pass", keep[-1])
        run.pass_count = len(fds)
    if pause is not None:
        run.pause = pause.native
    if watch is not None:
        run.watch = watch.native
    run.kill_flood = kill_flood
    for number in streams.capture:
        out = run.out[number - 1]
        out.mode = lib.SBX_STREAM_CAPTURE
        out.limit = _UNBOUNDED if streams.limit is None else streams.limit
    for number, fd in streams.relay:
        out = run.out[number - 1]
        out.mode, out.relay = lib.SBX_STREAM_RELAY, fd
    try:
        while code := lib.sbx_run(run, error):  # 1: a signal came; Python looks at it here
            if code < 0:
                raise NativeFailure(error)
        return _result(run)
    finally:
        lib.sbx_run_close(run)


_RECORD = Header("struct sbx_record")
_STATUS, _CLOCK = _RECORD.names.index("status"), _RECORD.names.index("clock0")
_USAGE = _RECORD.names.index("utime_us")
_OOM = _RECORD.names.index("out_of_memory")
_COUNTS = _RECORD.names.index("counts0")
_COUNTS_END = _COUNTS + len(METERS) + 1
_CLOCK_END, _USAGE_END = _CLOCK + lib.SBX_CLOCKS, _USAGE + 6
_ROOM = _RECORD.names.index("room0")
_ENDED, _ENDED_AT = Header("struct sbx_run").part("exit0", "applied_size")


def _counted(values: Sequence[int]) -> Mapping[str, int] | None:
    """A struct sbx_counts by the names of its meters; None if it says nothing."""
    known = values[len(METERS)]
    return {name: values[i] for i, name in enumerate(METERS) if known >> i & 1} if known else None


def _full(values: Sequence[int]) -> Room | None:
    what, where, size, used = values[_ROOM : _ROOM + 4]
    if what == lib.SBX_FULL_NOT:
        return None
    mount = where - lib.SBX_ROOM_MOUNT if where >= lib.SBX_ROOM_MOUNT else None
    return Room("bytes" if what == lib.SBX_FULL_BYTES else "inodes", mount, size, used)


def _result(run: Any) -> NativeResult:
    values = _ENDED.unpack_from(ffi.buffer(run), _ENDED_AT)  # attribute by attribute is slower
    timed_out, lost, began, ended, total1, total2, size1, size2, applied = values[-9:]
    return NativeResult(
        values[_STATUS],
        bool(timed_out),
        bool(lost),
        (
            bytes(ffi.buffer(run.out[0].data, size1)) if size1 else b"",
            bytes(ffi.buffer(run.out[1].data, size2)) if size2 else b"",
        ),
        (total1, total2),
        values[_CLOCK:_CLOCK_END],
        began,
        ended,
        values[_USAGE:_USAGE_END],
        bytes(ffi.buffer(run.applied, applied)) if applied else b"",
        _counted(values[_COUNTS:_COUNTS_END]),
        bool(values[_OOM] or run.out_of_memory),
        bool(values[_OOM + 1] or run.out_of_time),
        bool(values[_OOM - 1]),
        bool(run.flooded),
        room=_full(values),
    )


@dataclass(frozen=True, slots=True)
class Record:
    """What init, a launcher or the spawner said: struct sbx_record. ``fd`` is the receiver's to close."""

    kind: str
    fd: int
    pid: int
    status: int
    timed_out: bool
    killed: bool
    failed: bool
    text: bytes
    native: Any

    @property
    def error(self) -> NativeFailure | None:
        """What it says has failed. A new one each time: raised from here, it must not be held by what its own
        traceback holds, for that keeps whatever the callers have."""
        return NativeFailure(self.native.error) if self.failed else None


_KINDS = {
    constant(f"RECORD_{name}"): name
    for name in ("READY", "PIDFD", "ERROR", "APPLIED", "EXIT", "STARTED", "LENT", "DONE")
}


def send(
    socket: int,
    kind: str,
    body: bytes = b"",
    fds: Sequence[int] = (),
    *,
    flags: int = 0,
    signal: int = 0,
    plan: int = 0,
) -> None:
    """Send one message of ``enum sbx_message_kind``. Raises OSError."""
    message = ffi.new("struct sbx_message *")
    message.magic, message.kind = lib.SBX_REQUEST_MAGIC, constant(f"MESSAGE_{kind}")
    message.flags, message.signal, message.plan = flags, signal, plan
    numbers = ffi.new("int32_t[]", list(fds))
    code = lib.sbx_send(socket, message, ffi.from_buffer(body), len(body), numbers, len(fds))
    if code < 0:
        raise OSError(-code, os.strerror(-code))


_LAYERS = Header("struct sbx_layers")


@dataclass(frozen=True)
class LayersOrder:
    """Other layers: their numbers, the topmost first, and a descriptor of each that is new to init, else -1.
    ``upper``: the number of what is written to from then on; ``seal``: what was written until then is wanted
    as a layer; ``drop``: what is to be removed, None for all that there was. ``copy`` instead: as ``upper`` a
    copy of what was written, or of the layers; 0 for none."""

    layers: Sequence[tuple[int, int]]
    upper: int
    seal: bool = False
    drop: Sequence[int] | None = ()
    copy: bool = False


def send_layers(sock: socket.socket, answer: int, order: LayersOrder, fault: tuple[int, int]) -> None:
    """Give init an order. Raises OSError."""
    new = constant("LAYER_NEW")
    values = {
        "magic": lib.SBX_REQUEST_MAGIC,
        "kind": constant("MESSAGE_COPY" if order.copy else "MESSAGE_LAYERS"),
        "fault_at": fault[0],
        "fault_errno": fault[1],
        "seal": order.seal,
        "upper": order.upper,
        "count": len(order.layers),
        "drops": constant("DROP_OLD") if order.drop is None else len(order.drop),
    }
    values |= {f"drop{i}": number for i, number in enumerate(order.drop or ())}
    values |= {f"number{i}": number | (new if fd >= 0 else 0) for i, (number, fd) in enumerate(order.layers)}
    fds = [fd for _, fd in order.layers if fd >= 0]
    socket.send_fds(sock, [_LAYERS.pack(values)], [answer, *fds])


def send_mount(
    socket: int,
    source: tuple[bytes, bytes, bytes],
    about: tuple[int, bool],
    fds: Sequence[int],
    fault: tuple[int, int],
) -> None:
    """Ask the spawner for a mount of what is at a path. ``source``: this, and its id maps, perhaps empty;
    ``about``: attributes, and whether it is a directory; ``fds``: for the answer, and what is there. Raises
    OSError."""
    of = ffi.new("struct sbx_source_of *")
    of.attrs, of.dir = about
    of.fault_at, of.fault_errno = fault
    body = bytes(ffi.buffer(of)) + b"".join(text + b"\0" for text in source)
    send(socket, "MOUNT", body, fds)


def send_bind(
    sock: socket.socket,
    number: int,
    target: bytes | None,
    fds: Sequence[int],
    fault: tuple[int, int],
    *,
    lazy: bool,
) -> None:
    """Tell init to attach a mount, or with no target, to take away that of this number. ``fds``: for the
    answer, and the mount. Raises OSError."""
    order = ffi.new("struct sbx_bind *")
    order.magic = lib.SBX_REQUEST_MAGIC
    order.kind = constant("MESSAGE_UNBIND" if target is None else "MESSAGE_BIND")
    order.fault_at, order.fault_errno = fault
    order.number, order.lazy, order.target = number, lazy, target or b""
    socket.send_fds(sock, [bytes(ffi.buffer(order))], list(fds))


def send_file_op(socket: int, op: str, paths: bytes, *, flags: int = 0, mode: int = 0, at: int = -1) -> None:
    """Ask a launcher that serves files for one operation of ``enum sbx_file_ops``; ``paths`` are terminated,
    and relative to the descriptor ``at`` if there is one. Raises OSError."""
    ask = ffi.new("struct sbx_file_op *")
    ask.magic, ask.op, ask.flags, ask.mode = lib.SBX_REQUEST_MAGIC, constant(f"FILE_{op}"), flags, mode
    code = lib.sbx_file_send(socket, ask, ffi.from_buffer(paths), len(paths), at)
    if code < 0:
        raise OSError(-code, os.strerror(-code))


def receive(socket: int) -> Record | None:
    """The record that waits on a socket; None at end-of-file. Raises BlockingIOError if there is none."""
    record, fd = ffi.new("struct sbx_record *"), ffi.new("int32_t *")
    text = ffi.new("char[]", lib.SBX_MAX_INLINE)
    code = lib.sbx_receive_record(socket, record, text, lib.SBX_MAX_INLINE, fd)
    if code < 0:
        raise OSError(-code, os.strerror(-code))
    if code == 0:
        return None
    kind = _KINDS.get(record.kind, "unknown")
    return Record(
        kind,
        fd[0],
        record.pid,
        record.status,
        bool(record.timed_out),
        bool(record.killed),
        kind == "ERROR" or (kind == "DONE" and record.error.err != 0),
        bytes(ffi.buffer(text, record.size)) if kind == "APPLIED" else b"",
        record,
    )


def mount_fs(kind: str, options: Sequence[str]) -> int:
    """A detached mount of a file system, a descriptor: fsmount(2). Raises OSError."""
    fd: int = lib.sbx_mount_fs(kind.encode(), b"".join(item.encode() + b"\0" for item in options), 0)
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd))
    return fd


def remove_tree(directory: int, name: str) -> None:
    """Remove what has a name in a directory with everything below, however deep, through no link and whatever
    the modes of its directories. Raises OSError."""
    while (code := lib.sbx_remove_tree(directory, os.fsencode(name), True)) == -errno.ETIMEDOUT:
        pass  # much is gone already
    if code < 0:
        raise OSError(-code, os.strerror(-code), name)


def ended_result(record: Record, began: int, finished: int, applied: bytes) -> NativeResult:
    """The result of a command whose streams went elsewhere, from its EXIT record."""
    values = _RECORD.unpack(ffi.buffer(record.native))
    status = values[_STATUS]
    return NativeResult(
        status,
        record.timed_out,
        False,
        (b"", b""),
        (0, 0),
        values[_CLOCK:_CLOCK_END],
        began,
        finished,
        values[_USAGE:_USAGE_END],
        applied,
        _counted(values[_COUNTS:_COUNTS_END]),
        bool(values[_OOM]),
        bool(values[_OOM + 1]),
        record.killed,
        room=_full(values),
    )


def lost_result(began: int, finished: int) -> NativeResult:
    """The result of a command whose launcher ended without a word: somebody killed it, and so the command."""
    return NativeResult(9, False, True, (b"", b""), (0, 0), (0,) * 5, began, finished, (0,) * 6, b"")


class Pause:
    """How long a sandbox was suspended: struct sbx_pause, in a file that its launchers have mapped."""

    SIZE = mmap.PAGESIZE

    def __init__(self, fd: int) -> None:
        """``fd``: a file of :attr:`SIZE` bytes, which may be closed afterwards."""
        self._memory = mmap.mmap(fd, self.SIZE)
        self.native = ffi.cast("struct sbx_pause *", ffi.from_buffer(self._memory, require_writable=True))

    def begin(self) -> None:
        """From here on no limit of time counts. Idempotent."""
        self.native.since = self.native.since or time.monotonic_ns()

    def end(self) -> None:
        """It goes on. Idempotent."""
        since = self.native.since
        if since:
            self.native.total += time.monotonic_ns() - since
            self.native.since = 0

    @property
    def paused(self) -> bool:
        """Whether it is suspended now."""
        return bool(self.native.since)

    def until(self, now: int) -> int:
        """Nanoseconds up to a moment of CLOCK_MONOTONIC."""
        since = cast(int, self.native.since)
        return cast(int, self.native.total) + (max(0, now - since) if since else 0)


class Gauge:
    """The counters of one control group, for one command after the other: csrc/meter.c."""

    def __init__(self, directories: Mapping[str, int]) -> None:
        """``directories``: open ones, by names of ``enum sbx_group_use``. They may be closed afterwards."""
        self.native = ffi.new("struct sbx_gauge *")
        lib.sbx_gauge_init(self.native)
        for use, fd in directories.items():
            code = lib.sbx_gauge_open(self.native, fd, constant(f"GROUP_{use}"))
            if code < 0:
                self.close()
                raise OSError(-code, os.strerror(-code))

    def end(self) -> Mapping[str, int] | None:
        """What was counted since, but for init."""
        counts = ffi.new("struct sbx_counts *")
        lib.sbx_gauge_end(self.native, 1, counts)
        return _counted([*counts.value, counts.known])

    def worn(self, left: int) -> bool:
        """Whether a small command could not be measured any more, or it holds more bytes than ``left``."""
        return bool(lib.sbx_gauge_worn(self.native, left))

    def close(self) -> None:
        """Close its files. Idempotent."""
        lib.sbx_gauge_close(self.native)


class Watch:
    """Whether a command has used up what its control group may have: csrc/watch.c."""

    def __init__(self, gauge: Gauge, event: int) -> None:
        """``event``: an eventfd that tells of a lack of memory, or -1."""
        self.native = ffi.new("struct sbx_watch *")
        self._gauge, self.event = gauge, event

    def begin(self, cpu_time: float | None) -> None:
        """From here on it counts; ``cpu_time`` seconds are allowed."""
        lib.sbx_watch_begin(self.native, self._gauge.native, self.event, int((cpu_time or 0) * 1e6))

    def out_of_memory(self, *, told: bool) -> bool:
        """Whether a process was killed for want of memory; ``told``: the event says so."""
        return bool(lib.sbx_watch_memory(self.native, told))

    def out_of_time(self) -> bool:
        """Whether the CPU time is up."""
        return bool(lib.sbx_watch_cpu(self.native))

    @property
    def next(self) -> float | None:
        """Seconds until that should be asked again; None: when something happens."""
        look = lib.sbx_watch_next(self.native)
        return max(0.0, (look - time.monotonic_ns()) / 1e9) if look else None


# --- journals -------------------------------------------------------------------------------------

JOURNAL_HEAD = cast(int, lib.SBX_JOURNAL_HEAD)
JOURNAL_SIZE = cast(int, ffi.sizeof("struct sbx_journal"))
_JOURNAL_STATES = {constant(f"JOURNAL_{name}"): name for name in ("NEW", "RUNNING", "ENDED")}


@dataclass(frozen=True, slots=True)
class JournalHead:
    """How far a detached command has come: struct sbx_journal."""

    keep: int
    ring: int
    written: tuple[int, int]
    state: str
    pid: int
    exit: Record


def journal_head(keep: int) -> tuple[bytes, int]:
    """The first bytes of a new journal, and the whole file's size."""
    head = ffi.new("struct sbx_journal *")
    head.magic, head.layout = lib.SBX_JOURNAL_MAGIC, lib.SBX_LAYOUT
    head.keep, head.ring = keep, keep + lib.SBX_JOURNAL_SLACK
    return bytes(ffi.buffer(head)), JOURNAL_HEAD + 2 * head.ring


def parse_journal(data: bytes) -> JournalHead:
    """The first page of a journal. Raises ValueError where it is none."""
    if len(data) < JOURNAL_SIZE:
        raise ValueError("not a journal")
    head = ffi.new("struct sbx_journal *")
    ffi.memmove(head, data, JOURNAL_SIZE)
    if (
        head.magic != lib.SBX_JOURNAL_MAGIC
        or head.layout != lib.SBX_LAYOUT
        or head.state not in _JOURNAL_STATES
    ):
        raise ValueError("not a journal of this version")
    end = ffi.new("struct sbx_record *", head.exit)
    record = Record("EXIT", -1, end.pid, end.status, bool(end.timed_out), bool(end.killed), False, b"", end)
    written = head.written[0], head.written[1]
    return JournalHead(head.keep, head.ring, written, _JOURNAL_STATES[head.state], head.pid, record)
