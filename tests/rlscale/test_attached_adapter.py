"""An adapter in the learner: what is trained, what is synced, what is saved."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_learner import draw_rollouts, shape

from kimi_linear.checkpoint import named_released_tensors
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.algorithms import GRPOConfig
from rlscale.config import CELoraAdapterConfig, LearnerConfig, LoraAdapterConfig, RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.learner.learner import Learner, LearnerSpec

LORA = LoraAdapterConfig(rank=4, alpha=8)
CELORA = CELoraAdapterConfig(rank=4, alpha=8, refresh_every=2, keep_ratios={"o_proj": 0.3, "up_proj": 0.3})
SAMPLED = CELORA.model_copy(update={"selection": "sampled"})
ADAPTERS = {"lora": LORA, "celora": CELORA, "sampled": SAMPLED}


def learner(
    adapter: LoraAdapterConfig | CELoraAdapterConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> Learner:
    config = LearnerConfig(
        adapter=adapter, learning_rate=1e-2, warmup_steps=0, gradient_checkpointing=checkpointing
    )
    return LearnerSpec(shape(), dtype).build(config, GRPOConfig(), seed)


def weights(of: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in of.named_weights()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_synced_weights_are_the_policy_and_only_adapted_ones_change(adapter: str) -> None:
    ours = learner(ADAPTERS[adapter])
    before = weights(ours)
    for number in range(3):
        metrics = ours.train_step(draw_rollouts(seed=random.randrange(1 << 30)), temperature=1.0)
        assert metrics["skipped"] == 0, number
    after = weights(ours)
    plain = KimiLinearForCausalLM(shape())
    assert after.keys() == dict(named_released_tensors(plain)).keys()
    plain.load_state_dict(after)
    ids, cu_seqlens = torch.randint(3, 30, (12,)), torch.tensor([0, 5, 12])
    torch.testing.assert_close(
        plain.packed_hidden_states(ids, cu_seqlens),
        ours.model.packed_hidden_states(ids, cu_seqlens),
        rtol=1e-4,
        atol=1e-4,
    )
    changed = {name.split(".")[-2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name.split(".")[-2] for name in after} & set(LORA.target_modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_loaded_adapter_continues_bit_for_bit(adapter: str, dtype: torch.dtype, tmp_path: Path) -> None:
    ours = learner(ADAPTERS[adapter], dtype=dtype)
    for number in range(3):
        ours.train_step(draw_rollouts(seed=number), temperature=1.0)
    ours.save(tmp_path)
    loaded = learner(ADAPTERS[adapter], dtype=dtype)
    loaded.train_step(draw_rollouts(seed=9), temperature=1.0)  # what it held before must not matter
    loaded.load(tmp_path)
    for number in range(3, 6):
        expected = ours.train_step(draw_rollouts(seed=number), temperature=1.0)
        found = loaded.train_step(draw_rollouts(seed=number), temperature=1.0)
        assert found["loss"] == expected["loss"]
        assert found["grad_norm"] == expected["grad_norm"]
    torch.testing.assert_close(weights(loaded), weights(ours), rtol=0, atol=0)


def test_a_checkpoint_is_the_merged_model_and_beside_it_an_adapter_of_pefts(tmp_path: Path) -> None:
    ours = learner(CELORA)
    base = weights(ours)
    ours.train_step(draw_rollouts(seed=1), temperature=1.0)
    ours.save(tmp_path)
    merged = KimiLinearForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(named_released_tensors(merged)), weights(ours), rtol=0, atol=0)
    plain = KimiLinearForCausalLM(shape())
    plain.load_state_dict(base)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    ids = torch.randint(3, 30, (1, 9))
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_takes_the_same_steps() -> None:
    plain, checkpointed = (learner(CELORA, checkpointing=on) for on in (False, True))
    for number in range(4):
        for each in (plain, checkpointed):
            each.train_step(draw_rollouts(seed=number), temperature=1.0)
    torch.testing.assert_close(weights(checkpointed), weights(plain), rtol=0, atol=1e-5)


def test_a_detached_adapter_leaves_the_model_trainable_as_before_it_came() -> None:
    ours = learner(LORA)
    ours._detach_adapter()
    assert all(parameter.requires_grad for parameter in ours.model.parameters())
    assert (
        dict(ours.model.named_parameters()).keys()
        == dict(KimiLinearForCausalLM(shape()).named_parameters()).keys()
    )
    ours._start_afresh()
    assert any("lora_A" in name for name, _ in ours.model.named_parameters())


def test_a_checkpoint_of_another_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    learner(LORA).save(tmp_path)
    with pytest.raises(UserError, match="its adapter has other ranks or layers"):
        learner(LORA.model_copy(update={"rank": 5})).load(tmp_path)
    with pytest.raises(UserError, match="its adapter is on other layers"):
        learner(LORA.model_copy(update={"target_modules": ["o_proj"]})).load(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is no learner's checkpoint: adapter_model\.safetensors is missing"):
        learner(LORA).load(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "dora"}, r"learner\.adapter\.kind: must be one of 'none', 'lora', 'celora'"),
        ({"kind": "lora", "keep_ratios": {}}, r"unknown config key 'learner\.adapter\.keep_ratios'"),
        ({"kind": "celora", "keep_ratios": {"o_proj": 2}}, r"learner\.adapter\.keep_ratios\.o_proj"),
        ({"kind": "lora", "rank": 0}, r"learner\.adapter\.rank"),
    ],
)
def test_an_adapter_that_means_nothing_is_an_error_that_names_its_key(adapter: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, {"learner": {"adapter": adapter}})


def test_an_adapter_on_several_workers_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"workers=2 cannot share an adapter: set workers to 1"):
        parse_config(RunConfig, {"learner": {"workers": 2, "adapter": {"kind": "lora"}}})


def test_the_layout_is_that_of_the_synced_weights() -> None:
    ours = learner(CELORA)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in ours.named_layout()}
    assert found == {name: (tensor.shape, tensor.dtype) for name, tensor in ours.named_weights()}


def test_an_adapter_that_fits_no_layer_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^learner\.adapter: .*not found in the base model.*$"):
        learner(LORA.model_copy(update={"target_modules": ["z_proj"]}))
    with pytest.raises(UserError, match=r"^learner\.adapter: LoRA rank 56 is larger than .*o_proj"):
        learner(CELORA.model_copy(update={"rank": 64}))
