"""Where a step's seconds go, and how much of them engines and learner spend idle."""

from __future__ import annotations

from typing import Protocol

from rlscale.rollout.pool import Usage


class Clocked(Protocol):
    """What is asked of the rollout side; see `rlscale.rollout.pool.RolloutPool`."""

    @property
    def workers(self) -> int: ...

    @property
    def places(self) -> int: ...

    def clock(self) -> float: ...

    def usage(self) -> Usage: ...


class StepWatch:
    """Takes the time of one step's phases, from its making on.

    The phases are the learner's: `batch_wait_s`, waiting for experience; `learner_s`, training;
    `sync_stall_s`, waiting until the engines have the new weights.
    """

    def __init__(self, rollouts: Clocked) -> None:
        self._rollouts = rollouts
        self._usage = rollouts.usage()
        self._started = self._now = rollouts.clock()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase that began where the last one ended."""
        before, self._now = self._now, self._rollouts.clock()
        self._laps[phase] = self._now - before

    @property
    def total_s(self) -> float:
        """From the start to the end of the last phase."""
        return self._now - self._started

    def metrics(self) -> dict[str, float]:
        """The phases, and as shares of the step (in the time up to the last phase's end):

        `learner_idle_fraction`: not in `learner_s`. `rollout_idle_fraction`: of the workers' time, not in an
        engine step, counted in whole slices of time. `rollout_occupancy`: of the engines' places for
        completions, those in use. `worker_deaths`: rollout workers that died and were replaced.
        """
        usage = self._rollouts.usage()
        busy_s = usage.busy_s - self._usage.busy_s
        completion_s = usage.completion_s - self._usage.completion_s
        total_s = self.total_s
        return self._laps | {
            "step_s": total_s,
            "learner_idle_fraction": 1 - self._laps["learner_s"] / total_s,
            # A slice that began before the step counts whole: the shares may miss their bounds by one slice.
            "rollout_idle_fraction": max(0.0, 1 - busy_s / (self._rollouts.workers * total_s)),
            "rollout_occupancy": min(1.0, completion_s / (self._rollouts.places * total_s)),
            "worker_deaths": usage.deaths - self._usage.deaths,
        }
