"""The policy losses against hand-computed values, an independent float64 version and TRL."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlscale.algorithms import (
    AlgorithmConfig,
    CISPOConfig,
    DAPOConfig,
    DrGRPOConfig,
    GRPOConfig,
    GSPOConfig,
    MirrorDescentConfig,
    ReinforcePlusPlusConfig,
    RLOOConfig,
    ScaleRLConfig,
)
from rlscale.config import RunConfig
from rlscale.learner.losses import (
    PolicyTokens,
    cispo_loss,
    clipped_loss,
    gspo_loss,
    mirror_descent_loss,
    policy_loss,
    rloo_loss,
)
from rlscale.learner.metrics import combined
from rlscale.sections import sections

LOW, HIGH = 0.2, 0.28
ALGORITHMS: list[AlgorithmConfig] = [
    GRPOConfig(),
    GRPOConfig(mean="sequence"),
    GRPOConfig(mean="prompt"),
    DrGRPOConfig(divisor=9),
    DAPOConfig(),
    RLOOConfig(),
    ReinforcePlusPlusConfig(),
    GSPOConfig(),
    GSPOConfig(clip_low=0.1, clip_high=0.1),
    CISPOConfig(),
    CISPOConfig(max_ratio=1.1, mean="sequence"),
    ScaleRLConfig(),
    MirrorDescentConfig(),
    MirrorDescentConfig(tau=0.7),
]


def batch_of(lengths: Sequence[int], prompts: Sequence[int], seed: int, spread: float = 0.3) -> PolicyTokens:
    """A whole minibatch in float64: ratios on all sides of the clip, advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator, dtype=torch.float64)

    n, of_sequence = sum(lengths), torch.tensor(lengths)
    old = -3 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.1
    advantages = normal(len(lengths))
    advantages[torch.rand(len(lengths), generator=generator) < 0.1] = 0
    tokens: dict[int, int] = defaultdict(int)
    for length, prompt in zip(lengths, prompts, strict=True):
        tokens[prompt] += length
    return PolicyTokens(
        logprobs=(old + spread * normal(n)).requires_grad_(),
        old_logprobs=old,
        weights=2 * torch.rand(n, generator=generator, dtype=torch.float64),
        advantages=advantages.repeat_interleave(of_sequence),
        lengths=of_sequence,
        prompt_tokens=torch.tensor([tokens[prompt] for prompt in prompts]),
        minibatch_tokens=n,
        minibatch_sequences=len(lengths),
        minibatch_prompts=len(set(prompts)),
    )


def by_hand(
    ratios: Sequence[float], advantages: Sequence[float], lengths: Sequence[int], prompt_tokens: Sequence[int]
) -> PolicyTokens:
    """A minibatch of known ratios and advantages (of completions), with weights of 1 and π_old of 1."""
    return PolicyTokens(
        logprobs=torch.tensor(ratios).log().requires_grad_(),
        old_logprobs=torch.zeros(len(ratios)),
        weights=torch.ones(len(ratios)),
        advantages=torch.tensor(advantages).repeat_interleave(torch.tensor(lengths)),
        lengths=torch.tensor(lengths),
        prompt_tokens=torch.tensor(prompt_tokens),
        minibatch_tokens=len(ratios),
        minibatch_sequences=len(lengths),
        minibatch_prompts=2,
    )


def gradient(loss: torch.Tensor, tokens: PolicyTokens) -> list[float]:
    return torch.autograd.grad(loss, tokens.logprobs)[0].tolist()


def test_every_member_of_the_union_has_a_loss() -> None:
    known = set(sections(RunConfig.model_fields["algorithm"].annotation))
    assert known == {type(algorithm) for algorithm in ALGORITHMS}


