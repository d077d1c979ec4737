"""Namespaces: each sandbox has its own of every kind, and what is in them works."""

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support import (
    IS_ROOT,
    PROJECT,
    Spec,
    ask_python,
    host_environment,
    sandbox_processes,
    shell,
    wait_until,
)

import sandboxcore
from sandboxcore.host import ROOT_ID_BASE, features

KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
READ = "print(json.dumps({k: os.stat('/proc/self/ns/' + k).st_ino for k in os.listdir('/proc/self/ns')}))"


def inodes(**fields) -> dict[str, int]:
    return ask_python(READ, spec=Spec(**fields))


def own_inode(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


# --- which ------------------------------------------------------------------------------------------


def test_every_namespace_is_new() -> None:
    one, other = inodes(), inodes()
    for kind in KINDS:
        assert one[kind] != own_inode(kind), kind
        # an inode number may be used again once its namespace is gone: see the next test
        assert other[kind] != own_inode(kind), kind
    assert one["time"] == own_inode("time")


def test_two_sandboxes_share_none(tmp_path: Path) -> None:
    """Two at the same time; the second is started while the first is known to live."""
    from concurrent.futures import ThreadPoolExecutor

    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    spec = Spec(rw=[(shared, "/shared")])
    code = f"""
        import time
        open('/shared/' + sys.argv[1], 'w').close()
        while len(os.listdir('/shared')) < 2:
            time.sleep(0.002)
        {READ}
    """
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(ask_python, code, name, spec=spec, timeout=30) for name in ("a", "b")]
        one, other = (run.result(40) for run in runs)
    assert {kind for kind in KINDS if one[kind] == other[kind]} == set()


def test_the_record_tells_the_same() -> None:
    done = sandboxcore.run(["true"], record=True)
    assert done.capabilities is not None
    for kind in KINDS:
        assert done.capabilities.namespaces[kind] != own_inode(kind)


# --- time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [86400.0, 1000.25, 0.0])
def test_time_offsets(offset: float) -> None:
    spec = Spec(time_offsets={"monotonic": offset, "boottime": offset + 7})
    clocks = (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME)
    before = [time.clock_gettime(clock) for clock in clocks]
    inside = ask_python(
        "import time; print(json.dumps([time.clock_gettime(c) for c in map(int, sys.argv[1:])]))",
        *map(str, clocks),
        spec=spec,
    )
    after = [time.clock_gettime(clock) for clock in clocks]
    for index, shift in enumerate((offset, offset + 7)):
        assert before[index] + shift <= inside[index] <= after[index] + shift


def test_negative_time_offset() -> None:
    up = time.clock_gettime(time.CLOCK_MONOTONIC)
    spec = Spec(time_offsets={"monotonic": -up / 2})
    inside = ask_python("import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))", spec=spec)
    assert up / 2 <= inside <= time.clock_gettime(time.CLOCK_MONOTONIC) - up / 2


def test_time_offsets_make_a_time_namespace() -> None:
    assert inodes(time_offsets={"monotonic": 1})["time"] != own_inode("time")


# --- network ----------------------------------------------------------------------------------------

USE_LOOPBACK = """
    import socket, threading
    found = []
    for family, host in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
        if family == socket.AF_INET6 and not os.path.exists('/proc/net/if_inet6'):
            continue
        with socket.create_server((host, 0), family=family) as server:
            def serve():
                with server.accept()[0] as peer:
                    peer.sendall(peer.recv(100)[::-1])
            thread = threading.Thread(target=serve)
            thread.start()
            with socket.create_connection(server.getsockname()[:2], timeout=10) as client:
                client.sendall(b'abc')
                found.append([host, client.recv(100).decode()])
            thread.join()
    print(json.dumps([found, [name for _, name in socket.if_nameindex()]]))
"""


@pytest.mark.parametrize("network", ["none", "private"])
def test_loopback_works_and_is_all_there_is(network: str) -> None:
    talked, interfaces = ask_python(USE_LOOPBACK, spec=Spec(network=network))
    expected = ["127.0.0.1"] + ["::1"] * os.path.exists("/proc/net/if_inet6")
    assert talked == [[host, "cba"] for host in expected]
    assert interfaces == ["lo"]


CONNECT = """
    import socket
    with socket.socket() as s:
        s.settimeout(10)
        print(json.dumps(s.connect_ex(('127.0.0.1', int(sys.argv[1])))))
"""


