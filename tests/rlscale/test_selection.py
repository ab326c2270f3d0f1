"""What is trained on: rewards that teach, the price of length, and prompts that are mastered."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlscale.algorithms import SelectionConfig
from rlscale.errors import UserError
from rlscale.experience import Prompt, ScoredGroup
from rlscale.selection import PassRates, Selection, overlong_penalty, teaches
from rlscale.types import Completion, Problem, Rollout


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


def test_the_overlong_penalty_begins_after_the_right_answer_and_its_end_of_sequence() -> None:
    assert overlong_penalty(91, budget=100, buffer=0.2, required_length=90) == 0
    assert overlong_penalty(94, budget=100, buffer=0.2, required_length=90) == pytest.approx(1 / 3)
    assert overlong_penalty(100, budget=100, buffer=0.2, required_length=99) == 0


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


def group(rewards: list[float], prompt: str = "p", place: int = 0) -> ScoredGroup:
    """Scored completions, passed where the reward is 1."""
    rollouts = [Rollout([1], Completion([2], [-1.0], [0], "stop"), reward, place) for reward in rewards]
    problem = Problem(prompt, "a", 1, place)
    passed = [reward == 1.0 for reward in rewards]
    return ScoredGroup(Prompt(place, problem, [1]), rollouts, ["a"] * len(rewards), passed)


SOLVED, UNSOLVED, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(
    ("rule", "taken", "still"),
    [
        ("keep", [True, True, True], 0),
        ("drop", [False, False, True], 0),
        ("redraw", [False, False, True], 2),
    ],
)
def test_each_rule_takes_its_groups_and_draws_until_it_has_enough(
    rule: str, taken: list[bool], still: int
) -> None:
    selection = Selection(SelectionConfig(equal_rewards=rule), prompts_per_step=3)  # type: ignore[arg-type]
    assert selection.to_draw() == 3
    assert [selection.takes(group(rewards)) for rewards in (SOLVED, UNSOLVED, MIXED)] == taken
    assert selection.to_draw() == still
    tally = selection.close_batch()
    assert (tally.solved, tally.unsolved) == ((0, 0) if rule == "keep" else (1, 1))
    assert tally.drawn == 3
    assert selection.to_draw() == 3


def test_a_batch_from_which_all_is_dropped_is_drawn_again() -> None:
    selection = Selection(SelectionConfig(equal_rewards="drop"), prompts_per_step=2)
    assert not selection.takes(group(SOLVED))
    assert not selection.takes(group(SOLVED))
    assert selection.to_draw() == 2


def test_the_search_for_prompts_ends_with_what_to_change() -> None:
    selection = Selection(SelectionConfig(equal_rewards="redraw", max_draws=3), prompts_per_step=2)
    selection.takes(group(MIXED))
    for _ in range(4):
        selection.takes(group(SOLVED))
    assert selection.to_draw() == 1
    selection.takes(group(UNSOLVED))
    with pytest.raises(UserError, match=r"of 6 prompts only 1 .*\(4 others .*max_draws") as caught:
        selection.to_draw()
    assert "\n" not in str(caught.value)


def test_mastered_prompts_are_passed_over_and_the_state_survives_json() -> None:
    def prompt_at(place: int) -> Prompt:
        return Prompt(place, Problem("abc"[place % 3], "a", 1, place), [1])

    selection = Selection(SelectionConfig(retire_pass_rate=0.9), prompts_per_step=4)
    prompts, place = selection.next_prompts(prompt_at, 0, 4)
    assert ([p.place for p in prompts], place) == ([0, 1, 2, 3], 4)
    selection.takes(group(SOLVED, prompt="b"))
    selection.takes(group(MIXED, prompt="c"))
    restored = Selection(SelectionConfig(retire_pass_rate=0.9), prompts_per_step=4)
    restored.load_state_dict(json.loads(json.dumps(selection.state_dict())))
    for each in (selection, restored):
        prompts, place = each.next_prompts(prompt_at, 4, 3)
        assert ([p.place for p in prompts], place) == ([5, 6, 8], 9)
        assert each.metrics() == {"mastered_prompts": 1}
        assert each.close_batch().kept == 2
    for prompt in "ac":
        selection.takes(group([1.0] * 50, prompt=prompt))
    with pytest.raises(UserError, match=r"all prompts of the task at 0\.9 or more"):
        selection.next_prompts(prompt_at, 0, 1)


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
