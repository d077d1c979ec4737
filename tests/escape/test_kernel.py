"""Attacks through calls that are dangerous by themselves: namespaces, mounts, keys, io_uring...

Two walls, tried one at a time: the seccomp filter, and behind it the sandbox's user namespace, in
which the payload has no capability and no further namespace can be made.
"""

import ctypes
import errno
import os
import platform
import struct
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
    libc,
    marking,
    nested,
    number,
    open_for,
    pack,
    pointer,
    result,
)

from sandboxcore import Cause
from sandboxcore.seccomp_calls import DENIED

pytestmark = pytest.mark.escape

on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86_64 only")

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x80
KINDS = {
    "user": 0,
    "mnt": CLONE_NEWNS,
    "cgroup": CLONE_NEWCGROUP,
    "uts": CLONE_NEWUTS,
    "ipc": CLONE_NEWIPC,
    "pid": CLONE_NEWPID,
    "net": CLONE_NEWNET,
    "time": CLONE_NEWTIME,
}
SIGCHLD = 17
EVERY_CALL = [name for name in DENIED.split() if name not in ("lookup_dcookie", "nfsservctl")]


def read_number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def clone_args(flags: int) -> str:
    return pack("=11Q", flags, 0, 0, 0, SIGCHLD, 0, 0, 0, 0, 0, 0)


# --- namespaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nested_user_namespace_by_unshare(hostile: Hostile, kind: str) -> None:
    attack = calls(call("unshare", CLONE_NEWUSER | KINDS[kind]))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    # the second wall: user.max_user_namespaces and its like are 0
    assert hostile.inside(attack, seccomp=allowing("unshare")).verdict == "ENOSPC"


@pytest.mark.parametrize("kind", KINDS.keys() - {"time"})  # clone has no flag for that one
def test_nested_user_namespace_by_clone(hostile: Hostile, kind: str) -> None:
    attack = calls(call("clone", CLONE_NEWUSER | KINDS[kind] | SIGCHLD, 0, 0, 0, 0))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=allowing("clone")).verdict == "ENOSPC"


@pytest.mark.parametrize("kind", KINDS.keys() - {"user"})
def test_namespace_without_a_user_namespace(hostile: Hostile, kind: str) -> None:
    attack = calls(call("unshare", KINDS[kind]))
    assert hostile.in_userns(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=marking("unshare")).verdict == MARKER
    # no capability, not even for the sandbox's own root
    assert hostile.inside(attack, seccomp=allowing("unshare"), user="0").verdict == "EPERM"


