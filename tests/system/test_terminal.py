"""Commands in a terminal, used by a person at another one: interact(), attach(), popen(pty=)."""

import hashlib
import os
import signal
import subprocess
import termios
import uuid
from collections.abc import Iterator

import pytest
from ptydriver import at_terminal, interacting
from support import PYTHON, leaves_nothing, marked, wait_until

from sandboxcore import Exit, Sandbox, SpecError, Stdout

PROMPT = {"PS1": "in> "}
LOUD = r"printf '\033[?1049h\033[?25l\033[?2004h\033[?1000;1006h\033='"  # what a full-screen program sets
QUIET = {b"\x1b[?1049l", b"\x1b[?25h", b"\x1b[?2004l", b"\x1b[?1000l", b"\x1b[?1006l", b"\x1b>"}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def python(code: str) -> list[str]:
    return [PYTHON, "-I", "-S", "-c", code]


# --- programs that people use -------------------------------------------------------------------


@pytest.mark.needs_program("bash")
def test_a_shell_with_job_control() -> None:
    with interacting(env=PROMPT) as human:
        before = human.attributes()
        human.expect("in> ")
        human.send("tty\n")
        human.expect(r"[\r\n]/dev/pts/\d+\r")
        human.send("ls -l /dev/pts; test $(stat -c %u $(tty)) = $(id -u) && echo mi''ne\n")
        human.expect(r"crw--w---- .* \d+, +\d+ ")
        human.expect("mine")
        human.send("sleep 100 &\n")
        human.expect(r"\[1\] \d+")
        human.send("jobs\n")
        human.expect(r"\[1\]\+ +Running +sleep 100 &")
        human.send("kill %1; wait %1; echo ended=$?\n")
        human.expect("ended=143")
        human.send("echo ca''lled; cat\n")
        human.expect("called\r\n")
        human.send("hello\n")
        human.expect("hello\r\nhello\r\n")
        human.send("\x1a")
        human.expect(r"\[1\]\+ +Stopped +cat")
        human.send("bg\n")
        human.expect(r"\[1\]\+ cat &")
        human.send("\n")
        human.expect(r"\[1\]\+ +Stopped +cat")  # it must not read in the background
        human.send("fg\n")
        human.expect("[\r\n]cat\r\n")
        human.send("again\n")
        human.expect("again\r\nagain\r\n")
        human.send("\x03")
        human.expect("in> ")
        human.send("sh -c 'echo rea''dy; exec sleep 100'\n")
        human.expect("[\r\n]ready\r\n")
        human.send("\x03")
        human.expect("in> ")
        human.send("echo status=$?\n")
        human.expect("status=130")
        human.send("exit 7\n")
        assert human.reported() == [7, "exited"]
        assert human.wait() == 0
        assert human.attributes() == before
        for complaint in (b"terminal process group", b"no job control"):
            assert complaint not in human.seen


def test_the_interpreter() -> None:
    with interacting(PYTHON, "-I", "-q", env={"PYTHON_BASIC_REPL": "1"}) as human:
        human.expect(">>> ")
        human.send("for i in range(3):\n")
        human.expect(r"\.\.\. ")
        human.send("    print(i * 111)\n\n")
        human.expect("0\r\n111\r\n222\r\n")
        human.expect(">>> ")
        # not one long sleep: a signal just before its system call would not end it
        human.send("import time; any(print('wait' + 'ing') or time.sleep(0.1) for _ in range(1000))\n")
        human.expect("\nwaiting\r\n")
        human.send("\x03")
        human.expect("KeyboardInterrupt")
        human.expect(">>> ")
        human.send("6 * 7\n")  # or it would exit as if by SIGINT
        human.expect("42\r\n>>> ")
        human.send("\x04")
        assert human.reported() == [0, "exited"]


TEXT = "".join(f"line {number} of the text\n" for number in range(1, 1001))
FILES = f"files={{'/tmp/text': {TEXT!r}}}"


