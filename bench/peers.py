"""Other programs that start a command in fresh namespaces, called the way a user calls them.

Each is asked for the work of a default sandbox as far as its options go: every namespace, the
host's /usr read-only and nothing else of the host, own proc and tmpfs. `does` says what it really
does. None of them loads a seccomp filter or a Landlock ruleset here, so the comparison favours
them. All are started by subprocess.run with captured output.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.subjects import Refused, Subject, captured, timed

FIRST_HOST_ID = 1879048192  # the range that a sandbox of root is mapped to by default


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A program, what it does for its command line, and the block that runs it."""

    program: str
    does: str
    block: Callable[[Path], Callable[[int, float], list[float]]]


def bwrap(_: Path) -> Callable[[int, float], list[float]]:
    root = ["--ro-bind", "/usr", "/usr"]
    for link in ("bin", "sbin", "lib", "lib64"):
        if Path("/", link).is_symlink():
            root += ["--symlink", f"usr/{link}", f"/{link}"]
    return captured(
        [
            *("bwrap", "--unshare-user", "--unshare-all", "--uid", "1000", "--gid", "1000"),
            *(*root, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
            *("--tmpfs", "/workspace", "--chdir", "/workspace", "--hostname", "sandbox"),
            *("--cap-drop", "ALL", "--new-session", "--die-with-parent", "--clearenv"),
            *("--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "true"),
        ]
    )


def unshare(_: Path) -> Callable[[int, float], list[float]]:
    return captured(["unshare", "-UrmpfinuC", "--mount-proc", "true"])


def firejail(_: Path) -> Callable[[int, float], list[float]]:
    quiet = ["firejail", "--quiet", "--noprofile"]
    what = ["--net=none", "--ipc-namespace", "--private", "--private-dev", "--private-tmp"]
    return captured([*quiet, *what, "--caps.drop=all", "--nonewprivs", "--", "true"])


def crun(directory: Path) -> Callable[[int, float], list[float]]:
    # no cgroup: the default manager is a systemd that may not be there
    options = ["--cgroup-manager=disabled", "--root", str(directory / "state")]
    return _bundle_runner(["crun", *options], directory)


def runc(directory: Path) -> Callable[[int, float], list[float]]:
    return _bundle_runner(["runc", "--root", str(directory / "state")], directory)


BUNDLE = (
    "user mnt pid net ipc uts cgroup, /usr read-only, proc with masks, dev, pts, shm, 2 tmpfs, "
    "no capabilities, new session"
)
PEERS = (
    Peer(
        program="bwrap",
        does="user mnt pid net ipc uts cgroup, /usr read-only, proc, dev, 2 tmpfs, "
        "no capabilities, new session; no filter, no Landlock",
        block=bwrap,
    ),
    Peer(
        program="unshare",
        does="user mnt pid net ipc uts cgroup, proc; the host's whole root, capabilities in the "
        "namespace kept, no filter",
        block=unshare,
    ),
    Peer(
        program="crun",
        does=f"{BUNDLE}; no filter, no Landlock",
        block=crun,
    ),
    Peer(
        program="runc",
        does=f"{BUNDLE}, as root a cgroup of its own; no filter, no Landlock",
        block=runc,
    ),
    Peer(
        program="firejail",
        does="mnt pid net ipc uts, private home, dev and /tmp, no capabilities; no user or cgroup "
        "namespace, the rest of the host's root, no filter",
        block=firejail,
    ),
)


def peer_subjects(directory: Path) -> tuple[list[Subject], dict[str, str]]:
    """Subjects for the peers on PATH, and why the others are missing."""
    subjects, missing = [], {}
    for peer in PEERS:
        name = f"peer.{peer.program}"
        if shutil.which(peer.program) is None:
            missing[name] = "not on PATH"
            continue
        own = directory / peer.program
        own.mkdir()
        try:
            block = peer.block(own)
        except (Refused, OSError, subprocess.SubprocessError) as error:
            missing[name] = str(error)
            continue
        paced = 2 if peer.program == "bwrap" else 0
        subjects.append(
            Subject(name=name, block=block, does=peer.does, ratio_to=("subprocess.run",), paced=paced)
        )
    return subjects, missing


def _bundle_runner(command: list[str], directory: Path) -> Callable[[int, float], list[float]]:
    """Runs an OCI bundle in `directory`; each run needs an id of its own."""
    subprocess.run([command[0], "spec"], cwd=directory, check=True, capture_output=True)
    config = directory / "config.json"
    config.write_text(json.dumps(_default_sandbox(json.loads(config.read_text()))))
    rootfs = directory / "rootfs"
    for name in ("usr", "proc", "dev", "tmp", "workspace"):
        (rootfs / name).mkdir(parents=True)
    for link in ("bin", "sbin", "lib", "lib64"):
        (rootfs / link).symlink_to(f"usr/{link}")
    numbers = itertools.count()
    run = [*command, "run", "--bundle", str(directory)]

    def once() -> None:
        identity = f"bench-{os.getpid()}-{next(numbers)}"
        # stdin is a pipe: these runtimes give their stdio to the container's root, the host's /dev/null too
        subprocess.run([*run, identity], input=b"", capture_output=True, check=True)

    return timed(once)


def _default_sandbox(config: dict[str, Any]) -> dict[str, Any]:
    """The runtime's own config.json, changed to what a default sandbox is."""
    process, linux = config["process"], config["linux"]
    process.update(terminal=False, args=["true"], cwd="/workspace")
    process["capabilities"] = {name: [] for name in process["capabilities"]}
    config["hostname"] = "sandbox"
    unwanted = {"/sys", "/sys/fs/cgroup", "/dev/mqueue"}
    config["mounts"] = [m for m in config["mounts"] if m["destination"] not in unwanted]
    for mount in config["mounts"]:  # gid 5 is not mapped without root
        mount["options"] = [o for o in mount.get("options", []) if not o.startswith("gid=")]
    usr = {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]}
    config["mounts"].append(usr)
    for target in ("/tmp", "/workspace"):  # inside the bundle
        tmpfs = {"destination": target, "type": "tmpfs", "source": "tmpfs"}
        config["mounts"].append({**tmpfs, "options": ["nosuid", "nodev"]})
    kinds = ("user", "mount", "pid", "network", "ipc", "uts", "cgroup")
    linux["namespaces"] = [{"type": kind} for kind in kinds]
    root = os.geteuid() == 0
    for key, own in (("uidMappings", os.geteuid()), ("gidMappings", os.getegid())):
        host, size = (FIRST_HOST_ID, 65536) if root else (own, 1)
        linux[key] = [{"containerID": 0, "hostID": host, "size": size}]
    return config
