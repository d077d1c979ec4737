"""Whether somebody waits for a command in a sandbox, whoever that is: told by its processes."""

import contextlib
from pathlib import Path

from sandboxcore.identity import children
from sandboxcore.journal import Journal
from sandboxcore.records import SandboxRecord
from sandboxcore.store import Store


def is_awaited(store: Store, record: SandboxRecord) -> bool:
    """Whether a command runs in a persistent sandbox that is not detached: it ends with whoever started it,
    so he is there. What a detached one has below it is its own."""
    detached: set[int] | None = None
    for helper in children(record.pid):
        commands = {_number_inside(pid) for pid in children(helper)} - {0}
        if commands:
            detached = _detached(store, record.id) if detached is None else detached
            if not commands & detached:
                return True
    return False


def _number_inside(pid: int) -> int:
    """In its own pid namespace; 0 where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:") and line.split()[1] in "ZX":
                return 0
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return 0


def _detached(store: Store, sandbox: str) -> set[int]:
    """The numbers of its detached commands that run, as seen inside."""
    found = set()
    for record in store.commands(sandbox):
        with contextlib.suppress(FileNotFoundError):
            journal = Journal.open(store.home(sandbox).path / f"{record.id}.journal")
            try:
                head = journal.head()
            finally:
                journal.close()
            if head.state != "ENDED":
                found.add(head.pid)
    return found
