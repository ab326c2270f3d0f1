"""What the plugin makes of vLLM's description of a step, without an engine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from kimi_linear.config import preset
from kimi_linear.layers import KimiDeltaAttention as TrainedAttention
from kimi_linear.layers import PackedSequences
from kimi_linear.vllm_plugin.batch import split_batch
from kimi_linear.vllm_plugin.delta_attention import NULL_BLOCK, DeltaMetadataBuilder, KimiDeltaAttention


def step(queries: list[int], lengths: list[int], prefilling: list[bool] | None) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32)
    table = torch.tensor([[7 * n + 5, 99] if q else [NULL_BLOCK, 99] for n, q in enumerate(queries)])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        max_seq_len=max(lengths),
        num_reqs=len(queries),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        block_table_tensor=table.int(),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )


@pytest.mark.parametrize(
    ("queries", "lengths", "prefilling", "decodes", "boundaries", "fresh"),
    [
        ([1, 1, 1], [5, 1, 9], [False] * 3, 3, [0], []),
        ([1, 1, 0, 0], [5, 7, 0, 0], [False] * 4, 4, [0], []),
        ([1, 1, 1], [5, 1, 9], [False, True, False], 3, [0], [1]),
        ([1, 1, 1], [5, 1, 9], None, 3, [0], [1]),
        ([1, 1, 4, 3], [5, 1, 4, 8], [False, True, True, True], 2, [0, 4, 7], [1, 2]),
        ([6], [6], [True], 0, [0, 6], [0]),
    ],
)
def test_a_step_splits_into_decoding_prefilling_and_beginning_sequences(
    queries: list[int],
    lengths: list[int],
    prefilling: list[bool] | None,
    decodes: int,
    boundaries: list[int],
    fresh: list[int],
) -> None:
    split = split_batch(step(queries, lengths, prefilling))
    assert split.num_decodes == decodes
    assert split.cu_seqlens.tolist() == boundaries
    assert split.num_prefills == len(boundaries) - 1
    assert split.lengths.tolist() == lengths
    assert split.fresh.tolist() == fresh


def builder() -> Any:
    return DeltaMetadataBuilder(
        None, [], SimpleNamespace(model_config=None, compilation_config=None), torch.device("cpu")
    )


def test_slots_are_read_where_vllm_keeps_them_so_that_a_graph_sees_each_step() -> None:
    common = step([1, 1, 0], [4, 9, 0], [False] * 3)
    metadata = builder().build(0, common)
    assert metadata.slots.tolist() == [5, 12, NULL_BLOCK]
    assert metadata.fresh is None
    assert metadata.cu_seqlens is None
    common.block_table_tensor[0, 0] = 42
    assert metadata.slots[0] == 42
    other = torch.tensor([[1, 0], [2, 0], [NULL_BLOCK, 0], [4, 0]])
    updated = builder().update_block_table(metadata, other, common.slot_mapping)
    assert updated.slots.tolist() == [1, 2, NULL_BLOCK]
    assert updated.slots.data_ptr() == other.data_ptr()
    assert metadata.slots[0] == 42


@torch.no_grad()
def test_a_mixed_batch_runs_as_each_sequence_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that decode, go on with a prompt, and begin one; then a row that belongs to none."""
    print("seed", torch.seed())
    config = preset("tiny")
    layer = TrainedAttention(config)
    for parameter in layer.parameters():
        parameter.uniform_(-0.3, 0.3)
    heads, dim, hidden = config.linear_num_heads, config.linear_head_dim, config.hidden_size
    sequences = [torch.randn(n, hidden) for n in (6, 11, 4)]
    earlier = [5, 4, 0]
    served = SimpleNamespace(
        prefix="layer",
        heads=heads,
        dim=dim,
        conv_weight=torch.cat([getattr(layer, f"{x}_conv1d").weight for x in "qkv"]).squeeze(1),
        A_log=layer.A_log,
        dt_bias=layer.dt_bias,
        o_norm=layer.o_norm,
        kv_cache=(torch.randn(9, 3, 3 * heads * dim), torch.randn(9, heads, dim, dim)),
    )
    for name in ("forget", "decode", "prefill"):
        setattr(served, name, getattr(KimiDeltaAttention, name).__get__(served))
    slots = [5, 3, 8]
    for sequence, past, slot in zip(sequences, earlier, slots, strict=True):
        if past:
            bounds = PackedSequences.checked(torch.tensor([0, past]), past)
            cache = layer.prefill(sequence[:past], bounds)[1]
            served.kv_cache[0][slot], served.kv_cache[1][slot] = cache.convolution[0], cache.state[0]

    queries = [len(sequence) - past for sequence, past in zip(sequences, earlier, strict=True)]
    common = step(queries, [len(sequence) for sequence in sequences], [False, True, True])
    common.block_table_tensor[:, 0] = torch.tensor(slots)
    context = SimpleNamespace(attn_metadata={"layer": builder().build(0, common)})
    monkeypatch.setattr("kimi_linear.vllm_plugin.delta_attention.get_forward_context", lambda: context)
    x = torch.cat([s[past:] for s, past in zip(sequences, earlier, strict=True)] + [torch.randn(1, hidden)])
    o = KimiDeltaAttention.attend(
        served,
        torch.cat((layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)), -1),
        layer.f_b_proj(layer.f_a_proj(x)).unflatten(-1, (heads, dim)),
        layer.b_proj(x),
        layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (heads, dim)),
    )
    assert not o[-1].any()
    found = layer.o_proj(o[:-1].flatten(1)).split(queries)
    for sequence, past, slot, part in zip(sequences, earlier, slots, found, strict=True):
        packed = PackedSequences.checked(torch.tensor([0, len(sequence)]), len(sequence))
        expected, cache = layer.prefill(sequence, packed)
        torch.testing.assert_close(part, expected[past:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(served.kv_cache[1][slot], cache.state[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(served.kv_cache[0][slot], cache.convolution[0])
