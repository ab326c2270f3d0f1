"""Scaling curves of a sweep: held-out reward against a compute axis, fitted cell by cell."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlscale.runs import RunRecord
from rlscale.scaling.fit import (
    Extrapolation,
    FitRefused,
    PowerLawFit,
    SigmoidFit,
    extrapolate,
    fit_power_law,
    fit_sigmoid,
)
from rlscale.scaling.series import Cell, Cells

AXES = {
    "generated_tokens": "generated tokens",
    "flops": "FLOPs of rollouts and training",
    "device_hours": "GPU-hours, or CPU-hours",
    "step": "RL steps",
}
"""Compute axes and what they are called, the most telling first."""

FITTED_AXES = ("generated_tokens", "flops", "device_hours")
"""Axes that figures draw fits against."""

_SAMPLES = 300


@dataclass(frozen=True, slots=True)
class FittedCurve:
    """All seeds of one cell and architecture against one compute axis.

    Attributes:
        compute: [N], cost of each evaluation; reward: [N], held-out mean pass rate; seeds: [N].
        fit: of all points, or None and then `refusal` says why.
        check: the fit of the first half against the rest, or None where the half carries no fit.
        power_law: of the points that `drawn` is fitted to, for contrast; None without a fit.
    """

    cell: Cell
    architecture: str
    axis: str
    compute: np.ndarray
    reward: np.ndarray
    seeds: np.ndarray
    fit: SigmoidFit | None
    check: Extrapolation | None
    refusal: str
    power_law: PowerLawFit | None = None

    @property
    def drawn(self) -> SigmoidFit | None:
        """The sigmoid that figures draw: of the first half where that carries one, else of all points."""
        return self.check.fit if self.check else self.fit


def costs(run: RunRecord, axis: str) -> np.ndarray:
    """What each of the run's evaluations had cost so far, [evaluations]; NaN where the run recorded none."""
    evaluations = run.evaluations
    if axis == "flops":
        steps = np.array([m["step"] for m in run.metrics], dtype=float)
        spent = [[m.get(part) for part in ("rollout_flops", "train_flops")] for m in run.metrics]
        by_step = np.array(spent, dtype=float).reshape(-1, 2).sum(axis=1)  # NaN where not recorded
        total = np.concatenate(([0.0], np.cumsum(by_step)))
        return total[np.searchsorted(steps, [e["step"] for e in evaluations], side="right")]
    name = "wall_s" if axis == "device_hours" else axis
    values = np.array([np.nan if e.get(name) is None else e[name] for e in evaluations], dtype=float)
    return values * devices(run) / 3600 if axis == "device_hours" else values


def devices(run: RunRecord) -> float:
    """GPUs that the run holds, or CPUs if it has no GPU."""
    rollout, learner = run.config.rollout, run.config.learner
    gpus = rollout.workers * rollout.num_gpus + learner.workers * learner.num_gpus
    return gpus or rollout.workers * rollout.num_cpus + learner.workers * learner.num_cpus


def fit_cell(cell: Cell, architecture: str, runs: Sequence[RunRecord], axis: str) -> FittedCurve:
    """Fits all seeds of a cell together; a curve that carries no fit has its points and the reason.

    Prompts are resampled where every evaluation has the pass rates of the same number of prompts.
    """
    compute = np.concatenate([costs(run, axis) for run in runs])
    rates = [e.get("pass_rates") or [] for run in runs for e in run.evaluations]
    means = np.array([e["pass_rate"] for run in runs for e in run.evaluations], dtype=float)
    seeds = np.repeat([run.config.seed for run in runs], [len(run.evaluations) for run in runs])
    same = len({len(rate) for rate in rates}) == 1 and rates[0]
    reward = np.array(rates, dtype=float) if same else means
    fit = check = power_law = None
    refusal = ""
    try:
        fit = fit_sigmoid(compute, reward, seeds=seeds, samples=_SAMPLES)
        with suppress(FitRefused):
            check = extrapolate(compute, reward, seeds=seeds, samples=_SAMPLES)
        power_law = check.power_law if check else fit_power_law(compute, reward)
    except FitRefused as error:
        refusal = str(error) if (compute > 0).any() else f"no {AXES[axis]} on record"
    return FittedCurve(cell, architecture, axis, compute, means, seeds, fit, check, refusal, power_law)


def fit_axes(cells: Cells) -> dict[str, list[FittedCurve]]:
    """`fit_cells` for each of `FITTED_AXES`."""
    return {axis: fit_cells(cells, axis) for axis in FITTED_AXES}


def fit_records(curves: Sequence[FittedCurve]) -> list[dict[str, Any]]:
    """What the fits found, as JSON can hold it: a record a curve, estimates as [value, low, high]."""
    records = []
    for curve in curves:
        record: dict[str, Any] = {
            "axis": curve.axis,
            "architecture": curve.architecture,
            **curve.cell._asdict(),
        }
        if curve.fit is None:
            records.append(record | {"refusal": curve.refusal})
            continue
        for name in ("A", "B", "C_mid", "R0"):
            estimate = getattr(curve.fit, name)
            record[name] = [estimate.value, estimate.low, estimate.high]
        record |= {"rmse": curve.fit.rmse, "points": curve.fit.points}
        if curve.check is not None:
            record["first_half"] = {
                "split": curve.check.split,
                "error": curve.check.error,
                "power_law_error": curve.check.power_law_error,
            }
        records.append(record)
    return records


def fit_cells(cells: Cells, axis: str) -> list[FittedCurve]:
    """`fit_cell` for every cell and architecture that has been evaluated, in the cells' order."""
    return [
        fit_cell(cell, architecture, evaluated, axis)
        for cell, architectures in cells.items()
        for architecture, runs in architectures.items()
        if (evaluated := [run for run in runs if run.evaluations])
    ]
