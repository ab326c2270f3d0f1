"""Metrics of micro-batches, put together to those of a minibatch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

Metrics = dict[str, torch.Tensor]


def combined(totals: Mapping[str, torch.Tensor], shares: Mapping[str, torch.Tensor]) -> Metrics:
    """The metrics of a minibatch's micro-batches so far, and one more's: names that end in `_max` are maxima,
    all others shares that add up. Both mappings have the same names, unless the first is still empty."""
    if not totals:
        return dict(shares)
    return {
        name: torch.maximum(totals[name], share) if name.endswith("_max") else totals[name] + share
        for name, share in shares.items()
    }
