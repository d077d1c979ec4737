"""Run code you did not write, in a fresh and fully isolated Linux sandbox.

>>> import sandboxcore
>>> sandboxcore.run(["id", "-u"]).stdout
b'1000\\n'

Importing this package loads nothing else; each name is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandboxcore.capabilities import SandboxCapabilities
    from sandboxcore.changes import FileChange
    from sandboxcore.command import Exit, Process, Stderr, Stdout
    from sandboxcore.detached import DetachedCommand
    from sandboxcore.errors import (
        ArchiveError,
        CheckpointError,
        CommandFailed,
        CommitError,
        CwdNotFound,
        CwdNotPermitted,
        CwdPathInvalid,
        ExecError,
        InvalidTransition,
        ProgramNotExecutable,
        ProgramNotFound,
        ProgramPathInvalid,
        SandboxBusy,
        SandboxError,
        SandboxGone,
        SandboxNotFound,
        SandboxTimeout,
        SetupError,
        SnapshotNotFound,
        SpecError,
        TooManySandboxes,
        UnsupportedHost,
        VolumeNotFound,
    )
    from sandboxcore.fileops import FileInfo
    from sandboxcore.files import Files
    from sandboxcore.journal import Log
    from sandboxcore.lifecycle import SandboxState
    from sandboxcore.persistent import PersistentSandbox, gc, list_sandboxes
    from sandboxcore.pool import SandboxPool
    from sandboxcore.pool_policy import PoolConfig, PoolStats
    from sandboxcore.pools import SandboxPools
    from sandboxcore.process import run
    from sandboxcore.request import DEVNULL, PIPE, STDOUT
    from sandboxcore.result import Cause, ExecResult, Usage
    from sandboxcore.sandbox import Sandbox
    from sandboxcore.saved import SavedSnapshot, SnapshotStore
    from sandboxcore.seccomp import SeccompPolicy
    from sandboxcore.snapshots import Snapshot
    from sandboxcore.spec import Limits, Mount, SandboxSpec
    from sandboxcore.store import SandboxRecord
    from sandboxcore.template import Template
    from sandboxcore.volumes import Volume, Volumes, VolumeUsage

__version__ = "0.1.0"

_HOME = {
    "capabilities": ("SandboxCapabilities",),
    "changes": ("FileChange",),
    "errors": (
        *("ArchiveError", "CheckpointError", "CommitError", "SnapshotNotFound"),
        *("CwdNotFound", "CwdNotPermitted", "CwdPathInvalid"),
        *("CommandFailed", "ExecError", "InvalidTransition", "ProgramNotExecutable", "ProgramNotFound"),
        *("ProgramPathInvalid", "SandboxBusy", "SandboxError", "SandboxGone", "SandboxNotFound"),
        *("SandboxTimeout", "SetupError", "SpecError", "TooManySandboxes", "UnsupportedHost"),
        "VolumeNotFound",
    ),
    "cgroup_group": ("GroupUsage",),
    "command": ("Exit", "Process", "Stderr", "Stdout"),
    "fileops": ("FileInfo",),
    "files": ("Files",),
    "detached": ("DetachedCommand",),
    "groups": ("host_limits",),
    "journal": ("Log",),
    "lifecycle": ("SandboxState",),
    "persistent": ("PersistentSandbox", "gc", "list_sandboxes"),
    "pool": ("SandboxPool",),
    "pool_policy": ("PoolConfig", "PoolStats"),
    "pools": ("SandboxPools",),
    "process": ("run",),
    "request": ("DEVNULL", "PIPE", "STDOUT"),
    "result": ("Cause", "ExecResult", "Usage"),
    "resources": ("LimitChange",),
    "sandbox": ("Sandbox",),
    "saved": ("SavedSnapshot", "SnapshotStore"),
    "seccomp": ("SeccompPolicy",),
    "snapshots": ("Snapshot",),
    "spec": ("Limits", "Mount", "SandboxSpec"),
    "store": ("SandboxRecord",),
    "template": ("Template",),
    "volumes": ("Volume", "VolumeUsage", "Volumes"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "ArchiveError",
    "Cause",
    "CheckpointError",
    "CommandFailed",
    "CommitError",
    "CwdNotFound",
    "CwdNotPermitted",
    "CwdPathInvalid",
    "DetachedCommand",
    "ExecError",
    "ExecResult",
    "Exit",
    "FileChange",
    "FileInfo",
    "Files",
    "GroupUsage",
    "InvalidTransition",
    "LimitChange",
    "Limits",
    "Log",
    "Mount",
    "PersistentSandbox",
    "PoolConfig",
    "PoolStats",
    "Process",
    "ProgramNotExecutable",
    "ProgramNotFound",
    "ProgramPathInvalid",
    "Sandbox",
    "SandboxBusy",
    "SandboxCapabilities",
    "SandboxError",
    "SandboxGone",
    "SandboxNotFound",
    "SandboxPool",
    "SandboxPools",
    "SandboxRecord",
    "SandboxSpec",
    "SandboxState",
    "SandboxTimeout",
    "SavedSnapshot",
    "SeccompPolicy",
    "SetupError",
    "Snapshot",
    "SnapshotNotFound",
    "SnapshotStore",
    "SpecError",
    "Stderr",
    "Stdout",
    "Template",
    "TooManySandboxes",
    "UnsupportedHost",
    "Usage",
    "Volume",
    "VolumeNotFound",
    "VolumeUsage",
    "Volumes",
    "gc",
    "host_limits",
    "list_sandboxes",
    "run",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if name == "aio":
        import importlib

        return importlib.import_module("sandboxcore.aio")
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
