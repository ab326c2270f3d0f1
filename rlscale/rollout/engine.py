"""What the harness asks of an engine that samples completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from rlscale.types import GenerationReport, Sampling


class RolloutEngine(Protocol):
    """Samples completions from one policy whose weights can be replaced between calls.

    An engine starts with unspecified weights: every weight arrives through `load_weights`.
    """

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> GenerationReport:
        """Draws `sampling.samples` completions for each prompt (token ids), in the order of the prompts.

        Raises:
            UserError: a prompt plus the budget exceeds the context that the engine was built for.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces every weight by tensors under their names in the released checkpoint format.

        Completions drawn afterwards carry `version`. The tensors may be views of memory that the caller
        reuses once this returns.

        Raises:
            ValueError: a name is missing, unknown or given twice, or a shape differs; the message names them.
        """
        ...

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of cache that one sequence of `tokens` tokens occupies, as this engine lays it out."""
        ...

    def close(self) -> None:
        """Frees the engine's memory and processes; calling it twice is harmless."""
        ...
