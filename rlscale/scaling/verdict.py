"""What a sweep says about hybrid against full MLA, in sentences that carry their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlscale.runs import RunRecord
from rlscale.scaling.crossing import COMPARED, Crossing
from rlscale.scaling.curves import FittedCurve
from rlscale.scaling.fit import SigmoidFit
from rlscale.scaling.leads import MEASURES, Difference, Lead, Trend, trends
from rlscale.scaling.series import Cell
from rlscale.scaling.style import ARCHITECTURES, SHORT_NAMES
from rlscale.scaling.summary import Ratio

EXPECTED_METRICS = {
    "entropy": "entropy",
    "mismatch_mean": "rollout/learner mismatch",
    "staleness_mean": "staleness",
    "rollout_flops": "FLOPs",
    "truncated_fraction": "truncation",
}
"""Metrics that figures draw where a run recorded them, and what they are called."""

SUBJECTS = {
    name: "The hybrid" if name == "hybrid" else look.label
    for name, look in ARCHITECTURES.items()
    if name != "mla"
}
"""What sentences call each hybrid."""
_LEADS = {
    "rollout_tokens_per_s": ("generates faster", "generates more slowly"),
    "cache_bytes_per_sequence": ("needs less cache", "needs more cache"),
    "pass_rate_end": ("ends with the higher pass rate", "ends with the lower pass rate"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A headline, what it rests on, and what the runs cannot tell."""

    headline: str
    findings: list[str]
    missing: list[str]


def judge(
    runs: Sequence[RunRecord],
    ratios: Sequence[Ratio],
    crossings: Sequence[Crossing],
    curves: Sequence[FittedCurve],
    found: Sequence[Lead],
) -> Verdict:
    """Puts the comparison into words.

    Args:
        ratios, crossings: of the finished runs' summaries.
        curves: fitted, all against one compute axis.
        found: leads in held-out pass rate, of unfinished runs too.
    """
    findings, headlines = [], []
    over = trends(found)
    present = {ratio.architecture for ratio in ratios} | {lead.architecture for lead in found}
    for hybrid in (name for name in SUBJECTS if name in present):
        its = [ratio for ratio in ratios if ratio.architecture == hybrid]
        crossed = crossings if hybrid == "hybrid" else ()
        lead = max((x for x in found if x.architecture == hybrid), key=lambda x: x.cell, default=None)
        trend = max((x for x in over if x.architecture == hybrid), key=lambda x: x.budget_ratio, default=None)
        if lead:  # says more than the last evaluations alone
            its = [ratio for ratio in its if ratio.quantity != "pass_rate_end"]
        parts = _parts(its, crossed) + ([_pass_rates_part(trend or lead)] if lead else [])
        headlines.append(f"{SUBJECTS[hybrid]} {'; '.join(parts)}.")
        findings += [
            _about(SHORT_NAMES[hybrid], quantity, ratio, _along(crossed, quantity))
            for quantity in COMPARED
            if (ratio := _longest(its, quantity))
        ]
        if lead:
            findings += _about_pass_rates(SHORT_NAMES[hybrid], lead, trend)
    findings += _about_asymptotes(curves)
    findings += _about_extrapolation(curves)
    findings.append(_about_seeds(runs))
    nothing = "No verdict: no length has a finished run of a hybrid and of full MLA with the same seed."
    return Verdict(" ".join(headlines) or nothing, findings, _missing(runs, curves))


def unrecorded(runs: Sequence[RunRecord]) -> list[str]:
    """Metrics that figures would draw and that some of the runs that have trained did not record."""
    texts = []
    trained = [run for run in runs if run.metrics]
    for name, label in EXPECTED_METRICS.items():
        without = sum(all(m.get(name) is None for m in run.metrics) for run in trained)
        if without:
            texts.append(f"{label}: not recorded by {without} of {len(trained)} runs")
    return texts


