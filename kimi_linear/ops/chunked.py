"""Kimi Delta Attention in chunks: matrix products inside a chunk, a short scan over chunk states.

Source: Kimi Linear (arXiv:2510.26692), appendix C. PyTorch only, so it runs anywhere; this is the CPU's path.

Within a chunk of C tokens, with D[i, j] the decay from token j to token i per channel:
    L[i, j] = beta_i sum_d k_i k_j D[i, j]  (i > j),   A_qk[i, j] = sum_d q_i k_j D[i, j]  (i >= j)
    u = (I + L)^-1 (beta v),   w = (I + L)^-1 (beta k D[:, start])
    v' = u - w S,   o = scale ((q D[:, start]) S + A_qk v'),   S <- Diag(D[end, start]) S + (k D[end, :])^T v'
"""

from collections.abc import Iterator
from typing import Any

import torch

from kimi_linear.ops.packing import chunk_layout

CHUNK_SIZE = 32
SMALLEST_CHUNK = 16


def chunked_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA over packed sequences, with gradients for every tensor argument.

    Args:
        q, k, g: [T, HV, K] in the state's dtype; g the log-space decay, at most 0.
        v: [T, HV, V].
        beta: [T, HV].
        scale: factor of the output.
        initial_state: [N, HV, K, V], zeros if None.
        cu_seqlens: [N + 1].

    Returns:
        o [T, HV, V] and the final states [N, HV, K, V].
    """
    heads, key_dim, value_dim = q.shape[1], q.shape[2], v.shape[2]
    sequences = len(cu_seqlens) - 1
    state = q.new_zeros(sequences, heads, key_dim, value_dim) if initial_state is None else initial_state
    if q.shape[0] == 0:
        return torch.zeros_like(v), state

    longest = int(cu_seqlens.diff().max())
    layout = chunk_layout(cu_seqlens, chunk_size_for(longest))
    # [chunks, HV, C, ...]; padding has k = beta = g = 0 and so leaves the state as it is.
    q, k, v, g, beta = (layout.pad(x).transpose(1, 2).contiguous() for x in (q, k, v, g, beta.unsqueeze(-1)))

    scores_qk, scores_kk, from_start, to_end = ChunkProducts.apply(q, k, g)
    system = beta * scores_kk
    right = beta * torch.cat((v, k * from_start), dim=-1)
    # Unit lower triangular: the diagonal is taken as 1 and the rest of `system` above it is never read.
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (value_dim, key_dim), dim=-1
    )
    k_to_end = (k * to_end).transpose(-1, -2)
    chunk_decay = from_start[:, :, -1, :, None]

    states, corrected, final = [], [], []
    state = state[layout.order]
    steps = (x.split(layout.step_sizes) for x in (u, w, k_to_end, chunk_decay))
    for u_c, w_c, k_c, decay_c in zip(*steps, strict=True):
        running = len(u_c)
        if running < len(state):
            state, finished = state.split((running, len(state) - running))
            final.append(finished)
        v_c = u_c - w_c @ state
        states.append(state)
        corrected.append(v_c)
        state = decay_c * state + k_c @ v_c
    final.append(state)

    o = (q * from_start) @ torch.cat(states) + scores_qk @ torch.cat(corrected)
    o = layout.unpad((scale * o).transpose(1, 2))
    return o, torch.cat(final[::-1])[layout.ranks]


def chunk_size_for(longest: int) -> int:
    """32, or less where all sequences are short: the least power of two that holds the longest, from 16."""
    size = SMALLEST_CHUNK
    while size < min(longest, CHUNK_SIZE):
        size *= 2
    return size


class ChunkProducts(torch.autograd.Function):
    """What a chunk's tokens are to each other and to its two ends, from q, k and g [M, H, C, K], C a power of
    two.

    forward returns
        scores_qk [M, H, C, C]: sum_d q_i k_j exp(g_{j+1} + ... + g_i) for i >= j, zero elsewhere;
        scores_kk [M, H, C, C]: the same with k_i for q_i and i > j;
        from_start, to_end [M, H, C, K]: exp of the gates up to and with a token, and of those after it.

    Cut a block of tokens in two halves: for i in the later and j in the earlier one, the decay is the decay
    from the cut to i times the decay from j to the cut, so one matrix product serves all such pairs of the
    block. Cutting blocks of 2, 4, ..., C tokens meets every pair i > j once. Decays only ever multiply, so
    nothing overflows, nothing is the difference of larger sums, and no gate after i has a part in row i.

    Only the inputs are kept for the backward pass; decays are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        size = q.shape[2]
        scores_qk = q.new_zeros(*q.shape[:2], size, size)
        scores_kk = torch.zeros_like(scores_qk)
        scores_qk.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        from_start, to_end = g.exp(), torch.ones_like(g)
        for half, from_cut, to_cut in cuts(from_start, to_end):
            columns = (earlier(k, half) * to_cut).transpose(-1, -2)
            below_cut(scores_qk, half).copy_((later(q, half) * from_cut) @ columns)
            below_cut(scores_kk, half).copy_((later(k, half) * from_cut) @ columns)
        ctx.save_for_backward(q, k, g, from_start, to_end)
        return scores_qk, scores_kk, from_start, to_end

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, g, from_start, to_end = ctx.saved_tensors
        grad_qk, grad_kk, grad_from_start, grad_to_end = (grad.contiguous() for grad in grads)
        grad_q, grad_k_row, grad_k_column = (torch.zeros_like(x) for x in (q, k, k))
        for half, from_cut, to_cut in cuts(g.exp(), torch.ones_like(g)):
            columns = earlier(k, half) * to_cut
            block_qk, block_kk = (below_cut(grad, half).contiguous() for grad in (grad_qk, grad_kk))
            later(grad_q, half).addcmul_(block_qk @ columns, from_cut)
            later(grad_k_row, half).addcmul_(block_kk @ columns, from_cut)
            grad_columns = block_qk.transpose(-1, -2) @ (later(q, half) * from_cut)
            grad_columns += block_kk.transpose(-1, -2) @ (later(k, half) * from_cut)
            earlier(grad_k_column, half).addcmul_(grad_columns, to_cut)
        # The decay from j to i holds the gates of j + 1 to i: its gradient enters at i, leaves at j, and each
        # gate collects what has entered at it or after. The chunk's start is before, its end after, all
        # tokens.
        ends = to_end * grad_to_end
        entered = q * grad_q + k * (grad_k_row - grad_k_column) + from_start * grad_from_start - ends
        grad_g = entered.flip(-2).cumsum(-2).flip(-2) + ends.sum(-2, keepdim=True)
        diagonal = grad_qk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return grad_q + diagonal * k, grad_k_row + grad_k_column + diagonal * q, grad_g


