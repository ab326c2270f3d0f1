"""What a learner takes from logits, and their gradient, in one pass over them each: PyTorch needs about ten.

With x = logits / temperature of one row, m = max x and s = sum exp(x - m): the log-normaliser is m + log s,
and the entropy log s - sum (x - m) exp(x - m) / s, which cancels nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 8
LOWEST = tl.constexpr(-1e38)  # finite: a lane that has seen nothing must not subtract infinities


@triton.jit
def statistics_kernel(
    logits, targets, logprobs, entropies, log_normalisers, inverse_temperature, V, BV: tl.constexpr
):
    """One program a row; every lane keeps its own maximum and sums, which meet at the end."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    highest = tl.full([BV], LOWEST, tl.float32)
    total = tl.zeros([BV], tl.float32)
    weighted = tl.zeros([BV], tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logits + v, mask=v < V, other=LOWEST) * inverse_temperature
        raised = tl.maximum(highest, x)
        shift = highest - raised
        shrink = tl.exp(shift)
        weight = tl.where(v < V, tl.exp(x - raised), 0.0)
        weighted = (weighted + shift * total) * shrink + (x - raised) * weight
        total = total * shrink + weight
        highest = raised
    top = tl.max(highest, axis=0)
    shift = highest - top
    shrink = tl.exp(shift)
    weighted_sum = tl.sum((weighted + shift * total) * shrink, axis=0)
    total_sum = tl.sum(total * shrink, axis=0)
    spread = tl.log(total_sum)
    target = tl.load(logits + tl.load(targets + row)) * inverse_temperature
    tl.store(logprobs + row, target - top - spread)
    tl.store(entropies + row, spread - weighted_sum / total_sum)
    tl.store(log_normalisers + row, top + spread)


@triton.jit
def gradient_kernel(
    logits, targets, log_normalisers, scales, gradient, inverse_temperature, V, BV: tl.constexpr
):
    """One program BV columns of a row: scale (onehot(target) - softmax)."""
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    x = tl.load(logits + row * V + v, mask=v < V, other=0.0) * inverse_temperature
    probability = tl.exp(x - tl.load(log_normalisers + row))
    hit = tl.where(v == tl.load(targets + row), 1.0, 0.0)
    value = tl.load(scales + row) * (hit - probability)
    tl.store(gradient + row * V + v, value.to(gradient.dtype.element_ty), mask=v < V)


def softmax_statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `rlscale.learner.logprobs.softmax_statistics`."""
    rows, vocabulary = logits.shape
    results = tuple(logits.new_empty(rows) for _ in range(3))
    if rows:
        statistics_kernel[(rows,)](
            logits, targets, *results, 1 / temperature, vocabulary, BV=BLOCK, num_warps=WARPS
        )
    logprobs, entropies, log_normalisers = results
    return logprobs, entropies, log_normalisers


def softmax_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_normalisers: torch.Tensor,
    scales: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `rlscale.learner.logprobs.softmax_gradient`."""
    rows, vocabulary = logits.shape
    gradient = torch.empty(rows, vocabulary, dtype=dtype, device=logits.device)
    if rows:
        grid = (rows, triton.cdiv(vocabulary, BLOCK))
        gradient_kernel[grid](
            logits, targets, log_normalisers, scales, gradient, 1 / temperature, vocabulary,
            BV=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return gradient
