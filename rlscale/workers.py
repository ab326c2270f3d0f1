"""The actors of a run, started once and used for one run or for several of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch
from ray.util.placement_group import PlacementGroup

from rlscale.colocation import TakesTurns
from rlscale.config import AsynchronousConfig, RunConfig
from rlscale.errors import LearnerDied, UserError, WorkerDied
from rlscale.events import RunEvent
from rlscale.learner.actor import LearnerGroup, LearnerSpec
from rlscale.learner.replay import ReplayReport, replay
from rlscale.loop import train
from rlscale.models import interruption_of, model_config, tokenizer_for
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.engine import InFlight
from rlscale.rollout.pool import RolloutPool
from rlscale.runs.batches import load_batch
from rlscale.runs.checkpoints import Checkpoints
from rlscale.runs.files import write_json
from rlscale.runs.folder import RunFolder
from rlscale.runs.reading import REPLAY, RunRecord, read_config, read_run
from rlscale.tasks import Task, make_task
from rlscale.weights.synchronizer import Synchronizer
from rlscale.weights.transport import choose_transport

_REPORT = "warm_start.json"


class Workers(AbstractContextManager["Workers"]):
    """Rollout workers, learner and the synchronizer between them, on CPUs and GPUs that Ray reserved.

    Starting an engine takes most of a minute, so a sweep starts one `Workers` per architecture and calls
    `train` for each of its runs; these must agree in architecture, model, rollout workers and learner.

    Args:
        placement: reservation of `bundles(config)`.
        context: longest prompt and completion together that the runs have, in tokens.

    Raises:
        UserError: an engine has no memory, a checkpoint has another shape.
    """

    def __init__(self, config: RunConfig, placement: PlacementGroup, context: int) -> None:
        self.model_config = model_config(config.model, config.architecture)
        self.tokenizer = tokenizer_for(config.model)
        dtype = getattr(torch, config.model.dtype)
        self._stack = ExitStack()
        with self._stack:
            in_flight: InFlight = "refuse"
            if isinstance(config.mode, AsynchronousConfig):
                in_flight = config.mode.in_flight
            engine = EngineSpec(
                self.model_config,
                dtype,
                context,
                config.rollout,
                in_flight,
                interruption_of(config.algorithm, self.tokenizer),
            )
            self.rollouts = RolloutPool(engine, placement)
            self._stack.callback(self.rollouts.close)
            spec = LearnerSpec(self.model_config, dtype, config.model.checkpoint)
            transport = choose_transport(config.weight_sync, config.rollout, config.learner)
            self.learner = LearnerGroup(spec, config.learner, placement, config.rollout.workers, transport)
            self._stack.callback(self.learner.close)
            self.rollouts.ready()
            self._stack = self._stack.pop_all()

    @staticmethod
    def bundles(config: RunConfig) -> list[dict[str, float]]:
        """What the workers of a run ask `cluster.reserve` for: rollout workers first, then the learner."""
        return RolloutPool.bundles(config.rollout) + LearnerGroup.bundles(config.learner)

    def train(
        self,
        config: RunConfig,
        run: RunFolder,
        shared_warm_start: Path | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generator[RunEvent]:
        """One whole run: warm start or resume, RL, summary.

        If the learner dies, another one goes on from the run's newest checkpoint, `learner.max_restarts`
        times from the same one at most; the engines live on.

        Args:
            stop: see `rlscale.loop.train`.
            shared_warm_start: folder to take the warm-started learner from, and to leave it in if it is not
                there yet: runs that differ in their budget alone start from the same policy.

        Raises:
            UserError: as `rlscale.loop.train`, or the warm start does not reach its pass rate.
        """
        name = run.path.name
        deaths = 0
        while True:
            before = run.latest_checkpoint()
            try:
                yield from self._train(config, run, shared_warm_start, stop)
                break
            except Exception as error:
                # Its death can show first where others need it: engines read the weights that it published.
                death = error if isinstance(error, LearnerDied) else self.learner.death()
                if death is None:
                    raise
                deaths = deaths + 1 if run.latest_checkpoint() == before else 1
                if deaths > config.learner.max_restarts:
                    raise WorkerDied(
                        f"{death}; learner.max_restarts={config.learner.max_restarts} restarts from the same "
                        "checkpoint did not help"
                    ) from error
                run.rewind(str(death))
                self.learner.restart()
                step = run.progress().step or 0
                yield RunEvent(name, "restarting", step, message=f"{death}; going on from step {step}")
        if run.step < config.steps:
            run.stop()
            yield RunEvent(name, "stopped", run.step)
        else:
            run.finish(summary(read_run(run.path)))
            yield RunEvent(name, "finished", config.steps)

    def _train(
        self, config: RunConfig, run: RunFolder, shared_warm_start: Path | None, stop: Callable[[], bool]
    ) -> Iterator[RunEvent]:
        """Trains as long as the learner lives."""
        task = make_task(config.task.name, config.task.required_length, config.task.options)
        self.learner.start(config.learner, config.resolved_algorithm, config.seed)
        checkpoint = run.latest_checkpoint()
        if checkpoint is not None:
            self.learner.load(checkpoint[1])
        elif config.warm_start.target_pass_rate > 0:
            yield from self._warm_start(config, task, run, shared_warm_start)

        weights = Synchronizer(
            self.learner,
            self.rollouts,
            first_version=checkpoint[0] if checkpoint else 0,
            verify=config.weight_sync.verify,
        )
        # Who waits for completions is the loop, and while it does the learner does not learn.
        self.rollouts.resend_weights = weights.resend
        learner = TakesTurns(self.learner, self.rollouts) if config.rollout.sleep_level else self.learner
        if checkpoint is not None:  # else the evaluation before the first step says that training begins
            yield RunEvent(run.path.name, "training", run.step)
        for report in train(config, task, self.tokenizer, learner, self.rollouts, weights, run, stop):
            yield RunEvent(run.path.name, "training", report.step, report.metrics, report.evaluation)

    def _warm_start(
        self, config: RunConfig, task: Task, run: RunFolder, shared: Path | None
    ) -> Iterator[RunEvent]:
        """Trains on solutions, or takes over what a run of another budget trained."""
        kept = Checkpoints(shared, keep=1) if shared else None
        # What the policy after a warm start depends on: a folder from another config is not taken over.
        origin = config.model_dump(
            mode="json", include={"architecture", "seed", "model", "task", "warm_start"}
        )
        if kept and (whole := kept.latest()):
            found = json.loads((whole[1] / _REPORT).read_text())
            if found["origin"] == origin:
                self.learner.load(whole[1])
                run.log_warm_start(found["report"])
                return
        for news in self.learner.warm_start(task, self.tokenizer, config.warm_start, config.seed):
            if isinstance(news, tuple):
                yield RunEvent(run.path.name, "warm start", warm_start_pass_rate=news[1])
            else:
                report = asdict(news)
        if kept:
            with kept.write(0) as folder:
                self.learner.save(folder)
                write_json(folder / _REPORT, {"origin": origin, "report": report})
        run.log_warm_start(report)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def summary(record: RunRecord) -> dict[str, Any]:
    """The figures that stand for a finished run in tables and plots.

    `wall_s` are the seconds of warm start and RL, evaluations and engine start apart.
    """
    config, metrics, evaluations = record.config, record.metrics, record.evaluations
    warm_start = record.warm_start
    return {
        "architecture": config.architecture,
        "required_length": config.task.required_length,
        "budget": config.budget,
        "seed": config.seed,
        "pass_rate_start": evaluations[0]["pass_rate"],
        "pass_rate_end": evaluations[-1]["pass_rate"],
        "rollout_tokens_per_s": median(step["rollout_tokens_per_s"] for step in metrics),
        "cache_bytes_per_sequence": max(step["cache_bytes_per_sequence"] for step in metrics),
        "wall_s": metrics[-1]["wall_s"] + (warm_start["wall_s"] if warm_start else 0.0),
        "warm_start": warm_start,
    }


def replay_step(folder: Path) -> tuple[int, ReplayReport]:
    """The step that ended the run in `folder`, taken again in this process; its number and what it gave.

    Raises:
        UserError: the folder holds no run, or one that no such step ended.
    """
    config = read_config(folder)
    kept = Checkpoints(folder / REPLAY, keep=1).latest()
    if kept is None:
        raise UserError(f"{folder} holds no step to replay: a run whose learner can take no step leaves one")
    step, saved = kept
    spec = LearnerSpec(model_config(config.model, config.architecture), getattr(torch, config.model.dtype))
    learner = spec.build(config.learner, config.resolved_algorithm, config.seed)
    learner.load(saved)
    return step, replay(learner, load_batch(saved))
