"""Attacks through /proc: other processes, init, the kernel's settings and secrets."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import (
    AT_FDCWD,
    BUFFER,
    Hostile,
    call,
    calls,
    open_for,
    read,
    result,
)
from support import host_environment

import sandboxcore
from sandboxcore import SandboxSpec

pytestmark = pytest.mark.escape

# init has the id 0 of the sandbox (rootless: the payload's), so this payload has init's id
USERS = ["1000", "0"]
# What only a process that may trace another one gets to see. Links are followed, not read.
PRIVATE = ["environ", "mem", "auxv", "maps", "smaps", "syscall", "stack", "io", "personality", "pagemap"]
PRIVATE_LINKS = ["root", "cwd", "exe", "ns/net", "ns/mnt"]
PRIVATE_FOLDERS = ["fd", "fdinfo", "map_files", "task/{pid}/fd", "root/", "cwd/"]


# --- processes of the host ----------------------------------------------------------------------


def pids(listing: str) -> set[int]:
    return {int(name) for name in listing.split() if name.isdecimal()}


@pytest.mark.parametrize("proc", ["full", "pid"])
def test_host_processes(bystander: subprocess.Popen[bytes], proc: Any) -> None:
    assert bystander.pid in pids("\n".join(os.listdir("/proc")))
    spec = SandboxSpec(proc=proc)
    inside = pids(sandboxcore.run(["ls", "/proc"], spec=spec, text=True).stdout)
    assert inside == ({1, 2} if proc == "full" else {2}), "init and itself, or only itself"


@pytest.mark.parametrize(
    "name", ["environ", "cmdline", "mem", "maps", "status", "root/etc/shadow", "cwd", "fd/0", "ns/net"]
)
def test_host_process_by_number(hostile: Hostile, bystander: subprocess.Popen[bytes], name: str) -> None:
    attack = open_for(f"/proc/{bystander.pid}/{name}", os.O_RDONLY)
    if name not in ("root/etc/shadow", "cwd"):
        assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "ENOENT"


@pytest.mark.parametrize("landlock", [True, False])
@pytest.mark.parametrize("grant", ["ro", "rw"])
def test_host_processes_in_a_grant(
    bystander: subprocess.Popen[bytes], tmp_path: Path, grant: str, landlock: bool
) -> None:
    """Who could grant the whole of / would thereby grant /proc: neither may be a source, by any name."""
    assert Path(f"/host/proc/{bystander.pid}".removeprefix("/host")).exists()
    link = tmp_path / "link"
    link.symlink_to("/")
    for source in ("/", "/proc", "//", "/usr/..", str(link), f"{link}/proc"):
        options = {grant: [(source, "/host")], "landlock": landlock}
        with pytest.raises(sandboxcore.SpecError, match="/proc"):
            sandboxcore.run(["true"], spec=SandboxSpec(**options), timeout=30)


# --- init, the one process that is always in reach ----------------------------------------------


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", [*PRIVATE, *PRIVATE_LINKS, *PRIVATE_FOLDERS])
def test_secrets_of_init(hostile: Hostile, bystander: subprocess.Popen[bytes], name: str, user: str) -> None:
    def attack(pid: int) -> list[str]:
        path = f"/proc/{pid}/{name.format(pid=pid)}"
        return calls(call("openat", AT_FDCWD, path, os.O_RDONLY), call("read", result(0), BUFFER, 1))

    outside = hostile.outside(attack(bystander.pid))
    # a directory can be opened but not read; /proc/PID/mem has nothing at address 0
    assert outside.answers[0] == "ok"
    inside = hostile.inside(attack(1), user=user)
    assert inside.data == b""
    assert inside.verdict in ("EACCES", "EPERM")
    assert inside.answers[0] in ("EACCES", "EPERM") or name in ("maps", "smaps", "syscall", "auxv")


def test_init_can_be_told_from_nothing(hostile: Hostile, marker: str) -> None:
    """What everybody may read of init has nothing of the host in it."""
    code = (
        "import sys, sandboxcore; done = sandboxcore.run(['sh', '-c',"
        " 'cd /proc/1; for f in *; do echo $f; head -c 65536 $f 2>/dev/null; done; head -c 4096 comm'],"
        " text=True, errors='replace'); print(done.stdout)"
    )
    env = host_environment() | {"SECRET": marker}
    command = [sys.executable, "-c", code, marker]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "cmdline\nsandboxcore-spawner\0serve" in done.stdout
    assert marker not in done.stdout
    for name in {str(Path(sandboxcore.__file__).parent), os.getcwd(), sys.executable} - {"/"}:
        assert name not in done.stdout


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "name", "mem exe oom_score_adj uid_map setgroups comm clear_refs timerslack_ns".split()
)
def test_changing_init(hostile: Hostile, bystander: subprocess.Popen[bytes], name: str, user: str) -> None:
    """CVE-2019-5736 among them: /proc/1/exe is a file of the host."""

    def attack(pid: int) -> list[str]:
        return calls(
            call("openat", AT_FDCWD, f"/proc/{pid}/{name}", os.O_WRONLY),
            call("write", result(0), "1", 1),
        )

    if name in ("oom_score_adj", "clear_refs") or (name == "timerslack_ns" and os.geteuid() == 0):
        assert hostile.outside(attack(bystander.pid)).verdict == "ok"
    assert hostile.inside(attack(1), user=user).verdict in ("EACCES", "EPERM")


def test_overwriting_the_spawner(hostile: Hostile, bystander: subprocess.Popen[bytes]) -> None:
    """A descriptor of the running program, to be opened for writing when it has ended."""
    for flags in (os.O_RDONLY, os.O_PATH):
        attack = open_for(f"/proc/{bystander.pid}/exe", flags)
        assert hostile.outside(attack).verdict == "ok"
        for user in USERS:
            assert hostile.inside(open_for("/proc/1/exe", flags), user=user).verdict == "EACCES"


@pytest.mark.parametrize("name", ["uid_map", "gid_map", "setgroups"])
def test_rewriting_ones_own_ids(hostile: Hostile, name: str) -> None:
    attack = calls(
        call("openat", AT_FDCWD, f"/proc/self/{name}", os.O_WRONLY),
        call("write", result(0), "0 0 1", 5),
    )
    for user in USERS:
        assert hostile.inside(attack, user=user).verdict in ("EPERM", "EACCES")


# --- settings of the kernel ---------------------------------------------------------------------

HOOKS = (
    *("sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hotplug", "sysrq-trigger"),
    *("sys/kernel/poweroff_cmd", "sys/kernel/sysrq", "sys/vm/drop_caches", "sys/fs/suid_dumpable"),
    *("sys/kernel/randomize_va_space", "sys/vm/overcommit_memory", "irq/default_smp_affinity"),
    *("sys/fs/binfmt_misc/register", "sys/kernel/panic", "sys/kernel/printk"),
)


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_kernel(hostile: Hostile, name: str) -> None:
    attack = open_for(f"/proc/{name}", os.O_WRONLY)
    if os.geteuid() == 0 and os.path.exists(f"/proc/{name}"):
        assert hostile.outside(attack).verdict == "ok"
    for user in USERS:
        assert hostile.inside(attack, user=user).verdict in ("EACCES", "EROFS", "ENOENT")


def test_settings_of_ones_own_namespaces(hostile: Hostile) -> None:
    """The sandbox's root owns these; that they cannot be written is the mount's doing alone."""
    attack = open_for("/proc/sys/kernel/shmmax", os.O_WRONLY)
    assert hostile.in_userns(attack).verdict == "ok"
    assert hostile.inside(attack, user="0").verdict == "EROFS"
    everybody = open_for("/proc/sys/kernel/ns_last_pid", os.O_WRONLY)
    if os.access("/proc/sys/kernel/ns_last_pid", os.W_OK):
        assert hostile.outside(everybody).verdict == "ok"
        assert hostile.inside(everybody).verdict == "EROFS"


WRITABLE = r"""
find /proc -path '/proc/[0-9]*' -prune -o -path /proc/self -prune -o -path /proc/thread-self -prune \
    -o -type f -writable -print 2>/dev/null
