"""What layers derive from the boundaries of packed sequences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_linear.config import preset
from kimi_linear.layers import MultiHeadLatentAttention, PackedSequences
from kimi_linear.layers.attention import packed_attention


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_attention_over_buckets_is_attention_of_each_sequence_alone(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q, k, v, upstream = (
        torch.randn(tokens, 2, size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in (8, 8, 6, 6)
    )
    packed = PackedSequences.checked(torch.tensor([0, *lengths]).cumsum(0), tokens)
    o = packed_attention(q, k, v, 0.3, packed)
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in parts), is_causal=True, scale=0.3)
        for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    expected = torch.cat([x.transpose(0, 1) for x in alone])
    torch.testing.assert_close(o, expected)
    if tokens:
        gradients, expected_gradients = (
            torch.autograd.grad((x * upstream).sum(), (q, k, v)) for x in (o, expected)
        )
        torch.testing.assert_close(gradients, expected_gradients)
    assert len(packed.padded.rows) <= tokens * 4 / 3 + len(lengths)


def test_a_layer_that_was_told_the_lengths_reads_no_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MultiHeadLatentAttention(preset("tiny"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-0.5, 0.5)
    x, lengths = torch.randn(30, preset("tiny").hidden_size), [12, 0, 11, 7]
    boundaries = torch.tensor([0, 12, 12, 23, 30])
    expected = layer(x, PackedSequences.checked(boundaries, 30))
    told = PackedSequences.checked(boundaries, 30, lengths)
    monkeypatch.setattr(torch.Tensor, "diff", lambda *_: pytest.fail("the host waited for the boundaries"))
    torch.testing.assert_close(layer(x, told), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="lengths has 3 sequences and 30 tokens"):
        PackedSequences.checked(boundaries, 30, [12, 11, 7])
