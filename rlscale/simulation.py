"""Runs without a model: the real experience sources on simulated engines, a simulated learner and a simulated
clock, to see in seconds who would wait for whom.

Time is a queue of events, so a simulation is as fast as its events are few, and the same every time. Engines
draw completions of given lengths; how fast depends on how many they hold, and behind how much context.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlscale.algorithms import SelectionConfig
from rlscale.bubbles import StepWatch
from rlscale.config import AsynchronousConfig, ModeConfig
from rlscale.experience import Prompt, ScoredGroup
from rlscale.rollout.pool import Usage, even_slices
from rlscale.selection import Selection
from rlscale.simulated_engine import Draft, Engine, Group, SimulatedEngines
from rlscale.sources import experience_source
from rlscale.staleness import staleness_metrics
from rlscale.types import Completion, GenerationReport, GroupRequest, Problem, Rollout, Sampling
from rlscale.weights.base import SyncReport


@dataclass(frozen=True, slots=True)
class SimulatedLearner:
    """How long training takes: `step_s + tokens * token_s` seconds a step, and `sync_s` to bring the engines
    to the new weights, once their slices under way have ended."""

    step_s: float
    token_s: float
    sync_s: float


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """What a simulated run came to, over the steps after the first few.

    Args:
        steps: one record a step, with the names of `metrics.jsonl`.
        wall_s: simulated seconds of these steps.
        tokens: of the completions trained on.
        stale_fraction: of the groups submitted in the whole run, those that grew too old.
    """

    steps: list[dict[str, Any]]
    wall_s: float
    tokens: int
    stale_fraction: float

    @property
    def learner_idle_fraction(self) -> float:
        """Of the steps' seconds, those in which the learner did not train."""
        return 1 - sum(step["learner_s"] for step in self.steps) / self.wall_s

    @property
    def rollout_occupancy(self) -> float:
        """Of the engines' places for completions, those in use, over the steps' seconds."""
        return sum(step["rollout_occupancy"] * step["step_s"] for step in self.steps) / self.wall_s

    @property
    def staleness_max(self) -> int:
        """Updates between the weights that drew a token and those it was trained on with, at most."""
        return max(step["staleness_max"] for step in self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second."""
        return self.tokens / self.wall_s


def simulate(
    mode: ModeConfig,
    engines: SimulatedEngines,
    learner: SimulatedLearner,
    lengths: Callable[[int, int], int],
    *,
    prompts_per_step: int,
    samples_per_prompt: int,
    steps: int,
    skip: int = 5,
) -> SimulationReport:
    """Runs the loop of `rlscale.loop` on simulated parts.

    Args:
        lengths: tokens of completion `sample` of the prompt at `place`.
        skip: steps at the start that the report leaves out, while the engines fill up.

    Raises:
        ValueError: no step is left to report.
    """
    if steps <= skip:
        raise ValueError(f"of {steps} steps the first {skip} are left out: simulate more")
    clock = SimulatedClock()
    pool = _Pool(
        clock, engines, lengths, isinstance(mode, AsynchronousConfig) and mode.in_flight == "recompute"
    )
    sampling = Sampling(max_tokens=1, samples=samples_per_prompt)
    source = experience_source(
        mode,
        pool,
        _Weights(clock, pool, learner),
        _Prompts(),
        _Scores(),
        Selection(SelectionConfig(), prompts_per_step),
        prompts_per_step,
        sampling,
    )
    version = source.sync_weights().version
    records, tokens = [], 0
    for step in range(steps):
        watch = StepWatch(pool)
        batch = source.next_batch()
        watch.lap("batch_wait_s")
        batch_tokens = sum(group.tokens for group in batch.groups)
        clock.run_until(clock.now + learner.step_s + batch_tokens * learner.token_s)
        watch.lap("learner_s")
        staleness = staleness_metrics(batch.rollouts, version)
        version = source.sync_weights().version
        watch.lap("sync_stall_s")
        if step >= skip:
            tokens += batch_tokens
            records.append(staleness | source.metrics() | watch.metrics())
    last = records[-1]
    source.close()
    return SimulationReport(
        records,
        sum(record["step_s"] for record in records),
        tokens,
        last.get("groups_stale", 0) / last.get("groups_submitted", 1),
    )


class SimulatedClock:
    """Simulated time, and what is due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._count), event))

    def run_until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            self._next()
        self.now = time

    def run_while(self, waiting: Callable[[], bool]) -> None:
        while waiting():
            if not self._events:
                raise RuntimeError("the simulation waits for something that nothing under way will bring")
            self._next()

    def _next(self) -> None:
        self.now, _, event = heapq.heappop(self._events)
        event()


