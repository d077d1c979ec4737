"""Logs of events, read and checked: :func:`read_log`, :func:`verify_log`."""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from sandboxcore.errors import SpecError
from sandboxcore.eventlog import (
    MAX_LINE,
    PATIENCE,
    START,
    ChainLink,
    canonical,
    checked_key,
    full_files,
    is_authentic,
    is_there,
    link_of,
    parsed,
    wait_for,
)
from sandboxcore.events import LOGGER, Event, EventKind

_CHAIN = frozenset(("seq", "prev", "mac"))


def _event_of(found: dict[str, Any]) -> Event:
    return Event.from_dict({name: value for name, value in found.items() if name not in _CHAIN})


class _Raw(NamedTuple):
    """A line as it stands there, with its newline if it has one."""

    file: Path
    number: int
    data: bytes


def _raw_lines(path: Path, pruned: Callable[[], object] = lambda: None) -> Iterator[_Raw]:
    """Every line up to now: of the full files, oldest first, and of the file itself. Calls ``pruned`` where a
    writer has removed the oldest ones meanwhile, and goes on with what there is."""
    current: int | None = None
    try:
        current, parts, size = _moment(path)
    except FileNotFoundError:  # it is about to begin a new one
        parts, size = full_files(path), 0
        if not parts:
            raise
    try:
        for part in parts:
            try:
                with open(part, "rb") as file:
                    yield from _lines(part, file, file.seek(0, os.SEEK_END))
            except FileNotFoundError:
                if not any(other < part for other in full_files(path)):  # else it was not the oldest
                    pruned()
        if current is not None:
            with open(current, "rb", closefd=False) as file:
                yield from _lines(path, file, size)
    finally:
        if current is not None:
            os.close(current)


def _moment(path: Path) -> tuple[int, list[Path], int]:
    """The file, those before it, and how long it is while nobody writes. Writers go on behind that."""
    deadline = time.monotonic() + PATIENCE
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            wait_for(fd, path, deadline, fcntl.LOCK_SH)
            if is_there(fd, path):
                found = fd, full_files(path), os.fstat(fd).st_size
                fcntl.flock(fd, fcntl.LOCK_UN)
                fd = -1
                return found
        finally:
            if fd >= 0:
                os.close(fd)


def _lines(path: Path, file: IO[bytes], size: int) -> Iterator[_Raw]:
    file.seek(0)
    number, left = 0, size
    while left > 0 and (data := file.readline(min(left, MAX_LINE))):
        number, left = number + 1, left - len(data)
        yield _Raw(path, number, data)


def read_log(
    path: str | os.PathLike[str], *, bad: Callable[[Path, int, str], object] | None = None
) -> Iterator[Event]:
    """The events of a log, oldest first, with those of its full files. Nothing is verified.

    bad: called with file, line and reason for each line that is no event, which is left out; default: a
    warning to ``logging.getLogger("sandboxcore")``. Raises OSError.
    """
    for file, number, data in _raw_lines(Path(os.path.abspath(path))):
        found = parsed(data)
        try:
            if found is None or not data.endswith(b"\n"):
                raise SpecError("not a whole line")
            event = _event_of(found)
        except SpecError as error:
            if bad is not None:
                bad(file, number, str(error))
            else:
                LOGGER.warning("%s: line %d: %s", file, number, error)
        else:
            yield event


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What :func:`verify_log` has found.

    lines: how many were looked at. ok: whether nothing is wrong. problem, at_line, file: the first thing that
    is. last: the mac of the last line that was right, to be kept elsewhere for ``expect_last``; None if there
    is none. torn: numbers of lines that crashes left unfinished, and of which the chain tells; these are no
    problem.
    """

    lines: int
    ok: bool
    problem: str | None = None
    at_line: int | None = None
    file: Path | None = None
    last: str | None = None
    torn: tuple[int, ...] = ()


def verify_log(
    path: str | os.PathLike[str],
    key: bytes,
    *,
    expect_last: str | None = None,
    expect_lines: int | None = None,
    whole: bool = True,
) -> Verification:
    """Check the chain of a log that was written with a key, with its full files.

    It finds lines that were changed, removed, inserted, repeated or swapped, and another key.

    expect_last: the mac of a line that has to be there: that of the last one when somebody looked before.
    expect_lines: at least so many. whole=False: the oldest lines may be missing, because of ``backups``.

    What a chain cannot show: that lines are missing at the end, or everything, unless it is told what to
    expect; what was never written; and anything that was done by somebody who has the key, as each process
    that writes does. An event says what its writer believed, at the time that its clock showed. So keep the
    key and the last mac where those who are watched do not come.

    Raises OSError, :class:`SpecError` for a key that is too short.
    """
    chain = _Chain(checked_key(key), expect_last, whole=whole)
    lines = 0
    for raw in _raw_lines(Path(os.path.abspath(path)), chain.begin_anew):
        lines += 1
        if (problem := chain.take(raw)) is not None:
            break
    else:
        problem = chain.end(lines, expect_lines)
    if problem is None:
        return Verification(lines=lines, ok=True, last=chain.last, torn=tuple(chain.told))
    where, text = problem
    return Verification(
        lines=lines,
        ok=False,
        problem=text,
        at_line=None if where is None else where.number,
        file=None if where is None else where.file,
        last=chain.last,
        torn=tuple(chain.told),
    )


_UNTOLD = "not a whole line, and nothing in the chain tells of it"
_Problem = tuple[_Raw | None, str]


class _Torn:
    """Lines one after the other that are none: each writer was killed before it had told of the last."""

    def __init__(self, first: _Raw) -> None:
        self.first = first
        self.numbers: list[int] = []
        self._bytes, self._digest, self._end = 0, hashlib.sha256(), b""

    def add(self, raw: _Raw) -> None:
        self.numbers.append(raw.number)
        data = raw.data.removesuffix(b"\n")
        self._digest.update(self._end + data)
        self._bytes += len(self._end) + len(data)
        self._end = raw.data[len(data) :]

    def about(self) -> dict[str, Any]:
        """What has to be told of them: without the newline, which whoever tells has written."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