def test_high_bits_do_not_hide_clone_flags(hostile: Hostile) -> None:
    """A filter that compared 64 bits would see another number than the kernel does."""
    attack = calls(call("clone", 1 << 40 | CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"


def test_clone3_hides_its_flags(hostile: Hostile) -> None:
    attack = calls(call("clone3", clone_args(CLONE_NEWUSER), 88))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "ENOSYS"
    assert hostile.inside(attack, seccomp=allowing("clone3")).verdict == "ENOSPC"
    harmless = calls(call("clone3", clone_args(0), 88))
    assert hostile.inside(harmless, seccomp=allowing("clone3")).verdict == "ok"


@pytest.mark.parametrize("kind", ["mnt", "net", "uts", "ipc", "cgroup", "pid"])
def test_setns_into_a_namespace_file(hostile: Hostile, kind: str) -> None:
    """Into one's own namespace even: what is asked for is the capability."""
    attack = calls(
        call("openat", AT_FDCWD, f"/proc/self/ns/{kind}", os.O_RDONLY), call("setns", result(0), 0)
    )
    assert hostile.in_userns(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=marking("setns")).verdict == MARKER
    assert hostile.inside(attack, seccomp=allowing("setns"), user="0").verdict == "EPERM"


def test_setns_into_init_by_pidfd(hostile: Hostile) -> None:
    attack = calls(call("pidfd_open", 1, 0), call("setns", result(0), CLONE_NEWUTS))
    assert hostile.in_userns(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    for user in ("1000", "0"):
        assert hostile.inside(attack, seccomp=allowing("setns"), user=user).verdict == "EPERM"


def test_setns_into_the_host_by_passed_descriptor(hostile: Hostile) -> None:
    """Even a caller who hands the host's namespace over does not hand over the way in."""
    with open("/proc/self/ns/net") as namespace:
        fd = namespace.fileno()
        attack = calls(call("setns", fd, 0))
        policy = allowing("setns")
        assert hostile.inside(attack, pass_fds=[fd]).verdict == "EPERM"
        assert hostile.inside(attack, pass_fds=[fd], seccomp=policy).verdict == "EPERM"
        if os.geteuid() == 0:
            assert hostile.outside(attack, pass_fds=[fd]).verdict == "ok"


# --- mounts -------------------------------------------------------------------------------------

MS_BIND, MS_REC, MS_REMOUNT, MS_SHARED, MNT_DETACH = 4096, 16384, 32, 1 << 20, 2
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH, AT_EMPTY_PATH = 1, 4, 0x1000
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6
MOUNT_ATTR_CLEAR_ALL = pack("=4Q", 0, 0x1 | 0x2 | 0x4 | 0x8, 0, 0)  # rdonly nosuid nodev noexec

FSMOUNT = (
    call("fsopen", "tmpfs", 0),
    call("fsconfig", result(0), FSCONFIG_CMD_CREATE, 0, 0, 0),
    call("fsmount", result(0), 0, 0),
    call("move_mount", result(2), "", AT_FDCWD, "/tmp", MOVE_MOUNT_F_EMPTY_PATH),
)
CLONE_TREE = call("open_tree", AT_FDCWD, "/usr", OPEN_TREE_CLONE)
PRIVATE_TMP = call("mount", "none", "/tmp", "tmpfs", 0, 0)

# What it is called, the calls that the filter answers, the attack.
MOUNT_ATTACKS = {
    "tmpfs": ("mount", [PRIVATE_TMP]),
    "proc": ("mount", [call("mount", "none", "/tmp", "proc", 0, 0)]),
    "sysfs": ("mount", [call("mount", "none", "/tmp", "sysfs", 0, 0)]),
    "cgroup2": ("mount", [call("mount", "none", "/tmp", "cgroup2", 0, 0)]),
    "devpts": ("mount", [call("mount", "none", "/tmp", "devpts", 0, 0)]),
    "mqueue": ("mount", [call("mount", "none", "/tmp", "mqueue", 0, 0)]),
    "bind": ("mount", [call("mount", "/usr", "/tmp", 0, MS_BIND, 0)]),
    "rbind of everything": ("mount", [call("mount", "/", "/tmp", 0, MS_BIND | MS_REC, 0)]),
    "remount": ("mount", [PRIVATE_TMP, call("mount", "none", "/tmp", 0, MS_REMOUNT, 0)]),
    "propagation": ("mount", [call("mount", "none", "/", 0, MS_REC | MS_SHARED, 0)]),
    "umount": ("umount2", [PRIVATE_TMP, call("umount2", "/tmp", MNT_DETACH)]),
    "fsopen": ("fsopen", [FSMOUNT[0]]),
    "fsmount": ("fsopen fsconfig fsmount move_mount", [*FSMOUNT]),
    "open_tree": ("open_tree", [CLONE_TREE]),
    "move_mount": (
        "open_tree move_mount",
        [CLONE_TREE, call("move_mount", result(0), "", AT_FDCWD, "/tmp", MOVE_MOUNT_F_EMPTY_PATH)],
    ),
    "mount_setattr": (
        "mount_setattr",
        [PRIVATE_TMP, call("mount_setattr", AT_FDCWD, "/tmp", 0, MOUNT_ATTR_CLEAR_ALL, 32)],
    ),
    "fspick": ("fspick", [PRIVATE_TMP, call("fspick", AT_FDCWD, "/tmp", 0)]),
    "pivot_root": (
        "pivot_root",
        [PRIVATE_TMP, call("chdir", "/tmp"), call("pivot_root", ".", ".")],
    ),
    "chroot": ("chroot", [call("chroot", "/tmp")]),
}  # fmt: skip


@pytest.mark.parametrize("name", MOUNT_ATTACKS)
def test_mounts(hostile: Hostile, name: str) -> None:
    """By the old interface and the new one, which an old deny-list would miss (CVE-2021-41133)."""
    names, steps = MOUNT_ATTACKS[name]
    whole = calls(*steps)
    # inside, /tmp is a tmpfs of its own already
    attack = calls(*(step for step in steps if step is not PRIVATE_TMP or steps == [PRIVATE_TMP]))
    policy = allowing(*names.split())
    assert hostile.in_userns(whole).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=marking(*names.split())).verdict == MARKER
    # without the filter: no capability over the mounts, for either of the sandbox's users
    assert hostile.inside(attack, seccomp=policy).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=policy, user="0").verdict == "EPERM"


@pytest.mark.parametrize("target", ["/usr", "/etc", "/", "/proc/sys", "/hostile", "/dev/null"])
def test_remount_of_what_is_read_only(hostile: Hostile, target: str) -> None:
    writable = call("mount", "none", target, 0, MS_REMOUNT | MS_BIND, 0)
    bare = call("umount2", target, MNT_DETACH)
    own = call("mount", target, target, 0, MS_BIND, 0)
    frozen = call("mount", "none", target, 0, MS_REMOUNT | MS_BIND | 1, 0)
    if target not in ("/", "/hostile"):
        assert hostile.in_userns(calls(own, frozen, bare)).verdict == "ok"
    policy = allowing("mount", "umount2")
    for attack in (calls(writable), calls(bare)):
        assert hostile.inside(attack).verdict == "EPERM"
        assert hostile.inside(attack, seccomp=policy, user="0").verdict == "EPERM"


def test_release_agent(hostile: Hostile) -> None:
    """CVE-2022-0492: there is no cgroup file system to write to, and no way to mount one."""
    mount = calls(
        call("mount", "none", "/tmp", "cgroup2", 0, 0),
        call("openat", AT_FDCWD, "/tmp/cgroup.procs", os.O_WRONLY),
    )
    assert hostile.in_userns(mount).answers[0] == "ok"
    assert hostile.inside(mount, seccomp=allowing("mount"), user="0").verdict == "EPERM"
    assert hostile.inside(open_for("/sys/fs/cgroup", os.O_RDONLY)).verdict == "ENOENT"
    old = calls(call("mount", "none", "/tmp", "cgroup", 0, "pids"))
    assert hostile.inside(old).verdict == "EPERM"


# --- other ways into the kernel -----------------------------------------------------------------


@on_x86_64
def test_32_bit_entry(hostile: Hostile) -> None:
    attack = ["call", "i386:20"]  # getpid; the filter knows 64-bit numbers only
    assert hostile.outside(attack).verdict in ("ok", "SIGSEGV")  # by the kernel's configuration
    assert hostile.inside(attack).answers == ("SIGSYS",)
    assert hostile.run_inside(attack).cause is Cause.SECCOMP


@on_x86_64
def test_x32_entry(hostile: Hostile) -> None:
    attack = calls(call(0x40000000 | number("getpid")))
    assert hostile.outside(attack).verdict in ("ok", "ENOSYS")
    assert hostile.inside(attack).answers == ("SIGSYS",)


@pytest.mark.parametrize("number", [490, 5000, 0x3FFFFFFF])
def test_calls_of_the_future(hostile: Hostile, number: int) -> None:
    """What the policy does not know looks like what the kernel does not know."""
    assert hostile.inside(calls(call(number))).verdict == "ENOSYS"


def test_io_uring(hostile: Hostile) -> None:
    attack = calls(call("io_uring_setup", 1, pointer(bytes(120))))
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(calls(call("io_uring_enter", 0, 0, 0, 0, 0))).verdict == "EPERM"
    # nothing else stands in the way, where kernel.io_uring_disabled is 0
    disabled = os.path.exists("/proc/sys/kernel/io_uring_disabled") and (
        read_number("/proc/sys/kernel/io_uring_disabled") > 0
    )
    expected = "EPERM" if disabled else "ok"
    assert hostile.inside(attack, seccomp=allowing("io_uring_setup")).verdict == expected
    assert hostile.outside(attack).verdict in ("ok", expected)


BPF_MAP_CREATE = call("bpf", 0, pack("=5I", 2, 4, 4, 1, 0), 20)  # an array of one integer
PERF_ATTR = pack("=IIQQQQQ8Q", 1, 112, 0, 0, 0, 0, 0x61, *[0] * 8)  # cpu-clock, exclude_kernel
RICH = {
    "bpf": BPF_MAP_CREATE,
    "perf_event_open": call("perf_event_open", PERF_ATTR, 0, -1, -1, 0),
    "userfaultfd": call("userfaultfd", 1),  # UFFD_USER_MODE_ONLY
    "fanotify_init": call("fanotify_init", 0x200, 0),  # FAN_REPORT_FID
    "name_to_handle_at": call(
        "name_to_handle_at", AT_FDCWD, "/usr", pack("=Ii", 128, 0) + "00" * 128, pointer(bytes(8)), 0
    ),
    "syslog": call("syslog", 10, 0, 0),  # SYSLOG_ACTION_SIZE_BUFFER
    "clock_adjtime": call("clock_adjtime", 0, pack("=I", 0x8001) + "00" * 204),  # by 0 us
    "settimeofday": call("settimeofday", 0, 0),  # asks for the right only
    "quotactl": call("quotactl", 0x80000100, 0, 0, 0),  # Q_SYNC of everything
    "sethostname": call("sethostname", os.uname().nodename, len(os.uname().nodename)),
}  # fmt: skip
# What takes root outside; elsewhere it is the marker that shows the attack can tell.
ROOT_ONLY = {"bpf", "syslog", "clock_adjtime", "settimeofday", "sethostname"}
ROOT_ONLY |= {"perf_event_open"} if read_number("/proc/sys/kernel/perf_event_paranoid") > 2 else set()
# Where the filter is the only wall.
ONE_WALL = {"userfaultfd", "fanotify_init", "name_to_handle_at", "perf_event_open", "quotactl"}


@pytest.mark.parametrize("name", RICH)
def test_rich_interfaces(hostile: Hostile, name: str) -> None:
    attack = calls(RICH[name])
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=marking(name)).verdict == MARKER
    behind = hostile.inside(attack, seccomp=allowing(name)).verdict
    outside = hostile.outside(attack).verdict
    if os.geteuid() == 0 or name not in ROOT_ONLY:
        assert outside in ("ok", "ENOSYS", "EOPNOTSUPP"), "the attack has to work somewhere"
    if name == "perf_event_open" and behind == "EACCES":  # a second wall, where the host is strict
        return
    assert behind == (outside if name in ONE_WALL else "EPERM")


