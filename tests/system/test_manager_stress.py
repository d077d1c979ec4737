"""Two processes use one state directory at the same time, with 8 threads and 200 tasks each: nothing leaks,
no sandbox has two users at once, and there are never more than there may be.

SANDBOXCORE_STRESS_SECONDS (default 4) says for how long, SANDBOXCORE_STRESS_SEED repeats a run.
"""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import stress
from support import host_environment

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
    moves = ("acquired", "came back", "suspend", "leave", "touch", "no room", "run_pooled", "run_ephemeral")
    assert all(tally.get(move) for move in moves) or SECONDS < 3, tally
