"""The figures of a sweep, each as PNG and SVG.

    pass_rate_steps, pass_rate_tokens, pass_rate_time   held-out pass rate against three costs
    scaling_tokens, scaling_flops, scaling_hours        the same with fitted sigmoids and their extrapolation
    asymptotes                                          what the fits say against length
    throughput, cache                                   rollout tokens/s and cache bytes against length
    ratio, crossing                                     hybrid over full MLA, from which length it leads
    lead                                                hybrid less full MLA in held-out pass rate
    diagnostics, step_time                              what to look at when a curve looks odd

Beside them fits.json has the fits' numbers, the crossing lengths and the leads. Any set of runs will do: one
run, one length, one architecture, unfinished runs. Figures that the records cannot carry are left out.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlscale.errors import UserError
from rlscale.runs import RunRecord, find_runs
from rlscale.runs.files import write_json
from rlscale.scaling import style
from rlscale.scaling.crossing import crossings
from rlscale.scaling.curve_plots import asymptotes, crossing_lengths, scaling_curves
from rlscale.scaling.curves import FittedCurve, fit_axes, fit_records
from rlscale.scaling.leads import MEASURES, Lead, lead_records, leads, trends
from rlscale.scaling.panels import (
    CLAIM_LINES,
    architectures_of,
    budget_handles,
    budget_look,
    cell_title,
    cells_with,
    cost_axis,
    from_zero,
    legend,
    place_legend,
    runs_of,
    seed_lines,
)
from rlscale.scaling.series import (
    DIAGNOSTICS,
    Cell,
    Cells,
    by_cell,
    curve,
    diagnostics_of,
    mean_over_seeds,
    over_steps,
    prompts_evaluated,
    require_comparable,
    step_phases,
    wilson,
)
from rlscale.scaling.style import (
    ARCHITECTURES,
    CACHE_CLAIMS,
    GREY,
    PHASES,
    SHORT_NAMES,
    THROUGHPUT_CLAIMS,
    Claims,
    Look,
)
from rlscale.scaling.summary import Ratio, hybrid_to_mla, summarise


def plot_runs(folders: Sequence[Path], out: Path) -> list[Path]:
    """Draws all runs at or below `folders` into `out`, fits.json beside them; returns the figures' files.

    Raises:
        UserError: no runs there, runs of different tasks or model shapes, runs that have nothing to draw yet,
            or a folder that cannot be written.
    """
    runs = find_runs(folders)
    require_comparable(runs)
    curves = fit_axes(by_cell(runs))
    found = leads(runs)
    with style.style():
        drawn = figures(runs, curves)
        if not drawn:
            raise UserError(f"nothing to draw in {folders[0]}: no run there has got as far as an evaluation")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(
                out / "fits.json",
                {
                    "curves": [record for axis in curves.values() for record in fit_records(axis)],
                    "crossings": [crossing.record() for crossing in crossings(summarise(runs))],
                    **lead_records(found, trends(found)),
                },
            )
            return [path for name, figure in drawn.items() for path in style.save(figure, out, name)]
        except OSError as error:
            raise UserError(f"figures cannot go to {out} ({error.strerror}): choose another folder") from None


def figures(runs: Sequence[RunRecord], fitted: dict[str, list[FittedCurve]]) -> dict[str, Figure]:
    """The figures that the runs' records carry, by name. Call it, and save them, inside `style.style()`.

    Args:
        runs: comparable ones, see `require_comparable`.
        fitted: `fit_axes` of their cells.
    """
    cells = by_cell(runs)
    rows = summarise(runs)
    drawn = {
        "pass_rate_steps": _pass_rates(cells, "step"),
        "pass_rate_tokens": _pass_rates(cells, "generated_tokens"),
        "pass_rate_time": _pass_rates(cells, "wall_s"),
        "scaling_tokens": scaling_curves(fitted["generated_tokens"]),
        "scaling_flops": scaling_curves(fitted["flops"]),
        "scaling_hours": scaling_curves(fitted["device_hours"]),
        "asymptotes": asymptotes(fitted["generated_tokens"]),
        "throughput": _against_length(
            cells, "rollout_tokens_per_s", "rollout tokens per second", 1.0, THROUGHPUT_CLAIMS
        ),
        "cache": _against_length(
            cells, "cache_bytes_per_sequence", "cache per sequence (KiB)", 1 / 1024, CACHE_CLAIMS
        ),
        "ratio": _ratios(hybrid_to_mla(rows)),
        "crossing": crossing_lengths(crossings(rows)),
        "lead": _leads(leads(runs)),
        "diagnostics": _diagnostics(cells),
        "step_time": _step_times(cells),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _pass_rates(cells: Cells, x: str) -> Figure | None:
    """Held-out pass rate against `x`: a panel per cell, seeds thin, their mean bold with its interval."""
    cells = cells_with(cells, lambda run: curve(run.evaluations, x, "pass_rate").x.size > 0)
    if not cells:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(cells), 3)
    rows = -(-len(cells) // columns)
    figure, grid = style.new_figure(rows, columns)
    panels = [panel for row in grid for panel in row]
    scale, label = cost_axis(x, [r.get(x) or 0 for run in runs_of(cells) for r in run.evaluations])
    banded = False
    for panel, (cell, architectures) in zip(panels, cells.items(), strict=False):
        for architecture, runs in architectures.items():
            look = ARCHITECTURES[architecture]
            seeds = [run.evaluations for run in runs]
            seed_lines(panel, seeds, x, "pass_rate", look, scale)
            mean = mean_over_seeds(seeds, x, "pass_rate")
            panel.plot(mean.x * scale, mean.y, color=look.colour, ls=look.line, marker=look.marker, zorder=3)
            prompts = prompts_evaluated(runs)
            if prompts:
                low, high = wilson(mean.y, prompts)
                panel.fill_between(mean.x * scale, low, high, color=look.colour, alpha=0.15, lw=0)
                banded = True
        panel.set_ylim(-0.02, 1.02)
        from_zero(panel, 5, integer=x == "step")
        if x == "generated_tokens":
            panel.xaxis.set_major_formatter(style.engineering())
        panel.set_title(cell_title(cell, cells))
    for panel in panels[len(cells) :]:
        panel.remove()
    for i, panel in enumerate(panels[: len(cells)]):
        if i % columns == 0:
            panel.set_ylabel("held-out pass rate")
        else:
            panel.tick_params(labelleft=False)
        if i + columns >= len(cells):
            panel.set_xlabel(label)
    legend(figure, cells, banded=banded)
    return figure


def _against_length(cells: Cells, name: str, label: str, scale: float, claims: Claims) -> Figure | None:
    """A metric's median over steps against the required length: dots are runs, the line is their mean.

    `claims` are factors of the MLA's mean that get a thin line each, and what it says.
    """
    cells = cells_with(cells, lambda run: over_steps(run, name) is not None)
    if not cells:
        return None
    figure, [[panel]] = style.new_figure(1, 1, panel_height=2.3)
    ratios = sorted({cell.budget_ratio for cell in cells})
    for architecture in architectures_of(cells):
        look = ARCHITECTURES[architecture]
        for ratio in ratios:
            lengths, means = [], []
            for cell, architectures in cells.items():
                if cell.budget_ratio != ratio or architecture not in architectures:
                    continue
                values = [(over_steps(run, name) or 0.0) * scale for run in architectures[architecture]]
                if len(values) > 1:
                    panel.plot(
                        [cell.required_length] * len(values),
                        values,
                        color=look.colour,
                        marker=look.marker,
                        ls="",
                        ms=2.5,
                        alpha=0.5,
                    )
                lengths.append(cell.required_length)
                means.append(float(np.mean(values)))
            panel.plot(lengths, means, color=look.colour, ls=look.line, **budget_look(look, ratio, ratios))
            if architecture == "mla" and ratio == ratios[0]:
                for line, factor in zip(CLAIM_LINES, claims, strict=False):
                    panel.plot(lengths, [factor * mean for mean in means], color=GREY, lw=0.9, ls=line)
    panel.set_yscale("log")
    low, high = panel.dataLim.intervaly
    panel.set_ylim(low / 1.2, high * 1.2)
    style.log_ticks(panel)
    panel.set_ylabel(label)
    style.length_axis(panel, [cell.required_length for cell in cells])
    legend(
        figure,
        cells,
        budgets=ratios,
        seeds=False,
        claims=tuple(claims.values()) if "mla" in architectures_of(cells) else (),
    )
    return figure


def _ratios(ratios: list[Ratio]) -> Figure | None:
    """Each hybrid over full MLA against length, on a logarithmic axis with 1 marked."""
    quantities = {
        "rollout_tokens_per_s": "rollout tokens per second\n(above 1: hybrid faster)",
        "cache_bytes_per_sequence": "cache per sequence\n(below 1: hybrid smaller)",
        "pass_rate_end": "final held-out pass rate\n(above 1: hybrid better)",
    }
    titles = {q: title for q, title in quantities.items() if any(r.quantity == q for r in ratios)}
    if not titles:
        return None
    figure, [panels] = style.new_figure(1, len(titles))
    cells = {r: Cell(r.required_length, r.budget) for r in ratios}
    budgets = sorted({cell.budget_ratio for cell in cells.values()})
    hybrids = list(dict.fromkeys(r.architecture for r in ratios))
    looks = _hybrid_looks(hybrids)
    for panel, (quantity, title) in zip(panels, titles.items(), strict=True):
        panel.axhline(1, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
        edges = [1.0]
        for (hybrid, look), budget in itertools.product(looks.items(), budgets):
            found = [
                r
                for r in ratios
                if (r.quantity, r.architecture, cells[r].budget_ratio) == (quantity, hybrid, budget)
            ]
            shift = style.apart(hybrids.index(hybrid), len(hybrids))
            lengths, values = [r.required_length * shift for r in found], [r.ratio for r in found]
            panel.plot(lengths, values, color=look.colour, **budget_look(look, budget, budgets))
            for r in found:
                if r.low is not None and r.high is not None:
                    panel.plot([r.required_length * shift] * 2, [r.low, r.high], color=look.colour, lw=1)
                edges += [v for v in (r.low, r.ratio, r.high) if v]
        panel.set_title(title)
        _ratio_axis(panel, edges)
        style.length_axis(panel, [r.required_length for r in ratios if r.quantity == quantity])
    panels[0].set_ylabel("hybrid / full MLA")
    handles = _hybrid_handles(looks, budgets)
    if any(r.low is not None for r in ratios):
        handles.append(Line2D([], [], color="black", lw=1, label="95% paired bootstrap interval over seeds"))
    if handles:
        place_legend(figure, handles)
    return figure


def _leads(found: Sequence[Lead]) -> Figure | None:
    """Each hybrid's lead in held-out pass rate against length, at the end and on the way, with 0 marked."""
    if not found:
        return None
    shown, over = ("end", "mean"), trends(found)
    figure, [panels] = style.new_figure(1, len(shown))
    budgets = sorted({lead.cell.budget_ratio for lead in found})
    hybrids = list(dict.fromkeys(lead.architecture for lead in found))
    looks = _hybrid_looks(hybrids)
    edges = [0.05, -0.05]
    for panel, name in zip(panels, shown, strict=True):
        panel.axhline(0, color=GREY, lw=1, ls=(0, (2, 2)), zorder=1)
        for (hybrid, look), budget in itertools.product(looks.items(), budgets):
            mine = [x for x in found if (x.architecture, x.cell.budget_ratio) == (hybrid, budget)]
            shift = style.apart(hybrids.index(hybrid), len(hybrids))
            lengths = [lead.cell.required_length * shift for lead in mine]
            differences = [lead.by[name] for lead in mine]
            values = [difference.value for difference in differences]
            panel.plot(lengths, values, color=look.colour, **budget_look(look, budget, budgets))
            for length, difference in zip(lengths, differences, strict=True):
                ends = [difference.value + sign * (difference.half or 0.0) for sign in (-1, 1)]
                panel.plot([length] * 2, ends, color=look.colour, lw=1)
                edges += ends
        title = f"held-out pass rate, {MEASURES[name].label}"
        if len(over) == 1:
            [trend] = over
            whose = f"{SHORT_NAMES[trend.architecture]}, " if len(hybrids) > 1 else ""
            title += f"\n{whose}all lengths: {trend.mean[name].text()}"
        panel.set_title(title)
        style.length_axis(panel, [lead.cell.required_length for lead in found])
    reach = 1.1 * max(map(abs, edges))
    for panel in panels:
        panel.set_ylim(-reach, reach)
        panel.tick_params(labelleft=panel is panels[0])
    panels[0].set_ylabel("hybrid less full MLA")
    handles = _hybrid_handles(looks, budgets)
    handles.append(Line2D([], [], color="black", lw=1, label="95% interval over seeds"))
    place_legend(figure, handles)
    return figure


