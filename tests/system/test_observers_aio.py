"""What observers of a sandbox are told, for asyncio: the same, and each command has one end however its task
ends."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from living import SLEEP
from loops import play

from sandboxcore import EventKind, ProgramNotFound, SandboxSpec, aio

pytestmark = pytest.mark.once


class Told:
    """What one observer was told."""

    def __init__(self, sandbox: aio.Sandbox) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []
        self.stop = sandbox.observe(self)

    def __call__(self, kind: str, data: Mapping[str, Any]) -> None:
        assert isinstance(kind, EventKind)
        self.all.append((kind, dict(data)))

    def kinds(self, of: str = "") -> list[str]:
        return [kind for kind, _ in self.all if kind.startswith(of)]

    def ended(self) -> dict[str, Any]:
        """The end of the one command that there was."""
        starts = [data for kind, data in self.all if kind == "command.started"]
        ends = [data for kind, data in self.all if kind == "command.ended"]
        assert len(starts) == len(ends) == 1
        assert starts[0]["command"] == ends[0]["command"]
        return ends[0]


@pytest.fixture(params=["private", "persistent"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Makes one that is not started."""
    spec = SandboxSpec(writable=True) if "snapshots" in request.node.name else None
    if request.param == "private":
        return lambda: aio.Sandbox(spec)
    return lambda: aio.PersistentSandbox(spec, state_dir=tmp_path / "state")


@contextlib.asynccontextmanager
async def started(make: Any) -> Any:
    sandbox = make()
    try:
        await sandbox.start()
        yield sandbox, Told(sandbox)
    finally:
        await sandbox.destroy()


def test_states(make: Any) -> None:
    async def main() -> None:
        sandbox = make()
        told = Told(sandbox)
        assert dict(sandbox.timings) == {}
        await sandbox.start()
        assert list(sandbox.timings) == ["plan", "group", "spawn", "setup", "total"]
        await sandbox.suspend()
        await sandbox.resume()
        await sandbox.stop()
        await sandbox.start()
        await sandbox.destroy()
        await sandbox.destroy()
        assert told.kinds() == [
            f"sandbox.{kind}"
            for kind in ("started", "suspended", "resumed", "stopped", "started", "destroyed")
        ]

    play(main())


def test_found_dead(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            command = await sandbox.detach(SLEEP)
            os.kill(sandbox.pid, signal.SIGKILL)
            async with asyncio.timeout(10):
                while sandbox.state != "stopped":
                    await asyncio.sleep(0.005)
            command.close()
            assert told.kinds() == ["command.started", "command.ended", "sandbox.stopped"]
            assert told.all[-1][1]["reason"] == "died"
            assert told.ended()["cause"] == "killed"

    play(main())


def test_exec(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            await sandbox.shell("printf 12; exit 3")
            ended = told.ended()
            assert (ended["cause"], ended["returncode"], ended["stdout_total"]) == ("exited", 3, 2)

    play(main())


def test_exec_that_fails_or_is_cancelled(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            with pytest.raises(ProgramNotFound):
                await sandbox.exec(["no-such-program"])
            assert told.ended()["cause"] == "setup"
            told.all.clear()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await sandbox.exec(SLEEP)
            assert (told.ended()["cause"], told.ended()["error"]) == ("killed", "CancelledError")
            told.all.clear()
            await sandbox.exec(SLEEP, timeout=0.02)
            assert told.ended()["cause"] == "timeout"

    play(main())


@pytest.mark.parametrize("turns", range(0, 12, 2))
@pytest.mark.parametrize("how", ["exec", "popen", "detach"])
def test_each_start_has_an_end_whenever_it_is_cancelled(how: str, turns: int) -> None:
    async def main() -> None:
        async with aio.Sandbox() as sandbox:
            told = Told(sandbox)
            task = asyncio.ensure_future(getattr(sandbox, how)(SLEEP))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            del task
            gc.collect(1)
        async with asyncio.timeout(10):  # the loop lets go of a handle that is forgotten
            while told.kinds("command.") not in ([], ["command.started", "command.ended"]):
                await asyncio.sleep(0.005)

    play(main())


@pytest.mark.parametrize("how", ["wait", "close", "forget"])
def test_popen(make: Any, how: str) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            process = await sandbox.popen(["true"] if how == "wait" else SLEEP)
            if how == "wait":
                await process.wait()
            elif how == "close":
                process.close()
            del process
            async with asyncio.timeout(10):
                while len(told.kinds("command.")) < 2:
                    await asyncio.sleep(0.005)
            assert told.ended()["cause"] == ("exited" if how == "wait" else "killed")

    play(main())


def test_popen_that_does_not_start(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            with pytest.raises(ProgramNotFound):
                await sandbox.popen(["no-such-program"])
            assert (told.ended()["cause"], told.ended()["error"]) == ("setup", "ProgramNotFound")
            told.all.clear()
            with pytest.raises(ProgramNotFound):
                await sandbox.detach(["no-such-program"])
            assert told.ended()["cause"] == "setup"

    play(main())


def test_detach(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            async with await sandbox.detach(["printf", "123"]) as command:
                await command.wait(10)
                assert told.all[0][1]["command"] == command.id
            assert told.ended()["stdout_total"] == 3
            told.all.clear()
            (await sandbox.detach(SLEEP)).close()
            await sandbox.stop()
            assert told.ended()["cause"] == "killed"
            assert told.kinds()[-1] == "sandbox.stopped"

    play(main())


def test_files_limits_and_snapshots(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):
            await sandbox.files.write("a", b"123")
            assert await sandbox.files.read("a") == b"123"
            with pytest.raises(FileNotFoundError):
                await sandbox.files.remove("none")
            await sandbox.update(wall_time=5)
            assert told.all[:3] == [
                ("file.written", {"path": "/workspace/a", "bytes": 3}),
                ("file.read", {"path": "/workspace/a", "bytes": 3}),
                ("file.removed", {"path": "/workspace/none", "error": "FileNotFoundError"}),
            ]
            assert told.kinds()[3:] == ["sandbox.updated"]
            snapshot = await sandbox.snapshot("one")
            await sandbox.diff()
            await sandbox.restore(snapshot)
            await sandbox.discard()
            for child in await sandbox.fork(2):
                await child.destroy()
            assert told.kinds()[4:] == [
                f"sandbox.{kind}" for kind in ("snapshot", "restored", "discarded", "forked")
            ]

    play(main())


def test_binds(tmp_path: Path) -> None:
    async def main() -> None:
        async with aio.Sandbox(SandboxSpec(live_binds="ro")) as sandbox:
            told = Told(sandbox)
            await sandbox.bind(tmp_path, "/workspace/a")
            await sandbox.unbind("/workspace/a")
            assert told.kinds("sandbox.") == ["sandbox.bound", "sandbox.unbound"]

    play(main())


def test_each_task_has_its_trace(make: Any) -> None:
    async def main() -> None:
        async with started(make) as (sandbox, told):

            async def work(name: str) -> None:
                with sandbox.trace(name):
                    await sandbox.exec(["echo", name])
                    async with await sandbox.popen(["echo", name]) as process:
                        await process.wait()
                    await sandbox.files.write(name, name)

            await asyncio.gather(*(work(name) for name in "abc"))
            await sandbox.exec(["true"])
        traces = [data.get("trace_id") for _, data in told.all]
        assert [traces.count(name) for name in "abc"] == [5, 5, 5]
        for kind, data in told.all:
            if kind == "command.started" and data["args"] != ["true"]:
                assert data["args"] == ["echo", data["trace_id"]]

    play(main())
