"""The command line, as a shell sees it: exit statuses, streams, JSON, one line per failure."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CLI = [sys.executable, "-m", "sandboxcore"]


def cli(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*CLI, *args], capture_output=True, text=True, timeout=60, **options
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 77"], 77),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_status(command: list[str], status: int) -> None:
    done = cli("run", "--", *command)
    assert done.returncode == status
    assert len(done.stderr.splitlines()) == (1 if status in (126, 127) else 0)


@pytest.mark.once
def test_timeout_is_124() -> None:
    began = time.monotonic()
    assert cli("run", "--timeout", "0.3", "--", "sleep", "30").returncode == 124
    assert time.monotonic() - began < 15


@pytest.mark.once
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--bogus", "--", "true"], ["--bogus"]),
        (["--network", "wifi", "--", "true"], ["--network"]),
        (["--env", "novalue", "--", "true"], ["--env", "novalue"]),
        (["--ro", "/no/such/source", "--", "true"], ["/no/such/source", "No such file"]),
        (["--rootfs", "/no/such/root", "--", "true"], ["rootfs", "/no/such/root"]),
        (["--disk", "many", "--", "true"], ["limits.disk", "many"]),
        (["--spec", "/no/such.toml", "--", "true"], ["/no/such.toml"]),
        (["--workdir", "/no/such/dir", "--", "true"], ["cwd", "/no/such/dir"]),
        ([], ["COMMAND"]),
    ],
)
def test_refusals_are_125_and_one_line(args: list[str], words: list[str]) -> None:
    done = cli("run", *args)
    assert done.returncode == 125
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.once
def test_streams_pass_through() -> None:
    done = cli("run", "--", "sh", "-c", "cat; echo error >&2", input="in\n")
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "error\n", 0)


@pytest.mark.once
def test_large_streams_pass_through() -> None:
    data = os.urandom(3 << 20)
    done = subprocess.run([*CLI, "run", "--", "cat"], input=data, capture_output=True, timeout=60)
    assert done.stdout == data


@pytest.mark.once
def test_closed_output_ends_the_payload() -> None:
    command = " ".join([*CLI, "run", "--", "yes"])
    done = subprocess.run(f"{command} | head -n 1", shell=True, capture_output=True, timeout=60)
    assert done.stdout == b"y\n"


@pytest.mark.once
def test_closed_stdin() -> None:
    command = " ".join([*CLI, "run", "--", "cat"])
    done = subprocess.run(f"{command} <&-", shell=True, capture_output=True, timeout=60)
    assert (done.stdout, done.returncode) == (b"", 0)


@pytest.mark.once
def test_options_after_the_dashes_belong_to_the_command() -> None:
    done = cli("run", "--", "echo", "--timeout", "0", "--inadvisable-executable-name--", "--")
    assert done.stdout == "--timeout 0 --inadvisable-executable-name-- --\n"


def test_options_reach_the_sandbox(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chmod(tmp_path, 0o755)  # as root, payloads are somebody else
    (shared / "a").write_text("data")
    done = cli(
        *("run", "--ro", f"{shared}:/data", "--tmpfs", "/cache:1M", "--env", "NAME=va=lue"),
        *("--hostname", "box", "--workdir", "/tmp", "--deny", "/usr/bin/perl", "--"),
        *("sh", "-c", "cat /data/a; echo $NAME; hostname; pwd; stat -f -c %T /cache; perl -v"),
    )
    assert done.stdout == "datava=lue\nbox\n/tmp\ntmpfs\n"
    assert "perl" in done.stderr
    assert done.returncode in (126, 127)


@pytest.mark.once
def test_spec_file_and_options_combine(tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text('hostname = "filed"\n[limits]\npids = 30\n[env]\nA = "1"\n')
    script = "hostname; echo $A$B; grep 'Max processes' /proc/self/limits"
    done = cli("run", "--spec", str(spec), "--env", "B=2", "--", "sh", "-c", script)
    assert done.stdout.splitlines()[:2] == ["filed", "12"]
    assert done.stdout.splitlines()[2].split()[2] in ("30", "31")  # rootless, init counts as one


def test_json_has_the_whole_result() -> None:
    done = cli("run", "--json", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    data = json.loads(done.stdout)
    assert done.returncode == 3
    assert (data["stdout"], data["stderr"], data["returncode"]) == ("out\n", "err\n", 3)
    assert data["cause"] == "exited"
    assert data["applied"]["no_new_privs"] is True
    assert set(data["applied"]["capability_sets"].values()) == {0}


def test_doctor_says_that_sandboxes_run_here() -> None:
    done = cli("doctor", "--json")
    data = json.loads(done.stdout)
    assert done.returncode == 0
    assert data["run"] == "ok"
    probes = {row["name"]: row for row in data["probes"]}
    assert all(not row["errno"] for row in probes.values() if row["essential"])
    text = cli("doctor").stdout
    assert all(name in text for name in probes)


def test_doctor_without_user_namespaces() -> None:
    """Inside a user namespace that may have no children: the essential probe and the run both say so."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    if subprocess.run(["unshare", "-Ur", "true"], timeout=60).returncode:
        pytest.skip("user namespaces are not allowed here")
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script, "sh", *CLI, "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    data = json.loads(done.stdout)
    assert done.returncode == 1
    assert "user namespaces" in data["run"]
    user = next(row for row in data["probes"] if row["name"] == "user")
    assert user["errno"]
    assert "max_user_namespaces" in user["remedy"]


