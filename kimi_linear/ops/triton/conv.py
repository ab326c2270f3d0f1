"""Causal short convolution with SiLU over packed sequences: four taps, forward and backward.

A program walks down a strip of tokens with the last inputs of its channels in registers, so memory is passed
over once. The rows of a group are all asked for before any of them is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.tiles import LOG2E

WIDTH = 4

# Tokens of a strip and of a group, channels and warps of a program: fixed by measurement
# (benchmarks/NOTES.md).
FORWARD_OPTIONS = {"BT": 64, "GROUP": 8, "BC": 128, "num_warps": 1, "maxnreg": 96}
BACKWARD_OPTIONS = {"BT": 64, "GROUP": 4, "BC": 128, "num_warps": 1}


@triton.jit
def append(rows, row):
    """A tuple and one more member, as Triton takes it."""
    return rows + (row,)  # noqa: RUF005


@triton.jit
def silu(a):
    return a / (1.0 + tl.exp2(-a * LOG2E))


@triton.jit(do_not_specialize=["tokens", "sequences", "step"])
def places_kernel(cu_seqlens, places, tokens, sequences, step, BT: tl.constexpr):
    """Write each token's position in its sequence, and behind all of them each token's sequence.

    Bisection for the last sequence that starts at or before a token; `step` is the largest power of two below
    the number of sequences.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = t < tokens
    sequence = tl.zeros([BT], dtype=tl.int32)
    while step > 0:
        later = sequence + step
        known = inside & (later < sequences)
        start = tl.load(cu_seqlens + later, mask=known, other=0)
        sequence = tl.where(known & (start <= t), later, sequence)
        step //= 2
    start = tl.load(cu_seqlens + sequence, mask=inside, other=0)
    tl.store(places + t, (t - start).to(tl.int32), mask=inside)
    tl.store(places + tokens + t, sequence, mask=inside)


@triton.jit
def load_rows(x, first, begin, end, stride, channels, mask, COUNT: tl.constexpr):
    """Rows `first` to first + COUNT of x, zeros outside `begin` to `end`."""
    rows = ()
    for i in tl.static_range(0, COUNT):
        t = first + i
        inside = mask & (t >= begin) & (t < end)
        rows = append(rows, tl.load(x + t.to(tl.int64) * stride + channels, mask=inside, other=0.0))
    return rows


@triton.jit
def load_places(places, first, end, COUNT: tl.constexpr):
    """Positions and sequences of tokens `first` to first + COUNT, zeros from `end` on."""
    positions = ()
    sequences = ()
    for i in tl.static_range(0, COUNT):
        t = first + i
        positions = append(positions, tl.load(places + t, mask=t < end, other=0))
        sequences = append(sequences, tl.load(places + end + t, mask=t < end, other=0))
    return positions, sequences


@triton.jit
def within_sequence(places, first, end, COUNT: tl.constexpr):
    """Whether tokens `first` to first + COUNT, as far as there are any, and the 3 before them are of one
    sequence: of nearly all that is so, and what else may be need not be asked of each."""
    position = tl.load(places + first, mask=first < end, other=0)
    sequence = tl.load(places + end + first, mask=first < end, other=0)
    last = tl.load(places + end + tl.minimum(first + COUNT, end) - 1)
    return (position >= 3) & (sequence == last)


@triton.jit
def load_taps(weight, channels, mask):
    """The filters of some channels, oldest tap first, in float32."""
    taps = ()
    for i in tl.static_range(0, 4):
        taps = append(taps, tl.load(weight + channels * 4 + i, mask=mask, other=0.0).to(tl.float32))
    return taps


@triton.jit
def earlier_input(back: tl.constexpr, x, position, history, C, channels, mask):
    """The input `back` tokens earlier: x where the sequence has that token, else what its history has."""
    y = tl.where(position >= back, x, 0.0)
    if history is not None:
        at = (position + 3 - back) * C + channels
        y += tl.load(history + at, mask=mask & (position < back), other=0.0).to(tl.float32)
    return y


