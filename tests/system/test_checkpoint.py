"""Checkpoints of processes. What is marked criu runs where CRIU can do it, as in the machine of .ci/run."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import IS_ROOT, Spec, host_program, wait_until

from sandboxcore import CheckpointError, Sandbox, SpecError, UnsupportedHost, checkpoint, cli_doctor, criu
from sandboxcore.command import Process

PATIENCE = 120  # seconds; the virtual machine is slow
PLAIN = Spec(landlock=False)
# Counts lines up; says so for each byte that it reads.
COUNTER = """
import os, sys, threading
secret = os.urandom(8).hex()
threading.Thread(target=threading.Event().wait, daemon=True).start()
if os.fork() == 0:
    threading.Event().wait()
count = 0
while os.read(0, 1):
    count += 1
    print(count, secret, flush=True)
sys.exit(7)
"""

# Plants a key in the session keyring of a host process; who finds it: that, a command, the same restored.
KEYS = """
import subprocess, sys
from escape.hostile import allowing, libc, number
from sandboxcore import Sandbox, SandboxSpec, checkpoint

c, find = libc(), number("request_key")
if c.syscall(number("keyctl"), 1, None) < 0:
    sys.exit("keyctl")
if c.syscall(number("add_key"), b"user", b"sbx-planted", b"the secret", 10, -3) < 0:
    sys.exit("add_key")
look = f'''
import ctypes, os
while os.read(0, 1):
    print(ctypes.CDLL(None).syscall({find}, b"user", b"sbx-planted", None, 0) >= 0, flush=True)
'''

def ask(process):
    process.stdin.write(b"x")
    process.stdin.flush()
    print(process.stdout.readline().decode().strip())

pipe = subprocess.PIPE
with subprocess.Popen(["/usr/bin/python3", "-c", look], stdin=pipe, stdout=pipe) as outside:
    ask(outside)
spec = SandboxSpec(landlock=False, seccomp=allowing("request_key"))
with Sandbox(spec) as sandbox:
    process = sandbox.popen(["/usr/bin/python3", "-c", look], stdin=pipe, stdout=pipe, bufsize=0)
    ask(process)
    checkpoint.checkpoint(sandbox, process, sys.argv[1])
with Sandbox(spec) as sandbox, checkpoint.restore(sandbox, sys.argv[1]) as restored:
    ask(restored)
