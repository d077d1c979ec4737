"""Builds ``sandboxcore._core``, the cffi module of the host side (out of line, API mode, abi3).

The declarations are cut out of the headers between ``cdef-begin`` and ``cdef-end``, so that C and
Python cannot disagree about a layout.
"""

import os
import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).resolve().parent

HOST_SOURCES = (
    *("plan.c", "error.c", "wire.c", "client.c", "stream.c", "ask.c", "run.c", "meter.c", "watch.c"),
    *("fsmount.c", "remove.c"),
)
HELPER_SOURCES = (
    *("plan.c", "path.c", "mount.c", "overlay.c", "layers.c", "layer.c", "copy.c", "pack.c", "unpack.c"),
    *("shelf.c", "root.c", "template.c", "idmap.c", "net.c", "message.c", "session.c", "fds.c", "rlimit.c"),
    *("cred.c", "file.c", "landlock.c", "seccomp.c", "record.c", "spawn.c", "child.c", "init.c", "inbox.c"),
    *("spawner.c", "probe.c", "resident.c", "pool.c", "launcher.c", "command.c", "stdio.c", "pump.c"),
    *("pty.c", "proc.c", "files.c", "remove.c", "group.c", "meter.c", "watch.c", "binds.c", "mountinfo.c"),
    *("source.c", "fsmount.c", "room.c", "visit.c", "sweep.c", "restack.c", "door.c"),
)

CFLAGS = ["-std=gnu11", "-O2", "-D_GNU_SOURCE", "-fvisibility=hidden", "-fstack-protector-strong"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
SANITIZE = bool(os.environ.get("SBX_SANITIZE"))


def declarations(header: str) -> str:
    """The part of a header that cffi reads: no directives, no comments."""
    text = (CSRC / header).read_text()
    parts = re.findall(r"/\* cdef-begin \*/(.*?)/\* cdef-end \*/", text, re.DOTALL)
    return re.sub(r"/\*.*?\*/", "", "".join(parts), flags=re.DOTALL)


ffi = FFI()
ffi.cdef(re.sub(r"= (\d+) << (\d+)", lambda m: f"= {int(m[1]) << int(m[2])}", declarations("plan.h")))
ffi.cdef(declarations("sandboxcore.h"))
ffi.set_source(
    "sandboxcore._core",
    '#include "sandboxcore.h"',
    sources=[f"csrc/{name}" for name in HOST_SOURCES],
    include_dirs=["csrc"],
    extra_compile_args=[*CFLAGS, *(SANITIZERS if SANITIZE else [])],
    extra_link_args=SANITIZERS if SANITIZE else [],
    depends=[f"csrc/{path.name}" for path in sorted(CSRC.glob("*.h"))],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
