"""The filter before a terminal: whatever comes, in whatever pieces, text and colours are all that leaves."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxcore.cli_filter import TerminalFilter

COLOUR = re.compile(rb"\x1b\[[0-9;:]*m")
FORBIDDEN = re.compile(rb"[\x00-\x06\x0e-\x1f\x7f]")
C1 = re.compile(rb"\xc2[\x80-\x9f]")

CONTROLS = [
    b"\x1b",
    b"\x07",
    b"\x00",
    b"\x18",
    b"\xc2",
    b"\x9b",
    b"\x80",
    b"\x1b[31m",
    b"\x1b]52;c;",
    b"\r\n",
]
TEXTS = [b"[", b"]", b"P", b"0;", b"6", b"n", b"m", b"?", b"\\", b"(", b"c", b" ", b"text", b"\xe2\x80\x99"]
pieces = st.sampled_from(CONTROLS + TEXTS)


def filtered(*data: bytes) -> bytes:
    safe = TerminalFilter()
    return b"".join(map(safe.clean, data))


@given(st.lists(pieces, max_size=40))
def test_nothing_but_text_and_colours(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    for data in ([whole], parts, [whole[i : i + 1] for i in range(len(whole))]):
        shown = filtered(*data)
        assert not FORBIDDEN.search(COLOUR.sub(b"", shown))
        assert not C1.search(shown)  # a colour in the middle of one makes two broken characters of it


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    shown = filtered(data)
    assert not FORBIDDEN.search(COLOUR.sub(b"", shown))
    assert not C1.search(shown)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=100), st.integers(1, 7))
def test_text_passes_whole(text: str, size: int) -> None:
    data = text.encode()
    assert filtered(*(data[i : i + size] for i in range(0, len(data), size))) == data


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        (b"a\x1b[1;31mred\x1b[0m\tb\r\n\x08\x07", b"a\x1b[1;31mred\x1b[0m\tb\r\n\x08\x07"),
        (b"a\x1b]0;title\x07b", b"ab"),
        (b"a\x1b]52;c;eA==\x1b\\b", b"ab"),
        (b"a\x1bP+q544e\x1b\\b", b"ab"),
        (b"a\x1b[6nb\x1b[?1049hc", b"abc"),
        (b"a\x1bcb\x1b(0c\x1b#8d", b"abcd"),
        (b"a\x1b[\x006n\x1b[0mb", b"a6n\x1b[0mb"),  # what is removed joins nothing
        (b"a\xc2\x00\x9b6n", b"a6n"),
        (b"a\x1b\x1b[31mb", b"a\x1b[31mb"),
        (
            b"a\x1b]never" + b"x" * 5000,
            b"a" + b"x" * (5005 - 4096),
        ),  # does not swallow the rest of the output
    ],
)
def test_sequences(data: bytes, rest: bytes) -> None:
    assert filtered(data) == rest
    assert filtered(*(bytes([byte]) for byte in data)) == rest


@pytest.mark.parametrize("part", [b"\x1b]", b"\x1b", b"\x1b[", b"\x1b[0", b"\xc2", b"\xc2\x9b", b"\x1bP\x1b"])
def test_takes_time_in_proportion(part: bytes) -> None:
    began = time.process_time()
    filtered(part * (1 << 18))
    assert time.process_time() - began < 5
