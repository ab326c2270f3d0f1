"""Presets, the all-MLA twin and the accounting of parameters and cache."""

import pytest
import torch
from transformers import KimiLinearForCausalLM as TransformersKimiLinear

from kimi_linear.config import (
    PRESETS,
    break_even_tokens,
    cache_size,
    mla_twin,
    parameter_count,
    preset,
    uses_rope,
)
from kimi_linear.model import KimiLinearForCausalLM

MOE = {"num_experts": 6, "num_experts_per_token": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 256}


def test_the_released_model_has_its_published_size() -> None:
    count = parameter_count(preset("48b-a3b"))
    assert count.total == 49_122_675_072
    assert count.activated == 3_484_453_248


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_models_built_on_the_meta_device(name: str) -> None:
    config = preset(name)
    for model_class in (KimiLinearForCausalLM, TransformersKimiLinear):
        with torch.device("meta"):
            model = model_class(preset(name))
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config).total
    with torch.device("meta"):
        twin = KimiLinearForCausalLM(mla_twin(config))
    assert sum(p.numel() for p in twin.parameters()) == parameter_count(mla_twin(config)).total


def test_activated_parameters_leave_out_the_experts_a_token_does_not_see() -> None:
    config = preset("tiny", MOE)
    count = parameter_count(config)
    assert count.total - count.activated == 3 * (6 - 2) * 3 * 128 * 256


@pytest.mark.parametrize("overrides", [{}, MOE, {"num_hidden_layers": 7, "full_attention_layers": [2, 7]}])
@pytest.mark.parametrize("name", PRESETS)
def test_the_twin_is_all_mla_and_matches_parameters_within_one_percent(
    name: str, overrides: dict[str, object]
) -> None:
    config = preset(name, overrides)
    for position in ("rope", "nope"):
        twin = mla_twin(config, position)  # type: ignore[arg-type]
        assert set(twin.layer_types) == {"full_attention"}
        assert uses_rope(twin) == (position == "rope")
        hybrid_total = parameter_count(config).total
        assert abs(parameter_count(twin).total - hybrid_total) <= 0.01 * hybrid_total
        assert twin.mlp_layer_types == config.mlp_layer_types
    assert not uses_rope(config)


def test_the_released_models_cache_breaks_even_near_1900_tokens() -> None:
    hybrid, twin = cache_size(preset("48b-a3b")), cache_size(mla_twin(preset("48b-a3b")))
    assert (hybrid.bytes_per_token, hybrid.bytes_per_sequence) == (8_064, 43_417_600)
    assert (twin.bytes_per_token, twin.bytes_per_sequence) == (31_104, 0)
    tokens = break_even_tokens(hybrid, twin)
    assert 1_884 < tokens < 1_885
    assert hybrid.at(1_884) > twin.at(1_884)
    assert hybrid.at(1_885) < twin.at(1_885)
    assert break_even_tokens(twin, twin) == float("inf")


def test_cache_size_follows_the_dtypes() -> None:
    config = preset("tiny")
    size = cache_size(config, torch.float32, torch.float32, torch.float32)
    assert size.bytes_per_token == 80 * 4
    assert size.bytes_per_sequence == 3 * (4 * 32 * 32 + 3 * 3 * 128) * 4


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("huge", {}, "no preset 'huge'; there are tiny, small, 48b-a3b"),
        ("tiny", {"hidden": 64}, "no model setting hidden; there are .*hidden_size"),
        ("tiny", {"hidden_size": "64"}, "hidden_size must be int, got '64'"),
        ("tiny", {"hidden_size": True}, "hidden_size must be int, got True"),
        ("tiny", {"full_attention_layers": [5]}, r"must lie in 1..4, got \[5\]"),
    ],
)
def test_a_wrong_preset_or_setting_is_refused(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(name, overrides)


def test_settings_that_the_model_lacks_are_refused() -> None:
    config = preset("tiny")
    config.q_lora_rank = 32
    with pytest.raises(ValueError, match="q_lora_rank = 32; this model needs None"):
        KimiLinearForCausalLM(config)
    odd = mla_twin(preset("tiny", {"qk_rope_head_dim": 15}))
    with pytest.raises(ValueError, match="must be even for RoPE, got 15"):
        KimiLinearForCausalLM(odd)
