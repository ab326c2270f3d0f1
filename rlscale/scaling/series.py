"""From run records to the series that figures draw: grouping, means over seeds, intervals over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from rlscale.config import Architecture
from rlscale.errors import UserError
from rlscale.runs import RunRecord

Records = Sequence[dict[str, Any]]

_Z95 = 1.959964
# Runs that differ in one of these answer different questions, so no figure may average them.
_SHARED = (
    ("task", "name"),
    ("task", "options"),
    ("task", "reward"),
    ("model", "preset"),
    ("model", "overrides"),
)
DIAGNOSTICS = {
    "reward_mean": "training reward",
    "truncated_fraction": "truncated fraction",
    "entropy": "entropy (nats per token)",
    "mismatch_mean": "mean |log-prob mismatch|",
    "staleness_mean": "mean staleness (updates)",
}
"""Metrics to look at when a curve looks odd, and what they are called."""

# A step's phases, and the metrics that hold them, the learner's view first.
_PHASES = {
    "rollout_s": ("batch_wait_s", "rollout_s"),
    "train_s": ("learner_s", "train_s"),
    "sync_s": ("sync_stall_s", "sync_s"),
    "step_s": ("step_s",),
}


class Cell(NamedTuple):
    """A place in the sweep: what the answer needs and what a completion may have, in tokens."""

    required_length: int
    budget: int

    @property
    def budget_ratio(self) -> float:
        """Budget over required length, the end-of-sequence token apart."""
        return round((self.budget - 1) / self.required_length, 2)


Cells = dict[Cell, dict[str, list[RunRecord]]]
"""Runs by cell and architecture, ordered by seed."""


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of one line, shapes [points]."""

    x: np.ndarray
    y: np.ndarray


def by_cell(runs: Sequence[RunRecord]) -> Cells:
    """Runs by cell (shortest first) and architecture (hybrids first), ordered by seed."""
    order = get_args(Architecture)
    cells: dict[Cell, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda r: (order.index(r.config.architecture), r.config.seed)):
        cells[Cell(run.config.task.required_length, run.config.budget)][run.config.architecture].append(run)
    return dict(sorted(cells.items()))


def require_comparable(runs: Sequence[RunRecord]) -> None:
    """Refuses runs of different tasks or model shapes.

    Raises:
        UserError: names the setting that differs and two of its values.
    """
    for section, key in _SHARED:
        first = getattr(getattr(runs[0].config, section), key)
        for run in runs[1:]:
            value = getattr(getattr(run.config, section), key)
            if value != first:
                both = f"{first!r} in {runs[0].path} and {value!r} in {run.path}"
                raise UserError(f"{section}.{key} is {both}: plot them apart")


def curve(records: Records, x: str, y: str) -> Curve:
    """`y` against `x`, records that lack either left out."""
    points = [(r[x], r[y]) for r in records if r.get(x) is not None and r.get(y) is not None]
    columns = np.array(points, dtype=float).reshape(-1, 2).T
    return Curve(columns[0], columns[1])


def mean_over_seeds(seeds: Sequence[Records], x: str, y: str) -> Curve:
    """Mean of `x` and of `y` over the seeds, at the steps that every seed has.

    Seeds reach a step after different numbers of tokens and seconds, so `x` is averaged as well.
    """
    by_step = [
        {r["step"]: r for r in records if r.get(x) is not None and r.get(y) is not None} for records in seeds
    ]
    steps = sorted(set.intersection(*(set(records) for records in by_step))) if by_step else []
    means = [[np.mean([seed[step][name] for seed in by_step]) for name in (x, y)] for step in steps]
    columns = np.array(means, dtype=float).reshape(-1, 2).T
    return Curve(columns[0], columns[1])


def diagnostics_of(runs: Sequence[RunRecord]) -> list[str]:
    """The `DIAGNOSTICS` that these runs recorded; staleness where a token was stale, as in synchronous runs
    none can be."""
    curves = {name: [curve(run.metrics, "step", name).y for run in runs] for name in DIAGNOSTICS}
    recorded = [name for name, ys in curves.items() if any(y.size for y in ys)]
    stale = any(y.any() for y in curves["staleness_mean"])
    return [name for name in recorded if stale or name != "staleness_mean"]


def wilson(rate: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """95% Wilson score interval of a pass rate over `n` independent prompts, rate of shape [points].

    Completions of one prompt go together, and seeds are evaluated on the same prompts, so `n` counts prompts
    only: where completions do vary independently the interval is wider than it need be, never narrower.
    """
    z2 = _Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def prompts_evaluated(runs: Sequence[RunRecord]) -> int:
    """Held-out prompts behind each evaluation, the fewest if evaluations differ; 0 if no record tells."""
    counts = [len(e["pass_rates"]) for run in runs for e in run.evaluations if e.get("pass_rates")]
    return min(counts, default=0)


def over_steps(run: RunRecord, name: str) -> float | None:
    """Median of a metric over the run's steps; None if no step has it."""
    values = [m[name] for m in run.metrics if m.get(name) is not None]
    return float(np.median(values)) if values else None


def step_phases(runs: Sequence[RunRecord]) -> dict[str, float]:
    """Mean seconds of a step by phase, over steps and runs, as the learner sees them; empty without records.

    Runs that generate and train at the same time record what the learner waits for; other runs' phases follow
    one another and are what they are.
    """
    means: dict[str, float] = {}
    for name, recorded in _PHASES.items():
        values = [
            next((m[key] for key in recorded if m.get(key) is not None), 0.0) for r in runs for m in r.metrics
        ]
        means[name] = float(np.mean(values)) if values else 0.0
    total = means.pop("step_s")
    return means | {"other_s": max(0.0, total - sum(means.values()))} if total > 0 else {}
