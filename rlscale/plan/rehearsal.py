"""A real run whose clock is processor time: what it measures does not depend on who else uses the machine.

Loop, experience sources, engines, learner and run folder are a run's own; only the clock differs. An
engine's slice and a learner's step are taken one after the other in this process, and each moves the run's
clock by the processor time that it took, on a time line of its own: what engines draw while the learner
trains happens at the same time by this clock, as if each had a processor of its own. Scoring, transport and
waits of processes for each other take no time here.

    python -m rlscale.plan.rehearsal CONFIG FOLDER [KEY=VALUE]...
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from rlscale.config import AsynchronousConfig, RunConfig, load_config
from rlscale.learner.learner import Learner, LearnerSpec
from rlscale.lengths import SequenceLengths
from rlscale.loop import StepReport, train
from rlscale.memory import peak_bytes
from rlscale.models import interruption_of, model_config, tokenizer_for
from rlscale.rollout.actor import EngineSpec
from rlscale.rollout.engine import InFlight, RolloutEngine, group_requests
from rlscale.rollout.pool import SLICE_S, Usage, even_slices
from rlscale.runs import RunFolder
from rlscale.simulation import SimulatedClock
from rlscale.tasks import make_task
from rlscale.types import (
    Completion,
    Example,
    FinishedGroup,
    GenerationReport,
    GroupRequest,
    Rollout,
    Sampling,
)
from rlscale.weights.base import SyncReport

Deliver = Callable[[list[Completion]], None]


def rehearse(config: RunConfig, folder: Path) -> Iterator[StepReport]:
    """Trains as `rlscale run` does, without a warm start, into a new `folder`; yields a report a step.

    `config.rollout.num_cpus` and the learner's say how many threads each computes with: with more than one,
    the time of all of them counts.

    Raises:
        UserError: as `rlscale.loop.train`.
    """
    model, dtype = model_config(config.model, config.architecture), getattr(torch, config.model.dtype)
    task = make_task(config.task.name, config.task.required_length, config.task.options)
    tokenizer = tokenizer_for(config.model)
    lengths = SequenceLengths.of(config, task, tokenizer)
    in_flight: InFlight = config.mode.in_flight if isinstance(config.mode, AsynchronousConfig) else "refuse"
    spec = EngineSpec(
        model,
        dtype,
        config.rollout.context or lengths.context(model.max_position_embeddings),
        config.rollout,
        in_flight,
        interruption_of(config.algorithm, tokenizer),
    )
    with ExitStack() as stack:
        clock = SimulatedClock()
        engines = []
        for _ in range(config.rollout.workers):
            engines.append(spec.build())
            stack.callback(engines[-1].close)
        pool = RehearsalPool(engines, config.rollout.max_num_seqs, clock)
        started = LearnerSpec(model, dtype, config.model.checkpoint)
        learner = started.build(config.learner, config.resolved_algorithm, config.seed)
        run = stack.enter_context(RunFolder.create(folder, config))
        weights = _Weights(learner, pool)
        # The pool stands where `train` expects Ray's, of which it asks no more than this one has.
        yield from train(config, task, tokenizer, _Trains(learner, clock), pool, weights, run)  # type: ignore[arg-type]
        run.finish({})


@dataclass(slots=True, eq=False)
class _Seat:
    """An engine with what it is given. `steps` tells whether a slice is under way by the clock."""

    engine: RolloutEngine
    inbox: list[GroupRequest] = field(default_factory=list)
    given: dict[int, Deliver] = field(default_factory=dict)
    steps: bool = False

    @property
    def load(self) -> int:
        return self.engine.unfinished + sum(request.sampling.samples for request in self.inbox)


class RehearsalPool:
    """See `rlscale.rollout.pool.RolloutPool`: real engines, each on a time line of its own.

    Args:
        max_num_seqs: completions that an engine generates at the same time.
    """

    def __init__(self, engines: Sequence[RolloutEngine], max_num_seqs: int, clock: SimulatedClock) -> None:
        self.version = -1
        self._seats = [_Seat(engine) for engine in engines]
        self._max_num_seqs, self._clock = max_num_seqs, clock
        self._keys = itertools.count()
        self._queue: deque[tuple[GroupRequest, Deliver]] = deque()
        self._usage = Usage()
        self._still = False

    @property
    def workers(self) -> int:
        return len(self._seats)

    @property
    def places(self) -> int:
        return len(self._seats) * self._max_num_seqs

    def free_places(self) -> int:
        queued = sum(request.sampling.samples for request, _ in self._queue)
        return max(0, self.places - queued - sum(seat.load for seat in self._seats))

    def clock(self) -> float:
        return self._clock.now

    def usage(self) -> Usage:
        return self._usage

    def cache_bytes(self, tokens: int) -> int:
        return self._seats[0].engine.cache_bytes(tokens)

    def peak_bytes(self) -> int:
        return peak_bytes()

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> _Generation:
        return _Generation(self, group_requests(prompts, sampling))

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        return self.begin(prompts, sampling).result()

    def stream(self, on_group: Callable[[int, list[Completion]], None]) -> _Stream:
        return _Stream(self, on_group)

    def load_weights(self, weights: Callable[[], Any]) -> None:
        """Loads the next version into each engine once its slice under way has ended."""
        self._still = True
        self._clock.run_while(lambda: any(seat.steps for seat in self._seats))
        self.version += 1
        seconds = []
        for seat in self._seats:
            started = time.process_time()
            seat.engine.load_weights(weights(), self.version)
            seconds.append(time.process_time() - started)
        self._clock.run_until(self._clock.now + max(seconds))
        self._still = False
        self._step_all()

    def wait_while(self, waiting: Callable[[], bool]) -> None:
        self._clock.run_while(waiting)

    def spread(self, requests: Sequence[GroupRequest], delivers: Sequence[Deliver]) -> list[int]:
        """Gives each engine an even run of the groups; returns the keys they have here."""
        keys = []
        for seat, (first, end) in zip(self._seats, even_slices(len(requests), len(self._seats)), strict=True):
            for i in range(first, end):
                keys.append(next(self._keys))
                seat.inbox.append(replace(requests[i], key=keys[-1]))
                seat.given[keys[-1]] = delivers[i]
        self._step_all()
        return keys

    def enqueue(self, requests: Sequence[GroupRequest], delivers: Sequence[Deliver]) -> list[int]:
        """Puts groups in line for the least loaded engine each; returns the keys they have here."""
        keys = [next(self._keys) for _ in requests]
        named = [replace(request, key=key) for request, key in zip(requests, keys, strict=True)]
        self._queue.extend(zip(named, delivers, strict=True))
        self._assign()
        self._step_all()
        return keys

    def forget(self, keys: Sequence[int]) -> int:
        """Gives requests up; returns the tokens that had been drawn for them."""
        gone, tokens = set(keys), 0
        self._queue = deque(entry for entry in self._queue if entry[0].key not in gone)
        for seat in self._seats:
            seat.inbox = [request for request in seat.inbox if request.key not in gone]
            tokens += seat.engine.abort([key for key in gone if seat.given.pop(key, None) is not None])
        self._assign()
        return tokens

    def _assign(self) -> None:
        while self._queue:
            seat = min(self._seats, key=lambda seat: seat.load)
            if seat.load >= self._max_num_seqs:
                return
            request, deliver = self._queue.popleft()
            seat.inbox.append(request)
            seat.given[request.key] = deliver

    def _step_all(self) -> None:
        for seat in self._seats:
            self._step(seat)

    def _step(self, seat: _Seat) -> None:
        """Begins an engine's slice, unless one is under way, or weights are being loaded."""
        if seat.steps or self._still:
            return
        started = time.process_time()
        if seat.inbox:
            seat.engine.submit(seat.inbox)
            seat.inbox = []
        finished: list[FinishedGroup] = []
        seconds = completion_s = 0.0
        while seconds < SLICE_S and (unfinished := seat.engine.unfinished):
            finished += seat.engine.step()
            before, seconds = seconds, time.process_time() - started
            completion_s += (seconds - before) * min(unfinished, self._max_num_seqs)
        if not seconds:
            return
        seat.steps = True

        def end() -> None:
            seat.steps = False
            self._usage = replace(
                self._usage,
                busy_s=self._usage.busy_s + seconds,
                completion_s=self._usage.completion_s + completion_s,
            )
            for group in finished:
                # None if it was forgotten in the meantime.
                if deliver := seat.given.pop(group.key, None):
                    deliver(group.completions)
            self._assign()
            self._step_all()

        self._clock.at(self._clock.now + seconds, end)


