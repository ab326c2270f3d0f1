"""Packed sequences: many sequences in one row of tokens, with their boundaries."""

from dataclasses import dataclass
from functools import cached_property

import torch

from kimi_linear.ops.arguments import check_cu_seqlens
from kimi_linear.ops.packing import token_positions, uniform_cu_seqlens


@dataclass(frozen=True)
class PackedSequences:
    """Boundaries of sequences packed into T tokens, and what layers derive from them once for all.

    Attributes:
        cu_seqlens: [N + 1] int, from 0 to T.
        tokens: T.
    """

    cu_seqlens: torch.Tensor
    tokens: int

    @classmethod
    def checked(cls, cu_seqlens: torch.Tensor, tokens: int) -> "PackedSequences":
        """Raise ValueError unless the boundaries run from 0 to `tokens` without decreasing.

        On a GPU their values go unchecked: the host would wait for them.
        """
        check_cu_seqlens(cu_seqlens, 1, tokens, cu_seqlens.device)
        return cls(cu_seqlens, tokens)

    @classmethod
    def uniform(cls, sequences: int, length: int, device: torch.device) -> "PackedSequences":
        """Sequences of one length; nothing that layers derive from them waits for a GPU."""
        packed = cls(uniform_cu_seqlens(sequences, length, device), sequences * length)
        packed.__dict__["lengths"] = [length] * sequences  # where `cached_property` keeps what it knows
        return packed

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sequence. On a GPU the host waits for them, once."""
        return self.cu_seqlens.diff().tolist()

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] position of each token in its sequence."""
        return token_positions(self.cu_seqlens, self.tokens)[0]

    @cached_property
    def last_tokens(self) -> torch.Tensor:
        """[N] row of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1
