"""The connection to the spawner: one per process and network kind, made on first use.

The spawner ends when this process does. After ``os.fork()`` a child drops the inherited connection
and starts its own; a spawner that died is replaced on the next run.
"""

import contextlib
import errno as E
import fcntl
import os
import select
import socket
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

from sandboxcore import _native
from sandboxcore.errors import UnsupportedHost
from sandboxcore.host import HELPER, REMEDIES, HostFeatures
from sandboxcore.plan import Plan
from sandboxcore.tree import IDMAP, Mount

PATIENCE = 30.0  # seconds for what is done at once


class Spawner:
    """One live connection and the plans that the other side was given."""

    def __init__(self, host: HostFeatures, *, host_network: bool) -> None:
        """Start the helper and tell it how it will make sandboxes."""
        program = os.environ.get("SANDBOXCORE_SPAWNER") or str(HELPER)
        diagnostics = 2 if os.environ.get("SANDBOXCORE_DIAGNOSTICS") else -1
        self.known: set[int] = set()
        self.groups: Any = None  # the Groups below it: sandboxcore.groups
        self.fd: Final = _native.spawner_start(program, diagnostics)
        # Closed when the last thread that may still send on it has let go: the number would be reused.
        self.close: Final = weakref.finalize(self, os.close, self.fd)
        self._introduce(host, host_network=host_network)

    def _introduce(self, host: HostFeatures, *, host_network: bool) -> None:
        flags = 0 if host_network else _native.constant("HELLO_NET_POOL")
        if host.mode != "root":
            flags |= _native.constant("HELLO_USERNS")
        if host.mode == "rootless":
            flags |= _native.constant("HELLO_SELF_MAP")
        try:
            self.pid = _native.spawner_hello(self.fd, "HELLO", flags)
            if host.mode == "subuid":
                self._map_ids(host)
                _native.spawner_hello(self.fd, "MAPPED", 0)
        except _native.NativeFailure as failure:
            if failure.stage == "userns":
                raise UnsupportedHost("user namespaces for this user", REMEDIES["user"]) from failure
            raise

    def _map_ids(self, host: HostFeatures) -> None:
        """newuidmap(1), newgidmap(1): once per spawner, never per sandbox."""
        for tool, own, extra in (
            ("newuidmap", host.uid, host.subuid),
            ("newgidmap", host.gid, host.subgid),
        ):
            if extra is None:
                raise AssertionError("mode subuid without a range")
            maps = ["0", str(own), "1", "1", str(extra[0]), str(extra[1])]
            done = subprocess.run([tool, str(self.pid), *maps], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedHost(f"{tool} {' '.join(maps)}", done.stderr.strip() or "check /etc/subuid")

    def teach(self, plan: Plan) -> None:
        """Have the plan's template built, unless it is there already."""
        if plan.id not in self.known:
            _native.spawner_plan(self.fd, plan.id, plan.data)
            self.known.add(plan.id)

    def ask(self, plan: Plan) -> socket.socket:
        """The same without waiting: READY or an error comes on this socket."""
        _native.check_plan(plan.data)
        memfd = -1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            memfd = os.memfd_create("sandboxcore", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            view = memoryview(plan.data)
            while view:
                view = view[os.write(memfd, view) :]
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, seals)
            _native.send(self.fd, "PLAN", fds=[theirs.fileno(), memfd], plan=plan.id)
        except OSError as error:
            ours.close()
            raise _native.NativeFailure.of("spawner", 14, error.errno or E.EIO) from error
        finally:
            theirs.close()
            if memfd >= 0:
                os.close(memfd)
        return ours

    def shelve(self, number: int, fd: int) -> None:
        """Keep a layer, a descriptor of it, under a number for sandboxes to come. Raises NativeFailure."""
        self._converse("SHELVE", number, [fd])

    def borrow(self, number: int) -> int:
        """A descriptor of a layer of the shelf, for one sandbox. Raises NativeFailure."""
        return self._converse("BORROW", number).fd

    def unshelve(self, number: int) -> None:
        """Keep it no longer; whoever has it keeps it. Without waiting."""
        with contextlib.suppress(_native.NativeFailure):
            self._say("UNSHELVE", number, []).close()

    def stream(self, kind: str, number: int, fd: int, flags: int) -> socket.socket:
        """PACK or UNPACK a layer to or from a pipe; the answer comes on this socket: :meth:`concluded`.
        Raises NativeFailure."""
        return self._say(kind, number, [fd], flags)

    def ask_mount(self, mount: Mount, there: int, fault: tuple[int, int]) -> socket.socket:
        """Ask for a bind's mount, attached nowhere, for :meth:`hear`. ``there``: a descriptor of what has to
        be its source. Raises NativeFailure."""
        maps = mount.id_maps or ("", "")
        source = os.fsencode(mount.source), maps[0].encode(), maps[1].encode()
        about = mount.attrs & ~IDMAP, mount.directory
        return self._ask(lambda answer: _native.send_mount(self.fd, source, about, [answer, there], fault))

    def _say(self, kind: str, number: int, fds: Sequence[int], flags: int = 0) -> socket.socket:
        return self._ask(
            lambda answer: _native.send(self.fd, kind, fds=[answer, *fds], plan=number, flags=flags)
        )

    def _ask(self, send: Callable[[int], None]) -> socket.socket:
        if not self.close.alive:  # the number of its descriptor may be another's: a fork's, of this process
            raise _native.NativeFailure.of("spawner", 14, E.EBADF)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                send(theirs.fileno())
        except OSError as error:
            ours.close()
            raise _native.NativeFailure.of("spawner", 14, error.errno or E.EIO) from error
        return ours

    def _converse(self, kind: str, number: int, fds: Sequence[int] = ()) -> _native.Record:
        with self._say(kind, number, fds) as answer:
            return self.concluded(answer)

    @classmethod
    def concluded(cls, answer: socket.socket) -> _native.Record:
        """Wait for an answer, and take it. Raises NativeFailure."""
        poller = select.poll()
        poller.register(answer, select.POLLIN)
        poller.poll(PATIENCE * 1000)
        return cls.hear(answer)

    @staticmethod
    def hear(answer: socket.socket) -> _native.Record:
        """The answer that has come. Raises NativeFailure, also where there is none."""
        try:
            record = _native.receive(answer.fileno())
        except OSError as error:
            raise _native.NativeFailure.of("spawner", 15, error.errno or E.EIO) from error
        if record is None:
            raise _native.NativeFailure.of("spawner", 15, E.EPIPE)
        if record.error:
            raise record.error
        return record


_lock = threading.Lock()
_spawners: dict[tuple[HostFeatures, bool], Spawner] = {}


def get_spawner(plan: Plan) -> Spawner:
    """The spawner for a plan's kind of network and this process's identity."""
    key = plan.host, plan.host_network
    with _lock:
        spawner = _spawners.get(key)
        if spawner is None:
            spawner = _spawners[key] = Spawner(plan.host, host_network=plan.host_network)
        return spawner


def drop_spawner(spawner: Spawner) -> None:
    """Forget a spawner that does not answer any more; its sandboxes live on until they are done."""
    with _lock:
        for key, known in list(_spawners.items()):
            if known is spawner:
                del _spawners[key]


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    for spawner in _spawners.values():
        spawner.close()
    _spawners.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
