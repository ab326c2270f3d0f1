"""Causal softmax attention over packed sequences, on PyTorch's fused kernel."""

from typing import Any

import torch
import torch.nn.functional as F

from kimi_linear.layers.packed import PackedSequences


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, packed: PackedSequences
) -> torch.Tensor:
    """Each token attends to itself and to earlier tokens of its own sequence.

    Sequences of one length are a batch as they stand. Others of like length run as one padded batch.
    Causality makes padding harmless: it comes after the tokens. On a GPU nothing waits for the device where
    `packed` was told the lengths.

    Args:
        q, k: [T, H, K].
        v: [T, H, V].
        scale: factor of q . k before the softmax.
        packed: the sequences' boundaries.

    Returns:
        [T, H, V].
    """
    if not packed.tokens:
        return v
    if len(set(packed.lengths)) == 1:
        return _attention(q, k, v, scale, (-1, packed.lengths[0]))
    padded = packed.padded
    sizes = [n * longest for n, longest in padded.shapes]
    batches = (_Spread.apply(x, padded.rows, padded.places).split(sizes) for x in (q, k, v))
    outputs = [
        _attention(q_n, k_n, v_n, scale, shape)
        for q_n, k_n, v_n, shape in zip(*batches, padded.shapes, strict=True)
    ]
    return _Collected.apply(torch.cat(outputs), padded.places)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, shape: tuple[int, int]
) -> torch.Tensor:
    """Of sequences of one length that stand one after the other, `shape` of them and of that length."""
    value_dim = v.shape[-1]
    if q.shape[-1] > value_dim and not (v.is_cuda and v.dtype.itemsize == 2):
        # cuDNN alone, on GPUs and in half precision, has a fused kernel whose values differ in size.
        v = F.pad(v, (0, q.shape[-1] - value_dim))
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o.transpose(1, 2).flatten(0, 1)[..., :value_dim]


class _Spread(torch.autograd.Function):
    """x [T, ...] -> x[rows] [P, ...]. Of the places that repeat a token only the one in `places` has a
    gradient, so its backward pass reads those, once, and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Collected(torch.autograd.Function):
    """x [P, ...] -> x[places] [T, ...], no place twice: its backward pass writes and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.places = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        spread = grad.new_zeros(ctx.places, *grad.shape[1:])
        return spread.index_copy_(0, places, grad), None
