"""What a step of RL costs in floating-point operations, whatever hardware did it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import KimiLinearConfig

from kimi_linear.flops import generation_flops, training_flops
from rlscale.types import Rollout


def step_flops(
    model: KimiLinearConfig, rollouts: Sequence[Rollout], learned_from: Sequence[Rollout]
) -> dict[str, float]:
    """`rollout_flops` to generate `rollouts` and `train_flops` for one gradient of `learned_from`.

    Every completion reads its prompt, though an engine may share that work within a group; the head predicts
    completion tokens alone.
    """
    generated, learned = (
        [(len(rollout.prompt_ids), len(rollout.completion.token_ids)) for rollout in some]
        for some in (rollouts, learned_from)
    )
    lengths = [prompt + completion for prompt, completion in learned]
    predicted = sum(completion for _, completion in learned)
    return {
        "rollout_flops": sum(generation_flops(model, *size).total for size in generated),
        "train_flops": training_flops(model, lengths, predicted=predicted).total,
    }
