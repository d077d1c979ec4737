"""sandboxcore.aio: the same as without asyncio, for many at once; states, files, terminals."""

import asyncio
import contextlib
import gc
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiolife import MIB, mark, python, spawner_runs, with_sandbox
from loops import cancelled_after, condition, play
from support import Spec, gone, leaves_nothing, marked

import sandboxcore
import sandboxcore.files
import sandboxcore.persistent
from sandboxcore import Cause, Limits, Sandbox, SandboxState, aio
from sandboxcore.aio_streams import Store
from sandboxcore.detached import DetachedCommand
from sandboxcore.persistent import PersistentSandbox

pytestmark = pytest.mark.once

__all__ = ["spawner_runs"]  # fixtures


# --- the same as without asyncio --------------------------------------------------------------------

FLOOD = "import os\nfor i in range(300): os.write(1, b'%07d\\n' % i * 1000)"
BOTH = """
    import os, sys
    for fd in (1, 2):
        os.write(fd, b'%d' % fd * 300000)
    data = sys.stdin.buffer.read()
    for fd in (2, 1):
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[:100000]):]
"""
TABLE: dict[str, tuple[list[str], dict[str, Any]]] = {
    "true": (["true"], {}),
    "status": (["sh", "-c", "exit 42"], {}),
    "signal": (["sh", "-c", "kill -SEGV $$"], {}),
    "seccomp": (["sh", "-c", "kill -SYS $$"], {}),
    "streams": (["sh", "-c", "echo out; echo err >&2"], {}),
    "merged": (["sh", "-c", "echo out; echo err >&2"], {"stderr": sandboxcore.STDOUT}),
    "dropped": (["sh", "-c", "echo out; echo err >&2"], {"stdout": sandboxcore.DEVNULL}),
    "input": (["cat"], {"input": bytes(range(256)) * 20000}),
    "empty input": (["cat"], {"input": b""}),
    "bytes-like": (["cat"], {"input": memoryview(b"abc")}),
    "unread input": (["true"], {"input": bytes(MIB)}),
    "all at once": (python(BOTH), {"input": bytes(range(256)) * 8000}),
    "text": (["printf", "a\\r\\nb\\xff"], {"text": True, "errors": "replace"}),
    "flood": (python(FLOOD), {}),
    "cwd, env": (["sh", "-c", "pwd; env"], {"cwd": "/tmp", "env": {"A": "b", "PATH": "/usr/bin:/bin"}}),
    "files": (["sh", "-c", "cat a; ./b"], {"files": {"a": "x\n", "b": ("#!/bin/sh\necho y\n", 0o755)}}),
    "a daemon": (["sh", "-c", "setsid sleep 300 & echo done"], {}),
    "timeout": (["sh", "-c", "echo partial; sleep 300"], {"timeout": 0.3}),
    "timeout of a stopped one": (["sh", "-c", "kill -STOP $$"], {"timeout": 0.3}),
    "timeout with stuck input": (["sleep", "300"], {"input": bytes(4 * MIB), "timeout": 0.3}),
    "no program": (["/no/such/program"], {}),
    "no directory": (["true"], {"cwd": "/no/such/directory"}),
    "check": (["false"], {"check": True}),
    "check of a timeout": (["sleep", "300"], {"check": True, "timeout": 0.2}),
    "stdin=PIPE": (["true"], {"stdin": sandboxcore.PIPE}),
    "both": (["true"], {"stdin": sandboxcore.DEVNULL, "input": b"x"}),
    "no arguments": ([], {}),
}


def outcome(result: sandboxcore.ExecResult | Exception) -> tuple[Any, ...]:
    """What must not depend on who waits."""
    if isinstance(result, Exception):
        more = (getattr(result, "stage", ""), getattr(result, "index", 0), getattr(result, "errno", 0))
        inner = getattr(result, "result", None)
        return (type(result), *more, *(outcome(inner) if inner else (str(result),)))
    return (
        *(result.args, result.returncode, result.cause, result.stdout, result.stderr, result.truncated),
        *(result.stdout_total, result.stderr_total, set(result.timings), result.capabilities is None),
    )


def attempt(call: Callable[[], sandboxcore.ExecResult]) -> tuple[Any, ...]:
    try:
        return outcome(call())
    except Exception as error:
        return outcome(error)


