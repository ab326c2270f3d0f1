"""Causal short convolution with SiLU, one filter per channel, over packed sequences."""

from typing import Any

import torch
import torch.nn.functional as F

from kimi_linear.ops.arguments import check_cu_seqlens, state_dtype
from kimi_linear.ops.packing import token_positions

# Filters of the Triton kernels; PyTorch serves other widths.
KERNEL_WIDTH = 4


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """y_t = silu(sum_w weight[:, w] x_{t - (W - 1) + w}), each sequence on its own.

    Differentiable in x, weight and initial_state. On a GPU nothing waits for the device.

    Args:
        x: [T, C], sequences packed. Rows may lie apart, as columns of a wider projection do.
        weight: [C, W]; its last column multiplies the current token.
        cu_seqlens: [N + 1] int, boundaries of the sequences, on x's device.
        initial_state: [N, W - 1, C], the inputs before each sequence, oldest first; zeros if None.

    Returns:
        y [T, C] in x's dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit the others.
    """
    if x.ndim != 2 or weight.ndim != 2 or len(weight) != x.shape[1] or weight.shape[1] < 2:
        shapes = f"x {list(x.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"x must be [T, C] and weight [C, W] with W at least 2, got {shapes}")
    sequences = check_cu_seqlens(cu_seqlens, 1, len(x), x.device)
    if initial_state is not None:
        expected = [sequences, weight.shape[1] - 1, x.shape[1]]
        if list(initial_state.shape) != expected:
            given = list(initial_state.shape)
            raise ValueError(f"initial_state must be [N, W - 1, C] = {expected}, got {given}")
        initial_state = initial_state.to(x.dtype)
    if x.is_cuda and x.numel() and weight.shape[1] == KERNEL_WIDTH and x.dtype != torch.float64:
        from kimi_linear.ops.triton.conv import short_convolution as kernel

        return kernel(x, weight, cu_seqlens, initial_state)
    high = state_dtype(x.dtype)  # rounded once, as the kernel does
    if initial_state is not None:
        initial_state = initial_state.to(high)
    filters = weight.to(x.dtype).to(high)
    return ShortConvolution.apply(x.to(high), filters, cu_seqlens, initial_state).to(x.dtype)


def convolve_cached(
    x: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    parts: int = 1,
) -> torch.Tensor:
    """`short_convolution` of sequences that go on: their last inputs lie in a cache, and are kept there.

    Not differentiable. On a GPU nothing waits for the device.

    Args:
        x: [T, C], sequences packed. Rows may lie apart, as columns of a wider projection do.
        weight: [C, W]; its last column multiplies the current token.
        cu_seqlens: [N + 1] int, boundaries of the sequences, on x's device.
        states: [slots, W - 1, C], the inputs before each sequence, oldest first. Slots may lie apart, what is
            in one may not. Written: the last W - 1 inputs of each sequence.
        slots: [N] int, where each sequence's are; no two share one.
        parts: equal parts of the channels, each of which leaves contiguous.

    Returns:
        y [parts, T, C / parts] in x's dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit the others.
    """
    sequences, channels, width = len(slots), x.shape[1], weight.shape[1]
    if list(states.shape[1:]) != [width - 1, channels] or states.stride()[1:] != (channels, 1):
        raise ValueError(
            f"states must be [slots, W - 1, C] with [{width - 1}, {channels}] contiguous, got "
            f"{list(states.shape)} with strides {list(states.stride())}"
        )
    if channels % parts:
        raise ValueError(f"parts={parts} does not divide x's {channels} channels")
    if check_cu_seqlens(cu_seqlens, 1, len(x), x.device) != sequences:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens) - 1} sequences and slots {sequences}")
    if x.is_cuda and len(x) and width == KERNEL_WIDTH and x.stride(1) == 1 and x.dtype != torch.float64:
        from kimi_linear.ops.triton.conv import convolve_cached as kernel

        return kernel(x, weight.contiguous(), cu_seqlens.contiguous(), states, slots.contiguous(), parts)
    rows = slots.long()
    history = states.index_select(0, rows).to(x.dtype)
    y = short_convolution(x, weight, cu_seqlens, history)
    states[rows] = convolution_state(x, width, cu_seqlens, history).to(states.dtype)
    return y.unflatten(1, (parts, -1)).transpose(0, 1).contiguous()


class ShortConvolution(torch.autograd.Function):
    """`short_convolution` in PyTorch.

    Every sequence is laid down behind W - 1 rows of its own history, so that each tap reads all rows at once,
    one row later than the tap before it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        cu_seqlens: torch.Tensor,
        history: torch.Tensor | None,
    ) -> torch.Tensor:
        back, sequences = weight.shape[1] - 1, len(cu_seqlens) - 1
        device = x.device
        # A token's output stands at row `at`, its input W - 1 rows below.
        at = torch.arange(len(x), device=device) + token_positions(cu_seqlens, len(x))[1] * back
        starts = cu_seqlens[:-1].long() + torch.arange(sequences, device=device) * back
        history_at = (starts.unsqueeze(1) + torch.arange(back, device=device)).flatten()
        rows = x.new_zeros(len(x) + sequences * back, x.shape[1])
        rows.index_copy_(0, at + back, x)
        if history is not None:
            rows.index_copy_(0, history_at, history.flatten(0, 1))
        taps = weight.t().contiguous()
        filtered = rows[: len(rows) - back] * taps[0]
        for tap in range(1, back + 1):
            filtered.addcmul_(rows[tap : len(rows) - back + tap], taps[tap])
        ctx.save_for_backward(rows, taps, filtered, at, history_at)
        return F.silu(filtered.index_select(0, at))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, taps, filtered, at, history_at = ctx.saved_tensors
        back = len(taps) - 1
        chosen = filtered.index_select(0, at)
        grad_chosen = torch.ops.aten.silu_backward(grads[0], chosen)
        grad_filtered = torch.zeros_like(filtered).index_copy_(0, at, grad_chosen)
        grad_rows = torch.zeros_like(rows)
        grad_taps = torch.empty_like(taps)
        for tap in range(back + 1):
            seen = slice(tap, len(rows) - back + tap)
            grad_rows[seen].addcmul_(grad_filtered, taps[tap])
            grad_taps[tap] = torch.linalg.vecdot(grad_filtered, rows[seen], dim=0)
        grad_history = None
        if ctx.needs_input_grad[3]:
            grad_history = grad_rows.index_select(0, history_at).unflatten(0, (-1, back))
        return grad_rows.index_select(0, at + back), grad_taps.t(), None, grad_history


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
    high = state_dtype(x.dtype)
    y = (window.to(x.dtype).to(high) * weight.to(high).t()).sum(1)
    return F.silu(y).to(x.dtype), window[:, 1:]
