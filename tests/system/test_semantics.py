"""run() beside subprocess.run(): where they overlap they do the same."""

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import PYTHON, Spec, shell

import sandboxcore
from sandboxcore import DEVNULL, STDOUT

pytestmark = pytest.mark.once

ENV = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}


def sh(script: str, *args: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *args]


def outcome(call: Callable[[], Any]) -> Any:
    """What a caller sees: the result's fields, or the exception's standard type and its fields."""
    try:
        done = call()
    except subprocess.CalledProcessError as error:
        return "CalledProcessError", error.returncode, error.cmd, error.stdout, error.stderr
    except OSError as error:
        kinds = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
        kind = next((kind.__name__ for kind in kinds if isinstance(error, kind)), "OSError")
        return kind, error.errno, error.strerror, os.fspath(error.filename)
    except (ValueError, TypeError) as error:
        return next(kind.__name__ for kind in (ValueError, TypeError) if isinstance(error, kind))
    return list(done.args), done.returncode, done.stdout, done.stderr


SAME: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "nothing": (["true"], {}),
    "status": (sh("exit 3"), {}),
    "both streams": (sh("echo out; echo err >&2"), {}),
    "input": (["cat"], {"input": b"a\0\r\n\xff"}),
    "empty input": (["cat"], {"input": b""}),
    "text": (["cat"], {"input": "a\r\nb\rc\n", "text": True}),
    "encoding": (["cat"], {"input": "é", "encoding": "latin-1"}),
    "errors": (["printf", r"\377"], {"errors": "replace", "encoding": "utf-8"}),
    "merged": (sh("echo 1; echo 2 >&2; echo 3"), {"stderr": STDOUT}),
    "no output": (sh("echo 1; echo 2 >&2"), {"stdout": DEVNULL}),
    "no errors": (sh("echo 1; echo 2 >&2"), {"stderr": DEVNULL}),
    "nothing at all": (sh("echo 1; echo 2 >&2"), {"stdout": DEVNULL, "stderr": STDOUT}),
    "environment": (["env"], {"env": {"A": "1", "PATH": "/usr/bin:/bin", "Z": "é", "E": ""}}),
    "empty environment": (["/usr/bin/env"], {"env": {}}),
    "path of the environment": (["env"], {"env": {"PATH": "/nowhere:/usr/bin"}}),
    "cwd": (["pwd"], {"cwd": "/usr/bin"}),
    "relative program": (["./env"], {"cwd": "/usr/bin", "env": {}}),
    "arguments": (sh('for a; do echo "<$a>"; done', "", "a b", "*", "é", "\n", "-"), {}),
    "bytes": ([b"printf", b"\xff%s", b"\xfe"], {}),
    "surrogates": (["printf", "%s", "\udcff"], {}),
    "path-like": ([Path("/usr/bin/env")], {"env": {"A": "1"}}),
    "tuple": (("echo", "x"), {}),
    "signal": (sh("kill -9 $$"), {}),
    "term": (sh("kill $$"), {}),
    "status of a signal": (sh("sh -c 'kill -9 $$'; exit $?"), {}),
    "check passes": (["true"], {"check": True}),
    "check status": (sh("echo out; echo err >&2; exit 5"), {"check": True}),
    "check signal": (sh("kill -11 $$"), {"check": True}),
    "check text": (sh("echo out; exit 5"), {"check": True, "text": True}),
    "no program": (["no-such-program"], {}),
    "no program by path": (["/no/such/program"], {}),
    "no directory on the way": (["/etc/passwd/x"], {}),
    "not executable": (["/etc/passwd"], {}),
    "a directory": (["/usr/bin"], {}),
    "null byte in argument": (["echo", "a\0b"], {}),
    "null byte in program": (["ec\0ho"], {}),
    "null byte in environment": (["true"], {"env": {"A": "\0"}}),
    "null byte in cwd": (["true"], {"cwd": "/usr\0/bin"}),
    "bad name in environment": (["true"], {"env": {"A=B": "1"}}),
    "missing cwd": (["true"], {"cwd": "/no/such/directory"}),
    "cwd is a file": (["true"], {"cwd": "/etc/passwd"}),
    "input and stdin": (["cat"], {"input": b"x", "stdin": DEVNULL}),
    "one argument too long": (["echo", "x" * (128 << 10)], {}),
    "one argument as long as may be": (["echo", "x" * ((128 << 10) - 1)], {}),
    "one variable too long": (["true"], {"env": {"A": "x" * (128 << 10)}}),
    "1 MiB of arguments": (["echo", *["x" * 1023] * 1024], {}),
    "100,000 arguments": (["echo", *["x"] * 100_000], {}),
    "too many arguments": (["echo", *["x" * 100_000] * 100], {}),
    "many variables": (["env"], {"env": {f"V{n}": "x" * 100 for n in range(5000)}}),
    "no interpreter": (["./script"], {}),
}


