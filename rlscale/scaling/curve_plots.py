"""Figures of fitted scaling curves, of what the fits say against length, and of the crossing lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from rlscale.scaling import style
from rlscale.scaling.crossing import COMPARED, Crossing
from rlscale.scaling.curves import AXES, FittedCurve
from rlscale.scaling.fit import Estimate
from rlscale.scaling.panels import place_legend
from rlscale.scaling.style import ARCHITECTURES, GREY, POWER_LAW_LINE, SHORT_NAMES

_BEYOND = 1.5  # curves are drawn to this factor of the largest compute


def scaling_curves(curves: Sequence[FittedCurve]) -> Figure | None:
    """Held-out reward against compute, a panel per cell; nothing if no curve of the axis has points.

    Solid: the fit over the points that it rests on. Dashed: its extrapolation. Dotted: a power law fitted to
    the same points. Where the first half of the compute carries a fit, the line is that fit and the hollow
    points were held out from it.
    """
    cells = list(dict.fromkeys(c.cell for c in curves if np.isfinite(c.compute).any()))
    if not cells or not any(c.fit for c in curves):
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(cells), 3)
    rows = -(-len(cells) // columns)
    figure, grid = style.new_figure(rows, columns, panel_height=2.3)
    panels = [panel for row in grid for panel in row]
    budgets = len({cell.required_length for cell in cells}) < len(cells)
    checked = False
    for panel, cell in zip(panels, cells, strict=False):
        notes = []
        for curve in (c for c in curves if c.cell == cell):
            look = ARCHITECTURES[curve.architecture]
            held_out = np.zeros(len(curve.compute), dtype=bool)
            if curve.check is not None:
                checked = True
                held_out = curve.compute > curve.check.split
            shown: dict[str, Any] = {"color": look.colour, "marker": look.marker, "ls": "", "ms": 3}
            panel.plot(curve.compute[~held_out], curve.reward[~held_out], alpha=0.7, **shown)
            panel.plot(curve.compute[held_out], curve.reward[held_out], fillstyle="none", mew=0.7, **shown)
            fit, power_law = curve.drawn, curve.power_law
            if fit is not None and curve.fit is not None and power_law is not None:
                last = float(np.nanmax(curve.compute))
                x = np.linspace(0, last * _BEYOND, 200)
                inside = x <= fit.compute_range[1]
                # A marker at each line's end, to tell the architectures apart in grey.
                line: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markevery": [-1]}
                line |= {"mec": "white", "mew": 0.6, "ms": 5, "zorder": 3}
                panel.plot(x[inside], fit.predict(x[inside]), lw=1.3, **line)
                panel.plot(x[~inside], fit.predict(x[~inside]), ls=(0, (3, 2)), lw=1.1, **line)
                late = x[x >= fit.compute_range[0]]
                panel.plot(late, power_law.predict(late), ls=POWER_LAW_LINE, lw=0.9, **line | {"ms": 3.5})
                panel.fill_between(x, *fit.band(x), color=look.colour, alpha=0.13, lw=0)
                a = curve.fit.A
                found = f"A = {a.value:.2f} [{a.low:.2f}, {a.high:.2f}]"
            else:
                found = "no fit"
            notes.append((look, f"{SHORT_NAMES[curve.architecture]}: {found}"))
        for i, (look, note) in enumerate(reversed(notes)):
            box: dict[str, Any] = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
            place: dict[str, Any] = {"ha": "right", "transform": panel.transAxes, "zorder": 4, "bbox": box}
            panel.text(0.98, 0.03 + 0.11 * i, note, color=look.colour, **place)
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlim(left=0)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(style.engineering())
        budget = f", budget {cell.budget}" if budgets else ""
        panel.set_title(f"{cell.required_length} tokens required{budget}")
    for panel in panels[len(cells) :]:
        panel.remove()
    for i, panel in enumerate(panels[: len(cells)]):
        if i % columns == 0:
            panel.set_ylabel("held-out pass rate")
        else:
            panel.tick_params(labelleft=False)
        if i + columns >= len(cells):
            panel.set_xlabel(AXES[curves[0].axis])
    present = [a for a in ARCHITECTURES if any(c.architecture == a for c in curves)]
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=ARCHITECTURES[a].colour, marker=ARCHITECTURES[a].marker, label=_name(a))
        for a in present
    ]
    handles.append(Line2D([], [], color=GREY, ls=(0, (3, 2)), lw=1.1, label="extrapolated"))
    handles.append(Line2D([], [], color=GREY, ls=POWER_LAW_LINE, lw=0.9, label="power law"))
    if checked:
        label = "held out from the lines, not from A"
        handles.append(Line2D([], [], color=GREY, marker="o", fillstyle="none", ls="", label=label))
    handles.append(Patch(color=GREY, alpha=0.25, lw=0, label="95% band"))
    place_legend(figure, handles)
    return figure


def asymptotes(curves: Sequence[FittedCurve]) -> Figure | None:
    """Asymptote, midpoint and exponent against required length, with their intervals."""
    fitted = [c for c in curves if c.fit is not None]
    if not fitted:
        return None
    figure, [panels] = style.new_figure(1, 3)
    names = ("A", "C_mid", "B")
    titles = ("asymptote A", f"midpoint C_mid\n({AXES[fitted[0].axis]})", "exponent B")
    ratios = sorted({c.cell.budget_ratio for c in fitted})
    present = [a for a in ARCHITECTURES if any(c.architecture == a for c in fitted)]
    for place, architecture in enumerate(present):
        look = ARCHITECTURES[architecture]
        shift = style.apart(place, len(present))
        for i, ratio in enumerate(ratios):
            mine = [c for c in fitted if c.architecture == architecture and c.cell.budget_ratio == ratio]
            for panel, name in zip(panels, names, strict=True):
                x = [c.cell.required_length * shift for c in mine]
                estimates: list[Estimate] = [getattr(c.fit, name) for c in mine]
                y = [e.value for e in estimates]
                fill = ("full", "none", "left", "bottom")[i % 4]
                panel.plot(x, y, color=look.colour, ls=look.line, marker=look.marker, fillstyle=fill, lw=1)
                panel.vlines(x, [e.low for e in estimates], [e.high for e in estimates], look.colour, lw=0.8)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        style.length_axis(panel, [c.cell.required_length for c in fitted])
    panels[0].set_ylim(0, 1.02)
    for panel in panels[1:]:
        panel.set_yscale("log")
        style.log_ticks(panel)
    handles = [
        Line2D([], [], color=look.colour, ls=look.line, marker=look.marker, label=look.label)
        for look in (ARCHITECTURES[architecture] for architecture in present)
    ]
    handles.append(Line2D([], [], color=GREY, lw=0.8, label="95% bootstrap interval"))
    place_legend(figure, handles)
    return figure


def crossing_lengths(found: Sequence[Crossing]) -> Figure | None:
    """One line a quantity: the length from which the hybrid is ahead, with its interval.

    An arrow to the left says ahead at every length measured, to the right not ahead at the longest.
    """
    if not found:
        return None
    shortest = min(c.lengths[0] for c in found)
    longest = max(c.lengths[1] for c in found)
    left, right = shortest / 1.6, longest * 1.6
    figure, [[panel]] = style.new_figure(1, 1, panel_height=0.45 * len(found) + 0.7)
    figure.set_figwidth(0.75 * style.PAGE_WIDTH)
    ratios = sorted({c.budget_ratio for c in found})
    for y, c in enumerate(reversed(found)):
        if c.low is not None and c.high is not None:
            panel.hlines(y, max(left, c.low), min(right, c.high), color="black", lw=1.2)
        at, marker = (left, "<") if c.length == 0 else (right, ">") if np.isinf(c.length) else (c.length, "o")
        panel.plot(at, y, marker=marker, color="black", ms=6, clip_on=False)
        panel.annotate(
            _crossing_text(c), (at, y), xytext=(0, 6), textcoords="offset points", ha=_side(at, left, right)
        )
    panel.axvspan(shortest, longest, color=GREY, alpha=0.1, lw=0)
    labels = [
        COMPARED[c.quantity][0] + (f"\n(budget × {c.budget_ratio:g})" if len(ratios) > 1 else "")
        for c in reversed(found)
    ]
    panel.set_yticks(range(len(found)), labels)
    panel.set_ylim(-0.5, len(found) - 0.3)
    lengths = [2**i for i in range(int(np.ceil(np.log2(shortest))), int(np.floor(np.log2(longest))) + 1)]
    style.length_axis(panel, sorted({shortest, *lengths, longest}) if len(lengths) < 2 else lengths)
    panel.set_xlim(left, right)
    panel.set_xlabel("required output length from which the hybrid is ahead (tokens)")
    panel.grid(axis="y", visible=False)
    handles = [
        Line2D([], [], color=GREY, lw=6, alpha=0.25, label="lengths measured"),
        Line2D([], [], color="black", lw=1.2, label="95% interval over seeds"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    return figure


def _name(architecture: str) -> str:
    return ARCHITECTURES[architecture].label


def _side(at: float, left: float, right: float) -> str:
    return "left" if at == left else "right" if at == right else "center"


def _crossing_text(c: Crossing) -> str:
    if c.length == 0:
        return "at every length measured"
    if np.isinf(c.length):
        return "not at the longest"
    return f"{c.length:,.0f}"
