"""Attacks of a command on the living sandbox it is in: its init, its launchers, their sockets, and others."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    BUFFER,
    MARKER,
    PROGRAM,
    Hostile,
    Outcome,
    _outcome,
    allowing,
    call,
    calls,
    marking,
    pack,
)
from escape.test_processes import PRIO_PROCESS, REACHED, RLIMIT_NOFILE, USERS, intrusions
from support import PYTHON, descendants, gone, marked, wait_until

import sandboxcore
from sandboxcore import PIPE, Sandbox, _native
from sandboxcore.request import Request

pytestmark = pytest.mark.escape

INIT, LAUNCHER = 1, 2  # the first one, which stays
Open = Callable[..., Sandbox]


@pytest.fixture(params=["plain", "layers"])
def living(hostile: Hostile, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Makes living sandboxes with the hostile program in them; options are fields of SandboxSpec. With layers
    init keeps its capabilities."""
    writable = request.param == "layers"
    if writable:
        request.getfixturevalue("overlays")
    with contextlib.ExitStack() as stack:

        def start(**fields: Any) -> Sandbox:
            return stack.enter_context(Sandbox(hostile.spec.replace(writable=writable, **fields)))

        yield start


def inside(sandbox: Sandbox, attack: list[str]) -> Outcome:
    done = sandbox.exec([PROGRAM, *attack], timeout=30)
    return _outcome(done.stdout, done.returncode)


def python(code: str, *args: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", textwrap.dedent(code), *args]


def ask(sandbox: Sandbox, code: str, *args: str) -> Any:
    done = sandbox.exec(python("import json, os, sys\n" + textwrap.dedent(code), *args), timeout=30)
    assert done.returncode == 0, done
    return json.loads(done.stdout)


def one_id() -> bool:
    return sandboxcore.host.features().mode == "rootless"


# --- init and launchers -------------------------------------------------------------------------

LOOK = """
answers = {}
for pid in sys.argv[1:]:
    for name in ("mem", "environ", "maps", "auxv", "io", "syscall", "stack", "pagemap", "personality"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                file.seek(os.sysconf("SC_PAGESIZE") * 1024 if name == "mem" else 0)
                answers[f"{pid} {name}"] = len(file.read(10))
        except OSError as error:
            answers[f"{pid} {name}"] = error.strerror
    for name in ("cwd", "root", "exe", "ns/pid", "ns/net"):
        try:
            answers[f"{pid} {name}"] = len(os.readlink(f"/proc/{pid}/{name}"))
        except OSError as error:
            answers[f"{pid} {name}"] = error.strerror
    for name in ("fd", "fdinfo", "map_files"):
        try:
            answers[f"{pid} {name}"] = len(os.listdir(f"/proc/{pid}/{name}"))
        except OSError as error:
            answers[f"{pid} {name}"] = error.strerror
    for fd in range(40):
        try:
            os.close(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR))
            answers[f"{pid} fd {fd}"] = 1
        except OSError:
            pass
print(json.dumps(answers))
"""


@pytest.mark.parametrize("user", USERS)
def test_secrets_of_init_and_launchers(living: Open, user: str) -> None:
    sandbox = living(user=user)
    with sandbox.popen(["sleep", "60"]) as sibling:
        answers = ask(sandbox, LOOK, str(INIT), str(LAUNCHER), str(sibling.pid_inside))
        sibling.kill()
    reached = {name for name, answer in answers.items() if isinstance(answer, int)}
    ours = {name for name in reached if not name.startswith(f"{sibling.pid_inside} ")}
    assert ours == set()
    for name in ("environ", "maps", "cwd", "exe", "fd", "fd 1"):
        assert f"{sibling.pid_inside} {name}" in reached, "of another command the same can be read"


@pytest.mark.parametrize("name", intrusions(0))
def test_intruding_into_launchers(
    hostile: Hostile, living: Open, bystander: subprocess.Popen[bytes], name: str
) -> None:
    outside = hostile.outside(calls(*intrusions(bystander.pid)[name])).verdict
    if name != "process_madvise" or os.geteuid() == 0:
        assert outside in REACHED
    known = name.split(maxsplit=1)[0]
    closed = "ENOSYS" if name == "process_madvise" else "EPERM"
    for user in USERS:
        plain = living(user=user)
        behind = living(user=user, seccomp=allowing(known))
        for pid in (INIT, LAUNCHER):
            attack = calls(*intrusions(pid)[name])
            assert inside(plain, attack).verdict == closed
            assert inside(behind, attack).verdict in ("EPERM", "EACCES")
        marked_one = living(user=user, seccomp=marking(known))
        assert inside(marked_one, calls(*intrusions(LAUNCHER)[name])).verdict == MARKER


@pytest.mark.parametrize("user", USERS)
def test_limits_and_priorities_of_launchers(hostile: Hostile, living: Open, user: str) -> None:
    sandbox = living(user=user)
    behind = living(user=user, seccomp=marking("prlimit64"))
    with sandbox.popen(["sleep", "60"]) as sibling:
        for pid in (INIT, LAUNCHER, sibling.pid_inside):
            expected = "ok" if pid == sibling.pid_inside else "EPERM"
            for attack in (
                call("setpriority", PRIO_PROCESS, pid, 7),
                call("sched_setaffinity", pid, 8, pack("=Q", 1)),
                call("sched_setscheduler", pid, 3, pack("=i", 0)),
                call("ioprio_set", 1, pid, 3 << 13),
            ):
                assert inside(sandbox, calls(attack)).verdict == expected, (pid, attack)
            limit = calls(call("prlimit64", pid, RLIMIT_NOFILE, 0, BUFFER))
            assert inside(sandbox, limit).verdict == "EPERM"
        sibling.kill()
    limit = calls(call("prlimit64", LAUNCHER, RLIMIT_NOFILE, 0, BUFFER))
    assert inside(behind, limit).verdict == MARKER
    assert hostile.outside(calls(call("prlimit64", 0, RLIMIT_NOFILE, 0, BUFFER))).verdict == "ok"


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGSEGV])
def test_signals_to_launchers(living: Open, bystander: subprocess.Popen[bytes], sig: int) -> None:
    """Another id than the payload's. Where there is only one, test_hostile_commands shows that a launcher can
    be lost, and that the sandbox goes on."""
    os.kill(bystander.pid, 0)
    sandbox = living()
    with sandbox.popen(["sleep", "60"]) as sibling:
        answers = ("ok",) if one_id() else ("EPERM",)
        if not one_id() or sig not in (signal.SIGKILL, signal.SIGSEGV):
            assert inside(sandbox, calls(call("kill", LAUNCHER, sig))).verdict in answers
        assert inside(sandbox, calls(call("kill", sibling.pid_inside, signal.SIGKILL))).verdict == "ok"
        assert sibling.wait(10) == -9
    before = sandbox.pid
    inside(sandbox, calls(call("kill", INIT, sig)))
    assert sandbox.exec(["true"], timeout=30).ok
    assert sandbox.pid == before


