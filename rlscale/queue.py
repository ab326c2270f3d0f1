"""A queue of runs over whatever CPUs and GPUs the cluster has free.

A *lane* is a set of workers that trains one run after another: runs that differ in task, length, budget or
seed alone share it, unless they start from different checkpoints, because an engine takes most of a minute to
start. Lanes open as long as the cluster has room for one more and runs wait for it, and close when no waiting
run fits them. A run whose workers died, their machine lost for example, goes back to the end of the queue and
continues from its newest checkpoint on new ones.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlscale import cluster
from rlscale.config import EarlyStopConfig, RunConfig
from rlscale.errors import UserError, WorkerDied
from rlscale.events import RunEvent
from rlscale.runs.checkpoints import Checkpoints
from rlscale.runs.folder import RunFolder
from rlscale.runs.reading import read_run, read_status
from rlscale.workers import Workers, summary

_POLL_S = 1.0
"""How often free resources are looked at while runs are under way."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A run of a sweep: what to train, into which folder, the context that it needs of an engine in tokens,
    and what to do about an earlier attempt there."""

    config: RunConfig
    folder: Path
    context: int
    overwrite: bool = False
    resume: bool = False
    attempt: int = 0

    @property
    def lane(self) -> str:
        """Cells of equal `lane` can use the same workers: these depend on nothing else that a grid varies."""
        return f"{self.config.architecture} {self.config.model.checkpoint or ''}"

    @property
    def shared_warm_start(self) -> Path:
        """Where runs that differ in their budget alone leave their warm start."""
        length, seed = self.config.task.required_length, self.config.seed
        return self.folder.parent / "warm_starts" / f"{self.config.architecture}_length{length}_seed{seed}"

    def open(self) -> RunFolder:
        """The run's folder, created or resumed."""
        if self.resume:
            return RunFolder.resume(self.folder, self.config)
        return RunFolder.create(self.folder, self.config, self.overwrite)

    def again(self) -> Cell:
        """The next attempt, which continues what this one has left."""
        return replace(self, attempt=self.attempt + 1, resume=read_status(self.folder) is not None)


