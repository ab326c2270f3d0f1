"""Advantages: how much better a completion did than the others of its prompt, or of its batch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from rlscale.algorithms import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    MirrorDescentConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    ScaleRLConfig,
)
from rlscale.types import Rollout

EQUAL_REWARDS = 1e-9
"""Rewards of a group closer than this are equal: their differences are rounding, which a division by the
standard deviation would blow up to advantages of ±1."""

Scale = Literal["group", "batch", "none"]


def assign_advantages(rollouts: Sequence[Rollout], algorithm: AlgorithmConfig) -> None:
    """Fills in `Rollout.advantage` as `algorithm` defines it."""
    rewards = [rollout.reward for rollout in rollouts]
    groups = [rollout.group for rollout in rollouts]
    for rollout, advantage in zip(rollouts, advantages_of(rewards, groups, algorithm), strict=True):
        rollout.advantage = advantage


def advantages_of(rewards: Sequence[float], groups: Sequence[int], algorithm: AlgorithmConfig) -> list[float]:
    """The advantage of each completion.

    Args:
        rewards: of each completion.
        groups: of each completion; those of one prompt share a number, in any order.

    Raises:
        ValueError: a reward that is not finite, or lengths that differ.
    """
    match algorithm:
        case GRPOConfig(scale_by_std=scale):
            return group_relative_advantages(rewards, groups, "group" if scale else "none")
        case DAPOConfig() | GSPOConfig():
            return group_relative_advantages(rewards, groups, "group")
        case DrGRPOConfig() | MirrorDescentConfig():
            return group_relative_advantages(rewards, groups, "none")
        case CISPOConfig(advantage_scale=scale) | ScaleRLConfig(advantage_scale=scale):
            return group_relative_advantages(rewards, groups, scale)
        case RLOOConfig():
            return leave_one_out_advantages(rewards, groups)
        case ReinforcePlusPlusConfig(group_baseline=baseline):
            return batch_normalised_advantages(rewards, groups, baseline)


def group_relative_advantages(rewards: Sequence[float], groups: Sequence[int], scale: Scale) -> list[float]:
    """Rewards centred within their groups: GRPO's advantage (arXiv:2402.03300, section 4.1.2).

    A = (r - mean of its group) / scale. The scale is the standard deviation (n - 1 in the denominator) of the
    group's rewards, or of all centred rewards of the batch (ScaleRL, arXiv:2510.13786, section 3.2), or 1: a
    division within groups favours prompts whose rewards hardly differ (Dr. GRPO, arXiv:2503.20783). A group
    whose rewards are all equal says nothing about what to do better: its advantages are 0.
    """
    centred = [0.0] * len(rewards)
    for indices in _members(rewards, groups):
        own = [rewards[i] for i in indices]
        if max(own) - min(own) <= EQUAL_REWARDS:
            continue
        mean, deviation = fmean(own), stdev(own) if scale == "group" else 1.0
        for i in indices:
            centred[i] = (rewards[i] - mean) / deviation
    return _divided_by_deviation(centred) if scale == "batch" else centred


def leave_one_out_advantages(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """Each reward less the mean of the others of its group: RLOO (arXiv:2402.14740).

    A = r - (sum of the group - r) / (n - 1), and 0 for a completion without others.
    """
    advantages = [0.0] * len(rewards)
    for indices in _members(rewards, groups):
        total = math.fsum(rewards[i] for i in indices)
        for i in indices:
            if len(indices) > 1:
                advantages[i] = rewards[i] - (total - rewards[i]) / (len(indices) - 1)
    return advantages


def batch_normalised_advantages(
    rewards: Sequence[float], groups: Sequence[int], group_baseline: bool
) -> list[float]:
    """Rewards normalised over the batch: REINFORCE++ (arXiv:2501.03262, section 3).

    A = (x - mean of the batch) / standard deviation of the batch, where x is the reward or, in
    REINFORCE++-baseline, the reward less the mean of its group. All 0 where all x are equal.
    """
    centred = list(rewards)
    for indices in _members(rewards, groups):
        if group_baseline:
            mean = fmean(rewards[i] for i in indices)
            for i in indices:
                centred[i] = rewards[i] - mean
    mean = fmean(centred) if centred else 0.0
    return _divided_by_deviation([x - mean for x in centred])


def _divided_by_deviation(centred: list[float]) -> list[float]:
    if not centred or max(centred) - min(centred) <= EQUAL_REWARDS:
        return [0.0] * len(centred)
    deviation = stdev(centred)
    return [x / deviation for x in centred]


def _members(rewards: Sequence[float], groups: Sequence[int]) -> list[list[int]]:
    """Indices of the completions of each group."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i, (reward, group) in enumerate(zip(rewards, groups, strict=True)):
        if not math.isfinite(reward):
            raise ValueError(f"reward {reward} of completion {i} in group {group}: rewards must be finite")
        members[group].append(i)
    return list(members.values())
