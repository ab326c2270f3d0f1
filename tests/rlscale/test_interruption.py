"""Completions that spend their budget are told to answer, whatever engine draws them."""

from __future__ import annotations

import pytest
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.rollout.engine import completion_seed
from rlscale.rollout.interruption import InterruptingEngine, Interruption, interrupted
from rlscale.rollout.reference_engine import ReferenceEngine
from rlscale.types import Completion, GroupRequest, Sampling

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]}
FORCED = [7, 8, 9]
EOS = 2


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    print("seed", torch.seed())
    model = KimiLinearForCausalLM(preset("tiny", SHAPE))
    model.config.eos_token_id = list(range(20))  # of 128 about equally likely tokens, each ends a completion
    return model


def engine(model: KimiLinearForCausalLM) -> ReferenceEngine:
    engine = ReferenceEngine(model.config, torch.float32, 64, 5)
    engine.load_weights(named_released_tensors(model), version=4)
    return engine


def test_thought_forced_tokens_and_answer_are_one_completion() -> None:
    thought = Completion([5, 6], [-0.5, -0.25], [3, 3], "length")
    answer = Completion([4, EOS], [-1.0, -2.0], [4, 4], "stop")
    whole = interrupted(thought, FORCED, answer)
    assert whole.token_ids == [5, 6, 7, 8, 9, 4, EOS]
    assert whole.logprobs == [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0, -2.0]
    assert whole.weight_versions == [3, 3, 4, 4, 4, 4, 4]
    assert whole.finish_reason == "stop"
    assert whole.drawn() == [0, 1, 5, 6]
    assert whole.drawn_tokens == 4


def test_only_completions_cut_off_by_their_budget_go_on_and_as_the_policy_would(
    model: KimiLinearForCausalLM,
) -> None:
    prompts = [torch.randint(3, 128, (n,)).tolist() for n in (4, 9, 1, 6)]
    sampling = Sampling(6, samples=8, seed=11)
    plain = engine(model).generate(prompts, sampling)
    report = InterruptingEngine(engine(model), Interruption(FORCED, 5)).generate(prompts, sampling)
    seen = set()
    for place, (prompt, group) in enumerate(zip(prompts, report.completions, strict=True)):
        for i, (before, now) in enumerate(zip(plain.completions[place], group, strict=True)):
            seen.add(before.finish_reason)
            if before.finish_reason == "stop":
                assert (now.token_ids, now.forced) == (before.token_ids, None)
                continue
            assert now.token_ids[:9] == [*before.token_ids, *FORCED]
            assert now.forced == (6, 9)
            seed = completion_seed(11, place, -1 - i)
            answer = engine(model).generate(
                [prompt + now.token_ids[:9]], Sampling(5, seed=seed, first_prompt=place)
            )
            assert now.token_ids[9:] == answer.completions[0][0].token_ids
            assert now.finish_reason == answer.completions[0][0].finish_reason
    assert seen == {"stop", "length"}
    drawn = sum(len(c.drawn()) for group in report.completions for c in group)
    assert report.generated_tokens == drawn


def test_aborted_groups_do_not_come_back_and_the_others_do(model: KimiLinearForCausalLM) -> None:
    interrupting = InterruptingEngine(engine(model), Interruption(FORCED, 30))
    sampling = Sampling(1, samples=3, seed=5)
    interrupting.submit([GroupRequest(key, [3 + key, 4], sampling) for key in range(6)])
    finished = []
    while len(interrupting._held) < 2:
        finished += interrupting.step()
    early = {group.key for group in finished}
    gone = {next(iter(interrupting._held)), 5} - early
    held = [c for key in gone & interrupting._held.keys() for c in interrupting._held[key].completions]
    tokens = interrupting.abort([*gone, 99])
    # One token of each completion that waits for its answer or has it, and of answers what there was.
    assert sum(c.drawn_tokens for c in held) <= tokens <= 3 * len(gone) * 31
    while interrupting.unfinished:
        finished += interrupting.step()
    assert sorted(group.key for group in finished) == sorted(set(range(6)) - gone)
    assert all(len(group.completions) == 3 for group in finished)
    assert (interrupting._held, interrupting._owners, interrupting._requests) == ({}, {}, {})
