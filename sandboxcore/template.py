"""Sandboxes that begin where a script has ended: :class:`Template`."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Mapping
from typing import Any

from sandboxcore.errors import SnapshotNotFound, SpecError
from sandboxcore.request import FileContent
from sandboxcore.sandbox import Sandbox
from sandboxcore.saved import SnapshotStore
from sandboxcore.snapshots import Snapshot
from sandboxcore.spec import SandboxSpec


class Template:
    """A spec, and a script that is run once in it: what it has written is what sandboxes begin with.

    The script runs when the first sandbox is wanted; threads that want one meanwhile wait for it. With a
    store it runs once for all processes, until the spec, the script or the files are others.

    Parameters
    ----------
    spec: as for :class:`Sandbox`; with ``writable=True`` or an overlay, or nothing would be kept.
    script: for ``sh -e``, in the working directory of the spec.
    files: by their paths inside, put there before; as for :meth:`Sandbox.exec`.
    env: for the script only.
    timeout: in seconds; default 10 minutes.
    store: where it is kept, under the name ``template-HASH``.
    """

    def __init__(
        self,
        spec: SandboxSpec,
        script: str,
        *,
        files: Mapping[str, FileContent] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = 600,
        store: SnapshotStore | None = None,
    ) -> None:
        if not spec.writable and all(mount.kind != "overlay" for mount in spec.all_mounts()):
            raise SpecError(
                "template: nothing of what the script writes is kept; writable=True, or an overlay"
            )
        self.spec, self.script, self.files, self.env = spec, script, dict(files or {}), dict(env or {})
        self.timeout, self.store = timeout, store
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None

    @property
    def name(self) -> str:
        """``template-`` and a hash of everything that it is made of."""
        parts = (self.script, sorted(self.env.items()), sorted(self.files.items()))
        text = json.dumps(self.spec.to_dict(), sort_keys=True) + repr(parts)
        return f"template-{hashlib.sha256(text.encode()).hexdigest()[:32]}"

    def snapshot(self, *, rebuild: bool = False) -> Snapshot:
        """What the script has left. It runs if it has not yet, or with ``rebuild=True``.

        Raises :class:`CommandFailed` or :class:`SandboxTimeout`, with what the script has said in ``result``,
        and whatever starting a sandbox raises. Then nothing is left of it, and the next one tries again.
        """
        with self._lock:
            if self._snapshot is None or rebuild:
                self._snapshot = self._kept(rebuild=rebuild)
            return self._snapshot

    def sandbox(self, **about: Any) -> Sandbox:
        """Start one. ``about``: as for :class:`Sandbox`."""
        return Sandbox.from_snapshot(self.snapshot(), **about)

    def _kept(self, *, rebuild: bool) -> Snapshot:
        if self.store is None:
            return self._built()
        with self.store.alone(self.name):
            if not rebuild:
                with contextlib.suppress(SnapshotNotFound):
                    return self.store.load(self.name, spec=self.spec)
            snapshot = self._built()
            self.store.save(snapshot, replace=True)
        return snapshot

    def _built(self) -> Snapshot:
        with Sandbox(self.spec) as sandbox:
            argv = ["sh", "-ec", self.script]
            sandbox.exec(argv, files=self.files, env=self.env, timeout=self.timeout, check=True)
            return sandbox.snapshot(self.name)
