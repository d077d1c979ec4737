"""The files of a living sandbox at one moment, kept: :meth:`Sandbox.snapshot`, to go back to, or to begin
others with."""

import contextlib
import errno as E
import os
import stat
import tarfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

from sandboxcore import _native, durable, host
from sandboxcore.archive import Archive, Names, export
from sandboxcore.binds import LiveBinds
from sandboxcore.changes import Base, FileChange, View, compare, described, may_be_same
from sandboxcore.commit import Change, Place, commit, finish_all
from sandboxcore.errors import CommitError, SandboxBusy, SandboxError, SpecError
from sandboxcore.events import EventKind
from sandboxcore.layers import Copy, Layer, Layers
from sandboxcore.lifecycle import new_id
from sandboxcore.link import ANSWER_PATIENCE
from sandboxcore.packing import Digest, Entry, Found, Item, merged
from sandboxcore.plan import Overlay, Plan, compile_plan
from sandboxcore.process import with_spawner
from sandboxcore.spawner import get_spawner
from sandboxcore.spec import SandboxSpec
from sandboxcore.statedir import private_directory
from sandboxcore.tree import Node, below

_BUSY = {"launcher": "a command runs", "mount": "a file is open for writing"}


class Snapshot:
    """The files of a sandbox at one moment: everything written to its root (``writable=True``) and to its
    overlays, not what is in ``/tmp`` and ``/dev/shm``, nor processes.

    It lasts, in memory, until it is closed and no sandbox made from it is left; at most as long as this
    process. What it holds counts against ``limits.disk`` of the sandbox in which it was written, and of no
    other.

    id, name, created_at (seconds since the epoch), sandbox (the id of the one it was taken of), spec, copied
    (False: it took the same time however much there was; True: a copy was made while commands stood still).
    """

    def __init__(
        self, name: str | None, sandbox: str, plan: Plan, layers: tuple[Layer, ...], *, copied: bool
    ) -> None:
        spec = plan.spec
        self.plan = plan
        self.id = new_id("snp")
        self.name = name or self.id
        self.sandbox, self.spec = sandbox, spec
        self.created_at = time.time()
        self.copied = copied
        self._layers: tuple[Layer, ...] | None = layers

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The topmost first. Raises :class:`SandboxError` when it is closed."""
        if self._layers is None:
            raise SandboxError(f"snapshot {self.name}: closed")
        return self._layers

    def diff(self, old: Self | None = None) -> list[FileChange]:
        """What differs from an older snapshot, or from the beginning, by path. It takes as long as there is
        much in their layers.

        A file counts as changed if its time of change or anything else is another. ``old`` may be of another
        sandbox with the same overlays; else :class:`SpecError`.
        """
        if old is not None and not self.fits(old.spec):
            raise SpecError(f"snapshot {old.name}: of a sandbox with other overlays or layers")
        found = self._compared(() if old is None else old.layers)
        changes = [described(overlay.target, *change) for overlay, change in found]
        return sorted(changes, key=lambda change: change.path)

    def commit(
        self,
        paths: Iterable[str | os.PathLike[str]] | None = None,
        *,
        dry_run: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
    ) -> list[FileChange]:
        """Put what differs from the beginning into the host's directories that the overlays show, and return
        that. All of it or nothing, for each overlay, also if the machine stops meanwhile: what was begun then
        is finished by the next commit or :func:`gc`.

        What was written belongs to the owner of the directory, and has no set-id bits; sockets stay behind.
        What the host has changed meanwhile is overwritten where the sandbox has changed it, too.

        Parameters
        ----------
        paths: inside the sandbox; these, with what is below them, and nothing else. Default: everything in
            overlays of one directory; nothing of the root.
        dry_run: only return what would be done.
        state_dir: where a note is kept meanwhile; default as for :class:`PersistentSandbox`.

        Raises :class:`SpecError` for paths that lie in no directory of the host, :class:`CommitError`.
        """
        chosen = None if paths is None else [self._committable(os.fspath(path)) for path in paths]
        if chosen is None and not any(map(_has_directory, self.plan.overlays)):
            raise SpecError(f"snapshot {self.name}: no overlay of a directory; use export()")
        notes = private_directory(state_dir) / "commits"
        if not dry_run:
            with contextlib.suppress(CommitError):  # of another directory, perhaps; gc() says why
                finish_all(notes)
        done: list[FileChange] = []
        changes: dict[Overlay, list[Change]] = {}
        for overlay, change in self._compared(()):
            said = described(overlay.target, *change)
            if _has_directory(overlay) and said.type != "socket" and _is_chosen(said, chosen):
                changes.setdefault(overlay, []).append(Change(*change))
                done.append(said)
        for overlay, some in changes.items() if not dry_run else ():
            commit(Place(overlay.sources[0], overlay.inode), some, self._contents(overlay), notes)
        return sorted(done, key=lambda change: change.path)

    def export(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Write it to a tar file, for :meth:`load` on this host or on another one: below ``files/`` what was
        written, with owners as inside, and as the last member ``manifest.json`` with a SHA-256 of each file
        and with what was removed. Set-id bits and user attributes are in it, ACLs and sockets are not.

        A file of a path is made whole, or not at all. Raises OSError.
        """
        if isinstance(file, str | os.PathLike):
            path = Path(file)
            with durable.NewFile(path.parent) as new:
                self.export(new.file)
                new.put(path.name)
            return
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            write_archive(tar, self.layers, Names(self.plan.overlays, self.plan.id_maps))

    @classmethod
    def load(
        cls,
        file: str | os.PathLike[str] | BinaryIO,
        spec: SandboxSpec | None = None,
        *,
        name: str | None = None,
    ) -> Self:
        """A snapshot from a tar file that :meth:`export` wrote. It may come from anybody: whatever is in it
        can only be in the sandboxes made from it.

        file: a path, or a file that can seek; not compressed. spec: as for the sandbox of which it was taken,
        with the same overlays. Raises :class:`ArchiveError`, :class:`SpecError`, :class:`SetupError`,
        OSError.
        """
        plan = compile_plan(spec or SandboxSpec(), host.features())
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:
                return cls(name, "", plan, (loaded(opened, plan),), copied=True)
        return cls(name, "", plan, (loaded(file, plan),), copied=True)

    def fits(self, spec: SandboxSpec) -> bool:
        """Whether a sandbox of this spec can have its files."""
        return shape(spec) == shape(self.spec)

    def fitting(self, spec: SandboxSpec | None) -> SandboxSpec:
        """The spec for a sandbox that begins with it: its own, or this one. Raises SpecError."""
        if spec is not None and not self.fits(spec):
            raise SpecError(f"snapshot {self.name}: of a sandbox with other overlays or layers")
        return spec or self.spec

    def _committable(self, path: str) -> str:
        path = os.path.normpath(path)
        inside = [overlay for overlay in self.plan.overlays if below(path, overlay.target)]
        if not inside or not _has_directory(max(inside, key=lambda overlay: len(overlay.target))):
            raise SpecError(f"commit: {path}: in no overlay of a directory")
        return path

    def _compared(
        self, others: tuple[Layer, ...]
    ) -> Iterator[tuple[Overlay, tuple[bytes, Found | None, Found | None]]]:
        """What differs from some other layers, or from nothing."""
        cache: dict[Layer, list[tuple[bytes, Entry]]] = {}
        now, then = _merged(self.layers, cache), _merged(others, cache)
        bases = {one.index: Base(one.sources, _entries(one.nodes)) for one in self.plan.overlays}
        found = []
        for overlay in self.plan.overlays:
            covers = [os.fsencode(os.path.relpath(path, overlay.target)) for path in overlay.covers]
            base = bases[overlay.index]
            views = [View(_part(tree, overlay.index), base, covers) for tree in (then, now)]
            found += [(overlay, change) for change in compare(*views)]
        doubtful = {
            (one.layer, b"u%d/" % overlay.index + path)
            for overlay, (path, *pair) in found
            for one in pair
            if one is not None and may_be_same(*pair)
        }
        digests = _digests({*self.layers, *others}, doubtful)

        def digest(overlay: Overlay, path: bytes, one: Found | None) -> str | None:
            if one is None or not one.layer:
                return bases[overlay.index].digest(path)
            return digests[one.layer, b"u%d/" % overlay.index + path]

        for overlay, (path, *pair) in found:
            first, second = (digest(overlay, path, one) if may_be_same(*pair) else None for one in pair)
            if first is None or first != second:
                yield overlay, (path, pair[0], pair[1])

    def _contents(self, overlay: Overlay) -> Iterator[tuple[int, Iterator[Item]]]:
        """Everything in the layers of one overlay, with paths in it."""
        prefix = f"u{overlay.index}/".encode()
        for layer in self.layers:
            items = layer.items(content=True)
            yield (
                layer.number,
                (
                    item._replace(path=item.path.removeprefix(prefix))
                    for item in items
                    if item.path.startswith(prefix)
                ),
            )

    def close(self) -> None:
        """Let go of it. Sandboxes made from it live on. Idempotent."""
        self._layers = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot {self.name} of {self.sandbox}>"


