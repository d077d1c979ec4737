"""How an attack is written down, and where it is tried.

An attack is a list of system calls, made one after the other by a small static program (hostile.c).
The same attack is tried *outside*, where it has to succeed, and *inside* a sandbox, where it must not;
or outside as the root of a new user namespace, when it takes capabilities that a user lacks.
"""

import ctypes
import functools
import os
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyseccomp

import sandboxcore
from sandboxcore import SandboxSpec
from sandboxcore.seccomp import PROFILES, ArgRule, ArgTest, SeccompPolicy
from sandboxcore.seccomp_calls import RECENT

AT_FDCWD = -100
BUFFER = "%"  # an argument: where a call may put 64 KiB
PROGRAM = "/hostile/hostile"  # inside

STANDARD = PROFILES["standard"]
AS_ROOT_INSIDE = "0"  # SandboxSpec.user: uid 0 of the sandbox, the one that init has
MARKER = "EXDEV"  # what no attacked call says by itself

# A command line after "hostile"; what outside(), in_userns() and inside() take.
Attack = Sequence[str]


def result(call: int) -> str:
    """An argument: what the call of this number, counted from 0, returned."""
    return f"${call}"


def pointer(data: bytes) -> str:
    """An argument: the address of these bytes."""
    return "&" + data.hex()


def nested(*parts: bytes | str) -> str:
    """An argument: the address of these bytes, where text is itself an argument, an address."""
    inner = ("(" + part.removeprefix("&") + ")" if isinstance(part, str) else part.hex() for part in parts)
    return "&" + "".join(inner)


def pack(layout: str, *values: Any) -> str:
    """An argument: the address of a C struct."""
    return pointer(struct.pack(layout, *values))


@functools.cache
def number(name: str) -> int:
    """The number of a system call on this machine."""
    found: int = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    return found if found >= 0 else RECENT[name]


def call(name: str | int, *args: int | str | bytes) -> list[str]:
    """One system call. Text is passed as a C string, unless it is made by the functions above."""
    words = [str(number(name) if isinstance(name, str) else name)]
    for arg in args:
        if isinstance(arg, int):
            words.append(str(arg & 0xFFFFFFFFFFFFFFFF))
        elif isinstance(arg, bytes):
            words.append("@" + os.fsdecode(arg))
        else:
            words.append(arg if arg[:1] in ("$", "&", "%") else "@" + arg)
    return words


def calls(*steps: list[str]) -> list[str]:
    """System calls one after the other."""
    words = ["call"]
    for at, step in enumerate(steps):
        words += [",", *step] if at else step
    return words


def read(path: str | Path) -> list[str]:
    """Read the beginning of a file."""
    flags = os.O_RDONLY | os.O_NONBLOCK
    return calls(call("openat", AT_FDCWD, str(path), flags), call("read", result(0), BUFFER, 65000))


def open_for(path: str | Path, flags: int, mode: int = 0o600) -> list[str]:
    """Open a file."""
    return calls(call("openat", AT_FDCWD, str(path), flags, mode))


@dataclass(frozen=True)
class Outcome:
    """What the kernel answered.

    answers: for each call "ok" or the name of an error; the name of the signal if one ended it.
    values: what each call returned, -1 for an error.
    data: what the last call put into the buffer.
    """

    answers: tuple[str, ...]
    values: tuple[int, ...]
    data: bytes

    @property
    def verdict(self) -> str:
        """ "ok" if every call succeeded, else the first error."""
        return next((answer for answer in self.answers if answer != "ok"), "ok")


def _outcome(output: bytes, returncode: int) -> Outcome:
    text, _, data = output.partition(b"\0")
    answers, values = [], []
    for line in text.decode().splitlines():
        answer, _, value = line.partition(" ")
        answers.append(answer)
        values.append(int(value) if value else -1)
    if returncode < 0:
        answers.append(signal.Signals(-returncode).name)
    return Outcome(tuple(answers), tuple(values), data)


