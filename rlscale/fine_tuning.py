"""Supervised fine-tuning as a job of its own: it leaves a checkpoint to start RL from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from kimi_linear.checkpoint import save_checkpoint
from rlscale.config import FineTuneConfig
from rlscale.errors import UserError
from rlscale.learner.examples import Examples, supervised_data
from rlscale.learner.learner import LearnerSpec
from rlscale.models import check_tokenizer, model_config, tokenizer_for
from rlscale.runs.files import full_disk_named, refuse_file, replace_file, write_json
from rlscale.tasks import make_task
from rlscale.types import Example

CONFIG = "sft.yaml"
REPORT = "sft.json"
"""Beside the weights: the resolved config, and what the training took; the report marks the folder as
ours."""
_LOOKS = 20


@dataclass(frozen=True, slots=True)
class FineTuneReport:
    """What a fine-tuning took: steps, tokens of prompts and completions, seconds, and its last step's
    loss."""

    steps: int
    tokens: int
    wall_s: float
    loss: float


def fine_tune(
    config: FineTuneConfig,
    folder: Path,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, float], None] | None = None,
) -> FineTuneReport:
    """Trains and leaves weights, tokenizer, resolved config and report in `folder`.

    The weights are written at the end, in the released format and in `model.dtype`; until then nothing is.

    Args:
        overwrite: replace what an earlier call left there.
        on_progress: called with (step, loss) some twenty times.

    Raises:
        UserError: the config asks for the impossible, the folder is taken, an example is longer than the
            model's context, the loss is not finite, or the disk is full.
    """
    _refuse_taken(folder, overwrite)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = cuda but PyTorch sees no GPU: set it to cpu")
    shape = model_config(config.model, config.architecture)
    tokenizer = tokenizer_for(config.model)
    check_tokenizer(tokenizer, shape)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    data = supervised_data(config.data, task, tokenizer, config.seed)
    dtype = getattr(torch, config.model.dtype)
    # A CPU is slower in bfloat16 than in float32, a GPU many times faster; the steps are float32's on both.
    computes = dtype if config.device == "cuda" else torch.float32
    model = LearnerSpec(shape, computes, config.model.checkpoint).policy(config.seed).to(config.device)

    from rlscale.learner.supervised import Schedule, train_supervised

    last = float("nan")

    def after_step(step: int, loss: torch.Tensor) -> bool:
        nonlocal last
        if step % max(1, config.steps // _LOOKS) == 0 or step == config.steps:
            last = loss.item()
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss of step {step} is {last}: lower learning_rate={config.learning_rate}"
                )
            if on_progress is not None:
                on_progress(step, last)
        return False

    started = time.perf_counter()
    schedule = Schedule(config.steps, config.batch_size, config.learning_rate, config.warmup_steps)
    fitting = _Fitting(data, shape.max_position_embeddings)
    tokens = train_supervised(model.train(), tokenizer, fitting, schedule, config.seed, after_step)
    report = FineTuneReport(config.steps, tokens, time.perf_counter() - started, last)
    with full_disk_named(folder):
        save_checkpoint(model.to("cpu", dtype), folder)
        tokenizer.save_pretrained(folder)
        replace_file(
            folder / CONFIG, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode()
        )
        write_json(folder / REPORT, asdict(report))
    return report


@dataclass(frozen=True, slots=True)
class _Fitting:
    """Examples that are refused where they exceed the model's context."""

    examples: Examples
    context: int

    def at(self, number: int) -> Example:
        example = self.examples.at(number)
        if example.tokens > self.context:
            raise UserError(
                f"an example of {example.tokens} tokens exceeds the model's context of {self.context}: "
                "leave it out or raise model.overrides.model_max_length"
            )
        return example


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    refuse_file(folder, "the checkpoint")
    if not folder.exists():
        return
    ours = (folder / REPORT).exists()
    if any(folder.iterdir()) and not (ours and overwrite):
        remedy = "--overwrite replaces it" if ours else "choose a new or an empty folder"
        raise UserError(f"{folder} holds files already: {remedy}")
