"""Which way weights travel, chosen by where learner and engines compute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rlscale.config import LearnerConfig, RolloutConfig, TransportName, WeightSyncConfig
from rlscale.errors import UserError
from rlscale.weights.disk import DiskManifest, DiskPublisher, read_weights
from rlscale.weights.shared_memory import SharedMemoryPublisher, WeightManifest, open_weights
from rlscale.weights.stream import StreamManifest, StreamPublisher, receive

MIB = 1 << 20

Manifest = WeightManifest | StreamManifest | DiskManifest
"""What the learner tells engines of one version; each has `version` and `bytes`."""


class Publisher(Protocol):
    """The learner's side of a transport."""

    def publish(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        *,
        layout: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> Manifest: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Transport:
    """A way for weights, before either side has started.

    Args:
        name: which; "auto" is resolved by `choose_transport`.
        readers: engines that load every version, or their ranks where they are tensor-parallel.
        bucket_bytes: how much travels at a time, where weights travel in buckets.
        folder: where "disk" writes.
    """

    name: TransportName = "shared_memory"
    readers: int = 1
    bucket_bytes: int = 256 * MIB
    folder: Path | None = None

    def publisher(self, host: str = "127.0.0.1") -> Publisher:
        """The learner's side, in this process. `host` is its address for engines on other machines."""
        match self.name:
            case "shared_memory":
                return SharedMemoryPublisher()
            case "disk":
                assert self.folder is not None
                return DiskPublisher(self.folder)
            case "cuda_ipc":
                return StreamPublisher("staging", self.readers, self.bucket_bytes)
            case "nccl":
                return StreamPublisher("broadcast", self.readers, self.bucket_bytes, host)
        raise ValueError(f"no transport {self.name!r}")


def choose_transport(config: WeightSyncConfig, rollout: RolloutConfig, learner: LearnerConfig) -> Transport:
    """The transport that the config names, or that fits where both sides compute.

    CUDA IPC where all workers together share one GPU (each asks for a part of it), NCCL where each has GPUs
    of its own, else shared memory.

    Raises:
        UserError: the config names a transport that cannot join the two.
    """
    on_gpus = bool(rollout.num_gpus and learner.num_gpus)
    together = rollout.workers * rollout.num_gpus + learner.workers * learner.num_gpus
    one_gpu = on_gpus and together <= 1
    own_gpus = on_gpus and min(rollout.num_gpus, learner.num_gpus) >= 1
    name: TransportName = config.transport
    if name == "auto":
        name = "cuda_ipc" if one_gpu else "nccl" if own_gpus else "shared_memory"
    if name == "cuda_ipc" and not one_gpu:
        raise UserError(
            "weight_sync.transport=cuda_ipc needs learner and rollout on one GPU: let rollout.num_gpus and "
            f"learner.num_gpus of all workers add up to 1 at most, not {together:g}, or set auto"
        )
    if name == "nccl" and not own_gpus:
        raise UserError(
            "weight_sync.transport=nccl needs GPUs of their own for learner and rollout: "
            "set rollout.num_gpus and learner.num_gpus to whole numbers, or weight_sync.transport to auto"
        )
    if name == "disk" and config.folder is None:
        raise UserError(
            "weight_sync.transport=disk needs weight_sync.folder, one that learner and rollout see"
        )
    return Transport(
        name, rollout.workers * rollout.tensor_parallel_size, config.bucket_mib * MIB, config.folder
    )


def incoming(
    manifest: Manifest,
) -> AbstractContextManager[Iterable[tuple[str, torch.Tensor]]]:
    """The published weights, for one pass inside a `with` block; errors are the transport's own."""
    if isinstance(manifest, StreamManifest):
        return receive(manifest)
    if isinstance(manifest, DiskManifest):
        return read_weights(manifest)
    return open_weights(manifest)
