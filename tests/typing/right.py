"""Uses of the public names that a strict type checker accepts."""

from pathlib import Path

import sandboxcore
from sandboxcore import Cause, ExecResult, Limits, Mount, SandboxSpec

spec = SandboxSpec(
    profile="standard",
    ro=("/usr/share/dict", ("/a", "/b"), Path("/c")),
    rw=((Path("/d"), "/e"),),
    tmpfs=("/t:1M",),
    mounts=(Mount(kind="tmpfs", target="/x", size="1M"),),
    limits=Limits(pids=10, disk="1G", wall_time=1.5),
    network="private",
    user="1000:1000",
    env={"A": "1"},
)
done: ExecResult = sandboxcore.run(
    ["ls", Path("/"), b"x"], spec=spec, timeout=5, files={"a": "b", "c": (b"d", 0o755)}, text=True
)
if done.cause is Cause.TIMEOUT or done.timed_out:
    raise SystemExit(done.returncode)
seconds: float = done.usage.cpu_user + done.duration
larger: SandboxSpec = spec.replace(limits=Limits(pids=20))
