"""How far the hybrid is ahead of full MLA, with 95% intervals over seeds, from committed or fresh runs.

    python experiments/lengths_h200/gains.py experiments/lengths_h200/results experiments/hybrid_ratio/results

Prints, for each length, each hybrid's and full MLA's figure and their difference (Welch's interval), for all
hybrids of a length together, and for `hybrid` over all lengths of several seeds, which weigh the same: the
mean lead, and by least squares how it changes per doubling of the length. Runs of a length are compared up to
the last step at which all of them were evaluated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from scipy.stats import t as student

from rlscale.errors import UserError
from rlscale.runs import RunRecord, find_runs

FULL_MLA = "mla"
FIGURES = {
    "end (last three evaluations)": lambda rates: rates[-3:].mean(),
    "gain (end less the first two)": lambda rates: rates[-3:].mean() - rates[:2].mean(),
    "mean gain (all less the first two)": lambda rates: rates.mean() - rates[:2].mean(),
    "mean (all evaluations)": lambda rates: rates.mean(),
}


def main(
    folders: Annotated[list[Path], typer.Argument(help="Sweeps' folders, or what experiments/keep.py kept.")],
) -> None:
    """Print the table."""
    try:
        runs = find_runs(folders)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    rates: dict[int, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for length, same in by_length(runs).items():
        last = min(run.evaluations[-1]["step"] for run in same)
        for run in same:
            rates[length][run.config.architecture].append(pass_rates(run, last))
    for name, figure in FIGURES.items():
        print(name)
        leads: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for length in sorted(rates):
            cell = {
                key: np.array([figure(run) for run in seeds])
                for key, seeds in rates[length].items()
                if len(seeds) > 1
            }
            full = cell.pop(FULL_MLA, None)
            if full is None:
                continue
            print(f"  {length:>5} {FULL_MLA:<12} {interval([(1, full)])}")
            if "hybrid" in cell:
                leads[length] = cell["hybrid"], full
            if len(cell) > 1:
                cell["all hybrids"] = np.concatenate(list(cell.values()))
            for key, values in cell.items():
                difference = interval([(1, values), (-1, full)])
                print(f"  {length:>5} {key:<12} {interval([(1, values)])}, less full MLA's {difference}")
        if leads:
            mean = [1 / len(leads)] * len(leads)
            print(f"  all lengths, hybrid less full MLA: {weighed(mean, leads)}")
        if len(leads) > 1:
            doublings = np.log2(list(leads)) - np.log2(list(leads)).mean()
            slope = doublings / (doublings**2).sum()
            print(f"  all lengths, the same per doubling: {weighed(slope, leads, digits=3)}")


def by_length(runs: list[RunRecord]) -> dict[int, list[RunRecord]]:
    groups: dict[int, list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[run.config.task.required_length].append(run)
    return groups


def pass_rates(run: RunRecord, last: int) -> np.ndarray:
    """Of the evaluations up to step `last`."""
    return np.array([looked["pass_rate"] for looked in run.evaluations if looked["step"] <= last])


def weighed(
    weights: Sequence[float] | np.ndarray, leads: dict[int, tuple[np.ndarray, np.ndarray]], digits: int = 2
) -> str:
    """The weighted sum of the hybrid's leads over lengths, with its interval."""
    pairs = zip(weights, leads.values(), strict=True)
    terms = [term for weight, (ours, full) in pairs for term in ((weight, ours), (-weight, full))]
    return interval(terms, digits)


def interval(terms: list[tuple[float, np.ndarray]], digits: int = 2) -> str:
    """The weighted sum of groups' means and its 95% interval; degrees of freedom after Welch and
    Satterthwaite.
    """
    mean = sum(weight * float(values.mean()) for weight, values in terms)
    variances = [weight**2 * float(values.var(ddof=1)) / len(values) for weight, values in terms]
    uncertainty = [v**2 / (len(values) - 1) for v, (_, values) in zip(variances, terms, strict=True)]
    freedom = sum(variances) ** 2 / sum(uncertainty)
    half = float(student.ppf(0.975, freedom)) * sum(variances) ** 0.5
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


if __name__ == "__main__":
    typer.run(main)
