"""The way to a living sandbox: how one is asked for, and what its owner holds of it."""

import contextlib
import errno as E
import json
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Self

from sandboxcore import _native, cgroup, request
from sandboxcore.census import take_place
from sandboxcore.errors import SandboxError
from sandboxcore.groups import ends_with_us, groups_of, limits_of, remove_later
from sandboxcore.identity import boot_id, start_ticks
from sandboxcore.plan import Plan
from sandboxcore.request import sandbox_request
from sandboxcore.room import Room
from sandboxcore.spawner import Spawner
from sandboxcore.spec import Limits
from sandboxcore.statedir import close_lock
from sandboxcore.volumes import in_use

START_PATIENCE = 30.0  # seconds for a sandbox, or a program in it, to start
ANSWER_PATIENCE = 5.0  # seconds for init to do what it was told


class Home:
    """The directory of a persistent sandbox: the names of its sockets, the journals of its commands."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def bind(self, name: str) -> socket.socket:
        """A new socket under a name that is free."""
        return self._socket(name, socket.socket.bind)

    def connect(self, name: str) -> socket.socket:
        """A socket that sends to a name. Raises ConnectionRefusedError, FileNotFoundError."""
        return self._socket(name, socket.socket.connect)

    def _socket(self, name: str, use: Callable[[socket.socket, str], None]) -> socket.socket:
        """By a short address, whatever the directory's name: unix(7) has room for 107 bytes."""
        directory = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, directory)
            with contextlib.ExitStack() as failed:
                sock = failed.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                use(sock, f"/proc/self/fd/{directory}/{name}")
                failed.pop_all()
        return sock

    def pause(self, *, new: bool = False) -> _native.Pause:
        """The page that tells how long it was suspended."""
        with self.open_pause(new=new) as file:
            return _native.Pause(file.fileno())

    def open_pause(self, *, new: bool = False) -> IO[bytes]:
        """Its file; a sandbox that starts gets a new one."""
        path = self.path / "pause"
        if new:
            path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if new else 0)
        file = os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0)
        if new:
            file.truncate(_native.Pause.SIZE)
        return file

    @property
    def group(self) -> cgroup.Group | None:
        """The control group that the sandbox of this directory was started in."""
        try:
            data = json.loads((self.path / "group").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cgroup.Group.from_dict(data)

    @group.setter
    def group(self, group: cgroup.Group | None) -> None:
        if group is None:
            self.remove("group")
        else:
            self.remove("group")
            fd = os.open(self.path / "group", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                file.write(json.dumps(group.to_dict()))

    def end(self) -> None:
        """Tell whoever listens here as init to end."""
        with contextlib.suppress(OSError), self.connect("keeper") as keeper:
            _native.send(keeper.fileno(), "END")

    def remove(self, *names: str) -> None:
        """Remove files of it, those that exist."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)


class Link:
    """The way to a running sandbox: init's pidfd and the two sockets, of init and of the launchers.

    Whoever uses a descriptor does so in a ``with`` statement: another thread may close the sandbox meanwhile,
    and the number would soon be somebody else's.
    """

    def __init__(
        self,
        keeper: socket.socket,
        work: socket.socket,
        pidfd: int,
        answer: socket.socket | None = None,
        *,
        pause: _native.Pause | None = None,
        group: cgroup.Group | None = None,
    ) -> None:
        self.keeper, self.work, self.pidfd = keeper, work, pidfd
        self.pause, self.group = pause, group
        self.moments: tuple[int, ...] = ()  # of its birth: lifecycle.create_timings
        self._oom_kills = 0  # that are known
        self._answer = answer
        self._guard = threading.Lock()
        self._users, self._closed = 0, False
        # A sandbox that takes nothing, because it is stopped from outside, must not hold its caller for ever.
        patience = struct.pack("ll", int(ANSWER_PATIENCE), 0)
        work.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)

    def __enter__(self) -> Self:
        """Keep the descriptors. Raises NativeFailure when they are closed already."""
        with self._guard:
            if self._closed:
                raise _native.NativeFailure.of("launcher", 12, E.EPIPE)
            self._users += 1
            return self

    def __exit__(self, *exc: object) -> None:
        with self._guard:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            self._release()

    @staticmethod
    def _is_here(home: Home, boot: str) -> bool:
        """Whether the numbers of processes on record are those of this boot. Raises SandboxError where they
        are of another pid namespace."""
        here = boot_id()
        if boot.split()[:1] == here.split()[:1] and boot != here:
            raise SandboxError(
                f"{home.path}: belongs to another pid namespace, perhaps of a container: use it there"
            )
        return boot == here

    @classmethod
    def _pidfd(cls, home: Home, pid: int, ticks: int, boot: str) -> int:
        """That of a process on record, or -1 if that is gone. Raises SandboxError, OSError."""
        if not cls._is_here(home, boot) or not pid:
            return -1
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno not in (E.ESRCH, E.EINVAL, E.ENOENT):
                raise
            return -1  # gone; or the number is a thread's now
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, pidfd)
            if start_ticks(pid) != ticks or _poll(pidfd, 0):
                return -1  # the number is somebody else's now
            undo.pop_all()
        return pidfd

    @classmethod
    def runs(cls, home: Home, pid: int, ticks: int, boot: str) -> bool:
        """Whether that process is there, without a way to it. Raises what :meth:`reopen` does."""
        pidfd = cls._pidfd(home, pid, ticks, boot)
        if pidfd >= 0:
            os.close(pidfd)
        return pidfd >= 0

    @classmethod
    def reopen(cls, home: Home, pid: int, ticks: int, boot: str) -> Self | None:
        """The way to a persistent sandbox that was on record as this process; None if that is gone."""
        pidfd = cls._pidfd(home, pid, ticks, boot)
        if pidfd < 0:
            return None
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, pidfd)
            try:
                keeper = undo.enter_context(home.connect("keeper"))
                work = undo.enter_context(home.connect("work"))
                pause = home.pause()
            except (ConnectionRefusedError, FileNotFoundError):
                return None  # it has ended just now
            link = cls(keeper, work, pidfd, pause=pause, group=home.group)
            undo.pop_all()
        link._oom_kills = link._count_oom_kills()
        return link

    def stay(self) -> None:
        """A persistent sandbox is on record now: from here on it does not end with this process."""
        if self._answer is not None:
            with self._answer:
                _native.send(self._answer.fileno(), "STAY")
            self._answer = None

    def alive(self, *, patience: float = 0) -> bool:
        """Whether init still runs, ``patience`` seconds from now at the latest."""
        return self.pidfd >= 0 and not _poll(self.pidfd, patience)

    def explain(self, done: _native.NativeResult) -> None:
        """Say of a result that memory ran out where that took the launcher, too, which would have said so:
        the kernel, in need of another victim, found no larger one. What counts is a lack of memory since a
        command of this handle last met one."""
        lacked = done.out_of_memory or (done.counts or {}).get("oom_kills")
        if self.group is None or not (done.lost or lacked):
            return
        with self._guard:
            known, self._oom_kills = self._oom_kills, self._count_oom_kills()
            done.out_of_memory |= done.lost and not done.timed_out and self._oom_kills > known

    def limits_now(self, limits: Limits, done: _native.NativeResult) -> Limits:
        """A command's limits, as somebody may have changed them since it was started: where they matter."""
        met = done.out_of_memory or (done.counts or {}).get("pids_refused")
        if self.group is not None and met:
            with contextlib.suppress(SandboxError):
                now = limits_of(self.group)
                return replace(limits, **{name: now[name] for name in ("memory", "pids") if name in now})
        return limits

    def _count_oom_kills(self) -> int:
        """In all of the sandbox so far."""
        with contextlib.suppress(SandboxError):
            if self.group is not None:
                return self.group.usage().oom_kills or 0
        return 0

    def freeze(self) -> None:
        """Stop everything in it, and the clocks of its limits. Raises SetupError, TimeoutError, OSError."""
        if self.pause is not None:
            self.pause.begin()
        try:
            if not self._freezes():
                self.tell_init(signal.SIGSTOP)
            elif self.group is not None:
                self.group.freeze(ANSWER_PATIENCE)
        except BaseException:
            if self.pause is not None:
                self.pause.end()
            raise

    def thaw(self) -> None:
        """Let it go on. Raises SetupError, TimeoutError, OSError."""
        if self.pause is not None:
            self.pause.end()
        if not self._freezes():
            self.tell_init(signal.SIGCONT)
        elif self.group is not None:
            self.group.thaw(ANSWER_PATIENCE)

    def _freezes(self) -> bool:
        """Whether there is a freezer; else every process is stopped by a signal."""
        return self.group is not None and self.group.freezable

    def change_layers(self, order: _native.LayersOrder) -> int:
        """Have init make the overlays anew. Returns the layer that was sealed, a descriptor, or -1. Raises
        NativeFailure, OSError. Whoever is interrupted here cannot know what the sandbox has now: it ends."""
        with self.ask_layers(order) as answer, contextlib.ExitStack() as lost:
            lost.callback(self._put_down)
            record = self._hear(answer, START_PATIENCE)
            if not record.status:
                lost.pop_all()
        if record.error:
            raise record.error
        return record.fd

    def ask_layers(self, order: _native.LayersOrder) -> socket.socket:
        """The same without waiting, for :meth:`hear_layer`. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self:
                _native.send_layers(self.keeper, theirs.fileno(), order, request.FAULT)
        except BaseException:
            ours.close()
            raise
        return ours

    def ask_bind(self, number: int, target: str | None, fd: int = -1, *, lazy: bool = False) -> socket.socket:
        """Have init attach a mount, or with no target take away that of a number; for :meth:`hear_bind`.
        Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = None if target is None else os.fsencode(target)
        fds = [theirs.fileno(), *([] if fd < 0 else [fd])]
        try:
            with theirs, self:
                _native.send_bind(self.keeper, number, path, fds, request.FAULT, lazy=lazy)
        except BaseException:
            ours.close()
            raise
        return ours

    @classmethod
    def hear_bind(cls, answer: socket.socket) -> None:
        """Take the answer that has come. Raises NativeFailure, TimeoutError."""
        if not _poll(answer.fileno(), 0):
            raise TimeoutError(f"init does not answer within {ANSWER_PATIENCE} s")
        if (record := cls._hear(answer, 0)).error:
            raise record.error

    @classmethod
    def hear_layer(cls, answer: socket.socket, patience: float) -> int:
        """Wait at most so many seconds for a copy, a descriptor. Raises NativeFailure, TimeoutError."""
        record = cls._hear(answer, patience)
        if record.error:
            raise record.error
        return record.fd

    def _put_down(self) -> None:
        """Kill init, which cannot go on, and wait until whoever looks finds it gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        _poll(self.pidfd, ANSWER_PATIENCE)

    @staticmethod
    def _hear(answer: socket.socket, patience: float) -> _native.Record:
        if not _poll(answer.fileno(), patience):
            raise TimeoutError(f"init does not answer within {patience} s")
        record = _native.receive(answer.fileno())
        if record is None:
            raise _native.NativeFailure.of("launcher", 12, E.EPIPE)
        return record

    def tell_init(self, number: int) -> None:
        """Have init send a signal to every command. Raises TimeoutError, OSError."""
        with self.ask_init(number) as answer:
            if not _poll(answer.fileno(), ANSWER_PATIENCE):
                raise TimeoutError(f"init does not answer within {ANSWER_PATIENCE} s")
            self.hear_init(answer)

    def ask_init(self, number: int) -> socket.socket:
        """The same without waiting: the answer comes on this socket, for :meth:`hear_init`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs, self:
                _native.send(self.keeper.fileno(), "SIGNAL", fds=[theirs.fileno()], signal=number)
        except BaseException:
            ours.close()
            raise
        return ours

    @staticmethod
    def hear_init(answer: socket.socket) -> None:
        """Take init's answer. Raises OSError if it was not done."""
        record = _native.receive(answer.fileno())
        if record is None or record.error:
            code = record.error.errno if record and record.error else E.EPIPE
            raise OSError(code, os.strerror(code))

    def kill(self, *, wait: float) -> None:
        """End init and with it everything. Idempotent."""
        if self.pidfd >= 0 and not self._closed:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            if self.group is not None:
                with contextlib.suppress(SandboxError):
                    self.group.kill()  # the second way
            if wait and not _poll(self.pidfd, wait):
                raise TimeoutError("a process in uninterruptible sleep cannot be killed yet")
        self.close()

    def end(self, *, wait: float) -> None:
        """:meth:`kill`, and then the control group goes, too."""
        try:
            self.kill(wait=wait)
        finally:
            if self.group is not None:
                remove_later(self.group)

    def close(self) -> None:
        """Let go of the descriptors. A sandbox that is not persistent ends by that. Idempotent."""
        with self._guard:
            first, self._closed = not self._closed, True
            last = first and not self._users
        if last:
            self._release()

    def _release(self) -> None:
        self.pause = None  # it keeps a descriptor, and we may be kept by a traceback
        if self._answer is not None:
            self._answer.close()
        self.keeper.close()
        self.work.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _poll(fd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def _anonymous_pause() -> IO[bytes]:
    file = os.fdopen(os.memfd_create("sandboxcore-pause", os.MFD_CLOEXEC), "r+b", buffering=0)
    file.truncate(_native.Pause.SIZE)
    return file


class Birth:
    """A sandbox on its way: the request is sent, the answer may be waited for in any manner."""

    def __init__(
        self,
        answer: socket.socket,
        keeper: socket.socket,
        work: socket.socket,
        *,
        stays: bool,
        pause: _native.Pause | None,
        group: cgroup.Group | None,
    ) -> None:
        self.answer, self.keeper, self.work, self.stays = answer, keeper, work, stays
        self.pause, self.group = pause, group
        self.pidfd = -1
        self.moments: list[int] = []  # when a phase was over: group, spawn, setup; begins with its beginning

    @classmethod
    def send(
        cls,
        plan: Plan,
        connection: Spawner,
        name: str,
        home: Home | None = None,
        *,
        layers: Sequence[int] = (),
        room: Room | None = None,
    ) -> Self:
        """Ask a spawner for a sandbox; with ``home``, a persistent one. ``name``: of its control group, if it
        needs one. ``layers``: what it begins with, the topmost first, by their numbers on the shelf.
        ``room``: where it takes a place. Raises NativeFailure, SetupError, TooManySandboxes, OSError."""
        group, began = None, time.monotonic_ns()
        try:
            with contextlib.ExitStack() as stack:
                found: list[tuple[str, int]] = []
                places = []
                for take in (take_place, *(() if room is None else (room.take,))):
                    if (place := take()) >= 0:
                        stack.callback(close_lock, place)
                        places.append(place)
                if plan.controllers:
                    made = groups_of(connection).sandbox(plan, name, persistent=home is not None)
                    group = made.group
                    found = stack.enter_context(made.entrances())
                    if home is None:
                        ends_with_us(group)
                if home is not None:
                    home.group = group
                held = stack.enter_context(in_use(plan.volumes, name))
                found = [*found, *(("HOLD", fd) for fd in (*places, *held))]
                ready = time.monotonic_ns()
                birth = cls._send(plan, connection, home, found, group, layers=layers)
                birth.moments = [began, ready]
                return birth
        except BaseException:
            if group is not None:
                remove_later(group)
            raise

    @classmethod
    def _send(
        cls,
        plan: Plan,
        connection: Spawner,
        home: Home | None,
        entrances: list[tuple[str, int]],
        group: cgroup.Group | None,
        *,
        layers: Sequence[int],
    ) -> Self:
        ours: list[socket.socket] = []
        theirs: list[socket.socket] = []
        try:
            for name in ("answer", "keeper", "work"):
                if home and name != "answer":
                    home.remove(name)
                    theirs.append(home.bind(name))
                    ours.append(home.connect(name))
                else:
                    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    ours.append(pair[0])
                    theirs.append(pair[1])
            uses, groups = [use for use, _ in entrances], [fd for _, fd in entrances]
            message = sandbox_request(plan, persistent=home is not None, groups=uses, layers=layers)
            with home.open_pause(new=True) if home else _anonymous_pause() as page:
                pause = _native.Pause(page.fileno())
                fds = [*(sock.fileno() for sock in theirs), page.fileno(), *groups]
                _native.send(connection.fd, "RUN", message, fds)
        except BaseException:
            for sock in ours:
                sock.close()
            raise
        finally:
            for sock in theirs:
                sock.close()
        return cls(*ours, stays=home is not None, pause=pause, group=group)

    def hear(self) -> Link | None:
        """Take one record; the link when the sandbox stands. Raises BlockingIOError, NativeFailure."""
        try:
            record = _native.receive(self.answer.fileno())
        except ConnectionResetError:
            record = None
        if record is None:
            raise _native.NativeFailure.of("spawner" if self.pidfd < 0 else "init", 15, E.EPIPE)
        if record.error:
            raise record.error
        if record.kind == "PIDFD":
            self.pidfd = record.fd
            self.moments.append(time.monotonic_ns())
        if record.kind != "READY":
            return None
        self.moments.append(time.monotonic_ns())
        if not self.stays:
            self.answer.close()
        answer = self.answer if self.stays else None
        link = Link(self.keeper, self.work, self.pidfd, answer, pause=self.pause, group=self.group)
        self.pidfd = -1
        link.moments = tuple(self.moments)
        return link

    def abandon(self) -> None:
        """Give up: whatever there is of it dies."""
        self.pause = None  # it keeps a descriptor, and we may be kept by a traceback
        self.answer.close()
        Link(self.keeper, self.work, self.pidfd, group=self.group).end(wait=0)

    def wait(self, patience: float = START_PATIENCE) -> Link:
        """Block until it stands. Raises NativeFailure, SandboxTimeout."""
        deadline = time.monotonic() + patience
        try:
            while True:
                if not _poll(self.answer.fileno(), max(0.0, deadline - time.monotonic())):
                    raise _native.NativeFailure.of("init", 20, E.ETIME)
                with contextlib.suppress(BlockingIOError):
                    if link := self.hear():
                        return link
        except BaseException:
            self.abandon()
            raise
