"""Kimi Delta Attention token by token."""

import torch
import triton
import triton.language as tl

from kimi_linear.ops.triton.chunk import check_head_sizes, gate_kind
from kimi_linear.ops.triton.tiles import LOG2E, log2_decay


@triton.jit
def token_decay(g, at, channels, mask, hv, a_log, dt_bias, lower_bound, K: tl.constexpr, GATE: tl.constexpr):
    """exp of the log decay [KP] of one token and head."""
    f = tl.load(g + at + channels, mask=mask, other=0.0).to(tl.float32)
    if dt_bias is not None:
        f += tl.load(dt_bias + hv * K + channels, mask=mask, other=0.0).to(tl.float32)
    rate = 1.0
    if a_log is not None:
        rate = tl.exp2(tl.load(a_log + hv).to(tl.float32) * LOG2E)
    return tl.exp2(log2_decay(f, 0.0, rate, lower_bound, GATE))


@triton.jit
def delta_step(state, q, k, v, decay, b, scale):
    """S <- Diag(decay) S; S <- S + k (b (v - S^T k))^T; o = scale S^T q (arXiv:2510.26692, equation 1)."""
    # Both reads of the decayed state wait for nothing; the update's share of o is (q . k) error.
    state *= decay[:, None]
    along_k = tl.sum(state * k[:, None], axis=0)
    along_q = tl.sum(state * q[:, None], axis=0)
    error = b * (v - along_k)
    output = scale * (along_q + tl.sum(q * k, axis=0) * error)
    return state + k[:, None] * error[None, :], output


@triton.jit
def recurrent_kernel(
    q,
    k,
    v,
    g,
    beta,
    a_log,
    dt_bias,
    o,
    initial_state,
    final_state,
    cu_seqlens,
    T,
    scale,
    lower_bound,
    H: tl.constexpr,
    HV: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    VARLEN: tl.constexpr,
    GATE: tl.constexpr,
    BETA_SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """One program a slice of BV value channels of one head of one sequence; the state stays in registers."""
    sequence = tl.program_id(1) // HV
    hv = tl.program_id(1) % HV
    kk = tl.arange(0, KP)
    vv = tl.program_id(0) * BV + tl.arange(0, BV)
    k_mask = kk < K
    v_mask = vv < V
    state_mask = k_mask[:, None] & v_mask[None, :]
    state_offsets = (tl.program_id(1).to(tl.int64) * K + kk[:, None]) * V + vv[None, :]
    if initial_state is not None:
        state = tl.load(initial_state + state_offsets, mask=state_mask, other=0.0)
    else:
        state = tl.zeros([KP, BV], dtype=tl.float32)
    if VARLEN:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start).to(tl.int32)
    else:
        start = sequence.to(tl.int64) * T
        length = T
    row = start * HV + hv
    qk_row = start * H + hv // (HV // H)
    for _ in range(length):
        q_row = tl.load(q + qk_row * K + kk, mask=k_mask, other=0.0).to(tl.float32)
        k_row = tl.load(k + qk_row * K + kk, mask=k_mask, other=0.0).to(tl.float32)
        if NORMALIZE:
            q_row *= tl.rsqrt(tl.sum(q_row * q_row, axis=0) + 1e-6)
            k_row *= tl.rsqrt(tl.sum(k_row * k_row, axis=0) + 1e-6)
        v_row = tl.load(v + row * V + vv, mask=v_mask, other=0.0).to(tl.float32)
        b = tl.load(beta + row).to(tl.float32)
        if BETA_SIGMOID:
            b = 1.0 / (1.0 + tl.exp2(-b * LOG2E))
        decay = token_decay(g, row * K, kk, k_mask, hv, a_log, dt_bias, lower_bound, K, GATE)
        state, output = delta_step(state, q_row, k_row, v_row, decay, b, scale)
        tl.store(o + row * V + vv, output.to(o.dtype.element_ty), mask=v_mask)
        row += HV
        qk_row += H
    if final_state is not None:
        tl.store(final_state + state_offsets, state, mask=state_mask)


def fused_recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`kimi_linear.ops.fused_recurrent_kda` in one launch, for a few tokens a sequence. No gradients.

    Arguments and results are the dispatcher's. Raises ValueError where a gradient is asked for: `chunk_kda`
    has them.
    """
    check_head_sizes(q, v)
    inputs = (q, k, v, g, beta, initial_state, A_log, dt_bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise ValueError("fused_recurrent_kda has no gradient on a GPU: use chunk_kda, or torch.no_grad()")
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    batch, tokens, heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    o = torch.empty_like(v)
    final_state = None
    if output_final_state:
        final_state = v.new_empty(sequences, value_heads, key_dim, value_dim, dtype=torch.float32)
    block = min(32, max(16, triton.next_power_of_2(value_dim)))
    recurrent_kernel[(triton.cdiv(value_dim, block), sequences * value_heads)](
        q,
        k,
        v,
        g,
        beta,
        A_log,
        dt_bias,
        o,
        None if initial_state is None else initial_state.contiguous(),
        final_state,
        None if cu_seqlens is None else cu_seqlens.contiguous(),
        tokens,
        key_dim**-0.5 if scale is None else scale,
        0.0 if lower_bound is None else lower_bound,
        H=heads,
        HV=value_heads,
        K=key_dim,
        KP=max(16, triton.next_power_of_2(key_dim)),
        V=value_dim,
        BV=block,
        VARLEN=cu_seqlens is not None,
        GATE=gate_kind(use_gate_in_kernel, lower_bound),
        BETA_SIGMOID=use_beta_sigmoid_in_kernel,
        NORMALIZE=use_qk_l2norm_in_kernel,
        num_warps=4,
    )
    return o, final_state
