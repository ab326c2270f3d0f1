"""RMSNorm of each head times a sigmoid gate."""

import torch
import torch.nn.functional as F


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) * weight * sigmoid(gate) over the last dimension.

    What follows the recurrence in arXiv:2510.26692, section 4. Arithmetic is in float32 (float64 where
    x is float64). Differentiable in all three tensors.

    Args:
        x, gate: [..., d].
        weight: [d].
        eps: added to the mean square.

    Returns:
        [..., d] in x's dtype.

    Raises:
        ValueError: a shape that does not fit x's.
    """
    if gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {list(x.shape)}, got {list(gate.shape)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [d] = {list(x.shape[-1:])}, got {list(weight.shape)}")
    if x.is_cuda and x.numel() and x.dtype != torch.float64:
        from kimi_linear.ops.triton.norm import gated_rms_norm as kernel

        return kernel(x, gate, weight, eps)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)
    return (normed * gate.to(dtype).sigmoid()).to(x.dtype)
