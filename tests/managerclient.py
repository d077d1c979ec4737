"""A manager in a process of its own, which does what it is told line by line: see
tests/system/test_manager_model.py."""

import json
import sys
from typing import Any

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

    def serve(self) -> None:
        print("ready", flush=True)
        for line in sys.stdin:
            name, *args = json.loads(line)
            try:
                answer = {"done": getattr(self, name)(*args)}
            except SandboxError as error:
                answer = {"error": type(error).__name__, "text": str(error)}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    Server(sys.argv[1]).serve()
