"""Reset: what is given back becomes as new, which is read back, or nobody gets it."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from living import python
from pooling import PATIENCE, Events, members, ready
from support import leaves_nothing, wait_until

import sandboxcore
from sandboxcore import Limits, PoolConfig, Sandbox, SandboxPool, SandboxSpec, SandboxState, pool_stock
from sandboxcore.pool_reset import View, look, survivors

# What a client may leave, and how it is found. Each runs in a sandbox that is looked at afterwards.
LEFT = {
    "file in /tmp": ("touch /tmp/x", "directory /tmp"),
    "file in /dev/shm": ("touch /dev/shm/x", "directory /dev/shm"),
    "file in the workspace": ("mkdir -p /workspace/a/b", "directory /workspace"),
    "file in /var/tmp": ("echo x >/var/tmp/x", "directory /var/tmp"),
    "mode of /tmp": ("chmod 700 /tmp", "directory /tmp"),
    "attribute of a directory": (
        python("import os; os.setxattr('/workspace', 'user.x', b'y')"),
        "directory /workspace",
    ),
    "shared memory": (python("import ctypes; assert ctypes.CDLL(None).shmget(7, 99, 0o1600) >= 0"), "ipc"),
    "semaphores": (python("import ctypes; assert ctypes.CDLL(None).semget(7, 1, 0o1600) >= 0"), "ipc"),
    "message queue": (python("import ctypes; assert ctypes.CDLL(None).msgget(7, 0o1600) >= 0"), "ipc"),
}


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


@pytest.fixture(scope="module")
def pristine() -> Iterator[View]:
    with Sandbox() as sandbox:
        yield look(sandbox)


@pytest.mark.parametrize("what", LEFT)
def test_what_was_left_is_found(what: str, pristine: View) -> None:
    """The read-back by itself, without any reset: it has to see each of these."""
    command, found = LEFT[what]
    with Sandbox() as sandbox:
        assert survivors(pristine, look(sandbox)) == []
        if "user.x" in str(command) and not sandboxcore.host.features().tmpfs_xattr:
            pytest.skip("files in memory have no extended attributes here")
        sandbox.exec(["sh", "-c", command] if isinstance(command, str) else command, check=True)
        assert any(text.startswith(found) for text in survivors(pristine, look(sandbox)))


def test_a_process_that_was_left_is_found(pristine: View) -> None:
    with Sandbox() as sandbox, sandbox.popen(["sleep", "600"]) as process:
        assert any("sleep" in text for text in survivors(pristine, look(sandbox)))
        process.kill()


def test_what_the_host_has_changed_is_found(pristine: View, tmp_path: Path) -> None:
    with Sandbox(SandboxSpec(live_binds="ro")) as sandbox:
        before = look(sandbox)
        sandbox.bind(tmp_path, "/workspace/x")
        assert any(text.startswith("binds") for text in survivors(before, look(sandbox)))
        assert any(text.startswith("mounts") for text in survivors(before, look(sandbox)))
    with Sandbox() as sandbox:
        sandbox.update(open_files=77)
        sandbox.labels["a"] = "b"
        sandbox.detach(["true"]).wait(20)
        found = survivors(pristine, look(sandbox))
        for name in ("limits", "labels", "commands"):
            assert any(text.startswith(name) for text in found)


def test_a_namespace_that_was_kept_is_found(pristine: View) -> None:
    with Sandbox() as sandbox:
        view = look(sandbox)
        for kind in ("user", "mnt", "pid", "net", "ipc", "uts"):
            same = {**view.namespaces, kind: pristine.namespaces[kind]}
            found = survivors(pristine, dataclasses.replace(view, namespaces=same))
            assert found == [f"{kind} namespace: the same"]
        none = dataclasses.replace(view, namespaces={})
        assert any(text.startswith("namespaces") for text in survivors(pristine, none))
    assert survivors(pristine, None)


def test_files_in_an_overlay_are_found(overlays: None) -> None:
    with Sandbox(SandboxSpec(writable=True)) as sandbox:
        before = look(sandbox)
        sandbox.shell("mkdir -p /etc/deep && echo x >/etc/deep/file", check=True)
        assert survivors(before, look(sandbox)) != []


# --- the pool -----------------------------------------------------------------------------------------------


def test_what_is_given_back_is_as_new(tmp_path: Path) -> None:
    events = Events()
    config = PoolConfig(min_warm=1, max_warm=1, reset=True, binds="ro")
    with SandboxPool(config=config, on_event=events) as pool:
        assert pool.wait_ready(PATIENCE)
        pool.resize(min_warm=0, max_warm=1)  # nothing else comes
        used = pool.claim(
            client="one",
            env={"SECRET": "x"},
            files={"/tmp/secret": "x"},
            ro=[(tmp_path, "/workspace/in")],
            limits={"open_files": 70},
            labels={"who": "one"},
        )
        (claimed,) = events.of("pool.claimed")
        used.detach(["sleep", "600"])
        inits = used.pid
        pool.release(used)
        wait_until(lambda: pool.available == 1, "it to be reset")
        assert pool.stats().resets == 1
        assert not os.path.exists(f"/proc/{inits}")
        assert used.state is SandboxState.DESTROYED
        with pytest.raises(sandboxcore.SandboxError):
            used.exec(["true"])
        with pool.claim(client="two") as fresh:
            assert fresh is not used
            assert fresh.files.list("/tmp") == fresh.files.list("/workspace") == []
            assert fresh.shell("echo $SECRET").stdout == b"\n"
            assert fresh.spec == pool.spec
            assert fresh.capabilities.limits["Max open files"][0] != 70
            assert (fresh.labels, fresh.binds, fresh.commands()) == ({}, (), [])
            assert fresh.owner is None
        (event,) = wait_until(lambda: events.of("pool.reset"), "its being told")
        assert event["used"] == claimed["sandbox"] == used.id
        stats = pool.stats()
        assert (stats.hits, stats.misses, stats.resets, stats.reset_failures) == (2, 0, 1, 0)


def test_a_group_of_ones_own_each_time() -> None:
    try:
        spec = SandboxSpec(limits=Limits(memory="256M"), accounting=True)
        pool = SandboxPool(spec, PoolConfig(min_warm=1, max_warm=1, reset=True))
    except sandboxcore.UnsupportedHost as error:
        pytest.skip(str(error))
    with leaves_nothing(), pool:
        assert pool.wait_ready(PATIENCE)
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim(limits={"memory": "128M"})
        used.shell("head -c 64M /dev/zero >/tmp/x", check=True)
        peak = used.usage().memory_peak
        pool.release(used)
        wait_until(lambda: pool.available == 1, "it to be reset")
        with pool.claim() as fresh:
            assert fresh.spec.limits.memory == 256 << 20
            assert peak is None or (fresh.usage().memory_peak or 0) < peak


def test_what_survives_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reset that does not do its work hands out nothing."""
    events = Events()
    pool = SandboxPool(config=PoolConfig(min_warm=1, max_warm=1, reset=True), on_event=events)
    with pool:
        assert pool.wait_ready(PATIENCE)
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim()
        start = Sandbox.start

        def dirty(sandbox: Sandbox) -> None:
            start(sandbox)
            sandbox.shell("touch /tmp/left", check=True)

        with monkeypatch.context() as patched:
            patched.setattr(Sandbox, "start", dirty)
            pool.release(used)
            wait_until(lambda: pool.stats().reset_failures == 1, "the reset")
        assert pool.available == 0
        assert used.state is SandboxState.DESTROYED
        (event,) = wait_until(lambda: events.of("pool.discarded"), "its being told")
        assert event["reason"] == "reset"
        assert any("left" in text for text in event["survived"])


