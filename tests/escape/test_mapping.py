"""README.md promises tests for threats; this holds it to that."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.escape

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", (HERE / "README.md").read_text(), re.MULTILINE)
NAMES = [(threat, re.findall(r"`(\w+::\w+)`", tests)) for threat, tests in ROWS]
TRIED = {threat: names for threat, names in NAMES if names and "`" not in re.sub("`.*?`", "", threat)}


def existing() -> set[str]:
    found = set()
    for path in HERE.glob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.add(f"{path.stem.removeprefix('test_')}::{node.name}")
    return found


def test_every_threat_has_its_tests() -> None:
    assert len(TRIED) > 50
    missing = {name for names in TRIED.values() for name in names} - existing()
    assert not missing


def test_every_test_is_for_a_threat() -> None:
    promised = {name for names in TRIED.values() for name in names}
    forgotten = {name for name in existing() - promised if not name.startswith("mapping::")}
    assert not forgotten


def test_the_tables_are_whole() -> None:
    """Every line of the first table names tests; every line of the second gives a reason."""
    tried, _, not_tried = (HERE / "README.md").read_text().partition("## What is not tried here")
    for table, wants_tests in ((tried, True), (not_tried, False)):
        lines = [line for line in table.splitlines() if line.startswith("|")][2:]
        assert lines
        for line in lines:
            _, threat, content, _ = line.split("|")
            assert threat.strip()
            assert ("::test_" in content) if wants_tests else content.strip()
