"""What a user's type checker says about the public names."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPETS = Path(__file__).parents[1] / "typing"


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
@pytest.mark.parametrize("name", ["right.py", "wrong.py"])
def test_snippets(name: str, tmp_path: Path) -> None:
    """Every line with a comment `# error: CODE` is refused with that code, and no other line is."""
    source = SNIPPETS / name
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--cache-dir",
            str(tmp_path),
            "--no-error-summary",
            str(source),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=SNIPPETS.parents[1],
    )
    lines = done.stdout.splitlines()
    found = {
        int(line.split(":")[1]): line.rpartition("[")[2].rstrip("]") for line in lines if " error: " in line
    }
    text = source.read_text().splitlines()
    expected = {n: line.partition("# error: ")[2] for n, line in enumerate(text, 1) if "# error: " in line}
    assert found == expected, done.stdout + done.stderr
