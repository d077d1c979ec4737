"""What tests of pools share."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from support import wait_until

from sandboxcore import PoolConfig, Sandbox, SandboxPool, SandboxSpec

PATIENCE = 20  # seconds for a pool to be ready


@contextmanager
def ready(spec: SandboxSpec | None = None, **config: Any) -> Iterator[SandboxPool]:
    """A pool that has what it wants to have."""
    config = {"min_warm": 1, "max_warm": 4} | config
    with SandboxPool(spec, PoolConfig(**config)) as pool:
        assert pool.wait_ready(PATIENCE)
        yield pool


class Events:
    """What an observer has heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, data: Any) -> None:
        self.heard.append((kind, dict(data)))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in list(self.heard) if name == kind]


def kill(sandbox: Sandbox) -> None:
    """End it as an administrator might."""
    pid = sandbox.pid
    link = sandbox._link
    assert link is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not link.alive(), "its end")


def members(pool: Any) -> list[Sandbox]:
    """What nobody has claimed."""
    return [member.sandbox for member in list(pool._stock._members)]


def in_threads(count: int, work: Callable[[int], Any], seconds: float = 60) -> None:
    """Do something in so many threads at once; what one raises is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(seconds)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
