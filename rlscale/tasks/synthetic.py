"""The synthetic tasks: one character is one token, and each token of the answer has to be worked out.

Every prompt ends in `=`. Reversal, recall and stack follow the synthetic tests of Kimi Linear
(arXiv:2510.26692: palindrome, multi-query associative recall, stack).
"""

from __future__ import annotations

from string import ascii_lowercase, ascii_uppercase, digits, punctuation

import numpy as np
from pydantic import Field

from rlscale.errors import UserError
from rlscale.tasks.base import Task, TaskOptions

SYMBOLS = ascii_lowercase + ascii_uppercase + digits
"""What sequences are drawn from, in the order that sorting sorts by."""
STACK_NAMES = ascii_uppercase + digits + punctuation.replace("=", "").replace("-", "")
"""Names of stacks: apart from elements (lower case), from `-` (pop) and from `=` (end of prompt)."""
END = "="


class ReversalOptions(TaskOptions):
    alphabet: int = Field(10, ge=2, le=len(SYMBOLS))
    """Different characters that a sequence is drawn from: a-z, then A-Z, then 0-9."""


class Reversal(Task):
    """The palindrome test of Kimi Linear: continue a sequence with its mirror image."""

    name = "reversal"
    summary = "a random sequence, to be answered in reverse order: abca= gives acba"
    Options = ReversalOptions
    options: ReversalOptions

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        sequence = _sequence(rng, SYMBOLS[: self.options.alphabet], self.required_length)
        return sequence + END, sequence[::-1]


class SortingOptions(TaskOptions):
    alphabet: int = Field(4, ge=2, le=len(SYMBOLS))
    """Different characters that a sequence is drawn from: a-z, then A-Z, then 0-9, sorted in this order."""
    distinct: bool = False
    """Draw no character twice; the required length is then at most the alphabet's."""


class Sorting(Task):
    """Sort a sequence: every element of the answer depends on the whole prompt."""

    name = "sorting"
    summary = "a random sequence, to be answered in ascending order: badb= gives abbd"
    Options = SortingOptions
    lengths = "1 or more; with distinct: true at most the alphabet's size"
    options: SortingOptions

    def longest(self) -> int | None:
        return self.options.alphabet if self.options.distinct else None

    def why_longest(self) -> str:
        return f" (distinct characters of an alphabet of {self.options.alphabet}; or set distinct: false)"

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        indices = rng.choice(
            self.options.alphabet, self.required_length, replace=not self.options.distinct
        ).tolist()
        return "".join(SYMBOLS[i] for i in indices) + END, "".join(SYMBOLS[i] for i in sorted(indices))


class RecallOptions(TaskOptions):
    pairs: int = Field(8, ge=1, le=len(ascii_lowercase + ascii_uppercase))
    """Key-value pairs in the prompt; keys are letters, all different."""
    values: int = Field(10, ge=2, le=len(digits + punctuation) - 1)
    """Different characters that values are drawn from: 0-9, then punctuation."""


class Recall(Task):
    """Multi-query associative recall (MQAR, arXiv:2312.04927)."""

    name = "recall"
    summary = "key-value pairs, then keys, to be answered by their values: a3b7|bab= gives 737"
    Options = RecallOptions
    options: RecallOptions

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        letters = ascii_lowercase + ascii_uppercase
        keys = [letters[i] for i in rng.choice(len(letters), self.options.pairs, replace=False)]
        marks = digits + punctuation.replace("=", "").replace("|", "")
        values = _sequence(rng, marks[: self.options.values], self.options.pairs)
        value_of = dict(zip(keys, values, strict=True))
        # Rounds over all keys, so that the questions touch as many pairs as their number allows.
        queries: list[str] = []
        while len(queries) < self.required_length:
            queries += [keys[i] for i in rng.permutation(len(keys))]
        queries = queries[: self.required_length]
        pairs = "".join(key + value for key, value in value_of.items())
        return f"{pairs}|{''.join(queries)}{END}", "".join(value_of[key] for key in queries)


class StackOptions(TaskOptions):
    stacks: int = Field(64, ge=1, le=64)
    """Stacks that the operations are spread over."""
    elements: int = Field(26, ge=2, le=len(ascii_lowercase))
    """Different characters that are pushed: a-z."""


