"""The left operand of the one product that replaces dY W."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Rows of 16-byte multiples, which matrix units want of 16-bit operands.
_ALIGNMENT = 8


def project_and_gather(
    dy: torch.Tensor, projections: Sequence[torch.Tensor], channels: torch.Tensor
) -> torch.Tensor:
    """[dy @ P for P in projections | dy[:, channels] | zeros].

    Args:
        dy: [T, m].
        projections: each [m, p], in dy's dtype.
        channels: [k] int64, distinct.

    Returns:
        [T, width] in dy's dtype, the width rounded up by columns of zeros.
    """
    projected = sum(p.shape[1] for p in projections)
    used = projected + len(channels)
    width = -(-used // _ALIGNMENT) * _ALIGNMENT
    if not dy.is_cuda:
        padding = dy.new_zeros(len(dy), width - used)
        # Each projection on its own, as LoRA alone would compute it: the same bits.
        return torch.cat((*(dy @ p for p in projections), dy.index_select(1, channels), padding), dim=1)
    from rlscale.adapters.triton_gather import gather_channels

    dy = dy.contiguous()
    out = dy.new_empty(len(dy), width)
    torch.mm(dy, torch.cat(list(projections), dim=1), out=out[:, :projected])
    gather_channels(dy, channels, out[:, projected:used])
    out[:, used:] = 0
    return out