@triton.jit
def forward_kernel(
    x,
    weight,
    places,
    history,
    slots,
    y,
    tokens,
    stride,
    history_stride,
    C,
    D,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program a strip of BT tokens and BC of the D channels of a part, which y [C / D, tokens, D] keeps
    apart. With `slots`, sequence n's history is row slots[n] of `history`, else row n."""
    first = tl.program_id(0) * BT
    blocks = tl.cdiv(D, BC)
    part = tl.program_id(1) // blocks
    own = (tl.program_id(1) % blocks) * BC + tl.arange(0, BC)
    mask = own < D
    channels = part * D + own
    y += part.to(tl.int64) * tokens * D + own
    taps = load_taps(weight, channels, mask)
    halo = load_rows(x, first - 3, 0, tokens, stride, channels, mask, 3)
    x_3, x_2, x_1 = halo[0].to(tl.float32), halo[1].to(tl.float32), halo[2].to(tl.float32)
    for step in range(0, BT, GROUP):
        start = first + step
        rows = load_rows(x, start, 0, tokens, stride, channels, mask, GROUP)
        if within_sequence(places, start, tokens, GROUP):
            for i in tl.static_range(0, GROUP):
                x_0 = rows[i].to(tl.float32)
                a = taps[3] * x_0 + taps[2] * x_1 + taps[1] * x_2 + taps[0] * x_3
                at = y + (start + i).to(tl.int64) * D
                tl.store(at, silu(a).to(y.dtype.element_ty), mask=mask & (start + i < tokens))
                x_3, x_2, x_1 = x_2, x_1, x_0
        else:
            positions, sequences = load_places(places, start, tokens, GROUP)
            for i in tl.static_range(0, GROUP):
                before = history
                if history is not None:
                    slot = sequences[i]
                    if slots is not None:
                        slot = tl.load(slots + slot)
                    before += slot.to(tl.int64) * history_stride
                x_0 = rows[i].to(tl.float32)
                a = taps[3] * x_0
                a += taps[2] * earlier_input(1, x_1, positions[i], before, C, channels, mask)
                a += taps[1] * earlier_input(2, x_2, positions[i], before, C, channels, mask)
                a += taps[0] * earlier_input(3, x_3, positions[i], before, C, channels, mask)
                at = y + (start + i).to(tl.int64) * D
                tl.store(at, silu(a).to(y.dtype.element_ty), mask=mask & (start + i < tokens))
                x_3, x_2, x_1 = x_2, x_1, x_0


@triton.jit
def keep_inputs_kernel(x, cu_seqlens, states, slots, stride, state_stride, C, BC: tl.constexpr):
    """One program a sequence and BC channels: its last 3 inputs take the place of the 3 before it."""
    sequence = tl.program_id(0)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channels < C
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    states += tl.load(slots + sequence).to(tl.int64) * state_stride
    inputs = load_rows(x, end - 3, begin, end, stride, channels, mask, 3)
    kept = load_rows(states, end - begin, 0, 3, C, channels, mask, 3)
    for i in tl.static_range(0, 3):
        row = tl.where(end - 3 + i >= begin, inputs[i].to(tl.float32), kept[i].to(tl.float32))
        tl.store(states + i * C + channels, row.to(states.dtype.element_ty), mask=mask)


@triton.jit
def silu_gradient(a):
    """Derivative of a * sigmoid(a)."""
    sigmoid = 1.0 / (1.0 + tl.exp2(-a * LOG2E))
    return sigmoid * (1.0 + a * (1.0 - sigmoid))


@triton.jit
def backward_kernel(
    x,
    weight,
    places,
    history,
    dy,
    dx,
    dweight,
    tokens,
    stride,
    C,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
    BC: tl.constexpr,
):
    """One program a strip of BT - 3 tokens, and the 3 behind it whose outputs they had a part in.

    An output's gradient goes to its own token and the 3 before it; a token's is complete, and written, 3
    tokens later. `dweight` [strips, 4, C] takes each strip's share of the filters' gradient.
    """
    own: tl.constexpr = BT - 3
    first = tl.program_id(0) * own
    end = min(first + own, tokens)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channels < C
    taps = load_taps(weight, channels, mask)
    halo = load_rows(x, first - 3, 0, tokens, stride, channels, mask, 3)
    x_3, x_2, x_1 = halo[0].to(tl.float32), halo[1].to(tl.float32), halo[2].to(tl.float32)
    zero = tl.zeros([BC], dtype=tl.float32)
    dx_3, dx_2, dx_1 = zero, zero, zero
    dtap_0, dtap_1, dtap_2, dtap_3 = zero, zero, zero, zero
    for step in range(0, BT, GROUP):
        start = first + step
        rows = load_rows(x, start, 0, tokens, stride, channels, mask, GROUP)
        grads = load_rows(dy, start, 0, tokens, C, channels, mask, GROUP)
        positions, sequences = load_places(places, start, tokens, GROUP)
        for i in tl.static_range(0, GROUP):
            position = positions[i]
            x_0 = rows[i].to(tl.float32)
            before = history
            if history is not None:
                before += sequences[i].to(tl.int64) * (3 * C)
            seen_1 = earlier_input(1, x_1, position, before, C, channels, mask)
            seen_2 = earlier_input(2, x_2, position, before, C, channels, mask)
            seen_3 = earlier_input(3, x_3, position, before, C, channels, mask)
            a = taps[3] * x_0 + taps[2] * seen_1 + taps[1] * seen_2 + taps[0] * seen_3
            da = grads[i].to(tl.float32) * silu_gradient(a)
            dx_3 += tl.where(position >= 3, taps[0] * da, 0.0)
            dx_2 += tl.where(position >= 2, taps[1] * da, 0.0)
            dx_1 += tl.where(position >= 1, taps[2] * da, 0.0)
            done = start + i - 3
            at = dx + done.to(tl.int64) * C + channels
            tl.store(at, dx_3.to(dx.dtype.element_ty), mask=mask & (done >= first) & (done < end))
            dx_3, dx_2, dx_1 = dx_2, dx_1, taps[3] * da
            mine = tl.where(start + i < end, da, 0.0)
            dtap_0 += mine * seen_3
            dtap_1 += mine * seen_2
            dtap_2 += mine * seen_1
            dtap_3 += mine * x_0
            x_3, x_2, x_1 = x_2, x_1, x_0
    at = dweight + tl.program_id(0).to(tl.int64) * 4 * C + channels
    tl.store(at, dtap_0, mask=mask)
    tl.store(at + C, dtap_1, mask=mask)
    tl.store(at + 2 * C, dtap_2, mask=mask)
    tl.store(at + 3 * C, dtap_3, mask=mask)


@triton.jit
def history_gradient_kernel(x, weight, cu_seqlens, history, dy, dhistory, stride, C, BC: tl.constexpr):
    """One program a sequence and BC channels: its first 3 outputs alone saw its history."""
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channels < C
    begin = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    taps = load_taps(weight, channels, mask)
    seen = load_rows(history, sequence * 3, 0, sequence * 3 + 3, C, channels, mask, 3)
    seen = seen + load_rows(x, begin, begin, end, stride, channels, mask, 3)
    grads = load_rows(dy, begin, begin, end, C, channels, mask, 3)
    das = ()
    for i in tl.static_range(0, 3):
        a = tl.zeros([BC], dtype=tl.float32)
        for tap in tl.static_range(0, 4):
            a += taps[tap] * seen[i + tap].to(tl.float32)
        das = append(das, grads[i].to(tl.float32) * silu_gradient(a))
    for row in tl.static_range(0, 3):
        total = tl.zeros([BC], dtype=tl.float32)
        for i in tl.static_range(0, row + 1):
            total += taps[row - i] * das[i]
        at = dhistory + (sequence * 3 + row) * C + channels
        tl.store(at, total.to(dhistory.dtype.element_ty), mask=mask)


def token_places(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions of T packed tokens in their sequences, and their sequences: [2, T] int32."""
    places = torch.empty(2, tokens, dtype=torch.int32, device=cu_seqlens.device)
    sequences = cu_seqlens.numel() - 1
    step = 1 << (sequences - 1).bit_length() >> 1
    places_kernel[(triton.cdiv(tokens, 256),)](
        cu_seqlens, places, tokens, sequences, step, BT=256, num_warps=4
    )
    return places


class ShortConvolution(torch.autograd.Function):
    """`short_convolution` with its gradients. Keeps the inputs alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        cu_seqlens: torch.Tensor,
        history: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, channels = x.shape
        y = torch.empty(tokens, channels, dtype=x.dtype, device=x.device)
        places = token_places(cu_seqlens, tokens)
        options = FORWARD_OPTIONS
        grid = (triton.cdiv(tokens, options["BT"]), triton.cdiv(channels, options["BC"]))
        forward_kernel[grid](
            x, weight, places, history, None, y, tokens, x.stride(0), 3 * channels, channels, channels,
            **options,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cu_seqlens, history, places)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, cu_seqlens, history, places = ctx.saved_tensors
        dy = grads[0].contiguous()
        tokens, channels = x.shape
        dx = torch.empty_like(dy)
        options = BACKWARD_OPTIONS
        strips = triton.cdiv(tokens, options["BT"] - 3)
        dweight = torch.empty(strips, WIDTH, channels, device=x.device)
        backward_kernel[(strips, triton.cdiv(channels, options["BC"]))](
            x, weight, places, history, dy, dx, dweight, tokens, x.stride(0), channels, **options
        )
        dhistory = None
        if history is not None and ctx.needs_input_grad[3]:
            dhistory = torch.empty_like(history)
            block = options["BC"]
            history_gradient_kernel[(len(history), triton.cdiv(channels, block))](
                x, weight, cu_seqlens, history, dy, dhistory, x.stride(0), channels, BC=block, num_warps=1
            )
        return dx, dweight.sum(0).t().to(weight.dtype), None, dhistory


def short_convolution(
    x: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor, initial_state: torch.Tensor | None = None
) -> torch.Tensor:
    """`kimi_linear.ops.short_convolution` for W = 4, at least one token and at most float32.

    Rows of x may lie apart, as columns of a wider projection do; the result is contiguous.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    history = None if initial_state is None else initial_state.contiguous()
    return ShortConvolution.apply(x, weight.contiguous(), cu_seqlens.contiguous(), history)


def convolve_cached(
    x: torch.Tensor,
    weight: torch.Tensor,
    cu_seqlens: torch.Tensor,
    states: torch.Tensor,
    slots: torch.Tensor,
    parts: int,
) -> torch.Tensor:
    """`kimi_linear.ops.convolve_cached` for W = 4, at least one token and at most float32."""
    tokens, channels = x.shape
    size = channels // parts
    y = torch.empty(parts, tokens, size, dtype=x.dtype, device=x.device)
    options = FORWARD_OPTIONS
    grid = (triton.cdiv(tokens, options["BT"]), parts * triton.cdiv(size, options["BC"]))
    forward_kernel[grid](
        x, weight, token_places(cu_seqlens, tokens), states, slots, y, tokens, x.stride(0), states.stride(0),
        channels, size, **options,
    )  # fmt: skip
    block = options["BC"]
    keep_inputs_kernel[(len(slots), triton.cdiv(channels, block))](
        x, cu_seqlens, states, slots, x.stride(0), states.stride(0), channels, BC=block, num_warps=1
    )
    return y
