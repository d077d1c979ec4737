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
        SelectionRefused,
        SessionNotFound,
        SetupError,
        SnapshotNotFound,
        SpecError,
        TooManySandboxes,
        UnsupportedHost,
        VolumeNotFound,
    )
    from sandboxcore.eventchain import Verification, read_log, verify_log
    from sandboxcore.eventlog import EventLog
    from sandboxcore.events import Event, EventKind
    from sandboxcore.fileops import FileInfo
    from sandboxcore.files import Files
    from sandboxcore.journal import Log
    from sandboxcore.lifecycle import SandboxState
    from sandboxcore.managed_session import AttachResult, SandboxSession
    from sandboxcore.manager import SandboxManager
    from sandboxcore.manager_stats import Health, ManagerStats
    from sandboxcore.persistent import PersistentSandbox
    from sandboxcore.policy import Action, LifecyclePolicy
    from sandboxcore.pool import SandboxPool
    from sandboxcore.pool_policy import PoolConfig, PoolStats
    from sandboxcore.pools import SandboxPools
    from sandboxcore.process import run
    from sandboxcore.reconcile import Reconciled
    from sandboxcore.records import SandboxRecord, SessionRecord
    from sandboxcore.recovery import gc, list_sandboxes
    from sandboxcore.request import DEVNULL, PIPE, STDOUT
    from sandboxcore.result import Cause, ExecResult, Usage
    from sandboxcore.sandbox import Sandbox
    from sandboxcore.saved import SavedSnapshot, SnapshotStore
    from sandboxcore.seccomp import SeccompPolicy
    from sandboxcore.selection import RequiredCapabilities, SelectionOptions
    from sandboxcore.session import SessionState, SessionTimeouts
    from sandboxcore.snapshots import Snapshot
    from sandboxcore.spec import Limits, Mount, SandboxSpec
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
        *(
            "SandboxTimeout",
            "SelectionRefused",
            "SessionNotFound",
            "SetupError",
            "SpecError",
            "TooManySandboxes",
            "UnsupportedHost",
        ),
        "VolumeNotFound",
    ),
    "cgroup_group": ("GroupUsage",),
    "command": ("Exit", "Process", "Stderr", "Stdout"),
    "eventchain": ("Verification", "read_log", "verify_log"),
    "eventlog": ("EventLog",),
    "events": ("Event", "EventKind"),
    "fileops": ("FileInfo",),
    "files": ("Files",),
    "detached": ("DetachedCommand",),
    "groups": ("host_limits",),
    "journal": ("Log",),
    "lifecycle": ("SandboxState",),
    "persistent": ("PersistentSandbox",),
    "recovery": ("gc", "list_sandboxes"),
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
    "records": ("SandboxRecord", "SessionRecord"),
    "template": ("Template",),
    "volumes": ("Volume", "VolumeUsage", "Volumes"),
    "managed_session": ("AttachResult", "SandboxSession"),
    "manager": ("SandboxManager",),
    "manager_stats": ("Health", "ManagerStats"),
    "policy": ("Action", "LifecyclePolicy"),
    "reconcile": ("Reconciled",),
    "selection": ("RequiredCapabilities", "SelectionOptions"),
    "session": ("SessionState", "SessionTimeouts"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Action",
    "ArchiveError",
    "AttachResult",
    "Cause",
    "CheckpointError",
    "CommandFailed",
    "CommitError",
    "CwdNotFound",
    "CwdNotPermitted",
    "CwdPathInvalid",
    "DetachedCommand",
    "Event",
    "EventKind",
    "EventLog",
    "ExecError",
    "ExecResult",
    "Exit",
    "FileChange",
    "FileInfo",
    "Files",
    "GroupUsage",
    "Health",
    "InvalidTransition",
    "LifecyclePolicy",
    "LimitChange",
    "Limits",
    "Log",
    "ManagerStats",
    "Mount",
    "PersistentSandbox",
    "PoolConfig",
    "PoolStats",
    "Process",
    "ProgramNotExecutable",
    "ProgramNotFound",
    "ProgramPathInvalid",
    "Reconciled",
    "RequiredCapabilities",
    "Sandbox",
    "SandboxBusy",
    "SandboxCapabilities",
    "SandboxError",
    "SandboxGone",
    "SandboxManager",
    "SandboxNotFound",
    "SandboxPool",
    "SandboxPools",
    "SandboxRecord",
    "SandboxSession",
    "SandboxSpec",
    "SandboxState",
    "SandboxTimeout",
    "SavedSnapshot",
    "SeccompPolicy",
    "SelectionOptions",
    "SelectionRefused",
    "SessionNotFound",
    "SessionRecord",
    "SessionState",
    "SessionTimeouts",
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
    "Verification",
    "Volume",
    "VolumeNotFound",
    "VolumeUsage",
    "Volumes",
    "gc",
    "host_limits",
    "list_sandboxes",
    "read_log",
    "run",
    "verify_log",
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
