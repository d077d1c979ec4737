"""The fault walk: every system call after clone is made to fail, one after the other.

A helper built with SBX_FAULT counts the calls of the child (of the template's builder, of init and of
the payload until exec) and fails the chosen one. Allowed ends: a refusal that names the stage, with
nothing left behind; or, where the code has an answer to that errno, a sandbox no weaker than one without
the fault. Never a weaker sandbox, never silence, never a hang.
"""

import errno
import gc
import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support import descendants

import sandboxcore
from sandboxcore import (
    Cause,
    Sandbox,
    SandboxSpec,
    _native,
    binds,
    command,
    execution,
    groups,
    plan,
    process,
    request,
    spawner,
)

CSRC = Path(__file__).parents[2] / "csrc"

# A payload that prints all it can tell about its isolation.
FINGERPRINT = r"""
grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Seccomp_filters|Cap...|SigBlk|SigIgn):' /proc/self/status
cut -d' ' -f4,5,6 /proc/self/mountinfo | sort
cat /proc/self/limits /proc/self/uid_map; umask; hostname; pwd; ls /proc/self/fd | wc -l
cat /proc/sys/user/max_user_namespaces /proc/keys /proc/kallsyms | wc -c; ls /sys/class/net 2>&1
cat injected
"""

# What only one kind of step does; the stages it may be reported as.
STAGES_OF_CALL = {
    "setsid": {"session"},
    "keyctl": {"session"},
    "sethostname": {"hostname"},
    "seccomp": {"seccomp"},
    "execve": {"exec"},
    "landlock_create_ruleset": {"landlock"},
    "landlock_add_rule": {"landlock"},
    "landlock_restrict_self": {"landlock"},
    "capset": {"cred", "init"},
    "setgroups": {"cred"},
    "prlimit64": {"rlimit"},
    "vfork": {"fork"},
    "faccessat": {"proc"},
    "prctl": {"cred", "init"},
    "fsopen": {"mount"},
    "fsconfig": {"mount"},
    "fsmount": {"mount"},
    "mount": {"proc"},
    "dup3": {"stdio"},
    "kill": {"init"},
    "getrusage": {"init"},
    "sendmsg": {"init"},
}
ORDER = (
    *("idmap", "session", "init", "mount", "root", "mount", "nslimit", "proc", "mount", "hostname", "init"),
    "fork",
    *("session", "stdio", "cred", "file", "cwd", "landlock", "rlimit", "seccomp", "exec", "init"),
)


def call_numbers() -> dict[int, str]:
    """System call numbers by asking the C preprocessor, for this architecture."""
    names = "\n".join(f"{name} SYS_{name}" for name in STAGES_OF_CALL)
    done = subprocess.run(
        ["gcc", "-E", "-P", "-include", "sys/syscall.h", "-"],
        input=names, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    rows = [line.split() for line in done.stdout.splitlines() if line]
    return {int(row[1]): row[0] for row in rows if len(row) == 2 and row[1].isdecimal()}


def drop_spawners() -> None:
    for connection in list(spawner._spawners.values()):
        spawner.drop_spawner(connection)
        groups.let_go(connection)


@pytest.fixture
def faulty(fault_helper: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_native.NativeFailure]]:
    """Runs go through the fault helper; every bare failure is collected."""
    failures: list[_native.NativeFailure] = []
    render = process.render

    def collect(*args: object) -> sandboxcore.SandboxError:
        failures.append(args[-1])  # type: ignore[arg-type]
        return render(*args)  # type: ignore[arg-type]

    monkeypatch.setenv("SANDBOXCORE_SPAWNER", str(fault_helper))
    for module in (process, execution, command):
        monkeypatch.setattr(module, "render", collect)
    drop_spawners()
    yield failures
    drop_spawners()


SPEC = sandboxcore.SandboxSpec(
    tmpfs=["/opt/scratch:1M"],
    overlay=[(CSRC, "/data")],
    writable=True,
    limits=sandboxcore.Limits(cpu_time=100),
)


