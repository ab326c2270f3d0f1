"""Between scoring and training: what rewards teach, what length costs, and which prompts are mastered.

All of it group by group, so that whole batches and streams of groups use it alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlscale.algorithms import SelectionConfig
from rlscale.errors import UserError
from rlscale.learner.advantages import EQUAL_REWARDS

if TYPE_CHECKING:
    from rlscale.experience import Prompt, ScoredGroup

_MOST_PASSED_OVER = 10_000
"""Mastered prompts in a row after which a task counts as exhausted."""


def teaches(rewards: Sequence[float]) -> bool:
    """Whether the completions of a prompt have different rewards; from equal ones nothing can be learned."""
    return max(rewards) - min(rewards) > EQUAL_REWARDS


def overlong_penalty(tokens: int, budget: int, buffer: float, required_length: int) -> float:
    """What a completion's length takes from its reward: DAPO's soft overlong punishment.

        0 up to n_0 tokens, then (tokens - n_0) / (budget - n_0), which is 1 at the budget

    arXiv:2503.14476, eq. 13, with n_0 = (1 - buffer) * budget; but never below the tokens of the right
    answer, end-of-sequence included, so that no right answer is punished for what was asked of it.

    Args:
        tokens: of the completion; more than the budget count as the budget.
        buffer: the last fraction of the budget; 0 punishes nothing.
        required_length: tokens of the right answer, end-of-sequence apart.
    """
    start = max((1 - buffer) * budget, required_length + 1)
    return max(0.0, min(tokens, budget) - start) / (budget - start) if budget > start else 0.0


class PassRates:
    """How often each prompt was passed so far, and which are mastered, so that they need not be drawn again.

    No-positive-resampling (arXiv:2510.13786, section 3.2). Prompts are told apart by their text, of which a
    hash of 8 bytes and two counts are kept.

    Args:
        mastered_at: pass rate over all completions so far from which a prompt counts as mastered; None: none
            ever does, and nothing is kept.
    """

    def __init__(self, mastered_at: float | None) -> None:
        self._mastered_at = mastered_at
        self._counts: dict[str, tuple[int, int]] = {}  # passed, drawn

    def record(self, prompt: str, passed: Iterable[bool]) -> None:
        """Takes in how completions of a prompt did."""
        if self._mastered_at is None:
            return
        outcomes = list(passed)
        before = self._counts.get(_digest(prompt), (0, 0))
        self._counts[_digest(prompt)] = before[0] + sum(outcomes), before[1] + len(outcomes)

    def is_mastered(self, prompt: str) -> bool:
        return self._mastered_at is not None and self._is_high(self._counts.get(_digest(prompt), (0, 0)))

    @property
    def mastered(self) -> int:
        """Prompts that are not to be drawn again."""
        return sum(self._is_high(counts) for counts in self._counts.values())

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; plain data for JSON."""
        return {"counts": {digest: list(counts) for digest, counts in self._counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = {
            digest: (int(passed), int(drawn)) for digest, (passed, drawn) in state["counts"].items()
        }

    def _is_high(self, counts: tuple[int, int]) -> bool:
        passed, drawn = counts
        return self._mastered_at is not None and drawn > 0 and passed / drawn >= self._mastered_at


@dataclass(slots=True)
class Tally:
    """Groups drawn for one batch.

    Args:
        kept: groups to train on.
        solved, unsolved: left out since all completions earned the same, as all passed, or not all.
        unrewarded: left out since no completion has a reward.
        rewards_dropped: completions without a reward, of all groups.
    """

    kept: int = 0
    solved: int = 0
    unsolved: int = 0
    unrewarded: int = 0
    rewards_dropped: int = 0

    @property
    def drawn(self) -> int:
        return self.kept + self.solved + self.unsolved + self.unrewarded


class Selection:
    """Decides which prompts are drawn and which scored groups are trained on, and keeps count.

    Args:
        prompts_per_step: groups that a batch has.
    """

    def __init__(self, config: SelectionConfig, prompts_per_step: int) -> None:
        self._config, self._prompts_per_step = config, prompts_per_step
        self._pass_rates = PassRates(config.retire_pass_rate)
        self._tally = Tally()

    def next_prompts(
        self, prompt_at: Callable[[int], Prompt], place: int, count: int
    ) -> tuple[list[Prompt], int]:
        """The next prompts from a place on, mastered ones passed over, and the place after them.

        Raises:
            UserError: the task seems to have no other prompts left.
        """
        prompts: list[Prompt] = []
        passed_over = 0
        while len(prompts) < count:
            prompt = prompt_at(place)
            place += 1
            if not self._pass_rates.is_mastered(prompt.problem.prompt):
                prompts.append(prompt)
                passed_over = 0
                continue
            passed_over += 1
            if passed_over == _MOST_PASSED_OVER:
                raise UserError(
                    f"the policy passes all prompts of the task at {self._config.retire_pass_rate} or more: "
                    "end the run, or give it a harder task or a higher algorithm.selection.retire_pass_rate"
                )
        return prompts, place

    def takes(self, group: ScoredGroup) -> bool:
        """Takes a scored group in; whether it is trained on."""
        self._tally.rewards_dropped += group.dropped
        if not group.rollouts:
            self._tally.unrewarded += 1
            return False
        self._pass_rates.record(group.prompt.problem.prompt, group.passed)
        if self._config.equal_rewards == "keep" or teaches([rollout.reward for rollout in group.rollouts]):
            self._tally.kept += 1
            return True
        self._tally.solved += all(group.passed)
        self._tally.unsolved += not all(group.passed)
        return False

    def to_draw(self) -> int:
        """Groups to draw next for a batch that is drawn as a whole; 0 once there is enough to train on.

        Raises:
            UserError: as `check`.
        """
        n, tally = self._prompts_per_step, self._tally
        if tally.drawn == 0:
            return n
        if self._config.equal_rewards != "redraw" and tally.kept:
            return 0
        self.check()
        return n - tally.kept

    def check(self) -> None:
        """Ends a search that has gone on for too long.

        Raises:
            UserError: `max_draws` times `prompts_per_step` groups did not give enough for a batch.
        """
        n, tally = self._prompts_per_step, self._tally
        if tally.kept < n and tally.drawn >= self._config.max_draws * n:
            raise UserError(
                f"of {tally.drawn} prompts only {tally.kept} had completions of different rewards "
                f"({tally.solved} others were always passed): change the task's difficulty or "
                "warm_start.target_pass_rate, raise algorithm.selection.max_draws, or set "
                "algorithm.selection.equal_rewards=keep"
            )

    def close_batch(self) -> Tally:
        """The tally of this batch; the next one's begins."""
        tally, self._tally = self._tally, Tally()
        return tally

    def metrics(self) -> dict[str, float]:
        """`mastered_prompts`, those not to be drawn again, where there can be some."""
        if self._config.retire_pass_rate is None:
            return {}
        return {"mastered_prompts": self._pass_rates.mastered}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs; plain data for JSON."""
        return {"pass_rates": self._pass_rates.state_dict(), "tally": asdict(self._tally)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._pass_rates.load_state_dict(state["pass_rates"])
        self._tally = Tally(**state["tally"])


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
