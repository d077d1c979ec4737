"""Which sandbox somebody gets: each requirement is looked at, and a refusal names those that failed."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from managed import NOBODY, heard, is_gone, manager, nothing_left, runs, second, state

from sandboxcore import (
    Limits,
    RequiredCapabilities,
    SandboxError,
    SandboxManager,
    SandboxSession,
    SelectionOptions,
    SelectionRefused,
    SpecError,
)
from sandboxcore import SandboxSpec as Spec

pytestmark = pytest.mark.once

__all__ = ["heard", "manager", "nothing_left", "second", "state"]  # fixtures

POOLED = SelectionOptions(use_pool=True)


def requiring(**required: Any) -> SelectionOptions:
    return SelectionOptions(required=RequiredCapabilities(**required))


MATCHED: dict[str, tuple[Spec, dict[str, Any]]] = {
    "network": (Spec(network="host"), {"network": True}),
    "no network": (Spec(), {"network": False}),
    "write access": (Spec(), {"write_access": True}),
    "no write access": (Spec(ro=["/usr:/data"]), {"write_access": False}),
    "memory": (Spec(), {"min_memory": "1M"}),
    "readable": (Spec(), {"readable_paths": ["/usr", "/etc/passwd", "/tmp"]}),
    "writable": (Spec(), {"writable_paths": ["/tmp", "/workspace"]}),
}
REFUSED: dict[str, tuple[Spec, dict[str, Any], str]] = {
    "network": (Spec(), {"network": True}, "network"),
    "no network": (Spec(network="host"), {"network": False}, "network"),
    "write access": (Spec(workdir="/usr"), {"write_access": True}, "write_access"),
    "memory": (Spec(), {"min_memory": 1 << 60}, "min_memory"),
    "readable": (Spec(), {"readable_paths": ["/usr", "/no/such"]}, "readable_paths['/no/such']"),
    "denied": (Spec(deny=["/usr/include"]), {"readable_paths": ["/usr/include"]},
               "readable_paths['/usr/include']"),
    "writable": (Spec(), {"writable_paths": ["/tmp", "/usr/bin"]}, "writable_paths['/usr/bin']"),
}  # fmt: skip


@pytest.mark.parametrize("which", MATCHED)
@pytest.mark.parametrize("options", [{}, {"use_pool": True}], ids=["new", "pooled"])
def test_a_requirement_is_met(manager: SandboxManager, which: str, options: dict[str, bool]) -> None:
    spec, required = MATCHED[which]
    chosen = SelectionOptions(required=RequiredCapabilities(**required), **options)
    assert runs(manager.acquire(spec, chosen))


@pytest.mark.parametrize("which", REFUSED)
@pytest.mark.parametrize("options", [{}, {"use_pool": True}], ids=["new", "pooled"])
def test_a_requirement_is_refused_by_its_name(
    manager: SandboxManager, which: str, options: dict[str, bool]
) -> None:
    spec, required, name = REFUSED[which]
    with pytest.raises(SelectionRefused) as info:
        manager.acquire(spec, SelectionOptions(required=RequiredCapabilities(**required), **options))
    assert info.value.unmet.keys() == {name}
    assert name in str(info.value)
    assert manager.list_sandboxes() == []
    assert manager.list_sessions() == []


@pytest.mark.parametrize("which", REFUSED)
def test_one_that_is_preferred_is_looked_at_too(manager: SandboxManager, which: str) -> None:
    spec, required, name = REFUSED[which]
    made = manager.create(spec, name="dev")
    options = SelectionOptions(preferred_id="dev", required=RequiredCapabilities(**required))
    with pytest.raises(SelectionRefused) as info:
        manager.acquire(options=options)
    assert info.value.unmet.keys() == {name}
    assert made.exec(["true"]).ok
    assert manager.list_sessions() == []


def test_several_that_fail_are_all_named(manager: SandboxManager) -> None:
    required = RequiredCapabilities(network=True, min_memory=1 << 60)
    with pytest.raises(SelectionRefused) as info:
        manager.acquire(Spec(), SelectionOptions(required=required))
    assert info.value.unmet.keys() == {"network", "min_memory"}


def test_what_can_be_written_and_outlives_it(manager: SandboxManager, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    tmp_path.chmod(0o755)
    with pytest.raises(SelectionRefused) as info:
        manager.acquire(Spec(rw=[(str(tmp_path / "d"), "/data")]), requiring(write_access=False))
    assert info.value.unmet == {"write_access": "/data can be written to and outlives it"}


def test_a_limit_of_memory_counts(manager: SandboxManager) -> None:
    spec = Spec(limits=Limits(memory="64M"), optional=["memory"])
    with pytest.raises(SelectionRefused, match="min_memory"):
        manager.acquire(spec, requiring(min_memory="65M"))
    assert runs(manager.acquire(spec, requiring(min_memory="64M")))


def test_labels(manager: SandboxManager) -> None:
    blue = SelectionOptions(required_labels={"colour": "blue"})
    session = manager.acquire(options=blue, client_id="me")
    assert session.sandbox.labels == {"colour": "blue"}
    session.detach()
    red = SelectionOptions(required_labels={"colour": "red"})
    other = manager.acquire(options=red, client_id="me")
    assert other.sandbox_id != session.sandbox_id
    assert manager.acquire(options=blue, client_id="me") == session
    preferred = SelectionOptions(preferred_id=session.sandbox_id, required_labels={"colour": "red", "a": "b"})
    with pytest.raises(SelectionRefused) as info:
        manager.acquire(options=preferred)
    assert info.value.unmet == {
        "required_labels['colour']": "it is 'blue', not 'red'",
        "required_labels['a']": "it has none, not 'b'",
    }


def test_preferred(manager: SandboxManager) -> None:
    made = manager.create(name="dev")
    options = SelectionOptions(preferred_id="dev")
    first = manager.acquire(options=options, client_id="me")
    assert (first.sandbox_id, first.went_on) == (made.id, False)
    first.detach()
    again = manager.acquire(options=options, client_id="me")
    assert (again, again.went_on) == (first, True)
    made.stop()
    assert runs(manager.acquire(options=options, client_id="you"))
    missing = manager.acquire(options=SelectionOptions(preferred_id=NOBODY))
    assert missing.sandbox_id != made.id


def test_contradictions_and_back_ends() -> None:
    with pytest.raises(SpecError):
        SelectionOptions(preferred_id="x", require_fresh=True)
    with pytest.raises(SpecError):
        SelectionOptions(preferred_id="x", use_pool=True)
    assert SelectionOptions(preferred_backend="namespaces").preferred_backend == "namespaces"
    with pytest.raises(SelectionRefused) as info:
        SelectionOptions(preferred_backend="firecracker")
    assert info.value.unmet.keys() == {"preferred_backend"}
    for wrong in ({"network": "yes"}, {"min_memory": "much"}, {"readable_paths": "/usr"}):
        with pytest.raises(SpecError):
            RequiredCapabilities(**wrong)  # type: ignore[arg-type]


# --- pooled -------------------------------------------------------------------------------------------


def test_a_pooled_one_has_a_session_and_is_on_record(manager: SandboxManager, second: SandboxManager) -> None:
    session = manager.acquire(options=POOLED, client_id="me", name="warm", env={"A": "b"})
    assert session.sandbox.exec(["sh", "-c", "echo $A"]).stdout == b"b\n"
    record = second.get_record("warm")
    assert record is not None
    assert record.host.split()[0] == str(os.getpid())
    assert second.list_sessions() == [session]
    assert second.get_session_by_sandbox("warm") == session
    for use in (lambda: second.attach("warm"), lambda: second.find("warm"), lambda: second.destroy("warm")):
        with pytest.raises(SandboxError):
            use()
    assert runs(session)
    session.release()
    assert is_gone(manager, session.sandbox_id)
    assert second.get_record("warm") is None


def test_one_manager_ends_the_session_of_anothers(manager: SandboxManager, second: SandboxManager) -> None:
    session = manager.acquire(options=POOLED, client_id="me")
    second.terminate(session.id)
    manager.reconcile()
    assert is_gone(manager, session.sandbox_id)


def test_several_sessions_of_a_pooled_one(manager: SandboxManager) -> None:
    first = manager.acquire(options=POOLED, client_id="me")
    other = manager.attach(first.sandbox_id, "you").session
    first.release()
    assert runs(other)
    other.release()
    assert is_gone(manager, first.sandbox_id)


def test_what_a_pooled_one_cannot_have(manager: SandboxManager) -> None:
    session = manager.acquire(options=POOLED)
    for act in (manager.archive, manager.recover):
        with pytest.raises(SandboxError):
            act(session.sandbox_id)
    with pytest.raises(SandboxError):
        manager.fork(session)
    with pytest.raises(SpecError):
        manager.acquire(options=POOLED, creation_timeout=1)
    with pytest.raises(SpecError):
        manager.acquire(env={"A": "b"})


def test_never_from_one_client_to_another(manager: SandboxManager, second: SandboxManager) -> None:
    """Threads of five clients acquire, mark what they get, and leave or release it, by two managers."""
    wrong: list[str] = []
    guard = threading.Lock()

    def use(session: SandboxSession, client: str) -> None:
        found = session.sandbox.files.read("/tmp/of") if session.sandbox.files.exists("/tmp/of") else None
        if found != (client.encode() if session.went_on else None):
            with guard:
                wrong.append(f"{client} got what was {found!r}'s")
        session.sandbox.files.write("/tmp/of", client.encode())

    def work(one: SandboxManager, client: str) -> None:
        try:
            for turn in range(4):
                session = one.acquire(client_id=client, options=POOLED if turn == 3 else None)
                use(session, client)
                session.release(keep_alive=turn % 2 == 0)
        except Exception as error:
            with guard:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=((manager, second)[n % 2], f"c{n % 5}")) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert manager.list_sessions("active") == []
