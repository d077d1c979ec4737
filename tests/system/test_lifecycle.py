"""How a command ends, that everything of it ends with it, and what the host program notices: nothing."""

import asyncio
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import (
    Spec,
    can_grant,
    gone,
    host_process,
    host_program,
    kill_spawners,
    marked,
    run_python,
    sandbox_processes,
    shell,
    spawner_pids,
    wait_until,
)

import sandboxcore
from sandboxcore import Cause, Sandbox

pytestmark = pytest.mark.once

# --- by itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [*range(4), 42, *range(124, 131), 254, 255])
def test_exit_codes(code: int) -> None:
    done = shell('exit "$1"', str(code))
    assert (done.returncode, done.exit_code, done.signal, done.ok) == (code, code, None, code == 0)
    assert done.cause is Cause.EXITED


ENDING = sorted(
    set(signal.valid_signals())
    - {signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH}
    - {signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
)


def test_every_signal() -> None:
    """One sandbox for each; the payload takes the default action."""
    code = """
        import os, signal, sys
        number = int(sys.argv[1])
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    """
    for number in ENDING:
        done = run_python(code, str(int(number)))
        assert (done.returncode, done.signal) == (-number, number)
        expected = {signal.SIGSYS: Cause.SECCOMP}.get(number, Cause.SIGNALED)
        assert done.cause is expected, number
        assert not done.timed_out


def test_usage_and_timings() -> None:
    done = run_python("x = b'x' * (50 << 20)\nfor _ in range(2000000): pass")
    assert done.usage.cpu_user > 0.01
    assert done.usage.max_rss > 50 << 20
    assert set(done.timings) == {"queue", "clone", "setup", "drop", "run", "collect"}
    assert all(seconds >= 0 for seconds in done.timings.values())
    assert done.duration == done.timings["run"] < 30


# --- by the clock -----------------------------------------------------------------------------------

TREE = """
    import os, signal, subprocess, sys, time
    mark = sys.argv[1]
    sleeper = [sys.executable, '-I', '-S', '-c', 'import time; time.sleep(300)', mark]
    def daemon(stop):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                    signal.signal(number, signal.SIG_IGN)
                child = subprocess.Popen(sleeper)
                if stop:
                    os.kill(child.pid, signal.SIGSTOP)
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(300)
            os._exit(0)
        os.wait()
    daemon(False)
    daemon(True)
    print('partial', flush=True)
    print('error', file=sys.stderr, flush=True)
    subprocess.run(sleeper)
"""


def test_timeout_kills_the_whole_tree_and_keeps_the_output() -> None:
    mark = f"timeout-{os.getpid()}-{time.monotonic_ns()}"
    began = time.monotonic()
    done = run_python(TREE, mark, timeout=1.5)
    assert marked(mark) == set()
    assert (done.returncode, done.cause, done.timed_out) == (-9, Cause.TIMEOUT, True)
    assert (done.stdout, done.stderr) == (b"partial\n", b"error\n")
    assert 1.4 < time.monotonic() - began < 10


def test_the_result_comes_when_the_tree_is_gone() -> None:
    mark = f"left-{os.getpid()}-{time.monotonic_ns()}"
    code = TREE.replace("subprocess.run(sleeper)", "subprocess.Popen(sleeper)")
    for _ in range(5):
        done = run_python(code, mark)
        assert marked(mark) == set()
        assert (done.returncode, done.stdout) == (0, b"partial\n")


@pytest.mark.parametrize("timeout", [0, -1, 1e-9, 1e-4, 1e-3, 0.01])
def test_tiny_timeouts(timeout: float) -> None:
    for _ in range(10):
        done = sandboxcore.run(["sleep", "30"], timeout=timeout)
        assert (done.returncode, done.cause) == (-9, Cause.TIMEOUT)
    assert wait_until(lambda: all(map(gone, sandbox_processes())) or _only_makers(), "the end of all")


def _only_makers() -> bool:
    """Left are only the spawners' own helpers, which no run adds to."""
    return len(sandbox_processes()) <= 2 * len(spawner_pids())


def test_a_command_that_ends_in_time_is_not_timed_out() -> None:
    for timeout in (20, 1e9, 1e30):
        assert sandboxcore.run(["true"], timeout=timeout).cause is Cause.EXITED


def test_timeout_of_one_that_is_stopped() -> None:
    done = shell("kill -STOP $$", timeout=0.5)
    assert (done.returncode, done.cause) == (-9, Cause.TIMEOUT)


def test_timeout_while_the_input_is_stuck() -> None:
    done = sandboxcore.run(["sleep", "30"], input=bytes(10 << 20), timeout=0.3)
    assert done.timed_out


def test_timeout_with_check() -> None:
    with pytest.raises(sandboxcore.SandboxTimeout) as caught:
        shell("echo partial; sleep 30", timeout=0.5, check=True)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.result.stdout == b"partial\n"


# --- from outside -----------------------------------------------------------------------------------


def test_a_sandbox_that_is_killed_from_outside() -> None:
    """Its init, the parent of the payload, ends by another's hand."""
    sandboxcore.run(["true"])
    before = sandbox_processes()
    mark = f"killed-{os.getpid()}-{time.monotonic_ns()}"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(shell, "echo partial; sleep 60; true", mark, timeout=50)
        payload = wait_until(lambda: marked(mark), "the payload").pop()
        wait_until(lambda: Path(f"/proc/{payload}/task/{payload}/children").read_text() or True, "its child")
        init = int(Path(f"/proc/{payload}/stat").read_text().rpartition(")")[2].split()[1])
        assert init not in before
        os.kill(init, signal.SIGKILL)
        done = run.result(20)
    assert (done.returncode, done.cause) == (-9, Cause.KILLED)
    assert marked(mark) == set()


INTERRUPTED = """
    import sandboxcore, sys
    try:
        print('go', flush=True)
        sandboxcore.run(['sh', '-c', 'sleep 60; true', sys.argv[1]])
    except KeyboardInterrupt:
        from support import marked
        left = [p for p in marked(sys.argv[1]) if 'sh' == open(f'/proc/{p}/comm').read().strip()]
        print('interrupted', left, flush=True)
        print(sandboxcore.run(['echo', 'next'], text=True).stdout, end='')
"""


def payloads(mark: str) -> set[int]:
    """The marked shells; the host program itself has the mark in its arguments, too."""
    found = set()
    for pid in marked(mark):
        try:
            if Path(f"/proc/{pid}/comm").read_text().strip() == "sh":
                found.add(pid)
        except OSError:
            continue
    return found


def test_ctrl_c() -> None:
    mark = f"ctrl-c-{os.getpid()}-{time.monotonic_ns()}"
    with host_process(INTERRUPTED, mark) as host:
        wait_until(lambda: payloads(mark), "the payload")
        host.send_signal(signal.SIGINT)
        out, err = host.communicate(timeout=30)
    assert (host.returncode, out) == (0, "go\ninterrupted []\nnext\n"), err


@pytest.mark.parametrize("stdout", ["PIPE", "devnull"])
def test_ctrl_c_while_output_never_pauses(stdout: str) -> None:
    """The streams are always ready, so no call of the loop ever waits."""
    code = """
        import sys, sandboxcore
        limits = sandboxcore.Limits(output=1000)
        out = sandboxcore.PIPE if sys.argv[1] == 'PIPE' else open('/dev/null', 'wb')
        try:
            print('go', flush=True)
            spec = sandboxcore.SandboxSpec(limits=limits)
            sandboxcore.run(['cat', '/dev/zero'], stdout=out, spec=spec, timeout=20)
        except KeyboardInterrupt:
            print('interrupted')
    """
    with host_process(code, stdout) as host:
        assert host.stdout.readline() == "go\n"
        time.sleep(0.3)  # let it reach its stride; however far it got, the answer is the same
        host.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = host.communicate(timeout=60)
    assert out == "interrupted\n", err
    assert time.monotonic() - began < 5


def test_ctrl_c_reaches_only_the_host() -> None:
    """The terminal signals its whole foreground group; neither spawner nor payload is in it."""
    code = """
        import os, sandboxcore
        print(os.getpgrp(), sandboxcore.run(['sh', '-c', 'kill -INT 0; echo no']).returncode)
    """
    done = host_program(code, start_new_session=True)
    assert done.stdout.split()[1:] == ["-2"], done


def test_a_signal_handler_runs_meanwhile_and_the_run_goes_on() -> None:
    code = """
        import signal, sandboxcore
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        done = sandboxcore.run(['sh', '-c', 'sleep 0.5; echo out; exit 7'])
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(done.returncode, done.stdout, len(seen) > 10)
    """
    done = host_program(code)
    assert done.stdout == "7 b'out\\n' True\n", done.stderr


def test_an_exception_of_a_signal_handler_ends_the_sandbox() -> None:
    mark = f"alarm-{os.getpid()}-{time.monotonic_ns()}"
    code = """
        import signal, sys, sandboxcore
        class Enough(Exception): pass
        def stop(*_): raise Enough
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            sandboxcore.run(['sh', '-c', 'sleep 60; true', sys.argv[1]])
        except Enough:
            print('enough')
    """
    done = host_program(code, mark)
    assert done.stdout == "enough\n", done.stderr
    assert marked(mark) == set()


def test_a_host_that_is_killed_takes_its_sandboxes_along() -> None:
    mark = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    code = """
        import sys, threading, sandboxcore
        runs = [threading.Thread(target=sandboxcore.run, args=(['sh', '-c', 'sleep 60; true', sys.argv[1]],))
                for _ in range(3)]
        for run in runs:
            run.start()
        from support import spawner_pids, wait_until
        wait_until(spawner_pids, 'a spawner')
        print(*spawner_pids(), flush=True)
        runs[0].join()
    """
    with host_process(code, mark) as host:
        spawner = int(host.stdout.readline().split()[0])
        wait_until(lambda: len(payloads(mark)) == 3, "the payloads")
        host.kill()
        host.wait(10)
        wait_until(lambda: not payloads(mark), "the end of the payloads", 2)
        wait_until(lambda: gone(spawner), "the end of the spawner", 2)


def test_a_host_that_exits_leaves_no_spawner() -> None:
    code = """
        import sandboxcore
        from support import spawner_pids, sandbox_processes
        sandboxcore.run(['true'])
        sandboxcore.run(['true'], spec=sandboxcore.SandboxSpec(network='host'))
        print(*spawner_pids(), *sandbox_processes())
    """
    done = host_program(code)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 2, done.stderr
    for pid in pids:
        wait_until(lambda pid=pid: gone(pid), f"the end of {pid}", 5)


# --- the spawner ------------------------------------------------------------------------------------


def test_a_spawner_that_was_killed_is_replaced() -> None:
    for _ in range(3):
        assert sandboxcore.run(["echo", "x"]).stdout == b"x\n"
        first = spawner_pids()
        kill_spawners()
        assert sandboxcore.run(["echo", "x"]).stdout == b"x\n"
        assert not set(first) & set(spawner_pids())


def test_a_spawner_survives_a_broken_pipe() -> None:
    """It gets one when an init is killed in the moment in which it is told to go."""
    sandboxcore.run(["true"])
    before = spawner_pids()
    for pid in before:
        os.kill(pid, signal.SIGPIPE)
    broken = ["sh", "-c", "kill -PIPE $$"]  # no payload inherits what keeps it alive
    assert sandboxcore.run(broken).signal == signal.SIGPIPE
    with Sandbox(Spec()) as sandbox:
        assert sandbox.exec(broken).signal == signal.SIGPIPE
    assert spawner_pids() == before


def test_running_commands_survive_their_spawner(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    can_grant(shared)
    spec = Spec(rw=[(shared, "/s")])
    with ThreadPoolExecutor(1) as pool:
        script = "echo begin; touch /s/begun; until [ -e /s/go ]; do sleep 0.01; done; echo end; exit 5"
        run = pool.submit(shell, script, spec=spec, timeout=50)
        wait_until((shared / "begun").exists, "the payload")
        kill_spawners()
        (shared / "go").touch()
        done = run.result(30)
    assert (done.returncode, done.stdout, done.cause) == (5, b"begin\nend\n", Cause.EXITED)
    assert sandboxcore.run(["true"]).ok


def test_a_maker_of_network_namespaces_that_was_killed_is_replaced() -> None:
    """With its spawner, which can do nothing without it."""
    code = """
        import os
        import sandboxcore
        from pathlib import Path
        from support import gone, spawner_pids, wait_until
        assert sandboxcore.run(["true"]).ok
        (pid,) = spawner_pids()
        tasks = Path(f"/proc/{pid}/task/{pid}/children")
        wait_until(lambda: len(tasks.read_text().split()) == 1, "the end of what ran")
        maker = int(tasks.read_text())
        assert Path(f"/proc/{maker}/comm").read_text() == "sbx-netns\\n"
        os.kill(maker, 9)
        wait_until(lambda: gone(maker), "its end")
        assert sandboxcore.run(["true"]).ok
        wait_until(lambda: gone(pid), "the end of its spawner")
        print("replaced")
    """
    done = host_program(code)
    assert (done.stdout, done.stderr) == ("replaced\n", "")


def test_many_threads_whose_spawner_is_killed() -> None:
    """Whatever was not sent is tried again; what was may fail, clearly; nothing hangs."""
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = [0] * 4

    def work(index: int) -> None:
        while not stop.is_set():
            try:
                assert sandboxcore.run(["true"], timeout=20).returncode == 0
                counts[index] += 1
            except sandboxcore.SetupError as error:
                if error.stage != "spawner":
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        wait_until(spawner_pids, "a spawner")
        kill_spawners()
        reached = list(counts)
        wait_until(lambda reached=reached: counts > reached and sum(counts) > sum(reached) + 4, "more runs")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert failures == []


# --- forks and threads of the host ------------------------------------------------------------------


def test_fork_of_the_host() -> None:
    """Parent and child run commands at the same time, each through its own spawner."""
    code = """
        import os, sys, sandboxcore
        from support import spawner_pids
        assert sandboxcore.run(['true']).ok
        first = spawner_pids()
        source, sink = os.pipe()
        child = os.fork()
        for number in range(20):
            done = sandboxcore.run(['echo', str(number)])
            assert done.stdout == b'%d\\n' % number
        if child == 0:
            os.write(sink, repr(spawner_pids()).encode())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        theirs = eval(os.read(source, 100))
        assert spawner_pids() == first and not set(first) & set(theirs), (first, theirs)
        assert sandboxcore.run(['true']).ok
        print('fine')
    """
    done = host_program(code)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.skipif(
    "SBX_SANITIZE" in os.environ,
    reason="AddressSanitizer's own allocator deadlocks in the fork of a threaded process",
)
def test_fork_while_threads_run() -> None:
    code = """
        import os, threading, warnings, sandboxcore
        warnings.simplefilter('ignore')
        sandboxcore.run(['true'])  # a fork during another thread's import would deadlock by itself
        stop = threading.Event()
        def work():
            while not stop.is_set():
                sandboxcore.run(['true'])
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads: thread.start()
        for _ in range(10):
            child = os.fork()
            if child == 0:
                os._exit(0 if sandboxcore.run(['true'], timeout=20).ok else 1)
            assert os.waitpid(child, 0)[1] == 0
        stop.set()
        for thread in threads: thread.join()
        print('fine')
    """
    done = host_program(code)
    assert done.stdout == "fine\n", done.stderr


def test_multiprocessing() -> None:
    code = """
        import multiprocessing as mp, sandboxcore
        def work(number):
            return sandboxcore.run(['echo', str(number)], text=True).stdout
        if __name__ == '__main__':
            work(0)
            with mp.get_context('fork').Pool(3) as pool:
                print(''.join(pool.map(work, range(12))).split() == [str(n) for n in range(12)])
    """
    done = host_program(code)
    assert done.stdout == "True\n", done.stderr


def test_many_threads() -> None:
    def work(number: int) -> list[int]:
        return [
            index
            for index in range(50)
            if sandboxcore.run(["echo", f"{number}.{index}"], text=True, timeout=60).stdout
            != f"{number}.{index}\n"
        ]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


def test_asyncio() -> None:
    async def main() -> list[bytes]:
        runs = [
            asyncio.to_thread(sandboxcore.run, ["sh", "-c", f"sleep 0.1; echo {n}"], timeout=30)
            for n in range(20)
        ]
        return [done.stdout for done in await asyncio.gather(*runs)]

    assert asyncio.run(main()) == [b"%d\n" % n for n in range(20)]


# --- what the host notices --------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["count", "SIG_IGN", "SIG_DFL"])
def test_sigchld_of_the_host_is_untouched(action: str) -> None:
    code = """
        import os, signal, sys, sandboxcore
        seen = []
        handler = getattr(signal, sys.argv[1], lambda *_: seen.append(1))
        signal.signal(signal.SIGCHLD, handler)
        for _ in range(20):
            assert sandboxcore.run(['sh', '-c', 'sleep 0 & exit 3']).returncode == 3
        try:
            os.waitpid(-1, os.WNOHANG)
            print('a child')
        except ChildProcessError:
            print('none')
        print(len(seen), signal.getsignal(signal.SIGCHLD) == handler)
    """
    done = host_program(code, action)
    assert done.stdout == "none\n0 True\n", done.stderr


def test_a_child_of_the_hosts_own_can_still_be_waited_for() -> None:
    code = """
        import subprocess, sandboxcore
        child = subprocess.Popen(['sh', '-c', 'exit 9'])
        for _ in range(5):
            sandboxcore.run(['true'])
        print(child.wait(10))
    """
    assert host_program(code).stdout == "9\n"


def test_blocked_signals_of_the_host_are_not_the_payloads() -> None:
    code = """
        import signal, sandboxcore
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        done = sandboxcore.run(['grep', '-E', '^Sig(Blk|Ign)', '/proc/self/status'], text=True)
        print(done.stdout)
    """
    done = host_program(code)
    assert done.stdout.split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16], done


def test_ignored_signals_of_the_host_are_not_the_payloads() -> None:
    code = """
        import signal, sandboxcore
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        print(sandboxcore.run(['grep', '^SigIgn', '/proc/self/status'], text=True).stdout)
    """
    assert host_program(code).stdout.split() == ["SigIgn:", "0" * 16]


def test_umask_and_cwd_of_the_host_are_not_the_payloads(tmp_path: Path) -> None:
    code = """
        import os, sys, sandboxcore
        os.umask(0o777)
        os.chdir(sys.argv[1])
        print(sandboxcore.run(['sh', '-c', 'umask; pwd'], text=True).stdout)
    """
    assert host_program(code, str(tmp_path)).stdout.split() == ["0022", "/workspace"]


def test_nice_is_inherited_and_harmless() -> None:
    code = "import os, sandboxcore; os.nice(5); print(sandboxcore.run(['nice'], text=True).stdout)"
    assert host_program(code).stdout.split() == ["5"]
