"""Living sandboxes: their states."""

import contextlib
import gc
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from living import SLEEP, sandbox, shared
from support import descendants, gone, host_process, host_program, leaves_nothing, wait_until

import sandboxcore
from sandboxcore import (
    Cause,
    InvalidTransition,
    Sandbox,
    SandboxGone,
    SandboxSpec,
    SandboxState,
    SpecError,
    host,
    plan,
    spawner,
)

__all__ = ["sandbox", "shared"]  # fixtures


def test_created_and_started_apart() -> None:
    sandbox = Sandbox(name="mine", labels={"a": "b"}, metadata={"n": 1}, owner="me", description="d")
    assert sandbox.state is SandboxState.CREATED
    assert (sandbox.name, sandbox.labels, sandbox.metadata) == ("mine", {"a": "b"}, {"n": 1})
    assert (sandbox.owner, sandbox.description, sandbox.pid) == ("me", "d", 0)
    assert sandbox.started_at is None
    sandbox.start()
    assert sandbox.state is SandboxState.RUNNING
    assert sandbox.started_at is not None
    assert sandbox.created_at <= sandbox.started_at <= time.time()
    pid = sandbox.pid
    assert not gone(pid)
    sandbox.close()
    assert sandbox.state is SandboxState.DESTROYED
    assert sandbox.stopped_at is not None
    wait_until(lambda: gone(pid), "the end of init")


def test_spec_errors_come_before_anything_starts() -> None:
    with pytest.raises(SpecError):
        Sandbox(SandboxSpec(ro=["/nowhere/at/all"]))


def test_close_is_idempotent_and_legal_from_every_state() -> None:
    for prepare in ("", "start", "start suspend", "start stop", "start suspend stop", "close"):
        sandbox = Sandbox()
        for step in prepare.split():
            getattr(sandbox, step)()
        sandbox.close()
        sandbox.close()
        assert sandbox.state is SandboxState.DESTROYED


OPERATIONS = {
    "start": lambda sandbox: sandbox.start(),
    "suspend": lambda sandbox: sandbox.suspend(),
    "resume": lambda sandbox: sandbox.resume(),
    "stop": lambda sandbox: sandbox.stop(),
    "exec": lambda sandbox: sandbox.exec(["true"]),
    "popen": lambda sandbox: sandbox.popen(["true"]).close(),
    "signal": lambda sandbox: sandbox.signal(signal.SIGTERM),
    "capabilities": lambda sandbox: sandbox.capabilities,
}
LEGAL = {
    "created": {"start"},
    "running": {"suspend", "stop", "exec", "popen", "signal", "capabilities"},
    "paused": {"resume", "stop"},
    "stopped": {"start"},
    "destroyed": set(),
}
WAYS = {
    "created": "",
    "running": "start",
    "paused": "start suspend",
    "stopped": "start stop",
    "destroyed": "start close",
}


@pytest.mark.parametrize("state", LEGAL)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_in_every_state(state: str, operation: str) -> None:
    sandbox = Sandbox()
    try:
        for step in WAYS[state].split():
            getattr(sandbox, step)()
        assert sandbox.state == state
        if operation in LEGAL[state]:
            OPERATIONS[operation](sandbox)
        else:
            with pytest.raises(InvalidTransition) as caught:
                OPERATIONS[operation](sandbox)
            assert caught.value.state == state
            assert sandbox.state == state, "a refusal changes nothing"
    finally:
        sandbox.close()


def test_a_stopped_one_starts_again_and_is_empty() -> None:
    with Sandbox() as sandbox:
        assert sandbox.exec(["sh", "-c", "echo old > /workspace/a; echo old > /tmp/b"]).ok
        first = sandbox.pid
        sandbox.stop()
        assert gone(first)
        assert sandbox.stopped_at is not None
        sandbox.start()
        assert sandbox.stopped_at is None
        assert sandbox.exec(["ls", "/workspace", "/tmp"]).stdout == b"/tmp:\n\n/workspace:\n"


def test_with_statement_closes_after_an_exception() -> None:
    with contextlib.suppress(KeyError), Sandbox() as sandbox:
        process = sandbox.popen(SLEEP)
        raise KeyError
    assert sandbox.state is SandboxState.DESTROYED
    assert process.wait(5) == -9
    process.close()


def test_with_statement_takes_a_started_one() -> None:
    with Sandbox.create() as sandbox:
        assert sandbox.exec(["true"]).ok


