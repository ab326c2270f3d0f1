"""CE-LoRA: exact where it says so, the paper's formula where it approximates, plain LoRA on disk."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.adapters.approximation import approximated_linear
from rlscale.adapters.celora import (
    CELoraConfig,
    CELoraLinear,
    celora_layers,
    celora_state,
    count_steps,
    load_celora_state,
    optimizer_stepped,
)
from rlscale.adapters.defaults import PAPER_KEEP_RATIOS, TARGET_MODULES
from rlscale.adapters.selection import (
    inclusion_probabilities,
    sample_channels,
    share_budget,
    top_channels,
)

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_seed() -> None:
    print("torch.manual_seed:", torch.seed())


class TwoLayers(nn.Module):
    """The first layer sees the gradient that the second, `v_proj`, passes down."""

    def __init__(self, inputs: int = 12, hidden: int = 20, outputs: int = 16, bias: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, hidden, bias=bias)
        self.v_proj = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.v_proj(self.q_proj(x))


def two_layers(dtype: torch.dtype = torch.float32, bias: bool = False, **options: Any) -> PeftModel:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "keep_ratios": {"v_proj": 0.3},
    }
    model = get_peft_model(TwoLayers(bias=bias).to(dtype), CELoraConfig(**(settings | options)))
    return randomise(model)


def randomise(model: PeftModel) -> PeftModel:
    """B is zero at first, which would hide half of the gradients."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def layer_of(model: PeftModel) -> CELoraLinear:
    return next(m for m in model.modules() if isinstance(m, CELoraLinear))


def measure_and_choose(model: nn.Module, run: Callable[[], torch.Tensor]) -> None:
    run().square().sum().backward()
    optimizer_stepped(model)
    model.zero_grad()


def llama(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **(sizes | changes)))


def kimi() -> KimiLinearForCausalLM:
    return KimiLinearForCausalLM(preset("tiny", {"hidden_size": 32, "intermediate_size": 48}))


MODELS = {"llama": llama, "kimi": kimi}


def step(model: PeftModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def adamw(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


# What is exact


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [8, 6])
def test_loras_own_gradients_are_those_of_peft_given_the_incoming_gradient(bias: bool, alpha: int) -> None:
    ours = two_layers(bias=bias, lora_alpha=alpha, rank_pattern={"v_proj": 4})
    theirs = get_peft_model(
        TwoLayers(bias=bias), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 12)
    measure_and_choose(ours, lambda: ours(x))
    for model in (ours, theirs):
        hidden = torch.randn(9, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        dy = torch.randn(9, 16, generator=torch.Generator().manual_seed(2))
        model.base_model.model.v_proj(hidden).backward(dy)
    mine, plain = layer_of(ours), theirs.base_model.model.v_proj
    for part in ("lora_A", "lora_B"):
        found, expected = (
            getattr(mine, part)["default"].weight.grad,
            getattr(plain, part)["default"].weight.grad,
        )
        if alpha == 8:  # a scaling of 2: the same bits
            assert torch.equal(found, expected), part
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradcheck_passes_with_all_channels_kept() -> None:
    model = two_layers(torch.float64, keep_ratios={"v_proj": 1.0})
    measure_and_choose(model, lambda: model(torch.randn(7, 12, dtype=torch.float64)))
    layer = layer_of(model)
    approximation = layer.celora["default"]
    assert not approximation.measuring
    assert len(approximation.channels) == 16

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return approximated_linear(x, layer.get_base_layer().weight, None, a, b, 2.0, approximation)

    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *(w.detach().clone().requires_grad_() for w in leaves)))


