"""Advantages within groups."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from rlscale.learner.advantages import (
    advantages_of,
    assign_advantages,
    batch_normalised_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
)
from rlscale.types import Completion, Rollout

rewards_and_groups = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 1.0]) | st.floats(-5, 5, width=16), st.integers(0, 4)),
    max_size=40,
)


def test_advantages_equal_values_computed_by_hand() -> None:
    # Group 7: mean 0.5, deviations ±0.5, standard deviation sqrt(4 * 0.25 / 3); group 2: mean 0.25.
    rewards = [1.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0]
    groups = [7, 7, 2, 2, 7, 7, 2]
    third = 0.5 / 3
    scaled = group_relative_advantages(rewards, groups, scale="group")
    unscaled = group_relative_advantages(rewards, groups, scale="none")
    a, b = 0.5 / math.sqrt(1 / 3), math.sqrt((0.25 - 3 * third**2) / 2)
    assert unscaled == pytest.approx([0.5, -0.5, 0.5 - third, -third, 0.5, -0.5, -third])
    assert scaled == pytest.approx([a, -a, (0.5 - third) / b, -third / b, a, -a, -third / b])


@given(rewards_and_groups)
def test_advantages_of_a_group_have_mean_0_and_standard_deviation_1_or_are_all_0(
    pairs: list[tuple[float, int]],
) -> None:
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    advantages = group_relative_advantages(rewards, groups, scale="group")
    assert len(advantages) == len(rewards)
    for group in set(groups):
        own = [a for a, g in zip(advantages, groups, strict=True) if g == group]
        if len({r for r, g in pairs if g == group}) == 1:
            assert own == [0.0] * len(own)
        else:
            assert statistics.fmean(own) == pytest.approx(0, abs=1e-9)
            assert statistics.stdev(own) == pytest.approx(1)


def test_equal_rewards_that_no_float_mean_reproduces_give_no_advantage() -> None:
    # 0.1 + 0.2 is not 0.3 in floats; scaled by a standard deviation of 1e-17 the difference would become 1.
    assert group_relative_advantages([0.3, 0.1 + 0.2, 0.3], [0, 0, 0], scale="group") == [0, 0, 0]
    assert group_relative_advantages([0.1] * 3, [0] * 3, scale="group") == [0, 0, 0]


def test_a_group_of_one_has_advantage_0() -> None:
    assert group_relative_advantages([1.0, 0.0], [0, 1], scale="group") == [0, 0]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match=f"reward {reward} of completion 1 in group 5"):
        group_relative_advantages([0.0, reward], [5, 5], scale="group")


def test_advantages_scaled_over_the_batch_equal_values_computed_by_hand() -> None:
    # Centred: 0.5, -0.5 | 0.25, -0.25 | 0, 0; their standard deviation is sqrt(0.625 / 5).
    found = group_relative_advantages([1.0, 0.0, 0.5, 0.0, 1.0, 1.0], [0, 0, 1, 1, 2, 2], "batch")
    deviation = math.sqrt(0.125)
    assert found == pytest.approx([x / deviation for x in (0.5, -0.5, 0.25, -0.25, 0, 0)])
    assert group_relative_advantages([0.3, 0.1 + 0.2], [0, 0], "batch") == [0, 0]


def test_leave_one_out_advantages_equal_values_computed_by_hand() -> None:
    found = leave_one_out_advantages([1.0, 0.0, 0.5, 7.0], [0, 0, 0, 1])
    assert found == pytest.approx([0.75, -0.75, 0.0, 0.0])


def test_batch_normalised_advantages_equal_values_computed_by_hand() -> None:
    rewards, groups = [1.0, 0.0, 3.0, 2.0], [0, 0, 1, 1]
    # With a group's baseline ±0.5, standard deviation sqrt(1 / 3); without, deviations from 1.5.
    assert batch_normalised_advantages(rewards, groups, group_baseline=True) == pytest.approx(
        [math.sqrt(0.75), -math.sqrt(0.75)] * 2
    )
    deviation = math.sqrt(5 / 3)
    assert batch_normalised_advantages(rewards, groups, group_baseline=False) == pytest.approx(
        [x / deviation for x in (-0.5, -1.5, 1.5, 0.5)]
    )
    assert batch_normalised_advantages([0.3, 0.1 + 0.2], [0, 1], group_baseline=False) == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_leave_one_out_is_the_centred_reward_times_n_over_n_minus_1(seed: int) -> None:
    rng = random.Random(seed)
    rewards, groups = [rng.gauss(0, 1) for _ in range(24)], [i // 6 for i in range(24)]
    centred = group_relative_advantages(rewards, groups, "none")
    assert leave_one_out_advantages(rewards, groups) == pytest.approx([x * 6 / 5 for x in centred])


A, B = math.sqrt(0.5), math.sqrt(1.5)
"""±0.5 over its standard deviation in a group of two; and over that of ±0.5, 0, 0, sqrt(0.5 / 3)."""


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (GRPOConfig(), [A, -A, 0, 0]),
        (GRPOConfig(scale_by_std=False), [0.5, -0.5, 0, 0]),
        (DrGRPOConfig(), [0.5, -0.5, 0, 0]),
        (DAPOConfig(), [A, -A, 0, 0]),
        (GSPOConfig(), [A, -A, 0, 0]),
        (MirrorDescentConfig(), [0.5, -0.5, 0, 0]),
        (CISPOConfig(), [A, -A, 0, 0]),
        (CISPOConfig(advantage_scale="none"), [0.5, -0.5, 0, 0]),
        (ScaleRLConfig(), [B, -B, 0, 0]),
        (RLOOConfig(), [1, -1, 0, 0]),
        (ReinforcePlusPlusConfig(), [B, -B, 0, 0]),
        (ReinforcePlusPlusConfig(group_baseline=False), [0.5, -1.5, 0.5, 0.5]),
    ],
)
def test_each_algorithm_has_its_own_advantages(algorithm: AlgorithmConfig, expected: list[float]) -> None:
    rollouts = [
        Rollout([1], Completion([2], [-1.0], [0], "stop"), reward, group)
        for reward, group in ((1.0, 3), (0.0, 3), (1.0, 5), (1.0, 5))
    ]
    assign_advantages(rollouts, algorithm)
    assert [r.advantage for r in rollouts] == pytest.approx(expected)
    assert advantages_of([], [], algorithm) == []
