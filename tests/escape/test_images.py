"""Attacks by who makes a root file system: archives and images that are meant to be unpacked elsewhere."""

import gzip
import os
import stat
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import Layout, Member, digest, hard, link, member, tar
from support import Spec, host_program, shell, snapshot

import sandboxcore
from sandboxcore import Sandbox, SpecError, images

pytestmark = pytest.mark.escape


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state"
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(path))
    return path


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A directory of the host with a file, next to where things are unpacked."""
    path = tmp_path / "victim"
    path.mkdir()
    (path / "file").write_text("the host's\n")
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where a careless program unpacks: as deep as a layer lies in the state directory."""
    path = tmp_path / "state" / "layers" / "careless" / "tree"
    path.mkdir(parents=True, mode=0o700)
    (tmp_path / "state").chmod(0o700)
    return path


def carelessly(archive: Path, where: Path) -> None:
    """As many a program does."""
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "fully_trusted_filter"):
            opened.extractall(where, filter="fully_trusted")
        else:
            opened.extractall(where)


def attempt(archive: Path) -> Path | None:
    """Have it unpacked for a sandbox; the layer, unless it is refused."""
    try:
        return Path(images.load(archive).layers[0].path)
    except SpecError:
        return None


# What makes or changes something in the directory {victim}, four levels above and one beside.
WAYS_OUT: dict[str, Callable[[Path], list[Member]]] = {
    "absolute path": lambda v: [member(f"{v}/new", b"x")],
    "two dots": lambda v: [member("../../../../victim/new", b"x")],
    "two dots behind a directory": lambda v: [member("a/"), member("a/../../../../../victim/new", b"x")],
    "link to a directory": lambda v: [link("a", str(v)), member("a/new", b"x")],
    "relative link": lambda v: [link("a", "../../../../victim"), member("a/new", b"x")],
    "links in a chain": lambda v: [
        link("a", ".."),
        link("b", "a/../.."),
        link("c", "b/../victim"),
        member("c/new", b"x"),
    ],
    "link to a directory that is made below": lambda v: [link("a", str(v)), member("a/b/c/")],
    "link to a file": lambda v: [link("a", f"{v}/file"), member("a", b"x")],
    "link to what is not there yet": lambda v: [link("a", f"{v}/new"), member("a", b"x")],
    "hard link": lambda v: [hard("a", f"{v}/file"), member("a", b"x")],
    "hard link by two dots": lambda v: [hard("a", "../../../../victim/file"), member("a", b"x")],
    "hard link through a link": lambda v: [link("d", str(v)), hard("a", "d/file"), member("a", b"x")],
    "hard link to a link": lambda v: [link("l", f"{v}/file"), hard("a", "l"), member("a", b"x")],
    "link through a link": lambda v: [link("d", str(v)), link("d/new", "/etc/passwd")],
    "fifo through a link": lambda v: [link("d", str(v)), member("d/new", kind=tarfile.FIFOTYPE)],
    "mode through a link": lambda v: [link("d", f"{v}/file"), member("d", b"", mode=0o777)],
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_ways_out_of_an_archive(tmp_path: Path, victim: Path, scratch: Path, way: str) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(tar(*WAYS_OUT[way](victim)))
    before = snapshot(victim)
    attempt(archive)
    assert snapshot(victim) == before
    carelessly(archive, scratch)
    assert snapshot(victim) != before


def test_ways_out_between_layers(tmp_path: Path, victim: Path) -> None:
    """A link in one layer, a file through it in the next: each layer is unpacked by itself."""
    layout = Layout(tmp_path / "layout")
    low, top = tar(link("a", str(victim))), tar(member("a/new", b"x"))
    layout.add(layout.image(low, top))
    before = snapshot(victim)
    images.load(layout.path)
    assert snapshot(victim) == before
    for number, data in enumerate((low, top)):
        (tmp_path / str(number)).write_bytes(data)
        carelessly(tmp_path / str(number), tmp_path / "merged")
    assert snapshot(victim) != before


@pytest.mark.parametrize("name", ["a/.wh..", "a/.wh...", ".wh.", ".wh...", "../../../../.wh.victim"])
def test_whiteouts_of_what_is_outside(tmp_path: Path, victim: Path, scratch: Path, name: str) -> None:
    """Whoever removes what these name removes a whole directory, or the one above."""
    where, _, what = name.rpartition("/")
    (scratch / "a").mkdir()
    hit = (scratch / where / what.removeprefix(".wh.")).resolve()
    assert hit in (victim, scratch / "a") or scratch.is_relative_to(hit)
    archive = tmp_path / "archive"
    archive.write_bytes(tar(member("a/"), member(name)))
    before = snapshot(victim)
    assert attempt(archive) is None
    assert snapshot(victim) == before


def test_set_id_files_and_devices(tmp_path: Path, scratch: Path) -> None:
    """Nothing in the state directory gives anybody power, whoever may get there."""
    archive = tmp_path / "archive"
    members = [member("su", b"#!/bin/sh\n", mode=0o6755), member("d/", mode=0o6777)]
    members.append(member("fifo", kind=tarfile.FIFOTYPE))
    if os.geteuid() == 0:
        members.append(member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3))
    archive.write_bytes(tar(*members))
    carelessly(archive, scratch)
    assert (scratch / "su").stat().st_mode & 0o6000 == 0o6000
    assert stat.S_ISFIFO((scratch / "fifo").stat().st_mode)
    layer = attempt(archive)
    assert layer is not None
    assert sorted(os.listdir(layer)) == ["d", "su"]
    assert not any((layer / name).stat().st_mode & 0o6000 for name in ("d", "su"))
    if os.geteuid() == 0:
        assert (scratch / "null").is_char_device()


