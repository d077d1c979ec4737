"""Runs one module of CPython's `test` package and writes each test's outcome to report.json.

Usage: python -c "$(cat run_module.py)" MODULE LEFT_OUT,... [TEST ...]

`python -m test` would do, but what it says about single tests changes with the version, and it
stumbles over its own report when many tests fail.
"""

import faulthandler
import fnmatch
import importlib
import json
import sys
import unittest
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from test import support

TIME_LIMIT = 280.0  # seconds for one module; then every thread's stack is printed

RANKS = ("ok", "skipped", "failed")

ExcInfo = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]


class Result(unittest.TextTestResult):
    """Keeps the worst outcome of every test id: subtests and doctests share one."""

    outcomes: dict[str, tuple[str, str]] = {}

    def note(self, test: unittest.TestCase, status: str, detail: object = "") -> None:
        """Record an outcome; of an exception, its type and message."""
        if isinstance(detail, BaseException):
            detail = f"{type(detail).__name__}: {detail}"
        old = self.outcomes.get(test.id())
        if old is None or RANKS.index(status) > RANKS.index(old[0]):
            self.outcomes[test.id()] = (status, str(detail))

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "ok")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: ExcInfo) -> None:
        self.note(test, "ok")

    def addFailure(self, test: unittest.TestCase, err: ExcInfo) -> None:
        super().addFailure(test, err)
        self.note(test, "failed", err[1])

    def addError(self, test: unittest.TestCase, err: ExcInfo) -> None:
        super().addError(test, err)
        self.note(test, "failed", err[1])

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "failed", "unexpected success")

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.note(test, "failed", err[1])


def each(suite: Iterable[Any]) -> Iterator[unittest.TestCase]:
    """Every single test of a nested suite."""
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from each(item)
        else:
            yield item


def main(module: str, left_out: str, *only: str) -> None:
    """Run the module, or `only` the tests with these ids."""
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    report = Path("report.json").absolute()
    support.use_resources = []  # nothing that needs the internet, a screen or much memory
    importlib.import_module(f"test.{module}")  # the loader would make a failure a test
    suite = unittest.TestSuite(
        test
        for test in each(unittest.defaultTestLoader.loadTestsFromName(f"test.{module}"))
        if (not only or test.id() in only)
        and not any(fnmatch.fnmatchcase(test.id(), pattern) for pattern in left_out.split(","))
    )
    # (TextTestResult is generic for type checkers only.)
    unittest.TextTestRunner(resultclass=Result, verbosity=0).run(suite)  # type: ignore[arg-type]
    report.write_text(json.dumps(Result.outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
