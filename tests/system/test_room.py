"""Room: so many living sandboxes of a state directory, over threads, processes and crashes."""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiostay import state
from loops import play
from support import gone, host_process, leaves_nothing, wait_until

from sandboxcore import PersistentSandbox, Sandbox, SandboxError, SpecError, TooManySandboxes, aio, places
from sandboxcore import SandboxSpec as Spec
from sandboxcore.places import Places
from sandboxcore.room import FILE, Room
from sandboxcore.statedir import close_lock

__all__ = ["state"]  # a fixture

PATIENCE = 30


def sandbox_in(room: Room, spec: Spec | None = None) -> Sandbox:
    """One that takes a place, not started."""
    sandbox = Sandbox(spec)
    sandbox._room = room
    return sandbox


def persistent_in(room: Room, name: str) -> PersistentSandbox:
    """A persistent one, started."""
    sandbox = PersistentSandbox(name=name, state_dir=room.state_dir)
    sandbox._room = room
    return sandbox._started_or_gone()


def emptied(room: Room, taken: int = 0) -> None:
    """Closing a sandbox does not wait for the end of its init."""
    wait_until(lambda: room.taken() == taken, f"{taken} places taken")


@pytest.fixture
def taken(state: Path) -> Iterator[list[int]]:
    """Descriptors to close."""
    fds: list[int] = []
    yield fds
    for fd in fds:
        close_lock(fd)


# --- counting -----------------------------------------------------------------------------------------


def test_one_too_many(state: Path) -> None:
    room = Room(state, 2)
    with leaves_nothing(), sandbox_in(room) as first, sandbox_in(room) as second:
        assert (room.taken(), room.free()) == (2, 0)
        third = sandbox_in(room)
        with pytest.raises(TooManySandboxes, match="2 sandboxes") as caught:
            third.start()
        assert caught.value.errno == errno.EAGAIN
        assert (caught.value.maximum, caught.value.state_dir) == (2, str(state))
        assert f"in {state} already" in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        assert third.state == "created"
        assert second.exec(["true"]).ok  # commands do not count
        with Sandbox():  # nor does whoever has no room
            assert room.taken() == 2
        first.stop()
        third.start()
        with pytest.raises(TooManySandboxes):
            first.start()  # again
        third.close()
        assert room.wait(PATIENCE)
        first.start()
    emptied(room)
    assert room.free() == 2


def test_no_limit_leaves_nothing(state: Path) -> None:
    room = Room(state)
    with sandbox_in(room) as sandbox:
        assert sandbox.exec(["true"]).ok
        assert (room.take(), room.taken(), room.free(), room.wait(0)) == (-1, 0, None, True)
    assert not state.exists()


def test_a_limit_leaves_one_file(state: Path) -> None:
    room = Room(state, 1)
    assert (room.taken(), room.free(), room.wait(0)) == (0, 1, True)
    assert not state.exists()
    with sandbox_in(room):
        assert os.listdir(state) == [FILE]
    assert state.joinpath(FILE).stat().st_mode & 0o777 == 0o600


def test_no_place_is_lost_by_a_failure(state: Path) -> None:
    room = Room(state, 1)
    for _ in range(3):
        with pytest.raises(SandboxError):
            sandbox_in(room, Spec(ro=[("/etc", "/usr/nonexistent/etc")])).start()
        emptied(room)


def test_state_directories_count_apart(state: Path, tmp_path: Path) -> None:
    room, other = Room(state, 1), Room(tmp_path / "other", 1)
    with sandbox_in(room), sandbox_in(other):
        assert (room.taken(), other.taken()) == (1, 1)


def test_each_counts_all_whatever_its_own_maximum(state: Path, taken: list[int]) -> None:
    large, small = Room(state, 40), Room(state, 3)
    taken += [large.take() for _ in range(4)]
    assert (small.taken(), small.free(), large.free()) == (4, 0, 36)
    with pytest.raises(TooManySandboxes, match="3 sandboxes"):
        small.take()
    close_lock(taken.pop())
    assert small.taken() == 3
    with pytest.raises(TooManySandboxes):
        small.take()
    close_lock(taken.pop())
    taken.append(small.take())  # though the large one's are anywhere
    with pytest.raises(TooManySandboxes):
        small.take()
    taken += [large.take() for _ in range(37)]
    with pytest.raises(TooManySandboxes, match="40 sandboxes"):
        large.take()


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_bad_numbers(state: Path, value: object) -> None:
    with pytest.raises(SpecError, match="max_sandboxes"):
        Room(state, value)  # type: ignore[arg-type]


