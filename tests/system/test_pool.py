"""SandboxPool: what is warm, who gets it, and what is left."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pooling import PATIENCE, Events, in_threads, kill, members, ready
from support import gone, host_program, kill_spawners, leaves_nothing, wait_until

import sandboxcore
from sandboxcore import (
    InvalidTransition,
    PoolConfig,
    Sandbox,
    SandboxNotFound,
    SandboxPool,
    SandboxPools,
    SandboxSpec,
    SandboxState,
    SpecError,
    TooManySandboxes,
    pool_stock,
)
from sandboxcore.pool_stock import Stock


@pytest.fixture(autouse=True, scope="module")
def spawner_runs() -> None:
    """What is counted is what comes after the first use."""
    sandboxcore.run(["true"])


def test_a_claim_gets_a_warm_one() -> None:
    with ready() as pool:
        (warm,) = members(pool)
        with pool.claim(client="one") as sandbox:
            assert sandbox is warm
            assert sandbox.exec(["echo", "hi"], check=True).stdout == b"hi\n"
            assert pool.client(sandbox) == "one"
            stats = pool.stats()
            assert (stats.hits, stats.misses, stats.claimed, stats.hit_rate) == (1, 0, 1, 1.0)
        assert pool.replenish(PATIENCE)
        assert pool.available == pool.warm_count == 1
        assert pool.stats().claimed == 0
        assert members(pool) != [warm]


def test_what_is_given_back_is_destroyed_and_nobody_elses() -> None:
    with ready() as pool:
        sandbox = pool.claim()
        pid = sandbox.pid
        pool.release(sandbox)
        wait_until(lambda: sandbox.state is SandboxState.DESTROYED, "its end")
        wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the end of its init")
        with pytest.raises(SandboxNotFound):
            pool.release(sandbox)
        for _ in range(3):
            assert pool.replenish(PATIENCE)
            other = pool.claim()
            assert other is not sandbox
            pool.release(other)


def test_giving_back_what_is_not_the_pools() -> None:
    with ready() as pool, Sandbox() as sandbox:
        with pytest.raises(SandboxNotFound):
            pool.release(sandbox)
        assert sandbox.exec(["true"]).ok


def test_run() -> None:
    with ready() as pool:
        result = pool.run(["sh", "-c", "cat; echo $X"], input=b"in", env={"X": "y"}, client="c")
        assert result.stdout == b"iny\n"
        with pytest.raises(sandboxcore.CommandFailed):
            pool.run(["false"], check=True)
        with pytest.raises(sandboxcore.ProgramNotFound):
            pool.run(["no-such-program"])
        wait_until(lambda: pool.stats().claimed == 0, "everything to be given back")


def test_without_a_warm_one_a_cold_one_is_started() -> None:
    with SandboxPool(config=PoolConfig(min_warm=0, max_warm=2, adaptive=False)) as pool:
        with pool.claim() as sandbox:
            assert sandbox.exec(["true"]).ok
        stats = pool.stats()
        assert dict(stats.misses_by_reason) == {"empty": 1}
        assert (stats.hits, stats.misses, stats.hit_rate, stats.created, stats.warm) == (0, 1, 0.0, 1, 0)


def test_a_pool_learns_from_misses() -> None:
    with SandboxPool(config=PoolConfig(min_warm=0, max_warm=3)) as pool:
        assert pool.available == 0
        pool.release(pool.claim())
        wait_until(lambda: pool.available == 1, "one to be ready")
        for sandbox in [pool.claim() for _ in range(6)]:
            pool.release(sandbox)
        wait_until(lambda: pool.available == 3, "as many as there may be")
        assert pool.stats().target == 3


def test_waiting_for_a_warm_one() -> None:
    with SandboxPool(config=PoolConfig(min_warm=1, max_warm=1)) as pool:
        sandbox = pool.claim(timeout=PATIENCE)  # right after the start: there cannot be one yet
        assert pool.stats().hits == 1
        sandbox.close()


def test_replenish_resize_and_their_bounds() -> None:
    with ready() as pool:
        pool.resize(min_warm=4)
        assert pool.replenish(PATIENCE)
        assert pool.available == 4
        pool.resize(min_warm=1, max_warm=2)
        wait_until(lambda: pool.available == 2, "what is too many to end")
        with pytest.raises(SpecError):
            pool.resize(min_warm=3)
        assert (pool.config.min_warm, pool.config.max_warm) == (1, 2)


def test_the_most_is_never_exceeded() -> None:
    seen, events = [], Events()

    def observe(kind: str, data: Any) -> None:
        events(kind, data)
        seen.append(pool.available)

    pool = SandboxPool(config=PoolConfig(min_warm=2, max_warm=3), on_event=observe)
    with pool:
        for _ in range(10):
            claimed = [pool.claim() for _ in range(3)]
            for sandbox in claimed:
                pool.release(sandbox)
        assert pool.replenish(PATIENCE)
    assert max(seen) <= 3
    assert events.of("pool.refilled")


def test_the_rate_of_refills() -> None:
    with SandboxPool(config=PoolConfig(min_warm=3, max_warm=3, refill_rate=10)) as pool:
        began = time.monotonic()
        assert pool.wait_ready(PATIENCE)
        assert time.monotonic() - began >= 0.19


def test_what_is_old_is_replaced_though_nobody_claims() -> None:
    with ready(warm_ttl=0.2) as pool:
        (first,) = members(pool)
        wait_until(lambda: members(pool) and members(pool) != [first], "another one")
        assert pool.stats().expired >= 1
        wait_until(lambda: first.state is SandboxState.DESTROYED, "the end of the old one")


def test_the_dead_are_never_handed_out() -> None:
    with ready(min_warm=3, max_warm=3) as pool:
        for sandbox in members(pool):
            kill(sandbox)
        with pool.claim() as sandbox:
            assert sandbox.exec(["true"]).ok
        assert pool.stats().discarded >= 1
        assert pool.replenish(PATIENCE)
        assert all(sandbox.state is SandboxState.RUNNING for sandbox in members(pool))


def test_events() -> None:
    events = Events()

    def observe(kind: str, data: Any) -> None:
        events(kind, data)
        raise RuntimeError("an observer that fails disturbs nobody")

    with SandboxPool(config=PoolConfig(min_warm=1, max_warm=1), on_event=observe) as pool:
        assert pool.wait_ready(PATIENCE)
        first = pool.claim(client="me")
        second = pool.claim(network="private")
    assert events.of("pool.claimed") == [{"sandbox": first.id, "client": "me"}]
    assert events.of("pool.missed") == [{"sandbox": second.id, "client": None, "reason": "network"}]
    assert events.of("pool.refilled")[0]["sandbox"] == first.id
    assert all(data["reason"] == "draining" for data in events.of("pool.discarded"))
    first.close()
    second.close()


# --- what is left -----------------------------------------------------------------------------------------


def test_drain_leaves_nothing_and_lets_go_on() -> None:
    with leaves_nothing():
        before = set(threading.enumerate())
        pool = SandboxPool(config=PoolConfig(min_warm=3, max_warm=3)).start()
        assert pool.wait_ready(PATIENCE)
        kept = pool.claim()
        pids = [sandbox.pid for sandbox in members(pool)]
        pool.drain(PATIENCE)
        assert pool.available == 0
        assert not {t for t in set(threading.enumerate()) - before if t.name == "sandboxcore-pool"}
        assert all(gone(pid) for pid in pids)
        assert kept.exec(["true"]).ok, "what was claimed stays"
        cold = pool.claim()
        assert dict(pool.stats().misses_by_reason) == {"draining": 1}
        pool.release(cold)
        pool.release(kept)
        assert kept.state is SandboxState.DESTROYED
        pool.start()
        assert pool.wait_ready(PATIENCE)
        pool.close()
        pool.close()
        with pytest.raises(InvalidTransition):
            pool.claim()
        with pytest.raises(InvalidTransition):
            pool.start()


@contextmanager
def draining(monkeypatch: pytest.MonkeyPatch, joining: Callable[[], Any]) -> Iterator[SandboxPool]:
    """A pool whose thread ends when somebody begins to wait for that; who has waited does this, too."""
    go, finish = threading.Event(), Stock.finish

    def held(stock: Stock) -> None:
        assert go.wait(PATIENCE)
        finish(stock)

    def join(timeout: float | None = None) -> None:
        go.set()
        threading.Thread.join(thread, timeout)
        joining()

    with monkeypatch.context() as patched, ready() as pool:
        patched.setattr(Stock, "finish", held)
        thread = pool._stock._thread
        assert thread is not None
        pool._stock.shut()
        patched.setattr(thread, "join", join)
        yield pool


def pool_threads() -> int:
    return [thread.name for thread in threading.enumerate()].count("sandboxcore-pool")


def test_starting_twice_while_it_is_drained_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pool_threads()
    with draining(monkeypatch, threading.Barrier(2, timeout=PATIENCE).wait) as pool:
        in_threads(2, lambda number: pool.start())
        assert pool_threads() == before + 1
        assert pool.wait_ready(PATIENCE)
    assert pool_threads() == before


def test_what_is_closed_while_somebody_starts_it_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = pool_threads()
    with draining(monkeypatch, lambda: pool._stock.shut("closed")) as pool:
        with pytest.raises(InvalidTransition):
            pool.start()
        assert pool_threads() == before
        with pytest.raises(InvalidTransition):
            pool.claim()


def test_draining_while_somebody_starts_it_again_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    shut = Stock.shut

    def and_start(stock: Stock, state: str = "draining") -> None:
        shut(stock, state)
        if state == "draining":
            stock.open()

    with ready() as pool, monkeypatch.context() as patched:
        patched.setattr(Stock, "shut", and_start)
        pool.drain(PATIENCE)
        assert pool.wait_ready(PATIENCE)


def test_where_there_can_be_no_thread_it_is_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with leaves_nothing(), SandboxPool(config=PoolConfig(min_warm=1, max_warm=1)) as pool:
        pool.drain()
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError):
                pool.start()
        pool.claim().close()
        assert dict(pool.stats().misses_by_reason) == {"draining": 1}
        pool.start()
        assert pool.wait_ready(PATIENCE)


def test_draining_at_any_moment() -> None:
    with leaves_nothing():
        for number in range(6):
            pool = SandboxPool(config=PoolConfig(min_warm=4, max_warm=4)).start()
            time.sleep(number * 0.002)
            pool.close()
            assert pool.available == 0


def test_a_pool_that_nobody_has_any_more() -> None:
    with leaves_nothing():
        pool = SandboxPool(config=PoolConfig(min_warm=2, max_warm=2)).start()
        assert pool.wait_ready(PATIENCE)
        thread = pool._stock._thread
        assert thread is not None
        stock = pool._stock
        wait_until(lambda stock=stock: stock._parked, "the thread to sleep")
        del pool, stock
        gc.collect()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.mark.parametrize("end", ["pass", "raise KeyboardInterrupt", "sys.exit(3)"])
def test_an_interpreter_that_ends(end: str) -> None:
    done = host_program(
        f"""
        import sys
        from sandboxcore import PoolConfig, SandboxPool
        pool = SandboxPool(config=PoolConfig(min_warm=3, max_warm=3)).start()
        assert pool.wait_ready(20)
        kept = pool.claim()
        print(kept.pid, *[member.sandbox.pid for member in pool._stock._members], flush=True)
        {end}
        """
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 3
    assert "Fatal" not in done.stderr
    for pid in pids:
        wait_until(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "the end of it all")


def test_a_fork_has_no_pool() -> None:
    done = host_program(
        """
        import os
        from sandboxcore import PoolConfig, SandboxGone, SandboxPool, SandboxPools
        with SandboxPools(PoolConfig(min_warm=2, max_warm=2)) as pools:
            pool = pools.pool()
            assert pool.wait_ready(20)
            mine = pool.claim()
            for round in range(5):
                pool._stock._changed.acquire()  # as its thread may have it at that moment
                child = os.fork()
                if child == 0:
                    for use in (pool.claim, pool.start, pool.stats, pools.claim, lambda: pool.release(mine)):
                        try:
                            use()
                        except SandboxGone:
                            continue
                        os._exit(2)
                    pool.close()
                    pools.close()
                    os._exit(0)
                pool._stock._changed.release()
                assert os.waitpid(child, 0)[1] == 0
                assert mine.exec(["true"]).ok
                assert pool.run(["true"]).ok
        print("ok")
        """
    )
    assert done.stdout == "ok\n", done.stderr


def test_a_spawner_that_dies() -> None:
    """What is ready needs none any more; what comes next brings up another."""
    with ready(min_warm=2, max_warm=2) as pool:
        kill_spawners()
        before = members(pool)
        for _ in range(4):
            with pool.claim() as sandbox:
                assert sandbox.exec(["true"]).ok
        assert pool.replenish(PATIENCE)
        assert not set(before) & set(members(pool))


# --- many at once -----------------------------------------------------------------------------------------


def test_eight_threads_never_get_the_same_one() -> None:
    claims, releases, lock, held = [], [], threading.Lock(), set()
    with leaves_nothing(), ready(min_warm=4, max_warm=6) as pool:

        def work(number: int) -> None:
            for _ in range(12):
                sandbox = pool.claim(client=str(number))
                with lock:
                    assert sandbox.id not in held
                    held.add(sandbox.id)
                    claims.append(sandbox.id)
                assert sandbox.exec(["true"], timeout=20).ok
                assert pool.client(sandbox) == str(number)
                releases.append(sandbox.id)
                pool.release(sandbox)
                assert pool.available <= 6

        in_threads(8, work)
        stats = pool.stats()
        assert len(set(claims)) == len(claims) == 96, "each was handed out once"
        assert stats.hits + stats.misses == 96
        wait_until(lambda: pool.stats().claimed == 0, "everything to be given back")


@pytest.fixture
def places() -> Iterator[None]:
    """At most two sandboxes of this process at once."""
    yield
    sandboxcore.host_limits(max_sandboxes=None)


def test_too_many_ahead_of_time_is_no_failure(places: None) -> None:
    """And who needs a place gets that of a warm one."""
    sandboxcore.host_limits(max_sandboxes=2)
    with SandboxPool(config=PoolConfig(min_warm=3, max_warm=3)) as pool:
        wait_until(lambda: pool.available == 2, "as many as there may be")
        assert not pool.replenish(0.3)
        assert pool.stats().refill_failures == 0
        with pool.claim(network="private") as other:
            assert other.spec.network == "private"
            with pool.claim() as last:
                assert last.exec(["true"]).ok
                with pytest.raises(TooManySandboxes):
                    pool.claim()


def test_who_needs_a_place_gets_that_of_one_that_was_given_back(
    places: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_stock, "QUIET", 1e9)  # nobody ends it by himself
    monkeypatch.setattr(pool_stock, "PATIENCE", 1e9)
    sandboxcore.host_limits(max_sandboxes=1)
    with SandboxPool(config=PoolConfig(min_warm=0, max_warm=1, adaptive=False)) as pool:
        for _ in range(3):
            pool.release(pool.claim())
        last = pool.claim()
        with pytest.raises(TooManySandboxes):
            pool.claim()
        pool.release(last)


def test_who_needs_a_place_waits_for_one_that_ends(places: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ending, waiting, close = threading.Event(), threading.Event(), Sandbox.close

    def held(sandbox: Sandbox) -> None:
        if threading.current_thread().name == "sandboxcore-pool":
            ending.set()
            assert waiting.wait(PATIENCE)
        close(sandbox)

    def passing(stock: Stock) -> bool:
        waiting.set()
        return asked(stock)

    asked = Stock.passing
    monkeypatch.setattr(Sandbox, "close", held)
    monkeypatch.setattr(Stock, "passing", passing)
    sandboxcore.host_limits(max_sandboxes=1)
    with SandboxPool(config=PoolConfig(min_warm=0, max_warm=1, adaptive=False)) as pool:
        pool.release(pool.claim())
        assert ending.wait(PATIENCE)
        with pool.claim() as sandbox:
            assert sandbox.exec(["true"]).ok


def test_who_needs_a_place_gets_that_of_another_pool(places: None) -> None:
    sandboxcore.host_limits(max_sandboxes=2)
    with SandboxPools(PoolConfig(min_warm=2, max_warm=2, adaptive=False)) as pools:
        assert pools.warm(ONE, timeout=PATIENCE)
        with pools.claim(TWO) as one, pools.claim(TWO) as two:
            assert one.exec(["true"]).ok
            assert two.exec(["true"]).ok
            assert not pools.make_room()
            with pytest.raises(TooManySandboxes):
                pools.claim(ONE)


def test_starts_that_fail_ahead_of_time_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(24, "too many open files"), sandboxcore.SetupError("clone", 11)]
    start = Sandbox.start

    def failing(sandbox: Sandbox) -> None:
        if failures and threading.current_thread().name == "sandboxcore-pool":
            raise failures.pop()
        start(sandbox)

    monkeypatch.setattr(Sandbox, "start", failing)
    with SandboxPool(config=PoolConfig(min_warm=1, max_warm=1)) as pool:
        with pool.claim() as sandbox:
            assert sandbox.exec(["true"]).ok
        wait_until(lambda: pool.available == 1, "the third attempt")
        assert pool.stats().refill_failures == 2


# --- pools by their specs -----------------------------------------------------------------------------------

ONE, TWO = SandboxSpec(hostname="one"), SandboxSpec(hostname="two")


def test_each_spec_has_its_pool() -> None:
    with leaves_nothing(), SandboxPools(PoolConfig(min_warm=1, max_warm=1)) as pools:
        assert pools.warm(ONE, TWO, "minimal", timeout=PATIENCE)
        for spec in (ONE, TWO, SandboxSpec(hostname="one")):
            sandbox = pools.claim(spec, client="c")
            assert sandbox.exec(["uname", "-n"]).stdout.decode().strip() == spec.hostname
            pools.release(sandbox)
            with pytest.raises(SandboxNotFound):
                pools.release(sandbox)
            pools.pool(spec).replenish(PATIENCE)
        assert pools.run(["true"], spec="minimal").ok
        assert len(pools.each()) == 3
        stats = pools.stats()
        assert (stats.hits, stats.misses) == (4, 0)
        with pytest.raises(SpecError):
            pools.claim("no-such-profile")
        pools.drain(PATIENCE)
        assert pools.stats().warm == 0
        assert pools.stats().hits == 4, "of pools that are gone, too"
        assert pools.run(["true"], spec=ONE).ok
    with pytest.raises(InvalidTransition):
        pools.claim()


def test_the_least_recently_used_pool_is_drained() -> None:
    with leaves_nothing(), SandboxPools(PoolConfig(min_warm=1, max_warm=1), most=2) as pools:
        kept = pools.claim(ONE)
        pools.claim(TWO).close()
        pools.pool(ONE)
        pools.pool("minimal")
        assert set(pools.each()) == {ONE.fingerprint, SandboxSpec(profile="minimal").fingerprint}
        pools.pool(TWO)
        assert ONE.fingerprint not in pools.each()
        assert kept.exec(["true"]).ok, "what was claimed stays"
        pools.release(kept)
        wait_until(lambda: kept.state is SandboxState.DESTROYED, "its end")


def test_what_a_pool_has_done_counts_whatever_becomes_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shut, start, looked = Stock.shut, Sandbox.start, list[int]()
    starting, go = threading.Event(), threading.Event()
    config = PoolConfig(min_warm=1, max_warm=1, adaptive=False)
    with SandboxPools(config, most=1) as pools:
        assert pools.warm(ONE, timeout=PATIENCE)
        pools.claim(ONE).close()
        assert pools.pool(ONE).replenish(PATIENCE)

        def look_first(stock: Stock, state: str = "draining") -> None:
            looked.append(pools.stats().hits)
            shut(stock, state)
            looked.append(pools.stats().hits)

        def held(sandbox: Sandbox) -> None:
            if threading.current_thread().name == "cold":
                starting.set()
                assert go.wait(PATIENCE)
            start(sandbox)

        with monkeypatch.context() as patched:
            patched.setattr(Stock, "shut", look_first)
            patched.setattr(Sandbox, "start", held)
            cold = threading.Thread(
                target=lambda: pools.release(pools.claim(ONE, network="private")), name="cold"
            )
            cold.start()
            assert starting.wait(PATIENCE)
            pools.pool(TWO)
            assert looked == [1, 1]
            wait_until(lambda: pools.stats().discarded == 1, "the end of what was warm")
            wait_until(lambda: pools.stats() and pools._table._ended, "the end of its thread")
            go.set()
            cold.join(PATIENCE)
        stats = pools.stats()
        assert (stats.hits, dict(stats.misses_by_reason), stats.claimed) == (1, {"network": 1}, 0)
        wait_until(lambda: pools.stats() and not pools._table._ended, "it to be nobody's")
        assert (pools.stats().hits, pools.stats().misses) == (1, 1)


def test_a_pool_that_is_closed_by_whoever_has_it() -> None:
    """Then the next claim makes another one."""
    with leaves_nothing(), SandboxPools(PoolConfig(min_warm=1, max_warm=1)) as pools:
        assert pools.run(["true"]).returncode == 0
        pools.pool().close()
        assert pools.run(["true"]).returncode == 0
        assert pools.stats().hits + pools.stats().misses == 2


def test_a_total_over_all_pools() -> None:
    with SandboxPools(PoolConfig(min_warm=2, max_warm=4), total=3) as pools:
        one, two = pools.pool(ONE), pools.pool(TWO)
        wait_until(lambda: one.available + two.available == 3, "as many as there may be")
        assert not (one.replenish(0.2) and two.replenish(0.2))
        assert pools.stats().warm == 3
        one.claim().close()
        wait_until(lambda: one.available + two.available == 3, "another one in its place")


def test_pools_in_many_threads() -> None:
    specs = [ONE, TWO, SandboxSpec()]
    with leaves_nothing(), SandboxPools(PoolConfig(min_warm=1, max_warm=2), most=2) as pools:

        def work(number: int) -> None:
            for turn in range(5):
                assert pools.run(["true"], spec=specs[(number + turn) % 3], timeout=20).ok

        in_threads(6, work)
