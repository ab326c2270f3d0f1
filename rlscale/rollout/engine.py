"""What the harness asks of an engine that samples completions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from transformers import KimiLinearConfig

from rlscale.errors import UserError
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


def completion_seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one completion's random numbers, from the request's seed and its place there; below 2**63.

    Hashed, because requests of neighbouring seeds must not share streams: sample 1 of seed 7 is not
    sample 0 of seed 8.
    """
    digest = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stop_token_ids(model: KimiLinearConfig) -> list[int]:
    """The end-of-sequence tokens of a model: config.json names one or several."""
    eos = model.eos_token_id
    return list(eos) if isinstance(eos, list | tuple) else [eos]


def check_context(model: KimiLinearConfig, context: int) -> None:
    """Refuses a context longer than the model's own.

    Raises:
        UserError: names both.
    """
    longest = model.max_position_embeddings
    if context > longest:
        raise UserError(
            f"prompts and completions of up to {context} tokens exceed the model's context of {longest}: "
            "lower rollout.max_tokens or task.required_length, or raise model.overrides.model_max_length"
        )


def check_request(prompts: Sequence[Sequence[int]], sampling: Sampling, context: int) -> None:
    """Refuses what no engine can generate.

    Raises:
        UserError: a prompt is empty, or longer than `context` allows together with the budget.
    """
    for place, prompt in enumerate(prompts, sampling.first_prompt):
        if not len(prompt):
            raise UserError(f"prompt {place} has no tokens: a completion needs at least one to start from")
        if len(prompt) + sampling.max_tokens > context:
            raise UserError(
                f"prompt {place} has {len(prompt)} tokens and the budget is {sampling.max_tokens}, but the "
                f"engine's context is {context}: lower rollout.max_tokens or task.required_length"
            )