def _has_directory(overlay: Overlay) -> bool:
    return overlay.target != "/" and len(overlay.sources) == 1


def _is_chosen(change: FileChange, paths: list[str] | None) -> bool:
    """Whether it is wanted, or a directory that has to be made for what is."""
    if paths is None or any(below(change.path, path) for path in paths):
        return True
    made = change.kind == "added" or (change.kind == "changed" and change.type != change.old_type)
    return made and change.type == "dir" and any(below(path, change.path) for path in paths)


def _merged(layers: tuple[Layer, ...], cache: dict[Layer, list[tuple[bytes, Entry]]]) -> dict[bytes, Found]:
    for layer in layers:
        if layer not in cache:
            cache[layer] = [(item.path, item.entry) for item in layer.items(content=False)]
    return merged([(layer.number, cache[layer]) for layer in layers])


def write_archive(tar: tarfile.TarFile, layers: tuple[Layer, ...], names: Names) -> None:
    """Some layers, together."""
    contents = ((layer.number, layer.items(content=True)) for layer in layers)
    export(tar, _merged(layers, {}), contents, names)


def loaded(file: BinaryIO, plan: Plan) -> Layer:
    """What an archive has, as a layer."""
    if not plan.overlays:
        raise SpecError("load: the spec has nothing to write to; writable=True, or an overlay")
    archive = Archive(file, Names(plan.overlays, plan.id_maps))
    return with_spawner(plan, None, lambda keeper: Layer.made(keeper, archive.room, archive.write))


