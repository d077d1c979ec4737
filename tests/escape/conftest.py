"""What the escape tests share: the hostile program, compiled once, and a process of the host."""

import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from escape.hostile import Hostile

SOURCE = Path(__file__).with_name("hostile.c")


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    """The program and the places to run it."""
    folder = tmp_path_factory.mktemp("hostile")
    folder.chmod(0o755)  # a payload of root has no access to what only root may enter
    program = folder / "hostile"
    command = ["gcc", "-std=gnu17", "-O1", "-static", "-Wall", "-Wextra", "-Werror", "-o", program]
    subprocess.run([*command, SOURCE], check=True, timeout=60)
    return Hostile(program)


@pytest.fixture
def marker() -> str:
    """A text that stands nowhere else."""
    return f"marker-{uuid.uuid4().hex}"


@pytest.fixture
def bystander(hostile: Hostile, marker: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the same user on the host, which nobody but its owner shall touch."""
    command = [hostile.program, "hold", marker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={"SECRET": marker}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


@pytest.fixture
def open_dir(tmp_path: Path) -> Path:
    """A directory of the host that everybody may use."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@pytest.fixture
def exec_dir() -> Iterator[Path]:
    """A directory of the host that everybody may enter, and where set-user-ID bits count."""
    for parent in (tempfile.gettempdir(), "/var/tmp", "/usr/local"):
        if os.access(parent, os.W_OK) and not os.statvfs(parent).f_flag & os.ST_NOSUID:
            break
    else:
        pytest.skip("every directory for temporary files is mounted nosuid")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
