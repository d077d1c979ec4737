"""Snapshots: everything as it was, to go back to and to begin others with, at the price of a command."""

import asyncio
import contextlib
import errno
import gc
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resources import meanwhile
from support import PYTHON, Spec, host_program, leaves_nothing, snapshot, wait_until
from trees import FILL, filled, manifest, ok, small_source

from sandboxcore import (
    PIPE,
    InvalidTransition,
    Limits,
    Sandbox,
    SandboxBusy,
    SandboxError,
    SandboxSpec,
    SandboxState,
    SetupError,
    SpecError,
    _native,
    aio,
)

pytestmark = pytest.mark.usefixtures("overlays")

PATIENCE = 60


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_source(tmp_path / "source")


ALONE = [pytest.param(name, marks=pytest.mark.once) for name in ("root", "overlay")]


@pytest.fixture(params=[*ALONE, "both"])
def spec(request: pytest.FixtureRequest, source: Path) -> Any:
    """With /data to write to."""
    if request.param == "root":
        return Spec(writable=True, tmpfs=["/data/t:1M"], ro=[(source, "/opt/ro")])
    mounts = {"overlay": [(source, "/data")], "tmpfs": ["/data/t:1M"], "ro": [(source / "dir", "/data/ro")]}
    return Spec(writable=request.param == "both", **mounts)


# --- everything is kept -----------------------------------------------------------------------------


