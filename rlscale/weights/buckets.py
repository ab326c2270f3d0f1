"""Named tensors in buckets of bounded size, so that a sync needs little memory beside the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT = 64
"""Bytes: every tensor in a bucket starts on a multiple, which all dtypes and wide loads are happy with."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Where a tensor lies: `offset` in bytes into bucket number `bucket`, `dtype` by its name in torch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bucket: int
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * torch.empty((), dtype=getattr(torch, self.dtype)).itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """The tensor as a view of its bucket [bytes] uint8."""
        return buffer[self.offset : self.offset + self.size].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class Packing:
    """Which tensors travel in which bucket, in order; `sizes` are the buckets' bytes."""

    parcels: tuple[Parcel, ...]
    sizes: tuple[int, ...]

    def bucket(self, index: int) -> Iterator[Parcel]:
        return (parcel for parcel in self.parcels if parcel.bucket == index)


def pack(tensors: Sequence[tuple[str, torch.Tensor]], bucket_bytes: int) -> Packing:
    """Fills buckets of at most `bucket_bytes`, in order; a tensor larger than that has a bucket of its own.

    Raises:
        ValueError: no tensor at all.
    """
    if not tensors:
        raise ValueError("no weights to publish")
    parcels: list[Parcel] = []
    sizes = [0]
    for name, tensor in tensors:
        if sizes[-1] and sizes[-1] + tensor.nbytes > bucket_bytes:
            sizes.append(0)
        dtype = str(tensor.dtype).removeprefix("torch.")
        parcels.append(Parcel(name, tuple(tensor.shape), dtype, len(sizes) - 1, sizes[-1]))
        sizes[-1] += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return Packing(tuple(parcels), tuple(sizes))
