"""The Triton kernel that gathers the kept channels of dY into the left operand of one matrix product.

Nothing is summed here, so its result has one value only; the products around it are the library's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = (8, 128)
"""Rows and channels of a program, by measurement: benchmarks/NOTES.md."""


@triton.jit
def _gather_kernel(
    source, channels, out, rows, source_stride, out_stride, kept, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    # Programs of the same rows are neighbours: what one reads beside its channels, the next finds cached.
    place = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.load(channels + place, mask=place < kept, other=0)
    inside = (row < rows)[:, None] & (place < kept)[None, :]
    values = tl.load(source + row[:, None] * source_stride + channel[None, :], mask=inside)
    tl.store(out + row[:, None] * out_stride + place[None, :], values, mask=inside)


def gather_channels(
    source: torch.Tensor, channels: torch.Tensor, out: torch.Tensor, block: tuple[int, int] = BLOCK
) -> None:
    """out[:, :] = source[:, channels], which may be a slice of a wider tensor.

    Args:
        source: [T, m], rows contiguous.
        channels: [k] int64.
        out: [T, k], rows contiguous.
    """
    rows, kept = out.shape
    block_t, block_k = block
    grid = (triton.cdiv(kept, block_k), triton.cdiv(rows, block_t))
    _gather_kernel[grid](
        source,
        channels,
        out,
        rows,
        source.stride(0),
        out.stride(0),
        kept,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        num_warps=4,
    )