def test_a_snapshot_changes_nothing(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        before = filled(sandbox)
        for _ in range(3):
            with sandbox.snapshot():
                assert manifest(sandbox) == before


def test_everything_comes_back(spec: Any, source: Path) -> None:
    outside = snapshot(source)
    with Sandbox(spec) as sandbox:
        before = filled(sandbox)
        kept = sandbox.snapshot("one")
        ok(
            sandbox,
            "cd /data; rm -rf a many link; echo x > empty; mkdir link; chmod 700 .; mv random r; rm sparse",
        )
        assert manifest(sandbox) != before
        sandbox.restore(kept)
        assert manifest(sandbox) == before
        sandbox.restore(kept)
        assert manifest(sandbox) == before
        assert (kept.name, kept.sandbox, kept.spec) == ("one", sandbox.id, spec)
    assert snapshot(source) == outside


def test_others_begin_with_it(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        before = filled(sandbox)
        kept = sandbox.snapshot()
    with Sandbox.from_snapshot(kept, name="child") as child:
        assert child.name == "child"
        assert child.id != sandbox.id
        assert manifest(child) == before
        ok(child, "rm -r /data/a; echo y > /data/y")
        child.stop()
        child.start()
        assert manifest(child) == before
    with Sandbox.from_snapshot(kept) as child:
        kept.close()
        assert manifest(child) == before


def test_forks_are_independent(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        before = filled(sandbox)
        children = sandbox.fork(4)
        for n, child in enumerate(children):
            assert manifest(child) == before
            ok(child, f"echo {n} > /data/who; rm /data/empty")
        ok(sandbox, "echo parent > /data/who")
        assert [ok(child, "cat /data/who; ls /data/empty 2>&1 | wc -l") for child in children] == [
            f"{n}\n1\n".encode() for n in range(4)
        ]
        sandbox.close()
        with children[0].fork()[0] as grandchild:
            children[0].close()
            assert ok(grandchild, "cat /data/who /data/a/one") == b"0\none\n"
        for child in children:
            child.close()


def test_a_chain_of_snapshots(spec: Any) -> None:
    """Back and forth between 12 moments."""
    with Sandbox(spec) as sandbox:
        kept = []
        for n in range(12):
            ok(
                sandbox,
                f"cd /data; echo {n} > now; echo {n} > f{n}; rm -f f{n - 3}; rm -rf d; mkdir d; touch d/{n}",
            )
            kept.append((sandbox.snapshot(), manifest(sandbox)))
        order = list(range(12)) * 2
        random.shuffle(order)
        for n in order:
            sandbox.restore(kept[n][0])
            assert manifest(sandbox) == kept[n][1], (n, order)
            ok(sandbox, "rm -rf /data/*; echo gone > /data/now") if n % 3 == 0 else None


STEP = "cd /data; echo {n} > f{n}; rm -rf f{m} d/x; mkdir -p d/x/{n}"
LONG_STEP = """
cd /data; echo {n} > now; echo {n} > f{n}; rm -f f{m}; rm -rf d; mkdir -p d/d many; touch d/{n}
echo {n} >> a/one; ln -f now many/now; mv many m; cp -r m many; rm -r m; chmod 7{k}7 a
[ {k} = 0 ] && rm -rf many || mkdir -p many/{n}
"""


def test_deep_stacks_are_folded(spec: Any) -> None:
    """Any number of snapshots, each of them good for ever."""
    with Sandbox(spec) as sandbox:
        kept = []
        filled(sandbox)
        for n in range(150):
            script = LONG_STEP if n % 10 == 0 else STEP
            ok(sandbox, script.format(n=n, m=n - 5, k=n // 10 % 8))
            one = sandbox.snapshot()
            if n % 13 == 0:
                kept.append((one, manifest(sandbox)))
            assert len(sandbox._layers.stack) < 40
            if len(sandbox._layers.stack) > 30 and (fold := sandbox._layers._fold) is not None:
                assert fold.done(PATIENCE), "it goes on meanwhile, however slow the machine is"
            assert sandbox._layers._rest == 0, "no fold has failed"
        assert len({layer.weight for layer in sandbox._layers.stack}) > 1
        random.shuffle(kept)
        for one, then in kept:
            sandbox.restore(one)
            assert manifest(sandbox) == then
            with Sandbox.from_snapshot(one) as child:
                assert manifest(child) == then


@pytest.mark.parametrize("other", [False, True], ids=["own", "of_another"])
def test_what_is_folded_stays_reachable(spec: Any, other: bool) -> None:
    """A fold that is not over when the root, and all that lies on it, is mounted anew."""
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(Sandbox(spec))
        for n in range(12):
            ok(sandbox, f"head -c 12M /dev/urandom > /data/{n}; rm -f /data/{n - 2}")
            last = sandbox.snapshot()
            if other and n == 7:
                sandbox = stack.enter_context(Sandbox.from_snapshot(last))
        sandbox.snapshot()
        fold = sandbox._layers._fold
        assert fold is not None
        assert fold.done(PATIENCE)
        sandbox.snapshot()
        assert sandbox._layers._rest == 0
        assert [layer.weight for layer in sandbox._layers.stack].count(8) == 1
        before = manifest(sandbox)
        sandbox.restore(last)
        assert manifest(sandbox) == before


@pytest.mark.parametrize("later", range(6))
def test_the_collector_takes_snapshots_meanwhile(
    spec: Any, monkeypatch: pytest.MonkeyPatch, later: int
) -> None:
    """It comes with any allocation: here when the next snapshot has just begun to look what may go."""

    def constant(name: str, real: Callable[[str], int] = _native.constant) -> int:
        found = real(name)
        gc.set_threshold(gc.get_count()[0] + later)
        gc.enable()
        return found

    usual = gc.get_threshold()
    with Sandbox(spec) as sandbox:
        first = sandbox.snapshot()
        gone = [sandbox.snapshot() for _ in range(3)]
        sandbox.restore(first)
        monkeypatch.setattr(_native, "constant", constant)
        gc.disable()
        try:
            gone.append(gone)  # type: ignore[arg-type]
            del gone
            sandbox.snapshot()
        finally:
            gc.enable()
            gc.set_threshold(*usual)


def test_no_room_for_folding(spec: Any) -> None:
    """Then the stack grows for a while."""
    with Sandbox(spec.replace(limits=Limits(disk="16M"))) as sandbox:
        ok(sandbox, "head -c 10M /dev/urandom > /data/big; sha256sum /data/big > /data/sum")
        for _ in range(12):
            sandbox.snapshot()
        assert sandbox._layers._fold is not None
        assert sandbox._layers._fold.done(PATIENCE)
        sandbox.snapshot()
        assert sandbox._layers._fold is None
        assert len(sandbox._layers.stack) == 13
        ok(sandbox, "sha256sum -c /data/sum; rm /data/big")
        with sandbox.popen(["sleep", "100"]) as process:  # what there is of it goes with the next one
            sandbox.snapshot()
            process.kill()
        assert not sandbox.snapshot().copied


def test_more_layers_than_may_be(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxcore.layers.Layers._begin_fold", lambda *_: None)
    with Sandbox(spec) as sandbox:
        ok(sandbox, "echo 1 > /data/one")
        for _ in range(64):
            sandbox.snapshot()
        with pytest.raises(SandboxError, match="64 layers"):
            sandbox.snapshot()
        sandbox.discard()
        assert ok(sandbox, "cat /data/one") == b"1\n"


def test_restoring_what_another_one_has(spec: Any) -> None:
    with Sandbox(spec) as first, Sandbox(spec) as second:
        before = filled(first)
        kept = first.snapshot()
        ok(second, "echo other > /data/other")
        own = second.snapshot()
        second.restore(kept)
        assert manifest(second) == before
        first.close()
        ok(second, "echo more > /data/more")
        with Sandbox.from_snapshot(second.snapshot()) as third:
            assert ok(third, "cat /data/more /data/a/one") == b"more\none\n"
        second.restore(own)
        assert ok(second, "ls /data/a 2>&1 | wc -l; cat /data/other").endswith(b"other\n")


def test_discard(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        filled(sandbox)
        sandbox.discard()
        assert ok(sandbox, "ls /data/a 2>&1 | wc -l") == b"1\n"
        before = filled(sandbox)
        kept = sandbox.snapshot()
        ok(sandbox, "rm -r /data/a")
        sandbox.discard()
        assert manifest(sandbox) == before
        kept.close()


def test_what_lies_on_the_overlay_stays(spec: Any) -> None:
    """File systems of their own, and binds; with what is in them."""
    with Sandbox(spec) as sandbox:
        ok(sandbox, "echo t > /data/t/kept; echo tmp > /tmp/kept; echo shm > /dev/shm/kept")
        mounts = ok(sandbox, "cut -d' ' -f5,6 /proc/self/mountinfo | sort")
        first = sandbox.snapshot()
        sandbox.snapshot()
        sandbox.restore(first)
        assert ok(sandbox, "cat /data/t/kept /tmp/kept /dev/shm/kept") == b"t\ntmp\nshm\n"
        assert ok(sandbox, "cut -d' ' -f5,6 /proc/self/mountinfo | sort") == mounts
        assert ok(sandbox, "cat /opt/ro/file 2>/dev/null || cat /data/ro/deep") in (b"host\n", b"deep\n")


def test_no_weaker_than_before(spec: Any) -> None:
    script = """
    grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Seccomp_filters|Cap...|SigBlk|SigIgn):' /proc/self/status
    grep -v processes /proc/self/limits; cat /proc/self/uid_map; umask; pwd
    ls /proc/self/fd | wc -l; ls -l /proc/self/ns
    for path in /usr/x /dev/x /proc/x /proc/sys/kernel/x /opt/ro/x; do : > $path; done 2>&1
    ls /proc | grep -E 'nodes|scratch'
    """
    with Sandbox(spec) as sandbox:
        before = sandbox.shell(script).stdout
        assert b"CapEff:\t0000000000000000" in before
        assert b"Seccomp_filters:\t1" in before
        kept = sandbox.snapshot()
        assert sandbox.shell(script).stdout == before
        sandbox.restore(kept)
        assert sandbox.shell(script).stdout == before
        with sandbox.fork()[0] as child:
            namespaces = [line for line in child.shell(script).stdout.splitlines() if b"->" not in line]
            assert namespaces == [line for line in before.splitlines() if b"->" not in line]


def test_new_files_can_be_written_everywhere_afterwards(spec: Any) -> None:
    """Landlock's rules are about directories: they are made anew."""
    with Sandbox(spec) as sandbox:
        sandbox.snapshot()
        ok(
            sandbox,
            "echo 1 > /data/x; mkdir /data/dir2; mv /data/x /data/dir2/; echo t > /data/t/x; echo > /tmp/x",
        )
        assert sandbox.files.read("/data/dir2/x") == b"1\n"
        sandbox.files.write("/data/y", b"y")
        assert sandbox.exec(["cat", "/data/y"]).stdout == b"y"


def test_what_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (Path(__file__).parents[2] / "README.md").read_text().split("```python\n")[1:]
    (block,) = (text for text in blocks if "box.snapshot()" in text)
    exec(block.split("```")[0], {"Sandbox": Sandbox, "SandboxSpec": SandboxSpec})
    assert capsys.readouterr().out == 3 * "prepared\n"


# --- while something happens ------------------------------------------------------------------------


def test_commands_that_run(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        kept = sandbox.snapshot()
        process = sandbox.popen(["sleep", "100"])
        job = sandbox.detach(["sleep", "100"])
        for action in (
            lambda: sandbox.snapshot(copy=False),
            lambda: sandbox.restore(kept),
            sandbox.discard,
        ):
            with pytest.raises(SandboxBusy, match="a command runs"):
                action()
        process.kill()
        process.wait(PATIENCE)
        with pytest.raises(SandboxBusy):
            sandbox.snapshot(copy=False)
        job.kill()
        job.wait(PATIENCE)
        sandbox.discard()
        assert not sandbox.snapshot().copied


def test_files_that_are_open(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        with sandbox.files.open("/data/f", "wb") as file:
            file.write(b"before")
            file.flush()
            with pytest.raises(SandboxBusy, match="open for writing"):
                sandbox.snapshot(copy=False)
            copied = sandbox.snapshot()
            assert copied.copied
            file.write(b" and after")
        with Sandbox.from_snapshot(copied) as child:
            assert child.files.read("/data/f") == b"before"
        kept = sandbox.snapshot()
        assert not kept.copied
        with sandbox.files.open("/data/f", "rb") as file:
            sandbox.snapshot()
            assert file.read() == b"before and after"
            sandbox.restore(kept)
        assert sandbox.files.read("/data/f") == b"before and after"


def test_commands_of_other_threads_wait(spec: Any) -> None:
    """None is lost, and none sees half of a change."""
    failures: list[object] = []
    stop = threading.Event()

    def work(sandbox: Sandbox, n: int) -> None:
        while not stop.is_set():
            done = sandbox.shell(f"echo {n} > /data/f{n}; cat /data/f{n} /data/constant", timeout=PATIENCE)
            if done.stdout != f"{n}\nconstant\n".encode():
                failures.append(done)
                return

    with Sandbox(spec) as sandbox:
        ok(sandbox, "echo constant > /data/constant")
        threads = [threading.Thread(target=work, args=(sandbox, n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            sandbox.snapshot().close()
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert failures == []


# --- a copy while commands run ----------------------------------------------------------------------

WRITER = """
import os
os.chdir("/data")
n = 0
while True:
    with open("a", "w") as a, open("b", "w") as b:
        a.write(str(n)); a.flush(); b.write(str(n))
    os.rename("a", "a1"); os.rename("b", "b1")
    n += 1
    if n == 3: print("on", flush=True)
"""


def test_everything_is_in_a_copy(spec: Any) -> None:
    with Sandbox(spec) as sandbox:
        before = filled(sandbox)
        with sandbox.popen(["sleep", "100"]) as process:
            kept = sandbox.snapshot("copy")
            assert (kept.copied, kept.name) == (True, "copy")
            assert manifest(sandbox) == before
            ok(sandbox, "rm -rf /data/a; mkdir /data/a; touch /data/a/new; chmod 700 /data; rm /data/random")
            second = sandbox.snapshot()
            after = manifest(sandbox)
            process.kill()
        with Sandbox.from_snapshot(kept) as child, Sandbox.from_snapshot(second) as other:
            assert manifest(child) == before
            assert manifest(other) == after
        for one, content in ((kept, before), (second, after), (kept, before)):
            sandbox.restore(one)
            assert manifest(sandbox) == content
        sandbox.snapshot(copy=True)
        assert manifest(sandbox) == before


def test_copies_of_copies(spec: Any) -> None:
    """On top of sealed ones, and of what others have sealed."""
    with Sandbox(spec) as sandbox:
        filled(sandbox)
        for n in range(4):
            ok(sandbox, f"cd /data; rm -f many/{n}* ; echo {n} > n; ln -f n hard{n}; mv many m; mv m many")
            sandbox.snapshot(copy=n % 2 == 0)
        kept, before = sandbox.snapshot(copy=True), manifest(sandbox)
        with Sandbox.from_snapshot(kept) as child:
            assert manifest(child) == before
            ok(child, "rm -r /data/many; touch /data/x")
            again, then = child.snapshot(copy=True), manifest(child)
        sandbox.restore(again)
        assert manifest(sandbox) == then


def test_a_copy_is_of_one_moment(spec: Any) -> None:
    """Whoever writes is stopped for it, and goes on."""
    with Sandbox(spec) as sandbox, sandbox.popen([PYTHON, "-I", "-S", "-c", WRITER], stdout=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        for _ in range(5):
            with sandbox.fork()[0] as child:
                names = set(ok(child, "ls /data").split())
                assert names & {b"a", b"a1"}
                assert names & {b"b", b"b1"}
                if names >= {b"a1", b"b1"} and not names & {b"a", b"b"}:
                    a, b = ok(child, "cat /data/a1; echo; cat /data/b1").split()
                    assert a == b
            number = sandbox.files.read("/data/a1")
            wait_until(lambda seen=number: sandbox.files.read("/data/a1") != seen, "it to go on", PATIENCE)
        process.kill()


def test_who_was_stopped_stays_so(spec: Any) -> None:
    """And a parent does not hear that its child was."""
    script = """
    sleep 100 & one=$!; kill -STOP $one
    until [ "$(cut -d' ' -f3 /proc/$one/stat)" = T ]; do :; done
    sleep 101 & two=$!
    echo $one $two; read line
    until [ "$(cut -d' ' -f3 /proc/$two/stat)" = S ]; do :; done
    cut -d' ' -f3 /proc/$one/stat /proc/$two/stat
    kill -KILL $one; wait $one; kill $two; wait $two; echo $?
    """
    with Sandbox(spec) as sandbox:
        with sandbox.popen(["sh", "-c", script], stdin=PIPE, stdout=PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(5):
                assert sandbox.snapshot().copied
            output = process.communicate(b"\n", timeout=PATIENCE)[0]
        assert output.split() == [b"T", b"S", b"143"]


def test_no_limit_of_time_counts_during_a_copy(spec: Any) -> None:
    with Sandbox(spec.replace(limits=Limits(disk="400M"))) as sandbox:
        ok(sandbox, "head -c 150M /dev/urandom > /data/big")
        process = sandbox.popen(["sleep", "1"], timeout=2)
        assert sandbox.snapshot().copied
        assert process.wait(PATIENCE) == 0


def test_no_room_for_a_copy(spec: Any) -> None:
    """There is nothing of it then, and the next one is made when there is."""
    with (
        Sandbox(spec.replace(limits=Limits(disk="32M"))) as sandbox,
        sandbox.popen(["sleep", "100"]) as process,
    ):
        ok(sandbox, "head -c 20M /dev/urandom > /data/big; sha256sum /data/big > /data/sum")
        for _ in range(3):
            with pytest.raises(SetupError) as caught:
                sandbox.snapshot()
            assert (caught.value.stage, caught.value.errno) == ("mount", 28)
        ok(sandbox, "sha256sum -c /data/sum")
        ok(sandbox, "truncate -s 10M /data/big; sha256sum /data/big > /data/sum")
        with Sandbox.from_snapshot(sandbox.snapshot()) as child:
            ok(child, "sha256sum -c /data/sum")
        process.kill()


def test_depth_does_not_matter(spec: Any) -> None:
    """Deeper than any path may be."""
    script = f"""{PYTHON} -I -S -c '
import os
os.chdir("/data")
for n in range(3000):
    os.mkdir("directory"); os.chdir("directory")
open("bottom", "w").write("here")
'"""
    look = f"""{PYTHON} -I -S -c '
import os
os.chdir("/data")
for n in range(3000):
    os.chdir("directory")
print(open("bottom").read())
'"""
    with Sandbox(spec) as sandbox:
        ok(sandbox, script)
        with Sandbox.from_snapshot(sandbox.snapshot(copy=True)) as child:
            assert ok(child, look) == b"here\n"


def kill_copier(init: int) -> bool:
    """The child of init that is a copy of it, as launchers are not."""
    for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/comm").read_text() == "sbx-init\n":
                os.kill(int(pid), signal.SIGKILL)
                return True
    return False


def test_a_copy_that_is_killed(spec: Any) -> None:
    """By force, in the middle: everything goes on, and the next one works."""
    spec = spec.replace(limits=Limits(disk="1G"))
    with (
        Sandbox(spec) as sandbox,
        sandbox.popen(["sh", "-c", "while :; do date > /data/date; done"]) as process,
    ):
        ok(sandbox, "head -c 300M /dev/zero > /data/big")
        init = sandbox.pid
        for _ in range(50):
            gc.collect()  # the last snapshot
            with meanwhile(sandbox.snapshot) as results:
                while not results and not kill_copier(init):
                    pass
            if isinstance(results[0], SetupError):  # else it was done already
                break
        assert isinstance(results[0], SetupError)
        assert results[0].errno == errno.EPIPE
        before = sandbox.files.stat("/data/date").mtime
        wait_until(lambda: sandbox.files.stat("/data/date").mtime != before, "it to go on", PATIENCE)
        ok(sandbox, "truncate -s 1M /data/big")
        assert sandbox.snapshot().copied
        process.kill()


# --- what is refused --------------------------------------------------------------------------------


def test_nothing_to_keep() -> None:
    with Sandbox() as sandbox, pytest.raises(SpecError, match="writable"):
        sandbox.snapshot()


def test_one_that_does_not_fit(spec: Any, source: Path) -> None:
    with Sandbox(spec) as sandbox, Sandbox(Spec(writable=True, overlay=[(source, "/elsewhere")])) as other:
        kept = other.snapshot()
        with pytest.raises(SpecError, match="other overlays"):
            sandbox.restore(kept)
        assert ok(sandbox, "echo fine") == b"fine\n"


def test_closed_and_not_running(spec: Any) -> None:
    sandbox = Sandbox(spec)
    with pytest.raises(InvalidTransition):
        sandbox.snapshot()
    with sandbox:
        kept = sandbox.snapshot()
        kept.close()
        kept.close()
        for action in (lambda: sandbox.restore(kept), lambda: Sandbox.from_snapshot(kept)):
            with pytest.raises(SandboxError, match="closed"):
                action()
        sandbox.suspend()
        with pytest.raises(InvalidTransition):
            sandbox.snapshot()
        sandbox.resume()
        sandbox.stop()
        with pytest.raises(InvalidTransition):
            sandbox.snapshot()
    assert sandbox.state is SandboxState.DESTROYED


def test_no_room(spec: Any) -> None:
    """What cannot be done changes nothing."""
    with Sandbox(spec.replace(limits=Limits(inodes=400, disk="4M"))) as sandbox:
        ok(sandbox, "echo 1 > /data/one")
        sandbox.shell("cd /data; i=0; while mkdir d$i; do i=$((i + 1)); done; rmdir d1 d2 d3 d4")
        error = next(filter(None, (_failure(sandbox) for _ in range(30))))
        assert (error.stage, error.errno) == ("mount", 28)
        assert ok(sandbox, "cat /data/one") == b"1\n"
        ok(sandbox, "rmdir /data/d5 /data/d6 /data/d7 /data/d8 /data/d9")
        assert sandbox.shell("rm /data/one && echo 2 > /data/two").ok


def _failure(sandbox: Sandbox) -> SetupError | None:
    try:
        sandbox.snapshot()
    except SetupError as error:
        return error
    return None


# --- what is left -----------------------------------------------------------------------------------


def warm_up(spec: Any) -> None:
    """The spawner stays, and its shelf."""
    with Sandbox(spec) as sandbox:
        sandbox.snapshot()


def test_nothing_is_left(spec: Any) -> None:
    warm_up(spec)
    with leaves_nothing():
        with Sandbox(spec) as sandbox:
            ok(sandbox, "echo 1 > /data/1")
            kept = [sandbox.snapshot() for _ in range(5)]
            sandbox.restore(kept[2])
            for child in sandbox.fork(3):
                child.restore(kept[0])
                child.close()
        for one in kept:
            one.close()
        del kept, one


@pytest.mark.needs_root  # init's descriptors are nobody's business
def test_overlays_that_were_replaced_end(spec: Any) -> None:
    """A few may wait for a quiet moment; then there are none."""
    with Sandbox(spec) as sandbox:
        fds = Path(f"/proc/{sandbox.pid}/fd")
        before = len(list(fds.iterdir()))
        kept = [sandbox.snapshot()]
        assert len(list(fds.iterdir())) > before
        for _ in range(20):
            kept.append(sandbox.snapshot())
            assert len(list(fds.iterdir())) <= before + 8 + 2 + 11  # an answer, what it lent; a fold
        wait_until(lambda: len(list(fds.iterdir())) == before, "the end of those that were replaced")


def test_room_comes_back(spec: Any) -> None:
    """Of a snapshot that nobody has any more, though the overlay that wrote it ended just before."""
    with Sandbox(spec.replace(limits=Limits(disk="32M"))) as sandbox:
        empty = sandbox.snapshot()
        for _ in range(5):
            wait_until(lambda: sandbox.shell("head -c 20M /dev/zero > /data/big").ok, "room")
            sandbox.snapshot().close()
            sandbox.restore(empty)
            sandbox.discard()  # what nobody has goes with the next change


def test_memory_comes_back() -> None:
    """Of what nobody has any more; of forks that end; of what is discarded."""
    code = """
    import gc, os, time
    from sandboxcore import Sandbox, SandboxSpec
    def shmem():
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Shmem:")) >> 10
    spec = SandboxSpec(writable=True)
    def fill(sandbox):
        assert sandbox.shell("head -c 100M /dev/zero > /workspace/big").ok
    def settle(limit):
        for _ in range(500):
            gc.collect()
            if shmem() - start < limit:
                return True
            time.sleep(0.02)
        return False
    start = shmem()
    with Sandbox(spec) as sandbox:
        kept = sandbox.snapshot()
        for _ in range(3):
            fill(sandbox)
            sandbox.restore(kept)
        print(settle(80))
        fill(sandbox)
        child = sandbox.fork()[0]
    print(shmem() - start > 80)
    child.close()
    del child, sandbox
    kept.close()
    print(settle(60))
    """
    done = host_program(code)
    assert done.stdout == "True\n" * 3, done


# --- on an event loop -------------------------------------------------------------------------------


def test_on_an_event_loop(spec: Any) -> None:
    async def main() -> None:
        async with aio.Sandbox(spec) as sandbox:
            assert (await sandbox.shell(FILL, timeout=PATIENCE)).ok
            kept = await sandbox.snapshot("one")
            assert (await sandbox.shell("rm -r /data/a; cat /data/empty")).ok
            children = await sandbox.fork(3)
            outputs = await asyncio.gather(
                *(child.shell("ls /data/a 2>&1 | wc -l; ls /data/b") for child in children)
            )
            assert {done.stdout.splitlines()[0] for done in outputs} == {b"1"}
            await asyncio.gather(*(child.close() for child in children))
            await sandbox.restore(kept)
            assert (await sandbox.shell("cat /data/a/one")).stdout == b"one\n"
            async with await aio.Sandbox.from_snapshot(kept, name="child") as child:
                assert child.name == "child"
                assert (await child.shell("rm /data/a/one; cat /data/a/hard")).stdout == b"one\n"
                await child.discard()
                assert (await child.shell("cat /data/a/one")).stdout == b"one\n"
                process = await child.popen(["sleep", "100"])
                with pytest.raises(SandboxBusy):
                    await child.snapshot(copy=False)
                assert (await child.snapshot()).copied
                process.kill()
                await process.wait()

    warm_up(spec)
    with leaves_nothing():
        asyncio.run(asyncio.wait_for(main(), PATIENCE))