def test_a_directory_that_others_may_write(state: Path) -> None:
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(SandboxError, match="others may write"):
        Room(state, 1).take()
    assert not os.listdir(state)
    state.chmod(0o700)
    state.joinpath(FILE).symlink_to(state / "elsewhere")
    with pytest.raises(SandboxError, match=FILE):
        Room(state, 1).take()
    assert os.listdir(state) == [FILE]
    state.joinpath(FILE).unlink()


def test_a_forked_child_keeps_no_place(state: Path) -> None:
    room = Room(state, 1)
    fd = room.take()
    ready, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(ready, 1)
        os._exit(0)
    try:
        os.close(ready)
        close_lock(fd)
        emptied(room)
    finally:
        os.close(write)
        os.waitpid(child, 0)


def test_whoever_is_stopped_while_it_takes_a_place(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it for ever."""
    room = Room(state, 2)
    fd = room.take()
    monkeypatch.setattr(places, "PATIENCE", 0.05)
    assert places._set(fd, fcntl.F_WRLCK, places._TURN)
    with pytest.raises(SandboxError, match="taking a place for 0.05 s"):
        room.take()
    close_lock(fd)
    close_lock(room.take())


# --- threads and processes ------------------------------------------------------------------------------

CHURN = """
import json, sys, threading, time
from sandboxcore import Sandbox, TooManySandboxes
from sandboxcore.room import Room

lived, refused, room = [], [], Room(sys.argv[1], int(sys.argv[2]))

def churn():
    for _ in range(int(sys.argv[3])):
        sandbox = Sandbox()
        sandbox._room = room
        try:
            sandbox.start()
        except TooManySandboxes as error:
            refused.append((error.maximum, error.state_dir, sandbox.state))
            room.wait(5)
            continue
        begin = time.monotonic()
        assert sandbox.exec(["true"]).ok
        lived.append((begin, time.monotonic()))
        sandbox.close()

threads = [threading.Thread(target=churn) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([lived, refused]))
"""


def test_threads_of_two_processes_never_exceed_it(state: Path) -> None:
    """Each may have another maximum: nobody exceeds its own."""
    with host_process(CHURN, str(state), "3", "12") as one, host_process(CHURN, str(state), "2", "12") as two:
        results = [json.loads(process.communicate(timeout=PATIENCE)[0]) for process in (one, two)]
    moments = [(begin, 1) for lived, _ in results for begin, _ in lived]
    moments += [(end, -1) for lived, _ in results for _, end in lived]
    alive = most = 0
    for _, change in sorted(moments):
        alive += change
        most = max(most, alive)
    assert 2 <= most <= 3
    for (lived, refused), maximum in zip(results, (3, 2), strict=True):
        assert lived
        assert all(refusal == [maximum, str(state), "created"] for refusal in refused)
    assert results[0][1] or results[1][1]
    emptied(Room(state, 3))


HOLDER = """
import os, sys
from sandboxcore import PersistentSandbox, Sandbox
from sandboxcore.room import Room

room = Room(sys.argv[1], 3)
kept = []
for number in range(3):
    stays = sys.argv[2:] == ["stay"]
    sandbox = PersistentSandbox(state_dir=sys.argv[1], name=f"box{number}") if stays else Sandbox()
    sandbox._room = room
    sandbox.start()
    kept.append(sandbox)
print(*(sandbox.pid for sandbox in kept), flush=True)
sys.stdin.read()
"""


def test_killed_inits_and_a_killed_host_give_their_places_back(state: Path) -> None:
    room = Room(state, 3)
    with host_process(HOLDER, str(state)) as holder:
        assert holder.stdout is not None
        pids = [int(word) for word in holder.stdout.readline().split()]
        with pytest.raises(TooManySandboxes):
            sandbox_in(room).start()
        os.kill(pids[1], signal.SIGKILL)
        emptied(room, 2)
        with sandbox_in(room):
            assert room.free() == 0
        emptied(room, 2)
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE)
    assert all(wait_until(lambda pid=pid: gone(pid), "the end of an init") for pid in pids)
    emptied(room)


def test_persistent_ones_count_without_their_maker(state: Path) -> None:
    room = Room(state, 3)
    with host_process(HOLDER, str(state), "stay") as holder:
        assert holder.stdout is not None
        pids = [int(word) for word in holder.stdout.readline().split()]
        holder.send_signal(signal.SIGKILL)
        holder.wait(PATIENCE)
    assert room.taken() == 3
    with pytest.raises(TooManySandboxes):
        persistent_in(room, "another")
    with PersistentSandbox.connect("box0", state_dir=state) as box:
        box._room = room
        assert box.exec(["true"]).ok
        box.stop()
        emptied(room, 2)
        with persistent_in(room, "another") as another, pytest.raises(TooManySandboxes):
            box.start()
        assert box.state == "stopped"
        another.destroy()
        emptied(room, 2)
        box.start()
        assert (box.state, room.taken()) == ("running", 3)
    os.kill(pids[1], signal.SIGKILL)
    emptied(room, 2)


# --- forks ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("overlays")
@pytest.mark.parametrize("kind", ["private", "persistent"])
def test_forks_count_all_or_none(state: Path, kind: str) -> None:
    room = Room(state, 4)
    if kind == "private":
        parent = Sandbox(Spec(writable=True))
    else:
        parent = PersistentSandbox(Spec(writable=True), state_dir=state)
    parent._room = room
    parent.start()
    try:
        children = parent.fork(2)
        assert room.taken() == 3
        with pytest.raises(TooManySandboxes):
            children[0].fork(2)  # theirs count likewise
        emptied(room, 3)
        if isinstance(parent, PersistentSandbox):
            assert len(parent._store.all()) == 3
        for child in children:
            assert child.exec(["true"]).ok
            child.destroy()
        emptied(room, 1)
    finally:
        parent.destroy()
    emptied(room)


# --- asyncio ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("overlays")
def test_asyncio(state: Path) -> None:
    room = Room(state, 2)

    async def main() -> None:
        first = aio.Sandbox(Spec(writable=True))
        first._own._room = room
        async with first:
            (child,) = await first.fork()
            for sandbox in (aio.Sandbox(), aio.PersistentSandbox(name="box", state_dir=state)):
                sandbox._own._room = room
                with pytest.raises(TooManySandboxes):
                    await sandbox.start()
            with pytest.raises(TooManySandboxes):
                await child.fork()
            assert room.taken() == 2
            await child.close()
            emptied(room, 1)
            await sandbox.start()
            assert room.taken() == 2
            await sandbox.destroy()

    play(main())
    emptied(room)


# --- waiting ------------------------------------------------------------------------------------------------


def test_a_wait_has_an_end(state: Path, taken: list[int]) -> None:
    room = Room(state, 1)
    taken.append(room.take())
    begin = time.monotonic()
    assert not room.wait(0.05)
    assert not room.wait(0)
    assert 0.05 <= time.monotonic() - begin < PATIENCE


def test_a_killed_init_is_news(state: Path) -> None:
    """The kernel tells of it; nobody has to look again and again."""
    room = Room(state, 1)
    with sandbox_in(room) as sandbox, room.news() as fd:
        assert fd >= 0
        assert room.taken() == 1  # to look is no news
        with pytest.raises(BlockingIOError):
            os.read(fd, 64)
        os.kill(sandbox.pid, signal.SIGKILL)
        wait_until(lambda: _heard(fd), "news")
        emptied(room)


def _heard(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(os.read(fd, 64))
    return False


@pytest.mark.parametrize("told", [True, False])
def test_whoever_waits_gets_the_place(state: Path, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    if not told:  # the user has too many inotify instances

        def refused(path: str) -> int:
            raise OSError(errno.EMFILE, path)

        monkeypatch.setattr("sandboxcore.room._native.watch_closes", refused)
    room, looks, came = Room(state, 1), 0, threading.Event()
    taken = Places.taken

    def counted(self: Places) -> int:
        nonlocal looks
        looks += 1
        came.set()
        return taken(self)

    monkeypatch.setattr(Places, "taken", counted)
    found: list[bool] = []
    with sandbox_in(room) as sandbox:
        waiter = threading.Thread(target=lambda: found.append(room.wait(PATIENCE)))
        waiter.start()
        assert came.wait(PATIENCE)
        assert not found
        begin = time.monotonic()
        sandbox.stop()
        waiter.join(PATIENCE)
        assert found == [True]
    assert looks < 200 + 1000 * (time.monotonic() - begin)
