"""How many sandboxes of one state directory there may be at once: :class:`Room`."""

import contextlib
import os
import select
import time
from collections.abc import Iterator

from sandboxcore import _native
from sandboxcore.errors import TooManySandboxes
from sandboxcore.places import Places, checked_maximum
from sandboxcore.statedir import StatePath, private_directory, state_path

FILE = "room"  # in the state directory, made with the first place that is taken

_SHORTEST, _LONGEST, _BLIND = 0.001, 1.0, 0.05  # seconds between two looks; with nothing that tells of news


class Room:
    """Places for the living sandboxes of a state directory, over all processes.

    A sandbox holds its place by its init: the kernel gives it back when that is gone, however that happens.
    A place that anybody took counts for everybody, also where processes have different maxima.

    Parameters
    ----------
    state_dir: as for :class:`PersistentSandbox`.
    maximum: None for no limit; then nothing is counted. Raises :class:`SpecError`.
    """

    def __init__(self, state_dir: StatePath = None, maximum: int | None = None) -> None:
        self.maximum = None if maximum is None else checked_maximum(maximum)
        self.state_dir = state_path(state_dir)
        self._places = Places(self.state_dir / FILE)

    def take(self) -> int:
        """A place: a descriptor, for :func:`sandboxcore.statedir.close_lock`, which gives it back unless an
        init has it, too; -1 where there is no limit. Raises :class:`TooManySandboxes`, and
        :class:`SandboxError` for a directory that others may change."""
        if self.maximum is None:
            return -1
        private_directory(self.state_dir)
        fd = self._places.take(self.maximum)
        if fd < 0:
            raise TooManySandboxes(self.maximum, str(self.state_dir))
        return fd

    def taken(self) -> int:
        """How many places are taken now, also by those who know another maximum."""
        return self._places.taken()

    def free(self) -> int | None:
        """How many more sandboxes there may be now; None: any number."""
        return None if self.maximum is None else max(0, self.maximum - self.taken())

    @contextlib.contextmanager
    def news(self) -> Iterator[int]:
        """A descriptor that becomes readable when a place may just have been given back, in a moment at the
        latest: what is free then shows at the second look. -1 where there is no file yet, or the kernel has
        no more such descriptors for this user. See :func:`hear`."""
        fd = -1
        with contextlib.suppress(OSError):
            fd = _native.watch_closes(os.fspath(self._places.path))
        try:
            yield fd
        finally:
            if fd >= 0:
                os.close(fd)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there may be a free place, at most ``timeout`` seconds, None: for ever; False if there
        is none. Somebody else may be faster."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self.free() != 0:
            return True
        with self.news() as fd:
            poller = select.poll()
            if fd >= 0:
                poller.register(fd, select.POLLIN)
            pause = _SHORTEST
            while self.free() == 0:
                left = _LONGEST if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    return False
                if poller.poll(1000 * min(left, pause)):
                    hear(fd)
                    pause = _SHORTEST  # the kernel tells of it first, and unlocks then
                else:
                    pause = min(2 * pause, _LONGEST if fd >= 0 else _BLIND)
        return True


def hear(fd: int) -> None:
    """Take what made the descriptor of :meth:`Room.news` readable."""
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass
