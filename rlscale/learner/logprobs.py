"""Log-probabilities of given tokens from hidden states, never holding all [N, vocabulary] logits at once."""

from __future__ import annotations

from typing import Any

import torch

LOGITS_PER_CHUNK = 1 << 24
"""Logits that exist at a time on a CPU: 64 MiB in float32."""
LOGITS_PER_CHUNK_CUDA = 1 << 27
"""The same on a GPU, 512 MiB: 4096 rows of 32,768 keep its products within 3% of their best rate."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    logits_per_chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that distribution.

    The output head computes in float32 (float64 for float64 inputs) whatever dtype the model has, because
    rounded logits are a large part of the mismatch between learner and rollout (ScaleRL, arXiv:2510.13786).
    Logits are made chunk by chunk and made again in the backward pass. There, on a GPU, their gradient is
    rounded to the model's dtype before it is multiplied, as the products are after it: the error of the
    hidden states' gradient grows from 0.00166 to 0.00168, and both products run at tensor cores' rate.

    Args:
        hidden: [N, D], final hidden states where the targets are predicted.
        weight: [V, D] of the output head, in hidden's dtype.
        targets: [N] int64.
        temperature: that the targets were drawn with; their log-probabilities refer to it.
        logits_per_chunk: logits that exist at a time; None chooses by the device.

    Returns:
        log-probabilities [N] with gradient to hidden and weight, entropies [N] in nats without gradient.
    """
    if logits_per_chunk is None:
        logits_per_chunk = LOGITS_PER_CHUNK_CUDA if hidden.is_cuda else LOGITS_PER_CHUNK
    rows = max(1, logits_per_chunk // weight.shape[0])
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, temperature, rows)
    return logprobs, entropies


def softmax_statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of softmax(logits / temperature), logits [N, V] contiguous: log-probabilities at the targets [N],
    entropies [N] in nats, and log-normalisers [N]. May overwrite the logits."""
    if _has_kernels(logits):
        from kimi_linear.ops.triton import softmax

        return softmax.softmax_statistics(logits, targets, temperature)
    logits = logits.div_(temperature)
    log_normalisers = logits.logsumexp(-1)
    logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalisers
    logits -= log_normalisers[:, None]
    return logprobs, -(logits.exp() * logits).sum(-1), log_normalisers


def softmax_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_normalisers: torch.Tensor,
    scales: torch.Tensor,
    temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """scales [N] * (onehot(targets) - softmax(logits / temperature)), [N, V] in `dtype`: for scales that are
    upstream gradients over the temperature, the gradient of the logits. May overwrite them."""
    if _has_kernels(logits):
        from kimi_linear.ops.triton import softmax

        return softmax.softmax_gradient(logits, targets, log_normalisers, scales, temperature, dtype)
    probabilities = logits.div_(temperature).sub_(log_normalisers[:, None]).exp_()
    gradient = probabilities.mul_(-scales[:, None])
    return gradient.scatter_add_(-1, targets[:, None], scales[:, None]).to(dtype)


def _has_kernels(logits: torch.Tensor) -> bool:
    return logits.is_cuda and logits.dtype == torch.float32


def _high(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _multiplies_exactly(x: torch.Tensor) -> bool:
    """Whether tensor cores take x as it is to a product in float32: those of bfloat16 numbers are exact."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _operand(x: torch.Tensor) -> torch.Tensor:
    """x as products in float32 take it."""
    return x if _multiplies_exactly(x) else _high(x)


def _logits(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    if _multiplies_exactly(head):
        return torch.mm(hidden, head.t(), out_dtype=torch.float32)
    return hidden @ head.t()


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = _operand(weight)
        chunks = [
            softmax_statistics(_logits(_operand(h), head), target, temperature)
            for h, target in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        logprobs, entropies, log_normalisers = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        ctx.save_for_backward(hidden, weight, targets, log_normalisers)
        ctx.temperature, ctx.rows = temperature, rows
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """d log p(target) / d logits = (onehot(target) - softmax(logits)) / temperature."""
        hidden, weight, targets, log_normalisers = ctx.saved_tensors
        rounds = _multiplies_exactly(weight)
        head = _operand(weight)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=grad_logprobs.dtype)
        scales = grad_logprobs / ctx.temperature
        for i in range(0, len(hidden), ctx.rows):
            chunk = slice(i, i + ctx.rows)
            h = _operand(hidden[chunk])
            grad = softmax_gradient(
                _logits(h, head),
                targets[chunk],
                log_normalisers[chunk],
                scales[chunk],
                ctx.temperature,
                hidden.dtype if rounds else scales.dtype,
            )
            if rounds:
                torch.mm(grad, head, out=grad_hidden[chunk])
                grad_head = torch.addmm(grad_head, grad.t(), h, out_dtype=torch.float32)
            else:
                grad_hidden[chunk] = grad @ head
                grad_head.addmm_(grad.t(), h)
        return grad_hidden, grad_head.to(weight.dtype), None, None, None
