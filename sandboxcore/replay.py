"""The output of a detached command with a terminal, for somebody who comes later: :class:`Replay`."""

import re
import select
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandboxcore.detached import DetachedCommand

PIECE = 16384
REST = 0.05  # seconds until the next look where nobody tells of news

# Questions to a terminal: DA, DSR, DECRQM, XTVERSION, OSC and DCS queries. They were asked long ago; the
# command would take the answer of today's terminal for something typed.
_QUESTION = re.compile(
    rb"\x1b(?:\[[>=?]?[\d;]{0,32}(?:[cn]|\$p)|\[>\d{0,8}q|\]\d{1,8};(?:\d{1,8};)?\?(?:\x07|\x1b\\)"
    rb"|P[+$]q[^\x1b]{0,256}\x1b\\|Z)"
)


class Replay:
    """What is kept, without the questions in it, then what comes, until the command has ended; as
    :func:`sandboxcore.terminal.attach` reads it (a :class:`~sandboxcore.terminal.Far`)."""

    def __init__(self, command: "DetachedCommand") -> None:
        self._command = command
        self._at, self._old = 0, command.written[0]
        self._more, self._deaf, self.done = True, False, False
        self._news = command._subscribe()

    @property
    def patience(self) -> float | None:
        """How long to wait for the next event, in seconds; None: for ever."""
        return 0.0 if self._more else REST if self._deaf else None

    def wanted(self, *, reading: bool = True) -> dict[int, int]:
        """What to poll for: news."""
        return {self._news.fileno(): select.POLLIN} if reading and not self._deaf else {}

    def take(self, ready: Mapping[int, int], *, reading: bool = True) -> Iterator[tuple[int, bytes]]:
        """The next piece, if there is one."""
        if not reading or self.done:
            return
        if not self._deaf and self._news.fileno() in ready:
            self._deaf = not self._news.recv(1)  # it has ended; or it has as many followers as it takes
        ended = not self._more and self._command.result is not None  # before the last look at its output
        log = self._command.logs(since=self._at, size=PIECE)
        self._at, self._more, self.done = log.end, bool(log.data), ended and not log.data
        if log.data:
            yield 1, log.data if log.offset >= self._old else _QUESTION.sub(b"", log.data)

    def close(self) -> None:
        """Hear no more. Idempotent."""
        self._news.close()
