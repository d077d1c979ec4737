"""System call policies, and their compilation to a seccomp filter.

A policy answers each system call in one of four ways:

* *allow*: the call runs;
* *rule*: it runs or not by its arguments (clone flags, socket families, ioctl requests);
* *deny*: EPERM, for calls known to be dangerous, so that a program can say why it failed;
* anything else gets the default, ENOSYS: what a kernel without the call would say, and what
  programs know how to fall back from. A call newer than this file is therefore closed, not open.

Two answers hold whatever the policy says. A call made through another architecture's table (32-bit,
x32) kills the process. clone3 is ENOSYS unless a policy names it: its flags lie in memory, where a
filter cannot look, and every C library falls back to clone.

libseccomp turns the numbers into a binary tree. (The kernel walks a filter once for every system
call number when it is loaded, so the shape decides what loading costs.) It cannot express "every
value but these", so a call with a rule gets a marker for its answer there, and the marker then
becomes a jump to a short block of our own that looks at the arguments.

Nothing here loads a filter: the result is bytes. The built-in profiles are at the end of the file,
the names in them in seccomp_calls.py.
"""

from __future__ import annotations

import errno as errnos
import importlib
import os
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

from sandboxcore import seccomp_calls as calls
from sandboxcore.errors import SpecError, UnsupportedHost
from sandboxcore.seccomp_policy import ArgRule, ArgTest, SeccompPolicy

__all__ = [
    "PROFILES",
    "ArgRule",
    "ArgTest",
    "SeccompPolicy",
    "compile_filter",
    "hosts_launcher",
    "resolve",
    "without_set_id",
]

MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS: the kernel takes no longer filter

# struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; }
_INSTRUCTION = struct.Struct("=HBBI")
_Instruction = tuple[int, int, int, int]
_LD_ABS, _AND, _JA, _JEQ, _RET = 0x20, 0x54, 0x05, 0x15, 0x06
_ARGS = 16  # offset of args[] in struct seccomp_data

# Return values, in the kernel's words SECCOMP_RET_...
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000
_LOG = 0x7FFC0000
_ALLOW = 0x7FFF0000
_TRACE = 0x7FF00000  # no policy can ask for it, so it is free to be the marker of a rule
_ACTION_FULL = 0xFFFF0000

_DEFAULTS = {
    "ENOSYS": _ERRNO | errnos.ENOSYS,
    "EPERM": _ERRNO | errnos.EPERM,
    "kill": _KILL_PROCESS,
    "log": _LOG,
}


def resolve(policy: str | Mapping[str, Any] | SeccompPolicy) -> SeccompPolicy:
    """Return the policy meant by a profile's name, by plain data, or by itself.

    Plain data is what SeccompPolicy.from_dict() takes, and `base`: the profile it extends.
    Raises SpecError.
    """
    if isinstance(policy, SeccompPolicy):
        return policy
    if isinstance(policy, Mapping):
        own = {key: value for key, value in policy.items() if key != "base"}
        base = resolve(policy["base"]) if "base" in policy else None
        return SeccompPolicy.from_dict(own, base=base)
    if isinstance(policy, str) and policy in PROFILES:
        return PROFILES[policy]
    raise SpecError(f"seccomp: no profile {policy!r}; there are {', '.join(PROFILES)}")


def compile_filter(policy: str | Mapping[str, Any] | SeccompPolicy) -> bytes:
    """Compile a policy, or the profile of that name, to an array of struct sock_filter.

    The first compilation in a process imports pyseccomp; the result is kept for the next call.
    Raises SpecError for a name that is no system call and for a filter too long for the kernel,
    UnsupportedHost without libseccomp 2.5.
    """
    return _compile(resolve(policy))


