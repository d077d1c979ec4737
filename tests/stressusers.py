"""One user of a manager, in a thread or a task: see stress.py."""

import asyncio
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxcore import (
    InvalidTransition,
    SandboxGone,
    SandboxManager,
    SandboxNotFound,
    SelectionOptions,
    SessionNotFound,
    SessionState,
    SessionTimeouts,
    TooManySandboxes,
    aio,
)

SHARED = 12  # clients that threads and tasks of both processes have in common
LIMIT = 30  # seconds for whatever has to come true
WAIT = 2.0  # seconds for room

PATIENT = SessionTimeouts(idle=120, detached=0.7, suspended=120)
BRIEF = SessionTimeouts(idle=0.4, detached=0.2, suspended=0.2)
ENDED = (InvalidTransition, SandboxNotFound, SandboxGone, SessionNotFound)  # somebody else has ended it
SCRIPT = 'cat /tmp/who 2>/dev/null; echo "$1" >/tmp/who; echo "$2" >/tmp/token; echo "$2"'


class Direct:
    """A manager whose methods work at once, as one whose methods are awaited."""

    def __init__(self, own: SandboxManager) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*args: Any, **options: Any) -> Any:
            return getattr(self._own, name)(*args, **options)

        return call

    async def exec(self, session: Any, argv: list[str]) -> Any:
        return session.sandbox.exec(argv, timeout=LIMIT)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Awaited:
    """The same of one for asyncio."""

    def __init__(self, own: aio.SandboxManager) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    async def exec(self, session: Any, argv: list[str]) -> Any:
        return await session.sandbox.exec(argv, timeout=LIMIT)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@dataclass
class User:
    """Acquires, uses, releases, again and again, until the deadline."""

    manager: Any
    holders: Path
    name: str
    deadline: float
    random: random.Random
    tally: Counter[str]
    failures: list[str]
    held: Any = field(default=None)

    async def run(self) -> None:
        while time.monotonic() < self.deadline and not self.failures:
            try:
                if self.random.random() < 0.05:
                    await self.run_once()
                else:
                    await self.use()
            except Exception:
                self.failures.append(f"{self.name}:\n{traceback.format_exc()}")
            finally:
                self.let_go()

    async def run_once(self) -> None:
        token = f"{self.name} {self.random.random()}"
        method = self.random.choice(["run_ephemeral", "run_pooled"])
        try:
            done = await getattr(self.manager, method)(["echo", token], timeout=LIMIT)
        except TooManySandboxes:
            self.tally["no room"] += 1
            return
        assert done.stdout == f"{token}\n".encode(), done
        self.tally[method] += 1

    async def use(self) -> None:
        own = self.random.random() < 0.5
        client = self.name if own else f"shared{self.random.randrange(SHARED)}"
        brief = self.random.random() < 0.1
        try:
            session = await self.manager.acquire(
                None,
                SelectionOptions(use_pool=self.random.random() < 0.3),
                client,
                timeouts=BRIEF if brief else PATIENT,
                labels={"user": self.name},
                wait=self.random.choice([0.0, WAIT, WAIT, WAIT]),
            )
        except TooManySandboxes:
            self.tally["no room"] += 1
            return
        except ENDED:
            if not brief:  # a kept one that is brief was checked before
                raise
            self.tally["brief: ended at birth"] += 1
            return
        self.tally["acquired"] += 1
        try:
            await self.with_session(session, client, own=own)
        except ENDED:
            if session.timeouts != BRIEF:
                raise
            self.tally["brief: ended"] += 1
        except AssertionError:
            if session.timeouts != BRIEF or session.state is not SessionState.TERMINATED:
                raise
            self.tally["brief: ended while in use"] += 1

    async def with_session(self, session: Any, client: str, *, own: bool) -> None:
        self.hold(session)
        token = f"{session.id} {self.random.random()}"
        done = await self.manager.exec(session, ["sh", "-c", SCRIPT, "sh", client, token])
        found = done.stdout.decode().splitlines()
        assert found[-1:] == [token], (session, done)
        assert found[:-1] in ([], [client]), f"{session}: {client} has what {found[:-1]} had"
        move = self.random.choice(["nothing", "touch", "suspend", "detach", "wait", "leave"])
        self.tally[move] += 1
        if move == "touch":
            session.touch()
        elif move == "suspend":
            await session_do(self.manager, "suspend", session)
            assert session.state is SessionState.SUSPENDED or session.timeouts == BRIEF, session
            await session_do(self.manager, "resume", session)
        elif move == "wait":
            await self.manager.sleep(
                self.random.choice([0.0, 0.02, 0.8 if session.timeouts == BRIEF else 0.1])
            )
        elif move in ("detach", "leave"):
            returned = await self.come_back(session, client, own=own, leave=move == "leave")
            if returned is None:
                return
            session = returned
        done = await self.manager.exec(session, ["cat", "/tmp/token"])
        assert done.stdout == f"{token}\n".encode() or move == "detach", (token, session, done)
        self.let_go()
        how = self.random.choice(["release", "release", "terminate"])
        await session_do(self.manager, how, session)
        assert session.state is SessionState.TERMINATED, session

    async def come_back(self, session: Any, client: str, *, own: bool, leave: bool) -> Any:
        """Leave it, and perhaps take it up again: then it is ours once more."""
        self.let_go()
        if leave or not own:  # somebody else of that client may have it at once, and do with it what he likes
            await self.manager.release(session, keep_alive=True)
            return None
        await self.manager.detach(session)
        try:
            if self.random.random() < 0.5:
                found = await self.manager.resume(session)
            else:
                attached = await self.manager.attach(session.sandbox_id, client, timeouts=session.timeouts)
                found = attached.session
        except ENDED:
            self.tally["detached: ended"] += 1
            return None
        self.hold(found)
        self.tally["came back"] += 1
        return found

    def hold(self, session: Any) -> None:
        """It is this user's alone. Raises FileExistsError where it is somebody else's, too."""
        path = self.holders / session.sandbox_id
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(fd, f"{self.name} {session.id}".encode())
        os.close(fd)
        self.held = path

    def let_go(self) -> None:
        if self.held is not None:
            self.held.unlink()
            self.held = None


def session_do(manager: Any, what: str, session: Any) -> Awaitable[Any]:
    found: Awaitable[Any] = getattr(manager, what)(session)
    return found
