"""RMSNorm, plain and times a sigmoid gate, forward and backward, one pass over memory each."""

from typing import Any

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.tiles import LOG2E

# Elements and warps of a program, warps where a single row has more elements, and programs of the backward
# pass, each of which adds up a share of the weight's gradient.
BLOCK = 2048
WARPS = 2
WIDE_WARPS = 8
BACKWARD_PROGRAMS = 1056


@triton.jit
def forward_kernel(x, gate, weight, y, rows, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    """One program BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (row < rows) & (d < D)
    at = row * D + d
    x_block = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_block * x_block, axis=1, keep_dims=True) / D + eps)
    out = x_block * inverse * w / (1.0 + tl.exp2(-z * LOG2E))
    tl.store(y + at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    dweight,
    rows,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    BR: tl.constexpr,
):
    """Blocks of BR rows, dealt to the programs in turn; `dweight` [programs, D] takes each one's share."""
    d = tl.arange(0, DP)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    share = tl.zeros([BR, DP], dtype=tl.float32)
    for start in range(0, rows, tl.num_programs(0) * BR):
        row = start + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
        mask = (row < rows) & (d < D)
        at = row * D + d
        x_block = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x_block * x_block, axis=1, keep_dims=True) / D + eps)
        normed = x_block * inverse
        sigmoid = 1.0 / (1.0 + tl.exp2(-z * LOG2E))
        grad *= sigmoid
        share += grad * normed
        grad *= w
        dz = grad * normed * (1.0 - sigmoid)
        mean = tl.sum(grad * normed, axis=1, keep_dims=True) / D
        tl.store(dgate + at, dz.to(dgate.dtype.element_ty), mask=mask)
        tl.store(dx + at, (inverse * (grad - normed * mean)).to(dx.dtype.element_ty), mask=mask)
    d = tl.arange(0, DP)
    tl.store(dweight + tl.program_id(0) * D + d, tl.sum(share, axis=0), mask=d < D)


@triton.jit
def plain_forward_kernel(x, weight, y, rows, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    """One program BR rows."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    d = tl.arange(0, DP)[None, :]
    mask = (row < rows) & (d < D)
    at = row * D + d
    x_block = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x_block * x_block, axis=1, keep_dims=True) / D + eps)
    normed = (x_block * inverse).to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + at, (normed * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def plain_backward_kernel(
    x, weight, dy, dx, dweight, rows, eps, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr
):
    """Blocks of BR rows, dealt to the programs in turn; `dweight` [programs, D] takes each one's share."""
    d = tl.arange(0, DP)[None, :]
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    share = tl.zeros([BR, DP], dtype=tl.float32)
    for start in range(0, rows, tl.num_programs(0) * BR):
        row = start + tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
        mask = (row < rows) & (d < D)
        at = row * D + d
        x_block = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x_block * x_block, axis=1, keep_dims=True) / D + eps)
        normed = x_block * inverse
        share += grad * normed
        grad *= w
        mean = tl.sum(grad * normed, axis=1, keep_dims=True) / D
        tl.store(dx + at, (inverse * (grad - normed * mean)).to(dx.dtype.element_ty), mask=mask)
    d = tl.arange(0, DP)
    tl.store(dweight + tl.program_id(0) * D + d, tl.sum(share, axis=0), mask=d < D)


def block_sizes(size: int) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(size))
    warps = WARPS if padded <= BLOCK else WIDE_WARPS
    return {"D": size, "DP": padded, "BR": max(1, BLOCK // padded), "num_warps": warps}


class RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradients. Keeps the inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x)
        blocks = block_sizes(size)
        plain_forward_kernel[(triton.cdiv(rows, blocks["BR"]),)](x, weight, y, rows, eps, **blocks)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        dx = torch.empty_like(x)
        blocks = block_sizes(size)
        programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, blocks["BR"]))
        dweight = torch.empty(programs, size, device=x.device)
        plain_backward_kernel[(programs,)](
            x, weight, grads[0].contiguous(), dx, dweight, rows, ctx.eps, **blocks
        )
        return dx, dweight.sum(0).to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`kimi_linear.ops.rms_norm` for at least one row and at most float32."""
    return RMSNorm.apply(x.contiguous(), weight.contiguous(), eps)


class GatedRMSNorm(torch.autograd.Function):
    """`gated_rms_norm` with its gradients. Keeps the inputs alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        y = torch.empty_like(x)
        blocks = block_sizes(size)
        forward_kernel[(triton.cdiv(rows, blocks["BR"]),)](x, gate, weight, y, rows, eps, **blocks)
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        dx, dgate = torch.empty_like(x), torch.empty_like(gate)
        blocks = block_sizes(size)
        programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, blocks["BR"]))
        dweight = torch.empty(programs, size, device=x.device)
        backward_kernel[(programs,)](
            x, gate, weight, grads[0].contiguous(), dx, dgate, dweight, rows, ctx.eps, **blocks
        )
        return dx, dgate, dweight.sum(0).to(weight.dtype), None


def gated_rms_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`kimi_linear.ops.gated_rms_norm` for at least one row and at most float32."""
    return GatedRMSNorm.apply(x.contiguous(), gate.contiguous(), weight.contiguous(), eps)