@lru_cache(maxsize=64)
def _compile(policy: SeccompPolicy) -> bytes:
    if sys.byteorder != "little":  # the tests read the low half of an argument where it lies here
        raise UnsupportedHost("seccomp filters on a big-endian machine", "use x86_64 or aarch64")
    answers = {"clone3": _ERRNO | errnos.ENOSYS}
    answers |= dict.fromkeys(policy.allow, _ALLOW)
    answers |= dict.fromkeys(policy.deny, _ERRNO | errnos.EPERM)
    answers |= {rule.call: _TRACE | i for i, rule in enumerate(policy.rules)}
    tree = _tree(answers, _DEFAULTS[policy.default])
    program = _link(tree, [_block(rule) for rule in policy.rules])
    if len(program) > MAX_INSTRUCTIONS:
        raise SpecError(
            f"seccomp: policy {policy.name} needs {len(program)} instructions,"
            f" the kernel takes {MAX_INSTRUCTIONS}"
        )
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in program)


def _tree(answers: Mapping[str, int], default: int) -> list[_Instruction]:
    """Let libseccomp make the filter that looks at the architecture and the number only."""
    lib = _pyseccomp()
    try:
        tree = lib.SyscallFilter(default)
        tree.set_attr(lib.Attr.CTL_OPTIMIZE, 2)  # a binary tree instead of a list
        tree.set_attr(lib.Attr.ACT_BADARCH, lib.KILL_PROCESS)
    except OSError as error:
        raise UnsupportedHost(
            f"seccomp filters ({error.strerror})", "needs libseccomp 2.5 and Linux 4.14 or newer"
        ) from error
    for name, action in sorted(answers.items()):
        number = _number(lib, name)
        if number is not None and action != default:  # libseccomp rejects what repeats the default
            tree.add_rule(action, number)
    with os.fdopen(os.memfd_create("seccomp-filter"), "rb") as file:
        tree.export_bpf(file)
        file.seek(0)
        return list(_INSTRUCTION.iter_unpack(file.read()))


def _number(lib: ModuleType, name: str) -> int | None:
    """Return the number of a call here, None for one that only other kernels have."""
    number: int = lib.resolve_syscall(lib.Arch.NATIVE, name)
    if number == -1:  # libseccomp never heard of it
        number = calls.RECENT.get(name, -1)
    if number == -1 and not any(name in _calls(profile) for profile in PROFILES.values()):
        raise SpecError(f"seccomp: no system call is named {name!r}")
    return number if number >= 0 else None  # below -1: a call of other architectures


def _calls(policy: SeccompPolicy) -> frozenset[str]:
    return policy.allow | policy.deny | {rule.call for rule in policy.rules}


def _link(tree: Sequence[_Instruction], blocks: Sequence[list[_Instruction]]) -> list[_Instruction]:
    """Put the blocks behind the tree and let its markers jump to them."""
    program = list(tree)
    starts = []
    for block in blocks:
        starts.append(len(program))
        program += block
    for at, (code, _, _, k) in enumerate(tree):
        if code == _RET and k & _ACTION_FULL == _TRACE:
            program[at] = (_JA, 0, 0, starts[k & 0xFFFF] - at - 1)
    return program


def _block(rule: ArgRule) -> list[_Instruction]:
    allowed, refused = _ALLOW, _ERRNO | getattr(errnos, rule.errno)
    hit, miss = (allowed, refused) if rule.match == "allow" else (refused, allowed)
    alternatives = [_conjunction(tests, hit) for tests in rule.when]
    return [*(line for lines in alternatives for line in lines), (_RET, 0, 0, miss)]


def _conjunction(tests: Sequence[ArgTest], hit: int) -> list[_Instruction]:
    """Return `hit` when all tests hold; run past the end when one does not."""
    code: list[_Instruction] = [(_RET, 0, 0, hit)]
    for test in reversed(tests):
        load: list[_Instruction] = [(_LD_ABS, 0, 0, _ARGS + 8 * test.index)]
        if test.mask != 0xFFFFFFFF:
            load.append((_AND, 0, 0, test.mask))
        *others, last = test.values
        compare = [(_JEQ, len(others) - i, 0, value) for i, value in enumerate(others)]
        code = [*load, *compare, (_JEQ, 0, len(code), last), *code]
    return code


