"""Supervised training on generated solutions, so that RL starts from a policy that is sometimes right."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlscale.config import WarmStartConfig
from rlscale.errors import UserError
from rlscale.learner.examples import Solutions, encode_example
from rlscale.learner.pass_rate import mean_probability
from rlscale.learner.supervised import Schedule, train_supervised
from rlscale.tasks import Task
from rlscale.types import Example

VALIDATION_PROBLEMS = 128
LR_WARMUP_STEPS = 20


@dataclass(frozen=True, slots=True)
class WarmStartReport:
    """What a warm start took: optimizer steps, seconds, and tokens of prompts and answers trained on.

    `pass_rate` is the mean probability that a sample at temperature 1 is the right answer.
    """

    steps: int
    pass_rate: float
    wall_s: float
    tokens: int


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: WarmStartConfig,
    seed: int,
    on_progress: Callable[[int, float], None] | None = None,
) -> WarmStartReport:
    """Trains `model` in place with TRL's SFTTrainer until its pass rate reaches `config.target_pass_rate`.

    Solutions and their order depend on the task and the seed alone, so two architectures see the same data.
    The loss counts the answer's tokens and the end-of-sequence token.

    Args:
        model: on the device to train on; keeps its mode (train or eval) and is left without gradients.
        tokenizer: has an end-of-sequence and a padding token.
        task: its training split is trained on, its validation split is measured on.
        seed: the run's.
        on_progress: called with (step, pass rate) at every evaluation, step 0 included.

    Raises:
        UserError: the target was not reached within `config.max_steps`.
    """
    started = time.perf_counter()
    was_training = model.training
    validation = [task.problem("validation", key) for key in range(VALIDATION_PROBLEMS)]
    examples = [encode_example(tokenizer, problem.prompt, problem.answer) for problem in validation]
    progress = _StopAtTarget(model, examples, tokenizer, config, on_progress)
    progress.look(step=0)
    tokens = 0
    if not progress.reached:
        schedule = Schedule(config.max_steps, config.batch_size, config.learning_rate, LR_WARMUP_STEPS)
        solutions = Solutions(task, tokenizer, seed)
        tokens = train_supervised(model, tokenizer, solutions, schedule, seed, progress.after_step)
    model.train(was_training)
    if not progress.reached:
        raise UserError(
            f"the warm start reached a pass rate of {progress.pass_rate:.3f}, short of "
            f"{config.target_pass_rate}, in {config.max_steps} steps: raise warm_start.max_steps, or lower "
            "warm_start.target_pass_rate or the task's difficulty"
        )
    wall_s = time.perf_counter() - started
    return WarmStartReport(progress.step, progress.pass_rate, wall_s, tokens)


class _StopAtTarget:
    """Measures the pass rate every `evaluate_every` steps and ends the training once it is reached."""

    def __init__(
        self,
        model: PreTrainedModel,
        examples: list[Example],
        tokenizer: PreTrainedTokenizerBase,
        config: WarmStartConfig,
        on_progress: Callable[[int, float], None] | None,
    ) -> None:
        self.model = model
        self.examples = examples
        self.tokenizer = tokenizer
        self.config = config
        self.on_progress = on_progress
        self.step = 0
        self.pass_rate = 0.0

    @property
    def reached(self) -> bool:
        return self.pass_rate >= self.config.target_pass_rate

    def look(self, step: int) -> None:
        self.step = step
        self.pass_rate = mean_probability(self.model, self.tokenizer, self.examples)
        if self.on_progress is not None:
            self.on_progress(step, self.pass_rate)

    def after_step(self, step: int, _loss: torch.Tensor) -> bool:
        if step % self.config.evaluate_every == 0 or step == self.config.max_steps:
            self.look(step)
        return self.reached
