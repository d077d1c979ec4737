"""The command line about resources: limits, usage, causes, doctor, gc. Each verb is a process of its own."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from resources import PATIENCE, needs, populated
from support import PYTHON, gone, host_environment, host_program, wait_until

from sandboxcore import cgroup
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.spec import Limits, SandboxSpec

CLI = [sys.executable, "-m", "sandboxcore"]
MiB = 1 << 20
NOWHERE = "/no/such/group"  # for SANDBOXCORE_CGROUP: a host without any control group
CPU = str(min(os.sched_getaffinity(0)))
HOG = [PYTHON, "-I", "-S", "-c", "x = bytearray(200 << 20)"]
WORK = """
import time
x = bytearray(30 << 20)
while time.process_time() < 0.4: pass
"""
SPIN = ["sh", "-c", "while :; do :; done"]


class Shell:
    """Somebody who types commands, with a state directory of their own."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.env = {**host_environment(), "SANDBOXCORE_STATE_DIR": str(state)}

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CLI, *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env={**self.env, **env},
        )

    def __call__(self, *args: str, status: int = 0, **env: str) -> str:
        """What a command prints; if it is refused, the one line that says why."""
        done = self.run(*args, **env)
        assert done.returncode == status, (args, done)
        if status != 125:
            return done.stdout
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith("sandboxcore: ")
        return done.stderr

    def json(self, *args: str, **env: str) -> Any:
        return json.loads(self(args[0], "--json", *args[1:], **env))

    def group(self, name: str) -> cgroup.Group:
        """The control group of a sandbox, as it is on record."""
        (record,) = [row for row in self.json("ls") if row["name"] == name]
        return group_of(self.state, record["id"])


def group_of(state: Path, sandbox: str) -> cgroup.Group:
    return cgroup.Group.from_dict(json.loads((state / "sandboxes" / sandbox / "group").read_text()))


def left(group: cgroup.Group) -> list[Path]:
    """Which of its directories there are, and of those of the process that made it."""
    return [path for place in group.places() for path in (place, place.parent) if path.exists()]


@pytest.fixture
def sh(tmp_path: Path) -> Iterator[Shell]:
    """An empty state directory; at the end its sandboxes are gone."""
    shell = Shell(tmp_path / "state")
    yield shell
    rows = shell.json("ls") if shell.state.exists() else []
    if rows:
        shell("rm", "-f", *[row["name"] for row in rows])
    for row in rows:
        wait_until(lambda pid=row["pid"]: not pid or gone(pid), f"the end of {row['name']}", PATIENCE)


# --- doctor -------------------------------------------------------------------------------------------

CONTROLS = ("memory", "swap", "cpu", "pids", "io", "cpuset", "freezer", "kill")
LIMITED = {  # options that need the controller
    "memory": ["--memory", "1G"],
    "swap": ["--memory", "1G", "--swap", "1G"],
    "cpu": ["--cpus", "0.5"],
    "io": ["--io", "1G"],
    "cpuset": ["--cpuset", CPU],
}