class _Pool:
    """See `rlscale.sources.Rollouts`."""

    def __init__(
        self,
        clock: SimulatedClock,
        engines: SimulatedEngines,
        lengths: Callable[[int, int], int],
        recompute: bool,
    ) -> None:
        self.engines, self.version = engines, -1
        self._clock, self._lengths, self._recompute = clock, lengths, recompute
        self._engines = [Engine(self) for _ in range(engines.workers)]
        self._queue: deque[Group] = deque()
        self._usage = Usage()

    def at(self, time: float, event: Callable[[], None]) -> None:
        self._clock.at(time, event)

    @property
    def workers(self) -> int:
        return self.engines.workers

    @property
    def places(self) -> int:
        return self.engines.workers * self.engines.max_num_seqs

    def free_places(self) -> int:
        queued = sum(len(group.drafts) for group in self._queue)
        return max(0, self.places - queued - sum(engine.load for engine in self._engines))

    def clock(self) -> float:
        return self._clock.now

    def usage(self) -> Usage:
        for engine in self._engines:
            engine.settle()
        return self._usage

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> _Generation:
        return _Generation(self, len(prompts), sampling)

    def stream(self, on_group: Callable[[int, list[Completion]], None]) -> _Stream:
        return _Stream(self, on_group)

    def group(self, request: GroupRequest, deliver: Callable[[list[Completion]], None]) -> Group:
        group = Group(request, deliver)
        for sample in range(request.sampling.samples):
            length = self._lengths(request.sampling.first_prompt, sample)
            group.drafts.append(Draft(group, length))
        return group

    def spread(self, groups: Sequence[Group]) -> None:
        for engine, (first, end) in zip(
            self._engines, even_slices(len(groups), len(self._engines)), strict=True
        ):
            for group in groups[first:end]:
                engine.take(group)
            engine.look_up()

    def enqueue(self, groups: Sequence[Group]) -> None:
        self._queue.extend(groups)
        self._assign()

    def forget(self, groups: set[Group]) -> None:
        self._queue = deque(group for group in self._queue if group not in groups)
        for engine in self._engines:
            engine.forget(groups)
        self._assign()

    def pause(self) -> None:
        """Waits until every engine has ended its slice; none begins another before `resume`."""
        for engine in self._engines:
            engine.pause()
        self._clock.run_while(lambda: any(engine.steps for engine in self._engines))

    def resume(self, version: int) -> None:
        """Lets the engines go on under new weights."""
        self.version = version
        for engine in self._engines:
            engine.update(version, self._recompute)
            engine.resume()

    def wait_while(self, waiting: Callable[[], bool]) -> None:
        self._clock.run_while(waiting)

    def hand_over(self, completions: int) -> None:
        seconds = self.engines.batch_s + completions * self.engines.batch_completion_s
        self._clock.run_until(self._clock.now + seconds)

    def worked(self, seconds: float, completions: int) -> None:
        usage = self._usage
        self._usage = replace(
            usage, busy_s=usage.busy_s + seconds, completion_s=usage.completion_s + seconds * completions
        )

    def ended(self, drafts: Sequence[Draft]) -> None:
        for draft in drafts:
            group = draft.group
            group.finished += 1
            if group.finished == len(group.drafts):
                group.deliver([draft.completion() for draft in group.drafts])
        self._assign()

    def _assign(self) -> None:
        while self._queue:
            engine = min(self._engines, key=lambda engine: engine.load)
            if engine.load >= self.engines.max_num_seqs:
                break
            engine.take(self._queue.popleft())
        for engine in self._engines:
            engine.look_up()


