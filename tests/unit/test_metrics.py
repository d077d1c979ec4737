"""Counters, gauges, histograms, and a strict reader of what Prometheus reads."""

import math
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxcore.errors import SpecError
from sandboxcore.metrics import MAX_SERIES, OTHER, Counter, Gauge, Histogram, Metric, prometheus

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
NUMBER = re.compile(r"[+-]?(Inf|\d+(\.\d+)?([eE][+-]?\d+)?)|NaN")
PAIR = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"')
Labels = tuple[tuple[str, str], ...]


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), text)


def labels_of(text: str) -> Labels:
    found, at = [], 0
    while at < len(text):
        match = PAIR.match(text, at)
        assert match, text
        found.append((match[1], unescaped(match[2])))
        at = match.end()
        assert at == len(text) or text[at] == ",", text
        at += 1
    assert len({name for name, _ in found}) == len(found), text
    return tuple(found)


def parse(text: str) -> dict[str, tuple[str, str, dict[tuple[str, Labels], float]]]:
    """Name to (type, help, samples), of text in which everything is as the format says, and nothing else."""
    assert text == "" or text.endswith("\n")
    families: dict[str, tuple[str, str, dict[tuple[str, Labels], float]]] = {}
    lines, name, kind = text.split("\n")[:-1], "", ""
    for line in lines:
        if match := re.fullmatch(rf"# HELP ({NAME}) ((?:[^\\]|\\[\\n])*)", line):
            name, kind = match[1], ""
            assert name not in families, name
            families[name] = ("", unescaped(match[2]), {})
        elif match := re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge|histogram)", line):
            assert match[1] == name, line
            assert kind == "", line
            kind = match[2]
            families[name] = (kind, families[name][1], {})
        else:
            match = re.fullmatch(rf"({NAME})(?:\{{(.*)\}})? (\S+)", line)
            assert match, line
            assert kind, line
            allowed = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
            assert match[1] in [name + suffix for suffix in allowed], line
            assert NUMBER.fullmatch(match[3]), line
            key = match[1], labels_of(match[2] or "")
            assert key not in families[name][2], line
            families[name][2][key] = float(match[3])
    for name, (kind, _, samples) in families.items():
        assert kind, name
        if kind == "histogram":
            check_histogram(name, samples)
    return families


def check_histogram(name: str, samples: dict[tuple[str, Labels], float]) -> None:
    series: dict[Labels, list[tuple[float, float]]] = {}
    for (sample, labels), value in samples.items():
        if sample == f"{name}_bucket":
            bounds = [bound for label, bound in labels if label == "le"]
            assert len(bounds) == 1, labels
            rest = tuple(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((float(bounds[0]), value))
    for labels, buckets in series.items():
        assert buckets == sorted(buckets)
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)
        assert buckets[-1][0] == math.inf
        assert buckets[-1][1] == samples[f"{name}_count", labels]
        assert (f"{name}_sum", labels) in samples


def test_a_counter_counts_by_labels() -> None:
    counter = Counter("commands_total", "Commands.", ["cause"])
    counter.inc(cause="exited")
    counter.inc(2.5, cause="exited")
    counter.inc(cause="timeout")
    assert (counter.value(cause="exited"), counter.value(cause="oom")) == (3.5, 0)
    samples = parse(prometheus(counter))["commands_total"][2]
    assert samples["commands_total", (("cause", "exited"),)] == 3.5


def test_a_counter_without_labels_is_there_from_the_beginning() -> None:
    assert parse(prometheus(Counter("a_total", "A")))["a_total"][2] == {("a_total", ()): 0}


@pytest.mark.parametrize("amount", [-1, math.inf, math.nan])
def test_a_counter_only_grows(amount: float) -> None:
    with pytest.raises(SpecError):
        Counter("a_total", "A").inc(amount)


def test_a_gauge_is_set_or_read() -> None:
    gauge = Gauge("live", "Sandboxes.")
    gauge.set(3)
    gauge.inc()
    gauge.dec(2)
    assert gauge.value() == 2
    asked = Gauge("sessions", "Sessions.", ["state"], read=lambda: {("active",): 2, ("suspended",): 1})
    assert asked.value(state="active") == 2
    found = parse(prometheus(gauge, asked))
    assert found["live"][2] == {("live", ()): 2}
    assert found["sessions"][2]["sessions", (("state", "suspended"),)] == 1


