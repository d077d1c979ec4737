"""Living sandboxes: what a command in one costs, and its birth, end and terminal."""

from __future__ import annotations

import os
import pty
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from bench.subjects import MEBIBYTE, Refused, Subject, below_usr, timed

Block = Callable[[int, float], list[float]]


def living_subjects(stack: ExitStack) -> list[Subject]:
    """What needs a sandbox that stays; `stack` closes it."""
    try:
        import sandboxcore
    except ImportError as error:
        raise Refused(f"cannot import sandboxcore: {error}") from error

    sandbox = stack.enter_context(sandboxcore.Sandbox())
    limited = _limited(sandboxcore, stack)

    def run(argv: Sequence[str]) -> Block:
        return timed(lambda: sandbox.exec(argv, check=True))

    def popen() -> None:
        with sandbox.popen(["true"], stderr=sandboxcore.DEVNULL) as process:
            process.communicate()

    script = "stty -icanon; echo ready; exec cat >/dev/null"
    terminal = stack.enter_context(sandbox.popen(["/bin/sh", "-c", script], pty=True))
    stack.callback(terminal.kill)
    seen = b""
    while not seen.endswith(b"ready\r\n"):
        seen += os.read(terminal.stdout.fileno(), 100)
    return [
        Subject(
            name="living.exec",
            block=run(["true"]),
            does="`true` in a living sandbox, output captured: as isolated as cold.run",
            ratio_to=("subprocess.run", "cold.run", "floor.vfork_exec"),
            paced=10,
        ),
        Subject(
            name="living.exec.python",
            block=run([below_usr("python3"), "-I", "-c", "pass"]),
            does="the same, `python3 -I -c pass`",
            ratio_to=("subprocess.run.python",),
        ),
        Subject(
            name="living.exec.1MiB",
            block=run(["head", "-c", str(MEBIBYTE), "/dev/zero"]),
            does="the same, 1 MiB of output from `head`",
            ratio_to=("subprocess.run.1MiB",),
        ),
        *limited,
        *_layered(sandboxcore, stack),
        Subject(
            name="living.popen",
            block=timed(popen),
            does="popen of `true`, communicate, wait",
            ratio_to=("subprocess.run",),
        ),
        Subject(
            name="living.create",
            block=_create(sandboxcore.Sandbox),
            does="a sandbox that is ready for its first command",
            ratio_to=("subprocess.run", "floor.clone.all"),
            paced=10,
        ),
        Subject(
            name="living.close",
            block=_close(sandboxcore.Sandbox),
            does="close() of an idle sandbox, as its caller sees it",
            ratio_to=("subprocess.run",),
            paced=10,
        ),
        Subject(
            name="floor.pty_echo",
            block=_local_terminal(stack),
            does="one byte to a terminal in this process and its echo",
        ),
        Subject(
            name="living.pty_echo",
            block=_echo(terminal.stdout.fileno(), lambda: None),
            does="one byte to a command's terminal and its echo",
            ratio_to=("floor.pty_echo",),
            paced=10,
        ),
    ]


def _limited(sandboxcore: Any, stack: ExitStack) -> list[Subject]:
    """The same with limits that need control groups, where this host grants them."""
    limits = sandboxcore.Limits(memory="256M", cpus=os.cpu_count(), pids=256)
    spec = sandboxcore.SandboxSpec(limits=limits)
    try:
        sandbox = stack.enter_context(sandboxcore.Sandbox(spec))
    except sandboxcore.UnsupportedHost:
        return []

    def suspend() -> None:
        sandbox.suspend()
        sandbox.resume()

    busy = stack.enter_context(sandbox.popen(["/bin/sh", "-c", "while sleep 0.01; do :; done"]))
    stack.callback(busy.kill)
    return [
        Subject(
            name="cold.run.limits",
            block=timed(lambda: sandboxcore.run(["true"], spec=spec, check=True)),
            does="cold.run with limits of memory, CPUs and processes by control groups",
            ratio_to=("cold.run", "subprocess.run"),
            paced=10,
        ),
        Subject(
            name="living.exec.limits",
            block=timed(lambda: sandbox.exec(["true"], check=True)),
            does="living.exec with the same limits; what each command used is counted",
            ratio_to=("living.exec", "subprocess.run"),
            paced=10,
        ),
        Subject(
            name="living.suspend",
            block=timed(suspend),
            does="suspend and resume of that sandbox, in which two processes run",
            ratio_to=("subprocess.run",),
            paced=10,
        ),
    ]


