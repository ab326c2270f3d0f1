"""The training loop: generate, score, train, sync, evaluate, save.

`train` is the whole of it. What it drives hides behind four objects: a `RolloutPool` that samples, a
`LearnerGroup` that takes gradient steps, a `WeightSynchronizer` that brings the first up to date with the
second, and a `RunFolder` that remembers. Problems and random numbers of a step depend on the run's seed and
the step's number alone, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlscale.config import RunConfig
from rlscale.experience import collect, evaluate
from rlscale.learner.actor import LearnerGroup
from rlscale.learner.advantages import assign_advantages
from rlscale.rollout.actor import RolloutPool
from rlscale.runs.folder import RunFolder
from rlscale.tasks import Task
from rlscale.types import Problem, Sampling
from rlscale.weights.base import WeightSynchronizer

_KEYS_PER_SEED = 1 << 32  # problems that one seed may draw before it would meet the next seed's
_STEPS_PER_SEED = 1 << 20  # likewise for the engine's random numbers


@dataclass(frozen=True, slots=True)
class StepReport:
    """What `train` yields after a step: its metrics, and the held-out result on steps that were evaluated.

    Step 0 is the policy before RL: it has an evaluation and no metrics. What there is not is empty.
    """

    step: int
    metrics: Mapping[str, Any]
    evaluation: Mapping[str, Any]


def train(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    learner: LearnerGroup,
    rollouts: RolloutPool,
    weights: WeightSynchronizer,
    run: RunFolder,
) -> Iterator[StepReport]:
    """Trains from the step after the run's newest checkpoint to `config.steps`; yields a report a step.

    The learner must hold the weights of that checkpoint. `wall_s` counts generating, training and syncing;
    evaluations and checkpoints are the observer's cost, not the run's.

    Raises:
        UserError: the disk is full, a worker died, or a prompt and its budget exceed the model's context.
    """
    last, generated_tokens, wall_s = run.progress()
    sampling = Sampling(config.budget, config.rollout.samples_per_prompt, config.rollout.temperature)
    weights.sync_weights()

    for step in range(0 if last is None else last + 1, config.steps + 1):
        drawn = replace(sampling, seed=config.seed * _STEPS_PER_SEED + step)
        metrics: dict[str, Any] = {}
        if step > 0:
            started = time.perf_counter()
            problems = training_problems(task, config, step)
            experience = collect(rollouts, task, tokenizer, problems, drawn, config.task.reward)
            assign_advantages(experience.rollouts, config.algorithm)
            trained = learner.train_step(experience.rollouts, config.rollout.temperature)
            synced = weights.sync_weights()
            step_s = time.perf_counter() - started

            generated_tokens += experience.generated_tokens
            wall_s += step_s
            metrics = experience.metrics() | trained
            metrics |= {"sync_s": synced.wall_s, "weight_version": synced.version, "step_s": step_s}
            metrics |= {"generated_tokens": generated_tokens, "wall_s": wall_s}
            metrics |= {"cache_bytes_per_sequence": rollouts.cache_bytes(experience.longest_sequence)}
            run.log_metrics(step, metrics)

        evaluation: dict[str, Any] = {}
        if step % config.evaluation.every == 0 or step == config.steps:
            held_out = evaluate(rollouts, task, tokenizer, config.evaluation, drawn)
            evaluation = held_out.evaluation() | {"generated_tokens": generated_tokens, "wall_s": wall_s}
            run.log_evaluation(step, evaluation)
            run.log_samples(step, held_out.samples())

        if step % config.checkpoint.every == 0 or step == config.steps:
            with run.checkpoint(step) as folder:
                learner.save(folder)
        yield StepReport(step, metrics, evaluation)


def training_problems(task: Task, config: RunConfig, step: int) -> list[Problem]:
    """The prompts of a step: keys that no other step or seed draws, the same for all architectures."""
    n = config.rollout.prompts_per_step
    first = config.seed * _KEYS_PER_SEED + (step - 1) * n
    return [task.problem("train", key) for key in range(first, first + n)]
