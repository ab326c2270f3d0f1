"""Predictions against real training in this process, by processor time: see `rlscale.plan.rehearsal`."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from statistics import median

import pytest

from rlscale.config import RunConfig, parse_config
from rlscale.plan.hardware import Efficiency, find_device
from rlscale.plan.measurements import run_lengths
from rlscale.plan.plan import make_plan
from rlscale.plan.rehearsal import rehearse
from rlscale.plan.validation import outcome
from rlscale.runs import read_run

STEPS = 12
MOST_TURNS = 3


def settings(
    prompts: int, samples: int, budget: int, mode: str = "synchronous", length: int = 3
) -> RunConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return parse_config(
        RunConfig,
        {
            "steps": STEPS,
            "model": {"overrides": small | {"full_attention_layers": [2], "first_k_dense_replace": 2}},
            "task": {"name": "reversal", "required_length": length, "reward": "prefix"},
            "rollout": {
                "engine": "reference",
                "prompts_per_step": prompts,
                "samples_per_prompt": samples,
                "max_tokens": budget,
            },
            "mode": {"kind": mode} | ({"max_staleness": 2} if mode == "asynchronous" else {}),
            "evaluation": {"every": STEPS, "prompts": 1, "samples_per_prompt": 1},
            "checkpoint": {"every": STEPS},
        },
    )


MEASURED = {
    "few": settings(2, 4, 8),
    "many": settings(8, 8, 20),
    "long prompts": settings(8, 4, 6, length=100),
    "prompts": settings(32, 4, 1),
    "prompt": settings(1, 8, 1),
}
PREDICTED = {
    "synchronous": settings(4, 8, 20),
    "one_step_off": settings(8, 4, 20, "one_step_off"),
    "asynchronous": settings(8, 8, 20, "asynchronous"),
}


def test_runs_that_were_not_measured_take_as_long_as_predicted(tmp_path: Path) -> None:
    folders: dict[str, list[Path]] = {name: [] for name in MEASURED | PREDICTED}
    for turn in range(MOST_TURNS):
        # A step of each in turn: what slows the machine down for a while slows all of them. More turns take
        # noise away, not what is wrong with the model.
        rehearsals = []
        for name, config in (MEASURED | PREDICTED).items():
            folders[name].append(tmp_path / f"{name} {turn}")
            rehearsals.append(rehearse(config, folders[name][-1]))
        for _ in zip_longest(*rehearsals):
            pass
        costs = [folder for name in MEASURED for folder in folders[name]]
        errors = {}
        for name, config in PREDICTED.items():
            lengths = run_lengths(folders["many"][0], config.budget)
            plan = make_plan(config, lengths, find_device("cpu"), None, costs, Efficiency())
            assert (
                plan.costs["decode step"].origin == plan.costs["operation of training"].origin == "measured"
            )
            (found,) = [each for each in plan.forecasts if each.mode == name]
            took = median(outcome(read_run(folder))["step_s"] for folder in folders[name])
            errors[name] = found.step_s / took - 1
        print(f"errors of step_s after turn {turn}: {errors}")
        if max(map(abs, errors.values())) < 0.15:
            return
    pytest.fail(f"errors of step_s after {MOST_TURNS} turns: {errors}")
