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

from rlscale.plan.cluster import Split, forecast
from rlscale.plan.hardware import Efficiency, find_device
from rlscale.plan.lengths import FixedLengths, Lengths
from rlscale.plan.measurements import WARM_STEPS, read_measurements, run_lengths
from rlscale.plan.plan import make_job, named_costs
from rlscale.runs import read_run


def compare(measured: Sequence[Path], predicted: Path, lengths_of: Path | None = None) -> dict[str, Any]:
    """A run on CPUs as predicted from others, and as it was, with relative errors.

    Seconds of a step are medians, because a machine's hiccups belong to nobody's costs.

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
    steps = record.metrics[WARM_STEPS:]
    tokens = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    was = {
        "step_s": median(step["step_s"] for step in steps),
        "tokens_per_s": median(tokens * step["response_tokens_mean"] / step["step_s"] for step in steps),
        "learner_idle": median(step["learner_idle_fraction"] for step in steps),
        "staleness_mean": mean(step["staleness_mean"] for step in steps),
    }
    said = {
        "step_s": found.step_s,
        "tokens_per_s": found.tokens_per_s,
        "learner_idle": found.learner_idle,
        "staleness_mean": found.staleness_mean,
    }
    return {
        "run": predicted.name,
        "mode": found.mode,
        "architecture": config.architecture,
        "prompts_per_step": config.rollout.prompts_per_step,
        "samples_per_prompt": config.rollout.samples_per_prompt,
        "budget": config.budget,
        "steps": len(steps),
        "predicted": said,
        "outcome": was,
        "errors": {name: said[name] / was[name] - 1 for name in ("step_s", "tokens_per_s")},
        "costs": {name: [cost.value, cost.origin] for name, cost in named_costs(job, measurements).items()},
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
