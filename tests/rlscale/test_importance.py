"""Importance corrections and the metrics of the mismatch between rollout and learner."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlscale.algorithms import Correction, NoCorrection
from rlscale.learner.importance import importance_weights, mismatch_metrics
from rlscale.learner.metrics import combined

# Two completions: ratios of tokens 3, 0.5, 1 (their product 1.5) and 0.25, 2 (0.5).
OLD = torch.tensor([3.0, 0.5, 1.0, 0.25, 2.0]).log()
ROLLOUT = torch.zeros(5)
LENGTHS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (Correction(kind="truncate", high=2), [2, 0.5, 1, 0.25, 2]),
        (Correction(kind="truncate", low=0.4, high=1), [1, 0.5, 1, 0.4, 1]),
        (Correction(kind="mask", low=0.5, high=2), [0, 0.5, 1, 0, 2]),
        (Correction(kind="truncate", level="sequence", high=1.2), [1.2, 1.2, 1.2, 0.5, 0.5]),
        (Correction(kind="mask", level="sequence", low=0.6, high=2), [1.5, 1.5, 1.5, 0, 0]),
    ],
)
def test_weights_equal_values_computed_by_hand(config: Correction, weights: list[float]) -> None:
    assert importance_weights(OLD, ROLLOUT, LENGTHS, config).tolist() == pytest.approx(weights)


def test_metrics_equal_values_computed_by_hand() -> None:
    metrics = mismatch_metrics(OLD, ROLLOUT, LENGTHS, Correction(high=2), 5, 2)
    logs = [math.log(x) for x in (3, 0.5, 1, 0.25, 2)]
    expected = {
        "mismatch_mean": sum(map(abs, logs)) / 5,
        "mismatch_max": math.log(4),
        "mismatch_kl": sum(math.exp(x) - 1 - x for x in logs) / 5,
        "importance_mean": 6.75 / 5,
        "importance_max": 3,
        "importance_sequence_mean": 1.0,
        "importance_sequence_max": 1.5,
        "importance_bounded": 1 / 5,
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("config", "fraction"),
    [
        (NoCorrection(), 0.0),
        (Correction(kind="mask", low=0.5, high=2), 2 / 5),
        (Correction(kind="mask", level="sequence", low=0.6), 2 / 5),
        (Correction(kind="truncate", level="sequence", high=1.2), 3 / 5),
    ],
)
def test_the_fraction_counts_tokens_whose_weight_was_bounded(
    config: Correction | NoCorrection, fraction: float
) -> None:
    metrics = mismatch_metrics(OLD, ROLLOUT, LENGTHS, config, 5, 2)
    assert metrics["importance_bounded"].item() == pytest.approx(fraction)


@given(
    st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=7), min_size=2, max_size=6),
    st.sampled_from(["truncate", "mask"]),
    st.sampled_from(["token", "sequence"]),
)
def test_metrics_of_micro_batches_add_up_and_weights_stay_within_bounds(
    log_ratios: list[list[float]], kind: str, level: str
) -> None:
    config = Correction(kind=kind, level=level, low=0.5, high=3)  # type: ignore[arg-type]
    tokens = sum(map(len, log_ratios))

    def metrics_of(part: list[list[float]]) -> dict[str, torch.Tensor]:
        old = torch.tensor([x for own in part for x in own], dtype=torch.float64)
        lengths = torch.tensor([len(own) for own in part])
        weights = importance_weights(old, torch.zeros_like(old), lengths, config)
        assert bool(((weights >= 0.5) & (weights <= 3) | ((weights == 0) & (kind == "mask"))).all())
        return mismatch_metrics(old, torch.zeros_like(old), lengths, config, tokens, len(log_ratios))

    whole = metrics_of(log_ratios)
    parts = combined(combined({}, metrics_of(log_ratios[:1])), metrics_of(log_ratios[1:]))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_token_that_the_rollout_held_impossible_gives_a_finite_weight(level: str) -> None:
    old, rollout = torch.tensor([-0.1] * 50), torch.tensor([-400.0] * 50)
    config = Correction(level=level)  # type: ignore[arg-type]
    assert importance_weights(old, rollout, torch.tensor([50]), config).tolist() == [2.0] * 50
    metrics = mismatch_metrics(old, rollout, torch.tensor([50]), config, 50, 1)
    assert math.isfinite(metrics["importance_sequence_max"])


def test_no_gradient_flows_through_a_weight() -> None:
    old = OLD.clone().requires_grad_()
    assert not importance_weights(old, ROLLOUT, LENGTHS, Correction()).requires_grad
