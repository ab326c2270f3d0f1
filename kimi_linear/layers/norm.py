"""Root mean square normalisation, in float32 whatever the model's dtype."""

import torch
from torch import nn

from kimi_linear.ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of each head times a sigmoid gate: x, gate [..., d] -> [..., d]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)