def _parts(ratios: Sequence[Ratio], crossings: Sequence[Crossing]) -> list[str]:
    """Of the headline, one for each quantity."""
    parts = []
    for quantity, (ahead, behind) in _LEADS.items():
        ratio, crossing = _longest(ratios, quantity), _along(crossings, quantity)
        if ratio is None:
            continue
        if _equal(ratio):
            parts.append(f"equals full MLA in {COMPARED[quantity][0]} at {ratio.required_length:,} tokens")
        elif _undecided(ratio):
            parts.append(f"cannot be told from full MLA in {COMPARED[quantity][0]}")
        elif crossing is None:
            parts.append(f"{ahead if _hybrid_leads(ratio) else behind} at {ratio.required_length:,} tokens")
        elif crossing.length == 0:
            parts.append(f"{ahead} at every length measured")
        elif np.isinf(crossing.length):
            parts.append(f"{behind} at {crossing.lengths[1]:,} tokens, the longest measured")
        else:
            parts.append(f"{ahead} from about {crossing.length:,.0f} tokens of output on")
    return parts


def _pass_rates_part(found: Lead | Trend) -> str:
    """Of the headline: who has the higher pass rate at the end or, where that is open, on the way."""
    by = found.mean if isinstance(found, Trend) else found.by
    where = (
        f"over {_span(found)}" if isinstance(found, Trend) else f"at {found.cell.required_length:,} tokens"
    )
    if (end := by["end"]).decided:
        return f"ends with the {_higher(end)} pass rate {where} ({end.text()})"
    if (way := by["mean"]).decided:
        return f"has the {_higher(way)} pass rate on the way {where} ({way.text()}), not surely at the end"
    return f"cannot be told from full MLA in held-out pass rate {where}"


def _about_pass_rates(hybrid: str, lead: Lead, trend: Trend | None) -> list[str]:
    """A sentence for the end and one for the way there: over lengths, at the longest, and how it changes."""
    texts = []
    for name, gained in (("end", "end_gained"), ("mean", "mean_gained")):
        label = MEASURES[name].label
        text = f"Held-out pass rate {label}, {hybrid} less full MLA: "
        at = f"{lead.by[name].text()} at {lead.cell.required_length:,} tokens up to step {lead.step}"
        if trend is None:
            text += f"{at}; less what runs began with, {lead.by[gained].text()}"
        else:
            text += f"{trend.mean[name].text()} over {_span(trend)}, {at}; it changes by "
            text += f"{trend.per_doubling[name].text(3)} with each doubling of the length"
            text += f"; less what runs began with, {trend.mean[gained].text()} over all lengths"
        texts.append(f"{text} (95%, Welch).")
    return texts


def _span(trend: Trend) -> str:
    return f"{len(trend.lengths)} lengths of {trend.lengths[0]:,} to {trend.lengths[-1]:,} tokens"


def _higher(difference: Difference) -> str:
    return "higher" if difference.value > 0 else "lower"


def _undecided(ratio: Ratio) -> bool:
    """Whether the pairs of seeds leave open who is ahead. Without an interval they say nothing of what
    training decides; what the machine decides may stand on one."""
    if ratio.low is None or ratio.high is None:
        return ratio.quantity == "pass_rate_end"
    return ratio.low <= 1 <= ratio.high


def _equal(ratio: Ratio) -> bool:
    """Whether the pairs of seeds are the same beyond chance, as caches can be."""
    by_chance = ratio.quantity == "pass_rate_end" and ratio.low is None
    return ratio.ratio == 1 and ratio.low in (1, None) and ratio.high in (1, None) and not by_chance


def _hybrid_leads(ratio: Ratio) -> bool:
    return (ratio.ratio - 1) * COMPARED[ratio.quantity][1] > 0


def _longest(ratios: Sequence[Ratio], quantity: str) -> Ratio | None:
    mine = [r for r in ratios if r.quantity == quantity]
    return max(mine, key=lambda r: (r.required_length, r.budget), default=None)


def _along(crossings: Sequence[Crossing], quantity: str) -> Crossing | None:
    mine = [c for c in crossings if c.quantity == quantity]
    return max(mine, key=lambda c: c.budget_ratio, default=None)


