"""The package's face: what it exports, and what importing it costs."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sandboxcore

# What a program that only imports the package must not pay for.
HEAVY = {
    "cffi",
    "click",
    "pyseccomp",
    "subprocess",
    "dataclasses",
    "json",
    "hashlib",
    "tomllib",
    "asyncio",
    "logging",
}


def bare(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = str(Path(sandboxcore.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {path!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", *options, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


def test_all_is_what_is_there() -> None:
    assert sandboxcore.__all__ == sorted(
        set(sandboxcore.__all__), key=lambda name: (not name.isupper(), name)
    )
    for name in sandboxcore.__all__:
        assert getattr(sandboxcore, name) is not None
    assert set(sandboxcore.__all__) <= set(dir(sandboxcore))
    declared = {name for names in sandboxcore._HOME.values() for name in names}
    assert declared == set(sandboxcore.__all__)


def test_star_import() -> None:
    names: dict[str, object] = {}
    exec("from sandboxcore import *", names)
    assert set(sandboxcore.__all__) <= set(names)


def test_every_public_object_says_what_it_is() -> None:
    for name in sandboxcore.__all__:
        value = getattr(sandboxcore, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
            assert value.__module__.startswith("sandboxcore."), name
            for member, function in inspect.getmembers(value, inspect.isfunction):
                if not member.startswith("_") and function.__module__.startswith("sandboxcore"):
                    assert inspect.getdoc(function), f"{name}.{member}"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        sandboxcore.no_such_name  # noqa: B018
    assert not hasattr(sandboxcore, "__wrapped__")


def test_submodules_are_found() -> None:
    done = bare("import sandboxcore.spec, sandboxcore; print(sandboxcore.spec.__name__)", "-W", "error")
    assert done.stdout == "sandboxcore.spec\n"


def test_import_loads_nothing_else() -> None:
    code = "before = set(sys.modules); import sandboxcore; print(*sorted(set(sys.modules) - before))"
    loaded = set(bare(code).stdout.split())
    assert "sandboxcore" in loaded
    assert not loaded & HEAVY
    count = len(
        bare("before = set(sys.modules); import subprocess; print(*set(sys.modules) - before)").stdout.split()
    )
    assert len(loaded) <= 2 * count


def microseconds(module: str) -> int:
    """The best of several imports of one module with all that it imports."""
    best = sys.maxsize
    for _ in range(7):
        lines = bare(f"import {module}", "-X", "importtime").stderr.splitlines()
        for line in lines:
            _, cumulative, name = line.removeprefix("import time:").split("|")
            if name.strip() == module:
                best = min(best, int(cumulative))
    return best


def test_import_is_as_cheap_as_that_of_subprocess() -> None:
    assert microseconds("sandboxcore") <= 2 * microseconds("subprocess")


def test_typed() -> None:
    assert Path(sandboxcore.__file__).with_name("py.typed").exists()


def test_version() -> None:
    assert sandboxcore.__version__.count(".") == 2
