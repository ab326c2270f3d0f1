"""Runs without a model: the real experience sources on simulated engines, a simulated learner and a simulated
clock, to see in seconds who would wait for whom.

Time is a queue of events, so a simulation is as fast as its events are few, and the same every time. Engines
draw completions of given lengths; how fast depends on how many they hold, and behind how much context.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlscale.algorithms import SelectionConfig
from rlscale.bubbles import StepWatch
from rlscale.config import AsynchronousConfig, ModeConfig
from rlscale.experience import Prompt, ScoredGroup
from rlscale.rollout.pool import Usage, even_slices
from rlscale.selection import Selection
from rlscale.sources import experience_source
from rlscale.staleness import staleness_metrics
from rlscale.types import Completion, GenerationReport, GroupRequest, Problem, Rollout, Sampling
from rlscale.weights.base import SyncReport

_TOKEN_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class SimulatedEngines:
    """What engines there are and how fast they draw.

    A step that draws one token of each of n completions behind c tokens of context, of all n together, takes
    `step_s + n * completion_s + c * context_token_s` seconds.

    Args:
        workers: engines.
        max_num_seqs: completions that one engine draws at the same time.
        prefill_token_s: seconds to read a token of a prompt, or to read one again after a weight update in
            flight.
        prompt_tokens: of each completion.
    """

    workers: int
    max_num_seqs: int
    step_s: float
    completion_s: float
    prefill_token_s: float
    context_token_s: float = 0.0
    prompt_tokens: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of all engines together, full of completions that have just begun, contexts apart."""
        step_s = self.step_s + self.max_num_seqs * self.completion_s
        return self.workers * self.max_num_seqs / step_s


@dataclass(frozen=True, slots=True)
class SimulatedLearner:
    """How long training takes: `step_s + tokens * token_s` seconds a step, and `sync_s` to bring the engines
    to the new weights, during which they stand still; before it `step_end_s`, until their steps under way
    have ended."""

    step_s: float
    token_s: float
    sync_s: float
    step_end_s: float = 0.0


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


@dataclass(slots=True, eq=False)
class _Group:
    """A request, and its completions so far."""

    request: GroupRequest
    deliver: Callable[[list[Completion]], None]
    drafts: list[_Draft] = field(default_factory=list)
    oldest_version: int | None = None
    finished: int = 0


@dataclass(slots=True, eq=False)
class _Draft:
    """A completion in the making. `spans` holds weights' versions, each with the tokens drawn before it."""

    group: _Group
    length: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    def completion(self) -> Completion:
        ends = [start for _, start in self.spans[1:]] + [self.length]
        versions: list[int] = []
        for (version, start), end in zip(self.spans, ends, strict=True):
            versions += [version] * (end - start)
        return Completion([0] * self.length, [0.0] * self.length, versions, "stop")


