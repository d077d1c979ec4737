"""The command line for persistent sandboxes: each verb is a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ptydriver import Human, at_terminal
from support import gone, host_environment, marked, wait_until

CLI = [sys.executable, "-m", "sandboxcore"]

pytestmark = pytest.mark.once


class Shell:
    """Somebody who types commands, with a state directory of their own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.env = {**host_environment(), "SANDBOXCORE_STATE_DIR": str(state)}

    def __call__(self, *args: str, status: int = 0, **options: Any) -> str:
        """What a command prints; its exit status must be this one."""
        done = self.run(*args, **options)
        assert done.returncode == status, (args, done)
        if status == 125:
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert done.stderr.startswith("sandboxcore: ")
            return done.stderr
        return done.stdout

    def run(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
        if options["stdin"] is None:
            del options["stdin"]
        options = {"capture_output": True, "text": True, "timeout": 60, "env": self.env, **options}
        return subprocess.run([*CLI, *args], **options)

    def json(self, *args: str, **options: Any) -> Any:
        return json.loads(self(args[0], "--json", *args[1:], **options))

    def popen(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*CLI, *args], text=True, env=self.env, **{**pipes, **options})

    def line(self, *args: str) -> str:
        """A command as a shell takes it."""
        return " ".join([*CLI, *args])

    def state_of(self, name: str) -> str:
        return next(row["state"] for row in self.json("ls") if row["name"] == name)

    def status_of(self, name: str, command: str) -> str:
        return next(row["status"] for row in self.json("ls", name) if row["id"] == command)

    def remove_all(self) -> None:
        rows = self.json("ls")
        if rows:
            self("rm", "-f", *[row["name"] for row in rows])
        for row in rows:
            wait_until(lambda pid=row["pid"]: not pid or gone(pid), f"the end of {row['name']}")
        assert os.listdir(self.state / "sandboxes") == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A state directory with a running sandbox, "box", for tests that leave it as it is."""
    shell = Shell(tmp_path_factory.mktemp("shared") / "state")
    shell("create", "box", "--env", "OF=spec", "--hostname", "inside")
    yield shell
    assert shell.state_of("box") == "running"
    shell.remove_all()


@pytest.fixture
def sh(tmp_path: Path) -> Iterator[Shell]:
    """An empty state directory."""
    shell = Shell(tmp_path / "state")
    yield shell
    shell.remove_all()


# --- a life -------------------------------------------------------------------------------------


@pytest.mark.as_root
def test_a_whole_life(sh: Shell) -> None:
    printed = sh(
        "create", "one", "--no-start", "--label", "a=b", "--label", "c=d=e", "--description", "words"
    )
    assert re.fullmatch(r"sbx-[0-9a-f]{32}\n", printed)
    (record,) = sh.json("ls")
    assert (record["id"], record["name"], record["state"], record["pid"]) == (
        printed.strip(), "one", "created", 0,
    )  # fmt: skip
    assert (record["labels"], record["description"]) == ({"a": "b", "c": "d=e"}, "words")
    assert "created" in sh("exec", "one", "--", "true", status=125)
    assert sh.state_of("one") == "created"  # looking at it does not start it

    sh("start", "one")
    assert "cannot start" in sh("start", "one", status=125)
    sh("exec", "one", "--", "sh", "-c", "echo kept > /tmp/note")
    assert sh("exec", printed.strip(), "--", "cat", "/tmp/note") == "kept\n"  # by id, too

    sh("suspend", "one")
    assert sh.state_of("one") == "paused"
    assert "paused" in sh("exec", "one", "--", "true", status=125)
    assert "paused" in sh("suspend", "one", status=125)
    sh("resume", "one")
    assert "resume" in sh("resume", "one", status=125)
    assert sh("exec", "one", "--", "cat", "/tmp/note") == "kept\n"

    pid = sh.json("ls")[0]["pid"]
    sh("stop", "one")
    assert gone(pid)
    assert sh.state_of("one") == "stopped"
    assert "stopped" in sh("stop", "one", status=125)
    sh("start", "one")
    assert sh("exec", "one", "--", "cat", "/tmp/note", status=1) == ""  # what was private is lost

    assert "running" in sh("rm", "one", status=125)
    sh("stop", "one")
    sh("rm", "one")
    assert sh.json("ls") == []
    assert "'one'" in sh("exec", "one", "--", "true", status=125)


def test_start_means_the_directory_of_create(sh: Shell, tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o755)
    for name in ("here", "there"):
        place = tmp_path / name / "data"
        place.mkdir(parents=True)
        (place / "who").write_text(name)
    sh("create", "one", "--ro", "./data:/data", cwd=tmp_path / "here")
    sh("stop", "one", cwd=tmp_path / "there")
    sh("start", "one", cwd=tmp_path / "there")
    assert sh("exec", "one", "--", "cat", "/data/who", cwd=tmp_path / "there") == "here"


def test_spec_options_reach_the_sandbox(sh: Shell, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text('hostname = "filed"\n[labels]\nfrom = "file"\n')
    sh("create", "one", "--spec", str(spec), "--env", "A=1", "--tmpfs", "/cache:1M", "--workdir", "/tmp")
    script = "hostname; echo $A; pwd; stat -f -c %T /cache"
    assert sh("exec", "one", "--", "sh", "-c", script) == "filed\n1\n/tmp\ntmpfs\n"
    assert sh.json("ls", "--label", "from=file")[0]["name"] == "one"


def test_rm_goes_on_after_a_refusal(sh: Shell) -> None:
    sh("create", "runs")
    sh("create", "rests", "--no-start")
    done = sh.run("rm", "runs", "nobody", "rests")
    assert done.returncode == 125
    first, second = done.stderr.splitlines()
    assert "runs" in first
    assert "--force" in first
    assert "'nobody'" in second
    assert [row["name"] for row in sh.json("ls")] == ["runs"]
    sh("suspend", "runs")
    assert "paused" in sh("rm", "runs", status=125)
    sh("rm", "--force", "runs")


@pytest.mark.as_root
def test_gc(sh: Shell) -> None:
    sandbox = sh("create", "one").strip()
    done = sh.json("gc")
    assert (done["ended"], done["removed"]) == ([], [])
    os.kill(sh.json("ls")[0]["pid"], signal.SIGKILL)
    stray = sh.state / "sandboxes" / "sbx-stray"
    stray.mkdir()
    dry = sh.json("gc", "--dry-run")
    assert dry["removed"] == ["sbx-stray"]
    assert stray.exists()
    printed = _without_groups(sh("gc"))
    assert "removed sbx-stray\n" in printed
    assert not stray.exists()
    assert sh.state_of("one") == "stopped"
    assert set(printed.split()) <= {"ended", "removed", "sbx-stray", sandbox}
    assert _without_groups(sh("gc")) == ""
    sh("start", "one")


def _without_groups(printed: str) -> str:
    """Of control groups, anybody on this host may have left some just now."""
    return "".join(line for line in printed.splitlines(True) if not line.startswith("removed group "))


# --- names and places ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "a\nb", "é", "x" * 65, "\x1b[31m"])
def test_odd_names(shared: Shell, name: str) -> None:
    assert "name" in shared("create", name, status=125)
    assert "no sandbox" in shared("exec", name, "--", "true", status=125)


def test_a_name_like_an_option(shared: Shell) -> None:
    assert "not first" in shared("create", "--", "-v", status=125)
    assert "no sandbox" in shared("stop", "--", "--all", status=125)


def test_a_name_that_is_taken(shared: Shell) -> None:
    assert "'box'" in shared("create", "box", status=125)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["create"], ["NAME"]),
        (["create", "x", "--network", "wifi"], ["--network"]),
        (["create", "x", "--label", "novalue"], ["--label", "novalue"]),
        (["create", "x", "--ro", "/no/such"], ["/no/such", "No such file"]),
        (["create", "x", "--memory", "lots"], ["--memory", "lots"]),
        (["exec", "box"], ["COMMAND"]),
        (["exec", "box", "--env", "=x", "--", "true"], ["--env", "'=x'"]),
        (["exec", "box", "--env", "K\n", "--", "true"], ["--env"]),
        (["exec", "box", "--user", "root", "--", "true"], ["user", "'root'"]),
        (["exec", "box", "--workdir", "/no/dir", "--", "true"], ["cwd", "/no/dir"]),
        (["exec", "box", "--tty", "--", "true"], ["--tty", "not a terminal"]),
        (["exec", "box", "--detach", "--json", "--", "true"], ["--json"]),
        (["shell", "box"], ["not a terminal"]),
        (["ls", "nobody"], ["'nobody'"]),
        (["ls", "box", "--label", "a=b"], ["--label"]),
        (["logs", "box", "cmd-none"], ["'cmd-none'"]),
        (["logs", "box", "--since", "-1"], ["--since"]),
        (["logs", "box", "--since", "1", "--tail", "1"], ["--since", "--tail"]),
        (["attach", "box", "cmd-none"], ["'cmd-none'"]),
        (["kill", "box", "cmd-none"], ["'cmd-none'"]),
        (["kill", "box", "--signal", "HUH"], ["--signal", "'HUH'"]),
        (["kill", "box", "--signal", "0"], ["--signal"]),
        (["kill", "box", "--signal", "STOP"], ["suspend"]),
        (["rm"], ["NAME"]),
        (["frobnicate"], ["frobnicate"]),
        (["ls", "--state-dir", ""], ["--state-dir"]),
        (["ls", "--state-dir", "/proc/no"], ["/proc/no"]),
    ],
)
def test_refusals(shared: Shell, args: list[str], words: list[str]) -> None:
    said = shared(*args, status=125)
    assert all(word in said for word in words), said


def test_where_the_state_is(tmp_path: Path) -> None:
    shell = Shell(tmp_path / "variable")
    shell("create", "one", "--no-start")
    shell(
        "create", "one", "--no-start", "--state-dir", str(tmp_path / "option")
    )  # stronger than the variable
    shell.env["SANDBOXCORE_STATE_DIR"] = ""
    shell.env["XDG_STATE_HOME"] = str(tmp_path / "xdg")
    shell("create", "one", "--no-start")
    found = [tmp_path / "variable", tmp_path / "option", tmp_path / "xdg" / "sandboxcore"]
    assert all(len(shell.json("ls", "--state-dir", str(path))) == 1 for path in found)
    for path in found:
        shell("rm", "one", "--state-dir", str(path))


@pytest.mark.as_root
def test_a_state_directory_that_others_may_write(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    tmp_path.chmod(0o777)
    assert "others" in shell("ls", status=125)
    assert tmp_path.stat().st_mode & 0o777 == 0o777  # somebody else's business: it might be /tmp
    tmp_path.chmod(0o755)
    shell("ls")
    assert [p.stat().st_mode & 0o077 for p in tmp_path.iterdir() if not p.name.startswith(".")] == [0, 0]


# --- exec ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 77"], 77),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
        (["--version"], 127),  # a command named like an option
        (["--", "x"], 127),
    ],
)
def test_exit_status(shared: Shell, command: list[str], status: int) -> None:
    done = shared.run("exec", "box", "--", *command)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (1 if status in (126, 127) else 0)


def test_options_after_the_dashes_belong_to_the_command(shared: Shell) -> None:
    said = shared("exec", "box", "--", "echo", "--detach", "-t", "--timeout", "0", "--")
    assert said == "--detach -t --timeout 0 --\n"
    assert shared("exec", "--", "box", "echo", "-d") == "-d\n"


def test_streams_pass_through(shared: Shell) -> None:
    done = shared.run("exec", "box", "--", "sh", "-c", "cat; echo error >&2", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "error\n", 0)
    data = os.urandom(3 << 20)
    line = [*CLI, "exec", "box", "--", "cat"]
    assert subprocess.run(line, input=data, capture_output=True, timeout=60, env=shared.env).stdout == data


def test_closed_streams(shared: Shell) -> None:
    script = f"{shared.line('exec', 'box', '--', 'yes')} | head -n 1"
    done = subprocess.run(script, shell=True, capture_output=True, timeout=60, env=shared.env)
    assert (done.stdout, done.stderr) == (b"y\n", b"")
    script = f"{shared.line('exec', 'box', '--', 'cat')} <&-"
    done = subprocess.run(script, shell=True, capture_output=True, timeout=60, env=shared.env)
    assert (done.stdout, done.returncode) == (b"", 0)


@pytest.mark.as_root
def test_options_of_exec(shared: Shell) -> None:
    script = "echo $OF $A $HOME $(pwd) $(hostname); id -u"
    said = shared("exec", "box", "--env", "A=va=lue", "--workdir", "/tmp", "--", "sh", "-c", script)
    assert said == "spec va=lue /workspace /tmp inside\n1000\n"
    assert shared("exec", "box", "--env", "OF=me", "--", "sh", "-c", "echo $OF") == "me\n"
    data = shared.json("exec", "box", "--user", "1000:1000", "--", "sh", "-c", "echo out; echo err >&2")
    assert (data["stdout"], data["stderr"], data["returncode"]) == ("out\n", "err\n", 0)
    assert data["applied"]["no_new_privs"] is True


@pytest.mark.needs_root
def test_exec_as_another_user(shared: Shell) -> None:
    assert shared("exec", "box", "--user", "7:8", "--", "sh", "-c", "id -u; id -g") == "7\n8\n"


def test_timeout(shared: Shell) -> None:
    mark = uuid.uuid4().hex
    began = time.monotonic()
    shared("exec", "box", "--timeout", "0.3", "--", "sh", "-c", f"sleep 100; : {mark}", status=124)
    assert time.monotonic() - began < 15
    wait_until(lambda: not marked(mark), "the end of the command")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_the_command_not_the_sandbox(shared: Shell, number: int) -> None:
    mark = uuid.uuid4().hex
    with shared.popen("exec", "box", "--", "sh", "-c", f"echo ready; sleep 100 & wait; : {mark}") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(30) in (128 + number, -number)
        if number in (signal.SIGTERM, signal.SIGINT):
            assert process.returncode == 128 + number
            assert process.stderr is not None
            assert process.stderr.read().strip() == ""
    wait_until(lambda: not marked(mark), "the end of the command")
    assert shared("exec", "box", "--", "echo", "still") == "still\n"


@pytest.mark.as_root
def test_the_sandbox_ends_under_a_command(sh: Shell) -> None:
    sh("create", "one")
    with sh.popen("exec", "one", "--", "sh", "-c", "echo ready; sleep 100") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        sh("rm", "-f", "one")
        assert process.wait(30) == 128 + signal.SIGKILL


@pytest.mark.as_root
def test_exec_is_lean(shared: Shell) -> None:
    """It neither compiles a filter nor starts a spawner: all of that stands in the sandbox already."""
    code = """
    import sys
    from sandboxcore.cli import main
    sys.argv = ["sandboxcore", "exec", "box", "--", "true"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    import sandboxcore.spawner
    assert not sandboxcore.spawner._spawners
    unwanted = {"pyseccomp", "sandboxcore.terminal", "sandboxcore.aio", "asyncio", "sandboxcore.replay"}
    assert not unwanted & sys.modules.keys(), unwanted & sys.modules.keys()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=shared.env)
    assert (done.returncode, done.stderr) == (0, "")