@pytest.mark.needs_program("less")
def test_a_pager() -> None:
    with interacting("less", "/tmp/text", options=FILES) as human:
        human.expect(r"\x1b\[\?1049h")
        human.expect("line 1 of the text\r\n")
        human.expect("line 23 of the text\r\n")
        human.send("/line 777 of\n")
        human.expect("line .*777 of.* the text")
        human.expect("line 799 of the text")
        human.send("q")
        human.expect(r"\x1b\[\?1049l")
        assert human.reported() == [0, "exited"]


@pytest.mark.needs_program("vim")
def test_an_editor() -> None:
    with interacting("sh", "-c", "vim -u NONE -N /tmp/text; md5sum </tmp/text", options=FILES) as human:
        human.expect(r"\x1b\[\?1049h")
        human.expect("line 23 of the text")
        human.send("/line 500 of\r")
        human.expect("line .{0,20}500")
        human.send(":%s/line/LINE/g\r")
        human.expect("LINE 1000 of the text")
        human.send(":wq\r")
        human.expect(r"\x1b\[\?1049l")
        human.expect(hashlib.md5(TEXT.replace("line", "LINE").encode()).hexdigest())
        assert human.reported() == [0, "exited"]


def test_the_shell_is_the_first_that_exists() -> None:
    with interacting(options="env={'PATH': '/usr/bin', 'PS1': 'in> '}") as human:
        human.expect("in> ")
        human.send("readlink /proc/$$/exe; echo TERM=$TERM.\n")
        human.expect("bash" if os.path.exists("/usr/bin/bash") else "sh")
        human.expect(r"TERM=(dumb)?\.[^$]*in> ")  # env= is the whole of it; bash has a default
        human.send("\x04")
        assert human.reported() == [0, "exited"]


# --- environment, size --------------------------------------------------------------------------


def test_environment() -> None:
    command = ["sh", "-c", 'echo "$TERM/$COLORTERM/$LANG/$MINE/${COLUMNS-no}/${SECRET-no}"']
    about = {"COLORTERM": "truecolor", "LANG": "en_GB.UTF-8", "COLUMNS": "7", "SECRET": "x"}
    with interacting(*command, env={"MINE": "1"}, **about) as human:
        human.expect("xterm/truecolor/en_GB.UTF-8/1/no/no\r\n")
    with interacting(*command, env={"TERM": "vt100"}, **about) as human:
        human.expect("vt100/truecolor/")


SIZES = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
while True:
    size = os.get_terminal_size()
    os.write(1, b"size %d %d\\n" % (size.lines, size.columns))
    signal.sigwaitinfo([signal.SIGWINCH])
