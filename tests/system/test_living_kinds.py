"""Living sandboxes of every kind, many at once; and nothing of them is left."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from living import CAT, SLEEP, python, sandbox, shared
from support import IS_ROOT, can_grant, descendants, leaves_nothing, wait_until

import sandboxcore
from sandboxcore import DEVNULL, PIPE, ProgramNotFound, Sandbox, SandboxSpec, UnsupportedHost
from sandboxcore.seccomp import PROFILES

pytestmark = pytest.mark.once

__all__ = ["sandbox", "shared"]  # fixtures


# --- many at once -------------------------------------------------------------------------------------


def test_many_threads(sandbox: Sandbox) -> None:
    failures: list[object] = []

    def work(number: int) -> None:
        for turn in range(5):
            text = f"{number}.{turn}"
            try:
                done = sandbox.exec(["sh", "-c", f"echo {text}; exit {number}"], text=True, timeout=60)
            except Exception as error:
                failures.append(error)
                continue
            if (done.stdout, done.returncode) != (text + "\n", number):
                failures.append(done)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    # idle launchers go again
    wait_until(lambda: len(descendants(sandbox.pid)) <= 4, "the end of idle launchers")


@pytest.mark.slow
def test_more_commands_than_launchers() -> None:
    """They wait for their turn; who cannot wait is told so, and nothing else suffers."""
    with Sandbox() as sandbox:
        held = [sandbox.popen(CAT, stdin=PIPE, stdout=DEVNULL, stderr=DEVNULL) for _ in range(256)]
        assert len({process.pid for process in held}) == 256
        results: list[object] = []
        waiting = [
            threading.Thread(target=lambda: results.append(sandbox.exec(["echo", "late"], timeout=60)))
            for _ in range(10)
        ]
        for thread in waiting:
            thread.start()
        began = time.monotonic()
        impatient = sandbox.exec(["touch", "/tmp/ran"], timeout=0.5)
        assert impatient.timed_out
        assert time.monotonic() - began < 0.5 + 1
        assert all(process.poll() is None for process in held), "the others run on"
        assert results == []
        for process in held:
            process.stdin.close()
        for process in held:
            assert process.wait(30) == 0
            process.close()
        for thread in waiting:
            thread.join(60)
        assert [result.stdout for result in results] == [b"late\n"] * 10  # type: ignore[attr-defined]
        assert sandbox.exec(["ls", "/tmp"]).stdout == b"", "nobody waits for it: it never runs"


# --- every kind of sandbox ----------------------------------------------------------------------------

LEAN = PROFILES["standard"].extend(name="lean", deny=["pwritev2", "preadv2", "eventfd2", "symlinkat"])


@pytest.mark.parametrize(("policy", "filters"), [("minimal", 1), ("standard", 1), ("full", 1), (LEAN, 1)])
def test_policies(policy: Any, filters: int) -> None:
    with Sandbox(SandboxSpec(seccomp=policy)) as sandbox:
        look = ["sh", "-c", "grep Seccomp /proc/self/status"]
        for _ in range(2):
            assert sandbox.exec(look).stdout.split() == [
                b"Seccomp:",
                b"2",
                b"Seccomp_filters:",
                b"%d" % filters,
            ]
        with sandbox.popen(["sh", "-c", "cat; echo fin"], stdin=PIPE) as process:
            assert process.communicate(b"data ")[0] == b"data fin\n"
        with sandbox.popen(SLEEP) as process:
            process.kill()
            assert process.wait(5) == -9
        ring = (
            "import ctypes; print(ctypes.CDLL(None, use_errno=True).syscall(425, 1, 0), ctypes.get_errno())"
        )
        assert sandbox.exec(python(ring)).stdout.split()[0] == b"-1"


def test_a_filter_that_launchers_cannot_live_behind_is_the_commands_own() -> None:
    with Sandbox(SandboxSpec(seccomp=LEAN)) as sandbox:
        assert not sandboxcore.seccomp.hosts_launcher(LEAN)
        call = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(290, 0, 0), ctypes.get_errno())
"""
        if os.uname().machine == "x86_64":
            assert sandbox.exec(python(call)).stdout in (b"-1 1\n", b"-1 38\n")
        init = Path(f"/proc/{sandbox.pid}/status").read_text()
        assert "Seccomp:\t0" in init
        assert "NoNewPrivs:\t1" in init


