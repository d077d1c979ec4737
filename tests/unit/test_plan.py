"""Plans: compiled for hosts of every kind, independent of the order of a spec, and checked by C."""

import itertools
import os
import random
from pathlib import Path

import pytest

from sandboxcore import (
    Limits,
    Mount,
    SandboxSpec,
    SpecError,
    UnsupportedHost,
    _native,
    cgroup,
    cgroup_layout,
    cgroup_values,
)
from sandboxcore import plan as plan_module
from sandboxcore.host import HostFeatures
from sandboxcore.plan import compile_plan

ROOT = HostFeatures("root", 0, 0, 0x70000000, 6)
ROOTLESS = HostFeatures("rootless", 1234, 1234, 0, 6)
SUBUID = HostFeatures("subuid", 1234, 1234, 0, 6, (100000, 65535), (100000, 65535))
HOSTS = [ROOT, ROOTLESS, SUBUID]


def lines(spec: SandboxSpec, host: HostFeatures = ROOT, word: str = "") -> list[str]:
    return [line for line in compile_plan(spec, host).lines if line.startswith(word)]


@pytest.fixture(params=HOSTS, ids=lambda host: host.mode)
def host(request: pytest.FixtureRequest) -> HostFeatures:
    return request.param


# --- compilation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, 0, "5:6", 65535])
@pytest.mark.parametrize("profile", ["minimal", "standard", "full"])
def test_every_host_and_profile(host: HostFeatures, profile: str, user: int | str | None) -> None:
    plan = compile_plan(SandboxSpec(profile=profile, user=user), host)
    _native.check_plan(plan.data)
    assert plan.spec.profile == profile
    assert plan.id == compile_plan(SandboxSpec(profile=profile, user=user), host).id


def test_id_maps() -> None:
    spec = SandboxSpec(user="5:6")
    (root,), (rootless,), (subuid,) = (lines(spec, host, "ids:") for host in HOSTS)
    assert "'0 1879048192 65536'" in root
    assert "'5 0 1'" in rootless
    assert repr("0 1 5\n5 0 1\n6 6 65530") in subuid
    assert repr("0 0 1\n1 1 65535") in lines(SandboxSpec(user=0), SUBUID, "ids:")[0]


def test_subuid_maps_cover_a_whole_range_once() -> None:
    for user in (0, 1, 1000, 65534, 65535):
        text = lines(SandboxSpec(user=user), SUBUID, "ids:")[0].split("'")[1].replace("\\n", "\n")
        rows = [tuple(map(int, row.split())) for row in text.splitlines()]
        rows = [row for row in rows if row[2]]
        inside = sorted(n for first, _, count in rows for n in (first, first + count))
        outside = sorted(n for _, first, count in rows for n in (first, first + count))
        assert (inside[0], inside[-1]) == (outside[0], outside[-1]) == (0, 65536)
        assert inside[1:-1:2] == inside[2:-1:2]
        assert outside[1:-1:2] == outside[2:-1:2]
        assert all(count > 0 for _, _, count in rows)


@pytest.mark.parametrize(("network", "own"), [("none", False), ("private", True), ("host", False)])
def test_network(network: str, *, own: bool) -> None:
    plan = compile_plan(SandboxSpec(network=network), ROOT)
    (line,) = lines(SandboxSpec(network=network), ROOT, "namespaces:")
    assert ("net" in line.split(";")[0].split()) == own
    assert plan.host_network == (network == "host")


def test_the_description_names_everything(tmp_path: Path) -> None:
    spec = SandboxSpec(
        ro=[(tmp_path, "/r")],
        rw=[(tmp_path, "/w")],
        tmpfs=["/t"],
        deny=["/usr/share"],
        limits=Limits(pids=77),
    )
    text = "\n".join(lines(spec))
    for part in (
        f"{tmp_path} on /r (ro",
        f"{tmp_path} on /w (rw",
        "/t (rw",
        "/usr/share",
        "pids 77",
        "seccomp: standard",
    ):
        assert part in text


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.mode)
def test_only_root_maps_the_ids_of_writable_directories(tmp_path: Path, host: HostFeatures) -> None:
    owner = tmp_path.stat().st_uid
    data = compile_plan(SandboxSpec(rw=[(tmp_path, "/w")]), host).data
    assert (f"{owner} {0x70000000 + 1000} 1\0".encode() in data) == (host.mode == "root")


