"""What a manager counts: :class:`Metrics`."""

import time
from collections.abc import Mapping
from typing import Any

from sandboxcore.metrics import Counter, Histogram

PHASES = ("plan", "group", "spawn", "setup")


class Metrics:
    """What one manager has counted since it was made."""

    def __init__(self) -> None:
        self.created = Counter("sandboxcore_created_total", "Sandboxes started by this process.")
        self.ended = Counter("sandboxcore_destroyed_total", "Sandboxes destroyed, by reason.", ("reason",))
        self.actions = Counter(
            "sandboxcore_actions_total", "What the sweep has done, by kind of action.", ("action",)
        )
        self.commands = Counter("sandboxcore_commands_total", "Commands that ended, by cause.", ("cause",))
        self.durations = Histogram("sandboxcore_command_seconds", "How long commands took.")
        self.creation = Histogram(
            "sandboxcore_creation_seconds", "How long a start took, as its caller saw it."
        )
        self.phases = Histogram(
            "sandboxcore_creation_phase_seconds", "How long each phase of a start took.", ("phase",)
        )
        self.last_created: float | None = None

    def count_creation(self, seconds: float, timings: Mapping[str, float]) -> None:
        """A sandbox was started. ``timings``: :attr:`Sandbox.timings`."""
        self.created.inc()
        self.creation.observe(seconds)
        self.last_created = time.time()
        for phase in PHASES:
            if phase in timings:
                self.phases.observe(timings[phase], phase=phase)

    def count_end(self, reason: str) -> None:
        """A sandbox was destroyed by this manager."""
        self.ended.inc(reason=reason)

    def count_action(self, kind: str) -> None:
        """The sweep has done something."""
        self.actions.inc(action=kind)

    def count_command(self, cause: Any, duration: float | None) -> None:
        """A command has ended; a cause of None is one that nobody knows."""
        self.commands.inc(cause="unknown" if cause is None else str(cause))
        if duration is not None:
            self.durations.observe(duration)