@pytest.mark.parametrize("name", EVERY_CALL)
def test_every_denied_call_is_answered_by_the_filter(hostile: Hostile, name: str) -> None:
    """Modules, kexec, swap, quota, reboot, clocks, handles, keys...: with impossible arguments."""
    try:
        attack = calls(call(name, *[-1] * 6))
    except KeyError:
        pytest.skip(f"{name} is not a system call of this machine")
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(attack, seccomp=marking(name)).verdict == MARKER


def file_handle(path: Path) -> bytes:
    """struct file_handle, as name_to_handle_at(2) fills it."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128), 136)
    mount_id = ctypes.c_int()
    c = libc()
    if c.name_to_handle_at(AT_FDCWD, bytes(path), handle, ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return handle.raw


def test_shocker(hostile: Hostile, open_dir: Path) -> None:
    """open_by_handle_at opens any file of a file system by a number that can be guessed."""
    secret = open_dir / "secret"
    secret.write_text("secret")
    try:
        handle = file_handle(secret)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        pytest.skip("this file system has no file handles")
    attack = calls(
        call("openat", AT_FDCWD, str(open_dir), os.O_RDONLY),
        call("open_by_handle_at", result(0), pointer(handle), os.O_RDONLY),
        call("read", result(1), BUFFER, 100),
    )
    if os.geteuid() == 0:
        assert hostile.outside(attack).data == b"secret"
    granted = {"ro": [(open_dir, open_dir)]}
    assert hostile.inside(attack, **granted).verdict == "EPERM"
    answered = hostile.inside(attack, seccomp=marking("open_by_handle_at"), **granted)
    assert answered.answers[:2] == ("ok", MARKER)
    # no CAP_DAC_READ_SEARCH where the file system belongs
    policy = allowing("open_by_handle_at")
    assert hostile.inside(attack, seccomp=policy, user="0", **granted).verdict == "EPERM"


# --- what a payload may not undo ----------------------------------------------------------------

ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC = 0x40000, 0x400000
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
SECCOMP_SET_MODE_FILTER = 1


@pytest.mark.parametrize("persona", [ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC, 1 << 32 | 0x40000])
def test_personality(hostile: Hostile, persona: int) -> None:
    """Children would inherit a world without address randomisation, set-uid programs included."""
    attack = calls(call("personality", persona))
    assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(calls(call("personality", 0xFFFFFFFF))).values == (0,)


def test_no_new_privs_stays(hostile: Hostile) -> None:
    again = calls(call("prctl", PR_SET_NO_NEW_PRIVS, 0, 0, 0, 0), call("unshare", CLONE_NEWUSER))
    assert hostile.inside(again).answers == ("EINVAL", "EPERM")
    assert hostile.inside(calls(call("prctl", PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))).values == (1,)
    assert hostile.outside(calls(call("prctl", PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))).values == (0,)


def test_a_second_filter_lifts_nothing(hostile: Hostile) -> None:
    """The strictest answer of all filters holds, however many allow the call."""
    allow_all = pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)  # return SECCOMP_RET_ALLOW
    program = nested(struct.pack("=HHI", 1, 0, 0), allow_all)  # struct sock_fprog
    add = call("seccomp", SECCOMP_SET_MODE_FILTER, 0, program)
    assert hostile.inside(calls(add, call("unshare", CLONE_NEWUSER))).answers == ("ok", "EPERM")


@pytest.mark.parametrize("user", ["1000", "0"])
def test_capabilities_do_not_come_back(hostile: Hostile, user: str) -> None:
    """Neither by asking, nor by changing to another user of the sandbox."""
    everything = pack("=6I", 0xFFFFFFFF, 0xFFFFFFFF, 0, 0x1FF, 0x1FF, 0)
    header = pack("=Ii", 0x20080522, 0)
    wanted = calls(call("capset", header, everything))
    assert hostile.in_userns(wanted).verdict == "ok"
    assert hostile.inside(wanted, user=user).verdict == "EPERM"
    for name, args in {
        "setuid": [5],
        "setgid": [5],
        "setresuid": [5, 5, 5],
        "setgroups": [1, pack("=I", 5)],
    }.items():
        assert hostile.inside(calls(call(name, *args)), user=user).verdict in ("EPERM", "EINVAL")
