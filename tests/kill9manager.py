"""The same as kill9.py with managers: killed in the midst of acquire, release, fork, archive, sweep, refill.
See tests/system/test_kill9.py."""

import os
import random
import select
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar

import kill9
from kill9 import LIMIT, SENTINELS, inside
from support import descendants, gone, wait_until

from sandboxcore import (
    InvalidTransition,
    SandboxBusy,
    SandboxError,
    SandboxGone,
    SandboxManager,
    SandboxNotFound,
    SandboxSession,
    SandboxSpec,
    SelectionOptions,
    SessionNotFound,
    SessionState,
    SessionTimeouts,
    SetupError,
    SpecError,
    TooManySandboxes,
)
from sandboxcore.identity import start_ticks
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.policy import LifecyclePolicy
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.records import SandboxRecord
from sandboxcore.room import Room

MAXIMUM = 16
KEPT = ("put0", "put1")  # archived, recovered, destroyed, without a session
FOR_EVER = SessionTimeouts(idle=None, detached=None, suspended=None)
IDLE = SessionTimeouts(idle=3.0, detached=2.0, suspended=2.0)
EXPECTED = (
    InvalidTransition, SandboxBusy, SandboxGone, SandboxNotFound, SessionNotFound, SpecError,
    TooManySandboxes,
)  # fmt: skip
WRITABLE = SandboxSpec(writable=True)


class Client:
    """Two threads that use one manager until stdin ends."""

    def __init__(self, state: str, seed: int) -> None:
        self.state, self.seed = state, seed
        self.manager = SandboxManager(
            state, max_sandboxes=MAXIMUM, timeouts=IDLE, sweep_interval=0.2,
            pool=PoolConfig(min_warm=1, max_warm=2, warm_ttl=0.5, reset=bool(seed % 2)),
            policy=LifecyclePolicy(auto_stop=300),
        )  # fmt: skip
        self.over = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=Worker(self, number).run) for number in range(2)]
        for thread in threads:
            thread.start()
        select.select([0], [], [])
        self.over.set()
        for thread in threads:
            thread.join(2 * LIMIT)
            assert not thread.is_alive()
        self.manager.close()


class Worker:
    def __init__(self, client: Client, number: int) -> None:
        self.manager, self.over = client.manager, client.over
        self.random = random.Random(client.seed + number)
        self.name = f"client{self.random.randrange(4)}"  # several have the same
        self.sessions: list[SandboxSession] = []

    def run(self) -> None:
        often = [self.acquire, self.use, self.use, self.leave]
        rarely = [self.pause, self.fork, self.put, self.sentinel, self.pooled, self.settle]
        while not self.over.is_set():
            try:
                self.random.choice([*often, *often, *rarely])()
            except EXPECTED:
                pass
            except SetupError as error:
                if error.stage not in ("spawner", "idmap"):  # it was killed
                    raise
            except SandboxError as error:  # in the midst of a copy of what was written
                if "has its spawner died" not in str(error):
                    raise

    def acquire(self) -> None:
        if len(self.sessions) >= 3:
            self.leave()
        self.sessions.append(
            self.manager.acquire(
                self.random.choice([None, WRITABLE]),
                SelectionOptions(use_pool=self.random.random() < 0.3),
                self.name,
                ttl=self.random.choice([None, 60.0]),
            )
        )

    def any(self) -> SandboxSession:
        if not self.sessions:
            raise SessionNotFound("none")
        return self.random.choice(self.sessions)

    def use(self) -> None:
        session = self.any()
        done = session.sandbox.exec(["echo", session.id], timeout=LIMIT / 4)
        assert done.stdout.decode() == f"{session.id}\n" or done.cause in ("killed", "timeout"), done

    def leave(self) -> None:
        if self.sessions:
            session = self.sessions.pop(self.random.randrange(len(self.sessions)))
            self.random.choice(
                [session.release, session.terminate, session.detach, lambda: session.release(keep_alive=True)]
            )()

    def pause(self) -> None:
        session = self.any()
        session.suspend()
        session.resume()

    def fork(self) -> None:
        session = self.any()
        if session.sandbox.spec != WRITABLE or not isinstance(session.sandbox, PersistentSandbox):
            return
        self.sessions += self.manager.fork(session, self.random.choice([1, 2]))
        for session in self.sessions[4:]:
            session.release()
        del self.sessions[4:]

    def put(self) -> None:
        name = self.random.choice(KEPT)
        record = self.manager.get_record(name)
        if record is None:
            self.manager.create(self.random.choice([None, WRITABLE]), name=name)
        elif record.state == "archived":
            self.manager.recover(name, start=self.random.random() < 0.5)
        elif self.random.random() < 0.8:
            self.manager.archive(name, "put away")
        else:
            self.manager.destroy(name)

    def sentinel(self) -> None:
        """There are always these, they run, and somebody has a session of each."""
        name = self.random.choice(SENTINELS)
        found = self.manager.attach(name, "sentinel", create_if_missing=True, timeouts=FOR_EVER)
        assert found.session.sandbox.exec(["echo", "x"], timeout=LIMIT).stdout == b"x\n" or self.dies(name)
        found.session.detach()

    def dies(self, name: str) -> bool:
        """Whether it was killed: then it will be found so."""
        wait_until(lambda: self.manager.get_state(name) != "running" or self.over.is_set(), "its end", LIMIT)
        return True

    def pooled(self) -> None:
        done = self.manager.run_pooled(["echo", "x"], timeout=LIMIT / 4)
        assert done.stdout == b"x\n" or done.cause == "killed", done

    def settle(self) -> None:
        self.random.choice([self.manager.reconcile, self.manager.list_sandboxes, self.manager.stats])()


