"""One engine of a simulated run: what it draws, and when it looks up. See `rlscale.simulation`."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlscale.types import Completion, GroupRequest

_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class SimulatedEngines:
    """What engines there are and how fast they draw.

    A step that draws one token of each of n completions behind c tokens of context, of all n together, takes
    `step_s + n * completion_s + c * context_token_s` seconds. Where some of them are read first, because they
    begin, or again after a weight update in flight, it takes `prefill_s + sequences * prefill_sequence_s +
    tokens * prefill_token_s` more.

    Args:
        workers: engines.
        max_num_seqs: completions that one engine draws at the same time.
        prompt_tokens: of each completion.
        wake_s: that the first step of an engine takes longer when it had nothing to do.
        slice_s: an engine steps for so long, or until it is empty, before it hands on what is finished and
            looks up for prompts and new weights.
        reads_apart: prompts are read in a pass of their own, once for all samples of a group, which draws
            their first tokens; the others' tokens are drawn in a pass beside it.
        tokens_per_step: that a step stands for, where lengths are counted in grains.
        batch_s, batch_completion_s: from the end of a whole batch until it is scored and in the learner's
            hands, and more for each of its completions. Groups that come back singly are scored meanwhile.
    """

    workers: int
    max_num_seqs: int
    step_s: float
    completion_s: float
    prefill_token_s: float
    context_token_s: float = 0.0
    prompt_tokens: float = 0.0
    prefill_s: float = 0.0
    prefill_sequence_s: float = 0.0
    wake_s: float = 0.0
    slice_s: float = 0.0
    reads_apart: bool = False
    tokens_per_step: int = 1
    batch_s: float = 0.0
    batch_completion_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Of all engines together, full of completions that have just begun, contexts apart."""
        step_s = self.step_s + self.max_num_seqs * self.completion_s
        return self.workers * self.max_num_seqs / step_s


class Host(Protocol):
    """What an engine asks of the pool that it belongs to."""

    engines: SimulatedEngines
    version: int

    def at(self, time: float, event: Callable[[], None]) -> None: ...

    def clock(self) -> float: ...

    def worked(self, seconds: float, completions: int) -> None: ...

    def ended(self, drafts: Sequence[Draft]) -> None: ...


@dataclass(slots=True, eq=False)
class Group:
    """A request, and its completions so far."""

    request: GroupRequest
    deliver: Callable[[list[Completion]], None]
    drafts: list[Draft] = field(default_factory=list)
    oldest_version: int | None = None
    finished: int = 0


@dataclass(slots=True, eq=False)
class Draft:
    """A completion in the making. `spans` holds weights' versions, each with the tokens drawn before it."""

    group: Group
    length: int
    spans: list[tuple[int, int]] = field(default_factory=list)

    def completion(self) -> Completion:
        ends = [start for _, start in self.spans[1:]] + [self.length]
        versions: list[int] = []
        for (version, start), end in zip(self.spans, ends, strict=True):
            versions += [version] * (end - start)
        return Completion([0] * self.length, [0.0] * self.length, versions, "stop")


