"""The released checkpoint format: both ways with transformers, precise errors, no half-written folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from reference_models import as_transformers, random_model
from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig

from kimi_linear import checkpoint
from kimi_linear.checkpoint import (
    CheckpointError,
    load_released_tensors,
    named_released_tensors,
    read_config,
    released_config,
    save_checkpoint,
)
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM

MOE = {"num_experts": 4, "num_experts_per_token": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 40}


def assert_equal_states(left: torch.nn.Module, right: torch.nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("max_shard_bytes", [2**30, 100_000])
def test_a_saved_model_comes_back_bit_for_bit(max_shard_bytes: int, tmp_path: Path) -> None:
    model = random_model(preset("tiny", MOE)).bfloat16()
    for layer in model.model.layers[:3]:
        layer.self_attn.A_log.data = torch.randn(1, 1, 4, 1)
    save_checkpoint(model, tmp_path / "a" / "model", max_shard_bytes)
    shards = list((tmp_path / "a" / "model").glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes == 100_000)
    assert_equal_states(model, KimiLinearForCausalLM.from_pretrained(tmp_path / "a" / "model"))
    wide = KimiLinearForCausalLM.from_pretrained(tmp_path / "a" / "model", dtype=torch.float32)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}


def test_tensors_have_the_released_names_and_shapes(tmp_path: Path) -> None:
    save_checkpoint(KimiLinearForCausalLM(preset("tiny", MOE)), tmp_path / "model")
    shapes = {name: list(t.shape) for name, t in load_file(tmp_path / "model" / "model.safetensors").items()}
    attention = "model.layers.0.self_attn."
    expected = {
        "model.embed_tokens.weight": [128, 128],
        "lm_head.weight": [128, 128],
        "model.norm.weight": [128],
        "model.layers.0.input_layernorm.weight": [128],
        "model.layers.0.mlp.gate_proj.weight": [384, 128],
        attention + "q_conv1d.weight": [128, 1, 4],
        attention + "A_log": [1, 1, 4, 1],
        attention + "dt_bias": [128],
        attention + "f_a_proj.weight": [32, 128],
        attention + "g_b_proj.weight": [128, 32],
        attention + "b_proj.weight": [4, 128],
        attention + "o_norm.weight": [32],
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": [80, 128],
        "model.layers.3.self_attn.kv_b_proj.weight": [256, 64],
        "model.layers.1.block_sparse_moe.gate.weight": [4, 128],
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias": [4],
        "model.layers.1.block_sparse_moe.experts.3.w1.weight": [40, 128],
        "model.layers.1.block_sparse_moe.experts.3.w2.weight": [128, 40],
        "model.layers.1.block_sparse_moe.experts.3.w3.weight": [40, 128],
        "model.layers.1.block_sparse_moe.shared_experts.down_proj.weight": [128, 40],
    }
    assert expected.items() <= shapes.items()
    assert len(shapes) == 3 + 3 * 17 + 7 + 3 + 3 * (2 + 3 * 4 + 3)


@pytest.mark.parametrize("overrides", [{}, MOE])
def test_transformers_reads_ours_and_we_read_what_it_writes(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    model = random_model(preset("tiny", overrides))
    as_transformers(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_equal_states(model, KimiLinearForCausalLM.from_pretrained(tmp_path / "theirs"))


def test_configurations_keep_their_meaning_through_the_released_layout(tmp_path: Path) -> None:
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig as VllmConfig

    for config in (preset("48b-a3b"), mla_twin(preset("tiny")), mla_twin(preset("tiny", MOE), "nope")):
        settings = released_config(config)
        (tmp_path / "config.json").write_text(json.dumps(settings))
        again = read_config(tmp_path)
        for key in KimiLinearConfig().to_dict():
            if key not in ("transformers_version", "architectures", "dtype", "head_dim"):
                assert getattr(again, key) == getattr(config, key), key
        assert released_config(again) == settings
        vllm = VllmConfig(**settings)
        kda = [i for i, kind in enumerate(config.layer_types) if kind == "linear_attention"]
        assert [i for i in range(config.num_hidden_layers) if vllm.is_kda_layer(i)] == kda
        assert vllm.mla_use_nope == config.mla_use_nope
        assert vllm.max_position_embeddings == config.max_position_embeddings
        assert vllm.rope_parameters["rope_theta"] == 10000.0
        assert vllm.num_experts_per_token == config.num_experts_per_tok
    assert released_config(preset("48b-a3b"))["linear_attn_config"]["full_attn_layers"] == [
        4,
        8,
        12,
        16,
        20,
        24,
        27,
    ]


def test_published_tensors_share_the_models_memory() -> None:
    model = random_model(preset("tiny", MOE))
    before = {name: tensor.clone() for name, tensor in named_released_tensors(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    after = dict(named_released_tensors(model))
    changed = [name for name in before if not torch.equal(before[name] + 1, after[name])]
    assert [n for n in changed if not n.endswith("e_score_correction_bias")] == []
    assert not any(tensor.requires_grad for tensor in after.values())


def test_published_tensors_load_into_another_model() -> None:
    source, target = random_model(preset("tiny", MOE)), random_model(preset("tiny", MOE))
    load_released_tensors(target, reversed(list(named_released_tensors(source))))
    assert_equal_states(source, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"1 missing tensor\(s\): model.norm.weight"),
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.3.w2.weight"),
            r"1 missing tensor\(s\): model.layers.1.block_sparse_moe.experts.3.w2.weight",
        ),
        (lambda t: t.update(surplus=torch.zeros(1)), r"1 unknown tensor\(s\): surplus"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(127, 128)}),
            r"lm_head.weight has shape \[127, 128\]; the model needs \[128, 128\]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(
    change: object, message: str, tmp_path: Path
) -> None:
    save_checkpoint(KimiLinearForCausalLM(preset("tiny", MOE)), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "model")


def test_a_tensor_given_twice_is_refused() -> None:
    model = KimiLinearForCausalLM(preset("tiny"))
    tensors = list(named_released_tensors(model))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is given twice"):
        load_released_tensors(model, [*tensors, ("lm_head.weight", torch.zeros(128, 128))])


def test_folders_without_a_whole_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in .*not a checkpoint folder"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="'llama' model, not 'kimi_linear'"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    save_checkpoint(KimiLinearForCausalLM(preset("tiny")), tmp_path / "model", 100_000)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=re.escape(f"{shard.name} is missing; the checkpoint is incomplete")
    ):
        KimiLinearForCausalLM.from_pretrained(tmp_path / "model")


def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(preset("tiny"))
    save_checkpoint(model, tmp_path / "old", 100_000)
    calls = 0

    def fail_on_the_second(*arguments: object, **named: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError("no space left on device")
        save_file(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", fail_on_the_second)
    for name in ("new", "old"):
        calls = 0
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(random_model(preset("tiny")), tmp_path / name, 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert_equal_states(model, KimiLinearForCausalLM.from_pretrained(tmp_path / "old"))


def test_saving_over_an_older_checkpoint_leaves_none_of_its_shards(tmp_path: Path) -> None:
    save_checkpoint(random_model(preset("tiny")), tmp_path / "model", 100_000)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    model = random_model(preset("tiny"))
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_equal_states(model, KimiLinearForCausalLM.from_pretrained(tmp_path / "model"))


def test_experts_before_dense_layers_cannot_be_written() -> None:
    config = preset("tiny", MOE)
    config.mlp_layer_types = ["sparse", "dense", "dense", "dense"]
    with pytest.raises(ValueError, match="dense MLPs come before all experts"):
        released_config(config)