_import_lock = threading.Lock()


def call_name(number: int) -> str:
    """A system call's name on this machine, or its number."""
    lib = _pyseccomp()
    try:
        name: bytes = lib.resolve_syscall(lib.Arch.NATIVE, number)
    except ValueError:  # newer than the library
        return str(number)
    return name.decode()


def _pyseccomp() -> ModuleType:
    """Import pyseccomp without starting a process.

    It looks for its libraries with ctypes.util.find_library(), which runs ldconfig: 3 ms, a SIGCHLD
    the program around us did not ask for, and no result where there is no ldconfig. The dynamic
    linker finds both by name.
    """
    importer = threading.get_ident()
    names = {"c": None, "seccomp": "libseccomp.so.2"}  # None: the C library this process runs on

    def find_library(name: str) -> str | None:
        ours = threading.get_ident() == importer and name in names
        return names[name] if ours else search(name)

    with _import_lock:
        # Imports subprocess: not needed before the first filter. Not `import ctypes.util`: while another
        # thread imports it, too, it may be there already and not yet be known as ctypes.util.
        from ctypes import util

        search = util.find_library
        vars(util)["find_library"] = find_library
        try:
            return importlib.import_module("pyseccomp")
        except ModuleNotFoundError as error:
            raise UnsupportedHost("seccomp filters", "pip install pyseccomp") from error
        except (OSError, RuntimeError) as error:
            raise UnsupportedHost("seccomp filters", "apt-get install libseccomp2") from error
        finally:
            vars(util)["find_library"] = search


# --- The built-in profiles --------------------------------------------------------------------


def _arg(index: int, *values: int, mask: int = 0xFFFFFFFF) -> ArgTest:
    return ArgTest(index=index, values=values, mask=mask)


_COMMON_RULES = (
    # No namespace flag, CLONE_NEWNS to CLONE_NEWNET. (CLONE_NEWTIME does not exist here: its bit is
    # part of the exit signal.)
    ArgRule(call="clone", when=((_arg(0, 0, mask=0x7E020000),),)),
    # PER_LINUX, PER_LINUX32, both also with UNAME26, and the question which one it is. Not
    # ADDR_NO_RANDOMIZE or READ_IMPLIES_EXEC, which children inherit.
    ArgRule(call="personality", when=((_arg(0, 0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF),),)),
    # TIOCSTI and TIOCLINUX type into the terminal, TIOCCONS takes the console's output, TIOCSETD
    # loads line disciplines.
    ArgRule(call="ioctl", match="refuse", when=((_arg(1, 0x5412, 0x541C, 0x541D, 0x5423),),)),
    # One's own limits only: for other processes the kernel compares ids, and in a sandbox those are
    # all the same.
    ArgRule(call="prlimit64", when=((_arg(0, 0),),)),
    ArgRule(call="socketpair", when=((_arg(0, 1),),), errno="EAFNOSUPPORT"),
    # SOL_TCP, TCP_ULP: kernel TLS and its like.
    ArgRule(call="setsockopt", match="refuse", when=((_arg(1, 6), _arg(2, 31)),)),
)


def _prctl(*options: int) -> ArgRule:
    # EINVAL is what the kernel says to an option it does not know, so programs can cope with it.
    return ArgRule(call="prctl", when=((_arg(0, *options),),), errno="EINVAL")


def _socket(*inet: ArgTest) -> ArgRule:
    # AF_UNIX; AF_INET and AF_INET6 as `inet` says; AF_NETLINK with NETLINK_ROUTE. The others get
    # the answer of a kernel built without them.
    when = ((_arg(0, 1),), (_arg(0, 2, 10), *inet), (_arg(0, 16), _arg(2, 0)))
    return ArgRule(call="socket", when=when, errno="EAFNOSUPPORT")


def hosts_launcher(policy: SeccompPolicy) -> bool:
    """Whether init and the launchers of a living sandbox can do their work behind this policy."""
    known = {rule for profile in PROFILES.values() for rule in profile.rules}
    ruled = {rule.call for rule in policy.rules if rule in known} | policy.allow
    return policy.allow >= set(calls.LAUNCHER.split()) and ruled >= set(calls.LAUNCHER_RULES.split())