@pytest.mark.parametrize("name", MODELS)
def test_the_first_step_is_exact_and_the_next_is_not(name: str) -> None:
    base = MODELS[name]()
    plain = LoraConfig(r=8, lora_alpha=16, target_modules=SEVEN)
    ids = torch.randint(3, 40, (2, 11))
    ours = randomise(
        get_peft_model(copy.deepcopy(base), CELoraConfig(r=8, lora_alpha=16, target_modules=SEVEN))
    )
    ranks = {"rank_pattern": ours.peft_config["default"].rank_pattern}
    ranks["alpha_pattern"] = ours.peft_config["default"].alpha_pattern
    for key, value in ranks.items():
        setattr(plain, key, value)
    theirs = get_peft_model(base, plain)
    theirs.load_state_dict(ours.state_dict())

    def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    first, expected = gradients(ours), gradients(theirs)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-6)
    optimizer_stepped(ours)
    then = gradients(ours)
    # The gradient is made from the head down: the last layer's down_proj gets an exact one still.
    exact = [n for n in then if torch.allclose(then[n], expected[n], rtol=1e-3, atol=1e-6)]
    assert any("layers.1.mlp.down_proj" in n or "layers.3.mlp.down_proj" in n for n in exact)
    assert any("layers.0" in n for n in then.keys() - set(exact))


@pytest.mark.parametrize("selection", ["top", "sampled"])
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.7])
def test_the_input_gradient_is_the_papers_formula(keep: float, selection: str) -> None:
    model = two_layers(torch.float64, keep_ratios={"v_proj": keep}, frozen_rank=3, selection=selection)
    x = torch.randn(3, 5, 20, dtype=torch.float64, requires_grad=True)
    measure_and_choose(model, lambda: model(torch.randn(8, 12, dtype=torch.float64)))
    layer = layer_of(model)
    approximation = layer.celora["default"]
    dy = torch.randn(3, 5, 16, dtype=torch.float64)
    layer(x).backward(dy)
    weight = layer.get_base_layer().weight
    frozen_B, frozen_A, channels = approximation.frozen_B, approximation.frozen_A, approximation.channels
    assert torch.equal(channels, channels.unique())
    kept = dy[..., channels] if approximation.weights is None else dy[..., channels] * approximation.weights
    expected = dy @ frozen_B @ frozen_A + kept @ (weight[channels] - frozen_B[channels] @ frozen_A)
    expected = expected + dy @ layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)


def test_the_frozen_part_is_the_best_of_its_rank() -> None:
    model = two_layers(torch.float64, frozen_rank=5)
    layer = layer_of(model)
    weight = layer.get_base_layer().weight.detach()
    approximation = layer.celora["default"]
    before = torch.get_rng_state()
    approximation.factorise(weight)
    assert torch.equal(before, torch.get_rng_state())
    error = (weight - approximation.frozen_B @ approximation.frozen_A).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[5:].norm())


# Defects of the published code


def test_the_choice_depends_on_the_gradient_and_not_on_the_weights_alone() -> None:
    model = two_layers(keep_ratios={"v_proj": 4 / 16})
    layer = layer_of(model)
    x = torch.randn(64, 20, requires_grad=True)
    chosen = []
    for loud in ((1, 5, 7, 11), (0, 2, 8, 15)):
        dy = 0.01 * torch.randn(64, 16)
        # Columns whose entries cancel: their sum is nothing, their norm is what counts.
        dy[:, loud] += torch.where(torch.arange(64) % 2 == 0, 3.0, -3.0)[:, None]
        layer.celora["default"].measuring = True
        layer(x).backward(dy)
        optimizer_stepped(model)
        chosen.append(layer.celora["default"].channels.tolist())
    assert chosen == [[1, 5, 7, 11], [0, 2, 8, 15]]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_refreshes_are_counted_in_optimizer_steps(checkpointing: bool | None, accumulation: int) -> None:
    config = CELoraConfig(r=4, lora_alpha=8, target_modules=SEVEN, refresh_every=3)
    model = get_peft_model(llama(), config)
    model.train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    optimizer = adamw(model)
    count_steps(model, optimizer)
    refreshed, before = [], None
    for number in range(7):
        for _ in range(accumulation):
            ids = torch.randint(40, (2, 9))
            model(input_ids=ids, labels=ids).loss.backward()
        layers = list(celora_layers(model))
        assert {a.measuring for _, a, _ in layers} == {number % 3 == 0}
        optimizer.step()
        optimizer.zero_grad()
        now = [id(a.channels) for _, a, _ in layers]
        if now != before:
            refreshed.append(number)
        before = now
    assert refreshed == [0, 3, 6]


