"""Predictions beside what happened: runs that calibrate, and runs of other settings that are predicted.

python -m rlscale.plan.validation RESULTS.json --measured RUN... --predicted RUN...
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from rlscale.config import AsynchronousConfig, ModeConfig
from rlscale.errors import UserError
from rlscale.plan.cluster import Split, forecast
from rlscale.plan.hardware import Efficiency, find_device
from rlscale.plan.lengths import FixedLengths, Lengths
from rlscale.plan.measurements import WARM_STEPS, read_measurements, run_lengths
from rlscale.plan.plan import make_job, named_costs
from rlscale.runs.reading import RunRecord, read_run


def compare(measured: Sequence[Path], predicted: Path, lengths_of: Path | None = None) -> dict[str, Any]:
    """A run on CPUs as predicted from others, and as it was, with relative errors.

    Args:
        measured: runs that costs are fitted to; `predicted` must not be among them.
        lengths_of: run whose completions have the lengths to expect; None expects the right answer's.

    Raises:
        ValueError: `predicted` is among `measured`.
        UserError: as `rlscale.plan.plan.make_plan`.
    """
    if predicted.resolve() in {path.resolve() for path in measured}:
        raise ValueError(f"{predicted} is measured: it cannot be predicted too")
    record = read_run(predicted)
    config = record.config
    lengths: Lengths = FixedLengths(min(config.budget, config.task.required_length + 1))
    if lengths_of is not None:
        lengths = run_lengths(lengths_of, config.budget)
    cpu = find_device("cpu")
    measurements = read_measurements(measured, config.model, config.architecture, cpu)
    job = make_job(config, lengths, cpu, Efficiency(), measurements)
    found = forecast(job, config.mode, Split(config.rollout.workers, config.learner.workers))
    was = outcome(record)
    said = {
        "step_s": found.step_s,
        "tokens_per_s": found.tokens_per_s,
        "learner_idle": found.learner_idle,
        "rollout_idle": found.rollout_idle,
        "staleness_mean": found.staleness_mean,
    }
    return {
        "run": predicted.name,
        "mode": found.mode,
        "architecture": config.architecture,
        "prompts_per_step": config.rollout.prompts_per_step,
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "budget": config.budget,
        "steps": was.pop("steps"),
        "predicted": said,
        "outcome": was,
        "errors": {name: said[name] / was[name] - 1 for name in ("step_s", "tokens_per_s")},
        "costs": {name: [cost.value, cost.origin] for name, cost in named_costs(job, measurements).items()},
    }


def warm_steps(mode: ModeConfig, cold: int = WARM_STEPS) -> int:
    """Steps at the start of a run that are no measurement: in the `cold` first ones buffers are made and
    kernels compiled, and engines are not yet as far ahead of the learner as they will be."""
    return cold + (mode.max_staleness if isinstance(mode, AsynchronousConfig) else 0)


def outcome(record: RunRecord, cold: int = WARM_STEPS) -> dict[str, Any]:
    """How a run's steps came out, for comparison with a `Forecast`.

    Seconds and tokens/s are medians, because a machine's hiccups belong to nobody's costs. Not so in the
    asynchronous mode, whose steps are unlike each other by nature (in most the learner waits for nothing, in
    some for long): there they are means.

    Args:
        cold: see `warm_steps`.

    Raises:
        UserError: the run has no steps beyond those.
    """
    config = record.config
    warm = warm_steps(config.mode, cold)
    steps = record.metrics[warm:]
    if not steps:
        raise UserError(f"{record.path}: needs a run of more than {warm} steps")
    trained = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    tokens = [trained * step["response_tokens_mean"] for step in steps]
    seconds = [step["step_s"] for step in steps]
    if isinstance(config.mode, AsynchronousConfig):
        step_s, tokens_per_s = mean(seconds), sum(tokens) / sum(seconds)
    else:
        step_s = median(seconds)
        tokens_per_s = median(count / taken for count, taken in zip(tokens, seconds, strict=True))
    return {
        "steps": len(steps),
        "step_s": step_s,
        "tokens_per_s": tokens_per_s,
        "learner_idle": mean(step["learner_idle_fraction"] for step in steps),
        "rollout_idle": mean(step["rollout_idle_fraction"] for step in steps),
        "staleness_mean": mean(step["staleness_mean"] for step in steps),
    }


def main() -> None:
    """Compares the runs that the command line names, prints a line each and writes all of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--measured", type=Path, nargs="+", required=True)
    parser.add_argument("--predicted", type=Path, nargs="+", required=True)
    parser.add_argument("--lengths-of", type=Path)
    arguments = parser.parse_args()
    cases = [compare(arguments.measured, run, arguments.lengths_of) for run in arguments.predicted]
    for case in cases:
        said, was = case["predicted"], case["outcome"]
        print(
            f"{case['run']}: step {said['step_s']:.3f} s predicted, {was['step_s']:.3f} s measured "
            f"({case['errors']['step_s']:+.1%}); tokens/s {said['tokens_per_s']:,.0f}, "
            f"{was['tokens_per_s']:,.0f} ({case['errors']['tokens_per_s']:+.1%})"
        )
    document = {"measured": [path.name for path in arguments.measured], "cases": cases}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    arguments.results.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
