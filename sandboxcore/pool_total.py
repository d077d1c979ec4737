"""What several pools have between them: how many may be ready, and whose place somebody else gets.
:class:`Total`."""

import contextlib
import os
import select
import threading
import time
import weakref
from typing import Protocol

from sandboxcore.errors import SandboxError
from sandboxcore.link import ANSWER_PATIENCE
from sandboxcore.sandbox import Sandbox

LOOK = 0.001  # seconds between two looks at what has been killed


class Holder(Protocol):
    """A pool, as somebody sees it who needs a place."""

    @property
    def last_used(self) -> float:
        """When somebody has claimed one, by the monotonic clock."""

    def yield_place(self) -> None:
        """Do not take the next place that is free, for a moment."""

    def give_up(self, *, warm: bool) -> bool:
        """End one that was given back, or one that is warm; False if there is none."""

    def passing(self) -> bool:
        """Whether some are on their way: they have a place, and nobody can give them up."""


class Total:
    """How many sandboxes several pools may have ready together, None: any number; and the places of all that
    they have and nobody has claimed, which are anybody's who needs one."""

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.moves = 0  # how often one has come to be ready, was claimed, or has ended
        self._moved = threading.Condition(threading.Lock())
        self._taken = 0
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()

    def take(self) -> bool:
        """Whether there may be one more; then it counts."""
        with self._moved:
            if self.most is not None and self._taken >= self.most:
                return False
            self._taken += 1
            return True

    def give(self) -> None:
        """One less."""
        with self._moved:
            self._taken -= 1

    # --- room -----------------------------------------------------------------------------------------

    def join(self, holder: Holder) -> None:
        """One more pool."""
        with self._moved:
            self._holders.add(holder)

    def move(self, *, given: int = 0) -> None:
        """Tell whoever waits for a place; ``given``: so many fewer are ready. The caller has the lock under
        which the lists have changed."""
        with self._moved:
            self._taken -= given
            self.moves += 1
            self._moved.notify_all()

    def make_room(self, since: int | None = None) -> bool:
        """Have one of all pools end that nobody has claimed, for somebody who needs its place: one that was
        given back, or else a warm one of the pool that nobody has used for longest. Where all are on their
        way, starting or ending, wait for the first of them. Takes 5 s at most.

        since: what ``moves`` was when there was no place; default now. False: there was none then, either.
        """
        with self._moved:
            since = self.moves if since is None else since
            holders = sorted(self._holders, key=lambda holder: holder.last_used)
        for holder in holders:
            holder.yield_place()
        if any(holder.give_up(warm=warm) for warm in (False, True) for holder in holders):
            return True
        deadline = time.monotonic() + ANSWER_PATIENCE
        while self.moves == since and time.monotonic() < deadline:
            if not [holder for holder in holders if holder.passing()]:
                break
            with self._moved:
                self._moved.wait_for(lambda: self.moves != since, LOOK)
        return self.moves != since


class Leaving:
    """Sandboxes that were killed, and for whose end nobody has waited. Each has its place until then.

    For one thread at a time.
    """

    def __init__(self) -> None:
        self._ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._ends)

    def add(self, end: int) -> None:
        """A descriptor from :func:`end_of`."""
        self._ends.append(end)

    def gone(self) -> int:
        """How many have ended since the last look."""
        poller = select.poll()
        for end in self._ends:
            poller.register(end, select.POLLIN)
        found = poller.poll(0)
        for end, _ in found:
            self._ends.remove(end)
            os.close(end)
        return len(found)

    def __del__(self) -> None:
        for end in self._ends:
            os.close(end)


def end_of(sandbox: Sandbox) -> int | None:
    """A descriptor that shows when it has ended, whatever becomes of the sandbox; None if it does not run, or
    there are no more descriptors."""
    link = sandbox._link
    if link is not None:
        with contextlib.suppress(OSError, SandboxError), link:
            return os.dup(link.pidfd)
    return None