@pytest.mark.parametrize(
    "failure", [OSError(5, "no"), sandboxcore.SandboxError("no"), TimeoutError("no"), RuntimeError("no")]
)
def test_what_cannot_be_read_back_is_discarded(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(sandbox: Sandbox) -> View:
        raise failure

    with leaves_nothing(), ready(reset=True, max_warm=1) as pool:
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim()
        monkeypatch.setattr(pool_stock, "look", unreadable)
        pool.release(used)
        wait_until(lambda: pool.stats().reset_failures == 1, "the reset")
        assert pool.available == 0


def test_one_that_was_killed_is_reset_all_the_same() -> None:
    with ready(reset=True, max_warm=1) as pool:
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim()
        used.stop()
        pool.release(used)
        wait_until(lambda: pool.stats().resets == 1, "the reset")
        with pool.claim() as fresh:
            assert fresh.exec(["true"]).ok


def test_resets_keep_to_the_most() -> None:
    with leaves_nothing(), ready(reset=True, min_warm=2, max_warm=2) as pool:
        claimed = [pool.claim() for _ in range(5)]
        for sandbox in claimed:
            pool.release(sandbox)
            assert pool.available <= 2
        wait_until(lambda: all(s.state is SandboxState.DESTROYED for s in claimed), "all to be dealt with")
        assert pool.available <= 2
        assert len(set(members(pool)) & set(claimed)) == 0


@pytest.mark.parametrize("fields", [{"proc": "pid"}, {"network": "private"}, {"tmpfs": ["/cache"]}])
def test_kinds_of_sandboxes(fields: dict[str, Any]) -> None:
    with ready(SandboxSpec(**fields), reset=True, max_warm=1) as pool:
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim()
        used.shell("touch /tmp/x; touch /cache/y; true", check=True)
        pool.release(used)
        wait_until(lambda: pool.stats().resets == 1, "the reset")
        with pool.claim() as fresh:
            assert fresh.exec(["test", "!", "-e", "/tmp/x", "-a", "!", "-e", "/cache/y"]).ok


def test_a_writable_root(overlays: None) -> None:
    with ready(SandboxSpec(writable=True), reset=True, max_warm=1) as pool:
        pool.resize(min_warm=0, max_warm=1)
        used = pool.claim()
        used.shell("echo x >/etc/new", check=True)
        used.snapshot()
        used.shell("echo y >/etc/newer", check=True)
        pool.release(used)
        wait_until(lambda: pool.stats().resets == 1, "the reset")
        with pool.claim() as fresh:
            assert fresh.diff() == []


def test_without_a_place_there_is_no_reset_and_no_failure() -> None:
    sandboxcore.host_limits(max_sandboxes=1)
    try:
        with ready(reset=True, max_warm=1) as pool:
            pool.resize(min_warm=0, max_warm=1)
            used = pool.claim()
            pool.release(used)
            wait_until(lambda: used.state is SandboxState.DESTROYED, "its end")
            stats = pool.stats()
            assert (stats.resets, stats.reset_failures, stats.warm) == (0, 0, 0)
    finally:
        sandboxcore.host_limits(max_sandboxes=None)
