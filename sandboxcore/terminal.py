"""The caller's terminal, joined to that of a command: :func:`attach`."""

import contextlib
import os
import re
import select
import signal
import sys
import termios
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Literal, Protocol

from sandboxcore.command import Process
from sandboxcore.errors import SpecError
from sandboxcore.pipes import Outputs, Terminal, poll_once

Parting = Literal["ended", "detached", "hangup"]

PIECE = 1024  # bytes: what a terminal or pipe that polls writable takes at once, however little room it has
TYPED_ROOM = 65536  # bytes of input that the command does not read; then the caller's terminal has to wait
SHOWN_ROOM = 16384  # bytes of output on their way: few, so that Ctrl-C is seen to work
LOOK = 0.5  # seconds between looks at the window's size where no signal tells of it


class Far(Protocol):
    """The command's side, as :func:`attach` needs it. :class:`Outputs` explains the methods."""

    @property
    def done(self) -> bool: ...
    @property
    def patience(self) -> float | None: ...
    def wanted(self, *, reading: bool = True) -> dict[int, int]: ...
    def take(self, ready: Mapping[int, int], *, reading: bool = True) -> Iterator[tuple[int, bytes]]: ...
    def close(self) -> None: ...


def attach(
    command: Process | tuple[Terminal, Far],
    *,
    stdin: int = 0,
    stdout: int = 1,
    detach_keys: bytes | None = None,
) -> Parting:
    """Let the user at our terminal use the terminal of a command, until one of them has gone.

    Our terminal is raw meanwhile: every key, also Ctrl-C and Ctrl-Z, goes to the command, and every byte
    that it writes goes to our terminal unfiltered. That is what a user of a terminal wants, and it lets the
    command do what escape sequences can do to that terminal. Afterwards the terminal's attributes are what
    they were, on every way out, and modes that the output switched on and not off again (alternate screen,
    hidden cursor, bracketed paste, mouse reports, keypad) are reset.

    Call it from the main thread where possible. There a new size of the window is passed on at once; a stop
    by signal gives the terminal back meanwhile; and a signal that is about to end this process (SIGHUP,
    SIGINT, SIGQUIT, SIGTERM, while their action is the default one) does so after the terminal is restored.

    command: a :class:`Process` with ``pty=``.
    stdin: a descriptor of our terminal. Its flags are left alone.
    stdout: where output goes, as a rule the same terminal.
    detach_keys: bytes that leave the command running when they are typed, as b"\\x10\\x11" for Ctrl-P Ctrl-Q.
        A beginning of them is held back until the next key.

    Returns "ended" when the command has ended and all its output was written, "detached", or "hangup" when
    our terminal has gone; then the command was killed, if it is a :class:`Process`.
    Raises :class:`SpecError` where ``stdin`` is no terminal, or the command has none.
    """
    current_size(stdin)
    terminal, far = _far_side(command)
    near, told = Near(stdin, stdout), Told()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    try:
        try:
            told.listen()
            near.enter()
            parting = Joint(near, terminal, far, told, Keys(detach_keys or b"")).run()
        finally:
            near.leave()
    finally:  # again: a handler of the caller may have raised before the first line above
        near.leave()
        told.close()
        far.close()
    told.obey()
    if parting == "hangup" and isinstance(command, Process):
        command.kill()
    return parting


def current_size(stdin: int) -> tuple[int, int]:
    """Rows and columns of our terminal. Raises :class:`SpecError` where that descriptor is none."""
    if not os.isatty(stdin):
        raise SpecError(f"descriptor {stdin} is not a terminal; use exec() or popen()")
    return termios.tcgetwinsize(stdin)


def _far_side(command: Process | tuple[Terminal, Far]) -> tuple[Terminal, Far]:
    if not isinstance(command, Process):
        return command
    if not isinstance(command.stdout, Terminal) or command.stdout.closed:
        raise SpecError("the command has no terminal; start it with pty=")
    return command.stdout, Outputs(command)


