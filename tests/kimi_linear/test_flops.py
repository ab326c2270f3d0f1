"""Analytic operation counts against PyTorch's counter, which sees matrix products and attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import KimiLinearConfig

from kimi_linear.config import LINEAR_ATTENTION, mla_twin, preset
from kimi_linear.flops import CHUNK_SIZE, Flops, forward_flops, generation_flops, training_flops
from kimi_linear.model import KimiLinearForCausalLM
from kimi_linear.ops import chunked

# No two sizes alike, so that no mix-up of two cancels.
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "full_attention_layers": [2],
    "linear_num_heads": 3,
    "linear_head_dim": 16,
    "num_attention_heads": 5,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "kv_lora_rank": 40,
    "first_k_dense_replace": 1,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 48,
}


def shape(architecture: str) -> KimiLinearConfig:
    hybrid = preset("tiny", SHAPE)
    return hybrid if architecture == "hybrid" else mla_twin(hybrid)


def counted(config: KimiLinearConfig, lengths: list[int], backward: bool = False) -> int:
    model = KimiLinearForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (sum(lengths),))
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    # The counter knows no fused attention of the CPU's, but the two products that it stands for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model.lm_head(model.packed_hidden_states(ids, boundaries))
        if backward:
            logits.square().mean().backward()
    return int(counter.get_total_flops())


def unseen(config: KimiLinearConfig, tokens: int) -> int:
    """Short convolutions, which are computed elementwise."""
    channels = config.linear_num_heads * config.linear_head_dim
    layers = config.layer_types.count(LINEAR_ATTENTION)
    return layers * 2 * tokens * 3 * channels * config.linear_conv_kernel_dim


@pytest.mark.parametrize("lengths", [[128], [256, 256, 256]])
def test_every_product_of_full_mla_is_counted(lengths: list[int]) -> None:
    config = shape("mla")
    flops = forward_flops(config, lengths)
    # The counter does not know that half of the square is masked.
    assert counted(config, lengths) == flops.total + flops.mixing


@pytest.mark.parametrize("lengths", [[64], [192, 192]])
def test_every_product_of_the_hybrid_is_counted_and_kda_as_the_paper_counts_it(lengths: list[int]) -> None:
    config = shape("hybrid")
    tokens, dim = sum(lengths), config.linear_head_dim
    flops = forward_flops(config, lengths)
    mla = sum(n**2 for n in lengths) * config.num_attention_heads * (24 + 8 + 32)
    heads = config.layer_types.count(LINEAR_ATTENTION) * config.linear_num_heads
    kda = heads * (6 * tokens * dim**2 + 3 * tokens * CHUNK_SIZE * dim + tokens * CHUNK_SIZE**2)
    assert flops.mixing == mla + kda
    # What the CPU's path spends inside chunks: two triangles of scores, one square times values, and a solve
    # that the counter does not see.
    inside = heads * (2 * tokens * (chunked.CHUNK_SIZE - 1) * dim + 2 * tokens * chunked.CHUNK_SIZE * dim)
    seen_of_kda = heads * 6 * tokens * dim**2 + inside
    elsewhere = flops.total - flops.mixing - unseen(config, tokens)
    assert counted(config, lengths) == elsewhere + 2 * mla + seen_of_kda


def test_a_backward_pass_costs_two_forward_passes() -> None:
    config = shape("mla")
    assert counted(config, [256], backward=True) == 3 * counted(config, [256])
    assert training_flops(config, [256]).total == 3 * forward_flops(config, [256]).total


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_generation_counts_each_decoding_step_with_what_it_has_kept(architecture: str) -> None:
    config = shape(architecture)
    model = KimiLinearForCausalLM(config).eval()
    prompt, completion, batch = 64, 5, 2
    seen = 0
    _, cache = model.prefill(
        torch.randint(0, config.vocab_size, (batch * prompt,)), torch.arange(batch + 1) * prompt
    )
    for _ in range(completion - 1):
        with FlopCounterMode(display=False) as counter:
            model.decode(torch.randint(0, config.vocab_size, (batch,)), cache)
        seen += counter.get_total_flops()
    steps = completion - 1
    decoding = generation_flops(config, prompt, completion).total - generation_flops(config, prompt, 1).total
    # The counter does not see convolutions, decays (d^2 a head) and rank-one updates (2 d^2).
    kda = config.layer_types.count(LINEAR_ATTENTION) * config.linear_num_heads
    hidden_from_it = unseen(config, steps) + kda * 3 * config.linear_head_dim**2 * steps
    assert seen == batch * (decoding - hidden_from_it)


def test_the_head_counts_the_tokens_that_it_predicts() -> None:
    config = shape("hybrid")
    few, all_of_them = forward_flops(config, [50], predicted=7), forward_flops(config, [50])
    assert few.head == 7 * 2 * config.hidden_size * config.vocab_size
    assert all_of_them.head == 50 * few.head / 7
    assert few.projections == all_of_them.projections
    assert generation_flops(config, 50, 0).total == 0
    assert generation_flops(config, 50, 1) == forward_flops(config, [50], predicted=1)


def test_a_long_sequence_costs_the_released_hybrid_less_than_its_twin_and_a_short_one_no_less() -> None:
    hybrid = preset("48b-a3b")
    twin = mla_twin(hybrid)

    def mixing(config: KimiLinearConfig, tokens: int) -> float:
        return forward_flops(config, [tokens]).mixing

    # 6 d^2 + 3 C d + C^2 = T (192 + 128) at T = 398 for the released heads.
    assert mixing(hybrid, 390) > mixing(twin, 390)
    assert mixing(hybrid, 410) < mixing(twin, 410)
    # 3B activated parameters, two operations each.
    per_token = forward_flops(hybrid, [1]).total
    assert 5e9 < per_token < 7e9
    assert mixing(twin, 1 << 20) / mixing(hybrid, 1 << 20) == pytest.approx(27 / 7, rel=0.01)


def test_counts_add_and_scale_by_part() -> None:
    one = Flops(1.0, 2.0, 3.0, 4.0)
    assert one + one == one * 2 == Flops(2.0, 4.0, 6.0, 8.0)
    assert one.total == 10