class _Generation:
    """See `rlscale.rollout.pool.PendingGeneration`."""

    def __init__(self, pool: RehearsalPool, requests: Sequence[GroupRequest]) -> None:
        self._pool, self._started = pool, pool.clock()
        self._ended = self._started
        self._finished: dict[int, list[Completion]] = {}
        self._count = len(requests)
        self._keys = pool.spread(
            requests,
            [lambda group, place=request.key: self._deliver(place, group) for request in requests],  # type: ignore[misc]
        )

    def result(self) -> GenerationReport:
        self._pool.wait_while(lambda: len(self._finished) < self._count)
        completions = [self._finished[i] for i in range(self._count)]
        return GenerationReport(completions, self._ended - self._started)

    def cancel(self) -> None:
        self._pool.forget(self._keys)

    def _deliver(self, place: int, group: list[Completion]) -> None:
        self._finished[place] = group
        self._ended = self._pool.clock()


class _Stream:
    """See `rlscale.rollout.pool.GroupStream`."""

    def __init__(self, pool: RehearsalPool, on_group: Callable[[int, list[Completion]], None]) -> None:
        self._pool, self._on_group = pool, on_group
        self._running: dict[int, tuple[int, int]] = {}  # by the caller's key: the pool's, and the version
        self._given_up_tokens = 0

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        keys = self._pool.enqueue(
            requests,
            [lambda group, place=request.key: self._deliver(place, group) for request in requests],  # type: ignore[misc]
        )
        for request, key in zip(requests, keys, strict=True):
            self._running[request.key] = key, self._pool.version

    def wait_until(self, ready: Callable[[], bool]) -> None:
        self._pool.wait_while(lambda: not ready())

    def drop_older_than(self, version: int) -> list[int]:
        old = [place for place, (_, begun) in self._running.items() if begun < version]
        self._given_up_tokens += self._pool.forget([self._running.pop(place)[0] for place in old])
        return old

    def take_given_up_tokens(self) -> int:
        tokens, self._given_up_tokens = self._given_up_tokens, 0
        return tokens

    def close(self) -> None:
        self._pool.forget([key for key, _ in self._running.values()])
        self._running.clear()

    def _deliver(self, place: int, group: list[Completion]) -> None:
        del self._running[place]
        self._on_group(place, group)


