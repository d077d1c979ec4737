"""Root file systems from tar archives and from OCI image layouts."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import ARCHITECTURE, PACK, Layout, digest, hard, link, member, tar
from support import PYTHON, Spec, host_environment, host_process, host_program, snapshot, wait_until

import sandboxcore
from sandboxcore import (
    PersistentSandbox,
    Sandbox,
    SandboxError,
    SpecError,
    host,
    images,
    plan,
)
from sandboxcore.layerstore import LayerStore

# A root with nothing but links to the host's programs, which are mounted at /usr.
LINKS = [link(name, f"usr/{name}") for name in ("bin", "lib", "lib64") if os.path.islink(f"/{name}")]
LOOK = """
import hashlib, json, os, stat, sys
found = {}
for top in sys.argv[1:]:
    for where, names, files in os.walk(top):
        for path in [where, *(os.path.join(where, name) for name in names + files)]:
            st = os.lstat(path)
            about = [oct(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns]
            if stat.S_ISREG(st.st_mode):
                about += [hashlib.sha256(open(path, "rb").read()).hexdigest(), st.st_nlink]
                about += [[name, os.getxattr(path, name).decode()] for name in os.listxattr(path)]
            elif stat.S_ISLNK(st.st_mode):
                about += [os.readlink(path)]
            found[path] = about
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of the test's own, in which nothing is left half done."""
    path = tmp_path / "state"
    monkeypatch.setenv("SANDBOXCORE_STATE_DIR", str(path))
    yield path
    assert not list(path.glob("layers/tmp-*"))


def stored(state: Path) -> list[str]:
    """The layers in the store."""
    return sorted(path.name for path in state.glob("layers/sha256-*"))


def look(rootfs: Any, *tops: str, **fields: Any) -> dict[str, list[Any]]:
    """What a sandbox sees below some directories of a root file system."""
    spec = Spec(rootfs=rootfs, ro=["/usr"], user=0, **fields)
    done = sandboxcore.run([PYTHON, "-I", "-S", "-c", LOOK, *tops], spec=spec, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(rootfs: Any, *tops: str, **fields: Any) -> set[str]:
    return set(look(rootfs, *tops, **fields))


def owner(uid: int, gid: int) -> list[int]:
    """Whom a file belongs to, inside, of which the archive says this."""
    return [uid, gid] if host.features().mode == "root" else [0, 0]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def collected(count: int) -> None:
    """Layers of ended sandboxes can be removed, as soon as the kernel is done with those."""
    removed: set[str] = set()

    def all_removed() -> bool:
        removed.update(images.collect(unused_for=0))
        return len(removed) >= count

    wait_until(all_removed, "layers that can be removed")
    assert len(removed) == count


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


WHEN = 1_600_000_000
BASE = tar(
    *LINKS,
    member("data/", mode=0o1777, mtime=WHEN, uid=3, gid=4),
    member("data/file", b"content\n", mode=0o4644, mtime=WHEN + 0.25, uid=7, gid=8),
    hard("data/again", "data/file"),
    link("data/link", "file", mtime=WHEN),
    link("data/away", "/etc/../../passwd", mtime=WHEN),
    member("./data//sub/./file", b"x" * 3_000_000, mtime=WHEN),
    member(
        "data/attributes", b"y", mode=0o444, mtime=WHEN, pax_headers={"SCHILY.xattr.user.note": "text\né"}
    ),
    member("data/ünïcode\n", b"z", mtime=WHEN, uid=70000, gid=1 << 40),
    member("/data/from the root", b"", mtime=WHEN),
    member("data/null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3),
    member("data/fifo", kind=tarfile.FIFOTYPE),
    member("data/closed/", mode=0o500, mtime=WHEN),
    member("data/closed/file", b"deep", mode=0o400, mtime=WHEN),
)
EXPECTED = {
    "/data": ["0o41777", *owner(3, 4), WHEN * 10**9],
    "/data/file": ["0o100644", *owner(7, 8), WHEN * 10**9 + 250_000_000, sha256(b"content\n"), 2],
    "/data/again": ["0o100644", *owner(7, 8), WHEN * 10**9 + 250_000_000, sha256(b"content\n"), 2],
    "/data/link": ["0o120777", 0, 0, WHEN * 10**9, "file"],
    "/data/away": ["0o120777", 0, 0, WHEN * 10**9, "/etc/../../passwd"],
    "/data/sub": None,
    "/data/sub/file": ["0o100644", 0, 0, WHEN * 10**9, sha256(b"x" * 3_000_000), 1],
    "/data/attributes": ["0o100444", 0, 0, WHEN * 10**9, sha256(b"y"), 1, ["user.note", "text\né"]],
    "/data/ünïcode\n": ["0o100644", *owner(65534, 65534), WHEN * 10**9, sha256(b"z"), 1],
    "/data/from the root": ["0o100644", 0, 0, WHEN * 10**9, sha256(b""), 1],
    "/data/closed": ["0o40500", 0, 0, WHEN * 10**9],
    "/data/closed/file": ["0o100400", 0, 0, WHEN * 10**9, sha256(b"deep"), 1],
}


# --- archives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", PACK)
def test_archives(tmp_path: Path, state: Path, pack: str) -> None:
    """However it is packed, and whatever it is called: content, modes, owners, times, links, attributes."""
    archive = write(tmp_path / "root", PACK[pack](BASE))
    for writable in (False, True):
        found = look(archive, "/data", writable=writable)
        assert {path: EXPECTED[path] and about for path, about in found.items()} == EXPECTED
    assert len(stored(state)) == 1
    assert (state / "layers").stat().st_mode & 0o777 == 0o700


def test_streams_in_pieces(tmp_path: Path) -> None:
    """As programs make them that compress on several processors, or want to find single files again."""
    half = len(BASE) // 2
    note = b"\x50\x2a\x4d\x18\x03\0\0\0abc"  # of zstd: a frame to skip
    for pack, extra in (("gzip", b""), ("bzip2", b""), ("xz", b""), ("xz", bytes(8)), ("zstd", note)):
        halves = [PACK[pack](BASE[:half]), PACK[pack](BASE[half:])]
        archive = write(tmp_path / "root", extra * (pack == "zstd") + extra.join(halves) + extra)
        assert images.load(archive).layers[0].diff_id == digest(BASE)


def test_what_was_left_out_is_on_record(tmp_path: Path) -> None:
    layer = images.load(write(tmp_path / "root", BASE)).layers[0]
    assert layer.skipped == ("data/null: device", "data/fifo: fifo")
    assert (layer.skips, layer.diff_id, layer.opaque) == (2, digest(BASE), False)


def test_sparse_files(tmp_path: Path) -> None:
    """Of GNU tar, in all its formats; the holes are holes again."""
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"middle")
        file.truncate(3 << 20)
    formats = (["gnu"], *(["pax", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0")))
    for number, (kind, *how) in enumerate(formats):
        archive = tmp_path / f"{number}.tar"
        command = ["tar", "-S", f"--format={kind}", *how, "-cf", archive, "-C", tmp_path, "sparse"]
        subprocess.run(command, check=True, timeout=60)
        layer = images.load(archive).layers[0]
        copy = Path(layer.path, "sparse")
        assert copy.read_bytes() == source.read_bytes()
        assert copy.stat().st_blocks < 1000


def test_archives_of_tar(tmp_path: Path) -> None:
    """In all its formats, with names as long as each can have."""
    tree = tmp_path / "tree"
    for depth, name in (("a", "file"), ("d" * 90, "n" * 60), ("long/" * 40, "n" * 200)):
        (tree / depth).mkdir(parents=True)
        (tree / depth / name).write_text(name)
        (tree / depth / "link").symlink_to("t" * 90)
        os.link(tree / depth / name, tree / depth / "hard")
        expected = snapshot(tree)
        for kind in ("v7", "ustar", "gnu", "pax") if depth == "a" else ("gnu", "pax"):
            archive = tmp_path / f"{kind}{len(depth)}"
            options = ["tar", f"--format={kind}", "-cf", archive, "-C", tree, "."]
            subprocess.run(options, check=True, timeout=60)
            found = snapshot(Path(images.load(archive).layers[0].path))
            assert found.keys() == expected.keys()
            for path in found.keys() - {"."}:
                assert (found[path][0], found[path][4:]) == (expected[path][0], expected[path][4:])


def test_denied_paths_in_an_archive(tmp_path: Path, state: Path) -> None:
    """Also where the state directory is behind a link."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    state.symlink_to("elsewhere")
    spec = Spec(rootfs=write(tmp_path / "root", BASE), ro=["/usr"], deny=["/data/file", "/data/none"], user=0)
    assert sandboxcore.run(["cat", "/data/file"], spec=spec, timeout=60).stdout == b""
    assert sandboxcore.run(["cat", "/data/link"], spec=spec, timeout=60).stdout == b""
    assert sandboxcore.run(["cat", "/data/closed/file"], spec=spec, timeout=60).stdout == b"deep"


def test_an_archive_of_a_whole_root(tmp_path: Path, toolbox: str) -> None:
    """With its own program, as `tar -c` makes one; nothing of the host."""
    (tmp_path / "root/bin").mkdir(parents=True)
    write(tmp_path / "root/bin/toolbox", Path(toolbox).read_bytes()).chmod(0o755)
    subprocess.run(["tar", "-czf", tmp_path / "a.tgz", "-C", tmp_path / "root", "."], check=True, timeout=60)
    spec = Spec(rootfs=tmp_path / "a.tgz")
    assert sandboxcore.run(["/bin/toolbox", "id"], spec=spec, timeout=60).stdout == b"1000:1000\n"


def test_layers_of_all_kinds(tmp_path: Path) -> None:
    """Directories and archives in one list; whiteouts count in any."""
    low, top = tmp_path / "low", tmp_path / "top.tar"
    (low / "data").mkdir(parents=True)
    for name in ("a", "b"):
        (low / "data" / name).write_text(name)
    top.write_bytes(tar(*LINKS, member("data/.wh.a", b""), member("data/c", b"c")))
    assert names([low, top], "/data") == {"/data", "/data/b", "/data/c"}
    assert names([top, low], "/data") == {"/data", "/data/a", "/data/b", "/data/c"}
    assert names([low, top, top], "/data") == {"/data", "/data/b", "/data/c"}
    write(tmp_path / "all", tar(*LINKS, member("data/d", b""), member(".wh..wh..opq")))
    assert names([low, top, tmp_path / "all"], "/data") == {"/data", "/data/d"}


def test_a_changed_archive_is_noticed(tmp_path: Path, state: Path) -> None:
    archive = write(tmp_path / "root.tar", tar(*LINKS, member("data/a", b"")))
    assert names(archive, "/data") == {"/data", "/data/a"}
    spec = Spec(rootfs=archive, ro=["/usr"])
    first = plan.compile_plan(spec, host.features())
    assert plan.compile_plan(spec, host.features()) is first
    archive.write_bytes(tar(*LINKS, member("data/bb", b"")))
    assert names(archive, "/data") == {"/data", "/data/bb"}
    assert len(stored(state)) == 2


def test_an_archive_is_read_once(tmp_path: Path) -> None:
    """It is known by its inode and the inode's times, unless those are too new to tell."""
    store = LayerStore(owners=host.features().mode == "root")
    about = write(tmp_path / "root.tar", BASE).stat()
    layer = images.load(tmp_path / "root.tar").layers[0]
    assert store.known(about) is None
    store.remember(about, layer.diff_id, time.time() + 5)
    assert store.known(about) is layer
    with (tmp_path / "root.tar").open("ab") as file:
        file.write(bytes(512))
    assert store.known((tmp_path / "root.tar").stat()) is None


BROKEN = {
    "text": (b"no archive\n", "Not a directory, nor a tar archive"),
    "nothing": (b"", "Not a directory, nor a tar archive"),
    "gzip of text": (PACK["gzip"](b"no archive"), "Not a directory, nor a tar archive"),
    "cut off": (BASE[: len(BASE) // 2], "cut off"),
    "cut off behind a member": (BASE[:-10240], "no end of archive|cut off"),
    "damaged": (BASE[:512] + b"\1" * 512 + BASE[1024:], "damaged"),
    "gzip cut off": (PACK["gzip"](BASE)[:-20], "damaged"),
    "gzip with another sum": (PACK["gzip"](BASE)[:-8] + bytes(8), "damaged"),
    "xz cut off": (PACK["xz"](BASE)[:-20], "damaged"),
    "bzip2 cut off": (PACK["bzip2"](BASE)[:-20], "damaged"),
    "zstd cut off": (PACK["zstd"](BASE)[:-8], "damaged|cut off"),
    "an image in it": (
        tar(member("oci-layout", b"{}"), member("index.json", b"{}"), member("blobs/")),
        "unpack it",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_archives(tmp_path: Path, state: Path, name: str) -> None:
    data, message = BROKEN[name]
    with pytest.raises(SpecError, match=f"rootfs: .*/root: .*({message})"):
        sandboxcore.run(["true"], spec=Spec(rootfs=write(tmp_path / "root", data)))
    assert stored(state) == []


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in {"fifo": "rootfs", "none:tag": "No such file", "none": "No such file"}.items():
        with pytest.raises(SpecError, match=message):
            sandboxcore.run(["true"], spec=Spec(rootfs=tmp_path / name))


def test_bounds(tmp_path: Path, state: Path) -> None:
    archive = write(tmp_path / "root", BASE)
    for fields, message in (({"max_bytes": "1M"}, "1048576 bytes"), ({"max_entries": 5}, "5 files")):
        with pytest.raises(SpecError, match=message):
            images.load(archive, **fields)
    assert stored(state) == []
    assert images.load(archive, max_bytes="10M", max_entries=50).layers[0].bytes == 3_000_014


def test_a_full_file_system(tmp_path: Path, state: Path) -> None:
    """Where writing fails, nothing is left: RLIMIT_FSIZE stands for it."""
    archive = write(tmp_path / "root", BASE)
    code = """
    import resource, signal, sys
    from sandboxcore import SandboxError, images
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    try:
        images.load(sys.argv[1])
    except SandboxError as error:
        print(error)
    """
    assert "sub/./file': File too large" in host_program(code, str(archive)).stdout
    assert stored(state) == []


def test_zstd_without_the_package(tmp_path: Path) -> None:
    code = """
    import sys
    sys.modules["zstandard"] = sys.modules["compression.zstd"] = None
    from sandboxcore import UnsupportedHost, images
    try:
        images.load(sys.argv[1])
    except UnsupportedHost as error:
        print(error.remedy)
    """
    archive = write(tmp_path / "root", PACK["zstd"](BASE))
    assert "sandboxcore[images]" in host_program(code, str(archive)).stdout


# --- images -------------------------------------------------------------------------------------------

MIDDLE = tar(
    member("data/"),
    member("data/.wh.file"),
    member("data/sub/"),
    member("data/sub/.wh..wh..opq"),
    member("data/sub/new", b"new\n"),
    member("data/.wh.closed"),
    member("data/closed/", mode=0o700),
    member("data/closed/other", b"o"),
    member("data/.wh.none"),
    member("data/.wh.link"),
    member("data/link", b"a file now"),
)
TOP = tar(member("data/"), member("data/.wh.again"), member("data/file", b"another\n", mode=0o600))


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "layout")
    made.add(made.image(BASE, MIDDLE, TOP, Env=["A=b=c", "D"], Cmd=["sh"], User="7"), "three")
    made.add(made.image(BASE, MIDDLE, pack="zstd"), "two")
    return made


@pytest.mark.parametrize("writable", [False, True])
def test_an_image(layout: Layout, state: Path, *, writable: bool) -> None:
    """Layers, whiteouts, directories that hide what was below; two images share what they have in common."""
    found = look(f"{layout.path}:three", "/data", writable=writable)
    hidden = {"/data/again", "/data/sub/file", "/data/closed/file"}
    assert found.keys() == (EXPECTED.keys() - hidden) | {"/data/sub/new", "/data/closed/other"}
    assert found["/data/file"][4] == sha256(b"another\n")
    assert found["/data/link"][4] == sha256(b"a file now")
    assert found["/data/attributes"] == EXPECTED["/data/attributes"]
    assert found["/data/closed"][0] == "0o40700"
    below = names(f"{layout.path}:two", "/data", writable=writable)
    assert below == found.keys() - {"/data/file"} | {"/data/again"}
    assert len(stored(state)) == 3


def test_a_writable_image(layout: Layout) -> None:
    """What an image hides stays hidden when its place is taken, and the layers stay as they are."""
    spec = Spec(rootfs=f"{layout.path}:three", ro=["/usr"], user=0, writable=True)
    with Sandbox(spec) as box:
        done = box.shell(
            "mkdir /data/again; ls -A /data/again; rm -r /data/sub; mkdir /data/sub; ls -A /data/sub"
        )
        assert (done.returncode, done.stdout) == (0, b""), done
        snap = box.snapshot()
        box.shell("rm -r /data/sub; echo x > /data/closed/other")
        box.restore(snap)
        assert box.shell("cat /data/closed/other").stdout == b"o"
    assert "/data/sub/new" in names(f"{layout.path}:three", "/data")


def test_describe(layout: Layout) -> None:
    about = images.describe(f"{layout.path}:three")
    assert (about.tag, about.architecture, about.user, about.workdir) == ("three", ARCHITECTURE, "7", "")
    assert (dict(about.env), about.command, about.entrypoint) == ({"A": "b=c", "D": ""}, ("sh",), ())
    assert about.layers == (digest(BASE), digest(MIDDLE), digest(TOP))
    with pytest.raises(SpecError, match="not an OCI image layout"):
        images.describe(layout.path.parent)
    spec = Spec(rootfs=f"{layout.path}:three", ro=["/usr"])
    assert b"\nA=" not in sandboxcore.run(["env"], spec=spec, timeout=60).stdout


def test_which_image(layout: Layout) -> None:
    """By name; for this machine, also in an index of indexes; what is not clear is asked back."""
    for name, message in (("", "several images.*: three, two"), (":none", "no such image.*: three, two")):
        with pytest.raises(SpecError, match=message):
            images.load(f"{layout.path}{name}")
    other = layout.image(TOP, architecture="vax")
    for _ in range(3):
        own = {**layout.manifests[0], "platform": {"os": "linux", "architecture": ARCHITECTURE}}
        far = {**other, "platform": {"os": "linux", "architecture": "vax"}}
        layout.manifests[0] = layout.document({"manifests": [far, own]}, "index")
    layout.manifests[1:] = []
    layout.write()
    assert images.describe(layout.path).layers[-1] == digest(TOP)
    assert len(images.load(layout.path).layers) == 3
    layout.manifests[:] = [far]
    layout.write()
    with pytest.raises(SpecError, match="none for linux/.*, but for linux/vax"):
        images.load(layout.path)
    layout.manifests[:] = [other]
    layout.write()
    with pytest.raises(SpecError, match="for linux/vax, and this is linux/"):
        images.load(layout.path)


def test_a_new_image_of_the_same_name_is_noticed(layout: Layout) -> None:
    assert "/data/again" not in names(f"{layout.path}:three", "/data")
    layout.manifests.clear()
    layout.add(layout.image(BASE), "three")
    assert "/data/again" in names(f"{layout.path}:three", "/data")


def test_many_layers(tmp_path: Path) -> None:
    """More than one option of fsconfig(2) can name, and one of them twice."""
    layers = [tar(*LINKS), *(tar(member(f"data/{number}", b"")) for number in range(50))]
    layout = Layout(tmp_path / "layout")
    layout.add(layout.image(*layers, layers[7]))
    for writable in (False, True):
        assert len(names(layout.path, "/data", writable=writable)) == 51
    layout.manifests.clear()
    layout.add(layout.image(*(tar(member(f"data/{number}", b"")) for number in range(129)), pack=""))
    with pytest.raises(SpecError, match="129 layers, but 128"):
        look(layout.path)


def _replace(layout: Layout, name: str, data: bytes) -> None:
    layout.place(name).write_bytes(data)


def _falsify(layout: Layout, how: str) -> str:
    """Change something of an image with the layers BASE and TOP; returns what the error is to say."""
    image = layout.image(BASE, TOP)
    manifest = json.loads(layout.place(image["digest"]).read_bytes())
    layer, config = manifest["layers"][0], manifest["config"]
    message = "its digest or size is another"
    if how == "manifest":
        _replace(layout, image["digest"], json.dumps({**manifest, "x": 1}).encode())
    elif how == "configuration":
        _replace(layout, config["digest"], layout.place(config["digest"]).read_bytes() + b" ")
    elif how == "layer":
        _replace(layout, layer["digest"], PACK["gzip"](BASE.replace(b"content", b"CONTENT")))
    elif how == "something behind a layer":
        _replace(layout, layer["digest"], layout.place(layer["digest"]).read_bytes() + PACK["gzip"](b"\0"))
    elif how == "no layer":
        layout.place(layer["digest"]).unlink()
        message = "No such file"
    elif how == "fifo":
        layout.place(layer["digest"]).unlink()
        os.mkfifo(layout.place(layer["digest"]))
        message = "nor a file"
    else:
        message = _state_falsely(manifest, how)
        image = layout.document(manifest, "manifest")
    layout.manifests[:] = []
    layout.add(image)
    return message


def _state_falsely(manifest: dict[str, Any], how: str) -> str:
    layer = manifest["layers"][0]
    if how == "size":
        layer["size"] += 1
        return "its digest or size is another"
    if how == "path":
        layer["digest"] = "sha256:../../../../etc/passwd"
        return "no sha256"
    if how == "kind":
        layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+encrypted"
        return "not known"
    if how == "order":
        manifest["layers"].reverse()
        return "unpacked it is"
    manifest["layers"].pop()
    return "1 layers, but 2"


FALSE = ("manifest", "configuration", "layer", "something behind a layer", "no layer", "fifo", "size", "path")


@pytest.mark.parametrize("how", [*FALSE, "kind", "order", "number"])
def test_what_is_not_what_its_digest_says(tmp_path: Path, state: Path, how: str) -> None:
    layout = Layout(tmp_path / "layout")
    message = _falsify(layout, how)
    with pytest.raises(SpecError, match=message):
        images.load(layout.path)
    assert stored(state) == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "nonsense", "[" * 100_000, '{"manifests": 5}', '{"manifests": [5]}']
)
def test_a_false_index(tmp_path: Path, text: str) -> None:
    layout = Layout(tmp_path / "layout")
    (layout.path / "index.json").write_text(text)
    with pytest.raises(SpecError, match="rootfs: "):
        images.load(layout.path)


# --- the store ----------------------------------------------------------------------------------------

LOAD = """
import sys
from sandboxcore import images
"""


def test_several_at_once(layout: Layout, state: Path, tmp_path: Path) -> None:
    """All end well, whoever was first."""
    archive = write(tmp_path / "root", PACK["gzip"](BASE))
    code = LOAD + "print(*(one.path for path in sys.argv[1:] for one in images.load(path).layers))"
    command = [sys.executable, "-c", code, f"{layout.path}:three", str(archive)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=host_environment()) for _ in range(4)]
    said = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(said) == 1
    assert len(stored(state)) == 3


def test_a_crash_leaves_what_gc_removes(tmp_path: Path, state: Path) -> None:
    """And nothing of one that is at work."""
    archive = write(tmp_path / "root", BASE)
    code = (
        LOAD
        + """
from sandboxcore import _native
_native.syncfs = lambda fd: (print("here", flush=True), sys.stdin.readline())
images.load(sys.argv[1])
"""
    )
    with host_process(code, str(archive)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert images.collect(unused_for=0) == ()
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    (left,) = images.collect(dry_run=True)
    assert left.startswith("tmp-")
    assert stored(state) == []
    found = sandboxcore.gc(state).removed
    assert found == (f"layers/{left}",)
    assert images.collect(unused_for=0) == ()
    assert "/data" in names(archive, "/data")


def test_layers_in_use_stay(layout: Layout, state: Path) -> None:
    """As long as a plan or a sandbox has them, here or elsewhere; then they go, and come again."""
    code = (
        LOAD
        + """
from sandboxcore import Sandbox, SandboxSpec
spec = SandboxSpec(rootfs=sys.argv[1], ro=["/usr"])
with Sandbox(spec):
    print("here", flush=True)
    sys.stdin.readline()
"""
    )
    with host_process(code, f"{layout.path}:two") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        images.load(f"{layout.path}:three")
        assert images.collect(unused_for=3600) == ()
        gone = images.collect(unused_for=0, dry_run=True)
        assert len(gone) == 1
        assert images.collect(unused_for=0) == gone
        assert len(stored(state)) == 2
        process.communicate("\n", timeout=60)
    kept = images.load(f"{layout.path}:two")
    assert images.collect(unused_for=0) == ()
    del kept
    collected(2)
    assert "/data/sub/new" in names(f"{layout.path}:two", "/data")


def test_a_plan_of_a_removed_layer_is_made_anew(tmp_path: Path, state: Path) -> None:
    archive = write(tmp_path / "root", BASE)
    assert "/data" in names(archive, "/data")
    plan._cache.clear()
    sandboxcore.run(["true"], timeout=60)  # the spawner stays where it made the last sandbox
    collected(1)
    assert "/data" in names(archive, "/data")
    assert len(stored(state)) == 1


def test_a_persistent_sandbox_keeps_its_layers(layout: Layout, state: Path) -> None:
    """Also when its maker is gone: then it is their mounts that tell."""
    code = (
        LOAD
        + """
from sandboxcore import PersistentSandbox, SandboxSpec
spec = SandboxSpec(rootfs=sys.argv[1], ro=["/usr"], writable=sys.argv[2] == "w")
PersistentSandbox(spec, name="box").start()
"""
    )
    for how in "rw":
        done = host_program(code, f"{layout.path}:two", how)
        assert done.returncode == 0, done
        try:
            assert images.collect(unused_for=0) == ()
            with PersistentSandbox.connect("box") as box:
                assert box.exec(["cat", "/data/sub/new"]).stdout == b"new\n"
        finally:
            with PersistentSandbox.connect("box") as box:
                box.destroy()
        collected(2)


def test_no_descriptor_is_left(tmp_path: Path, state: Path) -> None:
    archive = write(tmp_path / "root", BASE)
    before = set(os.listdir("/proc/self/fd"))
    image = images.load(archive)
    with pytest.raises(SpecError):
        images.load(write(tmp_path / "bad", BASE[:5000]))
    del image
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_damaged_layer_is_unpacked_again(tmp_path: Path, state: Path) -> None:
    archive = write(tmp_path / "root", BASE)
    images.load(archive)
    (place,) = state.glob("layers/sha256-*")
    (place / "manifest.json").write_text("{")
    assert "/data" in names(archive, "/data")


def test_a_state_directory_of_others(tmp_path: Path, state: Path) -> None:
    state.mkdir(mode=0o777)
    state.chmod(0o777)
    with pytest.raises(SandboxError, match="others may write to it"):
        images.load(write(tmp_path / "root", BASE))


def test_a_state_directory_on_an_overlay(tmp_path: Path, layout: Layout) -> None:
    """As in a container: an overlay keeps whiteouts to itself, so they are marks."""
    for name in ("low", "up", "work", "merged"):
        (tmp_path / name).mkdir()
    code = (
        LOAD
        + """
import json, os
os.environ["SANDBOXCORE_STATE_DIR"] = sys.argv[1] + "/state"
from sandboxcore import SandboxSpec, run
try:
    os.mknod(sys.argv[1] + "/test", 0o20000)
except PermissionError:
    pass
else:
    sys.exit("it has whiteouts")
for writable in (False, True):
    spec = SandboxSpec(rootfs=sys.argv[2], ro=["/usr"], user=0, writable=writable)
    done = run(["sh", "-c", "cd /data; ls; ls sub closed"], spec=spec, timeout=60)
    print(json.dumps([done.stdout.decode(), done.stderr.decode()]))
"""
    )
    mount = 'mount -t overlay -o "lowerdir=$1/low,upperdir=$1/up,workdir=$1/work,userxattr" o "$1/merged"'
    script = f'{mount} && exec "$2" -c "$3" "$1/merged" "$4"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", tmp_path, sys.executable, code]
    done = subprocess.run(
        [*command, f"{layout.path}:three"], capture_output=True, text=True, env=host_environment(), timeout=90
    )
    if "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done
    for line in done.stdout.splitlines():
        seen, wrong = json.loads(line)
        assert "again" not in seen.split(), (seen, wrong)
        assert seen.split()[-4:] == ["closed:", "other", "sub:", "new"], (seen, wrong)


def test_the_command_line(layout: Layout, state: Path) -> None:
    def cli(*argv: str) -> str:
        command = [sys.executable, "-m", "sandboxcore", *argv]
        return subprocess.run(
            command, capture_output=True, text=True, env=host_environment(), timeout=60, check=True
        ).stdout

    given = ["--rootfs", f"{layout.path}:three", "--ro", "/usr"]
    assert cli("run", *given, "--", "cat", "/data/sub/new") == "new\n"
    assert "layers/sha256-" in cli("explain", *given)
    assert cli("gc", "--unused-layers", "1") == ""
    assert len(stored(state)) == 3
    wait_until(lambda: cli("gc", "--unused-layers", "0") is not None and not stored(state), "removal")
