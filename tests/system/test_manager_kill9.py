"""SIGKILL at random moments, of managers in the midst of whatever they do, their spawners, inits, launchers,
commands. The next manager sets everything right: nothing leaks, the records are true, and what only lost its
manager goes on.

SANDBOXCORE_KILL9_ROUNDS (default 12) says how often, SANDBOXCORE_KILL9_SEED repeats a run.
"""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import kill9
import kill9manager
import pytest
from support import host_environment

ROUNDS = int(os.environ.get("SANDBOXCORE_KILL9_ROUNDS", "12"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 6 * ROUNDS)
def test_manager_kill9(tmp_path: Path) -> None:
    seed = int(os.environ.get("SANDBOXCORE_KILL9_SEED") or int.from_bytes(os.urandom(3)))
    print(f"SANDBOXCORE_KILL9_SEED={seed}")
    command = [
        sys.executable,
        kill9manager.__file__,
        "conduct",
        str(tmp_path / "state"),
        str(ROUNDS),
        str(seed),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=host_environment(),
        start_new_session=True,
    ) as conductor:  # fmt: skip
        try:
            output, errors = conductor.communicate(timeout=50 + 6 * ROUNDS)
        finally:
            conductor.send_signal(signal.SIGKILL)
    print(errors)
    assert (conductor.returncode, errors) == (0, "")
    killed = ast.literal_eval(output)
    print(killed)
    assert sum(killed.values()) > ROUNDS * 0.8
    assert set(killed) == set(kill9.VICTIMS) or ROUNDS < 100  # a command is seldom there