# --- detached commands --------------------------------------------------------------------------


def test_detached_commands(sh: Shell) -> None:
    sh("create", "one")
    assert "no detached commands" in sh("logs", "one", status=125)
    assert sh("ls", "one").split() == ["ID", "STATUS", "EXIT", "PID", "AGE", "COMMAND"]
    script = "echo out; echo err >&2; read x < /tmp/go; echo more; exit 3"
    sh("exec", "one", "--", "mkfifo", "/tmp/go")
    first = sh("exec", "one", "--detach", "--", "sh", "-c", script).strip()
    assert re.fullmatch(r"cmd-[0-9a-f]{32}", first)
    assert sh("exec", "one", "-d", "--", "no-such-program", status=127) == ""  # and leaves no record

    with sh.popen("logs", "one", "--follow") as follower:
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert follower.stdout.readline() == "out\n"
        assert follower.stderr.readline() == "err\n"
        (row,) = sh.json("ls", "one")
        assert (row["id"], row["status"], row["returncode"]) == (first, "running", None)
        assert row["args"] == ["sh", "-c", script]
        sh("exec", "one", "--", "sh", "-c", "echo > /tmp/go")
        assert follower.stdout.read() == "more\n"
        assert follower.wait(30) == 0
    (row,) = sh.json("ls", "one")
    assert (row["status"], row["returncode"], row["stdout_total"], row["stderr_total"]) == ("failed", 3, 9, 4)
    assert sh("ls", "one").splitlines()[1].split()[:4] == [first, "failed", "3", "-"]

    second = sh("exec", "one", "-d", "--", "echo", "it's", "me").strip()
    wait_until(lambda: sh.status_of("one", second) == "completed", "the second command")
    assert sh("ls", "one").splitlines()[2].endswith("echo 'it'\"'\"'s' me")
    assert sh("logs", "one") == "it's me\n"  # the latest
    done = sh.run("logs", "one", first)
    assert (done.stdout, done.stderr) == ("out\nmore\n", "err\n")
    assert sh("logs", "one", first, "--stream", "stderr") == ""
    assert sh("logs", "one", first, "--stream", "stdout", "--since", "4") == "more\n"
    assert sh("logs", "one", first, "--tail", "3") == "re\n"
    assert sh("logs", "one", first, "--since", "100") == ""
    data = sh.json("logs", "one", first, "--since", "1")
    assert (data["status"], data["returncode"]) == ("failed", 3)
    assert data["stdout"] == {"offset": 1, "end": 9, "data": "ut\nmore\n"}
    assert data["stderr"] == {"offset": 1, "end": 4, "data": "rr\n"}
    lines = [json.loads(line) for line in sh("logs", "one", first, "-f", "--json").splitlines()]
    assert {"stream": "stderr", "offset": 0, "end": 4, "data": "err\n"} in lines
    assert lines[-1]["returncode"] == 3
    done = sh.run("attach", "one", first)  # without a terminal: its output, its status
    assert (done.stdout, done.stderr, done.returncode) == ("out\nmore\n", "err\n", 3)


