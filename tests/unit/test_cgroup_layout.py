"""Where groups may be made: the texts of many hosts, with trees of plain files behind them."""

import os
import stat
from pathlib import Path

import pytest

from sandboxcore import UnsupportedHost, cgroup, cgroup_layout, cgroup_scope
from sandboxcore.cgroup_layout import Layout, find
from sandboxcore.cgroup_mounts import parse_mounts, parse_own
from sandboxcore.spec import Limits

OURS = os.geteuid()
OTHER = 12345  # nobody whom these trees belong to
EVERY = "cpuset cpu io memory pids"
SUBSYSTEMS = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n" + "".join(
    f"{name}\t0\t1\t1\n" for name in ("cpuset", "cpu", "blkio", "memory", "freezer", "pids")
)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One disk, every subsystem, and no bus but where a test says so."""
    (tmp_path / "cgroups").write_text(SUBSYSTEMS)
    monkeypatch.setattr(cgroup_layout, "SUBSYSTEMS", tmp_path / "cgroups")
    monkeypatch.setattr(cgroup_layout, "block_devices", lambda: ["254:0"])
    monkeypatch.setattr(cgroup_layout, "_xattr", lambda path, name: None)
    monkeypatch.setattr(cgroup_layout, "_abilities", lambda parent: {"cgroup.freeze", "cgroup.kill"})
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def root_of(path: Path, controllers: str = EVERY) -> Path:
    """What a hierarchy's real root has."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("cgroup.procs", ""),
        ("cgroup.controllers", controllers),
        ("cgroup.subtree_control", ""),
    ):
        (path / name).write_text(text)
    return path


def group(path: Path, controllers: str = EVERY, kind: str = "domain") -> Path:
    """Any other group."""
    root_of(path, controllers)
    (path / "cgroup.type").write_text(kind + "\n")
    if "memory" in controllers:
        (path / "memory.max").write_text("max\n")
        (path / "memory.swap.max").write_text("max\n")
    return path


def legacy(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "cgroup.procs").write_text("")
    return path


def line(
    point: Path | str, *, root: str = "/", kind: str = "cgroup2", mode: str = "rw", with_: str = ""
) -> str:
    """One line of mountinfo for a directory that exists."""
    real = os.stat(str(point).encode().decode("unicode_escape"))
    device = f"{os.major(real.st_dev)}:{os.minor(real.st_dev)}"
    options = ",".join(filter(None, ("rw", with_)))
    return f"31 23 {device} {root} {point} {mode},relatime shared:9 - {kind} {kind} {options}\n"


def v1_lines(root: Path, own: str = "/", mode: str = "rw") -> str:
    every = ("memory", "cpu,cpuacct", "pids", "blkio", "cpuset", "freezer")
    return "".join(line(root / name, root=own, kind="cgroup", mode=mode, with_=name) for name in every)


def test_a_systemd_user_session_uses_its_own_scope(tmp_path: Path) -> None:
    own = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-1.scope"
    root_of(tmp_path / "cg")
    scope = group(tmp_path / "cg" / own[1:], "memory pids")
    uid = OURS or 1000
    if OURS == 0:
        os.chown(scope, uid, uid)
    found = find(line(tmp_path / "cg"), f"0::{own}\n", euid=uid)
    assert (found.v2, found.versions) == (scope, {"memory": 2, "pids": 2, "swap": 2})
    assert (found.freezer, found.kill, dict(found.v1)) == (2, True, {})
    for name in ("cpu", "io", "cpuset"):
        assert f"the {name} controller: {scope} was not given it" in found.remedies[name]
        assert "systemctl edit user@.service" in found.remedies[name]


