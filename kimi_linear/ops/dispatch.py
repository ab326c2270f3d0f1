"""The public operators: one signature each, the implementation chosen by the device of q."""

from collections.abc import Callable

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
    float32, or float64 where q is float64. On a GPU nothing waits for the device, so the values of cu_seqlens
    go unchecked.

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
    return _apply(
        "chunk_kda", _in_chunks, q, k, v, g, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, A_log, dt_bias, lower_bound,
        cu_seqlens,
    )  # fmt: skip


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
    return _apply(
        "fused_recurrent_kda", _by_tokens, q, k, v, g, beta, scale, initial_state, output_final_state,
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, A_log, dt_bias, lower_bound,
        cu_seqlens,
    )  # fmt: skip


def _apply(
    name: str,
    on_cpu: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    normalize: bool,
    use_gate: bool,
    sigmoid_beta: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Check a call and hand it to the Triton operator `name`, or activated to `on_cpu`."""
    check_arguments(q, k, v, g, beta, initial_state, use_gate, A_log, dt_bias, lower_bound, cu_seqlens)
    if q.is_cuda:
        import kimi_linear.ops.triton as kernels

        return getattr(kernels, name)(
            q, k, v, g, beta, scale, initial_state, output_final_state, normalize, use_gate, sigmoid_beta,
            A_log, dt_bias, lower_bound, cu_seqlens,
        )  # fmt: skip
    dtype = q.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = activate(
        q, k, v, g, beta, normalize, use_gate, sigmoid_beta, A_log, dt_bias, lower_bound
    )
    o, final_state = on_cpu(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return o.to(dtype), final_state if output_final_state else None


def _in_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if cu_seqlens is None:
        cu_seqlens = uniform_cu_seqlens(q.shape[0], q.shape[1], q.device)
    rows = v.shape[:2]
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    o, state = chunked_kda(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return o.unflatten(0, rows), state


def _by_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    state = initial_state
    if state is None:
        state = q.new_zeros(sequences, v.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is None:
        return recurrent_kda(q, k, v, g, beta, scale, state)
    # One chunk holds the longest sequence. Padding has k = beta = g = 0 and so leaves the state as it is.
    layout = chunk_layout(cu_seqlens, max(1, int(cu_seqlens.diff().max())))
    q, k, v, g, beta = (layout.pad(x.squeeze(0)) for x in (q, k, v, g, beta))
    running = layout.chunks
    ordered = state[layout.order]
    o, advanced = recurrent_kda(q, k, v, g, beta, scale, ordered[:running])
    state = torch.cat((advanced, ordered[running:]))[layout.ranks]
    return layout.unpad(o).unsqueeze(0), state