"""


def test_window_size() -> None:
    with interacting(*python(SIZES), size=(33, 99)) as human:
        human.expect("size 33 99\r")
        human.resize(40, 120)
        human.expect("size 40 120\r")
        human.resize(10, 20)
        human.expect("size 10 20\r")
        human.send("\x1c")  # Ctrl-\
        assert human.reported() == [-signal.SIGQUIT, "signaled"]


def test_window_size_in_another_thread() -> None:
    code = f"""
    def work():
        with Sandbox() as sandbox:
            report(sandbox.interact({python(SIZES)!r}).returncode)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    """
    with at_terminal(code, size=(33, 99)) as human:
        before = human.attributes()
        human.expect("size 33 99\r")
        human.resize(40, 120)
        human.expect("size 40 120\r")
        human.send("\x03")
        assert human.reported() == -signal.SIGINT
        assert human.wait() == 0
        assert human.attributes() == before


def test_no_terminal() -> None:
    reading, writing = os.pipe()
    try:
        with Sandbox() as sandbox, pytest.raises(SpecError, match=f"descriptor {reading} is not a terminal"):
            sandbox.interact(["true"], stdin=reading)
    finally:
        os.close(reading)
        os.close(writing)


# --- every way out ------------------------------------------------------------------------------

WAYS_OUT = {
    "end": ("", "", [3, "exited"]),
    "command killed": ("sandbox.signal(signal.SIGKILL)", "", "killed"),
    "sandbox closed": ("sandbox.close()", "", [-9, "killed"]),
    "sandbox killed": ("os.kill(sandbox.pid, signal.SIGKILL)", "", [-9, "killed"]),
    "handler raises": (
        "os.kill(os.getpid(), signal.SIGTERM)",
        "signal.signal(signal.SIGTERM, fail)",
        "Failure",
    ),
    "interrupt": ("os.kill(os.getpid(), signal.SIGINT)", "", "KeyboardInterrupt"),
    "exception": ("os.kill(os.getpid(), signal.SIGWINCH)", "signal.signal(signal.SIGWINCH, fail)", "Failure"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM)", "", -signal.SIGTERM),
    "SIGHUP": ("os.kill(os.getpid(), signal.SIGHUP)", "", -signal.SIGHUP),
    "timeout": ("", "options['timeout'] = 2", [-9, "timeout"]),
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_the_terminal_is_restored(way: str) -> None:
    act, prepare, outcome = WAYS_OUT[way]
    mark = uuid.uuid4().hex
    tail = "exit 3" if way == "end" else "while :; do sleep 100; done"
    script = f"trap '' HUP; stty raw -echo; {LOUD}; echo rea''dy; {tail} # "
    code = f"""
    class Failure(Exception):
        pass
    def fail(*_):
        raise Failure
    def act():
        ordered()
        {act or "pass"}
    options = {{}}
    {prepare or "pass"}
    signals = {{n: signal.getsignal(n) for n in signal.valid_signals()}}
    descriptors = len(os.listdir("/proc/self/fd"))
    with Sandbox() as sandbox:
        threading.Thread(target=act, daemon=True).start()
        try:
            done = sandbox.interact(["sh", "-c", {script!r} + os.environ["MARK"]], **options)
            outcome = [done.returncode, done.cause]
        except BaseException as error:
            outcome = type(error).__name__
        same = signals == {{n: signal.getsignal(n) for n in signal.valid_signals()}}
        report([outcome, same, [os.get_blocking(fd) for fd in (0, 1, 2)]])
        ordered()
    """
    with at_terminal(code, MARK=mark) as human:
        before = human.attributes()
        human.expect("ready")
        if way != "end":
            assert human.attributes() != before
            human.order()
        if isinstance(outcome, int):
            assert human.wait() == outcome
        else:
            found, same, blocking = human.reported()
            assert same
            assert blocking == [True] * 3
            assert found == outcome or found[1] in (outcome, "signaled")
        assert human.attributes() == before
        wait_until(lambda: not marked(mark), "the end of the command")
        if not isinstance(outcome, int):
            human.order()
            human.order()
            assert human.wait() == 0
        for reset in QUIET:
            assert reset in human.seen[human.seen.rindex(b"ready") :], human.seen


def test_what_was_reset_by_the_program_is_left_alone() -> None:
    script = LOUD + r"; printf '\033[?1049l\033[?25h\033[?2004l\033[?1000;1006l\033>'; echo do''ne"
    with interacting("sh", "-c", script) as human:
        human.reported()
        human.rest()
        assert human.seen.endswith(b"done\r\n")


@pytest.mark.needs_program("bash")
def test_stop_and_continue() -> None:
    """By a shell that does not help: it is the program's task to leave the terminal in order."""
    code = f"""
import os
from sandboxcore import Sandbox
print("pid", os.getpid(), flush=True)
with Sandbox() as sandbox:
    sandbox.interact({python(SIZES)!r})
"""
    import sys

    with at_terminal("", command=["bash", "--norc", "--noprofile", "-i"], PS1="out> ", CODE=code) as human:
        human.expect("out> ")
        human.send(f'{sys.executable} -c "$CODE"\n')
        pid = int(human.expect(r"pid (\d+)\r").group(1))
        human.expect("size 24 80\r")
        raw = human.attributes()
        assert not raw[3] & termios.ECHO
        for number in (signal.SIGTSTP, signal.SIGSTOP):
            os.kill(pid, number)
            human.expect(r"\[1\]\+ +Stopped")
            human.expect("out> ")
            human.send(
                r"stty -a | tr ' ;' '\n\n' | grep -xE 'i[c]anon|e[c]ho|o[p]ost' | sort | tr '\n' +; echo"
            )
            human.send("\n")
            human.expect(r"echo\+icanon\+opost\+\r")
            human.expect("out> ")  # before that readline would set the old size again: it reads and writes it
            human.resize(30, 90 + number)
            human.send("fg\n")
            human.expect(f"size 30 {90 + number}\r")
            assert human.attributes() == raw
        human.send("\x03")
        human.expect("out> ")
        human.send("exit\n")
        human.wait()


