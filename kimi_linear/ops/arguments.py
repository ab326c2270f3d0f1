"""Checks of arguments, and the activations that precede the recurrence, shared by every implementation."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

L2_NORM_EPS = 1e-6


@dataclass(frozen=True)
class KDAShape:
    """Sizes of one call: `sequences` N counts the rows of a batch, or the members of a packed batch."""

    batch: int
    tokens: int
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    sequences: int


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> KDAShape:
    """Raise ValueError, in one line, for a call that has no meaning; return its sizes otherwise.

    Shapes are those of `kimi_linear.ops.chunk_kda`.
    """
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, H, K], got {list(q.shape)}")
    batch, tokens, heads, key_dim = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k must have q's shape {list(q.shape)}, got {list(k.shape)}")
    if v.ndim != 4 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v must be [B, T, HV, V] with [B, T] = {[batch, tokens]}, got {list(v.shape)}")
    value_heads, value_dim = v.shape[2:]
    if min(heads, key_dim, value_heads, value_dim) == 0:
        raise ValueError(
            f"heads and head sizes must be positive, got q {list(q.shape)} and v {list(v.shape)}"
        )
    if value_heads % heads:
        raise ValueError(f"the {value_heads} heads of v must be a multiple of the {heads} heads of q and k")
    if g.shape != (batch, tokens, value_heads, key_dim):
        expected = [batch, tokens, value_heads, key_dim]
        raise ValueError(f"g must be [B, T, HV, K] = {expected}, got {list(g.shape)}")
    if beta.shape != (batch, tokens, value_heads):
        raise ValueError(f"beta must be [B, T, HV] = {[batch, tokens, value_heads]}, got {list(beta.shape)}")

    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}; move it there")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")

    sequences = batch
    if cu_seqlens is not None:
        sequences = check_cu_seqlens(cu_seqlens, batch, tokens, q.device)
    if initial_state is not None:
        expected = [sequences, value_heads, key_dim, value_dim]
        if list(initial_state.shape) != expected:
            raise ValueError(
                f"initial_state must be [N, HV, K, V] = {expected}, got {list(initial_state.shape)}"
            )
        if initial_state.dtype != state_dtype(q.dtype):
            raise ValueError(f"initial_state must be {state_dtype(q.dtype)}, got {initial_state.dtype}")
        if initial_state.device != q.device:
            raise ValueError(
                f"initial_state is on {initial_state.device} but q is on {q.device}; move it there"
            )

    if use_gate_in_kernel:
        if A_log is None and lower_bound is None:
            raise ValueError("use_gate_in_kernel=True needs A_log [HV], or lower_bound for the bounded gate")
        if A_log is not None and A_log.numel() != value_heads:
            raise ValueError(f"A_log must hold HV = {value_heads} values, got shape {list(A_log.shape)}")
        if dt_bias is not None and dt_bias.numel() != value_heads * key_dim:
            raise ValueError(
                f"dt_bias must hold HV * K = {value_heads * key_dim} values, got shape {list(dt_bias.shape)}"
            )
        if lower_bound is not None and not lower_bound < 0:
            raise ValueError(f"lower_bound must be negative (a log-space decay), got {lower_bound}")
    else:
        given = {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{', '.join(unused)} given but use_gate_in_kernel is False; set it to True")
    return KDAShape(batch, tokens, heads, value_heads, key_dim, value_dim, sequences)


def check_cu_seqlens(cu_seqlens: torch.Tensor, batch: int, tokens: int, device: torch.device) -> int:
    """Check cumulative sequence lengths [N + 1] of a packed batch of one row on `device`; return N.

    Their values are looked at on the CPU only: on a GPU the host would wait for them.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens packs all sequences into one row: B must be 1, got {batch}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] with N at least 1, got shape {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} but the tokens are on {device}; move it there"
        )
    if device.type != "cpu":
        return len(cu_seqlens) - 1
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"cu_seqlens must run from 0 to T = {tokens}, got {offsets[0]} to {offsets[-1]}")
    if any(end < start for start, end in pairwise(offsets)):
        raise ValueError("cu_seqlens must not decrease")
    return len(offsets) - 1


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of states and of the arithmetic: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last dimension; a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_NORM_EPS)


def kda_gate(
    f: torch.Tensor,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """Log-space decay per channel from the raw gate f [..., HV, K], in float32 (float64 for float64).

    Without `lower_bound`: -exp(A_log) * softplus(f + dt_bias), the released model's gate (arXiv:2510.26692).
    With it: lower_bound * sigmoid(exp(A_log) * (f + dt_bias)), another function with values in (lower_bound,
    0), not a clamp of the first. A_log has HV values (None only in the bounded gate, where it means 0),
    dt_bias HV * K.
    """
    f = f.to(state_dtype(f.dtype))
    if dt_bias is not None:
        f = f + dt_bias.to(f.dtype).view(f.shape[-2:])
    rate = 1.0 if A_log is None else A_log.to(f.dtype).exp().view(-1, 1)
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * f)
    return -rate * F.softplus(f)


def activate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    use_gate_in_kernel: bool,
    use_beta_sigmoid_in_kernel: bool,
    A_log: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    lower_bound: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply the activations that a call asks for and repeat grouped heads: what the recurrence itself takes.

    Returns q, k, g [B, T, HV, K], v [B, T, HV, V] and beta [B, T, HV] in the state's dtype.
    """
    dtype = state_dtype(q.dtype)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2_normalize(q), l2_normalize(k)
    if use_gate_in_kernel:
        g = kda_gate(g, A_log, dt_bias, lower_bound)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid()
    groups = v.shape[2] // q.shape[2]
    if groups > 1:
        q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    return q, k, v, g, beta
