"""What every test may ask for, and how a missing feature of the host becomes a skip or a failure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PYTHON, compile_objects, compile_static

import sandboxcore
from sandboxcore import host

CSRC = Path(__file__).parents[1] / "csrc"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The needs_* markers of pyproject.toml."""
    reasons = []
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        reasons.append("only root can do this")
    for marker in item.iter_markers("needs_program"):
        reasons += [f"no {name} on PATH" for name in marker.args if not shutil.which(name)]
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    """rw= as root needs id-mapped mounts, which a file system such as a container's overlay lacks; what is
    written to an overlay needs a kernel that is not too old."""
    try:
        return (yield)
    except sandboxcore.UnsupportedHost as error:
        if not error.feature.startswith(("an id-mapped mount", "an overlay that is written to")):
            raise
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """SANDBOXCORE_MUST_WORK=1: whatever the host lacks is a failure. Being somebody else is not."""
    report = yield
    if report.skipped and os.environ.get("SANDBOXCORE_MUST_WORK") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "only root can do this" not in reason:
            report.outcome, report.longrepr = "failed", f"SANDBOXCORE_MUST_WORK: {reason}"
    return report


@pytest.fixture(scope="session")
def toolbox(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A static program for roots that have nothing else: ls, cat, write, id, readlink."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc on PATH")
    return compile_static(tmp_path_factory.mktemp("toolbox") / "toolbox")


@pytest.fixture(scope="session")
def fault_helper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spawner of which any call after clone can be made to fail."""
    sys.path.insert(0, str(CSRC))
    from build_core import CFLAGS, HELPER_SOURCES

    directory = tmp_path_factory.mktemp("fault")
    objects = compile_objects([CSRC / name for name in HELPER_SOURCES], directory, *CFLAGS, "-DSBX_FAULT")
    helper = directory / "_spawner"
    subprocess.run(["gcc", *CFLAGS, "-static", *objects, "-o", helper], check=True, timeout=60)
    return helper


@pytest.fixture(scope="session")
def overlays() -> None:
    """For tests that need them. A host without them says so, which has a test of its own."""
    if not host.features().tmpfs_xattr:
        pytest.skip("files in memory have no extended attributes here: needs Linux 6.6")


@pytest.fixture(scope="session", autouse=True)
def python_inside() -> None:
    """Most payloads are Python programs; a sandbox by default sees only /usr."""
    if not os.access(PYTHON, os.X_OK):
        pytest.exit(f"the tests need {PYTHON} for their payloads", 1)
