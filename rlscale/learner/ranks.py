"""The learner's model over several processes: sharded by FSDP2, its gradient the sum over all of them.

Each rank computes on its share of the sequences and holds its shard of weights and optimizer state. What
leaves the learner (published weights, checkpoints) is gathered a bucket of tensors at a time and knows
nothing of ranks.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kimi_linear.checkpoint import load_released_tensors, released_tensors
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.learner.metrics import Metrics

# A rank that waits this long for another gives up, should the other hang without dying.
_TIMEOUT = timedelta(minutes=30)

_BUCKET_BYTES = 256 << 20
"""Of whole tensors in one message: a message for each of a hundred tensors costs more than their bytes."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that share one learner, seen from one of them; by default there is no other."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, address: str, rank: int, size: int, device: torch.device) -> Ranks:
        """Meets the other ranks at `address` (`tcp://host:port`, served by rank 0); NCCL on GPUs, else gloo.

        A process that has met them before stays with them: an address serves once.
        """
        if size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, address, _TIMEOUT, size, rank)
        return cls(rank, size)

    def shard(self, model: KimiLinearForCausalLM) -> None:
        """Gives every rank rank 0's weights and leaves it with its shard of them, in place."""
        if self.size == 1:
            return
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
        mesh = init_device_mesh(model.device.type, (self.size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        register_fsdp_forward_method(model, "packed_hidden_states")

    def combined(self, sums: Mapping[str, torch.Tensor]) -> Metrics:
        """The ranks' scalars put together, as `rlscale.learner.metrics.combined` does micro-batches'. All
        ranks must give the same names in the same order."""
        if self.size == 1:
            return dict(sums)
        together: Metrics = {}
        for operation, is_max in ((dist.ReduceOp.SUM, False), (dist.ReduceOp.MAX, True)):
            chosen = {name: value for name, value in sums.items() if name.endswith("_max") is is_max}
            if chosen:
                values = torch.stack([value.detach().double() for value in chosen.values()])
                dist.all_reduce(values, operation)
                together |= dict(zip(chosen, values, strict=True))
        return together


def free_address() -> str:
    """`tcp://host:port` of this machine, where nothing listens yet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("192.0.2.1", 9))  # sends nothing: asks which interface leads outside
            host = route.getsockname()[0]
        except OSError:
            host = "127.0.0.1"
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered on every rank, which must all ask at once; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that every rank holds whole, cut as `pattern` is; whole if that is."""
    tensor = tensor.to(pattern.device)
    if not isinstance(pattern, DTensor):
        return tensor
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def wholes(
    tensors: Mapping[str, torch.Tensor], bucket_bytes: int = _BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """`whole` of each tensor, in order; shards of several travel in one message.

    Args:
        bucket_bytes: of whole tensors in a message; a larger tensor has one of its own.
    """
    bucket: dict[str, DTensor] = {}
    size = 0
    for name, tensor in tensors.items():
        by_rows = isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)
        if bucket and (not by_rows or size + tensor.nbytes > bucket_bytes):
            yield from _gather(bucket)
            bucket, size = {}, 0
        if isinstance(tensor, DTensor) and by_rows:
            bucket[name] = tensor
            size += tensor.nbytes
        else:
            yield name, whole(tensor).detach()
    if bucket:
        yield from _gather(bucket)


def _gather(bucket: Mapping[str, DTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors cut along their rows, a rank's shard of all of them beside another's in one message.

    Rows that do not divide evenly leave the last ranks fewer of them: those send padding.
    """
    mesh = next(iter(bucket.values())).device_mesh
    local = [tensor.to_local() for tensor in bucket.values()]
    rows = [-(-tensor.shape[0] // mesh.size()) for tensor in bucket.values()]
    shards = []
    for shard, most in zip(local, rows, strict=True):
        if shard.shape[0] < most:
            shard = torch.cat([shard, shard.new_zeros(most - shard.shape[0], *shard.shape[1:])])
        shards.append(_bytes(shard))
    sent = torch.cat(shards)
    received = sent.new_empty(mesh.size() * sent.numel())
    dist.all_gather_into_tensor(received, sent, group=mesh.get_group())
    # As FSDP2 does for its own: a copy out of the message into all tensors by few kernels.
    padded = [
        shard.new_empty(mesh.size() * most, *shard.shape[1:]) for shard, most in zip(local, rows, strict=True)
    ]
    torch.split_with_sizes_copy(
        received.view(mesh.size(), -1),
        [shard.numel() for shard in shards],
        dim=1,
        out=[_bytes(tensor).view(mesh.size(), -1) for tensor in padded],
    )
    for (name, tensor), rows_of_all in zip(bucket.items(), padded, strict=True):
        yield name, rows_of_all[: tensor.shape[0]]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's contents, [bytes] uint8."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """All tensors whole and on the CPU where `keep` says so, nothing elsewhere; on all ranks at once."""
    return {name: full.cpu().contiguous() for name, full in wholes(tensors) if keep}


def released_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their released names, a bucket of the model's tensors gathered at a time."""
    # Parameters as they are: to detach a sharded one takes the host longer than to gather it.
    for name, tensor in wholes(model.state_dict(keep_vars=True)):
        yield from released_tensors({name: tensor})


def released_layout(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Names, shapes and dtypes of `released_weights`, on the meta device."""
    return list(
        released_tensors(
            {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                for name, tensor in model.state_dict(keep_vars=True).items()
            }
        )
    )


def load_released(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """`kimi_linear.checkpoint.load_released_tensors` for a model that may be sharded.

    A sharded model is read into whole tensors in the machine's memory first, of which each rank keeps its
    shard.

    Raises:
        CheckpointError: a tensor is missing, unknown, given twice or of another shape.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        load_released_tensors(model, tensors)
        return
    host = _State({name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()})
    load_released_tensors(host, tensors)
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(sharded_like(host.tensors[name], tensor))


class _State(nn.Module):
    """Whole tensors under a sharded model's names, for functions that ask a module for its state."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_: object, **__: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return self.tensors
