"""sandboxcore.aio: processes with streams."""

import asyncio
import contextlib
import os
import resource
import signal

import pytest
from aiolife import MIB, mark, python, spawner_runs, with_sandbox
from loops import condition
from support import leaves_nothing, marked

import sandboxcore
import sandboxcore.files
import sandboxcore.persistent
from sandboxcore import Cause, Limits, aio

pytestmark = pytest.mark.once

__all__ = ["spawner_runs"]  # fixtures


def test_communicate() -> None:
    data = os.urandom(5 * MIB)

    async def action(sandbox: aio.Sandbox) -> None:
        async with await sandbox.popen(["cat"], stdin=aio.PIPE) as process:
            assert await process.communicate(data) == (data, b"")
            assert (process.returncode, process.result.cause) == (0, Cause.EXITED)
        async with await sandbox.popen(["sh", "-c", "echo x; exit 3"], stderr=aio.DEVNULL) as process:
            assert await process.communicate() == (b"x\n", None)
            assert process.returncode == 3
        async with await sandbox.popen(["true"], stdin=aio.PIPE) as process:
            assert await process.communicate(data) == (b"", b"")

    with leaves_nothing():
        with_sandbox(action)


def test_communicate_goes_on_after_a_cancellation() -> None:
    data = os.urandom(3 * MIB)

    async def action(sandbox: aio.Sandbox) -> None:
        async with await sandbox.popen(["cat"], stdin=aio.PIPE) as process:
            for pause in (0.0, 0.001, 0.003, 0.01):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await process.communicate(data if process._input is None else None)
            assert await process.communicate() == (data, b"")
        name = mark()
        async with asyncio.timeout(20):
            task = asyncio.create_task(talk(sandbox, name))
            await condition(lambda: marked(name), "the command")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert marked(name) == set()

    async def talk(sandbox: aio.Sandbox, name: str) -> None:
        async with await sandbox.popen(["sh", "-c", "sleep 300; :", name]) as process:
            try:
                await process.communicate()
            finally:
                assert process.returncode is None

    with leaves_nothing():
        with_sandbox(action)


def test_a_conversation() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        async with await sandbox.popen(["cat"], stdin=aio.PIPE) as process:
            assert process.returncode is None
            assert 0 < process.pid_inside < process.pid or process.pid > 0
            for number in range(100):
                process.stdin.write(b"%d\n" % number)
                await process.stdin.drain()
                assert await process.stdout.readline() == b"%d\n" % number
            process.stdin.close()
            await process.stdin.wait_closed()
            assert await process.wait() == 0
            assert await process.stdout.read() == b""

    with leaves_nothing():
        with_sandbox(action)


def test_signals() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        for send, expected in (
            (lambda process: process.terminate(), -15),
            (lambda process: process.kill(), -9),
            (lambda process: process.send_signal(signal.SIGUSR2), -12),
        ):
            async with await sandbox.popen(["sleep", "300"]) as process:
                send(process)
                assert await process.wait() == expected
                send(process)  # does nothing now
        process = await sandbox.popen(["sleep", "300"])
        process.close()
        process.close()
        with pytest.raises(ValueError):
            await process.wait()
        with pytest.raises(sandboxcore.ProgramNotFound) as caught:
            await sandbox.popen(["/no/such/program"], stdin=aio.PIPE)
        assert (caught.value.stage, caught.value.errno) == ("exec", 2)

    with leaves_nothing():
        with_sandbox(action)


def test_the_timeout_of_a_process() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        async with await sandbox.popen(["sleep", "300"], timeout=0.2) as process:
            assert await process.wait() == -9
            assert process.result.cause is Cause.TIMEOUT

    with_sandbox(action)


def test_events() -> None:
    async def action(sandbox: aio.Sandbox) -> None:
        code = "import os\nfor i in range(500): os.write(1, b'o' * 1000); os.write(2, b'e' * 700)"
        async with await sandbox.popen(python(code)) as process:
            events = [event async for event in process]
        assert isinstance(events[-1], aio.Exit)
        assert events[-1].result.returncode == 0
        for kind, letter, size in ((aio.Stdout, b"o", 500_000), (aio.Stderr, b"e", 350_000)):
            pieces = [event for event in events if isinstance(event, kind)]
            assert b"".join(piece.data for piece in pieces) == letter * size
            assert [piece.offset for piece in pieces[1:]] == [p.offset + len(p.data) for p in pieces[:-1]]
        async with await sandbox.popen(["sh", "-c", "echo 1; read x; echo 2"], stdin=aio.PIPE) as process:
            async for event in process:
                assert event.data == b"1\n"
                break
            process.stdin.write(b"\n")
            assert await process.stdout.read() == b"2\n"  # nobody waits in the stream any more

    with leaves_nothing():
        with_sandbox(action)


