"""CPython's test_subprocess, with every command in one living sandbox.

`expected.json` says of each test that it passes, or why it cannot apply, or that it skips itself. It was made
with CPython 3.11 to 3.13; another version may lack some tests and have others.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support import PROJECT, can_grant, open_fds, wait_until

import sandboxcore
from sandboxcore import DEVNULL, PIPE, STDOUT, Sandbox

EXPECTED = json.loads(Path(__file__).with_name("expected.json").read_text())
ADAPTER = Path(__file__).with_name("adapter.py")
PREFIX = "test.test_subprocess."
TIME_LIMIT = 300  # seconds; it takes about 25
MAY_SKIP = 20  # tests that pass elsewhere and skip themselves for want of something on this host

Report = dict[str, tuple[str, str]]


def run_tests(directory: Path, *only: str) -> Report:
    """Run test_subprocess, or `only` some tests of it, with sandboxed children; the outcomes by name."""
    directory.mkdir()
    (directory / "tmp").mkdir()
    packages = [path for path in sys.path if path.endswith("-packages")]
    env = {
        "HOME": str(directory),
        "LC_ALL": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), *packages]),
        "TMPDIR": str(directory / "tmp"),
    }
    # The interpreter below the virtualenv: some tests skip themselves in one.
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    done = subprocess.run(
        [python, str(ADAPTER), *(PREFIX + name for name in only)],
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    report = directory / "report.json"
    assert report.exists(), f"no report, status {done.returncode}: {done.stderr[-4000:]}"
    outcomes = json.loads(report.read_text())
    return {name.removeprefix(PREFIX): (status, detail) for name, (status, detail) in outcomes.items()}


def listed(part: str) -> dict[str, str]:
    """The tests of one part of the list, each with its reason."""
    return {test: group["why"] for group in EXPECTED[part].values() for test in group["tests"]}


def complaints(report: Report) -> dict[str, str]:
    """What is not as the list says, by test."""
    passes, cannot, skips = set(EXPECTED["passes"]), listed("cannot apply"), listed("skips itself")
    found = {}
    for test, (status, detail) in report.items():
        message = (detail.strip().splitlines() or [""])[-1]
        if test in cannot:
            if status == "ok":
                found[test] = f"passes, although it is listed as: {cannot[test]}"
        elif status == "failed":
            known = test in passes or test in skips
            found[test] = message if known else f"not on the list, and fails: {message}"
    return found


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.timeout(2 * TIME_LIMIT + 30)
def test_cpythons_own_tests(tmp_path: Path) -> None:
    if find_spec("test") is None or find_spec("test.test_subprocess") is None:
        pytest.skip("this Python comes without its tests; Debian has them in libpython3.x-testsuite")
    can_grant(tmp_path)
    report = run_tests(tmp_path / "all")
    found = complaints(report)
    if 0 < len(found) <= 20:  # some depend on time: what counts shows again, alone
        found = complaints(run_tests(tmp_path / "again", *found))
    assert found == {}
    passes = [test for test in EXPECTED["passes"] if test in report]
    skipped = {test: report[test][1] for test in passes if report[test][0] == "skipped"}
    assert len(skipped) <= MAY_SKIP, skipped
    assert len(passes) >= 0.9 * len(EXPECTED["passes"]), "this is another test_subprocess"
    absent = {*EXPECTED["passes"], *listed("cannot apply"), *listed("skips itself")} - set(report)
    new = set(report) - {*EXPECTED["passes"], *listed("cannot apply"), *listed("skips itself")}
    print(f"{len(passes) - len(skipped)} passed; not in this version: {sorted(absent)}; new: {sorted(new)}")


def test_each_is_on_the_list_once() -> None:
    names = [*EXPECTED["passes"]]
    for part in ("cannot apply", "skips itself"):
        for group in EXPECTED[part].values():
            assert group["why"]
            assert group["tests"]
            names += group["tests"]
    assert len(names) == len(set(names))


# --- what came to light, as tests of its own --------------------------------------------------------


def test_executable_and_umask() -> None:
    script = ["nice name", "-c", 'echo "$0"; umask']
    with Sandbox() as sandbox:
        done = sandbox.exec(script, executable="sh", umask=0o027)
        assert done.stdout == b"nice name\n0027\n"
        with sandbox.popen(script, executable=b"/bin/sh") as process:
            assert process.stdout.read() == b"nice name\n0022\n"
        with pytest.raises(sandboxcore.ProgramNotFound) as caught:
            sandbox.exec(["sh"], executable="/none/such")
        assert (caught.value.stage, caught.value.filename) == ("exec", "/none/such")
        for umask in (-1, 0o1000):
            with pytest.raises(sandboxcore.SpecError, match="umask"):
                sandbox.exec(["true"], umask=umask)
        with pytest.raises(ValueError, match="null byte"):
            sandbox.exec(["true"], executable="a\0b")


def test_errors_have_subprocess_fields() -> None:
    with Sandbox() as sandbox:
        for cwd, kind in (
            ("/none", sandboxcore.CwdNotFound),
            ("/etc/passwd", sandboxcore.CwdPathInvalid),
        ):
            with pytest.raises(kind) as inside:
                sandbox.popen(["true"], cwd=cwd)
            with pytest.raises(OSError) as outside:
                subprocess.run(["true"], cwd=cwd)
            for name in ("errno", "strerror", "filename"):
                assert getattr(inside.value, name) == getattr(outside.value, name)
            assert str(inside.value).startswith(f"cwd: {cwd}: ")


def test_environment_of_bytes() -> None:
    with Sandbox() as sandbox:
        env: Any = {b"A\xff": b"\xfe", "B": "x", b"PATH": b"/usr/bin"}
        assert sandbox.exec(["env"], env=env).stdout.split() == [b"A\xff=\xfe", b"B=x", b"PATH=/usr/bin"]
        for wrong in ({b"": b"x"}, {b"A=B": b"x"}, {b"A": b"\0"}, {1: "x"}):
            with pytest.raises(sandboxcore.SpecError):
                sandbox.exec(["true"], env=wrong)


def test_one_file_for_both_keeps_the_order(tmp_path: Path) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9; do echo out$i; echo err$i >&2; done"
    with Sandbox() as sandbox, open(tmp_path / "log", "w+b") as log:
        with sandbox.popen(["sh", "-c", script], stdout=log, stderr=log) as process:
            assert process.wait(10) == 0
        log.seek(0)
        assert log.read().split() == [f"{word}{i}".encode() for i in range(1, 10) for word in ("out", "err")]


def test_a_closed_stream_is_the_null_device_beside_a_pipe() -> None:
    """The pipe must not be taken for the stream whose number it got. In a process whose streams may go."""
    code = (
        "import os, sandboxcore\n"
        "with sandboxcore.Sandbox() as sandbox:\n"
        "    os.close(0), os.close(1)\n"
        "    with sandbox.popen(['sh', '-c', 'cat >&2; [ /dev/fd/1 -ef /dev/null ] && echo null >&2'],\n"
        "                       stdin=sandboxcore.PIPE, stdout=None, stderr=sandboxcore.PIPE) as process:\n"
        "        print(process.communicate(b'fed ', timeout=10), file=open('/dev/stderr', 'w'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=env, timeout=60
    )
    assert done.stderr.strip() == rb"(None, b'fed null\n')"


def test_buffering_is_checked_before_anything_starts() -> None:
    wrong: tuple[tuple[type[Exception], dict[str, Any]], ...] = (
        (TypeError, {"bufsize": "many"}),
        (LookupError, {"encoding": "no-such"}),
        (LookupError, {"errors": "no-such"}),
    )
    with Sandbox() as sandbox:
        before = len(open_fds())
        for kind, options in wrong:
            with pytest.raises(kind):
                sandbox.popen(["sleep", "60"], **options)
        with pytest.warns(RuntimeWarning, match="line buffering"):
            sandbox.popen(["true"], bufsize=1).communicate(timeout=10)
        assert len(os.listdir("/proc/self/fd")) == before
        # In text it means lines, and nobody warns.
        with sandbox.popen(["cat"], stdin=PIPE, stderr=STDOUT, text=True, bufsize=1) as process:
            process.stdin.write("line\n")
            assert process.stdout.readline() == "line\n"


def test_what_cannot_be_flushed_is_reported() -> None:
    with Sandbox() as sandbox:
        process = sandbox.popen(["true"], stdin=PIPE, stdout=DEVNULL, bufsize=1 << 20)
        wait_until(lambda: process.poll() is not None, "the end of true")
        process.stdin.write(b"x" * (1 << 18))
        with pytest.raises(BrokenPipeError), process:
            pass
        assert process.returncode == 0


def test_closing_wakes_who_waits_in_another_thread() -> None:
    with Sandbox() as sandbox, ThreadPoolExecutor() as threads:
        process = sandbox.popen(["sleep", "60"], stdout=DEVNULL, stderr=DEVNULL)
        before = len(open_fds())
        waits = [threads.submit(process.wait) for _ in range(3)]
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before + 3, "three threads with a copy each")
        process.close()
        assert [wait.result(10) for wait in waits] == [-9] * 3


def test_nothing_stays_open_behind_the_end() -> None:
    """Not even where nobody closes: the number could be somebody else's by then."""
    with Sandbox() as sandbox:
        sandbox.exec(["true"])
        before = set(open_fds())
        process = sandbox.popen(["true"])
        process.communicate(timeout=10)
        assert set(os.listdir("/proc/self/fd")) <= before
        assert process.pid == 0
