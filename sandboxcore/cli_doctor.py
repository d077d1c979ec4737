"""What ``sandboxcore doctor`` finds: kernel primitives, control groups, and whether sandboxes run."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from sandboxcore import cgroup, criu, host
from sandboxcore.cgroup_layout import SHARED, V1_NAMES, Layout
from sandboxcore.errors import SandboxError, UnsupportedHost
from sandboxcore.process import run as run_command
from sandboxcore.spec import Limits, SandboxSpec

# Controllers, and the limits that need them.
CONTROLLERS = {
    "memory": ("memory",),
    "swap": ("swap",),  # counted by the memory controller, if at all
    "cpu": ("cpus", "cpu_weight"),
    "pids": (),
    "io": ("io",),
    "cpuset": ("cpuset",),
}
WITHOUT = {
    "pids": "limits.pids is kept by RLIMIT_NPROC instead",
    "freezer": "suspend uses SIGSTOP instead",
    "kill": "the sandbox's init is killed instead, which takes the rest with it",
}


@dataclass(frozen=True, slots=True)
class Control:
    """A controller, or another ability of control groups.

    version: of its hierarchy; 0 if it is missing. path: below which groups are made there. limits: those that
    are refused without it. remedy: where it is missing, what :class:`UnsupportedHost` says.
    """

    name: str
    version: int
    path: str | None
    limits: tuple[str, ...]
    remedy: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What was found.

    run: "ok", or why a sandbox does not run here. run_limited: the same with every limit that is to be had,
    None where none is. criu: its version if it can checkpoint processes here, or why it cannot.
    """

    probes: list[host.Probe]
    controls: list[Control]
    run: str
    run_limited: str | None
    criu: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        rows = [{"name": p.name, "errno": p.errno, "value": p.value, "essential": p.essential,
                 "remedy": p.remedy if p.errno else None} for p in self.probes]  # fmt: skip
        return {
            "uname": " ".join(os.uname()[2:4:]),
            "probes": rows,
            "control_groups": [asdict(control) for control in self.controls],
            "run": self.run,
            "run_limited": self.run_limited,
            "criu": self.criu,
        }


def examine() -> Report:
    """Try everything now. Where only systemd can delegate a group it is asked, as it is for a sandbox."""
    probes, samples = host.probe(), _samples()
    refusals = {name: _refusal(limits) for name, limits in samples.items()}
    granted: dict[str, Any] = {}
    for name, limits in samples.items():
        if not refusals[name]:
            granted |= {limit: getattr(limits, limit) for limit in cgroup.needed(limits)}
    found = cgroup.layout()  # after the refusals: systemd may have moved us
    controls = [_controller(found, name, refusals.get(name, "")) for name in CONTROLLERS]
    return Report(
        probes,
        [*controls, *_abilities(found)],
        _trial(SandboxSpec()),
        _trial(SandboxSpec(limits=Limits(**granted))) if granted else None,
        _criu(),
    )


def _samples() -> dict[str, Limits]:
    """For each controller, limits that need it."""
    return {
        "memory": Limits(memory="1T"),
        "swap": Limits(memory="1T", swap="1T"),
        "cpu": Limits(cpus=0.5),
        "io": Limits(io="1T"),
        "cpuset": Limits(cpuset=str(min(os.sched_getaffinity(0)))),
    }


def _refusal(limits: Limits) -> str:
    """What a sandbox with these limits would be told; empty if they are to be had."""
    try:
        cgroup.require(limits, ())
    except UnsupportedHost as error:
        return error.remedy
    except SandboxError as error:
        return str(error)
    return ""


def _controller(found: Layout, name: str, refusal: str) -> Control:
    version = 0 if refusal else found.versions.get(name, 0)
    legacy = found.v1.get(V1_NAMES["memory" if name == "swap" else name])
    place = {1: legacy, 2: found.v2}.get(version)
    remedy = refusal or found.remedies.get(name)
    return Control(name, version, _below(place), CONTROLLERS[name], None if version else remedy)


def _abilities(found: Layout) -> list[Control]:
    freezer = {1: found.v1.get("freezer"), 2: found.v2}.get(found.freezer)
    kill = found.v2 if found.kill else None
    return [
        Control("freezer", found.freezer, _below(freezer), (), found.remedies.get("freezer")),
        Control("kill", 2 if kill else 0, _below(kill), (), found.remedies.get("kill")),
    ]


def _below(parent: Path | None) -> str | None:
    return None if parent is None else str(parent / SHARED)


def _trial(spec: SandboxSpec) -> str:
    try:
        result = run_command(["/bin/sh", "-c", "exit 0"], spec=spec, timeout=30)
    except SandboxError as error:
        return str(error)
    return "ok" if result.ok else f"/bin/sh -c 'exit 0' gave {result.returncode}"


def _criu() -> str:
    try:
        return criu.check()
    except UnsupportedHost as error:
        return error.remedy


# --- for people -------------------------------------------------------------------------------------


def show(report: Report) -> None:
    """Print it."""
    for probe in report.probes:
        number = f" {probe.value}" if probe.value else ""
        _line(probe.name, "ok" + number if not probe.errno else os.strerror(probe.errno))
        if probe.errno:
            _remark(f"{'needed' if probe.essential else 'optional'}: {probe.remedy}")
    usable = report.criu[:1].isdigit()
    _line("criu", f"ok {report.criu}" if usable else "not usable")
    if not usable:
        _remark(f"for checkpoints: {report.criu}")
    click.echo("control groups")
    for control in report.controls:
        _line(control.name, f"v{control.version}, {control.path}" if control.version else "missing")
        if not control.version:
            needs = " and ".join(f"limits.{name}" for name in control.limits)
            _remark(f"{f'for {needs}' if needs else WITHOUT[control.name]}: {control.remedy}")
    _line("a sandbox", report.run)
    _line("with limits", report.run_limited or "none is to be had here")


def _line(name: str, text: str) -> None:
    click.echo(f"{name:<16}{text}")


def _remark(text: str) -> None:
    click.echo(f"{'':<16}  {text}")
