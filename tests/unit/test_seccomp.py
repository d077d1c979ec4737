"""Seccomp policies, proved by interpreting the compiled filters. One test asks the kernel."""

from __future__ import annotations

import ctypes.util
import errno
import importlib.util
import itertools
import json
import platform
import signal
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxcore import seccomp_calls
from sandboxcore.errors import SpecError, UnsupportedHost
from sandboxcore.seccomp import (
    PROFILES,
    ArgRule,
    ArgTest,
    SeccompPolicy,
    compile_filter,
    resolve,
)

_spec = importlib.util.spec_from_file_location("bpf", Path(__file__).with_name("bpf.py"))
bpf = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bpf)

ALLOW, KILL = bpf.ALLOW, bpf.KILL_PROCESS
EPERM, ENOSYS = bpf.errno(errno.EPERM), bpf.errno(errno.ENOSYS)
EINVAL, EAFNOSUPPORT = bpf.errno(errno.EINVAL), bpf.errno(errno.EAFNOSUPPORT)

on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86_64 only")


@cache
def program(policy: str | SeccompPolicy):
    return bpf.decode(compile_filter(policy))


@cache
def number(name: str) -> int:
    import pyseccomp

    found = pyseccomp.resolve_syscall(0, name)
    return seccomp_calls.RECENT.get(name, -1) if found == -1 else found


def answer(policy: str | SeccompPolicy, name: str, *args: int) -> int:
    return bpf.run(program(policy), number(name), args)


def check(policy: str | SeccompPolicy, name: str, args: tuple[int, ...], expected: int) -> None:
    got = answer(policy, name, *args)
    wanted = bpf.describe(expected)
    assert got == expected, f"{name}{args}: {bpf.describe(got)} instead of {wanted}"


# --- What every profile must say ---------------------------------------------------------------

# Written out again, not taken from seccomp_calls, so that a name lost there is found here.
DANGEROUS = """
    io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key bpf userfaultfd
    perf_event_open process_vm_readv process_vm_writev pidfd_getfd mount umount2 pivot_root
    open_tree open_tree_attr move_mount fsopen fsconfig fsmount fspick mount_setattr statmount
    listmount chroot setns unshare open_by_handle_at name_to_handle_at init_module finit_module
    delete_module kexec_load kexec_file_load settimeofday clock_settime adjtimex clock_adjtime
    quotactl quotactl_fd swapon swapoff reboot move_pages migrate_pages acct syslog vhangup kcmp
    fanotify_init fanotify_mark sethostname setdomainname lookup_dcookie nfsservctl iopl ioperm
"""


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", DANGEROUS.split())
def test_dangerous_calls_are_denied_whatever_their_arguments(profile, name):
    if number(name) < 0:
        pytest.skip(f"{platform.machine()} has no {name}")
    for args in [(), (1,), (0x10000000,), (0xFFFFFFFFFFFFFFFF,) * 6]:
        check(profile, name, args, EPERM)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_no_policy_lists_does_not_exist(profile):
    for unlisted in (435, 600, 5000, 0x3FFFFFFF, 0xFFFFFFFF):  # 435: clone3
        assert bpf.run(program(profile), unlisted) == ENOSYS


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("arch", [bpf.AUDIT_ARCH_I386, bpf.NATIVE ^ 1, bpf.NATIVE & 0xFFFF, 0])
def test_another_architecture_kills(profile, arch):
    for nr in (*range(600), 0x40000000, 0xFFFFFFFF):
        assert bpf.run(program(profile), nr, arch=arch) == KILL


@on_x86_64
@pytest.mark.parametrize("profile", PROFILES)
def test_x32_kills(profile):
    for nr in (*range(600), 0x3FFFFFFF):
        assert bpf.run(program(profile), 0x40000000 | nr) == KILL
        assert bpf.run(program(profile), 0x80000000 | nr) == KILL


@pytest.mark.parametrize("profile", PROFILES)
def test_every_number_has_an_expected_answer(profile):
    expected = {ALLOW, EPERM, ENOSYS, EINVAL, EAFNOSUPPORT}
    for nr, args in itertools.product(range(600), [(0,) * 6, (1,) * 6, (2**64 - 1,) * 6]):
        assert bpf.run(program(profile), nr, args) in expected


