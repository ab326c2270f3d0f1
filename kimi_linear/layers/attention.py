"""Causal softmax attention over packed sequences, on PyTorch's fused kernel."""

import torch
import torch.nn.functional as F

from kimi_linear.layers.packed import PackedSequences


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, packed: PackedSequences
) -> torch.Tensor:
    """Each token attends to itself and to earlier tokens of its own sequence.

    Sequences of one length are a batch as they stand. Others of like length run as one padded batch.
    Causality makes padding harmless: it comes after the tokens.

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
    rows, outputs = [], []
    for index, lengths in length_buckets(packed):
        inside = torch.arange(index.shape[1], device=index.device) < lengths.unsqueeze(1)
        q_n, k_n, v_n = (x[index].transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q_n, k_n, v_n, is_causal=True, scale=scale)
        rows.append(index[inside])
        outputs.append(o.transpose(1, 2)[inside])
    if not outputs:
        return v[..., :value_dim]
    return torch.cat(outputs)[torch.cat(rows).argsort()][..., :value_dim]


def length_buckets(packed: PackedSequences) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group sequences whose padded lengths differ by less than a quarter.

    Returns, for each group, the rows of its tokens [n, longest] (clamped into range beyond a sequence's end)
    and the lengths [n].
    """
    groups: list[list[int]] = []
    order = sorted((n for n, length in enumerate(packed.lengths) if length), key=packed.lengths.__getitem__)
    shortest = 0
    for n in reversed(order):
        if not groups or packed.lengths[n] < shortest:
            groups.append([])
            shortest = packed.lengths[n] * 3 // 4
        groups[-1].append(n)
    starts = packed.cu_seqlens[:-1].long()
    buckets = []
    for group in groups:
        members = torch.tensor(group, device=starts.device)
        lengths = torch.tensor([packed.lengths[n] for n in group], device=starts.device)
        index = starts[members].unsqueeze(1) + torch.arange(packed.lengths[group[0]], device=starts.device)
        buckets.append((index.clamp(max=int(packed.cu_seqlens[-1]) - 1), lengths))
    return buckets
