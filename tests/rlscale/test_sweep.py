"""A whole sweep through Ray: a grid of real runs, small, on the reference engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from rlscale import cluster
from rlscale.cli import draw
from rlscale.config import SweepConfig, parse_config
from rlscale.errors import UserError
from rlscale.runs import find_runs, read_run
from rlscale.scaling.summary import FIELDS
from rlscale.sweep import run_name, sweep


def grid(**changes: object) -> SweepConfig:
    tree = {
        "required_lengths": [3],
        "budget_ratios": [1.0, 2.0],
        "run": {
            "steps": 2,
            "model": {
                "overrides": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "full_attention_layers": [2],
                    "first_k_dense_replace": 2,
                }
            },
            "task": {"name": "reversal", "options": {"alphabet": 5}},
            "warm_start": {
                "target_pass_rate": 0.05,
                "evaluate_every": 10,
                "learning_rate": 5e-3,
                "batch_size": 32,
            },
            "rollout": {
                "engine": "reference",
                "prompts_per_step": 4,
                "samples_per_prompt": 2,
                "num_cpus": 0.5,
            },
            "learner": {"num_cpus": 0.5},
            "evaluation": {"every": 1, "prompts": 8},
            "checkpoint": {"every": 1},
        },
    }
    return parse_config(SweepConfig, tree | changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cluster.connect()
    folder = tmp_path_factory.mktemp("sweep") / "grid"
    events = list(sweep(grid(), folder))
    assert [event.state for event in events if event.state == "failed"] == []
    yield folder
    ray.shutdown()


def test_every_cell_of_the_grid_is_a_finished_run(swept: Path) -> None:
    assert {run.path.name for run in find_runs([swept])} == {run_name(cell) for cell in grid().cells()}
    assert {run.state for run in find_runs([swept])} == {"finished"}


def test_budgets_share_one_warm_start(swept: Path) -> None:
    assert len(list((swept / "warm_starts").iterdir())) == 2  # one an architecture
    for architecture in ("hybrid", "mla"):
        tight, wide = (read_run(swept / f"{architecture}_length3_budget{b}_seed0") for b in (4, 7))
        assert tight.warm_start is not None
        assert tight.warm_start == wide.warm_start


def test_the_summary_has_a_row_a_run_and_the_figures_are_drawn(swept: Path) -> None:
    draw([swept], swept / "plots", swept / "summary.json")
    rows = json.loads((swept / "summary.json").read_text())
    assert len(rows) == 4
    assert all(tuple(row) == FIELDS for row in rows)
    assert all(row["rollout_tokens_per_s"] > 0 and row["cache_bytes_per_sequence"] > 0 for row in rows)
    figures = {path.suffix for path in (swept / "plots").iterdir()}
    assert {".png", ".svg"} <= figures


def test_resume_runs_what_is_missing_and_leaves_the_rest(swept: Path) -> None:
    kept, removed = "hybrid_length3_budget4_seed0", "mla_length3_budget7_seed0"
    before = (swept / kept / "metrics.jsonl").read_bytes()
    shutil.rmtree(swept / removed)
    states = {(event.run, event.state) for event in sweep(grid(), swept, resume=True)}
    assert (removed, "finished") in states
    assert (kept, "warm start") not in states
    assert (swept / kept / "metrics.jsonl").read_bytes() == before
    assert read_run(swept / removed).state == "finished"


def test_a_sweep_refuses_a_folder_with_finished_runs_and_touches_nothing(swept: Path) -> None:
    before = sorted(path for path in swept.rglob("*"))
    with pytest.raises(UserError, match="finished"):
        list(sweep(grid(), swept))
    assert sorted(path for path in swept.rglob("*")) == before


def test_cells_that_fail_are_named_and_do_not_stop_the_others(swept: Path, tmp_path: Path) -> None:
    assert swept.is_dir()  # Ray is up
    run = grid().run.model_dump(exclude_unset=True)
    run["warm_start"] = {"target_pass_rate": 0.9, "max_steps": 1}
    failing = grid(architectures=["hybrid"], budget_ratios=[1.0, 2.0], run=run)
    with pytest.raises(UserError, match=r"2 of the runs failed.*warm_start.max_steps"):
        list(sweep(failing, tmp_path / "failing"))
    assert {run.state for run in find_runs([tmp_path / "failing"])} == {"failed"}


def test_more_cpus_than_the_cluster_has_is_said_at_once(swept: Path, tmp_path: Path) -> None:
    assert swept.is_dir()
    run = grid().run.model_dump(exclude_unset=True)
    run["learner"] = {"num_cpus": 512}
    with pytest.raises(UserError, match="512"):
        list(sweep(grid(architectures=["hybrid"], run=run), tmp_path / "too_large"))
    assert not (tmp_path / "too_large").exists()
