"""Turns series into records, and records into tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NotRequired, TypedDict

from bench.machine import Facts, noisy_blocks
from bench.runner import Series
from bench.stats import percentile, pooled, ratio_of_medians


class Record(TypedDict):
    """One line of the result. Latencies are microseconds; ratio is a ratio of medians, and
    ratio_lo and ratio_hi bound it (95 %, bootstrap over rounds). noisy is the share of blocks
    that ran while something else used the machine; failures counts the blocks that were lost."""

    name: str
    mode: str
    n: int
    p50_us: float
    p90_us: float
    p99_us: float
    min_us: float
    noisy: float
    failures: int
    ratio: NotRequired[float]
    ratio_to: NotRequired[str]
    ratio_lo: NotRequired[float]
    ratio_hi: NotRequired[float]


def records(series: Sequence[Series]) -> list[Record]:
    """A record for each series, and one for each further ratio, named "subject/reference".

    Names of paced series end in "@paced".
    """
    by_name = {_name(one): one for one in series}
    found: list[Record] = []
    for one in series:
        ratios = [_ratio(one, by_name.get(_suffixed(to, one.mode))) for to in one.subject.ratio_to]
        own = ratios[0] if ratios else None
        latencies = _latencies(one)
        found.append({**latencies, **own} if own else latencies)
        for ratio in ratios[1:]:
            if ratio:
                to = ratio["ratio_to"].removesuffix("@paced")
                name = _suffixed(ratio_name(one.subject.name, to), one.mode)
                found.append({**latencies, **ratio, "name": name})
    return found


def ratio_name(subject: str, reference: str) -> str:
    """The name of a record that divides a subject by other than its first reference."""
    return f"{subject}/{reference.removeprefix('peer.')}"


def noisy_share(series: Iterable[Series]) -> float:
    """The share of noisy blocks over everything."""
    counted = [(noisy_blocks(one.disturbances), len(one.disturbances)) for one in series]
    return sum(noisy for noisy, _ in counted) / max(1, sum(blocks for _, blocks in counted))


def table(found: Sequence[Record], *, markdown: bool = False) -> str:
    """The records as aligned text, or as a Markdown table."""
    head = ("name", "n", "p50 us", "p90 us", "p99 us", "min us", "ratio (95 %)", "to", "noisy")
    rows = [head, *(_row(record) for record in found)]
    if markdown:
        rule = ("---", *("---:",) * 6, "---", "---:")
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    left = (0, 7)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def work_table(series: Iterable[Series]) -> str:
    """What each subject does, as a Markdown table."""
    does = {one.subject.name: one.subject.does for one in series}
    lines = [f"| {name} | {text} |" for name, text in does.items()]
    return "\n".join(["| name | what one run does |", "| --- | --- |", *lines])


def facts_lines(facts: Facts, noisy: float) -> list[str]:
    """The machine in a few lines of "name: value"."""

    def shown(value: str | int | dict[str, str]) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} ({text})" for name, text in value.items()) or "none needed"
        return str(value)

    lines = [f"{name}: {shown(value)}" for name, value in facts.items()]
    return [*lines, f"noisy blocks: {noisy:.0%}"]


def missing_lines(missing: Mapping[str, str], series: Iterable[Series]) -> list[str]:
    """What was not measured, wholly or in part, and why."""
    lost = [
        f"{_name(one)} lost {len(one.failures)} blocks: {one.failures[-1]}" for one in series if one.failures
    ]
    return [*(f"missing {name}: {reason}" for name, reason in missing.items()), *lost]


class _Ratio(TypedDict):
    ratio: float
    ratio_to: str
    ratio_lo: float
    ratio_hi: float


def _suffixed(name: str, mode: str) -> str:
    return f"{name}@paced" if mode == "paced" else name


def _name(series: Series) -> str:
    return _suffixed(series.subject.name, series.mode)


def _ratio(series: Series, reference: Series | None) -> _Ratio | None:
    found = ratio_of_medians(series.blocks, reference.blocks) if reference else None
    if found is None or reference is None:
        return None
    ratio, low, high = (round(value, 3) for value in found)
    return {"ratio": ratio, "ratio_to": _name(reference), "ratio_lo": low, "ratio_hi": high}


def _latencies(series: Series) -> Record:
    ordered = pooled(series.blocks)
    return {
        "name": _name(series),
        "mode": series.mode,
        "n": len(ordered),
        "p50_us": round(percentile(ordered, 0.5), 2),
        "p90_us": round(percentile(ordered, 0.9), 2),
        "p99_us": round(percentile(ordered, 0.99), 2),
        "min_us": round(ordered[0], 2),
        "noisy": round(noisy_share([series]), 3),
        "failures": len(series.failures),
    }


def _row(record: Record) -> tuple[str, ...]:
    def shown(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.1f}"

    ratio = ""
    if "ratio" in record:
        ratio = f"{record['ratio']:.2f} ({record['ratio_lo']:.2f}-{record['ratio_hi']:.2f})"
    return (
        record["name"],
        str(record["n"]),
        *(shown(record[key]) for key in ("p50_us", "p90_us", "p99_us", "min_us")),
        ratio,
        record.get("ratio_to", ""),
        f"{record['noisy']:.0%}",
    )
