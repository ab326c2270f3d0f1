"""What a step of RL costs in floating-point operations, whatever hardware did it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import KimiLinearConfig

from kimi_linear.flops import generation_flops, training_flops
from rlscale.types import Rollout


def step_flops(model: KimiLinearConfig, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`rollout_flops` to generate these rollouts and `train_flops` for one gradient of them.

    Every completion reads its prompt, though an engine may share that work within a group; the head predicts
    completion tokens alone.
    """
    sizes = [(len(rollout.prompt_ids), len(rollout.completion.token_ids)) for rollout in rollouts]
    generated = sum(completion for _, completion in sizes)
    lengths = [prompt + completion for prompt, completion in sizes]
    return {
        "rollout_flops": sum(generation_flops(model, *size).total for size in sizes),
        "train_flops": training_flops(model, lengths, predicted=generated).total,
    }
