"""Which sandbox will do: :class:`SelectionOptions`. Each requirement is looked at, and a refusal names those
that failed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandboxcore.errors import SandboxError, SelectionRefused, SpecError
from sandboxcore.records import SandboxRecord
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import SandboxSpec, check_labels, clean_path, parse_size

BACKEND = "namespaces"  # the one there is: its name is for callers that know several


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredCapabilities:
    """What a sandbox must be able to do; ``None`` and empty: does not matter.

    network: whether it has the host's network, or none but its own. write_access: whether the payload can
    write in its working directory; False: nor to anything that outlives the sandbox. min_memory: bytes that
    it may use at least. readable_paths, writable_paths: absolute, inside; the payload itself tries.
    """

    network: bool | None = None
    write_access: bool | None = None
    min_memory: int | str | None = None
    readable_paths: Sequence[str] = ()
    writable_paths: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Validate and normalise."""
        put = object.__setattr__
        for name in ("network", "write_access"):
            if getattr(self, name) not in (None, True, False):
                raise SpecError(f"required.{name}: {getattr(self, name)!r} is not True, False or None")
        if self.min_memory is not None:
            put(self, "min_memory", parse_size(self.min_memory, "required.min_memory"))
        for name in ("readable_paths", "writable_paths"):
            if isinstance(getattr(self, name), str):
                raise SpecError(f"required.{name}: {getattr(self, name)!r} is not a list of paths")
            paths = tuple(clean_path(path, f"required.{name}") for path in getattr(self, name))
            put(self, name, paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """How :meth:`SandboxManager.acquire` chooses.

    preferred_id: this sandbox, by its id, name or UUID, if there is one. require_fresh: one that nobody has
    used. required: what it must be able to do. required_labels: it must have all of these; a new one gets
    them. preferred_backend: the only one is "namespaces". use_pool: a warm one of this process, if there is
    one, or a new one of the same kind; it ends with this process.
    """

    preferred_id: str | None = None
    require_fresh: bool = False
    required: RequiredCapabilities = field(default_factory=RequiredCapabilities)
    required_labels: Mapping[str, str] = field(default_factory=dict)
    preferred_backend: str | None = None
    use_pool: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        object.__setattr__(self, "required_labels", check_labels(self.required_labels))
        if self.preferred_id is not None and self.require_fresh:
            raise SpecError("preferred_id and require_fresh exclude each other")
        if self.preferred_id is not None and self.use_pool:
            raise SpecError("preferred_id and use_pool exclude each other")
        if self.preferred_backend not in (None, BACKEND):
            raise SelectionRefused(
                "acquire",
                {"preferred_backend": f"{self.preferred_backend!r} is unknown; there is {BACKEND!r}"},
            )


def unmet(
    spec: SandboxSpec, options: SelectionOptions, labels: Mapping[str, str], limits: Mapping[str, Any]
) -> dict[str, str]:
    """What fails by its description: each requirement with the reason. ``limits``: those that hold."""
    required, failed = options.required, {}
    for name, value in options.required_labels.items():
        if labels.get(name) != value:
            has = f"it is {labels[name]!r}" if name in labels else "it has none"
            failed[f"required_labels[{name!r}]"] = f"{has}, not {value!r}"
    if required.network is not None and required.network is not (spec.network == "host"):
        failed["network"] = f"its network is {spec.network!r}"
    lasting = [mount.target for mount in spec.all_mounts() if _outlives(mount)]
    if required.write_access is False and lasting:
        failed["write_access"] = f"{lasting[0]} can be written to and outlives it"
    if required.min_memory is not None:
        most = _memory(limits)
        if most < int(required.min_memory):
            failed["min_memory"] = f"it may use {most} bytes, not {required.min_memory}"
    return failed


def unmet_by(record: SandboxRecord, spec: SandboxSpec, options: SelectionOptions) -> dict[str, str]:
    """The same for one that is on record, which may have been started with less than its spec asks."""
    limits = {"memory": None if "limits.memory" in record.omitted else spec.limits.memory}
    return unmet(spec, options, record.labels, limits)


def _outlives(mount: Any) -> bool:
    return mount.kind in ("bind", "volume") and not mount.read_only


def _memory(limits: Mapping[str, Any]) -> int:
    """What the machine has bounds it, too."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = limits.get("memory")
    return most if limit is None else min(most, int(limit))


def unmet_inside(sandbox: Sandbox, required: RequiredCapabilities) -> dict[str, str]:
    """What fails by trying: the payload's own eyes. The sandbox runs."""
    failed = {}
    if required.network is not None:
        theirs = sandbox.capabilities.namespaces.get("net")
        if required.network is not (theirs == os.stat("/proc/self/ns/net").st_ino):
            failed["network"] = f"it {'has not' if required.network else 'has'} the host's network"
    if required.write_access and (why := _tried(sandbox, sandbox.spec.workdir, write=True)):
        failed["write_access"] = why
    for path in required.readable_paths:
        if why := _tried(sandbox, path, write=False):
            failed[f"readable_paths[{path!r}]"] = why
    for path in required.writable_paths:
        if why := _tried(sandbox, path, write=True):
            failed[f"writable_paths[{path!r}]"] = why
    return failed


def _tried(sandbox: Sandbox, path: str, *, write: bool) -> str:
    """Why the payload cannot read or write there; "" if it can. What it is not known to be is an error."""
    files = sandbox.files
    try:
        if files.stat(path).type == "directory":
            if not write:
                files.list(path)
                return ""
            probe = os.path.join(path, f".sandboxcore-{os.urandom(8).hex()}")
            files.write(probe, b"")
            files.remove(probe)
            return ""
        with files.open(path, "r+b" if write else "rb"):
            return ""
    except OSError as error:
        if isinstance(error, SandboxError):
            raise
        return os.strerror(error.errno) if error.errno else str(error)
