"""The detached commands of a persistent sandbox: on record, with journals in its directory."""

import contextlib
import os
import socket
import time

from sandboxcore.detached import DetachedCommand, Door
from sandboxcore.errors import SandboxNotFound
from sandboxcore.journal import Journal
from sandboxcore.lifecycle import new_id
from sandboxcore.persistent_files import PersistentFiles
from sandboxcore.records import CommandRecord
from sandboxcore.request import Request


class PersistentCommands(PersistentFiles):
    """The part of :class:`PersistentSandbox` that has to do with commands which nobody holds."""

    def _new_command(
        self, request: Request, keep: int, *, pty: bool, wait: bool = True
    ) -> tuple[DetachedCommand, socket.socket]:
        home, command_id, now = self._store.home(self.id), new_id("cmd"), time.time()
        args = [os.fsdecode(arg) for arg in request.args]
        record = CommandRecord(id=command_id, sandbox=self.id, args=args, pty=pty, started_at=now)
        # Locked, because gc() removes what is on no record
        with contextlib.ExitStack() as undo, self._store.locked(self.id, wait=wait):
            if self._store.get(self.id) is None:
                raise SandboxNotFound(f"sandbox {self.name} is not on record any more")
            undo.callback(home.remove, command_id, f"{command_id}.journal")
            journal = Journal.create(home.path / f"{command_id}.journal", keep)
            undo.callback(journal.close)
            later = home.bind(command_id)
            undo.callback(later.close)
            self._store.add(record)
            undo.pop_all()
        return self._command(record, journal), later

    def _command(self, record: CommandRecord, journal: Journal) -> DetachedCommand:
        home, name = self._store.home(self.id), record.id
        command = DetachedCommand(
            name, record.args, self._plan, journal, Door(home, name),
            pty=record.pty, started_at=record.started_at,
        )  # fmt: skip
        command._watch = self._watch_of(name)
        return command

    def _forget_command(self, command: DetachedCommand) -> None:
        command._forget()
        self._store.remove_command(command.id)
        self._store.home(self.id).remove(command.id, f"{command.id}.journal")

    def commands(self) -> list[DetachedCommand]:
        """The detached commands, oldest first, ended ones too, whoever started them."""
        found = []
        for record in self._store.commands(self.id):
            path = self._store.home(self.id).path / f"{record.id}.journal"
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                found.append(self._command(record, Journal.open(path)))
        return found
