"""CPython's own regression tests, run outside and inside a sandbox by the same interpreter.

Real programs are the best judges of an isolation: these tests fork, thread, signal, bind sockets,
lock semaphores and measure time, and they notice what is missing. Every test whose result differs
is listed with the reason; a difference without a known reason makes the demo fail.

    python demo/regrtest.py [MODULE ...]
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sandboxcore

MODULES = (
    "test_json",
    "test_subprocess",
    "test_threading",
    "test_socket",
    "test_multiprocessing_fork",
)

RUN_MODULE = Path(__file__).with_name("run_module.py")

# Left out on both sides: where this machine is itself a virtual machine, it waits for its host.
LEFT_OUT = ("*VSOCK*",)

# Why a result may differ: a pattern of test ids, one of the message on either side, the reason.
REASONS = (
    (
        "*UDPLITE*",
        "Address family not supported",
        "the standard profile has TCP, UDP and ICMP, no protocols that make the kernel load modules",
    ),
    (
        "*",
        "should be run as root|may require root",
        "nobody inside may do what is root's, and the test says so and skips itself",
    ),
    (
        "*",
        "RLIMIT_NPROC had no effect",
        "limits do not bind root outside; inside they bind, and the test can do its work",
    ),
    (
        "*.POSIXProcessTestCase.test_[gu]*",
        "Invalid argument",
        "without root on the host only one id exists inside: another is EINVAL, the test wants EPERM",
    ),
)

MODULE_TIMEOUT = 300.0  # seconds; the longest takes about 70 on two cores
ENV = {"LC_ALL": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one test. ``status`` is ok, skipped or failed; ``detail`` says why."""

    status: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One module on one side: its outcomes by test id, and the seconds it took."""

    outcomes: dict[str, Outcome]
    duration: float

    def count(self, status: str) -> int:
        """How many tests ended so."""
        return sum(outcome.status == status for outcome in self.outcomes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A test whose outcome differs; ``reason`` is empty where none is known."""

    test: str
    outside: Outcome
    inside: Outcome
    reason: str


Side = Callable[[Sequence[str]], tuple[bytes, bytes]]


# --- The two sides ----------------------------------------------------------------------------


def interpreter() -> tuple[str, str]:
    """The interpreter below this virtualenv, and the directory it is installed in."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable)), sys.base_prefix


def make_spec() -> sandboxcore.SandboxSpec:
    """The standard sandbox. An interpreter outside /usr has to be shown to it."""
    _, prefix = interpreter()
    visible = prefix == "/usr" or prefix.startswith("/usr/")
    return sandboxcore.SandboxSpec(ro=() if visible else (prefix,), env=ENV)


def outside(argv: Sequence[str]) -> tuple[bytes, bytes]:
    """Run a command as usual, in an empty directory. Returns stdout and stderr."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                cwd=directory,
                env={**ENV, "HOME": directory, "TMPDIR": directory},
                timeout=MODULE_TIMEOUT,
            )
        except subprocess.TimeoutExpired as error:
            return b"", (error.stderr or b"") + b"\ntimed out"
        return done.stdout, done.stderr


def inside(argv: Sequence[str]) -> tuple[bytes, bytes]:
    """Run a command in a fresh sandbox, in its private workspace. Returns stdout and stderr."""
    done = sandboxcore.run(argv, spec=make_spec(), timeout=MODULE_TIMEOUT)
    return done.stdout, done.stderr + (b"\ntimed out" if done.timed_out else b"")


def run_module(side: Side, module: str, only: Sequence[str] = ()) -> Report:
    """Run one module's tests, or `only` those named."""
    python, _ = interpreter()
    argv = [python, "-c", RUN_MODULE.read_text(), module, ",".join(LEFT_OUT), *only]
    # What a sandbox writes is gone with it, so the report comes back on stdout, alone.
    script = '"$@" >&2 && cat report.json'
    start = time.monotonic()
    report, log = side(["/bin/sh", "-c", script, "sh", *argv])
    return Report(outcomes=parse(module, report, log), duration=time.monotonic() - start)


def parse(module: str, report: bytes, log: bytes) -> dict[str, Outcome]:
    """The outcomes by test id. Without a report, the whole module is one failed test."""
    if not report:
        return {module: Outcome(status="failed", detail=last_line(log.decode(errors="replace")))}
    outcomes = json.loads(report).items()
    return {test: Outcome(status=status, detail=detail) for test, (status, detail) in outcomes}


