"""The report's figures as Plotly specifications: plain data that the page draws when it is scrolled to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlscale.runs import RunRecord
from rlscale.scaling.crossing import COMPARED, Crossing
from rlscale.scaling.curves import AXES, FittedCurve, costs
from rlscale.scaling.leads import MEASURES, Lead
from rlscale.scaling.series import (
    DIAGNOSTICS,
    Cell,
    Cells,
    diagnostics_of,
    mean_over_seeds,
    over_steps,
    step_phases,
)
from rlscale.scaling.style import ARCHITECTURES, GREY, PHASES, SHORT_NAMES, Claims, apart, short_number
from rlscale.scaling.summary import Ratio

_SYMBOLS = {
    "hybrid": "circle",
    "hybrid_15to1": "triangle-down",
    "hybrid_7to1": "triangle-up",
    "hybrid_3to1": "diamond",
    "hybrid_1to1": "cross",
    "mla": "square",
}
_DASHES = {
    "hybrid": "solid",
    "hybrid_15to1": "dot",
    "hybrid_7to1": "dashdot",
    "hybrid_3to1": "solid",
    "hybrid_1to1": "longdashdot",
    "mla": "dash",
}
_POINTS = 60  # of a drawn curve, and at most of a run's metrics


@dataclass(frozen=True, slots=True)
class ReportFigure:
    """One card of the page.

    Attributes:
        choices: what the reader may choose, each a label and its options.
        plots: by the chosen options' numbers joined with "/", Plotly's data and layout.
        wide: as wide as the page.
    """

    id: str
    title: str
    caption: str
    plots: dict[str, dict[str, Any]]
    choices: list[dict[str, Any]] = field(default_factory=list)
    wide: bool = False


def pass_rates(cells: Cells, curves: dict[str, list[FittedCurve]]) -> ReportFigure | None:
    """Held-out pass rate of each cell against each compute axis, fitted where `curves` has that axis."""
    shown = [cell for cell, groups in cells.items() if any(r.evaluations for g in groups.values() for r in g)]
    if not shown:
        return None
    plots = {}
    for i, cell in enumerate(shown):
        for j, axis in enumerate(AXES):
            data: list[dict[str, Any]] = []
            for architecture, runs in cells[cell].items():
                data += _points(architecture, runs, axis)
                found = (c for c in curves.get(axis, []) if (c.cell, c.architecture) == (cell, architecture))
                for curve in found:
                    data += _fitted(curve)
            layout = _layout(
                AXES[axis], "held-out pass rate", {"range": [-0.02, 1.04]}, {"rangemode": "tozero"}
            )
            plots[f"{i}/{j}"] = {"data": data, "layout": layout}
    return ReportFigure(
        "pass_rates",
        "Held-out pass rate",
        "Points are evaluations of single seeds. Lines are fitted sigmoids with their 95% bands, dashed "
        "where they extrapolate; hollow points were held out from the lines, and not from A, which is of all "
        "points. Dotted: power laws fitted to the same points as the lines, for contrast.",
        plots,
        [_choice("Length", _labels(shown)), _choice("Against", AXES.values())],
        wide=True,
    )


def fit_parameters(curves: Sequence[FittedCurve]) -> ReportFigure | None:
    """Asymptote, midpoint and exponent against length."""
    fitted = [c for c in curves if c.fit is not None]
    if not fitted:
        return None
    names = {"A": "asymptote A", "C_mid": f"midpoint C_mid ({AXES[fitted[0].axis]})", "B": "exponent B"}
    plots = {}
    for i, (name, title) in enumerate(names.items()):
        data = []
        present = _present(fitted)
        for place, architecture in enumerate(present):
            mine = [c for c in fitted if c.architecture == architecture]
            shift = apart(place, len(present))
            rows = [(c.cell.required_length * shift, getattr(c.fit, name)) for c in mine]
            data.append(
                _line(architecture, [length for length, _ in rows], [e.value for _, e in rows])
                | {"error_y": _errors([(e.value, e.low, e.high) for _, e in rows])}
                | {"text": [f"{c.cell.required_length:,} tokens" for c in mine], "hoverinfo": "name+text+y"}
            )
        ends = [end for c in fitted for end in (getattr(c.fit, name).low, getattr(c.fit, name).high)]
        scale = {"range": [0, 1.05]} if name == "A" else _log_axis(ends)
        lengths = [c.cell.required_length for c in fitted]
        plots[str(i)] = {"data": data, "layout": _length_layout(title, lengths, scale)}
    return ReportFigure(
        "parameters",
        "What the fits say against length",
        "R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B); bars are 95% bootstrap intervals over seeds and "
        "prompts.",
        plots,
        [_choice("Parameter", names.values())],
    )


def crossing(found: Sequence[Crossing]) -> ReportFigure | None:
    """The length from which the hybrid is ahead, a line for each quantity."""
    if not found:
        return None
    shortest, longest = min(c.lengths[0] for c in found), max(c.lengths[1] for c in found)
    left, right = shortest / 1.6, longest * 1.6
    several = len({c.budget_ratio for c in found}) > 1
    data = []
    for c in found:
        at = float(np.clip(c.length, left, right))
        name = COMPARED[c.quantity][0] + (f", budget × {c.budget_ratio:g}" if several else "")
        where = {0.0: "at every length", np.inf: "not at the longest"}
        marker = {0.0: "triangle-left", np.inf: "triangle-right"}
        trace: dict[str, Any] = {"x": [at], "y": [name], "mode": "markers+text", "showlegend": False}
        trace["text"] = [where.get(c.length, f"{c.length:,.0f} tokens")]
        trace["textposition"] = "top right" if at <= left else "top left" if at >= right else "top center"
        trace["marker"] = {"color": "black", "size": 11, "symbol": marker.get(c.length, "circle")}
        if c.low is not None and c.high is not None:
            ends = np.clip([c.low, c.high], left, right).tolist()
            trace["error_x"] = _errors([(at, *ends)]) | {"color": "black"}
        data.append(trace | {"cliponaxis": False})
    lengths = [2.0**i for i in range(int(np.ceil(np.log2(shortest))), int(np.log2(longest)) + 1)]
    if len(lengths) < 2:
        lengths = sorted({shortest, *lengths, longest})
    layout = _length_layout("", lengths, {"autorange": "reversed"})
    edges = [float(np.log10(left / 1.2)), float(np.log10(right * 1.2))]
    layout["xaxis"] |= {"title": {"text": "tokens"}, "range": edges}
    return ReportFigure(
        "crossing",
        "From which output length on the hybrid is ahead",
        f"Lengths measured: {shortest:,} to {longest:,} tokens. Bars are 95% paired bootstrap intervals over "
        "seeds.",
        {"": {"data": data, "layout": layout}},
    )


def against_length(
    id: str, title: str, metric: str, label: str, scale: float, claims: Claims, cells: Cells
) -> ReportFigure | None:
    """A metric's median over steps against length, with what the paper claims as multiples of MLA."""
    data: list[dict[str, Any]] = []
    for ratio in sorted({cell.budget_ratio for cell in cells}):
        for architecture in ARCHITECTURES:
            rows = []
            for cell, groups in cells.items():
                values = [over_steps(run, metric) for run in groups.get(architecture, [])]
                known = [value * scale for value in values if value is not None]
                if cell.budget_ratio == ratio and known:
                    rows.append((cell.required_length, float(np.mean(known)), min(known), max(known)))
            if not rows:
                continue
            lengths, means = [row[0] for row in rows], [row[1] for row in rows]
            line = _line(architecture, lengths, means) | {"error_y": _errors([row[1:] for row in rows])}
            if ratio != 1:
                line["name"] += f", budget × {ratio:g}"
            data.append(line)
            if architecture == "mla" and ratio == min(cell.budget_ratio for cell in cells):
                data += [
                    _plain(lengths, [factor * mean for mean in means], text, dash)
                    for (factor, text), dash in zip(claims.items(), ("dot", "dashdot"), strict=False)
                ]
    if not data:
        return None
    shown = [value for trace in data for value in trace["y"]]
    layout = _length_layout(label, [length for trace in data for length in trace["x"]], _log_axis(shown))
    caption = "Means over seeds of the median over steps; bars reach from the lowest to the highest seed."
    return ReportFigure(id, title, caption, {"": {"data": data, "layout": layout}})


