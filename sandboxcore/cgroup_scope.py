"""A group from systemd, for a process that is in none of its own: a transient scope, as `systemd-run --scope`
makes it (org.freedesktop.systemd1(5), StartTransientUnit)."""

import os
import secrets
import subprocess
import time
from pathlib import Path

OWN = Path("/proc/self/cgroup")
TIMEOUT = 5.0  # seconds; systemd answers in 4 to 60 ms


def enter_scope() -> str:
    """Have systemd move this process into a delegated scope. Returns "" or what went wrong.

    The scope lasts as long as there is a process in it. Threads and later children are in it, too;
    children of before stay where they are.
    """
    name = f"sandboxcore-{os.getpid()}-{secrets.token_hex(4)}.scope"
    properties = ["Delegate", "b", "true", "PIDs", "au", "1", str(os.getpid())]
    command = [
        "busctl",
        "--quiet",
        f"--timeout={TIMEOUT:.0f}",
        *(["--user"] if os.geteuid() != 0 else []),
        *(
            "call",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
        ),
        *("StartTransientUnit", "ssa(sv)a(sa(sv))", name, "fail", "2", *properties, "0"),
    ]
    deadline = time.monotonic() + TIMEOUT
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"asking systemd for a scope failed: {error}"
    if done.returncode != 0:
        return f"systemd gave no scope: {done.stderr.strip() or f'busctl ended with {done.returncode}'}"
    while name not in OWN.read_text():  # the call returns when the job is queued
        if time.monotonic() >= deadline:
            return f"systemd has not moved this process into {name} within {TIMEOUT:.0f} s"
        time.sleep(0.005)
    return ""
