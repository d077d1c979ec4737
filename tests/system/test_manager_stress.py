"""Two processes use one state directory at the same time, with 8 threads and 200 tasks each: nothing leaks,
no sandbox has two users at once, and there are never more than there may be.

SANDBOXCORE_STRESS_SECONDS (default 4) says for how long, SANDBOXCORE_STRESS_SEED repeats a run.
"""

import ast
import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stress
from support import host_environment, wait_until

from sandboxcore import SandboxManager, aio
from sandboxcore.events import EventKind

SECONDS = float(os.environ.get("SANDBOXCORE_STRESS_SECONDS", "4"))


@pytest.mark.slow
@pytest.mark.timeout(200 + 2 * SECONDS)
def test_stress(tmp_path: Path) -> None:
    seed = int(os.environ.get("SANDBOXCORE_STRESS_SEED") or int.from_bytes(os.urandom(3)))
    print(f"SANDBOXCORE_STRESS_SEED={seed}")
    command = [sys.executable, stress.__file__, "conduct", str(tmp_path / "state"), str(SECONDS), str(seed)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=host_environment(),
        start_new_session=True,
    ) as conductor:  # fmt: skip
        try:
            output, errors = conductor.communicate(timeout=190 + 2 * SECONDS)
        finally:
            conductor.send_signal(signal.SIGKILL)
    print(errors, output)
    assert conductor.returncode == 0
    tally, places, inits, looks, left, groups, failures = ast.literal_eval(output)
    assert failures == 0, errors
    assert 0 < places <= stress.MAXIMUM
    assert 0 < inits <= stress.MAXIMUM
    assert looks > SECONDS
    assert (left, groups) == ([{}, {}], [])
    moves = ["acquired", "came back", "suspend", "leave", "no room"]
    if SECONDS >= 30:  # they are rare
        moves += ["touch", "run_pooled", "run_ephemeral", "brief: ended"]
    assert all(tally.get(move) for move in moves) or SECONDS < 3, tally


def test_a_sweep_does_not_start_what_it_destroys(tmp_path: Path) -> None:
    with SandboxManager(tmp_path / "state", max_sandboxes=1, sweep_interval=None) as manager:
        box = manager.create(start=False, ttl=0.001)
        heard: list[str] = []
        manager.events.subscribe(lambda event: heard.append(event.kind))
        wait_until(manager.expired, "the end of its time")
        assert manager.reconcile().deleted == (box.id,)
        assert EventKind.SANDBOX_STARTED not in heard
        assert not manager.exists(box.id)


def test_a_task_that_needs_no_room_does_not_wait_for_it(tmp_path: Path) -> None:
    """While others wait in turn for a place, a client still finds what it has left."""

    async def main() -> None:
        async with aio.SandboxManager(tmp_path / "state", max_sandboxes=1, sweep_interval=None) as manager:
            first = await manager.acquire(client_id="a")
            waiting = asyncio.create_task(manager.acquire(client_id="b", wait=None))
            while not manager._turn.locked():
                await asyncio.sleep(0.01)
            await first.detach()
            again = await manager.acquire(client_id="a", wait=30)
            assert again.id == first.id
            found = await manager.attach(first.sandbox_id, "c")
            await asyncio.gather(found.session.release(), again.release())
            await (await asyncio.wait_for(waiting, 30)).release()

    asyncio.run(asyncio.wait_for(main(), 90))
