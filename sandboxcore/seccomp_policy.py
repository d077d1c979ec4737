"""What a seccomp policy says: the data that sandboxcore.seccomp compiles."""

from __future__ import annotations

import errno as errnos
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

from sandboxcore.errors import SpecError

__all__ = ["ArgRule", "ArgTest", "SeccompPolicy"]

DEFAULTS = ("ENOSYS", "EPERM", "kill", "log")
MAX_TESTS = 250  # instructions in one condition: a conditional jump of BPF reaches over 255


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgTest:
    """True when `args[index] & mask` is one of `values`.

    index: which argument, 0 to 5.
    values: one or more numbers below 2**32.
    mask: default all 32 bits.

    Only the low 32 bits are compared. That is all the kernel looks at in an int argument, and a
    filter that compared 64 could be passed by setting a high bit (CVE-2019-10063).

    Raises SpecError.
    """

    index: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(_items("values", self.values)))
        if not isinstance(self.index, int) or not 0 <= self.index <= 5:
            raise SpecError(f"seccomp: argument index must be 0 to 5, not {self.index!r}")
        for number in (self.mask, *self.values):
            if not isinstance(number, int) or not 0 <= number < 1 << 32:
                raise SpecError(f"seccomp: {number!r} is not an unsigned 32-bit number")
        if not self.values:
            raise SpecError("seccomp: a test without values is never true")
        if any(value & ~self.mask for value in self.values):
            raise SpecError("seccomp: a value with bits outside its mask is never matched")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgRule:
    """What one system call may be asked to do.

    call: its name.
    when: alternatives, one of which must hold; each is one or more tests that must all hold.
    match: "allow" (default) allows exactly what `when` describes, "refuse" all but that.
    errno: name of the answer to what is refused. Default "EPERM".

    Raises SpecError.
    """

    call: str
    when: tuple[tuple[ArgTest, ...], ...]
    match: Literal["allow", "refuse"] = "allow"
    errno: str = "EPERM"

    def __post_init__(self) -> None:
        if not isinstance(self.call, str) or not self.call:
            raise SpecError(f"seccomp: a rule needs the name of a call, not {self.call!r}")
        about = f"seccomp: rule for {self.call}"
        when = tuple(tuple(_items("a condition", tests)) for tests in _items("when", self.when))
        object.__setattr__(self, "when", when)
        if not when or not all(when):
            raise SpecError(f"{about}: an empty condition")
        if not all(isinstance(test, ArgTest) for tests in when for test in tests):
            raise SpecError(f"{about}: conditions are made of ArgTest")
        if any(sum(2 + len(test.values) for test in tests) > MAX_TESTS for tests in when):
            raise SpecError(f"{about}: too many values in one condition")
        if self.match not in ("allow", "refuse"):
            raise SpecError(f"{about}: match is 'allow' or 'refuse', not {self.match!r}")
        if self.errno not in errnos.errorcode.values():
            raise SpecError(f"{about}: unknown errno {self.errno!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeccompPolicy:
    """A seccomp policy: an allow-list of system calls with argument rules.

    name: for messages and records.
    allow: names of the calls that run.
    rules: calls that run by their arguments, at most one rule for each.
    deny: names of the calls answered EPERM.
    default: the answer to every other call: "ENOSYS" (default), "EPERM", "kill" (SIGSYS for the
        whole process), or "log", which lets the call run and notes it in the kernel's log. "log" is
        for finding out what a trusted program needs; it confines little.

    Immutable and hashable. Names of calls are checked by compile_filter(), because only libseccomp
    knows them. Raises SpecError.
    """

    name: str
    allow: frozenset[str] = frozenset()
    rules: tuple[ArgRule, ...] = ()
    deny: frozenset[str] = frozenset()
    default: Literal["ENOSYS", "EPERM", "kill", "log"] = "ENOSYS"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SpecError(f"seccomp: a policy needs a name, not {self.name!r}")
        if self.default not in DEFAULTS:
            raise SpecError(f"seccomp: default is one of {_list(DEFAULTS)}, not {self.default!r}")
        object.__setattr__(self, "allow", _names("allow", self.allow))
        object.__setattr__(self, "rules", _rules(self.rules))
        object.__setattr__(self, "deny", _names("deny", self.deny))
        named = sorted([*self.allow, *self.deny, *(rule.call for rule in self.rules)])
        twice = {name for name, following in pairwise(named) if name == following}
        if twice:
            raise SpecError(f"seccomp: more than one answer for {_list(sorted(twice))}")

    def __hash__(self) -> int:
        # Policies are looked up in the cache of filters. A frozenset remembers its hash, a tuple of
        # rules would compute it each time.
        return hash((self.name, self.allow, self.deny))

    def extend(
        self,
        *,
        allow: Iterable[str] = (),
        deny: Iterable[str] = (),
        rules: Iterable[ArgRule] = (),
        name: str | None = None,
    ) -> SeccompPolicy:
        """Return a copy in which the calls named here have the answer given here.

        Their earlier answer is dropped: `extend(allow=["socket"])` opens every socket family.
        name: default this policy's, with a "+". Raises SpecError.
        """
        allowed, denied, ruled = _names("allow", allow), _names("deny", deny), _rules(rules)
        new = allowed | denied | {rule.call for rule in ruled}
        return replace(
            self,
            name=f"{self.name}+" if name is None else name,
            allow=self.allow - new | allowed,
            rules=tuple(rule for rule in self.rules if rule.call not in new) + ruled,
            deny=self.deny - new | denied,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return strings, numbers, lists and dicts; from_dict() takes them back."""
        return {
            "name": self.name,
            "allow": sorted(self.allow),
            "rules": [
                asdict(rule)
                | {"when": [[asdict(t) | {"values": list(t.values)} for t in w] for w in rule.when]}
                for rule in self.rules
            ],
            "deny": sorted(self.deny),
            "default": self.default,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, base: SeccompPolicy | None = None) -> SeccompPolicy:
        """Make a policy from plain data, such as a TOML table whose keys are the fields.

        A rule is a table {call, when, match, errno}, a test in it {index, values, mask}.
        base: a policy to extend. Default: one that allows nothing. Raises SpecError.
        """
        given = _table(cls, data)
        default = given.pop("default", None)
        given["rules"] = [_rule_from(table) for table in _items("rules", given.get("rules", ()))]
        if base is None:
            base, given = cls(name="custom"), {"name": "custom"} | given
        policy = base.extend(**given)
        return policy if default is None else replace(policy, default=default)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _items(what: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise SpecError(f"seccomp: {what} must be a list, not {value!r}")
    return list(value)


def _names(what: str, value: Any) -> frozenset[str]:
    names = _items(what, value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise SpecError(f"seccomp: {what} must be names of system calls, not {name!r}")
    return frozenset(names)


def _rules(value: Any) -> tuple[ArgRule, ...]:
    rules = tuple(_items("rules", value))
    for rule in rules:
        if not isinstance(rule, ArgRule):
            raise SpecError(f"seccomp: {rule!r} is not an ArgRule")
    return rules


def _table(cls: type[Any], data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise SpecError(f"seccomp: {data!r} is not a table")
    keys = [field.name for field in fields(cls)]
    for key in data:
        if key not in keys:
            raise SpecError(f"seccomp: unknown key {key!r}; there are {_list(keys)}")
    return dict(data)


def _rule_from(data: Any) -> ArgRule:
    given = _table(ArgRule, data)
    when = [_items("a condition", tests) for tests in _items("when", given.get("when", ()))]
    given["when"] = [[_test_from(test) for test in tests] for tests in when]
    return ArgRule(**{"call": ""} | given)


def _test_from(data: Any) -> ArgTest:
    return ArgTest(**{"index": None, "values": ()} | _table(ArgTest, data))
