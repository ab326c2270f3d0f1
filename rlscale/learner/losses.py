"""Policy losses: pure functions of the tokens of one micro-batch.

An algorithm is a configuration class in `rlscale.algorithms` and a function here, joined by one line of
`policy_loss`. A loss and its metrics are shares of a whole minibatch: added over the minibatch's
micro-batches, on however many ranks, they give the minibatch's own, however it was cut.

In the formulas r_t = exp(log π(t) - log π_old(t)) is a token's importance ratio, A its completion's
advantage, |y| the tokens of a completion and w_t the weight that `rlscale.learner.importance` gives a token,
1 without a correction. mean_t is one of the means of `TokenMean`; weights scale the terms, not what these are
divided by.

Ratios end at e^20, where their gradient ends too: a whole completion's can overflow, and infinity times the
zero of a clip or of an advantage is no number, which would spoil the minibatch. TRL's have no such bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlscale.algorithms import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    MirrorDescentConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    ScaleRLConfig,
)
from rlscale.learner.importance import GREATEST_LOG_RATIO, bounded_exp, k3, sequence_sums
from rlscale.learner.metrics import Metrics

TokenMean = Literal["token", "sequence", "prompt"] | int
"""How terms x_t of tokens become one number, in a minibatch of n tokens, S completions and P prompts.