class _Chain:
    """What has to come next."""

    def __init__(self, key: bytes, expected: str | None, *, whole: bool) -> None:
        self._key, self._expected, self._whole = key, expected, whole
        self._next: ChainLink | None = ChainLink(0, START) if whole else None
        self._torn: _Torn | None = None
        self.last: str | None = None
        self.told: list[int] = []

    def begin_anew(self) -> None:
        """What was before is not there any more, which is as if it had never been, unless all is due."""
        if not self._whole:
            self._next = self._torn = None

    def take(self, raw: _Raw) -> _Problem | None:
        """The next line, or what is wrong."""
        found = parsed(raw.data) if raw.data.endswith(b"\n") else None
        if found is None:
            self._torn = self._torn or _Torn(raw)
            self._torn.add(raw)
            return None
        text = self._wrong(found, raw.data[:-1])
        if text is not None:
            return (raw, text) if self._torn is None else (self._torn.first, _UNTOLD)
        if (problem := self._tells_of_torn(found, raw)) is not None:
            return problem
        self._next = link_of(raw.data)
        self.last = found["mac"]
        if self.last == self._expected:
            self._expected = None
        return None

    def _wrong(self, found: dict[str, Any], line: bytes) -> str | None:
        if not {"seq", "prev", "mac"} <= found.keys() or link_of(line) is None:
            return "not of a chain"
        try:
            changed = canonical(found) != line or not is_authentic(self._key, found)
            _event_of(found)
        except (ValueError, RecursionError) as error:
            return f"no event: {error}"
        if changed:
            return "changed, or written with another key"
        due = self._next
        if due is None or (found["seq"], found["prev"]) == (due.seq, due.mac.hex()):
            return None
        if found["seq"] == due.seq:
            return "follows a line that is not here"
        return f"number {found['seq']} where {due.seq} is due: removed, inserted or moved"

    def _tells_of_torn(self, found: dict[str, Any], raw: _Raw) -> _Problem | None:
        torn, self._torn = self._torn, None
        tells = found["kind"] == EventKind.LOG_TORN
        if torn is None:
            return (raw, "tells of an unfinished line that is not here") if tells else None
        if not tells or found["data"] != torn.about():
            return torn.first, _UNTOLD
        self.told += torn.numbers
        return None

    def end(self, lines: int, expected: int | None) -> _Problem | None:
        """There are no more lines."""
        if self._torn is not None:
            return self._torn.first, "unfinished: whoever wrote it was killed, or the end is missing"
        if self._expected is not None:
            return None, "the expected last line is missing: the end was cut off, or it is another log"
        if expected is not None and lines < expected:
            return None, f"{lines} lines where {expected} are expected: the end was cut off"
        return None