def test_names_behind_indices(tmp_path: Path) -> None:
    plan = compile_plan(SandboxSpec(ro=[(tmp_path, "/r")], limits=Limits(file_size=5)), ROOT)
    assert any("/r (ro" in plan.subject("mount", n) for n in range(40))
    assert plan.subject("mount", 0) == plan.subject("source", 0) != ""
    assert "limits.file_size" in [plan.subject("rlimit", n) for n in range(10)]
    assert (plan.subject("mount", 10**6), plan.subject("mount", -1), plan.subject("none", 0)) == ("", "", "")


# --- order ------------------------------------------------------------------------------------------


def test_the_order_of_mounts_does_not_matter(tmp_path: Path, host: HostFeatures) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    mounts = [
        Mount(kind="bind", source=str(tmp_path), target="/m", read_only=False),
        Mount(kind="bind", source=str(tmp_path / "a"), target="/m/a"),
        Mount(kind="tmpfs", target="/m/a/b"),
        Mount(kind="bind", source=str(tmp_path), target="/m/a/b/late"),
        Mount(kind="bind", source=str(tmp_path), target="/m-sibling"),
    ]
    plans = {compile_plan(SandboxSpec(mounts=order), host).data for order in itertools.permutations(mounts)}
    assert len(plans) == 1


def test_parents_come_first(tmp_path: Path) -> None:
    targets = ["/x", "/x/y", "/x-y", "/x/y/z", "/tmp/a", "/tmp/a/b", "/workspace/q"]
    for _ in range(20):
        random.shuffle(targets)
        plan = compile_plan(SandboxSpec(tmpfs=targets), ROOT)
        order = [line.split(" on ")[1].split()[0] for line in plan.lines if line.startswith("mount:")]
        for early, late in itertools.combinations(order, 2):
            assert not early.startswith(late + "/")


def test_late_mounts(tmp_path: Path) -> None:
    found = lines(SandboxSpec(ro=[(tmp_path, "/tmp/x"), (tmp_path, "/y")]), ROOT, "mount:")
    late = {line.split(" on ")[1].split()[0]: line.endswith(", late)") for line in found}
    assert (late["/tmp/x"], late["/y"], late["/usr"]) == (True, False, False)


# --- deny -------------------------------------------------------------------------------------------


