"""CE-LoRA (arXiv:2502.01378) for PEFT: LoRA with a cheaper backward pass.

    model = get_peft_model(model, CELoraConfig(r=64, lora_alpha=128, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    count_steps(model, optimizer)

The forward pass, and LoRA's own gradients given the gradient that comes in, are exact. Layers that match a
pattern of `keep_ratios` compute the gradient of their *input* from a part of their output channels and a
low-rank part of their weight. On disk, and merged, the adapter is plain LoRA, which PEFT loads without us.
"""

from __future__ import annotations

import gc
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn
from torch.utils.hooks import RemovableHandle

from rlscale.adapters.approximation import Approximation, approximated_linear
from rlscale.adapters.defaults import PAPER_KEEP_RATIOS
from rlscale.adapters.selection import inclusion_probabilities, share_budget, top_channels

# Seven frozen ranks cost the memory of one trainable rank with its gradient and optimizer state, so r becomes
# 7/8 r trainable and 7/8 r frozen ranks.
EQUAL_MEMORY = 7 / 8


@dataclass
class CELoraConfig(LoraConfig):
    """A `LoraConfig` whose layers have a cheaper backward pass.

    Patterns are matched as PEFT matches `rank_pattern`: a module's name or its end, as a regular expression;
    the first that matches counts. Layers with a keep ratio have 7/8 of `r` and of `lora_alpha` (the same
    scaling) unless `rank_pattern` and `alpha_pattern` say otherwise. All else is plain LoRA.

    Args:
        keep_ratios: by pattern, the fraction of output channels that enter the input's gradient, in (0, 1];
            default: the paper's.
        frozen_rank: rank of the part of the weight that stays exact; default 7/8 of `r`.
        frozen_rank_pattern: by pattern, where it differs.
        refresh_every: optimizer steps from one choice of channels to the next. Every such step, the first
            included, is exact and measures the gradient that the next choice is made by.
        selection: "top" takes the channels of the largest norms, which is biased; "sampled" draws them anew
            in every step with probabilities p in proportion to their norms and weights 1/p, which is not.
        adaptive: share the total of all layers' channels among the layers by what they contribute to the
            gradients, each relative to its layer's, instead of keeping each layer's ratio.
        seed: of the sampling.

    Raises:
        ValueError: a ratio, rank or interval out of range. `get_peft_model` raises it for a layer that a
            pattern matches and that is quantised, no `nn.Linear`, tied to another, or smaller than a rank.
    """

    keep_ratios: dict[str, float] = field(default_factory=lambda: dict(PAPER_KEEP_RATIOS))
    frozen_rank: int | None = None
    frozen_rank_pattern: dict[str, int] = field(default_factory=dict)
    refresh_every: int = 200
    selection: Literal["top", "sampled"] = "top"
    adaptive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, ratio in self.keep_ratios.items():
            if not 0 < ratio <= 1:
                raise ValueError(f"keep_ratios[{pattern!r}] = {ratio} must be in (0, 1]")
        if self.refresh_every < 1:
            raise ValueError(f"refresh_every = {self.refresh_every} must be at least 1 optimizer step")
        if self.selection not in ("top", "sampled"):
            raise ValueError(f"selection = {self.selection!r} must be 'top' or 'sampled'")
        if self.frozen_rank is None:
            self.frozen_rank = max(1, int(EQUAL_MEMORY * self.r))
        for name, rank in {"frozen_rank": self.frozen_rank, **self.frozen_rank_pattern}.items():
            if rank < 1:
                raise ValueError(f"frozen rank {name} = {rank} must be at least 1")
        rank = max(1, int(EQUAL_MEMORY * self.r))
        alpha = self.lora_alpha * (rank / self.r) ** (0.5 if self.use_rslora else 1)
        lowered = [pattern for pattern in self.keep_ratios if pattern not in self.rank_pattern]
        self.rank_pattern: dict[str, int] = self.rank_pattern | dict.fromkeys(lowered, rank)
        self.alpha_pattern: dict[str, float] = dict.fromkeys(lowered, alpha) | self.alpha_pattern
        self._register_custom_module({nn.Module: _new_layer})

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: a plain LoraConfig."""
        own = {f.name for f in fields(CELoraConfig)} - {f.name for f in fields(LoraConfig)}
        return {key: value for key, value in super().to_dict().items() if key not in own}

    def keep_ratio_of(self, name: str) -> float | None:
        """The keep ratio of a module, None where no pattern matches: then it has plain LoRA."""
        return self.keep_ratios.get(get_pattern_key(list(self.keep_ratios), name))

    def frozen_rank_of(self, name: str) -> int:
        """The rank of a module's frozen part."""
        assert self.frozen_rank is not None
        key = get_pattern_key(list(self.frozen_rank_pattern), name)
        return self.frozen_rank_pattern.get(key, self.frozen_rank)


