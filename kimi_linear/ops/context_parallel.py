"""One packed batch split over ranks along its tokens: the outputs and gradients of the whole.

A rank's tokens need two things of the ranks before it: the last W - 1 inputs of the short convolution, and
the state that the recurrence has reached. The recurrence is affine in it: over a rank's tokens, per head,

    S_out = M S_in + N,

so every rank finds its M and N at once, all gather them, and each folds those before it into the state it
starts from. Handing the state from rank to rank instead needs no M and N, but R ranks then scan one after the
other. What a rank does to its chunks that needs no state is done once, for all scans. A rank whose sequence
begins on it starts from zeros: it scans once, has N with its outputs, and waits for nobody; the last of two
ranks needs no M and N of its own. So two ranks hand a state over, and from three on those in the middle scan
twice, whatever their number. Backwards likewise, with the gradient of the state and the transposed M.

What travels are K x (K + V) numbers a value head forwards and K x V backwards: 4 MiB and 2 MiB a rank and
layer in float32, for 32 heads of 128.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F

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

    Tensors are those of `chunk_kda` with B = 1 and T this rank's tokens. On a GPU with three ranks or more,
    K + V must be at most the kernels' largest head size, except on Hopper, where K may also be 64 or 128 and
    V any multiple of 64. Gradients of A_log and dt_bias are this rank's part of the sum. The backward pass
    runs once for a forward pass, on all ranks.

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
    tensors = (q, k, v, g, beta, A_log, dt_bias)
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    return ContextParallelKDA.apply(share, group, options, needed, *tensors)


class ContextParallelKDA(torch.autograd.Function):
    """`context_parallel_kda` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        share: RankShare,
        group: dist.ProcessGroup | None,
        options: dict[str, Any],
        needed: list[bool],
        *tensors: Any,
    ) -> torch.Tensor:
        q, _, v = tensors[:3]
        heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
        steps = new_steps(tensors, share, needed, options)
        incoming = steps.new_states()
        own = incoming.new_zeros(heads, key_dim, value_dim + key_dim)
        if share.before == 0:
            o, final = steps.outputs(None)
            if share.after > 0:
                own[..., :value_dim] = final[-1]
        elif share.after > 0:
            found = steps.transition(share.through)
            own[..., : found.shape[-1]] = found
        transitions, arrival = gather(own, group)
        if share.before > 0 or not any(needed):
            arrival.wait()
        if share.before > 0:
            for transition in transitions[: dist.get_rank(group)]:
                free, through = transition.split((value_dim, key_dim), dim=-1)
                incoming[0] = free + through @ incoming[0]
            o, _ = steps.outputs(incoming)
        ctx.share, ctx.group, ctx.steps, ctx.arrival = share, group, steps, arrival
        ctx.throughs = [transition[..., value_dim:] for transition in transitions]
        return o

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        share, group, steps = ctx.share, ctx.group, ctx.steps
        ctx.steps = None
        steps.begin_gradients(grads[0])
        outgoing = steps.new_states()
        if share.after == 0:
            asked = steps.incoming_gradient(outgoing)[0]
        elif share.before > 0:
            asked = steps.asked_of_first()
        asked = asked if share.before > 0 else torch.zeros_like(outgoing[0])
        gathered, arrival = gather(asked, group)
        if share.after > 0:
            arrival.wait()
            ctx.arrival.wait()
            later = list(zip(gathered, ctx.throughs, strict=True))[dist.get_rank(group) + 1 :]
            for own, through in reversed(later):
                outgoing[-1] = own + through.mT @ outgoing[-1]
            steps.incoming_gradient(outgoing)
        found = steps.gradients()
        if share.after == 0:
            arrival.wait()
        return (None, None, None, None, *found)


