"""What tests of sandboxes that outlive their process, or an event loop, share."""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loops import condition, play
from support import leaves_nothing

import sandboxcore
from sandboxcore import SandboxNotFound, aio
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.recovery import list_sandboxes

PATIENCE = 30
SLEEP = ["sleep", "300"]
TURNS = 25
Action = Callable[[aio.Sandbox], Awaitable[None]]


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory, empty again at the end."""
    yield tmp_path / "state"
    for record in list_sandboxes(tmp_path / "state"):
        with contextlib.suppress(SandboxNotFound):
            PersistentSandbox.connect(record.id, state_dir=tmp_path / "state").destroy()


@pytest.fixture(params=["private", "persistent"])
def living(request: pytest.FixtureRequest, state: Path) -> Callable[[Action], None]:
    """Plays with a running sandbox of either kind, after which nothing is left."""

    def run(action: Action) -> None:
        async def main() -> None:
            if request.param == "private":
                sandbox: aio.Sandbox = await aio.Sandbox.create()
            else:
                sandbox = await aio.PersistentSandbox.create(name="box", state_dir=state)
            try:
                await action(sandbox)
            finally:
                await sandbox.destroy()

        with leaves_nothing():
            play(main())
            gc.collect()
        if request.param == "persistent":
            assert entries(state) == []

    return run


def entries(state: Path) -> list[str]:
    """What there is of sandboxes on disk."""
    return sorted(os.listdir(state / "sandboxes"))


def sh(script: str, *args: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *args]


def mark() -> str:
    return f"aio-{os.getpid()}-{time.monotonic_ns()}"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def in_log(command: aio.DetachedCommand, text: bytes) -> bytes:
    await condition(lambda: text in command.logs().data, f"{text!r} in stdout", PATIENCE)
    return command.logs().data


@contextlib.asynccontextmanager
async def ticking(longest: float) -> Any:
    """The loop is never held for longer than so many seconds."""
    gaps = [0.0]

    async def tick() -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
    assert max(gaps) < longest


async def collect(command: aio.DetachedCommand) -> list[Any]:
    return [event async for event in command.follow()]
