"""How many to keep warm: pure, with a clock of the test's own."""

import itertools
from typing import Any

import pytest

from sandboxcore import Limits, PoolConfig, PoolStats, SandboxSpec, SpecError
from sandboxcore.pool_binding import wanted
from sandboxcore.pool_policy import HALF_LIFE, WINDOW, Demand, percentiles

WIDE = PoolConfig(min_warm=2, max_warm=10)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_warm": -1},
        {"min_warm": 1.5},
        {"min_warm": True},
        {"max_warm": 0, "min_warm": 0},
        {"min_warm": 3, "max_warm": 2},
        {"warm_ttl": 0},
        {"warm_ttl": float("nan")},
        {"refill_rate": 0},
        {"reset": "yes"},
        {"adaptive": 1},
        {"binds": "yes"},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="pool."):
        PoolConfig(**wrong)


def test_none_need_be_warm() -> None:
    assert PoolConfig(min_warm=0, max_warm=1).min_warm == 0


def test_without_demand_the_least_is_kept() -> None:
    assert Demand().target(1000.0, WIDE, 0.01) == 2


def test_a_miss_adds_one_and_is_forgotten() -> None:
    demand = Demand()
    for _ in range(3):
        demand.claimed(100.0, missed=True, most=WIDE.max_warm)
    assert demand.target(100.0, WIDE, 0.0) == 5
    assert demand.target(100.0 + 2 * HALF_LIFE, WIDE, 0.0) == 3
    assert demand.target(100.0 + 10 * HALF_LIFE, WIDE, 0.0) == 2


def test_hits_add_nothing_by_themselves() -> None:
    demand = Demand()
    for _ in range(5):
        demand.claimed(100.0, missed=False, most=WIDE.max_warm)
    assert demand.target(100.0, WIDE, 0.002) == 2


def test_a_stream_is_met_by_what_comes_during_a_start() -> None:
    """100 claims a second and 50 ms for a start: five more than the least."""
    demand = Demand()
    for number in range(3000):
        demand.claimed(number / 100, missed=False, most=WIDE.max_warm)
    assert demand.rate(30.0) == pytest.approx(95, rel=0.1)
    assert demand.target(30.0, WIDE, 0.05) == 7
    assert demand.target(30.0 + 5 * WINDOW, WIDE, 0.05) == 2


def test_never_more_than_the_most_and_never_less_than_the_least() -> None:
    demand = Demand()
    for now, missed in itertools.product(range(100), (True, False)):
        demand.claimed(now, missed=missed, most=WIDE.max_warm)
        assert 2 <= demand.target(now, WIDE, 10.0) <= 10
    # what was too much does not have to be forgotten first
    assert demand.target(99.0 + 4 * HALF_LIFE, WIDE, 0.0) == 3


def test_not_adaptive() -> None:
    demand, config = Demand(), PoolConfig(adaptive=False)
    demand.claimed(1.0, missed=True, most=config.max_warm)
    assert demand.target(1.0, config, 1.0) == config.min_warm


def test_a_clock_that_stands_still_or_goes_back_does_no_harm() -> None:
    demand = Demand()
    demand.claimed(10.0, missed=True, most=5)
    assert demand.extra(9.0) == 1
    assert demand.rate(9.0) == 1 / WINDOW


def test_percentiles() -> None:
    assert percentiles([]) == {}
    assert percentiles(range(101)) == {"p50": 50, "p95": 95, "p99": 99}
    assert percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}


def test_statistics_as_plain_data() -> None:
    stats = PoolStats(hits=3, misses=1, misses_by_reason={"empty": 1})
    assert stats.hit_rate == 0.75
    assert PoolStats().hit_rate is None
    data = stats.to_dict()
    assert data["hit_rate"] == 0.75
    assert data["misses_by_reason"] == {"empty": 1}


# --- what a claim asks for ------------------------------------------------------------------------------

SPEC = SandboxSpec(limits=Limits(pids=100), env={"A": "1"}, ro=["/etc:/data"])


def test_what_changes_is_all_that_is_asked_for() -> None:
    assert wanted(spec=SPEC, limits=Limits(pids=100)).limits == {}
    assert wanted(spec=SPEC, limits={"open_files": 9}).limits == {"open_files": 9}
    assert wanted(spec=SPEC, limits=Limits(pids=7, file_size="1K")).limits == {"pids": 7, "file_size": 1024}


def test_the_spec_of_one_that_has_it_from_the_start() -> None:
    asked = wanted(spec=SPEC, env={"B": "2"}, ro=["/usr:/more"], network="private", limits={"pids": 5})
    spec = asked.spec(SPEC)
    assert dict(spec.env) == {"A": "1", "B": "2"}
    assert spec.ro == ("/etc:/data", "/usr:/more")
    assert (spec.network, spec.limits.pids) == ("private", 5)
    assert wanted(spec=SPEC, labels={"a": "b"}).spec(SPEC) is SPEC


@pytest.mark.parametrize(
    "wrong",
    [
        {"env": {"A=": "x"}},
        {"env": {"A": 1}},
        {"labels": {"a": 1}},
        {"limits": {"no_such": 1}},
        {"limits": {"pids": -1}},
        {"limits": 5},
        {"network": "some"},
        {"ro": "/etc"},
        {"ro": [("/etc", "relative")]},
        {"rw": ["/etc:/data"]},
    ],
)
def test_what_no_sandbox_can_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        wanted(spec=SPEC, **wrong)