class Steps(Protocol):
    """`chunk_kda` of a rank's tokens in the steps between which ranks talk."""

    def transition(self, through: bool) -> torch.Tensor:
        """[HV, K, V + K], [N | M] of the last sequence; N alone, [HV, K, V], unless `through`."""

    def outputs(self, incoming: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """o and the final states, from states [n, HV, K, V], or zeros."""

    def new_states(self) -> torch.Tensor:
        """Zeros like the states."""

    def begin_gradients(self, output_grad: torch.Tensor) -> None:
        """Do what needs no gradient of a state."""

    def asked_of_first(self) -> torch.Tensor:
        """The gradient [HV, K, V] of the first sequence's state as far as outputs alone ask for it."""

    def incoming_gradient(self, outgoing_grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the incoming states, given that of the final ones."""

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Those of q, k, v, g, beta, A_log and dt_bias; comes last."""


def new_steps(
    tensors: tuple[Any, ...], share: RankShare, needed: list[bool], options: dict[str, Any]
) -> Steps:
    """Steps of q, k, v, g, beta, A_log and dt_bias, of which gradients are `needed`."""
    if tensors[0].is_cuda:
        from kimi_linear.ops.triton.shared import ChunkSteps

        return ChunkSteps(tensors, share.cu_seqlens, any(needed), **options)
    return DifferentiatedSteps(tensors, share, needed, options)


class DifferentiatedSteps:
    """`Steps` by autograd, on any device."""

    def __init__(
        self,
        tensors: tuple[Any, ...],
        share: RankShare,
        needed: list[bool],
        options: dict[str, Any],
    ) -> None:
        self.needed = any(needed)
        self.leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(needs)
            for x, needs in zip(tensors, needed, strict=True)
        ]
        self.share, self.options = share, options

    def transition(self, through: bool) -> torch.Tensor:
        q, k, v, g, beta, a_log, dt_bias = self.leaves
        heads, value_dim, key_dim = v.shape[2], v.shape[3], q.shape[3]
        last = [x[:, self.share.last_start :] for x in (q, k, v, g, beta)]
        state = v.new_zeros(
            1, heads, key_dim, value_dim + (key_dim if through else 0), dtype=state_dtype(q.dtype)
        )
        if through:
            # Values of zero leave the identity to pass through every transition: M itself.
            last[2] = F.pad(last[2], (0, key_dim))
            state[..., value_dim:] = torch.eye(key_dim, dtype=state.dtype, device=state.device)
        bounds = torch.arange(2, device=v.device) * last[2].shape[1]
        return run((*last, a_log, dt_bias), bounds, state, self.options)[1][0]

    def outputs(self, incoming: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            self.incoming = self.new_states() if incoming is None else incoming.detach().clone()
            self.incoming.requires_grad_(self.needed)
            self.o, self.states = run(self.leaves, self.share.cu_seqlens, self.incoming, self.options)
        return self.o.detach(), self.states.detach()

    def new_states(self) -> torch.Tensor:
        q, _, v = self.leaves[:3]
        shape = (len(self.share.cu_seqlens) - 1, v.shape[2], q.shape[3], v.shape[3])
        return v.new_zeros(shape, dtype=state_dtype(q.dtype))

    def begin_gradients(self, output_grad: torch.Tensor) -> None:
        self.output_grad = output_grad

    def asked_of_first(self) -> torch.Tensor:
        (asked,) = torch.autograd.grad(self.o, self.incoming, self.output_grad, retain_graph=True)
        return asked[0]

    def incoming_gradient(self, outgoing_grad: torch.Tensor) -> torch.Tensor:
        sources = [x for x in self.leaves if x is not None and x.requires_grad]
        outputs, grads = (self.o, self.states), (self.output_grad, outgoing_grad)
        asked, *found = torch.autograd.grad(outputs, [self.incoming, *sources], grads)
        self.found = iter(found)
        return asked

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(next(self.found) if x is not None and x.requires_grad else None for x in self.leaves)


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


def gather(x: torch.Tensor, group: dist.ProcessGroup | None) -> tuple[list[torch.Tensor], dist.Work]:
    """x of every rank, once the work is done."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    work = dist.all_gather(parts, x.contiguous(), group=group, async_op=True)
    assert work is not None
    return parts, work
