"""Weights that arrive while vLLM has a step under way, as it always has on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.rollout.engine import group_requests
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import FinishedGroup, Sampling

pytestmark = pytest.mark.vllm

SHAPE = preset(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]},
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


@pytest.fixture(scope="module")
def policies() -> list[KimiLinearForCausalLM]:
    found = [KimiLinearForCausalLM(SHAPE) for _ in range(2)]
    for policy in found:
        with torch.no_grad():
            # Some other token's logit is always far above 0, so no completion ends before its budget.
            policy.lm_head.weight[SHAPE.eos_token_id] = 0
            policy.lm_head.weight.mul_(100)
    return found


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[VLLMEngine]:
    with closing(VLLMEngine(SHAPE, torch.float32, 64, 8, 0.02, in_flight="recompute")) as engine:
        # On a CPU vLLM has no such queue: there a step is begun and ended in one call.
        core = engine._engine.engine_core.engine_core
        core.batch_queue, core.batch_queue_size = deque(maxlen=2), 2
        core.step_fn = core.step_with_batch_queue
        yield engine


@pytest.fixture
def engine(shared_engine: VLLMEngine, policies: list[KimiLinearForCausalLM]) -> VLLMEngine:
    shared_engine.load_weights(named_released_tensors(policies[0]), 0)
    return shared_engine


def steps_under_way(engine: VLLMEngine) -> int:
    queue = engine._engine.engine_core.engine_core.batch_queue
    return sum(output.total_num_scheduled_tokens > 0 for _, output, _ in queue)


def drawn(engine: VLLMEngine) -> int:
    """Tokens that the first completion has."""
    scheduler = engine._engine.engine_core.engine_core.scheduler
    return min((request.num_output_tokens for request in scheduler.running), default=0)


def start(engine: VLLMEngine, max_tokens: int) -> None:
    """Submits, and leaves while the third tokens are being drawn."""
    sampling = Sampling(max_tokens=max_tokens, samples=2, seed=3)
    engine.submit(group_requests(PROMPTS, sampling))
    while not (steps_under_way(engine) and drawn(engine) == 2):
        assert not engine.step()


def rest(engine: VLLMEngine) -> list[FinishedGroup]:
    finished: list[FinishedGroup] = []
    while engine.unfinished:
        finished += engine.step()
    return sorted(finished, key=lambda group: group.key)


def test_tokens_of_a_step_under_way_are_of_the_weights_that_drew_them(
    engine: VLLMEngine, policies: list[KimiLinearForCausalLM]
) -> None:
    start(engine, max_tokens=6)
    engine.load_weights(named_released_tensors(policies[1]), 1)
    for prompt, group in zip(PROMPTS, rest(engine), strict=True):
        for completion in group.completions:
            assert completion.weight_versions == [0, 0, 0, 1, 1, 1]
            ids = torch.tensor([prompt + completion.token_ids])
            with torch.no_grad():
                both = torch.stack([policy(ids).logits[0].log_softmax(-1) for policy in policies])
            places = torch.arange(6)
            expected = both[completion.weight_versions, len(prompt) - 1 + places, completion.token_ids]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)


def test_what_a_step_under_way_finishes_is_returned_once(
    engine: VLLMEngine, policies: list[KimiLinearForCausalLM]
) -> None:
    start(engine, max_tokens=3)
    engine.load_weights(named_released_tensors(policies[1]), 1)
    assert engine.unfinished == 4
    finished = rest(engine)
    assert [group.key for group in finished] == [0, 1]
    assert {v for group in finished for c in group.completions for v in c.weight_versions} == {0}


def test_a_forgotten_request_had_the_tokens_of_all_its_samples(engine: VLLMEngine) -> None:
    start(engine, max_tokens=9)
    assert engine.abort([0]) == 2 * 2  # the third are being drawn
    assert engine.abort([0]) == 0
    assert [group.key for group in rest(engine)] == [1]


def test_what_a_step_under_way_finishes_can_still_be_forgotten(
    engine: VLLMEngine, policies: list[KimiLinearForCausalLM]
) -> None:
    start(engine, max_tokens=3)
    engine.load_weights(named_released_tensors(policies[1]), 1)
    assert engine.abort([0, 7]) == 2 * 3
    assert [group.key for group in rest(engine)] == [1]
