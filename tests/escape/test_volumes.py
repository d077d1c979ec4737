"""Attacks on whoever keeps volumes, by what a payload leaves in one, and on the bounds of one."""

import contextlib
import json
import os
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from escape.hostile import AT_FDCWD, Hostile, call, calls, open_for, pack, pointer, read, result
from support import PYTHON, run_python, snapshot

import sandboxcore
from sandboxcore import PIPE, Sandbox, SandboxError, SandboxSpec, SpecError, VolumeNotFound, Volumes

pytestmark = pytest.mark.escape

FS_IOC_SETFLAGS, FS_IMMUTABLE = 0x40086602, 0x10
FS_IOC_FSSETXATTR = 0x401C5820
MiB = 1 << 20


@pytest.fixture
def volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volumes:
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(tmp_path / "state"))
    found = Volumes()
    found.create("v")
    found.create("other")
    sandboxcore.run(["true"], spec=SandboxSpec(volumes=["v:/v"]))  # refused here and now
    return found


@pytest.fixture
def secret(open_dir: Path) -> Path:
    """A directory of the host with something to lose in it."""
    (open_dir / "secret").write_bytes(bytes(4 * MiB))
    (open_dir / "secret").chmod(0o666)
    return open_dir


def test_links_planted_for_who_measures_and_removes(volumes: Volumes, secret: Path) -> None:
    before, data = snapshot(secret), volumes.get("v").path / "data"
    plant = f"cd /v; mkdir d; ln -s {secret} d/link; ln -s {secret}/secret file; ln -s / root; ln -s .. up"
    assert sandboxcore.run(["sh", "-c", plant], spec=SandboxSpec(volumes=["v:/v"])).ok
    assert os.listdir(data / "d/link") == ["secret"], "outside the links lead there"
    found = volumes.describe("v")
    assert found.inodes == 5
    assert found.bytes is not None
    assert found.bytes < MiB
    volumes.delete("v")
    assert snapshot(secret) == before
    assert volumes.gc() == ()


def test_race_of_a_directory_with_a_link(volumes: Volumes, secret: Path) -> None:
    """What is measured, or removed, becomes a link to something else in the very moment."""
    code = f"""
        import os
        os.mkdir("/v/d")
        os.symlink("{secret}", "/v/link")
        print("ready", flush=True)
        while True:
            os.rename("/v/d", "/v/x"); os.rename("/v/link", "/v/d")
            os.rename("/v/d", "/v/link"); os.rename("/v/x", "/v/d")
    """
    before, data, careless = snapshot(secret), volumes.get("v").path / "data", 0

    with Sandbox(SandboxSpec(volumes=["v:/v"])) as sandbox:
        racer = sandbox.popen([PYTHON, "-I", "-S", "-c", textwrap.dedent(code)], stdout=PIPE)
        assert racer.stdout is not None
        assert racer.stdout.readline() == b"ready\n"
        began = time.monotonic()
        while not careless or time.monotonic() < began + 0.7:
            found = volumes.describe("v")
            assert (found.bytes or 0) < MiB
            with contextlib.suppress(FileNotFoundError):
                careless += "secret" in os.listdir(data / "d")
            assert time.monotonic() < began + 30, "who goes by names is led astray"
    volumes.delete("v")
    assert snapshot(secret) == before


def test_a_tree_too_deep_for_who_removes_it(volumes: Volumes) -> None:
    code = "import os\nfor _ in range(2500):\n    os.mkdir('d'); os.chdir('d')"
    spec = SandboxSpec(volumes=["v:/v", "other:/o"])
    for place in ("/v", "/o"):
        assert run_python(code, spec=spec, cwd=place).ok
    with pytest.raises(RecursionError):
        shutil.rmtree(volumes.get("other").path / "data/d")
    assert volumes.describe("v") == sandboxcore.VolumeUsage(None, None, ())
    for name in ("v", "other"):
        volumes.delete(name)
    assert os.listdir(volumes.path) == [".lock"]