"""


@contextlib.contextmanager
def counting(sandbox: Sandbox) -> Iterator[Process]:
    """A counter that has counted to two."""
    with sandbox.popen(
        ["/usr/bin/python3", "-c", COUNTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        for number in (1, 2):
            assert step(process)[0] == str(number)
        yield process
        process.kill()


def step(process: Any) -> list[str]:
    """Let it count one further: the number, and its secret."""
    process.stdin.write(b"x")
    process.stdin.flush()
    return process.stdout.readline().decode().split()


@pytest.fixture(scope="module")
def able() -> None:
    """Skips where CRIU cannot."""
    try:
        criu.check()
    except UnsupportedHost as error:
        pytest.skip(error.remedy)


# --- where it cannot --------------------------------------------------------------------------------


def test_without_criu_the_remedy_is_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(criu, "_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedHost, match="install CRIU"):
        checkpoint.check()


@pytest.mark.needs_program("criu")
def test_check_says_what_criu_says() -> None:
    said = subprocess.run(["criu", "check"], capture_output=True, text=True, timeout=60)
    if said.returncode == 0:
        assert checkpoint.check()[0].isdigit()
        return
    with pytest.raises(UnsupportedHost) as caught:
        checkpoint.check()
    if IS_ROOT:
        first = next(line for line in (said.stdout + said.stderr).splitlines() if "Error" in line)
        assert first.strip() in str(caught.value)
    else:
        assert "root" in str(caught.value)


def test_doctor_says_the_same() -> None:
    try:
        expected = checkpoint.check()
    except UnsupportedHost as error:
        expected = error.remedy
    assert cli_doctor._criu() == expected


def test_where_it_cannot_nothing_happens(tmp_path: Path) -> None:
    """Refused before anything is touched: the command runs on, nothing is written."""
    with contextlib.suppress(UnsupportedHost):
        criu.check()
        pytest.skip("here it can")
    with Sandbox(PLAIN) as sandbox, counting(sandbox) as process:
        with pytest.raises(UnsupportedHost):
            checkpoint.checkpoint(sandbox, process, tmp_path / "images")
        with pytest.raises(UnsupportedHost):
            checkpoint.restore(sandbox, tmp_path / "images")
        assert step(process)[0] == "3"
        assert not list(tmp_path.iterdir())


# --- where it can -----------------------------------------------------------------------------------


@pytest.mark.criu
@pytest.mark.needs_root
@pytest.mark.usefixtures("able")
class TestRestored:
    """One boot of a slow machine for all of these."""

    def test_goes_on_in_another_sandbox(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        with Sandbox(PLAIN) as sandbox, counting(sandbox) as process:
            _, secret = step(process)
            checkpoint.checkpoint(sandbox, process, images)
            assert process.returncode == -signal.SIGKILL
        assert images.stat().st_mode & 0o777 == 0o700
        with Sandbox(PLAIN) as sandbox:
            with checkpoint.restore(sandbox, images) as restored:
                assert step(restored) == ["4", secret]
                self.is_isolated(sandbox, restored)
                assert restored.stdin is not None
                restored.stdin.close()
                assert restored.wait(PATIENCE) == 7
            assert sandbox.exec(["/bin/true"]).ok
            assert {path.stat().st_uid for path in [images, *images.iterdir()]} == {0}
            with checkpoint.restore(sandbox, images) as again:  # as often as one likes
                assert step(again) == ["4", secret]
                child = criu.tree(again.pid)[-1]
            wait_until(lambda: not Path(f"/proc/{child}").exists(), "the end of the child")

    def is_isolated(self, sandbox: Sandbox, restored: checkpoint.Restored) -> None:
        """As the kernel tells, of every thread of both processes."""
        members = criu.tree(restored.pid)
        assert len(members) == 2
        for pid in members:
            for task in os.listdir(f"/proc/{pid}/task"):
                status = criu.status(pid, int(task))
                assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
                assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2"]
            for kind in ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup"):
                ours, its = (os.readlink(f"/proc/{number}/ns/{kind}") for number in (sandbox.pid, pid))
                assert ours == its

    def test_ends_with_its_handle_and_with_its_sandbox(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        minimal = PLAIN.replace(seccomp="minimal")
        with Sandbox(minimal) as sandbox, counting(sandbox) as process:
            checkpoint.checkpoint(sandbox, process, images, leave_running=True)
            assert step(process)[0] == "3"
        with Sandbox(minimal) as sandbox:
            restored = checkpoint.restore(sandbox, images)
            members = criu.tree(restored.pid)
            restored.close()
            assert not any(Path(f"/proc/{pid}").exists() for pid in members)
            restored = checkpoint.restore(sandbox, images)
        assert restored.wait(PATIENCE) == -signal.SIGKILL
        restored.close()

    def test_what_is_not_as_before_is_killed(self, tmp_path: Path) -> None:
        """A record that says otherwise, of limits and of no_new_privs; images that are not root's alone."""
        images = tmp_path / "images"
        with Sandbox(PLAIN) as sandbox, counting(sandbox) as process:
            checkpoint.checkpoint(sandbox, process, images)
        about = images / "sandboxcore.json"
        before = about.read_text()
        about.write_text(before.replace("Max open files            65536", "Max open files            65535"))
        with Sandbox(PLAIN) as sandbox:
            with pytest.raises(CheckpointError, match="limits"):
                checkpoint.restore(sandbox, images)
            data = json.loads(before)
            for facts in data["facts"].values():
                for thread in facts["threads"]:
                    thread["NoNewPrivs"] = ["0"]
            about.write_text(json.dumps(data))
            with pytest.raises(CheckpointError, match="NoNewPrivs"):
                checkpoint.restore(sandbox, images)
            about.write_text(before)
            images.chmod(0o755)
            with pytest.raises(CheckpointError, match="others may"):
                checkpoint.restore(sandbox, images)
            images.chmod(0o700)
            with checkpoint.restore(sandbox, images) as restored:  # its numbers are free: nothing is left
                assert step(restored)[0] == "3"

    def test_what_criu_cannot_write_runs_on(self, tmp_path: Path) -> None:
        held = COUNTER.replace("import os", "import os; fd = os.pidfd_open(os.getpid()); import os", 1)
        with Sandbox(PLAIN) as sandbox, sandbox.popen(
            ["/usr/bin/python3", "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as process:  # fmt: skip
            assert step(process)[0] == "1"
            with pytest.raises(CheckpointError, match="criu dump"):
                checkpoint.checkpoint(sandbox, process, tmp_path / "images")
            assert step(process)[0] == "2"
            assert not list(tmp_path.iterdir())
            process.kill()

    def test_finds_no_key_of_who_restores_it(self, tmp_path: Path) -> None:
        done = host_program(KEYS, str(tmp_path / "images"), timeout=PATIENCE)
        assert done.stdout.split() == ["True", "False", "False"], done.stderr

    def test_another_spec_is_refused(self, tmp_path: Path) -> None:
        images = tmp_path / "images"
        with Sandbox(PLAIN) as sandbox, counting(sandbox) as process, counting(sandbox) as other:
            checkpoint.checkpoint(sandbox, process, images)
            assert step(other)[0] == "3"
        different = Sandbox(PLAIN.replace(hostname="other"))
        with different, pytest.raises(SpecError, match="another spec"):
            checkpoint.restore(different, images)

    def test_the_sandboxs_root_is_refused(self, tmp_path: Path) -> None:
        """It could kill the parent of what is restored, which then nobody would wait for."""
        with Sandbox(PLAIN) as sandbox, sandbox.popen(["/bin/sleep", "60"], user=0) as process:
            with pytest.raises(SpecError, match="user 0"):
                checkpoint.checkpoint(sandbox, process, tmp_path / "images")
            process.kill()

    @pytest.mark.parametrize(
        "spec",
        [
            Spec(),
            PLAIN.replace(proc="pid"),
            PLAIN.replace(network="host"),
            PLAIN.replace(time_offsets={"monotonic": 1}),
            PLAIN.replace(tmpfs=["/etc/hidden"]),
            PLAIN.replace(live_binds="ro"),
        ],
        ids=lambda spec: "spec",
    )
    def test_what_would_be_lost_is_refused(self, spec: Spec, tmp_path: Path) -> None:
        with Sandbox(spec) as sandbox, sandbox.popen(["/bin/sleep", "60"]) as process:
            with pytest.raises(SpecError, match="a checkpoint cannot be with"):
                checkpoint.checkpoint(sandbox, process, tmp_path / "images")
            process.kill()
