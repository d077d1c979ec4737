"""Clients of a shared state directory that are killed, or what they use is: see tests/system/test_kill9.py.

`conduct` starts a client per round, kills something at a random moment, and then looks whether everything is
as it should be. It is the reaper of all that loses its parent, so every process is below it, and none of
somebody else's.
"""

import ctypes
import errno
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from support import descendants, gone, host_environment, parents, wait_until

from sandboxcore import (
    PIPE,
    InvalidTransition,
    Sandbox,
    SandboxGone,
    SandboxNotFound,
    SandboxState,
    SetupError,
    SpecError,
)
from sandboxcore.identity import start_ticks
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.records import SandboxRecord
from sandboxcore.recovery import gc
from sandboxcore.store import Store

PR_SET_CHILD_SUBREAPER = 36
SENTINELS = ("keep0", "keep1")  # no client stops or destroys these
NAMES = ("a", "b", "c")
VICTIMS = ("client", "spawner", "init", "launcher", "command")
LIMIT = 20  # seconds for whatever has to come true

# --- the client -------------------------------------------------------------------------------------


class Client:
    """Does this and that with sandboxes until its stdin ends. What may go wrong because somebody else did
    something is fine; everything else is not."""

    def __init__(self, state: str, seed: int) -> None:
        self.state, self.random = state, random.Random(seed)
        self.private: list[Sandbox] = []

    def run(self) -> None:
        often = [self.execute, self.detach, self.sentinel]
        rarely = [self.stream, self.pause, self.create, self.stop, self.start, self.destroy, self.private_one]
        everything = [*often, *often, *rarely, self.collect]
        print("ready", flush=True)
        while not select.select([0], [], [], 0)[0]:
            try:
                self.random.choice(everything)()
            except (InvalidTransition, SandboxGone, SandboxNotFound, SpecError):
                pass
            except SetupError as error:
                if (error.stage, error.errno) not in (("spawner", errno.EPIPE), ("idmap", errno.ECHILD)):
                    raise
        for box in self.private:
            box.close()

    def any(self) -> Sandbox:
        if self.private and self.random.random() < 0.3:
            return self.random.choice(self.private)
        return self.open((*NAMES, *SENTINELS))

    def open(self, names: tuple[str, ...]) -> PersistentSandbox:
        return PersistentSandbox.connect(self.random.choice(names), state_dir=self.state)

    def execute(self) -> None:
        box = self.any()
        done = box.exec(["echo", "x"], timeout=LIMIT / 4)
        assert done.stdout == b"x\n" or done.cause == "killed" or paused(box), (done, box)

    def stream(self) -> None:
        box = self.any()
        with box.popen(["cat"], stdin=PIPE) as process:
            try:
                out, _ = process.communicate(b"through", timeout=LIMIT / 4)
            except subprocess.TimeoutExpired:
                assert paused(box), box
            else:
                assert out == b"through" or process.returncode == -9, (out, process.result)

    def detach(self) -> None:
        script = self.random.choice(
            ["exit 3", "sleep 0.05; echo x; exit 3", "sleep 300", "sleep 300 & sleep 300"]
        )
        try:
            command = self.any().detach(["sh", "-c", script], keep="4K")
        except TimeoutError:  # it was paused just then
            return
        if self.random.random() < 0.5 and "300" not in script:
            try:
                assert command.wait(LIMIT / 4).returncode in (3, -9), command.result
            except subprocess.TimeoutExpired:
                assert command.status == "running"
        command.close()

    def pause(self) -> None:
        box = self.open(NAMES)
        box.suspend()
        box.resume()

    def create(self) -> None:
        PersistentSandbox.create(name=self.random.choice(NAMES), state_dir=self.state).close()

    def stop(self) -> None:
        self.open(NAMES).stop()

    def start(self) -> None:
        self.open(NAMES).start()

    def destroy(self) -> None:
        self.open(NAMES).destroy()

    def sentinel(self) -> None:
        """There are always these, and they run."""
        for name in SENTINELS:
            try:
                box = PersistentSandbox.connect(name, state_dir=self.state)
            except SandboxNotFound:
                box = PersistentSandbox.create(name=name, state_dir=self.state)
            if box.state in (SandboxState.CREATED, SandboxState.STOPPED):
                box.start()

    def private_one(self) -> None:
        if len(self.private) >= 2:
            self.private.pop(0).close()
        box = Sandbox.create()
        self.private.append(box)
        box.detach(["sleep", "300"])

    def collect(self) -> None:
        gc(self.state)