def test_directories_that_keep_their_owner_out(hostile: Hostile, volumes: Volumes) -> None:
    """Nor can a payload make them keep root out."""
    lock = "mkdir -p /v/a/b/c; touch /v/a/b/c/f; chmod 0 /v/a/b/c /v/a/b; chmod 0500 /v/a; chmod 0 /v"
    assert sandboxcore.run(["sh", "-c", lock], spec=SandboxSpec(volumes=["v:/v"])).ok
    frozen = calls(
        call("openat", AT_FDCWD, "/o/file", os.O_CREAT | os.O_RDWR, 0o600),
        call("ioctl", result(0), FS_IOC_SETFLAGS, pack("q", FS_IMMUTABLE)),
        call("ioctl", result(0), FS_IOC_FSSETXATTR, pointer(pack_fsxattr(7))),
    )
    assert hostile.inside(frozen, volumes=["other:/o"]).answers[1:] in [
        ("EPERM", "EINVAL"),
        ("EPERM", "EPERM"),
    ]
    if os.geteuid() == 0:
        path = volumes.get("other").path / "data/file"
        attack = calls(
            call("openat", AT_FDCWD, str(path), os.O_RDWR, 0),
            call("ioctl", result(0), FS_IOC_SETFLAGS, pack("q", FS_IMMUTABLE)),
            call("unlinkat", AT_FDCWD, str(path), 0),
            call("ioctl", result(0), FS_IOC_SETFLAGS, pack("q", 0)),
        )
        assert hostile.outside(attack).answers == ("ok", "ok", "EPERM", "ok")
    else:
        with pytest.raises(PermissionError):
            shutil.rmtree(volumes.get("v").path / "data")
    for name in ("v", "other"):
        volumes.delete(name)
    assert os.listdir(volumes.path) == [".lock"]


def pack_fsxattr(project: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (0x200, 0, 0, project, 0)) + bytes(8)


@pytest.mark.parametrize(
    "name", ["../outside", "..", "/{secret}", "a/../../outside", "v/data", ".lock", "v\0x"]
)
def test_names_that_lead_out(volumes: Volumes, secret: Path, name: str) -> None:
    name = name.format(secret=str(secret)[1:])
    before = snapshot(secret)
    if "\0" not in name:  # no path could be made of it
        assert (volumes.path / name).resolve().parent != volumes.path.resolve() or name == ".lock"
    for action in (volumes.create, volumes.get, volumes.describe, volumes.delete, volumes.source):
        with pytest.raises(SpecError):
            action(name)
    with pytest.raises(SpecError):
        SandboxSpec(volumes=[(name, "/v")])
    assert snapshot(secret) == before
    assert sorted(os.listdir(volumes.path)) == [".lock", "other", "v"]


def test_links_in_the_place_of_a_volume(volumes: Volumes, secret: Path) -> None:
    """Somebody with the owner's rights, or a restored backup, has put them there: they are no volumes."""
    record = json.loads((volumes.get("v").path / "volume.json").read_text())
    (secret / "volume.json").write_text(json.dumps({**record, "name": "evil"}))
    (secret / "data").mkdir()
    (secret / "uses").mkdir()
    (volumes.path / "evil").symlink_to(secret)
    (volumes.get("other").path / "data").rmdir()
    (volumes.get("other").path / "data").symlink_to(secret)
    before = snapshot(secret)
    assert (volumes.path / "evil/volume.json").read_text(), "a path leads there"
    for name in ("evil", "other"):
        with pytest.raises((SandboxError, VolumeNotFound), match="no directory"):
            sandboxcore.run(["true"], spec=SandboxSpec(volumes=[f"{name}:/v"]))
    assert volumes.describe("other").bytes is None
    with pytest.raises(SandboxError, match="no directory"):
        volumes.delete("evil")
    volumes.delete("other")
    assert snapshot(secret) == before


