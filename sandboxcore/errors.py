"""What can go wrong, as one tree.

::

    SandboxError
    ├── SpecError (ValueError)          the description is wrong; nothing was started
    ├── UnsupportedHost                 this host cannot do what was asked: .feature, .remedy
    ├── SetupError (OSError)            isolation failed at .stage; nothing is left behind
    │   ├── CwdNotFound (FileNotFoundError)
    │   ├── CwdPathInvalid (NotADirectoryError)
    │   ├── CwdNotPermitted (PermissionError)
    │   └── ExecError                   isolation stands, the command could not be executed
    │       ├── ProgramNotFound (FileNotFoundError)
    │       ├── ProgramPathInvalid (NotADirectoryError)
    │       └── ProgramNotExecutable (PermissionError)
    ├── InvalidTransition (RuntimeError)     not in this state: .state, .wanted
    ├── SandboxNotFound (LookupError)        no sandbox or command of that name or id
    ├── SessionNotFound (LookupError)        no session of that id
    ├── SelectionRefused                     no sandbox is as was asked for: .unmet
    ├── VolumeNotFound (LookupError)         no volume of that name
    ├── SandboxBusy (BlockingIOError)        not now: something runs in it, or somebody has the volume
    ├── SandboxGone (ConnectionError)        its init has ended: killed from outside, or with its host process
    ├── CheckpointError                      CRIU could not, or what it restored is not isolated as before
    ├── CommandFailed (CalledProcessError)   check=True and a non-zero status
    └── SandboxTimeout (TimeoutError)        check=True and the time was up

Failing to sandbox is an exception; what the program did is data (:class:`ExecResult`), unless
``check=True`` asks otherwise.
"""

import errno as E
import functools
import os
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandboxcore.result import ExecResult


class SandboxError(Exception):
    """Base of everything this package raises on purpose."""


class SpecError(SandboxError, ValueError):
    """The spec or an argument is wrong. Raised before anything is started."""


class UnsupportedHost(SandboxError):
    """The host lacks something that the spec asks for.

    ``feature`` names it in the kernel's words, ``remedy`` says how to get it.
    """

    def __init__(self, feature: str, remedy: str) -> None:
        super().__init__(f"{feature}: not available on this host; {remedy}")
        self.feature = feature
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.feature, self.remedy)


class SetupError(SandboxError, OSError):
    """A step of the set-up failed; the payload did not run and nothing is left behind.

    ``stage`` names the step, ``index`` the item of its list, ``errno`` the kernel's answer,
    ``subject`` the path or object, ``hint`` a remedy where one is known. As with subprocess, ``strerror`` is
    the errno's text alone, and ``filename`` the program or the working directory, if it is about those.
    """

    def __init__(self, stage: str, errno: int, *, index: int = 0, subject: str = "", hint: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        if stage in ("exec", "cwd"):
            self.filename = subject or None
        self.stage = stage
        self.index = index
        self.subject = subject
        self.hint = hint

    def __str__(self) -> str:
        text = ": ".join(filter(None, (self.stage, self.subject, self.strerror)))
        return f"{text} ({self.hint})" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        about: dict[str, Any] = {"index": self.index, "subject": self.subject, "hint": self.hint}
        return functools.partial(type(self), self.stage, self.errno or 0, **about), ()


class CwdNotFound(SetupError, FileNotFoundError):
    """No such working directory inside the sandbox."""


class CwdPathInvalid(SetupError, NotADirectoryError):
    """The working directory, or a part of its path, is no directory."""


class CwdNotPermitted(SetupError, PermissionError):
    """The working directory is there, but the payload may not enter it."""


class ExecError(SetupError):
    """The sandbox stood, but the command could not be executed in it."""


class ProgramNotFound(ExecError, FileNotFoundError):
    """No such program inside the sandbox."""


class ProgramPathInvalid(ExecError, NotADirectoryError):
    """A part of the program's path is no directory."""


class ProgramNotExecutable(ExecError, PermissionError):
    """The program is there, but the payload may not execute it."""


class InvalidTransition(SandboxError, RuntimeError):
    """The sandbox is in a ``state`` that does not allow what was ``wanted``."""

    def __init__(self, name: str, state: str, wanted: str) -> None:
        super().__init__(f"{name}: cannot {wanted} while {state}")
        self.name, self.state, self.wanted = name, state, wanted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.state, self.wanted)


class TooManySandboxes(SandboxError, BlockingIOError):
    """There are ``maximum`` sandboxes already: of this user, by ``host_limits(max_sandboxes=)`` or
    ``SANDBOXCORE_MAX_SANDBOXES``; or, where ``state_dir`` is not None, of that state directory. Close one, or
    try again later."""

    def __init__(self, maximum: int, state_dir: str | None = None) -> None:
        where = "" if state_dir is None else f" in {state_dir}"
        text = f"there are {maximum} sandboxes{where} already, which is max_sandboxes"
        super().__init__(E.EAGAIN, text + (" of this state directory" if where else ""))
        self.maximum, self.state_dir = maximum, state_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.maximum, self.state_dir)


class SandboxNotFound(SandboxError, LookupError):
    """No sandbox, or no command in it, has this name or id."""


class SessionNotFound(SandboxError, LookupError):
    """No session has this id."""


class SelectionRefused(SandboxError):
    """No sandbox is as :class:`SelectionOptions` ask: ``unmet`` has each requirement that failed, and why."""

    def __init__(self, subject: str, unmet: Mapping[str, str]) -> None:
        super().__init__(f"{subject}: " + "; ".join(f"{name}: {why}" for name, why in unmet.items()))
        self.subject, self.unmet = subject, dict(unmet)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.subject, self.unmet)


class VolumeNotFound(SandboxError, LookupError):
    """No volume has this name."""


class SandboxGone(SandboxError, ConnectionError):
    """The sandbox was running and is not any more; nothing of it is left."""


class SandboxBusy(SandboxError, BlockingIOError):
    """Something runs in the sandbox that must not while this is done, or a sandbox has the volume; nothing
    has changed."""


class SnapshotNotFound(SandboxError, LookupError):
    """No saved snapshot has this name."""


class CommitError(SandboxError, OSError):
    """The host's directory cannot take what a sandbox wrote, or is not what it was: see ``filename``."""


class CheckpointError(SandboxError):
    """CRIU could not write or restore processes, or what it restored was not isolated as before; says why."""


class ArchiveError(SandboxError, ValueError):
    """An archive that is broken, hostile, or of something else."""


class CommandFailed(SandboxError, subprocess.CalledProcessError):
    """``check=True`` and the command did not exit with 0. ``result`` has everything."""

    def __init__(self, result: "ExecResult") -> None:
        subprocess.CalledProcessError.__init__(
            self, result.returncode, list(result.args), result.stdout, result.stderr
        )
        self.result = result

    def __str__(self) -> str:
        text = subprocess.CalledProcessError.__str__(self)
        return f"{text} ({self.result.cause.value}: {self.result.detail})" if self.result.detail else text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,)


class SandboxTimeout(SandboxError, TimeoutError):
    """``check=True`` and the time was up. ``result`` has the partial output."""

    def __init__(self, result: "ExecResult") -> None:
        super().__init__(f"command {result.args[0]!r} timed out after {result.duration:.3f} s")
        self.result = result

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.result,)
