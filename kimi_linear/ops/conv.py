"""Causal short convolution with SiLU, one filter per channel, over packed sequences."""

import torch
import torch.nn.functional as F

from kimi_linear.ops.packing import token_positions


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_t = silu(sum_w weight[:, w] x_{t - (W - 1) + w}), each sequence on its own.

    Args:
        x: [T, C], sequences packed.
        weight: [C, W]; its last column multiplies the current token.
        cu_seqlens: [N + 1], boundaries of the sequences.
        initial_state: [N, W - 1, C], the inputs before each sequence, oldest first; zeros if None.

    Returns:
        y [T, C].
    """
    width = weight.shape[1]
    _, sequences = token_positions(cu_seqlens)
    # Lay W - 1 earlier inputs before every sequence; then each tap reads the same rows, one row later.
    sequences_count = len(cu_seqlens) - 1
    first = torch.arange(len(x), device=x.device) + sequences * (width - 1)
    rows = x.new_zeros(len(x) + sequences_count * (width - 1), x.shape[1])
    rows = rows.index_copy(0, first + (width - 1), x)
    if initial_state is not None:
        starts = cu_seqlens[:-1].long() + torch.arange(sequences_count, device=x.device) * (width - 1)
        history = starts.unsqueeze(1) + torch.arange(width - 1, device=x.device)
        rows = rows.index_copy(0, history.flatten(), initial_state.to(x.dtype).flatten(0, 1))
    reach = len(rows) - (width - 1)
    y = rows[:reach] * weight[:, 0]
    for tap in range(1, width):
        y = torch.addcmul(y, rows[tap : tap + reach], weight[:, tap])
    return F.silu(y[first])


def convolution_state(
    x: torch.Tensor, width: int, cu_seqlens: torch.Tensor, initial_state: torch.Tensor | None = None
) -> torch.Tensor:
    """The last W - 1 inputs of each sequence [N, W - 1, C], oldest first: the state a next token needs."""
    sequences = len(cu_seqlens) - 1
    history = (
        x.new_zeros(sequences, width - 1, x.shape[1]) if initial_state is None else initial_state.to(x.dtype)
    )
    # Row r of sequence n is history while r < W - 1, then the sequence's own inputs; take its last W - 1
    # rows.
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    wanted = lengths.unsqueeze(1) + torch.arange(width - 1, device=x.device)
    from_history = wanted < width - 1
    history_rows = history.gather(1, wanted.clamp(max=width - 2).unsqueeze(-1).expand_as(history))
    if len(x) == 0:
        return history_rows
    own_rows = x[(offsets[:-1].unsqueeze(1) + wanted - (width - 1)).clamp(0, len(x) - 1)]
    return torch.where(from_history.unsqueeze(-1), history_rows, own_rows)


def convolution_step(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of N sequences: x [N, C], weight [C, W], state [N, W - 1, C] -> (y [N, C], new state)."""
    window = torch.cat((state, x.unsqueeze(1).to(state.dtype)), dim=1)
    y = (window.to(x.dtype) * weight.t()).sum(1)
    return F.silu(y), window[:, 1:]
