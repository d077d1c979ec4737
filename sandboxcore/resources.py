"""What a living sandbox uses, and may use: :meth:`Sandbox.usage`, :meth:`Sandbox.update`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from sandboxcore import cgroup
from sandboxcore.cgroup import Group, GroupUsage
from sandboxcore.cgroup_values import LIMITS
from sandboxcore.errors import SpecError, UnsupportedHost
from sandboxcore.events import EventKind
from sandboxcore.execution import Execution
from sandboxcore.groups import change_limits
from sandboxcore.plan import updated_plan
from sandboxcore.spec import Limits, SandboxSpec

FIXED = ("disk", "inodes")  # sizes of what is mounted


@dataclass(frozen=True, slots=True)
class LimitChange:
    """What :meth:`Sandbox.update` has done about one limit.

    before: the value until now. value: what is in force, as the kernel says where it can. applies: ``"now"``,
    to what runs already, or to the ``"next command"``, or with the ``"next start"``.
    """

    before: Any
    value: Any
    applies: Literal["now", "next command", "next start"]


class Resources(Execution):
    """The part of :class:`Sandbox` that has to do with its control group."""

    def usage(self) -> GroupUsage:
        """What everything in it uses now, and has used since its start.

        Raises :class:`SpecError` where it has no control group: where neither a limit asked for one nor
        ``accounting``.
        """
        group = self._link_now().group
        if group is None:
            raise SpecError("accounting: this sandbox has no control group; start it with accounting=True")
        return self._through(lambda link: group.usage())

    def update(self, **changes: Any) -> Mapping[str, LimitChange]:
        """Change limits, by the names of :class:`Limits`; ``None`` lifts one. All of them change, or none.

        Limits of the control group hold at once, also for what runs: lowering ``memory`` below what cannot be
        reclaimed kills (cgroup v2) or is refused (v1). The others hold for the next commands. A sandbox that
        does not run keeps them for its start.

        Raises :class:`SpecError` for a value that cannot be or a limit that is fixed (disk, inodes),
        :class:`UnsupportedHost` for one whose controller the sandbox was started without, and
        :class:`SetupError` for what the kernel refuses.
        """
        with self._lock:
            return self._update(changes)

    def _update(self, changes: Mapping[str, Any]) -> dict[str, LimitChange]:
        before = self.spec.limits
        for name in changes:
            if name not in Limits.__dataclass_fields__:
                raise SpecError(f"limits.{name}: there is no such limit")
        limits = replace(before, **changes)
        wanted = {name: getattr(limits, name) for name in changes}
        link = self._link
        if link is None:
            self._limits_now(self.spec.replace(limits=limits), running=False)
            found = {name: LimitChange(getattr(before, name), wanted[name], "next start") for name in wanted}
            return self._note_changes(found)
        if fixed := [name for name in wanted if name in FIXED]:
            raise SpecError(f"limits.{fixed[0]}: fixed when the sandbox starts")
        in_force = self._change_group(link.group, wanted)
        self._limits_now(self.spec.replace(limits=limits), running=True)
        found = {
            name: LimitChange(
                getattr(before, name),
                in_force.get(name, wanted[name]),
                "now" if name in in_force else "next command",
            )
            for name in wanted
        }
        return self._note_changes(found)

    def _note_changes(self, changes: dict[str, LimitChange]) -> dict[str, LimitChange]:
        if self._observers:
            self._note(EventKind.SANDBOX_UPDATED, limits={name: asdict(one) for name, one in changes.items()})
        return changes

    def _change_group(self, group: Group | None, wanted: Mapping[str, Any]) -> dict[str, Any]:
        grouped = {name: value for name, value in wanted.items() if name in LIMITS}
        if group is None or "pids" not in self._plan.controllers:
            grouped.pop("pids", None)  # RLIMIT_NPROC will do
        if not grouped:
            return {}
        if group is None:
            raise UnsupportedHost(
                f"limits.{next(iter(grouped))} of a sandbox without a control group",
                "start it with such a limit, or with accounting=True",
            )
        if grouped.get("io") is not None and "blkio" in group.v1 and self.spec.limits.io is None:
            raise UnsupportedHost(
                "limits.io of a sandbox that was started without one, on cgroup v1",
                "start it with limits.io; it can be changed and lifted then",
            )
        swap = "memory" in grouped and grouped["memory"] is not None and "swap" in cgroup.layout().versions
        if swap and "swap" not in grouped and self.spec.limits.swap is None:
            grouped["swap"] = 0  # as at the start: or the limit would only be where swapping begins
        in_force = change_limits(group, grouped)
        return {name: value for name, value in in_force.items() if name in wanted}

    def _limits_now(self, spec: SandboxSpec, *, running: bool) -> None:
        """Go by another spec from here on."""
        self.spec = spec
        if running:
            self._plan = updated_plan(self._plan, spec)
