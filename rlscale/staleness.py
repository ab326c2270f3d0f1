"""How far behind the learner the policy may be that drew a token: admission, accounting, metrics.

A token drawn under weights of version u and trained on by a learner that holds version v is v - u updates
stale. Version k is the policy after step k.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rlscale.types import Rollout

READY_BATCHES = 2
"""While a batch stands ready, groups are admitted up to so many batches in all. Engines faster than the
learner would otherwise fill all that `max_staleness` allows, and every batch would be as old as it may be."""


@dataclass(slots=True)
class StalenessManager:
    """Admits groups so that they can be trained on in time, and accounts for each one.

    A group that is admitted as the p-th of those not yet trained on (counted from 0) waits for p // n batches
    of n groups before its own. It is admitted if that leaves its first token at most `max_staleness` updates
    behind; then only a group that others overtake can grow too old (AReaL, arXiv:2505.24298, eq. 3). Nor are
    more admitted than keep engines and learner busy: while no batch stands ready, as many as engines can
    take; else up to `READY_BATCHES`.

    After every verb: submitted == accepted + filtered + running.

    Args:
        groups_per_step: n.
        max_staleness: in updates.
        submitted: groups that engines were asked for.
        accepted: finished and fit to train on: `trained` of them are, the others wait.
        filtered: given up: too old, without a signal, or without a reward.
        running: the others.
    """

    groups_per_step: int
    max_staleness: int
    submitted: int = 0
    accepted: int = 0
    filtered: int = 0
    running: int = 0
    trained: int = 0
    updates_pending: int = 0

    def capacity(self, engines_take: int) -> int:
        """Groups that may be submitted now, where engines could take so many."""
        in_time = (self.max_staleness + 1 - self.updates_pending) * self.groups_per_step
        useful = READY_BATCHES * self.groups_per_step
        if self.waiting < self.groups_per_step:
            useful = max(useful, self.waiting + self.running + engines_take)
        return max(0, min(in_time, useful) - self.waiting - self.running)

    @property
    def waiting(self) -> int:
        """Accepted groups that are not trained on yet."""
        return self.accepted - self.trained

    def submit(self, groups: int = 1) -> None:
        """Groups went to the engines."""
        self.submitted += groups
        self.running += groups
        self._check()

    def accept(self) -> None:
        """A running group finished and is fit to train on."""
        self.running -= 1
        self.accepted += 1
        self._check()

    def filter_running(self, groups: int = 1) -> None:
        """Running groups were given up, or finished unfit."""
        self.running -= groups
        self.filtered += groups
        self._check()

    def filter_waiting(self, groups: int = 1) -> None:
        """Accepted groups grew too old before their turn."""
        self.accepted -= groups
        self.filtered += groups
        self._check()

    def train(self) -> None:
        """A batch of accepted groups goes to the learner: until the next update, weights lag behind it."""
        self.trained += self.groups_per_step
        self.updates_pending += 1
        self._check()

    def update(self) -> None:
        """The engines hold the newest weights."""
        self.updates_pending = 0

    def state_dict(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes counts over; settings stay as they are."""
        for name in ("submitted", "accepted", "filtered", "running", "trained", "updates_pending"):
            setattr(self, name, state[name])
        self._check()

    def _check(self) -> None:
        assert self.submitted == self.accepted + self.filtered + self.running, self
        assert min(self.running, self.waiting, self.filtered) >= 0, self


def staleness_metrics(rollouts: Iterable[Rollout], version: int) -> dict[str, Any]:
    """How stale the tokens of a batch are for a learner that holds `version`.

    Returns:
        `staleness_mean` and `staleness_max` over the tokens, in updates, and `staleness_histogram`: entry i
        counts the tokens that are i updates stale.
    """
    counts: Counter[int] = Counter()
    for rollout in rollouts:
        versions, start = rollout.completion.weight_versions, 0
        while start < len(versions):  # they never fall from token to token
            end = bisect_right(versions, versions[start], start)
            counts[version - versions[start]] += end - start
            start = end
    tokens = counts.total()
    return {
        "staleness_mean": sum(updates * count for updates, count in counts.items()) / tokens,
        "staleness_max": max(counts),
        "staleness_histogram": [counts[updates] for updates in range(max(counts) + 1)],
    }
