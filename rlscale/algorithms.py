"""The algorithms as configuration: a union whose members' defaults are the settings that their papers vetted.

A member holds what its own loss and advantage read, so a combination that no paper means cannot be written.
Its functions are in `rlscale.learner.losses` and `rlscale.learner.advantages`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rlscale.sections import Section

LossMean = Literal["token", "sequence", "prompt"]
Data = Literal["solutions"] | Path


class NoCorrection(Section):
    """The ratio is taken to the rollout's own log-probabilities, mismatch and staleness included."""

    kind: Literal["none"] = "none"
    """No correction."""


class Correction(Section):
    """The ratio is taken to the learner's own policy at the start of the step; the ratio of that policy to
    the one that drew the tokens becomes a weight on the loss, kept within bounds. Costs a forward pass over
    all but the first of a step's updates: nothing with `learner.updates_per_step: 1`, where the ratio is 1
    and no clip acts."""

    kind: Literal["truncate", "mask"] = "truncate"
    """A weight beyond the bounds is set to the bound (truncated importance sampling), or to 0 (masked: on
    tokens IcePop, arXiv:2510.18855, with low 0.5 and high 5)."""
    level: Literal["token", "sequence"] = "token"
    """A weight for each token, or the product of a completion's for all its tokens: unbiased, and wild for
    long completions."""
    low: float = Field(0.0, ge=0, le=1)
    """Least weight."""
    high: float = Field(2.0, ge=1)
    """Greatest weight."""


ImportanceConfig = Annotated[NoCorrection | Correction, Field(discriminator="kind")]


class SelectionConfig(Section):
    """What of the rollouts is trained on, and which prompts are drawn."""

    equal_rewards: Literal["keep", "drop", "redraw"] = "keep"
    """Prompts whose completions all earned the same teach nothing. keep: they count in the loss's mean. drop:
    they are left out (zero-variance filtering, arXiv:2510.13786). redraw: further prompts take their places
    (dynamic sampling, arXiv:2503.14476), which costs their generation."""
    max_draws: int = Field(10, ge=1)
    """Draws of `rollout.prompts_per_step` prompts that a step may take until there is enough to train on: one
    prompt for drop, in whole batches, else all of them. Then the run ends with an error."""
    retire_pass_rate: float | None = Field(None, gt=0, le=1)
    """Prompts whose completions so far passed at this rate are not drawn again (no-positive-resampling,
    arXiv:2510.13786). Matters where a task has few prompts; remembers every prompt drawn."""
    overlong_buffer: float = Field(0.0, ge=0, lt=1)
    """Last fraction of the budget in which the reward falls linearly, by 1 at the budget's end (soft overlong
    punishment, arXiv:2503.14476, eq. 13). No completion of the required length is punished."""
    after_error: Literal["keep", "drop"] = "keep"
    """Tokens after a completion's first error, which its reward no longer depends on: the policy gradient is
    the same on average without them, and less noisy. drop: they are not trained on."""


class InterruptionConfig(Section):
    """Forced interruption by length (arXiv:2510.13786, appendix A.10): a completion that spent its budget is
    told to stop thinking, and may answer. The forced text is not trained on."""

    answer_tokens: int = Field(0, ge=0)
    """Tokens for the answer, beyond the budget; 0 interrupts nothing, and the completion stays cut off."""
    text: str = Field("</think>", min_length=1)
    """Ends a thought. What is scored is what follows its last occurrence, in every completion."""


class Algorithm(Section):
    """What every algorithm can be combined with."""

    importance: ImportanceConfig = Correction()
    """Correction for the mismatch between rollout and learner."""
    selection: SelectionConfig = SelectionConfig()
    """Which rollouts are trained on."""
    interruption: InterruptionConfig = InterruptionConfig()
    """What happens at the end of the budget."""


