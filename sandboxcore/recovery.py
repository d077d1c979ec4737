"""What is on record, set right by what is really there: :func:`list_sandboxes`, :func:`gc`."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping

from sandboxcore import cgroup
from sandboxcore.commit import finish_all
from sandboxcore.errors import SandboxError, SetupError
from sandboxcore.groups import remove_later
from sandboxcore.identity import lives
from sandboxcore.layerstore import collecting
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import Home, Link
from sandboxcore.records import SandboxRecord
from sandboxcore.saved import SnapshotStore
from sandboxcore.statedir import StatePath, private_directory
from sandboxcore.store import Store
from sandboxcore.volumes import Volumes

_RUN = (SandboxState.RUNNING, SandboxState.PAUSED)


def list_sandboxes(
    state_dir: StatePath = None, *, labels: Mapping[str, str] | None = None
) -> list[SandboxRecord]:
    """What is on record, oldest first, corrected by what is really there. ``labels``: only those with all of
    these."""
    with Store(state_dir) as store:
        return [record for record in true_records(store, labels or {}) if record is not None]


def true_records(store: Store, labels: Mapping[str, str]) -> Iterator[SandboxRecord | None]:
    """Each sandbox; None for what is not wanted, or was removed just now."""
    for record in store.all():
        true = true_record(store, record)
        yield true if true is not None and labels.items() <= true.labels.items() else None


def true_record(store: Store, record: SandboxRecord) -> SandboxRecord | None:
    if record.host:
        return None if _forgotten(store, record) else record
    if record.state in _RUN and not runs(store, record):
        store.end(record, time.time())
        drop_group(store, record.id)
        return store.get(record.id)
    return record


def _forgotten(store: Store, record: SandboxRecord, *, dry_run: bool = False) -> bool:
    """Whether it ended with the process that it belonged to; then it has no record any more."""
    if lives(record.host):
        return False
    if not dry_run:
        with contextlib.suppress(BlockingIOError), store.locked(record.id, wait=False):
            store.remove(record.id)
    return True


def drop_group(store: Store, sandbox_id: str) -> None:
    """Remove the control group of a sandbox that was found dead. Whoever works on it just now, but for this
    store itself, takes care of that, or has started it again: then it is another one."""
    with contextlib.suppress(BlockingIOError), contextlib.ExitStack() as stack:
        if not store.holds(sandbox_id):
            stack.enter_context(store.locked(sandbox_id, wait=False))
        now, group = store.get(sandbox_id), store.home(sandbox_id).group
        if group is not None and now is not None and now.state not in _RUN:
            remove_later(group)


@dataclasses.dataclass(frozen=True, slots=True)
class Collected:
    """What :func:`gc` did: ids of sandboxes found dead; what no record knew: directories, and files in
    them as "sandbox/file", remains of volumes, and layers of images as "layers/name"; control groups in which
    nothing can run any more, as absolute paths; layers that no snapshot has, likewise; directories into which
    a commit was finished."""

    ended: tuple[str, ...]
    removed: tuple[str, ...]
    groups: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()


def gc(
    state_dir: StatePath = None, *, dry_run: bool = False, unused_layers: float | None = None
) -> Collected:
    """Set the records right after crashes: sandboxes whose processes are gone are put down as stopped, and
    what no record knows is removed (what may still run there is ended first). What somebody works on
    just now is left alone.

    The control groups of such sandboxes go, and those of all processes on this host that are gone: also of
    those that had no state directory, or another one. With ``unused_layers``, so do the layers of images that
    nobody has used for so many seconds: see :func:`sandboxcore.images.collect`."""
    ended: list[str] = []
    removed: list[str] = []
    groups: list[str] = []
    with Store(state_dir) as store:
        for _ in collecting_records(
            store, ended, removed, groups, dry_run=dry_run, unused_layers=unused_layers
        ):
            pass
    layers, commits = collect_files(state_dir, dry_run=dry_run)
    return Collected(tuple(ended), tuple(removed), tuple(groups), layers, commits)


def collect_files(state_dir: StatePath, *, dry_run: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What crashes have left of snapshots and commits."""
    path = private_directory(state_dir)
    layers = SnapshotStore(path).gc(dry_run=dry_run) if (path / "snapshots").is_dir() else ()
    return layers, () if dry_run else tuple(finish_all(path / "commits"))


def collecting_records(
    store: Store,
    ended: list[str],
    removed: list[str],
    groups: list[str] | None = None,
    *,
    dry_run: bool,
    unused_layers: float | None = None,
) -> Iterator[None]:
    """A step for each sandbox or layer; no lock is held between them."""
    found = [] if groups is None else groups
    for record in store.all():
        if record.host:
            if _forgotten(store, record, dry_run=dry_run):
                ended.append(record.id)
            continue
        alive = _may_run(store, record)
        if record.state in _RUN and not alive:
            ended.append(record.id)
            if not dry_run:
                store.end(record, time.time())
        with contextlib.suppress(BlockingIOError), _looking_at(store, record.id, dry_run=dry_run):
            removed += _clear(store, record.id, dry_run=dry_run)
            now = None if alive else store.get(record.id)  # what ends just now is for the next time
            if now is not None and not _may_run(store, now):
                found += _clear_group(store.home(record.id), dry_run=dry_run)
        yield
    for stray in store.strays():
        with contextlib.suppress(BlockingIOError), _looking_at(store, stray, dry_run=dry_run):
            if store.get(stray) is None and store.home(stray).path.is_dir():
                removed.append(stray)
                if not dry_run:
                    store.home(stray).end()
                    found += _clear_group(store.home(stray), dry_run=False)
                    store.remove(stray)
        yield
    found += cgroup.collect(dry_run=dry_run)
    for layer in collecting(store.path, unused_for=unused_layers, dry_run=dry_run):
        removed.append(f"layers/{layer}")
        yield
    removed += [f"volumes/{name}" for name in Volumes(store.path).gc(dry_run=dry_run)]


def _looking_at(store: Store, sandbox: str, *, dry_run: bool) -> contextlib.AbstractContextManager[None]:
    """Hold its lock; raises BlockingIOError where somebody else does. Holding may make its file and remove
    it: a dry run only looks."""
    if not dry_run:
        return store.locked(sandbox, wait=False)
    if not store.idle(sandbox):
        raise BlockingIOError(f"somebody works on {sandbox}")
    return contextlib.nullcontext()


def _may_run(store: Store, record: SandboxRecord) -> bool:
    return record.state in _RUN and runs(store, record)


def _clear_group(home: Home, *, dry_run: bool) -> list[str]:
    """Remove the control group of a sandbox that is gone. What is busy still stays for the next time."""
    group = home.group
    places = [str(place) for place in group.places() if place.is_dir()] if group else []
    if group is None or dry_run:
        return places
    with contextlib.suppress(SetupError):  # somebody else's
        group.remove()
    return [place for place in places if not os.path.exists(place)]


def runs(store: Store, record: SandboxRecord) -> bool:
    """Whether the init that is on record for a sandbox is there; changes nothing."""
    try:
        return Link.runs(store.home(record.id), record.pid, record.ticks, record.boot)
    except SandboxError:  # of another pid namespace: not ours to say
        return True


def _clear(store: Store, sandbox: str, *, dry_run: bool) -> list[str]:
    """Remove what a crash left of commands that were not on record yet."""
    home = store.home(sandbox)
    try:
        orphans = store.orphans(sandbox)
    except FileNotFoundError:  # destroyed meanwhile
        return []
    if not dry_run:
        home.remove(*orphans)
    return [f"{sandbox}/{name}" for name in orphans]
