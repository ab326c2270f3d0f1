"""One row per finished run, and how the hybrid compares with full MLA at each length."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rlscale.errors import UserError
from rlscale.runs import RunRecord
from rlscale.scaling.crossing import COMPARED
from rlscale.scaling.pairs import carry_interval, resampled_log_ratios
from rlscale.scaling.style import ARCHITECTURES, SHORT_NAMES

FIELDS = (
    "architecture",
    "required_length",
    "budget",
    "seed",
    "pass_rate_start",
    "pass_rate_end",
    "rollout_tokens_per_s",
    "cache_bytes_per_sequence",
    "wall_s",
)

_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Ratio:
    """A hybrid over full MLA in one quantity, at one required length and budget.

    Args:
        architecture: the hybrid.
        ratio: mean over the seeds that both architectures have, hybrid's over MLA's.
        low, high: 95% paired bootstrap interval over those seeds; None with fewer than three, which say too
            little about the spread, and where one of them is at 0.
        seeds: number of pairs.
    """

    architecture: str
    required_length: int
    budget: int
    quantity: str
    ratio: float
    low: float | None
    high: float | None
    seeds: int


def summarise(runs: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """One row of `FIELDS` per finished run, ordered by length, budget, architecture and seed.

    Unfinished and failed runs have no row. `pass_rate_start` is the held-out pass rate after the warm start,
    `rollout_tokens_per_s` the median over steps, `wall_s` the seconds of the whole run.

    Raises:
        UserError: a finished run's summary lacks a field.
    """
    rows = []
    for run in runs:
        if run.state != "finished":
            continue
        summary = run.status.get("summary", {})
        missing = [field for field in FIELDS if field not in summary]
        if missing:
            raise UserError(
                f"the summary of {run.path} lacks {', '.join(missing)}: run it again, --overwrite"
            )
        rows.append({field: summary[field] for field in FIELDS})
    return sorted(rows, key=lambda r: (r["required_length"], r["budget"], r["architecture"], r["seed"]))


def write_summary(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows as a JSON list, one row a line."""
    path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n")


def hybrid_to_mla(rows: Iterable[dict[str, Any]]) -> list[Ratio]:
    """Ratios of throughput, cache and final pass rate, for each hybrid, length and budget, paired by seed.

    The interval resamples the pairs, so what a seed does to both architectures cancels. A ratio whose MLA
    side is 0 is left out.
    """
    cells: dict[tuple[int, int], dict[int, dict[str, dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        cells[row["required_length"], row["budget"]][row["seed"]][row["architecture"]] = row
    ratios = []
    for (length, budget), seeds in sorted(cells.items()):
        for hybrid, quantity in itertools.product((a for a in ARCHITECTURES if a != "mla"), COMPARED):
            pairs = [sides for _, sides in sorted(seeds.items()) if {hybrid, "mla"} <= sides.keys()]
            values = [(sides[hybrid][quantity], sides["mla"][quantity]) for sides in pairs]
            both = np.array([pair for pair in values if None not in pair], dtype=float)
            if len(both) and both[:, 1].any():
                found = _paired_ratio(both)
                ratios.append(Ratio(hybrid, length, budget, quantity, *found, seeds=len(both)))
    return ratios


def _paired_ratio(pairs: np.ndarray) -> tuple[float, float | None, float | None]:
    """Ratio of the column means of `pairs`, shape [seeds, 2], and its 95% bootstrap interval."""
    ratio = float(pairs[:, 0].mean() / pairs[:, 1].mean())
    if not carry_interval(pairs):
        return ratio, None, None
    drawn = resampled_log_ratios(pairs, _RESAMPLES, np.random.default_rng(0))
    low, high = np.exp(np.percentile(drawn, [2.5, 97.5]))
    return ratio, float(low), float(high)


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for a terminal, widest differences side by side: one line a run."""
    title = "Held-out pass rate under RL"
    # One space between columns: a million tokens must fit a terminal of 80 too.
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in (
        "length",
        "budget",
        "architecture",
        "seed",
        "pass rate",
        "gain",
        "tokens/s",
        "cache\nKiB",
        "time\ns",
    ):
        table.add_column(heading, justify="left" if heading == "architecture" else "right", no_wrap=True)
    previous = None
    for row in rows:
        cell = (row["required_length"], row["budget"])
        if previous is not None and cell != previous:
            table.add_section()
        previous = cell
        start, end = row["pass_rate_start"], row["pass_rate_end"]
        table.add_row(
            str(row["required_length"]),
            str(row["budget"]),
            row["architecture"],
            str(row["seed"]),
            f"{_number(start, '.2f')} → {_number(end, '.2f')}",
            _number(None if start is None or end is None else end - start, "+.2f"),
            _number(row["rollout_tokens_per_s"], ",.0f"),
            _number(row["cache_bytes_per_sequence"], ",.0f", 1 / 1024),
            _number(row["wall_s"], ",.0f"),
        )
    return table


def ratio_table(ratios: Sequence[Ratio]) -> Table:
    """Hybrid over MLA, a line for each hybrid, length and budget; intervals where seeds carry them.

    A single hybrid is not named, so that the table fits a terminal of 80 columns.
    """
    several = len({ratio.architecture for ratio in ratios}) > 1
    title = "Hybrid / full MLA, same seeds"
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    named = ("hybrid",) if several else ()
    for heading in ("length", "budget", *named, "seeds", "tokens/s", "cache", "final pass rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_cell: dict[tuple[int, int, str], dict[str, Ratio]] = defaultdict(dict)
    for ratio in ratios:
        by_cell[ratio.required_length, ratio.budget, ratio.architecture][ratio.quantity] = ratio
    for (length, budget, hybrid), found in by_cell.items():
        texts = []
        for quantity in COMPARED:
            r = found.get(quantity)
            interval = "" if r is None or r.low is None else f" [{r.low:.2f}, {r.high:.2f}]"
            texts.append("–" if r is None else f"{r.ratio:.2f}{interval}")
        seeds = max(r.seeds for r in found.values())
        names = (SHORT_NAMES[hybrid],) if several else ()
        table.add_row(str(length), str(budget), *names, str(seeds), *texts)
    return table


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:{form}}"