def test_descriptors_of_a_command(living: Open) -> None:
    """Nothing of a launcher's is inherited: no socket at all, and no file of the host."""
    sandbox = living()
    look = """
    fds = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    print(json.dumps({fd: os.readlink(f"/proc/self/fd/{fd}") for fd in fds}))
    """
    for _ in range(3):
        links = ask(sandbox, look)
        assert set(links) <= {"0", "1", "2", "3"}
        assert not any(link.startswith("socket:") for link in links.values())
        assert links["0"] == "/dev/null"
    names = sandbox.exec(["cat", "/proc/net/unix"], text=True)
    assert [line for line in names.stdout.splitlines()[1:] if len(line.split()) > 7] == []
    left, right = socket.socketpair()
    with left, right:  # a control: what is passed on purpose is seen
        number = right.fileno()
        show = python(f"import os; print(os.readlink('/proc/self/fd/{number}'))")
        done = sandbox.exec(show, pass_fds=[number])
        assert done.stdout.startswith(b"socket:")


# --- commands among each other ------------------------------------------------------------------

KEEPER = """
import array, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind("/tmp/meet")
server.listen()
print("ready", flush=True)
sock, _ = server.accept()
_, anc, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(16))
fds = array.array("i"); fds.frombytes(anc[0][2])
sock.sendall(b"!")
if sys.argv[1] == "flood":
    import signal
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    while True:
        os.write(fds[0], b"x" * 65536)
import time; time.sleep(60)
"""
GIVER = """
import array, os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect("/tmp/meet")
sock.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [int(sys.argv[1])]))])
sock.recv(1)
os.write(1, b"mine")
"""


@pytest.mark.parametrize("what", ["hold", "flood"])
@pytest.mark.parametrize("how", ["exec", "relay", "popen", "events"])
def test_a_pipe_given_to_another_command(living: Open, tmp_path: Path, what: str, how: str) -> None:
    """Who waits for one command does not wait for those that it gave its output to."""
    sandbox = living()
    with sandbox.popen(python(KEEPER, what)) as keeper:
        assert keeper.stdout.readline() == b"ready\n"
        giver = python(GIVER, "1")
        began = time.monotonic()
        if how == "exec":
            done = sandbox.exec(giver, timeout=20)
            assert (done.returncode, done.timed_out) == (0, False)
            assert what == "flood" or done.stdout == b"mine"
        elif how == "relay":
            with (tmp_path / "out").open("wb") as target, sandbox.popen(giver, stdout=target) as process:
                assert process.wait(20) == 0
            assert what == "flood" or (tmp_path / "out").read_bytes() == b"mine"
        elif how == "popen":
            with sandbox.popen(giver) as process:
                out, _ = process.communicate(timeout=20)
                assert process.returncode == 0
                assert what == "flood" or out == b"mine"
        else:
            with sandbox.popen(giver) as process:
                events = list(process)
                assert isinstance(events[-1], sandboxcore.Exit)
        assert time.monotonic() - began < 10
        assert keeper.poll() is None or what == "flood"
        keeper.kill()


