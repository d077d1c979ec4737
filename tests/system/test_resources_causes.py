"""Why a command ended is what was counted or was done to it, never a guess from its status."""

import signal
import time

import pytest
from resources import (
    LIVING,
    PATIENCE,
    WAYS,
    MiB,
    box,
    load,
    meanwhile,
    needs,
    perform,
    spec,
    started,
    within,
)
from support import host_program, wait_until

import sandboxcore
from sandboxcore import Cause, CommandFailed, Limits, SandboxSpec

pytestmark = pytest.mark.cgroup
every_way = pytest.mark.parametrize("way", WAYS)

EVERY_LIMIT = {"memory": "64M", "pids": 100, "cpu_time": 60}  # and none of them is met


@every_way
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGXCPU])
def test_a_signal_of_its_own(way: str, number: signal.Signals) -> None:
    """The signals that limits use, too, prove nothing."""
    needs("memory")
    done = perform(way, load("raise", int(number)), spec(**EVERY_LIMIT))
    assert (done.returncode, done.cause, done.detail) == (-number, Cause.SIGNALED, ""), done
    assert done.signal is number


@every_way
@pytest.mark.parametrize("status", [1, 137, 152])
def test_a_status_that_looks_like_a_signal(way: str, status: int) -> None:
    needs("memory")
    done = perform(way, load("alloc", 8 * MiB, "exit", status), spec(**EVERY_LIMIT))
    assert (done.returncode, done.cause, done.detail) == (status, Cause.EXITED, ""), done


def test_exit_zero_says_all() -> None:
    needs("memory", "pids")
    done = perform("exec", load("bomb", "exit", 0), spec(memory="256M", pids=20))
    assert (done.cause, done.returncode) == (Cause.EXITED, 0)


@every_way
def test_a_timeout_is_no_lack_of_memory(way: str) -> None:
    needs("memory")
    done = perform(way, load("alloc", 8 * MiB, "hold"), spec(**EVERY_LIMIT), timeout=0.5)
    assert (done.returncode, done.cause) == (-signal.SIGKILL, Cause.TIMEOUT), done


@pytest.mark.parametrize("way", ["popen", "detach"])
def test_killed_by_the_caller(way: str) -> None:
    needs("memory")
    with box(**EVERY_LIMIT) as sandbox:
        if way == "popen":
            with started(sandbox, "say", "ready", "hold") as process:
                process.kill()
                process.wait(PATIENCE)
                done = process.result
        else:
            with sandbox.detach(load("hold")) as command:
                command.kill()
                done = command.wait(PATIENCE)
        assert done is not None
        assert (done.returncode, done.cause, done.detail) == (-signal.SIGKILL, Cause.KILLED, ""), done


@pytest.mark.parametrize("way", LIVING)
def test_killed_with_all_the_others(way: str) -> None:
    """By Sandbox.signal(), which the command cannot tell from a signal of its own."""
    with (
        box() as sandbox,
        meanwhile(lambda: within(sandbox, way, ["sh", "-c", "touch /tmp/there; exec sleep 600"])) as ends,
    ):
        wait_until(lambda: sandbox.files.exists("/tmp/there"), "the command", PATIENCE)
        sandbox.signal(signal.SIGKILL)
    [done] = ends
    assert (done.returncode, done.cause, done.detail) == (-signal.SIGKILL, Cause.KILLED, ""), done


def test_one_commands_lack_of_memory_is_not_anothers_end() -> None:
    """Who ends by a signal of its own while its neighbour is out of memory was not."""
    needs("memory")
    with box(memory="64M") as sandbox, started(sandbox, "say", "ready", "go", "raise", 9) as other:
        assert sandbox.exec(load("alloc", 200 * MiB), timeout=PATIENCE).cause is Cause.OOM
        other.stdin.write(b"g")
        other.wait(PATIENCE)
        assert other.result is not None
        assert other.result.cause is Cause.SIGNALED
        assert sandbox.exec(load("raise", 9), timeout=PATIENCE).cause is Cause.SIGNALED


def test_a_child_that_runs_out_of_memory_takes_the_command_with_it() -> None:
    needs("memory")
    for way in ("run", "exec"):
        began = time.monotonic()
        script = "/load/workload alloc 209715200; sleep 600"
        done = perform(way, ["sh", "-c", script], spec(memory="64M"))
        assert (done.cause, done.returncode) == (Cause.OOM, -signal.SIGKILL), done
        assert time.monotonic() - began < PATIENCE


@every_way
def test_a_child_that_ran_out_of_memory_is_why(way: str) -> None:
    """Also where the command has seen that and ended before it could be killed for it."""
    needs("memory")
    done = perform(way, ["sh", "-c", "/load/workload alloc 209715200; exit 3"], spec(memory="64M"))
    assert (done.cause, done.returncode in (3, -signal.SIGKILL)) == (Cause.OOM, True), done
    assert "limits.memory: 64 MiB, peak " in done.detail


@pytest.mark.slow
def test_a_lack_of_memory_of_all_sandboxes_together_ends_one() -> None:
    """At the limit of the host, the largest goes; every other group is told as well, and runs on."""
    needs("memory")
    code = """
        import threading
        from resources import MiB, load, spec
        from sandboxcore import Limits, host_limits, run
        ends = {}
        def start(name, *steps):
            def body():
                ends[name] = str(run(load(*steps), spec=spec(memory="1G"), timeout=60).cause)
            thread = threading.Thread(target=body)
            thread.start()
            return thread
        run(["true"], spec=spec(memory="1G"))  # there are groups
        host_limits(Limits(memory="256M"))
        try:
            small = start("small", "alloc", 16 * MiB, "burn", 2000)
            start("large", "burn", 300, "alloc", 600 * MiB).join()
            small.join()
        finally:
            host_limits(Limits())
        print(ends["large"], ends["small"])
    """
    done = host_program(code, timeout=PATIENCE)
    assert (done.stdout, done.stderr) == ("oom exited\n", "")


@pytest.mark.parametrize("way", ["run", "exec"])
@pytest.mark.parametrize("stream", [1, 2])
def test_output(way: str, stream: int) -> None:
    """Needs no group at all."""
    described = SandboxSpec(limits=Limits(output="64K", output_action="kill"))
    done = perform(way, ["sh", "-c", f"yes >&{stream}; sleep 600"], described)
    assert (done.cause, done.returncode, done.truncated) == (Cause.OUTPUT, -signal.SIGKILL, True), done
    assert done.detail.startswith("limits.output: 64 KiB, written ")
    assert (len(done.stdout), len(done.stderr)) == ((65536, 0) if stream == 1 else (0, 65536))


@pytest.mark.parametrize("way", ["run", "exec"])
def test_as_much_output_as_allowed(way: str) -> None:
    described = SandboxSpec(limits=Limits(output="64K", output_action="kill"))
    done = perform(way, ["head", "-c", "65536", "/dev/zero"], described)
    assert (done.cause, done.returncode, done.truncated) == (Cause.EXITED, 0, False)


def test_output_is_only_cut_unless_told_otherwise() -> None:
    done = sandboxcore.run(
        ["head", "-c", "200000", "/dev/zero"], spec=SandboxSpec(limits=Limits(output="64K"))
    )
    assert (done.cause, done.returncode, done.truncated) == (Cause.EXITED, 0, True)


def test_check_says_why() -> None:
    needs("memory")
    with box(memory="64M") as sandbox:
        with pytest.raises(CommandFailed, match=r"oom: limits.memory: 64 MiB, peak [0-9.]+ MiB"):
            within(sandbox, "exec", load("alloc", 200 * MiB), check=True)
