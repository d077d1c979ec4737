"""What is measured: a name, a way to take a block of samples, and what the work consists of.

Both sides of a ratio do the same call with the same payload and both capture its output. The
payload is looked up below /usr, which is what a default sandbox shows of the host.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEBIBYTE = 1 << 20
USR_PATH = "/usr/local/bin:/usr/bin"


class Refused(Exception):
    """This host cannot run the subject; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One thing to measure.

    block(count, gap_s) takes `count` samples in microseconds, sleeping `gap_s` seconds before
    each; it raises when a run does not succeed. ratio_to names the subjects to divide by; the
    first is the record's own ratio, the others make records of their own. paced is the number
    of samples in a paced block, 0 for a subject that is only measured back to back.
    """

    name: str
    block: Callable[[int, float], list[float]]
    does: str
    ratio_to: tuple[str, ...] = ()
    paced: int = 0


def timed(call: Callable[[], object]) -> Callable[[int, float], list[float]]:
    """A block that times `call` from outside."""

    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            if gap_s:
                time.sleep(gap_s)
            start = time.perf_counter_ns()
            call()
            samples.append((time.perf_counter_ns() - start) / 1000)
        return samples

    return block


def reported(code: str) -> Callable[[int, float], list[float]]:
    """A block of fresh interpreters that run `code` and print nanoseconds they took themselves."""
    argv = [sys.executable, "-I", "-c", code]

    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            time.sleep(gap_s)
            done = subprocess.run(argv, capture_output=True, check=True)
            samples.append(int(done.stdout) / 1000)
        return samples

    return block


def captured(argv: Sequence[str]) -> Callable[[int, float], list[float]]:
    """A block of subprocess.run with captured output that must succeed."""
    return timed(lambda: subprocess.run(argv, capture_output=True, check=True))


def below_usr(program: str) -> str:
    path = shutil.which(program, path=USR_PATH)
    if path is None:
        raise Refused(f"no {program} below /usr")
    return path


def python_subjects() -> list[Subject]:
    """What needs nothing but Python: the references."""
    python = [below_usr("python3"), "-I", "-c", "pass"]
    head = ["head", "-c", str(MEBIBYTE), "/dev/zero"]
    return [
        Subject(
            name="subprocess.run",
            block=captured(["true"]),
            does="vfork + exec of `true`, output captured; no isolation",
            ratio_to=("floor.vfork_exec",),
            paced=10,
        ),
        Subject(
            name="subprocess.run.python",
            block=captured(python),
            does="the same, `python3 -I -c pass`",
        ),
        Subject(
            name="subprocess.run.1MiB",
            block=captured(head),
            does="the same, 1 MiB of output from `head`",
        ),
        Subject(
            name="import.subprocess",
            block=reported(_timing("import subprocess")),
            does="`import subprocess` in a fresh interpreter",
        ),
    ]


def library_subjects(peers: Sequence[str]) -> list[Subject]:
    """sandboxcore itself; `peers` are the names of the subjects it is also divided by."""
    try:
        import sandboxcore
        from sandboxcore import host
    except ImportError as error:
        raise Refused(f"cannot import sandboxcore: {error}") from error

    def run(argv: Sequence[str], **fields: Any) -> Callable[[int, float], list[float]]:
        spec = sandboxcore.SandboxSpec(**fields)
        return timed(lambda: sandboxcore.run(argv, spec=spec, check=True))

    python = [below_usr("python3"), "-I", "-c", "pass"]
    head = ["head", "-c", str(MEBIBYTE), "/dev/zero"]
    isolation = (
        "a fresh sandbox: user mnt pid net ipc uts cgroup namespaces, own root with proc, dev, "
        "tmpfs, no capabilities, rlimits, Landlock, seccomp filter"
    )
    overlays = [
        Subject(
            name="cold.run.overlay",
            block=run(["true"], overlay=[("/usr/share", "/data")]),
            does="cold.run with a directory of the host copy-on-write",
            ratio_to=("cold.run",),
        ),
        Subject(
            name="cold.run.writable",
            block=run(["true"], writable=True),
            does="cold.run with a writable root",
            ratio_to=("cold.run",),
        ),
    ]
    if not host.features().tmpfs_xattr:
        overlays = []
    return [
        Subject(
            name="cold.run",
            block=run(["true"]),
            does=f"{isolation}; `true`, output captured",
            ratio_to=("subprocess.run", *peers, "floor.clone.all"),
            paced=10,
        ),
        Subject(
            name="cold.run.python",
            block=run(python),
            does="the same, `python3 -I -c pass`",
            ratio_to=("subprocess.run.python",),
        ),
        Subject(
            name="cold.run.1MiB",
            block=run(head),
            does="the same, 1 MiB of output from `head`",
            ratio_to=("subprocess.run.1MiB",),
        ),
        Subject(
            name="cold.first",
            block=reported("import sandboxcore\n" + _timing("sandboxcore.run(['true'], check=True)")),
            does="the first run of a process: the spawner and the template are made in it",
            ratio_to=("subprocess.run",),
        ),
        Subject(
            name="import.sandboxcore",
            block=reported(_timing("import sandboxcore")),
            does="`import sandboxcore` in a fresh interpreter",
            ratio_to=("import.subprocess",),
        ),
        Subject(
            name="cli.run",
            block=captured([*_command_line(), "run", "--", "true"]),
            does="`sandboxcore run -- true`: an interpreter, then what cold.first does",
            ratio_to=("subprocess.run", *peers),
        ),
        *overlays,
    ]


def _timing(statement: str) -> str:
    return f"import time\nstart = time.perf_counter_ns()\n{statement}\nprint(time.perf_counter_ns() - start)"


def _command_line() -> list[str]:
    """The console script of this very installation, or the module where there is none."""
    script = Path(sys.executable).with_name("sandboxcore")
    return [str(script)] if script.exists() else [sys.executable, "-m", "sandboxcore"]
