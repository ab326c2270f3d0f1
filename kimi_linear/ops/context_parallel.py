"""One packed batch split over ranks along its tokens: the outputs and gradients of the whole.

A rank's tokens need two things of the ranks before it: the last W - 1 inputs of the short convolution, and
the state that the recurrence has reached. The recurrence is affine in it: over a rank's tokens, per head,

    S_out = M S_in + N,

so every rank finds its M and N at once, all gather them, and each folds those before it into the state it
starts from. Handing the state from rank to rank instead needs no M and N, but R ranks then work one after
the other. The fold costs one more scan of the sequence that crosses a rank's end, and one more backward pass
on a rank with sequences that cross its beginning and its end, whatever R is. What travels are K x (K + V)
numbers a value head forwards and K x V backwards: 4 MiB and 2 MiB a rank and layer in float32, for 32 heads
of 128.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kimi_linear.ops.arguments import state_dtype
from kimi_linear.ops.conv import short_convolution
from kimi_linear.ops.dispatch import chunk_kda


@dataclass(frozen=True)
class RankShare:
    """What one rank holds of a packed batch.

    Attributes:
        cu_seqlens: [n + 1] int64, boundaries of the sequences, or parts of them, among this rank's tokens.
        last_start: this rank's first token of its last sequence.
        before: tokens of the first of them that earlier ranks hold.
        after: tokens of the last of them that later ranks hold.
        smallest: tokens of the rank that holds fewest.
    """

    cu_seqlens: torch.Tensor
    last_start: int
    before: int
    after: int
    smallest: int

    @property
    def through(self) -> bool:
        """Whether one sequence comes from an earlier rank and goes on to a later one."""
        return self.before > 0 and self.after > 0 and len(self.cu_seqlens) == 2


def split_sequences(
    cu_seqlens: torch.Tensor, tokens: list[int], rank: int, device: torch.device | None = None
) -> RankShare:
    """Find the share of `rank` where rank r holds the next tokens[r] tokens of a packed batch.

    Args:
        cu_seqlens: [N + 1] int, boundaries of the whole batch, on the CPU. Empty sequences are left out.
        tokens: number of tokens of each rank.
        rank: whose share.
        device: where the rank's tokens are, the CPU if None.

    Raises:
        ValueError: a rank without tokens, or numbers that do not add up to the batch.
    """
    bounds = cu_seqlens.unique().tolist()
    if min(tokens) < 1 or sum(tokens) != bounds[-1]:
        raise ValueError(
            f"tokens must be positive and add up to the {bounds[-1]} tokens of the batch, got {tokens}"
        )
    start = sum(tokens[:rank])
    end = start + tokens[rank]
    first = max(bound for bound in bounds if bound <= start)
    last = min(bound for bound in bounds if bound >= end)
    inner = [bound - start for bound in bounds if start < bound < end]
    return RankShare(
        cu_seqlens=torch.tensor([0, *inner, end - start], device=device),
        last_start=inner[-1] if inner else 0,
        before=start - first,
        after=last - end,
        smallest=min(tokens),
    )


def context_parallel_convolution(
    x: torch.Tensor, weight: torch.Tensor, share: RankShare, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """`short_convolution` of this rank's tokens x [t, C]; every rank of the group must call it.

    The last W - 1 inputs of the rank before take the place of history; their gradient goes back to it.
    weight's gradient is this rank's part of the sum.

    Raises:
        ValueError: a rank with less than W - 1 tokens.
    """
    back = weight.shape[1] - 1
    if share.smallest < back:
        raise ValueError(f"each rank must hold at least {back} tokens, one holds {share.smallest}")
    halo = NextRank.apply(x[len(x) - back :], group)
    known = torch.arange(back, device=x.device).unsqueeze(1) >= back - share.before
    first = torch.where(known, halo, 0)
    sequences = len(share.cu_seqlens) - 1
    history = torch.cat((first.unsqueeze(0), x.new_zeros(sequences - 1, back, x.shape[1])))
    return short_convolution(x, weight, share.cu_seqlens, history)


class NextRank(torch.autograd.Function):
    """Each rank's tensor on the rank after it, zeros on the first; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        return shift(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return shift(grads[0], -1, ctx.group), None