@pytest.mark.parametrize("ignored", [True, False])
def test_our_terminal_hangs_up(ignored: bool) -> None:
    mark = uuid.uuid4().hex
    script = "trap '' HUP INT TERM; echo rea''dy; while :; do sleep 100; done # "
    code = f"""
    {"signal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else ""}
    with Sandbox() as sandbox:
        done = sandbox.interact(["sh", "-c", {script!r} + os.environ["MARK"]])
        report([done.returncode, done.cause])
        ordered()
    """
    with at_terminal(code, MARK=mark) as human:
        human.expect("ready\r")
        assert marked(mark)
        human.hang_up()
        if ignored:
            assert human.reported() == [-9, "killed"]
            wait_until(lambda: not marked(mark), "the end of the command")
            human.order()
        assert human.process.wait(20) == (0 if ignored else -signal.SIGHUP)
        wait_until(lambda: not marked(mark), "the end of the command")


# --- bytes --------------------------------------------------------------------------------------


def test_a_large_paste() -> None:
    lines = [f"{number:06} {'x' * 50}" for number in range(1150)]  # 64 KiB
    with interacting("sh", "-c", "stty -echo; echo rea''dy; exec cat") as human:
        human.expect("ready\r\n")
        start = len(human.seen)
        human.send("\n".join(lines) + "\n\x04")
        assert human.reported() == [0, "exited"]
        assert human.rest()[start:].decode().split("\r\n")[:-1] == lines


def test_large_output() -> None:
    code = """
import os, subprocess
subprocess.run(["stty", "-opost"])
data = b"".join(b"%07d\\n" % n for n in range(1 << 20))  # 8 MiB
while data:
    data = data[os.write(1, data[:65536]):]
"""
    with interacting(*python(code), options="") as human:
        assert human.reported(60) == [0, "exited"]
        expected = b"".join(b"%07d\n" % number for number in range(1 << 20))
        assert human.rest() == expected


def test_every_byte_passes() -> None:
    code = """
import os, tty
tty.setraw(0)
os.write(1, b"rea" + b"dy.")
for _ in range(4):
    data = b""
    while len(data) < 256:
        data += os.read(0, 256 - len(data))
    os.write(1, data)
"""
    with interacting(*python(code)) as human:
        human.expect(r"ready\.")
        start = len(human.seen)
        human.send(bytes(range(256)) * 4)
        assert human.reported() == [0, "exited"]
        assert human.rest()[start:] == bytes(range(256)) * 4


# --- a command that means harm ------------------------------------------------------------------


def test_a_flood_can_be_interrupted() -> None:
    with interacting("sh", "-c", "yes; echo st''atus=$?", options="") as human:
        human.expect("y\r\ny\r\n")
        human.send("\x03")
        assert human.reported() == [-signal.SIGINT, "signaled"]


