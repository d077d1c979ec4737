"""The main comparisons under pytest-benchmark: `pytest bench --benchmark-only`.

Not part of the test suite. pytest-benchmark takes one subject after the other, so compare its
numbers with care; ratios to rely on come from `python -m bench`, which interleaves. What it lacks,
percentiles, is in extra_info (microseconds).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import sandboxcore
from bench.stats import percentile
from bench.subjects import MEBIBYTE, below_usr

Run = Callable[[Sequence[str]], object]


def by_subprocess(argv: Sequence[str]) -> object:
    return subprocess.run(argv, capture_output=True, check=True)


def by_sandboxcore(argv: Sequence[str]) -> object:
    return sandboxcore.run(argv, check=True)


RUNS = pytest.mark.parametrize(
    "run",
    [
        pytest.param(by_subprocess, id="subprocess.run"),
        pytest.param(by_sandboxcore, id="sandboxcore.run"),
    ],
)


def measure(benchmark: BenchmarkFixture, call: Callable[[], object], *, rounds: int) -> None:
    """Times `call` and adds percentiles to the saved data."""
    warm_up = max(1, rounds // 10)
    # pytest-benchmark types its fixture, but not this method
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=warm_up)  # type: ignore[no-untyped-call]
    if benchmark.stats is None:  # --benchmark-disable
        return
    ordered = [seconds * 1e6 for seconds in benchmark.stats.stats.sorted_data]
    benchmark.extra_info["n"] = len(ordered)
    for name, fraction in (("p50_us", 0.5), ("p90_us", 0.9), ("p99_us", 0.99), ("min_us", 0.0)):
        benchmark.extra_info[name] = round(percentile(ordered, fraction), 2)


@RUNS
@pytest.mark.benchmark(group="true")
def test_true(benchmark: BenchmarkFixture, run: Run) -> None:
    measure(benchmark, lambda: run(["true"]), rounds=1000)


@pytest.mark.benchmark(group="true")
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bwrap is not on PATH")
def test_true_in_bwrap(benchmark: BenchmarkFixture) -> None:
    argv = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    measure(benchmark, lambda: by_subprocess([*argv, "true"]), rounds=300)


@RUNS
@pytest.mark.benchmark(group="python3 -I -c pass")
def test_python(benchmark: BenchmarkFixture, run: Run) -> None:
    argv = [below_usr("python3"), "-I", "-c", "pass"]
    measure(benchmark, lambda: run(argv), rounds=200)


@RUNS
@pytest.mark.benchmark(group="1 MiB of output")
def test_output(benchmark: BenchmarkFixture, run: Run) -> None:
    argv = ["head", "-c", str(MEBIBYTE), "/dev/zero"]
    measure(benchmark, lambda: run(argv), rounds=300)


@pytest.mark.parametrize("module", ["subprocess", "sandboxcore"])
@pytest.mark.benchmark(group="interpreter start and import")
def test_import(benchmark: BenchmarkFixture, module: str) -> None:
    argv = [sys.executable, "-I", "-c", f"import {module}"]
    measure(benchmark, lambda: by_subprocess(argv), rounds=50)


@pytest.mark.benchmark(group="command line")
def test_command_line(benchmark: BenchmarkFixture) -> None:
    argv = [sys.executable, "-m", "sandboxcore", "run", "--", "true"]
    measure(benchmark, lambda: by_subprocess(argv), rounds=50)
