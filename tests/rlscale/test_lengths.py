"""What engines are built to hold: the sequences of the runs they serve, not the model's whole context."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from kimi_linear.config import preset
from rlscale import queue
from rlscale.config import EarlyStopConfig, ModelConfig, RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.lengths import SequenceLengths
from rlscale.models import tokenizer_for
from rlscale.queue import Cell
from rlscale.sweep import check
from rlscale.tasks import encode_prompt, make_task


def run_config(**changes: Any) -> RunConfig:
    return parse_config(RunConfig, {"task": {"name": "stack", "required_length": 9}} | changes)


def test_a_run_asks_for_its_prompt_and_budget_whatever_context_the_model_has() -> None:
    config = run_config(model={"preset": "48b-a3b", "overrides": {"vocab_size": 128, "eos_token_id": 2}})
    assert preset("48b-a3b").max_position_embeddings == 1 << 20
    # Nine pushes and nine pops of two characters, `=` and a token in front; nine elements and an end.
    assert check(config) == 2 * 2 * 9 + 2 + 9 + 1
    assert check(run_config(rollout={"max_tokens": 100})) == 2 * 2 * 9 + 2 + 100


def test_an_interruption_counts() -> None:
    interruption = {"answer_tokens": 5, "text": "0123"}
    config = run_config(algorithm={"kind": "grpo", "interruption": interruption})
    assert check(config) == check(run_config()) + 4 + 5


def test_prompts_of_many_lengths_get_room_for_longer_ones_within_the_models_context() -> None:
    task = {"name": "reasoning_gym/leg_counting", "required_length": 4}
    lengths = SequenceLengths.of(
        run_config(task=task), make_task(task["name"], 4, {}), tokenizer_for(run_config().model)
    )
    assert lengths.varies
    context = lengths.context(1 << 20)
    assert context == 2 * lengths.prompt + 5
    assert lengths.context(context - 3) == context - 3
    tokenizer, problems = tokenizer_for(run_config().model), make_task(task["name"], 4, {})
    prompts = [len(encode_prompt(tokenizer, problems.problem("held_out", key).prompt)) for key in range(200)]
    assert max(prompts) + 5 <= context


def test_a_context_that_is_set_is_taken_and_refused_where_it_is_impossible() -> None:
    needed = check(run_config())
    assert check(run_config(rollout={"context": needed})) == needed
    assert check(run_config(rollout={"context": needed + 7})) == needed + 7
    with pytest.raises(UserError, match=f"context={needed - 1} does not hold .* raise it to {needed} "):
        check(run_config(rollout={"context": needed - 1}))
    limit = preset("tiny").max_position_embeddings
    with pytest.raises(UserError, match=f"context={limit + 1} exceeds the model's context of {limit}"):
        check(run_config(rollout={"context": limit + 1}))


def test_engines_that_runs_of_a_sweep_share_hold_the_longest_of_them(tmp_path: Path) -> None:
    config = run_config()
    twin = config.model_copy(update={"architecture": "mla"})
    cells = [
        Cell(config, tmp_path / "a", 30),
        Cell(config, tmp_path / "b", 90),
        Cell(twin, tmp_path / "c", 50),
        Cell(config, tmp_path / "d", 60),
    ]
    waiting = queue._Queue(cells, retries=0, early_stop=EarlyStopConfig(), wait=0)
    assert waiting.contexts == {cells[0].lane: 90, cells[2].lane: 50}
    assert dataclasses.replace(cells[0]).again().context == 30


def test_runs_of_a_sweep_that_start_from_different_checkpoints_share_no_workers(tmp_path: Path) -> None:
    config = run_config()
    lanes = {
        Cell(config.model_copy(update={"model": ModelConfig(checkpoint=path)}), tmp_path, 30).lane
        for path in (None, tmp_path / "a", tmp_path / "b", tmp_path / "a")
    }
    assert len(lanes) == 3
