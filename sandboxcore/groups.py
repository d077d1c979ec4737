"""Control groups for sandboxes: one for each run, used again and again, and one for each sandbox that stays.

What is slow about groups (making, removing, giving them controllers) is done ahead or afterwards, in a thread
of its own; a run takes one that is ready. :mod:`sandboxcore.cgroup` knows files, C (``csrc/group.c``) lets
processes be born there.
"""

import atexit
import contextlib
import dataclasses
import errno as E
import os
import queue
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandboxcore import _native, census, cgroup
from sandboxcore.cgroup_files import naming
from sandboxcore.cgroup_values import LIMITS
from sandboxcore.errors import SandboxError, SetupError, UnsupportedHost
from sandboxcore.plan import Plan
from sandboxcore.spawner import Spawner
from sandboxcore.spec import Limits

READY = 2  # groups for runs that are kept ahead once there was a demand
KEPT = 8  # and at most so many, for all kinds of limits together
LEFTOVER = 4 << 20  # bytes that an idle group may still hold (page cache) to be used again
PATIENCE = 5.0  # seconds for a group to become empty
AGAIN = 1.0  # seconds until what could not be removed is tried again
# What a sandbox that stays has for itself, init and launchers, on top of the limits of its commands; and what
# launchers use of a command's. csrc/group.c has the same for groups of launchers that begin.
OWN = {"pids": _native.constant("OWN_PIDS"), "memory": _native.constant("OWN_MEMORY")}
_LAUNCHERS = {"pids": 1}
INIT = {"pids": 1}  # of a fresh sandbox
SLOTS = {"memory": "SLOTS_MEMORY", "pids": "SLOTS_PIDS", "cpuacct": "SLOTS_CPUACCT", "blkio": "SLOTS_BLKIO"}

Kind = tuple[tuple[str, ...], Limits]  # of runs: controllers and limits
Entrance = tuple[str, int]  # a name of enum sbx_group_use, and a descriptor


