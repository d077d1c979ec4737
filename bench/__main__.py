"""`python -m bench`: measure everything in one interleaved run, print a table, write JSON."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path

from bench import machine, report
from bench.floors import Floors
from bench.living import living_subjects
from bench.peers import peer_subjects
from bench.pool import pool_subjects
from bench.runner import FULL, QUICK, Series, take
from bench.subjects import Refused, Subject, library_subjects, python_subjects


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # a peer's mapped root must reach its bundle
        series, missing = _measure(directory, options.only, quick=options.quick)
    if not series:
        print("nothing to measure", *report.missing_lines(missing, series), sep="\n", file=sys.stderr)
        return 1
    found = report.records(series)
    facts = machine.facts()
    if options.json:
        side = {"facts": facts, "noisy": report.noisy_share(series), "missing": missing}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        options.json.with_suffix(".machine.json").write_text(json.dumps(side, indent=1) + "\n")
    head = report.facts_lines(facts, report.noisy_share(series))
    absent = report.missing_lines(missing, series)
    if options.markdown:
        lines = [f"- {line}" for line in (*head, *absent)]
        print(*lines, "", report.table(found, markdown=True), "", report.work_table(series), sep="\n")
    else:
        print(*head, "", report.table(found), *absent, sep="\n")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records, and facts beside them")
    parser.add_argument("--quick", action="store_true", help="under 30 s; p99 means little")
    parser.add_argument(
        "--only", metavar="PATTERN", help="names to measure (shell pattern), with what they divide"
    )
    parser.add_argument("--markdown", action="store_true", help="print the tables of README.md")
    return parser.parse_args(argv)


def _measure(directory: Path, only: str | None, *, quick: bool) -> tuple[list[Series], dict[str, str]]:
    """Every series of both modes, and what could not be measured."""
    with ExitStack() as stack:
        subjects, missing = _subjects(directory, stack)
        names = _chosen(subjects, only)
        chosen = [subject for subject in subjects if subject.name in names]
        found: list[Series] = []
        for plan in QUICK if quick else FULL:
            taking_part = [subject for subject in chosen if subject.paced or not plan.gap_s]
            series, refused = take(taking_part, plan)
            found += series
            missing.update(refused)
    return found, missing


def _subjects(directory: Path, stack: ExitStack) -> tuple[list[Subject], dict[str, str]]:
    """All subjects that this machine can try, and why the others are missing."""
    peers, missing = peer_subjects(directory)
    names = [peer.name for peer in peers]
    subjects: list[Subject] = []
    try:
        subjects += stack.enter_context(Floors(directory)).subjects()
    except Refused as error:
        missing["floor.*"] = str(error)
    subjects += python_subjects()
    try:
        subjects += library_subjects(names)
        subjects += living_subjects(stack)
        subjects += pool_subjects(stack)
    except Refused as error:
        missing["cold.*, living.*, pool.*, cli.*"] = str(error)
    return subjects + peers, missing


def _chosen(subjects: Sequence[Subject], only: str | None) -> set[str]:
    """The names that match, and the names that they are divided by."""
    if only is None:
        return {subject.name for subject in subjects}
    names = set()
    for subject in subjects:
        if fnmatch(subject.name, only):
            names |= {subject.name, *subject.ratio_to[:1]}
        for to in subject.ratio_to[1:]:
            if fnmatch(report.ratio_name(subject.name, to), only):
                names |= {subject.name, to}
    return names


if __name__ == "__main__":
    sys.exit(main())