class Stack(Task):
    """State tracking over many last-in-first-out stacks."""

    name = "stack"
    summary = "pushes (Ax: x on stack A) and pops (A-), to be answered by what is popped: AxAyA-A-= gives yx"
    Options = StackOptions
    options: StackOptions

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        names = STACK_NAMES[: self.options.stacks]
        elements = iter(_sequence(rng, ascii_lowercase[: self.options.elements], self.required_length))
        stacks: dict[str, list[str]] = {}
        operations: list[str] = []
        popped: list[str] = []
        pushes_left = self.required_length
        while len(popped) < self.required_length:
            filled = [name for name, content in stacks.items() if content]
            if pushes_left and (not filled or rng.random() < 0.5):
                stack, element = names[rng.integers(len(names))], next(elements)
                stacks.setdefault(stack, []).append(element)
                operations.append(stack + element)
                pushes_left -= 1
            else:
                stack = filled[rng.integers(len(filled))]
                popped.append(stacks[stack].pop())
                operations.append(stack + "-")
        return "".join(operations) + END, "".join(popped)


class RunningSumOptions(TaskOptions):
    modulus: int = Field(10, ge=2, le=len(digits + ascii_lowercase))
    """Sums are taken modulo this; digits are 0-9, then a-z."""


class RunningSum(Task):
    """Running sums: every element of the answer depends on the element before it."""

    name = "running_sum"
    summary = "random digits, to be answered by their running sums: 385= gives 316 modulo 10"
    Options = RunningSumOptions
    options: RunningSumOptions

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        numerals = digits + ascii_lowercase
        terms = rng.integers(self.options.modulus, size=self.required_length)
        sums = np.cumsum(terms) % self.options.modulus
        return "".join(numerals[i] for i in terms) + END, "".join(numerals[i] for i in sums)


class CountdownOptions(TaskOptions):
    letters: int = Field(5, ge=1, le=len(ascii_lowercase))
    """Of the word in the prompt, all different."""
    alphabet: int = Field(8, ge=1, le=len(ascii_lowercase))
    """Letters that words are drawn from: a-z; as many as a word has at least."""
    base: int = Field(16, ge=2, le=len(digits + ascii_uppercase))
    """Of the number that counts down; its digits are 0-9, then A-Z."""
    digits: int = Field(3, ge=1, le=8)
    """Of that number, the least significant one first. A row of the answer is the word and so many digits."""


class Countdown(Task):
    """A short prompt and a long answer, as in reasoning: each row repeats the word and counts on from the row
    before it, and the answer ends where the count does."""

    name = "countdown"
    summary = "a word and a number, to be answered by rows that count down: cab300= gives cab200cab100cab000"
    Options = CountdownOptions
    options: CountdownOptions
    lengths = "multiples of letters + digits, of fewer than base ** digits rows"

    def __init__(self, required_length: int, options: CountdownOptions) -> None:
        super().__init__(required_length, options)
        if required_length % self._row:
            raise UserError(
                f"{self.name}: required_length={required_length} is impossible, valid: multiples of "
                f"{self._row} ({options.letters} letters and {options.digits} digits a row)"
            )
        if options.alphabet < options.letters:
            raise UserError(
                f"{self.name}: words of {options.letters} different letters need an alphabet of as many: "
                f"raise alphabet (now {options.alphabet}) or lower letters"
            )

    def longest(self) -> int | None:
        return self._row * (self.options.base**self.options.digits - 1)

    def why_longest(self) -> str:
        return f" (rows counted in {self.options.digits} digits to base {self.options.base})"

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        letters = rng.permutation(self.options.alphabet)[: self.options.letters]
        word = "".join(ascii_lowercase[i] for i in letters)
        rows = self.required_length // self._row
        return word + self._number(rows) + END, "".join(
            word + self._number(left) for left in range(rows)[::-1]
        )

    @property
    def _row(self) -> int:
        return self.options.letters + self.options.digits

    def _number(self, value: int) -> str:
        numerals, base = digits + ascii_uppercase, self.options.base
        return "".join(numerals[value // base**place % base] for place in range(self.options.digits))


def _sequence(rng: np.random.Generator, symbols: str, length: int) -> str:
    return "".join(symbols[i] for i in rng.integers(len(symbols), size=length))
