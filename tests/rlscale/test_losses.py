"""The policy losses against hand-computed values, an independent float64 version and TRL."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlscale.config import GRPOConfig
from rlscale.learner.losses import PolicyTokens, grpo_loss, policy_loss

LOW, HIGH = 0.2, 0.28


def random_tokens(seed: int, n: int, spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logprobs, rollout_logprobs and advantages, float64: ratios on all sides of the clip, advantages of both
    signs and 0."""
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(n, generator=generator, dtype=torch.float64) * 3 - 0.1
    logprobs = rollout + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    advantages[torch.rand(n, generator=generator) < 0.1] = 0
    return logprobs, rollout, advantages


def numpy_loss_and_gradient(
    logprobs: np.ndarray, rollout: np.ndarray, advantages: np.ndarray, n: int
) -> tuple[float, np.ndarray]:
    """The loss token by token from its case distinction, and its derivative by hand."""
    loss, gradient = 0.0, np.zeros_like(logprobs)
    for t, (new, old, a) in enumerate(zip(logprobs, rollout, advantages, strict=True)):
        r = np.exp(new - old)
        if a >= 0 and r > 1 + HIGH:
            loss -= (1 + HIGH) * a / n
        elif a < 0 and r < 1 - LOW:
            loss -= (1 - LOW) * a / n
        else:
            loss -= r * a / n
            gradient[t] = -r * a / n
    return loss, gradient


def test_grpo_loss_and_metrics_equal_values_computed_by_hand() -> None:
    # Ratios 1.5 and 0.5, each with an advantage of either sign: the clip holds where it would help further.
    logprobs = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    loss, metrics = grpo_loss(PolicyTokens(logprobs, torch.zeros(5), advantages, 5), LOW, HIGH)
    # -(1.28 - 1.5 + 0.5 - 0.8 + 2.0) / 5
    assert loss.item() == pytest.approx(-0.296)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, 0.3, -0.1, 0.0, -0.4])
    assert metrics["clip_fraction"].item() == pytest.approx(0.4)
    assert metrics["ratio_mean"].item() == pytest.approx(1.0)
    # (2 (0.5 - ln 1.5) + 2 (-0.5 - ln 0.5)) / 5
    assert metrics["kl"].item() == pytest.approx(0.11507282898)
    assert not any(value.requires_grad for value in metrics.values())


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 200))
def test_grpo_loss_and_gradient_equal_an_independent_float64_version(seed: int, n: int) -> None:
    logprobs, rollout, advantages = random_tokens(seed, n)
    logprobs.requires_grad_()
    loss, _ = policy_loss(PolicyTokens(logprobs, rollout, advantages, n + 7), GRPOConfig())
    loss.backward()
    expected, gradient = numpy_loss_and_gradient(
        logprobs.detach().numpy(), rollout.numpy(), advantages.numpy(), n + 7
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), gradient, rtol=1e-12, atol=1e-15)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 100), data=st.data())
def test_losses_and_metrics_of_micro_batches_add_up_to_those_of_the_minibatch(
    seed: int, n: int, data: st.DataObject
) -> None:
    tokens = random_tokens(seed, n)
    cut = data.draw(st.integers(1, n - 1))
    whole = policy_loss(PolicyTokens(*tokens, n), GRPOConfig())
    parts = [
        policy_loss(PolicyTokens(*(x[part] for x in tokens), n), GRPOConfig())
        for part in (slice(cut), slice(cut, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value)


def test_grpo_kl_keeps_its_digits_for_a_nearly_unchanged_policy() -> None:
    # k3 of a log-ratio x is x^2 / 2 + ...: exp(x) - 1 - x in float32 would leave nothing but rounding.
    logprobs = torch.full((8,), -2.0) + 2.0**-13
    _, metrics = grpo_loss(PolicyTokens(logprobs, torch.full((8,), -2.0), torch.ones(8), 8), LOW, HIGH)
    assert metrics["kl"].item() == pytest.approx(2.0**-27, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_grpo_loss_and_gradient_equal_those_of_trl(seed: int) -> None:
    """TRL's own `GRPOTrainer._compute_loss`, given this batch's log-probabilities in place of a model's."""
    from trl import GRPOTrainer

    lengths = [3, 7, 1, 5]
    n, batch, longest = sum(lengths), len(lengths), max(lengths)
    logprobs, rollout, _ = random_tokens(seed, n)
    of_sequence = torch.tensor([1.3, -0.4, 0.0, -0.9], dtype=torch.float64)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    advantages = of_sequence[:, None].expand(batch, longest)[mask]

    ours = logprobs.clone().requires_grad_()
    loss, _ = grpo_loss(PolicyTokens(ours, rollout, advantages, n), LOW, HIGH)
    loss.backward()

    def padded(x: torch.Tensor) -> torch.Tensor:
        return torch.full((batch, longest), -1.0, dtype=torch.float64).masked_scatter(mask, x)

    theirs = logprobs.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            padded(theirs),
            torch.zeros(batch, longest),
            None,
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x),
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=HIGH,
        epsilon_low=LOW,
        importance_sampling_level="token",
        loss_type="dapo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    inputs = {
        "prompt_ids": torch.zeros(batch, 2, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 2, dtype=torch.long),
        "completion_ids": torch.zeros(batch, longest, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": of_sequence,
        "old_per_token_logps": padded(rollout),
        "num_items_in_batch": torch.tensor(float(n)),
    }
    reference = GRPOTrainer._compute_loss(trainer, None, inputs)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