def test_a_terminal_that_is_left_and_taken_again() -> None:
    away = "sleep 0.3"
    script = f"exec <&- >&- 2>&-; {away}; echo hello >/dev/tty; read x </dev/tty; echo got=$x >/dev/tty"
    with interacting("sh", "-c", script) as human:
        human.expect("hello\r\n")
        human.send("word\n")
        human.expect("got=word\r\n")
        assert human.reported() == [0, "exited"]


def test_a_terminal_that_somebody_else_holds() -> None:
    """Another command of the sandbox keeps it open and floods it."""
    thief = "while ! echo x >/dev/pts/0; do :; done 2>/dev/null; exec yes >/dev/pts/0"
    code = f"""
    with Sandbox() as sandbox:
        thief = sandbox.popen(["sh", "-c", {thief!r}])
        report(sandbox.interact(["sh", "-c", "read x; exit 4"]).returncode)
        report(thief.wait())  # the terminal is gone
    """
    with at_terminal(code) as human:
        human.expect("y\r\ny\r\n")
        human.send("\n")
        assert human.reported() == 4
        assert human.reported() == 1
        assert human.wait() == 0


def test_leaving_a_command() -> None:
    code = """
    with Sandbox() as sandbox, sandbox.popen(["cat"], pty=True) as process:
        for _ in range(3):
            report(attach(process, detach_keys=b"\\x10\\x11"))
            report([process.poll(), os.get_blocking(process.stdout.fileno())])
        report(process.wait())
    """
    with at_terminal(code) as human:
        before = human.attributes()
        human.send("a\x10b\n")
        human.expect(r"a\^Pb\r\na\x10b\r\n")
        human.send("\x10")
        human.send("\x11")
        assert human.reported() == "detached"
        assert human.reported() == [None, True]
        wait_until(lambda: human.attributes() != before, "the second attach()")
        human.send("two\n")
        human.expect("two\r\ntwo\r\n")
        human.send("\x10\x10\x11")
        assert human.reported() == "detached"
        assert human.reported() == [None, True]
        wait_until(lambda: human.attributes() != before, "the third attach()")
        human.send("\x04\x04")  # the first ends the line that begins with the Ctrl-P of before
        assert human.reported() == "ended"
        assert human.reported() == [0, True]
        assert human.reported() == 0
        assert human.attributes() == before


# --- popen(pty=) --------------------------------------------------------------------------------


def test_terminal_of_a_process(sandbox: Sandbox) -> None:
    with sandbox.popen(python(SIZES), pty=(5, 50)) as process:
        assert process.stdout.read(100) == b"size 5 50\r\n"
        process.resize(6, 60)
        assert process.stdout.read(100) == b"size 6 60\r\n"
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert process.stdout.read(100) == b""
        assert process.stdin is process.stdout
        assert process.stdout.isatty()


def test_closing_hangs_up(sandbox: Sandbox) -> None:
    code = """
import os, signal, time
signal.signal(signal.SIGHUP, lambda *_: os._exit(7))
print("ready", flush=True)
time.sleep(100)
"""
    with sandbox.popen(python(code), pty=True) as process:
        assert process.stdout.read(100) == b"ready\r\n"
        process.stdout.close()
        assert process.wait(10) == 7
    with sandbox.popen(["sh", "-c", "trap '' HUP; echo ready; sleep 100; sleep 100"], pty=True) as process:
        assert process.stdout.read(100) == b"ready\r\n"
        process.close()
        assert process.poll() == -signal.SIGKILL
        process.close()
    with leaves_nothing():
        pass


def test_typing_into_ones_own_terminal(sandbox: Sandbox) -> None:
    code = """
import fcntl
for number in (0x5412, 1 << 32 | 0x5412):
    try:
        fcntl.ioctl(0, number, b"x")
    except OSError as error:
        print(error.errno)
"""
    with sandbox.popen(python(code), pty=True) as process:
        assert process.communicate(timeout=10) == (b"1\r\n1\r\n", None)