def attempt() -> sandboxcore.ExecResult:
    return sandboxcore.run(["/bin/sh", "-c", FINGERPRINT], spec=SPEC, files={"injected": "data"}, timeout=30)


def counts() -> tuple[int, int, int]:
    """Descriptors here and in the spawner, and the spawner's children."""
    pid = next(iter(spawner._spawners.values())).pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{pid}/fd")), len(children)


def settled() -> tuple[int, int, int]:
    """The counts once the spawner has reaped every sandbox and closed what its last request brought; only the
    maker of namespaces is left."""
    gc.collect()  # what earlier tests left to the collector would go meanwhile
    deadline = time.monotonic() + 20
    last, now = None, counts()
    while now[2] > 1 or now != last:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
        last, now = now, counts()
    return now


def walk(
    monkeypatch: pytest.MonkeyPatch, failures: list[_native.NativeFailure], code: int
) -> list[tuple[str, int]]:
    """Fail call 1, 2, 3 ... with `code` until nothing fails any more; returns (stage, syscall) of each."""
    clean = attempt()
    assert clean.ok
    before = settled()
    seen: list[tuple[str, int]] = []
    survived = 0
    # a call that only confirms an honest ENOENT or EINVAL before it: that one is then reported
    doubts = {number for number, name in call_numbers().items() if name in ("faccessat", "prctl")}
    for number in range(1, 2000):
        monkeypatch.setattr(request, "FAULT", (number, code))
        failures.clear()
        try:
            result = attempt()
        except (sandboxcore.SetupError, sandboxcore.UnsupportedHost):
            survived = 0
            if code == errno.EUCLEAN and failures[0].syscall not in doubts:
                assert failures[0].errno == code, (number, failures[0])
            seen.append((failures[0].stage, failures[0].syscall))
        else:
            assert result.stdout == clean.stdout, f"call {number} failed with {code} and weakened the sandbox"
            survived += 1
        if survived == 50:  # far more than any retried or answered call in a row
            break
    monkeypatch.setattr(request, "FAULT", (0, 0))
    assert attempt().stdout == clean.stdout
    assert settled() == before
    return seen


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_call_fails_at_the_right_stage(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = walk(monkeypatch, faulty, errno.EUCLEAN)

    numbers = call_numbers()
    for stage, number in seen:
        if number in numbers:
            assert stage in STAGES_OF_CALL[numbers[number]], numbers[number]
    stages = [stage for i, (stage, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != stage]
    position = 0
    for stage in stages:  # in the recipe's order
        assert stage in ORDER[position:], (stage, stages)
        position = ORDER.index(stage, position)
    assert {*stages} == {*ORDER}
    assert len(seen) > 150


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOSYS, errno.EINVAL, errno.EINTR, errno.EACCES])
def test_likely_errors_never_weaken(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert len(walk(monkeypatch, faulty, code)) > 100


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_call_of_the_template(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = attempt()
    before = settled()
    stages = []
    for number in range(1, 2000):
        monkeypatch.setattr(plan, "FAULT", number)
        monkeypatch.setattr(plan, "_cache", {})
        faulty.clear()
        try:
            result = attempt()
        except (sandboxcore.SetupError, sandboxcore.UnsupportedHost):
            assert faulty[0].errno == errno.EUCLEAN
            stages.append(faulty[0].stage)
        else:
            assert result.stdout == clean.stdout
            break
    assert {*stages} == {"template", "source", "node", "mount", "root"}
    assert len(stages) > 100
    after = settled()
    assert after[0] == before[0]
    assert after[1] - before[1] <= 1  # the one new template of the last, good attempt


# --- living sandboxes ---------------------------------------------------------------------------


def comparable(output: bytes) -> bytes:
    """Where launchers have the payload's id, its limit of processes has room for them, who come and go."""
    return re.sub(rb"Max processes.*\n", b"", output)


def by_exec(living: Sandbox, folder: Path) -> tuple[sandboxcore.ExecResult, bytes]:
    done = living.exec(
        ["/bin/sh", "-c", FINGERPRINT], files={"injected": "data"}, stderr=sandboxcore.STDOUT, timeout=20
    )
    return done, comparable(done.stdout)


def by_relay(living: Sandbox, folder: Path) -> tuple[sandboxcore.ExecResult, bytes]:
    """Its streams are copied by the launcher."""
    with (folder / "out").open("wb") as out, open("/dev/zero", "rb") as zero:
        files = {"injected": "data"}
        with living.popen(
            ["/bin/sh", "-c", FINGERPRINT], stdin=zero, stdout=out, stderr=sandboxcore.STDOUT, files=files
        ) as process:
            process.wait(20)
    assert process.result is not None
    return process.result, comparable((folder / "out").read_bytes())


def by_terminal(living: Sandbox, folder: Path) -> tuple[sandboxcore.ExecResult, bytes]:
    with living.popen(["/bin/sh", "-c", FINGERPRINT], pty=True, files={"injected": "data"}) as process:
        output = process.communicate(timeout=20)[0] or b""
    assert process.result is not None
    return process.result, comparable(output)


WAYS = {"exec": by_exec, "relay": by_relay, "terminal": by_terminal}
STAGES_OF_COMMANDS = {"fork", "session", "stdio", "cred", "file", "cwd", "rlimit", "exec"}
NORMAL_ENDS = (sandboxcore.SetupError, sandboxcore.UnsupportedHost)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", [errno.EUCLEAN, errno.EINTR, errno.EAGAIN, errno.ENOMEM])
@pytest.mark.parametrize("way", WAYS)
def test_every_call_of_a_command(
    faulty: list[_native.NativeFailure],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
    code: int,
) -> None:
    """In the launcher and in its child: an error that says where, or the same command, or, where a stream
    broke, less of its output. The sandbox stays."""
    with Sandbox(SPEC) as living:
        done, clean = WAYS[way](living, tmp_path)
        assert done.ok, clean
        gc.collect()
        init, before = living.pid, len(os.listdir("/proc/self/fd"))
        stages, survived = set(), 0
        for number in range(1, 3000):
            monkeypatch.setattr(request, "FAULT", (number, code))
            faulty.clear()
            try:
                done, output = WAYS[way](living, tmp_path)
            except NORMAL_ENDS:
                assert faulty[0].errno in (code, errno.EPERM), faulty
                stages.add(faulty[0].stage)
                survived = 0
            else:
                assert done.cause is not Cause.TIMEOUT, number
                whole = done.cause is Cause.EXITED and done.returncode == 0
                assert output == clean if whole and way != "relay" else clean.startswith(output), (
                    number,
                    done,
                )
                survived = survived + 1 if whole and output == clean else 0
            if survived == 50:
                break
        monkeypatch.setattr(request, "FAULT", (0, 0))
        assert WAYS[way](living, tmp_path)[1] == clean
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        assert living.pid == init
        if code == errno.EUCLEAN:
            assert stages >= STAGES_OF_COMMANDS
            assert ("pty" in stages) is (way == "terminal")


def walk_of_births(
    faulty: list[_native.NativeFailure],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    codes: Sequence[int],
    *,
    spec: SandboxSpec = SPEC,
    stands: Callable[[Sandbox], None] = lambda living: None,
    ran: Callable[[sandboxcore.ExecResult], None] = lambda done: None,
) -> set[str]:
    """From a birth to a first command, in init and in the first launcher, each of which counts on.

    Each call fails with one of the ``codes``, as it comes. ``stands`` looks at every sandbox that came to
    be, ``ran`` at every command that was not killed. Returns the stages that failed."""
    with Sandbox(spec) as living:
        clean = by_exec(living, tmp_path)[1]
    stages, survived = set(), 0
    for number in range(1, 3000):
        faulty.clear()
        monkeypatch.setattr(request, "FAULT", (number, random.choice(codes)))
        living = Sandbox(spec)
        try:
            living.start()
            monkeypatch.setattr(request, "FAULT", (0, 0))
            stands(living)
            done, output = by_exec(living, tmp_path)
        except NORMAL_ENDS:
            stages.add(faulty[0].stage)
            survived = 0
        except (sandboxcore.SandboxGone, sandboxcore.InvalidTransition):
            survived = 0  # it stood already: its end is the answer
        else:
            assert done.cause is Cause.KILLED or output == clean, (number, done)
            if done.cause is not Cause.KILLED:
                ran(done)
            survived = survived + 1 if output == clean else 0
        finally:
            living.close()
        if survived == 30:
            break
    monkeypatch.setattr(request, "FAULT", (0, 0))
    with Sandbox(spec) as living:
        assert by_exec(living, tmp_path)[1] == clean
    return stages


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", [errno.EUCLEAN, errno.EINTR, errno.ENOMEM])
def test_every_call_of_a_living_sandbox(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    with Sandbox(SPEC) as living:
        by_exec(living, tmp_path)
    before = settled()
    stages = walk_of_births(faulty, monkeypatch, tmp_path, [code])
    after = settled()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)
    if code == errno.EUCLEAN:
        assert stages >= {"idmap", "session", "init", "mount", "nslimit", "proc", "hostname", "cred"}
        assert stages >= {"landlock", "seccomp", "launcher"}


# --- other layers for a living sandbox ------------------------------------------------------------------

MARK = """
cat /data/mark /srv/mark; stat -c %a /data; ls /data /srv | wc -l
cut -d' ' -f5,6 /proc/self/mountinfo | grep -v scratch/ | sort
"""
CHANGES: dict[str, Callable[[Sandbox, sandboxcore.Snapshot], object]] = {
    "seal": lambda living, other: living.snapshot(copy=False),
    "copy": lambda living, other: living.snapshot(copy=True),
    "discard": lambda living, other: living.discard(),
    "restore": lambda living, other: living.restore(other),
    "begin": lambda living, other: Sandbox.from_snapshot(other).close(),
}


def look(sandbox: Sandbox) -> str:
    """What a command sees; or what everybody does instead, where it does not come to an end."""
    done = sandbox.shell(MARK, text=True, timeout=60)
    everybody = [] if done.ok else [Path(f"/proc/{pid}/stat").read_text() for pid in descendants(sandbox.pid)]
    assert done.ok, (done, everybody)
    return done.stdout


def marked() -> Sandbox:
    living = Sandbox.create(SPEC)
    done = living.shell("for dir in /data /srv; do cd $dir; echo $dir > mark; mkdir d; done; chmod 711 /data")
    assert done.ok, done
    return living


@pytest.mark.slow
@pytest.mark.usefixtures("overlays")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("way", "code"), [*((way, errno.EUCLEAN) for way in CHANGES), ("seal", errno.ENOMEM)]
)
def test_every_call_of_a_change_of_layers(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch, way: str, code: int
) -> None:
    """In init, in its copier, and in the init of a fork: an error that says where, and nothing has changed;
    or the end of a sandbox that cannot go on; or the change."""
    with marked() as first:
        clean, other = look(first), first.snapshot()
    gc.collect()
    stages, ended, survived = set(), 0, 0
    living = Sandbox.from_snapshot(other)
    for number in range(1, 3000):
        monkeypatch.setattr(request, "FAULT", (number, code))
        failed, lost = None, False
        try:
            CHANGES[way](living, other)
        except NORMAL_ENDS as error:
            failed = error
        except sandboxcore.SandboxError:  # taken for the end of the spawner: there is a new one without it
            assert (way, number) == ("begin", 1)
            lost = True
        monkeypatch.setattr(request, "FAULT", (0, 0))
        if lost:
            living.close()
            with marked() as first:
                other = first.snapshot()
            living = Sandbox.from_snapshot(other)
        if failed:
            # the start of a sandbox reads an answer out of some errors: the walks above
            assert way == "begin" or failed.errno == code, (number, failed, faulty[-1])
            stages.add(failed.stage)
        try:
            assert look(living) == clean, (number, failed)
            with living.fork()[0] as child:
                assert look(child) == clean, (number, failed)
        except sandboxcore.SandboxGone:
            assert failed, number
            ended += 1
            living.close()
            living = Sandbox.from_snapshot(other)
        else:
            living.restore(other)
        survived = 0 if failed else survived + 1
        if survived == 20:
            break
    living.close()
    assert "mount" in stages
    assert (ended > 0) is (way in ("seal", "discard", "restore")), (ended, way)


# --- binds that come and go ------------------------------------------------------------------------------

MAPPED = "cut -d' ' -f4,5,6 /proc/self/mountinfo | grep -v scratch/ | sort"


@pytest.mark.slow
@pytest.mark.usefixtures("overlays")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["lend", "bind", "unbind", "lazy", "restore", "snapshot"])
def test_every_call_of_a_live_bind(
    faulty: list[_native.NativeFailure], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """In the spawner's child, and in init: an error that says where, and nothing has changed; or the end."""
    (tmp_path / "file").write_text("host\n")
    tmp_path.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, 12345)
    code, path, spec = errno.EUCLEAN, "/tmp/y", SPEC.replace(live_binds="rw")

    def begin() -> tuple[Sandbox, sandboxcore.Snapshot]:
        living = Sandbox.create(spec)
        kept = living.snapshot()
        for target in ("/data/ro", "/workspace/rw", "/tmp/x"):
            living.bind(tmp_path, target, read_only=target.endswith("ro"))
        assert living.shell("mkdir /tmp/y").ok
        if way in ("unbind", "lazy"):
            living.bind(tmp_path, path)
        return living, kept

    actions: dict[str, Callable[[], object]] = {
        "lend": lambda: living.bind(tmp_path, path, read_only=False),
        "bind": lambda: living.bind(tmp_path, path),
        "unbind": lambda: living.unbind(path),
        "lazy": lambda: living.unbind(path, lazy=True),
        "restore": lambda: living.restore(kept),
        "snapshot": lambda: living.snapshot(copy=False),
    }
    begin()[0].close()
    before = settled()
    living, kept = begin()
    clean, bound, stages, ended, survived = living.shell(MAPPED).stdout, living.binds, set(), 0, 0
    for number in range(1, 2000):
        monkeypatch.setattr(binds if way == "lend" else request, "FAULT", (number, code))
        failed = None
        try:
            actions[way]()
        except NORMAL_ENDS as error:
            failed = error
            stages.add(error.stage if error.errno == code else error)
        monkeypatch.setattr(binds if way == "lend" else request, "FAULT", (0, 0))
        survived = 0 if failed else survived + 1
        if failed is None and way in ("lend", "bind"):
            living.unbind(path)
        elif failed is None and way in ("unbind", "lazy"):
            living.bind(tmp_path, path)
        elif failed is None:
            living.restore(kept)  # or there would be a layer more, and a call
        try:
            assert living.shell(MAPPED).stdout == clean, (number, failed)
            assert living.binds == bound
        except sandboxcore.SandboxGone:
            assert failed, number
            ended += 1
            living.close()
            living, kept = begin()
        if survived == (20 if way in ("restore", "snapshot") else 5):
            break
    assert living.shell("cat /data/ro/file /workspace/rw/file /tmp/x/file").stdout == 3 * b"host\n"
    for bind in reversed(living.binds):
        living.unbind(bind.target)
    living.close()
    kept.close()
    assert settled() == before
    assert stages == {"template", "source"} if way == "lend" else stages <= {"mount", "root"}, stages
    assert (ended > 0) is (way in ("restore", "snapshot")), (ended, way)
