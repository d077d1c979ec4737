"""Events as data, who gets them, and the file in which they are kept and chained."""

import contextlib
import gc
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandboxcore import eventchain, eventlog
from sandboxcore.errors import SpecError
from sandboxcore.eventchain import Verification, read_log, verify_log
from sandboxcore.eventlog import EventLog
from sandboxcore.events import Dispatcher, Event, EventKind, current_trace, tracing

KEY = b"0123456789abcdef0123456789abcdef"
FILES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=50,
    deadline=None,
)

plain = st.recursive(
    st.none() | st.booleans() | st.text() | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
names = st.none() | st.text(min_size=1, max_size=40)
events = st.builds(
    Event,
    kind=st.sampled_from(EventKind),
    at=st.floats(0, 1e10),
    sandbox=names,
    session=names,
    client=names,
    trace_id=names,
    data=st.dictionaries(st.text(), plain, max_size=5),
)

others = events.filter(lambda event: event.kind is not EventKind.LOG_TORN)


def started(**data: Any) -> Event:
    return Event(kind=EventKind.SANDBOX_STARTED, sandbox="sbx-1", data=data)


# --- as data ----------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(events)
def test_an_event_survives_json(event: Event) -> None:
    again = Event.from_dict(json.loads(json.dumps(event.to_dict())))
    assert again == event
    assert hash(again) == hash(event)
    assert isinstance(again.kind, EventKind)


def test_data_is_plain_and_a_copy() -> None:
    given = {"args": (b"ls", Path("/x")), "cause": EventKind.LOG_TORN, "list": [1]}
    event = started(**given)
    given["list"].append(2)  # type: ignore[union-attr]
    assert dict(event.data) == {"args": ["ls", "/x"], "cause": "log.torn", "list": [1]}
    with pytest.raises(TypeError):
        event.data["a"] = 1  # type: ignore[index]


def test_ids_follow_time() -> None:
    first = Event(kind=EventKind.SANDBOX_STARTED)
    later = first.at + 0.002
    second = first
    while second.at < later:
        second = Event(kind=EventKind.SANDBOX_STARTED)
    assert first.id < second.id
    assert first.id.startswith("evt-")


GOOD = started(a=1).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"version": True}, {"version": None}, {"kind": "sandbox.eaten"}, {"kind": []},
        {"kind": None}, {"at": -1}, {"at": float("nan")}, {"at": float("inf")}, {"at": "1"}, {"at": True},
        {"id": ""}, {"id": "evt-1"}, {"id": 5}, {"sandbox": ""}, {"sandbox": 5}, {"session": "x" * 513},
        {"trace_id": ["a"]}, {"data": None}, {"data": []}, {"data": {"a": {1: 2}}},
        {"data": {"a": float("inf")}}, {"data": {"a": 1 << 70}}, {"data": {"a": object()}}, {"more": 1},
    ],
)  # fmt: skip
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    Event.from_dict(GOOD)
    with pytest.raises(SpecError):
        Event.from_dict({**GOOD, **change})


@pytest.mark.parametrize("name", ["version", "kind", "at", "id", "data"])
def test_nothing_may_be_missing(name: str) -> None:
    with pytest.raises(SpecError):
        Event.from_dict({key: value for key, value in GOOD.items() if key != name})


def test_neither_a_mapping_nor_too_deep() -> None:
    deep: Any = {}
    for _ in range(50):
        deep = {"a": deep}
    for wrong in (None, [], "x", {**GOOD, "data": deep}):
        with pytest.raises(SpecError):
            Event.from_dict(wrong)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "more"]), plain))
def test_anything_else_is_refused_as_such(change: dict[str, Any]) -> None:
    with contextlib.suppress(SpecError):
        assert Event.from_dict({**GOOD, **change}).to_dict() == {
            key: value for key, value in {**GOOD, **change}.items() if value is not None
        }


def test_what_an_observer_is_told_becomes_an_event() -> None:
    event = Event.noted("file.read", {"path": "/a", "trace_id": "t"}, sandbox="sbx-1", client="me")
    assert (event.kind, event.trace_id, dict(event.data)) == (EventKind.FILE_READ, "t", {"path": "/a"})
    assert (event.sandbox, event.client) == ("sbx-1", "me")


