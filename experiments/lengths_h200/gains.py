"""Pass rates of each architecture and of all hybrids together, with 95% intervals over seeds.

    python experiments/lengths_h200/gains.py experiments/lengths_h200/results experiments/hybrid_ratio/results

`rlscale plot` has each hybrid's lead over full MLA, and what lengths add up to; this adds either side's own
figure, by the same measures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from rlscale.errors import UserError
from rlscale.runs import find_runs
from rlscale.scaling.leads import MEASURES, rates_by_cell, welch


def main(
    folders: Annotated[list[Path], typer.Argument(help="Sweeps' folders, or what experiments/keep.py kept.")],
) -> None:
    """Print the table."""
    try:
        cells = rates_by_cell(find_runs(folders))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    for measure in MEASURES.values():
        print(measure.label)
        for cell, (_, rates) in cells.items():
            values = {name: measure.of(its) for name, its in rates.items()}
            hybrids = [its for name, its in values.items() if name != "mla"]
            if len(hybrids) > 1:
                values["all hybrids"] = np.concatenate(hybrids)
            for name, its in values.items():
                text = f"  {cell.required_length:>5} {name:<12} {welch([(1, its)]).text()}"
                if name != "mla" and "mla" in values:
                    text += f", less full MLA's {welch([(1, its), (-1, values['mla'])]).text()}"
                print(text)


if __name__ == "__main__":
    typer.run(main)