class _Engine:
    """Draws all its completions at the same pace, which their number and contexts set.

    `_depth` counts the tokens that a completion running all the time would have by now, so each ends at a
    depth that is known when it begins.
    """

    def __init__(self, pool: _Pool) -> None:
        self._pool, self._speed = pool, pool.engines
        self.waiting: deque[_Draft] = deque()
        self._running: list[tuple[float, int, _Draft]] = []  # a heap, by the depth at which each ends
        self._count = itertools.count()
        self._depth = 0.0
        self._drawn = 0.0  # tokens of the completions that run
        self._settled = 0.0  # time up to which progress is on record
        self._still_until = 0.0
        self._plan = 0  # events of earlier plans are void

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self._running)

    def take(self, group: _Group) -> None:
        self.settle()
        self.waiting.extend(group.drafts)
        self.plan()

    def forget(self, groups: set[_Group]) -> None:
        self.settle()
        self.waiting = deque(draft for draft in self.waiting if draft.group not in groups)
        kept = [entry for entry in self._running if entry[2].group not in groups]
        if len(kept) < len(self._running):
            self._running = kept
            heapq.heapify(kept)
            self._drawn = sum(draft.length - (end - self._depth) for end, _, draft in kept)
        self.plan()

    def stand_still(self, seconds: float) -> None:
        self.settle()
        self._still_until = max(self._still_until, self._pool.clock() + seconds)
        self.plan()

    def update(self, version: int, recompute: bool) -> None:
        self.settle()
        for end, _, draft in self._running:
            drawn = draft.length - math.ceil(end - self._depth - _TOKEN_TOLERANCE)
            draft.spans.append((version, drawn))
        if recompute:
            read = self._drawn + len(self._running) * self._speed.prompt_tokens
            self.stand_still(self._speed.prefill_token_s * read)

    def settle(self) -> None:
        """Puts what was drawn since the last time on record."""
        now = self._pool.clock()
        seconds = max(0.0, now - max(self._settled, self._still_until))
        self._settled = now
        n = len(self._running)
        if n and seconds:
            # step_s rises with every token drawn: seconds = tokens * step_s + tokens^2 * rise / 2.
            step_s, rise = self._step_s, n * self._speed.context_token_s
            tokens = 2 * seconds / (step_s + math.sqrt(step_s**2 + 2 * rise * seconds))
            self._depth += tokens
            self._drawn += n * tokens
            self._pool.worked(seconds, n)

    def plan(self) -> None:
        """Fills free places and sets the next event: the end of the shortest completion."""
        begun = 0
        while self.waiting and len(self._running) < self._speed.max_num_seqs:
            draft = self.waiting.popleft()
            draft.spans.append((self._pool.version, 0))
            if draft.group.oldest_version is None:
                draft.group.oldest_version = self._pool.version
            heapq.heappush(self._running, (self._depth + draft.length, next(self._count), draft))
            begun += 1
        if begun:
            prefill_s = begun * self._speed.prompt_tokens * self._speed.prefill_token_s
            self._still_until = max(self._still_until, self._pool.clock()) + prefill_s
        self._plan += 1
        if self._running:
            begin = max(self._pool.clock(), self._still_until)
            shortest = max(0.0, self._running[0][0] - self._depth)
            rise = len(self._running) * self._speed.context_token_s
            plan = self._plan
            self._pool.at(begin + shortest * self._step_s + shortest**2 * rise / 2, lambda: self._end(plan))

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return
        self.settle()
        ended = []
        while self._running and self._running[0][0] - self._depth <= _TOKEN_TOLERANCE:
            ended.append(heapq.heappop(self._running)[2])
            self._drawn -= ended[-1].length
        self.plan()
        self._pool.ended(ended)

    @property
    def _step_s(self) -> float:
        speed, n = self._speed, len(self._running)
        context = self._drawn + n * speed.prompt_tokens
        return speed.step_s + n * speed.completion_s + context * speed.context_token_s


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
        self.at = clock.at
        self._clock, self._lengths, self._recompute = clock, lengths, recompute
        self._engines = [_Engine(self) for _ in range(engines.workers)]
        self._queue: deque[_Group] = deque()
        self._usage = Usage()

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

    def group(self, request: GroupRequest, deliver: Callable[[list[Completion]], None]) -> _Group:
        group = _Group(request, deliver)
        for sample in range(request.sampling.samples):
            length = self._lengths(request.sampling.first_prompt, sample)
            group.drafts.append(_Draft(group, length))
        return group

    def spread(self, groups: Sequence[_Group]) -> None:
        for engine, (first, end) in zip(
            self._engines, even_slices(len(groups), len(self._engines)), strict=True
        ):
            for group in groups[first:end]:
                engine.take(group)

    def enqueue(self, groups: Sequence[_Group]) -> None:
        self._queue.extend(groups)
        self._assign()

    def forget(self, groups: set[_Group]) -> None:
        self._queue = deque(group for group in self._queue if group not in groups)
        for engine in self._engines:
            engine.forget(groups)
        self._assign()

    def update(self, version: int) -> None:
        self.version = version
        for engine in self._engines:
            engine.update(version, self._recompute)

    def stand_still(self, seconds: float) -> None:
        for engine in self._engines:
            engine.stand_still(seconds)

    def wait_while(self, waiting: Callable[[], bool]) -> None:
        self._clock.run_while(waiting)

    def worked(self, seconds: float, completions: int) -> None:
        usage = self._usage
        self._usage = replace(
            usage, busy_s=usage.busy_s + seconds, completion_s=usage.completion_s + seconds * completions
        )

    def ended(self, drafts: Sequence[_Draft]) -> None:
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
                return
            engine.take(self._queue.popleft())


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
        self._groups: dict[int, _Group] = {}

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
        self._clock.run_until(started + self._costs.step_end_s)
        self._pool.stand_still(self._costs.sync_s)
        self._clock.run_until(self._clock.now + self._costs.sync_s)
        self._pool.update(self._pool.version + 1)
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