def _digests(layers: Iterable[Layer], wanted: set[tuple[int, bytes]]) -> dict[tuple[int, bytes], str]:
    """Of files in some layers, by the layers' numbers and paths there."""
    found = {}
    for layer in layers:
        if any(number == layer.number for number, _ in wanted):
            for path, entry, content in layer.items(content=True):
                if (layer.number, path) in wanted:
                    digest = Digest()
                    for extent in content:
                        digest.add(extent)
                    found[layer.number, path] = digest.hexdigest(entry.size)
    return found


def _part(tree: dict[bytes, Found], index: int) -> dict[bytes, Found]:
    """Of one overlay, with paths in it."""
    top = f"u{index}".encode()
    prefix = top + b"/"
    return {
        path[len(prefix) :]: found for path, found in tree.items() if path == top or path.startswith(prefix)
    }


def _entries(nodes: tuple[Node, ...]) -> dict[bytes, Entry]:
    kinds = {"DIR": stat.S_IFDIR, "FILE": stat.S_IFREG, "SYMLINK": stat.S_IFLNK}
    return {
        os.fsencode(node.path[1:]): Entry(kinds[node.kind] | node.mode, 0, 0, size=len(node.data))
        for node in nodes
    }


class Snapshots(LiveBinds):
    """The part of :class:`Sandbox` that has to do with its files at earlier moments."""

    id: str
    _layers: Layers

    def snapshot(self, name: str | None = None, *, copy: bool | None = None) -> Snapshot:
        """Keep everything as it is now, and go on.

        It takes the same time however much there is, unless a command runs or a file is open for writing:
        then everything stands still while what was written since the last snapshot is copied;
        ``Snapshot.copied`` says so. What this process has open for writing goes on, and is copied as it is.
        ``copy=False``: raise :class:`SandboxBusy` instead; ``True``: a copy in any case.

        Only of a sandbox whose spec has ``writable=True`` or overlays; else :class:`SpecError`. Raises
        :class:`SandboxBusy` where something does not stand still within 2 s, or where there are 64 layers.
        """
        taken = self._taken(name, copy)
        self._note_snapshot(taken)
        return taken

    def _note_snapshot(self, snapshot: Snapshot, kind: EventKind = EventKind.SANDBOX_SNAPSHOT) -> None:
        self._note(kind, snapshot=snapshot.id, name=snapshot.name, copied=snapshot.copied)

    def _note_commit(self, changes: list[FileChange], *, dry_run: bool) -> None:
        if not dry_run:
            self._note(EventKind.SANDBOX_COMMITTED, changes=len(changes))

    def _taken(self, name: str | None = None, copy: bool | None = None) -> Snapshot:
        with self._lock, self._quiet("snapshot"):
            if self._sealed(copy):
                return self._snapshot(name, None)
            with Copy(self._layers, self._link_now()) as made:
                return self._snapshot(name, made.take(get_spawner(self._plan)))

    def _sealed(self, copy: bool | None) -> bool:
        """Whether there is no need for a copy any more."""
        try:
            if not copy:
                self._layers.seal(self._link_now(), get_spawner(self._plan))
        except _native.NativeFailure as failure:
            if copy is False or failure.errno != E.EBUSY:
                raise
            return False
        return not copy

    def _snapshot(self, name: str | None, copied: Layer | None) -> Snapshot:
        layers = self._layers.stack if copied is None else (copied, *self._layers.stack)
        return Snapshot(name, self.id, self._plan, layers, copied=copied is not None)

    @contextlib.contextmanager
    def _moment(self) -> Iterator[Snapshot]:
        """A snapshot that nobody else wants."""
        with self._taken() as now:
            yield now

    def diff(self, since: Snapshot | None = None) -> list[FileChange]:
        """What differs now from a snapshot, or from the beginning: :meth:`Snapshot.diff` of a snapshot that
        is taken for it. Raises what :meth:`snapshot` does."""
        with self._moment() as now:
            return now.diff(since)

    def commit(
        self,
        paths: Iterable[str | os.PathLike[str]] | None = None,
        *,
        dry_run: bool = False,
        state_dir: str | os.PathLike[str] | None = None,
    ) -> list[FileChange]:
        """Put what was written into the host's directories: :meth:`Snapshot.commit` of a snapshot that is
        taken for it, on which the sandbox goes on as before. Raises what :meth:`snapshot` does."""
        with self._moment() as now:
            changes = now.commit(paths, dry_run=dry_run, state_dir=state_dir)
        self._note_commit(changes, dry_run=dry_run)
        return changes

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this sandbox or of another one with the same overlays. What was written
        since is lost, if no other snapshot has it. Takes the same time however much there is. What was bound
        while it runs (:meth:`bind`) stays.

        Raises :class:`SandboxBusy` while a command runs, :class:`SpecError` for one that does not fit.
        """
        with self._lock, self._quiet("restore"):
            if not snapshot.fits(self.spec):
                raise SpecError(f"snapshot {snapshot.name}: of a sandbox with other overlays or layers")
            self._layers.change(self._link_now(), snapshot.layers)
        self._note_snapshot(snapshot, EventKind.SANDBOX_RESTORED)

    def discard(self) -> None:
        """Go back to the last snapshot of it, or to the beginning. Raises :class:`SandboxBusy`."""
        with self._lock, self._quiet("discard"):
            self._layers.change(self._link_now(), self._layers.stack)
        self._note(EventKind.SANDBOX_DISCARDED)

    @contextlib.contextmanager
    def _quiet(self, wanted: str) -> Iterator[None]:
        """What init refuses while something happens in the sandbox. Raises SandboxBusy."""
        self._ready(wanted)
        with self._refusing(wanted):
            yield

    @contextlib.contextmanager
    def _refusing(self, wanted: str) -> Iterator[None]:
        """The same, whether or not it takes commands."""
        if not self._plan.overlays:
            raise SpecError(f"{wanted}: nothing of sandbox {self.name} is kept; writable=True, or an overlay")
        self._file_server.close(wait=ANSWER_PATIENCE)
        try:
            yield
        except _native.NativeFailure as failure:
            if failure.errno != E.EBUSY:
                raise self._rendered(None, failure) from None
            why = _BUSY.get(failure.stage, "another snapshot is taken")
            raise SandboxBusy(f"sandbox {self.name}: {wanted}: {why}") from None


class Shape(NamedTuple):
    """What has to be the same for files of one sandbox to be those of another."""

    writable: bool
    rootfs: Any
    overlays: tuple[tuple[str, Any], ...]
    ids: tuple[int, int]


def shape(spec: SandboxSpec) -> Shape:
    """Where sandboxes of this spec write."""
    overlays = [(mount.target, mount.source) for mount in spec.all_mounts() if mount.kind == "overlay"]
    if spec.writable:
        overlays.append(("/", None))
    root = spec.rootfs if spec.writable else None
    return Shape(spec.writable, root, tuple(sorted(overlays, key=str)), spec.ids())
