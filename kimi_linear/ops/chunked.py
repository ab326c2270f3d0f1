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
import torch.nn.functional as F

from kimi_linear.ops.packing import chunk_layout

CHUNK_SIZE = 64
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

    to_start = g.cumsum(-2)
    # Summed from the end rather than as a difference of prefixes, which would lose small gates beside large
    # ones.
    to_end = F.pad(g[:, :, 1:], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
    scores_qk, scores_kk = DecayedScores.apply(q, k, g)
    system = beta * scores_kk
    right = torch.cat((beta * v, beta * k * to_start.exp()), dim=-1)
    # Unit lower triangular: the diagonal is taken as 1 and the rest of `system` above it is never read.
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (value_dim, key_dim), dim=-1
    )
    k_to_end = (k * to_end.exp()).transpose(-1, -2)
    chunk_decay = to_start[:, :, -1, :, None].exp()

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

    o = (q * to_start.exp()) @ torch.cat(states) + scores_qk @ torch.cat(corrected)
    o = layout.unpad((scale * o).transpose(1, 2))
    return o, torch.cat(final[::-1])[layout.ranks]


def chunk_size_for(longest: int) -> int:
    """64, or less where all sequences are short: the least power of two that holds the longest, from 16."""
    size = SMALLEST_CHUNK
    while size < min(longest, CHUNK_SIZE):
        size *= 2
    return size


class DecayedScores(torch.autograd.Function):
    """Decayed products of all pairs in a chunk: sum_d (x_i k_j exp(g_{j+1} + ... + g_i))_d, x = q and x = k.

    Cut a block of tokens in two halves: for i in the later and j in the earlier one, the decay is the decay
    from the cut to i times the decay from j to the cut. Both are exponentials of sums of gates, never
    positive, never a difference of larger sums, and neither sees a gate after i. So one matrix product serves
    all such pairs of the block, and cutting blocks of C, C / 2, ..., 2 tokens meets every pair i > j exactly
    once.

    forward(q, k, g), all [M, H, C, K] with C a power of two, returns
        scores_qk [M, H, C, C], lower triangular with its diagonal (x = q),
        scores_kk [M, H, C, C], strictly lower triangular (x = k).
    Only the inputs are kept for the backward pass; decays are computed again there.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, g: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(q, k, g)
        size = q.shape[2]
        scores_qk = q.new_zeros(*q.shape[:2], size, size)
        scores_kk = torch.zeros_like(scores_qk)
        scores_qk.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        for half, from_cut, to_cut in decays_by_cut(g):
            columns = earlier(k, half) * to_cut
            for x, scores in ((q, scores_qk), (k, scores_kk)):
                rows = later(x, half) * from_cut
                below_cut(scores, half).copy_(rows @ columns.transpose(-1, -2))
        return scores_qk, scores_kk

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, g = ctx.saved_tensors
        grad_qk, grad_kk = (grad.contiguous() for grad in grad_outputs)
        diagonal = grad_qk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        grad_q = torch.zeros_like(q)
        grad_k_row, grad_k_column = torch.zeros_like(k), torch.zeros_like(k)
        for half, from_cut, to_cut in decays_by_cut(g):
            columns = earlier(k, half) * to_cut
            for x, grad_x, grad in ((q, grad_q, grad_qk), (k, grad_k_row, grad_kk)):
                block = below_cut(grad, half)
                later(grad_x, half).addcmul_(block @ columns, from_cut)
                rows = later(x, half) * from_cut
                earlier(grad_k_column, half).addcmul_(block.transpose(-1, -2) @ rows, to_cut)
        # A pair's decay holds the gates of j + 1 to i: its gradient enters at i, leaves at j, and sums from
        # the end.
        grad_g = (q * grad_q + k * (grad_k_row - grad_k_column)).flip(-2).cumsum(-2).flip(-2)
        return grad_q + diagonal * k, grad_k_row + grad_k_column + diagonal * q, grad_g


def decays_by_cut(g: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """For blocks of 2, 4, ..., C tokens cut in halves, yield a half's size and the decays beside the cut.

    from_cut [..., blocks, half, K]: exp of the gates after the cut up to and with each later token.
    to_cut [..., blocks, half, K]: exp of the gates after each earlier token up to the cut.
    """
    # Running sums inside each half: up to and with a token, and after it. Grown by one addition a level.
    through, after = g.clone(), torch.zeros_like(g)
    half = 1
    while half < g.shape[2]:
        later_through, earlier_after = later(through, half), earlier(after, half)
        yield half, later_through.exp(), earlier_after.exp()
        earlier_total = earlier(through, half)[..., -1:, :].clone()
        earlier_after += later_through[..., -1:, :]
        later_through += earlier_total
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
