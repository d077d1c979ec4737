"""stdin, stdout and stderr: every byte, in both directions at once, without deadlock or surprise."""

import io
import os
import random
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from support import PYTHON, Spec, ask_python, host_program, run_python, shell

import sandboxcore
from sandboxcore import DEVNULL, PIPE, STDOUT, Cause, Limits

pytestmark = pytest.mark.once

MIB = 1 << 20


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


# --- stdin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4095, 65536, 65537, MIB + 1, 32 * MIB])
def test_bytes_go_through_unchanged(size: int) -> None:
    data = noise(size)
    done = sandboxcore.run(["cat"], input=data, timeout=60)
    assert done.ok
    assert done.stdout == data
    assert (done.stdout_total, done.stderr_total, done.truncated) == (size, 0, False)


def test_both_outputs_and_the_input_at_once() -> None:
    """A payload that writes much before it reads, on both streams."""
    code = """
        import os, sys
        for fd in (1, 2):
            os.write(fd, b'%d' % fd * 300000)
        data = sys.stdin.buffer.read()
        for fd in (2, 1):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view[:100000]):]
    """
    data = noise(8 * MIB)
    done = run_python(code, input=data)
    assert done.stdout == b"1" * 300000 + data
    assert done.stderr == b"2" * 300000 + data


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview], ids=lambda kind: kind.__name__)
def test_bytes_like_input(make: type) -> None:
    assert sandboxcore.run(["cat"], input=make(b"abc")).stdout == b"abc"


def test_stdin_is_the_null_device_unless_told_otherwise() -> None:
    for stdin in (None, DEVNULL):
        done = shell("readlink /proc/self/fd/0; cat", stdin=stdin)
        assert done.stdout == b"/dev/null\n"


def test_stdin_from_a_file(tmp_path: Path) -> None:
    data = noise(3 * MIB)
    (tmp_path / "f").write_bytes(data)
    with open(tmp_path / "f", "rb") as file:
        assert sandboxcore.run(["cat"], stdin=file, timeout=60).stdout == data
    with open(tmp_path / "f", "rb") as file:
        file.seek(1000)
        os.lseek(file.fileno(), 1000, os.SEEK_SET)
        assert sandboxcore.run(["cat"], stdin=file.fileno(), timeout=60).stdout == data[1000:]


def test_stdin_from_a_pipe_that_is_fed_meanwhile() -> None:
    source, sink = os.pipe()
    data = noise(2 * MIB)

    def feed() -> None:
        with os.fdopen(sink, "wb") as file:
            for at in range(0, len(data), 100_003):
                file.write(data[at : at + 100_003])
                file.flush()

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        assert sandboxcore.run(["cat"], stdin=source, timeout=60).stdout == data
    finally:
        os.close(source)
        thread.join(10)


def test_a_silent_stdin_does_not_hold_up_the_end() -> None:
    source, sink = os.pipe()
    try:
        assert sandboxcore.run(["echo", "done"], stdin=source, timeout=20).stdout == b"done\n"
    finally:
        os.close(source)
        os.close(sink)


def test_a_closed_stdin_of_the_host(tmp_path: Path) -> None:
    """As with subprocess, a descriptor that is not open is an error, not an empty file."""
    source, sink = os.pipe()
    os.close(source)
    os.close(sink)
    with pytest.raises(OSError, match=r"(?i)bad file descriptor"):
        sandboxcore.run(["cat"], stdin=source, timeout=5)


def test_a_file_without_a_descriptor_is_refused() -> None:
    for options in ({"stdin": io.BytesIO(b"x")}, {"stdout": io.BytesIO()}, {"stderr": io.StringIO()}):
        with pytest.raises(io.UnsupportedOperation):
            sandboxcore.run(["true"], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"stdin": PIPE},
        {"input": b"x", "stdin": DEVNULL},
        {"stdin": STDOUT},
        {"stdout": STDOUT},
        {"stdin": -7},
        {"stdout": -7},
    ],
    ids=str,
)
def test_impossible_combinations(options: dict) -> None:
    with pytest.raises((ValueError, OSError)):
        sandboxcore.run(["true"], timeout=5, **options)


# --- a reader or writer that goes away --------------------------------------------------------------

EARLY = """
    import signal, sys, sandboxcore
    signal.signal(signal.SIGPIPE, getattr(signal, sys.argv[1]))
    for script in ('exec <&-; sleep 0.05; echo ok', 'head -c 10 >/dev/null; echo ok', 'echo ok'):
        done = sandboxcore.run(['sh', '-c', script], input=bytes(8 << 20), timeout=30)
        assert (done.returncode, done.stdout) == (0, b'ok\\n'), done
    print('alive', signal.getsignal(signal.SIGPIPE).name, signal.sigpending())
"""


@pytest.mark.parametrize("action", ["SIG_DFL", "SIG_IGN"])
def test_a_payload_that_closes_stdin_early(action: str) -> None:
    done = host_program(EARLY, action)
    assert (done.returncode, done.stdout) == (0, f"alive {action} set()\n"), done.stderr


