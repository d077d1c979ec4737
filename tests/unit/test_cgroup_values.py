"""Limits as control groups take them, and files of theirs, without a control group."""

from pathlib import Path

import pytest

from sandboxcore import SpecError, UnsupportedHost, cgroup, cgroup_files, cgroup_v2
from sandboxcore.cgroup_layout import Layout
from sandboxcore.cgroup_values import check_cpus, checked, cpu_quota, format_cpus, parse_cpus
from sandboxcore.spec import Limits


@pytest.mark.parametrize(
    ("text", "cpus", "spelt"),
    [
        ("0", {0}, "0"),
        ("0-3,8", {0, 1, 2, 3, 8}, "0-3,8"),
        (" 2,1 , 3\n", {1, 2, 3}, "1-3"),
        ("7,5", {5, 7}, "5,7"),
    ],
)
def test_cpu_lists(text: str, cpus: set[int], spelt: str) -> None:
    assert parse_cpus(text) == cpus
    assert format_cpus(cpus) == spelt


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "-1", "0,,1", "0-3:2", "999999", "0\n1"])
def test_what_is_no_list_of_cpus(text: str) -> None:
    with pytest.raises(SpecError, match="limits.cpuset: .* is not a list of CPUs"):
        parse_cpus(text)


def test_cpus_that_are_not_to_be_had() -> None:
    check_cpus("0-1", "0-3")
    with pytest.raises(UnsupportedHost, match="limits.cpuset '2-9': CPU 4-9: .*choose from 0-3"):
        check_cpus("2-9", "0-3\n")


@pytest.mark.parametrize(
    ("cpus", "quota"),
    [
        (0.5, (50_000, 100_000)),
        (16, (1_600_000, 100_000)),
        (0.01, (1000, 100_000)),
        (0.001, (1000, 1_000_000)),
    ],
)
def test_quota_and_period(cpus: float, quota: tuple[int, int]) -> None:
    assert cpu_quota(cpus) == quota


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cpus", 0.0001),
        ("cpu_weight", 10001),
        ("cpuset", "x"),
        ("memory", "much"),
        ("pids", 0),
        ("wall_time", 1),
        ("nonsense", 1),
    ],
)
def test_what_no_group_can_be_given(name: str, value: object) -> None:
    with pytest.raises(SpecError, match=f"limits.{name}"):
        checked({name: value})


def test_values_are_normalised() -> None:
    assert checked({"memory": "1M", "cpuset": "1,0", "pids": None}) == {
        "memory": 1 << 20,
        "cpuset": "0-1",
        "pids": None,
    }


def test_which_limits_need_a_group() -> None:
    assert cgroup.needed(Limits()) == {}
    every = Limits(memory=1, swap=1, cpus=1, cpu_weight=1, io=1, cpuset="0", pids=1)
    assert cgroup.needed(every) == {
        "memory": "memory",
        "swap": "memory",
        "cpus": "cpu",
        "cpu_weight": "cpu",
        "io": "io",
        "cpuset": "cpuset",
    }


def given(monkeypatch: pytest.MonkeyPatch, versions: dict[str, int]) -> None:
    remedies = {name: f"ask for {name}" for name in (*cgroup.LIMITS.values(), "swap") if name not in versions}
    found = Layout(Path("/nowhere"), {}, versions, remedies, 0, False)
    monkeypatch.setattr(cgroup, "layout", lambda: found)


def test_pids_joins_any_other_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"memory": 2, "pids": 2})
    assert cgroup.require(Limits(pids=5), ()) == ((), ())
    assert cgroup.require(Limits(memory=1), ()) == (("memory", "pids"), ())
    given(monkeypatch, {"memory": 2})
    assert cgroup.require(Limits(memory=1), ()) == (("memory",), ())


def test_what_is_missing_is_an_error_or_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"memory": 2})
    with pytest.raises(UnsupportedHost, match="^limits.swap: not available on this host; ask for swap$"):
        cgroup.require(Limits(memory=1, swap=0), ["cpus"])
    with pytest.raises(UnsupportedHost, match="^limits.cpus: .*ask for cpu$"):
        cgroup.require(Limits(memory=1, cpus=1), ["memory"])
    assert cgroup.require(Limits(memory=1, swap=0, cpus=1), ["swap", "cpus"]) == (
        ("memory",),
        ("swap", "cpus"),
    )


def test_v1_has_no_limit_of_swap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, {"memory": 1, "swap": 1})
    with pytest.raises(UnsupportedHost, match="limits.swap without limits.memory"):
        cgroup.require(Limits(swap=0), ())
    assert cgroup.require(Limits(swap=0, memory=1), ()) == (("memory",), ())


def test_only_real_disks_are_throttled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {
        "sda": ("8:0", 100, None),
        "nvme0n1": ("259:0", 5, "0"),
        "nvme0c0n1": ("259:1", 5, "1"),
        "loop0": ("7:0", 5, None),
        "ram0": ("1:0", 5, None),
        "zram0": ("252:0", 5, None),
        "sr0": ("11:0", 0, None),
    }
    for name, (number, size, hidden) in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev").write_text(number + "\n")
        (tmp_path / name / "size").write_text(f"{size}\n")
        if hidden is not None:
            (tmp_path / name / "hidden").write_text(hidden)
    monkeypatch.setattr(cgroup_files, "BLOCK", tmp_path)
    assert cgroup_files.block_devices() == ["259:0", "8:0"]
    monkeypatch.setattr(cgroup_files, "BLOCK", tmp_path / "none")
    assert cgroup_files.block_devices() == []


def test_reading_v2_files(tmp_path: Path) -> None:
    texts = {
        "memory.max": "4096\n",
        "memory.swap.max": "max\n",
        "cpu.max": "50000 100000\n",
        "cpu.weight": "100\n",
        "cpuset.cpus": "\n",
        "io.max": "8:0 rbps=max wbps=7 riops=max wiops=max\n8:16 rbps=5 wbps=max riops=1 wiops=max\n",
        "pids.max": "12\n",
        "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=1 dbytes=0 dios=0\n8:16 \n8:32 rbytes=1 wbytes=2\n",
        "cpu.stat": "usage_usec 3000000\nuser_usec 1000000\nsystem_usec 2000000\nthrottled_usec 500000\n",
        "memory.events": "low 0\noom 1\noom_kill 2\n",
        "pids.events": "max 3\n",
        "cpu.pressure": "some avg10=1.50 avg60=0.00 total=1\nfull avg10=9.00 avg60=0.00 total=0\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "cmd-1").mkdir()
    (tmp_path / "cmd-1/pids.events").write_text("max 4\n")
    assert cgroup_v2.limits(tmp_path, tuple(cgroup_v2.FILES)) == {
        "memory": 4096,
        "swap": None,
        "cpus": 0.5,
        "cpu_weight": 100,
        "io": 5,
        "pids": 12,
        "cpuset": None,
    }
    old = cgroup_v2.usage(tmp_path)
    assert old["pids_refused"] == 7  # Linux before 6.11
    (tmp_path / "pids.events.local").write_text("max 0\n")
    assert (
        cgroup_v2.usage(tmp_path)
        == old | {"pids_refused": 3}
        == {
            "cpu_user": 1.0,
            "cpu_system": 2.0,
            "cpu_throttled": 0.5,
            "io_read": 11,
            "io_written": 22,
            "oom_kills": 2,
            "pids_refused": 3,
            "pressure": {"cpu": 1.5},
        }
    )
    assert cgroup_v2.usage(tmp_path / "gone") == {}