def test_large_logs(shared: Shell) -> None:
    command = shared("exec", "box", "-d", "--", "sh", "-c", "seq 1000000; echo end >&2").strip()
    wait_until(lambda: shared.status_of("box", command) == "completed", "the command")
    kept = shared("logs", "box", command, "--stream", "stdout")
    assert len(kept) == 1 << 20  # the last MiB
    assert kept.endswith("999999\n1000000\n")
    assert shared("logs", "box", command, "--tail", "8", "--stream", "stdout") == "1000000\n"
    script = f"{shared.line('logs', 'box', command)} | head -c 5 | wc -c"
    done = subprocess.run(script, shell=True, capture_output=True, timeout=60, env=shared.env)
    assert done.stdout.strip() == b"5"
    assert done.stderr in (b"", b"end\n")


def test_logs_of_one_that_never_ends(shared: Shell) -> None:
    command = shared("exec", "box", "-d", "--", "yes").strip()
    wait_until(lambda: shared.json("ls", "box")[-1]["stdout_total"] > 1 << 21, "some output")
    assert set(shared("logs", "box", command).split()) <= {"y"}  # returns
    script = f"{shared.line('logs', 'box', command, '--follow')} | head -n 1"
    done = subprocess.run(script, shell=True, capture_output=True, timeout=60, env=shared.env)
    assert done.stdout in (b"y\n", b"\n")
    assert done.stderr == b""
    shared("kill", "box", command)
    assert shared.status_of("box", command) == "failed"


