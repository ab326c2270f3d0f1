"""The short way through plain steps: the model is asked, and answers are taken, as by vLLM's scheduler."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput

from kimi_linear.config import mla_twin, preset
from rlscale.rollout.scheduling import PlainDecoding
from rlscale.rollout.vllm_engine import VLLMEngine
from rlscale.types import FinishedGroup, GroupRequest, Sampling

pytestmark = pytest.mark.vllm

HYBRID = preset(
    "tiny",
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]},
)
CONTEXT, PLACES, GROUPS = 100, 12, 10
CACHE_GIB = 4.5e-4  # full before PLACES sequences have come to their ends
STOP = HYBRID.eos_token_id


class Kind(NamedTuple):
    """Which of vLLM's schedulers and runners."""

    name: str
    overlaps: bool  # a step is prepared while the last one is computed
    second_runner: bool


KINDS = [Kind("cpu", False, False), Kind("overlapping", True, False), Kind("gpu", True, True)]

Chosen = Callable[[str, int], int]
"""The token that a sequence draws at a place."""


class Answers:
    """Answers for an engine's model: a sequence's token is a function of its name and place alone."""

    def __init__(self, choose: Chosen) -> None:
        self.asked: list[dict[str, Any]] = []
        self._choose = choose
        self._answer: ModelRunnerOutput | None = None

    def execute_model(self, scheduled: Any, non_block: bool = False) -> Future[Any]:  # noqa: ARG002
        cached = scheduled.scheduled_cached_reqs
        self.asked.append(
            {
                "new": [(r.req_id, r.block_ids, r.num_computed_tokens) for r in scheduled.scheduled_new_reqs],
                "cached": list(
                    zip(
                        cached.req_ids,
                        cached.new_block_ids,
                        cached.num_computed_tokens,
                        cached.num_output_tokens,
                        strict=True,
                    )
                ),
                "resumed": set(cached.resumed_req_ids),
                "all": dict(cached.all_token_ids),
                "tokens": dict(scheduled.num_scheduled_tokens),
                "total": scheduled.total_num_scheduled_tokens,
                "finished": set(scheduled.finished_req_ids),
                "preempted": set(scheduled.preempted_req_ids or ()),
                "zero": scheduled.new_block_ids_to_zero,
                "others": (
                    scheduled.scheduled_spec_decode_tokens,
                    scheduled.scheduled_encoder_inputs,
                    scheduled.free_encoder_mm_hashes,
                    scheduled.kv_cache_block_copies,
                    scheduled.num_spec_tokens_to_schedule,
                ),
            }
        )
        if not scheduled.num_scheduled_tokens:
            return done(EMPTY_MODEL_RUNNER_OUTPUT)
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in scheduled.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        names = list(scheduled.num_scheduled_tokens)
        random.Random(len(self.asked)).shuffle(names)  # rows of the batch have an order of their own
        tokens = [self._choose(name, computed[name] + scheduled.num_scheduled_tokens[name]) for name in names]
        column = np.array(tokens).reshape(-1, 1)
        self._answer = ModelRunnerOutput(
            names,
            {name: row for row, name in enumerate(names)},
            [[token] for token in tokens],
            LogprobsLists(column, -column / 64, np.ones(len(names), dtype=int)),
        )
        return done(None)

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Any:  # noqa: ARG002
        assert self._answer is not None
        answer, self._answer = self._answer, None
        return done(answer) if non_block else answer


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@pytest.fixture(scope="module", params=["hybrid", "mla"])
def engine(request: pytest.FixtureRequest) -> Iterator[VLLMEngine]:
    shape = HYBRID if request.param == "hybrid" else mla_twin(HYBRID)
    with pytest.MonkeyPatch.context() as patch:
        # Random names would be forgotten in a random order, and their pages given out again in another.
        patch.setenv("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1")
        with closing(
            VLLMEngine(shape, torch.float32, CONTEXT, PLACES, CACHE_GIB, in_flight="keep")
        ) as engine:
            yield engine


def prepare(engine: VLLMEngine, kind: Kind, choose: Chosen, *, plain: bool) -> tuple[Answers, list[None]]:
    """Gives the engine another scheduler, and answers for a model.

    Returns:
        The answers, and a list that grows with each step that vLLM's own code schedules.
    """
    core: Any = engine._engine.engine_core.engine_core
    old, overlaps = core.scheduler, kind.overlaps
    core.scheduler = (AsyncScheduler if overlaps else Scheduler)(
        old.vllm_config,
        old.kv_cache_config,
        core.structured_output_manager,
        old.block_size,
        hash_block_size=old.block_size,
        log_stats=False,
    )
    core.scheduler.use_v2_model_runner = kind.second_runner
    core.batch_queue, core.batch_queue_size = (deque(maxlen=2), 2) if overlaps else (None, 1)
    core.step_fn = core.step_with_batch_queue if overlaps else core.step
    core.async_scheduling = overlaps
    answers = Answers(choose)
    executor = core.model_executor
    executor.execute_model, executor.sample_tokens = answers.execute_model, answers.sample_tokens
    # Of weights, which do not matter here.
    executor.collective_rpc = lambda call, *_: [["generate"] if call == "get_supported_tasks" else []]
    engine._version = 0
    core.set_weight_version("0")
    calls: list[None] = []
    schedule = core.scheduler.schedule

    def counted(*args: Any) -> Any:
        calls.append(None)
        return schedule(*args)

    core.scheduler.schedule = counted
    engine._decoding = PlainDecoding(engine._engine)
    if not plain:
        core.scheduler.schedule = counted
        del core.scheduler.update_from_output
    return answers, calls


