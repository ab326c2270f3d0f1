"""Runs and grids of runs: what is checked before anything starts, and what is said of failures at last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rlscale import cluster
from rlscale.config import RunConfig, SweepConfig
from rlscale.errors import UserError
from rlscale.events import RunEvent
from rlscale.learner.examples import ptx_batches
from rlscale.lengths import SequenceLengths
from rlscale.models import check_tokenizer, model_config, tokenizer_for
from rlscale.queue import Cell, run_queue
from rlscale.rewards import user_reward
from rlscale.runs.checkpoints import Checkpoints
from rlscale.runs.folder import RunFolder
from rlscale.runs.reading import read_run, read_status
from rlscale.runs.trackers import check_trackers
from rlscale.tasks import make_task
from rlscale.workers import Workers


def run_one(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    wait: float = 0,
) -> Iterator[RunEvent]:
    """Trains one run into `folder`, yielding its events as they come; after a step at whose end `stop()` is
    true, no other begins.

    Args:
        wait: seconds to wait for CPUs and GPUs that the cluster lacks, for an autoscaler to add them.

    Raises:
        UserError: the config asks for the impossible, the folder is taken, the cluster is too small, or
            training failed. All but the last leave nothing behind.
    """
    cell = Cell(config, folder, check(config), overwrite, resume)
    RunFolder.check(folder, config, resume=resume, overwrite=overwrite)
    yield RunEvent(folder.name, "starting")
    cluster.connect(address)
    with (
        cluster.reserve(Workers.bundles(config), wait) as placement,
        Workers(config, placement, cell.context) as workers,
        cell.open() as run,
    ):
        yield from workers.train(config, run, stop=stop)


def sweep(
    config: SweepConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    wait: float = 0,
) -> Iterator[RunEvent]:
    """Trains all cells of a grid into folders below `folder`, yielding events of all runs as they come.

    Cells run side by side as the cluster has room, see `rlscale.queue`. With `resume`, finished cells are
    left alone, unfinished ones continued, missing ones started. A cell whose workers died is continued
    on new ones, `config.retries` times; one that fails does not stop the others.

    Args:
        stop: once it returns true, no run begins, and those under way are saved after their step.
        wait: seconds to wait for CPUs and GPUs that the cluster lacks, for an autoscaler to add them.

    Raises:
        UserError: as `run_one` before anything starts; at the end, if cells failed, which and why.
    """
    cells: list[Cell] = []
    for run in config.cells():
        cell = Cell(run, folder.absolute() / run_name(run), check(run), overwrite)
        if resume and (status := read_status(cell.folder)):
            if status["state"] == "finished":
                yield from _events_of(cell.folder)
                continue
            cell = replace(cell, resume=True)
        RunFolder.check(cell.folder, run, resume=cell.resume, overwrite=overwrite)
        cells.append(cell)
    if overwrite:
        for cell in cells:
            Checkpoints(cell.shared_warm_start, keep=1).remove_all()

    cluster.connect(address)
    failures: dict[str, str] = {}
    for event in run_queue(cells, retries=config.retries, early_stop=config.early_stop, wait=wait, stop=stop):
        if event.state == "failed":
            failures[event.run] = event.message
        yield event
    if failures:
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failures.items())
        raise UserError(f"{len(failures)} of the runs failed, --resume tries them again: {reasons}")


def run_name(config: RunConfig) -> str:
    """The folder of a cell inside its sweep."""
    return (
        f"{config.architecture}_length{config.task.required_length}_budget{config.budget}_seed{config.seed}"
    )


def check(config: RunConfig) -> int:
    """Finds what cannot work before anything is started or written.

    Returns:
        Tokens of prompt and completion together that an engine of this run must hold: `rollout.context`, or
        what task and budget come to.

    Raises:
        UserError: a tracker that is not installed, unknown task, no such reward function, impossible length,
            a model that cannot be built, a tokenizer that is not the model's, examples that cannot be read,
            prompts and budget that exceed the context or the learner's micro-batch.
    """
    check_trackers(config.trackers)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    if function := user_reward(config.task):
        function.close()
    model = model_config(config.model, config.architecture)
    tokenizer = tokenizer_for(config.model)
    check_tokenizer(tokenizer, model)
    ptx_batches(config.algorithm, config.learner.updates_per_step, task, tokenizer, config.seed)
    lengths = SequenceLengths.of(config, task, tokenizer)
    longest, limit = lengths.longest, model.max_position_embeddings
    parts = (
        f"a prompt of {lengths.prompt} tokens, a budget of {lengths.budget} and an interruption of "
        f"{lengths.interruption}"
    )
    context = config.rollout.context
    if context is not None and longest > context:
        raise UserError(f"rollout.context={context} does not hold {parts}: raise it to {longest} or more")
    if context is not None and context > limit:
        raise UserError(f"rollout.context={context} exceeds the model's context of {limit}: lower it")
    if longest > limit:
        raise UserError(
            f"{parts} exceed the model's context of {limit}: lower task.required_length or rollout.max_tokens"
        )
    if longest > config.learner.tokens_per_micro_batch:
        raise UserError(
            f"a sequence of {longest} tokens exceeds learner.tokens_per_micro_batch="
            f"{config.learner.tokens_per_micro_batch}: raise it to {longest} or more"
        )
    return context or lengths.context(limit)


def _events_of(folder: Path) -> Iterator[RunEvent]:
    """A finished run told again, for tables that show all runs of a sweep."""
    record = read_run(folder)
    for evaluation in (record.evaluations[0], record.evaluations[-1]):
        yield RunEvent(folder.name, "training", evaluation["step"], record.metrics[-1], evaluation)
    yield RunEvent(folder.name, "finished", record.config.steps)