def test_the_clipped_loss_and_its_metrics_equal_values_computed_by_hand() -> None:
    # Ratios 1.5 and 0.5, each with an advantage of either sign: the clip holds where it would help further.
    tokens = by_hand([1.5, 1.5, 0.5, 0.5, 1.0], [1.0, -1.0, 1.0, -1.0, 2.0], [1] * 5, [1] * 5)
    loss, metrics = clipped_loss(tokens, LOW, HIGH, "token")
    # -(1.28 - 1.5 + 0.5 - 0.8 + 2.0) / 5
    assert loss.item() == pytest.approx(-0.296)
    assert gradient(loss, tokens) == pytest.approx([0.0, 0.3, -0.1, 0.0, -0.4])
    assert metrics["clip_fraction"].item() == pytest.approx(0.4)
    assert metrics["ratio_mean"].item() == pytest.approx(1.0)
    # (2 (0.5 - ln 1.5) + 2 (-0.5 - ln 0.5)) / 5
    assert metrics["kl"].item() == pytest.approx(0.11507282898)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("mean", "loss", "of_tokens"),
    [
        # The terms are the advantages 1, 1, 1 | -2 | 4 of three completions, the first two of one prompt.
        ("token", -(3 - 2 + 4) / 5, [-0.2, -0.2, -0.2, 0.4, -0.8]),
        ("sequence", -(1 - 2 + 4) / 3, [-1 / 9, -1 / 9, -1 / 9, 2 / 3, -4 / 3]),
        ("prompt", -((3 - 2) / 4 + 4) / 2, [-1 / 8, -1 / 8, -1 / 8, 1 / 4, -2]),
        (10, -(3 - 2 + 4) / (3 * 10), [-1 / 30, -1 / 30, -1 / 30, 1 / 15, -2 / 15]),
    ],
)
def test_the_means_equal_values_computed_by_hand(mean: Any, loss: float, of_tokens: list[float]) -> None:
    tokens = by_hand([1.0] * 5, [1.0, -2.0, 4.0], [3, 1, 1], [4, 4, 1])
    for found in (clipped_loss(tokens, LOW, HIGH, mean)[0], cispo_loss(tokens, 5.0, mean)[0]):
        assert gradient(found, tokens) == pytest.approx(of_tokens)
    assert clipped_loss(tokens, LOW, HIGH, mean)[0].item() == pytest.approx(loss)


def test_rloo_takes_a_completion_as_one_action_by_hand() -> None:
    # Products of ratios 1.1 * 1.2 = 1.32 (clipped at 1.28 since A > 0) and 0.9 * 0.8 = 0.72 (not: A > 0).
    tokens = by_hand([1.1, 1.2, 0.9, 0.8], [1.0, 2.0], [2, 2], [2, 2])
    loss, metrics = rloo_loss(tokens, LOW, HIGH)
    assert loss.item() == pytest.approx(-(1.28 + 1.44) / 2)
    assert gradient(loss, tokens) == pytest.approx([0, 0, -0.72, -0.72])
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)
    # On policy it is REINFORCE: every token of a completion has its advantage over the completions.
    tokens = by_hand([1.0] * 4, [1.0, -3.0], [3, 1], [3, 1])
    assert gradient(rloo_loss(tokens, LOW, HIGH)[0], tokens) == pytest.approx([-0.5, -0.5, -0.5, 1.5])


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.kind)
def test_no_ratio_is_too_large_for_finite_losses_gradients_and_metrics(algorithm: AlgorithmConfig) -> None:
    # e^60 for each token and e^120 for a completion, which float32 cannot hold; then e^180 for each.
    for log_ratio in (60.0, 180.0):
        logprobs = torch.tensor([log_ratio] * 6 + [-log_ratio] * 2 + [0.0]).requires_grad_()
        tokens = by_hand([1.0] * 9, [1.0, -1.0, 0.0, 1.0, 2.0], [2, 2, 2, 2, 1], [2, 2, 2, 2, 1])
        tokens = replace(tokens, logprobs=logprobs)
        loss, metrics = policy_loss(tokens, algorithm)
        slopes = gradient(loss, tokens)
        assert np.isfinite([loss.item(), *slopes, *(x.item() for x in metrics.values())]).all()
        # The completion beside them is trained on as ever.
        assert slopes[-1] < 0


def test_a_ratio_at_its_bound_counts_as_clipped() -> None:
    tokens = replace(by_hand([1.0], [-1.0], [1], [1]), logprobs=torch.tensor([20.5]).requires_grad_())
    loss, metrics = rloo_loss(tokens, LOW, HIGH)
    assert gradient(loss, tokens) == [0.0]
    assert metrics["clip_fraction"].item() == 1


def test_gspo_takes_the_geometric_mean_of_the_ratios_by_hand() -> None:
    # sqrt(4 * 1) = 2 with A = -1 is not clipped, sqrt(0.25) = 0.5 with A = -1 is, at 0.8.
    tokens = by_hand([4.0, 1.0, 0.5, 0.5], [-1.0, -1.0], [2, 2], [2, 2])
    loss, metrics = gspo_loss(tokens, LOW, HIGH)
    assert loss.item() == pytest.approx((2 + 0.8) / 2)
    # d s / d log π(t) = s / |y|
    assert gradient(loss, tokens) == pytest.approx([0.5, 0.5, 0, 0])
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)