def test_whiteouts_by_device(tmp_path: Path) -> None:
    """A device with the number 0 hides a file of the layers below; only a whiteout may."""
    for name in ("low", "naive"):
        (tmp_path / name / "etc").mkdir(parents=True)
    (tmp_path / "low/etc/file").write_text("seen\n")
    os.mknod(tmp_path / "naive/etc/file", stat.S_IFCHR, 0)
    (tmp_path / "top").write_bytes(tar(member("etc/file", kind=tarfile.CHRTYPE)))
    tools = [("/usr", "/usr"), *((f"/{name}", f"/{name}") for name in ("bin", "lib", "lib64"))]
    tools = [pair for pair in tools if os.path.exists(pair[0])]
    for top, seen in (("naive", b""), ("top", b"seen\n")):
        spec = Spec(rootfs=[tmp_path / "low", tmp_path / top], ro=tools)
        assert shell("cat /etc/file", spec=spec).stdout == seen


def test_marks_of_overlayfs(tmp_path: Path) -> None:
    """Attributes that overlayfs acts upon hide what is below, and capabilities make privileged programs."""
    headers = {f"SCHILY.xattr.user.overlay.{name}": "y" for name in ("opaque", "whiteout", "metacopy")}
    headers |= {"SCHILY.xattr.security.capability": "\1\0\0\2\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"}
    headers |= {"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.fine": "y"}
    (tmp_path / "top").write_bytes(
        tar(member("etc/", pax_headers=headers), member("etc/x", pax_headers=headers))
    )
    (tmp_path / "low/etc").mkdir(parents=True)
    (tmp_path / "low/etc/file").write_text("seen\n")
    layer = images.load(tmp_path / "top").layers[0]
    for path in ("etc", "etc/x"):
        assert os.listxattr(Path(layer.path, path)) == ["user.fine"]
    assert layer.skips == 10
    tools = [(path, path) for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.exists(path)]
    spec = Spec(rootfs=[tmp_path / "low", tmp_path / "top"], ro=tools)
    assert shell("cat /etc/file", spec=spec).stdout == b"seen\n"
    (tmp_path / "naive/etc").mkdir(parents=True)
    os.setxattr(tmp_path / "naive/etc", "user.overlay.opaque", b"y")
    spec = Spec(rootfs=[tmp_path / "low", tmp_path / "naive"], ro=tools)
    assert shell("cat /etc/file", spec=spec).stdout == b""


def test_talking_through_a_shared_root(tmp_path: Path) -> None:
    """Two sandboxes with one root could meet at a fifo in it, if Landlock did not stand before it."""
    tools = [(path, path) for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.exists(path)]
    (tmp_path / "naive").mkdir()
    os.mkfifo(tmp_path / "naive/meet")
    (tmp_path / "naive/meet").chmod(0o666)
    (tmp_path / "image").write_bytes(tar(member("meet", kind=tarfile.FIFOTYPE, mode=0o666)))
    for rootfs, heard in (([tmp_path / "naive"], b"secret\n"), (tmp_path / "image", b"")):
        spec = Spec(rootfs=rootfs, ro=tools, landlock=False)
        with Sandbox(spec) as one, Sandbox(spec) as other:
            hearing = one.popen(["timeout", "20", "cat", "/meet"], stdout=sandboxcore.PIPE)
            other.exec(["timeout", "20", "sh", "-c", "echo secret > /meet"], timeout=30)
            assert hearing.communicate(timeout=30)[0] == heard


