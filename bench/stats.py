"""Percentiles, and ratios of medians with an interval.

A sample is a latency in microseconds. Samples come in blocks, a few back to back, and one block of
every subject makes a round. Samples of one block share its luck, so the bootstrap draws whole
rounds, and it draws the same rounds for both sides of a ratio: drift that hits both cancels.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import chain

RESAMPLES = 300
CONFIDENCE = 0.95

Blocks = Mapping[int, Sequence[float]]
"""Samples of one subject by the number of the round in which they were taken."""


def pooled(blocks: Blocks) -> list[float]:
    """All samples, smallest first."""
    return sorted(chain.from_iterable(blocks.values()))


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the samples lie, interpolated between neighbours."""
    position = (len(ordered) - 1) * fraction
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def median(ordered: Sequence[float]) -> float:
    return percentile(ordered, 0.5)


def ratio_of_medians(subject: Blocks, reference: Blocks) -> tuple[float, float, float] | None:
    """(ratio, low, high) of the medians over the rounds that both took part in, or None.

    low and high bound the middle 95 % of the bootstrap; they equal the ratio when there is only
    one round to draw from.
    """
    rounds = sorted(subject.keys() & reference.keys())
    if not rounds:
        return None

    def ratio(drawn: Sequence[int]) -> float:
        above = median(sorted(chain.from_iterable(subject[r] for r in drawn)))
        return above / median(sorted(chain.from_iterable(reference[r] for r in drawn)))

    draw = random.Random(len(rounds))  # repeatable, not secret
    resampled = sorted(ratio(draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return ratio(rounds), percentile(resampled, tail), percentile(resampled, 1 - tail)
