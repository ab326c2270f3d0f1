"""How far each hybrid is ahead of full MLA in held-out pass rate, at every length and over all of them.

A run's last evaluation alone says little: of a hundred prompts it is off by 0.05, and a sweep has few seeds.
So a lead rests on several evaluations of each run, and what single lengths leave open is asked of all lengths
together. Intervals are 95% over seeds, by Student's t with Welch's and Satterthwaite's degrees of freedom:
runs of the same seed share nothing that training does not soon forget, so seeds are not paired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import t as student

from rlscale.runs import RunRecord
from rlscale.scaling.series import Cell, by_cell
from rlscale.scaling.style import ARCHITECTURES, SHORT_NAMES

_FIRST, _LAST = 2, 3  # evaluations that a start and an end are the mean of
_FULL_MLA = "mla"

Rates = np.ndarray
"""Held-out pass rates of one cell and architecture, [seeds, evaluations]."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What of a run's held-out pass rates is compared.

    Attributes:
        label: what it is called.
        of: from pass rates to a number for each seed, [seeds].
    """

    label: str
    of: Callable[[Rates], np.ndarray]


def _start(rates: Rates) -> np.ndarray:
    return np.asarray(rates[:, :_FIRST].mean(axis=1))


def _end(rates: Rates) -> np.ndarray:
    return np.asarray(rates[:, -_LAST:].mean(axis=1))


def _mean(rates: Rates) -> np.ndarray:
    return np.asarray(rates.mean(axis=1))


MEASURES = {
    "end": Measure("at the end", _end),
    "mean": Measure("on the way", _mean),
    "end_gained": Measure("at the end, gained", lambda rates: _end(rates) - _start(rates)),
    "mean_gained": Measure("on the way, gained", lambda rates: _mean(rates) - _start(rates)),
}
"""The mean of the last three evaluations and of all; and either less the mean of the first two, because what
runs begin with is not the work of RL."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A hybrid's pass rate less full MLA's.

    Attributes:
        value: of the means over seeds.
        half: half the width of its 95% interval; None where an architecture has a single seed, or no seed
            differs from another.
    """

    value: float
    half: float | None

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.half is not None and abs(self.value) > self.half

    def text(self, digits: int = 2) -> str:
        """As "+0.13 ± 0.06"."""
        spread = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.value:+.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Lead:
    """Of one hybrid in one cell, by `MEASURES`, up to the last step at which all its runs were evaluated.

    Attributes:
        rates: the hybrid's and full MLA's.
    """

    architecture: str
    cell: Cell
    step: int
    by: dict[str, Difference]
    rates: tuple[Rates, Rates] = field(repr=False, compare=False)

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the hybrid and of full MLA."""
        ours, full = self.rates
        return len(ours), len(full)


@dataclass(frozen=True, slots=True)
class Trend:
    """Leads of one hybrid along one ratio of budget to required length, by `MEASURES`.

    Attributes:
        lengths: that both architectures have several seeds at, shortest first; at least two.
        mean: over the lengths, which weigh the same.
        per_doubling: what least squares find the lead to change by when the length doubles.
    """

    architecture: str
    budget_ratio: float
    lengths: tuple[int, ...]
    mean: dict[str, Difference]
    per_doubling: dict[str, Difference]


def rates_by_cell(runs: Sequence[RunRecord]) -> dict[Cell, tuple[int, dict[str, Rates]]]:
    """The last step compared and pass rates by architecture, shortest cell first, seeds in order.

    Runs of a cell are compared at the steps that all of them were evaluated at, unfinished ones too; a run
    that was given up as hopeless stays where it was then. Left out are runs that failed or have come less
    than half as far as the cell's furthest, and cells with fewer than five such steps, of which start and end
    would overlap.
    """
    found = {}
    for cell, architectures in by_cell([run for run in runs if run.state != "failed"]).items():
        group = [run for seeds in architectures.values() for run in seeds]
        all_steps = sorted({step for run in group for step in _by_step(run)})
        rates: dict[str, list[dict[int, float]]] = defaultdict(list)
        for run in group:
            by_step = _by_step(run)
            if by_step and run.status.get("abandoned"):
                last = max(by_step)
                by_step |= {step: by_step[last] for step in all_steps if step > last}
            if by_step and 2 * max(by_step) >= all_steps[-1]:
                rates[run.config.architecture].append(by_step)
        compared = [
            step for step in all_steps if all(step in run for seeds in rates.values() for run in seeds)
        ]
        if len(compared) >= _FIRST + _LAST:
            found[cell] = (
                compared[-1],
                {
                    name: np.array([[run[step] for step in compared] for run in seeds])
                    for name, seeds in rates.items()
                },
            )
    return found


def leads(runs: Sequence[RunRecord]) -> list[Lead]:
    """Of every hybrid and cell that full MLA has too, shortest first, as `rates_by_cell` compares runs."""
    return [
        Lead(hybrid, cell, step, _by_measure([(1.0, both)]), both)
        for cell, (step, rates) in rates_by_cell(runs).items()
        for hybrid in ARCHITECTURES
        if hybrid != _FULL_MLA and {hybrid, _FULL_MLA} <= rates.keys()
        for both in [(rates[hybrid], rates[_FULL_MLA])]
    ]


