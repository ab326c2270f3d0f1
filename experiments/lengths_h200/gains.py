"""How far the hybrid is ahead of full MLA, with 95% intervals over seeds, from committed or fresh runs.

    python experiments/lengths_h200/gains.py experiments/lengths_h200/results experiments/hybrid_ratio/results

Prints, for each length, each hybrid's and full MLA's figure and their difference (Welch's interval), for all
hybrids of a length together, and for `hybrid` over all lengths of several seeds, which weigh the same.
"""

from __future__ import annotations

from collections import defaultdict
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
    for name, figure in FIGURES.items():
        cells: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in runs:
            cells[run.config.task.required_length][run.config.architecture].append(figure(pass_rates(run)))
        print(name)
        over_lengths: list[tuple[float, np.ndarray]] = []
        for length in sorted(cells):
            cell = {key: np.array(values) for key, values in cells[length].items() if len(values) > 1}
            full = cell.pop(FULL_MLA, None)
            if full is None:
                continue
            print(f"  {length:>5} {FULL_MLA:<12} {interval([(1, full)])}")
            if len(cell) > 1:
                cell["all hybrids"] = np.concatenate(list(cell.values()))
            for key, values in cell.items():
                difference = interval([(1, values), (-1, full)])
                print(f"  {length:>5} {key:<12} {interval([(1, values)])}, less full MLA's {difference}")
            if "hybrid" in cell:
                over_lengths += [(1, cell["hybrid"]), (-1, full)]
        if over_lengths:
            share = 2 / len(over_lengths)
            print(
                f"  all lengths, hybrid less full MLA: {interval([(w * share, x) for w, x in over_lengths])}"
            )


def pass_rates(run: RunRecord) -> np.ndarray:
    return np.array([evaluation["pass_rate"] for evaluation in run.evaluations])


def interval(terms: list[tuple[float, np.ndarray]]) -> str:
    """The weighted sum of groups' means and its 95% interval; degrees of freedom after Welch and
    Satterthwaite.
    """
    mean = sum(weight * float(values.mean()) for weight, values in terms)
    variances = [weight**2 * float(values.var(ddof=1)) / len(values) for weight, values in terms]
    uncertainty = [v**2 / (len(values) - 1) for v, (_, values) in zip(variances, terms, strict=True)]
    freedom = sum(variances) ** 2 / sum(uncertainty)
    half = float(student.ppf(0.975, freedom)) * sum(variances) ** 0.5
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


if __name__ == "__main__":
    typer.run(main)