def test_accumulated_batches_are_measured_together() -> None:
    model = two_layers()
    layer = layer_of(model)
    gradients = [torch.randn(5, 16), torch.randn(3, 16)]
    for dy in gradients:
        layer(torch.randn(len(dy), 20, requires_grad=True)).backward(dy)
    torch.testing.assert_close(layer.celora["default"].squares, torch.cat(gradients).square().sum(0))


def test_a_modules_ratio_and_rank_are_its_own() -> None:
    ratios = {r"layers\.1\.mlp\.up_proj": 0.25, "up_proj": 0.75, "down_proj": 1.0}
    config = CELoraConfig(
        r=8, lora_alpha=16, target_modules=SEVEN, keep_ratios=ratios, frozen_rank_pattern={"down_proj": 2}
    )
    model = get_peft_model(llama(), config)
    ids = torch.randint(40, (2, 9))
    measure_and_choose(model, lambda: model(input_ids=ids).logits)
    kept = {layer.module_name: len(a.channels) for layer, a, _ in celora_layers(model)}
    ranks = {layer.module_name: len(a.frozen_A) for layer, a, _ in celora_layers(model)}
    prefix = "model.layers."
    assert kept == {
        f"{prefix}0.mlp.up_proj": 36,
        f"{prefix}1.mlp.up_proj": 12,
        f"{prefix}0.mlp.down_proj": 32,
        f"{prefix}1.mlp.down_proj": 32,
    }
    assert {name.rpartition(".")[2]: rank for name, rank in ranks.items()} == {"up_proj": 7, "down_proj": 2}


def test_a_config_leaves_the_patterns_it_was_given_as_they_were() -> None:
    ranks, alphas = {"q_proj": 3}, {"v_proj": 5.0}
    config = CELoraConfig(r=8, lora_alpha=16, rank_pattern=ranks, alpha_pattern=alphas)
    assert (ranks, alphas) == ({"q_proj": 3}, {"v_proj": 5.0})
    assert config.rank_pattern == {"q_proj": 3} | dict.fromkeys(PAPER_KEEP_RATIOS, 7)
    assert config.alpha_pattern == dict.fromkeys(PAPER_KEEP_RATIOS, 14.0) | alphas


def test_defaults_are_the_papers() -> None:
    model = get_peft_model(llama(), CELoraConfig(r=8, lora_alpha=16, target_modules=SEVEN))
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            last = name.rpartition(".")[2]
            is_approximated = last in PAPER_KEEP_RATIOS
            assert isinstance(module, CELoraLinear) == is_approximated
            assert module.r["default"] == (7 if is_approximated else 8)
            assert module.scaling["default"] == 2.0