def _layered(sandboxcore: Any, stack: ExitStack) -> list[Subject]:
    """Snapshots by how much was written before, where this host has what overlays need."""
    spec = sandboxcore.SandboxSpec(writable=True, limits=sandboxcore.Limits(disk="1G"))
    try:
        sandbox = stack.enter_context(sandboxcore.Sandbox(spec))
        start = sandbox.snapshot()
    except sandboxcore.UnsupportedHost:
        return []
    busy = stack.enter_context(sandboxcore.Sandbox(spec))
    sleeper = stack.enter_context(busy.popen(["sleep", "3600"]))
    stack.callback(sleeper.kill)
    busy.shell(f"head -c {10 * MEBIBYTE} /dev/zero >/workspace/file", check=True)

    def fill(size: int) -> None:
        sandbox.restore(start)
        sandbox.shell(f"head -c {size} /dev/zero >/workspace/file", check=True)

    def prepared(before: Callable[[], object], action: Callable[[], object]) -> Block:
        def block(count: int, gap_s: float) -> list[float]:
            samples = []
            for _ in range(count):
                before()
                time.sleep(gap_s)
                samples += timed(action)(1, 0)
            return samples

        return block

    def fork() -> None:
        sandboxcore.Sandbox.from_snapshot(start).close()

    return [
        *(
            Subject(
                name=f"layers.snapshot.{name}",
                block=prepared(lambda size=size: fill(size), sandbox.snapshot),  # type: ignore[misc]
                does=f"a snapshot of an idle sandbox that has written {name}",
                ratio_to=("subprocess.run",),
                paced=10,
            )
            for name, size in (("1KiB", 1024), ("100MiB", 100 * MEBIBYTE))
        ),
        Subject(
            name="layers.restore.100MiB",
            block=prepared(lambda: fill(100 * MEBIBYTE), lambda: sandbox.restore(start)),
            does="going back to the start from there",
            ratio_to=("subprocess.run",),
            paced=10,
        ),
        Subject(
            name="layers.fork",
            block=timed(fork),
            does="a sandbox that begins with a snapshot, ready for its first command, and its close()",
            ratio_to=("subprocess.run", "living.create"),
            paced=10,
        ),
        Subject(
            name="layers.copy.10MiB",
            block=timed(busy.snapshot),
            does="a snapshot while a command runs: 10 MiB are copied, everything stands still",
            ratio_to=("subprocess.run",),
        ),
    ]


def _create(kind: Any) -> Block:
    """Times the making only; the end of each is not part of it."""

    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            sandbox = kind.create()
            samples.append((time.perf_counter_ns() - start) / 1000)
            sandbox.close()
        return samples

    return block


def _close(kind: Any) -> Block:
    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            sandbox = kind.create()
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            sandbox.close()
            samples.append((time.perf_counter_ns() - start) / 1000)
        return samples

    return block


def _local_terminal(stack: ExitStack) -> Block:
    """A terminal without a program: whoever times it also reads what was typed."""
    master, slave = pty.openpty()
    stack.callback(os.close, master)
    stack.callback(os.close, slave)
    attributes = termios.tcgetattr(slave)
    attributes[3] &= ~termios.ICANON
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    return _echo(master, lambda: os.read(slave, 100))


def _echo(master: int, after: Callable[[], object]) -> Block:
    """One character there and back, by the terminal's own echo."""

    def block(count: int, gap_s: float) -> list[float]:
        samples = []
        for _ in range(count):
            time.sleep(gap_s)
            start = time.perf_counter_ns()
            os.write(master, b"x")
            if os.read(master, 100) != b"x":
                raise RuntimeError("the terminal did not echo")
            samples.append((time.perf_counter_ns() - start) / 1000)
            after()
        return samples

    return block