def test_kill(sh: Shell) -> None:
    mark = uuid.uuid4().hex
    sh("create", "one")
    script = f"trap 'echo told' USR1; echo ready; while :; do sleep 100 & wait; done; : {mark}"
    both = [sh("exec", "one", "-d", "--", "sh", "-c", script).strip() for _ in range(2)]
    for command in both:
        wait_until(lambda command=command: sh("logs", "one", command), "a shell with its trap")
    for name in ("usr1", "SIGUSR1", str(int(signal.SIGUSR1))):
        before = len(sh("logs", "one", both[0]))
        sh("kill", "one", both[0], "--signal", name)
        wait_until(lambda before=before: len(sh("logs", "one", both[0])) > before, f"the answer to {name}")
    assert sh("logs", "one", both[1]) == "ready\n"
    assert sh("logs", "one", both[0]) == "ready\ntold\ntold\ntold\n"

    sh("kill", "one", both[0])
    rows = sh.json("ls", "one")
    assert [row["status"] for row in rows] == ["failed", "running"]
    assert (rows[0]["returncode"], rows[0]["signal"], rows[0]["cause"]) == (-9, 9, "killed")
    assert sh("ls", "one").splitlines()[1].split()[2] == "137"
    assert "ended" in sh("kill", "one", both[0], status=125)

    sh("kill", "one")  # every one
    wait_until(lambda: not marked(mark), "the end of the rest")
    assert sh("exec", "one", "--", "echo", "still") == "still\n"
    sh("suspend", "one")
    assert "paused" in sh("kill", "one", status=125)


