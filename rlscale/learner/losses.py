"""Policy losses: pure functions of the tokens of one micro-batch.

An algorithm is a configuration class in `rlscale.config` and a function here, joined by one line of
`policy_loss`. A loss and its metrics are shares of a whole minibatch: added over the minibatch's
micro-batches they give the minibatch's own, however it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlscale.config import AlgorithmConfig

Metrics = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """Completion tokens of the sequences packed into one micro-batch; prompts and padding are not among them.

    Attributes:
        logprobs: [N] float, log π(token) under the policy being trained; carries the gradient.
        rollout_logprobs: [N] float, log π_old(token) under the policy that drew it.
        advantages: [N] float, the advantage of the token's sequence.
        minibatch_tokens: completion tokens of the whole minibatch, the denominator of a token mean.
    """

    logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    minibatch_tokens: int


def policy_loss(tokens: PolicyTokens, algorithm: AlgorithmConfig) -> tuple[torch.Tensor, Metrics]:
    """The loss that `algorithm` means: a scalar to differentiate, and metrics without gradient."""
    match algorithm.kind:
        case "grpo":
            return grpo_loss(tokens, algorithm.clip_low, algorithm.clip_high)


def grpo_loss(tokens: PolicyTokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, Metrics]:
    """Group Relative Policy Optimization with asymmetric clipping and the mean over all tokens.

    With r_t = exp(log π(t) - log π_old(t)), A_t the advantage and n the tokens of the minibatch:

        loss = -1/n sum_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

    GRPO is arXiv:2402.03300, eq. 3, here without its KL term; asymmetric clipping ("clip higher") and the
    token mean are DAPO's, arXiv:2503.14476, eq. 8.

    Metrics: `clip_fraction`, the tokens whose gradient the clip removed; `ratio_mean`; `kl`, the estimate
    mean(r - 1 - log r) of KL(π_old || π).
    """
    log_ratio = tokens.logprobs - tokens.rollout_logprobs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(ratio * tokens.advantages, clipped_ratio * tokens.advantages)
    loss = -objective.sum() / tokens.minibatch_tokens

    with torch.no_grad():
        gains, losses = tokens.advantages > 0, tokens.advantages < 0
        clipped = (gains & (ratio > 1 + clip_high)) | (losses & (ratio < 1 - clip_low))
        sums = {"clip_fraction": clipped.sum(), "ratio_mean": ratio.sum(), "kl": _kl(log_ratio).sum()}
    return loss, {name: total / tokens.minibatch_tokens for name, total in sums.items()}


def _kl(log_ratio: torch.Tensor) -> torch.Tensor:
    # expm1 keeps the digits that exp(x) - 1 loses for the small ratios of a nearly unchanged policy.
    return torch.expm1(log_ratio) - log_ratio
