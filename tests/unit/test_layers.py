"""Imports inside the package point down only."""

import ast
from pathlib import Path

import sandboxcore

# From top to bottom. A module may import from the rows below its own, and never from the same row.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("process",),
    ("request", "spawner"),
    ("result",),
    ("plan",),
    ("tree",),
    ("host",),
    ("_native",),
    ("capabilities", "spec"),
    ("seccomp",),
    ("seccomp_policy",),
    ("errors", "seccomp_calls"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
PACKAGE = Path(sandboxcore.__file__).parent


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports when it is used: anywhere but for type checkers."""
    found = set()
    tree = ast.parse(path.read_text())
    skipped = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "sandboxcore":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sandboxcore."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("sandboxcore.")
            }
    return {name for name in found if not name.startswith("__") and name != "_core"}


def test_every_module_has_a_layer() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(LEVEL)


def test_imports_point_down() -> None:
    upward = [
        f"{path.stem} -> {target}"
        for path in PACKAGE.glob("*.py")
        if path.stem != "__init__"
        for target in imports(path)
        if LEVEL.get(target, -1) <= LEVEL[path.stem]
    ]
    assert upward == []


def test_only_one_module_knows_the_compiled_one() -> None:
    knowing = {path.stem for path in PACKAGE.glob("*.py") if "_core import" in path.read_text()}
    assert knowing == {"_native"}


def test_sizes() -> None:
    """A file is read in one go, a function on one screen."""
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 420, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                documentation = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or 0) - node.lineno - documentation.count("\n")
                assert lines <= 50, f"{path.name}: {node.name}"
