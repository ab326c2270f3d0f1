"""What every task is: a stream of problems, each a function of its key alone, and a score for completions."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np

from rlscale.config import Section
from rlscale.errors import UserError
from rlscale.types import Problem

Split = Literal["train", "held_out", "validation"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "validation")
Shaping = Literal["exact", "prefix", "prefix_and_exact"]


class TaskOptions(Section):
    """The knobs of a task's difficulty. An unknown one is an error; the required length is none of them."""


class Task(ABC):
    """Problems whose right answer is known and exactly `required_length` tokens long.

    A problem is a function of (task, options, required length, split, key), on every machine. The splits are
    disjoint in two ways: their random numbers are seeded apart, and a prompt belongs to one split by its
    hash, so no held-out prompt is ever trained on, however small the space of problems.
    """

    name: ClassVar[str]
    """As in `task.name`."""
    summary: ClassVar[str]
    """One line: what is asked and what answers it."""
    Options: ClassVar[type[TaskOptions]]
    lengths: ClassVar[str] = "1 or more"
    """Required lengths that the task can be asked for, in words."""
    max_draws: ClassVar[int] = 1000
    """Random problems looked at before a split is declared empty."""

    def __init__(self, required_length: int, options: TaskOptions) -> None:
        """Raises UserError, naming the valid range, where no answer has `required_length` tokens."""
        self.required_length = required_length
        self.options = options
        longest = self.longest()
        if required_length < 1 or (longest is not None and required_length > longest):
            valid = "1 or more" if longest is None else f"1 to {longest}{self.why_longest()}"
            raise UserError(f"{self.name}: required_length={required_length} is impossible, valid: {valid}")

    def longest(self) -> int | None:
        """The longest answer these options allow, in tokens; None: no limit."""
        return None

    def why_longest(self) -> str:
        """For error messages: what the limit comes from, and what lifts it."""
        return ""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> tuple[str, str] | None:
        """A random prompt and its answer, by numbers from `rng` alone; None: draw again."""

    def why_empty(self, split: Split) -> str:
        """For error messages: why no problem of a split was found, and what helps."""
        return (
            f"too few different problems for a {split} split: "
            f"raise required_length or widen its options (now {self.options.model_dump()})"
        )

    def problem(self, split: Split, key: int) -> Problem:
        """Problem number `key` of a split.

        Raises:
            UserError: the options leave so few different prompts that the split has none.
        """
        rng = self._generator(split, key)
        for _ in range(self.max_draws):
            drawn = self.draw(rng)
            if drawn is not None and split_of(drawn[0]) == split:
                prompt, answer = drawn
                return Problem(prompt, answer, len(answer), key)
        raise UserError(f"{self.name} with required_length={self.required_length}: {self.why_empty(split)}")

    def score(self, problem: Problem, completion: str, shaping: Shaping) -> float:
        """The reward of a completion, its end-of-sequence token left out.

        exact: 1 for the answer, else 0. prefix: the characters right before the first error over the
        answer's length; going on after the answer counts as an error in its last character, so only the
        answer itself earns 1. prefix_and_exact: the mean of both. Of a long answer prefix gives nearly all
        to a policy that does not stop at its end, which then may forget how to.
        """
        if completion == problem.answer:
            return 1.0
        if shaping == "exact":
            return 0.0
        part = min(_right(problem, completion), len(problem.answer) - 1) / len(problem.answer)
        return part if shaping == "prefix" else part / 2

    def settled(self, problem: Problem, completion: str) -> int:
        """Characters of a completion up to its first error, that included: its score is the same whatever
        follows them. All of them where there is no error in it."""
        return min(_right(problem, completion) + 1, len(completion))

    def _generator(self, split: Split, key: int) -> np.random.Generator:
        # Python's hash() differs between processes; SHA-256 of a canonical text does not.
        identity = [self.name, self.options.model_dump(mode="json"), self.required_length, split, key]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _right(problem: Problem, completion: str) -> int:
    """Characters before the first error."""
    pairs = enumerate(zip(completion, problem.answer, strict=False))
    shorter = min(len(completion), len(problem.answer))
    return next((place for place, (given, expected) in pairs if given != expected), shorter)


def split_of(prompt: str) -> Split:
    """The split a prompt belongs to: an eighth each is held out and for validation, the rest trains."""
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 8
    return {0: "held_out", 1: "validation"}.get(bucket, "train")  # type: ignore[return-value]