def test_traces_nest() -> None:
    assert current_trace() is None
    with tracing("a"):
        with tracing("b"):
            assert current_trace() == "b"
        assert current_trace() == "a"
    assert current_trace() is None
    with pytest.raises(SpecError):
        with tracing(""):
            pass


# --- who gets them ----------------------------------------------------------------------------------


def test_subscribers_get_what_they_want() -> None:
    dispatcher, every, some = Dispatcher(), [], []
    assert dispatcher.emit(EventKind.FILE_READ) is None
    assert not dispatcher.active
    stop = dispatcher.subscribe(every.append)
    dispatcher.subscribe(some.append, [EventKind.FILE_READ])
    first, second = dispatcher.emit(EventKind.FILE_READ, sandbox="a"), dispatcher.emit(EventKind.POOL_MISSED)
    assert (every, some) == ([first, second], [first])
    stop()
    stop()
    third = dispatcher.emit(EventKind.FILE_READ)
    assert (every, some) == ([first, second], [first, third])
    with pytest.raises(SpecError):
        dispatcher.subscribe(print, ["no.such"])


def test_the_same_callback_twice_is_two() -> None:
    dispatcher, found = Dispatcher(), []
    stop = dispatcher.subscribe(found.append)
    dispatcher.subscribe(found.append)
    dispatcher.emit(EventKind.FILE_READ)
    assert len(found) == 2
    stop()
    dispatcher.emit(EventKind.FILE_READ)
    assert len(found) == 3


def test_one_that_raises_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    dispatcher, found = Dispatcher(), []

    def wrong(event: Event) -> None:
        raise RuntimeError("oh")

    dispatcher.subscribe(wrong)
    dispatcher.subscribe(found.append)
    with caplog.at_level(logging.ERROR, "sandboxcore"):
        dispatcher.emit(EventKind.FILE_READ)
    assert len(found) == 1
    assert "file.read" in caplog.text
    assert "oh" in caplog.text


def test_a_subscriber_may_dispatch_and_unsubscribe() -> None:
    dispatcher, found = Dispatcher(), []

    def once(event: Event) -> None:
        stop()
        found.append(event.kind)
        dispatcher.emit(EventKind.POOL_MISSED)

    stop = dispatcher.subscribe(once)
    dispatcher.subscribe(lambda event: found.append(event.kind), [EventKind.POOL_MISSED])
    dispatcher.emit(EventKind.FILE_READ)
    assert found == [EventKind.FILE_READ, EventKind.POOL_MISSED]


def test_threads_lose_and_swap_nothing() -> None:
    dispatcher, found = Dispatcher(), []
    dispatcher.subscribe(found.append)

    def work(thread: int) -> None:
        for number in range(300):
            dispatcher.emit(EventKind.FILE_READ, data={"thread": thread, "number": number})
            if number % 10 == 0:
                dispatcher.subscribe(len, [EventKind.LOG_TORN])()

    play([threading.Thread(target=work, args=[number]) for number in range(4)])
    for thread in range(4):
        assert [event.data["number"] for event in found if event.data["thread"] == thread] == list(range(300))