def test_close_waits_for_commands() -> None:
    sandbox = Sandbox.create()
    with sandbox.popen(SLEEP) as process:
        pid = process.pid
        sandbox.close()
        assert gone(pid)
        assert process.wait(5) == -9
        assert process.result is not None
        assert process.result.cause is Cause.KILLED


@pytest.mark.parametrize("how", ["close", "stop", "kill"])
def test_its_end_while_exec_runs_in_another_thread(how: str) -> None:
    sandbox = Sandbox.create()
    results: list[object] = []

    def work() -> None:
        try:
            results.append(sandbox.exec(SLEEP))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: len(descendants(sandbox.pid)) > 1, "the command")
    if how == "kill":
        os.kill(sandbox.pid, signal.SIGKILL)
    else:
        getattr(sandbox, how)()
    thread.join(10)
    (result,) = results
    assert isinstance(result, sandboxcore.ExecResult)
    assert (result.returncode, result.cause) == (-9, Cause.KILLED)
    wait_until(lambda: sandbox.state == ("destroyed" if how == "close" else "stopped"), "the state")
    sandbox.close()


@pytest.mark.parametrize("round", range(5))
def test_exec_while_it_closes(round: int) -> None:
    """Whatever the moment: a result, or an exception of ours; and never another sandbox's command."""
    sandbox, bystander = Sandbox.create(), Sandbox.create()
    bystander.exec(["sh", "-c", "echo bystander > /tmp/name"])
    allowed = (SandboxGone, InvalidTransition)
    outcomes: list[object] = []

    def work() -> None:
        with contextlib.suppress(InvalidTransition, SandboxGone):
            while True:
                try:
                    outcomes.append(sandbox.exec(["cat", "/tmp/name"]))
                except Exception as error:
                    outcomes.append(error)
                    raise

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(outcomes) > 10 * round, "some commands")
    sandbox.close()
    fresh = [Sandbox.create() for _ in range(3)]  # they get the descriptors' numbers
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    for outcome in outcomes:
        if isinstance(outcome, sandboxcore.ExecResult):
            assert outcome.stdout == b""
            assert outcome.cause in (Cause.EXITED, Cause.KILLED)
        else:
            assert isinstance(outcome, allowed), outcome
    assert all(other.exec(["true"]).ok for other in (bystander, *fresh))
    for other in (bystander, *fresh):
        other.close()


def test_killed_from_outside_it_is_stopped_and_can_start_again() -> None:
    with Sandbox() as sandbox:
        process = sandbox.popen(SLEEP)
        os.kill(sandbox.pid, signal.SIGKILL)
        assert process.wait(5) == -9
        assert process.result is not None
        assert process.result.cause is Cause.KILLED
        process.close()
        with contextlib.suppress(SandboxGone, InvalidTransition):
            # or its last launcher is about to die, with the request
            assert sandbox.exec(["true"]).cause is Cause.KILLED
        wait_until(lambda: sandbox.state is SandboxState.STOPPED, "the state")
        with pytest.raises(InvalidTransition):
            sandbox.exec(["true"])
        sandbox.start()
        assert sandbox.exec(["true"]).ok


def test_exec_of_one_killed_just_now() -> None:
    for _ in range(10):
        with Sandbox() as sandbox:
            os.kill(sandbox.pid, signal.SIGKILL)
            try:
                result = sandbox.exec(["true"])
            except (SandboxGone, InvalidTransition):
                continue
            assert result.cause in (Cause.KILLED, Cause.EXITED)


def test_it_ends_with_its_host_process() -> None:
    program = """
    import sys
    from sandboxcore import Sandbox
    sandbox = Sandbox.create()
    process = sandbox.popen(["sleep", "600"])
    print(sandbox.pid, process.pid, flush=True)
    sys.stdin.read()
    """
    with host_process(program) as host:
        assert host.stdout is not None
        pids = [int(text) for text in host.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(gone, pids))
        host.kill()
        host.wait(10)
        wait_until(lambda: all(map(gone, pids)), "the end of everything")