# O_CREAT, __O_TMPFILE: only with one of them has open() a mode to look at.
_CREATES = 0o100, 0o20000000, 0o20000100
_SET_ID = 0o2000, 0o4000, 0o6000


def without_set_id(policy: SeccompPolicy) -> SeccompPolicy:
    """The policy for a sandbox that can write to a host directory: no set-user-ID or set-group-ID bits.

    Such a file would belong to the directory's owner, and outside anybody could run it. openat2 hides
    its mode in memory, so it gets the default answer.

    Raises SpecError where a custom rule already says something about one of these calls.
    """
    mode = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "mknod": 1, "mknodat": 2, "creat": 1}
    tests: dict[str, tuple[ArgTest, ...]] = {
        call: (_arg(index, *_SET_ID, mask=0o6000),) for call, index in mode.items()
    }
    for call, index in (("open", 1), ("openat", 2)):
        flags = _arg(index, *_CREATES, mask=0o20000100)
        tests[call] = (flags, _arg(index + 1, *_SET_ID, mask=0o6000))
    for rule in policy.rules:
        if rule.call in tests or rule.call == "openat2":
            raise SpecError(f"seccomp: a rule for {rule.call} cannot be combined with rw= or a volume")
    bounded = {call: when for call, when in tests.items() if call in policy.allow}
    return replace(
        policy,
        name=f"{policy.name} without set-id",
        allow=policy.allow - bounded.keys() - {"openat2"},
        rules=(*policy.rules, *(ArgRule(call=c, match="refuse", when=(w,)) for c, w in bounded.items())),
    )


def _profiles() -> dict[str, SeccompPolicy]:
    minimal = SeccompPolicy(
        name="minimal",
        allow=frozenset(calls.MINIMAL.split()),
        rules=(*_COMMON_RULES, _prctl(*calls.PRCTL_MINIMAL)),
        deny=frozenset([*calls.DENIED.split(), "ptrace", "socket"]),
    )
    standard = minimal.extend(
        name="standard",
        allow=calls.STANDARD.split(),
        rules=[
            _prctl(*calls.PRCTL_MINIMAL, *calls.PRCTL_STANDARD),
            # SOCK_STREAM, DGRAM, RAW (not SOCK_PACKET, which turns AF_INET into AF_PACKET) with
            # the default protocol, ICMP, TCP, UDP, ICMPv6: others load modules.
            _socket(_arg(1, 1, 2, 3, mask=0xF), _arg(2, 0, 1, 6, 17, 58)),
        ],
    )
    full = standard.extend(
        name="full",
        allow=calls.FULL.split(),
        rules=[
            _prctl(*calls.PRCTL_MINIMAL, *calls.PRCTL_STANDARD, *calls.PRCTL_FULL),
            _socket(_arg(1, 1, 2, 3, 4, 5, 6, mask=0xF)),
            # A debugger may run its own program (PTRACE_TRACEME), but not seize others: no
            # PTRACE_ATTACH, no PTRACE_SEIZE.
            ArgRule(call="ptrace", match="refuse", when=((_arg(0, 16, 0x4206),),)),
        ],
    )
    return {policy.name: policy for policy in (minimal, standard, full)}


#: The profiles by name; each allows all that the one before it allows.
#:
#: minimal   One program and its children computing. CPython, compilers and shell pipelines run.
#:           There are no sockets but socketpair(), and no IPC but pipes, signals, shared mappings.
#: standard  What programs commonly need, the network within the sandbox's namespace included.
#: full      Everything that is no danger to isolation: also NUMA placement, asynchronous I/O, all
#:           IP protocols, debuggers that start their own program. Namespaces, mounts, keys, BPF,
#:           io_uring and the rest of the denied calls stay closed.
PROFILES: Mapping[str, SeccompPolicy] = _profiles()
