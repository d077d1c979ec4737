"""What is read back of a sandbox before it is handed to somebody else: :func:`look`, :func:`survivors`.

A reset gives a sandbox another isolation, and this is how it is known that it has: everything that one client
could have left is looked at as it is seen from inside, and has to be as in the one that nobody had used yet.
"""

import errno as E
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sandboxcore.errors import SandboxError
from sandboxcore.fileops import Ask
from sandboxcore.sandbox import Sandbox

IPC = ("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg")
PEERS = "Max processes"  # as an ordinary user, launchers count there, of whom there may be one more or less
OURS = "sbx-"  # how the names of init and of launchers begin; nobody else's, in a pid namespace of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """A directory on which something private and writable is mounted, and how much there is in all of that
    file system: for what lies in an overlay has no other place there."""

    mode: int
    uid: int
    gid: int
    attributes: tuple[str, ...]
    entries: tuple[tuple[str, int, int, int, int], ...]  # name, mode, uid, gid, size
    inodes: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A sandbox as it is seen from inside. ``namespaces``: by kind, but for those that are the host's."""

    namespaces: Mapping[str, int]
    processes: tuple[str, ...]
    directories: Mapping[str, Directory]
    ipc: Mapping[str, bytes]
    mounts: tuple[tuple[Any, ...], ...]
    binds: tuple[Any, ...]
    limits: Mapping[str, Any]
    group: Mapping[str, Any] | None
    environment: Mapping[str, str]
    labels: Mapping[str, str]
    commands: int


def prime(sandbox: Sandbox) -> None:
    """Have a first command behind it, which does everything but the exec: with that, init makes a second
    launcher, and what both consist of is in memory. Else whoever claims it pays for that, with half of what a
    command costs. Raises what :attr:`Sandbox.capabilities` does."""
    *_, done = sandbox._dry_run()
    if not done.applied:
        raise SandboxError("it does not say what was applied")


def look(sandbox: Sandbox) -> View:
    """Read everything back. Takes about two milliseconds, and has to be done while nothing runs there.

    Raises what :attr:`Sandbox.capabilities` does, OSError, and SandboxError for what cannot be read.
    """
    sandbox._capabilities = None  # now, and not what was read once
    seen = sandbox.capabilities
    sandbox._capabilities = None
    private = [target for target, writable in sandbox._plan.mounted if writable]
    try:
        return View(
            namespaces={kind: number for kind, number in seen.namespaces.items() if number != _own(kind)},
            processes=_processes(sandbox),
            directories={target: _directory(sandbox, target) for target in private},
            ipc=dict(_ipc(sandbox)),
            mounts=tuple((one.target, one.fstype, one.source, *one.options) for one in seen.mounts),
            binds=sandbox.binds,
            limits={name: pair for name, pair in seen.limits.items() if name != PEERS},
            group=seen.control_group,
            environment=sandbox.environment,
            labels=dict(sandbox.labels),
            commands=len(sandbox._detached),
        )
    finally:
        sandbox._file_server.close()


def survivors(before: View, after: View | None, *, there: bool = True) -> list[str]:
    """What is not as it was in the one that nobody had used; nothing: it is as new. ``there``: that one still
    exists, so no other namespace can have the number of one of its own."""
    if after is None:
        return ["nothing was read back"]
    found = [
        f"{kind} namespace: the same"
        for kind, number in before.namespaces.items()
        if there and after.namespaces.get(kind) == number
    ]
    if before.namespaces.keys() != after.namespaces.keys():
        found.append(f"namespaces: {sorted(after.namespaces)}, not {sorted(before.namespaces)}")
    found += [f"process {name!r}" for name in after.processes if not name.startswith(OURS)]
    for target in sorted(before.directories.keys() | after.directories.keys()):
        if before.directories.get(target) != after.directories.get(target):
            found.append(f"directory {target}: {after.directories.get(target)}")
    for name in ("ipc", "mounts", "binds", "limits", "group", "environment", "labels", "commands"):
        if getattr(before, name) != getattr(after, name):
            found.append(f"{name}: {getattr(after, name)}")
    return found


def _own(kind: str) -> int:
    """The number of the host's namespace, which a sandbox may share by its spec."""
    return os.stat(f"/proc/self/ns/{kind}").st_ino


def _lent(sandbox: Sandbox, path: str, flags: int) -> int:
    return sandbox.files._ask(Ask("OPEN", path, flags=flags, about=path))


def _processes(sandbox: Sandbox) -> tuple[str, ...]:
    """The names of all processes, by the sandbox's own /proc."""
    names = []
    fd = _lent(sandbox, "/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for entry in os.listdir(fd):
            if entry.isdecimal():
                try:
                    names.append(_text(fd, f"{entry}/comm").strip())
                except (FileNotFoundError, ProcessLookupError):
                    continue  # a launcher too many, which has ended
    finally:
        os.close(fd)
    if not names and sandbox.spec.proc != "pid":  # which hides from us what hides from the payload: init
        raise SandboxError("its processes cannot be read")
    return tuple(sorted(names))


def _text(directory: int, path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    with os.fdopen(fd) as file:
        return file.read()


def _directory(sandbox: Sandbox, target: str) -> Directory:
    fd = _lent(sandbox, target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        st, fs = os.fstat(fd), os.fstatvfs(fd)
        entries = []
        for name in sorted(os.listdir(fd)):
            one = os.stat(name, dir_fd=fd, follow_symlinks=False)
            entries.append((name, one.st_mode, one.st_uid, one.st_gid, _size(one)))
        return Directory(
            mode=st.st_mode,
            uid=st.st_uid,
            gid=st.st_gid,
            attributes=tuple(sorted(os.listxattr(fd))),
            entries=tuple(entries),
            inodes=fs.f_files - fs.f_ffree,
            bytes=(fs.f_blocks - fs.f_bfree) * fs.f_bsize,
        )
    finally:
        os.close(fd)


def _size(st: os.stat_result) -> int:
    return st.st_size if stat.S_ISREG(st.st_mode) else 0


def _ipc(sandbox: Sandbox) -> Iterator[tuple[str, bytes]]:
    """SysV objects; a /proc of processes only has no list of them, and the namespace alone has to do."""
    for path in IPC:
        try:
            fd = _lent(sandbox, path, os.O_RDONLY)
        except OSError as error:
            if error.errno != E.ENOENT or sandbox.spec.proc != "pid":
                raise
            continue
        with open(fd, "rb") as file:
            yield path, file.read()
