"""The exceptions: their tree, what they say, and that they survive a trip to another process."""

import copy
import errno
import pickle
import subprocess

import pytest

import sandboxcore
from sandboxcore import (
    Cause,
    CommandFailed,
    ExecError,
    ExecResult,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    SandboxError,
    SandboxTimeout,
    SetupError,
    SpecError,
    UnsupportedHost,
    Usage,
)

TREE = {
    SandboxError: Exception,
    SpecError: (SandboxError, ValueError),
    UnsupportedHost: SandboxError,
    SetupError: (SandboxError, OSError),
    ExecError: SetupError,
    ProgramNotFound: (ExecError, FileNotFoundError),
    ProgramNotExecutable: (ExecError, PermissionError),
    ProgramPathInvalid: (ExecError, NotADirectoryError),
    CommandFailed: (SandboxError, subprocess.CalledProcessError),
    SandboxTimeout: (SandboxError, TimeoutError),
}


def result(returncode: int, cause: Cause = Cause.EXITED) -> ExecResult:
    return ExecResult(
        args=("prog", "arg"),
        returncode=returncode,
        stdout=b"out",
        stderr=b"err",
        duration=1.5,
        cause=cause,
        stdout_total=3,
        stderr_total=3,
        truncated=False,
        usage=Usage(0.0, 0.0, 0, 0, 0, 0),
        timings={"run": 1.5},
    )


def test_tree() -> None:
    for child, parents in TREE.items():
        for parent in parents if isinstance(parents, tuple) else (parents,):
            assert issubclass(child, parent)
    public = {name for name in sandboxcore.__all__ if isinstance(getattr(sandboxcore, name), type)}
    assert {kind.__name__ for kind in TREE} == {
        name for name in public if issubclass(getattr(sandboxcore, name), BaseException)
    }


def test_setup_error_says_everything() -> None:
    error = SetupError("mount", errno.EPERM, index=3, subject="/a on /b", hint="do this")
    assert (error.stage, error.errno, error.index, error.subject, error.hint) == (
        "mount",
        1,
        3,
        "/a on /b",
        "do this",
    )
    assert str(error) == "mount: /a on /b: Operation not permitted (do this)"
    assert str(SetupError("clone", errno.EAGAIN)) == "clone: Resource temporarily unavailable"
    assert error.strerror == str(error)


def test_unsupported_host() -> None:
    error = UnsupportedHost("Landlock", "boot with lsm=landlock")
    assert (error.feature, error.remedy) == ("Landlock", "boot with lsm=landlock")
    assert "Landlock" in str(error)
    assert "boot with" in str(error)


def test_command_failed() -> None:
    done = result(3)
    with pytest.raises(CommandFailed) as caught:
        done.check_returncode()
    error = caught.value
    assert (error.returncode, error.cmd, error.stdout, error.output, error.stderr) == (
        3,
        ["prog", "arg"],
        b"out",
        b"out",
        b"err",
    )
    assert error.result is done
    assert "status 3" in str(error)
    assert "SIGKILL" in str(CommandFailed(result(-9)))
    result(0).check_returncode()


def test_timeout() -> None:
    done = result(-9, Cause.TIMEOUT)
    with pytest.raises(SandboxTimeout, match="prog") as caught:
        done.check_returncode()
    assert caught.value.result is done
    assert done.timed_out
    assert not done.ok


SAMPLES = [
    SandboxError("text"),
    SpecError("field: wrong"),
    UnsupportedHost("feature", "remedy"),
    SetupError("mount", errno.EPERM, index=3, subject="/a", hint="h"),
    ExecError("exec", errno.ENOEXEC, subject="prog"),
    ProgramNotFound("exec", errno.ENOENT, subject="prog"),
    ProgramNotExecutable("exec", errno.EACCES, subject="prog"),
    CommandFailed(result(3)),
    SandboxTimeout(result(-9, Cause.TIMEOUT)),
]


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("trip", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_they_travel(error: Exception, trip) -> None:
    """A pool of worker processes hands its exceptions on by pickling them."""
    again = trip(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    for name in (
        "stage",
        "errno",
        "index",
        "subject",
        "hint",
        "feature",
        "remedy",
        "result",
        "returncode",
        "cmd",
    ):
        assert getattr(again, name, None) == getattr(error, name, None)


def test_a_result_travels() -> None:
    done = result(0)
    assert pickle.loads(pickle.dumps(done)) == done


@pytest.mark.parametrize(("code", "name"), [(-9, "SIGKILL"), (-11, "SIGSEGV"), (0, None), (5, None)])
def test_signal(code: int, name: str | None) -> None:
    found = result(code).signal
    assert (found.name if found is not None else None) == name


def test_signal_without_a_name() -> None:
    assert result(-40).signal == 40
