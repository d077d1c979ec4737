"""Late binding: a warm sandbox becomes what a claim asks for, or one of its own is started."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pooling import members, ready
from support import can_grant, wait_until

import sandboxcore
from sandboxcore import (
    Limits,
    PoolConfig,
    Sandbox,
    SandboxError,
    SandboxPool,
    SandboxSpec,
    SandboxState,
    SetupError,
    SpecError,
    UnsupportedHost,
)


def reasons(pool: SandboxPool) -> dict[str, int]:
    return dict(pool.stats().misses_by_reason)


def test_environment_for_all_that_comes_later() -> None:
    with ready(SandboxSpec(env={"BASE": "1"})) as pool:
        (warm,) = members(pool)
        with pool.claim(env={"LATE": "2"}) as sandbox:
            assert sandbox is warm
            script = "echo $BASE$LATE"
            assert sandbox.shell(script).stdout == b"12\n"
            with sandbox.popen(["sh", "-c", script]) as process:
                assert process.communicate(timeout=20)[0] == b"12\n"
            command = sandbox.detach(["sh", "-c", script])
            assert command.wait(20).returncode == 0
            assert command.logs().data == b"12\n"
            assert sandbox.environment["LATE"] == "2"
            assert sandbox.spec.env["LATE"] == "2"
            sandbox.stop()
            sandbox.start()
            assert sandbox.shell(script).stdout == b"12\n"
        assert reasons(pool) == {}


def test_a_path_of_ones_own() -> None:
    with ready() as pool:
        files = {"bin/hello": ("#!/bin/sh\necho hello\n", 0o755)}
        with pool.claim(env={"PATH": "/workspace/bin:/usr/bin:/bin"}, files=files) as sandbox:
            assert sandbox.exec(["hello"]).stdout == b"hello\n"


def test_files() -> None:
    with ready() as pool, pool.claim(files={"a": "text", "/tmp/d/b": (b"\x00", 0o600)}) as sandbox:
        assert sandbox.files.read("/workspace/a") == b"text"
        assert sandbox.files.stat("/tmp/d/b").mode == 0o600
        assert reasons(pool) == {}


def test_identity() -> None:
    with ready(SandboxSpec(labels={"kind": "x"})) as pool:
        about: dict[str, Any] = {"owner": "o", "description": "d", "metadata": {"m": [1]}}
        with pool.claim(name="mine", labels={"a": "b"}, **about) as sandbox:
            assert sandbox.name == "mine"
            assert sandbox.labels == {"kind": "x", "a": "b"}
            assert (sandbox.owner, sandbox.description, sandbox.metadata) == ("o", "d", {"m": [1]})
        with pool.claim() as other:
            assert other.name == other.id
            assert other.labels == {"kind": "x"}


def test_limits_of_commands() -> None:
    with ready() as pool:
        (warm,) = members(pool)
        with pool.claim(limits={"open_files": 99, "wall_time": 0.3}) as sandbox:
            assert sandbox is warm
            assert sandbox.shell("ulimit -n").stdout == b"99\n"
            assert sandbox.exec(["sleep", "60"]).timed_out
            assert sandbox.spec.limits.open_files == 99
        with pool.claim(limits=Limits(open_files=98)) as other:
            assert other.shell("ulimit -n").stdout == b"98\n"
        assert reasons(pool).keys() <= {"empty"}


def test_limits_of_the_group() -> None:
    try:
        pool = SandboxPool(SandboxSpec(limits=Limits(memory="512M")), PoolConfig(min_warm=1))
    except UnsupportedHost as error:
        pytest.skip(str(error))
    with pool:
        assert pool.wait_ready(20)
        with pool.claim(limits={"memory": "64M"}) as sandbox:
            assert sandbox.capabilities.control_group is not None
            assert sandbox.capabilities.control_group["memory"] == 64 << 20
        assert reasons(pool) == {}


def test_what_cannot_be_late_is_started_with_it() -> None:
    with ready(min_warm=2) as pool:
        warm = set(members(pool))
        with pool.claim(network="private") as one, pool.claim(limits={"disk": "8M"}) as two:
            assert one.spec.network == "private"
            assert two.spec.limits.disk == 8 << 20
            assert not {one, two} & warm
        with pool.claim(ro=["/etc:/tmp/etc"]) as three:
            assert three.exec(["test", "-e", "/tmp/etc/passwd"]).ok
        assert reasons(pool) == {"network": 1, "limits": 1, "mounts": 1}
        assert set(members(pool)) == warm, "nobody lost a warm one by that"
        with pool.claim(network="none") as four:
            assert four in warm


def test_mounts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen")
    tmp_path.chmod(0o755)
    with ready(binds="ro") as pool:
        (warm,) = members(pool)
        with pool.claim(ro=[(tmp_path, "/workspace/in"), (tmp_path / "file", "/tmp/one")]) as sandbox:
            assert sandbox is warm
            assert sandbox.shell("cat in/file /tmp/one").stdout == b"seenseen"
            assert sandbox.exec(["touch", "in/new"]).returncode != 0
        assert reasons(pool) == {}
        with pool.claim(rw=[(tmp_path, "/workspace/out")]):
            assert reasons(pool) == {"mounts": 1}


def test_writable_mounts(tmp_path: Path) -> None:
    can_grant(tmp_path)
    with ready(binds="rw") as pool:
        (warm,) = members(pool)
        assert warm.spec.live_binds == "rw"
        with pool.claim(rw=[(tmp_path, "/workspace/out")], ro=["/etc:/workspace/out2"]) as sandbox:
            assert sandbox is warm
            sandbox.shell("echo x >out/file", check=True)
        assert (tmp_path / "file").read_text() == "x\n"
        assert (tmp_path / "file").stat().st_uid == os.geteuid()
        assert reasons(pool) == {}


def test_pools_mount_no_more_than_their_spec_says() -> None:
    assert SandboxPool().spec.live_binds is None
    assert SandboxPool(SandboxSpec(live_binds="rw"), PoolConfig(binds="ro")).spec.live_binds == "rw"
    assert SandboxPool(SandboxSpec(live_binds="ro")).spec.live_binds == "ro"


# --- what cannot be ---------------------------------------------------------------------------------------


def cold_error(**asked: Any) -> SandboxError | OSError:
    """What a sandbox that is started with it raises."""
    files = asked.pop("files", {})
    try:
        with Sandbox(SandboxSpec(**asked)) as sandbox:
            sandbox.files.write_many(files)
    except (SandboxError, OSError) as error:
        return error
    raise AssertionError("it can be")


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        ({"ro": ["/no/such/directory:/workspace/x"]}, SpecError),
        ({"ro": ["/etc:/usr/not-there"]}, SetupError),
        ({"files": {"/usr/file": "x"}}, OSError),
        ({"files": {"/no/file": "x"}}, OSError),
        ({"ro": ["/etc:/workspace/etc"], "files": {"etc/file": "x"}}, OSError),
    ],
)
def test_what_fails_late_fails_as_it_would_have_at_once(asked: dict[str, Any], kind: type[Exception]) -> None:
    expected = cold_error(**asked)
    with ready(binds="ro") as pool:
        (warm,) = members(pool)
        with pytest.raises(kind) as caught:
            pool.claim(**asked)
        assert type(caught.value) is type(expected)
        assert str(caught.value) == str(expected)
        assert warm.state is SandboxState.DESTROYED, "it is half of what was asked for"
        stats = pool.stats()
        assert (stats.claimed, stats.hits) == (0, 0)
        with pool.claim(timeout=20) as sandbox:
            assert sandbox is not warm
            assert sandbox.binds == ()


@pytest.mark.parametrize(
    "asked",
    [{"env": {"A=": ""}}, {"limits": {"pids": 0}}, {"network": "no"}, {"name": "\x1b[2J"}, {"name": ""}],
)
def test_what_no_sandbox_can_be_costs_no_warm_one(asked: dict[str, Any]) -> None:
    with ready() as pool:
        before = members(pool)
        with pytest.raises(SpecError):
            pool.claim(**asked)
        assert members(pool) == before
        assert pool.stats().misses == 0


def test_one_that_dies_while_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked gets another one."""
    update: Callable[..., Any] = Sandbox.update

    def dying(sandbox: Sandbox, **changes: Any) -> Any:
        sandbox.stop()
        return update(sandbox, **changes)

    monkeypatch.setattr(Sandbox, "update", dying)
    with ready() as pool, pool.claim(limits={"open_files": 50}, files={"a": "b"}) as sandbox:
        assert sandbox.shell("ulimit -n; cat a").stdout == b"50\nb"
        assert reasons(pool) == {"failed": 1}


def test_an_interrupt_while_it_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(sandbox: Sandbox, **changes: Any) -> Any:
        raise KeyboardInterrupt

    with ready() as pool:
        (warm,) = members(pool)
        monkeypatch.setattr(Sandbox, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.claim(limits={"open_files": 50})
        wait_until(lambda: warm.state is SandboxState.DESTROYED, "its end")
        assert pool.stats().claimed == 0


def test_the_members_of_a_pool_are_as_isolated_as_any() -> None:
    with ready() as pool, pool.claim(env={"A": "b"}, limits={"pids": 9}) as one, Sandbox() as two:
        ours, theirs = one.capabilities, two.capabilities
        for name in ("no_new_privs", "seccomp_mode", "seccomp_filters", "capability_sets", "uid", "groups"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert [m.target for m in ours.mounts] == [m.target for m in theirs.mounts]
        assert sandboxcore.run(["true"]).ok
