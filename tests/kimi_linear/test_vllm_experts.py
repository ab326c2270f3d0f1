"""Experts on a GPU go to vLLM's grouped kernels, which must be given what the CPU's way takes one by one."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.layers import fused_moe

from kimi_linear.vllm_plugin.feed_forward import SparseMoE

pytestmark = pytest.mark.vllm


def as_vllm_documents(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """What `fused_experts` computes: gate rows before up rows in w1, outputs weighed and summed."""
    assert topk_ids.dtype == torch.int32
    assert topk_weights.dtype == torch.float32
    out = torch.zeros_like(hidden_states)
    for token, (weights, experts) in enumerate(zip(topk_weights, topk_ids.tolist(), strict=True)):
        for weight, expert in zip(weights, experts, strict=True):
            gate, up = (w1[expert] @ hidden_states[token]).chunk(2)
            out[token] += weight * (w2[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize(("groups", "top_groups"), [(1, 1), (4, 2)])
def test_the_grouped_kernel_is_given_the_experts_that_the_cpu_takes_one_by_one(
    monkeypatch: pytest.MonkeyPatch, groups: int, top_groups: int
) -> None:
    torch.manual_seed(torch.seed())
    experts, top_k, intermediate, hidden = 8, 3, 5, 6
    layer = SimpleNamespace(
        experts=experts,
        top_k=top_k,
        share=intermediate,
        hidden=hidden,
        groups=groups,
        top_groups=top_groups,
        renormalize=True,
        scaling=2.446,
        gate_weight=torch.randn(experts, hidden),
        correction_bias=torch.randn(experts),
        gate_up=torch.randn(2 * experts, intermediate, hidden),
        down=torch.randn(experts, hidden, intermediate),
    )
    monkeypatch.setattr(fused_moe, "fused_experts", as_vllm_documents)
    for tokens in (1, 7):
        x = torch.randn(tokens, hidden)
        before = x.clone()
        chosen, weights = SparseMoE.route(layer, x)
        grouped = SparseMoE.fused(layer, x, chosen, weights)
        torch.testing.assert_close(grouped, SparseMoE.expert_by_expert(layer, x, chosen, weights))
        assert torch.equal(x, before)
