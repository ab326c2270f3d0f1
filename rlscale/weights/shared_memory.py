"""Weights from one process to others of the same machine: written once, read in place.

The segment is an anonymous memory file (memfd). Readers open it through the publisher's entry in /proc, so
it has no name to collide, to leak or to unlink: the kernel frees it when the publisher and the last reader
are gone, however they end. Nor does it count against /dev/shm, which containers commonly limit to 64 MiB.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rlscale.errors import UserError
from rlscale.memory import GIB, available_memory
from rlscale.weights.base import account_for

_ALIGNMENT = 64  # a cache line: every tensor starts on one
_HEADER = struct.Struct("<16sq")  # token of the publisher, version that the segment holds
_WRITING = -1  # in place of a version while tensors are being copied


class StaleWeightsError(RuntimeError):
    """The segment does not hold, or stopped holding while it was read, what its manifest promises."""


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where in the segment a tensor lies: `offset` in bytes, `dtype` by its name in torch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """All that a process of the same machine needs to read one version of the weights.

    `segment` is the path of the segment, `bytes` the payload without padding, `checksum` the CRC-32 of the
    segment's contents if the publisher was asked for one.
    """

    segment: str
    token: bytes
    size: int
    version: int
    bytes: int
    tensors: tuple[TensorPlace, ...]
    checksum: int | None = None


class SharedMemoryPublisher:
    """The learner's side. The segment is re-used while names, shapes and dtypes stay the same."""

    def __init__(self) -> None:
        self._token = secrets.token_bytes(16)
        self._segment: tuple[int, mmap.mmap] | None = None
        self._places: tuple[TensorPlace, ...] = ()
        self._views: list[torch.Tensor] = []

    def publish(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        checksum: bool = False,
        layout: Sequence[tuple[str, torch.Tensor]] | None = None,
    ) -> WeightManifest:
        """Copies every tensor, from any device, into the segment. Earlier manifests become stale.

        Args:
            named_tensors: name and tensor; without `layout` held until all are copied.
            version: not negative.
            checksum: let readers verify the contents, at the cost of one more pass on either side.
            layout: what `named_tensors` will bring, in that order, as tensors without memory (device meta);
                each tensor is then let go as soon as it is copied.

        Raises:
            ValueError: a name twice, no tensor at all, one that is not the layout's, or a negative version.
            UserError: the machine has not enough memory for the segment.
        """
        if version < 0:
            raise ValueError(f"weight versions count up from 0, not {version}")
        if layout is None:
            layout = named_tensors = list(named_tensors)
        account_for(layout, {name: tensor.shape for name, tensor in layout})
        places, size = _lay_out(layout)
        if places != self._places or self._segment is None:
            self._allocate(places, size)
        assert self._segment is not None
        memory = self._segment[1]
        memory[: _HEADER.size] = _HEADER.pack(self._token, _WRITING)
        with torch.no_grad():
            for (name, tensor), place, view in zip(named_tensors, places, self._views, strict=True):
                if (name, tuple(tensor.shape)) != (place.name, place.shape):
                    raise ValueError(
                        f"{name} {tuple(tensor.shape)} came where {place.name} {place.shape} was due"
                    )
                view.copy_(tensor)
        memory[: _HEADER.size] = _HEADER.pack(self._token, version)
        return WeightManifest(
            segment=f"/proc/{os.getpid()}/fd/{self._segment[0]}",
            token=self._token,
            size=size,
            version=version,
            bytes=sum(tensor.nbytes for _, tensor in layout),
            tensors=places,
            checksum=zlib.crc32(memoryview(memory)[_HEADER.size :]) if checksum else None,
        )

    def close(self) -> None:
        """Frees the segment as soon as no reader has it open; calling it twice is harmless."""
        if self._segment is not None:
            self._views, self._places = [], ()
            os.close(self._segment[0])
            self._segment = None

    def __del__(self) -> None:
        self.close()

    def _allocate(self, places: tuple[TensorPlace, ...], size: int) -> None:
        self.close()
        free = available_memory()
        if size > free:
            raise UserError(_no_memory(size, f"{free / GIB:.2f} GiB are free"))
        descriptor = os.memfd_create("rlscale-weights")
        try:
            # Takes the pages now: a segment that grew on first touch would end in SIGBUS where memory ends.
            os.posix_fallocate(descriptor, 0, size)
            memory = mmap.mmap(descriptor, size)
        except OSError as error:
            os.close(descriptor)
            raise UserError(_no_memory(size, str(error.strerror).lower())) from None
        self._segment, self._places = (descriptor, memory), places
        self._views = [_view(memory, place) for place in places]


@contextmanager
def open_weights(manifest: WeightManifest) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The published tensors as views into the segment, for reading inside the `with` block.

    The views' memory stays mapped as long as they live, but its contents change with the next `publish`.

    Raises:
        StaleWeightsError: the segment is gone or holds another version, when opened or at the end of the
            block (whatever was read in between may be torn), or its contents fail the manifest's checksum.
    """
    try:
        descriptor = os.open(manifest.segment, os.O_RDONLY)
    except OSError:
        raise StaleWeightsError(f"the publisher of weight version {manifest.version} is gone") from None
    try:
        _check_version(descriptor, manifest)
        # A private mapping counts as writable, as torch wants it, and cannot alter what others see.
        memory = mmap.mmap(descriptor, manifest.size, access=mmap.ACCESS_COPY)
        if manifest.checksum is not None:
            found = zlib.crc32(memoryview(memory)[_HEADER.size :])
            _check_version(descriptor, manifest)
            if found != manifest.checksum:
                raise StaleWeightsError(f"weight version {manifest.version} is damaged: its checksum differs")
        yield [(place.name, _view(memory, place)) for place in manifest.tensors]
        _check_version(descriptor, manifest)
    finally:
        os.close(descriptor)


def _check_version(descriptor: int, manifest: WeightManifest) -> None:
    header = os.pread(descriptor, _HEADER.size, 0) if os.fstat(descriptor).st_size == manifest.size else b""
    # The path names a descriptor of a process, and both numbers can be re-used: the token tells.
    token, version = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", _WRITING)
    if token != manifest.token:
        raise StaleWeightsError(f"the segment of weight version {manifest.version} is gone")
    if version != manifest.version:
        now = "is being written" if version == _WRITING else f"holds {version}"
        raise StaleWeightsError(f"weight version {manifest.version} is stale: its segment {now}")


def _lay_out(tensors: Sequence[tuple[str, torch.Tensor]]) -> tuple[tuple[TensorPlace, ...], int]:
    if not tensors:
        raise ValueError("no weights to publish")
    places: list[TensorPlace] = []
    end = _HEADER.size
    for name, tensor in tensors:
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(
            TensorPlace(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset)
        )
        end = offset + tensor.nbytes
    return tuple(places), end


def _view(memory: mmap.mmap, place: TensorPlace) -> torch.Tensor:
    dtype = getattr(torch, place.dtype)
    count = torch.Size(place.shape).numel()
    if count == 0:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=place.offset).view(place.shape)


def _no_memory(size: int, why: str) -> str:
    return (
        f"weight sync needs {size / GIB:.2f} GiB of shared memory and {why}: "
        "lower rollout.cache_gib or choose a smaller model"
    )
