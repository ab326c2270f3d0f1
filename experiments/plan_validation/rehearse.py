"""Do rehearsals take as long as `rlscale plan`'s model says? Real training, by processor time.

    python experiments/plan_validation/rehearse.py RESULTS.json [--turns N]

The runs of `MEASURED` give costs and lengths, those of `PREDICTED` are predicted from them and compared; all
are cpu.yaml with other prompts, samples, budgets or modes. A step of each is taken in turn, so that whatever
else the machine does meets all of them alike.
"""

from __future__ import annotations

import json
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from rlscale.config import RunConfig, load_config
from rlscale.plan.rehearsal import rehearse
from rlscale.plan.validation import compare
from rlscale.runs.environment import environment

CONFIG = Path(__file__).parent / "cpu.yaml"
STEPS = 30
MEASURED = {
    "few": ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=4", "rollout.max_tokens=8"],
    "many": [],
    "more": ["rollout.prompts_per_step=16", "rollout.max_tokens=12"],
    "long_prompts": ["task.required_length=100", "rollout.samples_per_prompt=4", "rollout.max_tokens=6"],
    "prompts": ["rollout.prompts_per_step=32", "rollout.samples_per_prompt=4", "rollout.max_tokens=1"],
    "prompt": ["rollout.prompts_per_step=1", "rollout.max_tokens=1"],
}
ASYNCHRONOUS = ["mode.kind=asynchronous"]
PREDICTED = {
    "synchronous": ["rollout.prompts_per_step=4", "rollout.max_tokens=14"],
    "one_step_off": ["mode.kind=one_step_off", "rollout.samples_per_prompt=4"],
    "asynchronous": [*ASYNCHRONOUS, "rollout.prompts_per_step=4"],
    "asynchronous_2": [*ASYNCHRONOUS, "mode.max_staleness=2"],
    "asynchronous_2_keep": [*ASYNCHRONOUS, "mode.max_staleness=2", "mode.in_flight=keep"],
}


def main(
    results: Annotated[Path, typer.Argument(metavar="RESULTS")],
    turns: Annotated[int, typer.Option(min=1, help="Comparisons, each with runs of its own.")] = 3,
) -> None:
    """Rehearse, predict, compare."""
    cases = []
    for turn in range(turns):
        with tempfile.TemporaryDirectory(prefix="rlscale-rehearsals-") as folder:
            runs = {name: Path(folder) / name for name in MEASURED | PREDICTED}
            ends = [f"steps={STEPS}", f"evaluation.every={STEPS}", f"checkpoint.every={STEPS}"]
            rehearsals = [
                rehearse(load_config(RunConfig, CONFIG, [*changes, *ends]), runs[name])
                for name, changes in (MEASURED | PREDICTED).items()
            ]
            for _ in zip_longest(*rehearsals):
                pass
            measured = [runs[name] for name in MEASURED]
            for name in PREDICTED:
                case = {"turn": turn, **compare(measured, runs[name], lengths_of=runs["many"])}
                cases.append(case)
                said, was = case["predicted"]["step_s"], case["outcome"]["step_s"]
                print(
                    f"{name}: {said:.4f} s predicted, {was:.4f} s measured ({said / was - 1:+.1%})",
                    flush=True,
                )
    document = {"environment": environment(), "steps": STEPS, "cases": cases}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