@pytest.mark.parametrize("case", SAME)
def test_same_as_subprocess(case: str, tmp_path: Path) -> None:
    argv, options = SAME[case]
    options = {"env": ENV, **options}
    script = tmp_path / "dir/script"
    script.parent.mkdir()
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    fields = {"ro": [(script.parent, "/dir")]}
    outer = dict(options)
    if case == "no interpreter":
        options, outer = {**options, "cwd": "/dir"}, {**options, "cwd": script.parent}
    if "input" not in options and "stdin" not in options:
        outer["stdin"] = DEVNULL
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    inside = outcome(lambda: sandboxcore.run(argv, spec=Spec(**fields), timeout=60, **options))
    outside = outcome(lambda: subprocess.run(argv, timeout=60, **{**pipes, **outer}))
    if case in ("environment", "many variables"):  # the order is the caller's in both
        assert sorted(inside[2].split()) == sorted(outside[2].split())
    assert inside == outside


def test_an_error_names_the_program() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program") as caught:
        sandboxcore.run(["no-such-program"])
    assert isinstance(caught.value, sandboxcore.ProgramNotFound)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(PermissionError, match="/etc/passwd") as refused:
        sandboxcore.run(["/etc/passwd"])
    assert isinstance(refused.value, sandboxcore.ProgramNotExecutable)


def test_search_goes_on_behind_what_may_not_be_executed(tmp_path: Path) -> None:
    """execvp(3): the next directory of PATH is tried; a refusal is reported only if nothing works."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "tool").write_text("no\n")
    (bad / "only").write_text("no\n")
    good = tmp_path / "good"
    good.mkdir()
    (good / "tool").write_text("#!/bin/sh\necho good\n")
    (good / "tool").chmod(0o755)
    spec = Spec(ro=[(bad, "/b"), (good, "/g")], env={"PATH": "/b:/g:/usr/bin"})
    assert sandboxcore.run(["tool"], spec=spec).stdout == b"good\n"
    with pytest.raises(PermissionError):
        sandboxcore.run(["only"], spec=spec)


@pytest.mark.parametrize("argv", [[], "true", b"true", ()])
def test_no_command_line(argv: Any) -> None:
    with pytest.raises(ValueError, match="argv"):
        sandboxcore.run(argv)


def test_environment_is_replaced_not_merged() -> None:
    done = sandboxcore.run(["/usr/bin/env"], env={"ONLY": "this"}, spec=Spec(env={"NOT": "that"}))
    assert done.stdout == b"ONLY=this\n"


def test_relative_cwd_is_below_the_workdir() -> None:
    assert sandboxcore.run(["pwd"], cwd="lib", spec=Spec(workdir="/usr")).stdout == b"/usr/lib\n"
    assert sandboxcore.run(["pwd"], cwd=Path("/usr")).stdout == b"/usr\n"


def test_cwd_through_a_link_stays_inside(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "up").symlink_to("../../../../../..")
    (links / "usr").symlink_to("/usr")
    (links / "out").symlink_to(tmp_path)
    spec = Spec(ro=[(links, "/l")])
    assert shell("pwd -P; ls", cwd="/l/up", spec=spec).stdout.startswith(b"/\n")
    assert shell("pwd -P", cwd="/l/usr", spec=spec).stdout == b"/usr\n"
    with pytest.raises(OSError, match="No such file") as caught:
        shell("pwd", cwd="/l/out", spec=spec)
    assert caught.value.errno == errno.ENOENT


def test_args_and_repr() -> None:
    done = sandboxcore.run(["echo", "x"])
    assert done.args == ("echo", "x")
    assert "returncode=0" in repr(done)
    done.check_returncode()


def test_subprocess_inside() -> None:
    code = (
        "import subprocess; print(subprocess.run(['echo', 'nested'], capture_output=True, text=True).stdout)"
    )
    assert sandboxcore.run([PYTHON, "-c", code]).stdout == b"nested\n\n"


def test_python_of_the_host_is_not_asked_for_anything() -> None:
    """No environment variable of this process reaches the payload."""
    assert not set(os.environ) & {"ONLY_INSIDE"}
    assert sandboxcore.run(["env"], env={"ONLY_INSIDE": "1"}).stdout == b"ONLY_INSIDE=1\n"