class GRPOConfig(Algorithm):
    """Group Relative Policy Optimization (arXiv:2402.03300) with the token mean of DAPO, no KL term."""

    kind: Literal["grpo"] = "grpo"
    """Which algorithm; the keys beside it are its own."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.28, gt=0)
    """Above clip_low, so that rare tokens can gain probability (DAPO's clip-higher)."""
    scale_by_std: bool = True
    """Divide the centred rewards by their group's standard deviation."""
    mean: LossMean = "token"
    """Over tokens, or first within each completion (sequence, as in the paper) or within each prompt."""


class DrGRPOConfig(Algorithm):
    """Dr. GRPO (arXiv:2503.20783): neither length nor a group's standard deviation biases the gradient."""

    kind: Literal["dr_grpo"] = "dr_grpo"
    """Which algorithm."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.2, gt=0)
    """As clip_low."""
    divisor: int | None = Field(None, ge=1)
    """Tokens that the sum over a completion is divided by, whatever its length; default: the budget."""


class DAPOConfig(Algorithm):
    """DAPO (arXiv:2503.14476): clip-higher, token mean, dynamic sampling, soft overlong punishment."""

    kind: Literal["dapo"] = "dapo"
    """Which algorithm."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.28, gt=0)
    """Above clip_low, so that rare tokens can gain probability."""
    selection: SelectionConfig = SelectionConfig(equal_rewards="redraw", overlong_buffer=0.2)
    """Dynamic sampling, and the paper's ratio of buffer to budget, 4,096 to 20,480."""


class RLOOConfig(Algorithm):
    """REINFORCE leave-one-out (arXiv:2402.14740): a completion is one action, its baseline the others' mean
    reward."""

    kind: Literal["rloo"] = "rloo"
    """Which algorithm."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio of the whole completion is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.2, gt=0)
    """As clip_low."""


class ReinforcePlusPlusConfig(Algorithm):
    """REINFORCE++ (arXiv:2501.03262): advantages normalised over the batch, clipped ratios, no KL term."""

    kind: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    """Which algorithm."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The importance ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(0.2, gt=0)
    """As clip_low."""
    group_baseline: bool = True
    """Centre rewards within their prompts first (REINFORCE++-baseline, for verifiable rewards), or only over
    the batch."""


class GSPOConfig(Algorithm):
    """Group Sequence Policy Optimization (arXiv:2507.18071): the ratio is a completion's, per token in the
    geometric mean, and clipped as a whole."""

    kind: Literal["gspo"] = "gspo"
    """Which algorithm."""
    clip_low: float = Field(3e-4, gt=0, lt=1)
    """The completion's ratio is clipped to [1 - clip_low, 1 + clip_high]."""
    clip_high: float = Field(4e-4, gt=0)
    """So small because the mean over a completion moves little."""


class _TruncatedRatio(Algorithm):
    importance: ImportanceConfig = NoCorrection()
    """None, since the loss truncates the ratio to the rollout's own policy."""
    max_ratio: float = Field(5.0, ge=1)
    """The importance ratio is truncated at it; tokens beyond still give gradient."""


class CISPOConfig(_TruncatedRatio):
    """CISPO (arXiv:2506.13585): REINFORCE weighted by truncated importance ratios, with gradient from every
    token."""

    kind: Literal["cispo"] = "cispo"
    """Which algorithm."""
    advantage_scale: Literal["group", "batch", "none"] = "group"
    """Divide the centred rewards by the standard deviation of their group, by that of the batch, or not."""
    mean: LossMean = "token"
    """Over tokens, or first within each completion (sequence) or within each prompt."""


class ScaleRLConfig(_TruncatedRatio):
    """The recipe of ScaleRL (arXiv:2510.13786, section 4): CISPO, prompt mean, advantages scaled over the
    batch, zero-variance filtering, no-positive-resampling, forced interruption. The learner's head computes
    in float32 under every algorithm."""

    kind: Literal["scalerl"] = "scalerl"
    """Which algorithm."""
    advantage_scale: Literal["group", "batch", "none"] = "batch"
    """Divide the centred rewards by the standard deviation of their group, by that of the batch, or not."""
    mean: LossMean = "prompt"
    """Over tokens, or first within each completion (sequence) or within each prompt."""
    selection: SelectionConfig = SelectionConfig(equal_rewards="drop", retire_pass_rate=0.9)
    """Zero-variance filtering and no-positive-resampling."""
    interruption: InterruptionConfig = InterruptionConfig(answer_tokens=32)
    """After the budget."""


class PTXConfig(Section):
    """A supervised loss beside the policy's, so that what was learned before is not forgotten."""

    data: Data | None = None
    """A file of JSON lines with prompt and completion, or `solutions`: the task's own. Without data there is
    no such loss."""
    weight: float = Field(0.1, gt=0)
    """Of its token mean, beside the policy loss."""
    batch_size: int = Field(16, ge=1)
    """Examples for each update."""


class MirrorDescentConfig(Algorithm):
    """Policy mirror descent of Kimi k1.5 (arXiv:2501.12599, section 2.3.2), which trained Kimi Linear: the
    squared error between centred reward and scaled log-ratio. The pull towards the last policy acts from a
    step's second update on."""

    kind: Literal["mirror_descent"] = "mirror_descent"
    """Which algorithm."""
    tau: float = Field(0.01, gt=0)
    """Strength of the pull towards the policy at the start of the step."""
    ptx: PTXConfig = PTXConfig()
    """Supervised loss beside it."""


AlgorithmConfig = Annotated[
    GRPOConfig
    | DrGRPOConfig
    | DAPOConfig
    | RLOOConfig
    | ReinforcePlusPlusConfig
    | GSPOConfig
    | CISPOConfig
    | ScaleRLConfig
    | MirrorDescentConfig,
    Field(discriminator="kind"),
]
