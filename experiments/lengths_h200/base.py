"""The policies that the runs of lengths_h200.yaml and hybrid_ratio.yaml start from.

    python experiments/lengths_h200/base.py hybrid --output runs/countdown_base/hybrid

Supervised training from random weights on countdowns of one length, until the policy is sometimes right.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from rlscale.config import Architecture, GRPOConfig, LearnerConfig, ModelConfig, WarmStartConfig
from rlscale.errors import UserError
from rlscale.learner.learner import LearnerSpec
from rlscale.models import model_config
from rlscale.runs.files import write_json
from rlscale.tasks import build_tokenizer, make_task


class TimeOver(Exception):
    """The training has had its seconds."""


def main(
    architecture: Annotated[Architecture, typer.Argument(help="As `architecture` of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint.")],
    preset: Annotated[str, typer.Option(help="Shape of the hybrid.")] = "small",
    length: Annotated[int, typer.Option(help="Required length of the answers, in tokens.")] = 256,
    batch: Annotated[int, typer.Option(help="Answers a step.")] = 64,
    target: Annotated[float, typer.Option(help="Pass rate to stop at.")] = 0.2,
    steps: Annotated[int, typer.Option(help="Optimizer steps, at most.")] = 2000,
    seconds: Annotated[float, typer.Option(help="Save what there is after so many.")] = 600,
) -> None:
    """Train, and leave a checkpoint in the released format with the curve of pass rates beside it."""
    shape = ModelConfig.model_validate({"preset": preset, "dtype": "bfloat16"})
    on_gpu = torch.cuda.is_available()
    spec = LearnerSpec(model_config(shape, architecture), torch.bfloat16 if on_gpu else torch.float32)
    learner = spec.build(LearnerConfig(num_gpus=int(on_gpu)), GRPOConfig(), seed=0)
    tokenizer, task = build_tokenizer(), make_task("countdown", length, {})
    config = WarmStartConfig(
        target_pass_rate=target, max_steps=steps, batch_size=batch, learning_rate=1e-3, evaluate_every=5
    )
    started, curve = time.perf_counter(), []

    def look(step: int, pass_rate: float) -> None:
        curve.append([step, pass_rate, round(time.perf_counter() - started, 2)])
        print(architecture, *curve[-1], flush=True)
        if curve[-1][2] > seconds:
            raise TimeOver

    try:
        learner.warm_start(task, tokenizer, config, 0, look)
    except (TimeOver, UserError) as error:
        print(f"{architecture}: {str(error) or 'time is over'}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    learner.model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_json(output / "base.json", {"length": length, "batch": batch, "target": target, "curve": curve})


if __name__ == "__main__":
    typer.run(main)
