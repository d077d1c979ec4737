"""A person at a terminal: starts a program on a pseudo-terminal, types, and waits for what appears."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import host_environment

# What stands before a program: its terminal is its controlling one, no signal is ignored or blocked because
# it is here, report() tells us something that is not on the screen, and ordered() returns when we want
# something to happen.
PREAMBLE = """
import fcntl, json, os, signal, sys, termios, threading, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
for number in "HUP QUIT TERM TSTP TTIN TTOU CONT WINCH CHLD".split():
    signal.signal(signal.Signals["SIG" + number], signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
from sandboxcore import Sandbox, SandboxSpec
from sandboxcore.terminal import attach
from support import PYTHON
def report(value):
    os.write(int(os.environ["REPORT"]), json.dumps(value).encode() + b"\\n")
def ordered():
    os.read(int(os.environ["ORDERS"]), 1)
"""


class Human:
    """Whoever sits at the terminal of ``process``. Every wait has a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], master: int, reports: int, orders: int) -> None:
        self.process, self.master = process, master
        self.seen = bytearray()  # everything that appeared
        self._at = 0  # where expect() goes on
        self._reports, self._orders = reports, orders
        os.set_blocking(master, False)

    def _turn(self, events: int, seconds: float) -> int:
        """Read what there is; returns what the terminal is ready for."""
        poller = select.poll()
        poller.register(self.master, events)
        ready = dict(poller.poll(max(0, seconds * 1000))).get(self.master, 0)
        if ready & (select.POLLIN | select.POLLHUP):
            try:
                self.seen += os.read(self.master, 65536)
            except BlockingIOError:
                pass
            except OSError:  # EIO: everybody has left the terminal
                return select.POLLHUP
        return ready

    def expect(self, pattern: str, seconds: float = 15) -> re.Match[bytes]:
        """Wait until a regular expression appears, after what was expected before."""
        deadline = time.monotonic() + seconds
        expression = re.compile(pattern.encode("latin-1"))
        while not (match := expression.search(self.seen, self._at)):
            left = deadline - time.monotonic()
            assert left > 0, (
                f"{pattern!r} did not appear within {seconds} s: {self.seen[self._at :][-2000:]!r}; "
                f"at the terminal are {self.present()}"
            )
            if self._turn(select.POLLIN, left) == select.POLLHUP:
                assert expression.search(self.seen, self._at), f"no {pattern!r}: {self.seen[-2000:]!r}"
        self._at = match.end()
        return match

    def send(self, text: str | bytes, seconds: float = 30) -> None:
        """Type."""
        data = text.encode() if isinstance(text, str) else text
        deadline = time.monotonic() + seconds
        while data:
            assert time.monotonic() < deadline, f"{len(data)} bytes cannot be typed"
            if self._turn(select.POLLIN | select.POLLOUT, 1) & select.POLLOUT:
                data = data[os.write(self.master, data[:512]) :]

    def resize(self, rows: int, columns: int) -> None:
        """Drag the window's corner."""
        termios.tcsetwinsize(self.master, (rows, columns))

    def attributes(self) -> list[Any]:
        """The terminal's, termios(3)."""
        return termios.tcgetattr(self.master)

    def order(self) -> None:
        """Have ordered() return."""
        os.write(self._orders, b"!")

    def reported(self, seconds: float = 20) -> Any:
        """What the program reports next."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            assert time.monotonic() < deadline, f"no report within {seconds} s: {self.seen[-2000:]!r}"
            poller = select.poll()
            for fd in {self._reports, self.master} - {-1}:
                poller.register(fd, select.POLLIN)
            ready = dict(poller.poll(1000))
            if self.master in ready and self._turn(select.POLLIN, 0) == select.POLLHUP:
                time.sleep(0.01)  # everybody has left it, and it says so at once
            if self._reports in ready:
                byte = os.read(self._reports, 1)
                assert byte, f"it ended without a report: {self.rest()[-2000:]!r}"
                line += byte
        return json.loads(line)

    def rest(self, seconds: float = 20) -> bytearray:
        """Everything until nobody is at the terminal any more."""
        deadline = time.monotonic() + seconds
        while self.master >= 0 and self._turn(select.POLLIN, 1) != select.POLLHUP:
            assert time.monotonic() < deadline, f"it does not end: {self.seen[-2000:]!r}"
        return self.seen

    def wait(self, seconds: float = 20) -> int:
        """The end of the program, its return code."""
        self.rest(seconds)
        return self.process.wait(seconds)

    def present(self) -> list[str]:
        """Who is in the terminal's session: number, name, state, groups, and what it waits in."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                state, _, group, session, _, foreground = rest.split()[:6]
                if int(session) == self.process.pid:
                    call = (entry / "wchan").read_text()
                    found.append(f"{entry.name} {name} {state} group {group} of {foreground} in {call}")
        return found

    def hang_up(self) -> None:
        """Close the window."""
        os.close(self.master)
        self.master = -1


@contextmanager
def at_terminal(
    code: str, *, size: tuple[int, int] = (24, 80), command: Sequence[str] = (), **environment: str
) -> Iterator[Human]:
    """Run a Python program, or the command that it then becomes, in a terminal of its own."""
    master, slave = pty.openpty()
    reports, for_reports = os.pipe()
    for_orders, orders = os.pipe()
    ours = [master, reports, orders]
    try:
        termios.tcsetwinsize(master, size)
        mode = termios.tcgetattr(slave)
        mode[0] |= termios.IXANY  # so that ours differs from anybody's default
        mode[6][termios.VKILL] = b"\x18"
        termios.tcsetattr(slave, termios.TCSANOW, mode)
        become = f"os.execvp({command[0]!r}, {list(command)!r})" if command else textwrap.dedent(code)
        about = {"REPORT": str(for_reports), "ORDERS": str(for_orders), "TERM": "xterm", **environment}
        process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + become],
            stdin=slave, stdout=slave, stderr=slave, pass_fds=[for_reports, for_orders],
            start_new_session=True, env={**host_environment(), **about},
        )  # fmt: skip
        for fd in (slave, for_reports, for_orders):
            os.close(fd)
        human = Human(process, *ours)
        try:
            yield human
        finally:
            process.kill()
            process.wait(20)
            ours[0] = human.master
    finally:
        for fd in ours:
            if fd >= 0:
                os.close(fd)


@contextmanager
def interacting(
    *argv: str,
    size: tuple[int, int] = (24, 80),
    env: dict[str, str] | None = None,
    options: str = "",
    **about: str,
) -> Iterator[Human]:
    """A program that does nothing but Sandbox.interact(), and reports the return code and the cause."""
    given = list(argv) or None
    code = f"""
with Sandbox(SandboxSpec(env={env or {}!r})) as sandbox:
    done = sandbox.interact({given!r}, {options})
report([done.returncode, done.cause])
"""
    with at_terminal(code, size=size, **about) as human:
        yield human
