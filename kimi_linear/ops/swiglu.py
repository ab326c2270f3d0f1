"""The gate of a feed-forward layer."""

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv:2002.05202), elementwise; silu is rounded before it is multiplied, as vLLM does.

    Differentiable in both. On a GPU nothing but the inputs is kept for that.

    Args:
        gate, up: of one shape and dtype.

    Returns:
        Their shape and dtype.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        given = f"{gate.dtype} {list(gate.shape)} and {up.dtype} {list(up.shape)}"
        raise ValueError(f"gate and up must have one shape and dtype, got {given}")
    if gate.is_cuda and gate.numel() and gate.dtype != torch.float64:
        from kimi_linear.ops.triton.swiglu import swiglu as kernel

        return kernel(gate, up)
    return F.silu(gate) * up
