"""Temporary: one pool per fingerprint."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sandboxcore.pool import SandboxPool
from sandboxcore.pool_policy import PoolConfig, PoolStats
from sandboxcore.result import ExecResult
from sandboxcore.room import Room
from sandboxcore.sandbox import Sandbox
from sandboxcore.spec import SandboxSpec


class SandboxPools:
    def __init__(
        self,
        config: PoolConfig | None = None,
        *,
        room: Room | None = None,
        on_event: Callable[[str, Mapping[str, Any]], object] | None = None,
    ) -> None:
        self._config, self._room, self._on_event = config, room, on_event
        self._lock = threading.Lock()
        self._pools: dict[str, SandboxPool] = {}
        self._of: dict[str, SandboxPool] = {}

    def _pool(self, spec: SandboxSpec | str | None) -> SandboxPool:
        spec = SandboxSpec(profile=spec) if isinstance(spec, str) else spec or SandboxSpec()
        with self._lock:
            if spec.fingerprint not in self._pools:
                self._pools[spec.fingerprint] = SandboxPool(
                    spec, self._config, room=self._room, on_event=self._on_event
                ).start()
            return self._pools[spec.fingerprint]

    def warm(self, spec: SandboxSpec | str) -> None:
        self._pool(spec)

    def claim(self, spec: SandboxSpec | None = None, **binding: Any) -> Sandbox:
        pool = self._pool(spec)
        sandbox = pool.claim(**binding)
        self._of[sandbox.id] = pool
        return sandbox

    def release(self, sandbox: Sandbox) -> None:
        self._of.pop(sandbox.id).release(sandbox)

    def run(self, argv: Sequence[Any], *, spec: SandboxSpec | None = None, **options: Any) -> ExecResult:
        return self._pool(spec).run(argv, **options)

    def stats(self) -> PoolStats:
        return next((pool.stats() for pool in self._pools.values()), PoolStats())

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