@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_payload_itself_needs_between_filter_and_exec(profile):
    for name in ("execve", "execveat", "rt_sigprocmask", "exit_group", "write", "read", "openat"):
        check(profile, name, (), ALLOW)


# --- Arguments -----------------------------------------------------------------------------------

M, S, F = "minimal", "standard", "full"
FORK, THREAD, VFORK = 0x01200011, 0x003D0F00, 0x4111
NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
UNIX, INET, INET6, NETLINK, PACKET, ALG, VSOCK = 1, 2, 10, 16, 17, 38, 40
STREAM, DGRAM, RAW, SOCK_PACKET, CLOEXEC = 1, 2, 3, 10, 0o2000000
TCP, UDP, SCTP, MPTCP = 6, 17, 132, 262
TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD = 0x5412, 0x541C, 0x541D, 0x5423
PR_SET_NAME, PR_SET_SECCOMP, PR_SET_MM, PR_SET_IO_FLUSHER, PR_SCHED_CORE = 15, 22, 35, 57, 62

CASES = [
    # call, arguments, {profile: answer} or the answer of all profiles
    *(("clone", (flags,), ALLOW) for flags in (FORK, THREAD, VFORK, 0, 17)),
    *(("clone", (FORK | flag,), EPERM) for flag in NAMESPACES.values()),
    ("clone", (0x7E020000,), EPERM),
    *(("personality", (value,), ALLOW) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)),
    ("personality", (0x0040000,), EPERM),  # ADDR_NO_RANDOMIZE
    ("personality", (0x0400000,), EPERM),  # READ_IMPLIES_EXEC
    ("personality", (0x0100008,), EPERM),  # MMAP_PAGE_ZERO
    *(("ioctl", (0, cmd), EPERM) for cmd in (TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD)),
    *(("ioctl", (0, cmd), ALLOW) for cmd in (0x5401, 0x5411, 0x5413, 0x541B, 0x5421, 0x5422)),
    ("prlimit64", (0, 7, 0, 0), ALLOW),
    ("prlimit64", (1, 7, 0, 0), EPERM),
    ("prlimit64", (0xFFFFFFFF,), EPERM),
    ("socketpair", (UNIX, STREAM), ALLOW),
    ("socketpair", (INET, STREAM), EAFNOSUPPORT),
    ("socketpair", (30, DGRAM), EAFNOSUPPORT),  # AF_TIPC
    ("setsockopt", (3, 6, 31), EPERM),  # SOL_TCP, TCP_ULP
    ("setsockopt", (3, 6, 1), ALLOW),  # TCP_NODELAY
    ("setsockopt", (3, 1, 31), ALLOW),  # the same number at SOL_SOCKET
    *(
        ("socket", (family, kind | flag), {M: EPERM, S: ALLOW, F: ALLOW})
        for family in (UNIX, INET, INET6)
        for kind in (STREAM, DGRAM, RAW)
        for flag in (0, CLOEXEC)
    ),
    ("socket", (UNIX, 5), {M: EPERM, S: ALLOW, F: ALLOW}),  # SOCK_SEQPACKET
    ("socket", (INET, STREAM, TCP), {M: EPERM, S: ALLOW, F: ALLOW}),
    ("socket", (INET6, DGRAM, UDP), {M: EPERM, S: ALLOW, F: ALLOW}),
    ("socket", (INET, STREAM, SCTP), {M: EPERM, S: EAFNOSUPPORT, F: ALLOW}),
    ("socket", (INET, STREAM, MPTCP), {M: EPERM, S: EAFNOSUPPORT, F: ALLOW}),
    ("socket", (INET, SOCK_PACKET), {M: EPERM, S: EAFNOSUPPORT, F: EAFNOSUPPORT}),
    ("socket", (INET, SOCK_PACKET | CLOEXEC), {M: EPERM, S: EAFNOSUPPORT, F: EAFNOSUPPORT}),
    ("socket", (NETLINK, RAW, 0), {M: EPERM, S: ALLOW, F: ALLOW}),
    *(
        ("socket", (NETLINK, RAW, protocol), {M: EPERM, S: EAFNOSUPPORT, F: EAFNOSUPPORT})
        for protocol in (4, 6, 9, 12, 15, 16)  # diag, xfrm, audit, netfilter, uevent, generic
    ),
    *(
        ("socket", (family, RAW, 0), {M: EPERM, S: EAFNOSUPPORT, F: EAFNOSUPPORT})
        for family in range(48)
        if family not in (UNIX, INET, INET6, NETLINK)
    ),
    ("prctl", (PR_SET_NAME,), ALLOW),
    ("prctl", (38, 1), ALLOW),  # SET_NO_NEW_PRIVS
    ("prctl", (0x53564D41,), ALLOW),  # SET_VMA
    ("prctl", (PR_SET_SECCOMP, 2), {M: EINVAL, S: ALLOW, F: ALLOW}),
    ("prctl", (0x59616D61,), {M: EINVAL, S: ALLOW, F: ALLOW}),  # SET_PTRACER
    ("prctl", (53,), {M: EINVAL, S: EINVAL, F: ALLOW}),  # SET_SPECULATION_CTRL
    *(
        ("prctl", (option,), EINVAL)
        for option in (0, PR_SET_MM, PR_SET_IO_FLUSHER, PR_SCHED_CORE, 67, 1000, 0xFFFFFFFF)
    ),
    ("ptrace", (0,), {M: EPERM, S: EPERM, F: ALLOW}),  # TRACEME
    ("ptrace", (16,), EPERM),  # ATTACH
    ("ptrace", (0x4206,), EPERM),  # SEIZE
    *((name, (), {M: ENOSYS, S: ALLOW, F: ALLOW}) for name in ("shmget", "mq_open", "seccomp")),
    *((name, (), {M: ENOSYS, S: ALLOW, F: ALLOW}) for name in ("bind", "landlock_add_rule")),
    *((name, (), {M: ENOSYS, S: ENOSYS, F: ALLOW}) for name in ("mbind", "io_setup", "sysfs")),
    *((name, (), ALLOW) for name in ("fork", "vfork", "futex", "mmap", "epoll_wait", "sendmsg")),
    *((name, (), ALLOW) for name in ("memfd_create", "pidfd_open", "pidfd_send_signal", "getppid")),
]


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    CASES,
    ids=[f"{name}-{','.join(map(hex, args))}" for name, args, _ in CASES],
)
@pytest.mark.parametrize("high", [0, 0xFFFFFFFF << 32, 1 << 32], ids=["", "high", "bit32"])
def test_arguments(name, args, high, expected):
    """The kernel reads 32 bits of these arguments, so the upper half must change no answer."""
    if number(name) < 0:
        pytest.skip(f"{platform.machine()} has no {name}")
    args = tuple(arg | high for arg in args)
    for profile in PROFILES:
        check(profile, name, args, expected[profile] if isinstance(expected, dict) else expected)


