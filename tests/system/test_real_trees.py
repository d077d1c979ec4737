"""What people do: a repository with its build, and a virtual environment with what is installed into it,
through snapshot, change, diff, restore, fork and commit."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from support import PYTHON, Spec, snapshot
from trees import given_away, manifest, ok

from sandboxcore import Sandbox

pytestmark = pytest.mark.usefixtures("overlays")

MAKEFILE = """
all: prog
prog: main.py lib.py
\tcat lib.py main.py > prog && chmod +x prog
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    path = tmp_path / "repo"
    path.mkdir()
    (path / "Makefile").write_text(MAKEFILE)
    (path / "main.py").write_text("print(answer())\n")
    (path / "lib.py").write_text("#!/usr/bin/python3\ndef answer(): return 42\n")
    for n in range(30):
        (path / f"doc{n}.txt").write_text(f"page {n}\n" * 50)
    return given_away(path)


GIT = "export HOME=/tmp; git config --global user.email a@b.c; git config --global user.name A; cd /repo;"


@pytest.mark.needs_program("git", "make")
def test_a_repository_and_its_build(repository: Path, tmp_path: Path) -> None:
    outside = snapshot(repository)
    with Sandbox(Spec(overlay=[(repository, "/repo")])) as sandbox:
        ok(sandbox, f"{GIT} git init -q . && git add -A && git commit -qm one && make -s && ./prog")
        built, tree = sandbox.snapshot("built"), manifest(sandbox, "/repo")
        ok(
            sandbox,
            f"{GIT} git checkout -qb topic; sed -i s/42/43/ lib.py; git rm -q doc1.txt; git commit -qam two",
        )
        ok(
            sandbox,
            f"{GIT} make -s; test $(./prog) = 43; git gc -q; rm -r doc2.txt",
        )
        changes = {change.path: change.kind for change in sandbox.diff(built)}
        assert changes["/repo/lib.py"] == changes["/repo/prog"] == "changed"
        assert changes["/repo/doc1.txt"] == changes["/repo/doc2.txt"] == "removed"
        assert changes["/repo/.git/packed-refs"] == "added"
        assert "/repo/doc3.txt" not in changes
        topic, topic_tree = sandbox.snapshot("topic"), manifest(sandbox, "/repo")
        sandbox.restore(built)
        assert manifest(sandbox, "/repo") == tree
        assert (
            ok(sandbox, f"{GIT} git fsck --strict 2>&1; git status -s --ignored; ./prog") == b"?? prog\n42\n"
        )
        tree = manifest(sandbox, "/repo")  # git has looked at it
        with sandbox.fork()[0] as child:
            assert manifest(child, "/repo") == tree
            child.restore(topic)
            assert manifest(child, "/repo") == topic_tree
            topic.export(tmp_path / "topic.tar")
            assert snapshot(repository) == outside
            child.commit(state_dir=tmp_path / "state")
            assert not child.diff(topic)
    with Sandbox(Spec(ro=[(repository, "/repo")])) as sandbox:
        look = "git config --global safe.directory '*'; git fsck --strict 2>&1; git log --format=%s; ./prog"
        assert ok(sandbox, f"{GIT} {look}") == b"two\none\n43\n"
    assert not (repository / "doc2.txt").exists()
    after = snapshot(repository)
    assert all(after[f"doc{n}.txt"] == outside[f"doc{n}.txt"] for n in range(3, 30)), "not even written again"


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """Two packages, one of which needs the other."""
    path = tmp_path / "wheels"
    path.mkdir()
    for name, needs in (("alpha", "Requires-Dist: beta\n"), ("beta", "")):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", f"name = {name!r}\n")
            wheel.writestr(f"{name}/__main__.py", f"import {name}; print({name}.name)\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            files = [f"{name}/__init__.py", f"{name}/__main__.py", f"{info}/METADATA", f"{info}/WHEEL"]
            wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"]))
    return path


def test_a_virtual_environment(wheels: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    pip = next(iter(Path(sys.prefix).glob("lib/python3*/site-packages/pip")))
    shutil.copytree(pip, tmp_path / "pip/pip", ignore=shutil.ignore_patterns("__pycache__"))
    spec = Spec(
        overlay=[(given_away(home), "/home/me")], ro=[(wheels, "/wheels"), (tmp_path / "pip", "/pip")],
        env={"PYTHONPATH": "/pip", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    install = "cd /home/me; venv/bin/python -m pip install -q --no-index --find-links /wheels"
    with Sandbox(spec) as sandbox:
        ok(
            sandbox,
            f"cd /home/me; {PYTHON} -m venv --without-pip venv; {install} beta; venv/bin/python -m beta",
        )
        bare, tree = sandbox.snapshot("bare"), manifest(sandbox, "/home/me")
        ok(sandbox, f"{install} alpha; venv/bin/python -m alpha; {PYTHON} -m compileall -q venv/lib")
        added = [
            change.path for change in sandbox.diff(bare) if change.kind == "added" and "alpha" in change.path
        ]
        assert any(path.endswith("/alpha/__init__.py") for path in added)
        assert not any(change.kind == "removed" for change in sandbox.diff(bare))
        full, full_tree = sandbox.snapshot("full"), manifest(sandbox, "/home/me")
        sandbox.restore(bare)
        assert manifest(sandbox, "/home/me") == tree
        assert not sandbox.shell("cd /home/me; venv/bin/python -m alpha").ok
        with Sandbox.from_snapshot(full) as child:
            assert manifest(child, "/home/me") == full_tree
            assert ok(child, "cd /home/me; venv/bin/python -m alpha") == b"alpha\n"
            child.commit(["/home/me/venv"], state_dir=tmp_path / "state")
    with Sandbox(spec) as sandbox:
        assert (
            ok(sandbox, "cd /home/me; venv/bin/python -m alpha; venv/bin/python -m beta") == b"alpha\nbeta\n"
        )