def test_interrupted_followers_leave_the_command(shared: Shell) -> None:
    command = shared("exec", "box", "-d", "--", "sh", "-c", "echo ready; exec sleep 100").strip()
    for verb in (["logs", "--follow"], ["attach"]):
        with shared.popen(*verb, "box", command) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
    assert shared.status_of("box", command) == "running"
    shared("kill", "box", command)


# --- tables -------------------------------------------------------------------------------------


def test_table_of_sandboxes(sh: Shell) -> None:
    assert sh("ls").split() == ["NAME", "ID", "STATE", "PID", "AGE", "LABELS"]
    first = sh("create", "a", "--no-start", "--label", "team=x", "--label", "k=v").strip()
    second = sh("create", "longer-name").strip()
    head, one, two = sh("ls").splitlines()
    assert one.split()[:4] == ["a", first, "created", "-"]
    assert one.split()[5] == "k=v,team=x"
    assert two.split()[:3] == ["longer-name", second, "running"]
    assert two.split()[3] == str(sh.json("ls")[1]["pid"])
    assert re.fullmatch(r"\d+s", two.split()[4])
    assert head.index("ID") == one.index(first) == two.index(second)
    assert [row["name"] for row in sh.json("ls", "--label", "team=x")] == ["a"]
    assert sh.json("ls", "--label", "team=x", "--label", "k=w") == []


