"""The public operators: one signature each, the implementation chosen by the device of q."""

import torch

from kimi_linear.ops.arguments import activate, check_arguments
from kimi_linear.ops.chunked import chunked_kda
from kimi_linear.ops.packing import chunk_layout, uniform_cu_seqlens
from kimi_linear.ops.reference import recurrent_kda


def chunk_kda(
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
    """Kimi Delta Attention (arXiv:2510.26692) in chunks, for training and prefill. Differentiable.

    Names, shapes, defaults and state layout are those of flash-linear-attention 0.6.0. Arithmetic is in
    float32, or float64 where q is float64.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V], HV a multiple of H: value head h reads query and key head h // (HV / H).
        g: [B, T, HV, K], the log-space decay (at most 0), or the raw gate if `use_gate_in_kernel`.
        beta: [B, T, HV], in (0, 1), or its logits if `use_beta_sigmoid_in_kernel`.
        scale: factor of the output, K ** -0.5 if None.
        initial_state: [N, HV, K, V] float32, zeros if None; N is B, or the number of packed sequences.
        output_final_state: return the final states too.
        use_qk_l2norm_in_kernel: scale q and k to x / sqrt(sum x^2 + 1e-6) first.
        use_gate_in_kernel: compute the decay -exp(A_log) * softplus(g + dt_bias), or with `lower_bound` the
            bounded decay lower_bound * sigmoid(exp(A_log) * (g + dt_bias)).
        use_beta_sigmoid_in_kernel: apply the sigmoid to beta.
        A_log: HV values; required by the unbounded gate.
        dt_bias: HV * K values.
        lower_bound: negative; chooses the bounded gate.
        cu_seqlens: [N + 1] int, boundaries of sequences packed into one row (then B = 1).

    Returns:
        o [B, T, HV, V] in q's dtype, and the final states [N, HV, K, V] or None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or a combination without meaning.
    """
    check_arguments(
        q, k, v, g, beta, initial_state, use_gate_in_kernel, A_log, dt_bias, lower_bound, cu_seqlens
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if q.is_cuda:
        import kimi_linear.ops.triton as kernels

        return kernels.chunk_kda(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            cu_seqlens=cu_seqlens,
        )
    q, k, v, g, beta = activate(
        q,
        k,
        v,
        g,
        beta,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        A_log,
        dt_bias,
        lower_bound,
    )
    if cu_seqlens is None:
        cu_seqlens = uniform_cu_seqlens(q.shape[0], q.shape[1], q.device)
    rows = v.shape[:2]
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    o, final_state = chunked_kda(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return o.unflatten(0, rows).to(dtype), final_state if output_final_state else None


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
    """Kimi Delta Attention (arXiv:2510.26692) token by token, for a few tokens a sequence: decoding.

    Arguments, results and errors are those of `chunk_kda`. All sequences advance together, so the cost grows
    with the longest one.
    """
    check_arguments(
        q, k, v, g, beta, initial_state, use_gate_in_kernel, A_log, dt_bias, lower_bound, cu_seqlens
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = q.dtype
    if q.is_cuda:
        import kimi_linear.ops.triton as kernels

        return kernels.fused_recurrent_kda(
            q,
            k,
            v,
            g,
            beta,
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            use_gate_in_kernel=use_gate_in_kernel,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=lower_bound,
            cu_seqlens=cu_seqlens,
        )
    q, k, v, g, beta = activate(
        q,
        k,
        v,
        g,
        beta,
        use_qk_l2norm_in_kernel,
        use_gate_in_kernel,
        use_beta_sigmoid_in_kernel,
        A_log,
        dt_bias,
        lower_bound,
    )
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = initial_state
    if state is None:
        state = q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is None:
        o, state = recurrent_kda(q, k, v, g, beta, scale, state)
    else:
        # One chunk holds the longest sequence. Padding has k = beta = g = 0 and so leaves the state as it is.
        layout = chunk_layout(cu_seqlens, max(1, int(cu_seqlens.diff().max())))
        q, k, v, g, beta = (layout.pad(x.squeeze(0)) for x in (q, k, v, g, beta))
        running = layout.chunks
        ordered = state[layout.order]
        o, advanced = recurrent_kda(q, k, v, g, beta, scale, ordered[:running])
        state = torch.cat((advanced, ordered[running:]))[layout.ranks]
        o = layout.unpad(o).unsqueeze(0)
    return o.to(dtype), state if output_final_state else None
