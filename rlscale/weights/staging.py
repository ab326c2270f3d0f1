"""A buffer that one process fills and others of the same machine read in place, on the CPU or on a GPU."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class StagingHandle:
    """All that another process needs to map the buffer: `cuda` holds CUDA's IPC handle, `path` names a
    descriptor of the owner's."""

    size: int
    path: str | None = None
    cuda: tuple[Any, ...] | None = None

    def attach(self) -> torch.Tensor:
        """The owner's buffer, [size] uint8, mapped into this process: not the owner's own.

        Raises:
            OSError: the owner is gone.
        """
        if self.cuda is not None:
            from torch.multiprocessing.reductions import rebuild_cuda_tensor

            arguments = list(self.cuda)
            arguments[6] = torch.cuda.current_device()  # the same GPU may have another number here
            return rebuild_cuda_tensor(*arguments)
        assert self.path is not None
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            return torch.frombuffer(mmap.mmap(descriptor, self.size), dtype=torch.uint8)
        finally:
            os.close(descriptor)


class Staging:
    """The owner's side. `tensor` is the buffer, [size] uint8; it lives as long as this object."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._descriptor: int | None = None
        if device.type == "cuda":
            from torch.multiprocessing.reductions import reduce_tensor

            self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
            self.handle = StagingHandle(size, cuda=reduce_tensor(self.tensor)[1])
        else:
            self._descriptor = os.memfd_create("rlscale-staging")
            os.posix_fallocate(self._descriptor, 0, size)
            self.tensor = torch.frombuffer(mmap.mmap(self._descriptor, size), dtype=torch.uint8)
            self.handle = StagingHandle(size, path=f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def close(self) -> None:
        """Lets go of the buffer; readers that have it mapped keep it. Calling it twice is harmless."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self.tensor = self.tensor[:0]