def test_the_nearest_delegated_ancestor_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root_of(tmp_path / "cg")
    service = group(tmp_path / "cg/user.slice/user@1000.service")
    group(service / "app.slice/app-1.scope")
    own = "0::/user.slice/user@1000.service/app.slice/app-1.scope\n"
    monkeypatch.setattr(
        cgroup_layout,
        "_xattr",
        lambda path, name: b"1" if (path, name) == (service, "user.delegate") else None,
    )
    assert find(line(tmp_path / "cg"), own, euid=OTHER).v2 == service
    assert find(line(tmp_path / "cg"), own, euid=0).v2 == service


def test_who_was_moved_to_the_leaf_for_host_processes_starts_from_above_it(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    scope = group(tmp_path / "cg/a.scope")
    group(scope / "sandboxcore.host")
    for path in (scope, scope / "sandboxcore.host"):
        if OURS == 0:
            os.chown(path, OTHER, OTHER)
    found = find(line(tmp_path / "cg"), "0::/a.scope/sandboxcore.host\n", euid=OURS or OTHER)
    assert found.v2 == scope


def test_without_delegation_the_remedy_names_controller_and_command(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    group(tmp_path / "cg/user.slice/session-1.scope")
    found = find(line(tmp_path / "cg"), "0::/user.slice/session-1.scope\n", euid=OTHER)
    assert (found.v2, found.versions, found.freezer, found.kill) == (None, {}, 0, False)
    for name in cgroup_layout.CONTROLLERS:
        assert f"the {name} controller: no v2 group is delegated to uid {OTHER}" in found.remedies[name]
        assert "Delegate=" in found.remedies[name]
    assert {"swap", "freezer", "kill"} <= found.remedies.keys()


def test_root_makes_groups_below_the_real_root(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    group(tmp_path / "cg/user.slice/user-0.slice/session-1.scope")
    found = find(line(tmp_path / "cg"), "0::/user.slice/user-0.slice/session-1.scope\n", euid=0)
    assert found.v2 == tmp_path / "cg"
    assert found.versions == dict.fromkeys((*cgroup_layout.CONTROLLERS, "swap"), 2)
    assert found.remedies == {}


def test_wsl2_with_a_plain_root(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    assert find(line(tmp_path / "cg"), "0::/\n", euid=0).v2 == tmp_path / "cg"
    found = find(line(tmp_path / "cg"), "0::/\n", euid=OTHER)
    assert found.v2 is None
    assert "the memory controller: no v2 group is delegated" in found.remedies["memory"]


def test_docker_with_a_private_namespace_read_only(tmp_path: Path) -> None:
    group(tmp_path / "cg")
    found = find(line(tmp_path / "cg", mode="ro"), "0::/\n", euid=0)
    assert (found.v2, found.versions) == (None, {})
    assert f"the memory controller: {tmp_path / 'cg'} is mounted read-only" in found.remedies["memory"]
    assert "--cgroupns=private" in found.remedies["memory"]


def test_docker_with_a_private_namespace_writable(tmp_path: Path) -> None:
    group(tmp_path / "cg", "cpuset cpu io memory hugetlb pids rdma misc")
    found = find(line(tmp_path / "cg"), "0::/\n", euid=0)
    assert found.v2 == tmp_path / "cg"
    assert set(found.versions) == {*cgroup_layout.CONTROLLERS, "swap"}


def test_outside_of_the_namespace_there_is_no_parent(tmp_path: Path) -> None:
    group(tmp_path / "cg")
    found = find(line(tmp_path / "cg"), "0::/../other\n", euid=0)
    assert found.v2 is None
    assert "not below the cgroup namespace's root" in found.remedies["memory"]


def test_docker_v1_shows_each_hierarchy_from_its_own_group(tmp_path: Path) -> None:
    own = "/docker/3f2a"
    for name in ("memory", "cpu,cpuacct", "pids", "blkio", "cpuset", "freezer"):
        legacy(tmp_path / name)
    (tmp_path / "memory/memory.memsw.limit_in_bytes").write_text("")
    groups = "".join(
        f"{number}:{name}:{own}\n"
        for number, name in enumerate(
            ("cpu,cpuacct", "memory", "pids", "blkio", "cpuset", "freezer", "name=systemd"), 1
        )
    )
    found = find(v1_lines(tmp_path, own), groups + f"0::{own}\n", euid=0)
    assert found.versions == dict.fromkeys((*cgroup_layout.CONTROLLERS, "swap"), 1)
    both = tmp_path / "cpu,cpuacct"
    assert found.v1["memory"] == tmp_path / "memory"
    assert (found.v1["cpu"], found.v1["cpuacct"], found.v1["blkio"]) == (both, both, tmp_path / "blkio")
    assert (found.v2, found.freezer, found.kill) == (None, 1, False)
    assert "cgroup2" in found.remedies["kill"]

    found = find(v1_lines(tmp_path, own, mode="ro"), groups, euid=0)
    assert (found.versions, dict(found.v1), found.freezer) == ({}, {}, 0)
    assert "the v1 controller blkio at" in found.remedies["io"]
    assert "mounted read-only" in found.remedies["io"]

    found = find(v1_lines(tmp_path, "/elsewhere"), groups, euid=0)
    assert "group of the v1 controller pids is not below" in found.remedies["pids"]


def test_v1_without_swap_accounting_says_so(tmp_path: Path) -> None:
    legacy(tmp_path / "memory")
    found = find(line(tmp_path / "memory", kind="cgroup", with_="memory"), "1:memory:/\n", euid=0)
    assert found.versions == {"memory": 1}
    assert "swapaccount=1" in found.remedies["swap"]


def test_v1_needs_cgroupspy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    legacy(tmp_path / "pids")
    monkeypatch.setattr(cgroup_layout.importlib.util, "find_spec", lambda name: None)
    found = find(line(tmp_path / "pids", kind="cgroup", with_="pids"), "1:pids:/\n", euid=0)
    assert found.versions == {}
    assert "pip install cgroupspy" in found.remedies["pids"]


def test_a_hybrid_host_freezes_and_kills_on_the_unified_hierarchy(tmp_path: Path) -> None:
    unified = root_of(tmp_path / "unified", "")
    own = group(unified / "system.slice/x.service", "")
    legacy(tmp_path / "memory/system.slice/x.service")
    mounts = line(unified) + line(tmp_path / "memory", kind="cgroup", with_="memory")
    groups = "4:memory:/system.slice/x.service\n2:pids:/\n0::/system.slice/x.service\n"
    found = find(mounts, groups, euid=0)
    assert (found.v2, found.freezer, found.kill) == (own, 2, True)
    assert found.versions == {"memory": 1}
    assert found.v1["memory"] == tmp_path / "memory/system.slice/x.service"
    assert "v1 controller here, and mounted nowhere" in found.remedies["pids"]
    assert "no mounted hierarchy has it" in found.remedies["cpu"]


def test_no_cgroups_mounted() -> None:
    found = find("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", "", euid=0)
    assert (found.v2, found.versions) == (None, {})
    for name in (*cgroup_layout.CONTROLLERS, "swap"):
        assert "mount -t cgroup2" in found.remedies[name]


def test_a_controller_that_the_kernel_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root_of(tmp_path / "cg", "cpu pids")
    text = SUBSYSTEMS.replace("memory\t0\t1\t1", "memory\t0\t1\t0").replace("blkio\t0\t1\t1\n", "")
    cgroup_layout.SUBSYSTEMS.write_text(text)
    found = find(line(tmp_path / "cg"), "0::/\n", euid=0)
    assert set(found.versions) == {"cpu", "pids"}
    assert found.remedies["memory"] == (
        "the memory controller: it is switched off; boot with cgroup_enable=memory"
    )
    assert found.remedies["io"] == "the io controller: this kernel is built without it"


def test_without_a_disk_there_is_no_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root_of(tmp_path / "cg")
    monkeypatch.setattr(cgroup_layout, "block_devices", list)
    found = find(line(tmp_path / "cg"), "0::/\n", euid=0)
    assert "no block device" in found.remedies["io"]


def test_a_threaded_group_is_no_parent(tmp_path: Path) -> None:
    group(tmp_path / "cg", kind="threaded")
    found = find(line(tmp_path / "cg"), "0::/\n", euid=0)
    assert "is of type 'threaded'" in found.remedies["memory"]


def test_a_mount_that_is_covered_does_not_count(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    covered = line(tmp_path / "cg").split(" ")
    covered[2] = "0:9999"
    assert find(" ".join(covered), "0::/\n", euid=0).v2 is None


def test_names_with_escapes(tmp_path: Path) -> None:
    point = tmp_path / "a b\\c"
    root_of(point)
    own = group(point / "x:y \\z")
    text = line(str(point).replace("\\", r"\134").replace(" ", r"\040"))
    mount = parse_mounts(text)[0]
    assert (mount.point, mount.unified, mount.writable) == (point, True, True)
    assert parse_own("0::/x:y \\z\n12:cpu,cpuacct:/a\n1:name=systemd:/b\n") == {
        "": "/x:y \\z",
        "cpu": "/a",
        "cpuacct": "/a",
        "name=systemd": "/b",
    }
    assert mount.place("/x:y \\z") == own
    if OURS == 0:
        os.chown(own, OTHER, OTHER)
    assert find(text, "0::/x:y \\z\n", euid=OURS or OTHER).v2 == own


@pytest.mark.parametrize(
    ("root", "own", "below"),
    [
        ("/", "/", ""),
        ("/", "/a/b", "a/b"),
        ("/a", "/a/b", "b"),
        ("/a", "/ab", None),
        ("/..", "/../x", "x"),
        ("/..", "/", None),
        ("/", "/../x", None),
        ("/../y", "/../x", None),
    ],
)
def test_a_group_as_a_mount_shows_it(tmp_path: Path, root: str, own: str, below: str | None) -> None:
    mount = parse_mounts(line(tmp_path, root=root))[0]
    assert mount.place(own) == (None if below is None else tmp_path / below)


# --- SANDBOXCORE_CGROUP -----------------------------------------------------------------------------


def test_the_setting_names_the_parent(tmp_path: Path) -> None:
    root_of(tmp_path / "cg")
    named = group(tmp_path / "cg/ours", "memory")
    for setting in ("ours", str(named)):
        found = find(line(tmp_path / "cg"), "0::/\n", euid=OTHER, setting=setting)
        assert (found.v2, found.versions) == (named, {"memory": 2, "swap": 2})


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("missing", "No such file"),
        ("/proc", "not below the cgroup2 file system"),
        ("plain", "is no control group"),
        *([] if OURS == 0 else [("closed", "not writable")]),  # root may write everything
    ],
)
def test_an_unusable_setting_makes_everything_unavailable(tmp_path: Path, setting: str, problem: str) -> None:
    root_of(tmp_path / "cg")
    (tmp_path / "cg/plain").mkdir()
    closed = group(tmp_path / "cg/closed")
    (closed / "cgroup.procs").chmod(stat.S_IRUSR)
    found = find(line(tmp_path / "cg"), "0::/\n", euid=0, setting=setting)
    assert (found.v2, found.versions, found.freezer, found.kill) == (None, {}, 0, False)
    for name in (*cgroup_layout.CONTROLLERS, "swap", "freezer", "kill"):
        assert found.remedies[name].startswith(f"SANDBOXCORE_CGROUP={setting}: ")
        assert problem in found.remedies[name]


def test_a_setting_without_cgroup2(tmp_path: Path) -> None:
    legacy(tmp_path / "pids")
    mounts = line(tmp_path / "pids", kind="cgroup", with_="pids")
    found = find(mounts, "1:pids:/\n", euid=0, setting="x")
    assert found.versions == {}
    assert found.remedies["pids"] == "SANDBOXCORE_CGROUP=x: no cgroup2 file system is mounted"


def test_layout_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: str) -> str:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(cgroup_layout, "_text", unreadable)
    cgroup_layout.forget()
    try:
        found = cgroup.layout()
    finally:
        cgroup_layout.forget()
    assert found.versions == {}
    assert "Permission denied: '/proc/self/mountinfo'" in found.remedies["memory"]


# --- a scope from systemd ---------------------------------------------------------------------------

STUB = """#!/bin/sh
printf '%s\\n' "$@" > {log}
for word; do case $word in *.scope) name=$word; esac; done
{action}
"""
MOVE = """cp -r {root}/template "{root}/cg/user@1.service/$name"
echo "0::/user@1.service/$name" > {root}/own"""


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's login session in a scope that is not the user's, and a bus."""
    root_of(tmp_path / "cg")
    group(tmp_path / "cg/session-1.scope")
    group(tmp_path / "cg/user@1.service")
    group(tmp_path / "template", "memory pids")
    (tmp_path / "own").write_text("0::/session-1.scope\n")
    texts = {"/proc/self/mountinfo": lambda: line(tmp_path / "cg")}
    texts["/proc/self/cgroup"] = (tmp_path / "own").read_text
    monkeypatch.setattr(cgroup_layout, "_text", lambda path: texts[path]())
    monkeypatch.setattr(
        cgroup_layout, "_xattr", lambda path, name: b"1" if "sandboxcore-" in path.name else None
    )
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    monkeypatch.setattr(cgroup_scope, "OWN", tmp_path / "own")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nowhere")
    cgroup_layout.forget()
    cgroup._ask_once.cache_clear()
    yield tmp_path
    cgroup_layout.forget()
    cgroup._ask_once.cache_clear()


def stub(root: Path, action: str) -> None:
    (root / "bin").mkdir()
    program = root / "bin/busctl"
    program.write_text(STUB.format(log=root / "log", action=action.format(root=root)))
    program.chmod(0o755)


def test_layout_only_says_that_a_scope_can_be_had(session: Path) -> None:
    stub(session, MOVE)
    found: Layout = cgroup.layout()
    assert (found.scope, found.v2, found.versions) == (True, None, {})
    assert not (session / "log").exists()


def test_a_scope_is_asked_for_when_it_is_needed(session: Path) -> None:
    stub(session, MOVE)
    assert cgroup.require(Limits(), ()) == ((), ())
    assert not (session / "log").exists()
    assert cgroup.require(Limits(memory="1G"), ()) == (("memory", "pids"), ())
    words = (session / "log").read_text().splitlines()
    assert words[:3] == ["--quiet", "--timeout=5", "--user"]
    assert words[words.index("Delegate") :] == [
        "Delegate",
        "b",
        "true",
        "PIDs",
        "au",
        "1",
        str(os.getpid()),
        "0",
    ]
    found = cgroup.layout()
    assert found.v2 is not None
    assert found.v2.parent == session / "cg/user@1.service"
    with pytest.raises(UnsupportedHost, match="limits.cpus: .*the cpu controller: .* was not given it"):
        cgroup.require(Limits(cpus=1), ())


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        ("echo Access denied >&2; exit 1", "systemd gave no scope: Access denied"),
        ("exit 3", "busctl ended with 3"),
        ("exit 0", "systemd has not moved this process into sandboxcore-"),
        ("exec sleep 60", "timed out"),
    ],
)
def test_what_became_of_asking_is_in_the_remedy(
    session: Path, action: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup_scope, "TIMEOUT", 0.5)
    stub(session, action)
    with pytest.raises(UnsupportedHost, match="limits.memory: .*no v2 group is delegated") as caught:
        cgroup.require(Limits(memory="1G"), ())
    assert problem in caught.value.remedy
    (session / "log").unlink()
    assert cgroup.require(Limits(memory="1G"), ["memory"]) == ((), ("memory",))
    assert not (session / "log").exists()  # once
