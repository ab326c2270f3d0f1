"""Figures of what `rlscale bench` measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlscale.scaling import style
from rlscale.scaling.style import ARCHITECTURES

Case = dict[str, Any]


def plot_rollout(cases: Sequence[Case], out: Path) -> list[Path]:
    """Time per output token of fixed batches, tokens/s with the cache filled, and cache per sequence, each
    against the context. Returns the files written."""
    decodes = [case for case in cases if case["kind"] == "decode" and case["step_ms"] is not None]
    fixed = [case for case in decodes if not case["fills_cache"]]
    filled = [case for case in decodes if case["fills_cache"]]
    panels = [
        (
            "time per output token (ms)",
            "step_ms",
            sequences,
            [c for c in fixed if c["sequences"] == sequences],
        )
        for sequences in sorted({case["sequences"] for case in fixed})
    ]
    panels.append(("tokens/s, cache filled", "tokens_per_s", None, filled))
    panels.append(("cache per sequence (bytes)", "cache_bytes_per_sequence", None, decodes))
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return []
    with style.style():
        figure, [row] = style.new_figure(1, len(panels))
        for axes, (label, key, sequences, chosen) in zip(row, panels, strict=True):
            against_context(axes, chosen, key)
            axes.set_ylabel(label)
            if sequences is not None:
                axes.set_title(f"{sequences} sequence{'s' if sequences > 1 else ''}")
            if key == "step_ms":
                axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            else:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.yaxis.set_major_formatter(style.engineering())
        row[0].legend()
        out.mkdir(parents=True, exist_ok=True)
        return style.save(figure, out, "rollout")


def against_context(axes: Axes, cases: Sequence[Case], key: str) -> None:
    """One line an architecture, on a logarithmic axis of contexts."""
    for architecture, look in ARCHITECTURES.items():
        points = sorted(
            {(case["context"], case[key]) for case in cases if case["architecture"] == architecture}
        )
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=look.colour, marker=look.marker, ls=look.line, label=look.label)
    style.length_axis(axes, [case["context"] for case in cases])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: binary(round(tokens))))
    axes.set_xlabel("context (tokens)")


def binary(tokens: int) -> str:
    """4096 as 4k, 1048576 as 1M."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return str(tokens)


def plot_bars(
    cases: Sequence[Case], labels: Sequence[str], key: str, label: str, out: Path, name: str
) -> list[Path]:
    """A bar a case. Returns the files written."""
    with style.style():
        figure, [[axes]] = style.new_figure(1, 1)
        axes.bar(range(len(cases)), [case[key] for case in cases], color=style.BLUE, width=0.6)
        axes.set_xticks(range(len(cases)), labels)
        axes.set_ylabel(label)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_formatter(style.engineering())
        out.mkdir(parents=True, exist_ok=True)
        return style.save(figure, out, name)