def saved_bytes(model: nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of what a forward pass saves, the model's own weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)
    y.sum().backward()
    return sorted(shapes)


def test_nothing_is_saved_that_no_gradient_needs() -> None:
    model = two_layers(r=4, rank_pattern={"v_proj": 4})
    layer = layer_of(model)
    x = torch.randn(9, 20, requires_grad=True)
    # x for the gradient of A, x A^T for that of B: what plain LoRA saves too.
    assert saved_bytes(layer, x) == [(9, 4), (9, 20)]
    layer.lora_A["default"].weight.requires_grad_(False)
    assert saved_bytes(layer, x) == [(9, 4)]
    layer.lora_B["default"].weight.requires_grad_(False)
    assert saved_bytes(layer, x) == []


def test_a_layer_keeps_its_frozen_factors_and_a_few_vectors() -> None:
    model = two_layers(frozen_rank=3)
    measure_and_choose(model, lambda: model(torch.randn(8, 12)))
    shapes = {name: tuple(b.shape) for name, b in layer_of(model).celora.named_buffers()}
    assert shapes == {"default.frozen_B": (16, 3), "default.frozen_A": (3, 20), "default.channels": (5,)}


# Selection


def test_inclusion_probabilities_sum_to_the_sample_and_follow_the_scores() -> None:
    for scores in (torch.rand(50), torch.rand(50).pow(8), torch.zeros(50), torch.eye(50)[3] * 1e6):
        for keep in (1, 7, 49, 50):
            p = inclusion_probabilities(scores, keep)
            assert p.sum().item() == pytest.approx(keep)
            assert bool(((p > 0) & (p <= 1 + 1e-12)).all())
            order = scores.argsort()
            assert bool((p[order].diff() >= -1e-9).all())


def test_samples_are_distinct_sorted_and_as_frequent_as_their_probabilities() -> None:
    p = inclusion_probabilities(torch.rand(40).pow(3), 12)
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    counts = torch.zeros(40)
    draws = 4000
    for _ in range(draws):
        channels = sample_channels(p, 12, generator)
        assert len(channels) == 12
        assert bool((channels.diff() > 0).all())
        counts[channels] += 1
    deviation = (counts / draws - p).abs() / (p * (1 - p) / draws).sqrt().clamp(min=1e-4)
    assert deviation.max() < 5


def test_the_sampled_gradient_is_unbiased_with_the_variance_of_its_probabilities() -> None:
    """The mean of many draws is the exact product; the variance is at most that of independent draws with the
    same probabilities times a little, and the biased choice misses the product by far more than the mean."""
    model = two_layers(torch.float64, keep_ratios={"v_proj": 0.4}, selection="sampled", frozen_rank=2)
    measure_and_choose(model, lambda: model(torch.randn(8, 12, dtype=torch.float64)))
    layer = layer_of(model)
    approximation, weight = layer.celora["default"], layer.get_base_layer().weight
    dy = torch.randn(6, 16, dtype=torch.float64)
    exact = dy @ weight
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
    draws = []
    for _ in range(3000):
        approximation.sample(generator)
        draws.append(approximation.input_gradient(dy, weight, None, None)[0])
    found = torch.stack(draws)
    variance = (found - exact).square().sum((1, 2)).mean()
    p = approximation.probabilities
    residual = weight - approximation.frozen_B @ approximation.frozen_A
    independent = ((1 - p) / p * dy.square().sum(0) * residual.square().sum(1)).sum()
    assert variance < 1.5 * independent
    assert (found.mean(0) - exact).square().sum() < 10 * variance / len(draws)
    top = top_channels((dy.square().sum(0) * residual.square().sum(1)).sqrt(), len(approximation.channels))
    left_out = torch.ones(16, dtype=torch.bool).index_fill(0, top, False)
    bias = (dy[:, left_out] @ residual[left_out]).square().sum()
    assert bias > 10 * (found.mean(0) - exact).square().sum()


def test_draws_change_from_step_to_step_and_repeat_with_the_seed() -> None:
    base, x = TwoLayers(), torch.randn(8, 12)

    def draws(seed: int) -> list[list[int]]:
        config = CELoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            keep_ratios={"v_proj": 0.4},
            selection="sampled",
            seed=seed,
        )
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config)
        seen = []
        for _ in range(4):
            model(x).square().sum().backward()
            optimizer_stepped(model)
            seen.append(layer_of(model).celora["default"].channels.tolist())
        return seen

    assert draws(0) == draws(0)
    assert draws(0) != draws(1)
    assert len({tuple(channels) for channels in draws(0)}) > 1


def test_a_shared_budget_is_spent_where_it_gains_most_and_never_exceeded() -> None:
    gains = [torch.tensor([9.0, 8.0, 7.0, 6.0]), torch.tensor([5.0, 0.1, 0.1, 0.1])]
    assert share_budget(gains, costs=[1, 1], budgets=[2, 2]) == [3, 1]
    assert share_budget(gains, costs=[1, 1], budgets=[4, 4]) == [4, 4]
    for _ in range(50):
        sizes = torch.randint(2, 30, (4,)).tolist()
        gains = [torch.rand(size).pow(4) * 10 ** float(torch.randn(())) for size in sizes]
        costs = torch.randint(1, 100, (4,)).tolist()
        budgets = [int(torch.randint(1, size + 1, ())) for size in sizes]
        shared = share_budget(gains, costs, budgets)
        assert all(1 <= n <= size for n, size in zip(shared, sizes, strict=True))
        spent = sum(n * c for n, c in zip(shared, costs, strict=True))
        assert spent <= max(sum(costs), sum(b * c for b, c in zip(budgets, costs, strict=True)))