def test_each_profile_allows_what_the_smaller_one_allows():
    values = sorted({arg for _, args, _ in CASES for arg in args[:1]})
    triples = [(a, b, c) for a in values for b in (0, 1, 10, TIOCSTI) for c in (0, 6, 31)]
    ruled = {number(rule.call) for policy in PROFILES.values() for rule in policy.rules}
    for smaller, larger in itertools.pairwise((M, S, F)):
        for nr in range(600):
            for args in triples if nr in ruled else [()]:
                if bpf.run(program(smaller), nr, args) == ALLOW:
                    assert bpf.run(program(larger), nr, args) == ALLOW, (nr, args)


# --- The filter's shape --------------------------------------------------------------------------


def test_filters_are_small_and_cached():
    sizes = {profile: len(compile_filter(profile)) // 8 for profile in PROFILES}
    assert sizes[M] < 500
    assert sizes[S] < 600
    assert sizes[F] < 700
    assert compile_filter(S) is compile_filter(PROFILES[S])


def test_the_way_to_an_answer_is_short():
    """The kernel walks the filter for each number at load; a list would take hundreds of steps."""
    code = program(F)
    steps = []

    class Counted(list):
        def __getitem__(self, at):
            steps[-1] += 1
            return super().__getitem__(at)

    for nr in range(600):
        steps.append(0)
        bpf.run(Counted(code), nr)
    assert sum(steps) / len(steps) < 20


def test_the_architecture_is_checked_before_anything_else():
    for profile in PROFILES:
        (load, compare) = program(profile)[:2]
        assert load == (bpf.LD_ABS, 0, 0, 4)
        assert (compare[0], compare[3]) == (0x15, bpf.NATIVE)


def test_no_marker_is_left():
    for profile in PROFILES:
        answers = {k for code, _, _, k in program(profile) if code == bpf.RET}
        assert answers <= {ALLOW, EPERM, ENOSYS, KILL, EINVAL, EAFNOSUPPORT}


def test_names_are_known_and_numbers_are_right():
    """A misspelt name would be skipped in silence, as one that only another architecture has is."""
    import pyseccomp

    names = set().union(*(policy.allow | policy.deny for policy in PROFILES.values()))
    for name in sorted(names):
        assert number(name) != -1, name
    for name, recent in seccomp_calls.RECENT.items():
        assert pyseccomp.resolve_syscall(0, name) in (-1, recent), name


# --- Users' policies -----------------------------------------------------------------------------


def test_extend_gives_the_last_word():
    mine = PROFILES[S].extend(
        allow=["ptrace", "socket", "clone3"],
        deny=["kill", "prctl", "mbind"],
        rules=[ArgRule(call="dup", when=[[ArgTest(index=0, values=[1, 2])]], errno="EBADF")],
        name="mine",
    )
    assert mine.name == "mine"
    for name in ("ptrace", "socket", "clone3"):
        check(mine, name, (16, 16, 16), ALLOW)
    for name in ("kill", "prctl", "mbind"):
        check(mine, name, (15,), EPERM)
    check(mine, "dup", (2,), ALLOW)
    check(mine, "dup", (3,), bpf.errno(errno.EBADF))
    check(mine, "mount", (), EPERM)
    check(mine, "getpid", (), ALLOW)
    assert resolve(mine) is mine
    assert PROFILES[S].extend().name == "standard+"


def test_extend_replaces_a_rule():
    only_unix = ArgRule(call="socket", when=[[ArgTest(index=0, values=[UNIX])]])
    mine = PROFILES[S].extend(rules=[only_unix])
    check(mine, "socket", (UNIX, STREAM, 0), ALLOW)
    check(mine, "socket", (INET, STREAM, 0), EPERM)


@pytest.mark.parametrize(
    ("default", "expected"),
    [("ENOSYS", ENOSYS), ("EPERM", EPERM), ("kill", KILL), ("log", bpf.LOG)],
)
def test_default_answers(default, expected):
    policy = replace(PROFILES[S], default=default)
    check(policy, "mbind", (), expected)
    assert bpf.run(program(policy), 5000) == expected
    check(policy, "getpid", (), ALLOW)
    check(policy, "mount", (), EPERM)
    check(policy, "clone3", (), ENOSYS)
    assert bpf.run(program(policy), number("getpid"), arch=bpf.AUDIT_ARCH_I386) == KILL


def test_an_empty_policy_allows_nothing():
    policy = SeccompPolicy(name="nothing")
    assert {bpf.run(program(policy), nr) for nr in range(600)} == {ENOSYS}


def test_plain_data_round_trip():
    for policy in PROFILES.values():
        data = json.loads(json.dumps(policy.to_dict()))
        assert SeccompPolicy.from_dict(data) == policy
        assert resolve(data) == policy


def test_policy_from_toml():
    data = tomllib.loads("""
        base = "standard"
        name = "quiet"
        default = "EPERM"
        allow = ["mbind"]
        deny = ["inotify_init1"]

        [[rules]]
        call = "socket"
        errno = "EACCES"
        when = [
            [{ index = 0, values = [1] }],
            [{ index = 0, values = [2] }, { index = 1, values = [2], mask = 15 }],
        ]
    """)
    policy = resolve(data)
    assert policy.name == "quiet"
    check(policy, "mbind", (), ALLOW)
    check(policy, "inotify_init1", (), EPERM)
    check(policy, "socket", (UNIX, STREAM), ALLOW)
    check(policy, "socket", (INET, DGRAM | CLOEXEC), ALLOW)
    check(policy, "socket", (INET, STREAM), bpf.errno(errno.EACCES))
    check(policy, "io_setup", (), EPERM)
    assert resolve({"base": "full"}).name == "full+"
    assert resolve({"allow": ["read"]}).name == "custom"


TEST = ArgTest(index=0, values=(1,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: resolve("paranoid"), "paranoid.*minimal, standard, full"),
        (lambda: resolve(None), "no profile None"),
        (lambda: resolve({"base": "paranoid"}), "paranoid"),
        (lambda: resolve({"alow": []}), "unknown key 'alow'"),
        (lambda: resolve({"allow": "read"}), "allow must be a list"),
        (lambda: resolve({"allow": [1]}), "names of system calls"),
        (lambda: resolve({"rules": [1]}), "not a table"),
        (lambda: resolve({"rules": [{"call": "dup"}]}), "empty condition"),
        (lambda: resolve({"rules": [{"when": [[{"index": 0, "values": [1]}]]}]}), "needs the name"),
        (lambda: resolve({"rules": [{"call": "dup", "when": [[{"values": [1]}]]}]}), "index"),
        (lambda: resolve({"rules": [{"call": "dup", "when": [[{"index": 0}]]}]}), "without values"),
        (lambda: SeccompPolicy(name=""), "needs a name"),
        (lambda: SeccompPolicy(name="x", default="ESRCH"), "default is one of"),
        (lambda: SeccompPolicy(name="x", allow={"dup"}, deny={"dup"}), "one answer for dup"),
        (lambda: SeccompPolicy(name="x", rules=["dup"]), "not an ArgRule"),
        (lambda: ArgTest(index=6, values=[1]), "0 to 5"),
        (lambda: ArgTest(index=0, values=1), "must be a list"),
        (lambda: ArgTest(index=0, values=[-1]), "unsigned 32-bit"),
        (lambda: ArgTest(index=0, values=[1 << 32]), "unsigned 32-bit"),
        (lambda: ArgTest(index=0, values=[3], mask=1), "never matched"),
        (lambda: ArgRule(call="dup", when=[[]]), "empty condition"),
        (lambda: ArgRule(call="dup", when=[[1]]), "ArgTest"),
        (lambda: ArgRule(call="dup", when=[TEST]), "must be a list"),
        (lambda: ArgRule(call="dup", when=[[TEST]], match="maybe"), "'allow' or 'refuse'"),
        (lambda: ArgRule(call="dup", when=[[TEST]], errno="EWHAT"), "EWHAT"),
        (
            lambda: ArgRule(call="dup", when=[[ArgTest(index=0, values=range(300))]]),
            "too many values",
        ),
        (lambda: compile_filter(PROFILES[S].extend(allow=["opeat"])), "'opeat'"),
        (lambda: compile_filter({"base": "standard", "deny": ["nosuchcall"]}), "nosuchcall"),
    ],
)
def test_mistakes_are_named(make, words):
    with pytest.raises(SpecError, match=words):
        make()