find /proc/tty /proc/bus /proc/irq /proc/fs /proc/sys -type d -writable -print 2>/dev/null
"""


@pytest.mark.parametrize("user", USERS)
def test_nothing_in_proc_is_writable(hostile: Hostile, user: str) -> None:
    outside = hostile.run_outside(["userns", "exec", "sh", "-c", WRITABLE]).stdout.split()
    assert b"/proc/sys/kernel/shmmax" in outside
    inside = sandboxcore.run(["sh", "-c", WRITABLE], spec=SandboxSpec(user=user), timeout=30)
    assert inside.stdout == b""


def test_no_core_dump_reaches_a_handler_of_the_host() -> None:
    """A core_pattern with a pipe starts a program of the host, as its root, with the payload's memory
    as its input: a limit of 0 does not prevent that, a limit of 1 does (core(5))."""
    inside = sandboxcore.run(["cat", "/proc/self/limits"], text=True).stdout
    found = re.search(r"Max core file size +(\S+) +(\S+)", inside)
    assert found is not None
    assert found.groups() == ("1", "1")


@pytest.mark.parametrize("name", ["uevent_helper", "kernel/uevent_seqnum", "devices", "fs/cgroup"])
def test_no_sysfs(hostile: Hostile, name: str) -> None:
    attack = open_for(f"/sys/{name}", os.O_PATH)
    if name == "devices":
        assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "ENOENT"


# --- what the kernel knows ----------------------------------------------------------------------

MASKED = """
    kallsyms kcore keys key-users timer_list interrupts softirqs schedstat iomem ioports slabinfo
    vmallocinfo pagetypeinfo latency_stats sched_debug modules kmsg config.gz cmdline locks
    diskstats partitions mtrr acpi asound scsi driver pressure kpagecount kpageflags kpagecgroup
