"""files=: written as the payload, before exec, and nowhere else."""

import errno
from pathlib import Path

import pytest
from support import Spec, shell, snapshot

import sandboxcore
from sandboxcore import Limits, SetupError, SpecError

pytestmark = pytest.mark.once


def test_content_mode_and_owner() -> None:
    files = {
        "a": b"bytes\0\xff",
        "b": "téxt",
        "c/d/e": ("deep", 0o600),
        "/tmp/f": (b"", 0o755),
        "/workspace/g": bytearray(b"more"),
        "empty": "",
    }
    done = shell(
        "stat -c '%n %a %u:%g %s' a b c c/d/e /tmp/f g empty; cat a b c/d/e g",
        files=files,
    )
    assert done.stderr == b""
    assert done.stdout == (
        b"a 644 1000:1000 7\nb 644 1000:1000 5\nc 755 1000:1000 60\nc/d/e 600 1000:1000 4\n"
        b"/tmp/f 755 1000:1000 0\ng 644 1000:1000 4\nempty 644 1000:1000 0\n"
        b"bytes\0\xfft\xc3\xa9xtdeepmore"
    )


def test_a_script_that_is_run() -> None:
    done = sandboxcore.run(["./run.sh", "x"], files={"run.sh": ("#!/bin/sh\necho got $1\n", 0o755)})
    assert done.stdout == b"got x\n"


def test_relative_to_cwd() -> None:
    assert shell("cat x", cwd="/tmp", files={"x": "here"}).stdout == b"here"
    assert shell("cat x", spec=Spec(workdir="/tmp"), files={"x": "here"}).stdout == b"here"


def test_a_new_directory_can_be_the_working_directory() -> None:
    assert shell("pwd; cat x", cwd="made", files={"x": "here"}).stdout == b"/workspace/made\nhere"


def test_large_files() -> None:
    data = bytes(range(256)) * (4 << 12)  # 4 MiB
    done = shell("cat big | cksum; cksum < big; wc -c < big", files={"big": data})
    one, two, size = done.stdout.splitlines()
    assert one == two
    assert int(size) == len(data)
    assert shell("cat big", files={"big": data}).stdout == data


def test_many_files() -> None:
    files = {f"d{number % 7}/f{number}": str(number) for number in range(1000)}
    assert shell("find . -type f | wc -l; cat d0/f994", files=files).stdout == b"1000\n994"


def test_into_a_writable_host_directory(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    spec = Spec(rw=[(tmp_path / "s", "/s")])
    sandboxcore.run(["true"], spec=spec, files={"/s/new/f": "x"})
    made = tmp_path / "s/new/f"
    assert made.read_text() == "x"
    assert made.stat().st_uid == (tmp_path / "s").stat().st_uid


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    shared = tmp_path / "s"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "victim").mkdir()
    (shared / "out").symlink_to(tmp_path / "victim")
    (shared / "passwd").symlink_to("/etc/passwd")
    (shared / "tmp").symlink_to("/tmp")
    before = snapshot(tmp_path)
    for path in ("/s/out/f", "/s/passwd", "/s/tmp/f"):
        with pytest.raises(SetupError) as caught:
            sandboxcore.run(["true"], spec=Spec(rw=[(shared, "/s")]), files={path: "x"})
        assert (caught.value.stage, caught.value.errno) == ("file", errno.ELOOP), path
        assert caught.value.subject == path
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("/etc/x", errno.EROFS),
        ("/usr/x", errno.EROFS),
        ("/proc/x", None),
        ("/dev/x", errno.EROFS),
        ("/x", errno.EROFS),
    ],
)
def test_where_the_payload_cannot_write(path: str, number: int | None) -> None:
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], files={"first": "", path: "x"})
    assert (caught.value.stage, caught.value.index, caught.value.subject) == ("file", 1, path)
    if number:
        assert caught.value.errno in (number, errno.EACCES)


def test_a_directory_in_the_way() -> None:
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], files={"/tmp": "x"})
    assert (caught.value.stage, caught.value.errno) == ("file", errno.EISDIR)


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        sandboxcore.run(["true"], spec=Spec(limits=Limits(disk=65536)), files={"x": bytes(70000)})
    assert (caught.value.stage, caught.value.errno) == ("file", errno.ENOSPC)
    assert "limits.disk" in caught.value.hint


@pytest.mark.parametrize("path", ["../x", "a/../b", "a\0b", "d/", "x" * 5000, ""])
def test_unusable_names(path: str) -> None:
    with pytest.raises(SpecError, match="files"):
        sandboxcore.run(["true"], files={path: "x"})


@pytest.mark.parametrize("mode", [-1, 0o4755, 0o1000])
def test_unusable_modes(mode: int) -> None:
    with pytest.raises(SpecError, match="mode"):
        sandboxcore.run(["true"], files={"x": ("", mode)})


def test_the_limit_of_file_size_is_the_payloads() -> None:
    """RLIMIT_FSIZE bounds what the command writes, not what it was given; nothing dies of SIGXFSZ."""
    done = shell(
        "wc -c < x; head -c 2000 /dev/zero > y",
        spec=Spec(limits=Limits(file_size=1000)),
        files={"x": bytes(2000)},
    )
    assert done.stdout == b"2000\n"
    assert not done.ok
