"""One decode step of a KDA layer, from its projections to its output projection, in one launch."""

from functools import cache

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.chunk import check_head_sizes, gate_kind
from kimi_linear.ops.triton.conv import append, silu
from kimi_linear.ops.triton.recurrent import delta_step, token_decay
from kimi_linear.ops.triton.tiles import LOG2E

# Fixed by measurement (benchmarks/NOTES.md).
DECODE_OPTIONS = {"num_warps": 4}


@triton.jit
def load_window(x, window, channels, mask, C: tl.constexpr, W: tl.constexpr):
    """The last W inputs of some channels, oldest first, in their own dtype."""
    rows = ()
    for tap in tl.static_range(0, W - 1):
        rows = append(rows, tl.load(window + tap * C + channels, mask=mask, other=0.0))
    return append(rows, tl.load(x + channels, mask=mask, other=0.0))


@triton.jit
def convolve(rows, weight, channels, mask, W: tl.constexpr):
    """SiLU of the short convolution's newest output: float32, rounded as prefill and learner round it."""
    y = tl.zeros(channels.shape, dtype=tl.float32)
    for tap in tl.static_range(0, W):
        factor = tl.load(weight + channels * W + tap, mask=mask, other=0.0).to(tl.float32)
        y += factor * rows[tap].to(tl.float32)
    return silu(y).to(rows[W - 1].dtype).to(tl.float32)


@triton.jit
def shift_window(rows, window, channels, mask, C: tl.constexpr, W: tl.constexpr):
    """Keep the newest W - 1 inputs for the next token."""
    for tap in tl.static_range(0, W - 1):
        tl.store(window + tap * C + channels, rows[tap + 1].to(window.dtype.element_ty), mask=mask)


