"""How many there may be, what runs without a session, what a manager says of itself, and other processes."""

import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from managed import heard, is_gone, kinds, manager, nothing_left, runs, second, session_in, state
from pooling import in_threads
from support import host_process, leaves_nothing, wait_until

from sandboxcore import (
    Event,
    LifecyclePolicy,
    SandboxError,
    SandboxManager,
    SandboxState,
    SelectionOptions,
    SessionTimeouts,
    SpecError,
    TooManySandboxes,
)
from sandboxcore import SandboxSpec as Spec
from sandboxcore.pool_policy import PoolConfig
from sandboxcore.template import Template

pytestmark = pytest.mark.once

__all__ = ["heard", "manager", "nothing_left", "second", "state"]  # fixtures

POOLED = SelectionOptions(use_pool=True)
PATIENCE = 30


@pytest.fixture
def small(state: Path) -> Any:
    """A manager with room for two."""
    with SandboxManager(state, max_sandboxes=2, sweep_interval=None) as made:
        yield made
        made.destroy_all()


# --- room ---------------------------------------------------------------------------------------------


def test_no_more_than_max_sandboxes(small: SandboxManager) -> None:
    first, other = small.acquire(client_id="a"), small.acquire(client_id="b")
    for act in (
        small.acquire,
        small.create,
        lambda: small.attach("dev", create_if_missing=True),
        lambda: small.run_ephemeral(["true"]),
        lambda: small.run_pooled(["true"]),
        lambda: small.acquire(options=POOLED),
    ):
        with pytest.raises(TooManySandboxes):
            act()
    assert len(small.list_sandboxes()) == len(small.list_sessions()) == 2
    assert small.stats().living == small.stats().max_sandboxes == 2
    assert small.attach(first.sandbox_id, "c").session.sandbox_id == first.sandbox_id  # needs no room
    other.release()
    assert small.run_ephemeral(["true"], wait=PATIENCE).ok


def test_whoever_waits_gets_the_place_that_is_given_back(small: SandboxManager) -> None:
    first, stopped = small.acquire(client_id="a"), small.acquire(client_id="b")
    stopped.sandbox.stop()
    stopped.detach()
    archived = small.create()
    small.destroy(archived.id)
    other = small.create()
    small.archive(other.id)
    blocker = small.create(wait=PATIENCE)
    waiting = (
        lambda: small.resume(stopped, wait=PATIENCE),
        lambda: small.recover(other.id, start=True, wait=PATIENCE),
        lambda: small.attach(stopped.sandbox_id, "c", wait=PATIENCE),
        lambda: small.acquire(wait=PATIENCE).release(),
        lambda: small.run_ephemeral(["true"], wait=PATIENCE),
    )
    with pytest.raises(TooManySandboxes):
        small.resume(stopped)
    for act in waiting:
        began, errors = time.monotonic(), []

        def go(act: Any = act, errors: list[BaseException] = errors) -> None:
            try:
                act()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=go)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        blocker.stop()
        thread.join(PATIENCE)
        assert errors == []
        assert time.monotonic() - began < PATIENCE
        for record in small.list_sandboxes(state="running"):
            if record.id != first.sandbox_id:
                small.find(record.id).stop()
        small._when_there_is_room(blocker.start, PATIENCE)


WAITED: dict[str, Any] = {
    "create": lambda manager, key: manager.create(ttl=500),
    "acquire": lambda manager, key: manager.acquire(ttl=500),
    "pooled": lambda manager, key: manager.acquire(ttl=500, options=POOLED),
    "attach": lambda manager, key: manager.attach(key, "me").session,
    "make": lambda manager, key: manager.attach("dev", "me", create_if_missing=True).session,
}