@pytest.mark.parametrize(("network", "reached"), [("none", False), ("private", False), ("host", True)])
def test_a_port_of_the_host(network: str, *, reached: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = ask_python(CONNECT, str(server.getsockname()[1]), spec=Spec(network=network))
    assert (answer == 0) == reached


def test_host_network_is_the_hosts() -> None:
    found = inodes(network="host")
    assert found["net"] == own_inode("net")
    assert found["pid"] != own_inode("pid")


def test_loopback_of_a_used_namespace_is_not_shared() -> None:
    """A port that one sandbox still holds is free in every other."""
    code = "import socket; socket.create_server(('127.0.0.1', 7777)); print(1)"
    assert [ask_python(code) for _ in range(5)] == [1] * 5


# --- names and ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sandbox", "box-1", "a.b.c", "x" * 63])
def test_hostname(name: str) -> None:
    before = socket.gethostname()
    code = (
        "import socket; print(json.dumps([socket.gethostname(), socket.gethostbyname(socket.gethostname())]))"
    )
    assert ask_python(code, spec=Spec(hostname=name)) == [name, "127.0.0.1"]
    assert socket.gethostname() == before


IDS = "print(json.dumps([*os.getresuid(), *os.getresgid(), os.getgroups()]))"


@pytest.mark.parametrize(
    ("user", "uid", "gid"),
    [
        (None, 1000, 1000),
        ("0", 0, 0),
        (0, 0, 0),
        ("1000:1001", 1000, 1001),
        (65535, 65535, 65535),
        ("5:0", 5, 0),
    ],
)
def test_user(user: int | str | None, uid: int, gid: int) -> None:
    inside = ask_python(IDS, spec=Spec(user=user))
    # rootless, the groups of the caller cannot be dropped; they show as the overflow group
    assert inside[:-1] == [uid] * 3 + [gid] * 3
    assert set(inside[-1]) <= {gid, 65534}


def test_user_has_a_name_and_a_home() -> None:
    done = shell("id -un; id -gn; echo $HOME; cd; pwd", spec=Spec(user="77:88"))
    assert done.stdout == b"sandbox\nsandbox\n/workspace\n/workspace\n"


@pytest.mark.parametrize("user", [None, 0])
def test_identity_as_the_host_sees_it(user: int | None) -> None:
    """No payload has an id of the host's own range as root, and rootless it is the caller's."""
    from concurrent.futures import ThreadPoolExecutor

    sandboxcore.run(["true"], spec=Spec(user=user))
    before = sandbox_processes()
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(sandboxcore.run, ["sleep", "60"], spec=Spec(user=user), timeout=30)
        payload = wait_until(lambda: _named("sleep", sandbox_processes() - before), "the payload")
        status = Path(f"/proc/{payload}/status").read_text()
        os.kill(payload, 9)
        assert run.result(20).returncode == -9
    uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    outside = {"root": ROOT_ID_BASE + (1000 if user is None else user), "rootless": os.geteuid()}
    mode = features().mode
    if mode in outside:
        assert uids == [str(outside[mode])] * 4
    assert (mode == "root") == IS_ROOT


def _named(name: str, pids: set[int]) -> int | None:
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
        except OSError:
            continue
    return None


@pytest.mark.needs_root
@pytest.mark.needs_program("newuidmap", "newgidmap", "setpriv", "unshare")
def test_subordinate_ids(tmp_path: Path) -> None:
    """With a range in /etc/subuid, the payload gets ids that are not the caller's."""
    checkout = Path(sandboxcore.__file__).resolve()
    if not all(folder.stat().st_mode & 0o001 for folder in checkout.parents):
        pytest.skip("this checkout lies where no other user can read it")
    tmp_path.chmod(0o755)
    passwd = Path("/etc/passwd").read_text() + "subject:x:61999:61999::/:/bin/sh\n"  # newuidmap wants a name
    for name, text in {
        "passwd": passwd,
        **dict.fromkeys(("subuid", "subgid"), "subject:300000:65536\n"),
    }.items():
        (tmp_path / name).write_text(text)
    code = (
        "import sandboxcore; from sandboxcore.host import features; print(features().mode);"
        "s = 'id -u; echo a > f; stat -c %u f; cat /proc/self/uid_map';"
        "d = sandboxcore.run(['sh', '-c', s], text=True);"
        "print(d.stdout, d.stderr)"
    )
    import sys

    script = (
        'for f in passwd subuid subgid; do mount --bind "$1/$f" /etc/$f || exit 99; done; shift; '
        'exec setpriv --reuid 61999 --regid 61999 --clear-groups --inh-caps=-all "$@"'
    )
    for name in ("/etc/subuid", "/etc/subgid"):
        if not os.path.exists(name):
            pytest.skip(f"no {name} to cover")
    if not os.access(PROJECT, os.R_OK) or (PROJECT.stat().st_mode & 0o005) != 0o005:
        pytest.skip("the checkout is not readable for other users")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=host_environment() | {"HOME": "/"},
        cwd="/",
    )
    assert done.stderr == ""
    mode, uid, owner, *maps = done.stdout.split("\n")
    assert (mode, uid, owner) == ("subuid", "1000", "1000")
    assert sum(int(line.split()[2]) for line in maps if line.strip()) == 65536
