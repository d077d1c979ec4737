"""`subprocess.Popen` over one living sandbox, as thin as it goes; and the program that runs CPython's own
test_subprocess with it.

Usage: adapter.py [TEST ...]     in an empty directory, which the sandbox sees; writes report.json there

What differs between the two interfaces on purpose is translated here, and nothing else is: a Popen inherits
streams, environment and working directory, a sandbox's command has its own. What has no counterpart is
refused (preexec_fn) or ignored (close_fds, restore_signals, ids, sessions), and the test that needs it fails.
"""

import fcntl
import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from types import GenericAlias
from typing import Any

import sandboxcore

SANDBOX: sandboxcore.Sandbox  # set by main(): the one that all commands run in


class SandboxPopen:
    """Everything but the constructor is :class:`sandboxcore.Process`."""

    def __init__(  # noqa: PLR0917 - it is subprocess's
        self, args, bufsize=-1, executable=None, stdin=None, stdout=None, stderr=None, preexec_fn=None,
        close_fds=True, shell=False, cwd=None, env=None, universal_newlines=None, startupinfo=None,
        creationflags=0, restore_signals=True, start_new_session=False, pass_fds=(), *, user=None,
        group=None, extra_groups=None, encoding=None, errors=None, text=None, umask=-1, pipesize=-1,
        process_group=None,
    ):  # fmt: skip
        if startupinfo is not None or creationflags != 0:
            raise ValueError("startupinfo and creationflags are only supported on Windows platforms")
        if preexec_fn is not None:
            raise ValueError("preexec_fn is not supported in a sandbox")
        if None not in (text, universal_newlines) and bool(text) != bool(universal_newlines):
            raise subprocess.SubprocessError("text and universal_newlines differ")
        if pass_fds and not close_fds:
            warnings.warn("pass_fds overriding close_fds.", RuntimeWarning, stacklevel=2)
        process = SANDBOX.popen(
            make_argv(args, executable, shell),
            executable=executable,
            bufsize=-1 if bufsize is None else bufsize,
            stdin=inherited(0) if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=os.path.join(os.getcwd(), os.fsdecode(cwd or "")),
            env=os.environ if env is None else env,
            pass_fds=pass_fds,
            text=bool(text or universal_newlines),
            encoding=encoding,
            errors=errors,
            umask=None if umask < 0 else umask,
        )
        self.__dict__.update(_process=process, args=args)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and pipesize > 0:
                fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, pipesize)

    __class_getitem__ = classmethod(GenericAlias)

    def __getattr__(self, name: str) -> Any:
        if name == "_process":
            raise AttributeError("it did not start")
        return getattr(self._process, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._process, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._process, name)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # A Process is killed when its block fails; a Popen runs on, and is waited for.
        return self._process.__exit__(None, None, None)


def make_argv(args, executable, shell):
    """The command line, as subprocess composes it."""
    if isinstance(args, str | bytes):
        args = [args]
    elif isinstance(args, os.PathLike):
        if shell:
            raise TypeError("path-like args is not allowed when shell is true")
        args = [args]
    if not shell:
        return list(args)
    return [executable or "/bin/sh", "-c", *args]


def inherited(number: int) -> int:
    """Our own stream, for a command that shall have it; the null device if it is closed."""
    try:
        os.fstat(number)
    except OSError:
        return subprocess.DEVNULL
    return number


def make_spec(directory: str) -> sandboxcore.SandboxSpec:
    """What a Popen sees without asking: the interpreter, and the directory that the test works in."""
    prefix = sys.base_prefix
    visible = prefix == "/usr" or prefix.startswith("/usr/")
    return sandboxcore.SandboxSpec(rw=[directory], ro=() if visible else (prefix,), workdir=directory)


def main(*only: str) -> None:
    """Run test_subprocess, or `only` the tests with these ids."""
    global SANDBOX
    sys.path.append(str(Path(__file__).parents[2] / "demo"))
    import run_module

    os.environ.pop("PYTHONPATH")
    # So few that the test can try what happens at the limit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    directory = os.getcwd()
    with sandboxcore.Sandbox(make_spec(directory)) as SANDBOX:
        subprocess.Popen = SandboxPopen
        run_module.main("test_subprocess", "", *only)


if __name__ == "__main__":
    main(*sys.argv[1:])
