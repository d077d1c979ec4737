"""When a pool starts the next one: by a clock of the test's own, without a thread."""

import pytest

from sandboxcore import PoolConfig, TooManySandboxes
from sandboxcore.pool_shelf import Member
from sandboxcore.pool_stock import PATIENCE, QUIET, TICK, Stock
from sandboxcore.sandbox import Sandbox


def stock(count: int, **config: float) -> Stock:
    """With so many of four, and nobody to fill it. Nothing runs."""
    made = Stock(None, PoolConfig(**{"min_warm": 4, "max_warm": 8} | config))  # type: ignore[arg-type]
    made._members.extend(Member(Sandbox(), 100.0) for _ in range(count))
    made._wanting_since = 100.0
    return made


def test_full_it_waits_for_the_first_to_be_too_old() -> None:
    assert stock(4)._wait(101.0) == pytest.approx(599.0)
    assert stock(0, min_warm=0)._wait(101.0) is None


def test_empty_it_starts_at_once() -> None:
    made = stock(0)
    made._claimed_at = 100.0
    assert made._wait(100.0) == 0


def test_after_a_claim_it_is_quiet_for_a_while() -> None:
    made = stock(3)
    made._claimed_at = 100.0
    assert made._wait(100.0) == pytest.approx(QUIET)
    assert made._wait(100.0 + QUIET) == pytest.approx(0, abs=1e-6)


def test_claim_after_claim_it_waits_the_shorter_the_fewer_are_left() -> None:
    waits = []
    for count in (3, 2, 1):
        made = stock(count)
        made._claimed_at = now = 100.0
        while made._wait(now) > 1e-9:  # type: ignore[operator]
            now += 0.0001
            made._claimed_at = now
        waits.append(now - 100.0)
    assert waits == pytest.approx([PATIENCE * count / 4 for count in (3, 2, 1)], abs=0.001)


def test_who_waits_is_not_kept_waiting() -> None:
    made = stock(3)
    made._claimed_at = 100.0
    made.haste(1)
    assert made._wait(100.0) == 0


def test_the_rate_holds_for_everybody() -> None:
    made = stock(0, refill_rate=2.0)
    made._started_at = 100.0
    made.haste(1)
    assert made._wait(100.1) == pytest.approx(0.4)


def test_after_failures_it_waits_longer_and_longer() -> None:
    made = stock(0)
    pauses = []
    for _ in range(12):
        made._fail(OSError(24, "no"))
        pauses.append(made._pause)
    assert pauses[:3] == pytest.approx([0.05, 0.1, 0.2])
    assert pauses[-1] == 5.0
    made._fail(None)
    assert made._pause == 0.05, "too many are no failure"


def test_the_first_failure_of_a_row_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stock(0)
    caplog.set_level("DEBUG", "sandboxcore")
    for error in (None, OSError("one"), OSError("two"), TooManySandboxes(2), OSError("three")):
        made._fail(error)
    monkeypatch.setattr(made, "_begun", lambda sandbox: Member(sandbox, 100.0))
    made._refill()
    made._fail(OSError("four"))
    told = [(record.levelname, record.getMessage().split()[-1]) for record in caplog.records]
    assert told == [("WARNING", "one"), ("DEBUG", "two"), ("DEBUG", "three"), ("WARNING", "four")]
    assert made._count["refill_failures"] == 4


def test_claims_wake_nobody_who_looks_by_himself() -> None:
    made = stock(4)
    made._claimed_at = 100.0
    assert made._park(100.5, 500.0) == TICK
    assert not made._parked
    assert made._park(110.0, 500.0) == 500.0
    assert made._parked
    with made._changed:
        made._nudge()
    assert made._wake.is_set()