# --- bombs ------------------------------------------------------------------------------------------

CAREFUL = """
import resource, sys, tarfile
from sandboxcore import SpecError, images
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    images.load(sys.argv[1], max_bytes=sys.argv[2], max_entries=1000)
except SpecError as error:
    print(error)
"""
CARELESS = """
import resource, sys, tarfile
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
names = tarfile.open(sys.argv[1]).getnames()
"""


def _bomb(size: int, *blocks: bytes) -> bytes:
    """Blocks, then zeros, compressed without having them in memory; one compressed piece stands for all."""
    piece = gzip.compress(bytes(1 << 24), 9)
    return gzip.compress(b"".join(blocks)) + piece * (size >> 24)


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    return member(name, kind=kind, size=size)[0].tobuf(tarfile.GNU_FORMAT)


def test_size_bombs(tmp_path: Path, state: Path) -> None:
    """A few kilobytes that become 64 GiB: nothing of it is written beyond the bound."""
    archive = tmp_path / "archive"
    archive.write_bytes(_bomb(1 << 30, _header("zeros", 64 << 30)))
    assert archive.stat().st_size < 2 << 20
    with tarfile.open(archive) as opened:
        assert opened.next().size == 64 << 30  # all of this is what extractall() would begin to write
    for bound in ("16M", "20M"):
        assert "bytes unpacked" in host_program(CAREFUL, str(archive), bound).stdout
    assert not list(state.glob("layers/*/tree"))


def test_holes(tmp_path: Path, state: Path) -> None:
    """A sparse file takes nothing in the archive, and whoever reads it gets all of it."""
    archive = tmp_path / "archive"
    info, _ = member("hole", pax_headers={"GNU.sparse.map": "", "GNU.sparse.size": str(1 << 60)})
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 60)}
    info.size = 512
    archive.write_bytes(tar((info, b"0\n".ljust(512, b"\0"))))
    with tarfile.open(archive) as opened:
        assert opened.next().size == 1 << 60
    with pytest.raises(SpecError, match="bytes unpacked"):
        images.load(archive)
    assert not list(state.glob("layers/*/tree"))


def test_header_bombs(tmp_path: Path) -> None:
    """A header of 2 GiB, which the standard library would have in memory."""
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        archive = tmp_path / "archive"
        archive.write_bytes(_bomb(2 << 30, _header("long", (2 << 30) - 512, kind)))
        assert "MemoryError" in host_program(CARELESS, str(archive)).stderr
        assert "of headers for one member" in host_program(CAREFUL, str(archive), "16G").stdout


