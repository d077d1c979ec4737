"""The name of the system call for which a filter killed: from the kernel's log, if that is certain."""

import errno
from pathlib import Path

import pytest

import sandboxcore
from sandboxcore import Cause, SandboxSpec, SeccompPolicy, audit
from sandboxcore.seccomp import call_name, resolve

LINE = (
    "5,1234,{usec},-;audit: type=1326 audit(1795288390.082:21184): auid=4294967295 uid={uid} gid=7 ses=1"
    ' pid=31118 comm="python3" exe="/usr/bin/python3.11" sig={sig} arch=c000003e syscall={call} compat=0'
    " ip=0x7f41382704f7 code=0x80000000\n"
)
SECOND = 1_000_000_000


def line(*, usec: int = 10_000_000, uid: int = 1000, sig: int = 31, call: int = 110) -> str:
    return LINE.format(usec=usec, uid=uid, sig=sig, call=call)


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (line(), [110]),
        (line(usec=1_000_000), []),  # before
        (line(usec=60_000_000), []),  # after
        (line(uid=2000), []),  # somebody else's
        (line(sig=0), []),  # of a filter that only logs
        ("6,1,10000000,-;usb 1-1: new device\n", []),
        ("", []),
        ('6,1,10000000,-;comm="type=1326 uid=1000"\n', []),
    ],
)
def test_what_a_line_says(record: str, found: list[int]) -> None:
    assert list(audit.find([record], 9 * SECOND, 11 * SECOND, range(1000, 1001))) == found


def test_two_calls_are_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = 9 * SECOND, 11 * SECOND, range(1000, 1001)
    monkeypatch.setattr(audit, "_records", lambda: iter([line(), line()]))
    assert audit.forbidden_call(*moments) == call_name(110)
    monkeypatch.setattr(audit, "_records", lambda: iter([line(), line(call=101)]))
    assert audit.forbidden_call(*moments) == ""


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOENT, errno.EPERM])
def test_a_log_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    def refuse() -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(audit, "_records", refuse)
    assert audit.forbidden_call(0, SECOND, range(1)) == ""


def test_names() -> None:
    assert call_name(10**6) == str(10**6)
    assert call_name(0)


def test_a_real_kill_is_named_or_said_to_be_unknown() -> None:
    """The kernel limits the rate of such lines, and not everybody may read them: never a wrong name."""
    standard = resolve("standard")
    policy = SeccompPolicy.from_dict(
        standard.to_dict()
        | {"name": "strict", "allow": sorted(set(standard.allow) - {"getppid"}), "default": "kill"}
    )
    program = "import os; os.getppid()"
    result = sandboxcore.run(["python3", "-c", program], spec=SandboxSpec(seccomp=policy))
    assert (result.cause, result.returncode) == (Cause.SECCOMP, -31)
    assert result.detail in ("system call getppid", "the system call's name is not in a log that we may read")
