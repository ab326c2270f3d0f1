"""Weights through a folder that learner and engines both see: the slow way that works wherever files do."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlscale.errors import UserError
from rlscale.weights.base import account_for


@dataclass(frozen=True, slots=True)
class DiskManifest:
    """Where one version lies: a safetensors file; `bytes` are its tensors'."""

    path: Path
    version: int
    bytes: int


class DiskPublisher:
    """The learner's side. Keeps the newest version alone; one that is killed leaves it behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Runs of a sweep that go on side by side share the folder, and count the same versions.
        self._prefix = secrets.token_hex(8)
        self._written: Path | None = None

    def publish(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        layout: Sequence[tuple[str, torch.Tensor]] | None = None,  # noqa: ARG002 (all are held anyway)
    ) -> DiskManifest:
        """Writes every tensor; earlier manifests become stale.

        Raises:
            ValueError: a name twice.
            UserError: the folder cannot be written to.
        """
        # Released names may share memory (experts do), which the format refuses.
        tensors = [
            (name, tensor.detach().cpu().clone(memory_format=torch.contiguous_format))
            for name, tensor in named_tensors
        ]
        whole = account_for(tensors, {name: tensor.shape for name, tensor in tensors})
        path = self._folder / f"{self._prefix}-version-{version}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(whole, unfinished)
            unfinished.rename(path)
        except OSError as error:
            raise UserError(
                f"weight_sync.folder={self._folder}: {error.strerror or error}; choose another folder"
            ) from None
        if self._written not in (None, path):
            self.close()
        self._written = path
        return DiskManifest(path, version, sum(tensor.nbytes for _, tensor in tensors))

    def close(self) -> None:
        """Removes the newest version's file; calling it twice is harmless."""
        if self._written is not None:
            self._written.unlink(missing_ok=True)
            self._written = None


@contextmanager
def read_weights(manifest: DiskManifest) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """The published tensors, read one by one inside the `with` block.

    Raises:
        RuntimeError: the file is gone: another version has been published since.
    """
    try:
        file = safe_open(manifest.path, framework="pt")
    except FileNotFoundError:
        raise RuntimeError(f"weight version {manifest.version} is gone from {manifest.path.parent}") from None
    with file as tensors:
        yield ((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118 (no mapping)
