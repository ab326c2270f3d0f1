"""The figure of scaling_gpus: what was predicted for each layout and mode, and what came.

python experiments/scaling_gpus/figures.py RESULTS.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from rlscale.scaling.style import ARCHITECTURES, engineering, new_figure, save, style

HERE = Path(__file__).parent
MODES = {"synchronous": "sync.", "one_step_off": "1 off", "asynchronous": "async."}
PANELS = {
    "step_s": "seconds of a step",
    "tokens_per_s_per_gpu": "tokens/s of each GPU",
    "learner_idle": "learner idle",
    "rollout_idle": "engines idle",
}
WIDTH = 0.38


def bars(axes: Axes, records: Sequence[dict[str, Any]], name: str, kinds: Sequence[tuple[str, str]]) -> None:
    """Measured values as bars, predicted ones as marks, by layout and mode, architectures side by side."""
    architectures = list(dict.fromkeys(record["architecture"] for record in records))
    for i, architecture in enumerate(architectures):
        look = ARCHITECTURES[architecture]
        found = {(r["layout"], r["mode"]): r for r in records if r["architecture"] == architecture}
        places = np.arange(len(kinds)) + (i - (len(architectures) - 1) / 2) * WIDTH
        for which in ("measured", "predicted"):
            values = [
                found[kind][which][name] if kind in found and found[kind][which] else np.nan for kind in kinds
            ]
            if which == "measured":
                axes.bar(
                    places,
                    values,
                    WIDTH,
                    color=look.colour,
                    alpha=0.55,
                    hatch="////" * i,
                    edgecolor="white",
                    label=look.label,
                )
            else:
                label = "predicted" if i == 0 else None
                axes.plot(places, values, "D", color="black", markersize=3.5, label=label)
    axes.set_xticks(np.arange(len(kinds)), [f"{layout}\n{MODES[mode]}" for layout, mode in kinds], fontsize=6)
    axes.grid(axis="x", visible=False)
    axes.set_ylim(bottom=0)


def draw(results: Path, out: Path) -> None:
    """Writes scaling.png and .svg into `out`: a row for each kind of work."""
    records = json.loads(results.read_text())["cases"]
    with style():
        figure, grid = new_figure(2, len(PANELS), 1.7)
        for row, (work, title) in zip(
            grid, (("per_gpu", "the same work for each GPU"), ("fixed", "the same work in all")), strict=True
        ):
            ours = [r for r in records if r["work"] == work or (r["gpus"], r["work"]) == (1, "per_gpu")]
            kinds = list(dict.fromkeys((r["layout"], r["mode"]) for r in ours))
            for axes, (name, label) in zip(row, PANELS.items(), strict=True):
                bars(axes, ours, name, kinds)
                axes.set_title(label)
                if name == "tokens_per_s_per_gpu":
                    axes.yaxis.set_major_formatter(engineering())
                if name.endswith("idle"):
                    axes.set_ylim(0, 1)
            row[0].set_ylabel(title, fontsize=7)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(figure, out, "scaling")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), HERE)
