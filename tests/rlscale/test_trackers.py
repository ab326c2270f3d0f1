"""Trackers: one config line, an error before the run starts, and never the end of a run."""

from __future__ import annotations

import importlib.machinery
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rlscale.config import RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.runs import RunFolder
from rlscale.runs.trackers import check_trackers
from rlscale.sweep import check, run_one


class HostedRun:
    """What `init` of wandb 0.31 and trackio 0.43 gives: `log` with a step, and `finish`."""

    def __init__(self, project: str, name: str, group: str, config: dict[str, Any]):
        self.place = (project, name, group)
        self.config = config
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False
        self.broken = False

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("the service is gone")
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def hosted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[HostedRun]]:
    """A tracker's package as if installed: its name, and the runs that it was asked for."""
    runs: list[HostedRun] = []

    def init(**keywords: Any) -> HostedRun:
        runs.append(HostedRun(**keywords))
        return runs[-1]

    package = ModuleType(request.param)
    package.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    package.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, request.param, package)
    return request.param, runs


def config(*trackers: str) -> RunConfig:
    return parse_config(RunConfig, {"trackers": list(trackers)})


def test_one_line_sends_every_finite_scalar_of_training_and_evaluation(
    tmp_path: Path, hosted: tuple[str, list[HostedRun]]
) -> None:
    name, runs = hosted
    with RunFolder.create(tmp_path / "sweep" / "cell", config("tensorboard", name)) as run:
        run.log_evaluation(0, {"pass_rate": 0.25, "pass_rates": [0.0, 0.5]})
        run.log_metrics(1, {"reward_mean": 0.5, "entropy": math.nan, "staleness_histogram": [3]})
        run.finish({})
    (tracked,) = runs
    assert tracked.place == ("rlscale", "cell", "sweep")
    assert tracked.config["trackers"] == ["tensorboard", name]
    assert tracked.logged == [(0, {"evaluation/pass_rate": 0.25}), (1, {"train/reward_mean": 0.5})]
    assert tracked.finished
    assert list((tmp_path / "sweep" / "cell" / "tensorboard").iterdir())


def test_without_trackers_a_run_writes_its_folder_alone(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", config()) as run:
        run.log_metrics(1, {"reward_mean": 0.5})
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_service_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, hosted: tuple[str, list[HostedRun]]
) -> None:
    name, runs = hosted
    with RunFolder.create(tmp_path / "run", config(name)) as run:
        run.log_metrics(1, {"reward_mean": 0.5})
        runs[0].broken = True
        with pytest.warns(UserWarning, match=f"{name} gets no more of this run: the service is gone"):
            run.log_metrics(2, {"reward_mean": 0.6})
        run.log_metrics(3, {"reward_mean": 0.7})
        run.finish({})
    assert [step for step, _ in runs[0].logged] == [1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_service_that_does_not_let_a_run_begin_is_one_line_and_leaves_no_folder(
    tmp_path: Path, hosted: tuple[str, list[HostedRun]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> HostedRun:
        raise RuntimeError("no login\nfound")

    name, _ = hosted
    monkeypatch.setattr(sys.modules[name], "init", init)
    with pytest.raises(UserError, match=rf"{name} cannot start \(no login found\): set it up, or remove it"):
        RunFolder.create(tmp_path / "run", config(name))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None if package == name else True)
    reason = f"trackers has {name}, which is not installed: pip install {name}, or remove it"
    with pytest.raises(UserError, match=reason):
        check(config("tensorboard", name))
    with pytest.raises(UserError, match=reason):
        next(run_one(config(name), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    check_trackers(["tensorboard"])


def test_a_tracker_that_nobody_knows_is_refused_by_the_config() -> None:
    with pytest.raises(UserError, match=r"trackers.*'tensorboard', 'wandb' or 'trackio'"):
        config("mlflow")