def test_tables_show_no_control_characters(sh: Shell) -> None:
    sh("create", "one", "--label", "k=\x1b[2Jv\n")
    assert sh("ls").splitlines()[1].endswith("k=?[2Jv?")
    sh("exec", "one", "-d", "--", "echo", "\x1b]0;t\x07\n")
    assert "\x1b" not in sh("ls", "one")
    assert len(sh("ls", "one").splitlines()) == 2


# --- terminals ----------------------------------------------------------------------------------


def at(shell: Shell, *args: str, **about: str) -> Any:
    """Somebody who has started a command of ours at a terminal."""
    return at_terminal("", command=[*CLI, *args], SANDBOXCORE_STATE_DIR=str(shell.state), **about)


def test_exec_with_a_terminal(shared: Shell) -> None:
    with at(shared, "exec", "-t", "box", "--env", "PS1=in> ", "--", "sh") as human:
        before = human.attributes()
        human.expect("in> ")
        human.send("tty; echo $TERM $OF\n")
        human.expect(r"/dev/pts/\d+\r\nxterm spec")
        human.resize(33, 99)
        human.send("stty size\n")
        human.expect("33 99")
        human.expect("in> ")
        human.send("sh -c 'echo slee''ping; exec sleep 100'\n")
        human.expect("[\r\n]sleeping\r\n")
        human.send("\x03")  # for the sleep, not for us
        human.expect("in> ")
        human.send("exit 7\n")
        assert human.wait() == 7
        assert human.attributes() == before


def test_exec_with_a_terminal_ends_by_timeout_and_signal(shared: Shell) -> None:
    with at(shared, "exec", "-t", "--timeout", "1", "box", "--", "sleep", "100") as human:
        assert human.wait() == 124
    mark = uuid.uuid4().hex
    with at(shared, "exec", "-t", "box", "--", "sh", "-c", f"echo rea''dy; sleep 100; : {mark}") as human:
        before = human.attributes()
        human.expect("ready")
        human.process.terminate()
        assert human.wait() == 128 + signal.SIGTERM
        assert human.attributes() == before
    wait_until(lambda: not marked(mark), "the end of the command")