@pytest.mark.parametrize("way", WAITED)
def test_its_time_begins_when_there_is_room(state: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Not with the waiting, here of 1000 s."""
    timeouts = SessionTimeouts(idle=500)
    with SandboxManager(state, timeouts=timeouts, sweep_interval=None) as manager:
        stopped = manager.create()
        stopped.stop()
        now, room = time.time, manager._when_there_is_room

        def waited(*args: Any) -> Any:
            monkeypatch.setattr(manager, "_when_there_is_room", room)
            monkeypatch.setattr(time, "time", lambda: now() + 1000)
            return room(*args)

        monkeypatch.setattr(manager, "_when_there_is_room", waited)
        made = WAITED[way](manager, stopped.id)
        done = manager.reconcile()
        assert (done.deleted, done.terminated) == ((), ())
        for record in manager.list_sandboxes():
            assert record.expires_at is None or record.expires_at > time.time() + 490
        for session in manager.list_sessions():
            assert session.created_at == made.created_at > time.time() - 10
        manager.destroy_all()


def test_who_waits_too_long_is_told_so(small: SandboxManager) -> None:
    small.create(), small.create()
    began = time.monotonic()
    with pytest.raises(TooManySandboxes):
        small.acquire(wait=0.2)
    assert 0.2 <= time.monotonic() - began < 10
    assert len(small.list_sandboxes()) == 2


def test_waiting_for_the_users_room_is_no_busy_loop(small: SandboxManager) -> None:
    """This state directory has room, which says nothing of how many the user may have."""
    attempts: list[float] = []

    def start(succeeds: int) -> int:
        attempts.append(time.monotonic())
        if len(attempts) < succeeds:
            raise TooManySandboxes(2)
        return len(attempts)

    with pytest.raises(TooManySandboxes):
        small._when_there_is_room(lambda: start(1 << 30), 0.22)
    assert len(attempts) <= 6
    attempts.clear()
    assert small._when_there_is_room(lambda: start(4), None) == 4
    assert attempts[-1] - attempts[0] >= 3 * 0.05


def test_what_is_due_makes_room(small: SandboxManager) -> None:
    heard: list[Event] = []
    small.events.subscribe(heard.append)
    made, session = small.create(ttl=0.01), small.acquire(client_id="me", timeouts=SessionTimeouts(idle=0.01))
    time.sleep(0.02)
    assert runs(small.acquire(wait=PATIENCE))
    (out,) = [event for event in heard if event.kind == "session.timed_out"]
    assert (out.session, out.client, out.sandbox) == (session.id, "me", session.sandbox_id)
    (expired,) = [event for event in heard if event.kind == "sandbox.expired"]
    assert expired.sandbox == made.id


def test_threads_never_have_more_than_there_may_be(small: SandboxManager, state: Path) -> None:
    errors: list[BaseException] = []
    most, now, guard = 0, 0, threading.Lock()
    with SandboxManager(state, max_sandboxes=2, sweep_interval=None) as other:

        def work(one: SandboxManager, client: str) -> None:
            nonlocal most, now
            try:
                for _ in range(3):
                    with one.acquire(client_id=client, wait=60) as session:
                        with guard:
                            now += 1
                            most = max(most, now)
                        assert runs(session)
                        with guard:
                            now -= 1
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=((small, other)[n % 2], f"c{n}")) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors == []
    assert 1 <= most <= 2
    assert small.list_sandboxes() == []


def test_what_is_warm_makes_room(small: SandboxManager) -> None:
    assert small.run_pooled(["true"]).ok
    pool = small.pools.pool()
    wait_until(lambda: pool.available == 2, "its pool to have taken every place")
    made = small.create(), small.create()
    with pytest.raises(TooManySandboxes):
        small.create()
    for one in made:
        assert one.exec(["true"]).ok


def test_whoever_was_faster_is_no_reason_to_give_up(
    small: SandboxManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room was made, and somebody else has taken it: it is made again, but not for ever."""
    monkeypatch.setattr(small, "_make_room", lambda: True)
    tried: list[int] = []

    def take(refused: int) -> str:
        tried.append(refused)
        if len(tried) <= refused:
            raise TooManySandboxes(2, str(small.state_dir))
        return "taken"

    assert small._when_there_is_room(lambda: take(3), 0.0) == "taken"
    tried.clear()
    with pytest.raises(TooManySandboxes):
        small._when_there_is_room(lambda: take(100), 0.0)
    assert len(tried) < 10


def test_as_many_as_there_may_be_use_the_pool_one_after_the_other(small: SandboxManager) -> None:
    """What is on its way out, or in, is nobody's: there is always a place for whoever has none."""

    def work(number: int) -> None:
        for _ in range(25):
            assert small.run_pooled(["true"], timeout=20).ok

    in_threads(2, work)


# --- without a session --------------------------------------------------------------------------------


def test_run_ephemeral_with_files(manager: SandboxManager, heard: list[Event]) -> None:
    done = manager.run_ephemeral(
        ["cat", "/workspace/in", "-"], files={"/workspace/in": b"file "}, input=b"input", timeout=20
    )
    assert (done.stdout, done.ok) == (b"file input", True)
    assert manager.list_sandboxes() == []
    assert kinds(heard, "command") == ["command.started", "command.ended"]
    assert list(heard[0].data["args"]) == ["cat", "/workspace/in", "-"]
    assert heard[0].data["command"] == heard[1].data["command"]
    with pytest.raises(SandboxError):
        manager.run_ephemeral(["/no/such/program"])
    assert heard[-1].data["error"]


def test_run_pooled(manager: SandboxManager) -> None:
    for _ in range(3):
        assert manager.run_pooled(["echo", "x"]).stdout == b"x\n"
    stats = manager.stats()
    assert stats.pool.hits + stats.pool.misses == 3
    assert stats.hit_rate is not None
    assert 0 <= stats.hit_rate <= 1
    assert stats.commands["exited"] == 3


def test_pools_that_are_filled_from_the_beginning(state: Path) -> None:
    spec = Spec(env={"WARM": "1"})
    with SandboxManager(
        state, warm=[spec, "minimal"], pool=PoolConfig(min_warm=1, max_warm=2), sweep_interval=None
    ) as manager:
        wait_until(lambda: manager.stats().pool_size >= 2, "warm ones", PATIENCE)
        session = manager.acquire(spec, POOLED)
        assert session.sandbox.exec(["sh", "-c", "echo $WARM"]).stdout == b"1\n"
        assert manager.stats().hit_rate == 1
    with SandboxManager(state, sweep_interval=None) as manager:
        assert manager.list_sandboxes() == []


def test_pools_for_which_there_is_no_room_are_not_waited_for(state: Path) -> None:
    config = PoolConfig(min_warm=2, max_warm=2)
    with SandboxManager(
        state, max_sandboxes=1, warm=["minimal"], pool=config, sweep_interval=None
    ) as manager:
        wait_until(lambda: manager.stats().pool_size == 1, "the one for which there is room", PATIENCE)
        assert manager.run_pooled(["echo", "x"], spec=Spec(profile="minimal")).stdout == b"x\n"
    with pytest.raises(SpecError):
        SandboxManager(state, warm=[Spec(ro=["/no/such/thing"])], sweep_interval=None)


def test_destroy_all(manager: SandboxManager, second: SandboxManager) -> None:
    kept = manager.create(labels={"keep": "1"})
    for name in ("active", "detached", "suspended"):
        session_in(manager, name)
    pooled = manager.acquire(options=POOLED)
    theirs = second.acquire(options=POOLED)
    done = manager.destroy_all(labels={"no": "such"})
    assert done == ()
    gone = [one.id for one in manager.list_sandboxes() if one.id not in (kept.id, theirs.sandbox_id)]
    manager.update(kept.id, labels={})
    assert {action.id for action in manager.destroy_all()} == {*gone, kept.id}
    assert [record.id for record in manager.list_sandboxes()] == [theirs.sandbox_id]
    assert pooled.state == "terminated"
    assert runs(theirs)
    assert manager.destroy_all() == ()


# --- templates and forks ------------------------------------------------------------------------------


def test_from_a_template(manager: SandboxManager, overlays: None) -> None:
    template = Template(Spec(writable=True), "echo made > /workspace/by")
    made = manager.create(template=template, template_help="has /workspace/by", name="dev")
    session = manager.acquire(template=template, client_id="me")
    for sandbox in (made, session.sandbox):
        assert sandbox.files.read("/workspace/by") == b"made\n"
        record = manager.get_record(sandbox.id)
        assert record is not None
        assert record.template == template.name
    record = manager.get_record("dev")
    assert record is not None
    assert record.template_help == "has /workspace/by"
    with pytest.raises(SandboxError):
        manager.acquire(template=Template(Spec(writable=True), "exit 3"))
    assert len(manager.list_sandboxes()) == 2


def test_fork(manager: SandboxManager, heard: list[Event], overlays: None) -> None:
    policy = LifecyclePolicy(auto_stop=60)
    session = manager.acquire(Spec(writable=True), client_id="me", labels={"a": "b"}, policy=policy)
    session.sandbox.files.write("/workspace/x", b"1")
    heard.clear()
    children = manager.fork(session, 2)
    assert kinds(heard, "session") == ["session.acquired"] * 2
    assert {event.session for event in heard if event.kind == "session.acquired"} == {
        child.id for child in children
    }
    for child in children:
        assert child.sandbox.files.read("/workspace/x") == b"1"
        child.sandbox.files.write("/workspace/x", b"2")
        assert (child.client_id, child.labels) == ("me", {"a": "b"})
        record = manager.get_record(child.sandbox_id)
        assert record is not None
        assert record.policy == policy.to_dict()
    assert session.sandbox.files.read("/workspace/x") == b"1"
    children[0].release()
    assert is_gone(manager, children[0].sandbox_id)
    assert runs(children[1])


def test_a_fork_for_which_there_is_no_room_leaves_nothing(small: SandboxManager, overlays: None) -> None:
    session = small.acquire(Spec(writable=True))
    with pytest.raises(TooManySandboxes):
        small.fork(session, 2)
    assert small.list_sessions() == [session]
    assert len(small.list_sandboxes()) == 1
    assert runs(session)


# --- what it says of itself ---------------------------------------------------------------------------


def test_stats_health_and_prometheus(manager: SandboxManager) -> None:
    session = manager.acquire(client_id="me")
    session_in(manager, "detached", "you")
    session_in(manager, "suspended")
    session_in(manager, "terminated")
    assert session.sandbox.exec(["sh", "-c", "exit 3"]).returncode == 3
    stats = manager.stats()
    assert stats.created == 4
    assert stats.sandboxes == {"running": 2, "paused": 1}
    assert stats.sessions == {"active": 1, "detached": 1, "suspended": 1, "terminated": 1}
    assert (stats.active_sandboxes, stats.living, stats.max_sandboxes) == (3, 3, 100)
    assert stats.commands == {"exited": 1}
    assert stats.mean_creation is not None
    for summary in (stats.creation, *stats.phases.values()):
        assert summary["count"] == 4
        assert 0 < (summary["p50"] or 0) <= (summary["p95"] or 0) <= (summary["p99"] or 0)
    assert json.loads(json.dumps(stats.to_dict()))["created"] == 4
    health = manager.health()
    assert health.healthy, health
    assert health.backend == "namespaces"
    assert health.utilisation == pytest.approx(0.03, abs=0.02)
    assert health.last_created is not None
    text = manager.prometheus()
    for line in (
        'sandboxcore_sandboxes{state="running"} 2',
        'sandboxcore_sessions{state="detached"} 1',
        "sandboxcore_created_total 4",
        'sandboxcore_commands_total{cause="exited"} 1',
    ):
        assert line in text.splitlines()


def test_numbers_of_pools(state: Path) -> None:
    config = PoolConfig(min_warm=1, max_warm=1, adaptive=False)
    with SandboxManager(state, pool=config, sweep_interval=None) as manager:
        assert manager.stats().mean_creation is None
        assert manager.pools.warm("standard", timeout=PATIENCE)
        manager.pools.claim(network="private").close()
        manager.create()
        stats = manager.stats()
        assert (stats.created, stats.creation["count"], stats.pool.created) == (3, 1, 2)
        assert stats.mean_creation == stats.creation["sum"]
        lines = manager.prometheus().splitlines()
        manager.destroy_all()
    for line in (
        "created_total 3",
        "creation_seconds_count 1",
        "pool_created_total 2",
        "pool_target 1",
        "pool_hits_total 0",
        'pool_misses_total{reason="network"} 1',
        *(f"pool_{name}_total 0" for name in ("expired", "discarded", "resets", "refill_failures")),
    ):
        assert f"sandboxcore_{line}" in lines


def test_a_full_one_warns(small: SandboxManager) -> None:
    small.create(), small.create()
    health = small.health()
    assert health.utilisation == 1
    assert health.warnings
    assert not health.healthy


# --- two processes ------------------------------------------------------------------------------------

OTHER = """
    import sys
    from sandboxcore import SandboxManager, SelectionOptions
    manager = SandboxManager(sys.argv[1], sweep_interval=None)
    pooled = manager.acquire(options=SelectionOptions(use_pool=True), client_id="other", name="pooled")
    kept = manager.acquire(client_id="other", name="kept")
    kept.sandbox.files.write("/tmp/x", b"1")
    kept.detach()
    print(pooled.id, kept.id, flush=True)
    for line in sys.stdin:
        pass
"""


def test_another_process(manager: SandboxManager, state: Path) -> None:
    """It shares what is persistent, and is seen with what is its own; which ends with it."""
    with host_process(OTHER, str(state)) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert len(line) == 2, process.stderr.read() if process.stderr else ""
        pooled, kept = manager.get_session(line[0]), manager.get_session(line[1])
        assert pooled is not None
        assert kept is not None
        assert (pooled.state, pooled.client_id) == ("active", "other")
        with pytest.raises(SandboxError, match=str(process.pid)):
            manager.attach("pooled")
        assert manager.acquire(client_id="other") == kept
        assert kept.sandbox.files.read("/tmp/x") == b"1"
        assert manager.stats().living >= 2
        process.kill()
        process.wait(PATIENCE)
        done = manager.reconcile()
    assert [action.id for action in done.actions if action.kind == "forget"] == [pooled.sandbox_id]
    assert pooled.state == "terminated"
    assert is_gone(manager, "pooled")
    assert runs(kept)


def test_nobody_needs_a_manager_that_was_closed(manager: SandboxManager, state: Path) -> None:
    with SandboxManager(state, sweep_interval=None) as other:
        session = other.acquire(client_id="me")
        pooled = other.acquire(options=POOLED)
    other.close()
    assert is_gone(manager, pooled.sandbox_id)
    found = manager.get_session(session.id)
    assert found == session
    assert found is not None
    assert runs(found)
    assert manager.get_state(session.sandbox_id) is SandboxState.RUNNING


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"sweep_interval": 0}, "sweep_interval: 0 is not"),
        ({"max_sandboxes": 0}, "max_sandboxes: 0 is not"),
        ({"warm": ["no such profile"]}, "'no such profile' is not one of"),
        ({"timeouts": 3}, "timeouts: 3 is no SessionTimeouts"),
        ({"policy": {}}, "policy: {} is no LifecyclePolicy"),
        ({"pool": 2}, "pool: 2 is no PoolConfig"),
        ({"on_event": [3]}, "3 cannot be called"),
    ],
)
def test_wrong_arguments(state: Path, wrong: dict[str, Any], why: str) -> None:
    """And nothing is left open for the collector to close."""
    gc.collect()
    gc.disable()
    try:
        with leaves_nothing(), pytest.raises(SpecError, match=why):
            SandboxManager(state, **wrong)
    finally:
        gc.enable()