def test_explain_prints_the_plan() -> None:
    done = cli("explain", "--ro", "/usr/share:/data", "--pids", "7")
    assert done.returncode == 0
    assert "mount: /usr/share on /data (ro, spec ro)" in done.stdout
    assert "seccomp: standard" in done.stdout
    data = json.loads(cli("explain", "--json").stdout)
    assert data["spec"]["profile"] == "standard"


def test_sigterm_ends_the_sandbox_with_the_command() -> None:
    command = [*CLI, "run", "--", "sh", "-c", "echo ready; sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


# --- terminals ---------------------------------------------------------------------------------------


def on_terminal(command: list[str]) -> bytes:
    """What a command writes to a terminal of its own."""
    child, master = pty.fork()
    if child == 0:
        os.execv(command[0], command)
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([master], [], [], 1)
        if not ready:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # EIO: the other end is closed
            break
        if not data:
            break
        output += data
    os.close(master)
    os.waitpid(child, 0)
    return output


HOSTILE = {
    "title": rb"\033]0;owned\007",
    "clipboard": rb"\033]52;c;b3duZWQ=\033\\",
    "report": rb"\033[6n",
    "dcs": rb"\033P+q544e\033\\",
    "reset": rb"\033c",
    "c1": rb"\302\233" + b"6n",
    "charset": rb"\033(0",
}


@pytest.mark.once
@pytest.mark.parametrize("name", HOSTILE)
def test_terminal_gets_no_commands(name: str) -> None:
    sequence = os.fsdecode(HOSTILE[name])
    script = f"printf 'a{sequence}b\\033[31mred\\033[0m'"
    raw = on_terminal(["/bin/sh", "-c", script])
    assert raw.count(b"\x1b") + raw.count(b"\xc2") > 2  # the control: unsandboxed, it arrives

    seen = on_terminal([*CLI, "run", "--", "sh", "-c", script])

    rest = b"6n" if name == "c1" else b""  # without its introducer only text
    assert seen == b"a" + rest + b"b\x1b[31mred\x1b[0m"


def test_payload_has_no_terminal() -> None:
    script = "tty; test -t 0 || echo none; echo > /dev/tty"
    seen = on_terminal([*CLI, "run", "--", "sh", "-c", script])
    assert b"not a tty" in seen
    assert b"none" in seen
    assert b"/dev/tty" in seen  # cannot be opened: no controlling terminal