@pytest.fixture(scope="module")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What doctor finds here, by control."""
    data = Shell(tmp_path_factory.mktemp("doctor") / "state").json("doctor")
    return {row["name"]: row for row in data["control_groups"]} | {"run": data["run_limited"]}


def test_doctor_agrees_with_the_layout(diagnosis: dict[str, Any]) -> None:
    found = cgroup.layout()
    assert tuple(diagnosis)[:-1] == CONTROLS
    for name in ("memory", "swap", "cpu", "pids", "io", "cpuset"):
        row = diagnosis[name]
        assert row["version"] == found.versions.get(name, 0)
        assert row["remedy"] == found.remedies.get(name)
        assert bool(row["path"]) == bool(row["version"])
        if row["path"]:
            assert Path(row["path"]).parent.is_dir()
            assert Path(row["path"]).name == "sandboxcore"
    assert diagnosis["freezer"]["version"] == found.freezer
    assert bool(diagnosis["kill"]["version"]) == found.kill
    assert diagnosis["run"] == ("ok" if any(diagnosis[name]["version"] for name in LIMITED) else None)


@pytest.mark.parametrize("name", LIMITED)
def test_doctor_says_what_a_refusal_says(diagnosis: dict[str, Any], sh: Shell, name: str) -> None:
    row, command = diagnosis[name], ["run", *LIMITED[name], "--", "true"]
    if row["version"]:
        sh(*command)
        return
    said = sh(*command, status=125)
    assert row["remedy"] in said
    assert "limits." in said


def test_doctor_in_text(diagnosis: dict[str, Any], sh: Shell) -> None:
    lines = sh("doctor").splitlines()
    start = lines.index("control groups")
    for name in CONTROLS:
        number = next(n for n, line in enumerate(lines) if n > start and line.split()[0] == name)
        row = diagnosis[name]
        if row["version"]:
            assert lines[number].split(maxsplit=1)[1] == f"v{row['version']}, {row['path']}"
        else:
            assert lines[number].split() == [name, "missing"]
            assert lines[number + 1].endswith(row["remedy"])
    assert lines[-2].split() == ["a", "sandbox", "ok"]
    assert lines[-1].startswith("with limits")


def test_a_host_without_control_groups(sh: Shell) -> None:
    data = sh.json("doctor", SANDBOXCORE_CGROUP=NOWHERE)
    assert (data["run"], data["run_limited"]) == ("ok", None)  # a sandbox needs none
    rows = {row["name"]: row for row in data["control_groups"]}
    assert all(
        row["version"] == 0 and f"SANDBOXCORE_CGROUP={NOWHERE}" in row["remedy"] for row in rows.values()
    )
    said = sh("run", "--memory", "64M", "--", "true", status=125, SANDBOXCORE_CGROUP=NOWHERE)
    assert said == f"sandboxcore: limits.memory: not available on this host; {rows['memory']['remedy']}\n"
    said = sh("create", "box", "--accounting", status=125, SANDBOXCORE_CGROUP=NOWHERE)
    assert rows["memory"]["remedy"] in said
    text = sh("doctor", SANDBOXCORE_CGROUP=NOWHERE)
    assert "limits.cpus and limits.cpu_weight: SANDBOXCORE_CGROUP=" in text
    assert text.splitlines()[-1].split(maxsplit=2)[2] == "none is to be had here"


def test_what_is_optional_may_be_missing(sh: Shell) -> None:
    args = ["--memory", "64M", "--accounting", "--optional", "memory", "--optional", "accounting"]
    done = sh.json("run", *args, "--", "true", SANDBOXCORE_CGROUP=NOWHERE)
    assert set(done["applied"]["omitted"]) == {"limits.memory", "accounting"}
    assert done["usage"]["memory_peak"] is None
    plan = sh.json("explain", *args, SANDBOXCORE_CGROUP=NOWHERE)
    assert (plan["controllers"], plan["group_limits"]) == ([], {})
    assert set(plan["omitted"]) == {"limits.memory", "accounting"}
    sh("create", "box", *args, SANDBOXCORE_CGROUP=NOWHERE)
    (row,) = sh.json("stats", SANDBOXCORE_CGROUP=NOWHERE)
    assert row["usage"] is None
    assert "memory" not in row["limits"]  # asked for, not in force


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--memory", "lots", "not a size"),
        ("--memory", "-1", "not a size"),
        ("--swap", "1X", "not a size"),
        ("--io", "fast", "not a size"),
        ("--cpus", "0", "not a positive number"),
        ("--cpus", "two", "not a positive number"),
        ("--cpus", "nan", "not a positive number"),
        ("--cpu-weight", "10001", "not between 1 and 10000"),
        ("--cpu-weight", "1.5", "not a whole number"),
        ("--cpu-time", "0", "not a positive number"),
        ("--wall-time", "-3", "not a positive number"),
        ("--pids", "many", "not a positive number"),
        ("--open-files", "0", "not a positive number"),
        ("--file-size", "?", "not a size"),
        ("--cpuset", "a", "not a list of CPUs"),
        ("--disk", "big", "not a size"),
        ("--inodes", "0.5", "not a whole number"),
        ("--output", "much", "not a size"),
        ("--output-action", "ignore", "truncate"),
    ],
)
def test_a_wrong_value_names_the_option(sh: Shell, option: str, value: str, why: str) -> None:
    verb = ["update", "box"] if option in ("--memory", "--cpus") else ["run"]
    said = sh(*verb, option, value, *(["--", "true"] if verb == ["run"] else []), status=125)
    assert f"'{option}'" in said
    assert why in said


def test_every_limit_has_an_option(sh: Shell, tmp_path: Path) -> None:
    given = {
        "cpu_time": 7, "wall_time": 8.5, "pids": 9, "open_files": 10, "file_size": 11 << 10,
        "output": 12 * MiB, "disk": 13 * MiB, "inodes": 1400, "output_action": "kill", "memory": 64 * MiB,
        "swap": MiB, "cpus": 0.5, "cpu_weight": 50, "io": 100 * MiB, "cpuset": CPU,
    }  # fmt: skip
    assert given.keys() == set(Limits.__dataclass_fields__)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    optional = [f"--optional={name}" for name in cgroup.LIMITS]
    plan = sh.json("explain", *options, *optional)
    assert plan["spec"]["limits"] == given
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'accounting = true\noptional = ["accounting"]\n[limits]\nmemory = "1G"\nopen_files = 50\n'
    )
    combined = sh.json("explain", "--spec", str(spec), "--memory", "none", "--pids", "none")["spec"]
    assert combined["accounting"] is True  # of the file
    assert combined["limits"] == dataclasses.asdict(Limits(pids=None, open_files=50))


def test_explain_shows_what_would_be_written(sh: Shell) -> None:
    needs("memory", "cpu")
    plan = sh.json("explain", "--memory", "64M", "--cpus", "0.5", "--pids", "30")
    assert {"memory", "cpu"} <= set(plan["controllers"])
    wanted = {"memory": 64 * MiB, "cpus": 0.5} | ({"pids": 30} if "pids" in plan["controllers"] else {})
    assert wanted.items() <= plan["group_limits"].items()
    assert plan["omitted"] == []
    text = sh("explain", "--memory", "64M")
    assert "control group: memory" in text
    assert f"group limit: memory {64 * MiB}\n" in text
    assert "group limit" not in sh("explain", "--pids", "30")  # needs none


def test_output_is_about_captured_output(sh: Shell) -> None:
    assert "--json" in sh("run", "--output", "1K", "--", "true", status=125)
    done = sh.run("run", "--json", "--output", "1K", "--output-action", "kill", "--", "yes")
    data = json.loads(done.stdout)
    assert (data["cause"], done.returncode) == ("output", 128 + signal.SIGKILL)
    assert "limits.output: 1 KiB" in data["detail"]
    assert data["truncated"] is True


# --- causes -------------------------------------------------------------------------------------------


def test_a_timeout_is_told(sh: Shell) -> None:
    done = sh.run("run", "--timeout", "0.3", "--", "sleep", "100")
    assert done.returncode == 124
    assert re.fullmatch(r"sandboxcore: timeout: killed after \d\.\d{3} s\n", done.stderr)
    data = json.loads(sh("run", "--wall-time", "0.3", "--json", "--", "sleep", "100", status=124))
    assert (data["cause"], data["timed_out"]) == ("timeout", True)


def test_cpu_time_is_told(sh: Shell) -> None:
    done = sh.run("run", "--cpu-time", "1", "--timeout", str(PATIENCE), "--", *SPIN)
    assert done.returncode in (128 + signal.SIGXCPU, 128 + signal.SIGKILL)
    assert re.fullmatch(r"sandboxcore: cpu_time: limits\.cpu_time: 1 s, used [\d.]+ s\n", done.stderr)


def test_memory_is_told(sh: Shell) -> None:
    needs("memory")
    done = sh.run("run", "--memory", "64M", "--", *HOG)
    assert (done.returncode, done.stdout) == (128 + signal.SIGKILL, "")
    assert re.fullmatch(r"sandboxcore: oom: limits\.memory: 64 MiB, peak [\d.]+ MiB.*\n", done.stderr)
    done = sh.run("run", "--memory", "64M", "--json", "--", *HOG)
    data = json.loads(done.stdout)
    assert (data["cause"], data["returncode"], done.stderr) == ("oom", -signal.SIGKILL, "")
    assert data["detail"].startswith("limits.memory: 64 MiB, peak ")
    assert data["usage"]["oom_kills"] >= 1
    assert data["usage"]["memory_peak"] == pytest.approx(64 * MiB, rel=0.05)


def test_processes_are_told(sh: Shell) -> None:
    needs("pids", "memory")
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 5 & done; exit 3"
    done = sh.run("run", "--pids", "6", "--accounting", "--", "sh", "-c", script)
    assert done.returncode not in (0, 125)
    assert re.fullmatch(
        r"sandboxcore: pids: limits\.pids: 6, \d+ forks refused", done.stderr.splitlines()[-1]
    )


def test_no_limit_no_line(sh: Shell) -> None:
    for command in (["sh", "-c", "exit 3"], ["sh", "-c", "kill -KILL $$"]):
        assert sh.run("run", "--", *command).stderr == ""


def test_causes_in_a_sandbox_that_stays(sh: Shell) -> None:
    needs("memory")
    sh("create", "box", "--memory", "64M")
    done = sh.run("exec", "box", "--", *HOG)
    assert done.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(r"sandboxcore: oom: limits\.memory: 64 MiB, peak [\d.]+ MiB.*\n", done.stderr)
    data = json.loads(sh("exec", "box", "--json", "--", *HOG, status=128 + signal.SIGKILL))
    assert (data["cause"], data["detail"][:22]) == ("oom", "limits.memory: 64 MiB,")

    command = sh("exec", "box", "--detach", "--", *HOG).strip()
    done = sh.run("attach", "box", command)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.startswith("sandboxcore: oom: limits.memory: 64 MiB")
    (row,) = sh.json("ls", "box")
    assert (row["cause"], row["detail"][:22]) == ("oom", "limits.memory: 64 MiB,")
    sh("exec", "box", "--", "true")  # the sandbox stays


# --- stats --------------------------------------------------------------------------------------------


def test_stats_of_nothing(sh: Shell) -> None:
    assert sh.json("stats") == []
    done = sh.run("stats")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [
        "NAME", "STATE", "MEMORY", "PEAK", "LIMIT", "CPU", "PIDS", "READ", "WRITTEN", "PRESSURE",
    ]  # fmt: skip
    sh("create", "rests", "--no-start")
    assert sh.json("stats") == []
    assert "created" in sh("stats", "rests", status=125)
    assert "'nobody'" in sh("stats", "nobody", status=125)


def test_stats_without_a_control_group(sh: Shell) -> None:
    sh("create", "one", "--pids", "50")
    sh("create", "two", "--label", "a=b")
    done = sh.run("stats")
    assert done.returncode == 0
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [["one", "running"], ["two", "running"]]
    assert [row[2:] for row in rows] == [
        ["-", "-", "-", "-", "-/50", "-", "-", "-"],
        ["-", "-", "-", "-", "-/4096", "-", "-", "-"],
    ]
    assert len(done.stderr.splitlines()) == 1  # once
    assert "one, two" in done.stderr
    assert "--accounting" in done.stderr
    data = sh.json("stats", "two")
    assert [(row["name"], row["usage"], row["limits"]["pids"]) for row in data] == [("two", None, 4096)]


def test_stats(sh: Shell) -> None:
    needs("memory", "pids")
    sh("create", "box", "--memory", "100M", "--pids", "50")
    sh("exec", "box", "--", PYTHON, "-I", "-S", "-c", WORK)
    (row,) = sh.json("stats")
    usage = row["usage"]
    assert (row["state"], row["limits"]["memory"], row["limits"]["pids"]) == ("running", 100 * MiB, 50)
    assert 30 * MiB < usage["memory_peak"] < 100 * MiB
    assert 0 < usage["memory"] < usage["memory_peak"]
    assert 0.3 <= usage["cpu_user"] + usage["cpu_system"] < 30
    assert 2 <= usage["pids"] <= usage["pids_peak"]
    assert (usage["oom_kills"], usage["pids_refused"]) == (0, 0)
    assert all(
        value is None or isinstance(value, int | float) for name, value in usage.items() if name != "pressure"
    )

    sh("suspend", "box")
    done = sh.run("stats", "box")
    assert (done.returncode, done.stderr) == (0, "")
    header, line = done.stdout.splitlines()
    cells = dict(zip(header.split(), line.split(), strict=False))
    assert (cells["NAME"], cells["STATE"], cells["LIMIT"]) == ("box", "paused", "100M")
    assert re.fullmatch(r"[\d.]+M", cells["PEAK"])
    assert re.fullmatch(r"\d+\.\d\ds", cells["CPU"])
    assert re.fullmatch(r"\d+/50", cells["PIDS"])
    end = header.index("LIMIT") + len("LIMIT")
    assert line[:end].endswith("100M")  # aligned
    sh("resume", "box")
    sh("stop", "box")
    assert sh.json("stats") == []


def test_accounting_alone(sh: Shell) -> None:
    needs("memory")
    sh("create", "box", "--accounting")
    (row,) = sh.json("stats")
    assert row["limits"]["memory"] is None
    assert row["usage"]["memory"] > 0
    usage = sh.json("exec", "box", "--", PYTHON, "-I", "-S", "-c", "x = bytearray(8 << 20)")["usage"]
    assert usage["memory_peak"] > 8 * MiB


# --- update -------------------------------------------------------------------------------------------


def test_update_of_what_runs(sh: Shell) -> None:
    needs("memory", "pids")
    sh("create", "box", "--memory", "400M")
    sh("exec", "box", "--", *HOG)
    printed = sh("update", "box", "--memory", "64M", "--pids", "40", "--open-files", "100", "--output", "1M")
    assert printed.splitlines() == [
        "memory: 400M -> 64M (now)",
        "pids: 4096 -> 40 (now)",
        "open_files: 65536 -> 100 (next command)",
        "output: 64M -> 1M (next command)",
    ]
    assert sh("exec", "box", "--", "sh", "-c", "ulimit -n") == "100\n"
    assert "limits.memory: 64 MiB" in sh.run("exec", "box", "--", *HOG).stderr
    (row,) = sh.json("stats")
    assert (row["limits"]["memory"], row["limits"]["pids"]) == (64 * MiB, 40)

    data = sh.json("update", "box", "--memory", "none")
    assert data == {"memory": {"before": 64 * MiB, "value": None, "applies": "now"}}
    sh("exec", "box", "--", *HOG)
    (row,) = sh.json("stats")
    assert row["limits"]["memory"] is None
    assert row["usage"]["oom_kills"] >= 1  # still measured


def test_update_without_a_control_group(sh: Shell) -> None:
    sh("create", "box")
    assert sh("update", "box", "--pids", "30", "--cpu-time", "9") == (
        "cpu_time: none -> 9 (next command)\npids: 4096 -> 30 (next command)\n"
    )
    said = sh("update", "box", "--memory", "64M", "--open-files", "7", status=125)
    assert "limits.memory" in said
    assert "accounting" in said
    (row,) = sh.json("stats")
    assert row["limits"]["open_files"] == Limits().open_files  # all, or none
    assert "limits.disk" in sh("update", "box", "--disk", "1M", status=125)
    assert "--memory" in sh("update", "box", status=125)
    assert "'nobody'" in sh("update", "nobody", "--pids", "3", status=125)

    sh("stop", "box")
    assert sh("update", "box", "--disk", "5M", "--pids", "none") == (
        "pids: 30 -> none (next start)\ndisk: 1G -> 5M (next start)\n"
    )
    sh("start", "box")
    size = sh("exec", "box", "--", "stat", "-f", "-c", "%S %b", "/tmp").split()
    assert int(size[0]) * int(size[1]) == 5 * MiB


# --- suspended ----------------------------------------------------------------------------------------


def test_suspend_is_the_freezer(sh: Shell) -> None:
    needs("memory", "freezer")
    sh("create", "box", "--memory", "200M")
    group = sh.group("box")
    command = sh("exec", "box", "--detach", "--", *SPIN).strip()
    sh("suspend", "box")
    assert group.frozen
    sh("resume", "box")
    assert not group.frozen
    sh("suspend", "box")
    sh("rm", "-f", "box")  # kill works on a frozen one
    assert command
    wait_until(lambda: not left(group), "the end of its groups", PATIENCE)


# --- what is left -------------------------------------------------------------------------------------


def test_rm_leaves_no_group(sh: Shell) -> None:
    """Neither the sandbox's, nor those of the process that made it, which is gone for long."""
    needs("memory")
    sh("create", "box", "--memory", "200M")
    group = sh.group("box")
    assert group.populated
    sh("rm", "-f", "box")
    assert left(group) == []


