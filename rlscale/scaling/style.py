"""How figures look: one set of sizes, and one colour, marker and line for each thing that is compared.

Colours are Okabe and Ito's, which the common forms of colour blindness keep apart; markers, dashes and
hatches say the same again for print in grey.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullLocator,
    ScalarFormatter,
)

# Inches: the text width of a two-column page, and of one column.
PAGE_WIDTH = 7.0
COLUMN_WIDTH = 3.4
PANEL_HEIGHT = 2.1

BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE = "#56B4E9", "#CC79A7"
GREY = "#666666"

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "savefig.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "rlscale",  # the same data give the same file
}


@dataclass(frozen=True, slots=True)
class Look:
    """What stands for one thing in every figure."""

    label: str
    colour: str
    marker: str = "o"
    line: str | tuple[float, tuple[float, ...]] = "-"
    hatch: str = ""


ARCHITECTURES = {
    "hybrid": Look("KDA/MLA hybrid", BLUE, "o", "-"),
    "hybrid_15to1": Look("KDA:MLA 15:1", PURPLE, "v", (0, (1, 1))),
    "hybrid_7to1": Look("KDA:MLA 7:1", GREEN, "^", (0, (6, 1, 1, 1))),
    "hybrid_3to1": Look("KDA:MLA 3:1", SKY, "D", (0, (8, 1))),
    "hybrid_1to1": Look("KDA:MLA 1:1", ORANGE, "P", (0, (3, 1, 1, 1, 1, 1))),
    "mla": Look("full MLA", VERMILLION, "s", (0, (4, 1.5))),
}
SHORT_NAMES = {
    "hybrid": "hybrid",
    "hybrid_15to1": "15:1",
    "hybrid_7to1": "7:1",
    "hybrid_3to1": "3:1",
    "hybrid_1to1": "1:1",
    "mla": "MLA",
}
"""Where a label has no room for the architecture's full name."""
POWER_LAW_LINE = ":"
PHASES = {
    "rollout_s": Look("rollout", BLUE, hatch=""),
    "train_s": Look("learner", ORANGE, hatch="////"),
    "sync_s": Look("weight sync", GREEN, hatch="...."),
    "other_s": Look("other", "#BBBBBB", hatch="xxxx"),
}


Claims = dict[float, str]
"""What a paper claims of the hybrid as multiples of full MLA, and how a legend says it."""

# The Kimi Linear paper (arXiv:2510.26692, abstract and figure 1), for the 48B model at 1M tokens.
THROUGHPUT_CLAIMS: Claims = {
    2.2: "MLA × 2.2: paper, 1M tokens, 1 sequence",
    6.3: "MLA × 6.3: paper, 1M tokens, full",
}
CACHE_CLAIMS: Claims = {0.25: "MLA × 0.25: paper, 1M tokens"}


def new_figure(
    rows: int, columns: int, panel_height: float = PANEL_HEIGHT
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` x `columns` panels: as wide as a column of text for one panel, as a page for
    several, and wider only where panels would become slivers."""
    width = COLUMN_WIDTH if columns == 1 else max(PAGE_WIDTH, 1.3 * columns)
    figure = Figure(figsize=(width, rows * panel_height + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in grid]


def length_axis(axes: Axes, lengths: list[int]) -> None:
    """A logarithmic axis of output lengths, a tick at each length measured that its label has room for."""
    lengths = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.3)
    room = math.log2(lengths[-1] / lengths[0]) / 7
    ticks = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if math.log2(ticks[-1] / length) > room - 1e-9:
            ticks.append(length)
    axes.xaxis.set_major_locator(FixedLocator(ticks[::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("required output length (tokens)")


def apart(place: int, count: int) -> float:
    """Factor on a length that keeps the marks of `count` architectures from lying over one another."""
    return 1.03 ** (2 * place - count + 1)


def log_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic y axis at powers of ten, and at 2 and 5 times them where the axis is short."""
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if decades < 2 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))


def short_number(value: float) -> str:
    """1500 as 1.5k and 2000000 as 2M, but 0.5 as 0.5."""
    return f"{value:g}" if abs(value) < 1000 else str(engineering()(value))


def engineering(unit: str = "") -> EngFormatter:
    """1500 as 1.5k, 2000000 as 2M."""
    return EngFormatter(unit=unit, sep="")


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Writes `name`.png and `name`.svg into `out`."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both files
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    figure.savefig(paths[0])
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


def style() -> Any:
    """Context in which figures must be made and saved; leaves matplotlib's settings outside it alone."""
    return mpl.rc_context(RC)
