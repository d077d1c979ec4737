"""BEHAVIOURS.md: every row names tests that exist, or says why there is none."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROW = re.compile(r"\| (?P<behaviour>[^|]+) \| (?P<shown>[^|]+) \|")


def rows() -> list[tuple[str, str]]:
    lines = (TESTS / "BEHAVIOURS.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    found = [ROW.fullmatch(line) for line in table if line not in ("| Behaviour | Shown by |", "|---|---|")]
    assert None not in found
    return [(match["behaviour"], match["shown"]) for match in found if match]


@functools.cache
def contents(path: str) -> frozenset[str]:
    """Functions, and classes, of a file's top level that pytest takes for tests."""
    body = ast.parse((TESTS / path).read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return frozenset(name for name in names if name.startswith(("test_", "Test")))


def test_every_row_names_tests_that_exist() -> None:
    assert len(rows()) > 90
    for behaviour, shown in rows():
        named = re.findall(r"`([a-z0-9_/]+\.py)::(\w+)`", shown)
        assert named or re.match(r"out of scope: .", shown), behaviour
        for path, name in named:
            assert name in contents(path), f"{behaviour}: {path}::{name}"


def test_every_test_of_the_manager_is_of_a_manager() -> None:
    """Each part of the manager's tests shows something that is listed."""
    shown = (TESTS / "BEHAVIOURS.md").read_text()
    for path in sorted((TESTS / "system").glob("test_manager*.py")):
        assert f"`system/{path.name}::" in shown, path.name
