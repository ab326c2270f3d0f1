"""Advantages: how much better a completion did than the others of its prompt."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev

from rlscale.config import AlgorithmConfig
from rlscale.types import Rollout

_EQUAL_REWARDS = 1e-9
"""Rewards of a group closer than this are equal: their differences are rounding, which a division by the
standard deviation would blow up to advantages of ±1."""


def assign_advantages(rollouts: Sequence[Rollout], algorithm: AlgorithmConfig) -> None:
    """Fills in `Rollout.advantage` as `algorithm` defines it."""
    rewards = [rollout.reward for rollout in rollouts]
    groups = [rollout.group for rollout in rollouts]
    for rollout, advantage in zip(
        rollouts, group_relative_advantages(rewards, groups, algorithm.scale_by_std), strict=True
    ):
        rollout.advantage = advantage


def group_relative_advantages(
    rewards: Sequence[float], groups: Sequence[int], scale_by_std: bool
) -> list[float]:
    """Rewards centred within their groups: GRPO's advantage (arXiv:2402.03300, section 4.1.2).

    A = (r - mean of its group) / standard deviation of its group (n - 1 in the denominator), or without the
    division, which favours prompts whose rewards hardly differ, in Dr. GRPO (arXiv:2503.20783). A group whose
    rewards are all equal says nothing about what to do better: its advantages are 0.

    Args:
        rewards: of each completion.
        groups: of each completion; those of one prompt share a number, in any order.

    Raises:
        ValueError: a reward that is not finite, or lengths that differ.
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if not math.isfinite(reward):
            raise ValueError(f"reward {reward} of completion {i} in group {group}: rewards must be finite")
        members[group].append(i)

    advantages = [0.0] * len(rewards)
    for indices in members.values():
        own = [rewards[i] for i in indices]
        if max(own) - min(own) <= _EQUAL_REWARDS:
            continue
        mean, scale = fmean(own), stdev(own) if scale_by_std else 1.0
        for i in indices:
            advantages[i] = (rewards[i] - mean) / scale
    return advantages
