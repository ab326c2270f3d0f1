"""Where the loop's batches come from: the modes of sharing time between engines and learner.

A mode is an `ExperienceSource`. The loop takes a batch, trains, and has the weights synced, whatever the
mode; when engines work and on which weights is the source's affair.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from rlscale.config import AsynchronousConfig, ModeConfig, OneStepOffConfig
from rlscale.experience import Experience, Prompt, ScoredGroup
from rlscale.rollout.pool import Usage
from rlscale.selection import Selection
from rlscale.staleness import StalenessManager
from rlscale.types import Completion, GenerationReport, GroupRequest, Sampling
from rlscale.weights.base import SyncReport, WeightSynchronizer


class Pending(Protocol):
    """A generation under way."""

    def result(self) -> GenerationReport: ...

    def cancel(self) -> None: ...


class Stream(Protocol):
    """Groups that come back one by one; see `rlscale.rollout.pool.GroupStream`."""

    def submit(self, requests: Sequence[GroupRequest]) -> None: ...

    def wait_until(self, ready: Callable[[], bool]) -> None: ...

    def drop_older_than(self, version: int) -> list[int]: ...

    def take_given_up_tokens(self) -> int: ...

    def close(self) -> None: ...


class Rollouts(Protocol):
    """What is asked of the rollout side; see `rlscale.rollout.pool.RolloutPool`."""

    @property
    def workers(self) -> int: ...

    @property
    def places(self) -> int: ...

    def free_places(self) -> int: ...

    def clock(self) -> float: ...

    def usage(self) -> Usage: ...

    def begin(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Pending: ...

    def stream(self, on_group: Callable[[int, list[Completion]], None]) -> Stream: ...


class Scores(Protocol):
    """Gives a prompt's completions their rewards; see `rlscale.experience.Scorer`."""

    def score(self, prompt: Prompt, completions: Sequence[Completion]) -> ScoredGroup: ...


class Prompts(Protocol):
    """The prompts of a run by their places; see `rlscale.experience.TrainingPrompts`."""

    def at(self, place: int) -> Prompt: ...


class ExperienceSource(ABC):
    """Yields the batches that a learner trains on, and brings the engines to its weights."""

    @abstractmethod
    def next_batch(self) -> Experience:
        """Waits for `prompts_per_step` scored groups."""

    @abstractmethod
    def sync_weights(self) -> SyncReport:
        """Brings all engines to the learner's weights; comes first, and then after each training step."""

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """What the last batch says about the mode, as `metrics.jsonl` has it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on after the last sync: the place in the data, and groups
        that are drawn and not trained on. Plain JSON."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same mode; comes before the first sync."""

    @abstractmethod
    def close(self) -> None:
        """Gives up what is under way; calling it twice is harmless."""


