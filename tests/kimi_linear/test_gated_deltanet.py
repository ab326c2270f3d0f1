"""Gated DeltaNet, a case of the KDA layer: against a scalar-gate recurrence, in models, files and counts."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_models import random_model, relative_error

from kimi_linear.checkpoint import CheckpointError, read_config, released_config, save_checkpoint
from kimi_linear.config import gated_deltanet_twin, mla_twin, parameter_count, preset
from kimi_linear.flops import forward_flops
from kimi_linear.layers import KimiDeltaAttention, PackedSequences
from kimi_linear.model import KimiLinearForCausalLM
from kimi_linear.ops import l2_normalize, short_convolution

SCALAR = {"linear_attention_type": "gated_deltanet"}


def scalar_gate_recurrence(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence [T, D] through the layer in float64, the state decaying by one number a head
    (arXiv:2412.06464, equation 10)."""
    cu_seqlens = torch.tensor([0, len(x)])
    convolutions = (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
    q, k, v = (
        short_convolution(projection(x), filters.weight.squeeze(1), cu_seqlens).unflatten(
            1, (layer.heads, -1)
        )
        for projection, filters in zip((layer.q_proj, layer.k_proj, layer.v_proj), convolutions, strict=True)
    )
    q, k = l2_normalize(q) * layer.head_dim**-0.5, l2_normalize(k)
    alpha = torch.exp(-layer.A_log.flatten().exp() * F.softplus(layer.a_proj(x) + layer.dt_bias))
    beta = layer.b_proj(x).sigmoid()
    outputs = torch.empty_like(v)
    for h in range(layer.heads):
        state = x.new_zeros(layer.head_dim, layer.head_dim)
        for t in range(len(x)):
            erased = torch.eye(layer.head_dim).to(x) - beta[t, h] * torch.outer(k[t, h], k[t, h])
            state = alpha[t, h] * erased @ state + beta[t, h] * torch.outer(k[t, h], v[t, h])
            outputs[t, h] = state.t() @ q[t, h]
    normed = outputs * torch.rsqrt(outputs.square().mean(-1, keepdim=True) + layer.o_norm.eps)
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(1, (layer.heads, -1)).sigmoid()
    return layer.o_proj((normed * layer.o_norm.weight * gate).flatten(1))


def test_the_layer_is_a_recurrence_whose_decay_is_one_number_a_head() -> None:
    model = random_model(preset("tiny", SCALAR))
    layer = model.model.layers[0].self_attn
    with torch.no_grad():  # decays from almost none to almost all, of both signs before the softplus
        layer.a_proj.weight.mul_(50)
    lengths = [1, 70, 33]
    x = torch.randn(sum(lengths), 128)
    o = layer(x, PackedSequences.checked(torch.tensor([0, *lengths]).cumsum(0), len(x)))
    exact = KimiDeltaAttention(model.config).double()
    exact.load_state_dict(layer.state_dict())
    expected = torch.cat([scalar_gate_recurrence(exact, part) for part in x.double().split(lengths)])
    assert relative_error(o.double(), expected) < 1e-5


def test_prefill_and_decode_equal_the_whole_forward_with_a_scalar_gate() -> None:
    model = random_model(preset("tiny", SCALAR)).eval()
    ids = torch.randint(1, 128, (2, 40))
    whole = model(ids).logits
    logits, cache = model.prefill(ids[:, :25].flatten(), torch.tensor([0, 25, 50]))
    for t in range(25, 40):
        assert relative_error(logits, whole[:, t - 1]) < 1e-5
        logits = model.decode(ids[:, t], cache)


def test_a_checkpoint_keeps_the_kind_of_linear_attention(tmp_path: Path) -> None:
    model = random_model(preset("tiny", SCALAR)).eval()
    save_checkpoint(model, tmp_path / "scalar")
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "scalar")
    ids = torch.randint(1, 128, (1, 20))
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert read_config(tmp_path / "scalar").linear_attention_type == "gated_deltanet"
    # The released layout says nothing of it and its tensors are KDA's.
    assert "linear_attention_type" not in released_config(preset("tiny"))
    save_checkpoint(random_model(preset("tiny")), tmp_path / "kda")
    (tmp_path / "kda" / "config.json").write_bytes((tmp_path / "scalar" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"dt_bias has shape \[128\]; the model needs \[4\]"):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "kda")


@pytest.mark.parametrize("name", ["tiny", "small", "48b-a3b"])
def test_parameters_are_counted_and_the_twin_matches_kdas_within_one_percent(name: str) -> None:
    kda, plain, twin = preset(name), preset(name, SCALAR), gated_deltanet_twin(preset(name))
    for config in (plain, twin, mla_twin(plain)):
        with torch.device("meta"):
            model = KimiLinearForCausalLM(config)
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config).total
    heads, dim, hidden = kda.linear_num_heads, kda.linear_head_dim, kda.hidden_size
    layer = (hidden + heads * dim) * dim + heads * dim - (hidden * heads + heads)
    layers = kda.layer_types.count("linear_attention")
    assert parameter_count(kda).total - parameter_count(plain).total == layers * layer
    total = parameter_count(kda).total
    assert abs(parameter_count(twin).total - total) <= 0.01 * total
    assert (twin.layer_types, twin.linear_attention_type) == (kda.layer_types, "gated_deltanet")


def test_only_the_projection_of_the_decay_costs_less() -> None:
    kda, scalar = forward_flops(preset("tiny"), [64]), forward_flops(preset("tiny", SCALAR), [64])
    assert (kda.mixing, kda.feed_forward, kda.head) == (scalar.mixing, scalar.feed_forward, scalar.head)
    assert kda.projections - scalar.projections == 2 * 64 * 3 * ((128 + 128) * 32 - 128 * 4)


def test_an_unknown_kind_is_refused() -> None:
    message = "linear_attention_type must be kda or gated_deltanet, got 'mamba2'"
    with pytest.raises(ValueError, match=message):
        preset("tiny", {"linear_attention_type": "mamba2"})
    config = preset("tiny")
    config.linear_attention_type = "mamba2"
    with pytest.raises(ValueError, match=message):
        KimiLinearForCausalLM(config)