token: sum_t x_t / n. sequence: the mean over completions of their means, sum_t x_t / (S |y|). prompt:
likewise of prompts, sum_t x_t / (P * tokens of the prompt's completions). A number L: sum_t x_t / (S L).
"""


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """Completion tokens of the sequences packed into one micro-batch, completion after completion; prompts,
    forced tokens and padding are not among them.

    Attributes:
        logprobs: [N] float, log π(token) under the policy being trained; carries the gradient.
        old_logprobs: [N] float, log π_old(token): the learner's policy at the start of the step or, without a
            correction, the policy that drew the token.
        weights: [N] float, the importance weights.
        advantages: [N] float, the advantage of the token's completion.
        lengths: [S] int64, tokens of each completion; they add up to N.
        prompt_tokens: [S] int64, tokens that all completions of the same prompt have in the minibatch.
        minibatch_tokens: completion tokens of the whole minibatch.
        minibatch_sequences: its completions.
        minibatch_prompts: its prompts.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    lengths: torch.Tensor
    prompt_tokens: torch.Tensor
    minibatch_tokens: int
    minibatch_sequences: int
    minibatch_prompts: int


def policy_loss(tokens: PolicyTokens, algorithm: AlgorithmConfig) -> tuple[torch.Tensor, Metrics]:
    """The loss that `algorithm` means: a scalar to differentiate, and metrics without gradient.

    Metrics of every algorithm: `ratio_mean`, the mean of r over tokens, and `kl`, the estimate mean(r - 1 -
    log r) of KL(π_old || π); where something is clipped or truncated, `clip_fraction` of the tokens whose
    gradient that changed.

    Raises:
        ValueError: Dr. GRPO's divisor is not settled; `RunConfig.resolved_algorithm` does that.
    """
    match algorithm:
        case GRPOConfig(clip_low=low, clip_high=high, mean=mean):
            return clipped_loss(tokens, low, high, mean)
        case DAPOConfig(clip_low=low, clip_high=high):
            return clipped_loss(tokens, low, high, "token")
        case ReinforcePlusPlusConfig(clip_low=low, clip_high=high):
            return clipped_loss(tokens, low, high, "token")
        case DrGRPOConfig(clip_low=low, clip_high=high, divisor=divisor):
            if divisor is None:
                raise ValueError("Dr. GRPO needs its divisor: take RunConfig.resolved_algorithm")
            return clipped_loss(tokens, low, high, divisor)
        case RLOOConfig(clip_low=low, clip_high=high):
            return rloo_loss(tokens, low, high)
        case GSPOConfig(clip_low=low, clip_high=high):
            return gspo_loss(tokens, low, high)
        case CISPOConfig(max_ratio=ratio, mean=mean) | ScaleRLConfig(max_ratio=ratio, mean=mean):
            return cispo_loss(tokens, ratio, mean)
        case MirrorDescentConfig(tau=tau):
            return mirror_descent_loss(tokens, tau)


def clipped_loss(
    tokens: PolicyTokens, clip_low: float, clip_high: float, mean: TokenMean
) -> tuple[torch.Tensor, Metrics]:
    """The clipped surrogate of PPO with a completion's advantage for each of its tokens.

        loss = -mean_t w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)

    With the mean over completions GRPO, arXiv:2402.03300, eq. 3, here without its KL term; with the mean over
    tokens and clip_high > clip_low DAPO, arXiv:2503.14476, eq. 8; divided by a constant length Dr. GRPO,
    arXiv:2503.20783, section 3.2; REINFORCE++, arXiv:2501.03262, clips alike.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    objective, clipped = _clipped(log_ratio, tokens.advantages, clip_low, clip_high)
    return -_mean(tokens, tokens.weights * objective, mean), _metrics(tokens, log_ratio, clipped)


def rloo_loss(tokens: PolicyTokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, Metrics]:
    """REINFORCE leave-one-out: a completion y is one action, its ratio the product R of its tokens' ratios.

        loss = -1/S sum_y W min(R A, clip(R, 1 - clip_low, 1 + clip_high) A),  R = prod_t r_t

    W is the mean of the completion's weights w_t. The gradient at π = π_old is that of arXiv:2402.14740, -A
    sum_t ∇ log π(t) / S; ratio and clip, as TRL has them, let a batch serve several updates.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    of_sequence = sequence_sums(log_ratio, tokens.lengths).repeat_interleave(tokens.lengths)
    objective, clipped = _clipped(of_sequence, tokens.advantages, clip_low, clip_high)
    return -_mean(tokens, tokens.weights * objective, "sequence"), _metrics(tokens, log_ratio, clipped)


def gspo_loss(tokens: PolicyTokens, clip_low: float, clip_high: float) -> tuple[torch.Tensor, Metrics]:
    """Group Sequence Policy Optimization: as RLOO's loss, with the geometric mean of the tokens' ratios.

        loss = -1/S sum_y W min(s A, clip(s, 1 - clip_low, 1 + clip_high) A),  s = (prod_t r_t)^(1/|y|)

    arXiv:2507.18071, eq. 5 and 7. W is the mean of the completion's weights w_t.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    means = (sequence_sums(log_ratio, tokens.lengths) / tokens.lengths).repeat_interleave(tokens.lengths)
    objective, clipped = _clipped(means, tokens.advantages, clip_low, clip_high)
    return -_mean(tokens, tokens.weights * objective, "sequence"), _metrics(tokens, log_ratio, clipped)


def cispo_loss(tokens: PolicyTokens, max_ratio: float, mean: TokenMean) -> tuple[torch.Tensor, Metrics]:
    """REINFORCE with truncated importance ratios as constant weights: no token's gradient is cut off.

        loss = -mean_t w_t stop_gradient(min(r_t, max_ratio)) A log π(t)

    CISPO, arXiv:2506.13585, eq. 4 and 5, without a lower bound on the ratio, as there. ScaleRL,
    arXiv:2510.13786, section 4, takes the mean over prompts.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    ratio = bounded_exp(log_ratio.detach())
    terms = tokens.weights * ratio.clamp(max=max_ratio) * tokens.advantages * tokens.logprobs
    truncated = (ratio > max_ratio) & (tokens.advantages != 0)
    return -_mean(tokens, terms, mean), _metrics(tokens, log_ratio, truncated)


def mirror_descent_loss(tokens: PolicyTokens, tau: float) -> tuple[torch.Tensor, Metrics]:
    """Policy mirror descent of Kimi k1.5: regression of the log-ratio on the centred reward A.

        loss = 1/S sum_y W tau / (2 |y|) (A / tau - sum_t log r_t)^2

    arXiv:2501.12599, section 2.3.2: its surrogate (A - tau sum_t log r_t)^2, with the mean reward for tau log
    Z, over 2 tau |y|. The gradient at π = π_old is that of REINFORCE, -W A / |y| sum_t ∇ log π(t) / S; away
    from there a pull of strength tau towards π_old, the last iterate, is added. W is the mean of the
    completion's weights w_t.
    """
    log_ratio = tokens.logprobs - tokens.old_logprobs
    of_sequence = sequence_sums(log_ratio, tokens.lengths).repeat_interleave(tokens.lengths)
    lengths = tokens.lengths.repeat_interleave(tokens.lengths)
    terms = tokens.weights * 0.5 * tau * (tokens.advantages / tau - of_sequence) ** 2 / lengths
    return _mean(tokens, terms, "sequence"), _metrics(tokens, log_ratio)


def _mean(tokens: PolicyTokens, terms: torch.Tensor, mean: TokenMean) -> torch.Tensor:
    """The micro-batch's share of the minibatch's mean of `terms` [N]."""
    match mean:
        case "token":
            return terms.sum() / tokens.minibatch_tokens
        case "sequence":
            return (sequence_sums(terms, tokens.lengths) / tokens.lengths).sum() / tokens.minibatch_sequences
        case "prompt":
            shares = sequence_sums(terms, tokens.lengths) / tokens.prompt_tokens
            return shares.sum() / tokens.minibatch_prompts
        case length:
            return terms.sum() / (tokens.minibatch_sequences * length)


def _clipped(
    log_ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective [N], and where [N] the clip, or the ratio's own bound, removed the gradient."""
    ratio = bounded_exp(log_ratio)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    gone = (advantages > 0) & (ratio > 1 + high)
    gone |= (advantages < 0) & ((ratio < 1 - low) | (log_ratio > GREATEST_LOG_RATIO))
    return objective, gone


@torch.no_grad()
def _metrics(tokens: PolicyTokens, log_ratio: torch.Tensor, clipped: torch.Tensor | None = None) -> Metrics:
    sums = {"ratio_mean": bounded_exp(log_ratio).sum(), "kl": k3(log_ratio).sum()}
    if clipped is not None:
        sums["clip_fraction"] = clipped.sum()
    return {name: total / tokens.minibatch_tokens for name, total in sums.items()}