def test_gc_leaves_what_runs(sh: Shell) -> None:
    needs("memory")
    sh("create", "runs", "--memory", "200M")
    sh("create", "rests", "--memory", "200M")
    groups = [sh.group("runs"), sh.group("rests")]
    sh("suspend", "rests")
    done = sh.json("gc")
    assert (done["ended"], done["removed"]) == ([], [])
    assert not [path for group in groups for path in group.places() if str(path) in done["groups"]]
    assert all(group.populated for group in groups)
    sh("exec", "runs", "--", "true")
    sh("resume", "rests")
    sh("exec", "rests", "--", "true")
    assert [row["usage"] is None for row in sh.json("stats")] == [False, False]


def test_gc_removes_the_group_of_a_sandbox_found_dead(sh: Shell) -> None:
    """Whose maker lives on: so its other groups stay."""
    needs("memory")
    with PersistentSandbox.create(
        SandboxSpec(limits=Limits(memory="200M")), name="box", state_dir=sh.state
    ) as box:
        sandbox, pid = box.id, box.record.pid
    group = group_of(sh.state, sandbox)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid) and not group.populated, "the end of init", PATIENCE)
    places = sorted(map(str, group.places()))

    dry = sh.json("gc", "--dry-run")
    assert dry["ended"] == [sandbox]
    assert set(places) <= set(dry["groups"])
    assert all(map(os.path.exists, places))
    printed = sh("gc").splitlines()
    assert f"ended {sandbox}" in printed
    assert {f"removed group {place}" for place in places} <= set(printed)
    assert not any(map(os.path.exists, places))
    assert all(place.parent.exists() for place in group.places())
    assert not set(places) & set(sh.json("gc")["groups"])


