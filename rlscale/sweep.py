"""Runs and grids of runs: what is checked before anything starts, and who runs where.

A sweep is one Ray task per architecture. The task starts its engine once and trains its cells one after the
other; architectures train side by side where the cluster has CPUs and GPUs for both, else in turn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray

from rlscale import cluster
from rlscale.config import RunConfig, SweepConfig
from rlscale.errors import UserError
from rlscale.events import RunEvent
from rlscale.learner.examples import ptx_batches
from rlscale.models import check_tokenizer, interruption_of, model_config, tokenizer_for
from rlscale.runs.checkpoints import Checkpoints
from rlscale.runs.folder import RunFolder
from rlscale.runs.reading import read_run, read_status
from rlscale.runs.trackers import check_trackers
from rlscale.tasks import encode_prompt, make_task
from rlscale.workers import Workers

_FOREVER = 7 * 24 * 3600.0
"""Seconds that a cell waits for CPUs and GPUs that other cells of its sweep use."""


def run_one(
    config: RunConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RunEvent]:
    """Trains one run into `folder`, yielding its events as they come; after a step at whose end `stop()` is
    true, no other begins.

    Raises:
        UserError: the config asks for the impossible, the folder is taken, the cluster is too small, or
            training failed. All but the last leave nothing behind.
    """
    check(config)
    RunFolder.check(folder, config, resume=resume, overwrite=overwrite)
    yield RunEvent(folder.name, "starting")
    cluster.connect(address)
    with Workers(config) as workers, _open(folder, config, resume, overwrite) as run:
        yield from workers.train(config, run, stop=stop)


def sweep(
    config: SweepConfig,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    address: str | None = None,
) -> Iterator[RunEvent]:
    """Trains all cells of a grid into folders below `folder`, yielding events of all runs as they come.

    With `resume`, finished cells are left alone, unfinished ones continued, missing ones started. A cell that
    fails does not stop the others.

    Raises:
        UserError: as `run_one` before anything starts; at the end, if cells failed, which and why.
    """
    plan: dict[str, list[_Cell]] = defaultdict(list)
    for run in config.cells():
        check(run)
        cell = _Cell(run, folder.absolute() / run_name(run), overwrite)
        if resume and (status := read_status(cell.folder)):
            if status["state"] == "finished":
                yield from _events_of(cell.folder)
                continue
            cell = replace(cell, resume=True)
        RunFolder.check(cell.folder, run, resume=cell.resume, overwrite=overwrite)
        plan[run.architecture].append(cell)
    if overwrite:
        for cell in chain(*plan.values()):
            Checkpoints(cell.shared_warm_start, keep=1).remove_all()

    cluster.connect(address)
    failures: dict[str, str] = {}
    for event in _merged([_train_cells.remote(cells) for cells in plan.values()]):
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


def check(config: RunConfig) -> None:
    """Finds what cannot work before anything is started or written.

    Raises:
        UserError: a tracker that is not installed, unknown task, impossible length, a model that cannot be
            built, a tokenizer that is not the model's, examples that cannot be read, prompts and budget that
            exceed the context or the learner's micro-batch.
    """
    check_trackers(config.trackers)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    model = model_config(config.model, config.architecture)
    tokenizer = tokenizer_for(config.model)
    check_tokenizer(tokenizer, model)
    ptx_batches(config.algorithm, config.learner.updates_per_step, task, tokenizer, config.seed)
    prompt = len(encode_prompt(tokenizer, task.problem("train", 0).prompt))
    interruption = interruption_of(config.algorithm, tokenizer)
    added = interruption.tokens if interruption else 0
    longest = prompt + config.budget + added
    if longest > model.max_position_embeddings:
        raise UserError(
            f"a prompt of {prompt} tokens, a budget of {config.budget} and an interruption of {added} exceed "
            f"the model's context of {model.max_position_embeddings}: lower task.required_length or "
            "rollout.max_tokens"
        )
    if longest > config.learner.tokens_per_micro_batch:
        raise UserError(
            f"a sequence of {longest} tokens exceeds learner.tokens_per_micro_batch="
            f"{config.learner.tokens_per_micro_batch}: raise it to {longest} or more"
        )


@dataclass(frozen=True, slots=True)
class _Cell:
    config: RunConfig
    folder: Path
    overwrite: bool
    resume: bool = False

    @property
    def shared_warm_start(self) -> Path:
        """Where runs that differ in their budget alone leave their warm start."""
        length, seed = self.config.task.required_length, self.config.seed
        return self.folder.parent / "warm_starts" / f"{self.config.architecture}_length{length}_seed{seed}"


@ray.remote(num_cpus=0, max_retries=0)
def _train_cells(cells: Sequence[_Cell]) -> Iterator[RunEvent]:
    """The cells of one architecture, on one set of workers."""
    yield RunEvent(cells[0].folder.name, "starting")
    try:
        workers = Workers(cells[0].config, timeout=_FOREVER)
    except UserError as error:
        for cell in cells:
            yield RunEvent(cell.folder.name, "failed", message=str(error))
        return
    with workers:
        for cell in cells:
            try:
                with _open(cell.folder, cell.config, cell.resume, cell.overwrite) as run:
                    yield from workers.train(cell.config, run, cell.shared_warm_start)
            except UserError as error:
                yield RunEvent(cell.folder.name, "failed", message=str(error))


def _merged(streams: list[Any]) -> Iterator[RunEvent]:
    """Events of all streams (Ray's generators of references) in the order in which they come."""
    while streams:
        ready, _ = ray.wait(streams, num_returns=1)
        for stream in ready:
            try:
                reference = next(stream)
            except StopIteration:
                streams.remove(stream)
                continue
            yield cluster.gather([reference], "sweep task")[0]


def _open(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> RunFolder:
    return RunFolder.resume(folder, config) if resume else RunFolder.create(folder, config, overwrite)


def _events_of(folder: Path) -> Iterator[RunEvent]:
    """A finished run told again, for tables that show all runs of a sweep."""
    record = read_run(folder)
    for evaluation in (record.evaluations[0], record.evaluations[-1]):
        yield RunEvent(folder.name, "training", evaluation["step"], record.metrics[-1], evaluation)
    yield RunEvent(folder.name, "finished", record.config.steps)
