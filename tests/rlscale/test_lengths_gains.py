"""The intervals that experiments/lengths_h200/gains.py prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

SCRIPT = Path(__file__).parents[2] / "experiments" / "lengths_h200" / "gains.py"
spec = importlib.util.spec_from_file_location("lengths_gains", SCRIPT)
assert spec
assert spec.loader
gains = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gains)


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.replace("[", "").replace("]", "").replace(",", "").split()]


@pytest.mark.parametrize("seed", range(5))
def test_intervals_are_students_and_welchs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(3, 2, size=3), rng.normal(1, 5, size=4)
    one = ttest_1samp(x, 0).confidence_interval()
    assert numbers(gains.interval([(1, x)])) == pytest.approx([x.mean(), one.low, one.high], abs=0.006)
    two = ttest_ind(x, y, equal_var=False).confidence_interval()
    found = numbers(gains.interval([(1, x), (-1, y)]))
    assert found == pytest.approx([x.mean() - y.mean(), two.low, two.high], abs=0.006)


@pytest.mark.parametrize("seed", range(3))
def test_weighed_leads_add_up_over_lengths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    leads = {n: (rng.normal(0.1 * n, 1, size=3), rng.normal(0, 1, size=3)) for n in (1, 2, 3)}
    means = [ours.mean() - full.mean() for ours, full in leads.values()]
    slope, low, high = numbers(gains.weighed([-0.5, 0.0, 0.5], leads, digits=6))
    assert slope == pytest.approx((means[2] - means[0]) / 2, abs=1e-6)
    ends = [values for n in (1, 3) for values in leads[n]]
    spread = sum(values.var(ddof=1) / 3 for values in ends) ** 0.5 / 2
    assert 1.96 * spread < high - slope == pytest.approx(slope - low, abs=2e-6)


def test_runs_are_compared_up_to_their_last_common_step() -> None:
    [run, *_] = gains.find_runs([SCRIPT.parent / "results"])
    steps = [looked["step"] for looked in run.evaluations]
    assert len(gains.pass_rates(run, steps[-2])) == len(steps) - 1
    assert len(gains.pass_rates(run, steps[-1])) == len(steps)


def test_the_committed_runs_give_the_readmes_lead(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [SCRIPT.parent / "results", SCRIPT.parents[1] / "hybrid_ratio" / "results"]
    gains.main(folders)
    printed = capsys.readouterr().out
    readme = (SCRIPT.parent / "README.md").read_text().replace("\n", " ")
    for lead in (line.rpartition(": ")[2] for line in printed.splitlines() if "all lengths" in line):
        assert lead in readme
