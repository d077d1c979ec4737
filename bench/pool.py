"""Warm pools: what a claim costs, with and without what comes with it, and what the pool does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from bench.subjects import Refused, Subject

Block = Callable[[int, float], list[float]]

WARM = 24
PATIENCE = 30.0  # seconds for the pool to be full


def pool_subjects(stack: ExitStack) -> list[Subject]:
    """What needs a pool; `stack` closes them."""
    try:
        import sandboxcore
    except ImportError as error:
        raise Refused(f"cannot import sandboxcore: {error}") from error

    def opened(**config: Any) -> Any:
        made = sandboxcore.SandboxPool(None, sandboxcore.PoolConfig(**config))
        stack.enter_context(made)
        if not made.wait_ready(PATIENCE):
            raise Refused("a pool does not fill")
        return made

    pool = opened(min_warm=WARM, max_warm=WARM, binds="ro")
    empty = opened(min_warm=0, max_warm=1, adaptive=False)
    resets = opened(min_warm=1, max_warm=1, reset=True, adaptive=False)
    resets.resize(min_warm=0)  # so that nothing else fills it
    return [
        Subject(
            name="pool.run",
            block=_runs(pool),
            does="claim, `true` in it, output captured, give back; the refill goes on",
            ratio_to=("subprocess.run", "living.exec", "cold.run"),
            paced=10,
        ),
        *_claim_subjects(pool, empty),
        Subject(
            name="pool.refill",
            block=_refills(pool),
            does="one start ahead of time, at full speed",
            ratio_to=("living.create",),
        ),
        Subject(
            name="pool.reset",
            block=_resets(resets),
            does="from giving back until it is ready for somebody else, read back",
            ratio_to=("living.create",),
        ),
    ]


def _claim_subjects(pool: Any, empty: Any) -> list[Subject]:
    bound: dict[str, Any] = {
        "env": {"NAME": "value"},
        "files": {"input": "some text"},
        "limits": {"open_files": 256},
        "labels": {"job": "1"},
    }
    return [
        Subject(
            name="pool.claim",
            block=_claims(pool, {}),
            does="claim only: a sandbox that was started before, no command; the refill goes on",
            ratio_to=("subprocess.run", "living.create"),
            paced=10,
        ),
        Subject(
            name="pool.bound",
            block=_claims(pool, bound),
            does="claim with a variable, a file, a limit and a label, bound late",
            ratio_to=("subprocess.run", "living.create"),
            paced=10,
        ),
        Subject(
            name="pool.bound.mount",
            block=_claims(pool, {"ro": [("/usr/share", "/workspace/data")]}),
            does="claim with a read-only mount, bound late",
            ratio_to=("subprocess.run", "living.create"),
        ),
        Subject(
            name="pool.miss",
            block=_claims(empty, {}),
            does="claim of an empty pool: a sandbox that is started now",
            ratio_to=("living.create", "subprocess.run"),
            paced=10,
        ),
    ]


def _claims(pool: Any, asked: dict[str, Any]) -> Block:
    """Times the claim only; it is given back outside of that."""

    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            _stocked(pool)
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            sandbox = pool.claim(**asked)
            samples.append((time.perf_counter_ns() - start) / 1000)
            pool.release(sandbox)
        return _checked(pool, samples)

    return block


def _runs(pool: Any) -> Block:
    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            _stocked(pool)
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            pool.run(["true"], check=True)
            samples.append((time.perf_counter_ns() - start) / 1000)
        return _checked(pool, samples)

    return block


def _stocked(pool: Any) -> None:
    """A miss has a row of its own: the others are of what is warm."""
    if pool.config.min_warm and not pool.available:
        _full(pool)


def _checked(pool: Any, samples: list[float]) -> list[float]:
    """Only hits, or only misses; and what is to be made up for does not weigh on the next subject."""
    stats = pool.stats()
    if pool.config.min_warm and stats.misses:
        raise RuntimeError(f"not all were warm: {dict(stats.misses_by_reason)}")
    _full(pool)
    return samples


def _full(pool: Any) -> None:
    if not pool.replenish(PATIENCE):
        raise RuntimeError("the pool does not fill")


def _refills(pool: Any) -> Block:
    def block(count: int, gap_s: float) -> list[float]:
        _full(pool)
        for sandbox in [pool.claim() for _ in range(min(count, WARM))]:
            pool.release(sandbox)
        start = time.perf_counter_ns()
        _full(pool)
        each = (time.perf_counter_ns() - start) / 1000 / min(count, WARM)
        return [each] * count

    return block


def _resets(pool: Any) -> Block:
    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            sandbox = pool.claim()
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            pool.release(sandbox)
            if not pool._stock.await_full(PATIENCE, least=1):
                raise RuntimeError("it is not reset")
            samples.append((time.perf_counter_ns() - start) / 1000)
        return samples

    return block
