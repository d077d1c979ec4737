"""SIGKILL at random moments: of clients or managers in the midst of whatever they do, their spawners, inits,
launchers, commands. Nothing leaks, the records are true, whoever comes next sets everything right, and what
only lost its client goes on.

SANDBOXCORE_KILL9_ROUNDS (default: as below) says how often, SANDBOXCORE_KILL9_SEED repeats a run.
"""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import kill9
import kill9manager
import pytest
from support import host_environment

ROUNDS = int(os.environ.get("SANDBOXCORE_KILL9_ROUNDS", "0"))


@pytest.mark.slow
@pytest.mark.timeout(60 + 6 * max(ROUNDS, 20))
@pytest.mark.parametrize(
    ("program", "rounds", "enough"),  # to have had every kind of victim; a manager's command is seldom there
    [(kill9, 20, 20), (kill9manager, 12, 100)],
    ids=["clients", "managers"],
)
def test_kill9(tmp_path: Path, program: ModuleType, rounds: int, enough: int) -> None:
    rounds = ROUNDS or rounds
    seed = int(os.environ.get("SANDBOXCORE_KILL9_SEED") or int.from_bytes(os.urandom(3)))
    print(f"SANDBOXCORE_KILL9_SEED={seed}")
    command = [
        sys.executable,
        str(program.__file__),
        "conduct",
        str(tmp_path / "state"),
        str(rounds),
        str(seed),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=host_environment(),
        start_new_session=True,
    ) as conductor:  # fmt: skip
        try:
            output, errors = conductor.communicate(timeout=50 + 6 * rounds)
        finally:
            conductor.send_signal(signal.SIGKILL)
    print(errors)
    assert (conductor.returncode, errors) == (0, "")
    killed = ast.literal_eval(output)
    print(killed)
    assert sum(killed.values()) > rounds * 0.8
    assert set(killed) == set(kill9.VICTIMS) or rounds < enough
