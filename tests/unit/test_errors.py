"""The exception tree, as callers meet it."""

import copy
import errno
import pickle
import subprocess

import pytest

import sandboxcore
from sandboxcore import errors


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.SpecError, ValueError),
        (errors.SetupError, OSError),
        (errors.CwdNotFound, FileNotFoundError),
        (errors.CwdPathInvalid, NotADirectoryError),
        (errors.CwdNotPermitted, PermissionError),
        (errors.ProgramNotFound, FileNotFoundError),
        (errors.ProgramPathInvalid, NotADirectoryError),
        (errors.ProgramNotExecutable, PermissionError),
        (errors.CommandFailed, subprocess.CalledProcessError),
        (errors.SandboxTimeout, TimeoutError),
    ],
)
def test_each_is_also_what_the_standard_library_would_raise(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, sandboxcore.SandboxError)


def test_setup_error_names_everything() -> None:
    error = errors.SetupError("mount", errno.ENOENT, index=3, subject="/a on /b", hint="create it")
    assert (error.stage, error.index, error.errno, error.subject) == ("mount", 3, errno.ENOENT, "/a on /b")
    assert str(error) == "mount: /a on /b: No such file or directory (create it)"
    assert (error.strerror, error.filename) == ("No such file or directory", None)
    assert errors.ExecError("exec", errno.ENOENT, subject="tool").filename == "tool"
    assert str(errors.SetupError("host", errno.EMFILE)) == "host: Too many open files"


def test_unsupported_host_names_feature_and_remedy() -> None:
    error = errors.UnsupportedHost("Landlock", "boot with lsm=landlock")
    assert (error.feature, error.remedy) == ("Landlock", "boot with lsm=landlock")
    assert str(error) == "Landlock: not available on this host; boot with lsm=landlock"


@pytest.mark.parametrize(
    "error",
    [
        errors.SetupError("mount", errno.ENOENT, index=3, subject="/a on /b", hint="create it"),
        errors.ProgramNotFound("exec", errno.ENOENT, subject="x"),
        errors.UnsupportedHost("Landlock", "boot with lsm=landlock"),
        errors.SpecError("wrong"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_travel_between_processes(error: Exception) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)