LINKS = """
found = []
for pid in os.listdir("/proc"):
    if pid.isdecimal() and int(pid) != os.getpid():
        try:
            found += [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            pass
print(json.dumps(found))
"""


def test_host_files_behind_a_relay(living: Open, tmp_path: Path) -> None:
    """A command can take over pipes of another one with its id; the host's file is not behind them."""
    sandbox = living()
    target, source = tmp_path / "target", tmp_path / "source"
    source.write_bytes(b"x" * 10_000_000)
    with target.open("wb") as stdout, source.open("rb") as stdin:
        with sandbox.popen(
            ["sh", "-c", "sleep 60; cat"], stdin=stdin, stdout=stdout, stderr=stdout
        ) as process:
            links = ask(sandbox, LINKS)
            assert sum(link.startswith("pipe:") for link in links) >= 3, "of the other command"
            assert not any(str(tmp_path) in link for link in links)
            steal = f"open('/proc/{process.pid_inside}/fd/1', 'wb').write(b'stolen'); print(1)"
            assert ask(sandbox, steal) == 1
            wait_until(lambda: target.read_bytes() == b"stolen", "what came through the pipe")
            truncate = f"""
            try:
                os.truncate('/proc/{process.pid_inside}/fd/1', 0); print(1)
            except OSError as error:
                print(0)
            """
            assert ask(sandbox, truncate) == 0
            process.kill()
    assert target.read_bytes() == b"stolen"
    with target.open("rb") as control:
        assert os.readlink(f"/proc/self/fd/{control.fileno()}") == str(target), "here one can tell"


@pytest.mark.parametrize("user", USERS)
def test_another_living_sandbox(living: Open, marker: str, user: str) -> None:
    one, two = living(user=user), living(user=user)
    serve = """
    import socket, sys
    server = socket.socket(socket.AF_UNIX)
    server.bind("\\0" + sys.argv[1])
    server.listen()
    print("ready", flush=True)
    server.accept()
    """
    with one.popen(python(serve, marker)) as server:
        assert server.stdout.readline() == b"ready\n"
        assert one.exec(["sh", "-c", f"echo {marker} > /tmp/{marker}"]).ok
        connect = """
        import socket
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect("\\0" + sys.argv[1]); print(1)
            except OSError as error:
                print(json.dumps(error.strerror))
        """
        look = "ls /tmp; cat /proc/[0-9]*/cmdline"
        seen = two.exec(["sh", "-c", look, "sh"], text=True).stdout
        assert marker not in seen
        assert ask(two, connect, marker) == "Connection refused"
        two.exec(["sh", "-c", "kill -9 -1"], timeout=30)
        assert server.poll() is None
        assert marker in one.exec(["sh", "-c", look, "sh"], text=True).stdout
        assert ask(one, connect, marker) == 1, "the control: in the same sandbox one can"


DAEMON = """
import os, sys, time
for _ in range(2):
    if os.fork():
        os._exit(0)
    os.setsid()
time.sleep(60)
"""
TWO = """
import os, time
if os.fork() == 0:
    os.setsid()
os.write(1, b"r")
time.sleep(60)
"""


def test_outliving_its_command_or_its_sandbox(living: Open, marker: str) -> None:
    def alive() -> list[int]:
        return [pid for pid in marked(marker) if not gone(pid)]

    subprocess.run([PYTHON, "-c", DAEMON, marker], check=True, timeout=30)

    def daemon() -> list[int]:
        """Once it is the only one, and no longer on its way there: its parent has the mark, too, and ends."""
        found = alive()
        time.sleep(0.1)  # between two looks, which have to agree
        return found if len(found) == 1 and alive() == found else []

    (pid,) = wait_until(daemon, "the daemon: outside that is how to do it")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(), "its end")
    sandbox = living()
    assert sandbox.exec(python(DAEMON, marker), timeout=30).returncode == 0
    assert alive() == []
    with sandbox.popen(python(TWO, marker)) as process:
        assert process.stdout.read(2) == b"rr"
        assert len(alive()) == 2
        sandbox.close()
        assert alive() == []