def test_chains_of_headers(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(_header("x", 0, tarfile.XHDTYPE) * 3000 + _header("y", 0) + bytes(1024))
    assert "RecursionError" in host_program(CARELESS, str(archive)).stderr
    assert attempt(archive) is None


def test_entry_bombs(tmp_path: Path, state: Path) -> None:
    """Many files, or one path of many directories; deeper than a program can remove again."""
    archive = tmp_path / "archive"
    many = [member(f"{number}", b"") for number in range(1001)]
    for members, message in (
        (many, "1000 files and directories"),
        ([member("/".join("d" * 200) + "/" + f"{n}/" * 3) for n in range(300)], "1000 files"),
        ([member("d/" * 300 + "x", b"")], "too deep"),
        ([member("d/" * 2000 + "x", b"")], "too deep"),
        ([member("n" * 256, b"")], "too long"),
        ([link("a", "t" * 5000)], "too long"),
    ):
        archive.write_bytes(tar(*members))
        with pytest.raises(SpecError, match=message):
            images.load(archive, max_entries=1000)
    assert not list(state.glob("layers/*/tree"))


def test_directories_that_cannot_be_entered(tmp_path: Path, state: Path) -> None:
    """Modes without any right, in what is refused in the end: all of it is removed again."""
    archive = tmp_path / "archive"
    closed = [member("a/", mode=0), member("a/b/", mode=0), member("a/b/c", b"x", mode=0)]
    archive.write_bytes(tar(*closed))
    layer = attempt(archive)
    assert layer is not None
    assert stat.S_IMODE((layer / "a").stat().st_mode) == 0
    assert images.collect(unused_for=0) == (layer.parent.name,)
    archive.write_bytes(tar(*closed, hard("d", "none")))
    assert attempt(archive) is None
    assert not list(state.glob("layers/*/tree"))


def _with_size(header: bytes, size: int) -> bytes:
    """A header with a size that tar's octal digits cannot say."""
    raw = bytearray(header)
    raw[124:136] = (
        b"\xff" * 4 + struct.pack(">q", size) if size < 0 else b"\x80\0\0\0" + struct.pack(">q", size)
    )
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


FILE = _header("file", 0)
LIES: dict[str, bytes] = {
    "negative size": _with_size(FILE, -512) + bytes(1024),
    "more than there is": _with_size(FILE, 1 << 40) + bytes(10240),
    "more than a file can have": _with_size(FILE, (1 << 63) - 1) + bytes(10240),
    "negative size of an attribute": _with_size(_header("x", 0, tarfile.XHDTYPE), -512) + FILE + bytes(1024),
    "unknown kind": _header("file", 0, b"Z") + bytes(1024),
    "a file that is a directory": tar(member("a/b", b""), member("a", b"")),
    "a directory that is a file": tar(member("a", b""), member("a/", b"")),
    "a file in a file": tar(member("a", b""), member("a/b", b"")),
    "a link in place of a directory": tar(member("a/b", b""), link("a", "/")),
    "the root as a file": tar(member("./", b"", kind=tarfile.REGTYPE)),
    "a link to itself": tar(member("a", b""), hard("a", "a")),
    "a link to a directory": tar(member("a/"), hard("b", "a")),
    "a link to what comes later": tar(hard("b", "a"), member("a", b"")),
    "a NUL in a name": tar(member("a", b"", pax_headers={"path": "a\0b"})),
    "a NUL in a link": tar(link("a", "x", pax_headers={"linkpath": "a\0b"})),
    "a NUL in an attribute": tar(member("a", b"", pax_headers={"SCHILY.xattr.user.a\0b": "x"})),
    "an attribute without a name": tar(member("a", b"", pax_headers={"SCHILY.xattr.user.": "x"})),
    "a time that is none": tar(member("a", b"", pax_headers={"mtime": "nan"})),
    "a hole before the file": tar(
        member("a", b"", pax_headers={"GNU.sparse.map": "-5,10", "GNU.sparse.size": "10"})
    ),
    "holes that overlap": tar(
        member("a", b"x" * 20, pax_headers={"GNU.sparse.map": "5,10,0,10", "GNU.sparse.size": "20"})
    ),
    "holes behind the end": tar(
        member("a", b"x" * 20, pax_headers={"GNU.sparse.map": "5,10,90,10", "GNU.sparse.size": "20"})
    ),
    "more pieces than data": tar(
        member("a", b"", pax_headers={"GNU.sparse.map": "0,5000,6000,10", "GNU.sparse.size": "6010"})
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_archives_that_lie(tmp_path: Path, state: Path, lie: str) -> None:
    """Each is refused by name, and nothing of it stays."""
    archive = tmp_path / "archive"
    archive.write_bytes(LIES[lie])
    assert attempt(archive) is None
    assert not list(state.glob("layers/*/tree"))


def test_random_damage(tmp_path: Path, state: Path) -> None:
    """Bytes of the headers wrong, one at a time: a layer or a SpecError, and never anything else."""
    good = tar(
        member("a/", pax_headers={"mtime": "1.5"}), member("a/b", b"x"), hard("c", "a/b"), link("d", "a")
    )
    archive = tmp_path / "archive"
    for place in range(0, len(good) - 1024, 61):
        data = bytearray(good)
        data[place] ^= 0x80 if place % 2 else 0x11
        archive.write_bytes(data)
        attempt(archive)
    assert not list(state.glob("layers/tmp-*"))


def test_a_digest_of_something_else(tmp_path: Path, victim: Path) -> None:
    """A path as a digest, a link as a blob: what is used is what the digest says."""
    layout = Layout(tmp_path / "layout")
    layer = tar(member("a", b"x"))
    image = layout.image(layer, pack="")
    layout.add(image)
    for name in ("../../../victim/file", "sha256:../../../victim/file", f"sha256:{'0' * 63}/"):
        layout.manifests[0] = {**image, "digest": name}
        layout.write()
        with pytest.raises(SpecError, match="no sha256"):
            images.load(layout.path)
    layout.manifests[0] = image
    layout.write()
    layout.place(digest(layer)).unlink()
    layout.place(digest(layer)).symlink_to(victim / "file")
    with pytest.raises(SpecError, match="its digest or size|nor a tar archive"):
        images.load(layout.path)
    assert layout.place(digest(layer)).read_text() == "the host's\n"