def test_events_are_not_lost_by_a_cancellation() -> None:
    code = "import os\nfor i in range(20000): os.write(1 + i % 2, b'%06d' % i)"

    async def action(sandbox: aio.Sandbox) -> None:
        got: dict[type, bytearray] = {aio.Stdout: bytearray(), aio.Stderr: bytearray()}

        async def consume(process: aio.Process) -> bool:
            async for event in process:
                if isinstance(event, aio.Exit):
                    return True
                assert event.offset == len(got[type(event)])
                got[type(event)] += event.data
            return False

        async with await sandbox.popen(python(code)) as process:
            while True:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.002):
                        if await consume(process):
                            break
        for number, kind in enumerate((aio.Stdout, aio.Stderr)):
            assert got[kind] == b"".join(b"%06d" % i for i in range(number, 20000, 2))

    with leaves_nothing():
        with_sandbox(action)


def test_who_reads_slowly_slows_it() -> None:
    """The payload says in a file how far it has come; it stops when pipe and bounded buffer are full."""
    code = """
        import os
        done = 0
        with open('/tmp/far', 'wb', 0) as far:
            while done < 64 << 20:
                done += os.write(1, bytes(65536))
                os.pwrite(far.fileno(), b'%012d' % done, 0)
    """

    async def action(sandbox: aio.Sandbox) -> None:
        async def far() -> int:
            return int((await sandbox.shell("cat /tmp/far")).stdout or 0)

        async with await sandbox.popen(python(code)) as process:
            first = await anext(aiter(process))
            assert first.offset == 0
            last, same = -1, 0
            while same < 10:
                await asyncio.sleep(0.02)
                now = await far()
                same, last = (same + 1 if now == last and now else 0), now
            assert 0 < last < 2 * MIB
            total = len(first.data)
            async for event in process:
                if isinstance(event, aio.Stdout):
                    total += len(event.data)
            assert total == 64 << 20

    with leaves_nothing():
        with_sandbox(action)


def test_200_mib_in_flat_memory() -> None:
    code = "import os\nfor _ in range(3200): os.write(1, bytes(65536))"

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def action(sandbox: aio.Sandbox) -> None:
        await sandbox.exec(python(code.replace("3200", "100")))
        before = peak()
        total = 0
        async with await sandbox.popen(python(code)) as process:
            async for event in process:
                if isinstance(event, aio.Stdout):
                    total += len(event.data)
        assert total == 200 * MIB
        done = await sandbox.exec(python(code), limits=Limits(output="1M"))
        assert (done.stdout_total, len(done.stdout), done.truncated) == (200 * MIB, MIB, True)
        assert peak() - before < 24 << 10

    with_sandbox(action)


def test_outputs_end_with_the_command() -> None:
    """Another command of the sandbox was given the pipe, and keeps it open or even writes."""
    keeper = """
        import array, os, socket, sys
        server = socket.socket(socket.AF_UNIX)
        server.bind('/tmp/door')
        server.listen()
        print('ready', flush=True)
        peer, _ = server.accept()
        _, control, _, _ = peer.recvmsg(1, 4096)
        fds = array.array('i', control[0][2])
        peer.send(b'x')
        while True:
            os.write(fds[0], b'z' * 4096)
    """
    giver = """
        import array, socket, sys
        peer = socket.socket(socket.AF_UNIX)
        peer.connect('/tmp/door')
        peer.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [1]))])
        peer.recv(1)
        print('given', flush=True)
    """

    async def action(sandbox: aio.Sandbox) -> None:
        for how in ("exec", "popen", "pty"):
            await sandbox.shell("rm -f /tmp/door")
            async with await sandbox.popen(python(keeper)) as holder:
                assert await holder.stdout.readline() == b"ready\n"
                async with asyncio.timeout(10):
                    if how == "exec":
                        output = (await sandbox.exec(python(giver))).stdout
                    else:
                        async with await sandbox.popen(python(giver), pty=how == "pty") as process:
                            output, _ = await process.communicate()
                assert b"given" in output
                holder.kill()

    with leaves_nothing():
        with_sandbox(action)
