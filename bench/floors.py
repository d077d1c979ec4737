"""Floors: what the kernel alone charges, measured by floors.c (which says how)."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from bench.subjects import Refused, Subject

FLOORS = {
    "vfork_exec": "vfork, exec and wait of a dynamic `true`",
    "fork_exec": "the same with fork",
    "clone.none": "clone3, exit, wait of an empty child",
    "clone.user": "with a new user namespace",
    "clone.mnt": "with a new mount namespace: a copy of all the host's mounts",
    "clone.pid": "with a new pid namespace",
    "clone.net": "with a new network namespace",
    "clone.ipc": "with a new ipc namespace",
    "clone.uts": "with a new uts namespace",
    "clone.cgroup": "with a new cgroup namespace",
    "clone.time": "with a new time namespace",
    "clone.all_but_net": "user mnt pid ipc uts cgroup at once",
    "clone.all": "user mnt pid net ipc uts cgroup at once",
    "seccomp_load.linear": "load a filter that compares 300 numbers one after the other",
    "seccomp_load.tree": "load the filter of the standard profile, a tree",
    "overlay_mount": "mount overlay, upper on tmpfs",
    "proc_mount": "mount proc of a new pid namespace",
    "tmpfs_mount": "mount tmpfs",
    "pivot_umount": "pivot_root and lazy umount of a copy of the host's mounts",
    "netns_create": "unshare of the network namespace",
    "netns_setns": "setns to a ready network namespace",
    "lo_up": "bring lo up in a new network namespace",
}
PACED = {"vfork_exec", "clone.all", "netns_create", "pivot_umount"}
LINEAR_SYSCALLS = 300
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def linear_filter() -> bytes:
    """An allow-list as a beginner writes it: the architecture, then one comparison a call."""

    def instruction(code: int, if_true: int, if_false: int, k: int) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, k)

    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allow, kill, eperm = 0x7FFF0000, 0x80000000, 0x00050001  # SECCOMP_RET_*
    head = [
        instruction(load, 0, 0, 4),  # seccomp_data.arch
        instruction(equal, 1, 0, AUDIT_ARCH.get(platform.machine(), 0)),
        instruction(answer, 0, 0, kill),
        instruction(load, 0, 0, 0),  # seccomp_data.nr
    ]
    for number in range(LINEAR_SYSCALLS):
        head += [instruction(equal, 0, 1, number), instruction(answer, 0, 0, allow)]
    return b"".join([*head, instruction(answer, 0, 0, eperm)])


def tree_filter() -> bytes:
    """The filter that a default sandbox loads; empty, and so refused, without the library."""
    try:
        from sandboxcore.seccomp import compile_filter
    except ImportError:
        return b""
    return compile_filter("standard")


class Floors(AbstractContextManager["Floors"]):
    """The floors program, built in `directory` and running until the context ends."""

    def __init__(self, directory: Path) -> None:
        program, scratch = directory / "floors", directory / "scratch"
        linear, tree = directory / "linear.bpf", directory / "tree.bpf"
        source = Path(__file__).with_suffix(".c")
        compiler = [os.environ.get("CC", "cc"), "-std=c11", "-D_GNU_SOURCE", "-O2", "-static"]
        try:
            subprocess.run([*compiler, source, "-o", program], check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise Refused(f"no C compiler: {error.filename}") from None
        except subprocess.CalledProcessError as error:
            raise Refused(f"floors.c does not build: {error.stderr.strip()[-200:]}") from None
        scratch.mkdir()
        linear.write_bytes(linear_filter())
        tree.write_bytes(tree_filter())
        true = shutil.which("true") or "/bin/true"
        self._process = subprocess.Popen(
            [program, scratch, true, linear, tree],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()  # end of input ends the program

    def block(self, name: str, count: int, gap_s: float) -> list[float]:
        """`count` samples of one floor, each `gap_s` seconds after the one before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{name} {count} {round(gap_s * 1e6)}\n")
        line = self._process.stdout.readline()
        if not line:
            raise Refused("the floors program ended")
        answer = json.loads(line)
        if answer["step"]:
            number = answer["errno"]
            code = errno.errorcode.get(number, str(number))
            raise Refused(f"{answer['step']}: {code} ({os.strerror(number)})")
        samples: list[float] = answer["us"]
        return samples

    def subjects(self) -> list[Subject]:
        def of(name: str) -> Callable[[int, float], list[float]]:
            return lambda count, gap_s: self.block(name, count, gap_s)

        return [
            Subject(name=f"floor.{name}", block=of(name), does=does, paced=2 if name in PACED else 0)
            for name, does in FLOORS.items()
        ]
