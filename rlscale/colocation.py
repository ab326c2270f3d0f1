"""Learner and engines on one GPU, which each has whole while it works."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rlscale.types import Example, Rollout


class Trains(Protocol):
    """What the loop asks of a learner."""

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]: ...

    def save(self, folder: Path) -> None: ...


class Sleeps(Protocol):
    """Engines that give up their memory until they are woken."""

    def sleep(self) -> None: ...

    def wake(self) -> None: ...


class TakesTurns:
    """A learner that trains while the engines on its GPU sleep.

    Engines wake as soon as a step has ended, and before weights are synced: an engine that sleeps cannot take
    any. The learner keeps weights and optimizer state; what a step needs beside them it has given back by
    then.
    """

    def __init__(self, learner: Trains, rollouts: Sleeps) -> None:
        self._learner = learner
        self._rollouts = rollouts

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        """See `Learner.train_step`."""
        self._rollouts.sleep()
        try:
            return self._learner.train_step(rollouts, temperature, examples)
        finally:
            self._rollouts.wake()

    def save(self, folder: Path) -> None:
        """See `Learner.save`."""
        self._learner.save(folder)
