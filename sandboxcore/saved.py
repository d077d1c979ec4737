"""Snapshots that outlive the process which took them: :class:`SnapshotStore`.

Below ``snapshots`` in the state directory there is a file ``layers/SHA256.tar`` for each layer, shared by all
snapshots that have it, and a record ``names/NAME.json`` for each snapshot. Layers are on the disk before the
record is: so a snapshot is there whole or not at all, whatever dies when. Whoever adds something holds the
lock together with others; :meth:`SnapshotStore.gc` alone.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import struct
import tarfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandboxcore import durable, host
from sandboxcore.archive import Names
from sandboxcore.errors import ArchiveError, SandboxError, SnapshotNotFound, SpecError
from sandboxcore.layers import Layer
from sandboxcore.plan import Plan, compile_plan
from sandboxcore.process import reach_spawner
from sandboxcore.snapshots import Snapshot, loaded, write_archive
from sandboxcore.spec import SandboxSpec, check_name
from sandboxcore.statedir import private_directory

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSnapshot:
    """What is on record of a snapshot. ``size``: in bytes, of its layers on the disk, of which other
    snapshots may have some, too; times in seconds since the epoch; ``sandbox``: the id of the one it was
    taken of."""

    name: str
    id: str
    sandbox: str
    created_at: float
    saved_at: float
    size: int
    spec: dict[str, Any]
    layers: tuple[str, ...]
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


class SnapshotStore:
    """Named snapshots on the disk. Any thread and any number of processes may use it.

    state_dir: as for :class:`PersistentSandbox`. Raises :class:`SandboxError` where it cannot be used.
    """

    def __init__(self, state_dir: str | os.PathLike[str] | None = None) -> None:
        self.path = private_directory(state_dir) / "snapshots"
        self._names, self._layers = self.path / "names", self.path / "layers"
        with self._understood():
            for path in (self.path, self._names, self._layers):
                path.mkdir(mode=0o700, exist_ok=True)
        self._loaded: weakref.WeakValueDictionary[str, Layer] = weakref.WeakValueDictionary()

    def save(
        self,
        snapshot: Snapshot,
        name: str | None = None,
        *,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        replace: bool = False,
    ) -> SavedSnapshot:
        """Put a snapshot on the disk; layers that are there are not written again. What
        :meth:`Snapshot.export` leaves out is left out.

        name: default the snapshot's. replace: instead of another one of this name; else :class:`SpecError`.
        """
        name = snapshot.name if name is None else name
        check_name(name)
        with self.holding():
            if not replace and self._record(name).exists():
                raise SpecError(f"name: {name!r} is the name of another snapshot")
            names = Names(snapshot.plan.overlays, snapshot.plan.id_maps)
            digests = tuple(distinct(self.keep((layer,), names) for layer in snapshot.layers))
            saved = SavedSnapshot(
                name=name,
                id=snapshot.id,
                sandbox=snapshot.sandbox,
                created_at=snapshot.created_at,
                saved_at=time.time(),
                size=sum(self._path(digest).stat().st_size for digest in digests),
                spec=snapshot.spec.to_dict(),
                layers=digests,
                description=description,
                labels=dict(labels or {}),
            )
            data = json.dumps({"version": VERSION, **dataclasses.asdict(saved)}, indent=1).encode()
            try:
                durable.write(self._record(name), data, replace=replace)
            except FileExistsError:
                raise SpecError(f"name: {name!r} is the name of another snapshot") from None
        return saved

    def load(self, name: str, *, spec: SandboxSpec | None = None) -> Snapshot:
        """A saved snapshot, in memory again. It takes as long as there is much in it, unless some snapshot
        that this object loaded or saved has the same layers and still lives.

        spec: instead of the one on record, with the same overlays. Raises :class:`SnapshotNotFound`,
        :class:`ArchiveError` where a file is not what it was, and what making a sandbox raises.
        """
        with self.holding():
            saved = self.describe(name)
            plan = compile_plan(spec or SandboxSpec.from_dict(saved.spec), host.features(), self.path.parent)
            layers = tuple(self.layer(digest, plan) for digest in distinct(saved.layers))
        snapshot = Snapshot(saved.name, saved.sandbox, plan, layers, copied=True)
        snapshot.id, snapshot.created_at = saved.id, saved.created_at
        return snapshot

    def describe(self, name: str) -> SavedSnapshot:
        """What is on record of one. Raises :class:`SnapshotNotFound`."""
        check_name(name)
        try:
            return _parsed(self._record(name))
        except FileNotFoundError:
            raise SnapshotNotFound(f"no snapshot has the name {name!r} in {self.path}") from None

    def list(self, *, labels: Mapping[str, str] | None = None) -> list[SavedSnapshot]:
        """All of them, or those with all of these labels; the oldest first."""
        found = []
        with self._understood():
            for path in self._names.glob("[!.]*.json"):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    found.append(_parsed(path))
        wanted = dict(labels or {}).items()
        chosen = [one for one in found if wanted <= one.labels.items()]
        return sorted(chosen, key=lambda one: (one.saved_at, one.name))

    def delete(self, name: str) -> None:
        """Forget one; what was loaded from it lives on. Its layers go with the next :meth:`gc`. Raises
        :class:`SnapshotNotFound`."""
        check_name(name)
        try:
            self._record(name).unlink()
        except FileNotFoundError:
            raise SnapshotNotFound(f"no snapshot has the name {name!r} in {self.path}") from None
        with self._understood():
            durable.sync_directory(self._names)

    def gc(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Remove layers that no snapshot has, and what a crash has left; their paths. While somebody saves or
        loads, nothing."""
        found: list[Path] = []
        with (
            contextlib.suppress(BlockingIOError),
            self._understood(),
            self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            known = {f"{digest}.tar" for saved in self.list() for digest in saved.layers}
            known |= {f"{digest}.tar" for digest in self._of_sandboxes()}
            found = [path for path in self._layers.iterdir() if path.name not in known]
            found += [path for path in self._names.iterdir() if path.name.startswith(durable.TEMPORARY)]
            for path in () if dry_run else found:
                path.unlink()
        return tuple(sorted(map(str, found)))

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Nobody else is in here meanwhile, in any process: for who makes a snapshot if there is none."""
        check_name(name)
        byte = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        with open(self.path / "making", "ab") as file:
            # F_OFD_SETLKW, fcntl_locking(2): one byte for each name, so that no file has to be removed.
            fcntl.fcntl(file, fcntl.F_OFD_SETLKW, struct.pack("hhqqi", fcntl.F_WRLCK, 0, byte, 1, 0))
            yield

    def _of_sandboxes(self) -> Iterator[str]:
        """The layers that persistent sandboxes have, or begin with."""
        for path in (self.path.parent / "sandboxes").glob("*/layers"):
            with contextlib.suppress(FileNotFoundError):
                about = json.loads(path.read_text())
                yield from (*about["base"], *(about["now"] or ()))

    # --- for sandboxes that stay ------------------------------------------------------------------

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """No layer goes meanwhile."""
        with self._understood(), self._locked(fcntl.LOCK_SH):
            yield

    def keep(self, layers: tuple[Layer, ...], names: Names, *, lasts: bool = True) -> str:
        """Write some layers as one, the topmost first, unless it is there. Its digest. ``lasts``: one that is
        alone may be used as long as it lives, instead of loading it."""
        known = layers[0].digest if len(layers) == 1 else None
        if known is not None and self._path(known).exists():
            return known
        with durable.NewFile(self._layers) as new:
            with tarfile.open(fileobj=new.file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                write_archive(tar, layers, names)
            new.file.seek(0)
            digest = hashlib.file_digest(new.file, "sha256").hexdigest()
            new.put(self._path(digest).name)
        if lasts and len(layers) == 1:
            layers[0].digest, self._loaded[digest] = digest, layers[0]
        return digest

    def layer(self, digest: str, plan: Plan) -> Layer:
        """A layer that was kept, in memory: with the spawner that a sandbox of this plan begins with now."""
        layer = self._loaded.get(digest)
        if layer is not None and layer.keeper is reach_spawner(plan, None):
            return layer
        with open(self._path(digest), "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ArchiveError(f"{file.name}: not what was written; the disk, or somebody else")
            file.seek(0)
            layer = loaded(file, plan)
        layer.digest, self._loaded[digest] = digest, layer
        return layer

    # --- files ----------------------------------------------------------------------------------

    def _record(self, name: str) -> Path:
        return self._names / f"{name}.json"

    def _path(self, digest: str) -> Path:
        return self._layers / f"{digest}.tar"

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, SandboxError | BlockingIOError):
                raise
            raise SandboxError(f"{self.path}: {error}") from error

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        with open(self.path / "lock", "ab") as file:
            fcntl.flock(file, how)
            yield


def distinct(digests: Iterable[str]) -> list[str]:
    """Each layer once, the topmost first: one that is there again hides all that it has further below, and no
    overlay takes a directory twice."""
    return list(dict.fromkeys(digests))


def _parsed(path: Path) -> SavedSnapshot:
    try:
        values = json.loads(path.read_text())
        version = values.pop("version")
        if version != VERSION:
            raise ArchiveError(f"{path}: version {version}, but only {VERSION} is known")
        return SavedSnapshot(**{**values, "layers": tuple(values["layers"])})
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, SandboxError):
            raise
        raise ArchiveError(f"{path}: broken") from error