def _watch_memory(directory: int) -> int:
    """An eventfd that fires when memory runs out: cgroup-v1/memory.rst, 10."""
    with naming("memory.oom_control"), contextlib.ExitStack() as stack:
        event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, event)
        control = os.open("memory.oom_control", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        stack.callback(os.close, control)
        register = os.open("cgroup.event_control", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        stack.callback(os.close, register)
        os.write(register, f"{event} {control}".encode())
        return os.dup(event)


class RunGroup:
    """The group of a fresh sandbox: one run after the other."""

    def __init__(self, group: cgroup.Group, limits: Limits) -> None:
        self.group = group
        self._opened = cgroup.Directories()
        self._event = -1
        self.gauge = _native.Gauge({})
        self.watch = _native.Watch(self.gauge, -1)
        try:
            group.limit(_with(limits, INIT), whole=True)
            opened = self._opened = group.directories()
            gauges = {} if opened.v2 is None else {"SLOTS": opened.v2}
            gauges |= {SLOTS[name]: fd for name, fd in opened.v1.items() if name in SLOTS}
            with naming(f"the counters of {group.relative}"):
                self.gauge = _native.Gauge(gauges)
            if "memory" in opened.v1:
                self._event = _watch_memory(opened.v1["memory"])
            self.watch = _native.Watch(self.gauge, self._event)
        except BaseException:
            self._release()
            self.gauge.close()
            remove_later(group)
            raise
        born = [] if opened.v2 is None else [("BORN", opened.v2)]
        self._entrances = [*born, *(("MOVE", fd) for fd in opened.procs.values())]

    @property
    def uses(self) -> list[str]:
        """What the request says about :attr:`fds`."""
        return [use for use, _ in self._entrances]

    @property
    def fds(self) -> list[int]:
        """What the spawner and init need of the group."""
        return [fd for _, fd in self._entrances]

    def _release(self) -> None:
        self._opened.close()
        if self._event >= 0:
            os.close(self._event)
            self._event = -1

    def close(self) -> None:
        """Remove it, when the last of its processes is gone."""
        self._release()
        self.gauge.close()
        _remove(self.group)


class SandboxGroup:
    """The group of a sandbox that stays, in which its init makes one for each launcher."""

    def __init__(self, group: cgroup.Group, limits: Limits, *, nested: bool) -> None:
        """``nested``: version 2 counts; else each launcher gets groups of version 1 only."""
        self.group, self._nested = group, nested
        # Version 1 throttles each group by itself, without those below: then commands have none of their own.
        self._slots = {name: use for name, use in SLOTS.items() if name != "blkio" or limits.io is None}
        try:
            group.limit(_with(limits, OWN), whole=False)
            group.prepare()
        except BaseException:
            remove_later(group)
            raise

    @contextlib.contextmanager
    def entrances(self) -> Iterator[list[Entrance]]:
        """What the spawner and init need of it: uses and descriptors, which are closed afterwards."""
        with self.group.directories("init") as opened, contextlib.ExitStack() as stack:
            found = [] if opened.v2 is None else [("BORN", opened.v2)]
            if self._nested and self.group.v2 is not None:
                with naming(f"opening {self.group.v2}"):
                    parent = os.open(self.group.v2, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, parent)
                found.append(("SLOTS", parent))
            found += [("MOVE", fd) for fd in opened.procs.values()]
            found += [(self._slots[name], fd) for name, fd in opened.v1.items() if name in self._slots]
            yield found


def _with(limits: Limits, own: Mapping[str, int]) -> Limits:
    """With room for what belongs to the sandbox and not to its commands."""
    return dataclasses.replace(limits, **_more({name: getattr(limits, name) for name in own}, own))


def _more(values: Mapping[str, Any], by: Mapping[str, int], sign: int = 1) -> dict[str, Any]:
    return {
        name: value + sign * by[name] if name in by and value is not None else value
        for name, value in values.items()
    }


def limits_of(group: cgroup.Group) -> dict[str, Any]:
    """What the commands of a sandbox that stays may use, as the kernel has it."""
    return _more(group.limits(), OWN, -1)


def change_limits(group: cgroup.Group, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Change limits of a sandbox that stays, of its group and of those of its launchers: all, or none.

    Values as :class:`Limits` has them. Returns what is in force. Raises as :meth:`cgroup.Group.change`.
    """
    before = limits_of(group)
    for name in changes:
        if LIMITS[name] in group.controllers and name not in before:
            raise UnsupportedHost(f"limits.{name} of a running sandbox", cgroup.layout().remedies[name])
    try:
        # Launchers first: what is killed because less is allowed now is a command. Then those born meanwhile.
        _change_launchers(group, changes)
        in_force = _more(group.change(_more(changes, OWN)), OWN, -1)
        _change_launchers(group, changes)
    except BaseException:
        old = {name: before[name] for name in changes if name in before}
        with contextlib.suppress(SandboxError):
            group.change(_more(old, OWN))
            _change_launchers(group, old)
        raise
    return in_force


def _change_launchers(group: cgroup.Group, changes: Mapping[str, Any]) -> None:
    for leaf in group.launchers():
        # Version 1 knows memory and swap as one. The other limits are on the whole only.
        names = {"memory", "pids", "swap"} if "memory" in leaf.v1 else {"memory", "pids"}
        wanted = _more({name: value for name, value in changes.items() if name in names}, _LAUNCHERS)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if leaf.limits() != leaf.limits() | wanted:
                    leaf.change(wanted)
                break
            except SetupError as error:
                if error.errno not in (E.ENOENT, E.ENODEV) or time.monotonic() > deadline:
                    raise
            if not any(place.is_dir() for place in leaf.places()):  # its launcher has ended
                break
            time.sleep(0.001)  # or is on its way


class Groups:
    """All groups below one spawner."""

    def __init__(self, connection: Spawner) -> None:
        self.connection = connection
        self._lock = threading.Lock()
        self._idle: dict[Kind, list[RunGroup]] = {}
        self._number = 0
        self._retired = False
        self._entering = threading.Lock()
        layout = cgroup.layout()
        self._nested = 2 in layout.versions.values()
        self.base = cgroup.Base(layout)
        try:
            if self._nested and layout.v2 is not None:  # while it has no controllers for its children:
                self._make_root(connection, layout.v2 / self.base.relative)
        except BaseException:
            self.base.remove()
            raise

    @staticmethod
    def _make_root(connection: Spawner, directory: Path) -> None:
        """The root of what sandboxes that stay see of groups: cgroup_namespaces(7)."""
        with naming(f"opening {directory}"):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with ours:
                with theirs:
                    _native.send(connection.fd, "CGROUP", fds=[theirs.fileno(), fd])
                poller = select.poll()
                poller.register(ours, select.POLLIN)
                if not poller.poll(PATIENCE * 1000):
                    raise _native.NativeFailure.of("cgroup", 26, E.ETIME)
                record = _native.receive(ours.fileno())
        finally:
            os.close(fd)
        if record is None:
            raise _native.NativeFailure.of("spawner", 16, E.EPIPE)
        if record.error:
            raise record.error

    def _make(self, name: str, controllers: Sequence[str]) -> cgroup.Group:
        with self._entering:  # nobody is born there before the spawner is there itself
            if set(controllers) - set(self.base.controllers):
                self.base.enable(controllers)
                self.base.adopt(self.connection.pid)
        return self.base.group(name, controllers)

    def _run_group(self, plan: Plan) -> RunGroup:
        with self._lock:
            self._number += 1
            name = f"run-{self._number}"
        return RunGroup(self._make(name, plan.controllers), plan.group_limits)

    def lease(self, plan: Plan) -> RunGroup:
        """A group for one run; give it back afterwards."""
        key = plan.controllers, plan.group_limits
        with self._lock:
            idle = self._idle.setdefault(key, [])
            group = idle.pop() if idle else None
        if group is None:
            group = self._run_group(plan)
        group.watch.begin(plan.spec.limits.cpu_time)
        return group

    def give_back(self, plan: Plan, group: RunGroup, *, clean: bool) -> None:
        """After a run: to be used again, if that would find it as good as new, or to be removed and replaced
        in the background. ``clean``: nothing of the run is left in it."""
        key = plan.controllers, plan.group_limits
        if clean and not group.gauge.worn(LEFTOVER) and self._keep(key, group):
            return
        _later(group.close)
        _later(lambda: self._refill(plan))

    def _refill(self, plan: Plan) -> None:
        key = plan.controllers, plan.group_limits
        while True:
            with self._lock:
                if self._retired or len(self._idle.get(key, ())) >= READY:
                    return
            group = self._run_group(plan)
            if not self._keep(key, group):
                group.close()

    def _keep(self, key: Kind, group: RunGroup) -> bool:
        """Have it ready; False if none is wanted any more."""
        with self._lock:
            if not self._retired:
                self._idle.setdefault(key, []).append(group)
                self._evict(key)
            return not self._retired

    def _evict(self, used: Kind) -> None:
        """Keep a bounded number for all kinds of limits together; those not used for longest go first. Each
        has some ten descriptors. The caller holds the lock."""
        self._idle[used] = self._idle.pop(used)
        while sum(map(len, self._idle.values())) > KEPT:
            oldest = next(groups for groups in self._idle.values() if groups)
            _later(oldest.pop(0).close)

    def sandbox(self, plan: Plan, name: str, *, persistent: bool) -> SandboxGroup:
        """A group for a living sandbox."""
        with self._lock:
            self._number += 1
            name = f"{name}.{self._number}{cgroup.STAYS if persistent else ''}"  # a new one for each start
        return SandboxGroup(self._make(name, plan.controllers), plan.group_limits, nested=self._nested)

    def retire(self) -> None:
        """Keep no group ready any more."""
        with self._lock:
            self._retired = True
            idle, self._idle = [group for groups in self._idle.values() for group in groups], {}
        for group in idle:
            group.close()

    def close(self) -> None:
        """Remove what nobody is in."""
        self.retire()
        self.base.remove()


def counted(done: _native.NativeResult, group: RunGroup) -> _native.NativeResult:
    """The result with what the run's group has counted."""
    done.counts = group.gauge.end()
    if done.applied:
        done.group_limits = _more(group.group.limits(), INIT, -1)
    done.out_of_memory |= bool(done.counts and done.counts.get("oom_kills"))
    return done


def host_limits(limits: Limits | None = None, *, max_sandboxes: int | None = None) -> dict[str, Any]:
    """Limit all sandboxes of this user together.

    limits: of the control group that all of their groups are in, for every process that uses the same one;
        what is None is lifted (``pids``: where it has its default), and default None leaves them alone.
    max_sandboxes: how many there may be at once, in all processes of the user, those of :func:`run` included;
        counted where this process makes one (the same can be said by SANDBOXCORE_MAX_SANDBOXES). One more
        raises :class:`TooManySandboxes`. None: what the environment says.

    Returns the group's limits as the kernel has them. Raises :class:`UnsupportedHost`, :class:`SpecError`.
    """
    census.set_maximum(max_sandboxes)
    if limits is None:
        return {}
    if limits.pids == Limits().pids:
        limits = dataclasses.replace(limits, pids=None)
    return cgroup.host_limits(limits)


# --- one for each spawner, and the thread that tidies up ----------------------------------------------

_lock = threading.Lock()
_making = threading.Lock()
_all: "weakref.WeakSet[Groups]" = weakref.WeakSet()
_bases: list[cgroup.Base] = []  # of spawners that are gone: sandboxes may live on there
_work: "queue.SimpleQueue[Callable[[], object]]" = queue.SimpleQueue()
_worker: threading.Thread | None = None
_ending = False
_left: list[cgroup.Group] = []  # that could not be removed yet
_ours: dict[str, cgroup.Group] = {}  # of sandboxes that end with this process


def groups_of(connection: Spawner) -> Groups:
    """The groups below a spawner, made on first use."""
    with _making:
        if connection.groups is None:
            connection.groups = Groups(connection)
            _all.add(connection.groups)
            _later(cgroup.collect)
        found: Groups = connection.groups
        return found


def let_go(connection: Spawner) -> None:
    """There will be another spawner instead of this one: what is ready for runs below it is of no use."""
    if isinstance(connection.groups, Groups):
        _bases.append(connection.groups.base)
        _later(connection.groups.retire)


def _later(task: Callable[[], object]) -> None:
    global _worker
    if _ending:  # no thread starts any more
        with contextlib.suppress(Exception):
            task()
        return
    with _lock:
        _work.put(task)
        if _worker is None or not _worker.is_alive():
            _worker = threading.Thread(target=_tidy, name="sandboxcore-groups", daemon=True)
            _worker.start()


def _tidy() -> None:
    while True:
        task: Callable[[], object] = _remove_left
        with contextlib.suppress(queue.Empty):
            task = _work.get(timeout=AGAIN if _left else None)
        with contextlib.suppress(Exception):  # what could not be removed is collected another time
            task()


def ends_with_us(group: cgroup.Group) -> None:
    """Whoever does not close the sandbox leaves no group behind, either."""
    _ours[group.relative] = group


def remove_later(group: cgroup.Group) -> None:
    """Remove a sandbox's group, when its last process is gone, without waiting for that."""
    _ours.pop(group.relative, None)
    _later(lambda: _remove(group))


def _remove(group: cgroup.Group) -> None:
    """What cannot be removed just now, as for want of a descriptor, is tried again."""
    _remove_left((group, PATIENCE))
    if f"/host-{os.getpid()}-" not in group.relative:  # who made it may be gone: then so is what it is below
        cgroup.collect()


def _remove_left(*more: tuple[cgroup.Group, float]) -> None:
    older, _left[:] = list(_left), []
    for each, patience in [*((each, 0.0) for each in older), *more]:
        gone = False
        with contextlib.suppress(OSError, SandboxError):
            gone = each.remove(patience)
        if not gone:
            _left.append(each)


@contextlib.contextmanager
def leased(plan: Plan, connection: Spawner) -> Iterator[RunGroup]:
    """The group of one run."""
    groups = groups_of(connection)
    group = groups.lease(plan)
    clean = False
    try:
        yield group
        clean = True
    finally:
        groups.give_back(plan, group, clean=clean)


def _at_exit() -> None:
    global _ending
    _ending = True
    if _worker is not None and _worker.is_alive():  # in the middle of something, perhaps
        done = threading.Event()
        _work.put(done.set)
        done.wait(PATIENCE)
    for group in list(_ours.values()):
        with contextlib.suppress(SetupError):
            group.kill()
            remove_later(group)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            task = _work.get_nowait()
        except queue.Empty:
            break
        with contextlib.suppress(Exception):
            task()
    for groups in list(_all):
        groups.connection.close()  # the spawner is in one of them
        with contextlib.suppress(Exception):
            groups.close()
    for base in _bases:
        with contextlib.suppress(Exception):
            base.remove()


def _after_fork_in_child() -> None:
    global _lock, _making, _work, _worker
    _lock, _making, _work, _worker = threading.Lock(), threading.Lock(), queue.SimpleQueue(), None
    _all.clear()
    _bases.clear()
    _left.clear()
    _ours.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
