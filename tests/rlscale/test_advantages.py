"""Advantages within groups."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlscale.config import GRPOConfig
from rlscale.learner.advantages import assign_advantages, group_relative_advantages
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
    scaled = group_relative_advantages(rewards, groups, scale_by_std=True)
    unscaled = group_relative_advantages(rewards, groups, scale_by_std=False)
    a, b = 0.5 / math.sqrt(1 / 3), math.sqrt((0.25 - 3 * third**2) / 2)
    assert unscaled == pytest.approx([0.5, -0.5, 0.5 - third, -third, 0.5, -0.5, -third])
    assert scaled == pytest.approx([a, -a, (0.5 - third) / b, -third / b, a, -a, -third / b])


@given(rewards_and_groups)
def test_advantages_of_a_group_have_mean_0_and_standard_deviation_1_or_are_all_0(
    pairs: list[tuple[float, int]],
) -> None:
    rewards, groups = [r for r, _ in pairs], [g for _, g in pairs]
    advantages = group_relative_advantages(rewards, groups, scale_by_std=True)
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
    assert group_relative_advantages([0.3, 0.1 + 0.2, 0.3], [0, 0, 0], scale_by_std=True) == [0, 0, 0]
    assert group_relative_advantages([0.1] * 3, [0] * 3, scale_by_std=True) == [0, 0, 0]


def test_a_group_of_one_has_advantage_0() -> None:
    assert group_relative_advantages([1.0, 0.0], [0, 1], scale_by_std=True) == [0, 0]


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(reward: float) -> None:
    with pytest.raises(ValueError, match=f"reward {reward} of completion 1 in group 5"):
        group_relative_advantages([0.0, reward], [5, 5], scale_by_std=True)


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_assign_advantages_fills_in_rollouts_as_the_algorithm_says(scale_by_std: bool) -> None:
    rollouts = [Rollout([1], Completion([2], [-1.0], [0], "stop"), reward, 3) for reward in (1.0, 0.0)]
    assign_advantages(rollouts, GRPOConfig(scale_by_std=scale_by_std))
    expected = math.sqrt(0.5) if scale_by_std else 0.5
    assert [r.advantage for r in rollouts] == pytest.approx([expected, -expected])
