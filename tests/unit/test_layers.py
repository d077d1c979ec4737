"""Imports point down: ARCHITECTURE.md's table, checked."""

import ast
from pathlib import Path

import sandboxcore

PACKAGE = Path(sandboxcore.__file__).parent

# From the bottom up; modules of one row may not import each other.
LAYERS = (
    ("errors", "_core", "seccomp_calls"),
    ("statedir", "identity", "_native", "capabilities", "seccomp_policy"),
    ("seccomp", "places"),
    ("census", "room"),
    ("spec", "audit", "volume_image", "metrics"),
    ("host", "volumes", "tarstream"),
    ("unpack",),
    ("layerstore",),
    ("images",),
    ("criu", "tree", "cgroup_files", "cgroup_mounts"),
    ("cgroup_values",),
    ("cgroup_v1", "cgroup_v2"),
    ("cgroup_layout",),
    ("cgroup_group", "cgroup_scope"),
    ("cgroup",),
    ("plan",),
    ("request", "result", "spawner"),
    ("packing",),
    ("changes",),
    ("groups", "durable"),
    ("process", "lifecycle", "link", "archive"),
    ("commit", "events"),
    ("layers", "eventlog"),
    ("pipes", "records", "observers", "eventchain"),
    ("store", "session", "policy"),
    ("ledger",),
    ("command", "journal"),
    ("terminal", "replay"),
    ("detached",),
    ("fileops",),
    ("filetree",),
    ("files",),
    ("execution",),
    ("resources",),
    ("binds",),
    ("snapshots",),
    ("sandbox", "saved"),
    ("persistent_files", "template", "checkpoint", "recovery", "inhabitants"),
    ("persistent_commands",),
    ("persistent", "aio_loop", "aio_streams"),
    ("reconcile", "pool_policy", "pool_binding", "pool_reset", "selection"),
    ("pool_total",),
    ("pool_shelf",),
    ("pool_stock",),
    ("pool",),
    ("pools", "managed_session"),
    ("manager_metrics",),
    ("manager_stats", "directory"),
    ("keeping",),
    ("tenancy",),
    ("acquiring",),
    ("manager",),
    ("aio_exec", "aio_files"),
    ("aio_life", "aio_run"),
    ("aio_process", "aio_detached"),
    ("aio_sandbox",),
    ("aio_persistent", "aio_session", "aio_pool"),
    ("aio_keeping",),
    ("aio_manager",),
    ("aio",),
    ("cli_common", "cli_filter"),
    ("cli_manager", "cli_doctor"),
    ("cli_living", "cli_reading", "cli_resources", "cli_snapshots", "cli_volumes"),
    ("cli_keeping", "cli_sessions", "cli_events"),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in it; not those only for type checkers."""
    found = set()
    tree = ast.parse(path.read_text())
    hidden = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in hidden:
            parts = (node.module or "").split(".")
            if parts == ["sandboxcore"]:
                found |= {alias.name for alias in node.names} & LEVEL.keys()
            elif parts[0] == "sandboxcore":
                found.add(parts[1])
    return found


def test_every_module_has_a_layer() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == LEVEL.keys() - {"_core"}


def test_imports_point_down() -> None:
    upward = [
        f"{path.stem} -> {name}"
        for path in PACKAGE.glob("*.py")
        for name in imports(path)
        if LEVEL[name] >= LEVEL[path.stem]
    ]
    assert upward == []


def test_only_native_sees_the_compiled_module() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py") if "_core" in imports(path)} == {"_native"}