def paused(box: Sandbox) -> bool:
    """Another client had stopped it just then, or was killed before it went on."""
    return box.state in (SandboxState.PAUSED, SandboxState.STOPPED, SandboxState.DESTROYED)


# --- who is who -------------------------------------------------------------------------------------


def inside(pid: int) -> list[int]:
    """A process's number in each of its namespaces, outermost first."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return [int(word) for line in lines if line.startswith("NSpid:") for word in line.split()[1:]]


def is_helper(pid: int) -> bool:
    """Whether it is our program: spawner, init or launcher, or a command before its exec."""
    try:
        return b"sandboxcore-spawner" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def classify(clients: list[int]) -> dict[str, list[int]]:
    """Every process below us by what it is."""
    depth = len(inside(os.getpid()))
    parent_of, found = parents(), {name: [] for name in VICTIMS}
    for pid in descendants(os.getpid()):
        numbers = inside(pid)
        if gone(pid) or not numbers:
            continue
        if pid in clients:
            found["client"].append(pid)
        elif len(numbers) == depth:
            if is_helper(pid) and not is_helper(parent_of.get(pid, 0)):
                found["spawner"].append(pid)
        elif numbers[-1] == 1:
            found["init"].append(pid)
        elif is_helper(pid) and inside(parent_of.get(pid, 0))[-1:] == [1]:
            found["launcher"].append(pid)
        else:
            found["command"].append(pid)
    return {kind: sorted(pids) for kind, pids in found.items() if pids}


def reap() -> None:
    """What lost its parent is ours, dead or alive. Clients are waited for by number."""
    for pid, parent in parents().items():
        if parent == os.getpid() and gone(pid) and pid not in _clients:
            os.waitpid(pid, os.WNOHANG)


_clients: set[int] = set()

# --- the conductor ----------------------------------------------------------------------------------


class Conductor:
    names = ["sandboxes", "state.db"]  # what stays in the state directory

    def __init__(self, state: str, seed: int) -> None:
        self.state, self.random, self.killed = state, random.Random(seed), Counter[str]()

    def round(self, number: int) -> None:
        running = {
            box.name: box.pid for box in self.records() if box.name in SENTINELS and box.state == "running"
        }
        clients = [self.start_client() for _ in range(self.random.choice([1, 1, 2]))]
        time.sleep(self.random.uniform(0, 0.4))  # the random moment
        kind, pid = self.kill([client.pid for client in clients])
        time.sleep(self.random.uniform(0, 0.1))
        for client in clients:
            self.finish(client, killed=client.pid == pid)
        wait_until(lambda: not self.strays(), f"the end of {self.strays()}", LIMIT)
        gc(self.state)
        assert gc(self.state) == gc(self.state, dry_run=True)
        self.check_records()
        self.check_files()
        if kind != "init":
            for record in self.records():
                if running.get(record.name):
                    assert (record.state, record.pid) == ("running", running[record.name]), record
        self.make_room()

    def start_client(self) -> "subprocess.Popen[str]":
        command = [sys.executable, __file__, "client", self.state, str(self.random.getrandbits(32))]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        client = subprocess.Popen(command, text=True, env=host_environment(), **pipes)
        _clients.add(client.pid)
        assert client.stdout.readline() == "ready\n", client.communicate()
        return client

    def kill(self, clients: list[int]) -> tuple[str, int]:
        there = classify(clients)
        present = [kind for kind in VICTIMS if kind in there]
        kind = self.random.choice([kind for kind in present if not self.killed[kind]] or present)
        pid = self.random.choice(there[kind])
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return "nobody", 0
        try:
            if pid not in descendants(os.getpid()):
                return "nobody", 0
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return "nobody", 0
        finally:
            os.close(pidfd)
        self.killed[kind] += 1
        return kind, pid

    def finish(self, client: "subprocess.Popen[str]", *, killed: bool) -> None:
        _, errors = client.communicate(timeout=3 * LIMIT)  # closes its stdin
        _clients.discard(client.pid)
        assert (client.returncode, errors) == (-9 if killed else 0, ""), errors

    def records(self) -> list[SandboxRecord]:
        with Store(self.state) as store:
            return store.all()

    def strays(self) -> set[int]:
        """What runs though no record knows it."""
        reap()
        known = {box.pid for box in self.records() if box.state in ("running", "paused")}
        every = {pid for pid in descendants(os.getpid()) if not gone(pid)}
        return every - known - descendants(*known)

    def check_records(self) -> None:
        """Each is true, and what runs is of use."""
        for record in self.records():
            with closing(PersistentSandbox.connect(record.id, state_dir=self.state)) as box:
                if box.state is SandboxState.PAUSED:
                    box.resume()
                assert (box.state is SandboxState.RUNNING) == (record.state in ("running", "paused")), record
                if box.state is SandboxState.RUNNING:
                    assert start_ticks(record.pid) == record.ticks, record
                    assert box.exec(["echo", "x"], timeout=LIMIT).stdout == b"x\n", record
                else:
                    assert (record.pid, record.ticks) == (0, 0), record
                self.check_commands(box)

    @staticmethod
    def check_commands(box: PersistentSandbox) -> None:
        """A command runs if and only if there is its process."""
        every = [inside(pid) for pid in descendants(box.pid) if not gone(pid)]
        numbers = {one[-1] for one in every if one}
        for command in box.commands():
            with command:
                if command.status == "running":
                    assert command.pid_inside in numbers or command.status != "running", (command, box.record)

    def check_files(self) -> None:
        """No directory without a record, no record without a directory."""
        known = {record.id for record in self.records()}
        found = set(os.listdir(Path(self.state, "sandboxes")))
        assert {name for name in found if not name.endswith(".lock")} == known
        assert {name.removesuffix(".lock") for name in found} == known

    def make_room(self) -> None:
        for record in self.records():
            with closing(PersistentSandbox.connect(record.id, state_dir=self.state)) as box:
                if len(list(Path(self.state, "sandboxes", record.id).iterdir())) > 60:
                    box.destroy()

    def resources(self) -> dict[str, int]:
        """What a client could leave behind on the host besides processes and files."""
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mounts": len(Path("/proc/self/mountinfo").read_bytes().splitlines()),
            "cgroups": sum(1 for _ in os.walk("/sys/fs/cgroup")),
        }

    def finale(self) -> None:
        for record in self.records():
            PersistentSandbox.connect(record.id, state_dir=self.state).destroy()
        wait_until(lambda: reap() or not descendants(os.getpid()), "the end of everything", LIMIT)
        assert os.listdir(Path(self.state, "sandboxes")) == []
        assert sorted(os.listdir(self.state)) == self.names


def conduct(kind: type[Conductor], state: str, rounds: int, seed: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    conductor = kind(state, seed)
    Store(state).close()
    before: dict[str, int] = {}
    for number in range(rounds):
        try:
            conductor.round(number)
        except BaseException:
            print(f"round {number} of seed {seed}", file=sys.stderr, flush=True)
            for pid in descendants(os.getpid()):  # persistent ones would stay
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise
        if number == 4:  # everything was imported and opened once
            before = conductor.resources()
    after = conductor.resources()
    assert all(after[name] <= count + 1 for name, count in before.items()), (before, after)
    conductor.finale()
    print(dict(conductor.killed))


def main(what: str, state: str, *numbers: str) -> None:
    actions: dict[str, Callable[..., None]] = {
        "client": lambda *a: Client(*a).run(),
        "conduct": lambda *a: conduct(Conductor, *a),
    }
    actions[what](state, *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