def test_a_pending_sigpipe_of_the_hosts_own_stays() -> None:
    code = """
        import os, signal, sandboxcore
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])
        signal.raise_signal(signal.SIGPIPE)
        done = sandboxcore.run(['true'], input=bytes(1 << 20))
        print(done.returncode, signal.sigpending() == {signal.SIGPIPE})
        print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGPIPE})
    """
    done = host_program(code)
    assert (done.returncode, done.stdout) == (0, "0 True\nTrue\n"), done.stderr


def test_a_reader_of_the_output_that_is_gone() -> None:
    """As with any pipe, the payload gets SIGPIPE; this process does not."""
    source, sink = os.pipe()
    os.close(source)
    try:
        done = sandboxcore.run(["yes"], stdout=sink, timeout=30)
    finally:
        os.close(sink)
    assert done.returncode == -13
    assert done.stdout is None


def test_a_reader_that_never_reads_does_not_hold_up_the_timeout() -> None:
    source, sink = os.pipe()
    answer: list[sandboxcore.ExecResult] = []
    thread = threading.Thread(
        target=lambda: answer.append(sandboxcore.run(["yes"], stdout=sink, timeout=0.3)), daemon=True
    )
    thread.start()
    thread.join(8)
    late = thread.is_alive()
    os.close(source)  # sets it free in any case
    thread.join(10)
    os.close(sink)
    assert not late
    assert answer[0].cause is Cause.TIMEOUT


# --- where output goes ------------------------------------------------------------------------------


def test_pass_through() -> None:
    code = """
        import sandboxcore
        done = sandboxcore.run(['sh', '-c', 'echo out; echo err >&2'], stdout=None, stderr=None)
        assert done.stdout is None and done.stderr is None
        assert (done.stdout_total, done.stderr_total) == (4, 4)
    """
    done = host_program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")


def test_pass_through_of_much() -> None:
    code = "import sandboxcore; sandboxcore.run(['head', '-c', '20000000', '/dev/zero'], stdout=None)"
    done = host_program(code)
    assert (done.returncode, len(done.stdout)) == (0, 20_000_000)