class Keys:
    """Watches what is typed for the keys that detach."""

    def __init__(self, keys: bytes) -> None:
        self._keys, self._held = keys, b""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on of what was typed, and whether it was the keys."""
        if not self._keys:
            return data, False
        data = self._held + data
        before, found, _ = data.partition(self._keys)
        if found:
            return before, True
        size = next(n for n in range(len(self._keys) - 1, -1, -1) if data.endswith(self._keys[:n]))
        self._held = data[len(data) - size :]
        return data[: len(data) - size], False


class Modes:
    """Which modes the output has left switched on in the terminal: xterm's control sequences."""

    # 1 cursor keys, 25 cursor shown, 47 1047 1049 alternate screen, 66 keypad, 1000-1006 1015 1016 mouse and
    # focus, 2004 bracketed paste, 2026 held back output
    PRIVATE = frozenset((1, 25, 47, 66, 1047, 1049, *range(1000, 1007), 1015, 1016, 2004, 2026))
    ALTERNATE = frozenset((47, 1047, 1049))
    SEQUENCE = re.compile(rb"\x1b(?:\[\?([\d;]{1,64})([hl])|([=>c]))")
    BEGINNING = re.compile(rb"\x1b(?:\[(?:\?[\d;]{0,64})?)?\Z")

    def __init__(self) -> None:
        self._changed: set[int] = set()
        self._tail = b""

    @property
    def alternate(self) -> bool:
        """Whether the alternate screen is shown."""
        return bool(self._changed & self.ALTERNATE)

    def see(self, data: bytes) -> None:
        """Take note of a piece of output."""
        if not self._tail and b"\x1b" not in data:
            return
        data = self._tail + data
        for match in self.SEQUENCE.finditer(data):
            numbers, letter, single = match.groups()
            if single == b"c":  # full reset
                self._changed.clear()
            elif single:
                self._set(66, single == b"=")
            else:
                for number in numbers.split(b";"):
                    self._set(int(number or 0), letter == b"h")
        beginning = self.BEGINNING.search(data)
        self._tail = beginning.group() if beginning else b""

    def _set(self, mode: int, on: bool) -> None:
        if mode in self.PRIVATE:
            (self._changed.add if on != (mode == 25) else self._changed.discard)(mode)

    def sequence(self, *, restore: bool) -> bytes:
        """What resets these modes, or (``restore=False``) sets them again."""
        parts = []
        for mode in sorted(self._changed):
            on = (mode == 25) == restore
            if mode == 66:
                parts.append(b"\x1b=" if on else b"\x1b>")
            else:
                parts.append(b"\x1b[?%d%c" % (mode, b"h" if on else b"l"))
        return b"".join(parts)