def cuts(through: torch.Tensor, after: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For blocks of 2, 4, ..., C tokens cut in halves: a half's size, and the decays on the two sides of the
    cut.

    Takes exp(g) and ones, both [M, H, C, K], and leaves in their place the decays from the chunk's start
    through each token and from after each token to the chunk's end. What it yields are views, valid until the
    next step: from_cut and to_cut, [M, H, blocks, half, K].
    """
    half = 1
    while half < through.shape[2]:
        from_cut, to_cut = later(through, half), earlier(after, half)
        yield half, from_cut, to_cut
        whole_earlier_half = earlier(through, half)[..., -1:, :].clone()
        to_cut *= from_cut[..., -1:, :]
        from_cut *= whole_earlier_half
        half *= 2


def earlier(x: torch.Tensor, half: int) -> torch.Tensor:
    """View of the earlier halves of blocks of 2 half tokens: [M, H, C, K] -> [M, H, blocks, half, K]."""
    return x.unflatten(2, (-1, 2, half))[:, :, :, 0]


def later(x: torch.Tensor, half: int) -> torch.Tensor:
    """View of the later halves of blocks of 2 half tokens: [M, H, C, K] -> [M, H, blocks, half, K]."""
    return x.unflatten(2, (-1, 2, half))[:, :, :, 1]


def below_cut(scores: torch.Tensor, half: int) -> torch.Tensor:
    """View of scores of later rows, earlier columns: [M, H, C, C] -> [M, H, C / (2 half), half, half]."""
    blocks = scores.shape[2] // (2 * half)
    tiles = scores.view(*scores.shape[:2], blocks, 2, half, blocks, 2, half)[:, :, :, 1, :, :, 0]
    return tiles.diagonal(dim1=2, dim2=4).movedim(-1, 2)
