"""What tests of asyncio share: a loop with a time limit, waiting in it, cancelling at every turn."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def play(main: Coroutine[Any, Any, T], seconds: float = 60) -> T:
    """Run a coroutine to its end, in a loop of its own."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await main

    return asyncio.run(bounded())


async def condition(check: Callable[[], Any], what: str, seconds: float = 10) -> Any:
    """The condition's value as soon as it is true, without stopping the loop."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        await asyncio.sleep(0.005)
    return value


async def cancelled_after(turns: int, work: Coroutine[Any, Any, Any]) -> bool:
    """Cancel a task after so many turns of the loop, each with a little time; whether that was before its
    end."""
    task = asyncio.create_task(work)
    for turn in range(turns):
        await asyncio.sleep(0 if turn % 2 else 0.0004)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False
