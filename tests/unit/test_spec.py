"""SandboxSpec, Mount and Limits: what is accepted, what is refused, and that both are said early."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxcore import Limits, Mount, SandboxSpec, SeccompPolicy, SpecError
from sandboxcore.spec import clean_path, parse_size

# --- sizes and paths --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (512, 512),
        ("512", 512),
        ("1K", 1024),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1024),
        ("1.5M", 3 << 19),
        ("2G", 2 << 30),
        (" 3 T ", 3 << 40),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text, "x") == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", -1, "1X", "1.2.3", 1.5, None, True, "0x10", "1e3", "9" * 400 + "T", "\u0661"]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(SpecError, match="field"):
        parse_size(text, "field")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "path"), [("/", "/"), ("/a", "/a"), ("//a/./b//", "/a/b"), (Path("/x/y"), "/x/y"), ("/é", "/é")]
)
def test_paths(text: str, path: str) -> None:
    assert clean_path(text, "x") == path


@pytest.mark.parametrize(
    "text", ["", "a", "./a", "/a/../b", "/..", "/a\0b", "/" + "x" * 256, "/x" * 2500, b"/a"]
)
def test_no_paths(text: object) -> None:
    with pytest.raises(SpecError, match="field"):
        clean_path(text, "field")  # type: ignore[arg-type]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), max_size=20), max_size=8
    )
)
def test_a_clean_path_stays_as_it_is(parts: list[str]) -> None:
    try:
        clean = clean_path("/" + "/".join(parts), "x")
    except SpecError:
        assert ".." in parts
        return
    assert clean_path(clean, "x") == clean
    assert "//" not in clean
    assert ".." not in clean.split("/")


# --- what is refused --------------------------------------------------------------------------------

REFUSED = {
    "profile": ["", "Standard", None, 1],
    "network": ["", "bridge", None, True],
    "proc": ["", "all"],
    "landlock": ["yes", 2, None],
    "hostname": ["", "-a", "a-", "a b", "a" * 65, "a\0", "ä", "a\n"],
    "user": ["root", -1, "1:", ":1", "1:2:3", 65536, "1.5", True, "", " 1"],
    "deny": ["/etc", ["etc"], ["/"], ["/proc"], ["/proc/self"], ["/a/../b"], [""], 5],
    "capabilities": [["CAP_SYS_ADMIN"], "CAP_KILL"],
    "seccomp": ["none", "", 5],
    "ro": [
        "/etc",
        [""],
        [("/a",)],
        [("/a", "/b", "/c")],
        [("/a", "b")],
        [("/a", "/proc/x")],
        ["/proc:/x"],
        [5],
    ],
    "rw": [[("/a", "/dev")], [("/a", "/")], [("/a", "/sys/x")]],
    "tmpfs": ["/t", ["t"], ["/t:x"], ["/t:"], ["/dev/shm/x"]],
    "env": [{"": "x"}, {"A=": "x"}, {"A": "\0"}, {"A": 1}, {1: "x"}],
    "workdir": ["", "x", "/a/..", "/a\0"],
    "rootfs": ["/a\0b", 5, [], ["/a", 5], ["/a"] * 41, ["/a\0b"]],
    "writable": [1, None, "yes"],
    "overlay": ["/a", ["/a:/proc/x"], ["/:/a"], ["/proc/1:/a"]],
    "time_offsets": [{"realtime": 1}, {"monotonic": "x"}, {"monotonic": math.nan}, {"monotonic": math.inf}],
    "limits": [{"pids": 5}, None],
    "labels": [{"a": b"x"}, {1: "x"}],
    "optional": ["landlock", 5],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values], ids=str
)
def test_refused(field: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        SandboxSpec(**{field: value})  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    words = {"ro": "mounts", "rw": "mounts", "overlay": "mounts", "tmpfs": "mounts"}
    assert field in str(caught.value) or words.get(field, "?") in str(caught.value)


SIZES = ("memory", "swap", "file_size", "output", "disk", "io")
REFUSED_LIMITS = {
    **{name: [-1, "x", 1.5, True, "1Q", 1 << 64] for name in SIZES},
    **{name: [0, -1, 1.5, "5", math.inf] for name in ("pids", "open_files", "inodes", "cpu_weight")},
    **{name: [0, -1, "5", math.nan, math.inf] for name in ("cpus", "cpu_time", "wall_time")},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in REFUSED_LIMITS.items() for value in values],
    ids=str,
)
def test_refused_limits(field: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"limits.{field}"):
        Limits(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "bind", "target": "/t"},
        {"kind": "tmpfs", "target": "/t", "source": "/x"},
        {"kind": "overlay", "target": "/t"},
        {"kind": "tmpfs", "target": "t"},
        {"kind": "tmpfs", "target": "/"},
        {"kind": "tmpfs", "target": "/proc/x"},
        {"kind": "tmpfs", "target": "/t", "mode": 0o10000},
        {"kind": "tmpfs", "target": "/t", "mode": -1},
        {"kind": "tmpfs", "target": "/t", "size": "x"},
        {"kind": "tmpfs", "target": "/t", "inodes": -1},
        {"kind": "tmpfs", "target": "/t", "inodes": "many"},
        {"kind": "bind", "target": "/t", "source": "/proc/1"},
        {"kind": "bind", "target": "/t", "source": "/a\0"},
    ],
    ids=str,
)
def test_refused_mounts(fields: dict) -> None:
    with pytest.raises(SpecError, match="mounts"):
        Mount(**fields)


def test_a_target_twice() -> None:
    for fields in ({"ro": ["/a:/t"], "rw": ["/b:/t"]}, {"tmpfs": ["/t", "/t/"]}, {"ro": ["/a:/t", "/a:/t"]}):
        with pytest.raises(SpecError, match="twice"):
            SandboxSpec(**fields)


def test_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        SandboxSpec("standard")  # type: ignore[misc]


# --- what is accepted -------------------------------------------------------------------------------


def test_defaults() -> None:
    spec = SandboxSpec()
    assert (spec.seccomp, spec.proc, spec.network, spec.workdir) == ("standard", "full", "none", "/workspace")
    assert spec.ids() == (1000, 1000)
    assert SandboxSpec(profile="minimal").proc == "pid"
    assert SandboxSpec(profile="minimal", proc="full").proc == "full"


@pytest.mark.parametrize(
    ("user", "ids"), [(0, (0, 0)), ("5", (5, 5)), ("5:6", (5, 6)), (65535, (65535, 65535))]
)
def test_ids(user: int | str, ids: tuple[int, int]) -> None:
    assert SandboxSpec(user=user).ids() == ids


def test_short_forms_and_order() -> None:
    spec = SandboxSpec(
        ro=["/b", "/a:/x/y", ("/c:d", "/z"), Path("/p:q")], rw=[("/e", "/x")], tmpfs=["/t", "/x/y/z:1M"]
    )
    found = [(mount.kind, mount.source, mount.target, mount.read_only) for mount in spec.all_mounts()]
    assert found == [
        ("bind", "/b", "/b", True),
        ("bind", "/p:q", "/p:q", True),
        ("tmpfs", None, "/t", True),
        ("bind", "/e", "/x", False),
        ("bind", "/a", "/x/y", True),
        ("tmpfs", None, "/x/y/z", True),
        ("bind", "/c:d", "/z", True),
    ]
    assert spec.all_mounts()[5].size == 1 << 20


def test_relative_and_home_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    sources = [mount.source for mount in SandboxSpec(ro=["x:/a", ("~/y", "/b")]).all_mounts()]
    assert sources == [f"{tmp_path}/x", "/somewhere/y"]


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SandboxSpec().network = "host"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        SandboxSpec().other = 1  # type: ignore[attr-defined]


def test_later_changes_of_an_argument_change_nothing() -> None:
    env, labels, offsets, ro = {"A": "1"}, {"l": "1"}, {"monotonic": 1.0}, ["/a"]
    spec = SandboxSpec(env=env, labels=labels, time_offsets=offsets, ro=ro)
    before = spec.to_dict()
    env["B"], labels["m"], offsets["boottime"] = "2", "2", 2.0
    ro.append("/b")
    assert spec.to_dict() == before
    assert SandboxSpec.from_dict(spec.to_dict()).fingerprint == spec.fingerprint


def test_replace() -> None:
    spec = SandboxSpec(profile="minimal", env={"A": "1"})
    assert spec.replace(network="host") == SandboxSpec(profile="minimal", env={"A": "1"}, network="host")
    assert spec.replace(profile="full").seccomp == "full"
    assert spec.replace(profile="full", seccomp="minimal").seccomp == "minimal"
    assert SandboxSpec(proc="pid").replace(profile="full").proc == "pid"
    with pytest.raises(SpecError):
        spec.replace(network="x")
    assert spec.replace() == spec


def test_equality_and_hash() -> None:
    one, two = SandboxSpec(env={"A": "1", "B": "2"}), SandboxSpec(env={"B": "2", "A": "1"})
    assert one == two
    assert hash(one) == hash(two)
    assert len({one, two, SandboxSpec()}) == 2
    assert SandboxSpec(ro=["/a"]) != SandboxSpec(rw=["/a"])


def test_relative_sources_mean_the_directory_where_the_spec_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        specs.append(SandboxSpec(ro=["./a:/a", Path("b")], rw=[("c", "/c"), "~/d:/d"]))
    first, second = specs
    assert first.fingerprint != second.fingerprint
    assert [mount.source for mount in first.all_mounts()][:2] == [f"{tmp_path}/one/a", f"{tmp_path}/one/c"]
    assert SandboxSpec.from_dict(first.to_dict()) == first
    assert SandboxSpec(ro=first.ro, rw=first.rw).fingerprint == first.fingerprint


def test_every_field_counts_in_the_fingerprint() -> None:
    variants = {
        "profile": "full",
        "rootfs": "/r",
        "writable": True,
        "mounts": [Mount(kind="tmpfs", target="/t")],
        "ro": ["/a"],
        "rw": ["/a"],
        "overlay": ["/a"],
        "volumes": ["v:/a"],
        "deny": ["/a"],
        "tmpfs": ["/a"],
        "network": "host",
        "hostname": "h",
        "env": {"A": "1"},
        "workdir": "/tmp",
        "user": 5,
        "seccomp": "full",
        "landlock": False,
        "limits": Limits(pids=7),
        "labels": {"a": "b"},
        "optional": ["memory"],
        "time_offsets": {"monotonic": 1},
        "proc": "pid",
        "accounting": True,
        "live_binds": "ro",
    }
    fields = {field.name for field in dataclasses.fields(SandboxSpec)} - {"fingerprint", "capabilities"}
    assert set(variants) == fields
    prints = {SandboxSpec(**{name: value}).fingerprint for name, value in variants.items()}
    assert len(prints | {SandboxSpec().fingerprint}) == len(variants) + 1


# --- plain data -------------------------------------------------------------------------------------

names = st.text("abcxyz-", min_size=1, max_size=8).map(lambda text: f"n{text}n")
targets = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/t/" + "/".join(parts))
sizes = st.one_of(st.none(), st.integers(0, 1 << 50), st.sampled_from(["1K", "2.5M", "3G"]))
limits = st.builds(
    Limits,
    memory=sizes,
    disk=sizes,
    output=sizes,
    cpus=st.none() | st.floats(0.01, 100),
    pids=st.none() | st.integers(1, 1 << 20),
    wall_time=st.none() | st.floats(0.01, 1e6),
)
mounts = st.one_of(
    st.builds(Mount, kind=st.just("bind"), target=targets, source=targets, read_only=st.booleans()),
    st.builds(
        Mount,
        kind=st.just("tmpfs"),
        target=targets,
        size=sizes,
        inodes=st.none() | st.integers(1, 1000),
        mode=st.integers(0, 0o7777),
    ),
)
pairs = st.dictionaries(
    names, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4
)
offsets = st.dictionaries(st.sampled_from(["monotonic", "boottime"]), st.floats(-1e6, 1e6))
specs = st.builds(
    SandboxSpec,
    profile=st.sampled_from(["minimal", "standard", "full"]),
    rootfs=st.none() | targets | st.lists(targets, min_size=1, max_size=3).map(tuple),
    writable=st.booleans(),
    mounts=st.lists(mounts, max_size=4, unique_by=lambda mount: mount.target),
    ro=st.lists(targets.map(lambda path: (path, "/ro" + path)), max_size=3, unique=True),
    rw=st.lists(targets.map(lambda path: f"{path}:/rw{path}"), max_size=3, unique=True),
    deny=st.lists(targets, max_size=3),
    network=st.sampled_from(["none", "private", "host"]),
    env=pairs,
    labels=pairs,
    user=st.one_of(st.none(), st.integers(0, 65535), st.just("7:8")),
    seccomp=st.none() | st.sampled_from(["minimal", "full"]),
    landlock=st.sampled_from([True, False, "required"]),
    limits=limits,
    time_offsets=st.none()
    | st.dictionaries(st.sampled_from(["monotonic", "boottime"]), st.floats(-1e6, 1e6)),
    proc=st.sampled_from([None, "full", "pid"]),
)


@given(specs)
def test_round_trip_through_json(spec: SandboxSpec) -> None:
    again = SandboxSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.to_dict() == spec.to_dict()
    assert again.fingerprint == spec.fingerprint
    assert hash(again) == hash(spec)
    assert again.all_mounts() == spec.all_mounts()
    assert again == spec


def test_round_trip_of_a_policy() -> None:
    policy = SeccompPolicy(name="mine", allow=("read", "write"))
    spec = SandboxSpec(seccomp=policy)
    again = SandboxSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again.seccomp == policy
    assert again == spec


def test_from_toml(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        'profile = "minimal"\nro = ["/a:/b", ["/c", "/d"]]\nnetwork = "private"\n'
        '[limits]\ndisk = "1M"\npids = 5\n[env]\nA = "1"\n[[mounts]]\nkind = "tmpfs"\ntarget = "/t"\n'
        'size = "2K"\n'
    )
    spec = SandboxSpec.from_toml(tmp_path / "s.toml")
    assert spec == SandboxSpec(
        profile="minimal",
        ro=["/a:/b", ("/c", "/d")],
        network="private",
        limits=Limits(disk=1 << 20, pids=5),
        env={"A": "1"},
        mounts=[Mount(kind="tmpfs", target="/t", size=2048)],
    )


@pytest.mark.parametrize(
    "text",
    [
        "x = ",
        "unknown = 1",
        "[limits]\nunknown = 1",
        "limits = 5",
        "[[mounts]]\nkind = 'tmpfs'",
        "[[mounts]]\nkind = 'tmpfs'\ntarget = '/t'\nunknown = 1",
        "mounts = [5]",
        "mounts = 5",
        "env = 5",
        "ro = 5",
        "fingerprint = 'x'",
        "[seccomp]\nunknown = 1",
        "hostname = 5",
        "user = 1.5",
        "[env]\nA = 1",
    ],
)
def test_wrong_toml(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SpecError):
        SandboxSpec.from_toml(tmp_path / "s.toml")


def test_missing_and_undecodable_toml(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    for name in ("none", "b", "."):
        with pytest.raises(SpecError, match=str(tmp_path)):
            SandboxSpec.from_toml(tmp_path / name)
