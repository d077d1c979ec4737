"""Two processes with many threads and tasks, one state directory: see tests/system/test_manager_stress.py.

`conduct` starts the processes and looks meanwhile, from outside, how many sandboxes live. It is the reaper of
all that loses its parent, so whatever is left is below it.
"""

import ast
import asyncio
import contextlib
import ctypes
import logging
import os
import random
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from kill9 import PR_SET_CHILD_SUBREAPER, inside, is_helper
from stressusers import LIMIT, Awaited, Direct, User
from support import Counts, descendants, gone, host_environment, parents, settled, wait_until

from sandboxcore import SandboxError, SandboxManager, aio
from sandboxcore.identity import start_ticks
from sandboxcore.ledger import Ledger
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.room import Room

PROCESSES, THREADS, TASKS = 2, 8, 200
MAXIMUM = 20  # sandboxes at once, over all processes
SWEEP = 0.25

# --- one process --------------------------------------------------------------------------------------


def finished(work: Coroutine[Any, Any, None]) -> None:
    """Run what never waits."""
    with contextlib.suppress(StopIteration):
        work.send(None)
        raise AssertionError("it waits")


class Heard(logging.Handler):
    """What the package logs: an error is a failure."""

    def __init__(self, tally: Counter[str], failures: list[str]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())
        self.tally, self.failures = tally, failures

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self.failures.append(self.format(record))
        else:
            self.tally[f"warning: {re.sub(r'[0-9a-f]{8,}', '*', record.getMessage())}"] += 1


class Worker:
    def __init__(self, state: str, seconds: float, seed: int) -> None:
        self.state, self.seconds, self.seed = state, seconds, seed
        self.tally, self.failures = Counter[str](), list[str]()
        logging.getLogger("sandboxcore").addHandler(Heard(self.tally, self.failures))

    def options(self, *, reset: bool) -> dict[str, Any]:
        pool = PoolConfig(min_warm=1, max_warm=2, reset=reset, warm_ttl=1.0)
        return {"max_sandboxes": MAXIMUM, "sweep_interval": SWEEP, "pool": pool}

    def run(self) -> None:
        state, self.state = self.state, f"{self.state}.{self.seed}"  # of its own: each counts what it has
        Path(self.state + ".holders").mkdir()
        self.work(0.5, few=True)  # everything was imported and opened once
        with SandboxManager(self.state) as manager:
            manager.destroy_all()
        self.state = state
        before, threads = settled(), threading.active_count()
        self.say("ready")
        self.tally.clear()
        self.work(self.seconds)
        self.say(repr((dict(self.tally), self.failures)))
        wait_until(lambda: threading.active_count() <= threads, f"the end of {threading.enumerate()}", LIMIT)

        def more() -> dict[str, int]:
            now = Counts.now()
            return {name: now[name] - before[name] for name in COUNTED if now[name] > before[name]}

        deadline = time.monotonic() + LIMIT
        while (left := more()) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.say(repr(left))

    @staticmethod
    def say(text: str) -> None:
        print(text, flush=True)
        assert sys.stdin.readline() == "go on\n"

    def work(self, seconds: float, *, few: bool = False) -> None:
        """Threads with one manager, tasks with another."""
        deadline = time.monotonic() + seconds
        with SandboxManager(self.state, **self.options(reset=False)) as manager:
            users = [self.user(Direct(manager), f"t{n}", deadline) for n in range(2 if few else THREADS)]
            threads = [threading.Thread(target=finished, args=(user.run(),)) for user in users]
            loop = threading.Thread(target=asyncio.run, args=(self.tasks(deadline, 4 if few else TASKS),))
            for thread in (*threads, loop):
                thread.start()
            for thread in (*threads, loop):
                thread.join(seconds + 3 * LIMIT)
                if thread.is_alive():
                    frame = sys._current_frames()[thread.ident or 0]
                    self.failures.append(f"{thread} hangs:\n" + "".join(traceback.format_stack(frame)))

    async def tasks(self, deadline: float, many: int) -> None:
        async with aio.SandboxManager(self.state, **self.options(reset=True)) as manager:
            users = [self.user(Awaited(manager), f"a{n}", deadline) for n in range(many)]
            tasks = [asyncio.create_task(user.run(), name=user.name) for user in users]
            _, late = await asyncio.wait(tasks, timeout=deadline - time.monotonic() + 2 * LIMIT)
            for task in late:
                self.failures.append(f"{task} hangs: {task.get_stack()}")
                task.cancel()

    def user(self, manager: Any, name: str, deadline: float) -> User:
        name = f"{self.seed}{name}"
        holders = Path(self.state + ".holders")
        return User(manager, holders, name, deadline, random.Random(name), self.tally, self.failures)


