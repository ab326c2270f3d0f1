"""Compute axes, fits of a sweep's cells, and crossing lengths, on runs whose right answers are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlscale.config import RunConfig, parse_config
from rlscale.runs import RunFolder, RunRecord, read_run
from rlscale.scaling import style
from rlscale.scaling.crossing import Crossing, crossings
from rlscale.scaling.curve_plots import asymptotes, crossing_lengths, scaling_curves
from rlscale.scaling.curves import costs, fit_cell, fit_cells
from rlscale.scaling.fit import sigmoid
from rlscale.scaling.series import Cell, by_cell

TOKENS_A_STEP = 1000
FLOPS_A_STEP = 4e9


def write_curve(
    path: Path, architecture: str, seed: int, a: float, mid: float, *, length: int = 16, **changes: Any
) -> RunRecord:
    """100 steps, evaluated every five with 64 prompts, on a sigmoid of generated tokens."""
    tree = {"architecture": architecture, "seed": seed, "task": {"required_length": length}, **changes}
    rng = np.random.default_rng()
    easier = rng.uniform(-0.05, 0.05, 64)
    with RunFolder.create(path, parse_config(RunConfig, tree)) as run:
        for step in range(101):
            tokens = step * TOKENS_A_STEP
            if step:
                run.log_metrics(step, {"rollout_flops": 1e9, "train_flops": 3e9, "generated_tokens": tokens})
            if step % 5 == 0:
                chance = np.clip(sigmoid(tokens, a, 3.0, mid, 0.3) + easier, 0, 1)
                rates = (rng.binomial(4, chance) / 4).tolist()
                record = {"pass_rate": float(np.mean(rates)), "pass_rates": rates}
                run.log_evaluation(step, {**record, "generated_tokens": tokens, "wall_s": 36.0 * step})
    return read_run(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    folder = tmp_path_factory.mktemp("curves")
    shapes = {("hybrid", 16): (0.9, 30_000), ("mla", 16): (0.7, 35_000)}
    return [
        write_curve(folder / f"{architecture}{seed}", architecture, seed, *shape, length=length)
        for (architecture, length), shape in shapes.items()
        for seed in range(3)
    ]


def test_costs_count_up_to_each_evaluation_on_every_axis(runs: list[RunRecord], tmp_path: Path) -> None:
    steps = np.arange(0, 101, 5)
    np.testing.assert_array_equal(costs(runs[0], "step"), steps)
    np.testing.assert_array_equal(costs(runs[0], "generated_tokens"), steps * TOKENS_A_STEP)
    np.testing.assert_allclose(costs(runs[0], "flops"), steps * FLOPS_A_STEP)
    # Two CPUs by default: one for the rollout worker and one for the learner.
    np.testing.assert_allclose(costs(runs[0], "device_hours"), steps * 36 * 2 / 3600)
    gpus = {"rollout": {"num_gpus": 1, "workers": 3}, "learner": {"num_gpus": 1}}
    run = write_curve(tmp_path / "gpus", "mla", 0, 0.8, 20_000, **gpus)
    np.testing.assert_allclose(costs(run, "device_hours"), steps * 36 * 4 / 3600)


@pytest.mark.parametrize("axis", ["generated_tokens", "flops"])
def test_a_cells_seeds_are_fitted_together_on_any_axis(runs: list[RunRecord], axis: str) -> None:
    unit = {"generated_tokens": 1.0, "flops": FLOPS_A_STEP / TOKENS_A_STEP}[axis]
    hybrid, mla = fit_cells(by_cell(runs), axis)
    for found, a, mid in ((hybrid, 0.9, 30_000), (mla, 0.7, 35_000)):
        assert found.fit is not None
        assert found.refusal == ""
        assert found.fit.A.value == pytest.approx(a, abs=0.08)
        assert found.fit.C_mid.value == pytest.approx(mid * unit, rel=0.2)
        assert found.fit.A.low < found.fit.A.value < found.fit.A.high
        assert len(found.compute) == 3 * 21
    assert hybrid.fit is not None
    assert mla.fit is not None
    assert hybrid.fit.A.low > mla.fit.A.value


def test_a_cell_that_carries_no_fit_keeps_its_points_and_says_why(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "short", RunConfig()) as run:
        for step in (0, 10):
            run.log_evaluation(step, {"pass_rate": 0.4, "generated_tokens": 100 * step, "wall_s": 1.0})
    record = read_run(tmp_path / "short")
    found = fit_cell(Cell(32, 33), "hybrid", [record], "generated_tokens")
    assert (found.fit, found.refusal) == (None, "1 points after the start, at least 5 are needed")
    np.testing.assert_array_equal(found.reward, [0.4, 0.4])
    unrecorded = fit_cell(Cell(32, 33), "hybrid", [record], "flops")
    assert unrecorded.refusal == "no FLOPs of rollouts and training on record"


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_the_scaling_figure_shows_fit_extrapolation_and_points_held_out(runs: list[RunRecord]) -> None:
    curves = fit_cells(by_cell(runs), "generated_tokens")
    with style.style():
        figure = scaling_curves(curves)
    assert figure is not None
    (panel,) = figure.axes
    hybrid = curves[0]
    assert hybrid.fit is not None
    points = [line for line in panel.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == 2 * 3 * 21
    dashed = [line for line in panel.lines if line.is_dashed()]
    assert max(line.get_xdata()[-1] for line in dashed) == pytest.approx(1.5 * 100 * TOKENS_A_STEP)
    assert hybrid.check is not None
    hollow = [line for line in points if line.get_fillstyle() == "none"]
    assert min(line.get_xdata().min() for line in hollow if len(line.get_xdata())) > hybrid.check.split
    figure.canvas.draw()
    legend, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0
    assert legend.x1 <= page.x1
    assert "held out from the lines, not from A" in [t.get_text() for t in figure.legends[0].get_texts()]
    dotted = [line for line in panel.lines if line.get_linestyle() == ":"]
    assert len(dotted) == 2
    assert hybrid.power_law is not None
    x = dotted[0].get_xdata()
    np.testing.assert_allclose(dotted[0].get_ydata(), hybrid.power_law.predict(x))
    assert hybrid.check.power_law == hybrid.power_law
    assert f"hybrid: A = {hybrid.fit.A.value:.2f} [{hybrid.fit.A.low:.2f}, {hybrid.fit.A.high:.2f}]" in texts(
        figure
    )


def test_asymptotes_are_drawn_with_their_intervals_and_not_at_all_without_a_fit(
    runs: list[RunRecord],
) -> None:
    curves = fit_cells(by_cell(runs), "generated_tokens")
    with style.style():
        figure = asymptotes(curves)
        assert figure is not None
        hybrid = curves[0].fit
        assert hybrid is not None
        line, bar = figure.axes[0].lines[0], figure.axes[0].collections[0]
        assert line.get_ydata() == pytest.approx([hybrid.A.value])
        np.testing.assert_allclose(bar.get_segments()[0][:, 1], [hybrid.A.low, hybrid.A.high])
        assert asymptotes([]) is None
        assert scaling_curves([]) is None


def row(architecture: str, length: int, seed: int, speed: float, budget_ratio: int = 1) -> dict[str, Any]:
    fixed = {"cache_bytes_per_sequence": 100.0, "pass_rate_end": 0.5}
    place = {"required_length": length, "budget": budget_ratio * length + 1, "seed": seed}
    return {"architecture": architecture, **place, "rollout_tokens_per_s": speed, **fixed}


def speeds(
    ratios: dict[int, float], seeds: int = 3, noise: float = 0.0, **place: int
) -> list[dict[str, Any]]:
    """Rows in which hybrid over MLA is as given at each length, times noise."""
    rng = np.random.default_rng()
    rows = []
    for length, ratio in ratios.items():
        for seed in range(seeds):
            mla = rng.uniform(100, 120)
            rows.append(row("mla", length, seed, mla, **place))
            rows.append(row("hybrid", length, seed, mla * ratio * math.exp(noise * rng.normal()), **place))
    return rows


def throughput(found: list[Crossing]) -> Crossing:
    return next(c for c in found if c.quantity == "rollout_tokens_per_s")


def test_the_crossing_is_interpolated_between_the_lengths_around_it() -> None:
    found = throughput(crossings(speeds({16: 0.5, 64: 0.8, 256: 1.25, 1024: 2.0})))
    assert found.length == pytest.approx(128)
    assert found.low == pytest.approx(128)
    assert found.high == pytest.approx(128)
    assert found.lengths == (16, 1024)


def test_noisy_seeds_widen_the_crossings_interval_around_the_truth() -> None:
    found = [
        throughput(crossings(speeds({16: 0.5, 64: 0.8, 256: 1.25, 1024: 2.0}, 6, 0.1))) for _ in range(20)
    ]
    covered = [c.low is not None and c.high is not None and c.low <= 128 <= c.high for c in found]
    assert sum(covered) >= 13
    assert all(c.low is not None and c.high is not None and c.low < c.length < c.high for c in found)


def test_ahead_everywhere_and_nowhere_are_zero_and_infinity() -> None:
    assert throughput(crossings(speeds({16: 1.1, 64: 1.5}))).length == 0
    assert throughput(crossings(speeds({16: 0.9, 64: 0.8}))).length == math.inf
    assert throughput(crossings(speeds({16: 1.2, 64: 0.8}))).length == math.inf
    # Ahead, behind, ahead for good: the last rise counts.
    assert throughput(crossings(speeds({16: 2.0, 64: 0.5, 256: 2.0}))).length == pytest.approx(128)


def test_one_seed_has_a_crossing_and_no_interval_and_one_length_has_none() -> None:
    found = throughput(crossings(speeds({16: 0.5, 64: 2.0}, seeds=1)))
    assert (found.length, found.low, found.high) == (pytest.approx(32), None, None)
    assert crossings(speeds({16: 0.5})) == []
    assert crossings([row("mla", 16, 0, 1.0), row("hybrid", 64, 0, 1.0)]) == []


def test_budgets_have_crossings_of_their_own() -> None:
    rows = speeds({16: 0.5, 64: 2.0}) + speeds({16: 0.8, 64: 0.9}, budget_ratio=2)
    found = {c.budget_ratio: c.length for c in crossings(rows) if c.quantity == "rollout_tokens_per_s"}
    assert found == {1.0: pytest.approx(32), 2.0: math.inf}


def test_less_cache_is_better() -> None:
    rows = speeds({16: 1.0, 64: 1.0})
    for r in rows:
        if r["architecture"] == "hybrid":
            r["cache_bytes_per_sequence"] = 200.0 if r["required_length"] == 16 else 50.0
    found = next(c for c in crossings(rows) if c.quantity == "cache_bytes_per_sequence")
    assert found.length == pytest.approx(32)


def test_the_crossing_figure_writes_every_length_and_says_where_there_is_none() -> None:
    found = crossings(speeds({16: 0.5, 64: 0.8, 256: 1.25, 1024: 2.0}, 3, 0.05))
    with style.style():
        figure = crossing_lengths(found)
        assert crossing_lengths([]) is None
    assert figure is not None
    written = texts(figure)
    assert f"{throughput(found).length:,.0f}" in written
    # Cache and pass rate are equal at every length: the hybrid is ahead in neither.
    assert written.count("not at the longest") == 2
