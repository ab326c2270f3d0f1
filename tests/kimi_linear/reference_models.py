"""transformers' Kimi Linear beside ours, with the same weights."""

from pathlib import Path

import torch
from torch import nn
from transformers import KimiLinearConfig
from transformers import KimiLinearForCausalLM as TransformersKimiLinear

from kimi_linear.checkpoint import save_checkpoint
from kimi_linear.model import KimiLinearForCausalLM


def random_model(config: KimiLinearConfig) -> KimiLinearForCausalLM:
    """A model none of whose parameters has a special value: norms off 1, router corrections off 0."""
    model = KimiLinearForCausalLM(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.1 * tensor.abs().mean().clamp_min(0.1) * torch.randn_like(tensor)
        model.get_input_embeddings().weight[config.pad_token_id] = 0
    return model


def as_transformers(model: KimiLinearForCausalLM, folder: Path) -> nn.Module:
    """The model in transformers' implementation, handed over through a checkpoint."""
    save_checkpoint(model, folder)
    return TransformersKimiLinear.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).train()


def released_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of transformers' model under the released names."""
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        name = name.replace("forget_gate.", "")
        if name.endswith("self_attn.conv1d.weight"):
            for part, filters in zip("qkv", gradient.chunk(3), strict=True):
                gradients[name.replace("conv1d", f"{part}_conv1d")] = filters
        elif name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj").replace(".mlp.", ".block_sparse_moe.")
            for expert, stacked in enumerate(gradient):
                gradients[f"{prefix}{expert}.w1.weight"], gradients[f"{prefix}{expert}.w3.weight"] = (
                    stacked.chunk(2)
                )
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj").replace(".mlp.", ".block_sparse_moe.")
            for expert, matrix in enumerate(gradient):
                gradients[f"{prefix}{expert}.w2.weight"] = matrix
        else:
            in_experts = ".mlp.gate.weight" in name or ".mlp.shared_experts." in name
            gradients[name.replace(".mlp.", ".block_sparse_moe.") if in_experts else name] = gradient
    return gradients


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().norm() / expected.detach().norm().clamp_min(1e-12))
