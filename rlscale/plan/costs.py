"""What the parts of a step cost in seconds: fitted to measurements, or read off a device's data sheet.

An engine's step that draws one token for each of n sequences behind c tokens of context, of all n together,
takes

    step_s + n * sequence_s + c * context_s        (weights; KDA states; MLA latents, and what is computed)

and what is read in it, prompts or completions after a weight update in flight, takes

    pass_s + sequences * read_s + operations * prefill_flop_s

more. The first step of an engine that had nothing to do takes `wake_s` more. A learner's step takes
`step_s + sequences * sequence_s + operations * flop_s`, and between the end of a whole batch and it lie
`batch_s + completions * completion_s`. Coefficients are never negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import KimiLinearConfig

from kimi_linear.config import cache_size
from kimi_linear.flops import forward_flops
from rlscale.plan.hardware import Device, Efficiency
from rlscale.plan.memory import weight_bytes

MEASURED, ROOFLINE = "measured", "roofline"

_TELLS_APART = 0.1
"""Of a column's length, what must be left when the columns before it are taken out: less is no measurement of
its coefficient."""


@dataclass(frozen=True, slots=True)
class EngineSample:
    """Seconds that steps of an engine took.

    Args:
        steps: how many.
        sequences: that drew a token, summed over the steps.
        contexts: tokens behind which they drew, summed over sequences and steps.
        passes: steps in which something was read.
        reads: sequences that were read.
        prefill_flops: operations to read them.
        wakes: steps before which the engine had nothing to do.
    """

    steps: float
    sequences: float
    contexts: float
    passes: float
    reads: float
    prefill_flops: float
    wakes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LearnerSample:
    """Seconds that a step of one learner worker took, its operations and its sequences."""

    flops: float
    sequences: float
    seconds: float


@dataclass(frozen=True, slots=True)
class HandOverSample:
    """Seconds from the end of a batch of so many completions until the learner had it."""

    completions: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A cost and where it comes from, `MEASURED` or `ROOFLINE`."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class EngineCosts:
    """Of one engine, in seconds; see the module."""

    step_s: Coefficient
    sequence_s: Coefficient
    context_s: Coefficient
    pass_s: Coefficient
    read_s: Coefficient
    prefill_flop_s: Coefficient
    wake_s: Coefficient

    def seconds(self, sample: EngineSample) -> float:
        """What such steps take."""
        return (
            sample.steps * self.step_s.value
            + sample.sequences * self.sequence_s.value
            + sample.contexts * self.context_s.value
            + sample.passes * self.pass_s.value
            + sample.reads * self.read_s.value
            + sample.prefill_flops * self.prefill_flop_s.value
            + sample.wakes * self.wake_s.value
        )


@dataclass(frozen=True, slots=True)
class LearnerCosts:
    """Of one learner worker, in seconds; see the module."""

    flop_s: Coefficient
    step_s: Coefficient
    sequence_s: Coefficient


@dataclass(frozen=True, slots=True)
class HandOverCosts:
    """Of completions on their way to the learner, in seconds; see the module."""

    batch_s: Coefficient
    completion_s: Coefficient


def roofline_engine(
    model: KimiLinearConfig, dtype: torch.dtype, device: Device, efficiency: Efficiency
) -> EngineCosts:
    """From bytes and operations: all weights are read once a step, states read and written, latents read.

    Products and memory are taken to work one after the other, and all experts to be in use. A step that reads
    takes as long again as one that does not, and writes the states that it leaves.
    """
    bandwidth = device.bandwidth * efficiency.bandwidth
    flops = device.peak_flops * efficiency.compute
    size = cache_size(model, dtype, dtype)
    state_s = 2 * size.bytes_per_sequence / bandwidth
    step_s = efficiency.decode_step_s + weight_bytes(model, dtype) / bandwidth
    return EngineCosts(
        _assumed(step_s),
        _assumed(state_s + forward_flops(model, [1]).total / flops),
        _assumed(size.bytes_per_token / bandwidth),
        _assumed(step_s),
        _assumed(state_s / 2),
        _assumed(1 / flops),
        _assumed(0.0),
    )


def roofline_learner(device: Device, efficiency: Efficiency) -> LearnerCosts:
    """From operations alone."""
    return LearnerCosts(
        _assumed(1 / (device.peak_flops * efficiency.compute)),
        _assumed(efficiency.learner_step_s),
        _assumed(0.0),
    )


def fit_engine(samples: Sequence[EngineSample], roofline: EngineCosts) -> EngineCosts:
    """The costs that explain `samples` best, each error relative to its sample.

    What the samples do not tell apart keeps the roofline's value, and says so.
    """
    columns = [
        [s.steps, s.sequences, s.contexts, s.prefill_flops, s.reads, s.passes, s.wakes] for s in samples
    ]
    assumed = [
        roofline.step_s,
        roofline.sequence_s,
        roofline.context_s,
        roofline.prefill_flop_s,
        roofline.read_s,
        roofline.pass_s,
        roofline.wake_s,
    ]
    step, sequence, context, flop, read, reading, wake = _fit(columns, [s.seconds for s in samples], assumed)
    return EngineCosts(step, sequence, context, reading, read, flop, wake)


def fit_learner(samples: Sequence[LearnerSample], roofline: LearnerCosts) -> LearnerCosts:
    """As `fit_engine`, for a learner."""
    columns = [[s.flops, 1.0, s.sequences] for s in samples]
    assumed = [roofline.flop_s, roofline.step_s, roofline.sequence_s]
    return LearnerCosts(*_fit(columns, [s.seconds for s in samples], assumed))


def fit_hand_over(samples: Sequence[HandOverSample]) -> HandOverCosts:
    """As `fit_engine`, for what lies between engines and learner: without samples, nothing."""
    columns = [[1.0, sample.completions] for sample in samples]
    return HandOverCosts(*_fit(columns, [s.seconds for s in samples], [_assumed(0.0), _assumed(0.0)]))


def _assumed(value: float) -> Coefficient:
    return Coefficient(value, ROOFLINE)


def _fit(
    columns: Sequence[Sequence[float]], seconds: Sequence[float], assumed: Sequence[Coefficient]
) -> list[Coefficient]:
    if not seconds:
        return list(assumed)
    matrix = np.array(columns, dtype=float) / np.array(seconds, dtype=float)[:, None]
    roofline = np.array([each.value for each in assumed])
    free = _explaining(matrix, roofline)
    values = dict(
        zip(free, _least_absolute(matrix[:, free], _unexplained(matrix, roofline, free)), strict=True)
    )
    return [
        Coefficient(values[i], MEASURED) if i in values else coefficient
        for i, coefficient in enumerate(assumed)
    ]


def _explaining(matrix: np.ndarray, roofline: np.ndarray) -> list[int]:
    """As many columns as the samples tell apart: those that, beside the roofline of the others, leave least
    unexplained. Of equals the first."""
    every = range(matrix.shape[1])
    first = _told_apart(matrix, every)
    best, least = first, np.inf
    for free in itertools.combinations(every, len(first)):
        if _told_apart(matrix, free) != list(free):
            continue
        target = _unexplained(matrix, roofline, free)
        error = float(np.sum((matrix[:, free] @ _least_squares(matrix[:, free], target) - target) ** 2))
        if error < least * (1 - 1e-6) - 1e-12:
            best, least = list(free), error
    return best


def _unexplained(matrix: np.ndarray, roofline: np.ndarray, free: Sequence[int]) -> np.ndarray:
    """What of each sample is left to `free` columns, where the others cost what the roofline says.

    Where the data sheet alone explains more than was measured, it is no guide: the measured costs take all.
    """
    fixed = [i for i in range(matrix.shape[1]) if i not in free]
    rest = matrix[:, fixed] @ roofline[fixed]
    return 1 - rest if not fixed or rest.max() < 0.5 else np.ones(len(matrix))


def _told_apart(matrix: np.ndarray, columns: Iterable[int]) -> list[int]:
    """Those of the columns that are no combination of the ones before them, nearly."""
    free: list[int] = []
    for i in columns:
        column = matrix[:, i]
        rest = column
        if free:
            known = matrix[:, free] / np.linalg.norm(matrix[:, free], axis=0)
            rest = column - known @ np.linalg.lstsq(known, column, rcond=None)[0]
        if np.linalg.norm(rest) > _TELLS_APART * np.linalg.norm(column):
            free.append(i)
    return free


def _least_absolute(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Non-negative x of the smallest sum of |matrix x - target|: a step that was disturbed counts for one.

    Least squares, weighted anew until the sum of squares is that of absolute values.
    """
    weights = np.ones(len(target))
    x = np.zeros(matrix.shape[1])
    for _ in range(30):
        x = _least_squares(matrix * weights[:, None], target * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(matrix @ x - target), 1e-3))
    return [float(value) for value in x]


def _least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Non-negative least squares: there are few columns, so every choice of those above 0 is tried."""
    count = matrix.shape[1]
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(float).tiny)
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = matrix[:, chosen] / scale[list(chosen)]
            solution = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.sum((part @ solution - target) ** 2))
            if solution.min() >= 0 and error < least:
                best, least = np.zeros(count), error
                best[list(chosen)] = solution / scale[list(chosen)]
    return best
