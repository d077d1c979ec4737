"""Writes what Python really sends into a directory, one file each: where the fuzzer begins.

python tests/c/seeds.py DIRECTORY
"""

import sys
from pathlib import Path

from sandboxcore import Limits, SandboxSpec, host
from sandboxcore.plan import Plan, command_limits, compile_plan
from sandboxcore.request import Extras, Request, sandbox_request

STDIO = (0, 1, 2)


def a_request(plan: Plan, extras: Extras, **more: object) -> bytes:
    options = {"cwd": None, "env": None, "files": None, "pass_fds": (), "stdio": STDIO} | more
    return Request(plan, ["sh", "-c", "true", "x" * 100], extras=extras, **options).data  # type: ignore[arg-type]


def seeds() -> dict[str, bytes]:
    features = host.features()
    plain = compile_plan(SandboxSpec(), features)
    limits = Limits(cpu_time=3, disk="16M", inodes=1000)
    full = compile_plan(
        SandboxSpec(
            ro=["/usr/share:/data"], deny=["/data/doc"], tmpfs=["/opt/x:1M"], limits=limits,
            overlay=["/usr/lib:/srv/x"], writable=True, network="host", time_offsets={"monotonic": 5.5},
            seccomp="minimal", env={"A": "b"},
        ),
        features,
    )  # fmt: skip
    command = Extras(
        ids=(1000, 1000), rlimits=command_limits(full, Limits(cpu_time=1)), flags=("DETACHED", "PTY"),
        timeout=2.5, size=(30, 90),
    )  # fmt: skip
    file = {"a": (b"text", 0o755), "b/c": b""}
    run = Request(plain, ["true"], cwd="/tmp", env={"X": "y"}, files=file, pass_fds=(), stdio=STDIO)
    uses = ["BORN", "SLOTS", "MOVE", "SLOTS_MEMORY", "SLOTS_PIDS", "HOLD"]
    return {
        "plan": plain.data,
        "plan-full": full.data,
        "request": run.data,
        "request-groups": run.within(["BORN", "MOVE", "MOVE"]),
        "exec": a_request(full, command, files=file),
        "sandbox": sandbox_request(plain, persistent=False, groups=[]),
        "sandbox-groups": sandbox_request(full, persistent=True, groups=uses),
    }


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (directory / name).write_bytes(data)
