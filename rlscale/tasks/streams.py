"""Kimi Linear's synthetic tests as the paper lays them out (arXiv:2510.26692, section 5.1): endless batches
of token ids of one length, with targets at the positions that ask.

`rlscale.tasks.synthetic` asks the same for RL, as prompts that a completion answers. Here answers stand where
the paper has them, beside each question, and whole batches are drawn by tensor operations on any device, so
that a model of two layers never waits for its data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

IGNORED = -100
SEPARATOR = 3
"""The separator of palindrome and recall; 0, 1 and 2 are padding, beginning and end as in every preset."""
_FIRST = 4


class Stream(ABC):
    """A source of fresh problems."""

    name: ClassVar[str]
    vocabulary: int
    """Token ids are below it."""

    @abstractmethod
    def draw(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and targets, both [rows, length] int64 on the generator's device.

        A target is what the model is to predict at that position, -100 where nothing is asked.
        """

    @abstractmethod
    def check(self, length: int) -> None:
        """Raises ValueError, naming the remedy, for a length that has no problem."""


class Palindrome(Stream):
    """A random sequence, a separator, and the sequence in reverse order: `O G R <sep> R G O`.

    Half of the tokens are asked for. The last of them is a target only, so `length` is even. The paper's
    table leaves out the first of them; here it counts.
    """

    name = "palindrome"

    def __init__(self, symbols: int = 26) -> None:
        self.symbols = symbols
        self.vocabulary = _FIRST + symbols

    def check(self, length: int) -> None:
        if length < 2 or length % 2:
            raise ValueError(f"a palindrome's length must be even and 2 or more, got {length}")

    def draw(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        self.check(length)
        half, device = length // 2, generator.device
        sequence = _FIRST + torch.randint(self.symbols, (rows, half), generator=generator, device=device)
        mirrored = sequence.flip(1)
        separator = torch.full((rows, 1), SEPARATOR, device=device)
        ids = torch.cat((sequence, separator, mirrored[:, :-1]), 1)
        return ids, torch.cat((torch.full_like(sequence, IGNORED), mirrored), 1)


class MultiQueryRecall(Stream):
    """Multi-query associative recall (MQAR, arXiv:2312.04927): key-value pairs, a separator, then keys, each
    to be answered by its value: `A 1 C 3 <sep> C A` asks for 3 and 1.

    A quarter of `length` are pairs, with keys all different; all that follows asks, for keys drawn again and
    again. The paper gives neither number.
    """

    name = "recall"

    def __init__(self, keys: int = 1024, values: int = 26) -> None:
        self.keys, self.values = keys, values
        self.vocabulary = _FIRST + values + keys

    def check(self, length: int) -> None:
        if not 4 <= length // 4 * 4 <= 4 * self.keys:
            raise ValueError(f"recall needs a length of 4 to {4 * self.keys} (or more keys), got {length}")

    def draw(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        self.check(length)
        pairs, device = length // 4, generator.device
        order = torch.rand(rows, self.keys, generator=generator, device=device).argsort(1)
        keys = _FIRST + self.values + order[:, :pairs]
        values = _FIRST + torch.randint(self.values, (rows, pairs), generator=generator, device=device)
        asked = torch.randint(pairs, (rows, length - 2 * pairs - 1), generator=generator, device=device)
        separator = torch.full((rows, 1), SEPARATOR, device=device)
        told = torch.stack((keys, values), 2).flatten(1)
        ids = torch.cat((told, separator, keys.gather(1, asked)), 1)
        unasked = torch.full((rows, 2 * pairs + 1), IGNORED, device=device)
        return ids, torch.cat((unasked, values.gather(1, asked)), 1)


class Stacks(Stream):
    """State tracking over many last-in-first-out stacks: `<push> 1 G` puts G on stack 1, `<pop> 0 E` takes E
    from stack 0, and E is asked for at the stack's name.

    Each operation meets a stack drawn evenly; it pushes if that one is empty, and half of the time if not.
    Tokens that `length` has beyond whole operations stand in front, as beginnings of sequence.
    """

    name = "stack"

    def __init__(self, stacks: int = 64, elements: int = 26) -> None:
        self.stacks, self.elements = stacks, elements
        self.push, self.pop, self._names = _FIRST, _FIRST + 1, _FIRST + 2
        self._elements = self._names + stacks
        self.vocabulary = self._elements + elements

    def check(self, length: int) -> None:
        if length < 6:
            raise ValueError(f"a push and a pop need a length of 6 or more, got {length}")

    def draw(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        self.check(length)
        steps, device = length // 3, generator.device
        stack = torch.randint(self.stacks, (rows, steps), generator=generator, device=device)
        drawn = torch.randint(self.elements, (rows, steps), generator=generator, device=device)
        # A stack that grows or shrinks with even odds, and grows where it is empty, is as high as a random
        # walk is far from 0: heights are sums, and no operation waits for the one before.
        walk = 2 * torch.randint(2, (rows, steps), generator=generator, device=device) - 1
        by_stack = torch.argsort(stack, dim=1, stable=True)
        stack_of, step_of = stack.gather(1, by_stack), walk.gather(1, by_stack)
        position = _sums_within(stack_of, step_of)
        height, before = position.abs(), (position - step_of).abs()
        pushes = height > before
        # At one height of one stack pushes and pops take turns, so a pop finds its push just before it.
        level = stack_of * (steps + 1) + torch.maximum(height, before)
        by_level = torch.argsort(level, dim=1, stable=True)
        contents = drawn.gather(1, by_stack).gather(1, by_level)
        taken = torch.where(pushes.gather(1, by_level), contents, contents.roll(1, 1))
        taken = torch.empty_like(taken).scatter(1, by_level, taken)
        # Back in the order of the operations.
        element = self._elements + torch.empty_like(taken).scatter(1, by_stack, taken)
        pushes = torch.empty_like(pushes).scatter(1, by_stack, pushes)
        names = self._names + stack
        verbs = torch.where(pushes, self.push, self.pop)
        ids = torch.stack((verbs, names, element), 2).flatten(1)
        nothing = torch.full_like(names, IGNORED)
        targets = torch.stack((nothing, element.masked_fill(pushes, IGNORED), nothing), 2).flatten(1)
        front = (rows, length - 3 * steps)
        begin, ignored = (torch.full(front, value, device=device) for value in (1, IGNORED))
        return torch.cat((begin, ids), 1), torch.cat((ignored, targets), 1)


STREAMS: dict[str, type[Stream]] = {stream.name: stream for stream in (Palindrome, MultiQueryRecall, Stacks)}


def _sums_within(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Running sums along rows that start again with each group; groups [rows, n] ascend."""
    sums = values.cumsum(1)
    start = torch.searchsorted(groups, groups)  # the first place of each one's group
    return sums - (sums - values).gather(1, start)