def run_queue(
    cells: Sequence[Cell],
    *,
    retries: int,
    early_stop: EarlyStopConfig,
    wait: float = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[RunEvent]:
    """Trains all cells, yielding the events of all of them as they come; `failed` ends a cell for good.

    Once `stop()` is true no cell begins, and those under way are saved after their step.

    Args:
        cells: in the order in which they should start.
        retries: how often a cell whose workers died is continued on new ones.
        early_stop: which cells are given up as hopeless.
        wait: seconds to wait for CPUs and GPUs that the cluster lacks, for an autoscaler to add them.
    """
    queue = _Queue(list(cells), retries, early_stop, wait)
    try:
        while queue.waiting or queue.busy:
            if stop():
                queue.stop()
            queue.assign()
            yield from queue.open_lane()
            yield from queue.listen()
    finally:
        queue.close()


class _LaneActor:
    """The workers of a lane, in a process beside the driver, on its machine and so on its disk."""

    def __init__(self) -> None:
        self._workers: Workers | None = None
        self._stopping = False

    def start(self, config: RunConfig, placement: PlacementGroup, context: int) -> None:
        self._workers = Workers(config, placement, context)

    def train(self, cell: Cell, early_stop: EarlyStopConfig) -> Iterator[RunEvent]:
        assert self._workers is not None
        with cell.open() as run:
            events = self._workers.train(cell.config, run, cell.shared_warm_start, lambda: self._stopping)
            for event in events:
                yield event
                # Step 0 has no metrics, and a run without any has no summary.
                if not event.metrics or not early_stop.evaluations:
                    continue
                hopeless = _evaluations_in_a_row(run.path, early_stop.pass_rate)
                if hopeless >= early_stop.evaluations:
                    events.close()
                    reason = f"pass rate {early_stop.pass_rate:g} or less in {hopeless} evaluations"
                    run.finish(summary(read_run(run.path)), abandoned=reason)
                    yield RunEvent(event.run, "abandoned", event.step, message=reason)
                    return

    def stop(self) -> None:
        """For a call beside `train`, which ends after its step."""
        self._stopping = True

    def close(self) -> None:
        if self._workers is not None:
            self._workers.__exit__(None, None, None)


def _evaluations_in_a_row(folder: Path, pass_rate: float) -> int:
    """How many of a run's evaluations, the newest and those before it, passed no more often than that.

    Counted on disk: there a resumed run has its earlier ones, and one that went back has each once.
    """
    newest_first = reversed(read_run(folder).evaluations)
    return sum(1 for _ in takewhile(lambda evaluation: evaluation["pass_rate"] <= pass_rate, newest_first))


def _described(error: Exception, folder: Path) -> str:
    """An unforeseen error in one line; the whole of it is left in the run's folder, if there is one."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    path = folder / "traceback.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return line
    return f"{line[:200]} (see {path})"


@dataclass(slots=True)
class _Lane:
    key: str
    placement: PlacementGroup
    asked: float
    actor: Any = None
    news: Any = None
    """What to wait for: the reservation, then the engines, then the events of a cell; None when idle."""
    cell: Cell | None = None

    def close(self) -> None:
        if self.actor is not None and ray.is_initialized():
            ray.wait([self.actor.close.remote()], timeout=10)
            ray.kill(self.actor)
        cluster.release(self.placement)


@dataclass(slots=True)
class _Queue:
    waiting: list[Cell]
    retries: int
    early_stop: EarlyStopConfig
    wait: float
    lanes: list[_Lane] = field(default_factory=list)
    contexts: dict[str, int] = field(init=False)
    """For each kind of lane, what the longest of all its cells needs."""

    def __post_init__(self) -> None:
        self.contexts = {}
        for cell in self.waiting:
            self.contexts[cell.lane] = max(cell.context, self.contexts.get(cell.lane, 0))

    @property
    def busy(self) -> bool:
        return any(lane.cell for lane in self.lanes)

    def assign(self) -> None:
        """Gives idle lanes their next cell, and closes those that no waiting cell fits."""
        for lane in list(self.lanes):
            if lane.news is not None:
                continue
            fitting = [cell for cell in self.waiting if cell.lane == lane.key]
            ready = [cell for cell in fitting if not self._warm_start_under_way(cell)]
            if ready:
                lane.cell = ready[0]
                self.waiting.remove(ready[0])
                lane.news = lane.actor.train.remote(ready[0], self.early_stop)
            elif not fitting:
                self._close(lane)

    def open_lane(self) -> Iterator[RunEvent]:
        """Asks for one more lane if cells wait that no lane is free for, one reservation at a time."""
        if any(lane.actor is None for lane in self.lanes):
            return
        wanted = {cell.lane: cell for cell in reversed(self.waiting) if not self._warm_start_under_way(cell)}
        for lane in self.lanes:
            if lane.cell is None:
                wanted.pop(lane.key, None)
        if not wanted:
            return
        lanes_of = {key: sum(lane.key == key for lane in self.lanes) for key in wanted}
        key = min(reversed(wanted), key=lanes_of.__getitem__)  # the first cell's, where several have as few
        bundles = Workers.bundles(wanted[key].config)
        if not self.wait:
            try:
                cluster.check_fits(bundles)
            except UserError as error:
                if not self.lanes:
                    yield from self._give_up(key, str(error))
                return
            if self.lanes and not cluster.is_free(bundles):
                return
        placement = cluster.request(bundles)
        self.lanes.append(_Lane(key, placement, time.monotonic(), news=placement.ready()))

    def listen(self) -> Iterator[RunEvent]:
        """Waits a moment for news of the lanes and passes it on."""
        news = [lane.news for lane in self.lanes if lane.news is not None]
        ready = ray.wait(news, timeout=_POLL_S)[0] if news else []
        for lane in list(self.lanes):
            if lane.news in ready:
                yield from self._hear(lane)
            elif lane.actor is None:
                yield from self._reservation_late(lane)

    def stop(self) -> None:
        """Begins nothing more, and has the lanes end after their step; calling it again is harmless."""
        self.waiting.clear()
        for lane in self.lanes:
            if lane.cell:
                lane.actor.stop.remote()

    def close(self) -> None:
        for lane in list(self.lanes):
            self._close(lane)

    def _hear(self, lane: _Lane) -> Iterator[RunEvent]:
        try:
            if lane.actor is None:
                yield from self._start(lane)
            elif lane.cell is None:
                cluster.gather([lane.news], "lane")
                lane.news = None
            else:
                yield cluster.gather([next(lane.news)], "lane")[0]
        except StopIteration:
            lane.news = lane.cell = None
        except UserError as error:
            yield from self._failed(lane, error)
        except Exception as error:
            if lane.cell is None:
                raise
            # Nobody foresaw it, but it is this run's: the others go on, and on other workers.
            yield from self._failed(lane, UserError(_described(error, lane.cell.folder)))
            self._close(lane)

    def _failed(self, lane: _Lane, error: UserError) -> Iterator[RunEvent]:
        """The lane's cell failed or lost its workers; or, without a cell, the workers could not start."""
        running, died = lane.cell, isinstance(error, WorkerDied)
        cell = running or next((cell for cell in self.waiting if cell.lane == lane.key), None)
        if running and not died:
            lane.news = lane.cell = None  # the run's own fault: its workers serve the next
        else:
            self._close(lane)
        if cell is None:
            return
        if not running:
            self.waiting.remove(cell)
        if died and cell.attempt < self.retries:
            self.waiting.append(cell.again())
            yield RunEvent(cell.folder.name, "restarting", message=str(error))
            return
        yield RunEvent(cell.folder.name, "failed", message=str(error))
        if not running:
            yield from self._give_up(lane.key, str(error))  # what cannot start for one cannot for the others

    def _start(self, lane: _Lane) -> Iterator[RunEvent]:
        """Engines for a lane that has its reservation."""
        cell = next((cell for cell in self.waiting if cell.lane == lane.key), None)
        if cell is None:  # other lanes have taken all of them
            self._close(lane)
            return
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        lane.actor = (
            ray.remote(_LaneActor)
            # One thread trains, the other can be told to stop.
            .options(num_cpus=0, scheduling_strategy=here, max_concurrency=2)
            .remote()
        )
        lane.news = lane.actor.start.remote(cell.config, lane.placement, self.contexts[lane.key])
        yield RunEvent(cell.folder.name, "starting")

    def _reservation_late(self, lane: _Lane) -> Iterator[RunEvent]:
        """A reservation that waits for the sweep's own runs may take as long as they do; others may not."""
        waited = time.monotonic() - lane.asked
        if waited <= (self.wait or 30) or any(other.actor for other in self.lanes):
            return
        cell = next((cell for cell in self.waiting if cell.lane == lane.key), None)
        self._close(lane)
        if cell is not None:
            yield from self._give_up(
                lane.key, str(cluster.taken(Workers.bundles(cell.config), round(waited)))
            )

    def _give_up(self, key: str, reason: str) -> Iterator[RunEvent]:
        for cell in [cell for cell in self.waiting if cell.lane == key]:
            self.waiting.remove(cell)
            yield RunEvent(cell.folder.name, "failed", message=reason)

    def _warm_start_under_way(self, cell: Cell) -> bool:
        """Cells that share a warm start: the first makes it, the others start when it is there."""
        if not cell.config.warm_start.target_pass_rate:
            return False
        shared = cell.shared_warm_start
        under_way = any(lane.cell and lane.cell.shared_warm_start == shared for lane in self.lanes)
        return under_way and Checkpoints(shared, keep=1).latest() is None

    def _close(self, lane: _Lane) -> None:
        self.lanes.remove(lane)
        lane.close()