def last_line(text: str) -> str:
    """The last line that says something; of a traceback, that is the exception."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


# --- The comparison ---------------------------------------------------------------------------


def compare(expected: Report, actual: Report) -> list[Difference]:
    """Tests that ended otherwise inside than outside."""
    absent = Outcome(status="absent")
    differences = []
    tests = {*expected.outcomes, *actual.outcomes}
    broken = [test for test in tests if "." not in test]  # a module without a report says it all
    for test in sorted(broken or tests):
        before, after = expected.outcomes.get(test, absent), actual.outcomes.get(test, absent)
        if before.status != after.status:
            reason = explain(test, before.detail or after.detail)
            differences.append(Difference(test=test, outside=before, inside=after, reason=reason))
    return differences


def explain(test: str, detail: str) -> str:
    """The known reason for a difference, or nothing."""
    for tests, details, reason in REASONS:
        if fnmatch.fnmatchcase(test, tests) and re.search(details, detail):
            return reason
    return ""


def second_look(module: str, differences: Sequence[Difference]) -> list[Difference]:
    """Run what differs without a reason again, alone. These tests depend on time, and just now ten
    modules shared the machine: a difference counts when it shows again."""
    again = [difference.test for difference in differences if not difference.reason]
    if not again or module in again or len(again) > 50:
        return list(differences)
    still = compare(run_module(outside, module, again), run_module(inside, module, again))
    unexplained = {difference.test: difference for difference in still}
    return [
        found
        for difference in differences
        if (found := difference if difference.reason else unexplained.get(difference.test))
    ]


# --- The account ------------------------------------------------------------------------------


def show_isolation() -> None:
    """Three facts, seen from both sides, and what they cost."""
    python, _ = interpreter()
    interfaces = "import socket; print(*(name for _, name in socket.if_nameindex()))"
    # A datagram socket's connect only looks for a route: nothing is sent.
    connect = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    print(f"{'':10}{'outside':44}inside")
    for name, argv in {
        "id": ["id"],
        "ls /": ["ls", "/"],
        "network": [python, "-c", interfaces],
    }.items():
        before, after = (" ".join(side(argv)[0].decode().split()) for side in (outside, inside))
        print(f"{name:10}{shorten(before, 42):44}{shorten(after, 60)}")
    print(f"{'connect':10}{'':44}{last_line(inside([python, '-c', connect])[1].decode())}")
    plain = median_ms(lambda: subprocess.run(["true"], capture_output=True))
    boxed = median_ms(lambda: sandboxcore.run(["true"]))
    print(f"{'true':10}{f'{plain:.2f} ms':44}{boxed:.2f} ms, all of that made, used and removed\n")


def shorten(text: str, width: int) -> str:
    """Text in at most `width` columns."""
    return text if len(text) <= width else text[: width - 3] + "..."


def median_ms(call: Callable[[], object], rounds: int = 30) -> float:
    """Median duration of a call in milliseconds, after one that does not count."""
    call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def show_table(reports: dict[str, tuple[Report, Report]], found: dict[str, int]) -> None:
    """One line per module; each pair is outside/inside."""
    print(f"{'outside/inside':28}{'ok':>11}{'skipped':>11}{'failed':>11}{'seconds':>11}  different")
    for module, pair in reports.items():
        columns = [
            "/".join(str(report.count(status)) for report in pair) for status in ("ok", "skipped", "failed")
        ]
        columns.append("/".join(f"{report.duration:.0f}" for report in pair))
        print(f"{module:28}" + "".join(f"{text:>11}" for text in columns) + f"  {found[module]:9}")


def show_differences(differences: Sequence[Difference]) -> None:
    """Explained differences by reason and test class, then each one that is not."""
    reasons = Counter(difference.reason for difference in differences if difference.reason)
    for reason, count in reasons.most_common():
        print(f"\n{count} differ: {reason}")
        same = [difference for difference in differences if difference.reason == reason]
        classes = Counter(difference.test.rpartition(".")[0] for difference in same)
        if count < 6:
            for difference in same:
                print(f"    {describe(difference)}")
        else:
            for name, number in sorted(classes.items()):
                print(f"    {name.removeprefix('test.')}: {number}")
            print(f"    such as {describe(same[0])}")
    print()
    for difference in differences:
        if not difference.reason:
            print(f"UNEXPLAINED {describe(difference)}")


def describe(difference: Difference) -> str:
    """The test, and its two outcomes."""
    before, after = difference.outside, difference.inside
    detail = after.detail or before.detail
    name = difference.test.removeprefix("test.")
    return f"{name}: {before.status} -> {after.status}" + (f" ({shorten(detail, 90)})" if detail else "")


def main(modules: Sequence[str]) -> int:
    """Run everything and print the account. 0 when every difference is explained."""
    python, _ = interpreter()
    print(f"uid {os.getuid()}, {python}\n")
    show_isolation()
    print(f"running {' '.join(modules)} on both sides; this takes a minute or two", flush=True)
    with ThreadPoolExecutor(max_workers=2 * len(modules)) as threads:
        started = {
            module: [threads.submit(run_module, side, module) for side in (outside, inside)]
            for module in modules
        }
        reports = {module: (a.result(), b.result()) for module, (a, b) in started.items()}
    differences = {module: second_look(module, compare(*pair)) for module, pair in reports.items()}
    show_table(reports, {module: len(found) for module, found in differences.items()})
    every = [difference for found in differences.values() for difference in found]
    show_differences(every)
    for module, (plain, _) in reports.items():
        fails = {test for test, outcome in plain.outcomes.items() if outcome.status == "failed"}
        for test in sorted(fails - {module} - {difference.test for difference in differences[module]}):
            print(f"fails on both sides: {test} ({shorten(plain.outcomes[test].detail, 60)})")
    not_run = [module for module, (plain, _) in reports.items() if module in plain.outcomes]
    for module in not_run:
        print(f"NOT RUN {module}: {reports[module][0].outcomes[module].detail}")
    unexplained = sum(not difference.reason for difference in every)
    total = sum(len(inner.outcomes) for _, inner in reports.values())
    print(f"\n{total} tests inside; {len(every)} differ from outside, {unexplained} without a reason")
    return 1 if unexplained or not_run or not total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or MODULES))