def test_a_filter_longer_than_the_kernel_takes_is_refused():
    condition = [ArgTest(index=0, values=range(240))]
    names = sorted(name for name in PROFILES[S].allow if number(name) >= 0)[:20]
    policy = SeccompPolicy(name="long", rules=[ArgRule(call=n, when=[condition]) for n in names])
    with pytest.raises(SpecError, match=r"policy long needs .* the kernel takes 4096"):
        compile_filter(policy)


def test_calls_of_other_architectures_are_skipped():
    policy = PROFILES[S].extend(allow=["socketcall"], deny=["mmap2"])
    assert program(policy) == program(S)


# Any policy does what its data says: the tree, the markers and the blocks together.
tests = st.builds(
    lambda index, mask, values: ArgTest(index=index, mask=mask, values=[v & mask for v in values]),
    st.integers(0, 5),
    st.sampled_from([0xFFFFFFFF, 0xFF, 0x7E020000, 1]),
    st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), min_size=1, max_size=12),
)
rules = st.builds(
    ArgRule,
    call=st.sampled_from(["read", "ioctl", "clone", "tee", "futex_wait", "listns"]),
    when=st.lists(st.lists(tests, min_size=1, max_size=4), min_size=1, max_size=4),
    match=st.sampled_from(["allow", "refuse"]),
    errno=st.sampled_from(["EPERM", "ENOSYS", "EINVAL"]),
)
arguments = st.lists(st.integers(0, 3) | st.integers(0, 2**64 - 1), min_size=6, max_size=6)