def _hybrid_looks(hybrids: Sequence[str]) -> dict[str, Look]:
    """A single hybrid needs no name: the axis says what is compared."""
    return {a: ARCHITECTURES[a] for a in hybrids} if len(hybrids) > 1 else {hybrids[0]: Look("", "black")}


def _hybrid_handles(looks: dict[str, Look], budgets: Sequence[float]) -> list[Line2D]:
    """Of the hybrids that have a name, and of budgets where there are several."""
    named = [look for look in looks.values() if look.label]
    handles = [Line2D([], [], color=look.colour, marker=look.marker, label=look.label) for look in named]
    return handles + budget_handles(Look("", "black"), budgets)


def _diagnostics(cells: Cells) -> Figure | None:
    """Reward, truncation, entropy, mismatch and staleness against steps, a column per cell."""
    cells = cells_with(cells, lambda run: bool(diagnostics_of([run])))
    drawn = diagnostics_of(runs_of(cells))
    if not drawn:
        return None
    figure, grid = style.new_figure(len(drawn), len(cells), panel_height=1.35)
    for row, y in zip(grid, drawn, strict=True):
        for panel, architectures in zip(row, cells.values(), strict=True):
            for architecture, group in architectures.items():
                look = ARCHITECTURES[architecture]
                seeds = [run.metrics for run in group]
                seed_lines(panel, seeds, "step", y, look, 1.0)
                mean = mean_over_seeds(seeds, "step", y)
                panel.plot(mean.x, mean.y, color=look.colour, ls=look.line, lw=1.3, zorder=3)
            from_zero(panel, 4, integer=True)
            panel.tick_params(labelbottom=row is grid[-1], labelleft=panel is row[0])
        _share_y(row, y)
        row[0].set_ylabel(textwrap.fill(DIAGNOSTICS[y], 16))
    for panel, cell in zip(grid[0], cells, strict=True):
        panel.set_title(cell_title(cell, cells))
    for panel in grid[-1]:
        panel.set_xlabel("RL step")
    figure.align_ylabels()
    legend(figure, cells, markers=False)
    return figure


