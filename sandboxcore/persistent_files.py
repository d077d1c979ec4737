"""The files of a persistent sandbox at earlier moments. They outlive everybody, so they are kept on the disk:
what was written since the last restore is copied each time, and what lies below it is there already."""

import contextlib
import json
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from sandboxcore import _native, durable
from sandboxcore._native import LayersOrder
from sandboxcore.archive import Names
from sandboxcore.errors import SandboxError, SpecError
from sandboxcore.events import EventKind
from sandboxcore.identity import children
from sandboxcore.layers import Copy, Layers
from sandboxcore.lifecycle import SandboxState
from sandboxcore.link import START_PATIENCE, Birth, Home, Link
from sandboxcore.plan import Plan, completed_plan
from sandboxcore.process import with_spawner
from sandboxcore.sandbox import Sandbox
from sandboxcore.saved import SnapshotStore, distinct
from sandboxcore.snapshots import Snapshot
from sandboxcore.spawner import Spawner
from sandboxcore.store import Store


def _number() -> int:
    """Of a layer in a sandbox that other processes change, too: one that nobody takes is a random one."""
    return 1024 + int.from_bytes(os.urandom(8)) % (_native.constant("LAYER_NEW") - 1024)


class _OneCopy(Layers):
    """For a single copy of what was written. ``left``: numbers of copies that somebody who died has left."""

    def __init__(self, number: int, left: list[int]) -> None:
        self._number, self._left = number, left

    def take(self) -> int:
        return self._number

    def droppable(self) -> list[int]:
        return self._left

    def copied(self, *_: object) -> None:
        """It is about to go."""

    def failed(self, number: int) -> None:
        """Nothing to remember: init has removed it."""


