"""What a claim asks for beyond the pool's spec, and how a warm sandbox becomes that: late binding."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sandboxcore.cgroup_values import LIMITS
from sandboxcore.errors import SpecError
from sandboxcore.plan import Plan, rebound_plan
from sandboxcore.request import FileContent
from sandboxcore.resources import FIXED
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import Binding, Limits, Mount, Network, SandboxSpec, check_env, check_labels, check_name

Identity = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What one claim asks for. ``limits``: all of them, or only those that change; ``network``: None for the
    pool's; the rest as for :class:`SandboxSpec` and :class:`Sandbox`."""

    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileContent] = field(default_factory=dict)
    ro: tuple[Binding, ...] = ()
    rw: tuple[Binding, ...] = ()
    limits: Mapping[str, Any] = field(default_factory=dict)
    network: Network | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    owner: str | None = None
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """What is to be mounted, parents first."""
        return SandboxSpec(ro=self.ro, rw=self.rw).all_mounts()

    def spec(self, base: SandboxSpec) -> SandboxSpec:
        """The spec of a sandbox that has all of it from the start. Raises SpecError."""
        changes: dict[str, Any] = {}
        if self.env:
            changes["env"] = {**base.env, **self.env}
        if self.limits:
            changes["limits"] = replace(base.limits, **self.limits)
        if self.network is not None:
            changes["network"] = self.network
        for name in ("ro", "rw"):
            if getattr(self, name):
                changes[name] = (*getattr(base, name), *getattr(self, name))
        return base.replace(**changes) if changes else base

    def identity(self) -> Identity:
        """For a :class:`Sandbox` that is made for it."""
        return {
            "name": self.name,
            "owner": self.owner,
            "description": self.description,
            "labels": self.labels,
            "metadata": self.metadata,
        }

    def become(self, sandbox: Sandbox) -> None:
        """Give a warm sandbox this identity."""
        sandbox.name = self.name or sandbox.id
        if self.labels:
            sandbox.labels = {**sandbox.labels, **self.labels}
        sandbox.owner, sandbox.description = self.owner, self.description
        sandbox.metadata = dict(self.metadata)

    def not_late(self, spec: SandboxSpec, plan: Plan) -> str | None:
        """Why a warm sandbox of this spec cannot become that: ``"network"``, ``"limits"`` or ``"mounts"``."""
        if self.network not in (None, spec.network):
            return "network"
        if any(not _changeable(name, spec, plan) for name in self.limits):
            return "limits"
        if self.rw and plan.live_binds != "rw":
            return "mounts"
        return "mounts" if self.ro and plan.live_binds is None else None


NOTHING = Wanted()


def wanted(
    *,
    spec: SandboxSpec,
    env: Mapping[str, str] | None = None,
    files: Mapping[str, FileContent] | None = None,
    ro: Sequence[Binding] = (),
    rw: Sequence[Binding] = (),
    limits: Limits | Mapping[str, Any] | None = None,
    network: Network | None = None,
    labels: Mapping[str, str] | None = None,
    **identity: Any,
) -> Wanted:
    """What a claim asks for, checked. Raises SpecError for what no sandbox can be."""
    check_env(env or {}, "env")
    if identity.get("name") is not None:
        check_name(identity["name"])
    for name, bindings in (("ro", ro), ("rw", rw)):
        if isinstance(bindings, str | os.PathLike) or not isinstance(bindings, Iterable):
            raise SpecError(f"{name}: {bindings!r} is not a sequence")
    found = Wanted(
        env=env or {},
        files=files or {},
        ro=tuple(ro),
        rw=tuple(rw),
        limits=_changed(spec.limits, limits),
        network=network,
        labels=check_labels(labels or {}),
        **{name: value for name, value in identity.items() if value is not None},
    )
    if found.network is not None or found.ro or found.rw:
        found.spec(spec)  # says what cannot be
    return found


def _changed(base: Limits, limits: Limits | Mapping[str, Any] | None) -> dict[str, Any]:
    """Those that are others than the pool's, by their names."""
    if limits is None:
        return {}
    if isinstance(limits, Mapping):
        for name in limits:
            if name not in Limits.__dataclass_fields__:
                raise SpecError(f"limits.{name}: there is no such limit")
        limits = replace(base, **limits)
    elif not isinstance(limits, Limits):
        raise SpecError(f"limits: {limits!r} is not a Limits")
    names = Limits.__dataclass_fields__
    return {name: getattr(limits, name) for name in names if getattr(limits, name) != getattr(base, name)}


def _changeable(name: str, spec: SandboxSpec, plan: Plan) -> bool:
    """Whether a limit of a running sandbox can become another."""
    if name in FIXED:
        return False
    if name not in LIMITS or (name == "pids" and name not in plan.controllers):
        return True  # of its commands
    if name in ("io", "swap"):
        return getattr(spec.limits, name) is not None
    return LIMITS[name] in plan.controllers


def bind_late(sandbox: Sandbox, wanted: Wanted) -> None:
    """Make a running sandbox what is wanted. Raises what each part does; then it is half of that."""
    bind_at_once(sandbox, wanted)
    for mount in wanted.mounts if wanted.ro or wanted.rw else ():
        assert mount.source is not None
        if makes_target(sandbox, mount):
            with contextlib.suppress(OSError):  # bind() says why
                sandbox.files.mkdir(mount.target, parents=True, exist_ok=True)
        sandbox.bind(mount.source, mount.target, read_only=mount.read_only)
    if wanted.files:
        sandbox.files.write_many(wanted.files)


def makes_target(sandbox: Sandbox, mount: Mount) -> bool:
    """Whether to make the directory first, which would be missing in a new sandbox: a mount that finds
    no target has been made in vain."""
    return sandbox._is_private(mount.target) and os.path.isdir(mount.source or "")


def bind_at_once(sandbox: Sandbox, wanted: Wanted) -> None:
    """What nobody has to be waited for."""
    wanted.become(sandbox)
    if wanted.limits:
        sandbox.update(**wanted.limits)
    if wanted.env:
        sandbox._plan = rebound_plan(sandbox._plan, wanted.env)
        sandbox.spec = sandbox._plan.spec
