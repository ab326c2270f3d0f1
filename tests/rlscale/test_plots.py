"""Summaries, ratios and figures of synthetic sweeps whose right answers are known."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from rich.console import Console
from synthetic_runs import write_run, write_sweep

from rlscale.config import RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.runs import RunFolder, find_runs
from rlscale.scaling import (
    hybrid_to_mla,
    plot_runs,
    ratio_table,
    style,
    summarise,
    summary_table,
    write_summary,
)
from rlscale.scaling.curves import fit_axes
from rlscale.scaling.plots import figures
from rlscale.scaling.report_figures import diagnostics
from rlscale.scaling.series import by_cell, wilson
from rlscale.scaling.summary import FIELDS


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"), steps=30)


@pytest.fixture(scope="module")
def sweep_figures(sweep: Path) -> dict[str, Figure]:
    return drawn(sweep)


def drawn(folder: Path) -> dict[str, Figure]:
    runs = find_runs([folder])
    with style.style():
        return figures(runs, fit_axes(by_cell(runs)))


def panels(figure: Figure) -> list[Axes]:
    return list(figure.axes)


def bold(panel: Axes) -> list[Line2D]:
    """The means: hybrid's first, then MLA's."""
    return [line for line in panel.lines if line.get_linewidth() > 1.2 and line.get_linestyle() != "None"]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_both_architectures_at_one_length_give_every_figure_as_png_and_svg(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", lengths=(32,), seeds=(0,), steps=5)
    paths = plot_runs([tmp_path / "sweep"], tmp_path / "plots")
    names = {
        *("pass_rate_steps", "pass_rate_tokens", "pass_rate_time"),
        *("throughput", "cache", "ratio", "diagnostics", "step_time"),
    }
    assert {p.name for p in paths} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    for path in paths:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert path.stat().st_size > 5_000


def test_the_same_records_give_the_same_svg(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "hybrid", 32, 0, steps=3)
    for name in ("a", "b"):
        with style.style():
            style.save(drawn(tmp_path / "run")["throughput"], tmp_path, name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_every_text_lies_inside_its_figure_and_none_hides_another(sweep_figures: dict[str, Figure]) -> None:
    with style.style():
        for name, figure in sweep_figures.items():
            figure.draw_without_rendering()
            page = figure.bbox
            texts = [
                t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text()
            ]
            shown = [(t.get_text(), t.get_window_extent()) for t in texts]
            # Tick labels outside their axis' limits exist but are not drawn.
            ticks = {
                label
                for panel in figure.axes
                for axis, low_high in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim()))
                for tick in axis.get_major_ticks()
                for label in (tick.label1, tick.label2)
                if not low_high[0] <= tick.get_loc() <= low_high[1]
            }
            boxes = [(s, b) for t, (s, b) in zip(texts, shown, strict=True) if t not in ticks and b.width > 0]
            for text, box in boxes:
                beyond = max(page.x0 - box.x0, box.x1 - page.x1, page.y0 - box.y0, box.y1 - page.y1)
                assert beyond < 1, f"{name}: {text!r} is cut"
            for (one, a), (other, b) in itertools.combinations(boxes, 2):
                across = min(a.x1, b.x1) - max(a.x0, b.x0)
                down = min(a.y1, b.y1) - max(a.y0, b.y0)
                assert across < 1 or down < 1, f"{name}: {one!r} lies over {other!r}"


def test_the_bold_line_is_the_mean_over_seeds_and_lies_in_its_interval(
    sweep: Path, sweep_figures: dict[str, Figure]
) -> None:
    runs = find_runs([sweep])
    figure = sweep_figures["pass_rate_tokens"]
    assert [p.get_title() for p in panels(figure)] == [f"{n} tokens required" for n in (32, 64, 128)]
    for panel, length in zip(panels(figure), (32, 64, 128), strict=True):
        for line, band, architecture in zip(bold(panel), panel.collections, ("hybrid", "mla"), strict=True):
            seeds = [
                r.evaluations
                for r in runs
                if r.config.architecture == architecture and r.config.task.required_length == length
            ]
            assert len(seeds) == 2
            x = np.mean([[e["generated_tokens"] for e in s] for s in seeds], axis=0)
            y = np.mean([[e["pass_rate"] for e in s] for s in seeds], axis=0)
            np.testing.assert_allclose(line.get_xdata(), x)
            np.testing.assert_allclose(line.get_ydata(), y)
            assert line.get_color() == style.ARCHITECTURES[architecture].colour
            vertices = band.get_paths()[0].vertices
            for at, rate in zip(x, y, strict=True):
                edges = vertices[np.isclose(vertices[:, 0], at), 1]
                assert 0 <= edges.min() < rate < edges.max() <= 1
        assert panel.get_ylim() == (-0.02, 1.02)
    assert {"KDA/MLA hybrid", "full MLA", "single seeds", "95% interval over prompts"} == set(labels(figure))


def test_wilson_covers_the_true_rate_and_stays_inside_0_and_1() -> None:
    rng = np.random.default_rng()
    n = 64
    for rate in (0.02, 0.3, 0.5, 0.97):
        low, high = wilson(rng.binomial(n, rate, 20_000) / n, n)
        covered = np.mean((low <= rate) & (rate <= high))
        assert 0.92 < covered <= 1, f"95% interval covers {rate} in {covered:.3f} of samples"
    low, high = wilson(np.array([0.0, 1.0]), n)
    assert low[0] == 0
    assert 0 < high[0] < 0.1
    assert 0.9 < low[1] < 1
    assert high[1] == 1


def test_throughput_is_the_median_over_steps_with_the_papers_claims_as_multiples_of_mla(
    sweep: Path, sweep_figures: dict[str, Figure]
) -> None:
    runs = find_runs([sweep])
    (panel,) = panels(sweep_figures["throughput"])
    thin = [line for line in panel.lines if line.get_linewidth() < 1]
    mla = bold(panel)[1].get_ydata()
    for line, claim in zip(thin, (2.2, 6.3), strict=True):
        np.testing.assert_allclose(line.get_ydata(), claim * np.asarray(mla))
    assert {text for text in labels(sweep_figures["throughput"]) if "paper" in text} == {
        "MLA × 2.2: paper, 1M tokens, 1 sequence",
        "MLA × 6.3: paper, 1M tokens, full",
    }
    for line, architecture in zip(bold(panel), ("hybrid", "mla"), strict=True):
        wanted = [
            np.mean(
                [
                    np.median([m["rollout_tokens_per_s"] for m in r.metrics])
                    for r in runs
                    if r.config.architecture == architecture and r.config.task.required_length == length
                ]
            )
            for length in (32, 64, 128)
        ]
        np.testing.assert_allclose(line.get_ydata(), wanted)
    assert [t.get_text() for t in panel.get_xticklabels()] == ["32", "64", "128"]


def test_architectures_differ_in_colour_marker_and_line() -> None:
    hybrid, mla = style.ARCHITECTURES["hybrid"], style.ARCHITECTURES["mla"]
    assert hybrid.marker != mla.marker
    assert hybrid.line != mla.line

    def grey(colour: str) -> float:
        return float(np.dot(to_rgb(colour), [0.299, 0.587, 0.114]))

    assert abs(grey(hybrid.colour) - grey(mla.colour)) > 0.1
    assert len({look.hatch for look in style.PHASES.values()}) == len(style.PHASES)


def test_in_grey_no_line_of_one_architecture_looks_like_the_others(sweep_figures: dict[str, Figure]) -> None:
    compared = 0
    for name, figure in sweep_figures.items():
        looks: dict[str, set[tuple[Any, ...]]] = {
            architecture: {
                (line.get_linestyle(), line.get_marker(), line.get_fillstyle())
                for panel in figure.axes
                for line in panel.lines
                if line.get_color() == look.colour
            }
            for architecture, look in style.ARCHITECTURES.items()
            if architecture in ("hybrid", "mla")
        }
        if all(looks.values()):
            compared += 1
            assert not looks["hybrid"] & looks["mla"], name
    assert compared >= 8


def test_fits_and_crossings_lie_beside_the_figures_as_numbers(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", lengths=(32, 64), seeds=(0, 1), steps=60)
    plot_runs([tmp_path / "sweep"], tmp_path / "plots")
    written = json.loads((tmp_path / "plots" / "fits.json").read_text())
    assert len(written["curves"]) == 3 * 2 * 2
    runs = find_runs([tmp_path / "sweep"])
    for record, curve in zip(written["curves"], fit_axes(by_cell(runs))["generated_tokens"], strict=False):
        assert (record["axis"], record["architecture"]) == ("generated_tokens", curve.architecture)
        assert (record["required_length"], record["budget"]) == tuple(curve.cell)
        if curve.fit is None:
            assert record["refusal"] == curve.refusal
        else:
            assert record["A"] == [curve.fit.A.value, curve.fit.A.low, curve.fit.A.high]
            assert record["points"] == curve.fit.points
    cache = next(c for c in written["crossings"] if c["quantity"] == "cache_bytes_per_sequence")
    assert cache["length"] == "never"  # 70,000 bytes of state against 1,152 a token


@pytest.mark.parametrize("finish", [True, False])
def test_one_run_of_a_few_steps_is_enough(tmp_path: Path, finish: bool) -> None:
    write_run(tmp_path, "mla", 48, 0, steps=2, finish=finish)
    assert set(drawn(tmp_path)) == {
        *("pass_rate_steps", "pass_rate_tokens", "pass_rate_time"),
        *("throughput", "cache", "diagnostics", "step_time"),
    }


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
def test_staleness_is_drawn_of_runs_that_can_have_it(tmp_path: Path, mode: str) -> None:
    write_run(tmp_path, "mla", 48, 0, steps=2, mode={"kind": mode})
    figure = drawn(tmp_path)["diagnostics"]
    rows = {panel.get_ylabel().replace("\n", " ") for panel in panels(figure)}
    assert len(rows) == len(panels(figure)) == (5 if mode == "asynchronous" else 4)
    assert ("mean staleness (updates)" in rows) == (mode == "asynchronous")
    page = diagnostics(by_cell(find_runs([tmp_path])))
    assert page is not None
    assert ("mean staleness (updates)" in page.choices[0]["options"]) == (mode == "asynchronous")


def test_figures_without_their_records_are_left_out(tmp_path: Path) -> None:
    config = parse_config(RunConfig, {"steps": 3})
    RunFolder.create(tmp_path / "new", config).close()
    with pytest.raises(
        UserError, match=r"nothing to draw in .*: no run there has got as far as an evaluation"
    ):
        plot_runs([tmp_path], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
    with RunFolder.create(tmp_path / "started", config) as run:
        run.log_evaluation(0, {"pass_rate": 0.4, "generated_tokens": 0, "wall_s": 0.0})
    assert set(drawn(tmp_path)) == {"pass_rate_steps", "pass_rate_tokens", "pass_rate_time"}
    with RunFolder.create(tmp_path / "lost", config) as run:
        run.log_metrics(1, {"rollout_tokens_per_s": 100.0, "entropy": float("nan"), "mismatch_mean": 0.0})
    assert set(drawn(tmp_path)) >= {"throughput", "diagnostics"}


def test_budgets_of_one_length_get_panels_and_lines_of_their_own(tmp_path: Path) -> None:
    for ratio, architecture in itertools.product((0.5, 1), ("hybrid", "mla")):
        changes = {"rollout": {"max_tokens": int(32 * ratio) + 1}}
        write_run(tmp_path / f"{architecture}-{ratio}", architecture, 32, 0, steps=3, **changes)
    found = drawn(tmp_path)
    titles = [panel.get_title() for panel in panels(found["pass_rate_steps"])]
    assert titles == ["32 tokens required, budget 17", "32 tokens required, budget 33"]
    assert {"budget × 0.5", "budget × 1"} <= set(labels(found["throughput"]))
    assert {"budget × 0.5", "budget × 1"} == set(labels(found["ratio"]))


def test_runs_of_different_tasks_are_never_averaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "hybrid", 32, 0, steps=1, task={"name": "reversal"})
    write_run(tmp_path / "b", "hybrid", 32, 1, steps=1, task={"name": "sorting"})
    with pytest.raises(
        UserError, match=r"task\.name is 'reversal' in .* and 'sorting' in .*: plot them apart"
    ):
        plot_runs([tmp_path], tmp_path / "plots")


def test_figures_cannot_go_where_a_file_is(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "hybrid", 32, 0, steps=1)
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(UserError, match=r"figures cannot go to .*plots .*: choose another folder"):
        plot_runs([tmp_path / "run"], tmp_path / "plots")


def test_a_summary_has_a_row_per_finished_run_and_exactly_its_fields(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", lengths=(64, 32), steps=2)
    write_run(tmp_path / "sweep" / "unfinished", "mla", 16, 0, steps=2, finish=False)
    rows = summarise(find_runs([tmp_path / "sweep"]))
    write_summary(rows, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == rows
    assert [(r["required_length"], r["architecture"], r["seed"]) for r in rows] == [
        (length, architecture, seed)
        for length in (32, 64)
        for architecture in ("hybrid", "mla")
        for seed in (0, 1)
    ]
    assert all(
        list(row)
        == [
            *("architecture", "required_length", "budget", "seed", "pass_rate_start", "pass_rate_end"),
            *("rollout_tokens_per_s", "cache_bytes_per_sequence", "wall_s"),
        ]
        for row in rows
    )
    assert summarise([]) == []


def test_a_summary_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, RunConfig()).finish({field: 1 for field in FIELDS if field != "wall_s"})
    with pytest.raises(UserError, match=r"the summary of .* lacks wall_s"):
        summarise(find_runs([tmp_path]))


def row(architecture: str, seed: int, speed: float, passed: float = 0.5, length: int = 32) -> dict[str, Any]:
    values = {"rollout_tokens_per_s": speed, "cache_bytes_per_sequence": 10.0, "pass_rate_end": passed}
    start = {"budget": length + 1, "pass_rate_start": 0.1, "wall_s": 1.0}
    return {"architecture": architecture, "seed": seed, "required_length": length, **start, **values}


def test_a_ratio_pairs_seeds_and_has_an_interval_only_with_three() -> None:
    speeds = np.random.default_rng().uniform(10, 1000, 5)
    # Seeds differ wildly and the ratio within each is 1.5: pairing takes the seeds' spread out.
    rows = [row("mla", seed, speed) for seed, speed in enumerate(speeds)]
    rows += [row("hybrid", seed, 1.5 * speed) for seed, speed in enumerate(speeds)]
    found = {r.quantity: r for r in hybrid_to_mla(rows)}["rollout_tokens_per_s"]
    assert found.seeds == 5
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))

    single = hybrid_to_mla([row("mla", 0, 100.0), row("hybrid", 0, 80.0), row("hybrid", 1, 1.0)])[0]
    assert (single.ratio, single.low, single.high, single.seeds) == (0.8, None, None, 1)
    assert hybrid_to_mla([row("mla", 0, 1.0), row("hybrid", 1, 1.0)]) == []
    two = hybrid_to_mla([row(side, seed, 100.0 + seed) for side in ("mla", "hybrid") for seed in (0, 1)])[0]
    assert (two.low, two.high, two.seeds) == (None, None, 2)


def test_a_seed_that_never_passed_leaves_a_ratio_without_an_interval() -> None:
    rows = [row("mla", seed, 1.0, passed) for seed, passed in enumerate((0.0, 0.2, 0.4))]
    rows += [row("hybrid", seed, 1.0, 0.3) for seed in range(3)]
    found = {r.quantity: r for r in hybrid_to_mla(rows)}["pass_rate_end"]
    assert (found.ratio, found.low, found.high) == (pytest.approx(1.5), None, None)


@pytest.mark.parametrize(("seeds", "tries", "least"), [(3, 300, 270), (12, 40, 32)])
def test_a_bootstrap_interval_covers_the_true_ratio(seeds: int, tries: int, least: int) -> None:
    # Nominally 95%; a plain percentile bootstrap of three pairs covers 76%.
    rng = np.random.default_rng()
    covered = 0
    for _ in range(tries):
        noise = rng.normal(1, 0.1, (seeds, 2))
        rows = [row("hybrid", seed, 200 * a) for seed, (a, _) in enumerate(noise)]
        rows += [row("mla", seed, 100 * b) for seed, (_, b) in enumerate(noise)]
        found = hybrid_to_mla(rows)[0]
        assert found.low is not None
        assert found.high is not None
        assert found.low < found.ratio < found.high
        covered += found.low <= 2 <= found.high
    assert covered >= least


def test_a_ratio_over_nothing_is_left_out() -> None:
    rows = [row("mla", 0, 1.0, passed=0.0), row("hybrid", 0, 1.0, passed=0.4)]
    assert {r.quantity for r in hybrid_to_mla(rows)} == {"rollout_tokens_per_s", "cache_bytes_per_sequence"}


def test_tables_show_gain_and_interval_in_80_columns() -> None:
    rows = [row(a, s, 100.0 + s + 50 * (a == "mla"), 0.75, 64) for a in ("hybrid", "mla") for s in range(3)]
    # As wide as a run of a million tokens is.
    million = row("hybrid_15to1", 0, 12_345.0, 0.75, 1_048_576)
    million |= {"cache_bytes_per_sequence": 2_433_024_000, "wall_s": 12_345.0}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table([*rows, million]), ratio_table(hybrid_to_mla(rows)))
    text = console.export_text()
    assert "…" not in text
    assert "0.10 → 0.75" in text
    assert "+0.65" in text
    assert "0.67 [0.66, 0.67]" in text