def test_deny(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")

    def masks(*deny: str, mode: str = "ro") -> list[str]:
        found = lines(SandboxSpec(**{mode: [(tmp_path, "/s")]}, deny=deny), ROOT, "mount:")
        return [line.split(" on ")[1].split()[0] for line in found if "spec deny" in line]

    assert masks("/s/d", "/usr/share") == ["/s/d", "/usr/share"]
    assert masks("/s/none", "/none") == []
    for path in ("/s/link", "/s/link/x"):
        with pytest.raises(SpecError, match="symbolic link"):
            masks(path)
    with pytest.raises(SpecError, match="does not exist"):
        masks("/s/none", mode="rw")
    for name in ("bin", "lib"):
        if os.path.islink(f"/{name}"):
            with pytest.raises(SpecError, match="deny that"):
                masks(f"/{name}/x")


# --- what a host lacks ------------------------------------------------------------------------------


def test_landlock_of_each_abi() -> None:
    for abi in range(8):
        host = HostFeatures("root", 0, 0, 0x70000000, abi)
        plan = compile_plan(SandboxSpec(), host)
        _native.check_plan(plan.data)
        assert ("landlock" in plan.omitted) == (abi == 0)
    without = HostFeatures("root", 0, 0, 0x70000000, 0)
    with pytest.raises(UnsupportedHost, match="Landlock"):
        compile_plan(SandboxSpec(landlock="required"), without)
    optional = compile_plan(SandboxSpec(landlock="required", optional=["landlock"]), without)
    assert "landlock" in optional.omitted
    assert compile_plan(SandboxSpec(landlock=False), without).omitted == ()


@pytest.mark.parametrize("name", ["memory", "swap", "cpus", "cpu_weight", "io", "cpuset"])
def test_limits_that_the_host_cannot_have(
    name: str, host: HostFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = cgroup_values.LIMITS[name]
    remedies = dict.fromkeys((*cgroup_layout.CONTROLLERS, "swap", "freezer", "kill"), "do this")
    bare = cgroup_layout.Layout(None, {}, {}, remedies, 0, False)
    monkeypatch.setattr(cgroup, "layout", lambda: bare)
    monkeypatch.setattr(plan_module, "_cache", {})
    limits = Limits(**{name: "0" if name == "cpuset" else 5})
    with pytest.raises(UnsupportedHost, match=f"limits.{name}.*do this"):
        compile_plan(SandboxSpec(limits=limits), host)
    plan = compile_plan(SandboxSpec(limits=limits, optional=[name]), host)
    assert f"limits.{name}" in plan.omitted
    assert plan.controllers == ()
    assert controller not in plan.controllers
    with pytest.raises(UnsupportedHost, match="accounting.*do this"):
        compile_plan(SandboxSpec(accounting=True), host)


# --- freshness --------------------------------------------------------------------------------------


def test_a_plan_is_made_again_when_its_sources_change(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    spec = SandboxSpec(ro=[(source, "/s")])
    first = compile_plan(spec, ROOT)
    assert compile_plan(spec, ROOT) is first
    (source / "new").touch()  # a bind shows it by itself
    assert compile_plan(spec, ROOT) is first
    source.rename(tmp_path / "old")
    source.mkdir()
    assert compile_plan(spec, ROOT).id != first.id


def test_file_sources(tmp_path: Path) -> None:
    source = tmp_path / "f"
    source.write_text("1")
    spec = SandboxSpec(ro=[(source, "/f")])
    first = compile_plan(spec, ROOT)
    (tmp_path / "g").write_text("2")
    (tmp_path / "g").rename(source)
    assert compile_plan(spec, ROOT).id != first.id


# --- the validator ----------------------------------------------------------------------------------


def refused(data: bytes) -> bool:
    try:
        _native.check_plan(data)
    except _native.NativeFailure as failure:
        return failure.stage == "plan"
    return False


def test_a_damaged_header_is_refused_or_harmless(host: HostFeatures) -> None:
    """Every bit of the header, one at a time; C must say yes or no, never crash."""
    data = compile_plan(SandboxSpec(), host).data
    header = _native.ffi.sizeof("struct sbx_plan")
    count = 0
    for at in range(header):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            count += refused(bytes(broken))
    assert count > header  # most bits matter


def test_every_truncation_of_the_front_is_refused() -> None:
    data = compile_plan(SandboxSpec(), ROOT).data
    for size in [*range(600), *range(600, len(data), 997)]:
        assert refused(data[:size])
    assert refused(data + b"\0")
    assert refused(b"")


def test_random_damage_never_crashes() -> None:
    data = compile_plan(SandboxSpec(), ROOT).data
    source = random.Random(1)
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(source.choice((1, 2, 8))):
            at = source.randrange(len(broken))
            broken[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
        refused(bytes(broken))


def test_offsets_at_the_edges() -> None:
    data = compile_plan(SandboxSpec(), ROOT).data
    size = _native.ffi.sizeof("struct sbx_plan")
    for at in range(24, size, 4):
        for value in (
            1,
            size - 1,
            len(data) - 1,
            len(data),
            len(data) + 1,
            0x7FFFFFFF,
            0x80000000,
            0xFFFFFFFF,
        ):
            broken = bytearray(data)
            broken[at : at + 4] = value.to_bytes(4, "little")
            refused(bytes(broken))
