"""Attacks by one client of a pool on the next: whatever it leaves must not be there."""

from collections.abc import Iterator

import pytest
from escape.hostile import allowing, number
from living import python
from support import wait_until

from sandboxcore import PIPE, PoolConfig, Sandbox, SandboxError, SandboxPool, SandboxSpec, host

pytestmark = pytest.mark.escape

# Everything that a payload can leave somewhere, each with a mark.
LEAVE = """
import ctypes, os, sys
mark = sys.argv[1]
MQ_OPEN, ADD_KEY, KEYCTL = map(int, sys.argv[2:])
libc = ctypes.CDLL(None, use_errno=True)
for place in ("/tmp", "/var/tmp", "/dev/shm", "/workspace"):
    os.makedirs(f"{place}/.{mark}/deep")
    with open(f"{place}/{mark}", "w") as file:
        file.write(mark)
    try:
        os.setxattr(place, f"user.{mark}", mark.encode())
    except OSError:
        pass
key = 0x5eed
number = libc.shmget(key, 4096, 0o1600)
assert number >= 0
libc.shmat.restype = ctypes.c_void_p
ctypes.memmove(libc.shmat(number, None, 0), mark.encode(), len(mark))
assert libc.semget(key, 1, 0o1600) >= 0
assert libc.msgget(key, 0o1600) >= 0
libc.syscall(MQ_OPEN, mark.encode(), os.O_CREAT | os.O_RDWR, 0o600, None)  # refused, as it is now
assert libc.syscall(ADD_KEY, b"user", mark.encode(), mark.encode(), len(mark), -3) >= 0  # of the session
"""
# What of it is there: one line for each thing.
FIND = """
import ctypes, os, sys
mark = sys.argv[1]
MQ_OPEN, ADD_KEY, KEYCTL = map(int, sys.argv[2:])
libc = ctypes.CDLL(None, use_errno=True)
for top in ("/tmp", "/var/tmp", "/dev/shm", "/workspace"):
    for name in os.listdir(top):
        print("file", top, name)
    for name in os.listxattr(top):
        print("attribute", top, name)
for name, call in (("shm", libc.shmget), ("sem", libc.semget), ("msg", None)):
    got = libc.msgget(0x5eed, 0) if call is None else call(0x5eed, 0, 0)
    if got >= 0:
        print("ipc", name)
if libc.syscall(MQ_OPEN, mark.encode(), os.O_RDWR, 0, None) >= 0:
    print("queue")
if libc.syscall(KEYCTL, 10, -3, b"user", mark.encode(), 0) >= 0:  # KEYCTL_SEARCH of the session
    print("key")
for pid in os.listdir("/proc"):
    if pid.isdecimal() and int(pid) != os.getpid():
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                if mark in file.read():
                    print("process", pid)
        except OSError:
            pass
with open("/proc/net/unix") as file:
    for line in file:
        if mark in line:
            print("socket")
with open("/proc/net/sockstat") as file:
    for line in file:
        words = line.split()
        if words[0] == "TCP:" and int(words[words.index("tw") + 1]):
            print("connection")
with open("/proc/net/snmp") as file:
    for head, line in zip(file, file):
        if head.startswith("Udp:"):
            sent = dict(zip(head.split(), line.split()))["OutDatagrams"]
            if int(sent):
                print("packets")
if int(open("/proc/loadavg").read().split()[-1]) > 60:
    print("numbers")
if mark in " ".join(os.environ.values()):
    print("environment")
"""
# Connections that the kernel remembers, packets that it has counted, numbers of processes.
TRAFFIC = """
import os, socket
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
peer = server.accept()[0]
client.close()
peer.recv(1)
peer.close()
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.sendto(b"x", ("127.0.0.1", 9))
for _ in range(100):
    if os.fork() == 0:
        os._exit(0)
    os.wait()
"""
STAY = """
import socket, sys, time
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind("\\0" + sys.argv[1])
    sock.listen()
    print("ready", flush=True)
    time.sleep(600)
"""


NUMBERS = [str(number(name)) for name in ("mq_open", "add_key", "keyctl")]
KINDS = {"file", "attribute", "ipc", "key", "process", "socket", "connection", "packets", "numbers"}


def leave(sandbox: Sandbox, mark: str) -> None:
    """Leave a mark everywhere."""
    sandbox.exec(python(LEAVE, mark, *NUMBERS), check=True, timeout=30)
    sandbox.exec(python(TRAFFIC), check=True, timeout=30)
    sandbox.detach(python(STAY, mark))
    wait_until(lambda: "socket" in found(sandbox, mark), "the process that stays")


def found(sandbox: Sandbox, mark: str) -> set[str]:
    """What of it a client finds."""
    seen = sandbox.exec(python(FIND, mark, *NUMBERS), check=True, text=True, timeout=30).stdout
    return {line.split()[0] for line in seen.splitlines()}


@pytest.fixture
def pool() -> Iterator[SandboxPool]:
    """One sandbox, which is reset, and which policy is as weak as can be."""
    spec = SandboxSpec(seccomp=allowing("add_key", "keyctl"))
    with SandboxPool(spec, PoolConfig(min_warm=1, max_warm=1, reset=True)) as made:
        assert made.wait_ready(20)
        made.resize(min_warm=0, max_warm=1)
        yield made


def test_what_one_client_leaves_for_the_next(pool: SandboxPool, marker: str) -> None:
    used = pool.claim(client="one", env={"SECRET": marker}, files={"/tmp/given": marker})
    leave(used, marker)
    tmpfs_xattr = host.features().tmpfs_xattr
    control = KINDS | {"environment"} - ({"attribute"} if not tmpfs_xattr else set())
    assert found(used, marker) == control, "the control: without a reset all of it is there"
    pool.release(used)
    wait_until(lambda: pool.available == 1, "the reset")
    with pool.claim(client="two") as fresh:
        assert pool.stats().misses == 0
        assert found(fresh, marker) == set()


def test_keeping_a_handle_of_what_was_given_back(pool: SandboxPool, marker: str) -> None:
    """Whoever has given it back, and all that it has opened before, reach nobody else's."""
    used = pool.claim(client="one")
    process = used.popen(["cat"], stdin=PIPE)
    files = used.files
    kept = files.open("/tmp/kept", "w+b")
    pool.release(used)
    wait_until(lambda: pool.available == 1, "the reset")
    with kept, pool.claim(client="two") as fresh:
        for use in (
            lambda: used.exec(["true"]),
            lambda: files.write("/tmp/x", b"x"),
            lambda: used.popen(["true"]),
            used.snapshot,
            used.start,
        ):
            with pytest.raises(SandboxError):
                use()
        kept.write(marker.encode())
        kept.flush()
        assert process.wait(20) != 0
        assert fresh.files.list("/tmp") == []


def test_a_used_one_without_a_reset(marker: str) -> None:
    """Where nothing is reset, nobody ever gets what somebody else has had."""
    with SandboxPool(config=PoolConfig(min_warm=1, max_warm=2)) as pool:
        seen = set()
        for _ in range(6):
            sandbox = pool.claim(timeout=20)
            assert sandbox.id not in seen
            seen.add(sandbox.id)
            assert sandbox.files.list("/tmp") == []
            sandbox.files.write("/tmp/x", marker)
            pool.release(sandbox)
