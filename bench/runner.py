"""Takes the samples: rounds of one block of every subject, in turn.

Every round has another order: what a neighbour leaves behind (a network namespace is torn down by
the kernel when its process is long gone) would otherwise always hit the same subject.
Burst blocks are back to back; paced blocks sleep before every sample, which shows what a busy loop
hides (cold caches, idle states, and grace periods that the kernel makes a first caller wait for).
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench.machine import Disturbance, NoiseGuard
from bench.stats import median
from bench.subjects import Subject

SETTLE_S = 0.01
"""Pause after a block: what a sandbox leaves to be torn down should not weigh on the next one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many samples to take.

    mode: "burst" or "paced". rounds: at most; `budget_s` seconds end the run earlier, between two
    rounds. block_s: the longest that a burst block may take, so that slow subjects get fewer
    samples, down to one. warm_up_s: the same for the warm-up of each subject.
    """

    mode: str
    rounds: int
    budget_s: float
    block_s: float
    warm_up_s: float
    block: int = 10
    gap_s: float = 0.0


FULL = (
    Plan(mode="burst", rounds=100, budget_s=170, block_s=0.1, warm_up_s=0.25),
    Plan(mode="paced", rounds=100, budget_s=80, block_s=0.1, warm_up_s=0.25, gap_s=0.02),
)
QUICK = (
    Plan(mode="burst", rounds=20, budget_s=13, block_s=0.02, warm_up_s=0.05),
    Plan(mode="paced", rounds=10, budget_s=6, block_s=0.02, warm_up_s=0.05, gap_s=0.02),
)
WARM_UP_RUNS = 50


@dataclass(slots=True, kw_only=True)
class Series:
    """The samples of one subject in one mode, by round; and why blocks were lost."""

    subject: Subject
    mode: str
    blocks: dict[int, list[float]] = field(default_factory=dict)
    disturbances: list[Disturbance] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def take(subjects: Sequence[Subject], plan: Plan) -> tuple[list[Series], dict[str, str]]:
    """The series of every subject that ran, and why the others did not."""
    counts, missing = {}, {}
    for subject in subjects:
        try:
            counts[subject.name] = _warm_up(subject, plan)
        except Exception as error:  # whatever it is, the other subjects still count
            missing[subject.name] = _reason(error)
    series = [Series(subject=subject, mode=plan.mode) for subject in subjects if subject.name in counts]
    with uncollected():
        deadline = time.monotonic() + plan.budget_s
        for number in range(plan.rounds):
            if time.monotonic() > deadline:
                break
            for one in random.Random(number).sample(series, len(series)):
                _take_block(one, number, counts[one.subject.name], plan.gap_s)
    missing.update({one.subject.name: one.failures[-1] for one in series if not one.blocks})
    return [one for one in series if one.blocks], missing


def _take_block(series: Series, number: int, count: int, gap_s: float) -> None:
    guard = NoiseGuard()
    try:
        series.blocks[number] = series.subject.block(count, gap_s)
    except Exception as error:  # a failed start is not a fast start: the block is lost and counted
        series.failures.append(_reason(error))
    series.disturbances.append(guard.disturbance(count * gap_s))
    time.sleep(SETTLE_S)


def _warm_up(subject: Subject, plan: Plan) -> int:
    """Runs the subject a little, and says how many samples a block of it should have."""
    spent: list[float] = []  # by the clock on the wall: some subjects report less than they take
    start = time.monotonic()
    # three at least: the first run of a process may be unlike the others
    while len(spent) < 3 or (len(spent) < WARM_UP_RUNS and sum(spent) < plan.warm_up_s):
        subject.block(1, 0)
        spent.append(time.monotonic() - start - sum(spent))
    if plan.gap_s:
        return subject.paced
    return max(1, min(plan.block, round(plan.block_s / median(sorted(spent)))))


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection of ours in the middle of a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _reason(error: Exception) -> str:
    """One line: what a failed program wrote last, or the exception."""
    output = getattr(error, "stderr", None) or b""
    text = output.decode(errors="replace") if isinstance(output, bytes) else str(output)
    lines = text.strip().splitlines() or str(error).splitlines() or [type(error).__name__]
    return lines[-1]
