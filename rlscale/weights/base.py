"""The synchronizer's one verb, and the accounting that every transport and engine shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar


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


class Shaped(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> Sequence[int]: ...


T = TypeVar("T", bound=Shaped)


def account_for(weights: Iterable[tuple[str, T]], expected: Mapping[str, Sequence[int]]) -> dict[str, T]:
    """Checks that `weights` are exactly the `expected` names and shapes, before any of them is loaded.

    Raises:
        ValueError: names missing, unknown or given twice, or of another shape; the message lists them.
    """
    given: dict[str, T] = {}
    doubled, unknown, misshapen = [], [], []
    for name, tensor in weights:
        if name in given:
            doubled.append(name)
        elif name not in expected:
            unknown.append(name)
        elif tuple(tensor.shape) != tuple(expected[name]):
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name])}")
        given[name] = tensor
    missing = [name for name in expected if name not in given]
    faults = [
        f"{what} {_few(names)}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("given twice", doubled),
            ("misshapen", misshapen),
        )
        if names
    ]
    if faults:
        raise ValueError(f"weights do not fit the model: {'; '.join(faults)}")
    return given


def _few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