@triton.jit
def decode_kernel(
    qkv,
    conv_weight,
    conv_state,
    g,
    beta,
    a_log,
    dt_bias,
    state,
    slots,
    output_gate,
    norm_weight,
    o,
    qkv_stride,
    beta_stride,
    window_stride,
    state_stride,
    slot_stride,
    padding_slot,
    scale,
    eps,
    lower_bound,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    W: tl.constexpr,
    GATE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a sequence and head, so that the norm of a head's output needs no second launch.

    The state is read and written once and stays in registers between.
    """
    if EARLY:
        # This grid may start while the launch before it ends, and the next one while this one does.
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = tl.program_id(0) // HV
    hv = tl.program_id(0) % HV
    kk = tl.arange(0, KP)
    vv = tl.arange(0, VP)
    k_mask = kk < K
    v_mask = vv < V
    C: tl.constexpr = HV * (2 * K + V)
    row = sequence.to(tl.int64) * HV + hv
    slot = tl.load(slots + sequence * slot_stride).to(tl.int64)
    if slot <= padding_slot:
        tl.store(o + row * V + vv, tl.zeros([VP], dtype=o.dtype.element_ty), mask=v_mask)
        return
    state_at = state + slot * state_stride + (hv * K + kk[:, None]) * V + vv[None, :]
    state_mask = k_mask[:, None] & v_mask[None, :]
    # The state is nearly all that moves: ask for it first, then for everything else, and store only then. A
    # store in between would hold back every load behind it, since the two might overlap.
    s = tl.load(state_at, mask=state_mask, other=0.0).to(tl.float32)
    x = qkv + sequence.to(tl.int64) * qkv_stride
    window = conv_state + slot * window_stride
    q_channels = hv * K + kk
    k_channels = HV * K + q_channels
    v_channels = 2 * HV * K + hv * V + vv
    q_rows = load_window(x, window, q_channels, k_mask, C, W)
    k_rows = load_window(x, window, k_channels, k_mask, C, W)
    v_rows = load_window(x, window, v_channels, v_mask, C, W)
    b = tl.load(beta + sequence.to(tl.int64) * beta_stride + hv).to(tl.float32)
    decay = token_decay(g, row * K, kk, k_mask, hv, a_log, dt_bias, lower_bound, K, GATE)
    norm = tl.load(norm_weight + vv, mask=v_mask, other=0.0).to(tl.float32)
    gate = tl.load(output_gate + row * V + vv, mask=v_mask, other=0.0).to(tl.float32)

    q = convolve(q_rows, conv_weight, q_channels, k_mask, W)
    k = convolve(k_rows, conv_weight, k_channels, k_mask, W)
    v = convolve(v_rows, conv_weight, v_channels, v_mask, W)
    q *= tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6)
    k *= tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
    b = 1.0 / (1.0 + tl.exp2(-b * LOG2E))
    # Threads may share an element; none may overwrite a window that another has still to read.
    tl.debug_barrier()
    shift_window(q_rows, window, q_channels, k_mask, C, W)
    shift_window(k_rows, window, k_channels, k_mask, C, W)
    shift_window(v_rows, window, v_channels, v_mask, C, W)
    s, output = delta_step(s, q, k, v, decay, b, scale)
    tl.store(state_at, s.to(state.dtype.element_ty), mask=state_mask)
    output = output.to(o.dtype.element_ty).to(tl.float32)  # as prefill and learner keep it
    output *= tl.rsqrt(tl.sum(output * output, axis=0) / V + eps)
    output *= norm / (1.0 + tl.exp2(-gate * LOG2E))
    tl.store(o + row * V + vv, output.to(o.dtype.element_ty), mask=v_mask)


@cache
def starts_early(device: torch.device) -> bool:
    """Whether launches on `device` can overlap the end of those before them: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def kda_decode_step(
    qkv: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_state: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor,
    slots: torch.Tensor,
    output_gate: torch.Tensor,
    norm_weight: torch.Tensor,
    scale: float | None = None,
    eps: float = 1e-5,
    lower_bound: float | None = None,
    padding_slot: int = -1,
) -> torch.Tensor:
    """What a KDA layer does for one token of N sequences between its projections, in one launch.

    Short convolution and SiLU of q, k and v, normalisation of q and k, gate, sigmoid of beta, the recurrence,
    per-head RMSNorm and sigmoid output gate. Advances `conv_state` and `state` in place at the rows that
    `slots` names and touches no others. Allocates only its result and reads nothing back, so CUDA graphs can
    hold it.

    Args:
        qkv: [N, HV * (2 K + V)], projections before the convolution: all heads of q, then of k, then of v.
            Rows of qkv and beta may lie apart, as in columns of one wider projection.
        conv_weight: [HV * (2 K + V), W], the last column multiplies the newest token.
        conv_state: [slots, W - 1, HV * (2 K + V)], earlier inputs, oldest first. Slots of either cache may
            lie apart, as in pages that hold both.
        g: [N, HV, K], the raw gate.
        beta: [N, HV], logits.
        A_log: HV values; dt_bias: HV * K values or None.
        state: [slots, HV, K, V], float32 or bfloat16.
        slots: [N] int, each sequence's row of both caches, distinct but for padding, whose output is 0. They
            may lie apart, as in a column of a table.
        output_gate: [N, HV, V], logits.
        norm_weight: [V].
        scale: factor of the output, K ** -0.5 if None.
        eps: of the RMSNorm.
        lower_bound: chooses the bounded gate.
        padding_slot: slots up to this one are padding.

    Returns:
        [N, HV, V] in qkv's dtype.

    Raises:
        ValueError: a size that does not fit the others, or a cache whose slots are not each contiguous.
    """
    sequences, value_heads, key_dim = g.shape
    value_dim = norm_weight.numel()
    channels = value_heads * (2 * key_dim + value_dim)
    check_head_sizes(g[None], output_gate[None])
    if qkv.shape != (sequences, channels):
        raise ValueError(f"qkv must be [N, HV * (2 K + V)] = {[sequences, channels]}, got {list(qkv.shape)}")
    if conv_weight.shape[0] != channels or conv_weight.shape[1] < 2:
        raise ValueError(
            f"conv_weight must be [{channels}, W] with W at least 2, got {list(conv_weight.shape)}"
        )
    width = conv_weight.shape[1]
    if conv_state.shape[1:] != (width - 1, channels):
        expected = f"[slots, {width - 1}, {channels}]"
        raise ValueError(f"conv_state must be {expected}, got {list(conv_state.shape)}")
    if state.shape[1:] != (value_heads, key_dim, value_dim):
        expected = f"[slots, {value_heads}, {key_dim}, {value_dim}]"
        raise ValueError(f"state must be {expected}, got {list(state.shape)}")
    if not (state[:1].is_contiguous() and conv_state[:1].is_contiguous()):
        raise ValueError("state and conv_state are advanced in place and each slot must be contiguous")
    qkv, beta = (x if x.stride(-1) == 1 else x.contiguous() for x in (qkv, beta))
    o = qkv.new_empty(sequences, value_heads, value_dim)
    early = starts_early(qkv.device)
    decode_kernel[(sequences * value_heads,)](
        qkv,
        conv_weight.contiguous(),
        conv_state,
        g.contiguous(),
        beta,
        A_log,
        dt_bias,
        state,
        slots,
        output_gate.contiguous(),
        norm_weight,
        o,
        qkv.stride(0),
        beta.stride(0),
        conv_state.stride(0),
        state.stride(0),
        slots.stride(0),
        padding_slot,
        key_dim**-0.5 if scale is None else scale,
        eps,
        0.0 if lower_bound is None else lower_bound,
        HV=value_heads,
        K=key_dim,
        KP=max(16, triton.next_power_of_2(key_dim)),
        V=value_dim,
        VP=max(16, triton.next_power_of_2(value_dim)),
        W=width,
        GATE=gate_kind(True, lower_bound),
        EARLY=early,
        launch_pdl=early,
        **DECODE_OPTIONS,
    )
    return o