def test_adaptive_layers_share_the_budget_of_all() -> None:
    config = CELoraConfig(
        r=4, target_modules=SEVEN, keep_ratios=dict.fromkeys(SEVEN, 0.25), adaptive=True, frozen_rank=2
    )
    model = get_peft_model(llama(), config)
    ids = torch.randint(40, (2, 9))
    measure_and_choose(model, lambda: model(input_ids=ids).logits)
    layers = [(layer, a) for layer, a, _ in celora_layers(model) if a.channels is not None]
    kept = [len(a.channels) / layer.out_features for layer, a in layers]
    cost = sum(len(a.channels) * layer.in_features for layer, a in layers)
    budget = sum(-(-layer.out_features // 4) * layer.in_features for layer, _ in layers)
    assert 0.95 * budget < cost <= budget
    assert max(kept) > min(kept) + 0.05


def test_a_gradient_that_is_not_finite_is_measured_again() -> None:
    model = two_layers(refresh_every=100)
    layer = layer_of(model)
    approximation = layer.celora["default"]
    x = torch.randn(4, 20, requires_grad=True)
    layer(x).backward(torch.full((4, 16), torch.inf))
    optimizer_stepped(model)
    assert approximation.channels is None
    layer(x).backward(torch.randn(4, 16))
    optimizer_stepped(model)
    assert approximation.channels is not None
    assert layer(torch.randn(2, 20)).isfinite().all()


# PEFT


@pytest.mark.parametrize("name", MODELS)
def test_training_saves_merges_and_loads_as_plain_lora(name: str, tmp_path: Path) -> None:
    base = MODELS[name]()
    frozen = copy.deepcopy(base)
    config = CELoraConfig(r=8, lora_alpha=16, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    optimizer = adamw(model)
    count_steps(model, optimizer)
    ids = torch.randint(3, 40, (3, 12))
    losses = [step(model, optimizer, ids) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (
        not {"keep_ratios", "frozen_rank", "refresh_every", "selection", "adaptive", "seed"} & written.keys()
    )
    loaded = PeftModel.from_pretrained(frozen, tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert not any(isinstance(m, CELoraLinear) for m in loaded.modules())
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_disk_is_loaded_in_a_process_that_lacks_this_package(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, CELoraConfig(r=4, target_modules=SEVEN)))
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    torch.save(model(input_ids=ids).logits, tmp_path / "logits.pt")
    program = """
import sys, torch
sys.modules["rlscale"] = None
from peft import PeftModel
from transformers import LlamaForCausalLM
model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
found = model(input_ids=torch.arange(8)[None]).logits
torch.testing.assert_close(found, torch.load("logits.pt"))
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_merged_disabled_and_deleted_adapters_behave_as_pefts() -> None:
    model = two_layers()
    x = torch.randn(5, 12)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.set_adapter("other")
    assert not list(celora_layers(model))
    model.set_adapter("default")
    model.delete_adapter("default")
    assert not list(celora_layers(model))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_dropout_bias_and_wider_adapters_compute_what_peft_computes(dropout: float, lora_bias: bool) -> None:
    options = {"lora_dropout": dropout, "lora_bias": lora_bias, "rank_pattern": {"v_proj": 4}}
    ours = two_layers(torch.bfloat16, bias=True, **options)
    plain = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, lora_bias=lora_bias
    )
    theirs = get_peft_model(TwoLayers(bias=True).bfloat16(), plain)
    theirs.load_state_dict(ours.state_dict())
    assert layer_of(ours).lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(9, 12, dtype=torch.bfloat16)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        y = model(x)
        y.float().square().sum().backward()
        results.append((y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


def test_autocast_computes_in_its_dtype() -> None:
    model = two_layers()
    x = torch.randn(9, 12)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        optimizer_stepped(model)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_loaded_state_goes_on_as_if_nothing_had_happened() -> None:
    x = torch.randn(8, 12)
    model = two_layers(selection="sampled", refresh_every=4)
    other = copy.deepcopy(model)

    def run(of: PeftModel, steps: int) -> list[list[int]]:
        seen = []
        for _ in range(steps):
            of(x).square().sum().backward()
            optimizer_stepped(of)
            seen.append(layer_of(of).celora["default"].channels.tolist())
        return seen

    run(model, 3)
    load_celora_state(other, celora_state(model))
    assert run(other, 5) == run(model, 5)
    with pytest.raises(ValueError, match="no CE-LoRA layer of this model"):
        load_celora_state(other, {"z_proj.steps": torch.tensor(1)})
    with pytest.raises(ValueError, match="'v_proj' is missing"):
        load_celora_state(other, {})


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratios": {"v_proj": 0.0}}, r"keep_ratios\['v_proj'\] = 0.0 must be in \(0, 1\]"),
        ({"keep_ratios": {"v_proj": 1.5}}, r"keep_ratios\['v_proj'\] = 1.5 must be in \(0, 1\]"),
        ({"refresh_every": 0}, "refresh_every = 0 must be at least 1"),
        ({"selection": "best"}, "selection = 'best' must be 'top' or 'sampled'"),
        ({"frozen_rank": 0}, "frozen_rank = 0 must be at least 1"),
        ({"frozen_rank": 17}, r"frozen rank 17 is larger than v_proj's \[16, 20\]"),
        ({"r": 64}, r"LoRA rank 56 is larger than v_proj's \[16, 20\]"),
    ],
)
def test_a_setting_out_of_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_layers(**options)


def test_layers_that_cannot_be_approximated_are_refused_by_name() -> None:
    def attach(base: nn.Module, ratios: dict[str, float] | None = None) -> None:
        get_peft_model(
            base,
            CELoraConfig(
                r=2, target_modules=list(ratios or ["v_proj"]), keep_ratios=ratios or {"v_proj": 0.5}
            ),
        )

    class Quantised(nn.Linear):
        pass

    base = TwoLayers()
    base.v_proj = Quantised(20, 16)
    with pytest.raises(ValueError, match=r"v_proj is a Quantised, CE-LoRA needs an nn\.Linear: leave it out"):
        attach(base)
    base = TwoLayers()
    base.v_proj.weight = nn.Parameter(torch.zeros(16, 20, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="v_proj has a quantised weight"):
        attach(base)
    with pytest.raises(ValueError, match="lm_head shares its weight with another module"):
        attach(llama(tie_word_embeddings=True), {"lm_head": 0.5})
    attach(llama(), {"lm_head": 0.5})
    thawed = two_layers()
    layer_of(thawed).get_base_layer().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="v_proj: CE-LoRA needs a frozen base weight"):
        thawed(torch.randn(2, 12))


# The kernel, under Triton's interpreter, which Triton chooses when it is imported


def test_the_kernel_gathers_into_a_slice() -> None:
    program = """
import torch
from rlscale.adapters.triton_gather import gather_channels
sizes = ((70, 130, 17, (16, 64)), (33, 600, 300, (8, 128)), (1, 5, 5, (16, 256)), (40, 64, 1, (4, 16)))
for rows, wide, kept, block in sizes:
    for dtype in (torch.float32, torch.float16, torch.float64):
        source = torch.randn(rows, wide).to(dtype)
        channels = torch.randperm(wide)[:kept].sort().values
        out = torch.full((rows, kept + 9), float("nan"), dtype=dtype)
        gather_channels(source, channels, out[:, 3 : 3 + kept], block)
        assert torch.equal(out[:, 3 : 3 + kept], source[:, channels])
        assert out[:, :3].isnan().all() and out[:, 3 + kept :].isnan().all()
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