# --- the sockets --------------------------------------------------------------------------------

HEAD = struct.Struct("=IIIIQii")
MAGIC, EXEC, SIGNAL = (_native.constant(name) for name in ("REQUEST_MAGIC", "MESSAGE_EXEC", "MESSAGE_SIGNAL"))


def message(magic: int = MAGIC, kind: int = EXEC, in_memfd: int = 0, number: int = 0) -> bytes:
    return HEAD.pack(magic, kind, 0, in_memfd, 0, number, 0)


def garbage(fds: int) -> Iterator[tuple[bytes, int]]:
    """Datagrams that nobody should send, each with how many descriptors."""
    for count in range(fds):
        yield b"", count
        yield b"x", count
        yield message()[:-1], count
        yield message(magic=0), count
        yield message(), count
        yield message() + b"x" * 100, count
        yield message() + bytes(32768), count
        yield message() + bytes(60000), count
        yield message(in_memfd=1), count
        yield from (
            (message(kind=kind) + bytes(200), count) for kind in (0, 1, 2, 3, 4, SIGNAL, 99, 2**32 - 1)
        )
    good = bytearray(_native.ffi.sizeof("struct sbx_request"))
    for layout in range(4):
        struct.pack_into("=III", good, 0, MAGIC, layout, len(good))
        yield message() + bytes(good), 3


def send(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        socket.send_fds(sock, [data], fds)


def test_malformed_messages_to_launchers_and_init(living: Open) -> None:
    """The payload cannot reach these sockets; a host process that is out of its mind can."""
    sandbox = living()
    before = sandbox.pid
    link = sandbox._link
    assert link is not None
    for target, kinds in ((link.work, None), (link.keeper, {SIGNAL})):
        for data, count in garbage(6):
            if not data or (kinds and data[:4] == message()[:4] and data[4] not in kinds and data[4] > 5):
                continue  # an empty datagram reads as end-of-file: that is how one lets go
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            null = os.open("/dev/null", os.O_RDWR)
            with ours:
                ours.settimeout(10)
                send(target, data, [theirs.fileno(), *[null] * count][:count])
                theirs.close()
                os.close(null)
                if count:  # an error, or nothing: but the descriptor is let go
                    with contextlib.suppress(ConnectionResetError):
                        while ours.recv(40000):
                            pass
    assert sandbox.exec(["true"], timeout=20).ok
    assert sandbox.pid == before


def test_malformed_messages_to_a_command(living: Open) -> None:
    sandbox = living()
    with sandbox.popen(["cat"], stdin=PIPE) as process:
        sock = process._ending.sock
        for data, count in garbage(3):
            if data and not (data[:4] == message()[:4] and data[4] == SIGNAL):
                send(sock, data, [0] * count)
        for scope in (0, 1, 2, 3, 2**32 - 1):
            for number in (-1, 65, 2**31 - 1, 0):
                send(sock, HEAD.pack(MAGIC, SIGNAL, scope, 0, 0, number, 0), [])
        assert process.poll() is None
        assert process.communicate(b"alive", timeout=20)[0] == b"alive"
        assert process.returncode == 0
    assert sandbox.exec(["true"], timeout=20).ok


def test_random_messages(living: Open) -> None:
    """Requests of which one byte is wrong: refused, or run; never the end of the sandbox."""
    sandbox = living()
    link = sandbox._link
    assert link is not None
    request = Request(
        sandbox._plan, ["true"], cwd=None, env={}, files={"a": "b"}, pass_fds=(), stdio=(0, 0, 0)
    )
    head = message()
    for at in range(0, len(request.data), 7):
        data = bytearray(request.data)
        data[at] ^= 0xFF
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(20)
            send(link.work, head + bytes(data), [theirs.fileno()])
            theirs.close()
            with contextlib.suppress(ConnectionResetError):
                while ours.recv(40000):
                    pass
    assert sandbox.exec(["true"], timeout=20).ok
    wait_until(lambda: len(descendants(sandbox.pid)) <= 3, "nothing to be left")


def test_init_and_launchers_cannot_be_named(living: Open, marker: str) -> None:
    """No address leads to them: every unix socket that a payload can name is one of its own."""
    sandbox = living()
    probe = """
    import socket
    hits = 0
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for number in range(4096):
            with socket.socket(socket.AF_UNIX, kind) as sock:
                try:
                    sock.connect("\\0%05x" % number)
                    hits += 1
                except OSError:
                    pass
    print(hits)
    """
    assert ask(sandbox, probe) == 0
    control = """
    import socket
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as other:
        sock.bind("\\0%05x" % 77); sock.listen()
        other.connect("\\0%05x" % 77)
    print(1)
    """
    assert ask(sandbox, control) == 1
