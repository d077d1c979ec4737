"""A classic BPF interpreter for seccomp filters: what the kernel would answer, without asking it.

Only the instructions that libseccomp and sandboxcore.seccomp emit are known; any other is an error,
as is a program the kernel would not load.
"""

from __future__ import annotations

import os
import platform
import struct
from collections.abc import Sequence

KILL_PROCESS = 0x80000000
LOG = 0x7FFC0000
ALLOW = 0x7FFF0000

AUDIT_ARCH_I386 = 0x40000003
AUDIT_ARCH_X86_64 = 0xC000003E
AUDIT_ARCH_AARCH64 = 0xC00000B7
NATIVE = {"x86_64": AUDIT_ARCH_X86_64, "aarch64": AUDIT_ARCH_AARCH64}[platform.machine()]

LD_ABS, AND, JA, RET = 0x20, 0x54, 0x05, 0x06
JUMPS = {
    0x15: lambda a, k: a == k,  # JEQ
    0x25: lambda a, k: a > k,  # JGT
    0x35: lambda a, k: a >= k,  # JGE
    0x45: lambda a, k: a & k != 0,  # JSET
}
SECCOMP_DATA = struct.Struct("=iIQ6Q")  # nr, arch, instruction_pointer, args[6]


def errno(number: int) -> int:
    return 0x00050000 | number


def decode(program: bytes) -> list[tuple[int, int, int, int]]:
    """Return (code, jt, jf, k) of each instruction, checked as the kernel checks a filter."""
    assert len(program) % 8 == 0
    code = list(struct.iter_unpack("=HBBI", program))
    assert 0 < len(code) <= 4096
    assert code[-1][0] == RET
    for at, (op, jt, jf, k) in enumerate(code):
        after = len(code) - at - 1
        if op == LD_ABS:
            assert k % 4 == 0, f"{at}: unaligned load"
            assert k < SECCOMP_DATA.size, f"{at}: load behind the data"
        elif op == JA:
            assert k < after, f"{at}: jump behind the end"
        elif op in JUMPS:
            assert max(jt, jf) < after, f"{at}: jump behind the end"
        else:
            assert op in (AND, RET), f"{at}: unknown instruction {op:#x}"
    return code


def run(
    program: Sequence[tuple[int, int, int, int]],
    number: int,
    args: Sequence[int] = (),
    arch: int = NATIVE,
) -> int:
    """Return the filter's answer to one system call. `program` is from decode()."""
    six = [value & 0xFFFFFFFFFFFFFFFF for value in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    signed = number - (1 << 32) if number >= 1 << 31 else number
    data = SECCOMP_DATA.pack(signed, arch, 0, *six)
    accumulator = at = 0
    while True:
        op, jt, jf, k = program[at]
        at += 1
        if op == LD_ABS:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif op == AND:
            accumulator &= k
        elif op == JA:
            at += k
        elif op == RET:
            return k
        else:
            at += jt if JUMPS[op](accumulator, k) else jf


def describe(answer: int) -> str:
    """Return an answer in words, for messages of failed tests."""
    if answer & 0xFFFF0000 == errno(0):
        return os.strerror(answer & 0xFFFF)
    return {ALLOW: "allow", LOG: "log", KILL_PROCESS: "kill"}.get(answer, hex(answer))