async def attempt_async(call: Awaitable[sandboxcore.ExecResult]) -> tuple[Any, ...]:
    try:
        return outcome(await call)
    except Exception as error:
        return outcome(error)


@pytest.mark.parametrize("name", TABLE)
def test_run_gives_the_same(name: str) -> None:
    argv, options = TABLE[name]
    spec = Spec(limits=Limits(output="300K"))
    expected = attempt(lambda: sandboxcore.run(argv, spec=spec, **options))
    assert play(attempt_async(aio.run(argv, spec=spec, **options))) == expected


def test_exec_gives_the_same() -> None:
    spec = Spec(limits=Limits(output="300K"))
    with Sandbox(spec) as sandbox:
        expected = {name: attempt(partial(sandbox.exec, t[0], **t[1])) for name, t in TABLE.items()}

    async def action(sandbox: aio.Sandbox) -> dict[str, tuple[Any, ...]]:
        return {name: await attempt_async(sandbox.exec(t[0], **t[1])) for name, t in TABLE.items()}

    assert with_sandbox(action, spec=spec) == expected


def members(kind: type) -> dict[str, Any]:
    """The public methods and properties of a class, and how it is made."""
    found = inspect.getmembers(kind, lambda value: inspect.isroutine(value) or isinstance(value, property))
    made_by_others = kind.__name__ == "DetachedCommand"
    return {n: v for n, v in found if not n.startswith("_") or (n == "__init__" and not made_by_others)}


