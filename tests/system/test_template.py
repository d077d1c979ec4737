"""A script runs once, and sandboxes begin where it has ended."""

import threading
from pathlib import Path
from typing import Any

import pytest
from support import Spec, host_program, leaves_nothing
from trees import ok

from sandboxcore import CommandFailed, SandboxTimeout, SnapshotStore, SpecError, Template

pytestmark = pytest.mark.usefixtures("overlays")

SCRIPT = """
mkdir -p /opt/app; cp seed /opt/app/data; echo $MORE >> /opt/app/data; head -c 8 /dev/urandom > /opt/app/id
"""


def template(**options: Any) -> Template:
    spec = Spec(writable=True)
    return Template(spec, SCRIPT, files={"seed": b"one\n"}, env={"MORE": "two"}, **options)


def test_it_runs_once() -> None:
    made, found = template(), []

    def begin() -> None:
        with made.sandbox() as sandbox:
            found.append(ok(sandbox, "cat /opt/app/data /opt/app/id; echo mine > /opt/app/data"))

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert set(found) == {found[0]}
    assert found[0].startswith(b"one\ntwo\n")
    first = made.snapshot()
    assert made.snapshot() is first
    assert made.snapshot(rebuild=True) is not first
    begin()
    assert found[4] != found[0]


def test_once_for_all_processes(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "state")
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent)]!r}
from test_template import *
with template(store=SnapshotStore({str(tmp_path / "state")!r})).sandbox() as sandbox:
    print(ok(sandbox, "cat /opt/app/data; od -x /opt/app/id").decode())
"""
    done = [host_program(program, timeout=60) for _ in range(2)]
    assert not done[0].stderr
    assert done[0].stdout.startswith("one\ntwo\n")
    assert done[0].stdout == done[1].stdout
    assert [one.name for one in store.list()] == [template().name]
    other = Template(Spec(writable=True), SCRIPT + " ", files={"seed": b"one\n"}, env={"MORE": "two"})
    assert other.name != template().name


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "state")
    template().snapshot().close()  # a spawner, and its shelf
    broken = Template(Spec(writable=True), "echo so far; echo why >&2; false; echo no", store=store)
    with leaves_nothing(), pytest.raises(CommandFailed) as failed:
        broken.snapshot()
    assert (failed.value.result.stdout, failed.value.result.stderr) == (b"so far\n", b"why\n")
    slow = Template(Spec(writable=True), "echo so far; sleep 100", store=store, timeout=0.3)
    with leaves_nothing(), pytest.raises(SandboxTimeout) as late:
        slow.sandbox()
    assert late.value.result.stdout == b"so far\n"
    assert store.list() == []
    assert store.gc() == ()
    with pytest.raises(SpecError, match="nothing of what the script writes"):
        Template(Spec(), "true")