def _about(hybrid: str, quantity: str, ratio: Ratio, crossing: Crossing | None) -> str:
    name = COMPARED[quantity][0]
    text = f"{name.capitalize()}: {hybrid} / full MLA is {ratio.ratio:.2f}"
    if ratio.low is None:
        pairs = "one pair" if ratio.seeds == 1 else f"{ratio.seeds} pairs"
        text += f" at {ratio.required_length:,} tokens, from {pairs} of seeds"
        text += "; an interval takes three above 0"
    else:
        text += f" [{ratio.low:.2f}, {ratio.high:.2f}] at {ratio.required_length:,} tokens"
        text += f" (95% interval over {ratio.seeds} paired seeds)"
    if _equal(ratio):
        return text + "; the two are equal there."
    if _undecided(ratio):
        return text + "; this leaves open who is ahead."
    if crossing is None:
        return text + "."
    shortest, longest = crossing.lengths
    if crossing.length == 0:
        text += f"; the hybrid is ahead at every length from {shortest:,} to {longest:,} tokens"
    elif np.isinf(crossing.length):
        text += f"; the hybrid is not ahead at the longest of {shortest:,} to {longest:,} tokens"
    else:
        text += f"; the hybrid is ahead from about {crossing.length:,.0f} tokens on"
    if crossing.low is None or crossing.high is None:
        return text + ", without an interval because some length has fewer than three seeds above 0."
    if crossing.low == crossing.high:
        return text + "."
    low = "below the shortest" if crossing.low == 0 else f"{crossing.low:,.0f}"
    high = "beyond the longest" if np.isinf(crossing.high) else f"{crossing.high:,.0f}"
    return text + f" (95% interval of where it gets ahead: {low} to {high})."


def _about_asymptotes(curves: Sequence[FittedCurve]) -> list[str]:
    """Of each hybrid, every cell where it and full MLA carry a fit, in one sentence."""
    by_cell: dict[Cell, dict[str, SigmoidFit]] = {}
    for curve in curves:
        if curve.fit is not None:
            by_cell.setdefault(curve.cell, {})[curve.architecture] = curve.fit
    budgets = len({cell.required_length for cell in by_cell}) < len(by_cell)
    texts = []
    for name in SUBJECTS:
        parts = []
        for cell, fits in sorted(by_cell.items()):
            if not {name, "mla"} <= fits.keys():
                continue
            hybrid, mla = fits[name], fits["mla"]
            low, high = np.percentile(hybrid.samples[:, 0] - mla.samples[:, 0], [2.5, 97.5])
            place = f"{cell.required_length:,} tokens" + (f", budget {cell.budget:,}" if budgets else "")
            parts.append(
                f"at {place} {hybrid.A.value:.2f} against {mla.A.value:.2f} (difference "
                f"{hybrid.A.value - mla.A.value:+.2f} [{low:+.2f}, {high:+.2f}]"
                + (", which leaves open whose is higher)" if low <= 0 <= high else ")")
            )
        if parts:
            texts.append(f"Fitted asymptotes, {SHORT_NAMES[name]} against full MLA: {'; '.join(parts)}.")
    return texts


def _about_extrapolation(curves: Sequence[FittedCurve]) -> list[str]:
    checks = [c.check for c in curves if c.check is not None]
    if not checks:
        return []
    error = float(np.mean([check.error for check in checks]))
    power = float(np.mean([check.power_law_error for check in checks]))
    return [
        f"Sigmoids fitted to the first half of the compute predicted the rest with a mean error of "
        f"{error:.3f} in pass rate (curves: {len(checks)}); power laws with {power:.3f}."
    ]


def _about_seeds(runs: Sequence[RunRecord]) -> str:
    cells: dict[tuple[Any, ...], set[int]] = {}
    for run in runs:
        config = run.config
        place = (config.architecture, config.task.required_length, config.budget)
        cells.setdefault(place, set()).add(config.seed)
    counts = [len(seeds) for seeds in cells.values()]
    span = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    few = " Fewer than three say little about the spread between seeds." if min(counts) < 3 else ""
    return f"Seeds for each architecture and length: {span}.{few}"


def _missing(runs: Sequence[RunRecord], curves: Sequence[FittedCurve]) -> list[str]:
    texts = unrecorded(runs)
    for what, states in (("unfinished", ("running", "stopped")), ("failed", ("failed",))):
        count = sum(run.state in states for run in runs)
        if count:
            texts.append(f"{count} of {len(runs)} runs {what}: curves show them, tables of ratios do not")
    texts += [
        f"no fit for {c.architecture} at {c.cell.required_length} tokens, budget {c.cell.budget}: {c.refusal}"
        for c in curves
        if c.fit is None
    ]
    return texts