def ratio_figure(ratios: Sequence[Ratio]) -> ReportFigure | None:
    """Each hybrid over MLA against length, a choice for each quantity."""
    quantities = [q for q in COMPARED if any(r.quantity == q for r in ratios)]
    if not quantities:
        return None
    plots = {}
    for i, quantity in enumerate(quantities):
        mine = [r for r in ratios if r.quantity == quantity]
        hybrids = list(dict.fromkeys(r.architecture for r in mine))
        lines, rows = [], []
        for hybrid in hybrids:
            its = [r for r in mine if r.architecture == hybrid]
            bars = [
                (r.ratio, r.ratio, r.ratio) if r.low is None or r.high is None else (r.ratio, r.low, r.high)
                for r in its
            ]
            rows += bars
            text = [f"{r.seeds} paired seeds, budget {r.budget}" for r in its]
            joined = len({r.budget for r in its}) == len(its)
            lengths = [r.required_length for r in its]
            lines.append(_with_bars(hybrid, len(hybrids) > 1, lengths, bars, text, joined))
        ends = [1.25, 0.8, *(value for row in rows for value in row)]
        lengths = [r.required_length for r in mine]
        layout = _length_layout("hybrid / full MLA", lengths, _log_axis(ends))
        layout["shapes"] = [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": 1,
                "y1": 1,
                "line": {"color": GREY, "dash": "dot", "width": 1.5},
            }
        ]
        plots[str(i)] = {"data": lines, "layout": layout}
    return ReportFigure(
        "ratio",
        "Hybrid over full MLA",
        "Pairs of runs with the same seed; bars are 95% paired bootstrap intervals where there are three or "
        "more. Above 1 the hybrid has more.",
        plots,
        [_choice("Quantity", (COMPARED[q][0] for q in quantities))],
    )


