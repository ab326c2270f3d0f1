"""Predictions against real training in this process, by processor time: see `rlscale.plan.rehearsal`.

The asynchronous mode is left out: its predictions are 21% to 27% too low, as
experiments/plan_validation/README.md says.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from rlscale.config import RunConfig, parse_config
from rlscale.plan.hardware import Efficiency, find_device
from rlscale.plan.measurements import WARM_STEPS, run_lengths
from rlscale.plan.plan import make_plan
from rlscale.plan.rehearsal import rehearse
from rlscale.runs import read_run

STEPS = 6
MOST_TURNS = 3


def settings(prompts: int, samples: int, budget: int, mode: str = "synchronous") -> RunConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return parse_config(
        RunConfig,
        {
            "steps": STEPS,
            "model": {"overrides": small | {"full_attention_layers": [2], "first_k_dense_replace": 2}},
            "task": {"name": "reversal", "required_length": 3, "reward": "prefix"},
            "rollout": {
                "engine": "reference",
                "prompts_per_step": prompts,
                "samples_per_prompt": samples,
                "max_tokens": budget,
            },
            "mode": {"kind": mode},
            "evaluation": {"every": STEPS, "prompts": 1, "samples_per_prompt": 1},
            "checkpoint": {"every": STEPS},
        },
    )


def test_runs_that_were_not_measured_take_as_long_as_predicted(tmp_path: Path) -> None:
    measured = {"few": settings(2, 4, 8), "many": settings(8, 8, 20)}
    predicted = {
        "synchronous": settings(4, 8, 20),
        "one_step_off": settings(8, 4, 20, "one_step_off"),
    }
    folders: dict[str, list[Path]] = {name: [] for name in (*measured, *predicted)}
    for turn in range(MOST_TURNS):
        # In turns: whatever slows the machine down for a while slows all of them. More turns take noise away
        # from medians, not what is wrong with the model.
        for name, config in (measured | predicted).items():
            folders[name].append(tmp_path / f"{name}{turn}")
            for _ in rehearse(config, folders[name][-1]):
                pass
        costs = folders["few"] + folders["many"]
        errors = {}
        for name, config in predicted.items():
            lengths = run_lengths(folders["many"][0], config.budget)
            plan = make_plan(config, lengths, find_device("cpu"), None, costs, Efficiency())
            assert (
                plan.costs["decode step"].origin == plan.costs["operation of training"].origin == "measured"
            )
            (found,) = [each for each in plan.forecasts if each.mode == name]
            steps = [step for folder in folders[name] for step in read_run(folder).metrics[WARM_STEPS:]]
            errors[name] = found.step_s / median(step["step_s"] for step in steps) - 1
        if max(map(abs, errors.values())) < 0.15:
            return
    pytest.fail(f"errors of step_s after {MOST_TURNS} turns: {errors}")
