"""Attacks over the network: the host's own services, its neighbours, and the protocols themselves."""

import os
import socket
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from escape.hostile import (
    AT_FDCWD,
    BUFFER,
    MARKER,
    Hostile,
    allowing,
    call,
    calls,
    marking,
    nested,
    open_for,
    pack,
    pointer,
    result,
)

import sandboxcore
from sandboxcore import SandboxSpec
from sandboxcore.host import features

pytestmark = pytest.mark.escape

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_ALG, AF_VSOCK = 1, 2, 10, 16, 17, 38, 40
STREAM, DGRAM, RAW, SEQPACKET, PACKET, NONBLOCK = 1, 2, 3, 5, 10, 0o4000
AF_MAX = 46


def inet(address: str, port: int) -> str:
    return pointer(struct.pack("=HH", AF_INET, socket.htons(port)) + socket.inet_aton(address) + bytes(8))


def inet6(address: str, port: int) -> str:
    head = struct.pack("=HHI", AF_INET6, socket.htons(port), 0)
    return pointer(head + socket.inet_pton(AF_INET6, address) + bytes(4))


def connect(kind: int, address: str, family: int = AF_INET) -> list[str]:
    size = {AF_INET: 16, AF_INET6: 28, AF_UNIX: len(address[1:]) // 2}[family]
    return calls(call("socket", family, kind, 0), call("connect", result(0), address, size))


# --- services of the host -----------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[int]:
    """A port of the host's loopback."""
    with socket.socket() as service:
        service.bind(("127.0.0.1", 0))
        service.listen()
        yield service.getsockname()[1]


@pytest.mark.parametrize("network", ["none", "private"])
def test_loopback_of_the_host(hostile: Hostile, listener: int, network: str) -> None:
    attack = connect(STREAM, inet("127.0.0.1", listener))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack, network=network).verdict == "ECONNREFUSED"
    assert hostile.inside(attack, network="host").verdict == "ok", "nothing but the namespace says no"


@pytest.mark.parametrize("network", ["none", "private"])
def test_loopback_of_another_sandbox(hostile: Hostile, network: str) -> None:
    """Each has a loopback of its own, although namespaces come from a pool."""
    bind = calls(
        call("socket", AF_INET, STREAM, 0),
        call("bind", result(0), inet("127.0.0.1", 4711), 16),
        call("listen", result(0), 5),
        call("socket", AF_INET, STREAM, 0),
        call("connect", result(3), inet("127.0.0.1", 4711), 16),
    )
    for _ in range(3):
        assert hostile.inside(bind, network=network).verdict == "ok"
    later = connect(STREAM, inet("127.0.0.1", 4711))
    assert hostile.inside(later, network=network).verdict == "ECONNREFUSED"


@pytest.mark.parametrize("address", ["192.0.2.1", "169.254.169.254", "10.0.0.1", "8.8.8.8", "2001:db8::1"])
def test_other_hosts(hostile: Hostile, address: str) -> None:
    """Neighbours, and the address where clouds hand out credentials: there is no way to anywhere."""
    if ":" in address:
        attack = connect(DGRAM, inet6(address, 53), AF_INET6)
        assert hostile.inside(attack).verdict in ("ENETUNREACH", "EAFNOSUPPORT")
        return
    attack = connect(DGRAM, inet(address, 53))
    for network in ("none", "private"):
        for user in ("1000", "0"):
            done = hostile.inside(attack, network=network, user=user)
            assert done.answers == ("ok", "ENETUNREACH")
    # struct rtentry: a default route by way of lo, in a namespace of one's own
    any_address = struct.pack("=HH", AF_INET, 0) + bytes(12)
    route = bytes(8) + any_address * 3 + struct.pack("=H30x", 1)
    up = struct.pack("=16sH22x", b"lo", 0x41)
    SIOCSIFFLAGS, SIOCADDRT = 0x8914, 0x890B
    device = pack("=16s", b"lo\0")
    entry = nested(route, device, bytes(24))
    made = calls(
        call("socket", AF_INET, DGRAM, 0),
        call("ioctl", result(0), SIOCSIFFLAGS, pointer(up)),
        call("ioctl", result(0), SIOCADDRT, entry),
        call("connect", result(0), inet(address, 53), 16),
    )
    assert hostile.in_userns(made).verdict == "ok", "where there is a route, the attack succeeds"
    for user in ("1000", "0"):  # and the sandbox's root cannot make one
        done = hostile.inside(made, network="private", user=user)
        assert done.answers == ("ok", "EPERM", "EPERM", "ENETUNREACH")


