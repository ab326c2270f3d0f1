"""Packed sequences: many sequences in one row of tokens, with their boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kimi_linear.ops.arguments import check_cu_seqlens
from kimi_linear.ops.packing import token_positions, uniform_cu_seqlens


@dataclass(frozen=True)
class PaddedBatches:
    """Sequences of like length laid out as padded batches, one batch after the other: P places in all.

    Attributes:
        shapes: of each batch, its sequences and the longest of them.
        rows: [P] int64, the packed row of each place; any row where a sequence has ended.
        places: [T] int64, where each packed token stands.
    """

    shapes: list[tuple[int, int]]
    rows: torch.Tensor
    places: torch.Tensor


@dataclass(frozen=True)
class PackedSequences:
    """Boundaries of sequences packed into T tokens, and what layers derive from them once for all.

    Attributes:
        cu_seqlens: [N + 1] int, from 0 to T.
        tokens: T.
        known_lengths: tokens of each sequence, where the host knows them.
    """

    cu_seqlens: torch.Tensor
    tokens: int
    known_lengths: tuple[int, ...] | None = None

    @classmethod
    def checked(
        cls, cu_seqlens: torch.Tensor, tokens: int, lengths: Sequence[int] | None = None
    ) -> "PackedSequences":
        """Raise ValueError unless the boundaries run from 0 to `tokens` without decreasing.

        On a GPU their values go unchecked: the host would wait for them.
        """
        sequences = check_cu_seqlens(cu_seqlens, 1, tokens, cu_seqlens.device)
        if lengths is not None and (len(lengths) != sequences or sum(lengths) != tokens):
            raise ValueError(
                f"lengths has {len(lengths)} sequences and {sum(lengths)} tokens, but cu_seqlens bounds "
                f"{sequences} sequences of {tokens}"
            )
        return cls(cu_seqlens, tokens, None if lengths is None else tuple(lengths))

    @classmethod
    def uniform(cls, sequences: int, length: int, device: torch.device) -> "PackedSequences":
        """Sequences of one length; nothing that layers derive from them waits for a GPU."""
        packed = cls(uniform_cu_seqlens(sequences, length, device), sequences * length)
        packed.__dict__["lengths"] = [length] * sequences  # where `cached_property` keeps what it knows
        return packed

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence. On a GPU the host waits for them, once, unless it was told."""
        return self.cu_seqlens.diff().tolist() if self.known_lengths is None else list(self.known_lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] position of each token in its sequence."""
        return token_positions(self.cu_seqlens, self.tokens)[0]

    @cached_property
    def last_tokens(self) -> torch.Tensor:
        """[N] row of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    @cached_property
    def padded(self) -> PaddedBatches:
        """Sequences grouped so that padded lengths differ by less than a quarter, empty ones left out.

        Worked out on the host and sent to the device without waiting for it.
        """
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        shapes, rows = [], [torch.empty(0, dtype=torch.int64)]
        places = torch.empty(self.tokens, dtype=torch.int64)
        first = 0
        for group in _alike(self.lengths):
            lengths = torch.tensor([self.lengths[n] for n in group])
            place = torch.arange(self.lengths[group[0]])
            index = (starts[group].unsqueeze(1) + place).flatten()
            inside = (place < lengths.unsqueeze(1)).flatten().nonzero().squeeze(1)
            places[index[inside]] = first + inside
            rows.append(index.clamp(max=self.tokens - 1))
            shapes.append((len(group), len(place)))
            first += len(index)
        return PaddedBatches(shapes, self._sent(torch.cat(rows)), self._sent(places))

    def _sent(self, x: torch.Tensor) -> torch.Tensor:
        if self.cu_seqlens.is_cuda:
            x = x.pin_memory()
        return x.to(self.cu_seqlens.device, non_blocking=True)


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of nonzero lengths, the longest first, in groups none of which spans more than a quarter."""
    groups: list[list[int]] = []
    shortest = 0
    order = sorted((n for n, length in enumerate(lengths) if length), key=lengths.__getitem__)
    for n in reversed(order):
        if not groups or lengths[n] < shortest:
            groups.append([])
            shortest = lengths[n] * 3 // 4
        groups[-1].append(n)
    return groups