@settings(max_examples=100, deadline=None)
@given(st.lists(rules, max_size=6, unique_by=lambda rule: rule.call), st.lists(arguments))
def test_a_filter_says_what_its_rules_say(rules, many_args):
    policy = SeccompPolicy(name="any", allow={"write", "open"}, deny={"mount"}, rules=rules)
    code = bpf.decode(compile_filter(policy))
    for rule, args in itertools.product(rules, many_args):
        holds = any(all(args[t.index] & t.mask in t.values for t in tests) for tests in rule.when)
        refused = bpf.errno(getattr(errno, rule.errno))
        expected = ALLOW if holds == (rule.match == "allow") else refused
        assert bpf.run(code, number(rule.call), args) == expected
    assert bpf.run(code, number("write")) == ALLOW
    assert bpf.run(code, number("mount")) == EPERM
    assert bpf.run(code, number("close")) == ENOSYS


# --- Hosts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError("libseccomp.so.2: cannot open shared object file"), "apt-get install libseccomp2"),
        (ModuleNotFoundError("pyseccomp"), "pip install pyseccomp"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(monkeypatch, error, remedy):
    def fail(*_args):
        raise error

    find_library = ctypes.util.find_library
    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(UnsupportedHost) as caught:
        compile_filter(SeccompPolicy(name="needs the library"))
    assert caught.value.remedy == remedy
    assert ctypes.util.find_library is find_library


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=child_env())