def test_cispo_keeps_the_gradient_of_truncated_tokens_by_hand() -> None:
    tokens = by_hand([8.0, 2.0, 0.5], [1.0, -1.0, 2.0], [1, 1, 1], [1, 1, 1])
    loss, metrics = cispo_loss(tokens, 5.0, "token")
    assert loss.item() == pytest.approx(-(5 * np.log(8) - 2 * np.log(2) + 1 * np.log(0.5)) / 3)
    assert gradient(loss, tokens) == pytest.approx([-5 / 3, 2 / 3, -1 / 3])
    assert metrics["clip_fraction"].item() == pytest.approx(1 / 3)


def test_mirror_descent_equals_values_computed_by_hand() -> None:
    # Completion 1: A = 1, sum of log-ratios ln 6; completion 2: A = -0.5, log-ratio ln 0.5. tau = 0.5.
    tokens = by_hand([2.0, 3.0, 0.5], [1.0, -0.5], [2, 1], [3, 3])
    loss, metrics = mirror_descent_loss(tokens, tau=0.5)
    first, second = 2 - np.log(6), -1 - np.log(0.5)
    assert loss.item() == pytest.approx((0.25 * first**2 / 2 + 0.25 * second**2) / 2)
    # -tau (A / tau - sum) / |y| / S for each token
    assert gradient(loss, tokens) == pytest.approx([-first / 8, -first / 8, -second / 4])
    assert "clip_fraction" not in metrics


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_mirror_descent_starts_as_reinforce_with_a_mean_over_lengths(seed: int, lengths: list[int]) -> None:
    tokens = batch_of(lengths, [0] * len(lengths), seed, spread=0.0)
    found = gradient(policy_loss(tokens, MirrorDescentConfig())[0], tokens)
    of_tokens = tokens.lengths.repeat_interleave(tokens.lengths)
    # A completion's weight is the mean of its tokens'.
    weights = torch.cat([part.mean().expand(len(part)) for part in tokens.weights.split(lengths)])
    assert found == pytest.approx(
        (-weights * tokens.advantages / of_tokens / len(lengths)).tolist(), rel=1e-9
    )


def test_the_pull_towards_the_old_policy_wins_over_a_small_advantage() -> None:
    # The completion became likelier by more than A / tau: its likelihood is pushed back down.
    tokens = by_hand([2.0], [0.5], [1], [1])
    assert gradient(mirror_descent_loss(tokens, tau=1.0)[0], tokens)[0] > 0
    assert gradient(mirror_descent_loss(tokens, tau=0.5)[0], tokens)[0] < 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 200))
def test_the_default_loss_and_gradient_equal_an_independent_float64_version(seed: int, n: int) -> None:
    tokens = batch_of([1] * n, [0] * n, seed)
    loss, _ = policy_loss(tokens, GRPOConfig())
    expected, slopes = 0.0, []
    for new, old, a, w in zip(
        *(
            x.detach().tolist()
            for x in (tokens.logprobs, tokens.old_logprobs, tokens.advantages, tokens.weights)
        ),
        strict=True,
    ):
        r = np.exp(new - old)
        clipped = (a >= 0 and r > 1 + HIGH) or (a < 0 and r < 1 - LOW)
        expected -= w * a * (np.clip(r, 1 - LOW, 1 + HIGH) if clipped else r) / n
        slopes.append(0.0 if clipped else -w * r * a / n)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert gradient(loss, tokens) == pytest.approx(slopes, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.kind)
@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=8),
    data=st.data(),
)
def test_losses_and_metrics_of_micro_batches_add_up_to_those_of_the_minibatch(
    algorithm: AlgorithmConfig, seed: int, lengths: list[int], data: st.DataObject
) -> None:
    prompts = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    whole = batch_of(lengths, prompts, seed)
    cut = data.draw(st.integers(1, len(lengths) - 1))
    at = sum(lengths[:cut])

    def part(of_tokens: slice, of_sequences: slice) -> PolicyTokens:
        cut_tokens = {
            name: getattr(whole, name)[of_tokens]
            for name in ("logprobs", "old_logprobs", "weights", "advantages")
        }
        cut_sequences = {name: getattr(whole, name)[of_sequences] for name in ("lengths", "prompt_tokens")}
        return replace(whole, **cut_tokens, **cut_sequences)

    loss, metrics = policy_loss(whole, algorithm)
    first = policy_loss(part(slice(at), slice(cut)), algorithm)
    second = policy_loss(part(slice(at, None), slice(cut, None)), algorithm)
    torch.testing.assert_close(first[0] + second[0], loss)
    torch.testing.assert_close(combined(combined({}, first[1]), second[1]), metrics)
    assert gradient(first[0] + second[0], whole) == pytest.approx(gradient(loss, whole), rel=1e-9, abs=1e-12)