def lead_figure(found: Sequence[Lead]) -> ReportFigure | None:
    """Each hybrid less MLA in held-out pass rate against length, a choice for each measure."""
    if not found:
        return None
    hybrids = list(dict.fromkeys(lead.architecture for lead in found))
    plots = {}
    for i, name in enumerate(MEASURES):
        lines = []
        for hybrid in hybrids:
            its = [lead for lead in found if lead.architecture == hybrid]
            differences = [(d.value, d.half or 0.0) for d in (lead.by[name] for lead in its)]
            bars = [(value, value - half, value + half) for value, half in differences]
            text = [
                f"{'+'.join(map(str, lead.seeds))} seeds, up to step {lead.step}, budget {lead.cell.budget}"
                for lead in its
            ]
            lengths = [lead.cell.required_length for lead in its]
            joined = len(set(lengths)) == len(its)
            lines.append(_with_bars(hybrid, len(hybrids) > 1, lengths, bars, text, joined))
        lengths = [lead.cell.required_length for lead in found]
        layout = _length_layout("hybrid less full MLA", lengths, {"zeroline": True, "zerolinecolor": GREY})
        plots[str(i)] = {"data": lines, "layout": layout}
    return ReportFigure(
        "lead",
        "Lead in held-out pass rate",
        "At the steps that all runs of a length were evaluated at: the last three evaluations, all of them, "
        "or either less the first two. Bars are 95% intervals over seeds (Welch).",
        plots,
        [_choice("Measure", (measure.label for measure in MEASURES.values()))],
    )


def step_times(cells: Cells) -> ReportFigure | None:
    """Seconds of a step by phase, stacked, a bar for each cell and architecture."""
    bars = [
        (label, SHORT_NAMES[architecture], phases)
        for label, groups in zip(_labels(cells), cells.values(), strict=True)
        for architecture, runs in groups.items()
        if (phases := step_phases(runs))
    ]
    if not bars:
        return None
    shapes = {"rollout_s": "", "train_s": "/", "sync_s": ".", "other_s": "x"}
    data = [
        {
            "type": "bar",
            "name": look.label,
            "x": [[cell for cell, _, _ in bars], [name for _, name, _ in bars]],
            "y": _rounded(phases[phase] for _, _, phases in bars),
            "marker": {"color": look.colour, "pattern": {"shape": shapes[phase]}},
        }
        for phase, look in PHASES.items()
    ]
    layout = _layout("", "seconds per step") | {"barmode": "stack"}
    caption = "Means over steps and seeds, as the learner sees a step."
    plots = {"": {"data": data, "layout": layout}}
    return ReportFigure("step_time", "Where a step's time goes", caption, plots, wide=len(bars) > 6)


