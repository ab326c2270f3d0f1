"""Which parameter of the served model, or part of one, a tensor of the released checkpoint goes to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs


@dataclass(frozen=True)
class Part:
    """Where one checkpoint tensor goes.

    Attributes:
        parameter: name of the parameter, relative to the module until `weight_map` makes it absolute.
        shard: which part of that parameter, or None for all of it.
        shape: the checkpoint tensor's shape.
        first: the row of the parameter where the tensor begins.
    """

    parameter: str
    shard: int | None
    shape: tuple[int, ...]
    first: int = 0


class WeightParts:
    """A module whose checkpoint tensors do not each have a parameter of the same name and shape."""

    def weight_parts(self) -> dict[str, Part]:
        """Checkpoint name, relative to the module, -> where it goes."""
        raise NotImplementedError


def weight_map(model: nn.Module) -> dict[str, Part]:
    """Every checkpoint name that the model takes, and where it goes."""
    parts: dict[str, Part] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, WeightParts):
            dot = f"{prefix}." if prefix else ""
            for name, part in module.weight_parts().items():
                parts[dot + name] = replace(part, parameter=dot + part.parameter)
    covered = {part.parameter for part in parts.values()}
    for name, parameter in model.named_parameters():
        if name not in covered:
            parts[name] = Part(name, None, tuple(parameter.shape))
    return parts


def load_parts(
    model: nn.Module, parts: dict[str, Part], weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[str]:
    """Copy each named tensor to its place and yield its name, in the order given.

    Raises:
        ValueError: a name that the model does not have, or a tensor of another shape.
    """
    parameters = dict(model.named_parameters())
    for name, tensor in weights:
        part = parts.get(name)
        if part is None:
            raise ValueError(
                f"the served model has no weight {name!r}; give the checkpoint of the same config"
            )
        if tensor.shape != part.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, the served model needs {list(part.shape)}"
            )
        parameter = parameters[part.parameter]
        loader = getattr(parameter, "weight_loader", load_rows)
        if part.shard is None:
            loader(parameter, tensor)
        else:
            loader(parameter, tensor, part.shard)
        yield name


def stored_parts(model: nn.Module, parts: dict[str, Part]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every checkpoint tensor as the model holds it: views of its parameters, in the checkpoint's shapes."""
    parameters = dict(model.named_parameters())
    for name, part in parts.items():
        parameter = parameters[part.parameter].data
        rows = torch.Size(part.shape).numel() // parameter[0].numel()
        yield name, parameter[part.first : part.first + rows].reshape(part.shape)


def merged_parts(parameter: str, shapes: dict[str, tuple[int, int]]) -> dict[str, Part]:
    """Checkpoint matrices that lie one below the other in a merged projection, its shards in this order."""
    parts, first = {}, 0
    for shard, (name, shape) in enumerate(shapes.items()):
        parts[name] = Part(parameter, shard, shape, first)
        first += shape[0]
    return parts


def load_rows(param: nn.Parameter, loaded: torch.Tensor, shard: int = 0) -> None:
    """Copy a tensor to its rows of a parameter made of equal parts, part after part."""
    # vLLM's layer-wise reload swaps the argument called `param` for another tensor.
    rows = loaded.numel() // param[0].numel()
    place = param.data[shard * rows : (shard + 1) * rows]
    place.copy_(loaded.reshape(place.shape))


def new_parameter(shape: tuple[int, ...], dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised parameter that loads with `load_rows`, in vLLM's current dtype unless given."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": load_rows})
    return parameter


def keep_weights_in_place(module: nn.Module) -> None:
    """Have vLLM's linear layers on the CPU multiply by `weight` itself, not by a copy packed after loading.

    A copy would go stale when a learner writes new weights into a running engine.
    """
    for child in module.children():
        # vLLM's own switch, read in UnquantizedLinearMethod. Not a tensor, so past nn.Module's types.
        child.__dict__["_cpu_skip_gemm_dispatch"] = True


class InPlaceEmbedding(UnquantizedEmbeddingMethod):
    """`keep_weights_in_place` for embeddings, which have no such switch."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.__dict__["cpu_linear"] = F.linear