class BatchSource(ExperienceSource):
    """Whole batches, each drawn by one policy: synchronous, or one step ahead of the learner.

    The groups of a batch stand in the order of their prompts, and what is drawn depends on nothing else than
    the policy and the prompts' places, so a run can be repeated.

    Args:
        selection: of prompts and groups.
        sampling: for training; `seed` is the run's.
        ahead: draw the next batch while the learner trains on this one.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        weights: WeightSynchronizer,
        prompts: Prompts,
        scores: Scores,
        selection: Selection,
        prompts_per_step: int,
        sampling: Sampling,
        ahead: bool,
    ) -> None:
        self._rollouts, self._weights = rollouts, weights
        self._prompts, self._scores, self._selection = prompts, scores, selection
        self._prompts_per_step, self._sampling, self._ahead = prompts_per_step, sampling, ahead
        self._place = 0  # of the first prompt that no batch has had
        self._drawing: tuple[list[Prompt], Pending] | None = None
        self._drawn: Experience | None = None

    def next_batch(self) -> Experience:
        """See `ExperienceSource.next_batch`."""
        batch = self._finish()
        self._drawn = None
        if self._ahead:
            self._begin(self._prompts_per_step)
        return batch

    def sync_weights(self) -> SyncReport:
        """See `ExperienceSource.sync_weights`. A batch under way is finished first, under the old weights."""
        if self._drawing is not None:
            self._finish()
        return self._weights.sync_weights()

    def metrics(self) -> dict[str, Any]:
        """See `ExperienceSource.metrics`: what the selection says."""
        return self._selection.metrics()

    def state_dict(self) -> dict[str, Any]:
        """See `ExperienceSource.state_dict`."""
        drawn = self._drawn
        ahead = drawn and {
            "groups": [group.to_json() for group in drawn.groups],
            "generated_tokens": drawn.generated_tokens,
            "wall_s": drawn.wall_s,
            "filtered_solved": drawn.filtered_solved,
            "filtered_unsolved": drawn.filtered_unsolved,
            "rewards_dropped": drawn.rewards_dropped,
        }
        return {"place": self._place, "ahead": ahead, "selection": self._selection.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `ExperienceSource.load_state_dict`."""
        self._place = state["place"]
        self._selection.load_state_dict(state["selection"])
        if ahead := state["ahead"]:
            groups = [ScoredGroup.from_json(group, self._prompts.at) for group in ahead.pop("groups")]
            self._drawn = Experience(groups, **ahead)

    def close(self) -> None:
        """See `ExperienceSource.close`."""
        if self._drawing is not None:
            self._drawing[1].cancel()
            self._drawing = None

    def _begin(self, count: int) -> tuple[list[Prompt], Pending]:
        first = self._place
        prompts, self._place = self._selection.next_prompts(self._prompts.at, first, count)
        sampling = replace(self._sampling, first_prompt=first)
        self._drawing = prompts, self._rollouts.begin([prompt.prompt_ids for prompt in prompts], sampling)
        return self._drawing

    def _finish(self) -> Experience:
        groups: list[ScoredGroup] = []
        tokens, wall_s = 0, 0.0
        while self._drawn is None:
            prompts, pending = self._drawing or self._begin(self._selection.to_draw())
            report = pending.result()
            self._drawing = None
            scored = [self._scores.score(*drawn) for drawn in zip(prompts, report.completions, strict=True)]
            groups += [group for group in scored if self._selection.takes(group)]
            tokens, wall_s = tokens + report.generated_tokens, wall_s + report.wall_s
            if self._selection.to_draw() == 0:
                tally = self._selection.close_batch()
                self._drawn = Experience(
                    groups, tokens, wall_s, tally.solved, tally.unsolved, tally.rewards_dropped
                )
        return self._drawn