class _Trains:
    """See `rlscale.colocation.Trains`: engines go on by the clock while the learner trains."""

    def __init__(self, learner: Learner, clock: SimulatedClock) -> None:
        self._learner, self._clock = learner, clock

    def train_step(
        self, rollouts: Sequence[Rollout], temperature: float, examples: Sequence[Example] = ()
    ) -> dict[str, float]:
        started = time.process_time()
        metrics = self._learner.train_step(rollouts, temperature, examples)
        self._clock.run_until(self._clock.now + time.process_time() - started)
        return metrics

    def save(self, folder: Path) -> None:
        self._learner.save(folder)


class _Weights:
    """See `rlscale.weights.base.WeightSynchronizer`: engines read the learner's own tensors."""

    def __init__(self, learner: Learner, pool: RehearsalPool) -> None:
        self._learner, self._pool = learner, pool

    def sync_weights(self) -> SyncReport:
        started = self._pool.clock()
        self._pool.load_weights(self._learner.named_weights)
        return SyncReport(self._pool.version, 0, self._pool.clock() - started)

    def close(self) -> None:
        """Holds nothing."""


def main() -> None:
    """Rehearses a config; prints a line a step."""
    path, folder, *overrides = sys.argv[1:]
    for report in rehearse(load_config(RunConfig, Path(path), overrides), Path(folder)):
        if report.metrics:
            print(f"step {report.step}: {report.metrics['step_s']:.3f} s of processor time")


if __name__ == "__main__":
    main()
