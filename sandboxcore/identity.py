"""Which process it is: numbers are used again, so each goes with a start time, a boot and a namespace."""

import os
from pathlib import Path


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc(5), stat); 0 if there is none, or not any more.

    Raises OSError where that cannot be told, as without a free descriptor.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:  # a sweep asks of each sandbox
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat.rpartition(b")")[2].split()
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def pid_namespace() -> int:
    """Which one our numbers belong to: pid_namespaces(7)."""
    return os.stat("/proc/self/ns/pid").st_ino


def boot_id() -> str:
    """Whose numbers our processes have: the machine since its last boot, random(4), and the pid namespace."""
    with open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as file:
        return f"{file.read().decode().strip()} {pid_namespace()}"


def this_process() -> str:
    """What names this process on record: "PID TICKS BOOT"."""
    return f"{os.getpid()} {start_ticks(os.getpid())} {boot_id()}"


def lives(process: str) -> bool:
    """Whether a process that is on record so is there. One of another pid namespace is, as far as we know."""
    pid, ticks, boot = process.split(" ", 2)
    here = boot_id()
    if boot != here:
        return boot.split()[:1] == here.split()[:1]
    return start_ticks(int(pid)) == int(ticks)


def children(pid: int) -> list[int]:
    """Of a process with a single thread: proc(5), children; none of one that is gone. Raises OSError where
    that cannot be told, as on a kernel without CONFIG_PROC_CHILDREN."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        if start_ticks(pid):
            raise
        return []


def pid_of(pidfd: int) -> int:
    """The number behind a pidfd, as this process sees it; 0 when the process is gone: proc(5), fdinfo."""
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return max(0, int(next(line for line in lines if line.startswith("Pid:")).split()[1]))
