"""The bootstrap of a ratio over paired seeds, made honest for the few seeds that sweeps have."""

from __future__ import annotations

import numpy as np

_PAIRS_LEAST = 3  # of two, Student's t is 12.7 standard errors on each side, which tells nothing


def carry_interval(pairs: np.ndarray) -> bool:
    """Whether pairs, [n, 2], have an interval of their ratio: at least three, and none of their numbers 0,
    because a resampled mean might then be 0 and have no ratio."""
    return len(pairs) >= _PAIRS_LEAST and bool((pairs > 0).all())


def resampled_log_ratios(pairs: np.ndarray, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap samples of the logarithm of a ratio of means, whose percentiles are its intervals.

    Drawing pairs with replacement keeps what a seed does to both sides together, but of three pairs it gives
    no more than their own range: "95%" intervals cover the truth in three cases of four. So each sample's
    deviation from the ratio of all pairs is divided by a standard deviation as uncertain as that of so few
    pairs, sqrt(chi^2_(n-1) / n), as Student's t divides a normal deviation.

    Args:
        pairs: [n, 2], numerators and denominators, as `carry_interval` asks.
        samples: how many to draw.

    Returns:
        [samples], natural logarithms.
    """
    count = len(pairs)
    means = pairs[rng.integers(count, size=(samples, count))].mean(axis=1)
    drawn = np.log(means[:, 0] / means[:, 1])
    whole = pairs.mean(axis=0)
    centre = np.log(whole[0] / whole[1])
    return np.asarray(centre + (drawn - centre) * np.sqrt(count / rng.chisquare(count - 1, size=samples)))