class AsynchronousSource(ExperienceSource):
    """Engines that never wait for the learner: as a group finishes, another begins.

    New weights reach the engines between two steps, in the middle of completions, which go on under them.
    Each token's log-probability and version are those of the weights that drew it. `StalenessManager` admits
    groups so that few grow too old; those that do are dropped. A batch is made of the groups that began first
    among the finished ones.

    Args:
        selection: of prompts and groups; groups that it leaves out are replaced, under drop as under redraw.
        sampling: for training; `seed` is the run's.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        weights: WeightSynchronizer,
        prompts: Prompts,
        scores: Scores,
        selection: Selection,
        prompts_per_step: int,
        sampling: Sampling,
        max_staleness: int,
    ) -> None:
        self._rollouts, self._weights = rollouts, weights
        self._prompts, self._scores, self._sampling = prompts, scores, sampling
        self._selection = selection
        self._lock = threading.RLock()
        self._manager = StalenessManager(prompts_per_step, max_staleness)
        self._place = 0  # of the first prompt that was never submitted
        self._running: dict[int, Prompt] = {}  # by place
        self._waiting: dict[int, ScoredGroup] = {}  # by place; finished, not trained on
        self._unsent: list[Prompt] = []  # were running when a checkpoint was written
        self._oldest = 0  # version of weights whose tokens may still be trained on
        self._stale_groups = 0
        self._tokens = 0  # of groups given up since the last batch
        self._handed_out = rollouts.clock()
        self._stream = rollouts.stream(self._finished)

    def next_batch(self) -> Experience:
        """See `ExperienceSource.next_batch`."""
        n = self._manager.groups_per_step
        self._stream.wait_until(lambda: self._manager.waiting >= n)
        with self._lock:
            groups = [self._waiting.pop(place) for place in sorted(self._waiting)[:n]]
            self._manager.train()
            self._refill()
            self._tokens += self._stream.take_given_up_tokens()
            now, tokens = self._rollouts.clock(), self._tokens + sum(group.tokens for group in groups)
            since, self._handed_out, self._tokens = self._handed_out, now, 0
            tally = self._selection.close_batch()
        return Experience(groups, tokens, now - since, tally.solved, tally.unsolved, tally.rewards_dropped)

    def sync_weights(self) -> SyncReport:
        """See `ExperienceSource.sync_weights`. Drops what is too old to be trained on by these weights."""
        report = self._weights.sync_weights()
        with self._lock:
            self._manager.update()
            self._oldest = report.version - self._manager.max_staleness
            gone = self._stream.drop_older_than(self._oldest)
            for place in gone:
                del self._running[place]
            self._manager.filter_running(len(gone))
            old = [place for place, group in self._waiting.items() if group.oldest_version < self._oldest]
            for place in old:
                self._tokens += self._waiting.pop(place).tokens
            self._manager.filter_waiting(len(old))
            self._stale_groups += len(gone) + len(old)
            self._refill()
        return report

    def metrics(self) -> dict[str, Any]:
        """See `ExperienceSource.metrics`.

        `groups_submitted`, `groups_accepted`, `groups_filtered`, `groups_running`: so far, the first being
        the sum of the others. `groups_stale`: those of the filtered that grew too old. `groups_waiting`:
        those of the accepted that are not trained on yet.
        """
        with self._lock:
            manager = self._manager
            return {
                "groups_submitted": manager.submitted,
                "groups_accepted": manager.accepted,
                "groups_filtered": manager.filtered,
                "groups_running": manager.running,
                "groups_waiting": manager.waiting,
                "groups_stale": self._stale_groups,
            } | self._selection.metrics()

    def state_dict(self) -> dict[str, Any]:
        """See `ExperienceSource.state_dict`. Groups that are running will begin anew."""
        with self._lock:
            self._tokens += self._stream.take_given_up_tokens()
            return {
                "place": self._place,
                "running": list(self._running),
                "waiting": [group.to_json() for group in self._waiting.values()],
                "stale_groups": self._stale_groups,
                "tokens": self._tokens,
                "groups": self._manager.state_dict(),
                "selection": self._selection.state_dict(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `ExperienceSource.load_state_dict`."""
        with self._lock:
            self._place, self._stale_groups = state["place"], state["stale_groups"]
            self._tokens = state["tokens"]
            self._manager.load_state_dict(state["groups"])
            self._selection.load_state_dict(state["selection"])
            groups = [ScoredGroup.from_json(group, self._prompts.at) for group in state["waiting"]]
            self._waiting = {group.prompt.place: group for group in groups}
            self._running = {place: self._prompts.at(place) for place in state["running"]}
            self._unsent = list(self._running.values())

    def close(self) -> None:
        """See `ExperienceSource.close`."""
        self._stream.close()

    def _finished(self, place: int, completions: list[Completion]) -> None:
        """Called by the stream, in a thread of its own."""
        with self._lock:
            prompt = self._running.get(place)
        if prompt is None:
            return  # dropped at the last moment
        group = self._scores.score(prompt, completions)
        with self._lock:
            if self._running.pop(place, None) is None:
                return
            if group.rollouts and group.oldest_version < self._oldest:
                self._manager.filter_running()
                self._tokens += group.tokens
                self._stale_groups += 1
                self._refill()
            elif self._selection.takes(group):
                self._waiting[place] = group
                self._manager.accept()
                self._refill()
            else:
                self._manager.filter_running()
                self._tokens += group.tokens
                self._selection.check()
                self._refill()

    def _refill(self) -> None:
        """Submits what admission allows."""
        # A group in reserve for each worker, so that a place that falls free is taken at once.
        engines_take = self._rollouts.free_places() // self._sampling.samples + self._rollouts.workers
        prompts, self._place = self._selection.next_prompts(
            self._prompts.at, self._place, self._manager.capacity(engines_take)
        )
        self._running |= {prompt.place: prompt for prompt in prompts}
        self._manager.submit(len(prompts))
        prompts, self._unsent = self._unsent + prompts, []
        self._stream.submit([self._request(prompt) for prompt in prompts])

    def _request(self, prompt: Prompt) -> GroupRequest:
        return GroupRequest(
            prompt.place, prompt.prompt_ids, replace(self._sampling, first_prompt=prompt.place)
        )


def experience_source(
    mode: ModeConfig,
    rollouts: Rollouts,
    weights: WeightSynchronizer,
    prompts: Prompts,
    scores: Scores,
    selection: Selection,
    prompts_per_step: int,
    sampling: Sampling,
) -> ExperienceSource:
    """The source that a mode means."""
    parts = rollouts, weights, prompts, scores, selection, prompts_per_step, sampling
    if isinstance(mode, AsynchronousConfig):
        return AsynchronousSource(*parts, mode.max_staleness)
    return BatchSource(*parts, ahead=isinstance(mode, OneStepOffConfig))