"""


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", MASKED.split())
def test_kernel_information(hostile: Hostile, name: str, user: str) -> None:
    path = Path("/proc", name)
    attack = read(path)
    outside = hostile.outside(attack)
    if name in ("kallsyms", "interrupts", "softirqs", "cmdline"):  # which every kernel has
        assert outside.data
    inside = hostile.inside(attack, user=user)
    assert inside.data == b""
    assert inside.verdict in ("ok", "EACCES", "ENOENT", "EISDIR")
    if path.is_dir():
        listing = sandboxcore.run(["ls", "-A", path], spec=SandboxSpec(user=user))
        assert listing.stdout == b""
    assert hostile.inside(open_for(path, os.O_WRONLY), user=user).verdict != "ok"


@pytest.mark.parametrize("action", [2, 3, 9, 10])  # read, read all, sizes
def test_kernel_log(hostile: Hostile, action: int) -> None:
    attack = calls(call("syslog", action, BUFFER, 100 if action < 9 else 0))
    if os.geteuid() == 0 and action != 2:  # that one would wait, or take the log away
        assert hostile.outside(attack).verdict == "ok"
    assert hostile.inside(attack).verdict == "EPERM"
    assert hostile.inside(open_for("/dev/kmsg", os.O_RDONLY)).verdict == "ENOENT"


def test_minimal_proc(hostile: Hostile) -> None:
    """proc="pid": processes, and nothing else."""
    spec = SandboxSpec(proc="pid")
    names = set(sandboxcore.run(["ls", "/proc"], spec=spec, text=True).stdout.split())
    assert names == {"2", "self", "thread-self"}
    assert {"sys", "kallsyms", "meminfo"} <= set(os.listdir("/proc"))
    for name in ("sys", "meminfo", "cpuinfo", "net", "fs"):
        assert hostile.inside(open_for(f"/proc/{name}", os.O_PATH), proc="pid").verdict == "ENOENT"


# --- a /proc that is none -----------------------------------------------------------------------

FAKE = """
import json, os, subprocess, sys
from pathlib import Path
import sandboxcore

try:
    done = sandboxcore.run(["cat", "/proc/self/status"], timeout=20)
    print("ran", done)
except (sandboxcore.SandboxError, OSError) as error:
    print("refused", repr(error))
"""


def test_host_with_a_false_proc() -> None:
    """CVE-2025-52881: /proc is a directory that somebody prepared. Then nothing may run."""
    prepare = (
        "mkdir -p /mnt/proc/self; cp /proc/self/status /proc/self/uid_map /mnt/proc/self/;"
        ' mount --bind /mnt/proc /proc; exec "$@"'
    )
    private = "mount -t tmpfs none /mnt;"
    ids = ["--map-root-user"] if os.geteuid() else []
    command = ["unshare", *ids, "--mount", "sh", "-c", private + prepare, "sh"]
    real = [sys.executable, "-c", FAKE]
    env = host_environment()
    fake = subprocess.run([*command, *real], capture_output=True, text=True, env=env, timeout=60)
    assert fake.stdout.startswith("refused"), fake
    if os.geteuid() == 0:
        mounts = ["unshare", "--mount", *real]
        honest = subprocess.run(mounts, capture_output=True, text=True, env=env, timeout=60)
        assert honest.stdout.startswith("ran"), honest


# --- what the host is called --------------------------------------------------------------------


def test_name_of_the_host(hostile: Hostile) -> None:
    name = socket.gethostname()
    for place in ("/proc/sys/kernel/hostname", "/etc/hostname", "/etc/hosts"):
        assert name.encode() not in hostile.inside(read(place)).data.split()
    assert hostile.outside(read("/proc/sys/kernel/hostname")).data == name.encode() + b"\n"
    inside = sandboxcore.run(["uname", "-n"], text=True).stdout.strip()
    assert inside == "sandbox"
    rename = calls(call("sethostname", name, len(name)))
    assert hostile.in_userns(rename).verdict == "ok"
    assert hostile.inside(rename).verdict == "EPERM"
    assert socket.gethostname() == name


def test_machine_id(hostile: Hostile) -> None:
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id", "/sys/class/dmi/id/product_uuid"):
        if os.path.exists(place):
            assert hostile.outside(open_for(place, os.O_PATH)).verdict == "ok"
        assert hostile.inside(read(place)).verdict == "ENOENT"