def test_interfaces() -> None:
    def names(text: str) -> set[str]:
        return {line.partition(":")[0].strip() for line in text.splitlines() if ":" in line}

    look = ["cat", "/proc/self/net/dev"]
    host = {name for _, name in socket.if_nameindex()}
    inside = sandboxcore.run(look, text=True, record=True)
    with_host = sandboxcore.run(look, text=True, record=True, spec=SandboxSpec(network="host"))
    assert names(inside.stdout) == {"lo"}
    assert names(with_host.stdout) == host
    own = os.stat("/proc/self/ns/net").st_ino
    assert inside.capabilities.namespaces["net"] != own
    assert with_host.capabilities.namespaces["net"] == own


# --- unix sockets -------------------------------------------------------------------------------


def test_abstract_sockets_of_the_host(hostile: Hostile) -> None:
    """Like those of D-Bus and X: a name, no path, and only the network namespace in between."""
    name = b"\0" + uuid.uuid4().hex.encode()
    with socket.socket(AF_UNIX) as service:
        service.bind(name)
        service.listen()
        attack = connect(STREAM, pointer(struct.pack("=H", AF_UNIX) + name), AF_UNIX)
        assert hostile.outside(attack).verdict == "ok"
        assert hostile.inside(attack).verdict == "ECONNREFUSED"
        # the second wall alone: Landlock's scope
        alone = "EPERM" if features().landlock_abi >= 6 else "ok"
        assert hostile.inside(attack, network="host").verdict == alone
        assert hostile.inside(attack, network="host", landlock=False).verdict == "ok"


def test_path_sockets_of_the_host(hostile: Hostile, open_dir: Path) -> None:
    path = open_dir / "socket"
    with socket.socket(AF_UNIX) as service:
        service.bind(str(path))
        path.chmod(0o666)
        service.listen()
        attack = connect(STREAM, pointer(struct.pack("=H", AF_UNIX) + bytes(path) + b"\0"), AF_UNIX)
        assert hostile.outside(attack).verdict == "ok"
        assert hostile.inside(attack).verdict == "ENOENT"
        assert hostile.inside(attack, network="host").verdict == "ENOENT"


@pytest.mark.parametrize(
    "path",
    ["/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/user",
     "/run/systemd/private", "/run/containerd/containerd.sock", "/tmp/.X11-unix", "/dev/log"],
)  # fmt: skip
def test_well_known_sockets(hostile: Hostile, path: str) -> None:
    for network in ("none", "host"):
        done = hostile.inside(open_for(path, os.O_PATH), network=network)
        assert done.verdict == "ENOENT"


# --- protocols ----------------------------------------------------------------------------------

FAMILIES = [family for family in range(AF_MAX) if family not in (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)]


@pytest.mark.parametrize("profile", ["standard", "full"])
def test_rare_families(hostile: Hostile, profile: str) -> None:
    """AF_ALG, AF_VSOCK, AF_PACKET, AF_XDP...: many of them in no namespace, and full of surprises."""
    kinds = (STREAM, DGRAM, RAW, SEQPACKET, 4)
    attack = calls(*(call("socket", family, kind, 0) for family in FAMILIES for kind in kinds))
    assert set(hostile.inside(attack, profile=profile).answers) == {"EAFNOSUPPORT"}
    assert set(hostile.inside(attack, seccomp=marking("socket")).answers) == {MARKER}
    # one of them outside; trying all would make the host load modules
    assert hostile.in_userns(calls(call("socket", AF_PACKET, RAW, 0))).verdict == "ok"
    pairs = calls(*(call("socketpair", family, STREAM, 0, BUFFER) for family in range(2, AF_MAX)))
    assert set(hostile.inside(pairs, profile=profile).answers) == {"EAFNOSUPPORT"}


@pytest.mark.parametrize("family", [AF_PACKET, AF_VSOCK, AF_ALG])
def test_high_bits_do_not_hide_a_family(hostile: Hostile, family: int) -> None:
    attack = calls(call("socket", 1 << 32 | family, RAW if family == AF_PACKET else DGRAM, 0))
    assert hostile.inside(attack).verdict == "EAFNOSUPPORT"
    if family == AF_PACKET:
        assert hostile.in_userns(attack).verdict == "ok"


