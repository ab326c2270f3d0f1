"""Which parameter of the served model, or part of one, a tensor of the released checkpoint goes to."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

# Matrix products are fastest, and rows of their results aligned, where widths are multiples of this.
WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class Part:
    """Where one checkpoint tensor goes.

    Attributes:
        parameter: name of the parameter, relative to the module until `weight_map` makes it absolute.
        shard: which part of that parameter, or None for all of it.
        shape: the checkpoint tensor's shape.
        first: the row of the parameter where the tensor, or a rank's share of it, begins.
        split: dimension along which tensor-parallel ranks share the tensor; None where each has all of it.
        share: size of a rank's share along `split`. Shares may reach beyond the tensor's end, into padding.
        loader: whether the parameter's loader takes the rank's share, or the whole tensor, with its padding
            or without, and cuts that itself.
    """

    parameter: str
    shard: int | None
    shape: tuple[int, ...]
    first: int = 0
    split: int | None = None
    share: int = 0
    loader: Literal["takes share", "cuts", "pads and cuts"] = "takes share"

    @property
    def share_shape(self) -> tuple[int, ...]:
        """Shape of what one rank has of the tensor."""
        sizes = list(self.shape)
        if self.split is not None:
            sizes[self.split] = self.share
        return tuple(sizes)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """What of a checkpoint tensor the parameter's loader takes on this rank; padding is zeros."""
        if self.split is None or self.loader == "pads and cuts":
            return tensor
        first, size = 0, self.share * get_tensor_model_parallel_world_size()
        if self.loader == "takes share":
            first, size = get_tensor_model_parallel_rank() * self.share, self.share
        held = max(0, min(size, tensor.shape[self.split] - first))
        share = tensor.narrow(self.split, min(first, tensor.shape[self.split]), held)
        if held == size:
            return share
        shape = list(share.shape)
        shape[self.split] = size - held
        return torch.cat((share, share.new_zeros(shape)), dim=self.split)

    def joined(self, share: torch.Tensor) -> torch.Tensor:
        """The checkpoint tensor from all ranks' shares, on every rank; all must ask at once."""
        if self.split is None:
            return share
        if get_tensor_model_parallel_world_size() > 1:
            share = tensor_model_parallel_all_gather(share.contiguous(), self.split)
        return share.narrow(self.split, 0, self.shape[self.split])


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
    for prefix, module in model.named_modules():
        name = f"{prefix}.weight"
        if isinstance(module, RowParallelLinear):
            split, share = 1, module.input_size_per_partition
        elif isinstance(module, ColumnParallelLinear):
            split, share = 0, module.output_size_per_partition
        else:
            continue
        if name not in covered:
            shape = (module.output_size, module.input_size)
            parts[name] = Part(name, None, shape, split=split, share=share, loader="cuts")
            covered.add(name)
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
            loader(parameter, part.cut(tensor))
        else:
            loader(parameter, part.cut(tensor), part.shard)
        yield name


def stored_parts(model: nn.Module, parts: dict[str, Part]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every checkpoint tensor as the model holds it, in the checkpoint's shapes: views of its parameters.

    Where tensor-parallel ranks share a tensor, it is put together on every rank when its turn comes, so all
    ranks must go through all of them.
    """
    parameters = dict(model.named_parameters())
    for name, part in parts.items():
        parameter = parameters[part.parameter].data
        rows = torch.Size(part.share_shape).numel() // parameter[0].numel()
        yield name, part.joined(parameter[part.first : part.first + rows].reshape(part.share_shape))


def merged_parts(parameter: str, rows: Mapping[str, tuple[int, int | None]], columns: int) -> dict[str, Part]:
    """Checkpoint matrices that lie one below the other in a merged projection, its shards in this order.

    Args:
        rows: checkpoint name -> rows of the matrix, and rows of a tensor-parallel rank's share of it, None
            where each rank has the whole matrix.
        columns: of every matrix.
    """
    parts, first = {}, 0
    for shard, (name, (height, share)) in enumerate(rows.items()):
        split = None if share is None else 0
        parts[name] = Part(parameter, shard, (height, columns), first, split, share or 0)
        first += height if share is None else share
    return parts


def width_share(width: int) -> int:
    """A tensor-parallel rank's share of a width that need not be a multiple of their number.

    Rounded up to what matrix products like, so that the last ranks have padding.
    """
    ranks = get_tensor_model_parallel_world_size()
    return width if ranks == 1 else -(-width // (ranks * WIDTH_MULTIPLE)) * WIDTH_MULTIPLE


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