class Near:
    """Our side: the caller's terminal."""

    def __init__(self, stdin: int, stdout: int) -> None:
        self.stdin, self.stdout = stdin, stdout
        self.modes = Modes()
        self._saved: list[Any] | None = None
        self._raw = False

    def enter(self) -> None:
        """Make it raw: cfmakeraw(3). Stops this process, as ever, where it is in the background."""
        if self._saved is None:
            self._saved = termios.tcgetattr(self.stdin)
        mode = [*self._saved[:6], list(self._saved[6])]
        mode[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.INPCK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IUCLC | termios.IXON
        )  # fmt: skip
        mode[1] &= ~termios.OPOST
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        self._raw = True
        self._set(mode)

    def leave(self) -> None:
        """Make it what it was. Does nothing when that has been done, nor in the background, where the
        terminal is somebody else's now."""
        if self._raw and self._saved is not None:
            if not self._in_background():
                # should that have changed since, the kernel would stop us here
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
                try:
                    with contextlib.suppress(termios.error):  # hung up
                        self._set(self._saved)
                    self._show(self.modes.sequence(restore=True))
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._raw = False

    def again(self) -> None:
        """Raw after a stop, with the modes that the command had set."""
        self.enter()
        self._show(self.modes.sequence(restore=False))

    def _set(self, mode: list[Any]) -> None:
        while True:
            try:
                return termios.tcsetattr(self.stdin, termios.TCSANOW, mode)
            except termios.error as error:
                if error.args[0] != 4:  # EINTR: stopped and continued meanwhile
                    raise

    def _show(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            if data and poll_once({self.stdout: select.POLLOUT}, 1.0).get(self.stdout) == select.POLLOUT:
                os.write(self.stdout, data)

    def _in_background(self) -> bool:
        try:
            return os.tcgetpgrp(self.stdin) != os.getpgrp()
        except OSError:  # not our controlling terminal, so it does not stop us
            return False

    def size(self) -> tuple[int, int] | None:
        """Rows and columns; None when it has gone."""
        try:
            return termios.tcgetwinsize(self.stdin)
        except termios.error:
            return None


class Told:
    """The signals that matter to a raw terminal. Only the main thread may listen.

    The interpreter writes the number of each signal that comes to a pipe, which wakes the loop. A handler
    in Python would be too late for that: one that is due just before poll(2) runs after it.
    """

    FATAL = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

    def __init__(self) -> None:
        self.awake = -1  # readable when a signal came
        self._wake = self._others = -1  # the other end; what the interpreter wrote to before
        self._ending: set[int] = set()
        self._ours: set[int] = set()
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.awake, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._others = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (signal.SIGWINCH, signal.SIGCONT):
            self._handle(number)
        for number in (signal.SIGTSTP, *self.FATAL):
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handle(number)

    def _handle(self, number: int) -> None:
        before = signal.getsignal(number)
        if before is not None:  # one that is not Python's could not be put back
            self._before[number] = before
            self._ours.add(number)
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if callable(before):
            before(number, frame)

    def news(self) -> set[int]:
        """What came since the last time, and whatever is to end us."""
        try:
            numbers = os.read(self.awake, 4096)
        except BlockingIOError:
            return set(self._ending)
        if self._others >= 0:
            with contextlib.suppress(OSError):  # gone, or full: then it wakes up
                os.write(self._others, numbers)
        news = set(numbers) & self._ours
        self._ending |= news & set(self.FATAL)
        return news | self._ending

    def stop(self) -> None:
        """What SIGTSTP would have done. Returns after SIGCONT."""
        note = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            signal.raise_signal(signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, note)

    def obey(self) -> None:
        """End by the signal that was to end us, if one was."""
        for number in self._ending:
            signal.raise_signal(number)
            raise SystemExit(128 + number)  # the first process of a container survives its signals

    def close(self) -> None:
        """Put the earlier handlers back. Idempotent."""
        while self._before:
            number = next(iter(self._before))
            signal.signal(number, self._before[number])
            del self._before[number]
        if self.awake >= 0:
            self.news()
            signal.set_wakeup_fd(self._others)
            os.close(self.awake)
            os.close(self._wake)
        self.awake = self._wake = self._others = -1


class Joint:
    """Both sides, and the loop that copies between them.

    The descriptors of the caller are shared with others, so they stay blocking: they are polled, and little
    is written at once (PIECE).
    """

    def __init__(self, near: Near, terminal: Terminal, far: Far, told: Told, keys: Keys) -> None:
        self._near, self._terminal, self._far, self._told, self._keys = near, terminal, far, told, keys
        self._typed, self._shown = bytearray(), bytearray()
        self._size: tuple[int, int] | None = None

    def run(self) -> Parting:
        """Until one side has gone or the keys to detach were typed."""
        self._resize()
        while not (self._far.done and not self._shown):
            if self._told.awake >= 0 and not self._heed(self._told.news()):
                return "hangup"
            reading = len(self._shown) < SHOWN_ROOM and not self._far.done
            ready = poll_once(self._wanted(reading), self._patience(reading))
            if self._told.awake < 0:
                self._resize()
            for _, data in self._far.take(ready, reading=reading):
                self._near.modes.see(data)  # already: we may end right after it was written
                self._shown += data
            if (parting := self._type(ready.get(self._near.stdin, 0))) is not None:
                return parting
            if ready.get(self._near.stdout, 0) & ~select.POLLIN and not self._show():
                return "hangup"
            if (events := ready.get(self._terminal.fileno(), 0)) & select.POLLOUT:
                self._pass_on(abandoned=bool(events & select.POLLHUP))
        return "ended"

    def _wanted(self, reading: bool) -> dict[int, int]:
        near, wanted = self._near, self._far.wanted(reading=reading)

        def want(fd: int, events: int) -> None:
            wanted[fd] = wanted.get(fd, 0) | events

        # after the end the rest of what is typed belongs to whoever reads our terminal next
        more = len(self._typed) < TYPED_ROOM and not self._far.done
        want(near.stdin, select.POLLIN if more else 0)
        if self._shown:
            want(near.stdout, select.POLLOUT)
        if self._typed and not self._far.done:
            want(self._terminal.fileno(), select.POLLOUT)
        if self._told.awake >= 0:
            want(self._told.awake, select.POLLIN)
        return wanted

    def _patience(self, reading: bool) -> float | None:
        limits = [self._far.patience if reading else None, LOOK if self._told.awake < 0 else None]
        return min((seconds for seconds in limits if seconds is not None), default=None)

    def _heed(self, news: set[int]) -> bool:
        """Do what signals ask for. False: one is about to end us, or our terminal has gone."""
        if news & set(Told.FATAL):
            return False
        if signal.SIGTSTP in news:
            self._near.leave()
            self._told.stop()
        if news & {signal.SIGTSTP, signal.SIGCONT}:
            try:
                self._near.again()
            except termios.error:  # hung up: the kernel sends SIGCONT then, too, and that may be all we hear
                return False
            if self._near.modes.alternate and self._size:  # have a full-screen program draw anew
                with contextlib.suppress(termios.error):
                    self._terminal.resize(self._size[0], self._size[1] + 1)
                self._size = None
        if news & {signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH}:
            self._resize()
        return True

    def _resize(self) -> None:
        size = self._near.size()
        if size is not None and size != self._size:
            self._size = size
            with contextlib.suppress(termios.error):  # the command's has gone
                self._terminal.resize(*size)

    def _type(self, events: int) -> Parting | None:
        """Take what was typed."""
        data = b""
        if events & select.POLLIN:
            with contextlib.suppress(OSError):  # EIO
                data = os.read(self._near.stdin, PIECE)
        elif not events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return None
        if not data:
            return "hangup"
        data, detach = self._keys.take(data)
        self._typed += data
        if detach:
            self._pass_on(abandoned=False)
        return "detached" if detach else None

    def _pass_on(self, *, abandoned: bool) -> None:
        """Give the command what was typed, as much as it takes now."""
        if not self._typed:
            return
        try:
            del self._typed[: os.write(self._terminal.fileno(), self._typed)]
        except BlockingIOError:
            if abandoned:  # full, and nobody to read it
                self._typed.clear()
        except OSError:
            self._typed.clear()

    def _show(self) -> bool:
        """Write a piece of the command's output. False: nobody can see it any more."""
        try:
            del self._shown[: os.write(self._near.stdout, self._shown[:PIECE])]
        except OSError:
            return False
        return True
