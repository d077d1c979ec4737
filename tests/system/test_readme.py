"""What README shows is what happens."""

import doctest
import shlex
from pathlib import Path

import pytest

import sandboxcore

README = Path(__file__).parents[2] / "README.md"


def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(tmp_path))
    outcome = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted >= 6
    assert outcome.failed == 0


def test_the_shell_example() -> None:
    text = README.read_text()
    command, *output = text[text.index("$ sandboxcore run -- sh -c") :].splitlines()[:5]
    argv = shlex.split(command.partition("-- ")[2])
    done = sandboxcore.run(argv, stderr=sandboxcore.STDOUT, text=True)
    shown = {word for line in output for word in line.split()}
    seen = set(done.stdout.split())
    # the host decides whether it has /lib32 and the like; the rest is the same everywhere
    assert shown <= seen
    assert seen - shown <= {"lib32", "libx32"}