class Forked:
    """A client that has everything imported already: most of its life is work."""

    stdins: ClassVar[set[int]] = set()

    def __init__(self, state: str, seed: int) -> None:
        stdin, self.stdin = os.pipe()
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by finish()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(stdin, 0)
            os.dup2(self.stderr.fileno(), 2)
            for fd in (self.stdin, *Forked.stdins):  # or the others' would never end
                os.close(fd)
            status = 1
            try:
                Client(state, seed).run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        os.close(stdin)
        Forked.stdins.add(self.stdin)

    def finish(self, patience: float) -> tuple[int, str]:
        """Its status, and what it said."""
        Forked.stdins.discard(self.stdin)
        os.close(self.stdin)
        wait_until(lambda: gone(self.pid), f"the end of client {self.pid}", patience)
        _, status = os.waitpid(self.pid, 0)
        with self.stderr:
            self.stderr.seek(0)
            return os.waitstatus_to_exitcode(status), self.stderr.read()


class Conductor(kill9.Conductor):
    names = ["room", "sandboxes", "snapshots", "state.db"]

    def __init__(self, state: str, seed: int) -> None:
        super().__init__(state, seed)
        self.seen: set[str] = set()

    def round(self, number: int) -> None:
        sentinels = {box.name: box for box in self.records() if box.name in SENTINELS}
        clients = [self.start_client() for _ in range(self.random.choice([1, 1, 2]))]
        self.seen |= {f"/host-{client.pid}-" for client in clients}
        time.sleep(self.random.uniform(0, 0.5))  # the random moment
        kind, pid = self.kill([client.pid for client in clients])
        time.sleep(self.random.uniform(0, 0.1))
        for client in clients:
            self.finish(client, killed=client.pid == pid)
        with SandboxManager(self.state, sweep_interval=None, max_sandboxes=MAXIMUM) as manager:
            self.recover(manager)
            for record in manager.list_sandboxes():
                self.check(manager, record)
            self.check_sessions(manager)
            for name, before in sentinels.items():
                self.check_sentinel(manager, name, before, touched=kind == "init")
        self.check_files()
        self.seen |= {record.id for record in self.records()}

    def start_client(self) -> Any:
        client = Forked(self.state, self.random.getrandbits(32))
        kill9._clients.add(client.pid)
        return client

    def finish(self, client: Any, *, killed: bool) -> None:
        """What it logs of what was killed is fine; a traceback of a thread is not."""
        status, errors = client.finish(3 * LIMIT)
        kill9._clients.discard(client.pid)
        assert status == (-9 if killed else 0), errors
        assert "Exception in thread" not in errors, errors

    def recover(self, manager: SandboxManager) -> None:
        """One pass sets everything right; then there is nothing to do but what is due by time."""
        done = manager.reconcile()
        assert not done.failed, done.failed
        again = manager.reconcile(dry_run=True)
        due = ("without activity", "expired")
        assert all(any(why in action.reason for why in due) for action in again.actions), again
        assert (again.collected.ended, again.collected.removed) == ((), ()), again
        wait_until(lambda: not self.strays(), f"the end of {self.strays()}", LIMIT)
        living = [one for one in self.records() if one.state in ("running", "paused")]
        room = Room(self.state, MAXIMUM)
        wait_until(lambda: room.taken() == len(living), f"{len(living)} places, not {room.taken()}", LIMIT)
        assert manager.damaged() == []

    def check(self, manager: SandboxManager, record: SandboxRecord) -> None:
        """It is true, and of use."""
        assert (record.host, record.doomed) == ("", ""), record
        assert record.state in ("running", "paused", "stopped", "archived", "created"), record
        if record.state not in ("running", "paused"):
            assert (record.pid, record.ticks) == (0, 0), record
            return
        assert start_ticks(record.pid) == record.ticks, record
        assert inside(record.pid)[-1] == 1, record
        box = manager.find(record.id)
        if record.state == "paused":
            box.resume()
        assert box.pid == record.pid
        assert box.exec(["echo", "x"], timeout=LIMIT).stdout == b"x\n", record
        if record.state == "paused":
            box.suspend()

    def check_sessions(self, manager: SandboxManager) -> None:
        """Each is of a sandbox; and what a session is made for has one."""
        boxes = {record.id: record for record in manager.list_sandboxes()}
        sessions = manager.list_sessions()
        for session in sessions:
            box = boxes.get(session.sandbox_id)
            assert box is not None, session
            assert session.state is SessionState.SUSPENDED or box.state != "paused", (session, box)
        used = {session.sandbox_id for session in sessions}
        for box in boxes.values():
            assert box.id in used or box.name in KEPT, box

    def check_sentinel(
        self, manager: SandboxManager, name: str, before: SandboxRecord, *, touched: bool
    ) -> None:
        now = manager.get_record(name)
        assert now is not None, name
        assert now.id == before.id, now
        if not touched and before.state == "running":
            assert (now.state, now.pid, now.ticks) == ("running", before.pid, before.ticks), now
        held = [one for one in manager.list_sessions(client_id="sentinel") if one.sandbox_id == now.id]
        assert held, f"{name}: its session is gone"
        for extra in held[1:]:  # of those who were killed
            extra.terminate()

    def resources(self) -> dict[str, int]:
        """Other processes have control groups, too."""
        return {name: many for name, many in super().resources().items() if name != "cgroups"}

    def finale(self) -> None:
        with SandboxManager(self.state, sweep_interval=None) as manager:
            left = {one.sandbox_id for one in manager.list_sessions()}
            wait_until(lambda: self.only_kept(manager), f"the end of {left}", LIMIT)
            assert all(not action.error for action in manager.destroy_all())
            assert manager.list_sessions() == []
        wait_until(lambda: kill9.reap() or not descendants(os.getpid()), "the end of everything", LIMIT)
        with SandboxManager(self.state, sweep_interval=None) as manager:
            manager.reconcile()
        groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if any(one in path for one in self.seen)]
        assert groups == []
        assert Room(self.state, 1).taken() == 0
        assert os.listdir(Path(self.state, "sandboxes")) == []
        assert set(os.listdir(self.state)) <= set(self.names), os.listdir(self.state)

    @staticmethod
    def only_kept(manager: SandboxManager) -> bool:
        """Everybody's time is over, but for the sentinels'."""
        manager.reconcile()
        return all(record.name in (*SENTINELS, *KEPT) for record in manager.list_sandboxes())


def main(what: str, state: str, *numbers: str) -> None:
    assert what == "conduct"
    kill9.conduct(Conductor, state, *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
