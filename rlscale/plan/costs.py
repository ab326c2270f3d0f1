"""What the parts of a step cost in seconds: fitted to measurements, or read off a device's data sheet.

An engine's step that draws one token for each of n sequences behind c tokens of context, of all n together,
takes

    step_s + n * sequence_s + c * context_s        (weights; KDA states; MLA latents, and what is computed)

and reading prompts takes `prefill_flop_s` for each of their operations. A learner's step takes
`step_s + flop_s * operations`. Coefficients are never negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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
        prefill_flops: operations to read prompts.
    """

    steps: float
    sequences: float
    contexts: float
    prefill_flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class LearnerSample:
    """Seconds that a step of one learner worker took, and its operations."""

    flops: float
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
    prefill_flop_s: Coefficient

    def seconds(self, sample: EngineSample) -> float:
        """What such steps take."""
        return (
            sample.steps * self.step_s.value
            + sample.sequences * self.sequence_s.value
            + sample.contexts * self.context_s.value
            + sample.prefill_flops * self.prefill_flop_s.value
        )


@dataclass(frozen=True, slots=True)
class LearnerCosts:
    """Of one learner worker, in seconds; see the module."""

    flop_s: Coefficient
    step_s: Coefficient


def roofline_engine(
    model: KimiLinearConfig, dtype: torch.dtype, device: Device, efficiency: Efficiency
) -> EngineCosts:
    """From bytes and operations: all weights are read once a step, states read and written, latents read.

    Products and memory are taken to work one after the other, and all experts to be in use.
    """
    bandwidth = device.bandwidth * efficiency.bandwidth
    flops = device.peak_flops * efficiency.compute
    size = cache_size(model, dtype, dtype)
    state_s = 2 * size.bytes_per_sequence / bandwidth
    return EngineCosts(
        _assumed(efficiency.decode_step_s + weight_bytes(model, dtype) / bandwidth),
        _assumed(state_s + forward_flops(model, [1]).total / flops),
        _assumed(size.bytes_per_token / bandwidth),
        _assumed(1 / flops),
    )


def roofline_learner(device: Device, efficiency: Efficiency) -> LearnerCosts:
    """From operations alone."""
    return LearnerCosts(
        _assumed(1 / (device.peak_flops * efficiency.compute)), _assumed(efficiency.learner_step_s)
    )


def fit_engine(samples: Sequence[EngineSample], roofline: EngineCosts) -> EngineCosts:
    """The costs that explain `samples` best, each error relative to its sample.

    What the samples do not tell apart keeps the roofline's value, and says so.
    """
    columns = [[s.steps, s.sequences, s.contexts, s.prefill_flops] for s in samples]
    assumed = [roofline.step_s, roofline.sequence_s, roofline.context_s, roofline.prefill_flop_s]
    return EngineCosts(*_fit(columns, [s.seconds for s in samples], assumed))


def fit_learner(samples: Sequence[LearnerSample], roofline: LearnerCosts) -> LearnerCosts:
    """As `fit_engine`, for a learner."""
    columns = [[s.flops, 1.0] for s in samples]
    return LearnerCosts(*_fit(columns, [s.seconds for s in samples], [roofline.flop_s, roofline.step_s]))


def _assumed(value: float) -> Coefficient:
    return Coefficient(value, ROOFLINE)


def _fit(
    columns: Sequence[Sequence[float]], seconds: Sequence[float], assumed: Sequence[Coefficient]
) -> list[Coefficient]:
    if not seconds:
        return list(assumed)
    matrix = np.array(columns, dtype=float) / np.array(seconds, dtype=float)[:, None]
    free = _told_apart(matrix)
    fixed = [i for i in range(matrix.shape[1]) if i not in free]
    target = np.ones(len(seconds))
    rest = matrix[:, fixed] @ np.array([assumed[i].value for i in fixed])
    # Where the data sheet alone explains more than was measured, it is no guide: the measured costs take all.
    if fixed and rest.max() < 0.5:
        target -= rest
    values = dict(zip(free, _least_absolute(matrix[:, free], target), strict=True))
    return [
        Coefficient(values[i], MEASURED) if i in values else coefficient
        for i, coefficient in enumerate(assumed)
    ]


def _told_apart(matrix: np.ndarray) -> list[int]:
    """Columns that are no combination of those before them, nearly."""
    free: list[int] = []
    for i in range(matrix.shape[1]):
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