def _step_times(cells: Cells) -> Figure | None:
    """Where a step's seconds go: a bar for each cell and architecture, phases stacked."""
    bars: list[tuple[Cell, str, dict[str, float]]] = []
    for cell, architectures in cells.items():
        for architecture, runs in architectures.items():
            if phases := step_phases(runs):
                bars.append((cell, architecture, phases))
    if not bars:
        return None
    figure, [[panel]] = style.new_figure(1, 1, panel_height=2.3)
    figure.set_figwidth(min(style.PAGE_WIDTH, max(style.COLUMN_WIDTH, 0.6 * len(bars) + 0.8)))
    shown = list(dict.fromkeys(cell for cell, _, _ in bars))
    positions = [i + 0.6 * shown.index(cell) for i, (cell, _, _) in enumerate(bars)]
    bottom = np.zeros(len(bars))
    for name, look in PHASES.items():
        heights = np.array([phases[name] for _, _, phases in bars])
        if heights.max() < 0.01 * bottom.max():
            continue  # too thin to be seen
        panel.bar(
            positions,
            heights,
            0.75,
            bottom,
            label=look.label,
            color=look.colour,
            hatch=look.hatch,
            edgecolor="white",
            lw=0.5,
        )
        bottom += heights
    panel.set_xlim(positions[0] - 0.7, positions[-1] + 0.7)
    panel.set_xticks(positions, [SHORT_NAMES[a] for _, a, _ in bars])
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="x", visible=False)
    for cell in shown:
        centre = float(np.mean([p for p, (c, _, _) in zip(positions, bars, strict=True) if c == cell]))
        panel.annotate(
            cell_title(cell, cells).replace(" required", "\nrequired").replace(", ", "\n"),
            (centre, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            va="top",
        )
    panel.set_ylabel("seconds per step")
    place_legend(figure, panel.get_legend_handles_labels()[0])
    return figure


def _ratio_axis(panel: Axes, edges: Sequence[float]) -> None:
    """Logarithmic and symmetric about 1, so that 2 and 1/2 look alike."""
    reach = max(1.25, *(max(edge, 1 / edge) for edge in edges)) ** 1.15
    panel.set_yscale("log")
    panel.set_ylim(1 / reach, reach)
    if reach < 10:
        ticks = [1.0]
        for above, below in ((1.1, 0.9), (1.25, 0.8), (1.5, 0.67), (2, 0.5), (3, 0.33), (5, 0.2), (8, 0.125)):
            if max(ticks) * reach ** (1 / 6) <= above <= reach:  # some ten ticks, none in another's way
                ticks += [above, below]
        panel.set_yticks(ticks)
    else:
        panel.yaxis.set_major_locator(LogLocator(10))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))


def _share_y(row: Sequence[Axes], y: str) -> None:
    """One scale for a row of panels, chosen by what the metric is."""
    if y == "reward_mean":
        limits = (-0.04, 1.04)
    elif y == "truncated_fraction":
        top = min(1.0, max(0.1, *(panel.dataLim.y1 for panel in row)))
        limits = (-0.04 * top, 1.04 * top)
    elif y == "mismatch_mean":
        values = [v for panel in row for line in panel.lines for v in np.asarray(line.get_ydata()) if v > 0]
        if not values:
            limits = (-0.04, 1.04)
        else:
            for panel in row:
                panel.set_yscale("log")
                panel.yaxis.set_minor_formatter(NullFormatter())
            limits = (10 ** np.floor(np.log10(min(values))), 10 ** np.ceil(np.log10(max(values) * 1.001)))
    else:
        limits = (0.0, 1.05 * (max(panel.dataLim.y1 for panel in row) or 1.0))
    for panel in row:
        panel.set_ylim(limits)