COUNTED = ("processes", "host_fds", "spawner_fds", "mounts", "net_namespaces", "mount_namespaces")

# --- the conductor ------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks how many sandboxes live, by places and by processes, as long as it runs."""

    def __init__(self, room: Room) -> None:
        super().__init__(daemon=True)
        self.room, self.places, self.inits, self.looks = room, 0, 0, 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.places = max(self.places, self.room.taken())
            found = inits()
            if len(found) > MAXIMUM:
                print(f"{len(found)} live: {[about(pid) for pid in found]}", file=sys.stderr)
            self.inits = max(self.inits, len(found))
            self.looks += 1


def inits() -> dict[int, int]:
    """Those that live, all at one moment; one that is about to end has no memory any more. Not those of
    run_ephemeral(), whose places are held by who waits for them."""
    depth = len(inside(os.getpid()))
    found = {}
    for pid in descendants(os.getpid()):
        numbers = inside(pid)
        if len(numbers) == depth + 1 and numbers[-1] == 1 and is_helper(pid) and stays(pid):
            found[pid] = start_ticks(pid)
    return {pid: ticks for pid, ticks in found.items() if is_helper(pid) and start_ticks(pid) == ticks != 0}


def about(pid: int) -> object:
    """What it holds, for whoever wonders."""
    try:
        return pid, [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    except OSError as error:
        return pid, error


def stays(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text() == "sbx-init\n"
    except OSError:
        return False


def start_worker(state: str, seconds: str, seed: int) -> "subprocess.Popen[str]":
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, __file__, "worker", state, seconds, str(seed)]
    return subprocess.Popen(command, text=True, env=host_environment(), **pipes)


def go_on(*workers: "subprocess.Popen[str]") -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go on\n")
        worker.stdin.flush()


def heard(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().rstrip("\n")


def conduct(state: str, seconds: str, seed: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Path(state + ".holders").mkdir()
    workers = [start_worker(state, seconds, int(seed) * 10 + number) for number in range(PROCESSES)]
    assert [heard(worker) for worker in workers] == ["ready"] * PROCESSES
    watch = Watch(Room(state, MAXIMUM))
    watch.start()
    go_on(*workers)
    tallies, failures = Counter[str](), list[str]()
    for worker in workers:
        tally, failed = ast.literal_eval(heard(worker))
        tallies.update(tally)
        failures += failed
    watch.over.set()
    watch.join(LIMIT)
    for failure in failures[:5]:
        print(failure, file=sys.stderr)
    nothing_left(state)
    go_on(*workers)
    left = [ast.literal_eval(heard(worker)) for worker in workers]
    go_on(*workers)
    for worker in workers:
        worker.communicate(timeout=LIMIT)
    wait_until(lambda: reap() or not descendants(os.getpid()), "the end of everything", LIMIT)
    with SandboxManager(state, sweep_interval=None) as manager:
        manager.reconcile()
    pids = [worker.pid for worker in workers]
    groups = [
        path for path, _, _ in os.walk("/sys/fs/cgroup") if any(f"/host-{pid}-" in path for pid in pids)
    ]
    print((dict(tallies), watch.places, watch.inits, watch.looks, left, groups, len(failures)))


def nothing_left(state: str) -> None:
    """Both have closed their managers: what is left is what was kept for clients."""
    with SandboxManager(state, sweep_interval=None) as manager:
        manager.reconcile()
        for record in manager.list_sandboxes():
            assert not record.host, record
        for action in manager.destroy_all():
            assert not action.error, action
        assert (manager.list_sandboxes(), manager.list_sessions()) == ([], [])
        again = manager.reconcile()
        assert (again.actions, again.collected.removed, again.collected.ended) == ((), (), ()), again
        assert manager.damaged() == []
    with Ledger(state) as ledger:
        assert all(one.ended_at is not None and one.ended_why for one in ledger.sessions())
    wait_until(lambda: not inits(), "the end of every sandbox", LIMIT)
    wait_until(lambda: Room(state, 1).taken() == 0, "places given back", LIMIT)
    assert os.listdir(Path(state, "sandboxes")) == []
    assert sorted(os.listdir(state)) in (sorted(KNOWN), sorted([*KNOWN, "state.db-shm", "state.db-wal"]))
    assert os.listdir(state + ".holders") == []


KNOWN = ("room", "sandboxes", "state.db")


def reap() -> None:
    for pid, parent in parents().items():
        if parent == os.getpid() and gone(pid):
            with contextlib.suppress(ChildProcessError, SandboxError):
                os.waitpid(pid, os.WNOHANG)


def main(what: str, state: str, seconds: str, seed: str) -> None:
    if what == "conduct":
        conduct(state, seconds, seed)
    else:
        Worker(state, float(seconds), int(seed)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