def test_granted_directories(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    can_grant(tmp_path)
    with Sandbox(SandboxSpec(rw=[(tmp_path, "/data")])) as sandbox:
        assert sandbox.exec(["sh", "-c", "echo from inside > /data/file"]).ok
        assert (tmp_path / "file").read_text() == "from inside\n"
        assert (tmp_path / "file").stat().st_uid == os.getuid()
        (tmp_path / "other").write_text("from outside")
        assert sandbox.exec(["cat", "/data/other"]).stdout == b"from outside"


def test_other_specs() -> None:
    with Sandbox(SandboxSpec(network="host")) as sandbox:
        inside = sandbox.exec(["readlink", "/proc/self/ns/net"], text=True).stdout.strip()
        assert inside == os.readlink("/proc/self/ns/net")
    with Sandbox(SandboxSpec(network="private")) as sandbox:
        serve = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(b"hello")
"""
        with sandbox.popen(python(serve)) as server:
            port = int(server.stdout.readline())
            connect = f"import socket; print(socket.create_connection(('127.0.0.1', {port})).recv(9))"
            assert sandbox.exec(python(connect)).stdout == b"b'hello'\n"
            assert server.wait(10) == 0
    with Sandbox(SandboxSpec(landlock=False)) as sandbox:
        assert sandbox.exec(["true"]).ok


def test_time_offsets() -> None:
    try:
        sandbox = Sandbox(SandboxSpec(time_offsets={"boottime": 1_000_000, "monotonic": 0}))
    except UnsupportedHost as error:
        pytest.skip(str(error))
    with sandbox:
        for _ in range(2):
            uptime = float(sandbox.exec(["cat", "/proc/uptime"]).stdout.split()[0])
            assert uptime > 1_000_000
        assert sandbox.exec(SLEEP, timeout=0.1).timed_out


def test_other_roots(toolbox: str) -> None:
    folder = Path(toolbox).parent
    with Sandbox(SandboxSpec(rootfs=folder, env={}, workdir="/")) as sandbox:
        assert sandbox.exec(["/toolbox", "pwd"]).stdout == b"/\n"
        with sandbox.popen(["/toolbox", "cat", "/toolbox"]) as process:
            assert process.communicate()[0] == Path(toolbox).read_bytes()


def test_two_sandboxes_at_once() -> None:
    with Sandbox() as one, Sandbox() as two:
        one.exec(["sh", "-c", "echo one > /tmp/name"])
        assert two.exec(["ls", "/tmp"]).stdout == b""
        with one.popen(SLEEP) as process:
            two.signal(signal.SIGKILL)
            two.close()
            assert process.poll() is None
            process.kill()


# --- nothing is left ----------------------------------------------------------------------------------


def use(sandbox: Sandbox) -> None:
    assert sandbox.exec(["echo", "x"]).ok
    with sandbox.popen(CAT, stdin=PIPE) as process:
        assert process.communicate(b"x")[0] == b"x"
    with pytest.raises(ProgramNotFound):
        sandbox.exec(["no-such-program"])
    sandbox.exec(SLEEP, timeout=0.01)


def test_a_sandbox_leaves_nothing() -> None:
    with Sandbox() as sandbox:
        use(sandbox)
    with leaves_nothing():
        for _ in range(5):
            with Sandbox() as sandbox:
                use(sandbox)


def test_commands_leave_nothing_in_launchers(sandbox: Sandbox) -> None:
    def count() -> int:
        total = 0
        for pid in (sandbox.pid, *descendants(sandbox.pid)):
            total += len(os.listdir(f"/proc/{pid}/fd"))
        return total

    if not IS_ROOT:
        pytest.skip("only root can do this: look into what is not dumpable")
    for _ in range(5):
        use(sandbox)
    wait_until(lambda: len(descendants(sandbox.pid)) <= 3, "idle launchers to go")
    before = count()
    for _ in range(20):
        use(sandbox)
    wait_until(lambda: count() <= before + 12, "no more descriptors than those of two more launchers")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_soak() -> None:
    def many(sandbox: Sandbox) -> None:
        for turn in range(63):
            assert sandbox.exec(["echo", str(turn)], timeout=60).stdout == f"{turn}\n".encode()

    with Sandbox() as sandbox:
        use(sandbox)
    with leaves_nothing():
        with Sandbox() as sandbox:
            threads = [threading.Thread(target=many, args=(sandbox,)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(100)
                assert not thread.is_alive()
    with leaves_nothing():
        for _ in range(200):
            Sandbox.create().close()