@pytest.mark.parametrize("name", ["", "1a", "a-b", "a b", "ä"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError):
        Counter(name, "A")
    with pytest.raises(SpecError):
        Counter("a", "A", [name])


def test_bad_labels_are_refused() -> None:
    for labels in (["__a"], ["a", "a"], ["a:b"]):
        with pytest.raises(SpecError):
            Counter("a", "A", labels)
    with pytest.raises(SpecError):
        Histogram("a", "A", ["le"])
    with pytest.raises(SpecError):
        Counter("a", "A", ["b"]).inc()
    with pytest.raises(SpecError):
        Counter("a", "A").inc(b="c")


@pytest.mark.parametrize("buckets", [[2, 1], [1, 1], [1, math.inf]])
def test_bad_buckets_are_refused(buckets: list[float]) -> None:
    with pytest.raises(SpecError):
        Histogram("a", "A", buckets=buckets)


def test_names_that_meet_are_refused() -> None:
    with pytest.raises(SpecError):
        prometheus(Counter("a", "A"), Gauge("a", "A"))
    with pytest.raises(SpecError):
        prometheus(Histogram("a", "A"), Counter("a_count", "A"))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=50), st.text(max_size=50))
def test_any_text_is_escaped(help: str, value: str) -> None:
    counter = Counter("a_total", help, ["b"])
    counter.inc(b=value)
    _, text, samples = parse(prometheus(counter))["a_total"]
    assert text == help
    assert samples == {("a_total", (("b", value),)): 1}


def test_series_are_bounded() -> None:
    counter = Counter("a_total", "A", ["who"])
    for number in range(MAX_SERIES + 50):
        counter.inc(who=str(number))
    assert counter.value(who=OTHER) == 50
    assert len(parse(prometheus(counter))["a_total"][2]) == MAX_SERIES + 1


def test_buckets_are_counted_exactly() -> None:
    histogram = Histogram("a_seconds", "A", ["phase"], buckets=[0.1, 0.2, 1])
    for value in (0.1, 0.15, 0.2, 0.5, 7, -1):
        histogram.observe(value, phase="total")
    samples = parse(prometheus(histogram))["a_seconds"][2]
    found = [
        samples["a_seconds_bucket", (("phase", "total"), ("le", le))] for le in ("0.1", "0.2", "1", "+Inf")
    ]
    assert found == [2, 4, 5, 6]
    assert samples["a_seconds_sum", (("phase", "total"),)] == pytest.approx(6.95)


def test_nothing_has_no_percentiles() -> None:
    histogram = Histogram("a", "A")
    assert histogram.percentile(50) is None
    assert histogram.summary() == {
        "count": 0, "sum": 0.0, "min": None, "max": None, "p50": None, "p95": None, "p99": None,
    }  # fmt: skip
    for percent in (-1, 101, math.nan):
        with pytest.raises(SpecError):
            histogram.percentile(percent)
    for value in (math.inf, math.nan):
        with pytest.raises(SpecError):
            histogram.observe(value)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-6, 1e5), min_size=1), st.integers(0, 100))
def test_percentiles_are_as_near_as_is_said(values: list[float], percent: int) -> None:
    histogram = Histogram("a", "A")
    for value in values:
        histogram.observe(value)
    true = sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]
    found = histogram.percentile(percent)
    assert found is not None
    assert abs(found - true) <= true * (Histogram.ERROR + 1e-9)
    assert Histogram.ERROR < 0.022
    assert min(values) <= found <= max(values)
    assert histogram.count() == len(values)


def test_threads_lose_nothing() -> None:
    counter, gauge, histogram = Counter("a_total", "A", ["b"]), Gauge("b", "B"), Histogram("c", "C")

    def work() -> None:
        for number in range(2000):
            counter.inc(b=str(number % 3))
            gauge.inc()
            histogram.observe(0.001)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(counter.value(b=str(number)) for number in range(3)) == 8000
    assert (gauge.value(), histogram.count()) == (8000, 8000)
    every: list[Metric] = [counter, gauge, histogram]
    assert parse(prometheus(*every))["c"][2]["c_count", ()] == 8000
