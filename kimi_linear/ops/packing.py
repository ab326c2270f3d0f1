"""Layouts of packed sequences: where each token goes when sequences are cut into padded blocks."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChunkLayout:
    """Sequences cut into chunks of one size, ordered so that a scan over chunks is a scan over slices.

    Sequences are ranked by their number of chunks, most first. Chunks are stored step by step: first the
    first chunk of every sequence in order of rank, then every second chunk, and so on. The sequences still
    running at a step are the first `step_sizes[step]` ranks, so both the step's chunks and their states are
    contiguous slices.

    Attributes:
        slots: [T], for each packed token its row in the padded layout [chunks * chunk_size].
        step_sizes: number of chunks in each step, never increasing.
        ranks: [N], the rank of each sequence.
        order: [N], the sequence at each rank (the inverse of `ranks`).
        chunk_size: tokens in a chunk.
    """

    slots: torch.Tensor
    step_sizes: list[int]
    ranks: torch.Tensor
    order: torch.Tensor
    chunk_size: int

    @property
    def chunks(self) -> int:
        return sum(self.step_sizes)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] in packed order -> [chunks, chunk_size, ...], zeros where there is no token."""
        padded = x.new_zeros(self.chunks * self.chunk_size, *x.shape[1:])
        return padded.index_copy(0, self.slots, x).unflatten(0, (self.chunks, self.chunk_size))

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """[chunks, chunk_size, ...] -> [T, ...] in packed order."""
        return x.flatten(0, 1).index_select(0, self.slots)


def chunk_layout(cu_seqlens: torch.Tensor, chunk_size: int) -> ChunkLayout:
    """Lay out the sequences bounded by cu_seqlens [N + 1] in chunks of `chunk_size` tokens."""
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    chunk_counts = -(lengths // -chunk_size)
    order = torch.argsort(chunk_counts, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)

    steps = int(chunk_counts.max())
    step = torch.arange(steps, device=offsets.device)
    step_sizes = (chunk_counts.unsqueeze(0) > step.unsqueeze(1)).sum(1)
    step_starts = step_sizes.cumsum(0) - step_sizes

    positions, sequences = token_positions(cu_seqlens, int(offsets[-1]))
    chunk = step_starts[positions // chunk_size] + ranks[sequences]
    slots = chunk * chunk_size + positions % chunk_size
    return ChunkLayout(slots, step_sizes.tolist(), ranks, order, chunk_size)


def token_positions(cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of T packed tokens its position in its sequence and its sequence's number, both [T] int64."""
    offsets = cu_seqlens.long()
    place = torch.arange(tokens, device=offsets.device)
    sequences = torch.searchsorted(offsets[1:], place, right=True)
    return place - offsets[sequences], sequences


def uniform_cu_seqlens(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Boundaries [B + 1] of a rectangular batch [B, T] flattened into one row."""
    return torch.arange(batch + 1, device=device) * tokens
