"""What is killed at any moment: fault points are all changes of the file system that Python makes."""

import os
import signal
import sys
from collections.abc import Callable


def killed_at(count: int, action: Callable[[], None]) -> bool:
    """Whether a fork of this process was killed by its own hand, before it changed the file system for the
    so-many-th time."""
    if (child := os.fork()) == 0:
        left = count

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            changing = (
                event == "open"
                and isinstance(arguments[2], int)
                and arguments[2] & (os.O_CREAT | os.O_TMPFILE)
            )
            if changing or (event.startswith("os.") and event not in ("os.listdir", "os.scandir")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0
