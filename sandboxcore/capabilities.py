"""What was really applied to a payload, as the kernel told it from inside."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedMount:
    """One line of mountinfo, proc(5)."""

    target: str
    fstype: str
    source: str
    options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        """Whether this mount refuses writes."""
        return "ro" in self.options


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxCapabilities:
    """A record read by the payload itself after the last step of its set-up and before exec.

    ``capability_sets`` maps the names of /proc/PID/status (CapInh ...) to bit masks; ``namespaces`` maps
    a kind to its inode number; ``limits`` maps the names of /proc/PID/limits to (soft, hard), ``None`` for
    unlimited; ``omitted`` lists what the spec allowed to be missing and is missing; ``control_group`` has the
    limits of the sandbox's group by the names of :class:`Limits`, as its files say (``pids`` with those of
    ours), or is None where there is no group.
    """

    no_new_privs: bool
    seccomp_mode: int
    seccomp_filters: int
    capability_sets: Mapping[str, int]
    uid: int
    gid: int
    groups: tuple[int, ...]
    uid_map: str
    namespaces: Mapping[str, int]
    mounts: tuple[AppliedMount, ...]
    limits: Mapping[str, tuple[int | None, int | None]]
    omitted: tuple[str, ...]
    control_group: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        data = {name: getattr(self, name) for name in self.__slots__ if name != "mounts"}
        data["mounts"] = [
            {"target": m.target, "fstype": m.fstype, "source": m.source, "options": list(m.options)}
            for m in self.mounts
        ]
        return data


def parse_applied(
    text: bytes, omitted: tuple[str, ...], control_group: Mapping[str, Any] | None = None
) -> SandboxCapabilities:
    """Read the text that ``csrc/record.c`` collects: name NUL content NUL, for each part."""
    pieces = text.split(b"\0")
    parts = {
        name.decode(): content.decode(errors="replace")
        for name, content in zip(pieces[::2], pieces[1::2], strict=False)
    }
    lines = (line.partition(":") for line in parts["/proc/self/status"].splitlines())
    status = {key: value.strip() for key, _, value in lines}
    return SandboxCapabilities(
        no_new_privs=status["NoNewPrivs"] == "1",
        seccomp_mode=int(status["Seccomp"]),
        seccomp_filters=int(status["Seccomp_filters"]),
        capability_sets={name: int(status[name], 16) for name in CAPABILITY_SETS},
        uid=int(status["Uid"].split()[1]),
        gid=int(status["Gid"].split()[1]),
        groups=tuple(int(group) for group in status["Groups"].split()),
        uid_map=" ".join(parts["/proc/self/uid_map"].split()),
        namespaces={
            name.rpartition("/")[2]: int(re.sub(r"\D", "", link))
            for name, link in parts.items()
            if name.startswith("/proc/self/ns/")
        },
        mounts=tuple(_mount(line) for line in parts["/proc/self/mountinfo"].splitlines()),
        limits=dict(_limit(line) for line in parts["/proc/self/limits"].splitlines()[1:]),
        omitted=omitted,
        control_group=control_group,
    )


def _mount(line: str) -> AppliedMount:
    left, _, right = line.partition(" - ")
    fields, tail = left.split(), right.split()
    target = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
    return AppliedMount(target=target, fstype=tail[0], source=tail[1], options=tuple(fields[5].split(",")))


def _limit(line: str) -> tuple[str, tuple[int | None, int | None]]:
    name, soft, hard = line[:26].strip(), line[26:47].strip(), line[47:68].strip()
    return name, (
        None if soft == "unlimited" else int(soft),
        None if hard == "unlimited" else int(hard),
    )
