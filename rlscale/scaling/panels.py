"""Pieces that figures share: axes, legends, and the cells that a figure has something to draw for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlscale.runs import RunRecord
from rlscale.scaling import style
from rlscale.scaling.series import Cell, Cells, curve
from rlscale.scaling.style import ARCHITECTURES, GREY, Look

_ROW_CHARACTERS = 108  # of a legend on a page's width, each handle with its gaps as wide as six
_HANDLE_CHARACTERS = 6

CLAIM_LINES = ((0, (1, 1.5)), (0, (5, 1, 1, 1)))
"""Dashes of the lines that say what a paper claims."""


def from_zero(panel: Axes, ticks: int, *, integer: bool) -> None:
    """Starts the x axis just left of 0, so that the marker of step 0 is whole; ticks at round numbers."""
    right = max(panel.dataLim.x1, 1e-9)
    panel.set_xlim(-0.03 * right, 1.03 * right)
    panel.xaxis.set_major_locator(MaxNLocator(ticks, integer=integer, steps=[1, 2, 5, 10]))


def seed_lines(panel: Axes, seeds: Sequence[Any], x: str, y: str, look: Look, scale: float) -> None:
    """Thin lines, one a seed; a single seed is its own mean and gets none."""
    if len(seeds) > 1:
        for records in seeds:
            one = curve(records, x, y)
            panel.plot(one.x * scale, one.y, color=look.colour, ls=look.line, lw=0.6, alpha=0.6)


def cost_axis(x: str, values: Sequence[float]) -> tuple[float, str]:
    """Factor from the records' unit to the axis', and the axis' label."""
    if x == "step":
        return 1.0, "RL step"
    if x == "generated_tokens":
        return 1.0, "generated tokens"
    longest = max(values, default=0.0)
    if longest > 3 * 3600:
        return 1 / 3600, "wall-clock (hours)"
    return (1 / 60, "wall-clock (minutes)") if longest > 180 else (1.0, "wall-clock (seconds)")


def legend(
    figure: Figure,
    cells: Cells,
    *,
    budgets: Sequence[float] = (),
    banded: bool = False,
    markers: bool = True,
    seeds: bool = True,
    claims: Sequence[str] = (),
) -> None:
    handles: list[Any] = []
    for architecture in architectures_of(cells):
        look = ARCHITECTURES[architecture]
        marker = look.marker if markers else None
        handles.append(Line2D([], [], color=look.colour, ls=look.line, marker=marker, label=look.label))
    handles += budget_handles(Look("", GREY), budgets)
    if seeds and any(len(runs) > 1 for architectures in cells.values() for runs in architectures.values()):
        handles.append(Line2D([], [], color=GREY, lw=0.6, label="single seeds"))
    if banded:
        handles.append(Patch(color=GREY, alpha=0.25, lw=0, label="95% interval over prompts"))
    for line, claim in zip(CLAIM_LINES, claims, strict=False):
        handles.append(Line2D([], [], color=GREY, lw=0.9, ls=line, label=claim))
    place_legend(figure, handles)


def place_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Above the panels: as few rows as a page's width allows, two or three columns on a column's."""
    characters = sum(len(h.get_label()) + _HANDLE_CHARACTERS for h in handles)
    columns = -(-len(handles) // -(-characters // _ROW_CHARACTERS))
    if figure.get_figwidth() < 0.7 * style.PAGE_WIDTH:
        longest = max(len(h.get_label()) for h in handles)
        columns = 3 if longest < 12 else 2 if longest < 30 else 1
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def budget_look(look: Look, ratio: float, ratios: Sequence[float]) -> dict[str, Any]:
    """Markers that tell budgets apart: filled, hollow, half filled; lines grow thinner."""
    i = ratios.index(ratio)
    fill = ("full", "none", "left", "bottom")[i % 4]
    return {"marker": look.marker, "fillstyle": fill, "lw": 1.6 / (1 + 0.5 * i)}


def budget_handles(look: Look, ratios: Sequence[float]) -> list[Line2D]:
    if len(ratios) < 2:
        return []
    return [
        Line2D([], [], color=look.colour, label=f"budget × {ratio:g}", **budget_look(look, ratio, ratios))
        for ratio in ratios
    ]


def cell_title(cell: Cell, cells: Cells) -> str:
    lengths = [c.required_length for c in cells]
    budget = f", budget {cell.budget}" if len(set(lengths)) < len(lengths) else ""
    return f"{cell.required_length} tokens required{budget}"


def cells_with(cells: Cells, has: Callable[[RunRecord], bool]) -> Cells:
    """The runs that satisfy `has`, empty groups and cells dropped."""
    kept: Cells = {}
    for cell, architectures in cells.items():
        groups = {a: [run for run in runs if has(run)] for a, runs in architectures.items()}
        groups = {a: runs for a, runs in groups.items() if runs}
        if groups:
            kept[cell] = groups
    return kept


def runs_of(cells: Cells) -> list[RunRecord]:
    return [run for architectures in cells.values() for runs in architectures.values() for run in runs]


def architectures_of(cells: Cells) -> list[str]:
    present = {a for architectures in cells.values() for a in architectures}
    return [a for a in ARCHITECTURES if a in present]