def test_output_to_files(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        done = shell("echo out; echo err >&2", stdout=out, stderr=err.fileno())
    assert (done.stdout, done.stderr, done.truncated) == (None, None, False)
    assert ((tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()) == (b"out\n", b"err\n")


def test_one_of_each(tmp_path: Path) -> None:
    with open(tmp_path / "out", "wb") as out:
        done = shell("echo out; echo err >&2", stdout=out, stderr=PIPE)
        assert (done.stdout, done.stderr) == (None, b"err\n")
        done = shell("echo out; echo err >&2", stdout=DEVNULL)
        assert (done.stdout, done.stderr, done.stdout_total) == (None, b"err\n", 0)


def test_merged_output_keeps_its_order(tmp_path: Path) -> None:
    script = "for i in 1 2 3; do echo out$i; echo err$i >&2; done"
    expected = b"out1\nerr1\nout2\nerr2\nout3\nerr3\n"
    done = shell(script, stderr=STDOUT)
    assert (done.stdout, done.stderr) == (expected, None)
    with open(tmp_path / "f", "wb") as file:
        shell(script, stdout=file, stderr=STDOUT)
    assert (tmp_path / "f").read_bytes() == expected
    assert shell(script, stdout=DEVNULL, stderr=STDOUT).stdout is None


def test_a_payload_never_gets_the_callers_own_descriptor() -> None:
    with tempfile.TemporaryFile("w+b") as file:
        done = shell("readlink /proc/self/fd/1 >&2; echo x", stdout=file, stderr=PIPE)
        assert done.stderr.startswith(b"pipe:")
        file.seek(0)
        assert file.read() == b"x\n"


def test_output_of_one_that_leaves_children_behind() -> None:
    done = shell("(sleep 60; echo late) & echo early", timeout=30)
    assert (done.stdout, done.cause) == (b"early\n", Cause.EXITED)
    assert done.duration < 20


def test_output_to_a_descriptor_that_is_not_open() -> None:
    source, sink = os.pipe()
    os.close(source)
    os.close(sink)
    with pytest.raises(OSError, match=r"(?i)bad file descriptor"):
        sandboxcore.run(["echo"], stdout=sink, timeout=5)


def test_output_while_the_hosts_own_streams_are_closed() -> None:
    """Descriptors below 3 may be reused for anything then."""
    code = """
        import os, sys, sandboxcore
        os.close(0); os.close(1)
        done = sandboxcore.run(['sh', '-c', 'cat; echo err >&2'], input=b'data')
        assert (done.stdout, done.stderr) == (b'data', b'err\\n'), done
        done = sandboxcore.run(['sh', '-c', 'cat; echo err >&2'], input=b'data')
        assert (done.stdout, done.stderr) == (b'data', b'err\\n'), done
        os.write(2, b'fine')
    """
    done = host_program(code)
    assert (done.returncode, done.stderr) == (0, "fine")


def test_passed_descriptors(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"from a file")
    code = """
        file, sink = map(int, sys.argv[1:])
        os.write(sink, os.read(file, 100).upper())
        print(json.dumps(sorted(map(int, os.listdir('/proc/self/fd')))))
    """
    source, sink = os.pipe()
    try:
        with open(tmp_path / "f", "rb") as file:
            numbers = [file.fileno(), sink]
            open_inside = ask_python(code, *map(str, numbers), pass_fds=numbers)
        assert os.read(source, 100) == b"FROM A FILE"
        assert set(numbers) | {0, 1, 2} <= set(open_inside)
        assert len(open_inside) == 6  # and that of listdir
    finally:
        os.close(source)
        os.close(sink)


# --- the limit --------------------------------------------------------------------------------------

LIMITS = (0, 1, 2, 3, 7, 100, 101, 4096, 65535, 65536, 65537, 131072, 200_001)


@pytest.mark.parametrize("limit", LIMITS)
def test_head_and_tail_are_exact(limit: int) -> None:
    sizes = sorted(
        {max(0, limit + extra) for extra in (-1, 0, 1, 2, 3, limit // 2, limit, 3 * limit + 1, 70_000)}
    )
    for size in sizes:
        data = noise(size)
        done = sandboxcore.run(["cat"], input=data, spec=Spec(limits=Limits(output=limit)), timeout=30)
        tail = limit // 2
        expected = data if size <= limit else data[: limit - tail] + (data[-tail:] if tail else b"")
        assert done.stdout == expected, (limit, size)
        assert (done.stdout_total, done.truncated) == (size, size > limit)
        assert done.cause is Cause.EXITED


def test_each_stream_has_its_own_limit() -> None:
    done = shell("printf 12345678; printf ab >&2", spec=Spec(limits=Limits(output=4)))
    assert (done.stdout, done.stderr, done.truncated) == (b"1278", b"ab", True)
    assert (done.stdout_total, done.stderr_total) == (8, 2)


def test_much_more_than_the_limit_in_small_pieces() -> None:
    code = "import os\nfor i in range(20000): os.write(1, b'%06d\\n' % i)"
    done = run_python(code, spec=Spec(limits=Limits(output=70)))
    assert done.stdout.split() == [b"%06d" % i for i in (0, 1, 2, 3, 4, 19995, 19996, 19997, 19998, 19999)]
    assert done.stdout_total == 140_000


def test_relayed_output_is_complete(tmp_path: Path) -> None:
    """Also what is still in the pipe when the payload has ended."""
    for _ in range(30):
        with open(tmp_path / "f", "wb") as file:
            done = shell("head -c 130000 /dev/zero", stdout=file)
        assert (tmp_path / "f").stat().st_size == done.stdout_total == 130_000


def test_relayed_output_is_not_limited(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:
        done = shell("head -c 100000 /dev/zero", stdout=file, spec=Spec(limits=Limits(output=10)))
    assert (tmp_path / "f").stat().st_size == done.stdout_total == 100_000
    assert not done.truncated


# --- text -------------------------------------------------------------------------------------------


def test_text() -> None:
    done = sandboxcore.run(["sh", "-c", r"cat; printf 'a\r\nb\rc\n\303\251' >&2"], input="ü\n", text=True)
    assert (done.stdout, done.stderr) == ("ü\n", "a\nb\nc\né")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "cp1252"])
def test_input_and_output_have_one_encoding(encoding: str) -> None:
    """As subprocess: what comes back is what was sent."""
    kwargs = {"input": "é§", "encoding": encoding}
    assert sandboxcore.run(["cat"], **kwargs).stdout == "é§"
    assert subprocess.run(["cat"], capture_output=True, **kwargs).stdout == "é§"


def test_undecodable_output() -> None:
    argv = ["printf", r"a\377b"]
    with pytest.raises(UnicodeDecodeError):
        sandboxcore.run(argv, text=True)
    assert sandboxcore.run(argv, errors="replace").stdout == "a\ufffdb"
    assert sandboxcore.run(argv, encoding="latin-1").stdout == "aÿb"


def test_cut_text_is_decoded_all_the_same() -> None:
    done = sandboxcore.run(["cat"], input="é" * 100, text=True, spec=Spec(limits=Limits(output=5)))
    assert done.stdout == "é\ufffdé"
    assert done.truncated
    partial = shell(r"printf 'a\303'; sleep 30", text=True, timeout=0.5)
    assert (partial.stdout, partial.cause) == ("a\ufffd", Cause.TIMEOUT)


def test_universal_newlines_across_reads() -> None:
    code = "import os\nfor _ in range(1000): os.write(1, b'a\\r'); os.write(1, b'\\n')"
    assert run_python(code, text=True).stdout == "a\n" * 1000


def test_python_is_found() -> None:
    assert sandboxcore.run([PYTHON, "-c", "print('x')"]).stdout == b"x\n"
