"""Draws the figures of the synthetic tests from results/NAME.jsonl.

python experiments/synthetic/figures.py cpu
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from rlscale.scaling.style import (
    BLUE,
    GREEN,
    GREY,
    VERMILLION,
    Look,
    length_axis,
    new_figure,
    save,
    style,
)

HERE = Path(__file__).parent
LOOKS = {
    "kda": Look("KDA", BLUE, "o", "-"),
    "kda_even": Look("KDA, one decay a head at first", GREY, "v", (0, (1, 1.5))),
    "gated_deltanet": Look("Gated DeltaNet", GREEN, "^", (0, (6, 1, 1, 1))),
    "mla": Look("full MLA", VERMILLION, "s", (0, (4, 1.5))),
}
TITLES = {"palindrome": "palindrome", "recall": "associative recall", "stack": "stacks"}
CONVERGENCE_LENGTH = 1024  # where the paper compares how fast each learns

Best = dict[tuple[str, str, int], list[dict[str, Any]]]
"""By task, architecture and length: the records of the best learning rate, a seed each."""


def peak(record: dict[str, Any]) -> float:
    """Highest held-out accuracy, as the paper measures."""
    return max(look[1] for look in record["curve"])


def best(records: list[dict[str, Any]]) -> Best:
    """For each cell the learning rate whose seeds have the highest mean peak; of equals the fastest."""
    grid: dict[tuple[str, str, int], dict[float, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for r in records:
        grid[r["task"], r["architecture"], r["length"]][r["learning_rate"]].append(r)
    return {
        cell: max(
            rates.values(),
            key=lambda seeds: (fmean(map(peak, seeds)), -fmean(r["curve"][-1][0] for r in seeds)),
        )
        for cell, rates in grid.items()
    }


def draw_lengths(panels: list[Axes], tasks: list[str], found: Best) -> None:
    lengths = sorted({length for _, _, length in found})
    for panel, task in zip(panels, tasks, strict=True):
        for architecture, look in LOOKS.items():
            mine = [n for n in lengths if (task, architecture, n) in found]
            peaks = {n: [peak(r) for r in found[task, architecture, n]] for n in mine}
            for n, values in peaks.items():
                if len(values) > 1:
                    panel.plot([n] * len(values), values, ".", color=look.colour, alpha=0.5)
            panel.plot(
                mine, [fmean(peaks[n]) for n in mine], color=look.colour, marker=look.marker, ls=look.line
            )
        length_axis(panel, lengths)
        panel.set_xlabel("sequence length (tokens)")


def draw_steps(panels: list[Axes], tasks: list[str], found: Best) -> None:
    for panel, task in zip(panels, tasks, strict=True):
        lengths = {length for other, _, length in found if other == task}
        length = CONVERGENCE_LENGTH if CONVERGENCE_LENGTH in lengths else max(lengths)
        for architecture, look in LOOKS.items():
            for record in found.get((task, architecture, length), []):
                steps, accuracies = zip(*((look[0], look[1]) for look in record["curve"]), strict=True)
                panel.plot(steps, accuracies, color=look.colour, ls=look.line)
                panel.plot(steps[-1], accuracies[-1], color=look.colour, marker=look.marker)
        panel.set_xlabel(f"steps, {length:,} tokens")
        panel.set_xlim(left=0)


def main(
    name: Annotated[str, typer.Argument(help="cpu or gpu: which results.")],
    folder: Annotated[Path, typer.Option(help="Where they are, and where figures go.")] = HERE,
) -> None:
    """Draw peak accuracy against length and accuracy against steps."""
    text = (folder / "results" / f"{name}.jsonl").read_text()
    found = best([json.loads(line) for line in text.splitlines()])
    tasks = [task for task in TITLES if any(task == cell[0] for cell in found)]
    with style():
        for kind in ("length", "steps"):
            figure, [panels] = new_figure(1, len(tasks))
            if kind == "length":
                draw_lengths(panels, tasks, found)
            else:
                draw_steps(panels, tasks, found)
            for panel, task in zip(panels, tasks, strict=True):
                panel.axhline(1 / 26, color=GREY, lw=0.8, ls=":")
                panel.set_ylim(-0.02, 1.04)
                panel.set_title(TITLES[task])
            panels[0].set_ylabel("held-out accuracy")
            present = [a for a in LOOKS if any(a == architecture for _, architecture, _ in found)]
            handles = [
                Line2D([], [], color=look.colour, marker=look.marker, ls=look.line, label=look.label)
                for look in (LOOKS[architecture] for architecture in present)
            ]
            columns = len(handles) if len(tasks) > 1 else 1  # one panel is too narrow for a row
            figure.legend(handles=handles, loc="outside upper center", ncols=columns)
            save(figure, folder, f"{name}_{kind}")


if __name__ == "__main__":
    typer.run(main)