def test_shell(shared: Shell) -> None:
    with at(shared, "shell", "box") as human:
        human.send("echo $((6*7)); hostname; exit 5\n")
        human.expect("[\r\n]42\r\ninside\r\n")
        assert human.wait() == 5


def test_output_without_a_terminal_of_its_own_is_filtered(shared: Shell) -> None:
    script = r"printf 'a\033]0;title\007b\033[\0006n\033[31mred\033[0m'; tty"
    with at(shared, "exec", "box", "--", "sh", "-c", script) as human:
        human.wait()
        assert human.seen.startswith(b"ab6n\x1b[31mred\x1b[0mnot a tty")
    shared("exec", "box", "-d", "--", "sh", "-c", script)
    with at(shared, "logs", "-f", "box") as human:
        assert human.wait() == 0
        assert human.seen.startswith(b"ab6n\x1b[31mred\x1b[0mnot a tty")


def detached_shell(shell: Shell) -> str:
    script = "stty -echo; PS1='in> ' exec sh"
    return shell("exec", "box", "-d", "-t", "--", "sh", "-c", script).strip()


def leave(human: Human) -> None:
    before = human.attributes()
    human.send("\x10")
    human.send("\x11")
    human.expect("runs on")
    assert human.wait() == 0
    assert human.attributes()[3] != before[3]  # cooked again


def test_attach_replay_detach(shared: Shell) -> None:
    command = detached_shell(shared)
    with at(shared, "attach", "box", command) as human:
        human.send("echo begin$((1+1)); printf '\\033[6n\\033[1mbold\\033[c'\n")
        human.expect("begin2\r\n")
        human.expect(r"\x1b\[6n\x1b\[1mbold\x1b\[c")
        leave(human)
    assert shared.status_of("box", command) == "running"
    with at(shared, "attach", "box", command) as human:
        human.expect("begin2\r\n")  # what was there before
        human.expect(r"\x1b\[1mbold")
        assert b"\x1b[6n" not in human.seen  # but for questions to a terminal
        assert b"\x1b[c" not in human.seen
        human.resize(41, 101)
        human.send("echo; stty size\n")
        human.expect("41 101")
        human.expect("in> ")
        human.send("sh -c 'echo sleeping; exec sleep 100'\n")
        human.expect("sleeping\r\n")
        human.send("\x03")
        human.expect("in> ")
        human.send("echo status=$?; exit 6\n")
        human.expect("status=130")
        assert human.wait() == 6
    with at(shared, "attach", "box", command) as human:  # too late: its output, its status
        human.expect("begin2")
        assert human.wait() == 6


def test_two_attached(shared: Shell) -> None:
    command = detached_shell(shared)
    with at(shared, "attach", "box", command) as one, at(shared, "attach", "box", command) as two:
        one.expect("in> ")
        two.expect("in> ")
        one.send("echo $((40+2))\n")
        one.expect("42\r\n")
        two.expect("42\r\n")
        two.send("exit\n")
        assert two.wait() == 0
        assert one.wait() == 0


def test_an_attached_terminal_hangs_up(shared: Shell) -> None:
    command = detached_shell(shared)
    with at(shared, "attach", "box", command) as human:
        human.expect("in> ")
        human.hang_up()
        human.process.wait(20)
    assert shared.status_of("box", command) == "running"
    with at(shared, "attach", "box", command) as human:
        human.expect("in> ")
        human.process.terminate()
        assert human.wait() == 128 + signal.SIGTERM
    assert shared.status_of("box", command) == "running"
    shared("kill", "box", command)


def test_attach_to_one_without_a_terminal(shared: Shell) -> None:
    command = shared("exec", "box", "-d", "--", "sh", "-c", "echo ready; sleep 1; exit 4").strip()
    with at(shared, "attach", "box", command) as human:
        human.expect("ready")
        assert human.wait() == 4
