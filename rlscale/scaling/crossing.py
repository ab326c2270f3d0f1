"""The crossing length: from which output length on the hybrid is ahead of full MLA."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlscale.scaling.pairs import carry_interval, resampled_log_ratios

_RESAMPLES = 4000

COMPARED = {
    "rollout_tokens_per_s": ("rollout throughput", 1),
    "cache_bytes_per_sequence": ("cache per sequence", -1),
    "pass_rate_end": ("final held-out pass rate", 1),
}
"""Quantities: what they are called, and whether more (1) or less (-1) is better."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where the hybrid overtakes full MLA in one quantity, along one ratio of budget to required length.

    Attributes:
        length: tokens; 0 where the hybrid is ahead at every length measured, infinite where it is not ahead
            at the longest.
        low, high: 95% paired bootstrap interval over seeds, 0 and infinity meaning the same; None where some
            length has fewer than three pairs of seeds, or a seed at 0.
        lengths: shortest and longest length measured.
    """

    quantity: str
    budget_ratio: float
    length: float
    low: float | None
    high: float | None
    lengths: tuple[int, int]

    def record(self) -> dict[str, Any]:
        """As JSON can hold it: infinity, not ahead at the longest length, becomes "never"."""
        fields = asdict(self) | {"lengths": list(self.lengths)}
        return {key: "never" if value == math.inf else value for key, value in fields.items()}


def crossings(rows: Iterable[dict[str, Any]]) -> list[Crossing]:
    """Crossing lengths of a summary's rows (`rlscale.scaling.summary.summarise`), per quantity and budget, of
    the preset's hybrid: other ratios of KDA to MLA are compared length by length.

    Between two measured lengths the logarithm of hybrid/MLA is taken as linear in the logarithm of the
    length; the crossing is the last point where the hybrid gets ahead. Lengths without a pair of seeds do not
    count, and fewer than two lengths have no crossing.
    """
    pairs: dict[tuple[float, int], dict[int, dict[str, dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        ratio = round((row["budget"] - 1) / row["required_length"], 2)
        pairs[ratio, row["required_length"]][row["seed"]][row["architecture"]] = row
    found = []
    for ratio in sorted({ratio for ratio, _ in pairs}):
        for quantity in COMPARED:
            by_length = {}
            for length in sorted(length for other, length in pairs if other == ratio):
                both = [
                    (sides["hybrid"][quantity], sides["mla"][quantity])
                    for sides in pairs[ratio, length].values()
                    if {"hybrid", "mla"} <= sides.keys()
                ]
                values = np.array([pair for pair in both if None not in pair], dtype=float)
                if len(values) and (values.mean(axis=0) > 0).all():
                    by_length[length] = values
            if len(by_length) > 1:
                found.append(_crossing(quantity, ratio, by_length))
    return found


def _crossing(quantity: str, budget_ratio: float, by_length: dict[int, np.ndarray]) -> Crossing:
    lengths = np.array(list(by_length), dtype=float)
    sign = COMPARED[quantity][1]
    ahead = np.array([np.log(v[:, 0].mean() / v[:, 1].mean()) for v in by_length.values()]) * sign
    length = float(_last_rise(np.log(lengths), ahead[None])[0])
    low = high = None
    if all(carry_interval(values) for values in by_length.values()):
        rng = np.random.default_rng(0)
        columns = [sign * resampled_log_ratios(values, _RESAMPLES, rng) for values in by_length.values()]
        drawn = np.sort(_last_rise(np.log(lengths), np.stack(columns, axis=1)))
        # Order statistics, because interpolating between a number and infinity has no meaning.
        low = float(drawn[int(0.025 * _RESAMPLES)])
        high = float(drawn[int(0.975 * _RESAMPLES)])
    return Crossing(quantity, budget_ratio, length, low, high, (int(lengths[0]), int(lengths[-1])))


def _last_rise(log_lengths: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """Length where each row of `ahead` [rows, lengths] turns positive for good; 0 if it always was, else
    infinity."""
    result = np.where(ahead[:, -1] > 0, 0.0, np.inf)
    for i in range(ahead.shape[1] - 1):
        before, after = ahead[:, i], ahead[:, i + 1]
        rises = (before <= 0) & (after > 0)
        share = before / np.where(rises, before - after, 1.0)
        at = np.exp(log_lengths[i] + share * (log_lengths[i + 1] - log_lengths[i]))
        result = np.where(rises & np.isfinite(result), at, result)
    return result