class Engine:
    """Draws all its completions at the same pace, a token of each in a step.

    `_depth` counts the steps taken, so each completion ends at a depth that is known when it begins. Steps in
    which nothing begins or ends make one *stretch*, which is cut short at the end of a slice if something has
    come up meanwhile.
    """

    def __init__(self, pool: Host) -> None:
        self._pool, self._speed = pool, pool.engines
        self._inbox: list[Draft] = []  # taken in at the next slice
        self._waiting: deque[Draft] = deque()
        self._running: list[tuple[int, int, Draft]] = []  # a heap, by the depth at which each ends
        self._again: set[Draft] = set()  # run, and must be read again
        self._ended: list[Draft] = []  # handed on when the slice ends
        self._gone: set[Group] = set()  # given up in the middle of a step
        self._count = itertools.count()
        self._depth = 0
        self._drawn = 0  # tokens of the completions that run
        self._slice_end = 0.0
        self._stretch: _Stretch | None = None
        self._stretches = 0
        self._paused = False
        self._idle = True

    @property
    def load(self) -> int:
        return len(self._inbox) + len(self._waiting) + len(self._running)

    @property
    def steps(self) -> bool:
        """Whether a step is under way."""
        return self._stretch is not None

    def take(self, group: Group) -> None:
        self._inbox.extend(group.drafts)

    def forget(self, groups: set[Group]) -> None:
        self._inbox = [draft for draft in self._inbox if draft.group not in groups]
        self._waiting = deque(draft for draft in self._waiting if draft.group not in groups)
        self._gone |= groups
        self.look_up()

    def pause(self) -> None:
        """Begins no slice until `resume`."""
        self._paused = True
        self.look_up()

    def resume(self) -> None:
        self._paused = False
        self.look_up()

    def update(self, version: int, recompute: bool) -> None:
        for end, _, draft in self._running:
            draft.spans.append((version, draft.length - (end - self._depth)))
            if recompute:
                self._again.add(draft)

    def look_up(self) -> None:
        """Begins a slice if the engine is at rest; ends the stretch with the slice if there is news."""
        if self._stretch is None:
            self._begin_slice()
        elif self._inbox or self._paused or self._gone:
            self._end_at(self._steps_of_slice(self._stretch))

    def settle(self) -> None:
        """Puts the time that steps have taken since the last time on record."""
        if self._stretch is not None:
            now = self._pool.clock()
            self._pool.worked(now - self._stretch.settled, self._stretch.completions)
            self._stretch.settled = now

    def _begin_slice(self) -> None:
        if self._gone:
            self._running = [entry for entry in self._running if entry[2].group not in self._gone]
            heapq.heapify(self._running)
            self._again = {draft for draft in self._again if draft.group not in self._gone}
            self._drawn = sum(draft.length - (end - self._depth) for end, _, draft in self._running)
            self._gone.clear()
        if self._paused:
            return
        self._waiting.extend(self._inbox)
        self._inbox.clear()
        self._slice_end = self._pool.clock() + self._speed.slice_s
        self._begin_stretch()

    def _begin_stretch(self) -> None:
        speed = self._speed
        begun: list[Draft] = []
        while self._waiting and len(self._running) < speed.max_num_seqs:
            draft = self._waiting.popleft()
            draft.spans.append((self._pool.version, 0))
            if draft.group.oldest_version is None:
                draft.group.oldest_version = self._pool.version
            heapq.heappush(self._running, (self._depth + draft.length, next(self._count), draft))
            begun.append(draft)
        n = len(self._running)
        if not n:
            self._idle = True
            return
        wake_s, self._idle = speed.wake_s if self._idle else 0.0, False
        context = self._drawn + n * speed.prompt_tokens
        step_s = self._step_s(n, context)
        self._stretch = _Stretch(
            began=self._pool.clock(),
            settled=self._pool.clock(),
            completions=n,
            steps=0,
            first_s=wake_s + step_s + self._reading_s(begun, step_s),
            step_s=step_s + n * speed.context_token_s,
            rise=n * speed.context_token_s,
        )
        self._again.clear()
        steps = self._running[0][0] - self._depth
        self._end_at(min(steps, self._steps_of_slice(self._stretch)) if self._ended else steps)

    def _reading_s(self, begun: Sequence[Draft], step_s: float) -> float:
        """Seconds that a step takes longer for what is read in it."""
        speed = self._speed
        if not begun and not self._again:
            return 0.0
        prompts = len({id(draft.group) for draft in begun}) if speed.reads_apart else len(begun)
        depths = {id(draft): end - self._depth for end, _, draft in self._running} if self._again else {}
        drawn = sum(draft.length - depths[id(draft)] for draft in self._again)
        reads = prompts + len(self._again)
        tokens = drawn + reads * speed.prompt_tokens
        seconds = speed.prefill_s + reads * speed.prefill_sequence_s + tokens * speed.prefill_token_s
        if speed.reads_apart:
            n = len(self._running) - len(begun) - len(self._again)
            context = self._drawn - drawn + n * speed.prompt_tokens
            # What is read need not be decoded for the first token of the step.
            seconds += ((self._step_s(n, context) if n else 0.0) - step_s) / speed.tokens_per_step
        return seconds

    def _step_s(self, n: int, context: float) -> float:
        speed = self._speed
        return speed.step_s + n * speed.completion_s + context * speed.context_token_s

    def _steps_of_slice(self, stretch: _Stretch) -> int:
        """Steps of the stretch until the end of the slice that is under way now."""
        first = stretch.steps_until(self._slice_end)
        now = stretch.steps_until(self._pool.clock())
        if now <= first:
            return first
        slice_steps = (
            max(1, math.ceil(self._speed.slice_s / stretch.step_s - _TOLERANCE)) if stretch.step_s else 1
        )
        return first + math.ceil((now - first) / slice_steps) * slice_steps

    def _end_at(self, steps: int) -> None:
        """Has the stretch end after so many steps, unless it ends earlier."""
        stretch = self._stretch
        assert stretch is not None
        if stretch.steps and steps >= stretch.steps:
            return
        stretch.steps = steps
        self._stretches += 1
        number = self._stretches
        self._pool.at(stretch.began + stretch.seconds(steps), lambda: self._end(number))

    def _end(self, number: int) -> None:
        if number != self._stretches:
            return  # was cut short
        self.settle()
        stretch, self._stretch = self._stretch, None
        assert stretch is not None
        self._depth += stretch.steps
        self._drawn += stretch.completions * stretch.steps
        while self._running and self._running[0][0] <= self._depth:
            draft = heapq.heappop(self._running)[2]
            self._drawn -= draft.length
            self._ended.append(draft)
        in_slice = self._pool.clock() < self._slice_end - _TOLERANCE
        if in_slice and (self._running or self._waiting):
            self._begin_stretch()
            return
        ended = [draft for draft in self._ended if draft.group not in self._gone]
        self._ended.clear()
        self._pool.ended(ended)
        self.look_up()


@dataclass(slots=True)
class _Stretch:
    """Steps of the same completions: the first takes `first_s` seconds, the second `step_s`, and each after
    that `rise` more than the one before."""

    began: float
    settled: float
    completions: int
    steps: int
    first_s: float
    step_s: float
    rise: float

    def seconds(self, steps: int) -> float:
        """Of the first so many."""
        more = steps - 1
        return self.first_s + more * self.step_s + self.rise * more * (more - 1) / 2

    def steps_until(self, time: float) -> int:
        """Steps begun before `time`: at least 1."""
        seconds = time - self.began - self.first_s - _TOLERANCE
        if seconds <= 0 or self.step_s <= 0:
            return 1
        # seconds = more * step_s + rise * more * (more - 1) / 2
        linear = self.step_s - self.rise / 2
        more = 2 * seconds / (linear + math.sqrt(linear**2 + 2 * self.rise * seconds))
        return 1 + math.ceil(more - _TOLERANCE)