@pytest.mark.parametrize("network", ["none", "private", "host"])
def test_raw_and_packet_sockets(hostile: Hostile, network: str) -> None:
    raw = calls(call("socket", AF_INET, RAW, 1))
    packet = calls(call("socket", AF_PACKET, RAW, 0x0300))
    old_packet = calls(call("socket", AF_INET, PACKET, 0x0300))
    if os.geteuid() == 0:
        assert hostile.outside(raw).verdict == "ok"
    for attack in (raw, packet, old_packet):
        assert hostile.in_userns(attack).verdict == "ok"
    for user in ("1000", "0"):
        where = {"network": network, "user": user}
        assert hostile.inside(raw, **where).verdict == "EPERM"  # no CAP_NET_RAW
        assert hostile.inside(packet, **where).verdict == "EAFNOSUPPORT"
        assert hostile.inside(old_packet, **where).verdict == "EAFNOSUPPORT"
        for attack in (packet, old_packet):  # the second wall
            assert hostile.inside(attack, seccomp=allowing("socket"), **where).verdict == "EPERM"


def test_netlink_protocols(hostile: Hostile) -> None:
    """Routes only; not audit, uevent, xfrm, netfilter, diagnostics, crypto..."""
    protocols = list(range(1, 23))
    attack = calls(*(call("socket", AF_NETLINK, RAW, protocol) for protocol in protocols))
    for profile in ("standard", "full"):
        assert set(hostile.inside(attack, profile=profile).answers) == {"EAFNOSUPPORT"}
    uevent = 15
    assert hostile.inside(calls(call("socket", AF_NETLINK, RAW, 0))).verdict == "ok"
    high = calls(call("socket", AF_NETLINK, RAW, 1 << 32 | uevent))
    assert hostile.outside(high).verdict == "ok"
    assert hostile.inside(high).verdict == "EAFNOSUPPORT"


def test_protocols_that_load_modules(hostile: Hostile) -> None:
    """DCCP, SCTP, UDP-Lite, L2TP, MPTCP: each asks the kernel for code that it may not have yet."""
    protocols = {33: 6, 132: STREAM, 136: DGRAM, 115: DGRAM, 262: STREAM}
    attack = calls(*(call("socket", AF_INET, kind, number) for number, kind in protocols.items()))
    assert set(hostile.inside(attack).answers) == {"EAFNOSUPPORT"}
    assert set(hostile.inside(attack, seccomp=marking("socket")).answers) == {MARKER}


TCP_ULP, SOL_TCP = 31, 6


@pytest.mark.parametrize("high", [0, 1 << 32])
@pytest.mark.parametrize("ulp", ["tls", "smc", "mptcp", "espintcp"])
def test_kernel_tls(hostile: Hostile, ulp: str, high: int) -> None:
    attack = calls(
        call("socket", AF_INET, STREAM, 0),
        call("setsockopt", result(0), high | SOL_TCP, high | TCP_ULP, ulp, len(ulp)),
    )
    assert hostile.inside(attack).answers == ("ok", "EPERM")
    assert hostile.inside(attack, seccomp=marking("setsockopt")).answers == ("ok", MARKER)
    # Not connected, or no such protocol in this kernel: either way it has thought about it. (Outside,
    # root would make it load a module.)
    behind = hostile.inside(attack, seccomp=allowing("setsockopt")).answers[1]
    assert behind in ("ok", "ENOTCONN", "ENOENT", "EINVAL", "EOPNOTSUPP")
    common = call("setsockopt", result(0), SOL_TCP, 1, pack("=i", 1), 4)  # TCP_NODELAY
    assert hostile.inside(calls(call("socket", AF_INET, STREAM, 0), common)).verdict == "ok"


def test_settings_of_an_interface(hostile: Hostile) -> None:
    """lo belongs to the spawner's user namespace, so nobody inside can touch it."""
    down = pack("=16sH22x", b"lo", 0)
    attack = calls(call("socket", AF_INET, DGRAM, 0), call("ioctl", result(0), 0x8914, down))
    assert hostile.in_userns(attack).verdict == "ok"
    for network in ("none", "private", "host"):
        for user in ("1000", "0"):
            assert hostile.inside(attack, network=network, user=user).verdict == "EPERM"
    setting = open_for("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY)
    assert hostile.in_userns(setting).verdict == "ok"
    assert hostile.inside(setting, network="private", user="0").verdict in ("EROFS", "EACCES")
    tun = calls(call("openat", AT_FDCWD, "/dev/net/tun", os.O_RDWR))
    assert hostile.inside(tun).verdict == "ENOENT"
