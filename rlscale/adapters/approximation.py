"""A frozen linear layer with LoRA whose backward pass approximates the gradient of the layer's input.

CE-LoRA (arXiv:2502.01378) splits the frozen weight [m, n] into a low-rank part that stays exact and a
residual of which only the channels I enter:

    dX = (dY B0) A0 + dY[:, I] (W[I] - B0[I] A0)

The products are regrouped here, so that no residual is ever formed: what B0 A0 contributes to the channels of
I cancels, hence

    dX = dY[:, I] W[I] + (dY B0~) A0,    B0~ = B0 with the rows of I set to zero

and LoRA's own (dY B) A joins as further columns of the same two products. Where channels are sampled with
probability p, dY[:, I] W[I] is weighted by 1/p and the rows of B0~ are (1 - 1/p) B0, which is unbiased.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from rlscale.adapters.gathered import project_and_gather
from rlscale.adapters.selection import sample_channels

# Of the randomised SVD: its factors are then nearly the best ones.
_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_ROWS_AT_A_TIME = 1024


class Approximation(nn.Module):
    """What one layer keeps for its approximated input gradient.

    Until channels have been chosen the gradient is exact. While `measuring`, it is exact too and the squared
    norms of dY's columns are summed over the backward passes.

    Attributes:
        frozen_rank: r0, the rank of the frozen part.
        steps: optimizer steps taken.
        measuring: whether this step's gradient is exact and measured.
        keep: k, of sampled channels.
        frozen_B, frozen_A: [m, r0] and [r0, n] in the weight's dtype; None before `factorise`.
        channels: [k] int64 ascending; None before the first choice.
        weights: [k] float32, 1/p of sampled channels; None where the channels are the best ones.
        probabilities: [m] float64 that channels are sampled with; None where they are the best ones.
        squares: [m] float32, ‖dY[:, i]‖² summed while measuring; None when nothing was measured.
    """

    frozen_B: torch.Tensor | None
    frozen_A: torch.Tensor | None
    channels: torch.Tensor | None
    weights: torch.Tensor | None
    probabilities: torch.Tensor | None
    squares: torch.Tensor | None

    def __init__(self, frozen_rank: int) -> None:
        super().__init__()
        self.frozen_rank = frozen_rank
        self.steps = 0
        self.measuring = True
        self.keep = 0
        # Buffers move with the model; not persistent, so that checkpoints stay those of plain LoRA.
        for name in ("frozen_B", "frozen_A", "channels", "weights", "probabilities", "squares"):
            self.register_buffer(name, None, persistent=False)

    def factorise(self, weight: torch.Tensor) -> None:
        """Sets the frozen part to the largest `frozen_rank` singular values of the weight [m, n].

        The SVD is randomised; its random numbers depend on nothing, and nobody else's are drawn.
        """
        devices = [weight.device] if weight.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            rank = min(self.frozen_rank + _OVERSAMPLING, *weight.shape)
            u, s, v = torch.svd_lowrank(weight.to(_wide(weight.dtype)), rank, niter=_POWER_ITERATIONS)
        root = s[: self.frozen_rank].sqrt()
        self.frozen_B = (u[:, : self.frozen_rank] * root).to(weight.dtype)
        self.frozen_A = (v[:, : self.frozen_rank] * root).t().contiguous().to(weight.dtype)

    def scores(self, weight: torch.Tensor) -> torch.Tensor:
        """‖dY[:, i]‖ ‖Ws[i, :]‖ [m] float32, of the gradients measured and the residual Ws = W - B0 A0."""
        assert self.squares is not None
        return self.squares.sqrt() * self._residual_norms(weight)

    def gains(self, weight: torch.Tensor) -> torch.Tensor:
        """Each channel's squared score over the sum of all (‖dY[:, i]‖ ‖W[i, :]‖)², [m]: its share of the
        layer's whole input gradient, were the channels' terms orthogonal."""
        assert self.squares is not None
        norms = torch.linalg.vector_norm(weight, dim=1, dtype=_wide(weight.dtype))
        return self.scores(weight).square() / (self.squares * norms.square()).sum()

    def sample(self, generator: torch.Generator) -> None:
        """Draws `keep` channels by `probabilities`."""
        assert self.probabilities is not None
        self.channels = sample_channels(self.probabilities, self.keep, generator)
        self.weights = self.probabilities[self.channels].reciprocal().float()

    def _residual_norms(self, weight: torch.Tensor) -> torch.Tensor:
        assert self.frozen_B is not None
        assert self.frozen_A is not None
        dtype = _wide(weight.dtype)
        A = self.frozen_A.to(dtype)
        rows = zip(weight.split(_ROWS_AT_A_TIME), self.frozen_B.split(_ROWS_AT_A_TIME), strict=True)
        return torch.cat([torch.addmm(w.to(dtype), b.to(dtype), A, alpha=-1).norm(dim=1) for w, b in rows])

    def measure(self, dy: torch.Tensor) -> None:
        """Adds dY's columns [T, m] to `squares`."""
        squares = torch.linalg.vector_norm(dy, dim=0, dtype=_wide(dy.dtype)).square()
        self.squares = squares if self.squares is None else self.squares + squares

    def input_gradient(
        self,
        dy: torch.Tensor,
        weight: torch.Tensor,
        lora_A: torch.Tensor | None,
        scaled_B: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dX [T, n], with LoRA's share of it, and dY B [T, r] (times LoRA's scaling), which LoRA's A needs.

        Args:
            dy: [T, m].
            weight: [m, n], frozen.
            lora_A: [r, n], or None for the frozen layer alone.
            scaled_B: [m, r], B times the scaling, or None with lora_A.
        """
        exact = self.measuring or self.channels is None
        if exact:
            self.measure(dy)
            dx = dy @ weight.to(dy.dtype)
            if lora_A is None or scaled_B is None:
                return dx, None
            dh = dy @ scaled_B
            return dx.addmm_(dh, lora_A), dh
        assert self.channels is not None
        assert self.frozen_B is not None
        assert self.frozen_A is not None
        kept = weight.index_select(0, self.channels)
        if self.weights is None:
            outside = self.frozen_B.index_fill(0, self.channels, 0)
        else:
            kept = kept * self.weights.unsqueeze(1)
            factor = self.weights.new_ones(len(weight)).index_copy(0, self.channels, 1 - self.weights)
            outside = self.frozen_B * factor.unsqueeze(1)
        projections, rows = [outside.to(dy.dtype)], [self.frozen_A.to(dy.dtype)]
        if lora_A is not None and scaled_B is not None:
            projections.append(scaled_B)
            rows.append(lora_A)
        left = project_and_gather(dy, projections, self.channels)
        rows.append(kept.to(dy.dtype))
        rows.append(dy.new_zeros(left.shape[1] - sum(map(len, rows)), weight.shape[1]))
        dx = left @ torch.cat(rows)
        if lora_A is None:
            return dx, None
        return dx, left[:, self.frozen_rank : self.frozen_rank + len(lora_A)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What norms are computed in."""
    return torch.promote_types(dtype, torch.float32)