def test_hard_links_and_what_lies_next_to_it(hostile: Hostile, volumes: Volumes, secret: Path) -> None:
    """A host file is not carried into a volume, nor one of a volume into another; what the owner keeps next
    to it cannot be reached."""
    target = volumes.get("v").path / "data"
    link = call("linkat", AT_FDCWD, f"{secret}/secret", AT_FDCWD, f"{target}/link", 0)
    assert hostile.outside(calls(link)).verdict == "ok"
    (target / "link").unlink()
    grant: dict[str, Any] = {"ro": [(secret, "/s")], "volumes": ["v:/v", "other:/o"], "user": "0"}
    for source, place in (("/s/secret", "/v/link"), ("/v/file", "/o/link"), ("/usr/bin/env", "/v/env")):
        steps = calls(
            call("openat", AT_FDCWD, "/v/file", os.O_CREAT | os.O_RDWR, 0o600),
            call("linkat", AT_FDCWD, source, AT_FDCWD, place, 0),
            call("renameat", AT_FDCWD, "/v/file", AT_FDCWD, "/o/file"),
        )
        assert hostile.inside(steps, **grant).answers == ("ok", "EXDEV", "EXDEV")
    assert hostile.outside(read(f"{target}/../volume.json")).verdict == "ok"
    for path in ("/v/../volume.json", "/v/../uses", "/v/../../other"):
        assert hostile.inside(open_for(path, os.O_RDONLY), **grant).verdict == "ENOENT"
    assert os.listdir(volumes.get("other").path / "data") == []


@pytest.mark.parametrize("mode", [0o4755, 0o2755])
@pytest.mark.parametrize("how", ["fchmodat", "openat", "mknodat", "openat2"])
def test_no_set_user_id_file_is_left_behind(hostile: Hostile, volumes: Volumes, how: str, mode: int) -> None:
    """It would belong to the volume's owner, who may be root, and wait for an accomplice on the host."""
    create = os.O_CREAT | os.O_WRONLY

    def attack(path: str) -> list[str]:
        steps = {
            "fchmodat": [
                call("openat", AT_FDCWD, path, create, 0o755),
                call("fchmodat", AT_FDCWD, path, mode),
            ],
            "openat": [call("openat", AT_FDCWD, path, create, mode)],
            "mknodat": [call("mknodat", AT_FDCWD, path, 0o100000 | mode, 0)],
            "openat2": [call("openat2", AT_FDCWD, path, pack("=3Q", create, mode, 0), 24)],
        }
        return calls(*steps[how])

    trap = volumes.get("v").path / "data/trap"
    assert hostile.outside(attack(str(trap))).verdict == "ok"
    assert trap.stat().st_mode & 0o7777 == mode
    trap.unlink()
    hostile.inside(attack("/v/trap"), volumes=["v:/v"])
    assert not trap.exists() or not trap.stat().st_mode & 0o6000
    shutil.copy(hostile.program, trap)
    trap.chmod(0o6755)
    inside = sandboxcore.run(
        ["/v/trap", *calls(call("geteuid"))], spec=SandboxSpec(volumes=["v:/v"], user=None)
    )
    assert inside.stdout == b"ok 1000\n"  # nosuid


def test_going_beyond_the_size(volumes: Volumes) -> None:
    """Holes, files without a name, many small ones, and what is reserved for root: none of it is more."""
    try:
        volumes.create("bounded", quota="8M", inodes=32)
    except sandboxcore.UnsupportedHost as error:
        pytest.skip(str(error))
    code = """
        import errno, json, os
        total, hidden = 0, []
        for how in range(3):
            try:
                while True:
                    path, flags = ("/v", os.O_TMPFILE) if how == 0 else (f"/v/{how}{total}", os.O_CREAT)
                    fd = os.open(path, flags | os.O_RDWR)
                    hidden.append(fd)
                    if how == 1:
                        os.posix_fallocate(fd, 0, 1 << 20)
                        total += 1 << 20
                    else:
                        for at in range(0, 1 << 30, 1 << 20):
                            total += os.pwrite(fd, bytes(1 << 16), at if how else at // 16)
            except OSError as error:
                assert error.errno in (errno.ENOSPC, errno.EDQUOT), error
        print(json.dumps([total, len(hidden)]))
    """
    with Sandbox(SandboxSpec(volumes=["bounded:/v"], user=0)) as sandbox:
        done = sandbox.exec(["python3", "-c", "import textwrap,sys;exec(textwrap.dedent(sys.argv[1]))", code])
        assert done.ok, done
        total, files = json.loads(done.stdout)
    assert 7 * MiB < total <= 8.5 * MiB
    assert files <= 2 * 32
    image = volumes.get("bounded").path / "image"
    assert image.stat().st_blocks * 512 <= image.stat().st_size < 18 * MiB
    assert (volumes.describe("bounded").bytes or 0) <= 8.5 * MiB
