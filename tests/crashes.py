"""What is killed at any moment: fault points are all changes of the file system that Python makes."""

import os
import signal
import sys
from collections.abc import Callable


def kill_me_at(count: int) -> None:
    """Kill this process by its own hand, before it changes the file system for the so-many-th time."""
    left = count

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        flags = arguments[2] if event == "open" else 0
        changing = isinstance(flags, int) and flags & (os.O_CREAT | os.O_TMPFILE)
        if changing or (event.startswith("os.") and event not in ("os.listdir", "os.scandir")):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_at(count: int, action: Callable[[], None]) -> bool:
    """Whether a fork of this process was killed so."""
    if (child := os.fork()) == 0:
        try:
            kill_me_at(count)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