def diagnostics(cells: Cells) -> ReportFigure | None:
    """Training metrics against steps, a choice of metric and of cell."""
    runs = [run for groups in cells.values() for group in groups.values() for run in group]
    names = diagnostics_of(runs)
    if not names:
        return None
    plots = {}
    for i, name in enumerate(names):
        for j, cell in enumerate(cells):
            data = []
            for architecture, group in cells[cell].items():
                seeds = [run.metrics for run in group]
                mean = mean_over_seeds(seeds, "step", name)
                thin = max(1, len(mean.x) // _POINTS)
                data.append(_line(architecture, mean.x[::thin], mean.y[::thin]) | {"mode": "lines"})
            scale = {"type": "log"} if name == "mismatch_mean" else {"rangemode": "tozero"}
            plots[f"{i}/{j}"] = {"data": data, "layout": _layout("RL step", DIAGNOSTICS[name], scale)}
    return ReportFigure(
        "diagnostics",
        "Training, step by step",
        "Means over seeds at the steps that all seeds have reached.",
        plots,
        [_choice("Metric", (DIAGNOSTICS[n] for n in names)), _choice("Length", _labels(cells))],
    )


def _points(architecture: str, runs: Sequence[RunRecord], axis: str) -> list[dict[str, Any]]:
    x, y, text = [], [], []
    for run in runs:
        for cost, evaluation in zip(costs(run, axis), run.evaluations, strict=True):
            if np.isfinite(cost) and evaluation["pass_rate"] is not None:
                x.append(cost)
                y.append(evaluation["pass_rate"])
                text.append(f"seed {run.config.seed}, step {evaluation['step']}")
    look = ARCHITECTURES[architecture]
    marker = {"color": look.colour, "symbol": _SYMBOLS[architecture], "size": 6, "opacity": 0.75}
    trace = {"x": _rounded(x), "y": _rounded(y), "text": text, "mode": "markers", "marker": marker}
    return [trace | {"name": look.label, "legendgroup": architecture}] if x else []


def _fitted(curve: FittedCurve) -> list[dict[str, Any]]:
    fit, power_law = curve.drawn, curve.power_law
    if fit is None or curve.fit is None or power_law is None:
        return []
    look = ARCHITECTURES[curve.architecture]
    x = np.linspace(0, 1.5 * float(np.nanmax(curve.compute)), _POINTS)
    y, (low, high) = fit.predict(x), fit.band(x)
    inside = x <= fit.compute_range[1]
    group = {"legendgroup": curve.architecture, "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
    band = {
        "x": _rounded([*x, *x[::-1]]),
        "y": _rounded([*high, *low[::-1]]),
        "fill": "toself",
        "fillcolor": _faint(look.colour),
        "line": {"width": 0},
    }
    late = x[x >= fit.compute_range[0]]
    line = {"color": look.colour, "width": 2}
    thin = {"color": look.colour, "width": 1.2, "dash": "dot"}
    a = curve.fit.A
    traces = [
        band | group,
        {"x": _rounded(x[inside]), "y": _rounded(y[inside]), "line": line} | group,
        {"x": _rounded(late), "y": _rounded(power_law.predict(late)), "line": thin} | group,
        {"x": _rounded(x[~inside]), "y": _rounded(y[~inside]), "line": line | {"dash": "dash"}}
        | group
        | {
            "showlegend": True,
            "name": f"{SHORT_NAMES[curve.architecture]}: A = {a.value:.2f} [{a.low:.2f}, {a.high:.2f}]",
        },
    ]
    if curve.check is not None:
        held_out = np.isfinite(curve.compute) & (curve.compute > curve.check.split)
        marker = {"color": "white", "symbol": _SYMBOLS[curve.architecture], "size": 6}
        marker["line"] = {"color": look.colour, "width": 1.2}
        points = {"x": _rounded(curve.compute[held_out]), "y": _rounded(curve.reward[held_out])}
        traces.append(points | group | {"mode": "markers", "marker": marker})
    return traces


def _line(architecture: str, x: Iterable[float], y: Iterable[float]) -> dict[str, Any]:
    look = ARCHITECTURES[architecture]
    return {
        "name": look.label,
        "x": _rounded(x),
        "y": _rounded(y),
        "mode": "lines+markers",
        "marker": {"color": look.colour, "symbol": _SYMBOLS[architecture], "size": 8},
        "line": {"color": look.colour, "dash": _DASHES[architecture], "width": 2},
    }


def _with_bars(
    hybrid: str,
    named: bool,
    lengths: Sequence[int],
    bars: Sequence[tuple[float, float, float]],
    text: Sequence[str],
    joined: bool,
) -> dict[str, Any]:
    """A hybrid compared with full MLA: (value, low, high) at each length. A single hybrid needs no name,
    because the axis says what is compared."""
    line = _line(hybrid, lengths, [value for value, _, _ in bars])
    line |= {"error_y": _errors(bars), "showlegend": named, "text": list(text)}
    return line if joined else line | {"mode": "markers"}


def _plain(x: Sequence[float], y: Sequence[float], name: str, dash: str) -> dict[str, Any]:
    line = {"color": GREY, "dash": dash, "width": 1.3}
    return {"x": _rounded(x), "y": _rounded(y), "mode": "lines", "line": line, "name": name}


def _errors(rows: Sequence[tuple[float, ...]]) -> dict[str, Any]:
    """Error bars from (value, low, high)."""
    return {
        "type": "data",
        "symmetric": False,
        "array": _rounded(high - value for value, _, high in rows),
        "arrayminus": _rounded(value - low for value, low, _ in rows),
        "thickness": 1.3,
        "width": 0,
    }


def _layout(
    x: str, y: str, y_axis: dict[str, Any] | None = None, x_axis: dict[str, Any] | None = None
) -> dict[str, Any]:
    axis = {"gridcolor": "#E3E3E3", "zeroline": False, "linecolor": "#888888", "automargin": True}
    return {
        "xaxis": axis | {"title": {"text": x}} | (x_axis or {}),
        "yaxis": axis | {"title": {"text": y}} | (y_axis or {}),
        "margin": {"l": 55, "r": 15, "t": 34, "b": 45},  # the tool bar's place is at the top
        "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        "font": {"family": "system-ui, DejaVu Sans, sans-serif", "size": 12, "color": "#1c1c1c"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
    }


def _length_layout(y: str, lengths: Iterable[float], y_axis: dict[str, Any]) -> dict[str, Any]:
    """Lengths on a logarithmic axis, with a tick at each one measured, thinned where they would be many."""
    lengths = sorted(set(lengths))
    ticks = lengths[:: len(lengths) // 9 + 1]
    edges = [float(np.log10(lengths[0] / 1.3)), float(np.log10(lengths[-1] * 1.3))]
    axis = {"type": "log", "range": edges, "tickvals": ticks, "ticktext": [f"{t:,.0f}" for t in ticks]}
    return _layout("required output length (tokens)", y, y_axis, axis)


def _log_axis(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis around the positive ones of `values`, with ticks at round numbers written out."""
    known = [value for value in values if value > 0]
    low, high = np.log10(min(known)) - 0.06, np.log10(max(known)) + 0.06
    steps = (1, 1.5, 2, 3, 5, 7) if high - low < 1 else (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    shown = [tick for tick in ticks if low <= np.log10(tick) <= high]
    text = [short_number(tick) for tick in shown]
    return {"type": "log", "range": [low, high], "tickvals": shown, "ticktext": text}


def _choice(label: str, options: Iterable[str]) -> dict[str, Any]:
    return {"label": label, "options": list(options)}


def _labels(cells: Iterable[Cell]) -> list[str]:
    """What each cell is called; the budget is named where a length has several."""
    cells = list(cells)
    several = len({cell.required_length for cell in cells}) < len(cells)
    return [f"{c.required_length} tokens" + (f", budget {c.budget}" if several else "") for c in cells]


def _present(curves: Sequence[FittedCurve]) -> list[str]:
    return [a for a in ARCHITECTURES if any(c.architecture == a for c in curves)]


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.13)"


def _rounded(values: Iterable[float]) -> list[float]:
    """Four digits: a page of hundreds of runs stays small."""
    return [float(f"{value:.4g}") for value in values]
