"""How long completions are: distributions that a simulation draws from."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist, fmean

import numpy as np

_POINTS = 2000  # that moments are averaged over


class Lengths(ABC):
    """Tokens of completions. That of one depends on the seed and its place, not on who draws it or when."""

    seed: int

    @abstractmethod
    def quantile(self, probability: float) -> int:
        """The length that this share of the completions does not exceed, at least 1."""

    @abstractmethod
    def scaled(self, factor: float) -> Lengths:
        """The same shape, all lengths multiplied."""

    def __call__(self, place: int, sample: int) -> int:
        """Length of completion `sample` of the prompt at `place`."""
        return self.quantile(self.draw(place, sample))

    def draw(self, place: int, sample: int) -> float:
        """A random number in (0, 1) for a completion."""
        digest = hashlib.blake2b(f"{self.seed} {place} {sample}".encode(), digest_size=6).digest()
        return (int.from_bytes(digest, "little") + 0.5) / 2**48

    def spread(self, count: int) -> np.ndarray:
        """`count` lengths in ascending order, one for each equal share of the completions: float64."""
        return np.array([self.quantile((i + 0.5) / count) for i in range(count)], dtype=float)

    def mean(self) -> float:
        return float(self.spread(_POINTS).mean())

    def mean_square(self) -> float:
        return float((self.spread(_POINTS) ** 2).mean())


@dataclass(frozen=True, slots=True)
class FixedLengths(Lengths):
    """All completions have `tokens` tokens."""

    tokens: int
    seed: int = 0

    def quantile(self, probability: float) -> int:  # noqa: ARG002 (all are alike)
        """See `Lengths.quantile`."""
        return self.tokens

    def scaled(self, factor: float) -> FixedLengths:
        """See `Lengths.scaled`."""
        return replace(self, tokens=max(1, round(self.tokens * factor)))


@dataclass(frozen=True, slots=True)
class LogNormalLengths(Lengths):
    """Lengths with a heavy tail: exp(N(log median, sigma²)) tokens, cut off at the budget."""

    median: float
    sigma: float
    budget: int
    seed: int = 0

    def quantile(self, probability: float) -> int:
        """See `Lengths.quantile`."""
        if probability >= 1:
            return self.budget
        tokens = self.median * math.exp(self.sigma * NormalDist().inv_cdf(probability))
        return max(1, min(self.budget, round(tokens)))

    def scaled(self, factor: float) -> LogNormalLengths:
        """See `Lengths.scaled`."""
        return replace(self, median=self.median * factor, budget=max(1, round(self.budget * factor)))


@dataclass(frozen=True, slots=True)
class EmpiricalLengths(Lengths):
    """Lengths as a run's completions had them.

    Args:
        quantiles: at even steps of probability, from the shortest to the longest.
    """

    quantiles: tuple[float, ...]
    seed: int = 0

    def quantile(self, probability: float) -> int:
        """See `Lengths.quantile`."""
        place = probability * (len(self.quantiles) - 1)
        below = min(int(place), len(self.quantiles) - 2)
        low, high = self.quantiles[below], self.quantiles[below + 1]
        return max(1, round(low + (place - below) * (high - low)))

    def scaled(self, factor: float) -> EmpiricalLengths:
        """See `Lengths.scaled`."""
        return replace(self, quantiles=tuple(tokens * factor for tokens in self.quantiles))

    @classmethod
    def of_steps(cls, steps: Sequence[Sequence[float]]) -> EmpiricalLengths:
        """From the quantiles of several batches, the mean of each."""
        return cls(tuple(fmean(column) for column in zip(*steps, strict=True)))


@dataclass(frozen=True, slots=True)
class CoarseLengths(Lengths):
    """Lengths counted in grains of several tokens, for a simulation that needs fewer of them."""

    lengths: Lengths
    tokens_per_grain: int
    seed: int = field(init=False, default=0)

    def quantile(self, probability: float) -> int:
        """See `Lengths.quantile`."""
        return max(1, round(self.lengths.quantile(probability) / self.tokens_per_grain))

    def draw(self, place: int, sample: int) -> float:
        """See `Lengths.draw`."""
        return self.lengths.draw(place, sample)

    def scaled(self, factor: float) -> CoarseLengths:
        """See `Lengths.scaled`."""
        return replace(self, lengths=self.lengths.scaled(factor))


@dataclass(frozen=True, slots=True)
class PartOfBatch(Lengths):
    """Lengths of some of a batch's completions, among them the longest of them all, which a batch waits for.

    Args:
        prompts: of a batch, as far as they are drawn from here.
        completions: of the whole batch.
    """

    lengths: Lengths
    prompts: int
    completions: int
    seed: int = field(init=False, default=0)

    def quantile(self, probability: float) -> int:
        """See `Lengths.quantile`."""
        return self.lengths.quantile(probability)

    def draw(self, place: int, sample: int) -> float:
        """See `Lengths.draw`."""
        probability = self.lengths.draw(place, sample)
        is_longest = place % self.prompts == 0 and sample == 0
        return probability ** (1 / self.completions) if is_longest else probability

    def scaled(self, factor: float) -> PartOfBatch:
        """See `Lengths.scaled`."""
        return replace(self, lengths=self.lengths.scaled(factor))
