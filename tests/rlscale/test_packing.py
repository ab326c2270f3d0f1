"""Packing of rollouts into micro-batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlscale.errors import UserError
from rlscale.learner.packing import MinibatchTotals, first_fit_decreasing, pack
from rlscale.types import Completion, Rollout


@st.composite
def rollout_lists(draw: st.DrawFn) -> list[Rollout]:
    """Rollouts whose tokens are all different numbers, so that none can be taken for another; tokens in the
    midst of some were forced."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=25))
    number = itertools.count()
    rollouts = []
    for group, (prompt, completion) in enumerate(shapes):
        prompt_ids = [next(number) for _ in range(prompt)]
        token_ids = [next(number) for _ in range(completion)]
        forced = draw(st.none() | st.tuples(st.integers(1, completion), st.integers(1, completion)))
        sampled = Completion(token_ids, [-t / 64 for t in token_ids], [0] * completion, "stop", forced)
        rollouts.append(Rollout(prompt_ids, sampled, 0.0, group, advantage=group - 3.5))
    return rollouts


@settings(deadline=None)
@given(rollout_lists(), st.integers(41, 120))
def test_packing_loses_nothing_repeats_nothing_and_tells_the_order(
    rollouts: list[Rollout], budget: int
) -> None:
    batches = pack(rollouts, budget)
    assert sorted(i for batch in batches for i in batch.rollouts) == list(range(len(rollouts)))
    for batch in batches:
        assert batch.input_ids.shape == (1, batch.tokens)
        assert batch.tokens <= budget
        assert batch.cu_seqlens.dtype == torch.int32
        boundaries = batch.cu_seqlens.tolist()
        assert boundaries[0] == 0
        assert boundaries[-1] == batch.tokens
        row = batch.input_ids[0].tolist()
        at = 0
        for place, (i, (start, end)) in enumerate(
            zip(batch.rollouts, itertools.pairwise(boundaries), strict=True)
        ):
            rollout, drawn = rollouts[i], rollouts[i].completion.drawn()
            n = len(drawn)
            assert batch.groups[place] == rollout.group
            assert batch.lengths[place] == n
            assert row[start:end] == (rollout.prompt_ids + rollout.completion.token_ids)[:-1]
            tokens = slice(at, at + n)
            assert batch.targets[tokens].tolist() == [rollout.completion.token_ids[t] for t in drawn]
            assert batch.rollout_logprobs[tokens].tolist() == [rollout.completion.logprobs[t] for t in drawn]
            assert batch.advantages[tokens].tolist() == [rollout.advantage] * n
            # What predicts a token is the place of the token before it, inside the same sequence.
            predecessors = [rollout.prompt_ids[-1], *rollout.completion.token_ids[:-1]]
            predictors = batch.predictors[tokens].tolist()
            assert [row[predictor] for predictor in predictors] == [predecessors[t] for t in drawn]
            assert all(start <= predictor < end for predictor in predictors)
            at += n
        assert at == len(batch.targets) == len(batch.predictors)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200))
def test_first_fit_decreasing_leaves_no_two_bins_that_fit_into_one(lengths: list[int], capacity: int) -> None:
    bins = first_fit_decreasing(lengths, capacity)
    assert sorted(i for indices in bins for i in indices) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in indices) <= capacity for indices in bins)
    loads = [sum(lengths[i] for i in indices) for indices in bins]
    assert all(a + b > capacity for a, b in itertools.combinations(loads, 2))


def test_first_fit_decreasing_fills_bins_that_first_fit_would_leave_open() -> None:
    assert first_fit_decreasing([3, 7, 4, 6], 10) == [[0, 1], [2, 3]]


@settings(deadline=None)
@given(rollout_lists())
def test_packing_is_the_same_each_time(rollouts: list[Rollout]) -> None:
    for a, b in zip(pack(rollouts, 60), pack(rollouts, 60), strict=True):
        assert a.rollouts == b.rollouts
        assert torch.equal(a.input_ids, b.input_ids)


def rollout(prompt: int, completion: int) -> Rollout:
    return Rollout(
        [1] * prompt, Completion([2] * completion, [-1.0] * completion, [0] * completion, "stop"), 0.0, 9
    )


def test_a_sequence_that_just_fits_is_packed_and_one_token_more_names_the_setting() -> None:
    assert pack([rollout(5, 6)], 10)[0].tokens == 10  # the last token predicts nothing and is left out
    with pytest.raises(UserError, match=r"learner\.tokens_per_micro_batch = 10 .* 11 tokens: set it to 11"):
        pack([rollout(5, 6), rollout(5, 7)], 10)


@pytest.mark.parametrize(("prompt", "completion", "named"), [(0, 3, "prompt"), (3, 0, "completion")])
def test_an_empty_prompt_or_completion_is_refused(prompt: int, completion: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"group 9 has an empty {named}"):
        pack([rollout(prompt, completion)], 100)


def test_a_completion_without_a_logprob_per_token_is_refused() -> None:
    broken = rollout(2, 3)
    broken.completion.logprobs.pop()
    with pytest.raises(ValueError, match="group 9 has 3 completion tokens but 2 log-probabilities"):
        pack([broken], 100)


def test_totals_count_the_drawn_tokens_of_the_whole_minibatch() -> None:
    rollouts = [rollout(2, 3), rollout(2, 5), rollout(4, 1)]
    rollouts[1].completion.forced = (1, 3)
    rollouts[2].group = 4
    assert MinibatchTotals.of(rollouts) == MinibatchTotals(7, 3, {9: 6, 4: 1})


def test_a_completion_of_forced_tokens_alone_is_refused() -> None:
    forced = rollout(2, 3)
    forced.completion.forced = (0, 3)
    with pytest.raises(ValueError, match="group 9 has an empty completion"):
        pack([forced], 100)
