"""Any dataset of reasoning-gym as a task, scored by its own scorer.

The length of its answers cannot be dialled, so `required_length` is an upper bound: a problem whose reference
answer is longer, in characters, is drawn again.

In reasoning-gym 0.1.25 five datasets (isomorphic_strings, knight_swap, polynomial_multiplication,
ransom_note, word_ladder) iterate over sets: their problems agree between processes only under a fixed
PYTHONHASHSEED.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from rlscale.errors import UserError
from rlscale.tasks.base import Shaping, Split, Task, TaskOptions, split_of
from rlscale.types import Problem

_SAT_SOLVER = find_spec("pycosat") is not None
PREFIX = "reasoning_gym/"
_REMEMBERED_ENTRIES = 4096


class GymOptions(TaskOptions):
    """A dataset's own configuration; the dataset validates it."""

    dataset: dict[str, Any]


class GymTask(Task):
    """One dataset. A problem's `required_length` is that of its reference answer, at most the task's.

    Where a dataset accepts several answers, its scorer decides what is right, and `Problem.answer` is one of
    them. The prompt is the question and a line break.
    """

    summary = "a reasoning-gym dataset, scored by its own scorer; required_length bounds the answer's length"
    Options = GymOptions
    max_draws: ClassVar[int] = 200  # some datasets take a tenth of a second a draw

    def __init__(self, dataset: str, required_length: int, options: dict[str, Any]) -> None:
        """Raises UserError: unknown dataset or option, or a configuration that the dataset refuses."""
        self.name = PREFIX + dataset  # type: ignore[misc]
        known = [field.name for field in dataset_fields(dataset)]
        if dataset == "zebra_puzzles" and not _SAT_SOLVER:
            raise UserError(f"{self.name} needs pycosat, which needs a C compiler: pip install pycosat")
        for option in options:
            if option not in known:
                raise UserError(f"{self.name}: unknown option '{option}', known are {', '.join(known)}")
        try:
            self._dataset = _reasoning_gym().create_dataset(dataset, **{"seed": 0, **options})
        except (AssertionError, ValueError, TypeError) as error:
            raise UserError(f"{self.name} refuses the options {options}: {error}") from None
        self._entries: dict[str, dict[str, Any]] = {}
        super().__init__(required_length, GymOptions(dataset=options))

    def draw(self, rng: np.random.Generator) -> tuple[str, str] | None:
        entry = self._random_entry(rng)
        prompt, answer = entry["question"] + "\n", entry["answer"]
        if not isinstance(answer, str) or not 0 < len(answer) <= self.required_length:
            return None
        self._entries.pop(prompt, None)
        self._entries[prompt] = entry
        if len(self._entries) > _REMEMBERED_ENTRIES:
            self._entries.pop(next(iter(self._entries)))
        return prompt, answer

    def why_empty(self, split: Split) -> str:
        rng = self._generator(split, 0)
        answers = [self._random_entry(rng)["answer"] for _ in range(self.max_draws)]
        lengths = [len(answer) for answer in answers if isinstance(answer, str) and answer]
        if not lengths:
            return "the dataset gives no reference answers: choose another"
        if min(lengths) > self.required_length:
            return (
                f"the shortest of {len(answers)} answers has {min(lengths)} tokens: require as many or more"
            )
        return (
            f"none of {self.max_draws} draws for the {split} split fits: raise required_length (answers have "
            f"{min(lengths)} to {max(lengths)} tokens) or widen the dataset's options"
        )

    def score(self, problem: Problem, completion: str, shaping: Shaping) -> float:
        """1 where the dataset's scorer gives its full score; else as for every task, by the answer."""
        if problem.prompt not in self._entries:
            self.problem(split_of(problem.prompt), problem.key)
        try:
            full_score = self._dataset.score_answer(completion, self._entries[problem.prompt]) >= 1.0
        except Exception:  # scorers parse completions, and many do not expect what an untrained policy writes
            full_score = False
        return 1.0 if full_score else super().score(problem, completion, shaping)

    def settled(self, _problem: Problem, completion: str) -> int:
        """All of it: a scorer may accept what differs from the reference answer."""
        return len(completion)

    def _random_entry(self, rng: np.random.Generator) -> dict[str, Any]:
        index = int(rng.integers(1 << 31))
        # A few generators draw from the process's global random numbers; a problem must not depend on these.
        outside = random.getstate()
        try:
            return self._entry(index)
        except IndexError:  # some datasets are finite lists of `size` problems
            return self._entry(index % len(self._dataset))
        finally:
            random.setstate(outside)

    def _entry(self, index: int) -> dict[str, Any]:
        random.seed(index)
        entry: dict[str, Any] = self._dataset[index]
        return entry


def dataset_names() -> list[str]:
    """The datasets that `reasoning_gym/NAME` can name."""
    return sorted(_reasoning_gym().factory.DATASETS)


def dataset_fields(dataset: str) -> list[dataclasses.Field[Any]]:
    """The options of a dataset. Its seed is none of them: the splits need it."""
    config = _reasoning_gym().factory.DATASETS[dataset][1]
    return [field for field in dataclasses.fields(config) if field.name != "seed"]


@cache
def _reasoning_gym() -> ModuleType:
    """The library, imported when a task asks for it: with Matplotlib, which it needs, that takes a second."""
    if not _SAT_SOLVER:
        # It imports this SAT solver for zebra_puzzles alone, and it has to be compiled: where that was not
        # possible, the other datasets work all the same.
        sys.modules["pycosat"] = ModuleType("pycosat")
    import reasoning_gym

    return reasoning_gym
