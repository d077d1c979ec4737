"""What attach() understands of a stream of keys and of output."""

import ctypes
import operator
import os
import select
import signal
from functools import partial

import pytest

from sandboxcore.terminal import Joint, Keys, Modes, Near, Told

DETACH = b"\x10\x11"


def every_cut(data: bytes) -> list[list[bytes]]:
    """The data in one piece, in two at any place, and byte by byte."""
    pieces = [[data[:at], data[at:]] for at in range(1, len(data))]
    return [[data], *pieces, [data[at : at + 1] for at in range(len(data))]]


@pytest.mark.parametrize(
    ("typed", "passed", "found"),
    [
        (b"abc", b"abc", False),
        (b"a\x10b\x11", b"a\x10b\x11", False),
        (b"a\x10\x11", b"a", True),
        (b"a\x10\x10\x11", b"a\x10", True),
        (b"\x11\x10", b"\x11", False),  # held back
    ],
)
def test_keys_that_detach(typed: bytes, passed: bytes, found: bool) -> None:
    for pieces in every_cut(typed):
        keys, answers = Keys(DETACH), []
        for piece in pieces:
            answers.append(keys.take(piece))
            if answers[-1][1]:
                break
        assert b"".join(answer[0] for answer in answers) == passed
        assert answers[-1][1] is found


def test_what_comes_after_the_keys_is_nobodys() -> None:
    assert Keys(DETACH).take(b"a\x10\x11b") == (b"a", True)
    assert Keys(b"").take(DETACH) == (DETACH, False)
    # keys that begin with themselves
    keys = Keys(b"\x10\x10\x11")
    assert keys.take(b"\x10\x10\x10") == (b"\x10", False)
    assert keys.take(b"\x11") == (b"", True)


@pytest.mark.parametrize(
    ("output", "resets"),
    [
        (b"plain \x1b[1mbold\x1b[0m", b""),
        (b"\x1b[?1049h", b"\x1b[?1049l"),
        (b"\x1b[?1049h\x1b[?1049l", b""),
        (b"\x1b[?25l", b"\x1b[?25h"),
        (b"\x1b[?25l\x1b[?25h", b""),
        (b"\x1b[?1000;1006h\x1b=", b"\x1b>\x1b[?1000l\x1b[?1006l"),
        (b"\x1b[?1000;1006h\x1b[?1006l", b"\x1b[?1000l"),
        (b"\x1b[?2004h\x1bc", b""),  # full reset
        (b"\x1b[?7727h\x1b[?;h\x1b[4h", b""),  # none of ours
        (b"\x1b\x1b[?1h", b"\x1b[?1l"),
        (b"\x1b[?" + b"1;" * 40 + b"h", b""),  # too long for anybody
    ],
)
def test_modes_left_behind(output: bytes, resets: bytes) -> None:
    for pieces in every_cut(output):
        modes = Modes()
        for piece in pieces:
            modes.see(piece)
        assert modes.sequence(restore=True) == resets


def test_modes_come_again() -> None:
    modes = Modes()
    modes.see(b"\x1b[?1049h\x1b[?25l\x1b=")
    assert modes.alternate
    assert modes.sequence(restore=False) == b"\x1b[?25l\x1b=\x1b[?1049h"


# --- signals ------------------------------------------------------------------------------------


def test_a_signal_just_before_the_wait_ends_it() -> None:
    """As in the loop of attach() when it comes after the interpreter's last look at what is due: map() runs
    both calls without one."""
    told = Told()
    told.listen()
    try:
        poller = select.poll()
        poller.register(told.awake, select.POLLIN)
        raised = partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGWINCH)
        _, ready = map(operator.call, (raised, partial(poller.poll, 2000)))
        assert ready
        assert told.news() == {signal.SIGWINCH}
        assert told.news() == set()
    finally:
        told.close()


def test_a_hangup_may_begin_with_sigcont() -> None:
    """The kernel sends it with SIGHUP, which may be ignored."""
    master, slave = os.openpty()
    near = Near(slave, slave)
    try:
        near.enter()
        os.close(master)
        joint = Joint(near, None, None, Told(), Keys(b""))  # type: ignore[arg-type]
        assert joint._heed({signal.SIGCONT}) is False
    finally:
        near.leave()
        os.close(slave)


def test_whoever_listened_before_is_told_too() -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    called: list[int] = []
    handler = signal.signal(signal.SIGWINCH, lambda number, _: called.append(number))
    others = signal.set_wakeup_fd(writing)
    try:
        told = Told()
        told.listen()
        signal.raise_signal(signal.SIGWINCH)
        assert told.news() == {signal.SIGWINCH}
        signal.raise_signal(signal.SIGCONT)  # nobody asks any more
        told.close()
        told.close()
        assert os.read(reading, 9) == bytes([signal.SIGWINCH, signal.SIGCONT])
        assert called == [signal.SIGWINCH]
        assert signal.set_wakeup_fd(-1) == writing
    finally:
        signal.set_wakeup_fd(others)
        signal.signal(signal.SIGWINCH, handler)
        os.close(reading)
        os.close(writing)