def child_env() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_compiling_starts_no_process():
    done = run_python("""if True:
        import signal, subprocess, os
        signal.signal(signal.SIGCHLD, lambda *_: os._exit(3))
        subprocess.Popen = None
        from sandboxcore.seccomp import compile_filter
        assert compile_filter("standard")
    """)
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_may_compile_at_once():
    results, barrier = [], threading.Barrier(8)

    def work():
        barrier.wait(10)
        results.append(compile_filter(PROFILES[F].extend(name="threads")))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(results) == 8
    assert len(set(results)) == 1


def test_importing_is_light():
    """libseccomp, and the much that pyseccomp imports, wait for the first filter."""
    done = run_python("import sys, sandboxcore.seccomp; print('pyseccomp' in sys.modules)")
    assert (done.stdout, done.stderr) == ("False\n", "")


KERNEL = """if True:
    import ctypes, errno, json, struct, sys
    libc = ctypes.CDLL(None, use_errno=True)
    calls = json.loads(sys.argv[2])
    code = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]))

    class Filter(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    fprog = Filter((len(code) - 1) // 8, ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(fprog), 0, 0) == 0, ctypes.get_errno()
    for number, *args in calls:
        ctypes.set_errno(0)
        result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, args))
        print(ctypes.get_errno() if result == -1 else 0, flush=True)
"""


@pytest.mark.parametrize("profile", PROFILES)
def test_the_kernel_agrees(profile):
    nobody = 0x7FFFFFFF  # no such process: a call that came through would say ESRCH
    calls = {
        ("getppid",): 0,
        ("ptrace", 16, nobody): errno.EPERM,
        ("clone3", 0, 0): errno.ENOSYS,
        ("unshare", 0): errno.EPERM,
        ("prlimit64", nobody, 7, 0, 0): errno.EPERM,
        ("ioctl", nobody, TIOCSTI, 0): errno.EPERM,
        ("ioctl", nobody, TIOCSTI | 1 << 32, 0): errno.EPERM,
        ("ioctl", nobody, 0x5401, 0): errno.EBADF,
        ("socketpair", INET, STREAM, 0, 0): errno.EAFNOSUPPORT,
        ("prctl", PR_SET_MM, 0, 0, 0, 0): errno.EINVAL,
        ("getpid",): 0,
    }
    numbers = json.dumps([[number(name), *args] for name, *args in calls])
    done = run_python(KERNEL, compile_filter(profile).hex(), numbers)
    assert done.stderr == ""
    assert [int(line) for line in done.stdout.split()] == list(calls.values())


@on_x86_64
def test_the_kernel_kills_x32():
    done = run_python(KERNEL, compile_filter("full").hex(), json.dumps([[39], [0x40000000 | 39]]))
    assert done.stdout.split() == ["0"]
    assert done.returncode == -signal.SIGSYS