def play(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --- the file ---------------------------------------------------------------------------------------


@pytest.fixture(params=[None, KEY], ids=["plain", "chained"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def written(path: Path, count: int, **options: Any) -> list[Event]:
    made = [started(number=number) for number in range(count)]
    with EventLog(path, **options) as log:
        for event in made:
            log.append(event)
    return made


def strictly(path: Path) -> list[Event]:
    def bad(file: Path, line: int, why: str) -> None:
        pytest.fail(f"{file}:{line}: {why}")

    return list(read_log(path, bad=bad))


def test_what_is_written_is_read(path: Path, key: bytes | None) -> None:
    assert written(path, 5, key=key) == strictly(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for line in path.read_bytes().splitlines():
        assert json.loads(line)["version"] == 1
    more = written(path, 2, key=key, fsync=True)
    assert strictly(path)[5:] == more
    if key:
        assert verify_log(path, key).ok


def test_the_mode_is_made_private(path: Path) -> None:
    path.touch(mode=0o644)
    written(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_no_link_no_fifo_no_directory_is_made(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EventLog(path / "missing" / "log")
    target = path.with_name("target")
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        EventLog(path)
    assert not target.exists()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SpecError, match="regular"):
        EventLog(path)


def test_options_are_checked(path: Path) -> None:
    for wrong in ({"key": b"short"}, {"key": "0" * 32}, {"max_bytes": 0}, {"backups": -1}):
        with pytest.raises(SpecError):
            EventLog(path, **wrong)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_chain_needs_its_key(path: Path) -> None:
    written(path, 2, key=KEY)
    for other in (None, b"another key of 32 bytes........."):
        with pytest.raises(SpecError):
            EventLog(path, key=other)
    plain = path.with_name("plain")
    written(plain, 1)
    with pytest.raises(SpecError):
        EventLog(plain, key=KEY)


def test_what_only_the_log_knows_is_refused(path: Path) -> None:
    with EventLog(path, key=KEY) as log:
        with pytest.raises(SpecError):
            log.append(Event(kind=EventKind.LOG_TORN))


def test_a_closed_log_takes_nothing(path: Path) -> None:
    log = EventLog(path)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.append(started())


def test_full_files_are_kept_and_read_in_order(path: Path, key: bytes | None) -> None:
    made = written(path, 40, key=key, max_bytes=1500)
    made += written(path, 10, key=key, max_bytes=1500)
    files = sorted(path.parent.iterdir())
    assert len(files) > 4
    assert all(file.stat().st_size <= 1500 for file in files)
    assert strictly(path) == made
    if key:
        found = verify_log(path, key, expect_lines=50)
        assert (found.ok, found.lines) == (True, 50)
        files[2].unlink()
        assert not verify_log(path, key).ok


def test_old_files_go(path: Path) -> None:
    made = written(path, 40, key=KEY, max_bytes=1500, backups=2)
    assert len(list(path.parent.iterdir())) == 3
    found = strictly(path)
    assert found == made[-len(found) :]
    assert not verify_log(path, KEY).ok
    assert verify_log(path, KEY, whole=False).ok


def test_as_many_old_files_as_are_wanted_stay(path: Path) -> None:
    written(path, 10, max_bytes=1, backups=5)
    assert len(eventlog.full_files(path)) == 5


def test_a_chain_goes_on_though_no_old_file_stays(path: Path) -> None:
    written(path, 3, key=KEY, max_bytes=1, backups=0)
    assert [json.loads(line)["seq"] for line in path.read_bytes().splitlines()] == [2]
    assert eventlog.full_files(path) == []
    found = verify_log(path, KEY)
    assert (found.ok, found.at_line) == (False, 1)
    assert verify_log(path, KEY, whole=False).ok


def test_whoever_begins_the_new_file_goes_on_with_the_chain(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer, while the one who has renamed the old one has no lock."""
    with EventLog(path, key=KEY, max_bytes=600, backups=0) as log:
        rotate = log._rotate

        def and_write() -> None:
            rotate()
            with EventLog(path, key=KEY) as other:
                other.append(started(number=1))

        monkeypatch.setattr(log, "_rotate", and_write)
        log.append(started(number=0, more="x" * 300))
        log.append(started(number=2))
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [(line["seq"], line["data"]["number"]) for line in lines] == [(1, 1), (2, 2)]
    assert verify_log(path, KEY, whole=False).ok


def test_files_that_go_while_somebody_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(path, 5, key=KEY, max_bytes=1)
    first, *middle, last = eventlog.full_files(path)
    kept = {part: part.read_bytes() for part in (first, *middle, last)}
    reading = iter(read_log(path))
    assert next(reading) == made[0]
    for part in (first, middle[0]):
        part.unlink()
    assert list(reading) == made[2:]

    def while_verified(*gone: Path, **options: Any) -> Verification:
        for part, data in kept.items():
            part.write_bytes(data)
        then = iter([lambda: None, lambda: [part.unlink() for part in gone]])
        lines_of = eventchain._lines

        def lines(*args: Any) -> Any:
            yield from lines_of(*args)
            next(then, lambda: None)()  # after the second file

        with monkeypatch.context() as patched:
            patched.setattr(eventchain, "_lines", lines)
            return verify_log(path, KEY, **options)

    pruned = while_verified(*kept, whole=False)
    assert (pruned.ok, pruned.lines) == (True, 3)
    assert not while_verified(*kept).ok
    assert not while_verified(middle[-1], whole=False).ok, "it was not the oldest"


def test_a_file_moved_away_is_begun_again(path: Path) -> None:
    with EventLog(path) as log:
        log.append(started(number=1))
        path.rename(path.with_name("away"))
        log.append(started(number=2))
    assert [event.data["number"] for event in strictly(path)] == [2]


def test_bad_lines_are_reported_and_passed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = written(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    rubbish = [b"\n", b"{\n", b"[]\n", b"\xff\n", b'{"version":1}\n', b"[" * 100_000 + b"\n", b'{"a":NaN}\n']
    path.write_bytes(lines[0] + b"".join(rubbish) + lines[1] + b'{"half')
    bad: list[int] = []
    assert list(read_log(path, bad=lambda file, line, why: bad.append(line))) == made
    assert bad == [2, 3, 4, 5, 6, 7, 8, 10]
    with caplog.at_level(logging.WARNING, "sandboxcore"):
        assert list(read_log(path)) == made
    assert "line 10" in caplog.text
    with pytest.raises(FileNotFoundError):
        list(read_log(path.with_name("none")))


def test_a_full_disk_leaves_no_half_line(
    path: Path, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(path, key=key)
    log.append(started())
    before = path.read_bytes()

    def full(fd: int, data: memoryview) -> int:
        os.write(fd, bytes(data)[:20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(eventlog, "_write", full)
        with pytest.raises(OSError, match="space"):
            log.append(started())
    assert path.read_bytes() == before
    log.append(started())
    assert len(strictly(path)) == 2
    assert key is None or verify_log(path, key).ok


def test_a_finaliser_in_the_midst_of_a_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(path, key=KEY)
    inner = [started(number=2)]

    class Circle:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            while inner:
                log.append(inner.pop())

    def write(fd: int, data: memoryview) -> int:
        gc.collect(1)
        return os.write(fd, data)

    monkeypatch.setattr(eventlog, "_write", write)
    gc.disable()  # or it may be collected before
    try:
        Circle()
        log.append(started(number=1))
    finally:
        gc.enable()
    assert [event.data["number"] for event in strictly(path)] == [1, 2]
    assert verify_log(path, KEY).ok


# --- many writers -----------------------------------------------------------------------------------


def test_threads_share_a_log(path: Path, key: bytes | None) -> None:
    log = EventLog(path, key=key, max_bytes=20_000)

    def work(thread: int) -> None:
        for number in range(100):
            log.append(started(thread=thread, number=number))

    play([threading.Thread(target=work, args=[number]) for number in range(4)])
    found = strictly(path)
    for thread in range(4):
        assert [event.data["number"] for event in found if event.data["thread"] == thread] == list(range(100))
    assert key is None or verify_log(path, key, expect_lines=400).ok


WRITER = """
    import os, sys
    from sandboxcore import eventlog
    from sandboxcore.eventlog import EventLog
    from sandboxcore.events import Event, EventKind
    path, key, who, count, limit = sys.argv[1:]
    log = EventLog(path, key=key.encode() or None, max_bytes=int(limit) or None)
    def put(number):
        log.append(Event(kind=EventKind.FILE_READ, client=who, data={"number": number, "more": "x" * 200}))
"""
MANY = """
    sys.stdin.read(1)
    for number in range(int(count)):
        put(number)
"""
KILLED = """
    import signal
    for number in range(int(count)):
        put(number)
    def half(fd, data):
        os.write(fd, bytes(data)[:{cut}])
        os.kill(os.getpid(), signal.SIGKILL)
    eventlog._write = half
    put(-1)
"""


def writer(code: str, path: Path, key: bytes | None, who: str, *, count: int, limit: int = 0) -> Any:
    text = textwrap.dedent(WRITER) + textwrap.dedent(code)
    args = [str(path), (key or b"").decode(), who, str(count), str(limit)]
    return subprocess.Popen([sys.executable, "-c", text, *args], stdin=subprocess.PIPE)


def test_processes_share_a_log(path: Path, key: bytes | None) -> None:
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(writer(MANY, path, key, f"w{n}", count=150, limit=30_000)) for n in range(3)
        ]
        for process in writers:
            process.stdin.write(b"g")
            process.stdin.close()
        assert [process.wait(60) for process in writers] == [0, 0, 0]
    found = strictly(path)
    for number in range(3):
        assert [event.data["number"] for event in found if event.client == f"w{number}"] == list(range(150))
    assert len(list(path.parent.iterdir())) > 3
    if key:
        assert verify_log(path, key, expect_lines=450).ok


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_killed_writer(path: Path, key: bytes | None, cut: int) -> None:
    """In the middle of a line; and just before its newline, when everything has been said."""
    with writer(KILLED.format(cut=cut), path, key, "w", count=3) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    if key:
        found = verify_log(path, key)
        assert (found.ok, found.at_line) == (False, 4)
        assert "unfinished" in (found.problem or "")
    bad: list[int] = []
    assert len(list(read_log(path, bad=lambda file, line, why: bad.append(line)))) == 3
    assert bad == [4]
    written(path, 2, key=key)
    whole, lines = cut == -1, list(read_log(path, bad=lambda *_: None))
    torn = [] if whole else [EventKind.LOG_TORN]
    assert [event.kind for event in lines[3:]] == [
        *([EventKind.FILE_READ] if whole else torn), *[EventKind.SANDBOX_STARTED] * 2
    ]  # fmt: skip
    if key:
        found = verify_log(path, key)
        assert found == Verification(
            lines=6 if whole else 7, ok=True, last=found.last, torn=() if whole else (4,)
        )


def test_a_forked_child_goes_on(path: Path) -> None:
    log = EventLog(path, key=KEY)
    log.append(started(number=0))
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for number in range(1, 50):
                log.append(started(number=number))
            os._exit(0)
        os._exit(1)
    for number in range(50, 100):
        log.append(started(number=number))
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(event.data["number"] for event in strictly(path)) == list(range(100))
    assert verify_log(path, KEY).ok


def test_a_writer_that_stands_still_is_not_waited_for_in_vain(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventlog, "PATIENCE", 0.05)
    with EventLog(path) as first, EventLog(path) as second:
        with first._locked():
            with pytest.raises(TimeoutError):
                second.append(started())
        second.append(started())
    assert len(strictly(path)) == 1


# --- tampering --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    written(path, 12, key=KEY)
    return path, path.read_bytes().splitlines(keepends=True)


def tampered(path: Path, lines: list[bytes]) -> Path:
    other = path.with_name("tampered.jsonl")
    other.write_bytes(b"".join(lines))
    return other


def test_a_true_log_is_true(chained: tuple[Path, list[bytes]]) -> None:
    path, lines = chained
    found = verify_log(path, KEY)
    assert found == Verification(lines=12, ok=True, last=json.loads(lines[-1])["mac"])
    assert verify_log(path, KEY, expect_last=json.loads(lines[5])["mac"], expect_lines=12).ok


def test_another_key(chained: tuple[Path, list[bytes]]) -> None:
    found = verify_log(chained[0], KEY[::-1] + b"x")
    assert (found.ok, found.at_line) == (False, 1)


@FILES
@given(st.data())
def test_one_changed_byte_is_found(chained: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    path, lines = chained
    number = data.draw(st.integers(0, 11))
    at = data.draw(st.integers(0, len(lines[number]) - 2))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != lines[number][at]))
    changed = bytearray(lines[number])
    changed[at] = byte
    found = verify_log(tampered(path, [*lines[:number], bytes(changed), *lines[number + 1 :]]), KEY)
    assert not found.ok
    assert found.at_line == number + 1


@FILES
@given(st.integers(0, 11), st.integers(0, 11), st.sampled_from(["remove", "repeat", "swap", "move"]))
def test_lines_out_of_their_order_are_found(
    chained: tuple[Path, list[bytes]], one: int, other: int, how: str
) -> None:
    path, lines = chained
    changed = list(lines)
    if how == "remove":
        del changed[one]
    elif how == "repeat":
        changed.insert(other, lines[one])
    elif how == "swap":
        changed[one], changed[other] = lines[other], lines[one]
    else:
        changed.insert(other, changed.pop(one))
    found = verify_log(tampered(path, changed), KEY)
    if changed in (lines, lines[:-1]):
        assert found.ok
    else:
        first = next(
            (n for n, pair in enumerate(zip(changed, lines, strict=False)) if pair[0] != pair[1]), 12
        )
        assert (found.ok, found.at_line) == (False, first + 1)


def test_what_is_cut_off_at_the_end_is_found_by_who_knows(chained: tuple[Path, list[bytes]]) -> None:
    path, lines = chained
    last = verify_log(path, KEY).last
    shorter = tampered(path, lines[:8])
    assert verify_log(shorter, KEY).ok
    for expected in ({"expect_last": last}, {"expect_lines": 12}):
        found = verify_log(shorter, KEY, **expected)  # type: ignore[arg-type]
        assert not found.ok
        assert found.at_line is None
        assert "cut off" in (found.problem or "")
    assert not verify_log(tampered(path, lines[3:]), KEY).ok
    assert not verify_log(tampered(path, [*lines[:8], lines[8][:50]]), KEY).ok
    assert not verify_log(tampered(path, []), KEY, expect_last=last).ok


def test_lines_of_others_are_found(chained: tuple[Path, list[bytes]]) -> None:
    path, lines = chained
    forged = path.with_name("forged")
    forged.unlink(missing_ok=True)
    written(forged, 4, key=b"the key of somebody else")
    plain = json.dumps(started().to_dict(), sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for line in (
        plain,
        forged.read_bytes().splitlines(keepends=True)[3],
        b"rubbish\n",
        b"\n",
        b"{}\n",
        b"[]\n",
    ):
        for at in (0, 5, 12):
            found = verify_log(tampered(path, [*lines[:at], line, *lines[at:]]), KEY)
            assert (found.ok, found.at_line) == (False, at + 1), line


@pytest.mark.parametrize("rests", [[b"\n"], [b'\n{"at":', b'\n{"da'], [b"\n\n", b'\n{"at"']])
def test_crashes_while_a_torn_line_is_told_of(path: Path, key: bytes | None, rests: list[bytes]) -> None:
    made = written(path, 2, key=key)
    with path.open("ab") as file:
        file.write(b"".join([b'{"par', *rests]))
    torn = b"".join([b'{"par', *rests]).removesuffix(b"\n")
    made += written(path, 2, key=key)
    found = list(read_log(path, bad=lambda *_: None))
    assert [event.kind for event in found] == [*[EventKind.SANDBOX_STARTED] * 2, EventKind.LOG_TORN] + [
        EventKind.SANDBOX_STARTED
    ] * 2
    assert dict(found[2].data) == {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
    if key:
        lines = torn.count(b"\n") + 1
        found_out = verify_log(path, key)
        assert (found_out.ok, found_out.torn) == (True, tuple(range(3, 3 + lines))), found_out.problem
        changed = path.read_bytes().replace(b'{"par', b'{"pas')
        assert not verify_log(tampered(path, [changed]), key).ok


def test_a_torn_line_that_is_gone_is_missed(path: Path) -> None:
    written(path, 2, key=KEY)
    with path.open("ab") as file:
        file.write(b'{"at":1')
    written(path, 1, key=KEY)
    assert verify_log(path, KEY).torn == (3,)
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (
        lines[:2] + lines[3:],
        [*lines[:2], b'{"at":2\n', *lines[3:]],
        [*lines[:2], *lines[2:3] * 2],
    ):
        assert not verify_log(tampered(path, changed), KEY).ok


def test_a_log_that_was_not_chained_is_not_right(path: Path) -> None:
    written(path, 3)
    found = verify_log(path, KEY)
    assert (found.ok, found.at_line, found.last) == (False, 1, None)


@settings(FILES, max_examples=20)
@given(st.lists(st.lists(others, max_size=4), max_size=4), st.integers(300, 3000))
def test_any_events_of_any_writers_make_a_true_log(
    tmp_path: Path, sittings: list[list[Event]], limit: int
) -> None:
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "log"
    for some in sittings:
        with EventLog(path, key=KEY, max_bytes=limit) as log:
            for event in some:
                log.append(event)
    if any(sittings):
        assert strictly(path) == [event for some in sittings for event in some]
        found = verify_log(path, KEY, expect_lines=sum(map(len, sittings)))
        assert found.ok, found
