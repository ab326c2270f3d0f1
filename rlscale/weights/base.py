"""The synchronizer's one verb, and what a transport must do for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync moved: the version all engines now have, bytes published once, seconds taken."""

    version: int
    bytes: int
    wall_s: float


class WeightSynchronizer(Protocol):
    """Brings every rollout engine to the learner's weights. The training loop knows nothing of transports."""

    def sync_weights(self) -> SyncReport:
        """Publishes the learner's weights as the next version and loads them into every engine.

        On return all engines hold that version. If it raises, engines may differ: the run must stop or sync
        again before it generates.

        Raises:
            ValueError: the names or shapes of the two sides differ; nothing was generated with a mixture.
        """
        ...

    def close(self) -> None:
        """Frees what the transport holds (shared memory); calling it twice is harmless."""
        ...
