"""Run code you did not write, in a fresh and fully isolated Linux sandbox.

>>> import sandboxcore
>>> sandboxcore.run(["id", "-u"]).stdout
b'1000\\n'

Importing this package loads nothing else; each name is loaded on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandboxcore.capabilities import SandboxCapabilities
    from sandboxcore.errors import (
        CommandFailed,
        ExecError,
        ProgramNotExecutable,
        ProgramNotFound,
        ProgramPathInvalid,
        SandboxError,
        SandboxTimeout,
        SetupError,
        SpecError,
        UnsupportedHost,
    )
    from sandboxcore.process import run
    from sandboxcore.request import DEVNULL, PIPE, STDOUT
    from sandboxcore.result import Cause, ExecResult, Usage
    from sandboxcore.seccomp import SeccompPolicy
    from sandboxcore.spec import Limits, Mount, SandboxSpec

__version__ = "0.1.0"

_HOME = {
    "capabilities": ("SandboxCapabilities",),
    "errors": (
        *("CommandFailed", "ExecError", "ProgramNotExecutable", "ProgramNotFound", "ProgramPathInvalid"),
        *("SandboxError", "SandboxTimeout", "SetupError", "SpecError", "UnsupportedHost"),
    ),
    "process": ("run",),
    "request": ("DEVNULL", "PIPE", "STDOUT"),
    "result": ("Cause", "ExecResult", "Usage"),
    "seccomp": ("SeccompPolicy",),
    "spec": ("Limits", "Mount", "SandboxSpec"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "Cause",
    "CommandFailed",
    "ExecError",
    "ExecResult",
    "Limits",
    "Mount",
    "ProgramNotExecutable",
    "ProgramNotFound",
    "ProgramPathInvalid",
    "SandboxCapabilities",
    "SandboxError",
    "SandboxSpec",
    "SandboxTimeout",
    "SeccompPolicy",
    "SetupError",
    "SpecError",
    "UnsupportedHost",
    "Usage",
    "run",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
