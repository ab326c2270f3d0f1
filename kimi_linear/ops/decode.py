"""One decode step of a KDA layer, from its projections to its output projection, on any device."""

import torch

from kimi_linear.ops.arguments import kda_gate, l2_normalize, state_dtype
from kimi_linear.ops.conv import convolution_step
from kimi_linear.ops.norm import gated_rms_norm
from kimi_linear.ops.reference import recurrent_step


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
    eps: float = 1e-5,
    padding_slot: int = -1,
) -> torch.Tensor:
    """What a KDA layer does for one token of N sequences between its projections.

    Short convolution with SiLU, L2 normalisation of q and k, the unbounded gate, sigmoid of beta, the
    recurrence, per-head RMSNorm and sigmoid output gate (arXiv:2510.26692, section 4). Advances `conv_state`
    and `state` in place at the rows that `slots` names. One launch on a GPU, where CUDA graphs can hold it.

    Args:
        qkv: [N, H * (2 K + V)], projections before the convolution: all heads of q, then of k, then of v.
        conv_weight: [H * (2 K + V), W], the last column multiplies the newest token.
        conv_state: [slots, W - 1, H * (2 K + V)], earlier inputs, oldest first.
        g: [N, H, K], the raw gate.
        beta: [N, H], logits.
        A_log: H values; dt_bias: H * K values or None.
        state: [slots, H, K, V], float32 or bfloat16.
        slots: [N] int, each sequence's row of both caches, distinct but for padding, whose output is 0.
        output_gate: [N, H, V], logits.
        norm_weight: [V].
        eps: of the RMSNorm.
        padding_slot: slots up to this one are padding.

    Returns:
        [N, H, V] in qkv's dtype.
    """
    if qkv.is_cuda:
        from kimi_linear.ops import triton as kernels

        return kernels.kda_decode_step(
            qkv, conv_weight, conv_state, g, beta, A_log, dt_bias, state, slots, output_gate, norm_weight,
            eps=eps, padding_slot=padding_slot,
        )  # fmt: skip
    heads, key_dim = g.shape[1:]
    out = qkv.new_zeros(len(qkv), heads, norm_weight.numel())
    used = (slots > padding_slot).nonzero().squeeze(1)
    if len(used) < len(slots):
        qkv, g, beta, output_gate, slots = (x[used] for x in (qkv, g, beta, output_gate, slots))
    rows = slots.long()
    # index_select copies whole states, several times faster than indexing with a tensor does.
    y, history = convolution_step(qkv, conv_weight, conv_state.index_select(0, rows))
    high = state_dtype(qkv.dtype)
    q, k, v = (
        x.unflatten(-1, (heads, -1)).to(high)
        for x in y.tensor_split((heads * key_dim, 2 * heads * key_dim), 1)
    )
    o, final = recurrent_step(
        l2_normalize(q), l2_normalize(k), v, kda_gate(g, A_log, dt_bias), beta.to(high).sigmoid(),
        state.index_select(0, rows).to(high), key_dim**-0.5,
    )  # fmt: skip
    conv_state[rows], state[rows] = history, final.to(state.dtype)
    out[used] = gated_rms_norm(o.to(out.dtype), output_gate, norm_weight, eps)
    return out
