"""RMSNorm, plain and times a sigmoid gate."""

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension (arXiv:1910.07467).

    Arithmetic is in float32 (float64 where x is float64), rounded before it is multiplied by the weight, as
    vLLM does. Differentiable in both tensors.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.

    Returns:
        [..., d] in x's dtype.

    Raises:
        ValueError: a weight that does not fit x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [d] = {list(x.shape[-1:])}, got {list(weight.shape)}")
    if x.is_cuda and x.numel() and x.dtype != torch.float64 and weight.dtype == x.dtype:
        from kimi_linear.ops.triton.norm import rms_norm as kernel

        return kernel(x, weight, eps)
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)  # PyTorch's kernels round last


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