def test_the_interfaces_are_the_same() -> None:
    """Parameters cannot drift apart."""
    only_sync = {"popen": {"text", "encoding", "errors", "bufsize"}}
    only_async = {"popen": {"limit"}}
    assert inspect.signature(aio.run).parameters == inspect.signature(sandboxcore.run).parameters
    twins: list[tuple[type, type]] = [
        (Sandbox, aio.Sandbox),
        (PersistentSandbox, aio.PersistentSandbox),
        (DetachedCommand, aio.DetachedCommand),
    ]
    for sync, twin in twins:
        for name, theirs in members(sync).items():
            if name in ("interact", "attach"):  # they belong to a terminal
                continue
            ours = members(twin)[name]
            if isinstance(theirs, property):
                assert isinstance(ours, property) != (name == "capabilities"), name
                continue
            mine, others = (dict(inspect.signature(function).parameters) for function in (ours, theirs))
            different = only_async.get(name, set()), only_sync.get(name, set())
            assert mine.keys() - different[0] == others.keys() - different[1], (sync, name)
            for key in mine.keys() & others.keys():
                assert mine[key] == others[key], (sync, name, key)
    for name in ("gc", "list_sandboxes"):
        theirs = inspect.signature(getattr(sandboxcore.recovery, name)).parameters
        assert inspect.signature(getattr(aio, name)).parameters == theirs, name
    names = [name for name, _ in inspect.getmembers(sandboxcore.files.Files, inspect.isfunction)]
    for name in names:
        if not name.startswith("_"):
            ours = dict(inspect.signature(getattr(aio.Files, name)).parameters)
            assert ours == dict(inspect.signature(getattr(sandboxcore.files.Files, name)).parameters), name
    assert sandboxcore.aio is aio


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 10, 4095, 65536, 65537, 200_000, None])
def test_the_same_bytes_are_kept(limit: int | None) -> None:
    """The first and the last half of the limit, as csrc/stream.c has it, whatever the pieces are."""
    data = b"".join(b"%06d," % number for number in range(30000))
    sizes = [1, 2, 3, 9, 10, 11, 4095, 65535, 65536, 65537, 131072, 199_999, 200_000, 200_001, len(data)]
    code = "import sys; sys.stdout.write(''.join('%06d,' % n for n in range(30000))[:int(sys.argv[1])])"
    with Sandbox(Spec(limits=Limits(output=limit))) as sandbox:
        for size in sizes:
            done = sandbox.exec(python(code, str(size)))
            assert done.stdout_total == size
            for piece in (max(1, size // 50), 4096, 65536, size):
                store = Store(limit)
                for at in range(0, size, piece):
                    store.add(data[at : min(at + piece, size)])
                assert (store.value(), store.total) == (done.stdout, size), (size, piece)


def test_record_and_capabilities() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        seen = await sandbox.capabilities()
        assert seen.no_new_privs
        assert await sandbox.capabilities() is seen
        done = await sandbox.exec(["true"], record=True)
        assert done.capabilities is not None
        fresh = (await aio.run(["true"], record=True)).capabilities
        expected = sandboxcore.run(["true"], record=True).capabilities
        assert replace(fresh, namespaces={}) == replace(expected, namespaces={})

    with_sandbox(action)


# --- files and descriptors of the caller ------------------------------------------------------------


@pytest.mark.parametrize("living", [False, True])
def test_relays(tmp_path: Path, living: bool) -> None:
    data = os.urandom(3 * MIB)
    (tmp_path / "in").write_bytes(data)

    async def main(sandbox: aio.Sandbox) -> None:
        execute = sandbox.exec if living else aio.run
        with open(tmp_path / "in", "rb") as source, open(tmp_path / "out", "wb") as target:
            done = await execute(["cat"], stdin=source, stdout=target)
        assert (done.stdout, done.stdout_total) == (None, len(data))
        assert (tmp_path / "out").read_bytes() == data

        read, write = os.pipe()  # the reader is slower, and both ends belong to this very loop
        sink = bytearray()
        asyncio.get_running_loop().add_reader(read, lambda: sink.extend(os.read(read, 3000)))
        with open(tmp_path / "in", "rb") as source:
            done = await execute(["cat"], stdin=source, stdout=write)
        os.close(write)
        await condition(lambda: len(sink) == len(data), "the end of the relay")
        asyncio.get_running_loop().remove_reader(read)
        os.close(read)
        assert bytes(sink) == data

    with leaves_nothing():
        with_sandbox(main)


@pytest.mark.parametrize("living", [False, True])
def test_a_silent_source_and_a_reader_that_is_gone(living: bool) -> None:
    async def main(sandbox: aio.Sandbox) -> None:
        execute = sandbox.exec if living else aio.run
        source, sink = os.pipe()
        done = await execute(["echo", "done"], stdin=source, timeout=20)
        assert done.stdout == b"done\n"
        os.write(sink, b"fed\n")
        os.close(sink)
        assert (await execute(["cat"], stdin=source, timeout=20)).stdout == b"fed\n"
        os.close(source)
        read, write = os.pipe()
        os.close(read)
        done = await execute(["sh", "-c", "yes; :"], stdout=write, stderr=sandboxcore.DEVNULL, timeout=20)
        assert done.cause is Cause.EXITED
        os.close(write)
        read, write = os.pipe()  # nobody reads: its reader has his time, too
        began = time.monotonic()
        done = await execute(["yes"], stdout=write, timeout=0.3)
        assert done.timed_out
        assert time.monotonic() - began < 5
        os.close(read)
        os.close(write)

    with leaves_nothing():
        with_sandbox(main)


# --- many at once -----------------------------------------------------------------------------------


def test_a_hundred_commands_at_once() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        calls = [sandbox.exec(["sh", "-c", f"sleep 0.1; echo {n}; exit {n}"]) for n in range(100)]
        for number, done in enumerate(await asyncio.gather(*calls)):
            assert (done.returncode, done.stdout) == (number, b"%d\n" % number)

    with leaves_nothing():
        with_sandbox(action)


def test_thirty_sandboxes_at_once() -> None:
    async def main() -> None:
        spec = Spec(hostname=f"many-{time.monotonic_ns() % 10**9}")  # a plan that nobody has taught yet
        calls = [aio.run(["sh", "-c", f"hostname; exit {n}"], spec=spec) for n in range(30)]
        for number, done in enumerate(await asyncio.gather(*calls)):
            assert (done.returncode, done.stdout) == (number, spec.hostname.encode() + b"\n")

    with leaves_nothing():
        play(main())


def test_no_callback_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    sandboxcore.run(["true"])  # the spawner runs

    async def action() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0.5
        async with aio.Sandbox() as sandbox:
            await asyncio.gather(*(sandbox.exec(["cat"], input=bytes(MIB)) for _ in range(20)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await sandbox.exec(["sleep", "300"])
            await sandbox.suspend()
            await sandbox.resume()
            await sandbox.stop()
        await asyncio.gather(*(aio.run(["sleep", "300"], timeout=0.2) for _ in range(5)))

    with caplog.at_level(logging.WARNING, "asyncio"):
        asyncio.run(action(), debug=True)
    assert [record.getMessage() for record in caplog.records] == []


def test_a_loop_in_another_thread() -> None:
    results: list[sandboxcore.ExecResult] = []

    async def main() -> None:
        async with aio.Sandbox() as sandbox:
            results.append(await sandbox.shell("echo living"))
        results.append(await aio.run(["echo", "fresh"]))

    threads = threading.active_count()
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert threading.active_count() <= threads + 1
    thread.join(30)
    assert [done.stdout for done in results] == [b"living\n", b"fresh\n"]


# --- states -----------------------------------------------------------------------------------------


def test_states() -> None:
    async def main() -> None:
        sandbox = aio.Sandbox(name="n", labels={"a": "b"}, metadata={"c": 1}, description="d", owner="e")
        about = (sandbox.name, sandbox.labels, sandbox.metadata, sandbox.description, sandbox.owner)
        assert about == ("n", {"a": "b"}, {"c": 1}, "d", "e")
        assert (sandbox.state, sandbox.pid, sandbox.started_at) == (SandboxState.CREATED, 0, None)
        with pytest.raises(sandboxcore.InvalidTransition):
            await sandbox.exec(["true"])
        await sandbox.start()
        assert sandbox.state is SandboxState.RUNNING
        first = sandbox.pid
        with pytest.raises(sandboxcore.InvalidTransition):
            await sandbox.start()
        with pytest.raises(sandboxcore.InvalidTransition):
            await sandbox.resume()
        process = await sandbox.popen(["sleep", "300"])
        await sandbox.suspend()
        assert sandbox.state is SandboxState.PAUSED
        stat = Path(f"/proc/{process.pid}/stat")
        await condition(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "its stop")
        with pytest.raises(sandboxcore.InvalidTransition):
            await sandbox.exec(["true"])
        await sandbox.resume()
        assert (await sandbox.shell("echo on")).stdout == b"on\n"
        await sandbox.signal(signal.SIGUSR1)
        assert await process.wait() == -signal.SIGUSR1
        with pytest.raises(ValueError):
            await sandbox.signal(signal.SIGSTOP)
        await sandbox.stop()
        assert (sandbox.state, gone(first)) == (SandboxState.STOPPED, True)
        await sandbox.start()
        assert (await sandbox.exec(["true"])).ok
        os.kill(sandbox.pid, signal.SIGKILL)
        await condition(lambda: sandbox.state is SandboxState.STOPPED, "its end")
        with pytest.raises((sandboxcore.InvalidTransition, sandboxcore.SandboxGone)):
            await sandbox.exec(["true"])
        await sandbox.close()
        await sandbox.close()
        assert sandbox.state is SandboxState.DESTROYED

    with leaves_nothing():
        play(main())


def test_a_sandbox_that_is_killed_or_closed_under_its_commands() -> None:
    async def main() -> None:
        for end in ("kill", "close", "stop"):
            async with aio.Sandbox() as sandbox:
                name = mark()
                script = python("import sys, time\nprint('on', flush=True)\ntime.sleep(300)", name)
                execution = asyncio.create_task(sandbox.exec(script))
                process = await sandbox.popen(script)
                await condition(lambda name=name: len(marked(name)) >= 2, "both commands")
                assert await process.stdout.readline() == b"on\n"
                if end == "kill":
                    os.kill(sandbox.pid, signal.SIGKILL)
                else:
                    await getattr(sandbox, end)()
                done = await execution
                assert (done.returncode, done.cause) == (-9, Cause.KILLED)
                assert await process.wait() == -9
                await condition(lambda name=name: not marked(name), "the end of both")
                process.close()

    with leaves_nothing():
        play(main())


def test_a_forgotten_sandbox_and_process() -> None:
    async def main() -> None:
        name = mark()
        sandbox = await aio.Sandbox.create()
        process = await sandbox.popen(python("import time; time.sleep(300)", name))
        assert marked(name)
        del process
        gc.collect()
        await condition(lambda: not marked(name), "its end")
        del sandbox
        gc.collect()

    with leaves_nothing():
        play(main())


# --- files ---------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    """One thread of operations, on both sides."""
    data = os.urandom(3 * MIB)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "f").write_bytes(data)

    async def action(sandbox: aio.Sandbox) -> None:
        files = sandbox.files
        assert await files.write("a/b", data, mode=0o600) == len(data)
        assert await files.read("a/b") == data
        assert await files.read("a/b", offset=5, size=7) == data[5:12]
        await files.write_many({"a/c": "text", "a/d": (b"x", 0o755)})
        assert await files.read("a/c", text=True) == "text"
        assert [info.name for info in await files.list("a")] == ["b", "c", "d"]
        assert ((await files.stat("a/d")).mode, await files.exists("a/e")) == (0o755, False)
        await files.mkdir("x/y", parents=True)
        await files.rename("a/c", "x/y/c")
        await files.symlink("y/c", "x/link")
        await files.chmod("x/y/c", 0o640)
        assert (await sandbox.shell("cat x/link; stat -c %a x/y/c")).stdout == b"text640\n"
        with await files.open("x/y/c", "r+b") as file:
            file.seek(0, 2)
            file.write(b" and more")
        await files.copy_in(tmp_path / "tree", "tree")
        await files.copy_out("tree", tmp_path / "copy")
        assert (tmp_path / "copy" / "f").read_bytes() == data
        archive = await files.tar("x")
        await files.untar(archive, "z")
        assert await files.read("z/link") == b"text and more"
        await files.remove("x", recursive=True)
        with pytest.raises(FileNotFoundError) as caught:
            await files.read("x/link")
        assert caught.value.filename.endswith("x/link")
        many = [files.write(f"many/{n}", b"%d" % n) for n in range(50)]
        await asyncio.gather(*many)
        assert [await files.read(f"many/{n}") for n in range(50)] == [b"%d" % n for n in range(50)]
        for turns in range(12):
            assert await cancelled_after(turns, endless(files))
            assert await files.read("many/7") == b"7"
        await sandbox.stop()
        with pytest.raises(sandboxcore.InvalidTransition):
            await files.read("many/7")
        await sandbox.start()
        assert not await files.exists("many")

    async def endless(files: aio.Files) -> None:
        while True:
            await files.write("endless", data)

    with leaves_nothing():
        with_sandbox(action)


def test_the_files_of_a_sandbox_that_is_closed_meanwhile() -> None:
    async def endless(files: aio.Files) -> None:
        while True:
            await files.write("endless", b"x")

    async def main() -> None:
        for _ in range(5):
            async with aio.Sandbox() as sandbox:
                tasks = [asyncio.create_task(endless(sandbox.files)) for _ in range(5)]
                await asyncio.sleep(0.01)
            for task in tasks:
                with pytest.raises((sandboxcore.SandboxGone, sandboxcore.InvalidTransition)):
                    await task

    with leaves_nothing():
        play(main())


# --- terminals --------------------------------------------------------------------------------------


def test_a_terminal() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        async with await sandbox.popen(
            ["sh"], pty=(33, 101), env={"PS1": "", "PATH": "/usr/bin:/bin"}
        ) as process:
            process.stdin.write(b"stty -echo; tty; stty size\n")
            seen = await process.stdout.readuntil(b"33 101\r\n")
            assert b"/dev/pts/" in seen
            process.resize(44, 102)
            process.stdin.write(b"stty size\n")
            await process.stdout.readuntil(b"44 102\r\n")
            process.stdin.write(b"sh -c 'echo on; exec sleep 300'\n")
            await process.stdout.readuntil(b"on\r\n")
            process.stdin.write(b"\x03")
            process.stdin.write(b"echo interrupted; exit 7\n")
            assert b"interrupted" in await process.stdout.read()  # ends without an error
            assert await process.wait() == 7
            await process.stdout.read()
        with pytest.raises(ValueError):
            process.resize(1, 1)
        async with await sandbox.popen(["tty"], pty=True) as process:
            output, errors = await process.communicate()
            assert b"/dev/pts/" in output
            assert errors is None
        async with await sandbox.popen(["sh"], pty=True) as process:
            output, errors = await process.communicate(b"stty -echo; exec cat\nsome text")
            assert output.endswith(b"some text")
            assert process.returncode == 0
        script = "exec </dev/null >/dev/null 2>&1; sleep 0.3; echo again >/dev/tty"
        async with await sandbox.popen(["sh", "-c", script], pty=True) as process:
            assert await process.stdout.read() == b"again\r\n"
        async with await sandbox.popen(["sh", "-c", "echo a; exit 2"], pty=True) as process:
            events = [event async for event in process]
        assert events[0] == aio.Stdout(b"a\r\n", 0)
        assert events[-1].result.returncode == 2
        async with await sandbox.popen(["cat"]) as process:
            with pytest.raises(ValueError):
                process.resize(1, 1)

    with leaves_nothing():
        with_sandbox(action)
