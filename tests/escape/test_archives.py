"""Archives made to be read as snapshots by somebody who should not: refused, or harmless."""

import hashlib
import io
import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import IS_ROOT, Spec, leaves_nothing
from trees import ok

from sandboxcore import ArchiveError, Sandbox, Snapshot

pytestmark = [pytest.mark.escape, pytest.mark.usefixtures("overlays")]

SPEC = Spec(writable=True)
TOP = "files"


def member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **about: Any) -> tuple[Any, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode = kind, len(data), 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in about.items():
        setattr(info, key, value)
    return info, data


def archive(*members: tuple[Any, bytes], **manifest: Any) -> io.BytesIO:
    """What Snapshot.export() writes, but for what is given."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in (member(TOP, tarfile.DIRTYPE), *members):
            tar.addfile(info, io.BytesIO(data))
        hashes = {info.name: hashlib.sha256(data).hexdigest() for info, data in members if info.isreg()}
        about = {"format": "sandboxcore-snapshot", "version": 1, "overlays": ["/"], "sha256": hashes,
                 "removed": [], "opaque": [], **manifest}  # fmt: skip
        data = json.dumps(about).encode()
        tar.addfile(*((info := member("manifest.json", data=data))[0], io.BytesIO(info[1])))
    file.seek(0)
    return file


def unpacked_carelessly(file: io.BytesIO, into: Path) -> None:
    """The control: what tar does if it is trusted."""
    into.mkdir(parents=True)
    with tarfile.open(fileobj=file) as tar:
        tar.extraction_filter = staticmethod(
            lambda member, path: member
        )  # Python 3.11.4; before, it is trusted
        tar.extractall(into)
    file.seek(0)


@pytest.fixture(autouse=True)
def there_is_a_shelf() -> None:
    """And a spawner that knows the spec, so that nothing more is there afterwards."""
    Snapshot.load(archive(), SPEC).close()


def test_the_form_is_ours() -> None:
    """Else the refusals below would prove nothing."""
    good = archive(member(f"{TOP}/dir", tarfile.DIRTYPE), member(f"{TOP}/dir/file", data=b"content\n"))
    with Snapshot.load(good, SPEC) as kept, Sandbox.from_snapshot(kept) as sandbox:
        assert ok(sandbox, "cat /dir/file") == b"content\n"


WAYS_OUT: dict[str, Callable[[Path], list[tuple[Any, bytes]]]] = {
    "absolute": lambda out: [member(f"{out}/x", data=b"got out")],
    "dots": lambda out: [member(f"{TOP}/../../out/x", data=b"got out")],
    "link-above": lambda out: [
        member(f"{TOP}/link", tarfile.SYMTYPE, linkname=str(out)), member(f"{TOP}/link/x", data=b"got out"),
    ],
    "link-in-place": lambda out: [
        member(f"{TOP}/x", tarfile.SYMTYPE, linkname=f"{out}/x"), member(f"{TOP}/x", data=b"got out"),
    ],
    "hard-link-out": lambda out: [
        member(f"{TOP}/x", tarfile.LNKTYPE, linkname=f"{out}/secret"), member(f"{TOP}/x", data=b"got out"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS_OUT)
def test_ways_out(way: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "secret").write_text("secret")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    hostile = archive(*WAYS_OUT[way](out))
    with leaves_nothing(), pytest.raises(ArchiveError):
        Snapshot.load(hostile, SPEC)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    hostile.seek(0)
    unpacked_carelessly(hostile, tmp_path / "naive")
    assert {path.name: path.read_bytes() for path in out.iterdir()} != before, "the control gets out"


REFUSED = {
    "device": (member(f"{TOP}/null", tarfile.CHRTYPE, devmajor=1, devminor=3),),
    "whiteout": (member(f"{TOP}/etc", tarfile.CHRTYPE, devmajor=0, devminor=0),),
    "block": (member(f"{TOP}/disk", tarfile.BLKTYPE, devmajor=8),),
    "dot": (member(f"{TOP}/./x"),),
    "beside": (member("elsewhere/x"),),
    "file-above": (member(f"{TOP}/a"), member(f"{TOP}/a/b")),
    "no-directory-above": (member(f"{TOP}/a/b"),),
    "twice": (member(f"{TOP}/a"), member(f"{TOP}/a")),
    "link-to-later": (member(f"{TOP}/b", tarfile.LNKTYPE, linkname=f"{TOP}/a"), member(f"{TOP}/a")),
    "link-to-directory": (member(f"{TOP}/d", tarfile.LNKTYPE, linkname=TOP),),
    "long-name": (member(f"{TOP}/{'x' * 300}"),),
    "long-target": (member(f"{TOP}/x", tarfile.SYMTYPE, linkname="x" * 5000),),
    "large-hole": (
        member(f"{TOP}/x", data=b"0\n" + bytes(510), pax_headers={
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 63),
            "GNU.sparse.name": f"{TOP}/x",
        }),
    ),
    "attribute": (member(f"{TOP}/x", pax_headers={"SCHILY.xattr.user." + "n" * 300: "v"}),),
    "time": (member(f"{TOP}/x", pax_headers={"mtime": "9" * 40}),),
    "owner": (member(f"{TOP}/x", pax_headers={"uid": str(1 << 33)}),),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    if what == "owner" and not IS_ROOT:
        with Snapshot.load(archive(*REFUSED[what]), SPEC) as kept:  # his sandbox has one owner: all is his
            assert {item.entry.uid for item in kept.layers[0].items(content=False)} == {0}
        return
    with leaves_nothing(), pytest.raises(ArchiveError):
        Snapshot.load(archive(*REFUSED[what]), SPEC)


MANIFESTS: dict[str, dict[str, Any]] = {
    "version": {"version": 2},
    "other-overlays": {"overlays": ["/", "/etc"]},
    "removed-outside": {"removed": ["files/../../x"]},
    "removed-and-there": {"removed": [f"{TOP}/a"]},
    "removed-root": {"removed": [TOP]},
    "opaque-file": {"opaque": [f"{TOP}/a"]},
    "opaque-nothing": {"opaque": [f"{TOP}/nothing"]},
    "another-hash": {"sha256": {f"{TOP}/a": "0" * 64}},
    "no-hash": {"sha256": {}},
    "no-lists": {"removed": "x"},
    "numbers": {"removed": [1]},
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_lie(what: str) -> None:
    with leaves_nothing(), pytest.raises(ArchiveError):
        Snapshot.load(archive(member(f"{TOP}/a", data=b"x"), **MANIFESTS[what]), SPEC)


def test_cut_off_anywhere() -> None:
    whole = archive(member(f"{TOP}/a", data=b"x" * 2000)).getvalue()
    with leaves_nothing():
        for size in range(0, whole.rindex(b"}") + 1, 97):
            with pytest.raises(ArchiveError):
                Snapshot.load(io.BytesIO(whole[:size]), SPEC)


def test_what_is_harmless(tmp_path: Path) -> None:
    """Set-id bits, capabilities, attributes of overlayfs, deep trees, names of control characters."""
    deep = [member("/".join([TOP, *["d"] * n]), tarfile.DIRTYPE) for n in range(1, 400)]
    xattrs = {"SCHILY.xattr.security.capability": "\x01\x00\x00\x02" + "\xff" * 8,
              "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.opaque": "y",
              "SCHILY.xattr.user.overlay.redirect": "/", "SCHILY.xattr.user.own": "kept"}  # fmt: skip
    shell = Path("/bin/sh").resolve().read_bytes()
    hostile = archive(
        member(f"{TOP}/suid", data=shell, mode=0o6755, uid=0, gid=0),
        member(f"{TOP}/etc", tarfile.DIRTYPE, pax_headers=xattrs),
        member(f"{TOP}/name\x1b[31m\n", data=b""),
        *deep,
    )
    unpacked_carelessly(hostile, tmp_path / "naive")
    assert (tmp_path / "naive/files/suid").stat().st_mode & stat.S_ISUID, "the control"
    with Snapshot.load(hostile, SPEC) as kept, Sandbox.from_snapshot(kept) as sandbox:
        assert ok(
            sandbox, "ls -ld /suid | cut -c1-10; /suid -p -c 'id -u; cat /proc/self/status | grep CapEff'"
        ) in (b"-rwsr-sr-x\n1000\nCapEff:\t0000000000000000\n",)
        assert ok(sandbox, "ls /etc/passwd") == b"/etc/passwd\n", "nothing of ours makes it opaque"
        look = "import os; print(sorted(os.listxattr('/etc')), os.path.isdir('/' + 'd/' * 399))"
        assert ok(sandbox, f'/usr/bin/python3 -c "{look}"') == b"['user.own'] True\n"


@pytest.mark.needs_root
def test_owners_are_those_inside() -> None:
    """What an archive says to belong to root is not the host's root's."""
    hostile = archive(member(f"{TOP}/x", data=b"x", uid=0, gid=0))
    with Snapshot.load(hostile, SPEC) as kept:
        (entry,) = [item.entry for item in kept.layers[0].items(content=False) if item.path.endswith(b"/x")]
        assert entry.uid in kept.plan.uids
        assert entry.uid != 0
