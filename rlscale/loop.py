"""The training loop: take experience, train, sync, evaluate, save.

`train` is the whole of it, in every mode. What it drives hides behind four objects: an `ExperienceSource`
that yields scored batches, a `LearnerGroup` that takes gradient steps, a `RolloutPool` that samples for the
first, and a `RunFolder` that remembers. Prompts and random numbers depend on the run's seed and on places in
the data alone, so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlscale.bubbles import StepWatch
from rlscale.colocation import Trains
from rlscale.config import LearnerConfig, RunConfig
from rlscale.errors import UserError
from rlscale.experience import Scorer, TrainingPrompts, evaluate, until_settled
from rlscale.flops import step_flops
from rlscale.learner.advantages import assign_advantages
from rlscale.learner.examples import ptx_batches
from rlscale.memory import GIB
from rlscale.models import model_config
from rlscale.rewards import user_reward
from rlscale.rollout.pool import RolloutPool
from rlscale.runs.batches import Batch, save_batch
from rlscale.runs.files import write_json
from rlscale.runs.folder import RunFolder
from rlscale.selection import Selection
from rlscale.sources import experience_source
from rlscale.staleness import staleness_metrics
from rlscale.tasks import Task
from rlscale.types import Sampling
from rlscale.weights.base import WeightSynchronizer

SOURCE_FILE = "source.json"
"""Beside a checkpoint's weights: where the experience source was."""

_STEPS_PER_SEED = 1 << 20
"""Seeds of the engine's random numbers that a run has: one a step for evaluations, the last for training."""


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
    learner: Trains,
    rollouts: RolloutPool,
    weights: WeightSynchronizer,
    run: RunFolder,
    stop: Callable[[], bool] = lambda: False,
) -> Generator[StepReport]:
    """Trains from the step after the run's newest checkpoint to `config.steps`; yields a report a step.

    When `stop()` says so at the end of a step, that step is saved and the last one.

    The learner must hold the weights of that checkpoint, and `weights` must number its next sync by its step.
    `wall_s` counts generating, training and syncing; evaluations and checkpoints are the observer's cost, not
    the run's.

    Raises:
        UserError: the disk is full, workers keep dying, a prompt and its budget exceed the context, or the
            learner could take none of several steps; the last batch is then kept for `rlscale replay`.
        LearnerDied: the learner must be replaced, and training begun again from the newest checkpoint.
    """
    last, generated_tokens, wall_s = run.progress()
    first_seed = config.seed * _STEPS_PER_SEED
    sampling = Sampling(config.budget, config.rollout.samples_per_prompt, config.rollout.temperature)
    model = model_config(config.model, config.architecture)
    selected = config.algorithm.selection
    imitated = ptx_batches(config.algorithm, config.learner.updates_per_step, task, tokenizer, config.seed)
    function = user_reward(config.task)
    source = experience_source(
        config.mode,
        rollouts,
        weights,
        TrainingPrompts(task, tokenizer, config.seed),
        Scorer(
            task,
            tokenizer,
            config.task.reward,
            config.end_of_thought,
            config.budget,
            selected.overlong_buffer,
            function,
        ),
        Selection(selected, config.rollout.prompts_per_step),
        config.rollout.prompts_per_step,
        replace(sampling, seed=first_seed + _STEPS_PER_SEED - 1),
    )
    # The source first: while it lives, its thread calls the function, which would start a new process.
    with function or nullcontext(), closing(source):
        if checkpoint := run.latest_checkpoint():
            source.load_state_dict(json.loads((checkpoint[1] / SOURCE_FILE).read_text()))
        synced = source.sync_weights()

        for step in range(0 if last is None else last + 1, config.steps + 1):
            metrics: dict[str, Any] = {}
            if step > 0:
                watch = StepWatch(rollouts)
                experience = source.next_batch()
                watch.lap("batch_wait_s")
                assign_advantages(experience.rollouts, config.algorithm)
                learned_from = experience.rollouts
                if selected.after_error == "drop":
                    groups = (until_settled(group, task, tokenizer) for group in experience.groups)
                    learned_from = [rollout for group in groups for rollout in group]
                batch = Batch(learned_from, config.rollout.temperature, imitated(step))
                trained = learner.train_step(batch.rollouts, batch.temperature, batch.examples)
                watch.lap("learner_s")
                metrics = staleness_metrics(experience.rollouts, synced.version)
                synced = source.sync_weights()
                watch.lap("sync_stall_s")

                generated_tokens += experience.generated_tokens
                wall_s += watch.total_s
                metrics |= experience.metrics() | trained | source.metrics() | watch.metrics()
                metrics |= {"sync_s": synced.wall_s, "weight_version": synced.version}
                metrics |= {"generated_tokens": generated_tokens, "wall_s": wall_s}
                metrics |= {"cache_bytes_per_sequence": rollouts.cache_bytes(experience.longest_sequence)}
                metrics |= {"rollout_peak_gib": rollouts.peak_bytes() / GIB}
                metrics |= step_flops(model, experience.rollouts, batch.rollouts)
                run.log_metrics(step, metrics)
                if trained["skipped_steps"] >= config.learner.max_skipped_steps:
                    raise _keep_for_replay(run, step, learner, batch, config.learner)

            evaluation: dict[str, Any] = {}
            if step % config.evaluation.every == 0 or step == config.steps:
                drawn = replace(sampling, seed=first_seed + step)
                held_out = evaluate(
                    rollouts, task, tokenizer, config.evaluation, drawn, config.end_of_thought
                )
                evaluation = held_out.evaluation() | {"generated_tokens": generated_tokens, "wall_s": wall_s}
                run.log_evaluation(step, evaluation)
                run.log_samples(step, held_out.samples())

            stopping = stop()
            if stopping or step % config.checkpoint.every == 0 or step == config.steps:
                with run.checkpoint(step) as folder:
                    learner.save(folder)
                    tokenizer.save_pretrained(folder)  # so that another run can start from this one
                    write_json(folder / SOURCE_FILE, source.state_dict())
            yield StepReport(step, metrics, evaluation)
            if stopping:
                return


def _keep_for_replay(
    run: RunFolder, step: int, learner: Trains, batch: Batch, config: LearnerConfig
) -> UserError:
    """Saves a step that could not be taken; returns the error that ends the run."""
    with run.saving_for_replay(step) as folder:
        learner.save(folder)
        save_batch(folder, batch)
    return UserError(
        f"no update of the last {config.max_skipped_steps} steps could be taken: loss or gradient "
        f"were not finite, or larger than learner.skip_grad_norm={config.skip_grad_norm:g}; "
        f"`rlscale replay {run.path}` shows where"
    )