def test_looking_at_a_dead_sandbox_removes_its_group(sh: Shell) -> None:
    needs("memory")
    sh("create", "box", "--memory", "200M")
    group, (record,) = sh.group("box"), sh.json("ls")
    os.kill(record["pid"], signal.SIGKILL)
    wait_until(lambda: gone(record["pid"]), "the end of init", PATIENCE)
    assert sh.json("ls")[0]["state"] == "stopped"
    assert left(group) == []


def test_gc_removes_the_groups_of_processes_that_are_gone(sh: Shell) -> None:
    """Sandboxes that nobody has on record. Another process may collect them before we do."""
    needs("memory")
    code = """
        import os, signal
        from sandboxcore import Limits, Sandbox, SandboxSpec
        sandbox = Sandbox.create(SandboxSpec(limits=Limits(memory="200M")))
        print(*sandbox._link.group.places(), sep="\\n", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = host_program(code, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    bases = [Path(line).parent for line in done.stdout.splitlines()]
    assert bases
    wait_until(lambda: not any(map(populated, bases)), "the end of its processes", PATIENCE)
    dry = sh.json("gc", "--dry-run")["groups"]
    assert all(str(base) in dry or not base.exists() for base in bases)
    sh("gc")
    assert not any(base.exists() for base in bases)