class _Generation:
    """See `rlscale.rollout.pool.PendingGeneration`."""

    def __init__(self, pool: _Pool, prompts: int, sampling: Sampling) -> None:
        self._pool, self._started = pool, pool.clock()
        self._ended = self._started
        self._finished: dict[int, list[Completion]] = {}
        self._groups = [
            pool.group(
                GroupRequest(i, [], replace(sampling, first_prompt=sampling.first_prompt + i)),
                lambda completions, i=i: self._deliver(i, completions),  # type: ignore[misc]
            )
            for i in range(prompts)
        ]
        pool.spread(self._groups)

    def result(self) -> GenerationReport:
        self._pool.wait_while(lambda: len(self._finished) < len(self._groups))
        completions = [self._finished[i] for i in range(len(self._groups))]
        self._pool.hand_over(sum(map(len, completions)))
        return GenerationReport(completions, self._ended - self._started)

    def cancel(self) -> None:
        self._pool.forget(set(self._groups))

    def _deliver(self, place: int, completions: list[Completion]) -> None:
        self._finished[place] = completions
        self._ended = self._pool.clock()


class _Stream:
    """See `rlscale.rollout.pool.GroupStream`."""

    def __init__(self, pool: _Pool, on_group: Callable[[int, list[Completion]], None]) -> None:
        self._pool, self._on_group = pool, on_group
        self._groups: dict[int, Group] = {}

    def submit(self, requests: Sequence[GroupRequest]) -> None:
        groups = [
            self._pool.group(r, lambda completions, key=r.key: self._deliver(key, completions))  # type: ignore[misc]
            for r in requests
        ]
        self._groups |= {group.request.key: group for group in groups}
        self._pool.enqueue(groups)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        self._pool.wait_while(lambda: not ready())

    def drop_older_than(self, version: int) -> list[int]:
        old = [
            key
            for key, group in self._groups.items()
            if group.oldest_version is not None and group.oldest_version < version
        ]
        self._pool.forget({self._groups.pop(key) for key in old})
        return old

    def take_given_up_tokens(self) -> int:
        return 0  # simulations are asked for seconds, and for the tokens of what was trained on

    def close(self) -> None:
        self._pool.forget(set(self._groups.values()))
        self._groups.clear()

    def _deliver(self, key: int, completions: list[Completion]) -> None:
        del self._groups[key]
        self._on_group(key, completions)


class _Weights:
    """See `rlscale.weights.base.WeightSynchronizer`."""

    def __init__(self, clock: SimulatedClock, pool: _Pool, costs: SimulatedLearner) -> None:
        self._clock, self._pool, self._costs = clock, pool, costs

    def sync_weights(self) -> SyncReport:
        started = self._clock.now
        self._pool.pause()
        self._clock.run_until(self._clock.now + self._costs.sync_s)
        self._pool.resume(self._pool.version + 1)
        return SyncReport(self._pool.version, 0, self._clock.now - started)

    def close(self) -> None:
        """Holds nothing."""


class _Prompts:
    """See `rlscale.sources.Prompts`."""

    def at(self, place: int) -> Prompt:
        return Prompt(place, Problem("", "", 0, place), [])


class _Scores:
    """See `rlscale.sources.Scores`."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup:
        n = len(completions)
        rollouts = [Rollout([], completion, 0.0, prompt.place) for completion in completions]
        return ScoredGroup(prompt, rollouts, [""] * n, [False] * n)