def test_maxima_of_micro_batches_do_not_add_up() -> None:
    one, two = ({"x_max": torch.tensor(x), "x": torch.tensor(x)} for x in (3.0, 2.0))
    assert combined(combined({}, one), two) == {"x_max": 3.0, "x": 5.0}


def test_kl_keeps_its_digits_for_a_nearly_unchanged_policy() -> None:
    # k3 of a log-ratio x is x^2 / 2 + ...: exp(x) - 1 - x in float32 would leave nothing but rounding.
    tokens = replace(
        by_hand([1.0] * 8, [1.0] * 8, [1] * 8, [8] * 8), old_logprobs=torch.full((8,), -(2.0**-13))
    )
    _, metrics = clipped_loss(tokens, LOW, HIGH, "token")
    assert metrics["kl"].item() == pytest.approx(2.0**-27, rel=1e-3)


def test_an_unsettled_divisor_is_refused_and_the_budget_settles_it() -> None:
    tokens = by_hand([1.0], [1.0], [1], [1])
    with pytest.raises(ValueError, match="resolved_algorithm"):
        policy_loss(tokens, DrGRPOConfig())
    config = RunConfig.model_validate({"algorithm": {"kind": "dr_grpo"}, "rollout": {"max_tokens": 50}})
    assert policy_loss(tokens, config.resolved_algorithm)[0].item() == pytest.approx(-1 / 50)
    given = RunConfig.model_validate({"algorithm": {"kind": "dr_grpo", "divisor": 7}})
    assert given.resolved_algorithm == given.algorithm


TRL_CASES: dict[str, tuple[AlgorithmConfig, dict[str, Any]]] = {
    "grpo": (GRPOConfig(mean="sequence"), {"loss_type": "grpo"}),
    "bnpo": (GRPOConfig(), {"loss_type": "bnpo"}),
    "dapo": (DAPOConfig(), {"loss_type": "dapo"}),
    "dr_grpo": (DrGRPOConfig(divisor=12), {"loss_type": "dr_grpo", "epsilon_high": 0.2}),
    "gspo": (
        GSPOConfig(clip_low=0.03, clip_high=0.04),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.03,
            "epsilon_high": 0.04,
        },
    ),
    "cispo": (CISPOConfig(max_ratio=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "rloo": (RLOOConfig(), {"epsilon_high": 0.2}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "weighted"),
    [(name, weighted) for name in TRL_CASES for weighted in (False, True) if name != "rloo" or not weighted],
)
def test_losses_and_gradients_equal_those_of_trl(name: str, weighted: bool, seed: int) -> None:
    """The trainers' own `_compute_loss`, given this batch's log-probabilities in place of a model's. Their
    RLOO knows no importance weights."""
    from trl import GRPOTrainer, RLOOTrainer

    algorithm, options = TRL_CASES[name]
    lengths = [3, 7, 1, 5]
    tokens = batch_of(lengths, [0, 0, 1, 1], seed)
    if not weighted:
        tokens = replace(tokens, weights=torch.ones_like(tokens.weights))
    batch, longest = len(lengths), max(lengths)
    mask = torch.arange(longest) < tokens.lengths[:, None]

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.full((batch, longest), -1.0, dtype=torch.float64).masked_scatter(mask, x)

    theirs = tokens.logprobs.detach().clone().requires_grad_()
    settled = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            padded(theirs),
            torch.zeros(batch, longest),
            None,
        ),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_entropy_bonus_enabled": False,
        "accelerator": SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        "args": SimpleNamespace(delta=None, steps_per_generation=1),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_high": HIGH,
        "epsilon_low": LOW,
        "importance_sampling_level": "token",
        "max_completion_length": 12,
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": weighted,
        "vllm_importance_sampling_correction": weighted,
    }
    trainer = SimpleNamespace(**settled | options)
    firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    inputs = {
        "prompt_ids": torch.zeros(batch, 2, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 2, dtype=torch.long),
        "completion_ids": torch.zeros(batch, longest, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": tokens.advantages[firsts],
        "old_per_token_logps": padded(tokens.old_logprobs),
        "old_logps": torch.stack([part.sum() for part in tokens.old_logprobs.split(lengths)]),
        "importance_sampling_ratio": padded(tokens.weights),
        "num_items_in_batch": torch.tensor(float(sum(lengths))),
    }
    compute = RLOOTrainer._compute_loss if name == "rloo" else GRPOTrainer._compute_loss
    reference = compute(trainer, None, inputs)
    loss, _ = policy_loss(tokens, algorithm)
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-14)
    (expected,) = torch.autograd.grad(reference, theirs)
    assert gradient(loss, tokens) == pytest.approx(expected.tolist(), rel=1e-10, abs=1e-14)