def trends(found: Sequence[Lead]) -> list[Trend]:
    """What leads add up to over the lengths of each hybrid and budget ratio, where there are two or more."""
    series: dict[tuple[str, float], dict[int, tuple[Rates, Rates]]] = defaultdict(dict)
    for lead in found:
        if min(lead.seeds) > 1:
            series[lead.architecture, lead.cell.budget_ratio][lead.cell.required_length] = lead.rates
    over = []
    for (hybrid, ratio), by_length in series.items():
        if len(by_length) < 2:
            continue
        doublings = np.log2(list(by_length))
        doublings -= doublings.mean()
        slope = doublings / (doublings**2).sum()
        over.append(
            Trend(
                hybrid,
                ratio,
                tuple(by_length),
                mean=_by_measure([(1 / len(by_length), both) for both in by_length.values()]),
                per_doubling=_by_measure(list(zip(slope, by_length.values(), strict=True))),
            )
        )
    return over


def welch(terms: Sequence[tuple[float, np.ndarray]]) -> Difference:
    """The weighted sum of groups' means, with degrees of freedom after Welch and Satterthwaite.

    Args:
        terms: a weight and a group's numbers, [seeds], each.
    """
    value = sum(weight * float(numbers.mean()) for weight, numbers in terms)
    if any(len(numbers) < 2 for _, numbers in terms):
        return Difference(value, None)
    variances = [weight**2 * float(numbers.var(ddof=1)) / len(numbers) for weight, numbers in terms]
    if not (total := sum(variances)):
        return Difference(value, None)
    freedom = total**2 / sum(
        v**2 / (len(numbers) - 1) for v, (_, numbers) in zip(variances, terms, strict=True)
    )
    return Difference(value, float(student.ppf(0.975, freedom)) * total**0.5)


def lead_records(found: Sequence[Lead], over: Sequence[Trend]) -> dict[str, list[dict[str, Any]]]:
    """Leads and trends as JSON holds them, a difference as [value, low, high]."""

    def numbers(by: dict[str, Difference]) -> dict[str, list[float | None]]:
        return {
            name: [d.value, *((None, None) if d.half is None else (d.value - d.half, d.value + d.half))]
            for name, d in by.items()
        }

    return {
        "leads": [
            {"architecture": lead.architecture, **lead.cell._asdict(), "step": lead.step, "seeds": lead.seeds}
            | numbers(lead.by)
            for lead in found
        ],
        "trends": [
            {"architecture": t.architecture, "budget_ratio": t.budget_ratio, "lengths": t.lengths}
            | {"mean": numbers(t.mean), "per_doubling": numbers(t.per_doubling)}
            for t in over
        ],
    }


def lead_table(found: Sequence[Lead], over: Sequence[Trend]) -> Table:
    """A line for each hybrid and cell, then one for all its lengths and one for what a doubling changes.

    A single hybrid is not named, nor are budgets where no length has several, so that the table fits a
    terminal of 80 columns.
    """
    hybrids = list(dict.fromkeys(lead.architecture for lead in found))
    budgets = len({(lead.architecture, lead.cell.required_length) for lead in found}) < len(found)
    table = Table(
        title="Held-out pass rate, hybrid less full MLA, 95% over seeds",
        caption="slope: change with each doubling of the length" if over else None,
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold",
    )
    shown = {"length": True, "budget": budgets, "hybrid": len(hybrids) > 1, "step": True}
    for heading in (name for name, is_shown in shown.items() if is_shown):
        table.add_column(heading, justify="right", no_wrap=True)
    for measure in MEASURES.values():
        table.add_column(measure.label.replace(", ", ",\n"), justify="right", no_wrap=True)

    def line(
        length: str, budget: str, hybrid: str, step: str, by: dict[str, Difference], digits: int
    ) -> None:
        places = zip((length, budget, SHORT_NAMES[hybrid], step), shown.values(), strict=True)
        table.add_row(
            *(text for text, is_shown in places if is_shown), *(d.text(digits) for d in by.values())
        )

    for hybrid in hybrids:
        for lead in (lead for lead in found if lead.architecture == hybrid):
            line(
                *(f"{lead.cell.required_length:,}", f"{lead.cell.budget:,}", hybrid, str(lead.step)),
                lead.by,
                2,
            )
        for trend in (trend for trend in over if trend.architecture == hybrid):
            budget = f"x {trend.budget_ratio:g}"
            line("all", budget, hybrid, "", trend.mean, 2)
            line("slope", budget, hybrid, "", trend.per_doubling, 3)
        table.add_section()
    return table


def _by_step(run: RunRecord) -> dict[int, float]:
    return {e["step"]: e["pass_rate"] for e in run.evaluations if e["pass_rate"] is not None}


def _by_measure(terms: Sequence[tuple[float, tuple[Rates, Rates]]]) -> dict[str, Difference]:
    """Sums over cells of a weight times the hybrid's lead, from the hybrid's and full MLA's rates."""
    return {
        name: welch(
            [
                (sign * weight, measure.of(rates))
                for weight, both in terms
                for sign, rates in zip((1, -1), both, strict=True)
            ]
        )
        for name, measure in MEASURES.items()
    }