def requests(seed: int) -> list[GroupRequest]:
    rng = random.Random(seed)
    return [
        GroupRequest(
            key,
            [rng.randrange(3, 30) for _ in range(rng.randrange(1, 20))],
            Sampling(max_tokens=rng.randrange(1, CONTEXT - 20), samples=rng.randrange(1, 4), seed=key),
        )
        for key in range(GROUPS)
    ]


def chooser(seed: int) -> Chosen:
    def choose(name: str, place: int) -> int:
        drawn = crc32(f"{seed} {name} {place}".encode())
        return STOP if drawn % 200 == 0 else 3 + drawn % 61

    return choose


def drive(engine: VLLMEngine, seed: int) -> tuple[list[FinishedGroup], list[int]]:
    """Groups come one after the other; some are forgotten, and weights replaced, while others are drawn."""
    rng = random.Random(seed)
    todo = requests(seed)
    finished: list[FinishedGroup] = []
    forgotten: list[int] = []
    while todo or engine.unfinished:
        if todo and rng.random() < 0.6:
            engine.submit([todo.pop()])
        if rng.random() < 0.02:
            forgotten.append(engine.abort([rng.randrange(GROUPS)]))
        if rng.random() < 0.05:
            engine._replace(lambda *_: [], None, (engine._version or 0) + 1)
        finished += engine.step()
    return finished, forgotten


def read_again(asked: list[dict[str, Any]]) -> bool:
    """Whether a sequence lost its pages and was read again: the second runner takes it for new."""
    new = [name for step in asked for name, *_ in step["new"]]
    return len(new) > len(set(new)) or any(step["resumed"] for step in asked)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_what_is_asked_and_what_comes_of_it_are_vllms_own(engine: VLLMEngine, kind: Kind) -> None:
    read_anew, steps, long_steps = [], 0, 0
    for seed in range(8):
        theirs, asked_by_vllm = prepare(engine, kind, chooser(seed), plain=False)
        expected = drive(engine, seed)
        ours, asked_for_long = prepare(engine, kind, chooser(seed), plain=True)
        assert drive(engine, seed) == expected
        assert len(ours.asked) == len(theirs.asked) == len(asked_by_vllm)
        for step, (one, other) in enumerate(zip(ours.asked, theirs.asked, strict=True)):
            assert one == other, (seed, step)
        read_anew.append(read_again(ours.asked))
        steps, long_steps = steps + len(asked_by_vllm), long_steps + len(asked_for_long)
    assert any(read_anew)
    assert long_steps < 0.8 * steps  # in most steps sequences wait for pages


def test_unfinished_sequences_are_told_when_weights_change(engine: VLLMEngine) -> None:
    answers, _ = prepare(engine, KINDS[0], lambda _, place: place, plain=True)
    engine.submit([GroupRequest(0, [5, 6, 7], Sampling(max_tokens=9))])
    for _ in range(4):
        assert not engine.step()
    (state,) = engine._engine.output_processor.request_states.values()
    assert state.detokenizer.num_output_tokens() == 1  # the first, which vLLM takes to the processor itself
    engine._replace(lambda *_: [], None, 1)
    assert state.detokenizer.num_output_tokens() == 4
    while engine.unfinished:
        finished = engine.step()
    ((completion,),) = [group.completions for group in finished]
    assert completion.token_ids == list(range(3, 12))
    assert completion.logprobs == [-token / 64 for token in completion.token_ids]
    assert completion.weight_versions == [0] * 4 + [1] * 5
    assert len(answers.asked) == 9


def test_outputs_that_somebody_wants_of_each_token_are_vllms(engine: VLLMEngine) -> None:
    prepare(engine, KINDS[0], lambda _, place: place, plain=True)
    params = SamplingParams(max_tokens=5, logprobs=0, flat_logprobs=True, detokenize=False, ignore_eos=True)
    engine._engine.add_request("one", {"prompt_token_ids": [5, 6]}, params)
    seen = []
    while engine._engine.has_unfinished_requests():
        (output,) = engine._engine.step()
        seen.append(len(output.outputs[0].token_ids))
    assert seen == [1, 2, 3, 4, 5]
