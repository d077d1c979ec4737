"""Limits: each holds, and the cause tells which one ended the command."""

import errno
import resource
import signal

import pytest
from support import IS_ROOT, Spec, ask_python, run_python, shell

import sandboxcore
from sandboxcore import Cause, Limits, UnsupportedHost

FORK = """
    import time
    made = 0
    try:
        while made < 100:
            if os.fork() == 0:
                time.sleep(60)
            made += 1
    except OSError as error:
        print(json.dumps([made, error.errno]))
        sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.parametrize("user", [None, 0])
@pytest.mark.parametrize("pids", [1, 5, 20])
def test_pids(pids: int, user: int | None) -> None:
    """The payload itself is one of them, init is not."""
    assert ask_python(FORK, spec=Spec(limits=Limits(pids=pids), user=user)) == [pids - 1, errno.EAGAIN]


def test_pids_of_one_sandbox_do_not_count_in_another() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(ask_python, FORK, spec=Spec(limits=Limits(pids=6))) for _ in range(4)]
        assert [run.result(60) for run in runs] == [[5, errno.EAGAIN]] * 4


def test_threads_count() -> None:
    code = """
        import threading, time
        made = 0
        try:
            while made < 100:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                made += 1
        except RuntimeError:
            print(made, flush=True)
        os._exit(0)
    """
    assert ask_python(code, spec=Spec(limits=Limits(pids=10))) == 9


def test_open_files() -> None:
    code = """
        files = []
        try:
            while len(files) < 1000:
                files.append(os.open('/dev/null', os.O_RDONLY))
        except OSError as error:
            print(json.dumps([files[-1], error.errno]))
    """
    assert ask_python(code, spec=Spec(limits=Limits(open_files=40))) == [39, errno.EMFILE]


def test_file_size() -> None:
    done = shell("exec head -c 100000 /dev/zero > big", spec=Spec(limits=Limits(file_size=65536)))
    assert (done.returncode, done.cause) == (-signal.SIGXFSZ, Cause.DISK)
    kept = shell("head -c 100000 /dev/zero > big; stat -c %s big", spec=Spec(limits=Limits(file_size="64K")))
    assert kept.stdout == b"65536\n"


def test_cpu_time() -> None:
    done = run_python("while True: pass", spec=Spec(limits=Limits(cpu_time=1)), timeout=30)
    assert (done.returncode, done.cause) == (-signal.SIGXCPU, Cause.CPU_TIME)
    assert 0.8 <= done.usage.cpu_user + done.usage.cpu_system <= 2.5


def test_cpu_time_of_one_that_ignores_the_warning() -> None:
    code = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    done = run_python(code, spec=Spec(limits=Limits(cpu_time=0.5)), timeout=30)  # rounded up to 1 s
    assert (done.returncode, done.cause) == (-signal.SIGKILL, Cause.CPU_TIME)


def test_wall_time() -> None:
    spec = Spec(limits=Limits(wall_time=0.2))
    done = sandboxcore.run(["sleep", "30"], spec=spec)
    assert (done.returncode, done.cause) == (-signal.SIGKILL, Cause.TIMEOUT)
    assert 0.15 < done.duration < 5
    assert sandboxcore.run(["sleep", "30"], spec=spec, timeout=20).timed_out  # the smaller holds
    assert sandboxcore.run(["sleep", "30"], spec=Spec(limits=Limits(wall_time=20)), timeout=0.2).timed_out


FILL = """
    import errno
    total = 0
    try:
        for number in range(64):
            with open(f'{sys.argv[1 + number % (len(sys.argv) - 1)]}/{number}', 'wb', buffering=0) as file:
                for _ in range(4):
                    total += file.write(bytes(65536))
    except OSError as error:
        print(json.dumps([total, error.errno]))
"""


def test_disk_is_one_budget_for_all_private_directories() -> None:
    spec = Spec(limits=Limits(disk="2M"))
    total, number = ask_python(FILL, "/tmp", "/workspace", "/dev/shm", "/var/tmp", spec=spec)
    assert number == errno.ENOSPC
    assert 1.9 * (1 << 20) <= total <= 1 << 21


def test_inodes_are_one_budget() -> None:
    code = """
        made = 0
        try:
            while made < 5000:
                open(f'{("/tmp", "/workspace", "/dev/shm")[made % 3]}/{made}', 'x').close()
                made += 1
        except OSError as error:
            print(json.dumps([made, error.errno]))
    """
    made, number = ask_python(code, spec=Spec(limits=Limits(inodes=200)))
    assert number == errno.ENOSPC
    assert 180 <= made <= 200


def test_no_limits_at_all() -> None:
    none = dict.fromkeys(("pids", "open_files", "output", "disk", "inodes"))
    assert shell("echo hello", spec=Spec(limits=Limits(**none))).stdout == b"hello\n"


def test_limits_of_the_record() -> None:
    limits = Limits(open_files=100, file_size=1 << 20, cpu_time=3)
    done = sandboxcore.run(["true"], spec=Spec(limits=limits), record=True)
    assert done.capabilities is not None
    found = done.capabilities.limits
    assert found["Max open files"] == (100, 100)
    assert found["Max file size"] == (1 << 20, 1 << 20)
    assert found["Max cpu time"][0] == 3
    assert found["Max core file size"] == (1, 1)  # 0 would still start a pipe of core_pattern


@pytest.mark.skipif(IS_ROOT, reason="root may raise its limits")
def test_more_than_the_hard_limit_is_refused() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(UnsupportedHost, match="hard limit"):
        sandboxcore.run(["true"], spec=Spec(limits=Limits(open_files=hard + 1)))