def test_communicate(sandbox: Sandbox) -> None:
    with sandbox.popen(["cat"], pty=True) as process:
        assert process.communicate(b"one\ntwo", timeout=10)[0].startswith(b"one\r\n")
        assert process.returncode == 0
    with sandbox.popen(["sh", "-c", "stty -echo; echo ready; cat"], pty=True, text=True) as process:
        assert process.stdout.read(7) == b"ready\r\n"
        assert process.communicate("one\ntwo\n", timeout=10) == ("one\ntwo\n", None)
    lines = b"".join(b"%06d %s\n" % (number, b"x" * 90) for number in range(5000))
    with sandbox.popen(["sh", "-c", "stty -echo -opost; echo ready; cat"], pty=True) as process:
        assert process.stdout.read(6) == b"ready\n"
        assert process.communicate(lines, timeout=30) == (lines, None)


def test_communicate_in_time(sandbox: Sandbox) -> None:
    with sandbox.popen(["sh", "-c", "echo early; sleep 100; echo late"], pty=True) as process:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            process.communicate(timeout=1)
        assert caught.value.output == b"early\r\n"
        process.kill()
        assert process.communicate(timeout=10) == (b"early\r\n", None)
        assert process.returncode == -signal.SIGKILL


def test_events(sandbox: Sandbox) -> None:
    process = sandbox.popen(
        ["sh", "-c", "echo one; exec <&- >&- 2>&-; sleep 0.3; echo two >/dev/tty"], pty=True
    )
    events = list(process)
    assert b"".join(event.data for event in events[:-1]) == b"one\r\ntwo\r\n"
    assert [type(event) for event in events] == [Stdout] * (len(events) - 1) + [Exit]
    assert events[1].offset == len(events[0].data)
    assert events[-1].result.returncode == 0
    process.close()


@pytest.mark.parametrize("pty", [True, False])
@pytest.mark.parametrize("way", ["communicate", "events"])
def test_an_output_that_somebody_else_holds(pty: bool, way: str) -> None:
    """A second command opens the first one's standard output and keeps it."""
    with (
        Sandbox() as sandbox,
        sandbox.popen(["sh", "-c", "read x; echo bye"], pty=pty, stdin=subprocess.PIPE) as one,
    ):
        path = f"/proc/{one.pid_inside}/fd/1"
        thief = sandbox.popen(["sh", "-c", f"exec 5>{path}; echo ready; sleep 100; sleep 100"])
        assert thief.stdout.readline() == b"ready\n"
        one.stdin.write(b"\n")
        if not pty:
            one.stdin.flush()
        if way == "communicate":
            output = one.communicate(timeout=10)[0]
        else:
            output = b"".join(event.data for event in one if isinstance(event, Stdout))
        assert output.endswith(b"bye\r\n" if pty else b"bye\n")
        assert thief.poll() is None
        thief.kill()
        thief.close()


def test_an_output_that_the_command_takes_back(sandbox: Sandbox) -> None:
    """It reads its own pipe, and flushes its terminal, while we look: a read must not block."""
    steal = """
import os, threading, time
end = time.monotonic() + 1
mine = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
while time.monotonic() < end:
    os.write(1, b"x")
    try:
        os.read(mine, 100)
    except BlockingIOError:
        pass
"""
    flush = """
import os, termios, time
end = time.monotonic() + 1
while time.monotonic() < end:
    os.write(1, b"x")
    termios.tcflush(1, termios.TCIOFLUSH)
"""
    for code, pty in ((steal, False), (flush, True)):
        with sandbox.popen(python(code), pty=pty) as process:
            process.communicate(timeout=20)
            assert process.returncode == 0


def test_a_process_without_terminal(sandbox: Sandbox) -> None:
    from sandboxcore.terminal import attach

    master, slave = os.openpty()
    try:
        with sandbox.popen(["true"]) as process:
            with pytest.raises(SpecError, match="no terminal"):
                attach(process, stdin=slave)
            with pytest.raises(ValueError, match="no terminal"):
                process.resize(1, 1)
    finally:
        os.close(master)
        os.close(slave)
