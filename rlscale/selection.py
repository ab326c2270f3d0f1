"""Between scoring and training: what rewards teach, what length costs, and which prompts are mastered.

Functions and a small record, group by group, so that a loop of whole batches and one of single groups can use
them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlscale.algorithms import SelectionConfig
from rlscale.errors import UserError
from rlscale.learner.advantages import EQUAL_REWARDS


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


def check_draws(drawn: int, found: int, needed: int, prompts_per_step: int, config: SelectionConfig) -> None:
    """Ends a search for prompts that teach something.

    Args:
        drawn: prompts drawn for this batch.
        found: those of them whose completions have different rewards.
        needed: how many the batch needs.

    Raises:
        UserError: `config.max_draws` times `prompts_per_step` prompts did not give enough.
    """
    if found < needed and drawn >= config.max_draws * prompts_per_step:
        raise UserError(
            f"of {drawn} prompts only {found} had completions of different rewards, a step needs {needed}: "
            "the policy solves nearly all or nearly none, so change the task's difficulty or "
            "warm_start.target_pass_rate, raise algorithm.selection.max_draws, or set "
            "algorithm.selection.equal_rewards=keep"
        )


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


def _digest(prompt: str) -> str:
    return hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
