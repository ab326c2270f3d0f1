"""silu(gate) * up, forward and backward, one pass over memory each."""

from typing import Any

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.tiles import LOG2E

BLOCK = 2048
WARPS = 4


@triton.jit
def forward_kernel(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    silu = (z / (1.0 + tl.exp2(-z * LOG2E))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (silu * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
    tl.store(dup + at, (grad * z * sigmoid).to(dup.dtype.element_ty), mask=mask)
    slope = sigmoid * (1.0 + z * (1.0 - sigmoid))
    tl.store(dgate + at, (grad * u * slope).to(dgate.dtype.element_ty), mask=mask)


class SwiGLU(torch.autograd.Function):
    """`swiglu` with its gradients. Keeps the inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(gate)
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        forward_kernel[grid](gate, up, y, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), BLOCK),)
        dy = grads[0].contiguous()
        backward_kernel[grid](gate, up, dy, dgate, dup, gate.numel(), BLOCK=BLOCK, num_warps=WARPS)
        return dgate, dup


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`kimi_linear.ops.swiglu` for at least one number and at most float32."""
    return SwiGLU.apply(gate.contiguous(), up.contiguous())
