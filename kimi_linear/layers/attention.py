"""Causal softmax attention over packed sequences, on PyTorch's fused kernel."""

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
    value_dim = v.shape[-1]
    # The fused CPU kernel wants one head size for all three.
    v = F.pad(v, (0, q.shape[-1] - value_dim)) if q.shape[-1] > value_dim else v
    if len(set(packed.lengths)) == 1 and packed.tokens:
        q_n, k_n, v_n = (x.unflatten(0, (-1, packed.lengths[0])).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, scale=scale)
        return o.transpose(1, 2).flatten(0, 1)[..., :value_dim]
    buckets, order = packed.buckets
    outputs = []
    for bucket in buckets:
        q_n, k_n, v_n = (
            x.index_select(0, bucket.rows.flatten()).unflatten(0, bucket.rows.shape).transpose(1, 2)
            for x in (q, k, v)
        )
        o = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, scale=scale)
        outputs.append(o.transpose(1, 2).flatten(0, 1).index_select(0, bucket.inside))
    if not outputs:
        return v[..., :value_dim]
    return torch.cat(outputs).index_select(0, order)[..., :value_dim]
