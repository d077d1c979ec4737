"""The verbs about files at earlier moments."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support import host_environment
from trees import make_source

pytestmark = [pytest.mark.usefixtures("overlays"), pytest.mark.once]


def test_names_that_a_payload_has_made_up(tmp_path: Path) -> None:
    """Neither to the terminal, nor in the way of what comes after them."""
    source = make_source(tmp_path / "source")
    environment = {
        **host_environment(),
        "SANDBOXCORE_STATE_DIR": str(tmp_path / "state"),
        "LC_ALL": "C.UTF-8",
    }

    def cli(*args: str) -> bytes:
        done = subprocess.run(
            [sys.executable, "-m", "sandboxcore", *args], env=environment, capture_output=True,
            stdin=subprocess.DEVNULL, timeout=60, check=True,
        )  # fmt: skip
        assert done.stderr == b""
        return done.stdout

    cli("create", "--overlay", f"{source}:/data", "box")
    try:
        script = r"""cd /data; for end in '\033[2J' '\377' z; do : > "$(printf a$end)"; done"""
        cli("exec", "box", "--", "sh", "-c", script)
        told = b"A /data/a?[2J 0\nA /data/az 0\nA /data/a? 0\n"
        for verb in (["diff"], ["commit", "--dry-run"], ["commit"]):
            assert cli(*verb, "box") == told
        assert os.path.exists(os.fsencode(source) + b"/a\377")
    finally:
        cli("rm", "-f", "box")


def test_a_whole_life(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    environment = {**host_environment(), "SANDBOXCORE_STATE_DIR": str(tmp_path / "state")}

    def cli(*args: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sandboxcore", *args], env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    cli("create", "--writable", "--overlay", f"{source}:/data", "box")
    try:
        cli("exec", "box", "--", "sh", "-c", "echo new > /data/new; rm /data/g")
        assert cli("snapshot", "box", "one") == "one\n"
        cli("exec", "box", "--", "sh", "-c", "mkdir /made; echo later > /data/new")
        assert cli("diff", "box", "one") == "M /data/new 6\nA /made/\n"
        changes = json.loads(cli("diff", "box", "--json"))
        assert {change["path"]: change["kind"] for change in changes} == {
            "/data/g": "removed", "/data/new": "added", "/made": "added",
        }  # fmt: skip
        assert cli("fork", "box", "two") == "two\n"
        assert cli("exec", "two", "--", "cat", "/data/new") == "later\n"
        cli("restore", "box", "one")
        assert cli("exec", "box", "--", "cat", "/data/new") == "new\n"
        assert "one" in cli("snapshot", "box", "one", status=125)
        planned = cli("commit", "--dry-run", "box")
        assert planned == cli("commit", "box", "/data") == "D /data/g\nA /data/new 4\n"
        assert (source / "new").read_text() == "new\n"
        cli("export", "one", str(tmp_path / "one.tar"))
        with tarfile.open(tmp_path / "one.tar") as tar:
            assert "files/data/new" in tar.getnames()
        cli("import", str(tmp_path / "one.tar"), "copy", "one")
        assert [one["name"] for one in json.loads(cli("snapshots", "--json"))] == ["one", "copy"]
        assert cli("fork", "--from-snapshot", "copy", "three") == "three\n"
        assert cli("exec", "three", "--", "cat", "/data/new") == "new\n"
        assert "NAME" in cli("snapshots")
        cli("rm-snapshot", "one", "copy")
        assert "'copy'" in cli("rm-snapshot", "copy", status=125)
    finally:
        cli("rm", "-f", "box", "two", "three")
    assert "removed layer" in cli("gc")
    assert cli("gc") == ""
