"""`python -m bench.many`: how long things take while 10, 100, 1000 other sandboxes live.

The number goes up and down again, and each level is measured both times, so drift hits all of them alike.
`subprocess.run` is there to tell what the machine itself does. The others are another process's, in the state
directory in which the sweep and `acquire` look, too. With --own they are this process's, which holds four
descriptors for each: then a vfork takes longer, too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from bench.runner import uncollected
from sandboxcore import Sandbox, SandboxManager, run
from sandboxcore.pool import SandboxPool

LEVELS = (10, 100, 1000)
GOAL = 1.3  # times the value at the first level
SETTLE = 0.5  # seconds after the number has changed
PAUSE = 0.002  # seconds between two samples: the end of one is not part of the next

Samples = dict[tuple[str, int], list[float]]
Action = Callable[[], tuple[float, Mapping[str, float]]]
"""Does it once; the milliseconds it took, and those of its phases, by name."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.many", description=__doc__)
    parser.add_argument("--levels", type=int, nargs="+", default=list(LEVELS))
    parser.add_argument(
        "--samples", type=int, default=100, help="of each at each level and turn; default 100"
    )
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    parser.add_argument("--own", action="store_true", help="the others are this process's")
    parser.add_argument("--populate", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.populate:
        return populate(options.populate)
    levels = sorted(options.levels)
    samples: Samples = {}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-many-"))
        manager = stack.enter_context(SandboxManager(directory, max_sandboxes=None, sweep_interval=None))
        stack.callback(manager.destroy_all)
        actions = subjects(manager, stack)
        others = Others(manager) if options.own else stack.enter_context(Elsewhere(directory))
        with uncollected():
            for level in [*levels, *reversed(levels)]:
                others.become(level)
                time.sleep(SETTLE)
                measure(actions, level, options.samples, samples)
    report(samples, levels)
    if options.json:
        found = [{"what": what, "living": level, "ms": ms} for (what, level), ms in samples.items()]
        options.json.write_text(json.dumps(found) + "\n")
    return 0


class Others:
    """Those that live meanwhile."""

    def __init__(self, manager: SandboxManager) -> None:
        self.manager, self.ids = manager, list[str]()

    def become(self, level: int) -> None:
        """Have so many."""
        while len(self.ids) < level:
            self.ids.append(self.manager.create().id)
        while len(self.ids) > level:
            self.manager.destroy(self.ids.pop(random.randrange(len(self.ids))))


class Elsewhere:
    """The same of another process."""

    def __init__(self, directory: str) -> None:
        command = [sys.executable, "-m", "bench.many", "--populate", directory]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def become(self, level: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(level, file=self.process.stdin, flush=True)
        if self.process.stdout.readline() != f"{level}\n":
            sys.exit("the process that has the others has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.communicate(timeout=60)


def populate(directory: str) -> int:
    """What that process does."""
    with SandboxManager(directory, max_sandboxes=None, sweep_interval=None) as manager:
        others = Others(manager)
        for line in sys.stdin:
            others.become(int(line))
            print(int(line), flush=True)
    return 0


def measure(actions: Mapping[str, Action], level: int, count: int, samples: Samples) -> None:
    """Each of them so often, in turn and in another order each time."""
    names = list(actions)
    for _ in range(3):
        for name in names:
            actions[name]()
    for number in range(count):
        for name in random.sample(names, len(names)):
            if name == "reconcile" and number >= 10:  # as long as all others together
                continue
            time.sleep(PAUSE)
            taken, phases = actions[name]()
            samples.setdefault((name, level), []).append(taken)
            for phase, milliseconds in phases.items():
                samples.setdefault((f"{name}: {phase}", level), []).append(milliseconds)


def subjects(manager: SandboxManager, stack: ExitStack) -> dict[str, Action]:
    """What is measured. Each is as it would be with nothing else living, but for the manager's records."""
    living = stack.enter_context(Sandbox())
    pool = stack.enter_context(SandboxPool())
    clock = time.perf_counter

    def since(began: float) -> float:
        return (clock() - began) * 1e3

    def plain() -> tuple[float, Mapping[str, float]]:
        began = clock()
        subprocess.run(["true"], capture_output=True, check=True)
        return since(began), {}

    def executed() -> tuple[float, Mapping[str, float]]:
        began = clock()
        living.exec(["true"], check=True)
        return since(began), {}

    def cold() -> tuple[float, Mapping[str, float]]:
        began = clock()
        done = run(["true"], check=True)
        return since(began), in_milliseconds(done.timings)

    def claimed() -> tuple[float, Mapping[str, float]]:
        if not pool.replenish(10):
            raise TimeoutError("the pool does not fill")
        began = clock()
        sandbox = pool.claim()
        sandbox.exec(["true"], check=True)
        taken = since(began)
        pool.release(sandbox)
        return taken, {}

    def acquired() -> tuple[float, Mapping[str, float]]:
        began = clock()
        session = manager.acquire(client_id="bench")
        got = since(began)
        phases = in_milliseconds(session.sandbox.timings)
        again = clock()
        session.release()
        released = since(again)
        return got + released, {**phases, "acquire": got, "release": released}

    def swept() -> tuple[float, Mapping[str, float]]:
        began = clock()
        manager.reconcile(dry_run=True)
        return since(began), {}

    return {
        "subprocess.run": plain,
        "exec": executed,
        "cold run": cold,
        "claim + exec": claimed,
        "acquire + release": acquired,
        "reconcile": swept,
    }


def in_milliseconds(timings: Mapping[str, float]) -> dict[str, float]:
    return {name: seconds * 1e3 for name, seconds in timings.items()}


def report(samples: Samples, levels: Sequence[int]) -> None:
    """Medians with quartiles, and how many times the value at the first level."""
    print("median (quartiles) in ms while so many others live; and by the first column; n of each")
    print("| | " + " | ".join(map(str, levels)) + " | n |\n| --- |" + " ---: |" * (len(levels) + 1))
    for what in dict.fromkeys(name for name, _ in samples):
        first = statistics.median(samples[what, levels[0]])
        cells = []
        for level in levels:
            low, middle, high = statistics.quantiles(samples[what, level], n=4)
            ratio = middle / first if first else 1.0
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f}) {ratio:.2f}")
        print(f"| {what} | " + " | ".join(cells) + f" | {len(samples[what, levels[0]])} |")


if __name__ == "__main__":
    sys.exit(main())