class CELoraLinear(Linear):
    """PEFT's LoRA layer around an `nn.Linear`, with CE-LoRA's backward pass where its adapter asks for it."""

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)
        if not hasattr(self, "celora"):  # PEFT calls this from its constructor, and for each further adapter
            self.celora: Any = nn.ModuleDict()  # of Approximation, by adapter
            self.celora_config: dict[str, CELoraConfig] = {}
            self.module_name: str = kwargs["target_name"]
        if isinstance(config, CELoraConfig) and config.keep_ratio_of(self.module_name) is not None:
            self.celora[adapter_name] = Approximation(config.frozen_rank_of(self.module_name))
            self.celora_config[adapter_name] = config

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.celora:
            del self.celora[adapter_name], self.celora_config[adapter_name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As PEFT's `Linear.forward`, and by it where adapters are merged, disabled or several."""
        active = self.active_adapters
        if (
            len(active) != 1
            or active[0] not in self.celora
            or self.disable_adapters
            or self.merged
            or args
            or kwargs
        ):
            return super().forward(x, *args, **kwargs)
        adapter = active[0]
        base, lora_A, lora_B = self.get_base_layer(), self.lora_A[adapter], self.lora_B[adapter]
        if base.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.module_name}: CE-LoRA needs a frozen base weight, but it requires a gradient: "
                "freeze it or give the module plain LoRA"
            )
        approximation, scaling = self.celora[adapter], self.scaling[adapter]
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            with torch.autocast(device_type, enabled=False):
                matrices = (lora_A.weight.to(dtype), lora_B.weight.to(dtype))
                return self._forward(x.to(dtype), matrices, adapter, approximation, scaling)
        return self._forward(x, (lora_A.weight, lora_B.weight), adapter, approximation, scaling)

    def _forward(
        self,
        x: torch.Tensor,
        matrices: tuple[torch.Tensor, torch.Tensor],
        adapter: str,
        approximation: Approximation,
        scaling: float,
    ) -> torch.Tensor:
        base, dropout, lora_B = self.get_base_layer(), self.lora_dropout[adapter], self.lora_B[adapter]
        drops = isinstance(dropout, nn.Dropout) and dropout.training
        if not drops and lora_B.bias is None and matrices[0].dtype == x.dtype:
            return approximated_linear(x, base.weight, base.bias, *matrices, scaling, approximation)
        # LoRA as PEFT computes it: on a dropped-out input, with a bias, or in a wider dtype than the layer's.
        y = approximated_linear(x, base.weight, base.bias, None, None, scaling, approximation)
        h = F.linear(dropout(x.to(matrices[0].dtype)), matrices[0])
        bias = None if lora_B.bias is None else lora_B.bias.to(h.dtype)
        return (y + F.linear(h, matrices[1], bias) * scaling).to(y.dtype)


def _new_layer(
    target: nn.Module, adapter_name: str, config: CELoraConfig, **kwargs: Any
) -> CELoraLinear | None:
    """The layer that PEFT puts around `target`; None leaves the choice to PEFT."""
    name = kwargs["target_name"]
    if kwargs.get("parameter_name") is not None or config.keep_ratio_of(name) is None:
        return None
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    remedy = "leave it out of keep_ratios or target_modules"
    if type(base) is not nn.Linear:
        raise ValueError(f"{name} is a {type(base).__name__}, CE-LoRA needs an nn.Linear: {remedy}")
    weight = base.weight
    if not weight.is_floating_point() or weight.dtype.itemsize < 2 or type(weight.data) is not torch.Tensor:
        raise ValueError(f"{name} has a quantised weight, CE-LoRA needs its rows as numbers: {remedy}")
    if _owners(weight) > 1:
        raise ValueError(f"{name} shares its weight with another module, CE-LoRA needs its own: {remedy}")
    for kind, rank in (("LoRA rank", kwargs["r"]), ("frozen rank", config.frozen_rank_of(name))):
        if rank > min(weight.shape):
            raise ValueError(f"{kind} {rank} is larger than {name}'s {list(weight.shape)}: lower it")
    return CELoraLinear(target, adapter_name, config=config, **kwargs)


def _owners(weight: torch.Tensor) -> int:
    """Modules that hold this parameter. PEFT hands over the module alone, so the garbage collector is asked
    who else refers to its weight; a module's own names have no dots, a state dict's have."""
    holders = (holder for holder in gc.get_referrers(weight) if isinstance(holder, dict))
    return sum(any(v is weight and "." not in str(k) for k, v in holder.items()) for holder in holders)


