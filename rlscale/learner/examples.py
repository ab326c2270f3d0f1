"""Supervised data: prompts with the completions that a policy is to imitate."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from rlscale.algorithms import AlgorithmConfig, Data, MirrorDescentConfig
from rlscale.errors import UserError
from rlscale.tasks import Task, encode_prompt, encode_text
from rlscale.types import Example

# Solutions come from the upper half of a seed's training keys, RL's problems from the lower.
_KEYS_PER_SEED = 1 << 32
_FIRST_KEY = 1 << 31


class Examples(Protocol):
    """Endless examples by number: the same number is the same example on every machine."""

    def at(self, number: int) -> Example: ...


class Solutions:
    """A task's training problems with their answers; RL on the same seed draws none of them."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._task, self._tokenizer, self._seed = task, tokenizer, seed

    def at(self, number: int) -> Example:
        """Raises UserError where a seed has no further problems."""
        if number >= _KEYS_PER_SEED - _FIRST_KEY:
            raise UserError(f"seed {self._seed} has no solution number {number}: take another seed")
        problem = self._task.problem("train", self._seed * _KEYS_PER_SEED + _FIRST_KEY + number)
        return encode_example(self._tokenizer, problem.prompt, problem.answer)


class ExampleFile:
    """The examples of a file, in an order drawn anew from the seed in each pass over it.

    Each line is an object with `prompt` and `completion`, both text.

    Raises:
        UserError: the file cannot be read, a line is no such object, or has a character without a token.
    """

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._examples = read_examples(path, tokenizer)
        self._seed = seed
        self._order: tuple[int, list[int]] = -1, []  # pass over the file, and its order

    def at(self, number: int) -> Example:
        epoch, place = divmod(number, len(self._examples))
        if epoch != self._order[0]:
            order = list(range(len(self._examples)))
            random.Random(f"{self._seed} {epoch}").shuffle(order)
            self._order = epoch, order
        return self._examples[self._order[1][place]]


def supervised_data(data: Data, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> Examples:
    """What a setting `data` means: a file, or `solutions`. Raises as `ExampleFile`."""
    if isinstance(data, Path):
        return ExampleFile(data, tokenizer, seed)
    return Solutions(task, tokenizer, seed)


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The examples of a file of JSON lines; raises as `ExampleFile`."""
    try:
        lines = path.read_text("utf-8").split("\n")  # splitlines would cut at separators inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no examples can be read from {path}: {' '.join(str(error).split())}") from None
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            prompt, completion = found["prompt"], found["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} must be an object with texts `prompt` and `completion`, such as "
                '{"prompt": "2+2=", "completion": "4"}'
            ) from None
        try:
            examples.append(encode_example(tokenizer, prompt, completion))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise UserError(f"{path} has no examples: give it lines with `prompt` and `completion`")
    return examples


def encode_example(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Example:
    """A prompt as RL would put it, and its completion with the end-of-sequence token."""
    return Example(
        encode_prompt(tokenizer, prompt), [*encode_text(tokenizer, completion), tokenizer.eos_token_id]
    )


def ptx_batches(
    algorithm: AlgorithmConfig,
    updates_per_step: int,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Callable[[int], list[Example]]:
    """The examples of each RL step, counted from 1, for the algorithm's supervised loss; none where it has
    none.

    Raises:
        UserError: as `ExampleFile`.
    """
    if not isinstance(algorithm, MirrorDescentConfig) or algorithm.ptx.data is None:
        return lambda _: []
    examples = supervised_data(algorithm.ptx.data, task, tokenizer, seed)
    n = algorithm.ptx.batch_size * updates_per_step
    return lambda step: [examples.at(number) for number in range((step - 1) * n, step * n)]