def test_interpreter_exit_without_close() -> None:
    done = host_program(
        """
        from sandboxcore import Sandbox
        sandbox = Sandbox.create()
        process = sandbox.popen(["sleep", "600"], stdin=-1)
        print(sandbox.pid, process.pid, flush=True)
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(text) for text in done.stdout.split()]
    wait_until(lambda: all(map(gone, pids)), "the end of everything")


def test_a_forked_child_neither_uses_nor_ends_it() -> None:
    done = host_program(
        """
        import os, signal, sys
        from sandboxcore import Sandbox, SandboxGone
        sandbox = Sandbox.create()
        for leave in ("exit", "raise", "close", "forget"):
            with sandbox.popen(["cat"], stdin=-1) as process:
                child = os.fork()
                if child == 0:
                    for use in (lambda: sandbox.exec(["true"]), lambda: sandbox.popen(["true"]),
                                lambda: sandbox.signal(15), sandbox.suspend):
                        try:
                            use()
                        except SandboxGone:
                            continue
                        os._exit(1)
                    for use in (process.poll, process.wait, process.kill):
                        try:
                            use()
                        except ChildProcessError:
                            continue
                        os._exit(2)
                    if leave == "exit":
                        os._exit(0)
                    if leave == "raise":
                        sys.exit(0)
                    if leave == "close":
                        process.close()
                        sandbox.close()
                    if leave == "forget":
                        del process, sandbox
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, leave
                assert process.poll() is None, leave
                assert process.communicate(b"alive")[0] == b"alive", leave
                assert process.returncode == 0
            assert sandbox.exec(["true"]).ok
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("attempts", [1, 2])
def test_forgotten_sandboxes_end(attempts: int) -> None:
    """At once, also where the spawner had forgotten the plan: an error that was handled keeps nobody."""
    spec = SandboxSpec(hostname=f"forgotten{attempts}")
    Sandbox.create().close()  # there is a spawner
    with leaves_nothing():
        if attempts == 2:
            compiled = plan.compile_plan(spec, host.features())
            spawner.get_spawner(compiled).known.add(compiled.id)
        gc.disable()
        try:
            sandbox = Sandbox.create(spec)
            pid = sandbox.pid
            del sandbox
            wait_until(lambda: gone(pid), "its end")
        finally:
            gc.enable()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_suspend_really_stops(sandbox: Sandbox) -> None:
    with sandbox.popen(["sh", "-c", "while :; do echo x; done"]) as process:
        assert process.stdout.read(2) == b"x\n"
        pid = process.pid
        sandbox.suspend()
        assert sandbox.state is SandboxState.PAUSED
        everything = {pid, *descendants(sandbox.pid)}
        wait_until(lambda: {state(pid) for pid in everything} == {"T"}, "all of it to have stopped")
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read():
            pass  # what the pipe still held
        with pytest.raises(InvalidTransition):
            sandbox.exec(["true"])
        assert process.poll() is None
        assert not process.stdout.read()
        sandbox.resume()
        os.set_blocking(process.stdout.fileno(), True)
        assert process.stdout.read(2)
        assert sandbox.exec(["true"], timeout=20).ok
        process.kill()


def test_suspended_ones_can_end() -> None:
    for end in ("close", "stop"):
        sandbox = Sandbox.create()
        process = sandbox.popen(SLEEP)
        pid = process.pid
        sandbox.suspend()
        getattr(sandbox, end)()
        wait_until(lambda pid=pid: gone(pid), "the end")
        assert process.wait(5) == -9
        process.close()
        sandbox.close()


def test_clocks_run_on_while_suspended(sandbox: Sandbox) -> None:
    """A time limit is of the wall clock: it strikes as soon as the sandbox goes on."""
    with sandbox.popen(SLEEP, timeout=0.3) as process:
        sandbox.suspend()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.6)
        sandbox.resume()
        assert process.wait(2) == -9
        assert process.result is not None
        assert process.result.cause is Cause.TIMEOUT


def test_signal_reaches_every_command(sandbox: Sandbox) -> None:
    trap = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 0.05; done"
    processes = [sandbox.popen(["sh", "-c", trap]) for _ in range(3)]
    for process in processes:
        assert process.stdout.read(6) == b"ready\n"
    sandbox.signal(signal.SIGTERM)
    for process in processes:
        # (the sleep in it, too, has got the signal)
        assert process.stdout.read() in (b"term\n", b"Terminated\nterm\n")
        assert process.wait(5) == 3
        process.close()
    with sandbox.popen(SLEEP) as process:
        sandbox.signal(signal.SIGKILL)
        assert process.wait(5) == -9
    assert sandbox.exec(["true"]).ok
    for number in (signal.SIGSTOP, signal.SIGCONT):
        with pytest.raises(ValueError, match="suspend"):
            sandbox.signal(number)


def test_what_it_reports_of_itself(shared: Sandbox) -> None:
    applied = shared.capabilities
    assert applied.no_new_privs
    assert applied.seccomp_mode == 2
    assert not any(applied.capability_sets.values())
    recorded = shared.exec(["true"], record=True).capabilities
    assert recorded is not None
    assert recorded.seccomp_filters == applied.seccomp_filters
    assert recorded.mounts == applied.mounts