class PersistentFiles(Sandbox):
    """The part of :class:`PersistentSandbox` that has to do with its files at earlier moments."""

    DEEP = 8  # so many layers of a snapshot become one in the next

    _store: Store
    _snapshots: SnapshotStore | None = None

    @property
    def snapshots(self) -> SnapshotStore:
        """Where its snapshots are: those of all sandboxes in its state directory."""
        if self._snapshots is None:
            self._snapshots = SnapshotStore(self._store.path)
        return self._snapshots

    def snapshot(self, name: str | None = None, *, copy: bool | None = None) -> Snapshot:
        """Keep everything as it is now, on the disk and under a name, and go on.

        Everything stands still while what was written since the last restore is copied. name: default a new
        id; :class:`SpecError` if it is taken. copy: not False, for it always is one. Else as
        :meth:`Sandbox.snapshot`.
        """
        if copy is False:
            raise SpecError(f"sandbox {self.name}: snapshots of a persistent one are copies")
        with self._moment(name) as snapshot:
            self.snapshots.save(snapshot)
        self._note_snapshot(snapshot)
        return snapshot

    @contextlib.contextmanager
    def _moment(self, name: str | None = None) -> Iterator[Snapshot]:
        """Its layers are on the disk, as long as the block has not ended."""
        store = self.snapshots
        try:
            with store.holding(), self._lock, self._store.locked(self.id), self._quiet("snapshot"):
                digests = self._copied(store, self._written_layers())
                layers = tuple(store.layer(digest, self._plan) for digest in digests)
                yield Snapshot(name, self.id, self._plan, layers, copied=True)
        finally:
            store.gc()

    def _copied(self, store: SnapshotStore, below: list[str]) -> list[str]:
        """What was written, as a layer on the disk, and those below it; together as one where these are many.
        The sandbox is without the copy again; whoever dies here leaves it to the next one."""
        many = [store.layer(digest, self._plan) for digest in below] if len(below) >= self.DEEP else []
        keeper = with_spawner(self._plan, None, lambda connection: connection)  # it knows the plan now
        link, about, number = self._link_now(), self._layers_file(), _number()
        self._write_layers(about["base"], about["now"], [*about["copies"], number])
        with Copy(_OneCopy(number, about["copies"]), link) as made:
            layer = made.take(keeper)
        try:
            names = Names(self._plan.overlays, self._plan.id_maps)
            digest = store.keep((layer, *many), names, lasts=False)
            return [digest] if many else distinct([digest, *below])
        finally:
            del layer
            with link.ask_layers(LayersOrder((), 0, drop=[number], copy=True)) as answer:
                link.hear_layer(answer, START_PATIENCE)
            self._write_layers(about["base"], about["now"])

    def _kept_now(self) -> None:
        """The caller holds its lock, and the layers'."""
        digests = self._copied(self.snapshots, self._written_layers())
        self._write_layers(digests, self._layers_file()["now"])

    def _keep_last(self, before: SandboxState) -> None:
        """Keep its files, as they are when nothing runs in it any more. The caller holds its lock, and sees
        to it that nobody starts anything."""
        try:
            if before is SandboxState.PAUSED:
                self._through(Link.thaw)
            with self.snapshots.holding(), self._refusing("archive"):
                self._kept_now()  # first, for it may fail
                if self._any_commands():
                    self._tell(signal.SIGKILL)
                    self._kept_now()  # what they have written since
        finally:
            self.snapshots.gc()

    def _any_commands(self) -> bool:
        """Whether a launcher has children: proc(5), children. Where that cannot be told, perhaps."""
        try:
            return any(children(launcher) for launcher in children(self.pid))
        except OSError:
            return True

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, of this sandbox or of another one with the same overlays: also to one that
        is in memory only, which is put on the disk then. As :meth:`Sandbox.restore`."""
        self._go_back(snapshot)
        self._note_snapshot(snapshot, EventKind.SANDBOX_RESTORED)

    def _go_back(self, snapshot: Snapshot) -> None:
        store = self.snapshots
        with store.holding(), self._lock, self._store.locked(self.id), self._quiet("restore"):
            if not snapshot.fits(self.spec):
                raise SpecError(f"snapshot {snapshot.name}: of a sandbox with other overlays or layers")
            names = Names(self._plan.overlays, self._plan.id_maps)
            digests = [store.keep((layer,), names) for layer in snapshot.layers]
            before = self._layers_file()
            self._write_layers(before["base"], None)  # until it is known
            try:
                self._change(snapshot)
            except BaseException as error:
                if isinstance(error, _native.NativeFailure):  # nothing has changed
                    self._write_layers(before["base"], before["now"])
                raise
            self._write_layers(before["base"], digests)

    def _change(self, snapshot: Snapshot) -> None:
        with contextlib.ExitStack() as borrowed:
            layers = []
            for layer in snapshot.layers:
                fd = layer.keeper.borrow(layer.number)
                borrowed.callback(os.close, fd)
                layers.append((_number(), fd))
            self._link_now().change_layers(LayersOrder(layers, _number(), drop=None))

    def discard(self) -> None:
        """Go back to what was restored last, or to the beginning. Raises :class:`SandboxBusy`."""
        store = self.snapshots
        with store.holding(), self._lock, self._quiet("discard"):
            layers = tuple(store.layer(digest, self._plan) for digest in self._written_layers())
            self._go_back(Snapshot(None, self.id, self._plan, layers, copied=True))
        self._note(EventKind.SANDBOX_DISCARDED)

    @classmethod
    def _from(cls, snapshot: Snapshot, **about: Any) -> Self:
        """One that is on record and begins with a snapshot; not started."""
        sandbox = cls(**about)
        try:
            store = sandbox.snapshots
            names = Names(snapshot.plan.overlays, snapshot.plan.id_maps)
            with store.holding():
                digests = [store.keep((layer,), names) for layer in snapshot.layers]
                sandbox._write_layers(digests, digests)
        except BaseException:
            sandbox.destroy()
            raise
        return sandbox

    def _whole_plan(self) -> Plan:
        """That of one which was found again says only then which overlays it has."""
        if not self._plan.data:
            self._plan = completed_plan(self._plan, self._store.path)
        return self._plan

    @contextlib.contextmanager
    def _refusing(self, wanted: str) -> Iterator[None]:
        self._whole_plan()
        with super()._refusing(wanted):
            yield

    def _may_start(self) -> None:
        super()._may_start()
        if self._plan.overlays:
            store, base = self.snapshots, self._layers_file()["base"]
            with store.holding():
                self._load(base)
                self._write_layers(base, base)

    def _load(self, base: Iterable[str]) -> None:
        store = self.snapshots
        with store.holding():
            self._layers = Layers(tuple(store.layer(digest, self._plan) for digest in base))

    def _asked(self, connection: Spawner, home: Home | None) -> Birth:
        if self._layers.kept_by_another(connection):  # who has died since they were read
            self._load(self._layers_file()["base"])
        return super()._asked(connection, home)

    # --- which layers it has, on the disk ---------------------------------------------------------

    def _layers_path(self) -> Path:
        return self._store.home(self.id).path / "layers"

    def _layers_file(self) -> dict[str, Any]:
        """``base``: what it begins with; ``now``: what lies below what it writes, the topmost first; None
        where nobody knows, because a restore has not ended; ``copies``: numbers of what may lie in it, and
        nobody wants; ``overlays``: their numbers, and what lies below them, by where they are."""
        try:
            found: dict[str, Any] = json.loads(self._layers_path().read_text())
        except FileNotFoundError:
            return {"base": [], "now": [], "copies": []}
        return found

    def _written_layers(self) -> list[str]:
        found = self._layers_file()
        now: list[str] | None = found["now"]
        if now is None:
            raise SandboxError(f"sandbox {self.name}: a restore was interrupted; restore again, or stop it")
        if found["overlays"] != self._overlays():
            raise SandboxError(
                f"sandbox {self.name}: what its spec names has changed on the host since it started"
            )
        return now

    def _write_layers(self, base: list[str], now: list[str] | None, copies: Sequence[int] = ()) -> None:
        base, now = distinct(base), None if now is None else distinct(now)
        data = {"base": base, "now": now, "copies": list(copies), "overlays": self._overlays()}
        durable.write(self._layers_path(), json.dumps(data).encode())

    def _overlays(self) -> dict[str, list[int]]:
        return {overlay.target: [overlay.index, *overlay.inode] for overlay in self._plan.overlays}
