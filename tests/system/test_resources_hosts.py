"""Hosts that lack something: what is asked for is refused with a remedy, or left out and said so."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from resources import PATIENCE, needs, version
from support import host_environment, wait_until

import sandboxcore
from sandboxcore import cgroup

pytestmark = pytest.mark.cgroup

# Runs with the limits that it is given, and tells what was refused, or what was left out and what held.
ASK = """
    import json, sys
    from sandboxcore import Limits, Sandbox, SandboxSpec, UnsupportedHost, run
    told = []
    for limits, optional in json.loads(sys.argv[1]):
        accounting = limits.pop("accounting", False)
        spec = SandboxSpec(limits=Limits(**limits), optional=optional, accounting=accounting)
        try:
            fresh = run(["true"], spec=spec, record=True)
            with Sandbox.create(spec) as box:
                living = box.exec(["true"], record=True)
            assert (fresh.returncode, living.returncode) == (0, 0)
            assert fresh.capabilities.omitted == living.capabilities.omitted
            told.append(["runs", list(fresh.capabilities.omitted), fresh.usage.memory_peak is not None])
        except UnsupportedHost as error:
            told.append(["refused", error.feature, str(error)])
    print(json.dumps(told))
"""


def ask(*questions: tuple[dict[str, Any], list[str]], prefix: tuple[str, ...] = (), **more: str) -> Any:
    """The answers of a process in such an environment."""
    command = [*prefix, sys.executable, "-c", textwrap.dedent(ASK), json.dumps(questions)]
    environment = host_environment() | more
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LIMITS = {"memory": "64M", "cpus": 0.5, "cpu_weight": 50, "io": "10M", "cpuset": "0"}
REFUSALS = [({name: value}, []) for name, value in LIMITS.items()]


# --- no group for us ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_limit_is_refused_with_a_remedy() -> None:
    """The same whoever we are: the group that we are told to use is not there."""
    answers = ask(*REFUSALS, ({"accounting": True}, []), SANDBOXCORE_CGROUP="/sys/fs/cgroup/nowhere")
    for name, (what, feature, text) in zip([*LIMITS, "accounting"], answers, strict=True):
        assert what == "refused"
        assert feature == ("accounting" if name == "accounting" else f"limits.{name}")
        assert "SANDBOXCORE_CGROUP=/sys/fs/cgroup/nowhere: No such file or directory" in text


@pytest.mark.slow
def test_what_is_optional_is_left_out_and_said() -> None:
    names = ["memory", "cpus", "cpu_weight", "io", "accounting"]
    limits = {name: value for name, value in LIMITS.items() if name != "cpuset"}
    one, all_of_them, not_this_one = ask(
        ({"memory": "64M"}, ["memory"]),
        (limits | {"accounting": True}, names),
        ({"memory": "64M", "cpus": 1}, ["memory"]),
        SANDBOXCORE_CGROUP="/sys/fs/cgroup/nowhere",
    )
    assert one == ["runs", ["limits.memory"], False]
    assert all_of_them[0] == "runs"
    assert sorted(all_of_them[1]) == ["accounting", *sorted(f"limits.{name}" for name in limits)]
    assert not_this_one[:2] == ["refused", "limits.cpus"]


def test_what_is_optional_and_to_be_had_is_not_left_out() -> None:
    needs("memory")
    assert ask(({"memory": "64M"}, ["memory"])) == [["runs", [], True]]


def test_who_was_given_nothing() -> None:
    """As this user, here; a user without delegation gets the remedy that the layout has."""
    found = cgroup.layout()
    missing = [name for name in ("memory", "cpu", "io", "cpuset") if name not in found.versions]
    if not missing:
        pytest.skip("only root can do this without: this user has every controller")
    limit = {"memory": "memory", "cpu": "cpus", "io": "io", "cpuset": "cpuset"}
    for name in missing:
        [(what, feature, text)] = ask(({limit[name]: LIMITS[limit[name]]}, []))
        assert (what, feature) == ("refused", f"limits.{limit[name]}")
        assert found.remedies[name] in text
        if name not in ("io",):
            assert name in text


@pytest.mark.needs_root
def test_another_user_is_told_what_to_do() -> None:
    """Somebody to whom nothing is delegated, on this machine."""
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv on PATH")
    user = ("setpriv", "--reuid", "61234", "--regid", "61234", "--clear-groups")
    code = "import json; from sandboxcore.cgroup import layout; print(json.dumps(layout().remedies))"
    command = [*user, sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=host_environment(), timeout=PATIENCE)
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("only root can do this here: nobody else may read this checkout")
    assert done.returncode == 0, done.stderr
    remedies = json.loads(done.stdout)
    assert "61234" in remedies["memory"]
    assert "memory" in remedies["memory"]
    assert "delegate" in remedies["memory"].lower()


# --- a cgroup file system that is read-only -----------------------------------------------------------

READ_ONLY = """
    grep -E ' cgroup2? ' /proc/self/mounts | while read -r device place rest; do
        mount -o remount,bind,ro "$place" || exit 9
    done
    exec "$@"
"""


@pytest.mark.needs_root
@pytest.mark.needs_program("unshare", "mount")
def test_read_only() -> None:
    """As in containers. Only the mounts of a namespace of the test's own are."""
    needs("memory")
    prefix = ("unshare", "--mount", "sh", "-c", textwrap.dedent(READ_ONLY), "sh")
    refused, left_out = ask(({"memory": "64M"}, []), ({"memory": "64M"}, ["memory"]), prefix=prefix)
    assert refused[:2] == ["refused", "limits.memory"]
    assert "read-only" in refused[2]
    assert "/sys/fs/cgroup" in refused[2]
    assert left_out == ["runs", ["limits.memory"], False]


# --- some controllers only ----------------------------------------------------------------------------


def test_fewer_controllers() -> None:
    """A group of version 2 that was given memory and pids, as systemd by default delegates to users."""
    needs("memory", "pids", "cpu")
    if version("memory") == 1:
        pytest.skip("controllers of version 1 are not delegated one by one: use cgroup v2")
    assert sandboxcore.run(["true"], spec=sandboxcore.SandboxSpec(accounting=True)).ok  # enables them
    parent = cgroup.layout().v2
    assert parent is not None
    outer = parent / f"sandboxcore-test-{os.getpid()}"
    inner = outer / "given"
    outer.mkdir()
    try:
        (outer / "cgroup.subtree_control").write_text("+memory +pids")
        inner.mkdir()
        held, cpus, both = ask(
            ({"memory": "64M"}, []),
            ({"cpus": 0.5}, []),
            ({"memory": "48M", "cpus": 0.5}, ["cpus"]),  # another group: its peak is new
            SANDBOXCORE_CGROUP=str(inner),
        )
        assert held == ["runs", [], True]
        assert cpus[:2] == ["refused", "limits.cpus"]
        assert "the cpu controller" in cpus[2]
        assert both == ["runs", ["limits.cpus"], True]
    finally:
        for group in (inner, outer):
            wait_until(lambda group=group: _removed(group), f"the end of {group}", PATIENCE)


def _removed(group: Path) -> bool:
    for path in sorted((*group.rglob("*/"), group), key=lambda path: -len(path.parts)):
        if path.is_dir():
            try:
                path.rmdir()
            except OSError:
                return False
    return not group.exists()
