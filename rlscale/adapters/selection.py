"""Which output channels of a frozen layer enter its input gradient, from a score for each channel.

A channel's score is ‖dY[:, i]‖ ‖Ws[i, :]‖, the Frobenius norm of its term in dY Ws (CE-LoRA,
arXiv:2502.01378).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Scores are old by up to a refresh interval, so a channel that scored zero may matter by now: this share of
# the sampling probabilities is spread evenly, which also bounds the 1/p weights.
UNIFORM_SHARE = 0.1


def top_channels(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` channels of the highest scores [m], in ascending order [keep] int64."""
    return scores.topk(keep).indices.sort().values


def inclusion_probabilities(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Probabilities [m] float64 that sum to `keep`, proportional to the scores but at most 1.

    With a sample's terms weighted by 1/p these give the smallest variance of a sample of `keep` terms whose
    norms are the scores. Channels whose share would exceed 1 are certain, and the rest share what remains.
    """
    scores = scores.double()
    mean = scores.mean()
    mixed = (1 - UNIFORM_SHARE) * scores + UNIFORM_SHARE * torch.where(mean > 0, mean, 1.0)
    ordered, order = mixed.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # the sum of a score and of all below it
    remaining = keep - torch.arange(len(scores), device=scores.device)
    is_certain = (remaining > 0) & (remaining * ordered >= rest)
    # Shares fall along the order, so the certain channels are its first ones.
    certain = is_certain.long().cumprod(0).sum()
    shared = torch.where(is_certain.long().cumprod(0) > 0, 0.0, ordered)
    shares = shared * (keep - certain) / shared.sum().clamp(min=torch.finfo(torch.float64).tiny)
    shares = torch.where(is_certain.long().cumprod(0) > 0, 1.0, shares)
    return torch.empty_like(shares).scatter_(0, order, shares)


def sample_channels(probabilities: torch.Tensor, keep: int, generator: torch.Generator) -> torch.Tensor:
    """`keep` distinct channels [keep] int64, ascending, channel i among them with probability p[i].

    Systematic sampling in random order: points at distance 1 are laid over the cumulated probabilities.

    Args:
        probabilities: [m] float64, as `inclusion_probabilities` gives them.
        keep: their sum.
        generator: on the CPU.
    """
    device = probabilities.device
    order = torch.randperm(len(probabilities), generator=generator).to(device)
    start = torch.rand((), dtype=torch.float64, generator=generator).to(device)
    ends = probabilities[order].cumsum(0)
    ends[-1] = keep  # which rounding may have missed
    points = start + torch.arange(keep, device=device)
    return order[torch.searchsorted(ends, points, right=True)].sort().values


def share_budget(gains: Sequence[torch.Tensor], costs: Sequence[int], budgets: Sequence[int]) -> list[int]:
    """How many channels each layer keeps when all layers share one compute budget.

    Takes the channels with the largest gain for their cost, whatever their layer, while they fit; every
    layer keeps at least one. For additive errors this is the best choice up to the last channel.

    Args:
        gains: for each layer [m], what keeping each channel is worth, comparable across layers.
        costs: of one channel of each layer, e.g. its input features.
        budgets: channels that each layer would keep by itself; their total cost is what is shared.
    """
    total = sum(cost * budget for cost, budget in zip(costs, budgets, strict=True))
    total -= sum(costs)  # each layer's first channel
    layer = torch.cat([torch.full((len(gain),), i) for i, gain in enumerate(gains)])
    cost = torch.tensor(costs, dtype=torch.float64)[layer]
    value = torch.cat([gain.double().cpu() for gain in gains])
    best = torch.zeros(len(value), dtype=torch.bool)
    first = 0
    for gain in gains:
        best[first + int(gain.argmax())] = True
        first += len(gain)
    order = (value / cost).masked_fill(best, -1.0).argsort(descending=True, stable=True)
    order = order[: len(value) - len(gains)]  # without the channels that are kept anyway
    taken = order[cost[order].cumsum(0) <= total]
    counts = torch.bincount(layer[taken], minlength=len(gains)) + 1
    return counts.tolist()
