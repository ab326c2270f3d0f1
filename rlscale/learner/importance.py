"""Importance corrections: what the learner's policy and the one that drew the tokens differ in, as weights.

Rollouts are drawn by other kernels, in other precision, and by weights that may be some versions old. With
π_μ the policy that drew a token and π_old the learner's at the start of the step, the policy gradient of
tokens from π_μ is unbiased under the weights π_old / π_μ, here kept within bounds.
"""

from __future__ import annotations

import torch

from rlscale.algorithms import Correction, NoCorrection
from rlscale.learner.metrics import Metrics

GREATEST_LOG_RATIO = 20.0
"""e^20 is beyond every bound worth setting, and means over such ratios are still finite."""


def importance_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, lengths: torch.Tensor, config: Correction
) -> torch.Tensor:
    """The weight of each token: w = π_old / π_μ, truncated or masked.

        token:     w_t = exp(log π_old(t) - log π_μ(t))
        sequence:  w_t = exp(sum over the completion of log π_old - log π_μ)
        truncate:  min(max(w, low), high)
        mask:      w where low <= w <= high, else 0

    Truncated importance sampling is Ionides (2008); masking tokens is IcePop (arXiv:2510.18855).

    Args:
        old_logprobs: [N] float, log π_old of the tokens, completion after completion.
        rollout_logprobs: [N] float, log π_μ.
        lengths: [S] int64, tokens of each completion; they add up to N.

    Returns:
        [N] float, without gradient.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    if config.level == "sequence":
        log_ratio = sequence_sums(log_ratio, lengths).repeat_interleave(lengths)
    ratio = bounded_exp(log_ratio)
    if config.kind == "truncate":
        return ratio.clamp(config.low, config.high)
    return torch.where((ratio >= config.low) & (ratio <= config.high), ratio, 0.0)


def mismatch_metrics(
    old_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    lengths: torch.Tensor,
    config: Correction | NoCorrection,
    minibatch_tokens: int,
    minibatch_sequences: int,
) -> Metrics:
    """How far rollout and learner are apart; shares of a minibatch, arguments as in `importance_weights`.

    Over tokens, with x = log π_old - log π_μ: `mismatch_mean` and `mismatch_max` of |x|; `mismatch_kl`, the
    estimate mean(e^x - 1 - x) of KL(π_μ || π_old); `importance_mean` and `importance_max` of e^x. The last
    two over whole completions: `importance_sequence_mean` and `importance_sequence_max`.
    `importance_bounded`: the fraction of tokens whose weight the correction changed.
    """
    log_ratio = (old_logprobs - rollout_logprobs).detach()
    of_sequences = bounded_exp(sequence_sums(log_ratio, lengths))
    ratio, distance = bounded_exp(log_ratio), log_ratio.abs()
    bounded = torch.zeros_like(ratio)
    if isinstance(config, Correction):
        free = config.model_copy(update={"low": 0.0, "high": float("inf")})
        weights, uncorrected = (
            importance_weights(old_logprobs, rollout_logprobs, lengths, c) for c in (config, free)
        )
        bounded = (weights != uncorrected).to(ratio.dtype)
    return {
        "mismatch_mean": distance.sum() / minibatch_tokens,
        "mismatch_max": distance.max(),
        "mismatch_kl": k3(log_ratio).sum() / minibatch_tokens,
        "importance_mean": ratio.sum() / minibatch_tokens,
        "importance_max": ratio.max(),
        "importance_sequence_mean": of_sequences.sum() / minibatch_sequences,
        "importance_sequence_max": of_sequences.max(),
        "importance_bounded": bounded.sum() / minibatch_tokens,
    }


def sequence_sums(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Sums [S] over completions of x [N], which holds them one after the other; carries gradient."""
    return torch.segment_reduce(x, "sum", lengths=lengths)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """e^x - 1 - x: an estimate of a KL divergence, never negative (J. Schulman, 2020); x is 20 at most."""
    x = log_ratio.clamp(max=GREATEST_LOG_RATIO)
    # expm1 keeps the digits that exp(x) - 1 loses for the small ratios of a nearly unchanged policy.
    return torch.expm1(x) - x


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """min(e^x, e^20), without gradient at the bound; carries gradient below."""
    return log_ratio.clamp(max=GREATEST_LOG_RATIO).exp()