def shift(x: torch.Tensor, step: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """x of rank r - step on rank r; zeros where there is no such rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    x, received = x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format)
    transfers = []
    if 0 <= rank + step < ranks:
        transfers.append(dist.P2POp(dist.isend, x, group=group, group_peer=rank + step))
    if 0 <= rank - step < ranks:
        transfers.append(dist.P2POp(dist.irecv, received, group=group, group_peer=rank - step))
    for request in dist.batch_isend_irecv(transfers) if transfers else ():
        request.wait()
    return received


def context_parallel_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    share: RankShare,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
) -> torch.Tensor:
    """`chunk_kda` of this rank's tokens, all sequences starting from zero; every rank of the group calls it.

    Tensors are those of `chunk_kda` with B = 1 and T this rank's tokens. On a GPU, K + V must be at most the
    kernels' largest head size. Gradients of A_log and dt_bias are this rank's part of the sum. The backward
    pass runs once for a forward pass, on all ranks.

    Returns:
        o [1, T, HV, V].
    """
    options = {
        "scale": scale,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "use_gate_in_kernel": use_gate_in_kernel,
        "use_beta_sigmoid_in_kernel": use_beta_sigmoid_in_kernel,
        "lower_bound": lower_bound,
    }
    return ContextParallelKDA.apply(share, group, options, q, k, v, g, beta, A_log, dt_bias)


class ContextParallelKDA(torch.autograd.Function):
    """`context_parallel_kda` with its gradients.

    The local graph from inputs and incoming state to output and outgoing state is kept, because it is walked
    twice: once for what this rank's outputs ask of its incoming state, which the ranks before wait for, and
    once, when they have folded that, for what later ranks ask of the outgoing state.
    """

    @staticmethod
    def forward(
        ctx: Any,
        share: RankShare,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        q, v = tensors[0], tensors[2]
        assert q is not None
        assert v is not None
        transitions = gather(local_transition(share, options, tensors), group)
        incoming = v.new_zeros(
            len(share.cu_seqlens) - 1, v.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype)
        )
        for transition in transitions[: dist.get_rank(group)]:
            free, through = transition.split((v.shape[3], q.shape[3]), dim=-1)
            incoming[0] = free + through @ incoming[0]
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(needed)
                for x, needed in zip(tensors, ctx.needs_input_grad[3:], strict=True)
            ]
            incoming.requires_grad_(share.before > 0 and any(ctx.needs_input_grad))
            o, states = run(leaves, share.cu_seqlens, incoming, options)
        ctx.share, ctx.group = share, group
        ctx.local = leaves, incoming, o, states
        ctx.throughs = [transition[..., v.shape[3] :] for transition in transitions]
        return o.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        share, group, (leaves, incoming, o, states) = ctx.share, ctx.group, ctx.local
        sources = [x for x in leaves if x is not None and x.requires_grad]
        asked = torch.zeros_like(incoming[0])
        totals: list[torch.Tensor] = []
        if share.before > 0:
            *totals, from_outputs = torch.autograd.grad(
                o, [*sources, incoming], grads[0], retain_graph=share.after > 0
            )
            asked = from_outputs[0]
        outgoing = torch.zeros_like(asked)
        later = list(zip(gather(asked, group), ctx.throughs, strict=True))[dist.get_rank(group) + 1 :]
        for own, through in reversed(later):
            outgoing = own + through.transpose(-1, -2) @ outgoing
        if share.after > 0 or not totals:
            state_grads = torch.zeros_like(states)
            state_grads[-1] = outgoing
            outputs = (states,) if totals else (states, o)
            output_grads = (state_grads,) if totals else (state_grads, grads[0])
            parts = torch.autograd.grad(outputs, sources, output_grads, materialize_grads=True)
            totals = [x + y for x, y in zip(totals, parts, strict=True)] if totals else list(parts)
        remaining = iter(totals)
        ctx.local = None
        return (
            None,
            None,
            None,
            *(next(remaining) if x is not None and x.requires_grad else None for x in leaves),
        )


def run(
    tensors: Any, cu_seqlens: torch.Tensor, state: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_kda` of q, k, v, g, beta, A_log and dt_bias from given states: o and the final states."""
    q, k, v, g, beta, a_log, dt_bias = tensors
    o, states = chunk_kda(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        output_final_state=True,
        A_log=a_log,
        dt_bias=dt_bias,
        cu_seqlens=cu_seqlens,
        **options,
    )
    assert states is not None
    return o, states


def local_transition(share: RankShare, options: dict[str, Any], tensors: Any) -> torch.Tensor:
    """[N | M] of the state that leaves this rank, [HV, K, V + K].

    Zeros if none leaves, and M zeros if none that came in does.
    """
    q, k, v, g, beta, a_log, dt_bias = tensors
    heads, value_dim, key_dim = v.shape[2], v.shape[3], q.shape[3]
    state = v.new_zeros(1, heads, key_dim, value_dim + key_dim, dtype=state_dtype(q.dtype))
    if share.after == 0:
        return state[0]
    last = [x[:, share.last_start :] for x in (q, k, v, g, beta)]
    if share.through:
        # Values of zero leave the identity to pass through every transition: M itself.
        zeros = v.new_zeros(*last[2].shape[:3], key_dim)
        last[2] = torch.cat((last[2], zeros), dim=-1)
        state[..., value_dim:] = torch.eye(key_dim, dtype=state.dtype, device=state.device)
    bounds = torch.arange(2, device=v.device) * last[2].shape[1]
    _, final = run((*last, a_log, dt_bias), bounds, state[..., : last[2].shape[-1]].contiguous(), options)
    state[..., : final.shape[-1]] = final
    return state[0]


def gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """x of every rank."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts
