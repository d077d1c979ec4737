"""What a payload's output may do to the terminal that shows it: text and colours, nothing else."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator

_KEEP = rb"[^\x00-\x06\x0e-\x1f\x7f]+|\x1b\[[0-9;:]*m"  # BEL, BS, TAB, LF, VT, FF, CR are text here
_TOKENS = re.compile(
    rb"(?P<keep>" + _KEEP + rb")|(?P<string>\x1b[PX^_\]])"  # DCS, SOS, PM, APC, OSC
    rb"|\x1b\[[0-?]*[ -/]*[@-~]?|\x1b[ -/]*[0-~]?|[\x00-\x1f\x7f]"
)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[ -/]*)")
_STRING_END = re.compile(rb"\x07|\x1b\\|[\x18\x1a]")
_C1 = re.compile(rb"(?<!\xc2)\xc2++[\x80-\x9f]+")  # in UTF-8; nor is one made by what is removed between
_LONGEST = 4096  # bytes of one sequence; what is longer is none


class TerminalFilter:
    """Takes a stream in pieces and returns what of it is safe to show: ECMA-48 without its commands."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of a sequence
        self._lead = b""  # the beginning of a C1 control
        self._skip = 0  # bytes in which the end of a control string may still come

    def clean(self, data: bytes) -> bytes:
        """The next piece. A sequence that is not complete yet is held back."""
        data, self._held = self._held + data, b""
        kept, at = [self._lead], 0
        while at < len(data):
            if self._skip:
                at = self._skip_string(data, at)
                continue
            match = _TOKENS.match(data, at)
            assert match is not None  # there is a token for every byte
            at = match.end()
            if match["keep"]:
                kept.append(match["keep"])
            elif match["string"]:
                self._skip = _LONGEST
            elif at == len(data) and _UNFINISHED.fullmatch(match[0]) and len(match[0]) < _LONGEST:
                self._held = match[0]
        safe = _C1.sub(b"", b"".join(kept))
        text = safe.rstrip(b"\xc2")
        self._lead = b"\xc2" if len(text) < len(safe) else b""
        return text

    def _skip_string(self, data: bytes, at: int) -> int:
        limit = at + self._skip
        end = _STRING_END.search(data, at, limit)
        if end is not None:
            self._skip = 0
            return end.end()
        if len(data) < limit:
            self._skip = limit - len(data)
            if data.endswith(b"\x1b"):
                self._held = b"\x1b"
            return len(data)
        self._skip = 0
        return limit


def write_all(fd: int, data: bytes) -> None:
    """Write everything. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


@contextlib.contextmanager
def terminal_safe(number: int) -> Iterator[int]:
    """The descriptor to write to: itself, or if it is a terminal, a pipe whose reader keeps the payload
    from sending it commands."""
    if not os.isatty(number):
        yield number
        return
    reader, writer = os.pipe()
    safe = TerminalFilter()

    def copy() -> None:
        try:
            while data := os.read(reader, 65536):
                write_all(number, safe.clean(data))
        except OSError:  # the terminal has gone
            pass
        finally:
            os.close(reader)  # whoever still writes learns it

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield writer
    finally:
        os.close(writer)
        thread.join()
