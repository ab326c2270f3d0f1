"""What is trained on: rewards that teach, the price of length, and prompts that are mastered."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlscale.algorithms import SelectionConfig
from rlscale.errors import UserError
from rlscale.selection import PassRates, check_draws, overlong_penalty, teaches


def test_only_different_rewards_teach() -> None:
    assert teaches([0.0, 0.0, 1.0])
    assert teaches([0.25, 0.5])
    assert not teaches([1.0, 1.0])
    assert not teaches([0.0])
    assert not teaches([0.3, 0.1 + 0.2])  # equal but for rounding


@pytest.mark.parametrize(
    ("tokens", "penalty"),
    [(0, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (100, 1.0), (130, 1.0)],
)
def test_the_overlong_penalty_equals_values_computed_by_hand(tokens: int, penalty: float) -> None:
    assert overlong_penalty(tokens, budget=100, buffer=0.2, required_length=20) == pytest.approx(penalty)


@given(
    budget=st.integers(1, 500),
    buffer=st.floats(0, 0.99),
    required=st.integers(1, 600),
    tokens=st.integers(0, 700),
)
def test_no_completion_of_the_required_length_is_punished_and_none_by_more_than_1(
    budget: int, buffer: float, required: int, tokens: int
) -> None:
    penalty = overlong_penalty(tokens, budget, buffer, required)
    assert 0 <= penalty <= 1
    assert penalty <= overlong_penalty(tokens + 1, budget, buffer, required)
    if tokens <= required + 1 or buffer == 0:
        assert penalty == 0


def test_the_search_for_prompts_ends_with_what_to_change() -> None:
    config = SelectionConfig(equal_rewards="redraw", max_draws=3)
    check_draws(drawn=11, found=3, needed=4, prompts_per_step=4, config=config)
    check_draws(drawn=12, found=4, needed=4, prompts_per_step=4, config=config)
    with pytest.raises(UserError, match=r"of 12 prompts only 3 .* needs 4: .*max_draws") as caught:
        check_draws(drawn=12, found=3, needed=4, prompts_per_step=4, config=config)
    assert "\n" not in str(caught.value)


def test_a_prompt_is_mastered_by_its_pass_rate_over_all_its_completions() -> None:
    rates = PassRates(0.9)
    assert not rates.is_mastered("never drawn")
    rates.record("a", [True] * 8 + [False] * 2)
    assert not rates.is_mastered("a")
    rates.record("a", [True] * 10)  # 18 of 20
    assert rates.is_mastered("a")
    rates.record("b", [True])
    assert rates.mastered == 2
    rates.record("a", [False])  # 18 of 21
    assert not rates.is_mastered("a")
    assert rates.mastered == 1


def test_pass_rates_survive_json_and_go_on_counting() -> None:
    rates, restored = PassRates(0.5), PassRates(0.5)
    rates.record("é", [True, False, False])
    restored.load_state_dict(json.loads(json.dumps(rates.state_dict())))
    for each in (rates, restored):
        each.record("é", [True])
        assert each.is_mastered("é")
    assert restored.state_dict() == rates.state_dict()


def test_without_a_rate_nothing_is_mastered_and_nothing_kept() -> None:
    rates = PassRates(None)
    rates.record("a", [True])
    assert not rates.is_mastered("a")
    assert rates.state_dict() == PassRates(None).state_dict()