def celora_layers(model: nn.Module) -> Iterator[tuple[CELoraLinear, Approximation, CELoraConfig]]:
    """The approximated layers of a model, with the approximation and config of their active adapter."""
    for module in model.modules():
        if isinstance(module, CELoraLinear) and len(module.active_adapters) == 1:
            adapter = module.active_adapters[0]
            if adapter in module.celora:
                yield module, module.celora[adapter], module.celora_config[adapter]


def count_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Calls `optimizer_stepped(model)` after every step of an optimizer; without it all steps are exact.

    Returns:
        A handle whose `remove()` ends it.
    """
    return optimizer.register_step_post_hook(lambda *_: optimizer_stepped(model))


@torch.no_grad()
def optimizer_stepped(model: nn.Module) -> None:
    """Tells a model's layers that an optimizer step was taken; `count_steps` calls it by itself.

    Layers that measured the gradient choose their channels, sampled ones draw theirs. Until the next call all
    forward and backward passes belong to one step, however many there are.
    """
    layers = list(celora_layers(model))
    _choose([layer for layer in layers if _has_measured(layer[1])])
    for layer, approximation, config in layers:
        approximation.squares = None
        approximation.steps += 1
        approximation.measuring = approximation.steps % config.refresh_every == 0
        if approximation.probabilities is not None:
            generator = torch.Generator()
            generator.manual_seed(
                zlib.crc32(f"{config.seed} {layer.module_name} {approximation.steps}".encode())
            )
            approximation.sample(generator)


def celora_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """By layer and part: what a run needs, beside the adapter's weights, to go on where it stopped."""
    state: dict[str, torch.Tensor] = {}
    for layer, approximation, _ in celora_layers(model):
        parts = dict(approximation.named_buffers()) | {"steps": torch.tensor(approximation.steps)}
        state |= {f"{layer.module_name}.{part}": tensor for part, tensor in parts.items()}
    return state


def load_celora_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Continues from what `celora_state` gave.

    Raises:
        ValueError: the state is of another model; names the layer.
    """
    layers = list(celora_layers(model))
    unknown = {key.rpartition(".")[0] for key in state} - {layer.module_name for layer, *_ in layers}
    if unknown:
        raise ValueError(f"state of '{min(unknown)}', which is no CE-LoRA layer of this model")
    for layer, approximation, config in layers:
        prefix = f"{layer.module_name}."
        parts = {k.removeprefix(prefix): v for k, v in state.items() if k.rpartition(".")[0] + "." == prefix}
        if "steps" not in parts:
            raise ValueError(f"state of '{layer.module_name}' is missing")
        approximation.steps = int(parts.pop("steps"))
        approximation.measuring = approximation.steps % config.refresh_every == 0
        device = layer.get_base_layer().weight.device
        for part in dict(approximation.named_buffers()).keys() | parts.keys():
            tensor = parts.get(part)
            setattr(approximation, part, None if tensor is None else tensor.to(device, copy=True))
        if approximation.channels is not None:
            approximation.keep = len(approximation.channels)


def _has_measured(approximation: Approximation) -> bool:
    """Whether there is a gradient to choose by: a skipped update may have left one that is not finite."""
    if approximation.squares is None:
        return False
    total = approximation.squares.sum()
    return bool(torch.isfinite(total) & (total > 0))


def _choose(measured: list[tuple[CELoraLinear, Approximation, CELoraConfig]]) -> None:
    keeps, shares = [], []
    for layer, approximation, config in measured:
        weight = layer.get_base_layer().weight
        if approximation.frozen_B is None:
            approximation.factorise(weight)
        ratio = config.keep_ratio_of(layer.module_name)
        assert ratio is not None
        keeps.append(math.ceil(ratio * len(weight)))
        shares.append(approximation.scores(weight))
    adaptive = [i for i, (*_, config) in enumerate(measured) if config.adaptive]
    if adaptive:
        gains = [measured[i][1].gains(measured[i][0].get_base_layer().weight) for i in adaptive]
        costs = [measured[i][0].in_features for i in adaptive]
        shared = share_budget(gains, costs, [keeps[i] for i in adaptive])
        for i, keep in zip(adaptive, shared, strict=True):
            keeps[i] = keep
    for (_, approximation, config), keep, scores in zip(measured, keeps, shares, strict=True):
        if config.selection == "sampled":
            approximation.keep = keep
            approximation.probabilities = inclusion_probabilities(scores, keep)
        else:
            approximation.channels = top_channels(scores, keep)
