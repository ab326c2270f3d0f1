"""How far a hybrid is ahead in held-out pass rate, with intervals over seeds."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp, ttest_ind
from synthetic_runs import write_run, write_sweep

from rlscale.config import RunConfig, parse_config
from rlscale.runs import RunFolder, find_runs
from rlscale.scaling.leads import (
    MEASURES,
    Difference,
    lead_records,
    lead_table,
    leads,
    rates_by_cell,
    trends,
    welch,
)

STUDY = Path(__file__).parents[2] / "experiments" / "lengths_h200"


def write_rates(
    folder: Path,
    architecture: str,
    length: int,
    seed: int,
    rates: list[float],
    end: str = "finished",
    budget: int | None = None,
) -> None:
    """A run that was evaluated every ten steps, with these pass rates."""
    tree = {
        "architecture": architecture,
        "seed": seed,
        "task": {"required_length": length},
        "rollout": {"max_tokens": budget or length + 1},
    }
    with RunFolder.create(
        folder / f"{architecture}-{length}-{seed}-{budget}", parse_config(RunConfig, tree)
    ) as run:
        for i, rate in enumerate(rates):
            run.log_evaluation(10 * i, {"pass_rate": rate, "generated_tokens": 0, "wall_s": 0.0})
        if end == "failed":
            run.fail("the worker died")
        elif end in ("finished", "abandoned"):
            run.finish({}, abandoned="hopeless" if end == "abandoned" else None)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_students_and_welchs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(3, 2, size=3), rng.normal(1, 5, size=4)
    one = ttest_1samp(x, 0).confidence_interval()
    found = welch([(1, x)])
    assert (found.value - found.half, found.value + found.half) == pytest.approx(one)
    two = ttest_ind(x, y, equal_var=False).confidence_interval()
    found = welch([(1, x), (-1, y)])
    assert (found.value - found.half, found.value + found.half) == pytest.approx(two)
    assert found.decided == (two.low > 0 or two.high < 0)
    assert welch([(0.5, x), (-0.5, y)]).half == pytest.approx(found.half / 2)


def test_one_seed_has_a_lead_and_no_interval() -> None:
    alone = welch([(1, np.array([0.5])), (-1, np.array([0.25, 0.35]))])
    assert (alone.value, alone.half, alone.decided) == (pytest.approx(0.2), None, False)
    assert alone.text() == "+0.20"
    same = welch([(1, np.array([0.5, 0.5])), (-1, np.array([0.25, 0.25]))])
    assert same == Difference(0.25, None)
    assert Difference(-0.125, 0.0625).text(3) == "-0.125 ± 0.062"


@pytest.mark.parametrize("seed", range(3))
def test_a_lead_that_grows_with_the_length_is_found_with_its_growth(tmp_path: Path, seed: int) -> None:
    """Full MLA at 0.3 everywhere, the hybrid 0.05 above it at 16 tokens and 0.04 more with each doubling,
    from the third evaluation on; both with noise between seeds."""
    rng = np.random.default_rng(seed)
    for i, length in enumerate((16, 32, 64, 128)):
        for number, hybrid in itertools.product(range(3), (False, True)):
            start = 0.3 + rng.normal(0, 0.004)
            later = start + hybrid * (0.05 + 0.04 * i)
            write_rates(
                tmp_path, "hybrid" if hybrid else "mla", length, number, [start] * 2 + [later] * (3 + i)
            )
    runs = find_runs([tmp_path])
    found = leads(runs)
    assert [(lead.cell.required_length, lead.seeds, lead.step) for lead in found] == [
        (16, (3, 3), 40),
        (32, (3, 3), 50),
        (64, (3, 3), 60),
        (128, (3, 3), 70),
    ]
    for i, lead in enumerate(found):
        true = 0.05 + 0.04 * i
        share = (3 + i) / (5 + i)  # of evaluations after the start
        wanted = {"end": true, "mean": share * true, "end_gained": true, "mean_gained": share * true}
        assert {name: d.value for name, d in lead.by.items()} == pytest.approx(wanted, abs=0.015)
    (trend,) = trends(found)
    assert trend.lengths == (16, 32, 64, 128)
    for by, true in ((trend.mean, 0.11), (trend.per_doubling, 0.04)):
        assert by["end"].decided
        assert by["end"].value == pytest.approx(true, abs=0.01)
        assert by["end_gained"].value == pytest.approx(true, abs=1e-9)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        terms = []
        for spread in (0.02, 0.05, 0.1):
            terms += [(1 / 3, rng.normal(0.5, spread, 3)), (-1 / 3, rng.normal(0.4, spread, 3))]
        found = welch(terms)
        inside += abs(found.value - 0.1) <= found.half
    assert inside >= 930


def test_runs_are_compared_at_the_steps_that_all_of_them_reached(tmp_path: Path) -> None:
    rising = [0.1 * i for i in range(8)]
    write_rates(tmp_path, "hybrid", 16, 0, rising)
    write_rates(tmp_path, "hybrid", 16, 1, rising[:6], end="running")
    write_rates(tmp_path, "hybrid", 16, 2, rising[:2], end="running")  # has just begun
    write_rates(tmp_path, "mla", 16, 0, rising)
    write_rates(tmp_path, "mla", 16, 1, [0.9] * 8, end="failed")
    write_rates(tmp_path, "mla", 16, 2, [0.0] * 3, end="abandoned")
    write_rates(tmp_path, "mla", 32, 0, rising)  # no hybrid to compare with
    write_rates(tmp_path, "hybrid", 64, 0, rising[:4])
    write_rates(tmp_path, "mla", 64, 0, rising[:4])
    runs = find_runs([tmp_path])
    cells = {cell.required_length: found for cell, found in rates_by_cell(runs).items()}
    assert sorted(cells) == [16, 32]
    step, rates = cells[16]
    assert step == 50
    assert rates["hybrid"] == pytest.approx(np.array([rising[:6]] * 2))
    assert rates["mla"] == pytest.approx(np.array([rising[:6], [0.0] * 6]))
    (lead,) = leads(runs)
    assert (lead.seeds, lead.by["end"].value) == ((2, 2), pytest.approx(0.2))
    assert trends(leads(runs)) == []


def test_records_are_json_and_name_both_ends_of_an_interval(tmp_path: Path) -> None:
    runs = find_runs([write_sweep(tmp_path, seeds=(0, 1, 2))])
    records = lead_records(leads(runs), trends(leads(runs)))
    assert [record["required_length"] for record in records["leads"]] == [32, 64, 128]
    for record, lead in zip(records["leads"], leads(runs), strict=True):
        for name in MEASURES:
            value, low, high = record[name]
            assert low < value < high
            assert lead.by[name].text(6) == f"{value:+.6f} ± {high - value:.6f}"
    (trend,) = records["trends"]
    assert list(trend["per_doubling"]) == list(MEASURES)
    single = find_runs([write_sweep(tmp_path / "single", seeds=(0,))])
    assert lead_records(leads(single), [])["leads"][0]["end"][1:] == [None, None]


@pytest.mark.parametrize("hybrids", [("hybrid",), ("hybrid", "hybrid_7to1")])
def test_the_table_fits_80_columns(tmp_path: Path, hybrids: tuple[str, ...]) -> None:
    runs = find_runs([write_sweep(tmp_path, (*hybrids, "mla"), seeds=(0, 1, 2))])
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    console.print(lead_table(leads(runs), trends(leads(runs))))
    text = console.export_text()
    assert "…" not in text
    assert text.count("slope") == len(hybrids) + 1
    assert ("7:1" in text) == (len(hybrids) > 1)
    assert leads(runs)[0].by["end"].text() in text


def test_budgets_of_one_length_are_lines_of_their_own(tmp_path: Path) -> None:
    for budget, seed, architecture in itertools.product((17, 33), (0, 1), ("hybrid", "mla")):
        for length in (16, 32):
            rates = [0.1 * seed + 0.01 * i for i in range(6)]
            write_rates(tmp_path, architecture, length, seed, rates, budget=budget * length // 16)
    runs = find_runs([tmp_path])
    assert [lead.cell.budget for lead in leads(runs)] == [17, 33, 34, 66]
    assert [trend.lengths for trend in trends(leads(runs))] == [(16, 32)] * len(trends(leads(runs)))
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(lead_table(leads(runs), trends(leads(runs))))
    assert "budget" in console.export_text()


def test_the_committed_runs_give_the_readmes_leads() -> None:
    readme = " ".join((STUDY / "README.md").read_text().split())
    runs = find_runs([STUDY / "results"])
    (trend,) = trends(leads(runs))
    for name in MEASURES:
        assert f"| {trend.mean[name].text()} | {trend.per_doubling[name].text(3)} |" in readme
    for lead in leads(runs):
        assert lead.by["end"].text() in readme
        assert lead.by["mean"].text() in readme


def test_the_committed_runs_made_again_give_the_readmes_lines() -> None:
    readme = " ".join((STUDY / "README.md").read_text().split())
    first, longer = STUDY / "results_4096_first", STUDY / "results_1024_longer"
    for name, folders, length in (
        ("4,096, the first six, 27", [first], 4096),
        ("1,024, with full MLA's longer three, 36", [STUDY / "results", longer], 1024),
    ):
        (lead,) = (each for each in leads(find_runs(folders)) if each.cell.required_length == length)
        assert f"| {name} | {' | '.join(lead.by[measure].text() for measure in MEASURES)} |" in readme
        assert str(lead.step) == name.split()[-1]
    twelve: dict[str, list[list[float]]] = {"hybrid": [], "mla": []}
    for folder, last in ((STUDY / "results", 25), (first, 27)):
        for run in find_runs([folder]):
            if run.config.task.required_length == 4096:
                rates = [e["pass_rate"] for e in run.evaluations if e["step"] <= last]
                twelve[run.config.architecture].append(rates)
    for evaluations, words in ((3, "ahead at that end"), (99, "on the way")):
        ours, full = (
            np.array([np.mean(rates[-evaluations:]) for rates in twelve[a]]) for a in ("hybrid", "mla")
        )
        assert len(ours) == len(full) == 6
        assert f"{welch([(1, ours), (-1, full)]).text()} {words}" in readme


def test_the_committed_runs_of_all_ratios_give_the_readmes_line(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(STUDY / "gains.py"))["main"](
        [STUDY / "results", STUDY.parent / "hybrid_ratio" / "results"]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "all hybrids" in line]
    assert len(lines) == len(MEASURES)
    row = " | ".join(line.rpartition("full MLA's ")[2] for line in lines)
    assert f"all ratios of KDA to MLA layers, nine runs | {row} |" in (STUDY / "README.md").read_text()


def test_a_run_that_has_only_begun_does_not_take_a_cells_lead_away(tmp_path: Path) -> None:
    write_sweep(tmp_path, lengths=(32,), seeds=(0, 1))
    before = leads(find_runs([tmp_path]))
    write_run(tmp_path / "new", "hybrid", 32, 7, steps=3, finish=False)
    assert leads(find_runs([tmp_path])) == before
