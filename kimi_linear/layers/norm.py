"""Root mean square normalisation, in float32 whatever the model's dtype."""

import torch
import torch.nn.functional as F
from torch import nn

from kimi_linear.ops import gated_rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * normalize(x, self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm of each head times a sigmoid gate: x, gate [..., d] -> [..., d]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


def normalize(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Divide by the root mean square of the last dimension, in float32 (float64 for float64)."""
    return F.rms_norm(x if x.dtype == torch.float64 else x.float(), x.shape[-1:], eps=eps)
