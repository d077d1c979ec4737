"""`python -m bench.sizes`: snapshot, restore and fork by how much there is, and if all comes back.

Each round takes every size once, in another order, so drift hits all of them alike. Whatever comes after
1 GiB was written, or after the sandbox before has ended with as much, is slow for a while; so half a second
of the same operations in a sandbox with nothing comes first. In the first round the fork's files are
compared with the parent's: hashes, owners, modes, times, links, attributes.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from bench.runner import uncollected
from sandboxcore import Limits, Sandbox, SandboxSpec, Snapshot

Result = TypeVar("Result")

PYTHON = "/usr/bin/python3"
SETTLE = 0.5  # seconds
LARGE = f"""{PYTHON} -I -S -c '
import os
with open("/data/file", "wb") as file:
    for _ in range(%d): file.write(os.urandom(1 << 20))
'"""
FILL = {
    "1 MiB": LARGE % 1,
    "100 MiB": LARGE % 100,
    "1 GiB": LARGE % 1024,
    "100000 files": f"""{PYTHON} -I -S -c '
import os
for n in range(100000):
    if n % 500 == 0: os.mkdir(f"/data/d{{n // 500}}")
    with open(f"/data/d{{n // 500}}/{{n}}", "w") as file: file.write(str(n))
    if n % 100 == 0: os.setxattr(f"/data/d{{n // 500}}/{{n}}", "user.number", str(n).encode())
'""",
}
DESCRIBE = """
import hashlib, os, stat, sys
digest = hashlib.sha256()
for path, folders, names in os.walk("/data"):
    folders.sort()
    for name in sorted([*folders, *names]):
        full = os.path.join(path, name)
        st = os.lstat(full)
        about = [full, st.st_mode, st.st_uid, st.st_gid, st.st_mtime_ns]
        about += [(key, os.getxattr(full, key)) for key in sorted(os.listxattr(full))]
        digest.update(repr(about).encode())
        if stat.S_ISREG(st.st_mode):
            with open(full, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
print(digest.hexdigest())
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sizes", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=FILL, action="append")
    options = parser.parse_args(argv)
    sizes = options.only or list(FILL)
    samples: dict[tuple[str, str], list[float]] = {}
    for number in range(options.rounds):
        for size in random.sample(sizes, len(sizes)):
            for what, taken in measured(size, check=number == 0).items():
                samples.setdefault((what, size), []).append(taken)
    report(samples, sizes)
    return 0


def measured(size: str, *, check: bool) -> dict[str, float]:
    """Milliseconds for each operation, of a new sandbox that has written so much."""
    limits = Limits(disk="3G", inodes=1_000_000, memory=None, file_size=None)
    spec = SandboxSpec(writable=True, limits=limits)
    with Sandbox(spec) as sandbox, Sandbox(spec) as nothing:
        sandbox.shell("mkdir /data", check=True)
        start, empty = sandbox.snapshot(), nothing.snapshot()
        sandbox.shell(FILL[size], check=True, timeout=300)
        with uncollected():
            settled = time.monotonic() + SETTLE
            while time.monotonic() < settled:
                operations(nothing, empty)[1].close()
            found, child = operations(sandbox, start)
        with child:
            if check:
                there, here = (
                    one.exec([PYTHON, "-c", DESCRIBE], check=True).stdout for one in (child, sandbox)
                )
                if there != here:
                    sys.exit(f"{size}: the fork has other files")
    return found


def operations(sandbox: Sandbox, start: Snapshot) -> tuple[dict[str, float], Sandbox]:
    """How long each of them takes, and the fork."""
    found = {}

    def timed(what: str, action: Callable[[], Result]) -> Result:
        begin = time.perf_counter_ns()
        result = action()
        found[what] = (time.perf_counter_ns() - begin) / 1e6
        return result

    timed("subprocess.run", lambda: subprocess.run(["true"], capture_output=True, check=True))
    kept = timed("snapshot", lambda: sandbox.snapshot(copy=False))
    timed("restore", lambda: sandbox.restore(start))
    timed("restore, back", lambda: sandbox.restore(kept))
    return found, timed("fork", lambda: Sandbox.from_snapshot(kept))


def report(samples: dict[tuple[str, str], list[float]], sizes: Sequence[str]) -> None:
    print(f"n = {len(next(iter(samples.values())))}; median (quartiles) in ms; and by the first size")
    print("| | " + " | ".join(sizes) + " |\n| --- |" + " ---: |" * len(sizes))
    for what in dict.fromkeys(name for name, _ in samples):
        cells = []
        for size in sizes:
            low, middle, high = statistics.quantiles(samples[what, size], n=4)
            ratio = middle / statistics.median(samples[what, sizes[0]])
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f}) {ratio:.2f}")
        print(f"| {what} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    sys.exit(main())