class Hostile:
    """The compiled program, and the three places to run it."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.spec = SandboxSpec(ro=((program.parent, "/hostile"),))

    # --- attacks made of calls ------------------------------------------------------------------

    def outside(self, attack: Attack, **options: Any) -> Outcome:
        """Without a sandbox. Options are those of subprocess.run()."""
        done = self.run_outside(attack, **options)
        return _outcome(done.stdout, done.returncode)

    def in_userns(self, attack: Attack, **options: Any) -> Outcome:
        """Without a sandbox, with all capabilities over new namespaces of every kind."""
        return self.outside(["userns", *attack], **options)

    def inside(self, attack: Attack, **options: Any) -> Outcome:
        """In a sandbox. Options are those of sandboxcore.run(), and fields of SandboxSpec."""
        done = self.run_inside(attack, **options)
        return _outcome(done.stdout, done.returncode)

    # --- any command line of the program --------------------------------------------------------

    def run_outside(self, args: Attack, **options: Any) -> subprocess.CompletedProcess[bytes]:
        """The finished process."""
        given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "timeout": 30, **options}
        if "stdout" not in given:
            given["capture_output"] = True
        done = subprocess.run([self.program, *args], **given)
        assert done.returncode not in (64, 111, 112), done.stderr
        return done

    def run_inside(self, args: Attack, **options: Any) -> sandboxcore.ExecResult:
        """The result."""
        fields = {name: options.pop(name) for name in list(options) if name in _SPEC_FIELDS}
        if "ro" in fields:
            fields["ro"] = (*self.spec.ro, *fields["ro"])
        options.setdefault("timeout", 30)
        done = sandboxcore.run([PROGRAM, *args], spec=self.spec.replace(**fields), **options)
        assert done.returncode not in (64, 111, 112), done.stderr
        return done


_SPEC_FIELDS = frozenset(SandboxSpec.__dataclass_fields__)


# --- walls that stand behind the filter ---------------------------------------------------------


def allowing(*names: str) -> SeccompPolicy:
    """The standard policy without a word against these calls: what is left is the next wall."""
    return STANDARD.extend(name="allowing", allow=names)


def marking(*names: str) -> SeccompPolicy:
    """The standard policy, but it answers these calls with MARKER.

    Many a call says EPERM with and without the filter. An attack that comes back with the marker
    has shown that it does make the call, and that it was the filter that answered.
    """
    never = ((ArgTest(index=5, values=(0xD15EA5E,)),),)
    rules = [ArgRule(call=name, when=never, errno=MARKER) for name in names]
    return STANDARD.extend(name="marking", rules=rules)


# --- helpers ------------------------------------------------------------------------------------


def as_nobody() -> dict[str, Any]:
    """Options that make a child of root an ordinary user; nothing for a user."""
    if os.geteuid() != 0:
        return {}
    return {"user": 65534, "group": 65534, "extra_groups": []}


def libc() -> ctypes.CDLL:
    """For calls that Python has no word for."""
    return ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Conversation:
    """The other ends of its pipes. A payload that is not in our hands says when it is ready."""

    stdin: Any
    stdout: Any
    thread: threading.Thread
    finished: list[Any]

    def await_ready(self) -> None:
        """Wait for the line."""
        assert self.stdout.readline() == b"ready\n"

    def end(self) -> Any:
        """Close its stdin and return what it returned."""
        self.stdin.close()
        self.thread.join(30)
        return self.finished[0]


@contextmanager
def conversation(run: Callable[..., Any], *args: Any, **options: Any) -> Iterator[Conversation]:
    """Something that takes stdin= and stdout= and returns when it is done, while it runs."""
    for_stdin, for_us = os.pipe()
    from_it, for_stdout = os.pipe()
    finished: list[Any] = []

    def target() -> None:
        try:
            finished.append(run(*args, stdin=for_stdin, stdout=for_stdout, **options))
        finally:
            os.close(for_stdin)
            os.close(for_stdout)

    thread = threading.Thread(target=target)
    thread.start()
    with open(from_it, "rb") as stdout, open(for_us, "wb", buffering=0) as stdin:
        try:
            yield Conversation(stdin, stdout, thread, finished)
        finally:
            stdin.close()
            thread.join(30)
            assert not thread.is_alive(), "it does not end"
