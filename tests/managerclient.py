"""Managers in processes of their own, which do what they are told line by line: see
tests/system/test_manager_model.py. They are forked, for speed, by one that has imported everything and used
nothing."""

import json
import os
import signal
import socket
import sys
from typing import IO, Any

from sandboxcore import SandboxError, SandboxManager, SandboxSession

MARK = "/tmp/mark"


class Server:
    """Its methods are the commands; each takes and gives plain data."""

    def __init__(self, state: str) -> None:
        self.manager = SandboxManager(state, sweep_interval=None, max_sandboxes=50)

    def _session(self, key: str) -> SandboxSession:
        found = self.manager.get_session(key)
        assert found is not None, key
        return found

    def acquire(self, client: str) -> list[str]:
        session = self.manager.acquire(client_id=client)
        return [session.id, session.sandbox_id]

    def attach(self, sandbox: str, client: str) -> list[str]:
        session = self.manager.attach(sandbox, client).session
        return [session.id, session.sandbox_id]

    def detach(self, key: str) -> None:
        self._session(key).detach()

    def suspend(self, key: str) -> None:
        self._session(key).suspend()

    def resume(self, key: str) -> None:
        self._session(key).resume()

    def release(self, key: str) -> None:
        self._session(key).release()

    def terminate(self, key: str) -> None:
        self._session(key).terminate()

    def stop(self, sandbox: str) -> None:
        self.manager.find(sandbox).stop()

    def mark(self, sandbox: str, text: str) -> None:
        self.manager.find(sandbox).files.write(MARK, text.encode())

    def reconcile(self) -> list[str]:
        return [action.error for action in self.manager.reconcile().actions if action.error]

    def look(self) -> dict[str, Any]:
        """Everything there is: sessions, and sandboxes with their marks, as the sandboxes themselves say."""
        sessions = {
            one.id: [one.sandbox_id, one.client_id, one.state] for one in self.manager.list_sessions()
        }
        sandboxes = {}
        for record in self.manager.list_sandboxes():
            sandbox = self.manager.find(record.id)
            state, mark = sandbox.state.value, None
            if state == "running":
                done = sandbox.exec(["cat", MARK], timeout=20)
                mark = done.stdout.decode() if done.returncode == 0 else ""
            sandboxes[record.id] = [state, mark]
        return {"sessions": sessions, "sandboxes": sandboxes, "damaged": self.manager.damaged()}

    def serve(self, lines: IO[str]) -> None:
        """Until nobody listens any more."""
        for line in lines:
            name, *args = json.loads(line)
            try:
                answer = {"done": getattr(self, name)(*args)}
            except SandboxError as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            lines.write(json.dumps(answer) + "\n")
            lines.flush()


def accept(listener: socket.socket) -> None:
    """A process for each who connects and says which state directory it is."""
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with connection.makefile("rw") as lines:
            server = Server(lines.readline().strip())
            print(os.getpid(), file=lines, flush=True)
            server.serve(lines)
        os._exit(0)


def main(path: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reaped by the kernel
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        accept(listener)


if __name__ == "__main__":
    main(sys.argv[1])