def approximated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    scaling: float,
    approximation: Approximation,
) -> torch.Tensor:
    """x W^T + bias + scaling x A^T B^T, exact forwards; backwards the gradient of x is approximated.

    The gradients of A, B and bias are exact for the gradient that comes in. Of the activations it saves x,
    for A's gradient, and x A^T, for B's, and neither without LoRA.

    Args:
        x: [..., n].
        weight: [m, n], frozen.
        bias: [m] or None.
        lora_A, lora_B: [r, n] and [m, r] in x's dtype, or both None for the frozen layer alone.
        scaling: LoRA's alpha / r.
        approximation: the layer's.
    """
    return _ApproximatedLinear.apply(x, weight, bias, lora_A, lora_B, scaling, approximation)


class _ApproximatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor | None,
        lora_B: torch.Tensor | None,
        scaling: float,
        approximation: Approximation,
    ) -> torch.Tensor:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        h = None
        if lora_A is not None and lora_B is not None:
            h = F.linear(x, lora_A)
            y.flatten(0, -2).addmm_(h.flatten(0, -2), lora_B.t(), alpha=scaling)
        ctx.scaling, ctx.approximation, ctx.input_shape = scaling, approximation, x.shape
        _, _, _, a_needs, b_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(weight, lora_A, lora_B, x if a_needs else None, h if b_needs else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight, lora_A, lora_B, x, h = ctx.saved_tensors
        x_needs, _, bias_needs, *_ = ctx.needs_input_grad
        dy = grad.reshape(-1, grad.shape[-1])
        scaled_B = None if lora_B is None else lora_B * ctx.scaling
        dx = dh = None
        if x_needs:
            dx, dh = ctx.approximation.input_gradient(dy, weight, lora_A, scaled_B)
            dx = dx.view(ctx.input_shape)
        elif x is not None and scaled_B is not None:
            dh = dy @ scaled_B
        d_bias = dy.sum(0) if bias_needs else None
        dA = None if x is None or dh is None else dh.t() @ x.reshape(-1, x.shape[-1])
        dB = None if h is None else (dy.t() @ h.reshape(-1, h.shape[-1])).mul_(ctx.scaling)
        return dx, None, d_bias, dA, dB, None, None
