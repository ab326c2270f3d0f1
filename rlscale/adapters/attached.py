"""An adapter inside the learner's model: attach and detach, merged weights for the rollouts, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from kimi_linear.checkpoint import MAX_SHARD_BYTES, released_tensors, save_state
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.adapters.celora import CELoraConfig, celora_state, load_celora_state, optimizer_stepped
from rlscale.config import CELoraAdapterConfig, LoraAdapterConfig
from rlscale.errors import UserError

ADAPTER_FOLDER = "adapter"
BASE_FILE = "base.safetensors"
CELORA_FILE = "celora.safetensors"
_NAME = "default"
_BASE_WEIGHT = ".base_layer.weight"


class AttachedAdapter:
    """Puts an adapter into a model, whose other weights it freezes, and takes it out again.

    Args:
        model: changed in place.
        config: what to attach.
        seed: of LoRA's A and of CE-LoRA's samples.

    Raises:
        UserError: no module has such a name, or CE-LoRA cannot serve one of them.
    """

    def __init__(
        self, model: KimiLinearForCausalLM, config: LoraAdapterConfig | CELoraAdapterConfig, seed: int
    ) -> None:
        self._model = model
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._peft: PeftModel = get_peft_model(
                    model, _peft_config(config, seed), autocast_adapter_dtype=False
                )
        except ValueError as error:
            raise UserError(f"learner.adapter: {' '.join(str(error).split())}") from None

    def optimizer_stepped(self) -> None:
        """To be called after every optimizer step: CE-LoRA's refreshes are counted in them."""
        optimizer_stepped(self._model)

    def detach(self) -> None:
        """Gives the model back as it was before, all of its weights trainable."""
        self._peft.unload()
        self._model.requires_grad_(True)

    def merged_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under their released names, the adapter added to those it adapts, one at a time."""
        for name, tensor in self._model.state_dict().items():
            if ".lora_" in name:
                continue
            if name.endswith(_BASE_WEIGHT):
                layer = self._model.get_submodule(name.removesuffix(_BASE_WEIGHT))
                with torch.no_grad():
                    tensor = tensor + layer.get_delta_weight(_NAME).to(tensor.dtype)
            yield from released_tensors({name.replace(".base_layer.", "."): tensor})

    def layout(self) -> list[tuple[str, torch.Tensor]]:
        """Names, shapes and dtypes of `merged_weights`, on the meta device."""
        return [
            named
            for name, tensor in self._model.state_dict().items()
            if ".lora_" not in name
            for named in released_tensors({name.replace(".base_layer.", "."): tensor.to("meta")})
        ]

    def save(self, folder: Path) -> None:
        """Writes the merged model in the released format and beside it, to go on from: the adapter in PEFT's
        format, the weights below it, and CE-LoRA's choices."""
        save_state(self._model.config, dict(self.merged_weights()), folder, MAX_SHARD_BYTES)
        self._peft.save_pretrained(folder / ADAPTER_FOLDER)
        save_file(
            {name: layer.get_base_layer().weight.contiguous() for name, layer in self._layers()},
            folder / BASE_FILE,
        )
        save_file(
            {name: tensor.contiguous() for name, tensor in celora_state(self._model).items()},
            folder / CELORA_FILE,
        )

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Continues from a folder that `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, SafetensorError: a file is torn or of another adapter.
        """
        bases = _tensors(folder / BASE_FILE)
        layers = dict(self._layers())
        if bases.keys() != layers.keys():
            raise ValueError(f"its adapter is on other layers: {min(bases.keys() ^ layers.keys())}")
        for name, layer in layers.items():
            layer.get_base_layer().weight.copy_(bases[name])
        adapter = _tensors(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
        expected = {name: t.shape for name, t in get_peft_model_state_dict(self._peft).items()}
        if {name: t.shape for name, t in adapter.items()} != expected:
            raise ValueError("its adapter has other ranks or layers")
        set_peft_model_state_dict(self._peft, adapter)
        load_celora_state(self._model, _tensors(folder / CELORA_FILE))

    def _layers(self) -> Iterator[tuple[str, LoraLayer]]:
        return ((n, m) for n, m in self._model.named_modules() if isinstance(m, LoraLayer))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    path.stat()  # whose error names the file, as safetensors' does not
    return load_file(path)


def _peft_config(config: LoraAdapterConfig | CELoraAdapterConfig, seed: int) -> LoraConfig:
    shared: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.target_modules),
    }
    if not isinstance(config, CELoraAdapterConfig):
        return LoraConfig(**shared)
    return CELoraConfig(
        **shared,
        keep_ratios=dict(config.keep_ratios),
        frozen_rank=config.frozen_rank,
        frozen_rank_pattern=dict(config.frozen_rank_pattern),
        rank_pattern=dict(config.rank_pattern),
        refresh_every=config.refresh_every,
        selection=config.selection,
        adaptive=config.adaptive,
        seed=seed,
    )
