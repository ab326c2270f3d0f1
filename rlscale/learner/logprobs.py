"""Log-probabilities of given tokens from hidden states, never holding all [N, vocabulary] logits at once."""

from __future__ import annotations

from typing import Any

import torch

LOGITS_PER_CHUNK = 1 << 24
"""Logits that exist at a time: 64 MiB in float32, enough to keep a GPU busy and to fit into any."""


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    logits_per_chunk: int = LOGITS_PER_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(hidden @ weight.T / temperature) at the targets, and the entropy of that distribution.

    The output head computes in float32 (float64 for float64 inputs) whatever dtype the model has, because
    rounded logits are a large part of the mismatch between learner and rollout (ScaleRL, arXiv:2510.13786).
    Logits are made chunk by chunk and made again in the backward pass.

    Args:
        hidden: [N, D], final hidden states where the targets are predicted.
        weight: [V, D] of the output head.
        targets: [N] int64.
        temperature: that the targets were drawn with; their log-probabilities refer to it.

    Returns:
        log-probabilities [N] with gradient to hidden and weight, entropies [N] in nats without gradient.
    """
    rows = max(1, logits_per_chunk // weight.shape[0])
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, targets, temperature, rows)
    return logprobs, entropies


def _high(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
        head = _high(weight).t()
        logprobs, entropies, log_normalisers = [], [], []
        for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = (_high(h) @ head).div_(temperature)
            log_normaliser = logits.logsumexp(-1)
            logprobs.append(logits.gather(-1, target[:, None]).squeeze(-1) - log_normaliser)
            logits -= log_normaliser[:, None]
            entropies.append(-(logits.exp() * logits).sum(-1))
            log_normalisers.append(log_normaliser)
        log_normaliser = torch.cat(log_normalisers)
        ctx.save_for_backward(hidden, weight, targets, log_normaliser)
        ctx.temperature, ctx.rows = temperature, rows
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        """d log p(target) / d logits = (onehot(target) - softmax(logits)) / temperature."""
        hidden, weight, targets, log_normaliser = ctx.saved_tensors
        head = _high(weight)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        scales = grad_logprobs / ctx.temperature
        for i in range(0, len(hidden), ctx.rows):
            chunk = slice(i, i + ctx.rows)
            h = _high(hidden[chunk])
            logits = (h @ head.t()).div_(ctx.temperature)
            grad = logits.sub_(log_normaliser[chunk, None]).exp_().mul_(-scales[chunk, None])
            grad.scatter_add_(-1, targets[chunk, None], scales[chunk, None])
            grad_hidden[chunk] = grad @ head
            grad_head.addmm_(grad.t(), h)
        return grad_hidden, grad_head.to(weight.dtype), None, None, None
